"""Causal linear attention in C++ (see `native/src/recurrence.cpp`): the gated recurrence without decay, which maps
queries and keys as it loads them and divides outputs before it stores them."""

from __future__ import annotations

import ctypes
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
    needs_gradient,
    refusal,
    rows,
    sequence,
    sizes,
)
from regard.engines.linear_attention.torch_form import Rule

FEATURE_MAPS = ("identity", "elu", "relu", "relu_squared", "sigmoid", "exp", "silu")
"""In the order of their numbers in `regard_recurrence.h`, from 1 on."""


class Options(ctypes.Structure):
    _fields_ = (
        ("feature_map", ctypes.c_int64),
        ("normalize", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("valid", ctypes.c_void_p),
        ("inverse", ctypes.c_void_p),
    )


class LinearAttention(library.Arguments):
    kernel = "linear_attention"
    _fields_ = (("recurrence", GatedRecurrence), ("options", Options))


class LinearAttentionBackward(library.Arguments):
    kernel = "linear_attention_backward"
    _fields_ = (("recurrence", GatedRecurrenceBackward), ("options", Options))


def run(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, state: Tensor | None, valid: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """See :func:`regard.engines.linear_attention.linear_attention`. `chunk_size` would change rounding only."""
    state = None if state is None else state.float()
    keep = needs_gradient(q, k, v, state)
    o, final_state, *_ = _linear_attention(q, k, v, state, valid, rule.feature_map, rule.scale, rule.eps, keep)
    return o, final_state


def refuses(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, state: Tensor | None, valid: Tensor | None, chunk_size: int
) -> str | None:
    """Why the kernel does not take such a call; None when it does."""
    return _refusal(q, k, v, state, valid, rule.feature_map, rule.eps)


def _refusal(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, valid: Tensor | None, feature_map: str, eps: float | None
) -> str | None:
    if v.ndim != 4:
        return f"v has {v.ndim} axes, not 4"
    if feature_map not in FEATURE_MAPS:
        return f"it does not have the feature map {feature_map}"
    if valid is not None and (valid.shape != v.shape[:1] or valid.dtype != torch.int64 or not valid.is_cpu):
        return f"lengths of shape {tuple(valid.shape)} in {str(valid.dtype)[6:]} on {valid.device.type}"
    return refusal(v.shape[:3], q, k, v, None, state, 0 if eps is None else 1)


def _check(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, valid: Tensor | None, feature_map: str, eps: float | None
) -> None:
    reason = _refusal(q, k, v, state, valid, feature_map, eps)
    if reason is None and state is not None and state.dtype != torch.float32:
        reason = f"the state is {str(state.dtype)[6:]}, not float32"
    if reason is not None:
        raise Unsupported(f"native linear attention with such tensors: {reason}", nearest="backend='torch'")


def _options(feature_map: str, scale: float, eps: float | None, valid: Tensor | None, inverse: Tensor) -> Options:
    number = 1 + FEATURE_MAPS.index(feature_map)
    places = pointer(inverse) if inverse.numel() else None
    return Options(number, int(eps is not None), scale, eps or 0.0, pointer(valid), places)


def _empty_state(k: Tensor, v: Tensor, eps: float | None) -> Tensor:
    """With the normaliser as one more column."""
    return v.new_empty((*v.shape[:2], k.shape[-1], v.shape[-1] + (eps is not None)), dtype=torch.float32)


def _empty_results(k: Tensor, v: Tensor, eps: float | None, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state = _empty_state(k, v, eps)
    kept = checkpoint_count(v.shape[2]) if keep else 0
    return (
        v.new_empty(v.shape),
        state,
        v.new_empty((*state.shape[:2], kept, *state.shape[2:]), dtype=torch.float32),
        v.new_empty(v.shape[:3] if keep and eps is not None else (0,), dtype=torch.float32),
    )


@operator("linear_attention")
def _linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    valid: Tensor | None,
    feature_map: str,
    scale: float,
    eps: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, the final state, and with `keep` the states that backward starts from and inverse denominators."""
    _check(q, k, v, state, valid, feature_map, eps)
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    state, valid = (None if x is None else x.contiguous() for x in (state, valid))
    results = _empty_results(k, v, eps, keep)
    library.call(_arguments(q, k, v, state, valid, Rule(feature_map, scale, eps), *results))
    return results


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    valid: Tensor | None,
    rule: Rule,
    o: Tensor,
    final_state: Tensor,
    checkpoints: Tensor,
    inverse: Tensor,
) -> LinearAttention:
    recurrence = GatedRecurrence(
        *sizes(k, v, None, True),
        sequence(q),
        sequence(k),
        sequence(v),
        Sequence(),
        pointer(state),
        sequence(o),
        pointer(final_state),
        pointer(checkpoints) if checkpoints.numel() else None,
    )
    return LinearAttention(recurrence, _options(rule.feature_map, rule.scale, rule.eps, valid, inverse))


@lru_cache(maxsize=256)
def _template(layouts: tuple[library.Layout | None, ...], rule: Rule, threads: int) -> bytes | None:
    """The struct of a call of tensors that lie so (q, k, v and state), but for where; None where the kernel does not take
    them as they are."""
    found = library.samples(layouts)
    if found is None:
        return None
    q, k, v, state = found
    assert q is not None and k is not None and v is not None
    if _refusal(q, k, v, state, None, rule.feature_map, rule.eps) is not None:
        return None
    if any(rows_contiguous(x) is not x for x in (q, k, v)):
        return None
    if state is not None and (state.dtype != torch.float32 or not state.is_contiguous()):
        return None
    return bytes(_arguments(q, k, v, state, None, rule, *_empty_results(k, v, rule.eps, False)))


def plain(q: Tensor, k: Tensor, v: Tensor, rule: Rule, state: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """:func:`run` by the shortest way to the kernel; None for calls that have none, and where a gradient is recorded or
    somebody watches.

    Of few tokens, the general way through Python takes longer than the kernel.
    """
    if not runs_plainly(q, k, v, state):
        return None
    template = _template(library.layouts(q, k, v, state), rule, torch.get_num_threads())
    if template is None:
        return None
    arguments = LinearAttention.from_buffer_copy(template)
    o, final_state = v.new_empty(v.shape), _empty_state(k, v, rule.eps)
    recurrence = arguments.recurrence
    recurrence.q.data, recurrence.k.data, recurrence.v.data = pointer(q), pointer(k), pointer(v)
    recurrence.state, recurrence.o.data = pointer(state), pointer(o)
    recurrence.final_state = pointer(final_state)
    library.call(arguments)
    return o, final_state


@_linear_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    valid: Tensor | None,
    feature_map: str,
    scale: float,
    eps: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_results(k, v, eps, keep)


@operator("linear_attention_backward")
def _linear_attention_backward(
    grad_o: Tensor | None,
    grad_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    valid: Tensor | None,
    checkpoints: Tensor,
    inverse: Tensor,
    feature_map: str,
    scale: float,
    eps: float | None,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of q, k, v and state, empty where not needed."""
    _check(q, k, v, state, valid, feature_map, eps)
    normalized = eps is not None
    batch, heads, tokens, value_width = v.shape
    matrix = (k.shape[-1], value_width + normalized)
    same("checkpoints", checkpoints, (batch, heads, checkpoint_count(tokens), *matrix), torch.float32)
    same("inverse", inverse, (batch, heads, tokens) if normalized else (0,), torch.float32)
    if grad_o is not None:
        same("grad_o", grad_o, tuple(v.shape), v.dtype)
    if grad_final_state is not None:
        same("grad_final_state", grad_final_state, (batch, heads, *matrix), torch.float32)
    grads = _empty_gradients(q, k, v, state, needed)
    q, k, v, grad_o = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), rows(grad_o)
    state, valid, grad_final_state = (None if x is None else x.contiguous() for x in (state, valid, grad_final_state))
    checkpoints, inverse = checkpoints.contiguous(), inverse.contiguous()
    to = [grad if grad.numel() else None for grad in grads]
    recurrence = GatedRecurrenceBackward(
        *sizes(k, v, None, True),
        sequence(q),
        sequence(k),
        sequence(v),
        Sequence(),
        pointer(state),
        pointer(checkpoints),
        sequence(grad_o),
        pointer(grad_final_state),
        *map(sequence, to[:3]),
        Sequence(),
        pointer(to[3]),
    )
    library.call(LinearAttentionBackward(recurrence, _options(feature_map, scale, eps, valid, inverse)))
    return grads


@_linear_attention_backward.register_fake
def _(
    grad_o: Tensor | None,
    grad_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    valid: Tensor | None,
    checkpoints: Tensor,
    inverse: Tensor,
    feature_map: str,
    scale: float,
    eps: float | None,
    needed: list[bool],
) -> list[Tensor]:
    return _empty_gradients(q, k, v, state, needed)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, needed: list[bool]) -> list[Tensor]:
    return [
        x.new_empty(x.shape) if want and x is not None else v.new_empty(0)
        for x, want in zip((q, k, v, state), needed, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.feature_map, ctx.scale, ctx.eps, ctx.keep = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_o: Tensor | None, grad_final_state: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_o is None and grad_final_state is None:
        return (None,) * 9
    if not ctx.keep:
        raise Unsupported("the gradient of linear attention called with keep=False", supported="keep=True")
    q, k, v, state, valid, *kept = ctx.saved_tensors
    wanted = zip((q, k, v, state), ctx.needs_input_grad, strict=False)
    needed = [x is not None and want for x, want in wanted]
    grads = _linear_attention_backward(
        grad_o, grad_final_state, q, k, v, state, valid, *kept, ctx.feature_map, ctx.scale, ctx.eps, needed
    )
    return (*(grad if want else None for grad, want in zip(grads, needed, strict=True)), *(None,) * 5)


_linear_attention.register_autograd(_differentiate, setup_context=_save)
_linear_attention_backward.refuse_gradient(
    "a second derivative of native linear attention", supported="first derivatives"
)
