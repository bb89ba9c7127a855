"""Redistribute a model's heads over more or fewer layers: Wide Attention (Brown et al., arXiv 2210.00640).

::

    deep = EncoderConfig(2, vocab_size=256, dim=64, num_layers=6, num_heads=2, head_dim=16, feed_forward=128)
    wide = with_aspect(deep, 1)                             # one layer of 12 heads of width 16
    family = [with_aspect(deep, layers) for layers in aspects(deep)]

Heads keep their width, so attention has 4 dim head_dim parameters per head whichever layer a head is in. The number of
feed-forward networks and norms grows with the number of layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from regard.catalogue import get_mechanism
from regard.contract import Kind, Unsupported, one_of
from regard.models.encoder import EncoderConfig
from regard.models.language_model import LanguageModelConfig

AnyConfig = TypeVar("AnyConfig", EncoderConfig, LanguageModelConfig)

SIZES = ("num_heads", "num_kv_heads")
"""Options of a layer that set its number of heads."""


def aspects(config: EncoderConfig | LanguageModelConfig) -> tuple[int, ...]:
    """Return the numbers of layers that :func:`with_aspect` accepts for a config, from the widest to the deepest."""
    total, memory = _heads(config)
    return tuple(n for n in range(1, total + 1) if total % n == 0 and (memory is None or memory % n == 0))


def with_aspect(config: AnyConfig, num_layers: int, *, feed_forward: str = "layer") -> AnyConfig:
    """Return a config with the same number of heads, of the same width, spread over another number of layers.

    Args:
        config: a config whose layers are all alike.
        num_layers: one of :func:`aspects`.
        feed_forward: ``layer`` keeps the hidden width of each layer's network; ``total`` keeps the sum of the widths
            over all layers, so that wide and deep models do not differ in size.

    Raises:
        Unsupported: for layers that differ or have no heads, and for a number of layers that does not divide the heads.
    """
    one_of("feed_forward", feed_forward, ("layer", "total"))
    total, memory = _heads(config)
    accepted = aspects(config)
    if num_layers not in accepted:
        kv = "" if memory is None else f" and {memory} of keys and values"
        raise Unsupported(
            f"{total} heads{kv} in {num_layers} layers",
            supported=", ".join(map(str, accepted)),
            nearest=f"num_layers={min(accepted, key=lambda n: abs(n - num_layers))}",
        )
    before, width = len(config.plan), config.feed_forward
    name, options = config.plan[0]
    if feed_forward == "total":
        if width is None or "feed_forward" in options:
            raise Unsupported(
                "feed_forward='total' for a config that does not set the width",
                supported="feed_forward=WIDTH in the config",
            )
        if width * before % num_layers:
            raise Unsupported(
                f"{width * before} hidden features in all in {num_layers} layers", supported="a multiple of the layers"
            )
        width = width * before // num_layers
    return replace(
        config,
        plan=[(name, dict(options))] * num_layers,
        num_layers=num_layers,
        num_heads=total // num_layers,
        num_kv_heads=None if memory is None else memory // num_layers,
        head_dim=config.head_dim or config.dim // config.num_heads,
        feed_forward=width,
    )


def _heads(config: EncoderConfig | LanguageModelConfig) -> tuple[int, int | None]:
    """The total number of heads of all layers, and of key/value heads where `num_kv_heads` is set."""
    (name, options), *others = config.plan
    if any(other != (name, options) for other in others):
        raise Unsupported(
            "another number of layers of a plan whose layers differ", supported="layers that are all alike"
        )
    if get_mechanism(name).kind is not Kind.ATTENTION:
        raise Unsupported(f"the heads of {name}", supported="attention")
    for size in SIZES:
        if size in options:
            raise Unsupported(f"{size} in the plan", supported=f"{size} of the config", nearest="a plan without it")
    layers = len(config.plan)
    return layers * config.num_heads, None if config.num_kv_heads is None else layers * config.num_kv_heads
