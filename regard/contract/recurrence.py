"""The recurrence that a layer steps through in the place of softmax attention, as mechanisms tell it to decoders in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

W = TypeVar("W")
V = TypeVar("V")


class Recurrence(NamedTuple, Generic[W]):
    """What a layer does with its queries, keys and values in the place of softmax attention to a cache:

        S' = exp(g) S + phi(k) (a v)^T,    o = scale S'^T phi(q),
        z = gates(u) + gate_bias,    g = max(least, -exp(log_rates) softplus(sign z)),

    with u the layer's normed input, G heads of keys, values and gates that each serve as many query heads, softplus 1 without
    gates, and a softplus(z) in `steps`, otherwise 1. With a beta, a v becomes b (v - exp(g) S^T phi(k)), b = most_beta
    sigmoid(beta(u)). With a divisor, values have a one behind them, and o is divided by the sum of weights that is read of it.
    With a window of w tokens, k and v are those of w tokens before, and weights exp(c + score - largest score) of the w last
    tokens count beside those of the state, c of `log_window_weights`.

    Attributes:
        gates: linear layers one after the other, none, one or two, to one number or D of them for each of the G heads.
        log_rates: (G,) float32; None for no decay, and then there are no gates.
        sign: of z, 1 or -1.
        least: of g; -inf for no bound.
        steps: whether softplus(z), one number a head, also scales values.
        beta: a linear layer to one number for each of the G heads; None for none.
        most_beta: see above.
        eps: of phi(q) and of phi(k), which become y / sqrt(sum(y^2) + eps); None for those that stay as they are.
        feature_map: phi, a name in :data:`regard.engines.feature_maps.FEATURE_MAPS`.
        maps: (H, D, F) float32 each: phi(x) is [softmax(x W), softmax(-x W)], with W of each query head for its queries and for
            the keys that it reads; None for none. Then there are neither gates nor a decay, a beta and another feature map.
        scale: see above; None for that of the layer's scores.
        divisor: added to the sum of weights; None for no division.
        window: w, the token's own included; 0 for none. Needs maps and a divisor.
        log_window_weights: (H,) float32; None for 0.
        gate_bias: of z, float32; None for none.
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
        """All that maps the layer's input."""
        return self.gates if self.beta is None else (*self.gates, self.beta)

    def map(self, function: Callable[[W], V]) -> Recurrence[V]:
        """The same with `function` of each linear layer in its place."""
        found: Any = self
        beta = None if self.beta is None else function(self.beta)
        mapped: Recurrence[V] = found._replace(gates=tuple(map(function, self.gates)), beta=beta)
        return mapped

    def state_shape(self, heads: int, width: int) -> tuple[int, int, int]:
        """Of the state of a row: (heads, features of keys, features of values)."""
        features = width if self.maps is None else 2 * self.maps[0].shape[2]
        return heads, features, width + (self.divisor is not None)
