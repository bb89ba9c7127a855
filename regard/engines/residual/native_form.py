"""Residual branches of pre-norm blocks in C++ (`native/src/residual.cpp`), in float32 and without gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from regard.backends import prefers_native
from regard.backends.native import library
from regard.backends.native.library import pointer
from regard.backends.operators import PLAIN, runs_plainly

if TYPE_CHECKING:
    from jaxtyping import Float

FEWEST_ROWS = 32
"""Rows of the smallest input: each call packs the weights, which takes as long as a product with this many rows."""

MOST_WEIGHTS = 3 << 19
"""Largest total number of weights in a branch: larger weights do not stay in a core's cache between blocks of rows, and
libraries that also split them are up to a tenth faster."""


def is_small(x: Tensor) -> bool:
    """Return whether an input has too few rows for the kernels, as single tokens do; tested before anything slower."""
    return x.ndim < 2 or x.numel() < FEWEST_ROWS * x.shape[-1]


class Dense(NamedTuple):
    """A linear layer x W^T + bias: weight (N, K) and bias (N,) or None."""

    weight: Tensor
    bias: Tensor | None


class RowNorm(NamedTuple):
    """LayerNorm of the last axis or, if not `centred`, RMSNorm.

    Attributes:
        weight, bias: (width,); None for ones and zeros.
        eps: added to the variance or the mean square.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool


class Documents(NamedTuple):
    """Documents packed into one sequence, one after the other.

    Attributes:
        borders: (documents + 1,) int64, from 0 to the number of tokens.
        longest: length of the longest one.
    """

    borders: Tensor
    longest: int


