"""The softmax scan in C++ (`native/src/softmax_scan.cpp`): one pass over the values, and gradients without stored states."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer, rows_contiguous
from regard.backends.operators import operator
from regard.contract import Unsupported
from regard.engines.softmax_scan.torch_form import Carry

SCORES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of scores, decays and mixing weights: all are read in float32."""


class Scan(library.Arguments):
    kernel = "softmax_scan"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("s", ctypes.c_void_p),
        ("s_strides", ctypes.c_int64 * 4),
        ("v", ctypes.c_void_p),
        ("v_strides", ctypes.c_int64 * 3),
        ("log_decay", ctypes.c_void_p),
        ("log_decay_strides", ctypes.c_int64 * 3),
        ("mix", ctypes.c_void_p),
        ("mix_strides", ctypes.c_int64 * 4),
        ("m", ctypes.c_void_p),
        ("u", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m_out", ctypes.c_void_p),
        ("u_out", ctypes.c_void_p),
        ("w_out", ctypes.c_void_p),
    )


class ScanBackward(library.Arguments):
    kernel = "softmax_scan_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(Scan)),
        ("grad_out", ctypes.c_void_p),
        ("grad_out_strides", ctypes.c_int64 * 4),
        ("grad_u", ctypes.c_void_p),
        ("grad_w", ctypes.c_void_p),
        ("grad_s", ctypes.c_void_p),
        ("grad_s_strides", ctypes.c_int64 * 4),
        ("grad_v", ctypes.c_void_p),
        ("grad_mix", ctypes.c_void_p),
        ("grad_carry_m", ctypes.c_void_p),
        ("grad_carry_u", ctypes.c_void_p),
        ("grad_carry_w", ctypes.c_void_p),
    )


def run(
    s: Tensor, v: Tensor, carry: Carry, chunk_size: int, log_decay: Tensor | None, mix: Tensor | None
) -> tuple[Tensor, Carry]:
    """See :func:`regard.engines.softmax_scan.softmax_scan`; `chunk_size` is the kernel's own."""
    gate = None if log_decay is None else log_decay.float()
    out, m, u, w = _scan(s.float(), v, gate, None if mix is None else mix.float(), *carry)
    return (out if mix is not None else out.transpose(2, 3)), Carry(m.detach(), u, w)


def refuses(
    s: Tensor, v: Tensor, carry: Carry, chunk_size: int, log_decay: Tensor | None, mix: Tensor | None
) -> str | None:
    """Why a call is left to another backend."""
    if v.dtype not in library.DTYPES:
        return f"values in {v.dtype}"
    read = [x for x in (s, log_decay, mix) if x is not None]
    for x in read:
        if x.dtype not in SCORES:
            return f"scores, decays or mixing weights in {x.dtype}"
    if any(x.dtype != torch.float32 for x in carry):
        return "a carry in another dtype than float32"
    if any(x.device.type != "cpu" for x in (*read, v, *carry)):
        return "tensors on several devices"
    return _shapes_differ(s, v, log_decay, mix, *carry)


def _shapes_differ(
    s: Tensor, v: Tensor, log_decay: Tensor | None, mix: Tensor | None, m: Tensor, u: Tensor, w: Tensor
) -> str | None:
    if s.ndim != 4 or v.ndim != 4:
        return "scores and values of other than 4 axes"
    batch, heads, n, queries = s.shape
    found = v.shape[:3] == s.shape[:3] and max(queries, v.shape[3]) <= library.MOST
    found = found and m.shape == u.shape == (batch, heads, queries)
    found = found and w.shape == (batch, heads, queries, v.shape[-1]) and (mix is None or mix.shape == s.shape)
    if log_decay is not None:
        found = found and log_decay.ndim == 3 and log_decay.shape[2] == n
        found = found and log_decay.shape[0] in (1, batch) and log_decay.shape[1] in (1, heads)
    return None if found else "shapes that do not belong together"


def _arguments(
    s: Tensor, v: Tensor, log_decay: Tensor | None, mix: Tensor | None, m: Tensor, u: Tensor, w: Tensor, out: Tensor
) -> Scan:
    """The struct without the carry out. The caller keeps the tensors."""
    batch, heads, n, queries = s.shape
    values = {} if log_decay is None else {"log_decay": pointer(log_decay), "log_decay_strides": _shared(log_decay)}
    if mix is not None:
        values.update(mix=pointer(mix), mix_strides=mix.stride())
    return Scan(
        threads=torch.get_num_threads(),
        dtype=library.DTYPES[v.dtype],
        batch=batch,
        heads=heads,
        n=n,
        queries=queries,
        width=v.shape[-1],
        s=pointer(s),
        s_strides=s.stride(),
        v=pointer(v),
        v_strides=v.stride()[:3],
        m=pointer(m),
        u=pointer(u),
        w=pointer(w),
        out=pointer(out),
        **values,
    )


