"""A language model on a sequence split over several ranks: its layers mix over all ranks, the rest works per token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from regard.contract import Context, Mechanism, Result, Unsupported
from regard.core.precision import wide
from regard.distributed.attention import DistributedAttention
from regard.distributed.communicators import Ranks, Traffic, swap
from regard.distributed.layouts import Layout
from regard.distributed.recurrence import DistributedRecurrence
from regard.layers.attention import AttentionLayer
from regard.models.language_model import IGNORED, LanguageModel, next_tokens

if TYPE_CHECKING:
    from jaxtyping import Float, Int

BESIDE = {"training", "generator", "dropout"}
"""Arguments that a layer may pass to its mechanism besides the heads; a dropout that is not 0 is refused."""


class ContextParallel:
    """Training of a :class:`regard.models.LanguageModel` on sequences split over ranks (context parallelism)::

        parallel = ContextParallel(model)  # in each process, with the same weights
        loss = parallel.loss(ids)          # ids of the whole sequences, the same everywhere
        loss.backward()
        parallel.add_gradients()           # sum over the ranks; then step the optimizer, the same everywhere

    Each rank embeds, normalises and projects only its own tokens. Softmax layers attend by
    :class:`DistributedAttention`, recurrent layers pass their states on by :class:`DistributedRecurrence`. On virtual
    ranks the model sees all tokens, and its layers mix them in pieces.

    Short convolutions start from the last tokens of the previous rank.

    Args:
        model: a model with layers of plain softmax attention or of recurrent mechanisms, without dropout or auxiliary
            losses.
        scheme: the scheme of softmax layers.
        ranks, group: as in :class:`DistributedAttention`.

    Raises:
        Unsupported: for other models.
    """

    def __init__(
        self, model: LanguageModel, scheme: str = "ring", *, ranks: int | None = None, group: Any = None
    ) -> None:
        self.model = model
        self.ranks = Ranks.of(ranks, group)
        layers: list[Any] = [block.mixer for block in model.blocks]
        where: dict[str, Any] = {"ranks": ranks, "group": group}
        softmax = [_check_layer(layer) == "softmax" for layer in layers]
        if model.config.dropout or model.insertion.extra_tokens:
            raise Unsupported(
                "context parallelism with dropout or inserted tokens", supported="dropout=0, no landmarks"
            )
        # states and convolutions follow the sequence, which needs one contiguous piece per rank
        self.zigzag = all(softmax) and not any(layer.convolutions for layer in layers)
        self.mixers: list[tuple[AttentionLayer, DistributedAttention | DistributedRecurrence]] = []
        for layer, plain in zip(layers, softmax, strict=True):
            if plain:
                self.mixers.append((layer, DistributedAttention(scheme, zigzag=self.zigzag, **where)))
            else:
                self.mixers.append((layer, DistributedRecurrence(layer.card.name, **where, **vars(layer.config))))

    def layout(self, length: int) -> Layout:
        """The layout of a sequence: which tokens each rank has."""
        return Layout(length, self.ranks.count, self.zigzag)

    def loss(self, ids: Int[Tensor, "b n"], targets: Int[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
        """The mean cross entropy of all targets in nats, the same on every rank. Its gradients are those of this rank's
        tokens only; summed over the ranks they are those of the whole.

        Args:
            ids: the whole sequences.
            targets: as in :meth:`regard.models.LanguageModel.loss`.
        """
        targets = next_tokens(ids) if targets is None else targets
        count = (targets != IGNORED).sum().clamp(min=1)
        places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        length, context = ids.shape[1], Context()
        if self.ranks.group is not None:
            self._check_length(length)
            layout, here = self.layout(length), self.ranks.local[0]
            ids, targets, places = (layout.take(x, here, 1) for x in (ids, targets, places))
            context = Context(positions=places)
        with self._mixing(length):
            result = self.model(ids, context=context)
        if result.losses:
            raise Unsupported(f"auxiliary losses {', '.join(result.losses)}", supported="layers without them")
        logits = wide(result.output).flatten(0, 1)
        own = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum") / count
        if self.ranks.group is None:
            return own
        total = own.detach().clone()
        dist.all_reduce(total, group=self.ranks.group)
        return own + (total - own.detach())

    def add_gradients(self) -> None:
        """Sum the gradients of the model's parameters over the ranks. (`DistributedDataParallel` takes their mean.)"""
        if self.ranks.group is None:
            return
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad, group=self.ranks.group)

    def _check_length(self, length: int) -> None:
        convolutions: list[Any] = [c for layer, _ in self.mixers for c in layer.convolutions]
        widest = max((c.width for c in convolutions), default=1) - 1
        least = min(self.layout(length).size(rank) for rank in range(self.ranks.count))
        if least < widest:
            raise Unsupported(
                f"{least} tokens on a rank whose convolutions look {widest} back",
                supported="longer sequences, fewer ranks",
            )

    @contextmanager
    def _mixing(self, length: int) -> Iterator[None]:
        def mixing(over: DistributedAttention | DistributedRecurrence) -> Any:
            def mix(card: Mechanism, heads: Mapping[str, Tensor], **call: Any) -> Result:
                _check_call(card, call)
                if isinstance(over, DistributedRecurrence):
                    return Result(over(heads, length=length))
                return Result(over(heads["q"], heads["k"], heads["v"], length=length))

            return mix

        hooks = []
        for layer, over in self.mixers:
            layer.mix = mixing(over)
            if self.ranks.group is not None:
                hooks += [c.register_forward_pre_hook(self._begin) for c in layer.convolutions]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, _ in self.mixers:
                del layer.mix

    def _begin(self, convolution: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """A convolution's inputs, with the last tokens of the previous rank as its state."""
        x, lengths, _ = given
        return x, lengths, _Before.apply(self.ranks, convolution.width - 1, x)


class _Before(torch.autograd.Function):
    """The last tokens (B, count, C) of the previous rank; zeros on the first rank."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, count: int, x: Tensor) -> Tensor:
        ctx.ranks, ctx.count, ctx.shape = ranks, count, x.shape
        return _passed(ranks, x[:, x.shape[1] - count :], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        last = _passed(ctx.ranks, grad, -1)
        return None, None, F.pad(last, (0, 0, ctx.shape[1] - ctx.count, 0))


def _passed(ranks: Ranks, x: Tensor, by: int) -> Tensor:
    """Receive the tensor passed on by the rank `by` places before this one; zeros if there is none."""
    (here,) = ranks.local
    target, source = here + by, here - by
    found = torch.zeros_like(x, memory_format=torch.contiguous_format)
    sends = {target: [x]} if 0 <= target < ranks.count else {}
    ranks.run([swap(sends, {source: [found]} if 0 <= source < ranks.count else {})], [Traffic()])
    return found


def _check_layer(layer: Any) -> str:
    """The name of a layer's mechanism, if ranks can share the layer."""
    if type(layer) is not AttentionLayer or layer.merge is not None:
        raise Unsupported(
            f"context parallelism of {getattr(getattr(layer, 'card', None), 'name', type(layer).__name__)}, whose layer mixes "
            "tokens in other ways too",
            supported="softmax, and recurrent mechanisms in the common shell of attention layers",
            nearest="gated_linear",
        )
    if layer.card.name == "softmax" and layer.config != layer.card.config():
        raise Unsupported(f"context parallelism of softmax with {layer.config}", supported="no window, softcap or sink")
    return layer.card.name


def _check_call(card: Mechanism, call: Mapping[str, Any]) -> None:
    known = {"pattern", "config", *BESIDE}
    asked = [name for name, value in call.items() if name not in known and value is not None and value is not False]
    if asked or call.get("dropout"):
        raise Unsupported(
            f"context parallelism of {card.name} with {', '.join(asked or ['dropout'])}",
            supported="whole sequences without masks, positions that are rotary, sinusoidal, learned or none",
        )
