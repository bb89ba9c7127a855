"""Tests specific to mixture of heads: gates, the load-balance loss, the wrapped layer, and parity with official code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import calls, check_recorded, close, load, refused, watched
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regard import Context, Mask, Unsupported, backends, create_layer
from regard.contract import ALL_PATTERNS, Pattern
from regard.engines import attention_forms
from regard.mechanisms.mixture_of_heads import MECHANISM, head_usage, usage_entropy
from regard.models import LanguageModel, LanguageModelConfig, count_parameters, from_pretrained, save_pretrained
from regard.training import head_importance, mix_heads
from regard.workbench.verification.properties.layers import layer_decoding
from regard.workbench.verification.subjects import Subject

WANT_GATES = frozenset({"gates"})
TWO_AND_TWO = {"shared_heads": 2, "active_heads": 2}
gate = calls(MECHANISM)


def inputs_of(options: dict[str, Any], n: int = 9) -> dict[str, Tensor]:
    return Subject(MECHANISM, Pattern.CAUSAL_SELF, options).inputs(n)


def gates_of(inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    return gate(inputs, options, want=WANT_GATES).extras["gates"]


def make_layer(**options: Any) -> nn.Module:
    layer = create_layer("moh", 16, 8, **options).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def layer_gates(layer: nn.Module, x: Tensor, **context: Any) -> Tensor:
    return layer(x, context=Context(want=WANT_GATES, **context)).extras["gates"]


def tokens(n: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, 16, dtype=torch.float64)


# parity


@pytest.mark.parametrize(
    ("name", "options"),
    [("", TWO_AND_TWO), ("_all_shared", {"shared_heads": 4}), ("_no_shared", {"shared_heads": 0, "active_heads": 3})],
)
def test_a_layer_equals_the_official_code(name, options):
    data = load(f"mixture_of_heads{name}")
    options = options | {"head_dim": data["q"].shape[3], "mechanism_options": {"bias": True}}
    layer = create_layer("moh", 12, data["q"].shape[1], pattern="noncausal-self", **options).double()
    names = {
        "output": "proj",
        "merge.logits.routed": "wg",
        "merge.logits.shared": "wg_1",
        "merge.logits.balance": "wg_0",
    }
    weights = {}
    for what in ("weight", "bias"):
        weights |= {f"{ours}.{what}": data.get(f"weight_{theirs}_{what}") for ours, theirs in names.items()}
        heads = data[f"weight_qkv_{what}"].chunk(3)
        weights |= {f"{ours}.{what}": x for ours, x in zip(("query", "key", "value"), heads, strict=True)}
    layer.attention.load_state_dict({name: x for name, x in weights.items() if x is not None})
    x = data["x"].requires_grad_()
    result = layer(x, context=Context(want=WANT_GATES))
    close(result.extras["gates"], data["gates"])
    check_recorded(data, result.output, {"x": x})
    if "balance_loss" in data:
        total, count = result.losses["load_balance"]
        close(total / count, data["balance_loss"])
    else:
        assert result.losses == {}


def test_gates_with_one_shared_head_equal_the_official_code():
    data = load("mixture_of_heads_gates_one_shared")
    inputs = {"o": data["heads_out"].transpose(1, 2)}
    inputs |= {"routed": data["x"] @ data["weight_wg_weight"].T, "balance": data["x"] @ data["weight_wg_0_weight"].T}
    result = gate(inputs, {"shared_heads": 1, "active_heads": 2}, want=WANT_GATES)
    close(result.extras["gates"], data["gates"])
    close(result.output.transpose(1, 2).flatten(2), data["core_out"])
    close(result.losses["load_balance"][0], data["balance_loss"])


def test_query_norm_routing_equals_the_official_code():
    data = load("mixture_of_heads_query_norm")
    options = {"num_kv_heads": 4, "positions": "rotary", "router": "query_norm", "shared_heads": 4, "active_heads": 2}
    layer = create_layer("moh", 32, 8, **options)
    names = {"query": "q", "key": "k", "value": "v", "output": "o"}
    layer.load_state_dict({f"attention.{n}.weight": data[f"weight_{t}_proj_weight"] for n, t in names.items()})
    result = layer(data["x"], context=Context(want=WANT_GATES))
    assert torch.equal(result.extras["gates"], data["gates"])
    torch.testing.assert_close(result.output, data["out"], rtol=2e-5, atol=2e-6)  # observed 1e-6, for values up to 5


# gates


@pytest.mark.parametrize(
    "options",
    [{"shared_heads": 3, "active_heads": 5}, {"router": "query_norm", "shared_heads": 4, "active_heads": 4}],
)
def test_with_all_heads_active_and_even_routers_it_is_ordinary_attention(options):
    shell = {"num_kv_heads": 4, "positions": "rotary"}
    dense, layer, x = create_layer("softmax", 16, 8, **shell).double(), make_layer(**shell, **options), tokens(7)
    layer.attention.load_state_dict(dense.state_dict(), strict=False)
    for parameter in layer.attention.merge.parameters():
        nn.init.zeros_(parameter)
    close(layer(x).output, dense(x).output)
    close(layer_gates(layer, x), torch.ones(2, 7, 8, dtype=torch.float64))


@pytest.mark.parametrize(("shared", "active"), [(2, 4), (1, 1), (0, 3), (8, 0), (3, 5)])
def test_gates_of_each_token_add_up(shared, active):
    options = {"shared_heads": shared, "active_heads": active}
    inputs = inputs_of(options)
    gates = gates_of(inputs, options)
    assert ((gates != 0).sum(-1) == shared + active).all()
    ones = torch.ones(2, 9, 2, dtype=torch.float64)
    groups = 2 * inputs["balance"].softmax(-1) if "balance" in inputs else ones
    close(gates[..., :shared].sum(-1), groups[..., 0] * shared)
    close(gates[..., shared:].sum(-1), groups[..., 1] * active)


def test_plain_gates_are_products_of_softmaxes():
    options = TWO_AND_TWO | {"rescale_gates": False}
    inputs = inputs_of(options)
    gates = gates_of(inputs, options)
    groups, p = inputs["balance"].softmax(-1), inputs["routed"].softmax(-1)
    close(gates[..., :2], groups[..., :1] * inputs["shared"].softmax(-1))
    close(gates[..., 2:], groups[..., 1:] * torch.where(p >= p.topk(2).values[..., -1:], p, 0))


def test_ties_go_to_the_first_heads():
    inputs = {"o": torch.randn(1, 64, 3, 2), "routed": torch.zeros(1, 3, 64)}
    gates = gates_of(inputs, {"shared_heads": 0, "active_heads": 20})
    assert (gates[..., :20] == 1).all() and (gates[..., 20:] == 0).all()


def test_the_scale_multiplies_router_logits():
    inputs = inputs_of({})
    scaled = {k: t if k == "o" else 3 * t for k, t in inputs.items()}
    close(gate(inputs, scale=3.0).output, gate(scaled).output)


@pytest.mark.parametrize("options", [{}, {"gates": "binary"}], ids=str)
def test_an_inactive_head_gets_no_gradient_from_that_token(options):
    inputs = inputs_of(options)
    leaf = inputs["o"].requires_grad_()
    (gradient,) = torch.autograd.grad(gate(inputs, options).output.sum(), leaf)
    assert torch.equal((gradient != 0).all(-1), (gates_of(inputs, options) != 0).transpose(1, 2))
    layer = make_layer(**options)
    layer(tokens(40)).output.square().sum().backward()
    assert layer.attention.key.weight.grad.unflatten(0, (8, 2)).abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("router", ["input", "query_norm"])
def test_straight_through_gates_are_0_or_1_with_the_gradient_of_p(router):
    options = {"router": router, "gates": "straight_through", "shared_heads": 2}
    inputs = inputs_of(options)
    leaf = inputs["routed"].requires_grad_()
    gates = gates_of(inputs, options)
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    weight = torch.randn(2, 9, 6, dtype=torch.float64)
    scores = leaf if router == "input" else leaf / leaf.std(-1, keepdim=True)
    (expected,) = torch.autograd.grad((scores.softmax(-1) * weight).sum(), leaf)
    (found,) = torch.autograd.grad((gates[..., 2:] * weight).sum(), leaf)
    close(found, expected)


def test_query_norm_routing_does_not_see_positions():
    layer = make_layer(positions="rotary", router="query_norm", shared_heads=4, active_heads=2, head_dim=4)
    x = tokens(7, batch=1)
    gates = layer_gates(layer, x)
    assert torch.equal(layer_gates(layer, x, positions=torch.arange(7)[None] + 1000), gates)
    layer.attention.positions.rotate = None
    assert torch.equal(layer_gates(layer, x), gates)


@pytest.mark.parametrize("routed", [1, 3])
def test_equal_query_norms_give_finite_gradients(routed):
    options = {"router": "query_norm", "shared_heads": 8 - routed, "active_heads": 1}
    leaf = torch.ones(2, 9, routed, dtype=torch.float64, requires_grad=True)
    result = gate(inputs_of(options) | {"routed": leaf}, options)
    result.output.square().sum().backward()
    assert leaf.grad.isfinite().all() and result.output.isfinite().all()


def test_padding_gives_query_norms_finite_gradients():
    layer, valid = make_layer(router="query_norm", shared_heads=4), torch.arange(7) < torch.tensor([[7], [3]])
    x = tokens(7).masked_fill(~valid[..., None], torch.nan)
    result = layer(x, context=Context(mask=Mask(valid=valid)))
    (result.output.square().sum() + result.losses["load_balance"][0]).backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_head_usage_counts_active_heads_of_the_chosen_tokens():
    gates = torch.tensor([[[1.0, 0, 2, 0], [1, 3, 0, 0]], [[1, 0, 1, 0], [9, 9, 9, 9]]])
    close(head_usage(gates), torch.tensor([1, 0.5, 0.75, 0.25], dtype=torch.float64))
    chosen = torch.tensor([[True, True], [True, False]])
    close(head_usage(gates, chosen), torch.tensor([1, 1 / 3, 2 / 3, 0], dtype=torch.float64))
    even, collapsed = torch.full((4,), 0.5), torch.tensor([1.0, 1, 0, 0])
    assert usage_entropy(even).item() == pytest.approx(1)
    assert usage_entropy(collapsed).item() == pytest.approx(math.log(2) / math.log(4))


# losses


def balance(inputs: dict[str, Tensor]) -> Tensor:
    return gate(inputs, TWO_AND_TWO).losses["load_balance"][0]


def test_load_balance_is_k_when_even_and_e_when_collapsed():
    inputs = inputs_of(TWO_AND_TWO)
    p = inputs["routed"].softmax(-1)
    chosen = (p >= p.topk(2).values[..., -1:]).double()
    close(balance(inputs), 36 * (p.mean((0, 1)) * chosen.mean((0, 1))).mean())
    inputs["routed"].zero_()
    assert float(balance(inputs)) == pytest.approx(2, rel=1e-12)
    inputs["routed"][..., :2] = 50
    assert float(balance(inputs)) == pytest.approx(6, rel=1e-12)


def test_load_balance_lowers_the_logits_of_overused_heads():
    inputs = inputs_of(TWO_AND_TWO, n=200)
    inputs["routed"][..., 3] += 2
    leaf = inputs["routed"].requires_grad_()
    (gradient,) = torch.autograd.grad(balance(inputs), leaf)
    assert gradient[..., 3].sum() > 0 > gradient[..., [0, 1, 2, 4, 5]].sum()


def test_z_loss_is_the_mean_squared_log_sum_exp():
    inputs = inputs_of({})
    total, count = gate(inputs, {"z_loss": True}).losses["router_z"]
    close(total / count, inputs["routed"].logsumexp(-1).square().mean())


def test_padding_counts_in_no_loss():
    layer, x, valid = make_layer(z_loss=True), tokens(9), torch.rand(2, 9) < 0.6
    found = layer(x.masked_fill(~valid[..., None], torch.nan), context=Context(mask=Mask(valid=valid))).losses
    expected = layer(x[valid][None]).losses
    assert set(found) == {"load_balance", "router_z"}
    for name, (total, count) in expected.items():
        close(found[name][0], total)
        assert found[name][1] == count
    nothing = layer(x, context=Context(mask=Mask(lengths=torch.tensor([0, 0])))).losses
    assert all(total == 0 and count == 0 for total, count in nothing.values())


# the layer


@pytest.mark.parametrize("mechanism", ["gated_linear", "aaren", "local"])
def test_any_attention_mechanism_can_be_wrapped(mechanism):
    options = {"num_heads": 8, "mechanism": mechanism, "shared_heads": 2}
    assert layer_decoding(Subject(MECHANISM, Pattern.CAUSAL_SELF, options), torch.float64) < 1e-12


def test_the_wrapped_mechanisms_own_merge_comes_first():
    options, pattern = {"noncausal": "bidirectional"}, "noncausal-self"
    plain = create_layer("aaren", 16, 8, pattern=pattern, **options).double()
    binary = {"gates": "binary", "shared_heads": 8}
    layer = make_layer(mechanism="aaren", mechanism_options=options, pattern=pattern, **binary)
    renamed = {k.replace("merge.", "merge.inner."): v for k, v in plain.state_dict().items()}
    layer.attention.load_state_dict(renamed)
    x = tokens(7)
    close(layer(x).output, plain(x).output)


MISTAKES = [{"shared_heads": heads} for heads in (9, -1, (1, 1), (-1,), (8,))]
MISTAKES += [{"shared_heads": 2, "active_heads": active} for active in (0, 7)]
MISTAKES += [{"mechanism": "aaren", "router": "query_norm"}, {"router": "query_norm", "gates": "weighted"}]
MISTAKES += [{"mechanism": "mamba2"}, {"router": "norm"}, {"gates": "soft"}, {"noise": -1.0}, {"eps": 0.0}]


@pytest.mark.parametrize("options", MISTAKES, ids=str)
def test_mistakes_are_refused(options):
    refused(list(options)[-1], make_layer, **options)


@pytest.mark.parametrize(
    ("changes", "options"),
    [({"balance": None}, {}), ({"routed": torch.zeros(2, 9, 3)}, {}), ({}, {"gates": "binary"})],
)
def test_logits_of_other_widths_than_the_routers_are_refused(changes, options):
    refused("widths", gate, inputs_of({}) | changes, options)


# gathering only the chosen heads


def dense_and_gathered(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A dense and a gathering layer with the same weights."""
    dense, gathered = (make_layer(compute=compute, **options) for compute in ("dense", "gather"))
    gathered.load_state_dict(dense.state_dict())
    return dense, gathered


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_heads": 0, "active_heads": 1, "positions": "rotary"},
        {"shared_heads": (2, 7), "active_heads": 2, "num_kv_heads": 2, "positions": "rotary"},
        {"gates": "binary", "active_heads": 6},
        {"router": "query_norm"},
        {"mechanism_options": {"query_key_norm": "rms", "bias": True, "output_gate": "swish"}},
        {"positions": "alibi", "mechanism_options": {"linear": "token_parameter"}},
        {"gates": "binary", "mechanism_options": {"softcap": 5.0, "short_convolution": 3, "learn_sink": True}},
    ],
    ids=str,
)
def test_gathered_heads_equal_computed_and_masked_ones(options, pattern):
    context = Context(mask=Mask(lengths=torch.tensor([9, 0, 4])), want=WANT_GATES)
    given = [tokens(9, batch=3).requires_grad_()] + [tokens(5, batch=3).requires_grad_()] * pattern.cross
    found = []
    for layer in dense_and_gathered(pattern=pattern, **options):
        result = layer(*given, context=context)
        total = (result.output * torch.arange(16.0)).sum() + result.losses["load_balance"][0]
        gradients = torch.autograd.grad(total, [*given, *layer.parameters()], allow_unused=True)
        with torch.no_grad():  # without gradients, heads that are not chosen are not computed
            unlearned = layer(*given, context=context).output
        found.append([result.output, unlearned, result.extras["gates"], *gradients])
    for first, second in zip(*found, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            size = max(1, float(first.detach().abs().max()))
            torch.testing.assert_close(second, first, rtol=0, atol=1e-12 * size)


def test_all_tokens_on_one_head_and_heads_of_no_token_are_gathered():
    dense, gathered = dense_and_gathered(shared_heads=0, active_heads=1)
    for layer in (dense, gathered):
        nn.init.zeros_(layer.attention.merge.logits["routed"].weight)
    x = tokens(7)
    gates = layer_gates(gathered, x)
    assert (gates[..., 0] == 1).all() and (gates[..., 1:] == 0).all()
    close(gathered(x).output, dense(x).output)


def test_gathered_heads_do_the_work_of_the_chosen_ones_alone(monkeypatch):
    """A query has no scores in heads that it has not chosen; the cost of projections and routers is unchanged."""
    heads, width, n, dim = 8, 4, 64, 32
    count = lambda q, k, *rest, **options: q.shape[1] * q.shape[2] * k.shape[2]  # noqa: E731
    pairs = watched(monkeypatch, attention_forms, "attention", count)
    other = 2 * n * dim * (7 + 2 + 2 * heads * width)  # routers, keys and values
    queries = {}
    for compute in ("dense", "gather"):
        options = {"shared_heads": 1, "active_heads": 2, "head_dim": width, "compute": compute}
        layer = create_layer("moh", dim, heads, pattern="noncausal-self", **options)
        pairs.clear()
        with torch.no_grad(), backends.only("torch"), FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, n, dim))
        queries[compute] = sum(pairs) / n**2, (counter.get_total_flops() - other) / (2 * n * dim * width)
    assert queries == {"dense": (heads, 2 * heads), "gather": (3, 2 * heads)}


