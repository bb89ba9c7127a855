"""Costs of networks in parameters, FLOPs or milliseconds, and the budget that they have to keep.

A cost is modelled as a constant per width (in an encoder-decoder, per pair of widths) plus an amount per layer, which is
exact for parameters and FLOPs and approximate for times. So a few networks are measured, and the amounts that fit them
best give the costs of all networks in the space. For times this is an estimate: :mod:`regard.workbench.search.run` measures the
candidates for the final choice as whole networks, next to the reference.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from regard import backends
from regard.contract import Unsupported
from regard.measurement import units
from regard.measurement.flops import flop_counter
from regard.measurement.timing import Timing, calm_clock, interleaved
from regard.models import count_parameters
from regard.tasks import Task
from regard.training.step import batch_context, run_model
from regard.workbench.comparison.task_models import build
from regard.workbench.search.space import Genes, Space

UNITS = {
    **dict.fromkeys(("ms", "milliseconds", "time"), "milliseconds"),
    **dict.fromkeys(("flop", "flops"), "flops"),
    **dict.fromkeys(("parameter", "parameters", "params"), "parameters"),
}
FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
FORM = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%?)\s*([kMGT]?)\s*([a-zA-Z]+)\s*")
ACCEPTED = "what a network may cost: 60% time, 60% flops, 4.5ms, 20M flops or 300k parameters"


@dataclass(frozen=True)
class NetworkBudget:
    """The highest cost that a network may have.

    Attributes:
        unit: ``milliseconds`` or ``flops`` for reading one item, or ``parameters``.
        amount: the limit, in the unit or as a share of the cost of the first mechanism's largest network.
        share: whether the amount is such a share.
    """

    unit: str
    amount: float
    share: bool = False

    @classmethod
    def parse(cls, text: str) -> NetworkBudget:
        """Parse a positive share or an amount with a unit; raises Unsupported for anything else."""
        match = FORM.fullmatch(text)
        unit = None if match is None else UNITS.get(match[4].lower())
        if match is None or unit is None or float(match[1]) <= 0:
            raise Unsupported(f"budget {text!r} of a network", supported=ACCEPTED, nearest="60% time")
        if match[2]:
            if match[3]:
                raise Unsupported(
                    f"budget {text!r} of a network", supported=ACCEPTED, nearest=f"{match[1]}% {match[4]}"
                )
            return cls(unit, float(match[1]) / 100, True)
        if match[4].lower() == "time":
            raise Unsupported(f"budget {text!r} without a unit", supported=ACCEPTED, nearest=f"{match[1]}ms")
        return cls(unit, float(match[1]) * FACTORS[match[3]])

    def limit(self, reference: float) -> float:
        """The highest allowed cost, given the cost of the reference network."""
        return self.amount * reference if self.share else self.amount

    def __str__(self) -> str:
        if self.share:
            return f"{100 * self.amount:.4g}% of the {WORDS[self.unit]} of the reference"
        return worded(self.unit, self.amount)


WORDS = {"milliseconds": "time", "flops": "FLOPs", "parameters": "parameters"}


def worded(unit: str, value: float) -> str:
    """A cost with its unit."""
    if unit == "milliseconds":
        return units.milliseconds(value)
    return f"{units.count(value)} {WORDS[unit]}" if unit == "flops" else f"{value:,.0f} {WORDS[unit]}"


Measure = Callable[[Sequence[Genes]], Sequence[float]]
"""Measures the costs of networks."""


class CostTable:
    """The cost of every network in a space, from amounts for its layers.

    Args:
        space: the networks.
        amounts: by (width, stack, mechanism, heads, feed-forward width, ...) of a layer, and by (width,) for the constant,
            all given as indices of choices; an encoder-decoder has two widths.
    """

    def __init__(self, space: Space, amounts: Mapping[tuple[Any, ...], float]) -> None:
        self.space, self.amounts = space, dict(amounts)

    @classmethod
    def of(cls, space: Space, measure: Measure) -> CostTable:
        """Fit the amounts to measurements of the networks in :meth:`design`, by least squares for each width."""
        networks = cls.design(space)
        costs = np.asarray(measure(networks), dtype=np.float64)
        amounts: dict[tuple[Any, ...], float] = {}
        for widths in _widths(space):
            rows = [i for i, genes in enumerate(networks) if tuple(genes[at] for at in space.widths) == widths]
            parts = [_parts(space, networks[i]) for i in rows]
            names = list(dict.fromkeys(itertools.chain.from_iterable(parts)))
            counts = np.array([[part.count(name) for name in names] for part in parts], dtype=np.float64)
            found = np.linalg.lstsq(counts, costs[rows], rcond=None)[0]
            amounts |= dict(zip(names, found.tolist(), strict=True))
        return cls(space, amounts)

    @staticmethod
    def design(space: Space) -> list[Genes]:
        """Networks that determine the amounts: for every width, each kind of layer filling a stack, at two depths."""
        found = []
        for stack in space.stacks:
            own = {at: gene.kind for at, gene in enumerate(space.genes) if gene.stack == stack.name}
            choices = {kind: range(len(space.genes[at].choices)) for at, kind in own.items()}
            depth = space.at(stack.depth)
            ends = dict.fromkeys((0, len(space.genes[depth].choices) - 1))
            for widths, end in itertools.product(_widths(space), ends):
                for chosen in itertools.product(*choices.values()):
                    layer = dict(zip(choices, chosen, strict=True))
                    numbers = {at: layer[kind] for at, kind in own.items()}
                    numbers |= {depth: end} | dict(zip(space.widths, widths, strict=True))
                    found.append(space.canonical(tuple(numbers.get(at, 0) for at in range(len(space.genes)))))
        return list(dict.fromkeys(found))

    def __call__(self, genes: Genes) -> float:
        return sum(self.amounts[part] for part in _parts(self.space, genes))

    def cheapest(self, space: Space) -> Genes:
        """The network with the lowest cost in a part of the space."""
        best: tuple[float, Genes] | None = None
        depths = [space.at(name) for name in dict.fromkeys(stack.depth for stack in space.stacks)]
        outer = [*space.widths, *depths]
        for chosen in itertools.product(*(space.allowed[at] for at in outer)):
            numbers = [left[0] for left in space.allowed]
            for at, number in zip(outer, chosen, strict=True):
                numbers[at] = number
            widths = chosen[: len(space.widths)]
            for places in _layers(space):
                offered = itertools.product(*(space.allowed[at] for at in places))
                part = (*widths, space.genes[places[0]].stack)
                least = min(offered, key=lambda layer, part=part: self.amounts[(*part, *layer)])  # type: ignore[misc]
                for at, number in zip(places, least, strict=True):
                    numbers[at] = number
            genes = space.canonical(tuple(numbers))
            cost = self(genes)
            if best is None or cost < best[0]:
                best = cost, genes
        assert best is not None
        return best[1]


def _widths(space: Space) -> list[tuple[int, ...]]:
    """Every choice of the widths, as indices."""
    return list(itertools.product(*(range(len(space.genes[at].choices)) for at in space.widths)))


def _layers(space: Space) -> list[tuple[int, ...]]:
    """The gene indices of each layer."""
    named: dict[tuple[str, int], list[int]] = {}
    for at, gene in enumerate(space.genes):
        if gene.layer >= 0:
            named.setdefault((gene.stack, gene.layer), []).append(at)
    return [tuple(places) for places in named.values()]


def _parts(space: Space, genes: Genes) -> list[tuple[Any, ...]]:
    """The keys of a network's amounts in a table: the constant of its widths, and its layers."""
    active, widths = space.active(genes), tuple(genes[at] for at in space.widths)
    found: list[tuple[Any, ...]] = [widths]
    for places in _layers(space):
        if active[places[0]]:
            found.append((*widths, space.genes[places[0]].stack, *(genes[at] for at in places)))
    return found


