"""Tests specific to Aaren: closed forms, its learned query, its options, and recorded outputs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import check_recorded, close, load, refused

from regard.contract import ALL_PATTERNS, Mask, Pattern
from regard.create import create_layer
from regard.functional import aaren_attention


def sample(dtype=torch.float64):
    """Inputs with 19 tokens and two heads."""
    return tuple(torch.randn(*shape, dtype=dtype) for shape in ((2, 4), (2, 2, 19, 4), (2, 2, 19, 3)))


def softmax_attention(q, k, v, n=19, **options):
    """Softmax attention with the same query at n places."""
    return F.scaled_dot_product_attention(q[None, :, None].expand(2, -1, n, -1), k, v, **options)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_causal_softmax_attention_with_the_same_query_everywhere(size, dtype, tolerance):
    """A zero query gives the running mean; a very large score alone determines the output from its token on."""
    q, k, v = sample(dtype)
    close(aaren_attention(size * q, k, v), softmax_attention(size * q, k, v, is_causal=True), tolerance)


@pytest.mark.parametrize(
    ("pattern", "slots", "outputs"),
    [("noncausal-self", None, 19), ("noncausal-cross", 5, 5), ("causal-cross", 5, 5), ("causal-cross", None, 1)],
)
def test_other_patterns_pool_all_keys_by_softmax(pattern, slots, outputs):
    q, k, v = sample()
    slots = None if slots is None else torch.zeros(2, slots)
    close(aaren_attention(q, k, v, slots, pattern=pattern), softmax_attention(q, k, v, outputs), 1e-13)


def test_slots_choose_the_last_prefixes_in_causal_self_and_their_values_are_not_read():
    q, k, v = sample()
    found = aaren_attention(q, k, v, torch.full((2, 4), torch.nan))
    assert torch.equal(found, aaren_attention(q, k, v)[:, :, -4:])


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_forgetting_multiplies_earlier_weights_at_each_token(pattern):
    q, k, v = sample()
    last = torch.arange(19.0, dtype=torch.float64)[:, None] if pattern is Pattern.CAUSAL_SELF else 18.0
    age = last - torch.arange(19, dtype=torch.float64)
    scores = torch.einsum("hd,bhmd->bhm", q, k)[:, :, None] / 2 + age * math.log(0.8)
    expected = scores.masked_fill(age < 0, -torch.inf).softmax(-1) @ v
    expected = expected.expand(-1, -1, 1 if pattern.cross else 19, -1)
    close(aaren_attention(q, k, v, pattern=pattern, forget=0.8), expected, 1e-13)


def test_bidirectional_is_the_prefix_beside_the_suffix():
    q, k, v = sample()
    found = aaren_attention(q, k, v, pattern="noncausal-self", noncausal="bidirectional")
    suffix = aaren_attention(q, k.flip(2), v.flip(2)).flip(2)
    close(found, torch.cat([aaren_attention(q, k, v), suffix], -1), 1e-13)


@pytest.mark.parametrize("tokens", [1, 2])
def test_queries_are_those_of_the_query_tokens_which_read_the_same_keys_and_values(tokens):
    groups = 4 // tokens
    layer = create_layer("aaren", 8, 4, num_kv_heads=groups, query_tokens=tokens).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    queries = layer.projection.query(layer.projection.query_token).view(tokens, groups, 2)
    k, v = (f(x).unflatten(-1, (groups, 2)).transpose(1, 2) for f in (layer.key, layer.value))
    heads = torch.stack([aaren_attention(q, k, v) for q in queries], 2).flatten(1, 2)
    close(layer(x).output, layer.output(heads.transpose(1, 2).flatten(2)), 1e-14)


@pytest.mark.parametrize("name", ["aaren_prefix", "aaren_large_scores", "aaren_right_padded"])
def test_equals_recorded_torch_attention(name):
    a = load(name)
    inputs = [a[n].requires_grad_() for n in ("query", "k", "v")]
    padded = "key_mask" in a
    valid = a["key_mask"] if padded else torch.ones(1, 1, dtype=torch.bool)
    mask = Mask(lengths=valid.sum(-1)) if padded else None
    found = aaren_attention(*inputs, mask=mask, scale=float(a["scale"]), chunk_size=5)
    valid = valid[:, None, :, None]
    close(torch.where(valid, found, 0), torch.where(valid, a["out"], 0), 1e-10)  # observed 1.5e-14
    if padded:  # the recorded gradients include outputs at padding, which this library does not compute
        return
    check_recorded(a, found, dict(zip(("query", "k", "v"), inputs, strict=True)), 1e-10)  # observed 1.1e-14


def test_equals_the_recorded_scan_of_a_third_party():
    a = load("aaren_scan_thirdparty")
    result = aaren_attention(a["query"], a["k"], a["v"], scale=float(a["scale"]), return_state=True)
    close(result.output, a["out"], 1e-10)  # observed 3.6e-15
    state = result.state
    close(state.m[..., 0], a["run_max"][..., -1], 1e-10)
    close(state.u[..., 0], a["denominator"][..., -1], 1e-10)
    close(state.w[:, :, 0], a["numerator"][:, :, -1], 1e-10)


def test_query_tokens_need_key_value_heads_that_they_share():
    refused("num_kv_heads=2", create_layer, "aaren", 8, 4, query_tokens=2)
