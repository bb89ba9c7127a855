"""The search space: genes, each a choice among a few values, and the models that they encode.

A network has a width (an encoder-decoder one on each side), and for each of its stacks a number of layers; each layer
has a mechanism, a number of heads, if the stack's blocks have one a feed-forward network of some hidden width, and in
cross attention a number of the encoder's last layers that it reads. Genes of layers beyond the number of layers are
silent: networks that differ only in those are the same, and :meth:`Space.canonical` gives them the same genes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regard.contract import Pattern, Unsupported, at_least
from regard.models import count_parameters
from regard.models.variants import Layers, Variant, written_layers
from regard.tasks import Task
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.task_models import model_config

if TYPE_CHECKING:
    from regard.workbench.search.settings import SearchSettings

Genes = tuple[int, ...]
"""For each gene in a space, the index of its choice."""


@dataclass(frozen=True)
class Stack:
    """Layers of a network that process the same sequence.

    Attributes:
        name: prefix of its genes' names.
        pattern: pattern of its mechanisms.
        kinds: kinds of its layers' genes.
        side: the side of an encoder-decoder whose width and number of layers it has; "" in other networks.
    """

    name: str
    pattern: Pattern
    kinds: tuple[str, ...] = ("mechanism", "heads", "feed_forward")
    side: str = ""

    @property
    def dim(self) -> str:
        """The name of the gene for its width."""
        return f"{self.side} dim".lstrip()

    @property
    def depth(self) -> str:
        """The name of the gene for its number of layers."""
        return f"{self.side} depth".lstrip()


ENCODER, DECODER, CROSS = "encoder", "decoder", "cross"


def stacks_of(pattern: Pattern) -> tuple[Stack, ...]:
    """The stacks in a model for tasks with a pattern: in causal-cross those of an encoder-decoder; in noncausal-cross,
    as in comparisons, only the layers between the two sequences."""
    if pattern is not Pattern.CAUSAL_CROSS:
        return (Stack("layer", pattern),)
    return (
        Stack(ENCODER, Pattern.NONCAUSAL_SELF, side=ENCODER),
        Stack(DECODER, Pattern.CAUSAL_SELF, ("mechanism", "heads"), DECODER),
        Stack(CROSS, Pattern.CAUSAL_CROSS, ("mechanism", "heads", "feed_forward", "memory_layers"), DECODER),
    )


@dataclass(frozen=True)
class Gene:
    """One choice in a network.

    Attributes:
        name: its name, such as ``dim``, ``encoder depth`` or ``layer 2 mechanism``.
        choices: the possible values; sizes in ascending order.
        kind: ``dim``, ``depth``, ``mechanism``, ``heads``, ``feed_forward`` or ``memory_layers``.
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
    """The choices for a layer; None for those that its stack does not have."""

    mechanism: str
    heads: int
    feed_forward: int | None = None
    memory_layers: int | None = None


@dataclass(frozen=True)
class Network:
    """A network as data: its width, the layers of each stack, and in an encoder-decoder the encoder's width."""

    dim: int
    stacks: Mapping[str, tuple[Layer, ...]]
    encoder_dim: int | None = None

    @property
    def width(self) -> str:
        """The widths in words."""
        if self.encoder_dim in (None, self.dim):
            return f"width {self.dim}"
        return f"width {self.encoder_dim} in the encoder, {self.dim} in the decoder"

    def as_dict(self) -> dict[str, Any]:
        """The network as data for JSON."""
        found = dataclasses.asdict(self)
        stacks = found.pop("stacks")
        return _given(found) | {name: [_given(layer) for layer in layers] for name, layers in stacks.items()}


