"""What is peculiar to long-short attention: what is near, landmarks of all or of segments, both norms, and parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.apply import apply
from regard.contract import Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.functional import local_attention, softmax_attention
from regard.mechanisms.long_short import MECHANISM, Config, cost
from regard.models import LanguageModel, LanguageModelConfig

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
SELF = ["causal-self", "noncausal-self"]
WANT_STATE = Context(want=frozenset({"state"}))


def load(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def sample(n: int, r: int, batch: int = 2, heads: int = 2, width: int = 4) -> dict[str, Tensor]:
    shapes = {name: (batch, heads, n, width) for name in "qkv"} | {"p": (batch, heads, n, r)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str, config: Config, **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=config, **call).output


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def make_layer(pattern: str = "causal-self", **options: Any) -> torch.nn.Module:
    torch.manual_seed(len(str(options)))
    options = {"window": 3, "segment": 4, "landmarks": 3, **options}
    return create_layer("long_short", 8, 2, pattern=pattern, **options).double()


@pytest.mark.parametrize("n", [1, 4, 9, 20])
def test_causal_without_a_complete_segment_is_local_attention(n):
    x = sample(n, 2)
    config = Config(window=5, segment=21, rank=2)
    local = local_attention(x["q"], x["k"], x["v"], window=5)
    close(run(x, "causal-self", config), local)
    everything = softmax_attention(x["q"], x["k"], x["v"])
    close(run(x, "causal-self", Config(window=n, segment=n + 1, rank=2)), everything)


def test_a_window_over_all_reads_all_tokens_and_the_landmarks():
    x = sample(11, 3)
    found = run(x, "noncausal-self", Config(window=11, landmarks=3))
    weights = x["p"].softmax(2).mT
    keys, values = (torch.cat([x[name], weights @ x[name]], 2) for name in "kv")
    close(found, F.scaled_dot_product_attention(x["q"], keys, values))


def test_equal_scores_make_means():
    x = sample(12, 1)
    x["p"].zero_()
    keys, values = (torch.cat([x[n], x[n].unflatten(2, (3, 4)).mean(3)], 2) for n in "kv")
    i, j = torch.arange(12)[:, None], torch.arange(15)
    seen = torch.where(j < 12, (j <= i) & (j > i - 2), i >= (j - 12 + 1) * 4)
    expected = F.scaled_dot_product_attention(x["q"], keys, values, attn_mask=seen)
    close(run(x, "causal-self", Config(window=2, segment=4)), expected)


def seen_tokens(pattern: str, config: Config, n: int, *, scores: bool = False) -> Tensor:
    """Pairs (i, j) for which output i depends on v_j (on p_j with `scores`)."""
    x = sample(n, config.count(Pattern(pattern)), batch=1, heads=1)
    name = "p" if scores else "v"
    x[name].requires_grad_()
    output = run(x, pattern, config)
    rows = [torch.autograd.grad(output[:, :, i].sum(), x[name], retain_graph=True)[0] for i in range(n)]
    return torch.stack([row[0, 0].abs().sum(-1) > 0 for row in rows])


def test_a_causal_landmark_is_read_from_the_next_segment_on():
    seen = seen_tokens("causal-self", Config(window=2, segment=4), 11, scores=True)
    i, j = torch.arange(11)[:, None], torch.arange(11)
    assert torch.equal(seen, (j // 4 < i // 4))
    seen = seen_tokens("causal-self", Config(window=2, segment=4), 11)
    assert torch.equal(seen, (j // 4 < i // 4) | ((j <= i) & (j > i - 2)))


@pytest.mark.parametrize(("window", "side"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_noncausal_windows_are_segments_with_half_a_window_on_each_side(window, side):
    n = 13
    x = sample(n, 1, batch=1, heads=1)
    x["p"] = torch.full_like(x["p"], -torch.inf)
    x["p"][:, :, 0] = 0  # the landmark is token 0, so that only it is seen from everywhere
    x["v"].requires_grad_()
    output = run(x, "noncausal-self", Config(window=window, landmarks=1))
    for i in range(n):
        gradient = torch.autograd.grad(output[:, :, i].sum(), x["v"], retain_graph=True)[0][0, 0].abs().sum(-1)
        start = i // window * window
        near = set(range(max(0, start - side), min(n, start + window + side))) | {0}
        assert set(gradient.nonzero().flatten().tolist()) == near


def test_scores_are_compared_over_tokens():
    """A constant added to the scores of a landmark changes nothing; one of a token does."""
    for pattern, r in (("causal-self", 2), ("noncausal-self", 3)):
        x, config = sample(9, r), Config(window=2, segment=3, rank=2, landmarks=3)
        expected = run(x, pattern, config)
        close(run(x | {"p": x["p"] + torch.randn(r)}, pattern, config), expected)
        moved = run(x | {"p": x["p"] + torch.randn(9, 1)}, pattern, config)
        assert not torch.allclose(moved, expected)


@pytest.mark.parametrize("pattern", SELF)
def test_large_scores_stay_finite_with_finite_gradients(pattern):
    config = Config(window=2, segment=3, landmarks=1)
    x = {name: t.float() for name, t in sample(10, 1).items()}
    x["p"] = (1e4 * x["p"]).requires_grad_()
    x["k"].requires_grad_()
    output = run(x, pattern, config)
    output.square().sum().backward()
    assert output.isfinite().all() and x["p"].grad.isfinite().all() and x["k"].grad.isfinite().all()
    exact = {name: t.detach().double() for name, t in x.items()}
    close(output.detach().double(), run(exact, pattern, config, form="reference"), 1e-5)


@pytest.mark.parametrize("first", [-1e4, 1e4])
def test_a_segment_cut_where_its_scores_jump_equals_the_whole(first):
    x, config = sample(8, 2), Config(window=2, segment=6, rank=2)
    x["p"][:, :, :3] += first
    expected = run(x, "causal-self", config)
    state, outputs = None, []
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        piece = {name: t[:, :, part] for name, t in x.items()}
        result = apply(MECHANISM, piece, pattern="causal-self", config=config, state=state, return_state=True)
        outputs.append(result.output)
        state = result.state
    close(torch.cat(outputs, 2), expected)


def test_landmarks_are_made_of_raw_tokens_where_there_are_some():
    x, config = sample(8, 1), Config(window=1, segment=4)
    raw = sample(8, 1)
    found = run(x | {"k_raw": raw["k"], "v_raw": raw["v"]}, "causal-self", config)
    weights = x["p"][:, :, :4].softmax(2).mT
    keys, values = (torch.cat([x[n][:, :, 6:7], weights @ raw[n][:, :, :4]], 2) for n in "kv")
    close(found[:, :, 6:7], F.scaled_dot_product_attention(x["q"][:, :, 6:7], keys, values))


def test_landmarks_are_normalised_over_all_heads_together():
    x, config = sample(8, 3), Config(window=1, landmarks=3)
    weight, bias = torch.randn(2, 2, 4, dtype=torch.float64)
    found = run(x | {"norm_weight": weight, "norm_bias": bias}, "noncausal-self", config)
    both = []
    for name in "kv":
        flat = (x["p"].softmax(2).mT @ x[name]).transpose(1, 2).flatten(2)
        normal = F.layer_norm(flat, (8,), weight.flatten(), bias.flatten()).unflatten(2, (2, 4)).transpose(1, 2)
        both.append(torch.cat([x[name][:, :, :2], normal], 2))
    close(found[:, :, :1], F.scaled_dot_product_attention(x["q"][:, :, :1], *both))


def test_the_layer_has_two_norms_and_normalises_tokens_after_landmarks_are_made():
    layer, x = make_layer(window=1), torch.randn(1, 5, 8, dtype=torch.float64)
    projection = layer.projection
    for norm in (projection.token_norm, projection.landmark_norm):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    q, k, v = (module(x) for module in (layer.query, layer.key, layer.value))
    weights = projection.scores(x)[:, :4].softmax(1)  # (b, 4, h)
    both = []
    for tokens in (k, v):
        means = torch.einsum("bnh,bnhd->bhd", weights, tokens[:, :4].unflatten(2, (2, 4))).flatten(1)
        parts = [projection.token_norm(tokens[:, 4]), projection.landmark_norm(means)]
        both.append(torch.stack(parts, 1).unflatten(2, (2, 4)).transpose(1, 2))
    y = F.scaled_dot_product_attention(q[:, 4:].unflatten(2, (2, 4)).transpose(1, 2), *both)
    close(layer(x).output[:, 4:], layer.output(y.transpose(1, 2).flatten(2)))


def test_padding_inside_a_row_moves_no_segment():
    for pattern in SELF:
        layer, x = make_layer(pattern), torch.randn(1, 9, 8, dtype=torch.float64)
        valid = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1]], dtype=torch.bool)
        padded = torch.full((1, 13, 8), float("nan"), dtype=torch.float64)
        padded[valid] = x[0]
        output = layer(padded, context=Context(mask=Mask(valid=valid))).output
        close(output[valid][None], layer(x).output)
        assert (output[~valid] == 0).all()


def test_grouped_keys_share_landmarks_and_norms():
    for pattern in SELF:
        layer = make_layer(pattern, num_kv_heads=1)
        whole = make_layer(pattern)
        weights = layer.state_dict()
        for name in ("key.weight", "value.weight", "projection.scores.weight"):
            weights[name] = weights[name].repeat(2, 1)
        for norm in ("token_norm", "landmark_norm"):
            for name in ("weight", "bias"):
                weights[f"projection.{norm}.{name}"] = weights[f"projection.{norm}.{name}"].repeat(2)
        whole.load_state_dict(weights)
        x = torch.randn(2, 10, 8, dtype=torch.float64)
        close(layer(x).output, whole(x).output)


def test_the_state_keeps_a_window_the_landmarks_and_one_segment():
    config, r, d = Config(window=5, segment=4, rank=2), 2, 4
    for n in (16, 19, 40):
        state = apply(MECHANISM, sample(n, r, batch=1), pattern="causal-self", config=config, return_state=True).state
        assert state.keys.shape == (1, 2, n // 4 * r, d)
        numbers = sum(t.numel() for t in state.tensors().values()) - 1
        assert numbers == cost(Shape(1, 2, n, n, d, d), config).state


def test_decoding_in_a_language_model_equals_recomputation():
    torch.manual_seed(0)
    options = {"window": 3, "segment": 4, "rank": 2}
    model = LanguageModel(LanguageModelConfig(17, dim=16, num_heads=2, plan=[("long_short", options)] * 2))
    model = model.double().eval()
    ids = torch.randint(0, 17, (2, 14))
    whole = model(ids).output
    result = model(ids[:, :5], context=WANT_STATE)
    outputs, state = [result.output], result.state
    for t in range(5, 14):
        result = model(ids[:, t : t + 1], state=state)
        outputs.append(result.output)
        state = result.state
    close(torch.cat(outputs, 1), whole)


def test_dropout_drops_weights_of_tokens_and_of_landmarks():
    config = Config(window=1, segment=1)
    x = sample(40, 1)
    x["v"] = torch.ones_like(x["v"])

    def dropped(seed: int) -> Tensor:
        return run(x, "causal-self", config, dropout=0.5, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(dropped(1), dropped(1))
    assert not torch.equal(dropped(1), dropped(2))
    mean = torch.stack([dropped(seed) for seed in range(50)]).mean()
    assert abs(float(mean) - 1) < 0.05


def test_parity_of_the_noncausal_layer():
    f = load("long_short_noncausal_cab")
    layer = create_layer(
        "long_short", 8, 2, pattern="noncausal-self", window=5, landmarks=3, normalize_first=True, bias=True
    ).double()
    names = {"query": "W_q", "key": "W_k", "value": "W_v", "output": "W_o", "projection.scores": "dconv_fc"}
    names |= {"projection.token_norm": "dual_ln_l", "projection.landmark_norm": "dual_ln_s"}
    layer.load_state_dict({f"{a}.{p}": f[f"weight_{b}_{p}"] for a, b in names.items() for p in ("weight", "bias")})
    valid, x = f["valid"], f["x"].requires_grad_()
    output = layer(x, context=Context(mask=Mask(valid=valid))).output
    torch.testing.assert_close(output[valid], f["out"][valid], rtol=0, atol=1e-12)  # observed 4e-16
    (output * f["grad_out"]).sum().backward()
    torch.testing.assert_close(x.grad[valid], f["grad_x"][valid], rtol=0, atol=1e-12)


def test_parity_of_the_causal_layer():
    """The recorded code's memory of zeros is given as tokens."""
    f = load("long_short_causal_cab")
    layer = create_layer("long_short", 8, 2, window=8, segment=4, rank=2).double()
    weights = {"query.weight": "proj_query_weight", "key.weight": "proj_key_weight", "value.weight": "proj_val_weight"}
    weights |= {"output.weight": "proj_out_weight", "projection.scores.weight": "dconv_1_weight"}
    for own, other in (("token_norm", "dual_ln_win"), ("landmark_norm", "dual_ln_dproj")):
        weights |= {f"projection.{own}.{name}": f"{other}_{name}" for name in ("weight", "bias")}
    layer.load_state_dict({own: f[f"weight_{other}"] for own, other in weights.items()})
    x = f["x"].requires_grad_()
    output = layer(torch.cat([torch.zeros(2, 8, 8, dtype=torch.float64), x], 1)).output[:, 8:]
    torch.testing.assert_close(output, f["out"], rtol=0, atol=1e-12)  # observed 6e-16
    (output * f["grad_out"]).sum().backward()
    torch.testing.assert_close(x.grad, f["grad_x"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"landmarks": 0},
        {"segment": 0},
        {"rank": 0},
        {"norm_eps": 0.0},
        {"normalize_first": True, "dual_norm": False},
        {"value_dim": 6},
        {"positions": "rotary"},
        {"pattern": "causal-cross"},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(Unsupported):
        make_layer(**options)


def test_tensors_that_do_not_fit_the_options_are_refused():
    x, norm = sample(6, 2), torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(Unsupported, match="2 landmarks"):
        run(x, "causal-self", Config(rank=1))
    with pytest.raises(Unsupported, match="norm_bias"):
        run(x | {"norm_weight": norm}, "causal-self", Config(rank=2))
    narrow = x | {"v": x["v"][..., :3], "norm_weight": norm, "norm_bias": norm}
    with pytest.raises(Unsupported, match="3 features"):
        run(narrow, "causal-self", Config(rank=2))
    del narrow["norm_weight"], narrow["norm_bias"]
    assert run(narrow, "causal-self", Config(rank=2)).shape == (2, 2, 6, 3)
