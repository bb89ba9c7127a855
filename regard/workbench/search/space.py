"""The search space: genes, each a choice among a few values, and the models that they encode.

A network has one width, and for each of its stacks a number of layers; each layer has a mechanism, a number of heads
and, if the stack's blocks have one, a feed-forward network of some hidden width. Genes of layers beyond the number of
layers are silent: networks that differ only in those are the same, and :meth:`Space.canonical` gives them the same
genes.
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
"""For each gene in a space, the index of its choice."""


@dataclass(frozen=True)
class Stack:
    """Layers of a network that process the same sequence.

    Attributes:
        name: prefix of its genes' names.
        pattern: pattern of its mechanisms.
        depth: name of the gene for its number of layers.
        feed_forward: whether its blocks have a feed-forward network.
    """

    name: str
    pattern: Pattern
    depth: str = "depth"
    feed_forward: bool = True


ENCODER, DECODER, CROSS = "encoder", "decoder", "cross"


def stacks_of(pattern: Pattern) -> tuple[Stack, ...]:
    """The stacks in a model for tasks with a pattern: in causal-cross those of an encoder-decoder; in noncausal-cross,
    as in comparisons, only the layers between the two sequences."""
    if pattern is not Pattern.CAUSAL_CROSS:
        return (Stack("layer", pattern),)
    return (
        Stack(ENCODER, Pattern.NONCAUSAL_SELF, depth="encoder depth"),
        Stack(DECODER, Pattern.CAUSAL_SELF, feed_forward=False),
        Stack(CROSS, Pattern.CAUSAL_CROSS),
    )


@dataclass(frozen=True)
class Gene:
    """One choice in a network.

    Attributes:
        name: its name, such as ``dim``, ``depth`` or ``layer 2 mechanism``.
        choices: the possible values; sizes in ascending order.
        kind: ``dim``, ``depth``, ``mechanism``, ``heads`` or ``feed_forward``.
        stack: the stack of a layer's gene; "" for other genes.
        layer: the index, from 0, of a layer's gene; -1 for other genes.
    """

    name: str
    choices: tuple[Any, ...]
    kind: str
    stack: str = ""
    layer: int = -1


@dataclass(frozen=True)
class Layer:
    """The choices for a layer; `feed_forward` is None in stacks without feed-forward networks."""

    mechanism: str
    heads: int
    feed_forward: int | None


@dataclass(frozen=True)
class Network:
    """A network as data: its width, and the layers of each stack."""

    dim: int
    stacks: Mapping[str, tuple[Layer, ...]]

    def as_dict(self) -> dict[str, Any]:
        """The network as data for JSON."""
        return {
            "dim": self.dim,
            **{name: [dataclasses.asdict(layer) for layer in layers] for name, layers in self.stacks.items()},
        }


@dataclass(frozen=True)
class Choices:
    """The values that a search chooses from.

    Attributes:
        mechanisms: one-layer variants, as parsed by :func:`regard.models.variants.read_variant`.
        dims, depths, heads, feed_forward: possible sizes: one width per network, one depth per stack, and the others
            per layer.
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
        """The mechanisms to choose from, by name."""
        return tuple(variant.name for variant in self.mechanisms)


class Space:
    """The networks for a task that some choices span.

    Args:
        task: the task, which determines inputs and outputs.
        choices: see :class:`Choices`.
        settings: settings for the models around the chosen layers; the first frame is used.
        allowed: for each gene the indices of the choices that are left; all when None.

    Attributes:
        genes: one for the width; then one depth for each stack (stacks may share one); then for each layer the
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
        """The index of a gene by name."""
        return self._at[name]

    def active(self, genes: Genes) -> tuple[bool, ...]:
        """Whether each gene counts: those for the width, the depths, and the existing layers do."""
        return tuple(gene.layer < 0 or gene.layer < self._depth(genes, gene.stack) for gene in self.genes)

    def canonical(self, genes: Genes) -> Genes:
        """The same network with silent genes set to their first choice."""
        return tuple(number if counts else 0 for number, counts in zip(genes, self.active(genes), strict=True))

    def nearest(self, genes: Genes) -> Genes:
        """The network in which genes whose choice is not allowed take the first allowed one."""
        kept = tuple(n if n in left else left[0] for n, left in zip(genes, self.allowed, strict=True))
        return self.canonical(kept)

    def network(self, genes: Genes) -> Network:
        """Decode the genes."""
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
            Unsupported: for a network that is not in this space.
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
        """Whether all genes that count have an allowed choice."""
        return all(
            number in left or not counts
            for number, left, counts in zip(genes, self.allowed, self.active(genes), strict=True)
        )

    def restricted(self, left: Mapping[str, Sequence[int]]) -> Space:
        """The part of the space in which some genes, given by name or kind, have fewer choices."""
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
        """The number of networks in the space."""
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
        """All networks in the space, each once."""
        seen = set()
        for genes in itertools.product(*self.allowed):
            canonical = self.canonical(genes)
            if canonical not in seen:
                seen.add(canonical)
                yield canonical

    def draw(self, rng: random.Random) -> Genes:
        """A network with every gene drawn uniformly."""
        return self.canonical(tuple(rng.choice(left) for left in self.allowed))

    def extreme(self, rng: random.Random, *, largest: bool) -> Genes:
        """A network with the largest or smallest sizes, and with random mechanisms and heads."""
        at = -1 if largest else 0
        return self.canonical(
            tuple(
                rng.choice(left) if gene.kind in ("mechanism", "heads") else left[at]
                for gene, left in zip(self.genes, self.allowed, strict=True)
            )
        )

    def corners(self) -> Iterator[Genes]:
        """Networks of the largest depth and feed-forward width that together have each mechanism in each layer, with
        each number of heads and each width."""
        of = {
            kind: next(len(g.choices) for g in self.genes if g.kind == kind) for kind in ("dim", "mechanism", "heads")
        }
        for chosen in itertools.product(*(range(count) for count in of.values())):
            numbers = dict(zip(of, chosen, strict=True))
            yield tuple(numbers.get(gene.kind, len(gene.choices) - 1) for gene in self.genes)

    def uniform(self, mechanism: str) -> Genes:
        """The largest network with a single mechanism, and with the most heads."""
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
        """The model config, the same that `regard train` makes from this plan and width."""
        settings = self.sized(genes)
        return model_config(self.variant(genes), self.task, settings, settings.frames[0])

    def sized(self, genes: Genes) -> CompareSettings:
        """The settings with the network's width and depth."""
        network, last = self.network(genes), self.stacks[-1].name
        layers = network.stacks[last]
        return dataclasses.replace(self.settings, dim=network.dim, layers=len(layers), heads=layers[0].heads)

    def describe(self, genes: Genes) -> str:
        """A one-line description of a network."""
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
