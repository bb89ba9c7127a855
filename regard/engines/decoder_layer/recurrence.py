"""The gated recurrence of decoder layers in C++ (`native/src/decoder.cpp`): with gates and rates computed from the
layer's input, feature maps, a normaliser, and a softmax window before the state."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from regard.backends.native import recycled
from regard.backends.native.library import pointer
from regard.backends.operators import PLAIN
from regard.contract import Recurrence, Unsupported
from regard.engines.decoder_layer.native_form import DecoderLayer, Weight, WeightArguments, struct_of, unfit_weight
from regard.engines.linear_attention.native_form import FEATURE_MAPS

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class State(NamedTuple):
    """The state that a recurrence continues from, and memory for the state after it.

    Attributes:
        before, after: (B, H, K, V) float32, contiguous, with the shape of :meth:`Recurrence.state_shape`.
        window: keys and values of the window's tokens, followed by room for the new ones, (B, H, window + N, D) float32
            with contiguous features, right-aligned; None without a window.
        lengths: (B,) int64, contiguous: number of earlier tokens; used with a window.
    """

    before: Float[Tensor, "b h k v"]
    after: Float[Tensor, "b h k v"]
    window: tuple[Float[Tensor, "b h slots d"], Float[Tensor, "b h slots d"]] | None = None
    lengths: Int[Tensor, " b"] | None = None


class RecurrenceArguments(ctypes.Structure):
    """The struct `regard_decoder_recurrence`."""

    _fields_ = (
        ("gates", WeightArguments * 2),
        ("gate_bias", ctypes.c_void_p),
        ("log_rates", ctypes.c_void_p),
        ("sign", ctypes.c_float),
        ("least", ctypes.c_float),
        ("steps", ctypes.c_int64),
        ("beta", WeightArguments),
        ("most_beta", ctypes.c_float),
        ("eps", ctypes.c_float * 2),
        ("feature_map", ctypes.c_int64),
        ("maps", ctypes.c_void_p * 2),
        ("features", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("normalized", ctypes.c_int64),
        ("divisor", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("log_window_weights", ctypes.c_void_p),
    )


class StateArguments(ctypes.Structure):
    """The struct `regard_decoder_state`."""

    _fields_ = (
        ("before", ctypes.c_void_p),
        ("after", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("keys_strides", ctypes.c_int64 * 3),
        ("values_strides", ctypes.c_int64 * 3),
        ("lengths", ctypes.c_void_p),
    )


def unfit(recurrence: Recurrence[Weight], layer: DecoderLayer) -> str:
    """The reason why the kernel does not support a recurrence in a layer; empty if it does."""
    rates, heads, own = recurrence.log_rates, *(layer.weights[i].n // layer.head_width for i in (0, 1))
    of_heads = [*(recurrence.maps or ()), recurrence.log_window_weights]
    held = [x for weight in recurrence.linears for x in weight.tensors] + [rates, recurrence.gate_bias, *of_heads]
    if not all(x is None or (type(x) in PLAIN and x.is_cpu and x.is_contiguous()) for x in held):
        return "weights that are not plain, contiguous and on the processor"
    reason = next(filter(None, map(unfit_weight, recurrence.linears)), "")
    if reason:
        return reason
    if rates is not None and (rates.dtype != torch.float32 or rates.shape != (own,)):
        return "rates of other heads, or not in float32"
    if any(x is not None and (x.dtype != torch.float32 or len(x) != heads) for x in of_heads):
        return "maps or weights of windows of other heads, or not in float32"
    sizes = [(x.n, x.k) for x in map(struct_of, recurrence.gates)]
    ends = (own,) if recurrence.steps else (own, own * layer.head_width)
    chained = [layer.width, *(n for n, _ in sizes)]
    fits = len(sizes) <= 2 and [k for _, k in sizes] == chained[:-1] and (not sizes or chained[-1] in ends)
    fits = fits and (rates is not None or not (sizes or recurrence.steps)) and (bool(sizes) or not recurrence.steps)
    bias, beta = recurrence.gate_bias, None if recurrence.beta is None else struct_of(recurrence.beta)
    fits = fits and (bias is None or (bool(sizes) and bias.shape == (chained[-1],) and bias.dtype == torch.float32))
    fits = fits and (beta is None or (beta.n, beta.k) == (own, layer.width))
    if recurrence.maps is not None:
        shapes = {x.shape for x in recurrence.maps}
        fits = fits and len(shapes) == 1 and recurrence.maps[0].shape[1:-1] == (layer.head_width,)
    if not fits:
        return "sizes that do not belong together"
    plain = rates is None and beta is None and recurrence.feature_map == "identity" and recurrence.eps[1] is None
    if recurrence.feature_map not in FEATURE_MAPS or (recurrence.maps is not None and not plain):
        return "an unknown feature map, or maps combined with another feature map, a decay or a beta"
    if recurrence.window and (recurrence.maps is None or recurrence.divisor is None):
        return "a window without maps and a divisor"
    return ""


def room_after(state: Float[Tensor, "b h k v"]) -> Float[Tensor, "b h k v"]:
    """Uninitialised memory for the state that follows another."""
    return recycled.empty(state.shape)


def arguments_of(recurrence: Recurrence[Weight], scale: float) -> RecurrenceArguments:
    """The struct of a recurrence, which must be kept alive as long.

    Args:
        scale: scale of the layer's scores.
    """
    made = RecurrenceArguments(
        gate_bias=pointer(recurrence.gate_bias),
        log_rates=pointer(recurrence.log_rates),
        sign=recurrence.sign,
        least=recurrence.least,
        steps=recurrence.steps,
        most_beta=recurrence.most_beta,
        eps=(ctypes.c_float * 2)(*(-1 if x is None else x for x in recurrence.eps)),
        feature_map=1 + FEATURE_MAPS.index(recurrence.feature_map),
        scale=scale if recurrence.scale is None else recurrence.scale,
        normalized=recurrence.divisor is not None,
        divisor=recurrence.divisor or 0.0,
        window=recurrence.window,
        log_window_weights=pointer(recurrence.log_window_weights),
    )
    for number, weight in enumerate(recurrence.gates):
        made.gates[number] = struct_of(weight)
    if recurrence.beta is not None:
        made.beta = struct_of(recurrence.beta)
    if recurrence.maps is not None:
        made.maps[:], made.features = [*map(pointer, recurrence.maps)], recurrence.maps[0].shape[2]
    return made


def states_of(
    recurrences: Sequence[tuple[Recurrence[Weight], int]], states: Sequence[State], batch: int, n: int, width: int
) -> Any:
    """The structs of a call's states.

    Args:
        recurrences: each with its number of query heads.
        width: width of a head.

    Raises:
        Unsupported: for states that do not fit the recurrences.
    """
    if len(states) != len(recurrences):
        raise Unsupported(f"{len(states)} states of {len(recurrences)} layers")
    found = (StateArguments * len(states))()
    for to, (recurrence, heads), state in zip(found, recurrences, states, strict=True):
        shape = batch, *recurrence.state_shape(heads, width)
        for x in state[:2]:
            if x.shape != shape or x.dtype != torch.float32 or type(x) not in PLAIN or not x.is_contiguous():
                raise Unsupported(
                    f"a state {tuple(x.shape)} in {str(x.dtype)[6:]}", supported=f"{shape} in float32, contiguous"
                )
        to.before, to.after = map(pointer, state[:2])
        if recurrence.window:
            _put_window(to, state, (batch, heads, recurrence.window + n, width))
    return found


def _put_window(to: StateArguments, state: State, shape: tuple[int, ...]) -> None:
    around, lengths = state.window or (), state.lengths
    counted = lengths is not None and lengths.dtype == torch.int64 and lengths.shape == shape[:1]
    fits = [type(x) in PLAIN and x.shape == shape and x.dtype == torch.float32 and x.stride(3) == 1 for x in around]
    if lengths is None or not (counted and lengths.is_contiguous()) or fits != [True, True]:
        raise Unsupported("a state without its window", supported=f"keys and values {shape} in float32, and lengths")
    (to.keys, to.values), to.lengths = map(pointer, around), pointer(lengths)
    to.keys_strides[:], to.values_strides[:] = (x.stride()[:3] for x in around)
