"""A decoder layer in C++ (`native/src/decoder.cpp`), in float32, with weights in float32 or quantized."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from regard.backends.linear.product import FEW_ROWS
from regard.backends.native import library
from regard.backends.native.library import pointer
from regard.backends.operators import PLAIN, runs_plainly
from regard.engines.quantized_linear.native_form import SMALLEST_GROUP

if TYPE_CHECKING:
    from jaxtyping import Float

KINDS = {torch.float32: 32, torch.int8: 8, torch.uint8: 4}
"""Bits per number of a weight, by dtype."""


class Weight(NamedTuple):
    """The weight of a linear layer: float32, or codes as in :func:`regard.engines.quantized_linear.quantized_linear`.

    Attributes:
        codes: (N, K) float32 or int8, or (N, columns / 2) uint8, contiguous.
        scale, offset: of quantized weights, (N, groups) bfloat16.
        bias: (N,) float32.
        input_scale: (K,) float32, factors on the columns of the input.
        rounded: whether rows of the input are then rounded to 8 bits, as in
            :func:`regard.engines.quantized_linear.dynamic_linear`.
    """

    codes: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    rounded: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All its tensors."""
        return self.codes, self.scale, self.offset, self.bias, self.input_scale


class WeightArguments(ctypes.Structure):
    """The struct `regard_weight`, which several kernels take."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("bits", "n", "k", "columns", "group", "rounded")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "offset", "bias", "input_scale")),
    )


class DecoderInputs(library.Arguments):
    kernel = "decoder_inputs"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("head_width", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("projections", WeightArguments * 3),
        ("outputs", ctypes.c_void_p * 3),
        ("normed", ctypes.c_void_p),
    )


class DecoderOutputs(library.Arguments):
    kernel = "decoder_outputs"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("attended", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("output", WeightArguments),
        ("gate", WeightArguments),
        ("up", WeightArguments),
        ("down", WeightArguments),
        ("y", ctypes.c_void_p),
    )


class DecoderLayer:
    """The parts of a layer around its attention: x + attend(norm(x)), then x + down(silu(gate(norm(x))) up(norm(x))).

    Args:
        norms: weights of both RMS norms, (width,) float32.
        eps: eps of both RMS norms.
        head_width: features per head, all of which are rotated by their positions.
        weights: weights of queries, keys, values, output, gate, up and down.

    Holds pointers to the tensors: make a new object when they move. :attr:`reason` says why the kernels do not support
    them, and is empty if they do.

    Attributes:
        eps, norms, weights: the arguments in the form that the kernels take.
    """

    def __init__(
        self, norms: Sequence[Tensor], eps: Sequence[float], head_width: int, weights: Sequence[Weight]
    ) -> None:
        self._kept = [*norms, *(x for weight in weights for x in weight.tensors if x is not None)]
        self.width, self.head_width = norms[0].shape[0], head_width
        self.reason = library.why_missing() or self._misfit(norms, weights)
        if self.reason:
            return
        q, k, v, output, gate, up, down = self.weights = [*map(struct_of, weights)]
        self.eps, self.norms = [*eps], [*map(pointer, norms)]
        self._sizes = q.n, k.n, v.n
        self._inputs = DecoderInputs(
            width=self.width,
            head_width=head_width,
            eps=eps[0],
            norm=pointer(norms[0]),
            projections=(WeightArguments * 3)(q, k, v),
        )
        self._outputs = DecoderOutputs(
            width=self.width, eps=eps[1], norm=pointer(norms[1]), output=output, gate=gate, up=up, down=down
        )

    def _misfit(self, norms: Sequence[Tensor], weights: Sequence[Weight]) -> str:
        if not all(type(x) in PLAIN and x.is_cpu and x.is_contiguous() for x in self._kept):
            return "weights that are not plain, contiguous and on the processor"
        if any(x.dtype != torch.float32 or x.shape != (self.width,) for x in norms):
            return "norms of other widths, or not in float32"
        if self.head_width < 2 or self.head_width % 2:
            return "heads of an odd width"
        for weight in weights:
            reason = unfit_weight(weight)
            if reason:
                return reason
        q, k, v, output, gate, up, down = map(struct_of, weights)
        fits = q.n % self.head_width == k.n % self.head_width == 0 and k.n == v.n and output.k == q.n
        fits = fits and {q.k, k.k, v.k, gate.k, up.k, output.n, down.n} == {self.width} and gate.n == up.n == down.k
        return "" if fits else "sizes that do not belong together"

    def fits(self, x: Tensor, cosine: Tensor) -> bool:
        """Return whether tokens that :func:`few_tokens` accepts have this layer's sizes."""
        return not self.reason and x.shape[2] == self.width and cosine.shape[2] == self.head_width

    def inputs(
        self,
        x: Float[Tensor, "b n width"],
        cosine: Float[Tensor, "c n d"],
        sine: Float[Tensor, "c n d"],
        normed: Float[Tensor, "b n width"] | None = None,
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b g n d"], Float[Tensor, "b g n d"]]:
        """Rotated queries and keys, and values; the normed input is written to `normed`, a contiguous tensor, if
        given."""
        rows = x.shape[0], x.shape[1]
        cosine, sine = of_rows(cosine, rows[0]), of_rows(sine, rows[0])
        outputs = [x.new_empty((*rows, size)) for size in self._sizes]
        arguments = DecoderInputs.from_buffer_copy(self._inputs)
        arguments.threads, arguments.m, arguments.x = torch.get_num_threads(), rows[0] * rows[1], pointer(x)
        arguments.cosine, arguments.sine = pointer(cosine), pointer(sine)
        arguments.outputs[:] = [pointer(y) for y in outputs]
        arguments.normed = pointer(normed)
        library.call(arguments)
        q, k, v = (y.view(*rows, -1, self.head_width).transpose(1, 2) for y in outputs)
        return q, k, v

    def outputs(self, x: Float[Tensor, "b n width"], attended: Float[Tensor, "b n k"]) -> Float[Tensor, "b n width"]:
        """The layer's output, given the output of its heads."""
        attended, y = attended.contiguous(), torch.empty_like(x)
        arguments = DecoderOutputs.from_buffer_copy(self._outputs)
        arguments.threads, arguments.m = torch.get_num_threads(), x.shape[0] * x.shape[1]
        arguments.x, arguments.attended, arguments.y = pointer(x), pointer(attended), pointer(y)
        library.call(arguments)
        return y


def few_tokens(x: Tensor, cosine: Tensor, sine: Tensor) -> bool:
    """Return whether tokens (B, N, width) with their positions (B or 1, N, D) are supported: few, in float32, without
    gradients, and with no profiler or mode active."""
    return (
        x.ndim == cosine.ndim == 3
        and 0 < x.shape[0] * x.shape[1] <= FEW_ROWS
        and x.dtype == cosine.dtype == sine.dtype == torch.float32
        and cosine.shape == sine.shape
        and cosine.shape[0] in (1, x.shape[0])
        and cosine.shape[1] == x.shape[1]
        and runs_plainly(x, cosine, sine)
        and x.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def of_rows(x: Float[Tensor, "c n d"], rows: int) -> Float[Tensor, "b n d"]:
    """Positions for all rows, contiguous, expanded if all rows share them."""
    return (x if x.shape[0] == rows else x.expand(rows, -1, -1)).contiguous()


def unfit_weight(weight: Weight) -> str:
    """The reason why the kernels do not support a weight; empty if they do."""
    bits, given = KINDS.get(weight.codes.dtype), struct_of(weight)
    if bits is None or weight.codes.ndim != 2 or not weight.codes.numel():
        return "weights that are neither in float32 nor in codes"
    held = [x for x in (weight.scale, weight.offset) if x is not None]
    if (bits == 32 and held) or (bits == 8 and weight.offset is not None) or (bits < 32 and weight.scale is None):
        return "unexpected or missing scales or offsets"
    groups = 1 if bits == 8 or weight.scale is None else weight.scale.shape[-1]
    if any(x.dtype != torch.bfloat16 or x.shape != (given.n, groups) for x in held):
        return "scales or offsets of other shapes, or not in bfloat16"
    if bits == 4 and (given.columns % groups or given.group % SMALLEST_GROUP or given.columns != given.k):
        return "groups that are no multiple of 32, or do not fill a row"
    beside = [x for x in (weight.bias, weight.input_scale) if x is not None]
    if any(x.dtype != torch.float32 for x in beside) or max(given.n, given.columns) > library.MOST:
        return "biases that are not in float32, or sizes beyond the kernels'"
    fits = weight.bias is None or weight.bias.shape == (given.n,)
    fits = fits and (weight.input_scale is None or weight.input_scale.shape == (given.k,))
    return "" if fits else "biases of other shapes"


def struct_of(weight: Weight) -> Any:
    """The struct of a weight, whose tensors must be kept alive as long."""
    bits = KINDS.get(weight.codes.dtype, 0)
    n, columns = weight.codes.shape[0], weight.codes.shape[-1] * (2 if bits == 4 else 1)
    group = columns // weight.scale.shape[-1] if bits == 4 and weight.scale is not None else columns
    return WeightArguments(bits, n, columns, columns, group, weight.rounded, *map(pointer, weight.tensors))
