"""The recurrence that replaces softmax attention in a layer, as passed to the native call for a whole decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

W = TypeVar("W")
V = TypeVar("V")


class Recurrence(NamedTuple, Generic[W]):
    """What a layer computes from its queries, keys and values instead of softmax attention over a KV cache:

        S' = exp(g) S + phi(k) (a v)^T,    o = scale S'^T phi(q),
        z = gates(u) + gate_bias,    g = max(least, -exp(log_rates) softplus(sign z)),

    Here u is the layer's normed input, and each of the G heads of keys, values and gates serves the same number of
    query heads. The softplus is 1 without gates; a is softplus(z) with `steps`, otherwise 1. With `beta`, a v becomes b
    (v - exp(g) S^T phi(k)), b = most_beta sigmoid(beta(u)). With `divisor`, a one is appended to the values, and o is
    divided by the sum of weights that this column gives. With a window of w tokens, k and v are those of the token w
    steps earlier, and the last w tokens contribute, in addition to the state, with weights exp(c + score - largest
    score), where c comes from `log_window_weights`.

    Attributes:
        gates: up to two linear layers, applied in turn, that give one number or D numbers for each of the G heads;
            empty for none.
        log_rates: (G,) float32; None for no decay, in which case there are no gates.
        sign: sign of z, 1 or -1.
        least: lower bound of g; -inf for none.
        steps: whether softplus(z), one number per head, also scales the values.
        beta: a linear layer that gives one number for each of the G heads; None for none.
        most_beta: upper bound of b.
        eps: for phi(q) and for phi(k), which become y / sqrt(sum(y^2) + eps); None to leave one of them as it is.
        feature_map: name of phi in :data:`regard.engines.feature_maps.FEATURE_MAPS`.
        maps: (H, D, F) float32 each, for queries and for keys: phi(x) is [softmax(x W), softmax(-x W)], with the W of
            each query head applied to its queries and to the keys that it reads. Excludes gates, decay, beta and any
            other feature map. None for none.
        scale: factor on o; None for the scale of the layer's scores.
        divisor: added to the sum of weights; None for no division.
        window: w, including the current token; 0 for none. Needs `maps` and `divisor`.
        log_window_weights: c of each head, (H,) float32; None for 0.
        gate_bias: added to z, float32; None for none.
    """

    gates: tuple[W, ...] = ()
    log_rates: Tensor | None = None
    sign: float = 1.0
    least: float = -math.inf
    steps: bool = False
    beta: W | None = None
    most_beta: float = 1.0
    eps: tuple[float | None, float | None] = (None, None)
    feature_map: str = "identity"
    maps: tuple[Tensor, Tensor] | None = None
    scale: float | None = None
    divisor: float | None = None
    window: int = 0
    log_window_weights: Tensor | None = None
    gate_bias: Tensor | None = None

    @property
    def linears(self) -> tuple[W, ...]:
        """All linear layers that are applied to the layer's input."""
        return self.gates if self.beta is None else (*self.gates, self.beta)

    def map(self, function: Callable[[W], V]) -> Recurrence[V]:
        """A copy of this recurrence with each linear layer replaced by `function` of it."""
        found: Any = self
        beta = None if self.beta is None else function(self.beta)
        mapped: Recurrence[V] = found._replace(gates=tuple(map(function, self.gates)), beta=beta)
        return mapped

    def state_shape(self, heads: int, width: int) -> tuple[int, int, int]:
        """Shape of one row's state: (heads, features of keys, features of values)."""
        features = width if self.maps is None else 2 * self.maps[0].shape[2]
        return heads, features, width + (self.divisor is not None)
