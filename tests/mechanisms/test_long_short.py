"""Tests specific to long-short attention: near tokens, landmarks of all tokens or of segments, both norms, and parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import calls, check_recorded, close, cut, load, qkv, refused, shaken
from torch import Tensor, nn

from regard.contract import Context, Mask, Pattern
from regard.create import create_layer
from regard.mechanisms.long_short import MECHANISM

run = calls(MECHANISM)


def sample(n: int, r: int, **sizes: int) -> dict[str, Tensor]:
    """Inputs without raw tokens and norms."""
    inputs = qkv(n, **sizes)
    return inputs | {"p": torch.randn(*inputs["k"].shape[:3], r, dtype=torch.float64)}


def raw_and_norms(n: int) -> dict[str, Tensor]:
    raw = {f"{name}_raw": torch.randn(2, 2, n, 4, dtype=torch.float64) for name in "kv"}
    return raw | {f"norm_{name}": torch.randn(2, 4, dtype=torch.float64) for name in ("weight", "bias")}


def make_layer(pattern: str = "causal-self", **options: Any) -> nn.Module:
    options = {"window": 3, "segment": 4, "landmarks": 3, **options}
    return create_layer("long_short", 8, 2, pattern=pattern, **options).double()


def definition(inputs: dict[str, Tensor], pattern: str, options: dict) -> Tensor:
    """Query by query: one softmax over the near tokens and the landmarks that the query may see."""
    n, w, rows = inputs["q"].shape[2], options["window"], []
    for i in range(n):
        if pattern == "causal-self":
            size = options["segment"]
            near = [j for j in range(n) if i - w < j <= i]
            segments = [list(range(start, start + size)) for start in range(0, i // size * size, size)]
        else:
            first, side = i // w * w, max(1, w // 2)
            near = [j for j in range(n) if first - side <= j < first + w + side]
            segments = [list(range(n))]
        both = []
        for name in "kv":
            raw, parts = inputs.get(f"{name}_raw", inputs[name]), [inputs[name][:, :, near]]
            for segment in segments:
                weights = inputs["p"][:, :, segment].softmax(2)
                parts.append(normalized((weights[..., None] * raw[:, :, segment][..., None, :]).sum(2), inputs))
            both.append(torch.cat(parts, 2))
        rows.append(F.scaled_dot_product_attention(inputs["q"][:, :, i : i + 1], *both))
    return torch.cat(rows, 2)


def normalized(landmarks: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Normalise landmarks (B, H, r, D) over all heads together."""
    if "norm_weight" not in inputs:
        return landmarks
    variance, mean = torch.var_mean(landmarks, (1, 3), correction=0, keepdim=True)
    weight, bias = (inputs[name][:, None] for name in ("norm_weight", "norm_bias"))
    return (landmarks - mean) * (variance + 1e-5).rsqrt() * weight + bias


@pytest.mark.parametrize("more", [True, False], ids=["raw tokens and norms", "tokens alone"])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize(
    ("pattern", "options"),
    [("causal-self", {"segment": 4, "rank": 2}), ("causal-self", {"segment": 1}), ("noncausal-self", {"landmarks": 3})],
    ids=str,
)
def test_equals_the_definition_query_by_query(pattern, options, window, more):
    options = {"window": window, **options}
    inputs = sample(13, MECHANISM.options(**options).count(Pattern(pattern)))
    inputs |= raw_and_norms(13) if more else {}
    for form in (None, "reference"):
        close(run(inputs, options, pattern=pattern, form=form).output, definition(inputs, pattern, options))


@pytest.mark.parametrize("first", [-1e4, 1e4])
def test_a_segment_cut_where_its_scores_jump_equals_the_whole(first):
    inputs, options, state = sample(8, 2), {"window": 2, "segment": 6, "rank": 2}, None
    inputs["p"][:, :, :3] += first
    expected = run(inputs, options).output
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        result = run(cut(inputs, part, "qkvp"), options, state=state, return_state=True)
        close(result.output, expected[:, :, part])
        state = result.state


