"""The gated recurrence in C++ (`native/src/recurrence.cpp`). With beta, see `delta_rule`; for one token, see `step`."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous, same
from regard.backends.operators import operator, runs_plainly
from regard.contract import Unsupported
from regard.engines.gated_recurrence import delta_rule
from regard.engines.gated_recurrence.problem import Problem, differentiate, save
from regard.engines.gated_recurrence.torch_form import for_each_head

CHECKPOINT_EVERY = 256
"""Tokens between the states that forward stores for backward; they take a quarter of the size of v if K = V = 64."""


class Sequence(ctypes.Structure):
    """The struct `regard_sequence`: a tensor with one row per token, in either dtype."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("batch_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
    )


_SIZES = (
    ("threads", ctypes.c_int64),
    ("batch", ctypes.c_int64),
    ("heads", ctypes.c_int64),
    ("tokens", ctypes.c_int64),
    ("key_width", ctypes.c_int64),
    ("value_width", ctypes.c_int64),
    ("decay", ctypes.c_int64),
    ("inclusive", ctypes.c_int64),
    ("checkpoint_every", ctypes.c_int64),
)


class GatedRecurrence(library.Arguments):
    kernel = "gated_recurrence"
    _fields_ = (
        *_SIZES,
        ("q", Sequence),
        ("k", Sequence),
        ("v", Sequence),
        ("g", Sequence),
        ("state", ctypes.c_void_p),
        ("o", Sequence),
        ("final_state", ctypes.c_void_p),
        ("checkpoints", ctypes.c_void_p),
    )


class GatedRecurrenceBackward(library.Arguments):
    kernel = "gated_recurrence_backward"
    _fields_ = (
        *_SIZES,
        ("q", Sequence),
        ("k", Sequence),
        ("v", Sequence),
        ("g", Sequence),
        ("state", ctypes.c_void_p),
        ("checkpoints", ctypes.c_void_p),
        ("grad_o", Sequence),
        ("grad_final_state", ctypes.c_void_p),
        ("grad_q", Sequence),
        ("grad_k", Sequence),
        ("grad_v", Sequence),
        ("grad_g", Sequence),
        ("grad_state", ctypes.c_void_p),
    )


def run(problem: Problem, chunk_size: int, sub_chunk: int) -> tuple[Tensor | None, Tensor]:
    """See :func:`regard.engines.gated_recurrence.gated_recurrence`.

    Inputs are read in place, each in float32 or bfloat16. The kernel chooses its own blocks: `chunk_size` and
    `sub_chunk` would only affect rounding.
    """
    if problem.beta is not None:
        return delta_rule.run(_for_each_head(problem))
    state = None if problem.state is None else problem.state.float()
    keep = torch.is_grad_enabled() and problem.records
    o, final_state, _ = _gated_recurrence(replace(problem, state=state), keep)
    return (None if problem.q is None else o), final_state


def _for_each_head(p: Problem) -> Problem:
    """Repeat queries and keys for each head of values, as the delta rule's kernel needs them."""
    return replace(p, q=None if p.q is None else for_each_head(p.q, p.v), k=for_each_head(p.k, p.v))


def refuses(problem: Problem, chunk_size: int, sub_chunk: int) -> str | None:
    """The reason why the kernel cannot run a call; None if it can."""
    reason = _refusal(problem)
    return delta_rule.refuses(_for_each_head(problem)) if reason is None and problem.beta is not None else reason


def _refusal(p: Problem) -> str | None:
    if p.v.ndim != 4:
        return f"v has {p.v.ndim} axes, not 4"
    return refusal(p.v.shape[:3], p.q, p.k, p.v, p.log_decay, p.state)