def _given(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Choices:
    """The values that a search chooses from.

    Attributes:
        mechanisms: one-layer variants, as parsed by :func:`regard.models.variants.read_variant`.
        dims, depths, heads, feed_forward: possible sizes: one width per network (in an encoder-decoder one per side), one
            depth per stack, and the others per layer.
        encoder_depths: depths of the encoder of an encoder-decoder; `depths` when None.
        memory_layers: numbers of the encoder's last layers that each cross attention of an encoder-decoder reads; when
            None 1, and 2 if all encoders are so deep.
    """

    mechanisms: tuple[Variant, ...]
    dims: tuple[int, ...] = (32, 64)
    depths: tuple[int, ...] = (2, 3, 4)
    heads: tuple[int, ...] = (2, 4)
    feed_forward: tuple[int, ...] = (64, 128)
    encoder_depths: tuple[int, ...] | None = None
    memory_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.mechanisms:
            raise Unsupported("a search among no mechanisms", supported="one or more names from `regard list`")
        names = [variant.name for variant in self.mechanisms]
        for variant in self.mechanisms:
            if len(variant.layers) != 1:
                raise Unsupported(
                    f"{variant.name} as a choice for one layer", supported="a mechanism, with options or without"
                )
            for option in ("num_heads", "feed_forward", "memory_layers"):
                if option in variant.options:
                    raise Unsupported(
                        f"option {option!r} of {variant.name} in a search, which chooses it",
                        supported="--heads, --feed-forward and --memory-layers",
                    )
        if len(set(names)) < len(names):
            raise Unsupported(f"mechanisms {', '.join(names)}", supported="each mechanism once")
        for name in ("dims", "depths", "heads", "feed_forward", "encoder_depths", "memory_layers"):
            given = getattr(self, name)
            if given is None:
                continue
            values = tuple(sorted(set(given)))
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

    def sizes(self, pattern: Pattern) -> dict[str, tuple[int, ...]]:
        """The choices other than mechanisms, by name, for the networks of a pattern.

        Raises:
            Unsupported: for choices that these networks do not have, and more of the encoder's layers than there are.
        """
        found = {name: getattr(self, name) for name in ("dims", "depths", "heads", "feed_forward")}
        if pattern is not Pattern.CAUSAL_CROSS:
            for name in ("encoder_depths", "memory_layers"):
                if getattr(self, name) is not None:
                    raise Unsupported(
                        f"{name}={getattr(self, name)} in a search among networks of {pattern.value}",
                        supported="tasks that read a memory and write tokens",
                    )
            return found
        depths = self.depths if self.encoder_depths is None else self.encoder_depths
        read = tuple(n for n in (1, 2) if n <= depths[0]) if self.memory_layers is None else self.memory_layers
        if read[-1] > depths[0]:
            raise Unsupported(
                f"cross attention to the last {read[-1]} layers of an encoder of {depths[0]}",
                supported=f"--memory-layers up to {depths[0]}, the least --encoder-layers",
            )
        return found | {"encoder_depths": depths, "memory_layers": read}


def fitting(task: Task, choices: Choices, settings: SearchSettings) -> tuple[Choices, dict[str, str]]:
    """The choices without the mechanisms that some layer of the space cannot have, and why it cannot; the first
    mechanism is the reference and stays.

    Raises:
        Unsupported: if the first mechanism, or the sizes, cannot be searched.
    """
    kept, refused = list[Variant](), dict[str, str]()
    for variant in choices.mechanisms:
        one = dataclasses.replace(choices, mechanisms=(variant,))
        try:
            space = Space(task, one, settings.models(task, one.mechanisms))
            for genes in space.corners():
                count_parameters(space.config(genes))
        except Unsupported as error:
            if not kept:
                raise
            refused[variant.name] = f"{error.asked}; supported: {error.supported}"
        else:
            kept.append(variant)
    return dataclasses.replace(choices, mechanisms=tuple(kept)), refused


class Space:
    """The networks for a task that some choices span.

    Args:
        task: the task, which determines inputs and outputs.
        choices: see :class:`Choices`.
        settings: settings for the models around the chosen layers; the first frame is used.
        allowed: for each gene the indices of the choices that are left; all when None.

    Attributes:
        sizes: the choices other than mechanisms, by the names of :class:`Choices`.
        genes: one width, or in an encoder-decoder one for each side; then one depth for each stack (stacks may share
            one); then those of each layer.
        widths: indices of the genes for widths.
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
        self.sizes = choices.sizes(task.pattern)
        offered: dict[str, tuple[Any, ...]] = {"mechanism": choices.names, **self.sizes}
        genes = [Gene(dim, choices.dims, "dim") for dim in dict.fromkeys(stack.dim for stack in self.stacks)]
        self.widths = tuple(range(len(genes)))
        depths = {
            stack.depth: offered["encoder_depths" if stack.name == ENCODER else "depths"] for stack in self.stacks
        }
        genes += [Gene(depth, values, "depth") for depth, values in depths.items()]
        genes += [
            Gene(f"{stack.name} {layer + 1} {kind}", offered[kind], kind, stack.name, layer)
            for stack in self.stacks
            for layer in range(depths[stack.depth][-1])
            for kind in stack.kinds
        ]
        self.genes = tuple(genes)
        self.allowed = tuple(tuple(range(len(g.choices))) for g in genes) if allowed is None else tuple(allowed)
        self._at = {gene.name: i for i, gene in enumerate(self.genes)}
        self._depth_of = {stack.name: self._at[stack.depth] for stack in self.stacks}

    def at(self, name: str) -> int:
        """The index of a gene by name."""
        return self._at[name]

    def active(self, genes: Genes) -> tuple[bool, ...]:
        """Whether each gene counts: those for the widths, the depths, and the existing layers do."""
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
        stacks = {
            stack.name: tuple(
                Layer(**{kind: self._chosen(genes, f"{stack.name} {layer + 1} {kind}") for kind in stack.kinds})
                for layer in range(self._depth(genes, stack.name))
            )
            for stack in self.stacks
        }
        first, last = (self._chosen(genes, self.stacks[at].dim) for at in (0, -1))
        return Network(last, stacks, first if len(self.widths) > 1 else None)

    def genes_of(self, network: Network) -> Genes:
        """The canonical genes of a network; the inverse of :meth:`network`.

        Raises:
            Unsupported: for a network that is not in this space.
        """
        wanted: dict[str, Any] = {f"{ENCODER} dim": network.encoder_dim, self.stacks[-1].dim: network.dim}
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
        count = math.prod(len(self.allowed[at]) for at in self.widths)
        for depth in dict.fromkeys(stack.depth for stack in self.stacks):
            total = 0
            for number in self.allowed[self.at(depth)]:
                layers = self.genes[self.at(depth)].choices[number]
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
        each number of heads and of the memory's layers, and each width on each side."""
        of = {
            gene.kind: len(gene.choices) for gene in self.genes if gene.kind in ("mechanism", "heads", "memory_layers")
        }
        of |= {self.genes[at].name: len(self.genes[at].choices) for at in self.widths}
        for chosen in itertools.product(*(range(count) for count in of.values())):
            numbers = dict(zip(of, chosen, strict=True))
            most = (numbers.get(gene.kind, len(gene.choices) - 1) for gene in self.genes)
            yield tuple(numbers.get(gene.name, number) for gene, number in zip(self.genes, most, strict=True))

    def uniform(self, mechanism: str) -> Genes:
        """The largest network with a single mechanism, and with the most heads; like the Transformer, its cross attention
        reads the fewest of the encoder's last layers."""
        numbers = {"mechanism": self.choices.names.index(mechanism), "memory_layers": 0}
        return tuple(numbers.get(gene.kind, len(gene.choices) - 1) for gene in self.genes)

    def variant(self, genes: Genes) -> Variant:
        """The network's plan, without its width (but with that of an encoder-decoder's encoder)."""
        network = self.network(genes)
        stacks = {name: self._plan(layers) for name, layers in network.stacks.items()}
        if len(stacks) == 1:
            ((layers),) = stacks.values()
            return Variant(written_layers(layers), layers)
        return Variant(
            " / ".join(written_layers(layers) for layers in stacks.values()),
            stacks[CROSS],
            encoder=stacks[ENCODER],
            decoder=stacks[DECODER],
            encoder_dim=network.encoder_dim,
        )

    def config(self, genes: Genes) -> Any:
        """The model config, the same that `regard train` makes from this plan and width."""
        settings = self.sized(genes)
        return model_config(self.variant(genes), self.task, settings, settings.frames[0])

    def sized(self, genes: Genes) -> CompareSettings:
        """The settings with the network's width and depth (the decoder's, in an encoder-decoder)."""
        network, last = self.network(genes), self.stacks[-1].name
        layers = network.stacks[last]
        return dataclasses.replace(self.settings, dim=network.dim, layers=len(layers), heads=layers[0].heads)

    def describe(self, genes: Genes) -> str:
        """A one-line description of a network."""
        return f"{self.variant(genes).name} ({self.network(genes).width})"

    def _plan(self, layers: Sequence[Layer]) -> Layers:
        by_name = {variant.name: variant.layers[0] for variant in self.choices.mechanisms}
        plan = []
        for layer in layers:
            name, options = by_name[layer.mechanism]
            sizes: dict[str, Any] = {"num_heads": layer.heads}
            if layer.feed_forward is not None:
                sizes["feed_forward"] = layer.feed_forward
            if layer.memory_layers not in (None, 1):
                sizes["memory_layers"] = layer.memory_layers
            plan.append((name, {**options, **sizes}))
        return tuple(plan)

    def _depth(self, genes: Genes, stack: str) -> int:
        at = self._depth_of[stack]
        return self.genes[at].choices[genes[at]]

    def _depth_name(self, stack: str) -> str:
        return next(one.depth for one in self.stacks if one.name == stack)

    def _chosen(self, genes: Genes, name: str) -> Any:
        at = self._at[name]
        return self.genes[at].choices[genes[at]]
