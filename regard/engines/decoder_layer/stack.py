"""Consecutive decoder layers in C++, including softmax attention to their caches or the recurrences of their states
(`native/src/decoder.cpp`)."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.native.library import pointer
from regard.backends.operators import PLAIN
from regard.contract import Recurrence, Unsupported
from regard.engines.attention.paged import check_pages
from regard.engines.decoder_layer.native_form import DecoderLayer, Weight, WeightArguments, of_rows
from regard.engines.decoder_layer.recurrence import (
    RecurrenceArguments,
    State,
    StateArguments,
    arguments_of,
    states_of,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Places(NamedTuple):
    """The caches and states of a batch, with room for those of its next tokens.

    Attributes:
        caches: keys and values of each layer with softmax, float32 with contiguous features: (B, G, slots, D), or pages
            (pages, G, page size, D).
        lengths: number of earlier tokens in each row.
        table: (B, most) int64, contiguous: the pages of each row in order; None without pages.
        states: state of each layer with a recurrence.
        padding: how many of the `lengths` slots of each row precede its first token and are hidden; None with pages.
    """

    caches: Sequence[tuple[Tensor, Tensor]]
    lengths: Sequence[int]
    table: Int[Tensor, "b most"] | None = None
    states: Sequence[State] = ()
    padding: Sequence[int] | None = None


class _Layer(ctypes.Structure):
    _fields_ = (
        ("eps", ctypes.c_float * 2),
        ("norms", ctypes.c_void_p * 2),
        ("weights", WeightArguments * 7),
        ("scale", ctypes.c_float),
        ("left", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("keys_strides", ctypes.c_int64 * 3),
        ("values_strides", ctypes.c_int64 * 3),
        ("recurrence", ctypes.POINTER(RecurrenceArguments)),
    )


class DecoderLayersArguments(library.Arguments):
    """The struct `regard_decoder_layers_args`."""

    kernel = "decoder_layers"
    _fields_ = (
        ("threads", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("head_width", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("layers", ctypes.POINTER(_Layer)),
        ("states", ctypes.POINTER(StateArguments)),
        ("lengths", ctypes.c_void_p),
        ("padding", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("pages_stride", ctypes.c_int64),
        ("page_size", ctypes.c_int64),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("norm", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
    )


class DecoderLayers:
    """Whole layers with softmax attention to a cache, or with a recurrence instead.

    Args:
        layers: layers with an empty :attr:`DecoderLayer.reason`, all of the same width and head width.
        scales: scale of the scores in each layer.
        windows: how many earlier tokens a query sees in each layer; None for all.
        norm: weight (width,) float32 and eps of an RMS norm after the last layer; None for no norm.
        recurrences: for each layer, a recurrence that :func:`regard.engines.decoder_layer.unfit` accepts, or None for
            softmax; None if all have softmax.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        scales: Sequence[float],
        windows: Sequence[int | None],
        norm: tuple[Tensor, float] | None = None,
        recurrences: Sequence[Recurrence[Weight] | None] | None = None,
    ) -> None:
        recurrences = [None] * len(layers) if recurrences is None else recurrences
        self.width, self.head_width = layers[0].width, layers[0].head_width
        self._layers = (_Layer * len(layers))()
        own = [None if x is None else arguments_of(x, scale) for x, scale in zip(recurrences, scales, strict=True)]
        for to, layer, scale, window, recurrence in zip(self._layers, layers, scales, windows, own, strict=True):
            to.eps[:], to.norms[:], to.weights[:] = layer.eps, layer.norms, layer.weights
            to.scale, to.left = scale, -1 if window is None else min(window, library.MOST)
            if recurrence is not None:
                to.recurrence = ctypes.pointer(recurrence)
        self._kept = layers, norm, recurrences, own  # everything that the structs point to
        self._norm = {} if norm is None else {"norm": pointer(norm[0]), "eps": norm[1]}
        self._attending = {i: layers[i].weights[1].n // self.head_width for i, x in enumerate(own) if x is None}
        heads = [x.weights[0].n // self.head_width for x in layers]
        self._recurring = [(x, count) for x, count in zip(recurrences, heads, strict=True) if x is not None]
        self._last: _Pointed | None = None

    def __call__(
        self,
        x: Float[Tensor, "b n width"],
        cosine: Float[Tensor, "c n d"],
        sine: Float[Tensor, "c n d"],
        places: Places,
    ) -> Float[Tensor, "b n width"]:
        """The output for tokens that :func:`few_tokens` accepts; writes their keys and values to the cache, and the new
        states.

        Raises:
            Unsupported: for a cache or states that do not fit; nothing has been written then.
        """
        batch, n = x.shape[:2]
        pointed = self._pointed_at(places.caches)
        pointed.check(places, batch, n)
        states = states_of(self._recurring, places.states, batch, n, self.head_width)
        cosine, sine, y, table = of_rows(cosine, batch), of_rows(sine, batch), x.clone(), places.table
        lengths = (ctypes.c_int64 * batch)(*places.lengths)
        padding = None if places.padding is None else (ctypes.c_int64 * batch)(*places.padding)
        library.call(
            DecoderLayersArguments(
                threads=torch.get_num_threads(),
                batch=batch,
                n=n,
                width=self.width,
                head_width=self.head_width,
                count=len(pointed.layers),
                layers=pointed.layers,
                states=states,
                lengths=ctypes.addressof(lengths),
                padding=None if padding is None else ctypes.addressof(padding),
                pages=pointer(table),
                pages_stride=0 if table is None else table.shape[1],
                page_size=pointed.slots,
                cosine=pointer(cosine),
                sine=pointer(sine),
                x=pointer(y),
                **self._norm,
            )
        )
        return y

    def _pointed_at(self, caches: Sequence[tuple[Tensor, Tensor]]) -> _Pointed:
        """The layers' structs with pointers to the caches, reused as long as the caches stay the same. Existing structs
        are never changed, since other threads may use them."""
        last = self._last
        if last is not None and len(caches) == len(last.caches) and all(map(operator.is_, caches, last.caches)):
            return last
        layers = type(self._layers).from_buffer_copy(self._layers)
        for (number, heads), (keys, values) in zip(self._attending.items(), caches, strict=True):
            layer = layers[number]
            for x in (keys, values):
                fits = x.ndim == 4 and x.shape[1] == heads and x.shape[3] == self.head_width and x.stride(3) == 1
                if not fits or type(x) not in PLAIN or x.dtype != torch.float32:
                    raise Unsupported(
                        f"a cache {tuple(x.shape)} in {str(x.dtype)[6:]}",
                        supported=f"(rows or pages, {heads}, slots, {self.head_width}) in float32",
                    )
            layer.keys, layer.values = pointer(keys), pointer(values)
            layer.keys_strides[:], layer.values_strides[:] = keys.stride()[:3], values.stride()[:3]
        rows, slots = ({x.shape[axis] for pair in caches for x in pair} for axis in (0, 2))
        found = _Pointed(caches, layers, min(rows, default=0), min(slots, default=0), len(slots))
        self._last = found
        return found


class _Pointed(NamedTuple):
    """Layers' structs with pointers to caches.

    Attributes:
        rows: the smallest number of rows (or pages) of any layer.
        slots: the smallest number of slots per row (or page) of any layer.
        sizes: how many different numbers of slots there are.
    """

    caches: Sequence[tuple[Tensor, Tensor]]
    layers: Any
    rows: int
    slots: int
    sizes: int

    def check(self, places: Places, batch: int, n: int) -> None:
        """Raise Unsupported for places outside the caches."""
        if not self.caches:
            return
        lengths, table, slots, padding = places.lengths, places.table, self.slots, places.padding
        if padding is not None:
            inside = len(padding) == len(lengths) and all(0 <= p <= n for p, n in zip(padding, lengths, strict=True))
            if table is not None or not inside:
                raise Unsupported(
                    f"padding {list(padding)}", supported="as many numbers as rows, up to their lengths, without pages"
                )
        if len(lengths) != batch or (table is None and self.rows < batch):
            raise Unsupported(f"{len(lengths)} lengths and {self.rows} rows of a cache for {batch} rows")
        if table is not None:
            slots *= table.shape[1]
            fits = table.dtype == torch.int64 and table.is_contiguous() and self.sizes == 1 and len(table) == batch
            if not fits:
                raise Unsupported("pages that do not exist", supported=f"({batch}, most) int64 of pages of one size")
            check_pages(table, torch.tensor(lengths, dtype=torch.int64, device="cpu") + n, self.slots, self.rows)
        if not 0 <= min(lengths) <= max(lengths) <= slots - n:
            raise Unsupported(f"{n} tokens after {list(lengths)}", supported=f"{slots} together")