def refusal(
    lead: torch.Size,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    more_columns: int = 0,
) -> str | None:
    """The reason why the kernels cannot read such tensors; None if they can.

    Args:
        lead: (B, H, N), or (B, H) for one token.
        more_columns: number of columns that states have beyond the value features.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("log_decay", g), ("state", state)):
        if x is None or (x.is_cpu and x.dtype in library.DTYPES):
            continue
        if x.dtype not in library.DTYPES:
            return f"it computes in float32 and bfloat16, and {name} is {str(x.dtype)[6:]}"
        return f"it runs on cpu, and {name} is on {x.device.type}"
    if v.ndim != len(lead) + 1 or k.ndim != v.ndim:
        return f"k has {k.ndim} axes and v {v.ndim}, not {len(lead) + 1}"
    batch, heads, *tokens = lead
    shape, value_width = k.shape, v.shape[-1]
    width = shape[-1]
    if width < 1 or value_width < 1:
        return "keys or values without features"
    if max(width, value_width + more_columns) > library.MOST:
        return f"keys or values of more than {library.MOST} features"
    for name, x in (("k", k), ("q", q)):
        if x is None or (name == "q" and x.shape == shape):
            continue
        groups = x.shape[1] if x.ndim == v.ndim else 0
        if groups < 1 or heads % groups or x.shape != (batch, groups, *tokens, width):
            return f"{name} has shape {tuple(x.shape)} for v of shape {tuple(v.shape)} and {width} key features"
    if g is not None and g.shape != (*lead, width) and g.shape != (*lead, 1):
        return f"log_decay has shape {tuple(g.shape)}, not {tuple(lead)} and 1 or {width}"
    matrix = (width, value_width + more_columns)
    if state is not None and state.shape != (batch, heads, *matrix):
        return f"state has shape {tuple(state.shape)}, not {(batch, heads, *matrix)}"
    return None


def _check(p: Problem) -> None:
    reason = _refusal(p)
    if reason is None and p.beta is not None:
        reason = "there is a beta, for which there is the delta rule"
    if reason is None and p.state is not None and p.state.dtype != torch.float32:
        reason = f"the state is {str(p.state.dtype)[6:]}, not float32"
    if reason is not None:
        raise Unsupported(f"the native gated recurrence with such tensors: {reason}", nearest="backend='torch'")


def sequence(x: Tensor | None) -> Sequence:
    """The struct for a tensor (B, heads, N, width) with a contiguous last axis, which the caller must keep alive."""
    if x is None:
        return Sequence()
    batch, head, token, _ = x.stride()
    return Sequence(pointer(x), library.DTYPES[x.dtype], x.shape[1], batch, head, token)


def sizes(k: Tensor, v: Tensor, g: Tensor | None, inclusive: bool) -> tuple[int, ...]:
    """The leading numbers of the structs of both directions."""
    batch, heads, tokens, value_width = v.shape
    widths = k.shape[-1], value_width
    return torch.get_num_threads(), batch, heads, tokens, *widths, decay_kind(g), int(inclusive), CHECKPOINT_EVERY


def decay_kind(g: Tensor | None) -> int:
    """0 for no decay, 1 for one decay per head, 2 for one per feature."""
    return 0 if g is None else 1 if g.shape[-1] == 1 else 2


def rows(x: Tensor | None) -> Tensor | None:
    """`x` with a contiguous last axis, as kernels read it; None stays None."""
    return None if x is None else rows_contiguous(x)


def _empty_results(q: Tensor | None, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    o, state = v.new_empty(v.shape if q is not None else (0,)), _empty_state(k, v)
    kept = checkpoint_count(v.shape[2]) if keep else 0
    return o, state, v.new_empty((*state.shape[:2], kept, *state.shape[2:]), dtype=torch.float32)


def _empty_state(k: Tensor, v: Tensor) -> Tensor:
    return v.new_empty((*v.shape[:2], k.shape[-1], v.shape[-1]), dtype=torch.float32)


def checkpoint_count(tokens: int) -> int:
    """Number of states that forward stores for backward: one every `CHECKPOINT_EVERY` tokens, except at the start."""
    return max(0, (tokens - 1) // CHECKPOINT_EVERY)


@operator("gated_recurrence")
def _gated_recurrence(problem: Problem, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (empty if q is None), the final state, and with `keep` the states that backward starts from."""
    _check(problem)
    laid_out = _laid_out(problem)
    results = _empty_results(*laid_out[:3], keep)
    library.call(_arguments(*laid_out, problem.inclusive, *results))
    return results


def _arguments(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    inclusive: bool,
    o: Tensor,
    final_state: Tensor,
    checkpoints: Tensor,
) -> GatedRecurrence:
    return GatedRecurrence(
        *sizes(k, v, g, inclusive),
        sequence(q),
        sequence(k),
        sequence(v),
        sequence(g),
        pointer(state),
        Sequence() if q is None else sequence(o),
        pointer(final_state),
        pointer(checkpoints) if checkpoints.numel() else None,
    )