def _shared(x: Tensor) -> tuple[int, ...]:
    """Strides that do not move along axes of size 1."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _check(s: Tensor, v: Tensor, log_decay: Tensor | None, mix: Tensor | None, *carry: Tensor) -> None:
    reason = refuses(s, v, Carry(*carry), 1, log_decay, mix)
    if reason is None and any(x is not None and x.dtype != torch.float32 for x in (s, log_decay, mix)):
        reason = "scores, decays or mixing weights in another dtype than float32"
    if reason is not None:
        raise Unsupported(f"the native softmax scan with {reason}", nearest="backend='torch'")


def _empty_outputs(s: Tensor, v: Tensor, mix: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, n, queries = s.shape
    shape = (batch, heads, n, v.shape[-1]) if mix is not None else (batch, heads, queries, n, v.shape[-1])
    m = s.new_empty(batch, heads, queries)
    return v.new_empty(shape), m, torch.empty_like(m), w.new_empty(w.shape)


@operator("softmax_scan")
def _scan(
    s: Tensor, v: Tensor, log_decay: Tensor | None, mix: Tensor | None, m: Tensor, u: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs (B, H, Q, N, V), with mix (B, H, N, V), and the carry (m, u, w)."""
    _check(s, v, log_decay, mix, m, u, w)
    v, m, u, w = rows_contiguous(v), m.contiguous(), u.contiguous(), w.contiguous()
    out, m_out, u_out, w_out = _empty_outputs(s, v, mix, w)
    arguments = _arguments(s, v, log_decay, mix, m, u, w, out)
    arguments.m_out, arguments.u_out, arguments.w_out = pointer(m_out), pointer(u_out), pointer(w_out)
    library.call(arguments)
    return out, m_out, u_out, w_out


@_scan.register_fake
def _(s, v, log_decay, mix, m, u, w):
    return _empty_outputs(s, v, mix, w)


def _empty_gradients(
    s: Tensor, v: Tensor, mix: Tensor | None, m: Tensor, w: Tensor, need_s: bool, need_v: bool, need_mix: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    nothing = (0,)
    return (
        torch.empty_like(s) if need_s else s.new_empty(nothing),
        v.new_empty(v.shape if need_v else nothing),
        s.new_empty(s.shape if need_mix else nothing),
        m.new_empty(m.shape),
        m.new_empty(m.shape),
        w.new_empty(w.shape),
    )


@operator("softmax_scan_backward")
def _scan_backward(
    grad_out: Tensor,
    grad_u: Tensor,
    grad_w: Tensor,
    s: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    mix: Tensor | None,
    m: Tensor,
    u: Tensor,
    w: Tensor,
    out: Tensor | None,
    need_s: bool,
    need_v: bool,
    need_mix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of s, v, mix (empty where not needed) and of the carry m, u, w."""
    _check(s, v, log_decay, mix, m, u, w)
    expected = _empty_outputs(s, v, mix, w)
    given = [grad_out, grad_u, grad_w] + ([] if mix is not None else [out])
    like = [expected[0], expected[2], expected[3], expected[0]]
    for x, y in zip(given, like, strict=False):
        if x is None or x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
            raise Unsupported("gradients or outputs that are not the softmax scan's", nearest="backend='torch'")
    v, m, u, w = rows_contiguous(v), m.contiguous(), u.contiguous(), w.contiguous()
    grad_out, grad_u, grad_w = rows_contiguous(grad_out), grad_u.contiguous(), grad_w.contiguous()
    out = expected[0] if out is None else out.contiguous()
    grads = _empty_gradients(s, v, mix, m, w, need_s, need_v, need_mix and mix is not None)
    forward = _arguments(s, v, log_decay, mix, m, u, w, out)
    strides = grad_out.stride()
    arguments = ScanBackward(
        forward=ctypes.pointer(forward),
        grad_out=pointer(grad_out),
        grad_out_strides=strides[:4] if mix is None else (strides[0], strides[1], 0, strides[2]),
        grad_u=pointer(grad_u),
        grad_w=pointer(grad_w),
        grad_s=pointer(grads[0]) if need_s else None,
        grad_s_strides=grads[0].stride() if need_s else (0, 0, 0, 0),
        grad_v=pointer(grads[1]) if need_v else None,
        grad_mix=pointer(grads[2]) if need_mix else None,
        grad_carry_m=pointer(grads[3]),
        grad_carry_u=pointer(grads[4]),
        grad_carry_w=pointer(grads[5]),
    )
    library.call(arguments)
    return grads


@_scan_backward.register_fake
def _(grad_out, grad_u, grad_w, s, v, log_decay, mix, m, u, w, out, need_s, need_v, need_mix):
    return _empty_gradients(s, v, mix, m, w, need_s, need_v, need_mix and mix is not None)


def _save_scan(ctx, inputs, output):
    s, v, log_decay, mix, m, u, w = inputs
    ctx.save_for_backward(s, v, log_decay, mix, m, u, w, output[0] if mix is None else None)


def _differentiate_scan(ctx, grad_out, grad_m, grad_u, grad_w):
    s, v, log_decay, mix, m, u, w, out = ctx.saved_tensors
    need_s, need_v, need_decay, need_mix = ctx.needs_input_grad[:4]
    grad_s, grad_v, grad_mix, before_m, before_u, before_w = _scan_backward(
        grad_out, grad_u, grad_w, s, v, log_decay, mix, m, u, w, out, need_s or need_decay, need_v, need_mix
    )
    grad_decay = None
    if need_decay:
        # what decays at token t are the exponents of all tokens before it, and an output's exponents' gradients sum to 0
        by_token = torch.cat([before_m.double().sum(-1)[..., None], grad_s.double().sum(-1)[:, :, :-1]], -1)
        grad_decay = by_token.cumsum(-1)[..., : s.shape[2]].sum_to_size(log_decay.shape).to(log_decay.dtype)
    return (
        grad_s if need_s else None,
        grad_v if need_v else None,
        grad_decay,
        grad_mix if need_mix else None,
        before_m,
        before_u,
        before_w,
    )


_scan.register_autograd(_differentiate_scan, setup_context=_save_scan)
_scan_backward.refuse_gradient("second derivatives of the native softmax scan")
