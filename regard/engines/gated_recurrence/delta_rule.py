"""The delta rule in C++ (see `native/src/delta_rule.cpp`): the gated recurrence with a beta."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.operators import operator
from regard.contract import Unsupported

SEGMENT = 256
"""Tokens between two states that a forward call keeps for its backward call, as in `regard_delta_rule.h`."""

Strides = ctypes.c_int64 * 3


class DeltaRule(library.Arguments):
    kernel = "delta_rule"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("log_decay", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("final_state", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("value_width", ctypes.c_int64),
        ("decay_width", ctypes.c_int64),
        ("inclusive", ctypes.c_int64),
        ("q_strides", Strides),
        ("k_strides", Strides),
        ("v_strides", Strides),
        ("out_strides", Strides),
        ("log_decay_strides", Strides),
        ("beta_strides", Strides),
        ("state_strides", Strides),
    )


class DeltaRuleBackward(library.Arguments):
    kernel = "delta_rule_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(DeltaRule)),
        ("grad_out", ctypes.c_void_p),
        ("grad_out_strides", Strides),
        ("grad_final_state", ctypes.c_void_p),
        ("grad_final_state_strides", Strides),
        ("grad_q", ctypes.c_void_p),
        ("grad_k", ctypes.c_void_p),
        ("grad_v", ctypes.c_void_p),
        ("grad_log_decay", ctypes.c_void_p),
        ("grad_beta", ctypes.c_void_p),
        ("grad_state", ctypes.c_void_p),
    )


def refuses(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
    sub_chunk: int,
    inclusive: bool,
) -> str | None:
    """Why the kernel does not take such a call; None when it does."""
    if beta is None:
        return "it is the recurrence without a delta rule"
    for name, x in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("beta", beta), ("state", state)):
        if x is None:
            continue
        if x.dtype not in library.DTYPES:
            return f"it computes in float32 and bfloat16, and {name} is {str(x.dtype)[6:]}"
        if x.device.type != "cpu":
            return f"it runs on cpu, and {name} is on {x.device.type}"
    return _bad_shape(q, k, v, log_decay, beta, state)


def _bad_shape(
    q: Tensor | None, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, state: Tensor | None
) -> str | None:
    if k.ndim != 4:
        return f"k has {k.ndim} axes, not 4"
    batch, heads, n, width = k.shape
    if v.ndim != 4 or tuple(v.shape[:3]) != (batch, heads, n):
        return f"v has shape {tuple(v.shape)}, not ({batch}, {heads}, {n}, V)"
    value_width = v.shape[-1]
    if width < 1 or value_width < 1:
        return "keys or values without features"
    if max(width, value_width) > library.MOST:
        return f"keys or values of more than {library.MOST} features"
    if q is not None and q.shape != k.shape:
        return f"q has shape {tuple(q.shape)}, not that of k, {tuple(k.shape)}"
    if tuple(beta.shape) != (batch, heads, n):
        return f"beta has shape {tuple(beta.shape)}, not ({batch}, {heads}, {n})"
    if log_decay is not None and tuple(log_decay.shape) not in ((batch, heads, n, 1), (batch, heads, n, width)):
        return f"log_decay has shape {tuple(log_decay.shape)}, not ({batch}, {heads}, {n}, 1 or {width})"
    if state is not None and tuple(state.shape) != (batch, heads, width, value_width):
        return f"state has shape {tuple(state.shape)}, not ({batch}, {heads}, {width}, {value_width})"
    return None


def run(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
    sub_chunk: int,
    inclusive: bool,
) -> tuple[Tensor | None, Tensor]:
    """See :func:`regard.engines.gated_recurrence.gated_recurrence`, with beta.

    q, k and v are read where they lie when all are float32 or all bfloat16; otherwise they become float32. Gates, rates
    and state become float32. The kernel has chunk sizes of its own: `chunk_size` and `sub_chunk` would change rounding
    only.
    """
    assert beta is not None
    dtype = v.dtype
    if k.dtype != dtype or (q is not None and q.dtype != dtype):
        q, k, v = None if q is None else q.float(), k.float(), v.float()
    gate = None if log_decay is None else log_decay.float()
    state = None if state is None else state.float()
    needs_backward = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, gate, beta, state)
    )
    out, final_state, _ = _delta_rule(q, k, v, gate, beta.float(), state, inclusive, needs_backward)
    return (None if q is None else out.to(dtype)), final_state


@operator("delta_rule")
def _delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    inclusive: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (without features when q is None), the final state, and with `keep` what backward needs of the states."""
    _check(q, k, v, log_decay, beta, state)
    out, final_state, kept = _empty_results(q, k, v, keep)
    if k.shape[2] == 0:
        return out, final_state.zero_() if state is None else final_state.copy_(state), kept
    arguments, _inputs = _arguments(q, k, v, log_decay, beta, state, inclusive, kept if kept.numel() else None)
    arguments.out = library.pointer(out)
    arguments.out_strides = Strides(*out.stride()[:3])
    arguments.final_state = library.pointer(final_state)
    library.call(arguments)
    return out, final_state, kept


