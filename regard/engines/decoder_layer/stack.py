"""Consecutive decoder layers in C++, including softmax attention to their caches or the recurrences of their states
(`native/src/decoder.cpp`)."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

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


class Reading(NamedTuple):
    """The part of a cache that a token reads, as in :func:`regard.engines.quest_attention.quest_attention`.

    Attributes:
        low, high: smallest and largest entries of the keys in each page, (B, G, slots / page, D) float32, contiguous.
        page: slots in a page.
        chosen: number of pages that are read besides the newest token's.
        shared: whether the query heads of a key/value head read the same pages.
    """

    low: Tensor
    high: Tensor
    page: int
    chosen: int
    shared: bool


class Eviction(NamedTuple):
    """How a cache drops a token after a new one has attended.

    Attributes:
        weights: sum of the attention that each slot has had, (B, G, slots) float32, contiguous, to which that of the new
            token is added; None if the new token's attention alone decides, for all heads together.
        ranks: place in the row of each slot's token, (B, G, slots) int64, contiguous.
        capacity: a row that holds more tokens drops the one with the least attention, and the token in its last slot takes
            that slot.
        kept_from: tokens from this place on are not dropped.
    """

    weights: Tensor | None
    ranks: Tensor
    capacity: int
    kept_from: int


class SlotRotation(NamedTuple):
    """Angles of a cache whose keys are stored as they are: a key is rotated whenever it is read, a query once, both by the
    row of the token's slot.

    Attributes:
        cosine, sine: (slots, D) float32, contiguous; at least as many as any row holds with its new tokens.
    """

    cosine: Tensor
    sine: Tensor


class Codes(Protocol):
    """A block of tokens in 8 bits; all tensors are contiguous."""

    @property
    def k(self) -> Tensor:
        """Codes of the keys, (B, G, tokens, D) int8."""

    @property
    def k_step(self) -> Tensor:
        """What the keys' codes are multiplied by, (B, G, D) float32."""

    @property
    def v(self) -> Tensor:
        """Codes of the values by channel, (B, G, D, tokens) int8."""

    @property
    def v_step(self) -> Tensor:
        """What the values' codes are multiplied by, (B, G, tokens) float32."""


class Places(NamedTuple):
    """The caches and states of a batch, with room for those of its next tokens.

    Attributes:
        caches: keys and values of each layer with softmax, float32 with contiguous features: (B, G, slots, D), or pages
            (pages, G, page size, D).
        lengths: number of earlier tokens in each row.
        table: (B, most) int64, contiguous: the pages of each row in order; None without pages.
        states: state of each layer with a recurrence.
        padding: how many of the `lengths` slots of each row precede its first token and are hidden; None with pages.
        fewer: how many of the `lengths` tokens each of the caches has dropped; None if all hold all. Not with pages or
            padding.
        replaced: the slot of each cache that a single new token takes, in place of a token that is dropped, or -1 for the
            first free slot; such a cache holds one token more than `lengths` and `fewer` say. None for -1 everywhere.
        readings: for each of the caches, contiguous then, what a single new token reads of it, or None for everything;
            None for everything everywhere. Not with pages or padding.
        evictions: how each of the caches drops tokens as a single new token arrives, or None where it drops none; None for
            none anywhere. Not with pages or padding, nor for a cache with a reading or a slot to replace.
        rounded: for each of the caches, the blocks of tokens in 8 bits that come before what it holds, for a single new
            token; None for none anywhere. Not with pages or padding, nor for a cache with any of the above.
        rotations: for each of the caches, the angles of its slots, or None if its keys are rotated once, before they are
            stored; None for that everywhere. Not with pages or padding, nor for a cache with a reading, an eviction or
            tokens in 8 bits.
    """

    caches: Sequence[tuple[Tensor, Tensor]]
    lengths: Sequence[int]
    table: Int[Tensor, "b most"] | None = None
    states: Sequence[State] = ()
    padding: Sequence[int] | None = None
    fewer: Sequence[int] | None = None
    replaced: Sequence[int] | None = None
    readings: Sequence[Reading | None] | None = None
    evictions: Sequence[Eviction | None] | None = None
    rounded: Sequence[Sequence[Codes]] | None = None
    rotations: Sequence[SlotRotation | None] | None = None

    def of(self, caches: slice, states: slice) -> Places:
        """The places of some of the layers."""
        own = {name: x[caches] for name in OF_CACHES if (x := getattr(self, name)) is not None}
        return self._replace(states=self.states[states], **own)

    @property
    def whole(self) -> bool:
        """Whether all caches hold and read all tokens."""
        return all(getattr(self, name) is None for name in OF_CACHES[1:])


OF_CACHES = "caches", "fewer", "replaced", "readings", "evictions", "rounded", "rotations"
"""Attributes of :class:`Places` with one entry for each cache."""


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


class _Reading(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("page_size", ctypes.c_int64),
        ("chosen", ctypes.c_int64),
        ("shared", ctypes.c_int64),
    )


class _Eviction(ctypes.Structure):
    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("kept_from", ctypes.c_int64),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_step", ctypes.c_void_p),
        ("v_step", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
    )


