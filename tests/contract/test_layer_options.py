"""Every mechanism works with every option of the layer shell that it accepts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from regard import Context, Kind, Pattern, Unsupported, create_layer, get_mechanism, list_mechanisms
from regard.create import build_layer
from regard.workbench.verification.properties.layers import DIM, HEADS, LAYER_PROPERTIES, LayerSubject, sequences
from regard.workbench.verification.subjects import Subject
from regard.workbench.verification.verify import Place, check

OPTIONS = {
    "short_convolution": 4,
    "query_key_norm": "rms",
    "value_norm": "layer",
    "output_norm": "rms",
    "output_gate": "sigmoid",
    "num_kv_heads": 1,
    "value_expand": 2.0,
    "bias": True,
    "output_bias": False,
}
KEPT = [
    p for p in LAYER_PROPERTIES if p.name in ("layer_causality", "layer_decoding", "layer_padding", "layer_packing")
]
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
    cells = [check(Place(card, pattern, prop, torch.float64)) for prop in KEPT]
    failures = [f"{c.property}: {c.detail}" for c in cells if c is not None and c.status == "fail"]
    assert not failures, f"with {options}: " + "; ".join(failures)


OTHER_ROUTES = [
    ("kernelized_rpe", "noncausal-self", {"method": "fft"}),
    ("landmark", "causal-cross", {"top_k": 2}),
    ("positional_attention", "causal-self", {"content_heads": 1}),
    ("routing", "noncausal-self", {"local_heads": 2}),
    ("stochastic_subsampling", "causal-self", {"per_sample": True}),
]
EMPTY = [(n, p.value, {}) for n in list_mechanisms() for p in get_mechanism(n).patterns] + OTHER_ROUTES


@pytest.mark.parametrize(("name", "pattern", "options"), EMPTY, ids=lambda x: x if isinstance(x, str) else "")
def test_no_rows_and_no_tokens_are_no_mistake(name, pattern, options):
    layer = create_layer(name, DIM, HEADS, pattern=pattern, **options)
    subject = Subject(get_mechanism(name), Pattern(pattern), options)
    for batch, n in ((0, 7), (2, 0)):
        roles = None
        if subject.card.sample_context is not None:
            sampled = subject.card.sample_context(torch.Generator(), batch=batch, n=n, m=n, pattern=subject.pattern)
            roles = sampled.get("roles")
        x = torch.randn(batch, n, DIM, requires_grad=True)
        memory = torch.randn(batch, n, DIM) if subject.pattern.cross else None
        output = layer(x, memory, context=Context(grid=subject.grid(n), roles=roles)).output
        assert output.shape[0] == batch and (subject.output_axis() is None or output.shape == x.shape)
        (output.sum() + x.sum()).backward()  # an output pooled from no tokens has no gradient of its own


@pytest.mark.parametrize(("turn", "name"), list(enumerate(list_mechanisms())), ids=list_mechanisms())
def test_tensors_that_have_only_shapes_give_the_shape_of_the_output(turn, name):
    """FLOP counters and memory planners call models like this; each mechanism is tried in one of its patterns."""
    card = get_mechanism(name)
    layer = LayerSubject(Subject(card, card.patterns[turn % len(card.patterns)]), torch.float32)
    inputs, context = sequences(layer, 20)
    expected = layer.layer(*inputs, context=context).output
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = layer.layer(*inputs, context=context).output
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_sea_is_made_under_another_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = create_layer("sea", 16, 2).eval()
        assert layer(torch.randn(1, 20, 16)).output.dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(before)
