"""The products in PyTorch. For few rows on a CPU, torch's operators read the codes and compute in bfloat16."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from regard.backends.linear.product import FEW_ROWS
from regard.engines.linear import linear
from regard.engines.quantized_linear.packing import dequantize, padded, unpack
from regard.engines.quantized_linear.problem import Problem

TINY = 1e-30
"""Lower bound for the largest number of a row, so that a row of zeros has a grid too."""

GROUPS = (32, 64, 128, 256)
"""Group sizes that torch's operator supports."""

ROW_BLOCK = 16
"""Number of weight rows that torch's operator processes at once."""

COLUMN_BLOCK = 16
"""Number of columns that torch's 8-bit operator processes at once; other widths make it read past the weight's end."""


def quantized_linear(p: Problem) -> Tensor:
    """See :func:`regard.engines.quantized_linear.quantized_linear`."""
    x = padded(p.x, p.columns)
    y = _by_codes(x, p) if reads_codes(p.x) else None
    if y is None:
        return linear(x, dequantize(p.codes, p.scale, p.offset, x.dtype), p.bias)
    return y if p.bias is None else y + p.bias


def reads_codes(x: Tensor) -> bool:
    """Return whether a product of x may read codes: few rows, no gradients, float32 or bfloat16 on the CPU."""
    if torch.compiler.is_compiling():  # a traced program may run elsewhere, and on any number of rows
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return 0 < x.numel() <= FEW_ROWS * x.shape[-1]


def _by_codes(x: Tensor, p: Problem) -> Tensor | None:
    """The product without bias; None if torch has no operator for such a weight."""
    if not p.codes.is_cpu:
        return None
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(torch.bfloat16)
    if p.bits == 8:
        if p.columns % COLUMN_BLOCK:
            return None
        y = torch._weight_int8pack_mm(rows, p.codes, p.scale[:, 0].to(torch.bfloat16))
    else:
        weight = _packed(p)
        if weight is None:
            return None
        y = torch._weight_int4pack_mm_for_cpu(rows, weight.codes, p.group, weight.scale_and_offset)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


class Layout(NamedTuple):
    """A 4-bit weight in the layout of torch's operator."""

    codes: Tensor
    scale_and_offset: Tensor


_LAYOUTS = WeakIdKeyDictionary()
"""For each tensor of codes, its version and its copy in that layout."""


def _packed(p: Problem) -> Layout | None:
    """The weight in the operator's layout; None for sizes that the operator does not support."""
    if p.codes.shape[0] % ROW_BLOCK or p.group not in GROUPS:
        return None
    known = _LAYOUTS.get(p.codes)
    version = None if p.codes.is_inference() else p.codes._version
    if known is not None and known[0] == version:
        return known[1]
    offset = torch.zeros_like(p.scale) if p.offset is None else p.offset
    both = torch.stack([p.scale.T, offset.T], -1).to(torch.bfloat16).contiguous()
    made = Layout(torch._convert_weight_to_int4pack_for_cpu(unpack(p.codes).to(torch.int32), 1), both)
    _LAYOUTS[p.codes] = (version, made)
    return made


def integer_product(x: Tensor, codes: Tensor) -> Tensor:
    """(M, K) times the transpose of (N, K), both int8, as exact sums in float32."""
    if x.shape[0] and codes.shape[0] and _sums_are_exact(x.device.type):
        return torch._int_mm(x, codes.T).float()
    return (x.double() @ codes.double().T).float()


@functools.cache
def _sums_are_exact(device: str) -> bool:
    """Return whether torch's int8 product exists and does not saturate, as sums of pairs do on some processors."""
    if device != "cpu":
        return False
    high = torch.full((3, 512), 127, dtype=torch.int8, device=device)
    low = torch.full((16, 512), -128, dtype=torch.int8, device=device)
    try:
        found = [int(torch._int_mm(high, other.T)[0, 0]) for other in (low, -low - 1)]
    except RuntimeError:
        return False
    return found == [-127 * 128 * 512, 127 * 127 * 512]