def parameters(space: Space, networks: Sequence[Genes]) -> list[float]:
    """The number of parameters of each network."""
    return [float(count_parameters(space.config(genes))) for genes in networks]


def flops(space: Space, networks: Sequence[Genes]) -> list[float]:
    """FLOPs of the matrix products and scans with which each network reads one item, including projections, as counted in
    torch's own operators."""
    return [count_flops(build(space.config(genes), 0), space.task) for genes in networks]


@torch.no_grad()
def count_flops(model: nn.Module, task: Task) -> float:
    """FLOPs for reading the first held-out item; gradients of the model's parameters are switched off."""
    batch = next(iter(task.evaluation_batches(1)))
    model.eval().requires_grad_(False)  # torch's counter fails at modules that return a parameter as it is
    # with the same operators on every machine: torch cannot count inside a native kernel
    with backends.only("torch"), flop_counter() as counter:
        run_model(model, batch, batch_context(batch))
    return float(counter.get_total_flops())


def milliseconds(space: Space, networks: Sequence[Genes], *, seconds: float = 0.15, least: int = 5) -> list[float]:
    """The median time in which each network reads one item on this machine; all networks are measured in turns."""
    timed = time_models(
        {str(i): build(space.config(genes), 0) for i, genes in enumerate(networks)}, space, seconds, least
    )
    return [timed[str(i)].median * 1e3 for i in range(len(networks))]


@torch.no_grad()
def time_models(models: Mapping[str, nn.Module], space: Space, seconds: float, least: int = 5) -> dict[str, Timing]:
    """Times for reading one item, measured in turns.

    Args:
        seconds: timing budget per model.
        least: minimum number of turns.
    """
    device = torch.device(space.settings.device)
    batch = next(iter(space.task.evaluation_batches(1))).to(device)
    context = batch_context(batch)
    actions = {name: partial(run_model, model.to(device).eval(), batch, context) for name, model in models.items()}
    return interleaved(
        actions, seconds=seconds * len(models), least=least, most=500, device=device, clock=calm_clock(device)
    )


MEASURES: dict[str, Callable[..., list[float]]] = {
    "parameters": parameters,
    "flops": flops,
    "milliseconds": milliseconds,
}