@pytest.mark.parametrize("mechanism", ["linear", "gated_softmax"])
def test_heads_of_a_mechanism_that_reads_all_tokens_at_once_are_not_gathered(mechanism):
    refused('try compute="auto"', make_layer, compute="gather", mechanism=mechanism)
    make_layer(mechanism=mechanism)


@pytest.mark.parametrize("bias", [False, True])
def test_gathered_heads_go_on_from_a_state_and_take_a_bias(bias):
    dense, gathered = dense_and_gathered(shared_heads=1, active_heads=3, num_kv_heads=4, positions="rotary")
    x, keeps = tokens(11, batch=2), WANT_GATES | {"state"}
    given = torch.randn(1, 8, 5, 11).double() if bias else None
    for layer in (dense, gathered):
        layer.before = layer(x[:, :6], context=Context(want=keeps)).state
    after = Context(mask=Mask(bias=given), want=keeps)
    found, expected = (layer(x[:, 6:], context=after, state=layer.before) for layer in (gathered, dense))
    close(found.output, expected.output)
    close(found.state.mechanism.k, expected.state.mechanism.k)


def test_auto_gathers_where_it_pays():
    config = MECHANISM.options(shared_heads=4, active_heads=3)
    assert not config.gathers(9, 1000) and config.gathers(9, 1200) and not config.gathers(9, 1200, "cuda")
    half = MECHANISM.options(shared_heads=4, active_heads=1)
    assert half.gathers(9, 600) and not half.gathers(9, 500)
    assert not MECHANISM.options(shared_heads=9, active_heads=0).gathers(9, 9999)