class _Rounded(ctypes.Structure):
    _fields_ = (("blocks", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Rotation(ctypes.Structure):
    _fields_ = (("cosine", ctypes.c_void_p), ("sine", ctypes.c_void_p), ("slots", ctypes.c_int64))


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
        ("fewer", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("reading", ctypes.c_void_p),
        ("evictions", ctypes.c_void_p),
        ("rounded", ctypes.c_void_p),
        ("rotations", ctypes.c_void_p),
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
        self._codes: _Codes | None = None

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
        fewer, replaced = self._of_layers(places.fewer, 0), self._of_layers(places.replaced, -1)
        reading, evictions, rounded = self._readings(places), self._evictions(places), self._rounded(places)
        rotations = self._rotations(places)
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
                fewer=None if fewer is None else ctypes.addressof(fewer),
                slots=None if replaced is None else ctypes.addressof(replaced),
                reading=None if reading is None else ctypes.addressof(reading),
                evictions=None if evictions is None else ctypes.addressof(evictions),
                rounded=None if rounded is None else ctypes.addressof(rounded.layers),
                rotations=None if rotations is None else ctypes.addressof(rotations),
                cosine=pointer(cosine),
                sine=pointer(sine),
                x=pointer(y),
                **self._norm,
            )
        )
        return y

    def _of_layers(self, numbers: Sequence[int] | None, others: int) -> Any:
        """An array with the caches' numbers for the layers with softmax, and with `others` for the rest."""
        if numbers is None:
            return None
        found = (ctypes.c_int64 * len(self._layers))(*[others] * len(self._layers))
        for i, number in zip(self._attending, numbers, strict=True):
            found[i] = number
        return found

    def _readings(self, places: Places) -> Any:
        if places.readings is None:
            return None
        found = (_Reading * len(self._layers))()
        for i, reading, (keys, _) in zip(self._attending, places.readings, places.caches, strict=True):
            if reading is not None:
                low, high, *rest = reading
                found[i] = _Reading(pointer(low), pointer(high), keys.shape[2], *rest)
        return found

    def _evictions(self, places: Places) -> Any:
        if places.evictions is None:
            return None
        found = (_Eviction * len(self._layers))()
        for i, eviction in zip(self._attending, places.evictions, strict=True):
            if eviction is not None:
                weights, ranks, *rest = eviction
                found[i] = _Eviction(pointer(weights), pointer(ranks), ranks.shape[2], *rest)
        return found

    def _rotations(self, places: Places) -> Any:
        if places.rotations is None:
            return None
        found = (_Rotation * len(self._layers))()
        for i, rotation in zip(self._attending, places.rotations, strict=True):
            if rotation is not None:
                found[i] = _Rotation(pointer(rotation.cosine), pointer(rotation.sine), len(rotation.cosine))
        return found

    def _rounded(self, places: Places) -> _Codes | None:
        """The structs of tokens in 8 bits, reused as long as their blocks stay the same; see :meth:`_pointed_at`."""
        given, last = places.rounded, self._codes
        if given is None:
            return None
        if last is not None and len(given) == len(last.given) and all(map(operator.is_, given, last.given)):
            return last
        layers, kept = (_Rounded * len(self._layers))(), list[Any]()
        for i, cache, blocks in zip(self._attending, places.caches, given, strict=True):
            if not all(_decodable(cache, x) for x in blocks):
                raise Unsupported(
                    "tokens in 8 bits before those of a cache", supported="codes and steps of all its rows and heads"
                )
            own = (_Block * len(blocks))()
            for to, x in zip(own, blocks, strict=True):
                to.k, to.v, to.k_step, to.v_step = map(pointer, (x.k, x.v, x.k_step, x.v_step))
                to.tokens = x.k.shape[2]
            layers[i] = _Rounded(ctypes.addressof(own), len(blocks))
            kept.append(own)
        self._codes = _Codes(list(given), layers, kept)
        return self._codes

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
        rows = min((x.shape[0] for pair in caches for x in pair), default=0)
        found = _Pointed(caches, layers, rows, [x.shape[2] for pair in caches for x in pair])
        self._last = found
        return found


class _Codes(NamedTuple):
    """Layers' structs of tokens in 8 bits, and the blocks that they point to."""

    given: list[Sequence[Codes]]
    layers: Any
    kept: list[Any]


class _Pointed(NamedTuple):
    """Layers' structs with pointers to caches.

    Attributes:
        rows: the smallest number of rows (or pages) of any layer.
        room: number of slots per row (or page) of each layer's keys and values in turn.
    """

    caches: Sequence[tuple[Tensor, Tensor]]
    layers: Any
    rows: int
    room: Sequence[int]

    @property
    def slots(self) -> int:
        """The smallest number of slots per row (or page) of any layer."""
        return min(self.room, default=0)

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
            fits = (
                table.dtype == torch.int64 and table.is_contiguous() and len({*self.room}) == 1 and len(table) == batch
            )
            if not fits:
                raise Unsupported("pages that do not exist", supported=f"({batch}, most) int64 of pages of one size")
            check_pages(table, torch.tensor(lengths, dtype=torch.int64, device="cpu") + n, self.slots, self.rows)
        if not places.whole:
            self._check_dropped(places, n)
        elif not 0 <= min(lengths) <= max(lengths) <= slots - n:
            raise Unsupported(f"{n} tokens after {list(lengths)}", supported=f"{slots} together")

    def _check_dropped(self, places: Places, n: int) -> None:
        count = len(self.caches)
        fewer, replaced = places.fewer or [0] * count, places.replaced or [-1] * count
        readings, evictions = places.readings or [None] * count, places.evictions or [None] * count
        rounded, rotations = places.rounded or [()] * count, places.rotations or [None] * count
        told = f"caches that have dropped {list(fewer)} tokens, with {n} new ones in the slots {list(replaced)}"
        if (
            places.table is not None
            or places.padding is not None
            or any(len(x) != count for x in (fewer, replaced, readings, evictions, rounded, rotations))
        ):
            raise Unsupported(told, supported="a number for each cache, without pages and padding")
        least, most = min(places.lengths), max(places.lengths)
        for i, (dropped, slot) in enumerate(zip(fewer, replaced, strict=True)):
            inside = 0 <= dropped <= least and most - dropped + n <= min(self.room[2 * i : 2 * i + 2])
            if not inside or not -1 <= slot <= least - dropped or (slot >= 0 and n != 1):
                raise Unsupported(
                    f"{told}, after {list(places.lengths)}", supported="slots of the caches, for one token at a time"
                )
        if places.readings is not None and not (n == 1 and all(map(_readable, self.caches, places.readings))):
            raise Unsupported(
                "pages that are read of a cache",
                supported="contiguous caches of whole pages, with bounds of their keys, for one token at a time",
            )
        for cache, reading, eviction, slot in zip(self.caches, readings, evictions, replaced, strict=True):
            if eviction is not None and not (n == 1 and reading is None and slot < 0 and _evictable(cache, eviction)):
                raise Unsupported(
                    "tokens that are dropped from a cache",
                    supported="ranks and weights of each of its slots, for one token at a time that reads everything",
                )
        for blocks, *others in zip(rounded, readings, evictions, replaced, strict=True):
            if blocks and not (n == 1 and others == [None, None, -1]):
                raise Unsupported(
                    "tokens in 8 bits before those of a cache", supported="one token at a time that reads everything"
                )
        for cache, rotation, dropped, *others in zip(
            self.caches, rotations, fewer, readings, evictions, rounded, strict=True
        ):
            if rotation is not None and (any(others) or not _rotatable(cache, rotation, most - dropped + n)):
                raise Unsupported(
                    "keys of a cache that are rotated when they are read",
                    supported="angles of all its tokens in float32, for queries that read everything",
                )


def _decodable(cache: tuple[Tensor, Tensor], codes: Codes) -> bool:
    """Return whether a block of tokens fits before a cache."""
    rows, heads, _, width = cache[0].shape
    tokens = codes.k.shape[2] if codes.k.ndim == 4 else 0
    own = (codes.k, torch.int8), (codes.k_step, torch.float32), (codes.v, torch.int8), (codes.v_step, torch.float32)
    shapes = (tokens, width), (width,), (width, tokens), (tokens,)
    sizes = all(x.shape == (rows, heads, *shape) for (x, _), shape in zip(own, shapes, strict=True))
    return tokens > 0 and sizes and all(type(x) in PLAIN and x.dtype == dtype and x.is_contiguous() for x, dtype in own)


def _evictable(cache: tuple[Tensor, Tensor], eviction: Eviction) -> bool:
    """Return whether tokens can be dropped from a cache in this way."""
    own = [(eviction.ranks, torch.int64)]
    if eviction.weights is not None:
        own.append((eviction.weights, torch.float32))
    tensors = all(type(x) in PLAIN and x.dtype == dtype and x.is_contiguous() for x, dtype in own)
    return tensors and eviction.capacity > 0 and all(x.shape == cache[0].shape[:3] for x, _ in own)


def _rotatable(cache: tuple[Tensor, Tensor], rotation: SlotRotation, tokens: int) -> bool:
    """Return whether as many keys of a cache can be rotated in this way."""
    width = cache[0].shape[3]
    shapes = all(x.ndim == 2 and len(x) >= tokens and x.shape[1] == width for x in rotation)
    alike = len(rotation.cosine) == len(rotation.sine)
    return (
        shapes and alike and all(type(x) in PLAIN and x.dtype == torch.float32 and x.is_contiguous() for x in rotation)
    )


def _readable(cache: tuple[Tensor, Tensor], reading: Reading | None) -> bool:
    """Return whether a cache can be read in this way."""
    if reading is None:
        return True
    rows, heads, slots, width = cache[0].shape
    whole = reading.page > 0 and slots > 0 and slots % reading.page == 0 and reading.chosen >= 0
    bounds = reading.low, reading.high
    shapes = whole and all(x.shape == (rows, heads, slots // reading.page, width) for x in bounds)
    tensors = (*cache, *bounds)
    return shapes and all(type(x) in PLAIN and x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
