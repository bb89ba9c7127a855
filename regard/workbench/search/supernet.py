"""A supernet that contains all networks of a space: each is a leading slice of the same weights.

A network from the space is the model that `regard train` would build for it, called with slices of the supernet's
tensors in place of its own, so it computes exactly what a standalone network with those weights does. What is sliced:

- everything outside the mechanisms (embedding, norms, feed-forward networks, head) is sliced along each axis;
- the projections of queries, keys, values and outputs in attention layers are sliced, and shared by all mechanisms of a
  layer (arXiv 2207.13955): the number of heads only splits the same channels differently;
- other weights of a mechanism are not sliced: a matrix that holds several projections side by side, as in Mamba, would
  be cut in the middle of one. There are separate tensors for each mechanism and each of its shapes.

A smaller depth uses the first layers. A training step follows the sandwich rule (Yu & Huang, arXiv 1903.05134): the
largest network, the smallest, and a few drawn uniformly, with the mean of their losses; without the first two, deep and
wide networks would be trained less often than small ones, and ranked too low.
"""

from __future__ import annotations

import random
import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from regard.contract import Context, Result, Unsupported
from regard.layers.attention import AttentionLayer
from regard.models.losses import add_losses
from regard.workbench.comparison.task_models import build
from regard.workbench.search.space import Genes, Space

MIXER = re.compile(r"(?P<block>(?:\w+\.)*\d+)\.mixer\.(?P<inside>.+)")
SHARED = re.compile(r"(query|key|value|output)\.(weight|bias)")
KEPT = 128
"""Weightless models that are cached, since building one takes about as long as a small step."""


class Supernet(nn.Module):
    """The weights of all networks in a space.

    Args:
        space: the networks.
        seed: seed of the initial weights, and of the networks drawn in training.
        device: a torch device.
        draws: networks per step in addition to the largest and the smallest.
        share: whether mechanisms share the projections of queries, keys, values and outputs.
    """

    def __init__(self, space: Space, seed: int, device: str = "cpu", *, draws: int = 2, share: bool = True) -> None:
        super().__init__()
        self.space, self.seed, self.draws, self.share = space, seed, draws, share
        self.config = SimpleNamespace(loss_weights={})
        self.device = device
        self._models: dict[Genes, nn.Module] = {}
        made: dict[str, Tensor] = {}
        spared: set[str] = set()
        generator = torch.Generator().manual_seed(seed)
        for genes in space.corners():
            model = self._built(genes)
            embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
            for name, parameter in model.named_parameters():
                key = self.key(model, name)
                made[key] = _grown(made.get(key), parameter.detach(), generator)
                if id(parameter) in embeddings or getattr(parameter, "_no_weight_decay", False):
                    spared.add(key)
        self.tensors = nn.ParameterDict({key: nn.Parameter(tensor.to(device)) for key, tensor in made.items()})
        for key in spared:
            self.tensors[key]._no_weight_decay = True

    def key(self, model: nn.Module, name: str) -> str:
        """The supernet's key for the parameter that a network calls `name`."""
        plain = name.replace(".", "/")  # ParameterDict keys must not have dots
        match = MIXER.fullmatch(name)
        if match is None:
            return plain
        block: Any = model.get_submodule(match["block"])
        sliced = isinstance(block.mixer, AttentionLayer) and SHARED.fullmatch(match["inside"])
        if sliced and self.share:
            return plain
        mechanism = block.mixer.card.name if isinstance(block.mixer, AttentionLayer) else block.entry[0]
        options = {k: v for k, v in block.entry[1].items() if k not in ("num_heads", "feed_forward", "memory_layers")}
        own = f"{plain}|{mechanism}{sorted(options.items())}".replace(".", ",")
        return own if sliced else f"{own}|{'x'.join(map(str, model.get_parameter(name).shape))}"

    def slices(self, genes: Genes) -> dict[str, Tensor]:
        """The weights of a network under its own names for them, differentiable with respect to the supernet's."""
        model, found = self.model(genes), {}
        for name, parameter in model.named_parameters():
            whole = self.tensors[self.key(model, name)]
            part = whole[tuple(slice(size) for size in parameter.shape)]
            found[name] = part.contiguous()
        return found

    def model(self, genes: Genes) -> nn.Module:
        """The model of a network; its own weights are unused."""
        if genes not in self._models:
            if len(self._models) >= KEPT:
                self._models.pop(next(iter(self._models)))
            self._models[genes] = self._built(genes).to(self.device)
        return self._models[genes]

    def run(self, genes: Genes, *inputs: Tensor, context: Context) -> Result:
        """Run a network on some inputs with the supernet's weights."""
        model = self.model(genes)
        model.train(self.training)
        return functional_call(model, self.slices(genes), inputs, {"context": context})

    def alone(self, genes: Genes) -> nn.Module:
        """A standalone network with a copy of its weights."""
        model = self._built(genes).to(self.device)
        with torch.no_grad():
            slices = self.slices(genes)
            for name, parameter in model.named_parameters():
                parameter.copy_(slices[name])
        return model

    def drawn(self, step: int) -> list[Genes]:
        """The networks for a training step."""
        rng = random.Random(f"{self.seed} {step}")
        both = [self.space.extreme(rng, largest=largest) for largest in (True, False)]
        return list(dict.fromkeys([*both, *(self.space.draw(rng) for _ in range(self.draws))]))

    def forward(self, *inputs: Tensor, context: Context) -> Result:
        """In training, the output of the largest network, with those of the step's other networks as exits of equal
        weight, so that the mean of their losses is minimised. In evaluation, the output of the largest network."""
        step = int(context.progress or 0)
        first, *others = self.drawn(step)
        result = self.run(first, *inputs, context=context)
        if not self.training:
            return result
        exits = []
        for genes in others:
            other = self.run(genes, *inputs, context=context)
            exits.append((1.0, other.output))
            add_losses(result.losses, other.losses)
        return Result(result.output, None, result.losses, {"exits": exits})

    def _built(self, genes: Genes) -> nn.Module:
        try:
            return build(self.space.config(genes), self.seed)
        except Unsupported as error:
            raise Unsupported(
                f"{self.space.describe(genes)} in a search ({error.asked})",
                supported=error.supported,
                nearest=error.nearest or "other --dims and --heads, or --mechanisms without it",
            ) from None


def _grown(before: Tensor | None, part: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of the larger size in every axis: the larger tensor's numbers, filled up with similar random draws."""
    if before is None:
        return part.clone()
    sizes = [max(a, b) for a, b in zip(before.shape, part.shape, strict=True)]
    larger = before if before.numel() >= part.numel() else part
    if list(larger.shape) == sizes:
        return larger.clone()
    spread = float(larger.std()) if larger.numel() > 1 else 0.0
    grown = torch.empty(sizes, dtype=larger.dtype).normal_(float(larger.mean()), spread, generator=generator)
    grown[tuple(slice(size) for size in larger.shape)] = larger
    return grown
