"""Multiplying parts of a model by gates instead of removing them: the same outputs, at the original cost.

A gate of 0 removes a part, 1 leaves it, and gates may be learned. They multiply the inputs of the projection that
follows a part, or the output of a branch: weights are never modified, so gradients and other threads are not affected.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.compression.pruning.anatomy import BRANCHES, Cut, Host, Layer, Undo, check_cuts

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Gates:
    """Factors for the parts of a layer; None for parts that are left alone.

    Attributes:
        heads: one for each unit of attention.
        neurons: one for each neuron.
        attention, feed_forward: for a whole branch.
    """

    heads: Float[Tensor, " units"] | None = None
    neurons: Float[Tensor, " neurons"] | None = None
    attention: Float[Tensor, ""] | None = None
    feed_forward: Float[Tensor, ""] | None = None

    @classmethod
    def of(cls, layer: Layer, cut: Cut) -> Gates:
        """Gates that are 0 where something is cut."""
        zero = torch.zeros(())
        if cut.layer and layer.post_norm:
            return cls()
        return cls(
            _open(layer.units, cut.heads) if cut.heads else None,
            _open(layer.neurons, cut.neurons) if cut.neurons else None,
            zero if cut.attention and "attention" in layer.branches else None,
            zero if cut.feed_forward and "feed_forward" in layer.branches else None,
        )


def _open(count: int, gone: Sequence[int]) -> Tensor:
    return torch.ones(count).index_fill(0, torch.tensor(gone, dtype=torch.int64), 0.0)


@contextmanager
def gated(layers: Sequence[Layer], gates: Mapping[int, Gates]) -> Iterator[None]:
    """Apply gates, by layer number, to the model within the context."""
    with ExitStack() as hooks:
        for number, one in gates.items():
            layer = layers[number]
            if one.heads is not None and layer.output is not None:
                factors = one.heads.repeat_interleave(layer.group * layer.width)
                hooks.callback(layer.output.register_forward_pre_hook(_Inputs(factors)).remove)
            if one.neurons is not None and layer.down is not None:
                hooks.callback(layer.down.register_forward_pre_hook(_Inputs(one.neurons)).remove)
            for branch in BRANCHES:
                factor = getattr(one, branch)
                if factor is not None and branch in layer.ends:
                    hooks.callback(layer.ends[branch].register_forward_hook(_Output(factor)).remove)
        yield


@contextmanager
def stream_gated(host: Host, factors: Float[Tensor, " c"]) -> Iterator[None]:
    """Multiply the residual stream's start, what branches add to it, and what norms read from it, within the context.

    Norms are over the dimensions whose factor is not 0, so that removing the others changes nothing.

    Raises:
        Unsupported: as :meth:`regard.compression.pruning.anatomy.Host.stream`.
    """
    stream = host.stream()
    with ExitStack() as hooks:
        for module in [*stream.starts, *(end for layer in host.layers for end in layer.ends.values())]:
            hooks.callback(module.register_forward_hook(_Output(factors)).remove)
        for norm in stream.norms:
            hooks.callback(replace_forward(norm, _over_open(norm, factors)))
        yield


def _over_open(norm: nn.Module, factors: Float[Tensor, " c"]) -> Callable[[Tensor], Tensor]:
    """The forward of a norm over the dimensions whose factor is not 0, times the factors; the others become 0."""
    kept = factors.detach().nonzero()[:, 0]
    narrow = narrower_norm(norm, kept)

    def run(x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        places = kept.to(x.device)
        y = narrow.forward(x[..., places])
        return y.new_zeros(x.shape).index_copy(-1, places, y * factors.to(y)[places])

    return run


def narrower_norm(norm: nn.Module, kept: Int[Tensor, " k"]) -> Any:
    """A norm over some of the dimensions of another, with the same parameters there, through which gradients pass."""
    narrow: Any = copy.copy(norm)
    narrow._parameters = {}
    for name, parameter in norm._parameters.items():
        setattr(narrow, name, None if parameter is None else parameter[kept.to(parameter.device)])
    for name, size in (("dim", len(kept)), ("normalized_shape", (len(kept),))):
        if hasattr(norm, name):
            setattr(narrow, name, size)
    return narrow


@contextmanager
def masked(host: Host, cuts: Sequence[Cut], hidden: Sequence[int] = ()) -> Iterator[None]:
    """Make the model compute as if it were cut, and lacked `hidden` dimensions of its stream, within the context."""
    with ExitStack() as changes:
        settled = check_cuts(host.layers, cuts)
        for number, cut in enumerate(settled):
            if cut.hard is not None:
                changes.callback(host.harden(number, cut.hard))
            if cut.layer and host.layers[number].post_norm:
                changes.callback(host.layers[number].module.register_forward_hook(_passed).remove)
        pairs = enumerate(zip(host.layers, settled, strict=True))
        changes.enter_context(gated(host.layers, {i: Gates.of(layer, cut) for i, (layer, cut) in pairs}))
        if hidden:
            changes.enter_context(stream_gated(host, _open(host.stream().width, hidden)))
        yield


def _passed(module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
    """The input of a layer in the form of its output."""
    return (given[0], *output[1:]) if isinstance(output, tuple) else given[0]


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Undo:
    """Replace the forward of a module; return a function that undoes it."""
    before = vars(module).get("forward")
    module.forward = forward

    def undo() -> None:
        del module.forward
        if before is not None:
            module.forward = before

    return undo


@dataclass(frozen=True)
class _Inputs:
    factors: Tensor

    def __call__(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x = given[0]
        return (x * self.factors.to(x), *given[1:])


@dataclass(frozen=True)
class _Output:
    factor: Tensor

    def __call__(self, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * self.factor.to(output)
