"""Tests specific to token-parameter attention: Theta, tau, masks, growth, and parity with the official code."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import check_recorded, close, load, refused
from torch import Tensor, nn
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
    set_exit_rule,
    tokenformer_plan,
)
from regard.training import grow, shrink, token_usage


def make(in_features: int = 6, out_features: int = 5, tokens: int = 8, **options) -> TokenParameter:
    module = TokenParameter(in_features, out_features, config=Config(num_tokens=tokens, **options)).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("theta", "name"),
    [
        ("softmax", "softmax"),
        *[("l2_norm_gelu", name) for name in ("l2_norm_gelu", "masked", "routed")],
        *[("gelu_l2_norm", name) for name in ("gelu_l2_norm", "masked_gelu_l2_norm")],
    ],
)
def test_equals_the_official_code(theta, name):
    data = load(f"token_parameter_{name}")
    tokens, dim = data["weight_key"].shape
    module = TokenParameter(dim, 10, config=Config(theta=theta, num_tokens=tokens, tau_mode="sqrt_n")).double()
    module.load_state_dict({"key_tokens": data["weight_key"], "value_tokens": data["weight_value"]})
    x = data["x"].requires_grad_()
    output = module(x, token_mask=data.get("token_mask"), rows=data.get("router_index"))
    check_recorded(data, output, {"x": x, "weight_key": module.key_tokens, "weight_value": module.value_tokens})


def test_l2_norm_gelu_ignores_the_size_of_tokens_and_keys():
    module, x = make(), normal(2, 3, 6)
    before = module(x)
    close(module(7 * x), before)
    module.key_tokens.data.mul_(0.1)
    close(module(x), before)


def test_gelu_l2_norm_has_weights_of_norm_tau():
    weights = make(theta="gelu_l2_norm").weights(normal(4, 6))
    close(weights.norm(dim=-1), torch.full((4,), math.sqrt(8), dtype=torch.float64), 1e-7)


def test_negative_scores_alone_keep_their_digits_before_they_are_divided_by_their_norm():
    scores, values = -2 - 2 * torch.rand(9, 4), torch.randn(4, 3)
    found, expected = (
        attend_to_parameters(x, torch.eye(4, dtype=x.dtype), values.to(x.dtype), Config(theta="gelu_l2_norm"))
        for x in (scores, scores.double())
    )
    close(found.double(), expected, 1e-6)


def test_softmax_is_n_times_attention_of_scale_one():
    module, x = make(theta="softmax"), normal(2, 3, 6)
    keys, values = (t.expand(2, -1, -1) for t in (module.key_tokens, module.value_tokens))
    close(module(x), 8 * F.scaled_dot_product_attention(x, keys, values, scale=1.0), 1e-7)
    close(module.weights(x).sum(-1), torch.full((2, 3), 8.0, dtype=torch.float64), 1e-7)


@pytest.mark.parametrize(
    ("theta", "change"), [("l2_norm_gelu", 0.26), ("gelu_l2_norm", 1.5**0.5 - 1), ("softmax", 0.3)]
)
def test_tokens_with_zero_keys_change_the_function_with_sqrt_n(theta, change):
    keys, values, x, config = normal(256, 64), normal(256, 512), normal(50, 64) / 8, Config(theta=theta)
    before = attend_to_parameters(x, keys, values, config)
    more = torch.cat([keys, torch.zeros(128, 64)]), torch.cat([values, normal(128, 512)])
    found = (attend_to_parameters(x, *more, config) - before).norm() / before.norm()
    if theta == "gelu_l2_norm":
        assert found.item() == pytest.approx(change, abs=1e-10)
    elif theta == "softmax":
        assert found > change  # by how much depends on the mass of the new tokens' exp(0)
    else:
        assert abs(found - change) < 0.03


def test_order_does_not_matter_and_doubled_tokens_with_halved_values_need_tau_times_the_root_of_two():
    module, x, tau = make(), normal(4, 6), math.sqrt(8)
    close(module(x, rows=torch.randperm(8)), module(x))
    keys, values = module.key_tokens.repeat(2, 1), module.value_tokens.repeat(2, 1) / 2
    for given in (tau * math.sqrt(2), None):  # None: the default for 16 tokens
        close(attend_to_parameters(x, keys, values, module.config, tau=given), module(x), 1e-7)
    assert not torch.allclose(attend_to_parameters(x, keys, values, module.config, tau=tau), module(x), rtol=0.05)


@pytest.mark.parametrize("theta", THETAS)
def test_masked_rows_are_as_if_removed(theta):
    module, x = make(theta=theta), normal(4, 6)
    kept = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    close(module(x, token_mask=kept), module(x, rows=kept.nonzero()[:, 0]))
    each = torch.rand(4, 8) < 0.5
    close(module(x, token_mask=each), torch.stack([module(x[i], token_mask=each[i]) for i in range(4)]))
    assert (module(x, token_mask=torch.zeros(8, dtype=torch.bool)) == 0).all()


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
    module, x = make(64, 8, 6144).to(dtype), 100 * torch.randn(3, 64, dtype=dtype)
    tensors = (t.double() for t in (x, module.key_tokens, module.value_tokens))
    close(module(x).double(), attend_to_parameters(*tensors, module.config, tau=float(module.tau)), 4e-3)


def test_tau_is_saved_where_it_is_fixed():
    layer = regard.create_layer("pattention", 6, out_features=5, num_tokens=8)
    assert set(layer.state_dict()) == {"projection.key_tokens", "projection.value_tokens", "projection.tau"}
    assert float(layer.projection.tau) == pytest.approx(math.sqrt(8))
    free = regard.create_layer("pattention", 6, tau_mode="sqrt_n", pattern="noncausal-self")
    assert "projection.tau" not in free.state_dict() and free.pattern == "noncausal-self"
    assert free.projection.key_tokens.shape == (6, 6)
    assert TokenParameter(64, 64).value_tokens.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_linear_layer_is_a_special_case():
    linear, x = nn.Linear(6, 5, bias=False).double(), normal(2, 3, 6)
    close(TokenParameter.from_linear(linear)(x), linear(x))
    with pytest.raises(Unsupported):
        TokenParameter.from_linear(nn.Linear(6, 5))


def test_it_is_a_kind_of_linear_layer():
    assert "token_parameter" in list_linears()
    made = make_linear(6, 5, kind="token_parameter", num_tokens=3, theta="softmax")
    assert made.key_tokens.shape == (3, 6) and made.config.theta == "softmax"
    for alias in MECHANISM.aliases:
        assert isinstance(make_linear(6, 5, kind=alias, num_tokens=3), TokenParameter)
        assert alias not in list_linears()


def test_an_alias_never_hides_a_kind(monkeypatch):
    monkeypatch.setitem(linear.ALIASES, "dense", "token_parameter")
    assert isinstance(make_linear(6, 5), linear.Linear)


def test_default_tau_of_the_function_is_the_root_of_the_tokens():
    module, x = make(), normal(2, 3, 6)
    inputs = {"x": x, "keys": module.key_tokens, "values": module.value_tokens}
    for form in ("reference", "parallel"):
        close(apply(MECHANISM, inputs, form=form).output, module(x), 1e-7)
    doubled = apply(MECHANISM, inputs, config=Config(theta="identity"), scale=2.0).output
    close(doubled, 2 * x @ module.key_tokens.T @ module.value_tokens)


# growing and shrinking a module

PRESERVING = [
    {},
    {"top_k": 20},
    {"theta": "gelu_l2_norm"},
    {"theta": "gelu_l2_norm", "tau_mode": "sqrt_n"},
    {"theta": "identity", "tau_mode": "sqrt_n"},
]


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("options", PRESERVING, ids=str)
def test_a_grown_module_has_its_old_function_and_learns_with_its_new_rows(options, freeze):
    module, x = make(**options), normal(9, 6)
    before, old = module(x), (module.keys.clone(), module.values.clone())
    module.grow(13, freeze=freeze)
    close(module(x), before, 1e-13)
    assert module.keys.shape[0] == module.config.num_tokens == 13
    undone = copy.deepcopy(module)
    undone.shrink(8)
    close(undone(x), before, 1e-13)
    assert torch.equal(undone.keys, old[0])
    close(undone.values, old[1], 1e-14)
    assert (undone.config.num_tokens, undone.config.frozen_tokens, len(undone.key_tokens)) == (8, 0, 8)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        if step == 0:  # new keys learn and new values do not yet
            assert module.key_tokens.grad[-5:].abs().amax(-1).min() > 1e-3
            assert module.value_tokens.grad[-5:].abs().max() < 1e-12
        optimizer.step()
    assert not torch.allclose(module(x), before)
    assert (module.keys[8:] != 0).all()
    assert torch.equal(module.keys[:8], old[0]) == freeze
    assert module.key_tokens.shape[0] == (5 if freeze else 13)
    module.grow(15)  # frozen rows learn again
    assert (module.config.frozen_tokens, len(module.key_tokens), module.frozen_keys) == (0, 15, None)


@pytest.mark.parametrize("options", [{"theta": "softmax"}, {"tau_mode": "sqrt_n"}])
def test_without_preserving_new_keys_are_drawn_and_the_function_changes(options):
    module, x = make(**options), normal(9, 6)
    before = module(x)
    module.grow(16, preserve=False)
    assert (module.keys[8:] != 0).all()
    assert not torch.allclose(module(x), before, rtol=0.01)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("given", [False, True])
def test_a_shrunk_module_has_its_most_important_rows_in_their_order(theta, given):
    module, x = make(theta=theta), normal(9, 6)
    importance = torch.rand(8, dtype=torch.float64) if given else module.key_tokens.detach().square().sum(1)
    rows = torch.tensor(sorted(sorted(range(8), key=lambda i: -importance[i])[:5]))
    expected = module(x, rows=rows)
    module.shrink(5, importance=importance if given else None)
    close(module(x), expected)


# growing and shrinking a model


def randomised(model):
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=1 if "tokens" in name else 0.5)
    return model.double().eval()


def language_model(plan, **options) -> LanguageModel:
    return randomised(LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan, **options)))


def tokenformer(**options) -> LanguageModel:
    return language_model(tokenformer_plan(2, 12), norm="layer_nonparametric", tie_embeddings=True, **options)


def check_goes_on_from(before: Tensor, model, given: tuple[Tensor, ...], folder) -> None:
    """Check that a model has the outputs from before, learns from there, and can be saved and loaded."""
    close(model(*given).output, before)
    model(*given).output.square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    after = model(*given).output
    assert not torch.allclose(after, before)
    save_pretrained(model, folder)
    close(from_pretrained(folder)(*given).output, after)


def sizes(model) -> list[tuple[int, int, int]]:
    """For each block: tokens of the mixer, tokens of the network, and frozen tokens of the network."""
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
def test_a_tokenformer_grows_goes_on_and_is_saved(given, expected, tmp_path):
    model, ids = tokenformer(), torch.randint(11, (2, 7))
    before = model(ids).output
    set_exit_rule(model, None)  # creates a new config
    grow(model, **given)
    check_goes_on_from(before, model, (ids,), tmp_path)
    assert sizes(model) == sizes(from_pretrained(tmp_path)) == expected
    assert [block.entry for block in model.blocks] == list(model.config.plan)


OWN = {"linear": "token_parameter", "linear_options": {"num_tokens": 12}}
PLANS = {"plan": tokenformer_plan(1, 8), "decoder_plan": tokenformer_plan(2, 8)}
FUNNEL = FunnelEncoderConfig(num_classes=3, vocab_size=11, dim=16, num_heads=2, **PLANS)
MODELS = {
    "shared layers": lambda: tokenformer(stack={"share": "all"}),
    "wrapped layers": lambda: language_model([("softmax", OWN), ("mixture_of_heads", {"mechanism_options": OWN})]),
    "funnel encoder": lambda: randomised(FunnelEncoder(FUNNEL)),
}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_grows_also_inside_a_module(name, freeze, tmp_path):
    model, ids = MODELS[name](), torch.randint(11, (2, 8))
    before = model(ids).output
    outer = nn.ModuleDict({"model": model, "dense": language_model(["softmax"]), "alone": make()})
    names = grow(outer, factor=2, freeze=freeze)
    assert len(names) == sum(isinstance(module, TokenParameter) for module in outer.modules())
    check_goes_on_from(before, model, (ids,), tmp_path)


def test_every_plan_of_a_model_follows_its_own_layers(tmp_path):
    plans = {
        "encoder_plan": tokenformer_plan(1, 8),
        "decoder_plan": tokenformer_plan(2, 8, feed_forward_tokens=0),
        "cross_plan": tokenformer_plan(2, 8, positions="none"),
    }
    model = randomised(EncoderDecoder(EncoderDecoderConfig(11, 11, dim=16, num_heads=2, **plans)))
    given = torch.randint(11, (2, 4)), torch.randint(11, (2, 6))
    before = model(*given).output
    grow(model, {"encoder_blocks.*": 40, "blocks.1.mixer.*": 11, "blocks.1.feed_forward": 33, "blocks.2.*": 12})
    found = [
        [(o["linear_options"]["num_tokens"], o.get("feed_forward_options", {}).get("num_tokens")) for _, o in plan]
        for plan in (getattr(model.config, name) for name in plans)
    ]
    assert found == [[(40, 40)], [(8, None), (12, None)], [(11, 33), (8, 32)]]
    check_goes_on_from(before, model, given, tmp_path)


def test_a_shrunk_model_keeps_what_is_used(tmp_path):
    model, batches = tokenformer(), [torch.randint(11, (2, 7)) for _ in range(2)]
    for module in (m for m in model.modules() if isinstance(m, TokenParameter)):  # half of the tokens are never used
        module.key_tokens.data[::2] = 0
        module.value_tokens.data[::2] *= 100
    before = model(batches[0]).output
    usage = token_usage(model, batches)
    assert all((used[::2] == 0).all() and (used[1::2] > 0).all() for used in usage.values())
    by_norm = copy.deepcopy(model)
    assert shrink(model, factor=0.5, importance=usage) == shrink(by_norm, {"*.mixer.*": 6, "*.feed_forward": 24})
    for shrunk in (model, by_norm):
        assert sizes(shrunk) == [(6, 24, 0)] * 2
        check_goes_on_from(before, shrunk, (batches[0],), tmp_path)


def test_modules_of_different_sizes_grow_by_a_factor_or_a_number_each_and_freeze_their_own_rows():
    pair = nn.ModuleDict({"small": make(), "large": make(6, 5, 12), "other": make()})
    x = normal(4, 6)
    before = {name: module(x) for name, module in pair.items()}
    assert grow(pair, factor=1.7) == ("small", "large", "other")
    assert [len(module.keys) for module in pair.values()] == [14, 20, 14]  # 13.6 and 20.4
    assert grow(pair, {"large": 30, "*l*": 16}, freeze=True) == ("small", "large")
    assert [len(module.keys) for module in pair.values()] == [16, 30, 14]
    assert [len(module.key_tokens) for module in pair.values()] == [2, 10, 14]
    for name, module in pair.items():
        close(module(x), before[name], 1e-13)


def test_a_model_shrinks_by_the_importance_that_is_given():
    pair = nn.ModuleList([make(), make(6, 5, 12), make()])
    importance = {str(i): torch.rand(len(module.keys)) for i, module in enumerate(pair)}
    expected = [module.keys[importance[str(i)] >= importance[str(i)].median()] for i, module in enumerate(pair)]
    assert shrink(pair, {"1": 7, "0": 5}, importance=importance) == ("0", "1")
    assert [len(module.keys) for module in pair] == [5, 7, 8]
    for module, keys in zip(pair[:2], expected, strict=False):
        assert torch.equal(module.keys, keys)


def test_usage_is_the_mean_size_of_the_weights_over_all_tokens():
    model = nn.Sequential(make(6, 5, 8), make(5, 6, 9, theta="gelu_l2_norm"))
    batches = [normal(2, 3, 6), normal(4, 6)]
    found = token_usage(model, batches)
    x = torch.cat([batch.reshape(-1, 6) for batch in batches])
    scores = x @ model[0].keys.T
    close(found["0"], F.gelu(math.sqrt(8) * scores / scores.norm(dim=-1, keepdim=True)).abs().mean(0), 1e-7)
    close(found["1"], model[1].weights(model[0](x)).abs().mean(0))
    rows, expected = torch.tensor([5, 2]), torch.zeros(8, dtype=torch.float64)
    routed = token_usage(model[0], batches[1:], lambda module, x: module(x, rows=rows))[""]
    expected[rows] = model[0].weights(batches[1], rows=rows).abs().mean(0)
    close(routed, expected)


# refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make()(normal(2, 6), token_mask=torch.ones(8)), "booleans"),
        (lambda: regard.create_layer("pattention", 6, pattern="causal-cross"), "parameters only"),
        (lambda: apply(MECHANISM, {"x": normal(1, 2, 6), "values": normal(8, 5)}), "keys"),
        (lambda: make_linear(6, 5, kind="token_parameter", num_token=3), "try num_tokens"),
        (lambda: make_linear(6, 5, bias=True, kind="token_parameter"), "bias"),
        (lambda: make_linear(6, 5, kind="patention"), "supported: dense, token_parameter; try pattention"),
        (lambda: make(frozen_tokens=8), "frozen_tokens=8 of 8"),
        (lambda: make(theta="softmax").grow(20), "try preserve=False"),
        (lambda: make(tau_mode="sqrt_n").grow(20), 'try tau_mode="fixed"'),
        (lambda: make(top_k=3).grow(20), r"top_k=3.*try preserve=False"),
        (lambda: make().grow(8), "more than 8"),
        *[(lambda count=count: make().shrink(count), "from 1 to 7") for count in (8, 9, 0, -1)],
        (lambda: make().shrink(3, importance=torch.rand(7)), r"shape \(7,\); supported: \(8,\)"),
        (lambda: grow(nn.Linear(2, 2), 5), "without parameter tokens"),
        (lambda: token_usage(nn.Linear(2, 2), [normal(2, 2)]), "without parameter tokens"),
        (lambda: token_usage(make(), []), "a batch or more"),
    ],
)
def test_mistakes_are_refused(call, message):
    refused(message, call)


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (grow, {"num_tokens": 10}, "growing 12 tokens to 10"),
        (grow, {"num_tokens": {"0": 9, "1": 10}}, "growing 12 tokens to 10"),
        (grow, {"factor": 1.01}, "growing 8 tokens to 8"),
        (grow, {"num_tokens": 1.5}, r"try factor=1\.5"),
        (grow, {"num_tokens": {"0": 9, "2": 10}}, "supported: 0, 1"),
        (grow, {}, "one of them"),
        (grow, {"num_tokens": 20, "factor": 2.0}, "one of them"),
        (shrink, {"num_tokens": 8}, "from 1 to 7"),
        (shrink, {"factor": 0.5, "importance": {"0": torch.rand(8)}}, "importance without 1"),
        (shrink, {"factor": 0.01}, "from 1 to 7"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_changes(change, given, message):
    pair = nn.ModuleList([make(), make(6, 5, 12)])
    refused(message, change, pair, **given)
    assert [module.keys.shape[0] for module in pair] == [8, 12]


def test_sizes_that_a_config_cannot_say_are_refused_before_anything_changes():
    model = tokenformer()
    before = copy.deepcopy(model.state_dict())
    refused("one number for all projections of a layer's mixer", grow, model, {"blocks.0.mixer.query": 20})
    mamba = EncoderConfig(num_classes=3, vocab_size=11, dim=16, plan=[("mamba", {"linear": "pattention"})])
    refused(r"config of an Encoder cannot express.*linear_options", grow, Encoder(mamba), 99)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
