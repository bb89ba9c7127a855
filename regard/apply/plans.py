"""The fast path for calls without options, with or without a state and a rotation: caches what the shapes determine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.apply.checks import check_alignment, check_rows
from regard.apply.forms import choose_form, run_form
from regard.apply.layout import expand_heads, tied
from regard.apply.sizes import Shapes, measure, shapes_of
from regard.contract import Call, Mechanism, Pattern, Result, State


@dataclass(frozen=True)
class Plan:
    """The part of a call that its shapes and options determine.

    Attributes:
        form: the form to run.
        call: the form's arguments besides the tensors, still without state and rotation.
        batch: number of rows that a state must have; None if only the state knows it.
        heads: number of heads to which inputs with fewer heads are repeated; None if all have the same number.
    """

    form: str
    call: Call
    batch: int | None
    heads: int | None


@lru_cache(maxsize=1024)
def _planned(
    card: Mechanism, shapes: Shapes, pattern: Pattern, config: Any, continuing: bool, return_state: bool
) -> Plan:
    sizes = measure(card, shapes, pattern, continuing)
    if continuing:
        check_alignment(card, pattern, sizes.n > sizes.m)
    form = choose_form(
        card,
        pattern,
        sizes.n,
        sizes.m,
        has_memory=sizes.has_memory,
        stateful=continuing or return_state,
        continuing=continuing,
    )
    call = Call(pattern=pattern, config=config, scale=sizes.scale)
    return Plan(form, call, sizes.batch, sizes.heads if sizes.fewer_heads else None)


def plan_of(
    card: Mechanism,
    tensors: dict[str, Tensor],
    pattern: Pattern,
    config: Any,
    continuing: bool,
    return_state: bool,
) -> Plan | None:
    """The cached plan for a call with such tensors; None in a graph, and if sizes or options cannot be hashed."""
    if torch.compiler.is_compiling():
        return None
    try:
        return _planned(card, shapes_of(tensors), pattern, config, continuing, return_state)
    except TypeError:  # symbolic sizes cannot be hashed
        return None


def run_plan(
    card: Mechanism,
    plan: Plan,
    tensors: dict[str, Tensor],
    state: State | None,
    return_state: bool,
    rotate: Callable[[Tensor, Tensor], Tensor] | None,
) -> Result:
    """Run a call as planned."""
    call = plan.call
    if state is not None and plan.batch is not None:
        check_rows(card, state, plan.batch)
    if state is not None or rotate is not None:
        call = call.after(state, rotate)
    if plan.heads is not None:
        tensors = expand_heads(card, tensors, plan.heads)
    result = run_form(card, plan.form, call, tensors)
    result.output = tied(result.output, tensors)
    if state is None and not return_state:
        result.state = None
    return result


def rotates_alone(card: Mechanism, rest: dict[str, Any]) -> bool:
    """Return whether the only extra argument is a rotation that the card honours."""
    return rest.keys() == {"rotate"} and callable(rest["rotate"]) and "rotate" in card.honours
