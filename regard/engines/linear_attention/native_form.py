"""Causal linear attention in C++ (see `native/src/recurrence.cpp`): the gated recurrence without decay, with the
feature map applied on loading queries and keys, and the division before storing outputs."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous, same
from regard.backends.operators import operator, runs_plainly
from regard.contract import Unsupported
from regard.engines.gated_recurrence.native_form import (
    GatedRecurrence,
    GatedRecurrenceBackward,
    Sequence,
    checkpoint_count,
    refusal,
    rows,
    sequence,
    sizes,
)
from regard.engines.linear_attention.problem import Problem, Rule

FEATURE_MAPS = ("identity", "elu", "relu", "relu_squared", "sigmoid", "exp", "silu")
"""Feature maps in the order of their numbers in `regard_recurrence.h`, from 1 on."""


class Options(ctypes.Structure):
    """The struct with a rule and the number of valid tokens, in addition to the recurrence."""

    _fields_ = (
        ("feature_map", ctypes.c_int64),
        ("normalize", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("shift", ctypes.c_float),
        ("valid", ctypes.c_void_p),
        ("inverse", ctypes.c_void_p),
    )


class LinearAttention(library.Arguments):
    kernel = "linear_attention"
    _fields_ = (("recurrence", GatedRecurrence), ("options", Options))


class LinearAttentionBackward(library.Arguments):
    kernel = "linear_attention_backward"
    _fields_ = (("recurrence", GatedRecurrenceBackward), ("options", Options))


def run(problem: Problem, rule: Rule, chunk_size: int) -> tuple[Tensor, Tensor]:
    """See :func:`regard.engines.linear_attention.linear_attention`. `chunk_size` would only affect rounding."""
    state = None if problem.state is None else problem.state.float()
    keep = torch.is_grad_enabled() and problem.records
    o, final_state, *_ = _linear_attention(replace(problem, state=state), rule, keep)
    return o, final_state


def refuses(problem: Problem, rule: Rule, chunk_size: int) -> str | None:
    """The reason why the kernel cannot run a call; None if it can."""
    return _refusal(problem, rule)


def _refusal(p: Problem, rule: Rule) -> str | None:
    if p.v.ndim != 4:
        return f"v has {p.v.ndim} axes, not 4"
    if rule.feature_map not in FEATURE_MAPS:
        return f"it does not have the feature map {rule.feature_map}"
    valid = p.valid
    if valid is not None and (valid.shape != p.v.shape[:1] or valid.dtype != torch.int64 or not valid.is_cpu):
        return f"lengths of shape {tuple(valid.shape)} in {str(valid.dtype)[6:]} on {valid.device.type}"
    return refusal(p.v.shape[:3], p.q, p.k, p.v, None, p.state, 0 if rule.eps is None else 1)


def _check(p: Problem, rule: Rule) -> None:
    reason = _refusal(p, rule)
    if reason is None and p.state is not None and p.state.dtype != torch.float32:
        reason = f"the state is {str(p.state.dtype)[6:]}, not float32"
    if reason is not None:
        raise Unsupported(f"native linear attention with such tensors: {reason}", nearest="backend='torch'")


def _laid_out(p: Problem) -> Problem:
    """The tensors in the layouts that the kernel reads."""
    state, valid = (None if x is None else x.contiguous() for x in (p.state, p.valid))
    return Problem(rows_contiguous(p.q), rows_contiguous(p.k), rows_contiguous(p.v), state, valid)


def _options(rule: Rule, valid: Tensor | None, inverse: Tensor) -> Options:
    number = 1 + FEATURE_MAPS.index(rule.feature_map)
    places = pointer(inverse) if inverse.numel() else None
    return Options(number, int(rule.eps is not None), rule.scale, rule.eps or 0.0, rule.shift, pointer(valid), places)


def _empty_state(k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """An empty state, with the normaliser as an additional column."""
    return v.new_empty((*v.shape[:2], k.shape[-1], v.shape[-1] + (rule.eps is not None)), dtype=torch.float32)


def _empty_results(p: Problem, rule: Rule, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v, state = p.v, _empty_state(p.k, p.v, rule)
    kept = checkpoint_count(v.shape[2]) if keep else 0
    return (
        v.new_empty(v.shape),
        state,
        v.new_empty((*state.shape[:2], kept, *state.shape[2:]), dtype=torch.float32),
        v.new_empty(v.shape[:3] if keep and rule.eps is not None else (0,), dtype=torch.float32),
    )


@operator("linear_attention")
def _linear_attention(problem: Problem, rule: Rule, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, the final state, and with `keep` the states that backward starts from and the inverse denominators."""
    _check(problem, rule)
    p = _laid_out(problem)
    results = _empty_results(p, rule, keep)
    library.call(_arguments(p, rule, *results))
    return results


def _arguments(
    p: Problem, rule: Rule, o: Tensor, final_state: Tensor, checkpoints: Tensor, inverse: Tensor
) -> LinearAttention:
    recurrence = GatedRecurrence(
        *sizes(p.k, p.v, None, True),
        sequence(p.q),
        sequence(p.k),
        sequence(p.v),
        Sequence(),
        pointer(p.state),
        sequence(o),
        pointer(final_state),
        pointer(checkpoints) if checkpoints.numel() else None,
    )
    return LinearAttention(recurrence, _options(rule, p.valid, inverse))