# from trained heads


def language_model(plan: list[Any]) -> LanguageModel:
    return LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, plan=plan, num_heads=4)).double()


def test_importance_is_the_derivative_of_a_gate_on_the_head():
    model = language_model(["softmax", "mamba2", ("gated_linear", {"num_heads": 2})])
    ids = torch.randint(11, (3, 8))
    found = head_importance(model, [ids[:2], ids[2:]], lambda m, batch: m(batch).output.square().sum())
    assert [None if x is None else len(x) for x in found] == [4, None, 2]
    assert all(p.grad is None for p in model.parameters())
    xi = torch.ones(4, dtype=torch.float64, requires_grad=True)
    model.blocks[0].mixer.output.register_forward_pre_hook(lambda _, given: (given[0] * xi.repeat_interleave(4),))
    rows = [torch.autograd.grad(model(row[None]).output.square().sum(), xi)[0] for row in ids]
    close(found[0], torch.stack(rows).abs().mean(0), 1e-9)


def test_a_trained_model_becomes_a_mixture_whose_important_heads_are_shared(tmp_path):
    first = {"query_key_norm": "rms", "feed_forward": 24, "feed_forward_kind": "gelu"}
    plan = [("softmax", first | {"feed_forward_options": {"bias": True}}), "mamba2", "softmax"]
    model, ids = language_model(plan), torch.randint(11, (2, 8))
    importance = head_importance(model, [ids])
    whole = mix_heads(model, **TWO_AND_TWO, importance=importance)
    close(whole(ids).output, model(ids).output)
    assert count_parameters(whole) == count_parameters(model)
    for i in (0, 2):
        kept = list(whole.blocks[i].mixer.config.shared_heads)
        assert min(importance[i][kept]) >= max(importance[i][[h for h in range(4) if h not in kept]])
    fewer = mix_heads(model, shared_heads=1, active_heads=1, importance=importance)
    for i, gates in zip((0, 2), fewer(ids, context=Context(want=WANT_GATES)).extras["gates"], strict=True):
        assert ((gates.detach().round() != 0).sum(-1) == 2).all()
        assert (gates[..., list(fewer.blocks[i].mixer.config.shared_heads)] == 1).all()
    fewer.loss(ids).backward()
    save_pretrained(fewer, tmp_path)
    close(from_pretrained(tmp_path)(ids).output, fewer.eval()(ids).output)
    with pytest.raises(Unsupported):
        mix_heads(model, shared_heads=5, active_heads=0, importance=importance)
    refused("without a sequence", head_importance, model, [])