@_delta_rule.register_fake
def _(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    inclusive: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(q, k, v, keep)


def _empty_results(q: Tensor | None, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, n, width = k.shape
    value_width = v.shape[-1]
    out = v.new_empty(batch, heads, n, value_width if q is not None else 0)
    final_state = v.new_empty(batch, heads, width, value_width, dtype=torch.float32)
    states = _kept_states(n) if keep else 0
    return out, final_state, v.new_empty(batch, heads, states, width, value_width, dtype=torch.float32)


def _kept_states(n: int) -> int:
    return max((n - 1) // SEGMENT, 0)


@operator("delta_rule_backward")
def _delta_rule_backward(
    grad_out: Tensor | None,
    grad_final_state: Tensor | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    kept: Tensor,
    inclusive: bool,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of q, k, v, log_decay, beta and state; empty where not needed."""
    _check(q, k, v, log_decay, beta, state)
    batch, heads, n, width = k.shape
    _same("kept", kept, (batch, heads, _kept_states(n), width, v.shape[-1]), torch.float32)
    kept = kept.contiguous()
    if grad_out is not None:
        _same("grad_out", grad_out, (batch, heads, n, 0 if q is None else v.shape[-1]), v.dtype)
    if grad_final_state is not None:
        _same("grad_final_state", grad_final_state, (batch, heads, width, v.shape[-1]), torch.float32)
    grads = _empty_gradients(q, k, v, log_decay, beta, state, needed)
    if n == 0:
        if needed[5]:
            grads[5].zero_() if grad_final_state is None else grads[5].copy_(grad_final_state)
        return grads
    forward, _inputs = _arguments(q, k, v, log_decay, beta, state, inclusive, kept)
    arguments = DeltaRuleBackward(forward=ctypes.pointer(forward))
    if grad_out is not None and q is not None:
        grad_out = library.rows_contiguous(grad_out)
        arguments.grad_out = library.pointer(grad_out)
        arguments.grad_out_strides = Strides(*grad_out.stride()[:3])
    if grad_final_state is not None:
        grad_final_state = library.rows_contiguous(grad_final_state)
        arguments.grad_final_state = library.pointer(grad_final_state)
        arguments.grad_final_state_strides = Strides(*grad_final_state.stride()[:3])
    names = ("grad_q", "grad_k", "grad_v", "grad_log_decay", "grad_beta", "grad_state")
    for name, grad, is_needed in zip(names, grads, needed, strict=True):
        if is_needed:
            setattr(arguments, name, library.pointer(grad))
    library.call(arguments)
    return grads


@_delta_rule_backward.register_fake
def _(
    grad_out: Tensor | None,
    grad_final_state: Tensor | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    kept: Tensor,
    inclusive: bool,
    needed: list[bool],
) -> list[Tensor]:
    return _empty_gradients(q, k, v, log_decay, beta, state, needed)


def _empty_gradients(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    inputs = (q, k, v, log_decay, beta, state)
    return [
        v.new_empty(x.shape, dtype=x.dtype) if want and x is not None else v.new_empty(0)
        for x, want in zip(inputs, needed, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_decay, beta, state, inclusive, keep = inputs
    ctx.save_for_backward(q, k, v, log_decay, beta, state, output[2])
    ctx.inclusive, ctx.keep = inclusive, keep
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_final_state: Tensor | None, grad_kept: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, kept = ctx.saved_tensors
    needed = [x is not None and want for x, want in zip(inputs, ctx.needs_input_grad[:6], strict=True)]
    if grad_out is None and grad_final_state is None:
        return (None,) * 8
    if not ctx.keep:
        raise Unsupported("the gradient of a delta rule called with keep=False", supported="keep=True")
    grads = _delta_rule_backward(grad_out, grad_final_state, *inputs, kept, ctx.inclusive, needed)
    return (*(grad if want else None for grad, want in zip(grads, needed, strict=True)), None, None)


_delta_rule.register_autograd(_backward, setup_context=_setup_context)
_delta_rule_backward.refuse_gradient("a second derivative of the native delta rule", supported="first derivatives")


def _same(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype or x.device.type != "cpu":
        raise Unsupported(
            f"{name} of shape {tuple(x.shape)} in {str(x.dtype)[6:]} on {x.device.type}",
            supported=f"shape {shape} in {str(dtype)[6:]} on cpu",
        )


def _check(
    q: Tensor | None, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, state: Tensor | None
) -> None:
    reason = _bad_shape(q, k, v, log_decay, beta, state)
    if reason is not None:
        raise Unsupported(f"the native delta rule with such tensors: {reason}")
    if v.dtype not in library.DTYPES:
        raise Unsupported(f"v in {str(v.dtype)[6:]}", supported="float32 or bfloat16")
    for name, x, dtype in (
        ("q", q, v.dtype),
        ("k", k, v.dtype),
        ("v", v, v.dtype),
        ("log_decay", log_decay, torch.float32),
        ("beta", beta, torch.float32),
        ("state", state, torch.float32),
    ):
        if x is not None and (x.dtype != dtype or x.device.type != "cpu"):
            raise Unsupported(f"{name} in {str(x.dtype)[6:]} on {x.device.type}", supported=f"{str(dtype)[6:]} on cpu")


def _arguments(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    inclusive: bool,
    kept: Tensor | None,
) -> tuple[DeltaRule, list[Tensor]]:
    """The forward call's struct without its results, and the tensors that it points to."""
    arguments = DeltaRule(
        threads=torch.get_num_threads(),
        dtype=library.DTYPES[v.dtype],
        beta=library.pointer(beta),
        beta_strides=Strides(*beta.stride()),
        batch=k.shape[0],
        heads=k.shape[1],
        n=k.shape[2],
        width=k.shape[3],
        value_width=v.shape[3],
        decay_width=0 if log_decay is None else log_decay.shape[-1],
        inclusive=inclusive,
        kept=library.pointer(kept),
    )
    alive = [beta]
    for name, x in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("state", state)):
        if x is not None:
            x = library.rows_contiguous(x)
            alive.append(x)
            setattr(arguments, name, library.pointer(x))
            setattr(arguments, f"{name}_strides", Strides(*x.stride()[:3]))
    return arguments, alive
