"""The short way of a call of tensors alone, or with a state and a rotation: what shapes decide is remembered."""

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
    """What such a call comes to: shapes and options decide it.

    Attributes:
        form: the form that runs.
        call: what it gets beside the tensors, but for the state and the rotation.
        batch: rows that a state must have; None where it alone knows them.
        heads: what inputs with fewer heads are repeated to; None where all have as many.
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
    """What is remembered of calls of such tensors; None in a graph, and where sizes or options have no hash."""
    if torch.compiler.is_compiling():
        return None
    try:
        return _planned(card, shapes_of(tensors), pattern, config, continuing, return_state)
    except TypeError:  # sizes may be symbols
        return None


def run_plan(
    card: Mechanism,
    plan: Plan,
    tensors: dict[str, Tensor],
    state: State | None,
    return_state: bool,
    rotate: Callable[[Tensor, Tensor], Tensor] | None,
) -> Result:
    """Run what was planned."""
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
    """Whether a rotation that the card honours is all that accompanies the tensors and the state."""
    return rest.keys() == {"rotate"} and callable(rest["rotate"]) and "rotate" in card.honours
