"""Softmax in two levels in C++ (`native/src/grouped_attention.cpp`): scores of whole groups at a time, never all."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.operators import operator
from regard.contract import BlockMask, Unsupported
from regard.core.visibility import PositionBias, Ranks
from regard.engines.grouped_attention.torch_form import Dropout

Strides = ctypes.c_int64 * 3


class GroupedAttention(library.Arguments):
    kernel = "grouped_attention"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("value_width", ctypes.c_int64),
        ("q_strides", Strides),
        ("k_strides", Strides),
        ("v_strides", Strides),
        ("out_strides", Strides),
        ("query_ranks", ctypes.c_void_p),
        ("key_ranks", ctypes.c_void_p),
        ("own", ctypes.c_void_p),
        ("landmark", ctypes.c_void_p),
        ("query_ranks_stride", ctypes.c_int64),
        ("key_ranks_stride", ctypes.c_int64),
        ("own_stride", ctypes.c_int64),
        ("landmark_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
    )


class GroupedAttentionBackward(library.Arguments):
    kernel = "grouped_attention_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(GroupedAttention)),
        ("grad_out", ctypes.c_void_p),
        ("grad_out_strides", Strides),
        ("grad_q", ctypes.c_void_p),
        ("grad_k", ctypes.c_void_p),
        ("grad_v", ctypes.c_void_p),
        ("grad_q_strides", Strides),
        ("grad_k_strides", Strides),
        ("grad_v_strides", Strides),
    )


def refuses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranks: Ranks,
    landmark: Tensor,
    own: Tensor | None,
    causal: bool,
    scale: float,
    bias: Tensor | None,
    position_bias: PositionBias | None,
    blocks: BlockMask | None,
    dropout: Dropout,
    want_weights: bool,
) -> str | None:
    """Why the kernel does not take such a call; None when it does."""
    if dropout.random:
        return "it has no dropout"
    if want_weights:
        return "it does not store the weights"
    if bias is not None or position_bias is not None or blocks is not None:
        return "it has no biases and no block mask"
    if k.dtype not in library.DTYPES or v.dtype not in library.DTYPES:
        return "keys or values in another dtype than float32 and bfloat16"
    if any(x is not None and x.device.type != "cpu" for x in (k, v, landmark, own, ranks.queries, ranks.keys)):
        return "tensors on several devices"
    return _misfit(q, k, v, ranks.queries, ranks.keys, landmark, own)


def _misfit(
    q: Tensor, k: Tensor, v: Tensor, query_ranks: Tensor, key_ranks: Tensor, landmark: Tensor, own: Tensor | None
) -> str | None:
    """The mismatch among the tensors, in words; None when they belong together."""
    if not q.ndim == k.ndim == v.ndim == 4:
        return "q, k and v that do not have four axes"
    batch, heads, n, width = q.shape
    kv_heads, m, value_width = v.shape[1:]
    if k.shape != (batch, kv_heads, m, width) or v.shape[0] != batch or min(kv_heads, width, value_width) < 1:
        return "q, k and v of shapes that do not belong together"
    if heads % kv_heads or max(n, m, width, value_width) > library.MOST:
        return f"{heads} heads on {kv_heads}, or more than {library.MOST} tokens or features"
    rows = [(query_ranks, n, torch.int64), (key_ranks, m, torch.int64), (landmark, m, torch.bool)]
    rows += [] if own is None else [(own, n, torch.int64)]
    for x, slots, dtype in rows:
        if x.dtype != dtype or x.ndim != 2 or x.shape[0] not in (1, batch) or x.shape[1] != slots:
            return "ranks, landmarks or groups that do not belong to the tokens"
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranks: Ranks,
    landmark: Tensor,
    own: Tensor | None,
    causal: bool,
    scale: float,
    bias: Tensor | None,
    position_bias: PositionBias | None,
    blocks: BlockMask | None,
    dropout: Dropout,
    want_weights: bool,
) -> tuple[Tensor, None]:
    """See :func:`regard.engines.grouped_attention.grouped_attention`."""
    dtype = v.dtype
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = q.float(), k.float(), v.float()
    out, _ = _grouped_attention(q, k, v, ranks.queries, ranks.keys, landmark, own, causal, float(scale))
    return out.to(dtype), None


def _check(
    q: Tensor, k: Tensor, v: Tensor, query_ranks: Tensor, key_ranks: Tensor, landmark: Tensor, own: Tensor | None
) -> None:
    """Raise Unsupported for tensors that the kernel must not be given."""
    reason = _misfit(q, k, v, query_ranks, key_ranks, landmark, own)
    if reason is None and (q.dtype not in library.DTYPES or k.dtype != q.dtype or v.dtype != q.dtype):
        reason = "q, k and v in other dtypes than one of float32 and bfloat16"
    if reason is None and not library.within_range(query_ranks, key_ranks, own):
        reason = f"ranks or groups beyond {library.MOST}"
    if reason is not None:
        raise Unsupported(f"native grouped attention with {reason}", nearest="backend='torch'")


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def _by_row(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else 0


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_ranks: Tensor,
    key_ranks: Tensor,
    landmark: Tensor,
    own: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[GroupedAttention, tuple[Tensor | None, ...]]:
    """The forward struct, and the tensors whose memory it points at."""
    q, k, v, query_ranks, key_ranks, landmark = map(
        library.rows_contiguous, (q, k, v, query_ranks, key_ranks, landmark)
    )
    own = None if own is None else library.rows_contiguous(own)
    arguments = GroupedAttention(
        threads=torch.get_num_threads(),
        dtype=library.DTYPES[q.dtype],
        q=library.pointer(q),
        k=library.pointer(k),
        v=library.pointer(v),
        out=library.pointer(out),
        lse=library.pointer(lse),
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        n=q.shape[2],
        m=k.shape[2],
        width=q.shape[3],
        value_width=v.shape[3],
        q_strides=_strides(q),
        k_strides=_strides(k),
        v_strides=_strides(v),
        out_strides=_strides(out),
        query_ranks=library.pointer(query_ranks),
        key_ranks=library.pointer(key_ranks),
        own=library.pointer(own),
        landmark=library.pointer(landmark),
        query_ranks_stride=_by_row(query_ranks),
        key_ranks_stride=_by_row(key_ranks),
        own_stride=0 if own is None else _by_row(own),
        landmark_stride=_by_row(landmark),
        scale=scale,
        causal=causal,
    )
    return arguments, (q, k, v, query_ranks, key_ranks, landmark, own, out, lse)


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, V) with the heads of a token side by side, and the log-sum-exp of the upper level (B, H, N)."""
    out = v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("grouped_attention")
