"""Modules that a mechanism adds to its layer: a projection makes extra inputs, a merge changes the head outputs."""

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
    """A layer call as the mechanism's own modules see it: tokens are right-padded, with zeros in the padding.

    Attributes:
        x: the layer's input (B, N, C); None when only memory is being absorbed.
        memory: the tokens that keys and values come from (B, M, C2), `x` in self patterns; None if a state has absorbed
            them.
        context: context of the layer's call; its masks refer to the caller's layout.
        lengths: number of valid tokens in each row of `x`; None when all are valid.
        memory_lengths: likewise for `memory`.
        state: the projection's own state after the preceding tokens; None at the start.
        settled: what the merge computed before the heads (:meth:`Merge.choose`); None if it does all its work
            afterwards.
        keeps_losses: whether the losses of the result will be used.
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
    """Computes a mechanism's inputs from those of the shell (q, k, v as heads). Built from a `LayerSpec`.

    Attributes:
        makes_queries: whether it makes the queries too, so that the shell has no query projection.
        mixes_tokens: whether it mixes neighbouring tokens, so that padding must be removed first.
        for_one_pattern: whether its parameters only fit the pattern that it was built for.
        learns_from_losses: patterns in which it is trained by the auxiliary losses of a result, which third-party
            models do not add to their loss.
        reads_unrotated: (the inputs that it reads before positions rotate them, the option that makes it read something
            else); None if rotation makes no difference to it.
        learning_rates: Adam learning rates by parameter name, for those of its own parameters that need another rate
            than the rest when they are added to an already trained model.
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
        """All inputs of the mechanism, by name. A projection without a state only overrides this method."""
        raise NotImplementedError

    def forward(self, heads: Tensors, call: LayerCall) -> tuple[Tensors, State | None]:
        """The inputs, and the state after these tokens if the projection keeps one."""
        return self.inputs(heads, call), call.state


class Merge(nn.Module):
    """Changes the head outputs of a mechanism, before the layer's output norm, gate and projection.

    Attributes:
        each_token_alone: whether each token is processed on its own, so that padding may be anywhere.
    """

    each_token_alone: ClassVar[bool] = False

    if TYPE_CHECKING:
        __call__: Callable[..., Tensor]

    def choose(self, heads: Tensors, call: LayerCall) -> tuple[Tensors, LayerCall]:
        """For mechanisms with an input ``chosen``: the inputs, with ``chosen`` added if some tokens need only some of
        the heads, and the call, with the merge's intermediate results in `settled`."""
        return heads, call

    def forward(
        self, output: Float[Tensor, "b h n v"], heads: Tensors, call: LayerCall, result: Result
    ) -> Float[Tensor, "b h n v2"]:
        """Return the changed head outputs.

        Args:
            output: output of the mechanism.
            heads: inputs of the mechanism.
            call: the layer's call.
            result: result of the mechanism, with its losses and extras.
        """
        raise NotImplementedError
