"""What tests of the two attentions of TransNormer have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import load
from torch import Tensor

from regard.create import create_layer


def check_equals_the_authors_layer(
    mechanism: str, recording: str, options: dict[str, Any], close: Callable[[Tensor, Tensor], None]
) -> None:
    """The output of a recorded layer with LRPE, and the gradients of its input, angles and query weights."""
    recorded = load(recording)
    pattern = "causal-self" if "causal" in recording else "noncausal-self"
    layer = create_layer(mechanism, 12, 2, pattern=pattern, positions="lrpe", bias=True, **options).double()
    weights = {f"positions.{part}": recorded[part] for part in ("reflection", "angles")}
    for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "out"}.items():
        weights |= {f"{ours}.{part}": recorded[f"{theirs}_{part}"] for part in ("weight", "bias")}
    layer.load_state_dict(weights)
    x = recorded["x"].requires_grad_()
    output = layer(x).output
    close(output, recorded["out"])
    leaves = [x, layer.positions.angles, layer.query.weight]
    found = torch.autograd.grad(output, leaves, recorded["grad_out"])
    for gradient, leaf in zip(found, ("x", "angles", "q_weight"), strict=True):
        close(gradient, recorded[f"grad_{leaf}"])
