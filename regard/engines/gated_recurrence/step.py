"""One token of the gated recurrence in C++ (see `native/src/recurrence.cpp`), with or without beta."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library, recycled
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator, runs_plainly
from regard.contract import Unsupported
from regard.engines.gated_recurrence.native_form import Sequence, decay_kind, refusal, rows
from regard.engines.gated_recurrence.torch_form import for_each_head


class GatedRecurrenceStep(library.Arguments):
    kernel = "gated_recurrence_step"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("key_width", ctypes.c_int64),
        ("value_width", ctypes.c_int64),
        ("decay", ctypes.c_int64),
        ("q", Sequence),
        ("k", Sequence),
        ("v", Sequence),
        ("g", Sequence),
        ("beta", Sequence),
        ("state", ctypes.c_void_p),
        ("o", Sequence),
        ("new_state", ctypes.c_void_p),
    )


def run_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`regard.engines.gated_recurrence.gated_recurrence_step`."""
    return _step(q, k, v, log_decay, beta, state)


def refuses(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor
) -> str | None:
    """The reason why the kernel cannot run a step; None if it can."""
    if v.ndim != 3:
        return f"v has {v.ndim} axes, not 3"
    if state.dtype != torch.float32:
        return f"the state is {str(state.dtype)[6:]}, not float32"
    if beta is not None and (beta.shape != v.shape[:2] or beta.dtype not in library.DTYPES or not beta.is_cpu):
        return f"beta has shape {tuple(beta.shape)} in {str(beta.dtype)[6:]} on {beta.device.type}"
    return refusal(v.shape[:2], q, k, v, log_decay, state)


def _row(x: Tensor | None) -> Sequence:
    """The struct for a tensor (B, heads, width) with a contiguous last axis, or (B, heads)."""
    if x is None:
        return Sequence()
    batch, head = x.stride()[:2]
    return Sequence(pointer(x), library.DTYPES[x.dtype], x.shape[1], batch, head, 0)


@operator("gated_recurrence_step")
def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The output and the next state."""
    reason = refuses(q, k, v, g, beta, state)
    if reason is not None:
        raise Unsupported(f"a native step with such tensors: {reason}", nearest="backend='torch'")
    q, k, v, g, state = _laid_out(q, k, v, g, state)
    o, new_state = v.new_empty(v.shape), recycled.empty(state.shape)
    library.call(_arguments(q, k, v, g, beta, state, o, new_state))
    return o, new_state


def _laid_out(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """The tensors in the layouts that the kernel reads."""
    return rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), rows(g), state.contiguous()


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    o: Tensor,
    new_state: Tensor,
) -> GatedRecurrenceStep:
    return GatedRecurrenceStep(
        torch.get_num_threads(),
        *v.shape[:2],
        *state.shape[2:],
        decay_kind(g),
        _row(q),
        _row(k),
        _row(v),
        _row(g),
        _row(beta),
        pointer(state),
        _row(o),
        pointer(new_state),
    )


@lru_cache(maxsize=256)
def _template(layouts: tuple[library.Layout | None, ...], threads: int) -> bytes | None:
    """The struct for tensors (q, k, v, log_decay, beta and state) with these layouts, without addresses; None if the
    kernel cannot read them as they are."""
    found = library.samples(layouts)
    if found is None:
        return None
    q, k, v, g, beta, state = found
    assert q is not None and k is not None and v is not None and state is not None
    if refuses(q, k, v, g, beta, state) is not None:
        return None
    laid_out = _laid_out(q, k, v, g, state)
    if any(read is not x for read, x in zip(laid_out, (q, k, v, g, state), strict=True)):
        return None
    return bytes(_arguments(q, k, v, g, beta, state, v.new_empty(v.shape), state))


def plain(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor] | None:
    """:func:`run_step` by a direct kernel call; None for steps that need the general path, such as those that autograd,
    a profiler or a mode must see."""
    if not runs_plainly(q, k, v, log_decay, beta, state):
        return None
    template = _template(library.layouts(q, k, v, log_decay, beta, state), torch.get_num_threads())
    if template is None:
        return None
    arguments = GatedRecurrenceStep.from_buffer_copy(template)
    o, new_state = v.new_empty(v.shape), recycled.empty(state.shape)
    arguments.q.data, arguments.k.data, arguments.v.data = pointer(q), pointer(k), pointer(v)
    arguments.g.data, arguments.beta.data, arguments.state = pointer(log_decay), pointer(beta), pointer(state)
    arguments.o.data, arguments.new_state = pointer(o), pointer(new_state)
    library.call(arguments)
    return o, new_state


@_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_o: Tensor, grad_new_state: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass of one step, in torch operators: training does not go token by token."""
    inputs = q, k, v, g, beta, state = ctx.saved_tensors
    decay = None if g is None else g.float().exp()[..., None]
    decayed = state if decay is None else decay * state
    keys, queries = for_each_head(k, v).float(), for_each_head(q, v).float()
    values = v.float()
    if beta is not None:
        errors = values - torch.einsum("bhkv,bhk->bhv", decayed, keys)
        values = beta.float()[..., None] * errors
    new_state = decayed + keys[..., None] * values[..., None, :]
    grad_o = grad_o.float()
    later = grad_new_state + queries[..., None] * grad_o[..., None, :]
    grad_q, grad_k = (torch.einsum("bhkv,bhv->bhk", x, y) for x, y in ((new_state, grad_o), (later, values)))
    grad_v, grad_beta = torch.einsum("bhkv,bhk->bhv", later, keys), None
    if beta is not None:
        grad_beta = (grad_v * errors).sum(-1)
        grad_v = beta.float()[..., None] * grad_v
        grad_k = grad_k - torch.einsum("bhkv,bhv->bhk", decayed, grad_v)
        later = later - keys[..., None] * grad_v[..., None, :]
    grad_g = None if g is None else (later * decayed).sum(-1).sum_to_size(g.shape)
    grad_state = later if decay is None else decay * later
    grads = [_by_head(grad_q, q), _by_head(grad_k, k), grad_v, grad_g, grad_beta, grad_state]
    return tuple(None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))


def _by_head(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of shared heads: the sum over the heads that share them."""
    return grad if grad.shape == x.shape else grad.unflatten(1, (x.shape[1], -1)).sum(2)


_step.register_autograd(_differentiate, setup_context=_save)
