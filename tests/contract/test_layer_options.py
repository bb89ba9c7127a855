"""What a layer's own options must not break: every mechanism with every option of the shell that it accepts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from regard import Kind, Unsupported, get_mechanism, list_mechanisms
from regard.create import build_layer
from regard.workbench.layer_properties import DIM, HEADS, LAYER_PROPERTIES
from regard.workbench.verify import check

OPTIONS = {
    "short_convolution": 4,
    "query_key_norm": "rms",
    "value_norm": "layer",
    "output_norm": "rms",
    "output_gate": "sigmoid",
    "num_kv_heads": 1,
    "value_expand": 2.0,
    "bias": True,
}
KEPT = [p for p in LAYER_PROPERTIES if p.name in ("layer_causality", "layer_decoding", "layer_padding", "layer_packing")]
CELLS = [(name, p) for name in list_mechanisms(kind=Kind.ATTENTION) for p in get_mechanism(name).patterns]


def accepts(card, pattern, options):
    try:
        build_layer(card, DIM, HEADS, pattern=pattern, **options)
    except Unsupported:
        return False
    return True


@pytest.mark.parametrize(("name", "pattern"), CELLS, ids=[f"{n}-{p.value}" for n, p in CELLS])
def test_a_layer_is_causal_resumes_and_ignores_padding_with_all_options_that_it_accepts(name, pattern):
    card, options = get_mechanism(name), {}
    for option, value in OPTIONS.items():
        if accepts(card, pattern, {**options, option: value}):
            options[option] = value
    card = dataclasses.replace(card, layer_defaults={**card.layer_defaults, **options})
    cells = [check(card, pattern, prop, torch.float64) for prop in KEPT]
    failures = [f"{c.property}: {c.detail}" for c in cells if c is not None and c.status == "fail"]
    assert not failures, f"with {options}: " + "; ".join(failures)