class DenseArguments(ctypes.Structure):
    """The struct `regard_dense`."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class NormArguments(ctypes.Structure):
    """The struct `regard_row_norm`."""

    _fields_ = (
        ("centred", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class ResidualArguments(ctypes.Structure):
    """The struct `regard_residual`."""

    _fields_ = (
        ("width", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        ("norm", NormArguments),
        ("scale", ctypes.c_void_p),
    )


class FeedForwardArguments(library.Arguments):
    """The struct `regard_residual_feed_forward_args`."""

    kernel = "residual_feed_forward"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("around", ResidualArguments),
        ("gate", DenseArguments),
        ("up", DenseArguments),
        ("down", DenseArguments),
    )


class AttentionArguments(library.Arguments):
    """The struct `regard_residual_attention_args`."""

    kernel = "residual_attention"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("borders", ctypes.c_void_p),
        ("key_bias", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("scale_of_scores", ctypes.c_float),
        ("around", ResidualArguments),
        ("query", DenseArguments),
        ("key", DenseArguments),
        ("value", DenseArguments),
        ("output", DenseArguments),
    )


def plain(x: Tensor) -> bool:
    """Return whether an input is in float32 on the CPU, without a gradient, and nothing observes operators or backends:
    no mode, transform, autocast or trace."""
    if type(x) not in PLAIN or x.is_nested or x.dtype is not torch.float32 or x.layout is not torch.strided:
        return False
    return prefers_native() and runs_plainly(x) and not torch.is_autocast_enabled("cpu")


class _Branch:
    """The learned tensors of a branch and the struct that points to them.

    The struct keeps the addresses from when it was made: :meth:`is_current` says whether they are still valid.

    Attributes:
        reason: why the kernels do not support the tensors; empty if they do.
    """

    def __init__(self, norm: RowNorm, scale: Tensor | None, layers: Sequence[Dense]) -> None:
        self.width = layers[-1].weight.shape[0]
        self._beside = [x for x in (norm.weight, norm.bias, scale) if x is not None]
        self._learned = [*self._beside, *(x for layer in layers for x in layer if x is not None)]
        self._places = self._found_places()
        self.reason = library.why_missing() or self._misfit(layers)

    def is_current(self) -> bool:
        """Return whether the tensors still have the same addresses, dtypes, shapes and strides."""
        return self._found_places() == self._places

    def takes(self, x: Tensor) -> bool:
        """Return whether the kernel supports a :func:`plain` and large enough input: it fits, and has no gradients."""
        if self.reason or x.shape[-1] != self.width:
            return False
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in self._learned))

    def _found_places(self) -> list[Any]:
        return [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in self._learned]

    def _misfit(self, layers: Sequence[Dense]) -> str:
        if not all(type(x) in PLAIN and x.is_cpu and x.layout is torch.strided for x in self._learned):
            return "weights that are not plain and on the processor"
        if not all(x.dtype is torch.float32 and x.is_contiguous() and not x.is_neg() for x in self._learned):
            return "weights that are not contiguous in float32"
        if any(x.shape != (self.width,) for x in self._beside):
            return "norms or factors of other widths"
        for weight, bias in layers:
            if weight.ndim != 2 or not weight.numel() > 0 or max(weight.shape) > library.MOST:
                return "weights that are empty, too large or not matrices"
            if bias is not None and bias.shape != weight.shape[:1]:
                return "biases of other widths"
        if sum(layer.weight.numel() for layer in layers) > MOST_WEIGHTS:
            return "weights too large for this kernel to be the fastest"
        return ""

    def _around(self, norm: RowNorm, scale: Tensor | None) -> Any:
        normed = NormArguments(norm.centred, norm.eps, pointer(norm.weight), pointer(norm.bias))
        return ResidualArguments(width=self.width, x_stride=self.width, norm=normed, scale=pointer(scale))


class FeedForward(_Branch):
    """x + scale * down(gelu(up(norm(x)))); with a `gate`, x + scale * down(silu(gate z) * up z), where z = norm(x).

    Args:
        norm: norm of the input's rows.
        up, down, gate: linear layers.
        scale: (width,); None for ones.
    """

    def __init__(
        self, norm: RowNorm, up: Dense, down: Dense, gate: Dense | None = None, scale: Tensor | None = None
    ) -> None:
        super().__init__(norm, scale, [x for x in (gate, up, down) if x is not None])
        hidden = up.weight.shape[0]
        inside = up.weight.shape == (hidden, self.width) and down.weight.shape == (self.width, hidden)
        if not self.reason and not (inside and (gate is None or gate.weight.shape == up.weight.shape)):
            self.reason = "sizes that do not belong together"
        if self.reason:
            return
        self._arguments = FeedForwardArguments(
            around=self._around(norm, scale),
            gate=DenseArguments() if gate is None else _struct(gate),
            up=_struct(up),
            down=_struct(down),
        )

    def __call__(self, x: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b n c"]:
        """Compute the branch for a :func:`plain` input that it :meth:`takes`."""
        x, arguments = x.contiguous(), FeedForwardArguments.from_buffer_copy(self._arguments)
        y = torch.empty_like(x)
        arguments.threads, arguments.m = torch.get_num_threads(), x.numel() // self.width
        arguments.around.x, arguments.around.y = pointer(x), pointer(y)
        library.call(arguments)
        return y


class Attention(_Branch):
    """x + scale * output(softmax(scale_of_scores q k^T + key_bias) v) for heads of q, k and v, which are linear maps of
    norm(x); every token sees all tokens of its sequence, or of its document where documents are packed into one sequence.

    Args:
        norm: norm of the input's rows.
        query, key, value, output: linear layers.
        heads, kv_heads: number of query heads, and of key/value heads.
        scale_of_scores: factor on the scores, positive.
        scale: (width,); None for ones.
    """

    def __init__(
        self,
        norm: RowNorm,
        query: Dense,
        key: Dense,
        value: Dense,
        output: Dense,
        *,
        heads: int,
        kv_heads: int,
        scale_of_scores: float,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__(norm, scale, [query, key, value, output])
        self.reason = self.reason or self._wrong_sizes(query, key, value, output, heads, kv_heads)
        if self.reason:
            return
        self._arguments = AttentionArguments(
            heads=heads,
            kv_heads=kv_heads,
            scale_of_scores=scale_of_scores,
            around=self._around(norm, scale),
            query=_struct(query),
            key=_struct(key),
            value=_struct(value),
            output=_struct(output),
        )

    def _wrong_sizes(self, query: Dense, key: Dense, value: Dense, output: Dense, heads: int, kv_heads: int) -> str:
        (q, _), (k, _), (v, _), (_, read) = (x.weight.shape for x in (query, key, value, output))
        fits = heads >= 1 and kv_heads >= 1 and not (heads % kv_heads or q % heads or k % kv_heads or v % kv_heads)
        fits = fits and q // heads == k // kv_heads and read == v // kv_heads * heads
        fits = fits and all(x.weight.shape[1] == self.width for x in (query, key, value))
        return "" if fits else "sizes that do not belong together"

    def __call__(
        self,
        x: Float[Tensor, "b n c"],
        documents: Documents | None = None,
        key_bias: Float[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Compute the branch for a :func:`plain` input that it :meth:`takes`; not for documents with a bias, which is
        plain too."""
        x, arguments = x.contiguous(), AttentionArguments.from_buffer_copy(self._arguments)
        y = torch.empty_like(x)
        arguments.threads, arguments.batch, arguments.n = torch.get_num_threads(), x.shape[0], x.shape[1]
        if documents is not None:
            borders = documents.borders.contiguous()
            arguments.batch, arguments.n = len(borders) - 1, documents.longest
            arguments.borders = pointer(borders)
        key_bias = None if key_bias is None else key_bias.contiguous()
        arguments.key_bias = pointer(key_bias)
        arguments.around.x, arguments.around.y = pointer(x), pointer(y)
        library.call(arguments)
        return y

    def takes(self, x: Tensor) -> bool:
        """As for any branch, with inputs (B, N, width)."""
        return x.ndim == 3 and x.shape[1] <= library.MOST and super().takes(x)


def _struct(layer: Dense) -> Any:
    return DenseArguments(*layer.weight.shape, pointer(layer.weight), pointer(layer.bias))
