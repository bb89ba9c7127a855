"""The gated recurrence of a state as layers of a decoder have it in C++ (`native/src/decoder.cpp`), with gates and rates that are
made of the layer's input."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from regard.backends.native import recycled
from regard.backends.native.library import pointer
from regard.backends.operators import PLAIN
from regard.engines.decoder_layer.native_form import DecoderLayer, Weight, WeightArguments, struct_of, unfit_weight

if TYPE_CHECKING:
    from jaxtyping import Float

W = TypeVar("W")
V = TypeVar("V")


class Recurrence(NamedTuple, Generic[W]):
    """What a layer does with its queries, keys and values in the place of softmax attention to a cache:

        S' = exp(g) S + k (a v)^T,    o = S'^T q,    z = gates(u),    g = max(least, -exp(log_rates) softplus(sign z)),

    with u the layer's normed input, G heads of keys, values and gates that each serve as many query heads, softplus 1 without
    gates, and a softplus(z) in `steps`, otherwise 1. With a beta, a v becomes b (v - exp(g) S^T k), b = most_beta sigmoid(beta(u)).

    Attributes:
        gates: linear layers one after the other, none, one or two, to one number or D of them for each of the G heads.
        log_rates: (G,) float32; None for no decay, and then there are no gates.
        sign: of z, 1 or -1.
        least: of g; -inf for no bound.
        steps: whether softplus(z), one number a head, also scales values.
        beta: a linear layer to one number for each of the G heads; None for none.
        most_beta: see above.
        eps: of queries and of keys, which become x / sqrt(sum(x^2) + eps); None for those that stay as they are.
    """

    gates: tuple[W, ...] = ()
    log_rates: Tensor | None = None
    sign: float = 1.0
    least: float = -math.inf
    steps: bool = False
    beta: W | None = None
    most_beta: float = 1.0
    eps: tuple[float | None, float | None] = (None, None)

    @property
    def linears(self) -> tuple[W, ...]:
        """All that maps the layer's input."""
        return self.gates if self.beta is None else (*self.gates, self.beta)

    def map(self, function: Callable[[W], V]) -> Recurrence[V]:
        """The same with `function` of each linear layer in its place."""
        beta = None if self.beta is None else function(self.beta)
        return Recurrence(tuple(map(function, self.gates)), *self[1:5], beta, *self[6:])


class RecurrenceArguments(ctypes.Structure):
    """`regard_decoder_recurrence`."""

    _fields_ = (
        ("gates", WeightArguments * 2),
        ("log_rates", ctypes.c_void_p),
        ("sign", ctypes.c_float),
        ("least", ctypes.c_float),
        ("steps", ctypes.c_int64),
        ("beta", WeightArguments),
        ("most_beta", ctypes.c_float),
        ("eps", ctypes.c_float * 2),
    )


def unfit(recurrence: Recurrence[Weight], layer: DecoderLayer) -> str:
    """Why the kernel does not take a recurrence in a layer; empty where it does."""
    held = [x for weight in recurrence.linears for x in weight.tensors if x is not None]
    rates, own = recurrence.log_rates, layer.weights[1].n // layer.head_width
    held += [] if rates is None else [rates]
    if not all(type(x) in PLAIN and x.is_cpu and x.is_contiguous() for x in held):
        return "weights that are not plain, contiguous and on the processor"
    reason = next(filter(None, map(unfit_weight, recurrence.linears)), "")
    if reason:
        return reason
    if rates is not None and (rates.dtype != torch.float32 or rates.shape != (own,)):
        return "rates of other heads, or not in float32"
    sizes = [(x.n, x.k) for x in map(struct_of, recurrence.gates)]
    ends = (own,) if recurrence.steps else (own, own * layer.head_width)
    chained = [layer.width, *(n for n, _ in sizes)]
    fits = len(sizes) <= 2 and [k for _, k in sizes] == chained[:-1] and (not sizes or chained[-1] in ends)
    fits = fits and (rates is not None or not (sizes or recurrence.steps)) and (bool(sizes) or not recurrence.steps)
    beta = None if recurrence.beta is None else struct_of(recurrence.beta)
    fits = fits and (beta is None or (beta.n, beta.k) == (own, layer.width))
    return "" if fits else "sizes that do not belong together"


def room_after(state: Float[Tensor, "b h d d"]) -> Float[Tensor, "b h d d"]:
    """Where the state that comes after another may go, uninitialised."""
    return recycled.empty(state.shape)


def arguments_of(recurrence: Recurrence[Weight]) -> RecurrenceArguments:
    """The struct; the recurrence is to be kept as long."""
    made = RecurrenceArguments(
        log_rates=pointer(recurrence.log_rates),
        sign=recurrence.sign,
        least=recurrence.least,
        steps=recurrence.steps,
        most_beta=recurrence.most_beta,
        eps=(ctypes.c_float * 2)(*(-1 if x is None else x for x in recurrence.eps)),
    )
    for number, weight in enumerate(recurrence.gates):
        made.gates[number] = struct_of(weight)
    if recurrence.beta is not None:
        made.beta = struct_of(recurrence.beta)
    return made
