"""Frames: the parts of a layer around its mechanism, made the same for all mechanisms so that comparisons are fair.

A layer has parts that are not the mechanism: positions, short convolutions on queries, keys and values, norms of heads,
an output gate. Papers choose these parts differently, and they can matter more than the mechanism. A *frame* fixes
them:

- ``bare``: rotary positions (on grids, sinusoidal positions added to the input), an RMS norm of each output head, heads
  as wide as those of softmax, and nothing else;
- ``convolution``: the same, with a causal depthwise convolution over four tokens on queries, keys and values, as in
  most recurrent layers;
- ``unnormed``: ``convolution`` without the norm;
- ``own``: the parts of each paper's own layer.

The first two frames have the norm because a recurrence that sums without a denominator needs it, and because without it
softmax learns to recall at only a third of the learning rates. The norm is not neutral: mechanisms with a gated state
may do better without it. A mechanism keeps the parts that belong to it: a mixer such as Mamba keeps its whole block,
scores computed from positions keep their positions, and a gate that weights heads keeps the scale of their outputs,
which a norm would undo. :func:`layer_parts` tells which parts a layer has in the end.
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
    """Return the options of a plan's entry in a frame; given options take precedence over the frame's.

    Args:
        name: the mechanism.
        options: the options of its entry.
        frame: one of `FRAMES`.
        pattern: the pattern of the layer. In cross patterns no positions are set.
        rotary: whether layers may have rotary positions; False if positions are added to the model's input.

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
        del wanted["key_expand"], wanted["value_expand"]  # its widths are its own
    if rotary and not pattern.cross and "rotary" in card.accepts_positions and "positions" not in card.layer_defaults:
        wanted["positions"] = "rotary"
    return {option: value for option, value in wanted.items() if _frames(card, option)} | dict(options)


def _frames(card: Mechanism, option: str) -> bool:
    """Return whether a frame may set this option of the mechanism's layer."""
    return layer_accepts(card, option) and option not in {f.name for f in dataclasses.fields(card.config)}


def layer_parts(mixer: nn.Module) -> dict[str, str]:
    """Describe the parts of a layer other than its mechanism: positions, convolution, norms, gate.

    For a layer with a structure of its own, only say so, and whether it has a convolution.
    """
    mixer = getattr(mixer, "attention", mixer)  # unwrap a wrapper
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
