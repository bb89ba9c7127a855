"""The delta rule in C++ (see `native/src/delta_rule.cpp`): the gated recurrence with beta."""

from __future__ import annotations

import ctypes
from functools import lru_cache, partial

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import same
from regard.backends.operators import operator
from regard.contract import Unsupported
from regard.engines.gated_recurrence.problem import Problem, differentiate, save
from regard.engines.heads import Strides

SEGMENT = 256
"""Number of tokens between the states that forward stores for backward, as in `regard_delta_rule.h`."""


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


LEARNED = ("q", "k", "v", "log_decay", "beta", "state")
"""Names of the problem's learned tensors, as a constant so that compiled graphs need not query the class."""


def refuses(problem: Problem) -> str | None:
    """The reason why the kernel cannot run a call; None if it can."""
    p = problem
    if p.beta is None:
        return "it is the recurrence without a delta rule"
    for name, x in zip(LEARNED, p.learned, strict=True):
        if x is None:
            continue
        if x.dtype not in library.DTYPES:
            return f"it computes in float32 and bfloat16, and {name} is {str(x.dtype)[6:]}"
        if x.device.type != "cpu":
            return f"it runs on cpu, and {name} is on {x.device.type}"
    return _bad_shape(p)


def _bad_shape(p: Problem) -> str | None:
    k, v, beta, log_decay, state = p.k, p.v, p.beta, p.log_decay, p.state
    if beta is None:
        return "there is no beta"
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
    if p.q is not None and p.q.shape != k.shape:
        return f"q has shape {tuple(p.q.shape)}, not that of k, {tuple(k.shape)}"
    if tuple(beta.shape) != (batch, heads, n):
        return f"beta has shape {tuple(beta.shape)}, not ({batch}, {heads}, {n})"
    if log_decay is not None and tuple(log_decay.shape) not in ((batch, heads, n, 1), (batch, heads, n, width)):
        return f"log_decay has shape {tuple(log_decay.shape)}, not ({batch}, {heads}, {n}, 1 or {width})"
    if state is not None and tuple(state.shape) != (batch, heads, width, value_width):
        return f"state has shape {tuple(state.shape)}, not ({batch}, {heads}, {width}, {value_width})"
    return None


def run(problem: Problem) -> tuple[Tensor | None, Tensor]:
    """See :func:`regard.engines.gated_recurrence.gated_recurrence`, with beta.

    q, k and v are read in place if all are float32 or all are bfloat16; otherwise they are converted to float32. Gates,
    rates and state are converted to float32. The kernel chooses its own chunk sizes.
    """
    p, dtype = problem, problem.v.dtype
    q, k, v = p.q, p.k, p.v
    if k.dtype != dtype or (q is not None and q.dtype != dtype):
        q, k, v = None if q is None else q.float(), k.float(), v.float()
    gate, beta, state = (None if x is None else x.float() for x in (p.log_decay, p.beta, p.state))
    keep = torch.is_grad_enabled() and p.records
    out, final_state, _ = _delta_rule(Problem(q, k, v, gate, beta, state, p.inclusive), keep)
    return (None if q is None else out.to(dtype)), final_state