def test_the_layer_has_two_norms_and_normalises_tokens_after_landmarks_are_made():
    def heads(y: Tensor) -> Tensor:
        return y.unflatten(2, (2, -1)).transpose(1, 2)

    layer, x = shaken(make_layer()), torch.randn(2, 9, 8, dtype=torch.float64)
    own, k, v = layer.projection, layer.key(x), layer.value(x)
    inputs = {"q": heads(layer.query(x)), "k": heads(own.token_norm(k)), "v": heads(own.token_norm(v))}
    inputs |= {"p": heads(own.scores(x)), "k_raw": heads(k), "v_raw": heads(v)}
    inputs |= {f"norm_{name}": getattr(own.landmark_norm, name).view(2, 4) for name in ("weight", "bias")}
    expected = definition(inputs, "causal-self", {"window": 3, "segment": 4})
    close(layer(x).output, layer.output(expected.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_grouped_keys_share_landmarks_and_norms(pattern):
    layer, whole = make_layer(pattern, num_kv_heads=1), make_layer(pattern)
    weights = layer.state_dict()
    for name in ("key.weight", "value.weight", "projection.scores.weight"):
        weights[name] = weights[name].repeat(2, 1)
    for name in ("weight", "bias"):
        for norm in ("token_norm", "landmark_norm"):
            weights[f"projection.{norm}.{name}"] = weights[f"projection.{norm}.{name}"].repeat(2)
    whole.load_state_dict(weights)
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    close(layer(x).output, whole(x).output)


def test_parity_of_the_noncausal_layer():
    f = load("long_short_noncausal_cab")
    layer = make_layer("noncausal-self", window=5, normalize_first=True, bias=True)
    names = {"query": "W_q", "key": "W_k", "value": "W_v", "output": "W_o", "projection.scores": "dconv_fc"}
    names |= {"projection.token_norm": "dual_ln_l", "projection.landmark_norm": "dual_ln_s"}
    layer.load_state_dict({f"{a}.{p}": f[f"weight_{b}_{p}"] for a, b in names.items() for p in ("weight", "bias")})
    valid, x = f["valid"], f["x"].requires_grad_()
    output = layer(x, context=Context(mask=Mask(valid=valid))).output
    close(output[valid], f["out"][valid])  # observed 4e-16
    (gradient,) = torch.autograd.grad(output, x, f["grad_out"])
    close(gradient[valid], f["grad_x"][valid])


def test_parity_of_the_causal_layer():
    """The zeros in the recorded code's memory are passed as tokens."""
    f = load("long_short_causal_cab")
    layer = make_layer(window=8, rank=2)
    names = {"query": "proj_query", "key": "proj_key", "value": "proj_val", "output": "proj_out"}
    weights = {f"{own}.weight": f"{other}_weight" for own, other in names.items()}
    weights |= {"projection.scores.weight": "dconv_1_weight"}
    for own, other in (("token_norm", "dual_ln_win"), ("landmark_norm", "dual_ln_dproj")):
        weights |= {f"projection.{own}.{name}": f"{other}_{name}" for name in ("weight", "bias")}
    layer.load_state_dict({own: f[f"weight_{other}"] for own, other in weights.items()})
    x = f["x"].requires_grad_()
    output = layer(torch.cat([torch.zeros(2, 8, 8, dtype=torch.float64), x], 1)).output[:, 8:]
    check_recorded(f, output, {"x": x})  # observed 6e-16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_dim": 6}, "which share norms"),
        ({"positions": "rotary"}, "mixtures of keys"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    refused(message, make_layer, **options)


def test_tensors_that_do_not_fit_the_options_are_refused():
    inputs, options, more = sample(6, 2, value_dim=3), {"rank": 2}, raw_and_norms(6)
    weight, bias = ({name: more[name]} for name in ("norm_weight", "norm_bias"))
    refused("2 landmarks", run, inputs, {"rank": 1})
    refused("norm_bias", run, inputs | weight, options)
    refused("3 features", run, inputs | weight | bias, options)
    assert run(inputs, options).output.shape == (2, 2, 6, 3)
