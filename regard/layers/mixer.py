"""The shell of mixers: handles padding, patterns and states around a layer with an architecture of its own.

A mixer inherits from :class:`MixerLayer` and defines what it does with dense tokens (`mix`) and, if it has cross
patterns, with memory (`absorb`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.apply import apply
from regard.contract import Context, Mask, Mechanism, Pattern, Result, State, Unsupported
from regard.core.ragged import Gathering, gathering, gathering_in_place, inner_mask
from regard.layers.base import Layer
from regard.layers.checks import check_memory, check_memory_mask, check_state, check_tokens, given_context

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Tokens:
    """A sequence as a mixer sees it: zeros in the padding, which is on the right or at invalid places of a grid.

    Attributes:
        x: (B, N, C).
        lengths: number of valid tokens in each row; None when all are valid, and on a grid.
        valid: valid places of a grid; None when all are valid, and without a grid.
        mask: mask for :func:`regard.apply.apply`.
    """

    x: Float[Tensor, "b n c"]
    lengths: Int[Tensor, " b"] | None = None
    valid: Bool[Tensor, "b n"] | None = None
    mask: Mask | None = None

    @classmethod
    def laid_out(cls, x: Float[Tensor, "b n c"], layout: Gathering) -> Tokens:
        """Move the caller's tokens into a layout."""
        on_grid = layout.valid if layout.lengths is None else None
        return cls(layout.gather(x, axis=1), layout.lengths, on_grid, inner_mask(layout))

    def count(self) -> Int[Tensor, " b"]:
        """Number of valid tokens in each row of a sequence."""
        if self.lengths is not None:
            return self.lengths
        return torch.full(self.x.shape[:1], self.x.shape[1], device=self.x.device)


class MixerLayer(Layer):
    """A mixer as a layer, (B, N, C) -> (B, N, C).

    Args:
        card: the mechanism.
        dim: width C of input and output.
        pattern: one of the mechanism's patterns.
        config: the mechanism's options.

    Attributes:
        grid_axes: number of grid axes that inputs must have (1 for sequences); None for any number.
        state_type: class of its states, for mixers whose states no function checks.
        for_sequences: options with which a layer that only takes grids would take sequences.
    """

    state_type: type[State] = State
    grid_axes: int | None = None
    for_sequences: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, card: Mechanism, dim: int, *, pattern: str | Pattern, config: Any = None) -> None:
        super().__init__()
        self.card, self.dim, self.pattern = card, dim, card.require_pattern(pattern)
        self.config = card.options() if config is None else config

    def mix(self, tokens: Tokens, memory: Tokens | None, context: Context, state: Any) -> Result:
        """Mix dense tokens; the result has a state if `state` is given or ``"state"`` is wanted."""
        raise NotImplementedError

    def call(
        self, inputs: Mapping[str, Tensor | None], tokens: Tokens, context: Context, state: Any, *, dropout: float = 0.0
    ) -> Result:
        """Call the mechanism on dense tokens, with the call's grid if tokens keep their places."""
        return apply(
            self.card,
            inputs,
            pattern=self.pattern,
            mask=tokens.mask,
            grid=context.grid if self.card.keeps_places else None,
            state=state,
            return_state="state" in context.want,
            config=self.config,
            dropout=dropout,
            generator=context.generator,
        )

    def absorb(self, memory: Tokens, state: Any) -> Any:
        """The state after memory, continuing `state`; only for mixers with cross patterns."""
        raise Unsupported(f"absorbing memory with {self.card.name}", supported="layer(x)", nearest="softmax")

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c2"] | None = None,
        *,
        context: Context | None = None,
        state: Any = None,
    ) -> Result:
        """Mix a sequence.

        Args:
            x: input; in cross patterns, the sequence that queries come from.
            memory: the other sequence of cross patterns; None when `state` has absorbed it.
            context: masks, grid, generator, and the extras to return.
            state: state to continue from; the result then has the new state.

        Raises:
            Unsupported: for anything that the pattern or the mechanism does not support.
        """
        context = given_context(context)
        check_state(state, self.state_type, self.card.name)
        check_memory(self.pattern, memory, context, state)
        check_tokens(x, self.dim)
        self._check_wanted(context)
        layout = self._layout(x, context)
        tokens = Tokens.laid_out(x, layout)
        keys = None if memory is None else _right_padded(memory, context.memory_mask)
        result = self.mix(tokens, keys, context, state)
        result.output = layout.scatter(result.output, axis=1)
        return result

    def encode_memory(
        self, memory: Float[Tensor, "b m c2"], *, context: Context | None = None, state: Any = None
    ) -> Any:
        """Absorb memory once, for decoding in a cross pattern; call again with `state` as more memory streams in."""
        if not self.pattern.cross:
            raise Unsupported(f"encode_memory in {self.pattern.value}", supported="cross patterns", nearest="layer(x)")
        context = given_context(context)
        check_state(state, self.state_type, self.card.name)
        check_memory_mask(context)
        return self.absorb(_right_padded(memory, context.memory_mask), state)

    def _layout(self, x: Tensor, context: Context) -> Gathering:
        batch, n = x.shape[:2]
        if self.card.keeps_places and context.grid is not None:
            if self.pattern is not Pattern.NONCAUSAL_SELF:
                raise Unsupported(
                    f"{self.card.name} on a grid in {self.pattern.value}",
                    supported="grid=None, for a sequence",
                    nearest=Pattern.NONCAUSAL_SELF.value,
                )
            return gathering_in_place(context.mask, batch, n, context.grid, x.device)
        return gathering(context.mask, batch, n, x.device)

    def _check_wanted(self, context: Context) -> None:
        for what, given in (
            ("bias on pairs", context.mask is not None and context.mask.bias is not None),
            ("a block mask", context.mask is not None and context.mask.blocks is not None),
            ("attention weights", not {"weights", "lse"}.isdisjoint(context.want)),
            ("roles", context.roles is not None),
        ):
            if given:
                raise Unsupported(
                    f"{self.card.name} with {what}",
                    supported="valid, lengths and cu_seqlens masks",
                    nearest="softmax",
                )


def _right_padded(memory: Tensor, mask: Mask | None) -> Tokens:
    layout = gathering(mask, memory.shape[0], memory.shape[1], memory.device)
    return Tokens.laid_out(memory, layout)
