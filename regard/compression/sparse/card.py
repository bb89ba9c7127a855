"""A sparse method in place of a layer's softmax: the same queries, keys and values, but another cache."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from regard.catalogue import get_mechanism
from regard.compression.sparse.cache import MethodCache
from regard.compression.sparse.method import Method, Place, call
from regard.contract import Call, LayerCall, LayerSpec, Mechanism, Pattern, Projection, Result, Tensors, Unsupported

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Config:
    """The method that runs in a layer. Equal only to itself, since the meter belongs to the layer."""

    method: Method = field(default_factory=Method)
    place: Place = field(default_factory=Place)


def parallel(
    call_: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n e"]
) -> Result:
    """Prefill a whole prompt without a cache."""
    return _run(call_, q, k, v, keeps=False)


def chunked(
    call_: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n e"]
) -> Result:
    """Prefill a whole prompt, with the cache that the method keeps of it; or decode tokens after a cache, one by one.
    Also used for `step`."""
    return _run(call_, q, k, v, keeps=True)


def _run(given: Call, q: Tensor, k: Tensor, v: Tensor, *, keeps: bool) -> Result:
    config: Config = given.config
    if given.lengths is not None and not config.method.pads:
        raise Unsupported(
            "sparse attention of padded or packed sequences",
            supported="sequences of one length, and streaming",
            nearest="one prompt at a time",
        )
    place = dataclasses.replace(config.place, scale=given.scale, rotate=given.rotate, lengths=given.lengths)
    return Result(*call(config.method, q, k, v, given.state, place, keeps=keeps))


def card() -> Mechanism:
    """A card outside the catalogue: a method looks at the last tokens of a prompt before the first ones are answered,
    so most of the contract for causal mechanisms cannot hold."""
    return dataclasses.replace(
        get_mechanism("softmax"),
        name="sparse",
        aliases=(),
        summary="Softmax attention of which a trained model computes a part.",
        inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
        patterns=(Pattern.CAUSAL_SELF,),
        forms={"parallel": parallel, "chunked": chunked, "step": chunked},
        config=Config,
        variants={},
        variant_patterns={},
        state=MethodCache,
        uneven=False,
        honours=frozenset(),
        weights="none",
        accepts_positions=("none", "sinusoidal", "learned", "rotary"),
        projection=None,
    )


class Unrotated(Projection):
    """Lets another library's model leave the rotation of queries and keys to the method."""

    reads_unrotated = ("keys", "streaming:positions=text")

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        return heads


CARD = card()
PLACING = dataclasses.replace(CARD, honours=frozenset({"rotate"}), projection=Unrotated)
"""The card of a method that places keys itself."""


def card_of(method: Method) -> Mechanism:
    """The card of a layer with a method."""
    return PLACING if method.places_keys else CARD
