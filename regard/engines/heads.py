"""Queries, keys and values as attention kernels take them: the leading fields of their structs, and gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.operators import Packed

Strides = ctypes.c_int64 * 3

HEADS = (
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
)
"""The leading fields of all attention structs."""


def heads_arguments(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> dict[str, Any]:
    """Values of the fields :data:`HEADS`; features must be contiguous, and the caller must keep the tensors alive."""
    return {
        "threads": torch.get_num_threads(),
        "dtype": library.DTYPES[q.dtype],
        "lse": library.pointer(lse) if lse.numel() else None,
        "batch": q.shape[0],
        "heads": q.shape[1],
        "kv_heads": k.shape[1],
        "n": q.shape[2],
        "m": k.shape[2],
        "width": q.shape[3],
        "value_width": v.shape[3],
        **library.strided(q=q, k=k, v=v, out=out),
    }


HEAD_GRADIENTS = (
    ("grad_out", ctypes.c_void_p),
    ("grad_out_strides", Strides),
    ("grad_q", ctypes.c_void_p),
    ("grad_k", ctypes.c_void_p),
    ("grad_v", ctypes.c_void_p),
    ("grad_q_strides", Strides),
    ("grad_k_strides", Strides),
    ("grad_v_strides", Strides),
)
"""The fields after the forward struct for kernels with gradients of queries, keys and values alone."""


@dataclass(frozen=True)
class PackedHeads(Packed):
    """Base of problems in which only queries, keys and values have gradients."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.q, self.k, self.v]

    def empty_gradients(self, needed: Sequence[bool]) -> list[Tensor]:
        """Empty gradients with the heads of a token side by side if the input has them so."""
        inputs = (self.q, self.k, self.v)
        return [empty_gradient(x) if need else x.new_empty(0) for x, need in zip(inputs, needed, strict=True)]

    def heads_misfit(self) -> str | None:
        """The mismatch among queries, keys and values of four axes, in words; None if they fit together."""
        batch, heads, n, width = self.q.shape
        kv_heads, m, value_width = self.v.shape[1:]
        same = self.k.shape == (batch, kv_heads, m, width) and self.v.shape[0] == batch
        if not same or min(kv_heads, width, value_width) < 1:
            return "q, k and v of shapes that do not belong together"
        if heads % kv_heads or max(n, m, width, value_width) > library.MOST:
            return f"{heads} heads on {kv_heads}, or more than {library.MOST} tokens or features"
        return None

    def run_backward(
        self, kernel: type[library.Arguments], forward: ctypes.Structure, grad_out: Tensor, needed: Sequence[bool]
    ) -> list[Tensor]:
        """Gradients of q, k and v by a kernel whose struct ends with :data:`HEAD_GRADIENTS`; empty where not needed."""
        grads = self.empty_gradients(needed)
        grad_q, grad_k, grad_v = (x if need else None for x, need in zip(grads, needed, strict=True))
        outer = library.strided(grad_out=grad_out, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v)
        library.call(kernel(forward=ctypes.pointer(forward), **outer))
        return grads


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """An empty (B, H, N, V) with the heads of a token side by side, as the output projection reads them."""
    batch, heads, n, _ = q.shape
    width = v.shape[3]
    return v.new_empty_strided((batch, heads, n, width), (heads * n * width, width, heads * width, 1))


def by_row(x: Tensor) -> int:
    """The stride between rows of the batch; 0 if all rows share the tensor."""
    return x.stride(0) if x.shape[0] > 1 else 0


def empty_gradient(x: Tensor) -> Tensor:
    """An empty tensor like x, with the heads of a token side by side if x has them so, and contiguous features."""
    if x.stride(1) < x.stride(2):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
    return x.new_empty(x.shape)