@operator("delta_rule")
def _delta_rule(problem: Problem, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (without features if q is None), the final state, and with `keep` the states that backward needs."""
    _check(problem)
    out, final_state, kept = _empty_results(problem.q, problem.k, problem.v, keep)
    if problem.k.shape[2] == 0:
        state = problem.state
        return out, final_state.zero_() if state is None else final_state.copy_(state), kept
    arguments, _inputs = _arguments(problem, kept if kept.numel() else None)
    arguments.out, arguments.out_strides = library.pointer(out), out.stride()[:3]
    arguments.final_state = library.pointer(final_state)
    library.call(arguments)
    return out, final_state, kept


@lru_cache(maxsize=256)
def _template(layouts: tuple[library.Layout | None, ...], inclusive: bool, threads: int) -> bytes | None:
    """The struct for learned tensors with these layouts, without addresses; None if the kernel cannot read them as they
    are."""
    found = library.samples(layouts)
    if found is None:
        return None
    problem = Problem(*(*found, inclusive))  # type: ignore[arg-type]
    try:
        _check(problem)
    except Unsupported:
        return None
    arguments, read = _arguments(problem, None)
    out, _, _ = _empty_results(problem.q, problem.k, problem.v, False)
    arguments.out_strides = Strides(*out.stride()[:3])
    as_they_are = {id(x) for x in read} == {id(x) for x in found}
    return bytes(arguments) if as_they_are and problem.k.shape[2] else None


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    inclusive: bool,
) -> tuple[Tensor, Tensor] | None:
    """See :func:`regard.engines.gated_recurrence.native_form.plain`, which checks whether a direct call is safe."""
    template = _template(library.layouts(q, k, v, log_decay, beta, state), inclusive, torch.get_num_threads())
    if template is None:
        return None
    arguments = DeltaRule.from_buffer_copy(template)
    out, final_state, _ = _empty_results(q, k, v, False)
    arguments.q, arguments.k, arguments.v = library.pointer(q), library.pointer(k), library.pointer(v)
    arguments.log_decay, arguments.beta = library.pointer(log_decay), library.pointer(beta)
    arguments.state, arguments.out = library.pointer(state), library.pointer(out)
    arguments.final_state = library.pointer(final_state)
    library.call(arguments)
    return out, final_state


@_delta_rule.register_fake
def _(problem: Problem, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(problem.q, problem.k, problem.v, keep)


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
    grad_out: Tensor | None, grad_final_state: Tensor | None, problem: Problem, kept: Tensor, needed: list[bool]
) -> list[Tensor]:
    """Gradients of the problem's learned tensors; empty where not needed."""
    _check(problem)
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, n, width = k.shape
    same("kept", kept, (batch, heads, _kept_states(n), width, v.shape[-1]), torch.float32)
    kept = kept.contiguous()
    if grad_out is not None:
        same("grad_out", grad_out, (batch, heads, n, 0 if q is None else v.shape[-1]), v.dtype)
    if grad_final_state is not None:
        same("grad_final_state", grad_final_state, (batch, heads, width, v.shape[-1]), torch.float32)
    grads = problem.empty_gradients(needed)
    if n == 0:
        if needed[5]:
            grads[5].zero_() if grad_final_state is None else grads[5].copy_(grad_final_state)
        return grads
    forward, _inputs = _arguments(problem, kept)
    grad_out = None if grad_out is None or q is None else library.rows_contiguous(grad_out)
    grad_final_state = None if grad_final_state is None else library.rows_contiguous(grad_final_state)
    outer = library.strided(grad_out=grad_out, grad_final_state=grad_final_state)
    arguments = DeltaRuleBackward(forward=ctypes.pointer(forward), **outer)
    for name, grad, is_needed in zip(LEARNED, grads, needed, strict=True):
        if is_needed:
            setattr(arguments, f"grad_{name}", library.pointer(grad))
    library.call(arguments)
    return grads


@_delta_rule_backward.register_fake
def _(
    grad_out: Tensor | None, grad_final_state: Tensor | None, problem: Problem, kept: Tensor, needed: list[bool]
) -> list[Tensor]:
    return problem.empty_gradients(needed)


_delta_rule.register_autograd(partial(differentiate, _delta_rule_backward), setup_context=save)
_delta_rule_backward.refuse_gradient("a second derivative of the native delta rule", supported="first derivatives")


def _check(problem: Problem) -> None:
    reason = _bad_shape(problem)
    if reason is not None:
        raise Unsupported(f"the native delta rule with such tensors: {reason}")
    dtype = problem.v.dtype
    if dtype not in library.DTYPES:
        raise Unsupported(f"v in {str(dtype)[6:]}", supported="float32 or bfloat16")
    dtypes = [dtype] * 3 + [torch.float32] * 3
    for name, x, wanted in zip(LEARNED, problem.learned, dtypes, strict=True):
        if x is not None and (x.dtype != wanted or x.device.type != "cpu"):
            raise Unsupported(f"{name} in {str(x.dtype)[6:]} on {x.device.type}", supported=f"{str(wanted)[6:]} on cpu")


def _arguments(p: Problem, kept: Tensor | None) -> tuple[DeltaRule, list[Tensor | None]]:
    """The forward call's struct without its results, and the tensors that it points to."""
    assert p.beta is not None  # checked before
    q, k, v, log_decay, state = alive = [
        None if x is None else library.rows_contiguous(x) for x in (p.q, p.k, p.v, p.log_decay, p.state)
    ]
    arguments = DeltaRule(
        threads=torch.get_num_threads(),
        dtype=library.DTYPES[p.v.dtype],
        beta=library.pointer(p.beta),
        beta_strides=p.beta.stride(),
        **library.strided(q=q, k=k, v=v, log_decay=log_decay, state=state),
        batch=p.k.shape[0],
        heads=p.k.shape[1],
        n=p.k.shape[2],
        width=p.k.shape[3],
        value_width=p.v.shape[3],
        decay_width=0 if p.log_decay is None else p.log_decay.shape[-1],
        inclusive=p.inclusive,
        kept=library.pointer(kept),
    )
    return arguments, [p.beta, *alive]
