"""The space of networks: genes, each a choice among few, and the models that they stand for.

A network has one width, and in each of its stacks a number of layers; each layer has a mechanism, a number of heads and,
where the stack's blocks have one, a feed-forward network of some hidden width. Genes of layers beyond the number of layers
are silent: two networks that differ in those alone are the same, and :meth:`Space.canonical` spells both alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regard.contract import Pattern, Unsupported, at_least
from regard.models.variants import Layers, Variant, written_layers
from regard.tasks import Task
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.task_models import model_config

Genes = tuple[int, ...]
"""For each gene of a space the number of its choice."""


@dataclass(frozen=True)
class Stack:
    """Layers of a network that read the same sequence.

    Attributes:
        name: what its genes are called by.
        pattern: of its mechanisms.
        depth: name of the gene that says how many layers it has.
        feed_forward: whether its blocks have a feed-forward network.
    """

    name: str
    pattern: Pattern
    depth: str = "depth"
    feed_forward: bool = True


ENCODER, DECODER, CROSS = "encoder", "decoder", "cross"


def stacks_of(pattern: Pattern) -> tuple[Stack, ...]:
    """The stacks of a model for tasks of a pattern: in causal-cross those of an encoder-decoder; in noncausal-cross, as in
    comparisons, the layers between the two sequences."""
    if pattern is not Pattern.CAUSAL_CROSS:
        return (Stack("layer", pattern),)
    return (
        Stack(ENCODER, Pattern.NONCAUSAL_SELF, depth="encoder depth"),
        Stack(DECODER, Pattern.CAUSAL_SELF, feed_forward=False),
        Stack(CROSS, Pattern.CAUSAL_CROSS),
    )


@dataclass(frozen=True)
class Gene:
    """One choice.

    Attributes:
        name: ``dim``, ``depth``, ``layer 2 mechanism``.
        choices: what may be chosen, the smallest first where they are sizes.
        kind: ``dim``, ``depth``, ``mechanism``, ``heads`` or ``feed_forward``.
        stack: of a layer's gene; "" of the others.
        layer: its number from 0, of a layer's gene; -1 of the others.
    """

    name: str
    choices: tuple[Any, ...]
    kind: str
    stack: str = ""
    layer: int = -1


@dataclass(frozen=True)
class Layer:
    """What a layer has been chosen to be; `feed_forward` is None in stacks without."""

    mechanism: str
    heads: int
    feed_forward: int | None


@dataclass(frozen=True)
class Network:
    """A network in words and numbers: its width, and the layers of each stack."""

    dim: int
    stacks: Mapping[str, tuple[Layer, ...]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "dim": self.dim,
            **{name: [dataclasses.asdict(layer) for layer in layers] for name, layers in self.stacks.items()},
        }


@dataclass(frozen=True)
class Choices:
    """What a search chooses among.

    Attributes:
        mechanisms: one-layer variants, as :func:`regard.models.variants.read_variant` reads them.
        dims, depths, heads, feed_forward: numbers, of which each network has one width, each stack one depth, and each layer
            one of the others.
    """

    mechanisms: tuple[Variant, ...]
    dims: tuple[int, ...] = (32, 64)
    depths: tuple[int, ...] = (2, 3, 4)
    heads: tuple[int, ...] = (2, 4)
    feed_forward: tuple[int, ...] = (64, 128)

    def __post_init__(self) -> None:
        if not self.mechanisms:
            raise Unsupported("a search among no mechanisms", supported="one or more names from `regard list`")
        names = [variant.name for variant in self.mechanisms]
        for variant in self.mechanisms:
            if len(variant.layers) != 1:
                raise Unsupported(
                    f"{variant.name} as a choice for one layer", supported="a mechanism, with options or without"
                )
            for option in ("num_heads", "feed_forward"):
                if option in variant.options:
                    raise Unsupported(
                        f"option {option!r} of {variant.name} in a search, which chooses it",
                        supported="--heads and --feed-forward",
                    )
        if len(set(names)) < len(names):
            raise Unsupported(f"mechanisms {', '.join(names)}", supported="each mechanism once")
        for name in ("dims", "depths", "heads", "feed_forward"):
            values = tuple(sorted(set(getattr(self, name))))
            if not values:
                raise Unsupported(f"no {name}", supported="one or more whole numbers")
            at_least(name, values[0], 1)
            object.__setattr__(self, name, values)
        for dim, heads in itertools.product(self.dims, self.heads):
            if dim % heads:
                raise Unsupported(
                    f"a width of {dim} with {heads} heads",
                    supported="widths that are multiples of all numbers of heads",
                    nearest=f"--dims {math.ceil(dim / heads) * heads}",
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Mechanisms to choose from, by name."""
        return tuple(variant.name for variant in self.mechanisms)


