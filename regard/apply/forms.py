"""Choosing the form of a mechanism, and running it on right-padded tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.backends import watch_backends
from regard.contract import Call, Mechanism, Pattern, Result, Unsupported, closest
from regard.core.by_rows import by_rows


def choose_form(
    card: Mechanism, pattern: Pattern, n: int, m: int, *, has_memory: bool, stateful: bool, continuing: bool
) -> str:
    """The form to run if the caller requests none."""
    forms = card.forms
    if not forms:
        raise Unsupported(
            f"{card.name} as a function, of which there is only a module",
            supported="its layer: regard.create_layer, and --layer of regard profile",
        )
    if pattern.cross:
        if continuing and not has_memory:
            return "read"
        if stateful and "absorb" not in forms:
            raise Unsupported(
                f"a state of {card.name} in {pattern.value}",
                supported="whole calls, without a state",
                nearest="softmax",
            )
        if stateful or ("absorb" in forms and "parallel" not in forms):
            return "absorb+read"
        return "parallel" if "parallel" in forms else "reference"
    if stateful:
        if "chunked" not in forms or pattern.causal is False:
            raise Unsupported(
                f"a state of {card.name} in {pattern.value}",
                supported="causal-self, and cross patterns where the memory can be absorbed",
                nearest="softmax" if pattern.causal else "causal-self",
            )
        return "step" if continuing and n == m == 1 and "step" in forms else "chunked"
    return next(form for form in ("parallel", "chunked", "reference") if form in forms)


def run_form(card: Mechanism, form: str, call: Call, tensors: dict[str, Tensor]) -> Result:
    """Run one form."""
    if form == "absorb+read":
        queries = {n: t for n, t in tensors.items() if n not in card.memory_inputs}
        state = call.state
        if len(queries) < len(tensors):
            state = card.forms["absorb"](call, **{n: tensors[n] for n in card.absorbed_inputs if n in tensors})
        return _as_result(card.forms["read"](call.replace(state=state), **queries), state)
    if form not in card.forms:
        raise Unsupported(
            f"form {form!r} of {card.name}", supported=", ".join(card.forms), nearest=closest(form, card.forms)
        )
    if form == "reference" and not (call.lengths is None and call.memory_lengths is None):
        return Result(by_rows(card, call, tensors))
    return _as_result(card.forms[form](call, **tensors), call.state if form == "read" else None)


def run_on_backend(card: Mechanism, form: str, call: Call, tensors: dict[str, Tensor]) -> Result:
    """:func:`run_form`; raises Unsupported if no engine used the requested backend, since torch computed the form."""
    if call.backend is None or torch.compiler.is_compiling():
        return run_form(card, form, call, tensors)
    with watch_backends() as ran:
        result = run_form(card, form, call, tensors)
    if call.backend not in ran.backends and call.backend != "torch":
        raise Unsupported(
            f"backend {call.backend!r} for the {form} form of {card.name} in {call.pattern.value}",
            supported="torch: no engine computes it",
            nearest="torch",
        )
    return result


def _as_result(found: Tensor | Result, state: Any) -> Result:
    result = found if isinstance(found, Result) else Result(found)
    if result.state is None:
        result.state = state
    return result
