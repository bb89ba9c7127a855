"""Tests specific to latent attention: its two forms, its cache, which part is rotated, and parity."""

from __future__ import annotations

import pytest
import torch
from support import WANT_STATE, calls, check_recorded, close, close_gradients, in_steps, load, refused

from regard.contract import ALL_PATTERNS, Pattern
from regard.create import create_layer
from regard.mechanisms import latent
from regard.mechanisms.latent import MECHANISM
from regard.workbench.verification.subjects import Subject

run = calls(MECHANISM)


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_with_and_without_keys_and_values_it_is_the_same(pattern, absorbed, monkeypatch):
    monkeypatch.setattr(latent, "absorbs", lambda *sizes: absorbed)
    given = {name: x.requires_grad_() for name, x in Subject(MECHANISM, pattern).inputs(5).items()}
    found, expected = (run(given, pattern=pattern, form=form).output for form in (None, "reference"))
    close_gradients(found, expected, given)
    extras = run(given, pattern=pattern, want={"weights", "lse"}).extras
    close(extras["weights"].sum(-1), torch.ones_like(extras["lse"]))


def test_one_query_takes_the_form_without_keys_and_a_whole_sequence_that_with():
    sizes = {"d": 64, "v": 64, "r": 32, "c": 256}
    assert latent.absorbs(1, 4096, **sizes)
    assert not latent.absorbs(4096, 4096, **sizes)


@pytest.mark.parametrize("heads", [2, 8])
def test_the_cache_of_a_token_does_not_depend_on_the_heads(heads):
    layer = create_layer("latent", 32, heads, latent_dim=12, head_dim=4, positions="rotary").double()
    few, many = (layer(torch.randn(1, n, 32).double(), context=WANT_STATE).state.mechanism.nbytes for n in (5, 25))
    assert many - few == 20 * (12 + 4 + 1) * 8  # 1: the token's rank


def test_only_the_decoupled_part_is_rotated():
    layer = create_layer("latent", 16, 2, positions="rotary").double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        plain = create_layer("latent", 16, 2).double()
        plain.load_state_dict(layer.state_dict())
        assert (layer(x).output - plain(x).output).abs().max() > 1e-6
        rows = layer.projection.query.weight.unflatten(0, (2, -1))
        rows[:, -layer.head_dim :] = 0
        plain.load_state_dict(layer.state_dict())
        close(layer(x).output, plain(x).output)


@pytest.mark.parametrize("name", ["", "query_"])
def test_parity_with_deepseek_in_transformers(name):
    """Whole sequences, and token by token without computing keys and values, as the recorded code does."""
    arrays = load(f"latent_{name}transformers")
    ranks = {"latent_dim": 12, "content_dim": 6, "query_latent_dim": 10 if name else None}
    layer = create_layer("latent", 16, 2, positions="rotary", head_dim=4, value_dim=5, **ranks).double()
    down, key = arrays["kv_a_proj_with_mqa_weight"].split([12, 4])
    up_k, up_v = arrays["kv_b_proj_weight"].unflatten(0, (2, -1)).split([6, 5], 1)
    weights = {
        "key.weight": key,
        "output.weight": arrays["o_proj_weight"],
        "projection.down.weight": down,
        "projection.norm.weight": arrays["kv_a_layernorm_weight"],
        "projection.up_k": up_k,
        "projection.up_v": up_v,
        "projection.query.weight": arrays["q_b_proj_weight" if name else "q_proj_weight"],
    }
    if name:
        weights["projection.query_down.weight"] = arrays["q_a_proj_weight"]
        weights["projection.query_norm.weight"] = arrays["q_a_layernorm_weight"]
    layer.load_state_dict(weights)
    x = arrays["x"].requires_grad_()
    output = layer(x).output
    check_recorded(arrays, output, {"x": x})
    with torch.no_grad():
        close(in_steps(layer, x)[0], arrays["out"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_kv_heads": 2}, "one rotated key"),
        ({"query_key_norm": "rms"}, "query_key_norm"),
        ({"value_norm": "rms"}, "value_norm"),
        ({"short_convolution": 4}, "short_convolution"),
    ],
)
def test_what_it_has_no_place_for_is_refused(options, words):
    refused(words, create_layer, "latent", 16, 2, **options)


def test_keys_of_more_heads_than_one_are_refused():
    given = Subject(MECHANISM, Pattern.CAUSAL_SELF).inputs(4)
    refused("k of 2 heads", run, given | {"k": given["k"].expand(-1, 2, -1, -1)})