class Space:
    """The networks for a task among some choices.

    Args:
        task: says what goes in and out.
        choices: see :class:`Choices`.
        settings: of the models around the chosen layers; its frame is the first.
        allowed: for each gene the numbers of the choices that are left; all when None.

    Attributes:
        genes: one for the width, then for each stack its depth (once for stacks that share it), and for each of its layers the
            mechanism, the heads and the feed-forward width.
    """

    def __init__(
        self,
        task: Task,
        choices: Choices,
        settings: CompareSettings,
        allowed: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        self.task, self.choices, self.settings = task, choices, settings
        self.stacks = stacks_of(task.pattern)
        for stack, variant in itertools.product(self.stacks, choices.mechanisms):
            for card in variant.cards:
                card.require_pattern(stack.pattern)
        genes = [Gene("dim", choices.dims, "dim")]
        for depth in dict.fromkeys(stack.depth for stack in self.stacks):
            genes.append(Gene(depth, choices.depths, "depth"))
        for stack, layer in itertools.product(self.stacks, range(choices.depths[-1])):
            offered: dict[str, tuple[Any, ...]] = {"mechanism": choices.names, "heads": choices.heads}
            if stack.feed_forward:
                offered["feed_forward"] = choices.feed_forward
            genes += [
                Gene(f"{stack.name} {layer + 1} {kind}", values, kind, stack.name, layer)
                for kind, values in offered.items()
            ]
        self.genes = tuple(genes)
        self.allowed = tuple(tuple(range(len(g.choices))) for g in genes) if allowed is None else tuple(allowed)
        self._at = {gene.name: i for i, gene in enumerate(self.genes)}
        self._depth_of = {stack.name: self._at[stack.depth] for stack in self.stacks}

    def at(self, name: str) -> int:
        """The place of a gene."""
        return self._at[name]

    def active(self, genes: Genes) -> tuple[bool, ...]:
        """Which genes count: those of the width, the depths, and the layers that there are."""
        return tuple(gene.layer < 0 or gene.layer < self._depth(genes, gene.stack) for gene in self.genes)

    def canonical(self, genes: Genes) -> Genes:
        """The same network, with silent genes at their first choice."""
        return tuple(number if counts else 0 for number, counts in zip(genes, self.active(genes), strict=True))

    def nearest(self, genes: Genes) -> Genes:
        """The network with the first choice that is left for each gene whose choice is not."""
        kept = tuple(n if n in left else left[0] for n, left in zip(genes, self.allowed, strict=True))
        return self.canonical(kept)

    def network(self, genes: Genes) -> Network:
        """What the genes stand for."""
        stacks = {}
        for stack in self.stacks:
            layers = []
            for layer in range(self._depth(genes, stack.name)):
                chosen = {
                    kind: self._chosen(genes, f"{stack.name} {layer + 1} {kind}") for kind in ("mechanism", "heads")
                }
                width = self._chosen(genes, f"{stack.name} {layer + 1} feed_forward") if stack.feed_forward else None
                layers.append(Layer(**chosen, feed_forward=width))
            stacks[stack.name] = tuple(layers)
        return Network(self._chosen(genes, "dim"), stacks)

    def genes_of(self, network: Network) -> Genes:
        """The canonical genes of a network; the inverse of :meth:`network`.

        Raises:
            Unsupported: for a network that is not of this space.
        """
        wanted: dict[str, Any] = {"dim": network.dim}
        for stack in self.stacks:
            layers = network.stacks.get(stack.name, ())
            wanted[stack.depth] = len(layers)
            for i, layer in enumerate(layers):
                wanted |= {f"{stack.name} {i + 1} {kind}": value for kind, value in dataclasses.asdict(layer).items()}
        try:
            found = tuple(gene.choices.index(wanted[gene.name]) if gene.name in wanted else 0 for gene in self.genes)
        except ValueError:
            raise Unsupported(f"the network {network.as_dict()}", supported="networks of the space") from None
        return self.canonical(found)

    def holds(self, genes: Genes) -> bool:
        """Whether all choices that count are left."""
        return all(
            number in left or not counts
            for number, left, counts in zip(genes, self.allowed, self.active(genes), strict=True)
        )

    def restricted(self, left: Mapping[str, Sequence[int]]) -> Space:
        """The part of the space in which some genes, by name or by kind, have fewer choices left."""
        allowed = []
        for gene, before in zip(self.genes, self.allowed, strict=True):
            wanted = left.get(gene.name, left.get(gene.kind))
            kept = before if wanted is None else tuple(number for number in before if number in wanted)
            if not kept:
                raise Unsupported(f"a space without a choice for {gene.name}", supported="at least one choice")
            allowed.append(kept)
        return Space(self.task, self.choices, self.settings, allowed)

    @property
    def size(self) -> int:
        """The number of networks."""
        count = len(self.allowed[self.at("dim")])
        for depth in dict.fromkeys(stack.depth for stack in self.stacks):
            total = 0
            for number in self.allowed[self.at(depth)]:
                layers = self.choices.depths[number]
                total += math.prod(
                    len(left)
                    for gene, left in zip(self.genes, self.allowed, strict=True)
                    if gene.layer >= 0 and gene.layer < layers and self._depth_name(gene.stack) == depth
                )
            count *= total
        return count

    def every(self) -> Iterator[Genes]:
        """All networks, each once."""
        seen = set()
        for genes in itertools.product(*self.allowed):
            canonical = self.canonical(genes)
            if canonical not in seen:
                seen.add(canonical)
                yield canonical

    def draw(self, rng: random.Random) -> Genes:
        """A network with every gene drawn evenly."""
        return self.canonical(tuple(rng.choice(left) for left in self.allowed))

    def extreme(self, rng: random.Random, *, largest: bool) -> Genes:
        """A network of the greatest or the least sizes, its mechanisms and heads drawn."""
        at = -1 if largest else 0
        return self.canonical(
            tuple(
                rng.choice(left) if gene.kind in ("mechanism", "heads") else left[at]
                for gene, left in zip(self.genes, self.allowed, strict=True)
            )
        )

    def corners(self) -> Iterator[Genes]:
        """Networks of the greatest depth and feed-forward width, among which each mechanism is in each layer with each
        number of heads in each width."""
        of = {
            kind: next(len(g.choices) for g in self.genes if g.kind == kind) for kind in ("dim", "mechanism", "heads")
        }
        for chosen in itertools.product(*(range(count) for count in of.values())):
            numbers = dict(zip(of, chosen, strict=True))
            yield tuple(numbers.get(gene.kind, len(gene.choices) - 1) for gene in self.genes)

    def uniform(self, mechanism: str) -> Genes:
        """The largest network with one mechanism everywhere, and the most heads."""
        number = self.choices.names.index(mechanism)
        return tuple(number if g.kind == "mechanism" else len(g.choices) - 1 for g in self.genes)

    def variant(self, genes: Genes) -> Variant:
        """The network's plan, without its width."""
        stacks = {name: self._plan(layers) for name, layers in self.network(genes).stacks.items()}
        if len(stacks) == 1:
            ((layers),) = stacks.values()
            return Variant(written_layers(layers), layers)
        return Variant(
            " / ".join(written_layers(layers) for layers in stacks.values()),
            stacks[CROSS],
            encoder=stacks[ENCODER],
            decoder=stacks[DECODER],
        )

    def config(self, genes: Genes) -> Any:
        """The config of the model, which `regard train` makes of the same plan and width."""
        settings = self.sized(genes)
        return model_config(self.variant(genes), self.task, settings, settings.frames[0])

    def sized(self, genes: Genes) -> CompareSettings:
        """The settings with the network's width and depth."""
        network, last = self.network(genes), self.stacks[-1].name
        layers = network.stacks[last]
        return dataclasses.replace(self.settings, dim=network.dim, layers=len(layers), heads=layers[0].heads)

    def describe(self, genes: Genes) -> str:
        """A network on a line."""
        return f"{self.variant(genes).name} (width {self.network(genes).dim})"

    def _plan(self, layers: Sequence[Layer]) -> Layers:
        by_name = {variant.name: variant.layers[0] for variant in self.choices.mechanisms}
        plan = []
        for layer in layers:
            name, options = by_name[layer.mechanism]
            sizes: dict[str, Any] = {"num_heads": layer.heads}
            if layer.feed_forward is not None:
                sizes["feed_forward"] = layer.feed_forward
            plan.append((name, {**options, **sizes}))
        return tuple(plan)

    def _depth(self, genes: Genes, stack: str) -> int:
        return self.choices.depths[genes[self._depth_of[stack]]]

    def _depth_name(self, stack: str) -> str:
        return next(one.depth for one in self.stacks if one.name == stack)

    def _chosen(self, genes: Genes, name: str) -> Any:
        at = self._at[name]
        return self.genes[at].choices[genes[at]]
