r"""Learned gates remove heads, neurons and branches until a share of the parameters is left (CoFi, arXiv 2204.00408).

Each part has a gate z in [0, 1] with the hard concrete distribution (Louizos et al., arXiv 1712.01312), with u uniform
in (0, 1) and beta = 2/3, gamma = -0.1, zeta = 1.1:

    s = sigmoid((log u - log(1 - u) + log_alpha) / beta)
    z = clip(s (zeta - gamma) + gamma, 0, 1)
    P(z > 0) = sigmoid(log_alpha - beta log(-gamma / zeta))

A head is multiplied by its own gate and that of its layer's attention, a neuron by its own and that of its network. With
`hidden`, one vector of gates, which all layers share, multiplies the dimensions of the residual stream: its start, what
branches add to it, and what norms read from it (section 3.1; z_hidden). Norms are then over the dimensions whose gate is
not 0. With E the expected share of the branches' parameters that stays (each size times P(z > 0) of its gates, and the
mean P(z > 0) of the dimensions), and t the target share,

    loss + lambda_1 (E - t) + lambda_2 (E - t)^2

is minimised over log_alpha (and the model's weights, if they are trained too) and maximised over lambda_1 and lambda_2.
The target share falls linearly from 1 over the first part of the steps.

In the end z = clip(sigmoid(log_alpha) (zeta - gamma) + gamma, 0, 1): parts with gate 0 are cut, other gates are
multiplied into the weights after the part (those of the stream into the weights of norms and of what is added to it),
and the model is compacted.

Deviations: without CoFi's layer-wise distillation, which :mod:`regard.training.distillation` has; gates of the stream are
off by default, and also for models with norms before their branches, where CoFi has only BERT. Shares are of the
parameters of branches, without embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.compression.descent import by_path, saving
from regard.compression.layers import Run, run_batch
from regard.compression.pruning.anatomy import BRANCHES, Cut, Host, Undo, backwards, rows_of
from regard.compression.pruning.checked import compact
from regard.compression.pruning.losses import Losses, item_losses
from regard.compression.pruning.masks import Gates, gated, narrower_norm, stream_gated
from regard.contract import Unsupported, an_instance, at_least
from regard.training.checkpoint import load_checkpoint, restore, save_checkpoint

if TYPE_CHECKING:
    from jaxtyping import Float

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
PARTS = {"heads": "attention", "neurons": "feed_forward"}
HIDDEN = "hidden"
"""Name of the gates of the residual stream."""


def sample_gates(log_alpha: Float[Tensor, "..."], generator: torch.Generator | None = None) -> Float[Tensor, "..."]:
    """Gates from one random draw."""
    u = torch.rand(log_alpha.shape, generator=generator, dtype=log_alpha.dtype).clamp(1e-6, 1 - 1e-6)
    return _stretched(((u / (1 - u)).log() + log_alpha).div(BETA).sigmoid())


def final_gates(log_alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Deterministic gates, as used after training."""
    return _stretched(log_alpha.sigmoid())


