"""Checks of a call against the card: inputs, options, masks and states that it does not claim raise Unsupported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from regard.contract import (
    WANTS,
    BlockMask,
    Call,
    Mask,
    Mechanism,
    Pattern,
    State,
    Types,
    Unsupported,
    check_mask,
    closest,
    one_of,
)

CALL_TYPES = Types(
    {
        "scale": float | None,
        "backend": str | None,
        "form": str | None,
        "return_state": bool,
        "chunk_size": int | None,
        "dropout": float,
        "generator": torch.Generator | None,
        "grid": tuple[int, ...] | None,
        "roles": Tensor | None,
        "want": Collection,
        "progress": float | None,
        "training": bool,
        "rotate": Callable | None,
        "position_bias": Callable | None,
    }
)
"""Types of the keyword arguments of a call."""

KNOWN = CALL_TYPES.hints.keys() | {field.name for field in dataclasses.fields(Call)}

FLOATS = frozenset("qkvx")
"""Inputs that hold numbers, never indices, in every mechanism."""

IN_WORDS = {
    "bias": "additive scores",
    "blocks": "a block mask",
    "dropout": "dropout of attention weights",
    "lse": "the log-sum-exp of scores",
    "rotate": "a rotation of its queries and keys",
}
"""How error messages phrase words of :attr:`Mechanism.honours`, where the word itself would not do."""


def given_tensors(card: Mechanism, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The inputs that are not None; raises Unsupported for anything but tensors."""
    given = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or (name in FLOATS and not tensor.is_floating_point()):
            found = f"dtype {tensor.dtype}" if isinstance(tensor, Tensor) else f"type {type(tensor).__name__}"
            axes = ", ".join(card.axes.get(name, ""))
            raise Unsupported(f"{card.name}: {name} of {found}", supported=f"a tensor of floats ({axes})")
        given[name] = tensor
    return given


def check_options(card: Mechanism, mask: Mask | None, memory_mask: Mask | None, options: dict[str, Any]) -> None:
    """Raise Unsupported for options that the card does not honour or that have the wrong type."""
    check_mask("mask", mask)
    check_mask("memory_mask", memory_mask)
    for name in options.keys() - KNOWN:
        raise Unsupported(
            f"option {name!r} of {card.name}", supported=", ".join(sorted(KNOWN)), nearest=closest(name, KNOWN)
        )
    CALL_TYPES.check(card.name, options)
    dropout, want = options.get("dropout", 0.0), options.get("want", ())
    if not 0.0 <= dropout < 1.0:
        raise Unsupported(f"dropout={dropout}", supported="0 <= dropout < 1", nearest="dropout=0.0")
    for word in want:
        one_of("want", word, WANTS)
    if memory_mask is not None and (memory_mask.bias is not None or memory_mask.blocks is not None):
        raise Unsupported("a memory mask with bias or blocks", supported="bias and blocks on mask, which has the pairs")
    for what in _asked(mask, options):
        if what not in card.honours:
            raise Unsupported(
                f"{card.name} with {IN_WORDS.get(what, what)}",
                supported=", ".join(sorted(card.honours)) or "valid, lengths and cu_seqlens masks",
                nearest="softmax",
            )


def _asked(mask: Mask | None, options: dict[str, Any]) -> list[str]:
    """The features that a call needs, in the words of :attr:`Mechanism.honours`."""
    asked = [word for word in ("weights", "lse") if word in options.get("want", ())]
    asked += [word for word in ("roles", "rotate") if options.get(word) is not None]
    if options.get("dropout", 0.0) > 0:
        asked.append("dropout")
    if options.get("position_bias") is not None:
        asked.append("bias")
    if mask is not None:
        asked += [word for word in ("bias", "blocks") if getattr(mask, word) is not None]
    return asked


def check_form(card: Mechanism, form: str, call: Call, n: int, m: int, stateful: bool) -> None:
    """Raise Unsupported for a form, requested by name, that cannot compute this call."""
    name = f"form {form!r} of {card.name}"
    if form in ("reference", "parallel") and stateful:
        raise Unsupported(f"{name} with a state", supported="whole sequences", nearest="form='chunked'")
    if form == "reference" and not (call.lengths is None and call.memory_lengths is None):
        raise Unsupported(f"{name} on padded or packed tokens", supported="rows of equal length", nearest="form=None")
    if form in ("chunked", "step") and call.pattern is not Pattern.CAUSAL_SELF:
        raise Unsupported(f"{name} in {call.pattern.value}", supported="causal-self", nearest="form='parallel'")
    if form == "step" and not (call.state is not None and n == m == 1):
        raise Unsupported(f"{name} on {n} queries and {m} keys", supported="one token and a state to continue from")


def check_state(card: Mechanism, state: State | None) -> None:
    """Raise Unsupported for a state of another mechanism."""
    if state is None or (card.state is not None and isinstance(state, card.state)):
        return
    if card.state is None:
        raise Unsupported(f"{card.name} with a state", supported="whole sequences only")
    raise Unsupported(f"{card.name} with a state of {type(state).__name__}", supported=card.state.__name__)


def state_rows(state: State) -> int:
    """Number of sequences in a state."""
    return state.length.shape[0]  # type: ignore[attr-defined]


def check_rows(card: Mechanism, state: State, batch: int) -> None:
    """Raise Unsupported unless a state has one row per sequence. Not checked in a graph, where sizes may be symbols."""
    if torch.compiler.is_compiling() or state_rows(state) == batch:
        return
    raise Unsupported(
        f"{card.name} with a state of {state_rows(state)} rows for {batch} sequences",
        supported="a row of the state for each",
        nearest="state.select(rows)",
    )


def check_alignment(card: Mechanism, pattern: Pattern, more_queries: bool) -> None:
    """Raise Unsupported for queries that precede the last token of a fixed-size state, which cannot answer them."""
    if pattern is Pattern.CAUSAL_SELF and more_queries and card.recurrent:
        raise Unsupported(
            f"{card.name} continuing with more queries than keys, of which the first precede the state's end",
            supported="at most as many queries as new keys",
            nearest="softmax, whose state has every key",
        )


def check_blocks(blocks: BlockMask, batch: int, heads: int) -> None:
    """Raise Unsupported for visible blocks with another number of rows or heads than the call."""
    rows, columns = blocks.visible.shape[:2]
    if rows not in (1, batch) or columns not in (1, heads):
        raise Unsupported(
            f"visible blocks of shape {tuple(blocks.visible.shape)} for {batch} rows and {heads} heads",
            supported=f"({batch} or 1, {heads} or 1, query blocks, key blocks)",
        )
