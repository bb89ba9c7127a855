"""Modules that a mechanism adds to its layer: one makes inputs beside the heads, one changes the heads that come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from regard.contract.context import Context
from regard.contract.patterns import Pattern
from regard.contract.state import Result, State, Tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer as a mechanism's own modules see it: tokens are right-padded, with zeros in the padding.

    Attributes:
        x: the layer's input (B, N, C); None where memory alone is absorbed.
        memory: the tokens of keys and values (B, M, C2), `x` in self patterns; None where a state has absorbed them.
        context: of the layer's call; its masks are those of the caller's layout.
        lengths: valid tokens of each row of `x`; None when all are.
        memory_lengths: likewise of `memory`.
        state: the projection's own, after the tokens before; None at the start.
        settled: what the merge has settled before the heads are computed; None where it does all of it afterwards.
        keeps_losses: whether somebody takes losses of the result.
    """

    x: Float[Tensor, "b n c"] | None
    memory: Float[Tensor, "b m c2"] | None
    context: Context
    lengths: Int[Tensor, " b"] | None = None
    memory_lengths: Int[Tensor, " b"] | None = None
    state: Any = None
    settled: Any = None
    keeps_losses: bool = True


class Projection(nn.Module):
    """Makes a mechanism's inputs: those that the shell has (q, k, v as heads) with its own. Built from a `LayerSpec`.

    Attributes:
        makes_queries: whether it makes the queries too, so that the shell has none.
        mixes_tokens: whether it reads neighbours, so that padding has to be gathered away first.
        for_one_pattern: whether what it learns is of one pattern alone.
        learns_from_losses: patterns in which it learns from the losses of a result, which models of others do not add up.
        reads_unrotated: what it reads before positions rotate it, and the option that reads something else; None where
            rotation changes nothing for it.
        learning_rates: those of Adam that its own parameters need in a model that is trained already, by name, where they
            are not in proportion to the others'.
    """

    makes_queries: ClassVar[bool] = False
    mixes_tokens: ClassVar[bool] = False
    for_one_pattern: ClassVar[bool] = False
    learns_from_losses: ClassVar[tuple[Pattern, ...]] = ()
    reads_unrotated: tuple[str, str] | None = None
    learning_rates: ClassVar[Mapping[str, float]] = {}

    if TYPE_CHECKING:
        __call__: Callable[..., tuple[Tensors, State | None]]

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        """All inputs of the mechanism, by name; without a state this is all there is to write."""
        raise NotImplementedError

    def forward(self, heads: Tensors, call: LayerCall) -> tuple[Tensors, State | None]:
        """The inputs, and the state after these tokens where it keeps one."""
        return self.inputs(heads, call), call.state


class Merge(nn.Module):
    """Changes the heads that come out of a mechanism, before the layer's output norm, gate and projection.

    Attributes:
        each_token_alone: whether it mixes no tokens, so that padding may lie anywhere.
    """

    each_token_alone: ClassVar[bool] = False

    if TYPE_CHECKING:
        __call__: Callable[..., Tensor]

    def choose(self, heads: Tensors, call: LayerCall) -> tuple[Tensors, LayerCall]:
        """The inputs of a mechanism that takes ``chosen``, with it where some tokens need no more than some of the heads, and
        the call with what is settled by that."""
        return heads, call

    def forward(
        self, output: Float[Tensor, "b h n v"], heads: Tensors, call: LayerCall, result: Result
    ) -> Float[Tensor, "b h n v2"]:
        """The changed heads.

        Args:
            output: of the mechanism.
            heads: the inputs that it had.
            call: of the layer.
            result: of the mechanism, with its losses and extras.
        """
        raise NotImplementedError
