"""The parallel, chunked and read forms of mechanisms that attend to all keys so far, and attention with the arguments
of a call, for mechanisms with forms of their own.

A mechanism passes its differences as options of :func:`regard.engines.attention.attention`, which override those of the
call, and changes keys and values before and outputs after it. Its `absorb` is :func:`regard.engines.cache.absorb`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import Call, Pattern, Result, State, Unsupported
from regard.engines.attention import Ranks, Visibility, attend_in_chosen, attention, ranks
from regard.engines.cache import KeyValueState, extend
from regard.engines.paged_cache import PagedState

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], **options: Any
) -> Result:
    """Attention without a state."""
    return attend(call, q, k, v, ranks(call, q.shape[2], k.shape[2], q.device), **options)


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], **options: Any
) -> Result:
    """Continue a cached sequence by any number of tokens; also serves as the step."""
    if isinstance(call.state, PagedState):
        output = _attend_pages(call, q, k, v, **options)
        if output is not None:
            return output
    state, where = extend(call, k, v, q.shape[2])
    if q.shape[2] == 0 and not (call.want or torch.is_grad_enabled()):
        return Result(
            q.new_empty(*q.shape[:3], v.shape[3]), state
        )  # the general path to an empty result would take longer than the rest
    return attend(call, q, state.k, state.v, where, state, **options)


def _attend_pages(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    *,
    visibility: Visibility | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " h"] | None = None,
    stretch: tuple[float, float] | None = None,
    largest: int | None = None,
    chosen: Bool[Tensor, "b h n"] | None = None,
) -> Result | None:
    """The call on a paged cache, read in place; None if the pages must be gathered first."""
    if not (stretch is largest is chosen is call.bias is call.position_bias is call.blocks is None):
        return None
    if call.dropout or call.want or call.backend is not None:
        return None
    state: PagedState = call.state
    found = state.attended(call, q, k, v, by_pattern(call) if visibility is None else visibility, softcap, sink)
    return None if found is None else Result(*found)


def read(call: Call, q: Float[Tensor, "b h n d"], **options: Any) -> Result:
    """Attend from queries to absorbed memory."""
    state: KeyValueState = call.state
    where = ranks(call, q.shape[2], 0, q.device, state.ranks)
    return attend(call, q, state.k, state.v, where, state, **options)


def attend(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    where: Ranks,
    state: State | None = None,
    *,
    chosen: Bool[Tensor, "b h n"] | None = None,
    **options: Any,
) -> Result:
    """The output, `state`, and the weights and log-sum-exp if the call wants them; 0 for queries that are not
    `chosen`."""
    asked: dict[str, Any] = {
        "visibility": by_pattern(call),
        "scale": call.scale,
        "bias": call.bias,
        "position_bias": call.position_bias,
        "blocks": call.blocks,
        "dropout": call.dropout,
        "generator": call.generator,
        "want_weights": "weights" in call.want,
        "want_lse": "lse" in call.want,
        "backend": call.backend,
    }
    if chosen is None:
        output, weights, lse = attention(q, k, v, where, **asked | options)
    else:
        output, weights, lse = attend_in_chosen(attention, q, k, v, where, chosen != 0, **asked | options)
    extras = {name: x for name, x in (("weights", weights), ("lse", lse)) if x is not None}
    return Result(output, state, extras=extras)


def attend_to_part(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    where: Ranks,
    visibility: Visibility,
    **options: Any,
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n"]]:
    """Output and log-sum-exp of softmax over part of the keys, for :func:`regard.engines.merging.merge`; ignores the
    call's biases and blocks."""
    asked: dict[str, Any] = {"dropout": call.dropout, "generator": call.generator, "backend": call.backend}
    output, _, lse = attention(
        q, k, v, where, visibility=visibility, scale=call.scale, want_lse=True, **asked | options
    )
    assert lse is not None
    return output, lse


def by_pattern(call: Call) -> Visibility:
    """All keys; in causal-self, only those up to the query."""
    return Visibility(causal=call.pattern is Pattern.CAUSAL_SELF)


def check_window(what: str, window: tuple[int | None, int | None] | None, pattern: Pattern, none: str) -> None:
    """Raise Unsupported for windows (before, after) without meaning: in cross patterns, and after causal-self queries.

    Args:
        none: the option's value for no window, for errors.
    """
    if window is None or window == (None, None):
        return
    if pattern.cross:
        raise Unsupported(
            f"{what} with window={window} in {pattern.value} (memory has no position relative to a query)",
            supported="self patterns",
            nearest=f"window={none}",
        )
    if pattern is Pattern.CAUSAL_SELF and window[1]:
        raise Unsupported(
            f"{what} with window={window} in causal-self",
            supported="nothing after the query",
            nearest=f"window=({window[0]}, 0)",
        )
