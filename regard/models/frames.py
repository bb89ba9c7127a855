"""Frames: the parts around a mechanism in its layer, made the same for all so that a comparison is one of mechanisms.

A layer has parts that are not the mechanism: positions, short convolutions on queries, keys and values, norms of heads, a
gate on the output. Papers choose them differently, and they can matter more than the mechanism does. A *frame* fixes them:

- ``bare``: rotary positions (on grids sinusoidal ones, added to the input), an RMS norm of each output head, heads as wide as
  those of softmax, and nothing else;
- ``convolution``: the same, with a causal depthwise convolution over four tokens on queries, keys and values, as most
  recurrent layers have it;
- ``unnormed``: that without the norm;
- ``own``: what each paper's layer has, which differs.

The norm is in the first two, since a recurrence that sums without a denominator needs it, and without it softmax learns to
recall at a third of the learning rates. It is not neutral: what gates its state may be better without. A mechanism keeps
what belongs to it: a mixer such as Mamba its whole block, scores that are made of positions their positions, a gate that
says how much of a head counts the size of its output, which a norm would undo. :func:`layer_parts` says what a layer came
to have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from regard.catalogue import get_mechanism
from regard.contract import Kind, Mechanism, Pattern, one_of
from regard.layers.attention import AttentionLayer
from regard.layers.convolution import ShortConvolution
from regard.models.layer_plan import layer_accepts

BARE: Mapping[str, Any] = {
    "short_convolution": 0,
    "query_key_norm": None,
    "value_norm": None,
    "output_norm": "rms",
    "output_gate": None,
    "bias": False,
    "key_expand": 1.0,
    "value_expand": 1.0,
}
CONVOLUTION: Mapping[str, Any] = {**BARE, "short_convolution": 4}
FRAMES: Mapping[str, Mapping[str, Any]] = {
    "bare": BARE,
    "convolution": CONVOLUTION,
    "unnormed": {**CONVOLUTION, "output_norm": None},
    "own": {},
}
MEANINGS = {
    "bare": "rotary positions (on grids sinusoidal ones, added to the input) and a norm of output heads in every layer that "
    "can have them, and no convolutions",
    "convolution": "short convolutions on queries, keys and values, rotary positions (on grids sinusoidal ones, added to the "
    "input) and a norm of output heads in every layer that can have them",
    "unnormed": "short convolutions on queries, keys and values, rotary positions (on grids sinusoidal ones, added to the "
    "input), and no norm of output heads",
    "own": "in every layer the parts of its paper, which differ",
}


def in_frame(
    name: str, options: Mapping[str, Any], frame: str, pattern: Pattern, *, rotary: bool = True
) -> dict[str, Any]:
    """Options of a plan's entry in a frame; those that are given go before the frame's.

    Args:
        name: the mechanism.
        options: of its entry.
        frame: one of `FRAMES`.
        pattern: of the layer. In cross patterns no positions are set.
        rotary: whether layers place their tokens; False where positions are added to the model's input.

    Raises:
        Unsupported: for an unknown frame.
    """
    one_of("frame", frame, FRAMES)
    card, wanted = get_mechanism(name), dict(FRAMES[frame])
    if frame == "own":
        return dict(options)
    if card.kind is Kind.WRAPPER:
        inner = {**card.layer_defaults, **(options.get("mechanism_options") or {})}
        wrapped = in_frame(options.get("mechanism", "softmax"), inner, frame, pattern, rotary=rotary)
        positions = wrapped.pop("positions", None)
        found = {**options, "mechanism_options": wrapped}
        return found if positions is None else {"positions": positions, **found}
    if not getattr(card.module, "takes_convolutions", True):
        wanted["short_convolution"] = 0
    if card.layer_defaults.get("output_norm", "") is None:
        wanted["output_norm"] = None
    if card.projection is not None and card.projection.makes_queries:
        del wanted["key_expand"], wanted["value_expand"]  # widths of its own
    if rotary and not pattern.cross and "rotary" in card.accepts_positions and "positions" not in card.layer_defaults:
        wanted["positions"] = "rotary"
    return {option: value for option, value in wanted.items() if _frames(card, option)} | dict(options)


def _frames(card: Mechanism, option: str) -> bool:
    """Whether a part of the mechanism's layer is the frame's to choose."""
    return layer_accepts(card, option) and option not in {f.name for f in dataclasses.fields(card.config)}


def layer_parts(mixer: nn.Module) -> dict[str, str]:
    """The parts of a layer beside its mechanism, in words: positions, convolution, norms, gate.

    A layer with a structure of its own is told as such, with the convolutions and gates that are in it.
    """
    mixer = getattr(mixer, "attention", mixer)  # of a wrapper
    if not isinstance(mixer, AttentionLayer):
        inside = [type(module) for module in mixer.modules()]
        convolves = any(issubclass(kind, ShortConvolution | nn.Conv1d | nn.Conv2d) for kind in inside)
        return {"block": "its own" + (", with a convolution" if convolves else "")}
    scheme = getattr(mixer.positions, "name", None) or "none"
    widths = [module.width for module in mixer.convolutions if isinstance(module, ShortConvolution)]
    parts = {"positions": scheme, "convolution": f"over {widths[0]} tokens" if widths else "none"}
    if mixer.query_norm is not None or mixer.key_norm is not None:
        parts["norm of queries and keys"] = _norm(mixer.query_norm or mixer.key_norm)
    parts["norm of output heads"] = _norm(mixer.output_norm)
    parts["output gate"] = mixer.gate_activation or "none"
    return parts


def _norm(norm: nn.Module | None) -> str:
    return "none" if norm is None else "RMS" if "RMS" in type(norm).__name__ else "layer"