@lru_cache(maxsize=256)
def _template(layouts: tuple[library.Layout | None, ...], rule: Rule, threads: int) -> bytes | None:
    """The struct for tensors (q, k, v and state) with these layouts, without addresses; None if the kernel cannot read
    them as they are."""
    found = library.samples(layouts)
    if found is None:
        return None
    q, k, v, state = found
    assert q is not None and k is not None and v is not None
    problem = Problem(q, k, v, state, None)
    if _refusal(problem, rule) is not None or any(rows_contiguous(x) is not x for x in (q, k, v)):
        return None
    if state is not None and (state.dtype != torch.float32 or not state.is_contiguous()):
        return None
    return bytes(_arguments(problem, rule, *_empty_results(problem, rule, False)))


def plain(q: Tensor, k: Tensor, v: Tensor, rule: Rule, state: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """:func:`run` by a direct kernel call; None for calls that need the general path, such as those that autograd, a
    profiler or a mode must see.

    For few tokens, the general path through Python takes longer than the kernel.
    """
    if not runs_plainly(q, k, v, state):
        return None
    template = _template(library.layouts(q, k, v, state), rule, torch.get_num_threads())
    if template is None:
        return None
    arguments = LinearAttention.from_buffer_copy(template)
    o, final_state = v.new_empty(v.shape), _empty_state(k, v, rule)
    recurrence = arguments.recurrence
    recurrence.q.data, recurrence.k.data, recurrence.v.data = pointer(q), pointer(k), pointer(v)
    recurrence.state, recurrence.o.data = pointer(state), pointer(o)
    recurrence.final_state = pointer(final_state)
    library.call(arguments)
    return o, final_state


@_linear_attention.register_fake
def _(problem: Problem, rule: Rule, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_results(problem, rule, keep)


@operator("linear_attention_backward")
def _linear_attention_backward(
    grad_o: Tensor | None,
    grad_final_state: Tensor | None,
    problem: Problem,
    checkpoints: Tensor,
    inverse: Tensor,
    rule: Rule,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of q, k, v and state; empty where not needed."""
    _check(problem, rule)
    normalized = rule.eps is not None
    batch, heads, tokens, value_width = problem.v.shape
    matrix = (problem.k.shape[-1], value_width + normalized)
    same("checkpoints", checkpoints, (batch, heads, checkpoint_count(tokens), *matrix), torch.float32)
    same("inverse", inverse, (batch, heads, tokens) if normalized else (0,), torch.float32)
    if grad_o is not None:
        same("grad_o", grad_o, tuple(problem.v.shape), problem.v.dtype)
    if grad_final_state is not None:
        same("grad_final_state", grad_final_state, (batch, heads, *matrix), torch.float32)
    grads = problem.empty_gradients(needed)
    p, grad_o = _laid_out(problem), rows(grad_o)
    grad_final_state = None if grad_final_state is None else grad_final_state.contiguous()
    checkpoints, inverse = checkpoints.contiguous(), inverse.contiguous()
    to = [grad if grad.numel() else None for grad in grads]
    recurrence = GatedRecurrenceBackward(
        *sizes(p.k, p.v, None, True),
        sequence(p.q),
        sequence(p.k),
        sequence(p.v),
        Sequence(),
        pointer(p.state),
        pointer(checkpoints),
        sequence(grad_o),
        pointer(grad_final_state),
        *map(sequence, to[:3]),
        Sequence(),
        pointer(to[3]),
    )
    library.call(LinearAttentionBackward(recurrence, _options(rule, p.valid, inverse)))
    return grads


@_linear_attention_backward.register_fake
def _(
    grad_o: Tensor | None,
    grad_final_state: Tensor | None,
    problem: Problem,
    checkpoints: Tensor,
    inverse: Tensor,
    rule: Rule,
    needed: list[bool],
) -> list[Tensor]:
    return problem.empty_gradients(needed)


def _save(ctx: Any, inputs: tuple[Problem, Rule, bool], output: tuple[Tensor, ...]) -> None:
    problem, ctx.rule, ctx.keep = inputs
    problem.keep(ctx, *output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_o: Tensor | None, grad_final_state: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.needs_input_grad)
    if grad_o is None and grad_final_state is None:
        return nothing
    if not ctx.keep:
        raise Unsupported("the gradient of linear attention called with keep=False", supported="keep=True")
    problem, kept = Problem.kept(ctx)
    needed = problem.needed(ctx)
    grads = problem.gradients(
        _linear_attention_backward(grad_o, grad_final_state, problem, *kept, ctx.rule, needed), needed
    )
    return *grads, *nothing[len(grads) :]


_linear_attention.register_autograd(_differentiate, setup_context=_save)
_linear_attention_backward.refuse_gradient(
    "a second derivative of native linear attention", supported="first derivatives"
)
