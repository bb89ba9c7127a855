"""Which heads, neurons and layers matter least, from one pass over the calibration data or from the weights.

The score of a head or a neuron is how much its columns of the following projection contribute: the square of their
weights, with ``activation`` each times the mean square of its input (Wanda's score, arXiv 2306.11695, summed over a
part). Layers are removed whose output is most similar to their input, by the mean cosine over tokens (ShortGPT, Men et
al., arXiv 2403.03853), or at even distances (:mod:`regard.compression.pruning.layer_drop`).

Every layer loses the same number of heads and neurons, so that formats with one size for all layers can hold the
result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.compression.calibration import all_statistics
from regard.compression.layers import Run
from regard.compression.pruning.anatomy import Cut, Host, Layer
from regard.compression.pruning.layer_drop import even_layers
from regard.compression.pruning.steps import Structured
from regard.contract import Unsupported

if TYPE_CHECKING:
    from jaxtyping import Float


def choose(
    host: Host, step: Structured, batches: Sequence[Any], run: Run, kept: frozenset[int] = frozenset()
) -> list[Cut]:
    """Choose what to remove from each layer.

    Args:
        batches: for scores by activation.
        kept: numbers of layers that stay whole.

    Raises:
        Unsupported: for more layers than can be removed, and parts that cannot be removed.
    """
    layers = host.layers
    gone: set[int] = set()
    if step.layers:
        if step.layers >= len(layers) or step.layers > len(layers) - len(kept):
            raise Unsupported(
                f"layers={step.layers} of {len(layers)} layers",
                supported=f"fewer than {len(layers)} layers"
                + (f", {len(kept)} of which are to stay unchanged" if kept else ""),
            )
        free = [i for i in range(len(layers)) if i not in kept]
        if step.layers_by == "even":
            gone = {free[i] for i in even_layers(len(free), step.layers)}
        else:
            likeness = layer_likeness(host, batches, run)
            gone = set(sorted(free, key=lambda i: -likeness[i])[: step.layers])
    squares: dict[nn.Module, Tensor] = {}
    if step.by == "activation" and (step.heads or step.neurons):
        watched = {
            f"{i} {name}": linear for i, layer in enumerate(layers) for name, linear in _projections(layer).items()
        }
        found = all_statistics(host.model, watched, batches, run, second=False)
        squares = {watched[name]: one.squares / one.rows for name, one in found.items()}
    cuts = []
    for i, layer in enumerate(layers):
        if i in gone or i in kept:
            cuts.append(Cut(layer=i in gone))
            continue
        parts: dict[str, tuple[int, ...]] = {}
        for what, share, width in (("heads", step.heads, layer.group * layer.width), ("neurons", step.neurons, 1)):
            if not share:
                continue
            if what in layer.fixed:
                raise Unsupported(f"taking {what} out of {layer.name}: {layer.fixed[what]}", supported="layers=...")
            linear = _projections(layer).get(what)
            if linear is not None:
                scores = part_scores(linear, width, squares.get(linear))
                parts[what] = tuple(scores.argsort(stable=True)[: round(share * len(scores))].tolist())
        cuts.append(Cut(**parts))  # type: ignore[arg-type]
    return cuts


def part_scores(linear: nn.Linear, width: int, squares: Float[Tensor, " k"] | None = None) -> Float[Tensor, " parts"]:
    """How much each part of `width` columns contributes; `squares` are the mean squares of the inputs, 1 when None."""
    added = linear.weight.detach().double().square().sum(0)
    if squares is not None:
        added = added * squares.to(added)
    return added.view(-1, width).sum(1)


def layer_likeness(host: Host, batches: Sequence[Any], run: Run) -> list[float]:
    """The mean cosine between the input and the output of each layer."""
    sums, counts = torch.zeros(len(host.layers), dtype=torch.float64), [0] * len(host.layers)

    def watch(i: int, given: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        x = given[0] if given else named["hidden_states"]
        y = getattr(output, "output", output)
        y = y[0] if isinstance(y, tuple) else y
        cosines = F.cosine_similarity(x.detach().float(), y.detach().float(), dim=-1)
        sums[i] += cosines.sum().double()
        counts[i] += cosines.numel()

    with ExitStack() as hooks, torch.no_grad():
        for i, layer in enumerate(host.layers):
            hooks.callback(
                layer.module.register_forward_hook(
                    lambda _, given, named, output, i=i: watch(i, given, named, output), with_kwargs=True
                ).remove
            )
        for batch in batches:
            run(host.model, batch)
    return [float(total) / max(count, 1) for total, count in zip(sums, counts, strict=True)]


def _projections(layer: Layer) -> dict[str, nn.Linear]:
    found = {"heads": layer.output, "neurons": layer.down}
    return {name: linear for name, linear in found.items() if linear is not None}
