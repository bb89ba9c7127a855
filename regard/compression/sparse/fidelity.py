"""How far a method's attention is from dense attention, in a model that itself runs densely."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.compression.sparse.cache import HeadCache, MethodCache
from regard.compression.sparse.method import PHASES, Meter, Method, Place

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class TwoCaches(MethodCache):
    """The dense cache of a layer, and that of a method beside it."""

    dense: HeadCache
    sparse: Any
    length: Tensor

    def appended(self, k: Float[Tensor, "b g 1 d"], v: Float[Tensor, "b g 1 e"]) -> TwoCaches:
        return TwoCaches(self.dense.appended(k, v), self.sparse.appended(k, v), self.length + 1)


@dataclass(frozen=True)
class Beside(Method):
    """Dense attention, with a method run beside it on the same queries, keys and values, whose outputs are compared.

    So a layer's error is its own, and not that of the layers before it. Costs both. For a method that places keys itself
    the dense cache holds them unrotated too, and rotates them to their positions in the text.

    Attributes:
        method: the method that is judged.
        errors: relative errors so far, by phase: one number for each prompt and each token of each layer.
    """

    method: Method = field(default_factory=Method)
    errors: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})

    @property
    def places_keys(self) -> bool:
        return self.method.places_keys

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
        dense = super().prefill(q, k, v, place)
        self.errors["prefill"].append(relative_error(self.method.prefill(q, k, v, _unmetered(place)), dense))
        return dense

    def compress(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Any:
        dense = super().compress(q, k, v, place)
        return TwoCaches(dense, self.method.compress(q, k, v, _unmetered(place)), dense.length)

    def decode(self, q: Tensor, cache: Any, place: Place) -> tuple[Tensor, Any]:
        dense, queries = cache.dense, q
        if place.rotate is not None:
            places = torch.arange(dense.k.shape[2], device=q.device)[None]
            dense = dataclasses.replace(dense, k=place.rotate(dense.k, places))
            queries = place.rotate(q, dense.length[:, None].to(q.device) - 1)
        output, _ = super().decode(queries, dense, place)
        found, sparse = self.method.decode(q, cache.sparse, _unmetered(place))
        self.errors["decode"].append(relative_error(found, output))
        return output, TwoCaches(cache.dense, sparse, cache.length)

    def error(self, phase: str) -> float:
        """The mean relative error of a phase over layers and tokens; 0 if nothing ran."""
        errors = self.errors[phase]
        return sum(errors) / len(errors) if errors else 0.0


def _unmetered(place: Place) -> Place:
    return dataclasses.replace(place, meter=Meter())


def relative_error(output: Tensor, dense: Tensor) -> float:
    """The norm of the error relative to the norm of the dense output."""
    return float((output - dense).norm() / dense.norm())
