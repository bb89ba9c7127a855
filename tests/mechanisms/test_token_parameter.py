"""What is peculiar to token-parameter attention: Theta, tau, masks, growth, and parity with the official code."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regard
from regard import Unsupported
from regard.apply import apply
from regard.layers import linear
from regard.layers.linear import list_linears, make_linear
from regard.mechanisms.token_parameter import MECHANISM, THETAS, Config, TokenParameter, attend_to_parameters
from regard.models import (
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    FunnelEncoder,
    FunnelEncoderConfig,
    LanguageModel,
    LanguageModelConfig,
    from_pretrained,
    save_pretrained,
    set_exit_threshold,
    tokenformer_plan,
)
from regard.training import grow, shrink, token_usage

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
GELUS = ["l2_norm_gelu", "gelu_l2_norm"]


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def make(in_features: int = 6, out_features: int = 5, tokens: int = 8, **options) -> TokenParameter:
    module = TokenParameter(in_features, out_features, config=Config(num_tokens=tokens, **options)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def grown(module: TokenParameter, more: int, *, keys: float = 0.0) -> TokenParameter:
    """The module with `more` parameter tokens appended, tau as it was."""
    larger = make(module.in_features, module.out_features, len(module.key_tokens) + more, **options_of(module))
    with torch.no_grad():
        larger.key_tokens.mul_(keys)
        larger.key_tokens[: -more or None] = module.key_tokens
        larger.value_tokens[: -more or None] = module.value_tokens
        if module.tau is not None:
            larger.tau.copy_(module.tau)
    return larger


def options_of(module: TokenParameter) -> dict[str, str]:
    return {"theta": module.config.theta, "tau_mode": module.config.tau_mode}


@pytest.mark.parametrize(
    ("name", "theta"),
    [
        ("l2_norm_gelu", "l2_norm_gelu"),
        ("gelu_l2_norm", "gelu_l2_norm"),
        ("softmax", "softmax"),
        ("masked", "l2_norm_gelu"),
        ("masked_gelu_l2_norm", "gelu_l2_norm"),
        ("routed", "l2_norm_gelu"),
    ],
)
def test_equals_the_official_code(name, theta):
    data = load(f"token_parameter_{name}")
    tokens, dim = data["weight_key"].shape
    module = TokenParameter(dim, 10, config=Config(theta=theta, num_tokens=tokens, tau_mode="sqrt_n")).double()
    module.load_state_dict({"key_tokens": data["weight_key"], "value_tokens": data["weight_value"]})
    x = data["x"].requires_grad_()
    output = module(x, token_mask=data.get("token_mask"), rows=data.get("router_index"))
    torch.testing.assert_close(output, data["out"], rtol=0, atol=1e-10)  # observed 3e-15
    output.backward(data["grad_out"])
    for found, expected in (
        (x.grad, "grad_x"),
        (module.key_tokens.grad, "grad_weight_key"),
        (module.value_tokens.grad, "grad_weight_value"),
    ):
        torch.testing.assert_close(found, data[expected], rtol=0, atol=1e-10)  # observed 9e-15 of 34


def test_theta_is_a_gelu_of_normalised_scores():
    module, x = make(), torch.randn(6, dtype=torch.float64)
    s = [sum(a * b for a, b in zip(x.tolist(), row, strict=True)) for row in module.key_tokens.tolist()]
    norm = math.sqrt(sum(v * v for v in s))
    u = [math.sqrt(8) * v / norm for v in s]
    weights = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in u]
    expected = [sum(w * row[j] for w, row in zip(weights, module.value_tokens.tolist(), strict=True)) for j in range(5)]
    torch.testing.assert_close(module(x), torch.tensor(expected, dtype=torch.float64))


def test_l2_norm_gelu_ignores_the_size_of_tokens_and_keys():
    module, x = make(), torch.randn(2, 3, 6, dtype=torch.float64)
    before = module(x)
    torch.testing.assert_close(module(7 * x), before)
    with torch.no_grad():
        module.key_tokens.mul_(0.1)
    torch.testing.assert_close(module(x), before)


def test_gelu_l2_norm_has_weights_of_norm_tau():
    module = make(6, 8, 8, theta="gelu_l2_norm")
    nn.init.eye_(module.value_tokens)  # the output is then Theta
    weights = module(torch.randn(4, 6, dtype=torch.float64))
    torch.testing.assert_close(weights.norm(dim=-1), torch.full((4,), math.sqrt(8), dtype=torch.float64))


def test_softmax_is_n_times_attention_of_scale_one():
    module, x = make(theta="softmax"), torch.randn(2, 3, 6, dtype=torch.float64)
    keys, values = (t.expand(2, -1, -1) for t in (module.key_tokens, module.value_tokens))
    expected = 8 * F.scaled_dot_product_attention(x, keys, values, scale=1.0)
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        module.value_tokens.fill_(1.0)
    torch.testing.assert_close(module(x), torch.full((2, 3, 5), 8.0, dtype=torch.float64))


@pytest.mark.parametrize("theta", GELUS)
def test_tokens_with_zero_keys_change_nothing_while_tau_is_fixed(theta):
    module, x = make(theta=theta), torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(grown(module, 4)(x), module(x), rtol=0, atol=1e-13)


def test_masked_tokens_change_nothing_under_softmax_while_tau_is_fixed():
    module, x = make(theta="softmax"), torch.randn(4, 6, dtype=torch.float64)
    larger, kept = grown(module, 4), torch.arange(12) < 8
    torch.testing.assert_close(larger(x, token_mask=kept), module(x), rtol=0, atol=1e-13)
    assert not torch.allclose(larger(x), module(x), rtol=0.1)


@pytest.mark.parametrize(
    ("theta", "change"), [("l2_norm_gelu", 0.26), ("gelu_l2_norm", 1.5**0.5 - 1), ("softmax", 0.3)]
)
def test_tokens_with_zero_keys_change_the_function_with_sqrt_n(theta, change):
    module, x = make(64, 64, 256, theta=theta, tau_mode="sqrt_n"), torch.randn(50, 64, dtype=torch.float64) / 8
    before = module(x)
    found = (grown(module, 128)(x) - before).norm() / before.norm()
    if theta == "gelu_l2_norm":
        torch.testing.assert_close(found.item(), change, rtol=0, atol=1e-10)
    elif theta == "softmax":
        assert found > change  # how much depends on the mass that exp(0) takes
    else:
        assert abs(found - change) < 0.03


@pytest.mark.parametrize("theta", GELUS)
def test_new_keys_learn_and_new_values_do_not_yet(theta):
    larger, x = grown(make(theta=theta), 4), torch.randn(9, 6, dtype=torch.float64)
    before = larger(x)
    before.square().sum().backward()
    assert larger.key_tokens.grad[8:].abs().amax(-1).min() > 1e-3
    assert larger.value_tokens.grad[8:].abs().max() < 1e-12
    with torch.no_grad():
        larger.key_tokens[8:] -= 0.1 * larger.key_tokens.grad[8:]
    assert not torch.allclose(larger(x), before)


def test_order_of_parameter_tokens_does_not_matter():
    module, x, order = make(), torch.randn(4, 6, dtype=torch.float64), torch.randperm(8)
    torch.testing.assert_close(module(x, rows=order), module(x))


def test_doubled_tokens_with_halved_values_need_tau_times_the_root_of_two():
    module, x = make(), torch.randn(4, 6, dtype=torch.float64)
    keys, values = module.key_tokens.repeat(2, 1), module.value_tokens.repeat(2, 1) / 2
    tau = math.sqrt(8)
    twice = attend_to_parameters(x, keys, values, module.config, tau=tau * math.sqrt(2))
    torch.testing.assert_close(twice, module(x))
    torch.testing.assert_close(attend_to_parameters(x, keys, values, module.config), module(x))  # sqrt(16)
    assert not torch.allclose(attend_to_parameters(x, keys, values, module.config, tau=tau), module(x), rtol=0.05)


@pytest.mark.parametrize("theta", THETAS)
def test_masked_rows_are_as_if_removed(theta):
    module, x = make(theta=theta), torch.randn(4, 6, dtype=torch.float64)
    kept = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    rows = kept.nonzero()[:, 0]
    torch.testing.assert_close(module(x, token_mask=kept), module(x, rows=rows))
    each = torch.rand(4, 8) < 0.5
    one = torch.stack([module(x[i], token_mask=each[i]) for i in range(4)])
    torch.testing.assert_close(module(x, token_mask=each), one)
    none = module(x, token_mask=torch.zeros(8, dtype=torch.bool))
    assert (none == 0).all()


@pytest.mark.parametrize("theta", THETAS)
def test_top_k_is_a_mask_of_all_but_the_largest_scores_that_are_allowed(theta):
    module, x = make(theta=theta), torch.randn(4, 6, dtype=torch.float64)
    sparse = make(theta=theta, top_k=3)
    sparse.load_state_dict(module.state_dict())
    allowed = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    for mask in (torch.ones(8, dtype=torch.bool), allowed):
        scores = (x @ module.key_tokens.T).masked_fill(~mask, -torch.inf)
        largest = scores >= scores.sort(-1, descending=True).values[:, 2:3]
        assert (largest.sum(-1) == 3).all()
        found = sparse(x, token_mask=None if mask.all() else mask)
        torch.testing.assert_close(found, module(x, token_mask=largest))
        assert not torch.allclose(found, module(x, token_mask=mask))
    few = torch.arange(8) < 2  # fewer than k
    torch.testing.assert_close(sparse(x, token_mask=few), module(x, token_mask=few))
    torch.testing.assert_close(sparse(x, rows=torch.tensor([4, 2])), module(x, rows=torch.tensor([4, 2])))


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_zero_token_gives_a_finite_output_and_gradient(theta, masked):
    module, x = make(theta=theta), torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    output = module(x, token_mask=torch.zeros(8, dtype=torch.bool) if masked else None)
    output.sum().backward()
    assert output.isfinite().all() and x.grad.isfinite().all() and module.key_tokens.grad.isfinite().all()
    if theta != "softmax" or masked:
        assert (output == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_many_scores_do_not_overflow(dtype):
    module = make(64, 8, 6144).to(dtype)
    x = 100 * torch.randn(3, 64, dtype=dtype)
    expected = attend_to_parameters(
        x.double(), module.key_tokens.double(), module.value_tokens.double(), module.config, tau=float(module.tau)
    )
    assert float(((module(x) - expected).abs().max() / expected.abs().max()).detach()) < 4e-3


def test_parameters_are_n_times_both_widths_and_tau_is_saved():
    layer = regard.create_layer("pattention", 6, out_features=5, num_tokens=8)
    assert sum(p.numel() for p in layer.parameters()) == 8 * (6 + 5)
    assert set(layer.state_dict()) == {"projection.key_tokens", "projection.value_tokens", "projection.tau"}
    assert float(layer.projection.tau) == pytest.approx(math.sqrt(8))
    free = regard.create_layer("pattention", 6, tau_mode="sqrt_n", pattern="noncausal-self")
    assert "projection.tau" not in free.state_dict() and free.pattern == "noncausal-self"
    assert free.projection.key_tokens.shape == (6, 6)


def test_values_are_drawn_by_the_depth_of_the_model():
    module = TokenParameter(64, 64, config=Config(num_tokens=1000, num_layers=4))
    assert module.key_tokens.std().item() == pytest.approx(0.02, rel=0.05)
    assert module.value_tokens.std().item() == pytest.approx(2 / (4 * 8), rel=0.05)
    assert TokenParameter(64, 64).value_tokens.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_linear_layer_is_a_special_case():
    linear, x = nn.Linear(6, 5, bias=False).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(TokenParameter.from_linear(linear)(x), linear(x))
    with pytest.raises(Unsupported):
        TokenParameter.from_linear(nn.Linear(6, 5))


def test_it_is_a_kind_of_linear_layer():
    assert "token_parameter" in list_linears()
    made = make_linear(6, 5, kind="token_parameter", num_tokens=3, theta="softmax")
    assert made.key_tokens.shape == (3, 6) and made.config.theta == "softmax"
    with pytest.raises(Unsupported, match="try num_tokens"):
        make_linear(6, 5, kind="token_parameter", num_token=3)
    with pytest.raises(Unsupported, match="bias"):
        make_linear(6, 5, bias=True, kind="token_parameter")
    for alias in MECHANISM.aliases:
        assert isinstance(make_linear(6, 5, kind=alias, num_tokens=3), TokenParameter)
        assert alias not in list_linears()
    with pytest.raises(Unsupported, match="supported: dense, token_parameter; try pattention"):
        make_linear(6, 5, kind="patention")


def test_an_alias_never_hides_a_kind(monkeypatch):
    monkeypatch.setitem(linear.ALIASES, "dense", "token_parameter")
    assert isinstance(make_linear(6, 5), linear.Linear)


@pytest.mark.parametrize("name", ["softmax", "gated_linear"])
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-cross"])
def test_an_attention_layer_made_of_it_decodes_as_it_computes_the_whole(name, pattern):
    layer = regard.create_layer(name, 16, 2, pattern=pattern, linear="token_parameter").double().eval()
    assert isinstance(layer.query, TokenParameter) and isinstance(layer.output, TokenParameter)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x, memory = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    if pattern == "causal-self":
        expected = layer(x).output
        result = layer(x[:, :4], context=regard.Context(want=frozenset({"state"})))
        outputs, state, start = [result.output], result.state, 4
    else:
        expected = layer(x, memory).output
        outputs, state, start = [], layer.encode_memory(memory), 0
    for t in range(start, 9):
        y, state = layer.step(x[:, t], state)
        outputs.append(y[:, None])
    found = torch.cat(outputs, 1)
    assert float(((found - expected).abs().max() / expected.abs().max()).detach()) < 1e-12


def test_a_language_model_made_of_it_trains_and_generates():
    plan = [("softmax", {"linear": "token_parameter", "positions": "rotary", "position_options": {"fraction": 0.25}})]
    config = LanguageModelConfig(vocab_size=11, dim=32, plan=plan, num_heads=2, norm="layer_nonparametric")
    model = LanguageModel(config)
    assert not any("norm" in name for name in model.state_dict())
    ids = torch.randint(11, (2, 6))
    model(ids).output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(model.generate(ids, 4), model.generate(ids, 4, use_state=False))


def test_mistakes_are_refused():
    module, x = make(), torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(Unsupported, match="booleans"):
        module(x, token_mask=torch.ones(8))
    for options in (
        {"theta": "gelu"},
        {"tau_mode": "fix"},
        {"num_tokens": 0},
        {"num_layers": 0},
        {"eps": 0.0},
        {"top_k": 0},
    ):
        with pytest.raises(Unsupported):
            Config(**options)
    with pytest.raises(Unsupported, match="parameters only"):
        regard.create_layer("pattention", 6, pattern="causal-cross")
    with pytest.raises(Unsupported, match="keys"):
        apply(MECHANISM, {"x": x[None], "values": module.value_tokens})


def test_default_tau_of_the_function_is_the_root_of_the_tokens():
    module, x = make(), torch.randn(2, 3, 6, dtype=torch.float64)
    inputs = {"x": x, "keys": module.key_tokens, "values": module.value_tokens}
    for form in ("reference", "parallel"):
        torch.testing.assert_close(apply(MECHANISM, inputs, form=form).output, module(x))
    doubled = apply(MECHANISM, inputs, config=Config(theta="identity"), scale=2.0).output
    torch.testing.assert_close(doubled, 2 * x @ module.key_tokens.T @ module.value_tokens)


PRESERVING = [("l2_norm_gelu", "fixed"), ("gelu_l2_norm", "fixed"), ("gelu_l2_norm", "sqrt_n"), ("identity", "sqrt_n")]


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(("theta", "tau_mode"), PRESERVING)
def test_a_grown_module_has_its_old_function_and_learns_with_its_new_rows(theta, tau_mode, freeze):
    module, x = make(theta=theta, tau_mode=tau_mode), torch.randn(9, 6, dtype=torch.float64)
    before, old = module(x), (module.keys.clone(), module.values.clone())
    module.grow(13, freeze=freeze)
    torch.testing.assert_close(module(x), before, rtol=0, atol=1e-13)
    assert module.keys.shape[0] == module.config.num_tokens == 13
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(module(x), before)
    assert (module.keys[8:] != 0).all()
    if freeze:
        torch.testing.assert_close(module.keys[:8], old[0], rtol=0, atol=0)
        assert module.key_tokens.shape[0] == 5
    else:
        assert not torch.allclose(module.keys[:8], old[0])


def test_without_preserving_new_keys_are_drawn_and_the_function_changes():
    for options in ({"theta": "softmax"}, {"tau_mode": "sqrt_n"}):
        module, x = make(**options), torch.randn(9, 6, dtype=torch.float64)
        before = module(x)
        module.grow(16, preserve=False)
        assert (module.keys[8:] != 0).all()
        assert not torch.allclose(module(x), before, rtol=0.01)


def test_frozen_rows_learn_again_after_another_growth():
    module = make()
    module.grow(10, freeze=True)
    module.grow(12)
    assert module.config.frozen_tokens == 0
    assert module.key_tokens.shape[0] == 12
    assert module.frozen_keys is None


@pytest.mark.parametrize("freeze", [False, True])
def test_a_grown_model_goes_on_from_where_it_stood_and_is_saved(freeze, tmp_path):
    own = {"linear": "token_parameter", "linear_options": {"num_tokens": 12}}
    plan = [("softmax", own), ("mixture_of_heads", {"mechanism_options": own})]
    model = LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, plan=plan, num_heads=4)).double().eval()
    ids = torch.randint(11, (2, 7))
    before = model(ids).output
    names = grow(model, 20, freeze=freeze)
    assert "blocks.0.mixer.query" in names
    assert "blocks.1.mixer.attention.output" in names
    torch.testing.assert_close(model(ids).output, before, rtol=0, atol=1e-12)
    model.loss(ids).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).output, model(ids).output)
    assert not torch.allclose(again(ids).output, before)


def test_growth_that_cannot_be_is_refused_before_anything_changes():
    with pytest.raises(Unsupported, match="try preserve=False"):
        make(theta="softmax").grow(20)
    with pytest.raises(Unsupported, match='try tau_mode="fixed"'):
        make(tau_mode="sqrt_n").grow(20)
    with pytest.raises(Unsupported, match="more than 8"):
        make().grow(8)
    with pytest.raises(Unsupported, match="frozen_tokens=8 of 8"):
        make(frozen_tokens=8)
    with pytest.raises(Unsupported, match="without parameter tokens"):
        grow(torch.nn.Linear(2, 2), 5)
    with pytest.raises(Unsupported, match=r"top_k=3.*try preserve=False"):
        make(top_k=3).grow(20)
    pair = torch.nn.ModuleList([make(), make(6, 5, 12)])
    for given in ((10,), ({"0": 9, "1": 10},)):
        with pytest.raises(Unsupported, match="growing 12 tokens to 10"):
            grow(pair, *given)
    with pytest.raises(Unsupported, match="growing 8 tokens to 8"):
        grow(pair, factor=1.01)
    with pytest.raises(Unsupported, match=r"try factor=1\.5"):
        grow(pair, 1.5)
    with pytest.raises(Unsupported, match="supported: 0, 1"):
        grow(pair, {"0": 9, "2": 10})
    for options in ({}, {"num_tokens": 20, "factor": 2.0}):
        with pytest.raises(Unsupported, match="one of them"):
            grow(pair, **options)
    assert [module.keys.shape[0] for module in pair] == [8, 12]


def test_a_top_k_of_all_tokens_does_not_hinder_growth():
    module, x = make(top_k=20), torch.randn(4, 6, dtype=torch.float64)
    before = module(x)
    module.grow(20)
    torch.testing.assert_close(module(x), before)


def test_modules_of_different_sizes_grow_by_a_factor_or_a_number_each_and_freeze_their_own_rows():
    pair = torch.nn.ModuleDict({"small": make(), "large": make(6, 5, 12), "other": make()})
    x = torch.randn(4, 6, dtype=torch.float64)
    before = {name: module(x) for name, module in pair.items()}
    assert grow(pair, factor=1.7) == ("small", "large", "other")
    assert [len(module.keys) for module in pair.values()] == [14, 20, 14]  # 13.6 and 20.4
    assert grow(pair, {"large": 30, "*l*": 16}, freeze=True) == ("small", "large")
    assert [len(module.keys) for module in pair.values()] == [16, 30, 14]
    assert [len(module.key_tokens) for module in pair.values()] == [2, 10, 14]
    for name, module in pair.items():
        torch.testing.assert_close(module(x), before[name], rtol=0, atol=1e-13)


def randomised(model):
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=1 if "tokens" in name else 0.5)
    return model.double().eval()


def tokenformer(layers: int = 2, tokens: int = 12, **options) -> LanguageModel:
    chosen = {"plan": tokenformer_plan(layers, tokens), "norm": "layer_nonparametric", "tie_embeddings": True} | options
    return randomised(LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, **chosen)))


def sizes(model) -> list[tuple[int, int, int]]:
    """Of each block: tokens of the mixer and of the network, and the frozen ones of the network."""
    blocks = model.blocks
    return [(len(b.mixer.value.keys), len(b.feed_forward.keys), b.feed_forward.config.frozen_tokens) for b in blocks]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"factor": 7 / 3}, [(28, 112, 0)] * 2),
        ({"factor": 1.5, "freeze": True}, [(18, 72, 48)] * 2),
        ({"num_tokens": {"*.mixer.*": 15, "*.feed_forward": 50}}, [(15, 50, 0)] * 2),
        ({"num_tokens": {"blocks.0.*": 60, "*feed_forward": 70}, "freeze": True}, [(60, 60, 48), (12, 70, 48)]),
    ],
)
def test_a_tokenformer_grows_goes_on_decodes_and_is_saved(given, expected, tmp_path):
    model, ids = tokenformer(), torch.randint(11, (2, 7))
    before = model(ids).output
    set_exit_threshold(model, None)  # makes a new config
    grow(model, **given)
    assert sizes(model) == expected
    torch.testing.assert_close(model(ids).output, before, rtol=0, atol=1e-12)
    model.loss(ids).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    after = model(ids).output
    assert not torch.allclose(after, before)
    state = model(ids[:, :6], context=regard.Context(want=frozenset({"state"}))).state
    torch.testing.assert_close(model(ids[:, 6:], state=state).output[:, 0], after[:, 6])
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).output, after)
    assert sizes(again) == expected
    assert [block.entry for block in model.blocks] == list(model.config.plan)


def test_every_plan_of_a_model_follows_its_own_layers(tmp_path):
    config = EncoderDecoderConfig(
        vocab_size=11,
        memory_vocab_size=11,
        dim=16,
        num_heads=2,
        encoder_plan=tokenformer_plan(1, 8),
        decoder_plan=tokenformer_plan(2, 8, feed_forward_tokens=0),
        cross_plan=tokenformer_plan(2, 8, positions="none"),
    )
    model, ids, memory = randomised(EncoderDecoder(config)), torch.randint(11, (2, 4)), torch.randint(11, (2, 6))
    before = model(ids, memory).output
    grow(model, {"encoder_blocks.*": 40, "blocks.1.mixer.*": 11, "blocks.1.feed_forward": 33, "blocks.2.*": 12})
    torch.testing.assert_close(model(ids, memory).output, before, rtol=0, atol=1e-12)
    found = [
        [
            (options["linear_options"]["num_tokens"], options.get("feed_forward_options", {}).get("num_tokens"))
            for _, options in plan
        ]
        for plan in (model.config.encoder_plan, model.config.decoder_plan, model.config.cross_plan)
    ]
    assert found == [[(40, 40)], [(8, None), (12, None)], [(11, 33), (8, 32)]]
    save_pretrained(model, tmp_path)
    torch.testing.assert_close(from_pretrained(tmp_path)(ids, memory).output, before)


def test_a_funnel_encoder_and_a_model_inside_a_module_grow_and_are_saved(tmp_path):
    plans = {"plan": tokenformer_plan(1, 8), "decoder_plan": tokenformer_plan(2, 8)}
    inner = randomised(FunnelEncoder(FunnelEncoderConfig(num_classes=3, vocab_size=11, dim=16, num_heads=2, **plans)))
    others = {"dense": LanguageModel(LanguageModelConfig(vocab_size=11, dim=16)), "alone": make()}
    outer, ids = nn.ModuleDict({"inner": inner, **others}), torch.randint(11, (2, 8))
    before = inner(ids).output
    grow(outer, factor=2)
    torch.testing.assert_close(inner(ids).output, before, rtol=0, atol=1e-12)
    save_pretrained(inner, tmp_path)
    torch.testing.assert_close(from_pretrained(tmp_path)(ids).output, before)


def test_layers_that_share_their_weights_grow_together(tmp_path):
    model, ids = tokenformer(stack={"share": "all"}), torch.randint(11, (2, 7))
    before = model(ids).output
    grow(model, factor=2, freeze=True)
    torch.testing.assert_close(model(ids).output, before, rtol=0, atol=1e-12)
    save_pretrained(model, tmp_path)
    torch.testing.assert_close(from_pretrained(tmp_path)(ids).output, before)


def test_sizes_that_a_config_cannot_say_are_refused_before_anything_changes():
    model = tokenformer()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Unsupported, match="one number for all projections of a layer's mixer"):
        grow(model, {"blocks.0.mixer.query": 20})
    mamba = EncoderConfig(num_classes=3, vocab_size=11, dim=16, plan=[("mamba", {"linear": "pattention"})])
    with pytest.raises(Unsupported, match=r"config of a Encoder cannot say.*linear_options"):
        grow(Encoder(mamba), 99)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("theta", "tau_mode"), PRESERVING)
def test_shrinking_undoes_a_growth_that_was_not_trained(theta, tau_mode):
    module, x = make(theta=theta, tau_mode=tau_mode), torch.randn(9, 6, dtype=torch.float64)
    before, rows = module(x), (module.keys.clone(), module.values.clone())
    module.grow(13, freeze=True)
    torch.testing.assert_close(module(x), before, rtol=0, atol=1e-13)
    module.shrink(8)
    torch.testing.assert_close(module(x), before, rtol=0, atol=1e-13)
    torch.testing.assert_close(module.keys, rows[0], rtol=0, atol=0)
    torch.testing.assert_close(module.values, rows[1], rtol=1e-14, atol=0)
    assert (module.config.num_tokens, module.config.frozen_tokens, len(module.key_tokens)) == (8, 0, 8)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("given", [False, True])
def test_a_shrunk_module_has_its_most_important_rows_in_their_order(theta, given):
    module, x = make(theta=theta), torch.randn(9, 6, dtype=torch.float64)
    importance = torch.rand(8, dtype=torch.float64) if given else module.key_tokens.detach().square().sum(1)
    rows = torch.tensor(sorted(sorted(range(8), key=lambda i: -importance[i])[:5]))
    expected = module(x, rows=rows)
    module.shrink(5, importance=importance if given else None)
    torch.testing.assert_close(module(x), expected)


def test_usage_is_the_mean_size_of_the_weights_over_all_tokens():
    model = nn.Sequential(make(6, 5, 8), make(5, 6, 9, theta="gelu_l2_norm"))
    batches = [torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)]
    found = token_usage(model, batches)
    total = torch.zeros(8, dtype=torch.float64)
    for batch in batches:
        for x in batch.reshape(-1, 6):
            z = math.sqrt(8) * model[0].keys @ x / (model[0].keys @ x).norm()
            total += F.gelu(z).abs()
    torch.testing.assert_close(found["0"], total / 10)
    weights = model[1].weights(torch.cat([model[0](batch).reshape(-1, 5) for batch in batches]))
    torch.testing.assert_close(found["1"], weights.abs().mean(0))
    rows = torch.tensor([5, 2])
    routed = token_usage(model[0], batches[1:], lambda module, x: module(x, rows=rows))[""]
    expected = torch.zeros(8, dtype=torch.float64)
    expected[rows] = model[0].weights(batches[1], rows=rows).abs().mean(0)
    torch.testing.assert_close(routed, expected)


def test_a_shrunk_model_keeps_what_is_used_and_is_saved(tmp_path):
    model, batches = tokenformer(), [torch.randint(11, (2, 7)) for _ in range(2)]
    for block in model.blocks:  # half of the tokens are never used
        for module in (block.mixer.query, block.mixer.key, block.mixer.value, block.mixer.output, block.feed_forward):
            with torch.no_grad():
                module.key_tokens[::2] = 0
                module.value_tokens[::2] *= 100
    before = model(batches[0]).output
    usage = token_usage(model, batches)
    assert all((used[::2] == 0).all() and (used[1::2] > 0).all() for used in usage.values())
    by_norm = copy.deepcopy(model)
    assert shrink(model, factor=0.5, importance=usage) == shrink(by_norm, {"*.mixer.*": 6, "*.feed_forward": 24})
    for shrunk in (model, by_norm):
        assert sizes(shrunk) == [(6, 24, 0)] * 2
        torch.testing.assert_close(shrunk(batches[0]).output, before, rtol=0, atol=1e-12)
    save_pretrained(model, tmp_path)
    torch.testing.assert_close(from_pretrained(tmp_path)(batches[0]).output, before)


def test_a_model_shrinks_by_the_importance_that_is_given():
    pair = nn.ModuleList([make(), make(6, 5, 12), make()])
    importance = {str(i): torch.rand(len(module.keys)) for i, module in enumerate(pair)}
    expected = [module.keys[importance[str(i)] >= importance[str(i)].median()] for i, module in enumerate(pair)]
    assert shrink(pair, {"1": 7, "0": 5}, importance=importance) == ("0", "1")
    assert [len(module.keys) for module in pair] == [5, 7, 8]
    for module, keys in zip(pair[:2], expected, strict=False):
        assert torch.equal(module.keys, keys)


def test_shrinking_that_cannot_be_is_refused_before_anything_changes():
    for count in (8, 9, 0, -1):
        with pytest.raises(Unsupported, match="from 1 to 7"):
            make().shrink(count)
    with pytest.raises(Unsupported, match=r"shape \(7,\); supported: \(8,\)"):
        make().shrink(3, importance=torch.rand(7))
    pair = torch.nn.ModuleList([make(), make(6, 5, 12)])
    for options in ({"num_tokens": 8}, {"factor": 0.5, "importance": {"0": torch.rand(8)}}, {"factor": 0.01}):
        with pytest.raises(Unsupported):
            shrink(pair, **options)
    with pytest.raises(Unsupported, match="a batch or more"):
        token_usage(pair, [])
    with pytest.raises(Unsupported, match="without parameter tokens"):
        token_usage(nn.Linear(2, 2), [torch.randn(2, 2)])
    assert [module.keys.shape[0] for module in pair] == [8, 12]