def _grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_ranks: Tensor,
    key_ranks: Tensor,
    landmark: Tensor,
    own: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, query_ranks, key_ranks, landmark, own)
    outputs = _empty_outputs(q, v)
    arguments, kept = _arguments(q, k, v, query_ranks, key_ranks, landmark, own, causal, scale, *outputs)
    library.call(arguments)
    del kept
    return outputs


@_grouped_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v)


def _empty_gradient(x: Tensor, wanted: bool) -> Tensor:
    """Like x, with the heads of a token side by side where they are in x; empty when not wanted."""
    if not wanted:
        return x.new_empty(0)
    if x.stride(1) < x.stride(2):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
    return x.new_empty(x.shape)


@operator("grouped_attention_backward")
def _grouped_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_ranks: Tensor,
    key_ranks: Tensor,
    landmark: Tensor,
    own: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    want_q: bool,
    want_k: bool,
    want_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; empty tensors for those not wanted."""
    _check(q, k, v, query_ranks, key_ranks, landmark, own)
    tokens = q.shape[:3]
    if out.shape != (*tokens, v.shape[3]) or grad_out.shape != out.shape or lse.shape != tokens:
        raise Unsupported("native grouped attention with gradients of another output", nearest="backend='torch'")
    if out.dtype != q.dtype or grad_out.dtype != q.dtype or lse.dtype != torch.float32:
        raise Unsupported("native grouped attention with gradients of another dtype", nearest="backend='torch'")
    out, grad_out, lse = library.rows_contiguous(out), library.rows_contiguous(grad_out), lse.contiguous()
    forward, kept = _arguments(q, k, v, query_ranks, key_ranks, landmark, own, causal, scale, out, lse)
    grads = _empty_gradient(q, want_q), _empty_gradient(k, want_k), _empty_gradient(v, want_v)
    grad_q, grad_k, grad_v = grads
    arguments = GroupedAttentionBackward(
        forward=ctypes.pointer(forward), grad_out=library.pointer(grad_out), grad_out_strides=_strides(grad_out)
    )
    if want_q:
        arguments.grad_q, arguments.grad_q_strides = library.pointer(grad_q), Strides(*_strides(grad_q))
    if want_k:
        arguments.grad_k, arguments.grad_k_strides = library.pointer(grad_k), Strides(*_strides(grad_k))
    if want_v:
        arguments.grad_v, arguments.grad_v_strides = library.pointer(grad_v), Strides(*_strides(grad_v))
    library.call(arguments)
    del kept
    return grads


@_grouped_attention_backward.register_fake
def _(grad_out, q, k, v, query_ranks, key_ranks, landmark, own, out, lse, causal, scale, want_q, want_k, want_v):
    return _empty_gradient(q, want_q), _empty_gradient(k, want_k), _empty_gradient(v, want_v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    if grad_out is None or not any(wanted):
        return (None,) * 9
    grads = _grouped_attention_backward(grad_out, *ctx.saved_tensors, *ctx.options, *wanted)
    return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 6)


_grouped_attention.register_autograd(_differentiate, setup_context=_keep)
_grouped_attention_backward.refuse_gradient("gradients of gradients of native grouped attention")
