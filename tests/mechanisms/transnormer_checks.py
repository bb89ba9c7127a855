"""Checks shared by the tests of TransNormer's two kinds of attention."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from support import check_recorded, load

from regard.create import create_layer

NORM = {
    "simple_rms": lambda x: x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-8),
    "rms": lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6),
    "layer": lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-5),
    "none": lambda x: x,
}


def check_equals_the_authors_layer(mechanism: str, recording: str, options: dict[str, Any]) -> None:
    """Compare a layer with LRPE to a recording: output, and gradients of input, angles and query weights."""
    recorded = load(recording)
    pattern = "causal-self" if "causal" in recording else "noncausal-self"
    layer = create_layer(mechanism, 12, 2, pattern=pattern, positions="lrpe", bias=True, **options).double()
    weights = {f"positions.{part}": recorded[part] for part in ("reflection", "angles")}
    for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "out"}.items():
        weights |= {f"{ours}.{part}": recorded[f"{theirs}_{part}"] for part in ("weight", "bias")}
    layer.load_state_dict(weights)
    x = recorded["x"].requires_grad_()
    leaves = {"x": x, "angles": layer.positions.angles, "q_weight": layer.query.weight}
    check_recorded(recorded, layer(x).output, leaves)