def chance_to_stay(log_alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The probability that a gate is not 0."""
    return (log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()


def _stretched(s: Tensor) -> Tensor:
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class LearnedGates(nn.Module):
    """Gates of all parts of a model, except of branches that end in no plain projection to multiply them into.

    Args:
        host: the model, see :func:`regard.compression.pruning.find_host`.
        start: initial log_alpha; 2.2 opens a gate with probability 0.98.
        hidden: whether the dimensions of the residual stream have gates too.

    Raises:
        Unsupported: for a model with norms after its branches, into which gates cannot be multiplied; with `hidden` also
            for a model whose stream cannot become narrower.
    """

    def __init__(self, host: Host, start: float = 2.2, *, hidden: bool = False) -> None:
        super().__init__()
        self._host = (host,)
        self.log_alpha = nn.ParameterDict()
        for i, layer in enumerate(host.layers):
            for branch, end in layer.ends.items():
                if any("Norm" in type(module).__name__ for module in end.modules()):
                    raise Unsupported(
                        f"gates of {layer.name}, which norms what a branch adds", supported="branch_norm='none'"
                    )
                if branch in layer.last and branch not in layer.fixed:
                    self.log_alpha[f"{i} {branch}"] = nn.Parameter(torch.full((), start))
            for part, count in (("heads", layer.units), ("neurons", layer.neurons)):
                if count and part not in layer.fixed:
                    self.log_alpha[f"{i} {part}"] = nn.Parameter(torch.full((count,), start))
        if hidden:
            for norm in host.stream().norms:
                _check_factors(norm)
            compact(host, [Cut()] * len(host.layers), (0,))()
            self.log_alpha[HIDDEN] = nn.Parameter(torch.full((host.stream().width,), start))

    @property
    def host(self) -> Host:
        """The model."""
        return self._host[0]

    def _by_layer(self, make: Callable[[Tensor], Tensor]) -> dict[int, Gates]:
        names = (*PARTS, *BRANCHES)
        found: dict[int, Gates] = {}
        for i in range(len(self.host.layers)):
            own = {name: make(self.log_alpha[f"{i} {name}"]) for name in names if f"{i} {name}" in self.log_alpha}
            found[i] = Gates(**own)
        return found

    @contextmanager
    def applied(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """Apply gates to the model within the context: a random draw in training mode of this module, else final."""
        make = (lambda alpha: sample_gates(alpha, generator)) if self.training else final_gates
        with ExitStack() as contexts:
            contexts.enter_context(gated(self.host.layers, self._by_layer(make)))
            if HIDDEN in self.log_alpha:
                contexts.enter_context(stream_gated(self.host, make(self.log_alpha[HIDDEN])))
            yield

    def expected_share(self) -> Float[Tensor, ""]:
        """The expected share of the parameters of branches that stay."""
        stays = {name: chance_to_stay(alpha) for name, alpha in self.log_alpha.items()}
        kept, whole = torch.zeros(()), 0
        for i, layer in enumerate(self.host.layers):
            for part, branch in PARTS.items():
                if branch in layer.ends:
                    size = layer.parameters(branch)
                    whole += size
                    own = [stays[name].mean() for name in (f"{i} {branch}", f"{i} {part}") if name in stays]
                    kept = kept + size * (torch.stack(own).prod() if own else 1.0)
        if HIDDEN in stays:
            kept = kept * stays[HIDDEN].mean()
        return kept / max(whole, 1)

    @torch.no_grad()
    def cuts(self) -> list[Cut]:
        """The cuts that the final gates amount to."""
        found = []
        for gates in self._by_layer(final_gates).values():
            closed = {
                p: tuple((g == 0).nonzero()[:, 0].tolist()) for p in PARTS if (g := getattr(gates, p)) is not None
            }
            gone = {b: g is not None and not bool(g) for b in BRANCHES for g in [getattr(gates, b)]}
            found.append(Cut(**closed, **gone))  # type: ignore[arg-type]
        return found

    @torch.no_grad()
    def closed(self) -> tuple[int, ...]:
        """Numbers of the dimensions of the residual stream that the final gates remove."""
        if HIDDEN not in self.log_alpha:
            return ()
        return tuple((final_gates(self.log_alpha[HIDDEN]) == 0).nonzero()[:, 0].tolist())

    @torch.no_grad()
    def finish(self) -> Undo:
        """Multiply the final gates into the weights, and make the model smaller, in place, with the same outputs.

        Raises:
            Unsupported: if the model cannot be made smaller by these gates; it is then as it was.
        """
        undo: list[Undo] = []
        try:
            for i, gates in self._by_layer(final_gates).items():
                for part, branch in PARTS.items():
                    last = self.host.layers[i].last.get(branch)
                    inputs, output = getattr(gates, part), getattr(gates, branch)
                    if last is not None and inputs is not None:
                        each = inputs.repeat_interleave(last.in_features // len(inputs))
                        undo.append(_multiplied(last.weight, each, 1))
                    if last is not None and output is not None and float(output):
                        undo += [_multiplied(parameter, output, axis) for parameter, axis in rows_of(last)]
            if HIDDEN in self.log_alpha:
                factors = final_gates(self.log_alpha[HIDDEN])
                undo += [_multiplied(parameter, factors, axis) for parameter, axis in self.host.stream().scales]
            undo.append(compact(self.host, self.cuts(), self.closed()))
        except Unsupported:
            backwards(undo)()
            raise
        return backwards(undo)


@torch.no_grad()
def _check_factors(norm: nn.Module) -> None:
    """Raise Unsupported unless factors of a norm's output can be multiplied into its parameters."""
    parameters = dict(norm.named_parameters())
    x = torch.randn_like(next(iter(parameters.values())))
    halved = narrower_norm(norm, torch.arange(len(x)))
    for name, parameter in parameters.items():
        setattr(halved, name, parameter / 2)
    if not torch.allclose(halved.forward(x), norm(x) / 2, rtol=1e-2, atol=1e-4):
        raise Unsupported(
            f"gates of a residual stream under {an_instance(norm)}, whose output is not a multiple of its weight",
            supported="norms that multiply by their weight, such as LayerNorm and RMSNorm",
        )


def _multiplied(parameter: Tensor, factors: Tensor, axis: int) -> Undo:
    """Multiply factors along an axis, or one for all, into a parameter."""
    before = parameter.detach().clone()
    parameter.mul_(factors.to(parameter).view(-1, *[1] * (parameter.ndim - 1 - axis)))

    def undo() -> None:
        with torch.no_grad():
            parameter.copy_(before)

    return undo


@dataclass(frozen=True)
class Step:
    """A step of :func:`learn_gates`.

    Attributes:
        loss: loss of the model with sampled gates.
        share: expected share of the parameters that stay.
        asked: target share of this step.
    """

    loss: float
    share: float
    asked: float


def learn_gates(
    host: Host,
    batches: Callable[[int], Any],
    share: float,
    steps: int,
    *,
    rate: float = 0.1,
    price_rate: float = 0.5,
    model_rate: float = 0.0,
    warmup: float = 0.3,
    run: Run = run_batch,
    losses: Losses = item_losses,
    hidden: bool = False,
    seed: int = 0,
    file: Path | None = None,
    on_step: Callable[[int, Step], None] = lambda step, found: None,
) -> LearnedGates:
    """Learn gates until only a share of the parameters of branches stays.

    Args:
        batches: returns the batch of a step.
        share: share of the parameters to keep, in (0, 1).
        rate, price_rate: Adam's learning rates for log_alpha and lambda. The slower lambda changes, the longer the
            share oscillates.
        model_rate: Adam's learning rate for the model's own weights; 0 leaves them as they are.
        warmup: part of the steps over which the target share falls from 1.
        hidden: whether the residual stream may become narrower too.
        seed: seed of the random draws.
        file: where the state is saved every minute, on interruption, and at the end, for the same call to resume from.
        on_step: called after each step.

    Returns:
        The gates in evaluation mode; ``finish()`` makes the model smaller.
    """
    if not 0 < share < 1:
        raise Unsupported(f"share={share}", supported="0 < share < 1", nearest="share=0.5")
    at_least("steps", steps, 1)
    gates = LearnedGates(host, hidden=hidden)
    prices = nn.Parameter(torch.zeros(2))
    groups = [{"params": list(gates.parameters()), "lr": rate}, {"params": [prices], "lr": price_rate}]
    trained: dict[str, nn.Parameter] = {**gates.log_alpha, "prices": prices}
    if model_rate:
        own = {f"model {name}": p for name, p in host.model.named_parameters() if p.requires_grad}
        groups.append({"params": list(own.values()), "lr": model_rate})
        trained |= own
    optimizer, state, done = torch.optim.Adam(groups), by_path(trained), 0
    if file is not None and file.is_file():
        checkpoint = load_checkpoint(file)
        restore(checkpoint, state, optimizer)
        done = int(checkpoint.record["steps"])

    def keep() -> None:
        if file is not None and done:
            save_checkpoint(file, state, optimizer, {"steps": done})

    with saving(keep) as save_in_time:
        while done < steps:
            asked = 1 - (1 - share) * min(1.0, (done + 1) / max(warmup * steps, 1))
            optimizer.zero_grad()
            with gates.applied(torch.Generator().manual_seed((seed << 32) + done)):
                loss = losses(host.model, batches(done), run).mean()
            found = gates.expected_share()
            gap = found - asked
            (loss + prices[0] * gap + prices[1] * gap.square()).backward()
            assert prices.grad is not None
            prices.grad.neg_()  # gradient ascent: prices rise as long as too much stays
            optimizer.step()
            done += 1
            on_step(done - 1, Step(float(loss.detach()), float(found.detach()), asked))
            save_in_time()
    host.model.zero_grad()
    return gates.eval()