@lru_cache(maxsize=256)
def _template(layouts: tuple[library.Layout | None, ...], inclusive: bool, threads: int) -> bytes | None:
    """The struct for tensors (q, k, v, log_decay and state) with these layouts, without addresses; None if the kernel
    cannot read them as they are."""
    found = library.samples(layouts)
    if found is None:
        return None
    q, k, v, g, state = found
    assert k is not None and v is not None
    problem = Problem(q, k, v, g, None, state, inclusive)
    if _refusal(problem) is not None or (state is not None and state.dtype != torch.float32):
        return None
    laid_out = _laid_out(problem)
    if any(read is not x for read, x in zip(laid_out, found, strict=True)):
        return None
    return bytes(_arguments(*laid_out, inclusive, *_empty_results(q, k, v, False)))


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    inclusive: bool,
) -> tuple[Tensor, Tensor] | None:
    """:func:`run` by a direct kernel call; None for calls that need the general path, such as those that autograd, a
    profiler or a mode must see.

    For few tokens, the general path through Python takes longer than the kernel.
    """
    if not runs_plainly(q, k, v, log_decay, beta, state):
        return None
    if beta is not None:
        return delta_rule.plain(q, k, v, log_decay, beta, state, inclusive)
    template = _template(library.layouts(q, k, v, log_decay, state), inclusive, torch.get_num_threads())
    if template is None:
        return None
    arguments = GatedRecurrence.from_buffer_copy(template)
    o, final_state = v.new_empty(v.shape), _empty_state(k, v)
    arguments.q.data, arguments.k.data, arguments.v.data = pointer(q), pointer(k), pointer(v)
    arguments.g.data, arguments.state = pointer(log_decay), pointer(state)
    arguments.o.data, arguments.final_state = pointer(o), pointer(final_state)
    library.call(arguments)
    return o, final_state


def _laid_out(p: Problem) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q, k, v, log_decay and state in the layouts that the kernels read."""
    state = None if p.state is None else p.state.contiguous()
    return rows(p.q), rows_contiguous(p.k), rows_contiguous(p.v), rows(p.log_decay), state


@_gated_recurrence.register_fake
def _(problem: Problem, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(problem.q, problem.k, problem.v, keep)


@operator("gated_recurrence_backward")
def _gated_recurrence_backward(
    grad_o: Tensor | None, grad_final_state: Tensor | None, problem: Problem, checkpoints: Tensor, needed: list[bool]
) -> list[Tensor]:
    """Gradients of the problem's learned tensors; empty where not needed."""
    _check(problem)
    q, k, v, g, state = _laid_out(problem)
    batch, heads, tokens, value_width = v.shape
    matrix = (k.shape[-1], value_width)
    same("checkpoints", checkpoints, (batch, heads, checkpoint_count(tokens), *matrix), torch.float32)
    if grad_o is not None:
        same("grad_o", grad_o, tuple(v.shape) if q is not None else (0,), v.dtype)
    if grad_final_state is not None:
        same("grad_final_state", grad_final_state, (batch, heads, *matrix), torch.float32)
    grads = problem.empty_gradients(needed)
    to_q, to_k, to_v, to_g, _, to_state = (grad if grad.numel() else None for grad in grads)
    grad_o = rows(grad_o) if q is not None else None
    grad_final_state = None if grad_final_state is None else grad_final_state.contiguous()
    checkpoints = checkpoints.contiguous()
    library.call(
        GatedRecurrenceBackward(
            *sizes(k, v, g, problem.inclusive),
            sequence(q),
            sequence(k),
            sequence(v),
            sequence(g),
            pointer(state),
            pointer(checkpoints),
            sequence(grad_o),
            pointer(grad_final_state),
            *map(sequence, (to_q, to_k, to_v, to_g)),
            pointer(to_state),
        )
    )
    return grads


@_gated_recurrence_backward.register_fake
def _(
    grad_o: Tensor | None, grad_final_state: Tensor | None, problem: Problem, checkpoints: Tensor, needed: list[bool]
) -> list[Tensor]:
    return problem.empty_gradients(needed)


_gated_recurrence.register_autograd(partial(differentiate, _gated_recurrence_backward), setup_context=save)
_gated_recurrence_backward.refuse_gradient(
    "a second derivative of the native gated recurrence", supported="first derivatives"
)
