"""The parts of a model that can be removed: heads, neurons and whole branches of layers, in a common description.

A *unit* of attention is a key head with the query heads that read it: a single head, or a group of heads in models with
grouped queries, of which no single head can be removed. A *branch* is what a layer adds to the residual stream: its
attention, or its feed-forward network. Embeddings, the last norm and the heads of models are never removed; they become
narrower where dimensions of the stream are removed, which all layers share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from regard.compression.layers import comes_from_transformers
from regard.contract import Unsupported, an_instance
from regard.integrations.timm_places import is_of_timm

if TYPE_CHECKING:
    from jaxtyping import Int

BRANCHES = ("attention", "feed_forward")
KNOWN = (
    "LanguageModel and Encoder of regard; transformers models with layers as those of Llama, GPT-2, GPT-NeoX, OPT, BERT or "
    "DistilBERT; timm's VisionTransformer of plain blocks"
)

Undo = Callable[[], object]


@dataclass(frozen=True)
class Layer:
    """A layer of a model.

    Attributes:
        name, module: name and module of the layer.
        units, group: number of attention units, and query heads per unit.
        width: width of a query head's output.
        neurons: hidden width of the feed-forward network.
        output: the projection after the heads; None if heads cannot be removed.
        down: the projection after the neurons; None if neurons cannot be removed.
        branches: the module of each branch that the layer has.
        ends: for each branch, the module whose output is added to the residual stream.
        last: the plain projection that a branch ends in, for each branch that does.
        post_norm: whether norms come after the residual sums, so that they stay when branches are removed.
        fixed: the reason why ``heads``, ``neurons`` or a branch cannot be removed.
    """

    name: str
    module: nn.Module
    units: int
    group: int
    width: int
    neurons: int
    output: nn.Linear | None
    down: nn.Linear | None
    branches: Mapping[str, nn.Module]
    ends: Mapping[str, nn.Module]
    last: Mapping[str, nn.Linear]
    post_norm: bool = False
    fixed: Mapping[str, str] = field(default_factory=dict)

    def parameters(self, branch: str) -> int:
        """Number of parameters of a branch."""
        return sum(parameter.numel() for parameter in self.branches[branch].parameters())

    def columns(self, units: Sequence[int]) -> Int[Tensor, " c"]:
        """Columns of the output projection that read these units."""
        return spans(units, self.group * self.width)


@dataclass(frozen=True)
class Stream:
    """The residual stream, which all layers read and add to.

    Attributes:
        width: number of its dimensions.
        starts: the modules whose outputs add up to its first value; none if a norm, one of `norms`, comes after them.
        norms: the norms over it.
        scales: the parameters, with the axis of its dimensions, that factors of what is added to it and of what is read
            from it can be multiplied into: of its starts, of the last projections of branches, and of norms. Where the
            head's weight is the embedding's table, the last norm is left out.
    """

    width: int
    starts: Sequence[nn.Module]
    norms: Sequence[nn.Module]
    scales: Sequence[tuple[nn.Parameter, int]]

    def without(self, gone: Sequence[int]) -> Int[Tensor, " k"]:
        """Numbers of the dimensions that stay; raises Unsupported for dimensions that do not exist, or if none stays."""
        if gone and not 0 <= min(gone) <= max(gone) < self.width:
            raise Unsupported(f"dimensions {tuple(gone)} of a stream", supported=f"0 to {self.width - 1}")
        kept = [number for number in range(self.width) if number not in set(gone)]
        if not kept:
            raise Unsupported("taking all dimensions out of a stream", supported="a dimension or more that stays")
        return torch.tensor(kept)


@dataclass(frozen=True)
class Cut:
    """What is removed from a layer.

    Attributes:
        layer: whether the whole layer, including norms, is removed.
        attention, feed_forward: whether the whole branch is removed.
        heads, neurons: numbers of the units and neurons that are removed.
        hard: number of keys that each query still reads; None for all.
    """

    layer: bool = False
    attention: bool = False
    feed_forward: bool = False
    heads: tuple[int, ...] = ()
    neurons: tuple[int, ...] = ()
    hard: int | None = None

    def settled(self, layer: Layer) -> Cut:
        """The same cut without redundancy: parts of removed branches, and branches that do not exist, are left out."""
        if self.layer and layer.post_norm:
            return Cut(layer=True)
        attention = self.layer or self.attention or "attention" not in layer.branches
        feed_forward = self.layer or self.feed_forward or "feed_forward" not in layer.branches
        return Cut(
            layer=attention and feed_forward and not layer.post_norm,
            attention=attention,
            feed_forward=feed_forward,
            heads=() if attention else tuple(sorted(set(self.heads))),
            neurons=() if feed_forward else tuple(sorted(set(self.neurons))),
            hard=None if attention else self.hard,
        )


class Host(Protocol):
    """A model whose layers can be cut.

    Attributes:
        model: the model.
        layers: its layers, in execution order.
    """

    model: Any
    layers: list[Layer]

    def harden(self, layer: int, keys: int) -> Undo:
        """Let each query of a layer use only its `keys` largest attention weights, which are not renormalised."""
        ...

    def stream(self) -> Stream:
        """The residual stream; raises Unsupported if none of its dimensions can be removed, with the reason."""
        ...

    def compact(self, cuts: Sequence[Cut], hidden: Sequence[int] = ()) -> Undo:
        """Make the model smaller, in place, also by dimensions of its stream; its outputs are those of the masked model."""
        ...


def find_host(model: nn.Module) -> Host:
    """Find the layers of a model.

    Raises:
        Unsupported: for other kinds of models, with the reason.
    """
    from regard.compression.pruning.foreign import TransformersModel
    from regard.compression.pruning.own import OwnModel
    from regard.compression.pruning.vision import TimmModel

    if type(model).__module__.startswith("regard."):
        return OwnModel(model)
    if comes_from_transformers(model):
        return TransformersModel(model)
    if is_of_timm(model):
        return TimmModel(model)
    raise Unsupported(f"taking heads, neurons or layers out of {an_instance(model)}", supported=KNOWN)


def check_cuts(layers: Sequence[Layer], cuts: Sequence[Cut]) -> list[Cut]:
    """Validate cuts and settle them.

    Raises:
        Unsupported: for the wrong number of cuts, and for parts that cannot be removed or do not exist.
    """
    if len(cuts) != len(layers):
        raise Unsupported(f"cuts of {len(cuts)} layers", supported=f"a cut for each of {len(layers)} layers")
    settled = []
    for layer, cut in zip(layers, cuts, strict=True):
        cut = cut.settled(layer)
        for what, chosen, count in (("heads", cut.heads, layer.units), ("neurons", cut.neurons, layer.neurons)):
            if chosen and what in layer.fixed:
                raise Unsupported(f"taking {what} out of {layer.name}: {layer.fixed[what]}", supported="whole branches")
            if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
                raise Unsupported(f"{what} {chosen} of {layer.name}", supported=f"0 to {count - 1}")
        for branch in BRANCHES:
            if branch in layer.fixed and getattr(cut, branch) and not cut.layer:
                raise Unsupported(
                    f"taking a branch out of {layer.name}: {layer.fixed[branch]}", supported="heads, neurons or layers"
                )
        settled.append(cut)
    return settled


def spans(numbers: Sequence[int], width: int) -> Int[Tensor, " c"]:
    """Indices into a row of parts, each `width` wide, of the parts with these numbers."""
    starts = torch.tensor(list(numbers), dtype=torch.int64) * width
    return (starts[:, None] + torch.arange(width)).flatten()


def left(count: int, gone: Sequence[int]) -> tuple[list[int], bool]:
    """Numbers of the remaining parts, and whether they count: if none remains, the first is kept but adds nothing."""
    kept = [number for number in range(count) if number not in set(gone)]
    return (kept, True) if kept or not count else ([0], False)


def smaller(
    linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None, silent: bool = False
) -> nn.Linear:
    """A linear layer with some of the rows and columns of another; with `silent` its weight is 0."""
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if rows is not None:
        rows = rows.to(weight.device)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    weight = torch.zeros_like(weight) if silent else weight.clone()
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made = type(linear)(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=linear.bias.requires_grad)
    return made.train(linear.training)


def rows_of(module: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """The parameters of a linear layer or a norm, with the axis of its outputs."""
    return [(parameter, 0) for parameter in module.parameters(recurse=False)]


def staying(cuts: Sequence[Cut]) -> list[int]:
    """Numbers of the layers that settled cuts leave; raises Unsupported if none is left."""
    kept = [i for i, cut in enumerate(cuts) if not cut.layer]
    if not kept:
        raise Unsupported("taking all layers out of a model", supported="a layer or more that stays")
    return kept


class NoBranch(nn.Module):
    """Replacement for a removed branch: returns 0."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(x)


def put(parent: nn.Module, path: str, new: nn.Module) -> Undo:
    """Replace the module at a path below `parent`."""
    above, _, name = path.rpartition(".")
    return assign(parent.get_submodule(above), name, new)


def assign(owner: Any, name: str, value: Any) -> Undo:
    """Set an attribute, returning how to undo it."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, old)


def backwards(undo: Sequence[Undo]) -> Undo:
    """Combine undo functions, to run the last one first."""

    def back() -> None:
        for one in reversed(undo):
            one()

    return back
