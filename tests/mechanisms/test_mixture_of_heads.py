"""What is peculiar to mixture of heads: gates, the load-balance loss, the wrapped layer, and parity with official code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import Context, Mask, Unsupported, backends
from regard.apply import apply
from regard.contract import ALL_PATTERNS, Pattern
from regard.engines.attention import attention
from regard.layers import chosen_heads
from regard.mechanisms import softmax
from regard.mechanisms.mixture_of_heads import MECHANISM, Config, head_usage, usage_entropy
from regard.models import LanguageModel, LanguageModelConfig, count_parameters, from_pretrained, save_pretrained
from regard.training import head_importance, mix_heads
from regard.workbench.subjects import Subject

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
WANT_GATES = frozenset({"gates"})


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def inputs_of(n: int = 9, seed: int = 0, **options) -> dict[str, torch.Tensor]:
    return Subject(MECHANISM, Pattern.CAUSAL_SELF, options).inputs(n, seed=seed)


def gate(inputs, mask=None, scale=None, **options):
    """Result of the function; its extras hold the gates."""
    return apply(MECHANISM, inputs, mask=mask, scale=scale, config=Config(**options), want=WANT_GATES)


def make_layer(dim: int = 16, heads: int = 8, **options) -> torch.nn.Module:
    layer = regard.create_layer("moh", dim, heads, **options).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("", {"shared_heads": 2, "active_heads": 2}),
        ("_all_shared", {"shared_heads": 4}),
        ("_no_shared", {"shared_heads": 0, "active_heads": 3}),
    ],
)
def test_a_layer_equals_the_official_code(name, options):
    data = load(f"mixture_of_heads{name}")
    heads, width = data["q"].shape[1], data["q"].shape[3]
    bias = {"bias": True}
    layer = regard.create_layer(
        "moh", 12, heads, pattern="noncausal-self", head_dim=width, mechanism_options=bias, **options
    ).double()
    weights = {"attention.output.weight": data["weight_proj_weight"], "attention.output.bias": data["weight_proj_bias"]}
    for i, part in enumerate(("query", "key", "value")):
        for what in ("weight", "bias"):
            weights[f"attention.{part}.{what}"] = data[f"weight_qkv_{what}"].chunk(3)[i]
    for router, theirs in (("routed", "wg"), ("shared", "wg_1"), ("balance", "wg_0")):
        if f"weight_{theirs}_weight" in data:
            weights[f"attention.merge.logits.{router}.weight"] = data[f"weight_{theirs}_weight"]
    layer.load_state_dict(weights)
    x = data["x"].requires_grad_()
    result = layer(x, context=Context(want=WANT_GATES))
    close(result.extras["gates"], data["gates"], 1e-10)  # observed 4e-16
    close(result.output, data["out"], 1e-10)  # observed 2e-14 of 59
    (gradient,) = torch.autograd.grad(result.output, x, data["grad_out"])
    close(gradient, data["grad_x"], 1e-10)  # observed 5e-13 of 115
    if "balance_loss" in data:
        total, count = result.losses["load_balance"]
        close(total / count, data["balance_loss"], 1e-10)
    else:
        assert result.losses == {}


def test_gates_with_one_shared_head_equal_the_official_code():
    data = load("mixture_of_heads_gates_one_shared")
    inputs = {"o": data["heads_out"].transpose(1, 2)}
    inputs |= {"routed": data["x"] @ data["weight_wg_weight"].T, "balance": data["x"] @ data["weight_wg_0_weight"].T}
    result = gate(inputs, shared_heads=1, active_heads=2)
    close(result.extras["gates"], data["gates"], 1e-10)
    close(result.output.transpose(1, 2).flatten(2), data["core_out"], 1e-10)
    close(result.losses["load_balance"][0], data["balance_loss"], 1e-10)


def test_query_norm_routing_equals_the_official_code():
    data = load("mixture_of_heads_query_norm")
    layer = regard.create_layer(
        "moh", 32, 8, num_kv_heads=4, positions="rotary", router="query_norm", shared_heads=4, active_heads=2
    )
    names = {"query": "q", "key": "k", "value": "v", "output": "o"}
    layer.load_state_dict({f"attention.{n}.weight": data[f"weight_{t}_proj_weight"] for n, t in names.items()})
    result = layer(data["x"], context=Context(want=WANT_GATES))
    assert torch.equal(result.extras["gates"], data["gates"])
    torch.testing.assert_close(result.output, data["out"], rtol=2e-5, atol=2e-6)  # observed 1e-6 of 5


def test_uniform_routers_with_all_heads_active_are_ordinary_attention():
    layer, x = make_layer(shared_heads=3, active_heads=5), torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.attention.merge.parameters():
            parameter.zero_()
    merge, layer.attention.merge = layer.attention.merge, None
    expected = layer(x).output
    layer.attention.merge = merge
    close(layer(x).output, expected)
    close(layer(x, context=Context(want=WANT_GATES)).extras["gates"], torch.ones(2, 7, 8, dtype=torch.float64))


def test_the_output_is_a_sum_over_heads():
    layer, x = make_layer(), torch.randn(2, 7, 16, dtype=torch.float64)
    gates = layer(x, context=Context(want=WANT_GATES)).extras["gates"]
    caught = []
    layer.attention.merge.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    output = layer(x).output
    parts = layer.attention.output.weight.unflatten(1, (8, 2))  # (C, H, d)
    close(torch.einsum("bnh,bhnd,chd->bnc", gates, caught[0], parts), output)


@pytest.mark.parametrize(("shared", "active"), [(2, 4), (1, 1), (0, 3), (8, 0), (3, 5)])
def test_gates_of_each_token_add_up(shared, active):
    options = {"shared_heads": shared, "active_heads": active}
    inputs = inputs_of(**options)
    gates = gate(inputs, **options).extras["gates"]
    assert ((gates != 0).sum(-1) == shared + active).all()
    ones = torch.ones(2, 9, dtype=torch.float64)
    groups = 2 * inputs["balance"].softmax(-1) if "balance" in inputs else torch.stack([ones, ones], -1)
    close(gates[..., :shared].sum(-1), groups[..., 0] * shared)
    close(gates[..., shared:].sum(-1), groups[..., 1] * active)


def test_plain_gates_are_products_of_softmaxes():
    inputs = inputs_of(rescale_gates=False, shared_heads=2, active_heads=2)
    gates = gate(inputs, rescale_gates=False, shared_heads=2, active_heads=2).extras["gates"]
    groups, p = inputs["balance"].softmax(-1), inputs["routed"].softmax(-1)
    close(gates[..., :2], groups[..., :1] * inputs["shared"].softmax(-1))
    expected = groups[..., 1:] * torch.where(p >= p.topk(2).values[..., -1:], p, 0)
    close(gates[..., 2:], expected)


def test_ties_go_to_the_first_heads():
    inputs = {"o": torch.randn(1, 64, 3, 2), "routed": torch.zeros(1, 3, 64)}
    gates = gate(inputs, shared_heads=0, active_heads=20).extras["gates"]
    assert (gates[..., :20] == 1).all() and (gates[..., 20:] == 0).all()


def test_load_balance_is_k_when_even_and_e_when_collapsed():
    inputs = inputs_of(shared_heads=2, active_heads=2) | {"routed": torch.zeros(2, 9, 6, dtype=torch.float64)}
    close(
        gate(inputs, shared_heads=2, active_heads=2).losses["load_balance"][0], torch.tensor(2.0, dtype=torch.float64)
    )
    inputs["routed"][..., :2] = 50
    close(
        gate(inputs, shared_heads=2, active_heads=2).losses["load_balance"][0], torch.tensor(6.0, dtype=torch.float64)
    )
    random = inputs_of(shared_heads=2, active_heads=2)
    p = random["routed"].softmax(-1)
    chosen = (p >= p.topk(2).values[..., -1:]).double()
    expected = 36 * (p.mean((0, 1)) * chosen.mean((0, 1))).mean()
    close(gate(random, shared_heads=2, active_heads=2).losses["load_balance"][0], expected)


def test_load_balance_lowers_the_logits_of_overused_heads():
    inputs = inputs_of(n=200, shared_heads=2, active_heads=2)
    inputs["routed"][..., 3] += 2
    leaf = inputs["routed"].requires_grad_()
    (gradient,) = torch.autograd.grad(gate(inputs, shared_heads=2, active_heads=2).losses["load_balance"][0], leaf)
    assert gradient[..., 3].sum() > 0
    assert gradient[..., [0, 1, 2, 4, 5]].sum() < 0


def test_padding_counts_in_no_loss():
    options = {"z_loss": True}
    inputs, lengths = inputs_of(), torch.tensor([9, 4])
    found = gate(inputs, mask=Mask(lengths=lengths), **options).losses
    parts = [
        {k: t[i : i + 1].narrow(2 if k == "o" else 1, 0, int(lengths[i])) for k, t in inputs.items()} for i in range(2)
    ]
    packed = {k: torch.cat([p[k] for p in parts], 2 if k == "o" else 1) for k in inputs}
    expected = gate(packed, **options).losses
    assert set(found) == {"load_balance", "router_z"}
    for name, (total, count) in expected.items():
        close(found[name][0], total)
        assert found[name][1] == count
    empty = gate(inputs, mask=Mask(lengths=torch.tensor([0, 0]))).losses["load_balance"]
    assert empty[0] == 0 and empty[1] == 0
    layer, x = make_layer(), torch.randn(2, 9, 16, dtype=torch.float64)
    valid = torch.rand(2, 9) < 0.6
    clean = layer(x, context=Context(mask=Mask(valid=valid))).losses["load_balance"]
    poisoned = layer(torch.where(valid[..., None], x, torch.nan), context=Context(mask=Mask(valid=valid)))
    close(poisoned.losses["load_balance"][0], clean[0])


def test_z_loss_is_the_mean_squared_log_sum_exp():
    inputs = inputs_of()
    total, count = gate(inputs, z_loss=True).losses["router_z"]
    close(total / count, inputs["routed"].logsumexp(-1).square().mean())


def test_routers_that_are_not_needed_do_not_exist():
    def routers(**options):
        return set(make_layer(**options).attention.merge.logits)

    assert routers(shared_heads=2) == {"routed", "shared", "balance"}
    assert routers(shared_heads=1) == {"routed", "balance"}
    assert routers(shared_heads=0) == {"routed"}
    assert routers(shared_heads=8) == {"shared"}
    assert routers(shared_heads=2, two_stage=False) == {"routed", "shared"}
    assert routers(shared_heads=2, gates="binary") == {"routed"}
    assert routers(router="query_norm") == set()


@pytest.mark.parametrize("options", [{}, {"gates": "binary"}], ids=str)
def test_an_inactive_head_gets_no_gradient_from_that_token(options):
    inputs = inputs_of(**options)
    leaf = inputs["o"].requires_grad_()
    result = gate(inputs, **options)
    (gradient,) = torch.autograd.grad(result.output.sum(), leaf)
    assert torch.equal((gradient != 0).all(-1), (result.extras["gates"] != 0).transpose(1, 2))
    layer, x = make_layer(**options), torch.randn(2, 40, 16, dtype=torch.float64)
    layer(x).output.square().sum().backward()
    assert layer.attention.key.weight.grad.unflatten(0, (8, 2)).abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("router", ["input", "query_norm"])
def test_straight_through_gates_are_0_or_1_with_the_gradient_of_p(router):
    options = {"router": router, "gates": "straight_through", "shared_heads": 2}
    inputs = inputs_of(**options)
    leaf = inputs["routed"].requires_grad_()
    gates = gate(inputs, **options).extras["gates"]
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    weight = torch.randn(2, 9, 6, dtype=torch.float64)
    scores = leaf if router == "input" else leaf / leaf.std(-1, keepdim=True)
    (expected,) = torch.autograd.grad((scores.softmax(-1) * weight).sum(), leaf)
    (found,) = torch.autograd.grad((gates[..., 2:] * weight).sum(), leaf)
    close(found, expected)


def test_a_dense_layer_is_the_mixture_with_all_heads_active():
    dense = regard.create_layer("softmax", 16, 8, num_kv_heads=4, positions="rotary").double()
    layer = make_layer(num_kv_heads=4, positions="rotary", router="query_norm", shared_heads=4, active_heads=4)
    layer.attention.load_state_dict(dense.state_dict())
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert torch.equal(layer(x).output, dense(x).output)


def test_query_norm_routing_does_not_see_positions():
    layer = make_layer(positions="rotary", router="query_norm", shared_heads=4, active_heads=2, head_dim=4)
    x, far = torch.randn(1, 7, 16, dtype=torch.float64), torch.arange(7)[None] + 1000
    near_gates = layer(x, context=Context(want=WANT_GATES)).extras["gates"]
    assert torch.equal(layer(x, context=Context(want=WANT_GATES, positions=far)).extras["gates"], near_gates)
    layer.attention.positions.rotate = None
    assert torch.equal(layer(x, context=Context(want=WANT_GATES)).extras["gates"], near_gates)


@pytest.mark.parametrize("routed", [1, 3])
def test_equal_query_norms_give_finite_gradients(routed):
    options = {"router": "query_norm", "shared_heads": 8 - routed, "active_heads": 1}
    inputs = inputs_of(**options)
    leaf = torch.ones(2, 9, routed, dtype=torch.float64, requires_grad=True)
    result = gate(inputs | {"routed": leaf}, **options)
    result.output.square().sum().backward()
    assert leaf.grad.isfinite().all() and result.extras["gates"].isfinite().all()


def test_padding_gives_query_norms_finite_gradients():
    layer, x = make_layer(router="query_norm", shared_heads=4), torch.randn(2, 7, 16, dtype=torch.float64)
    valid = torch.arange(7) < torch.tensor([[7], [3]])
    result = layer(torch.where(valid[..., None], x, torch.nan), context=Context(mask=Mask(valid=valid)))
    (result.output.square().sum() + result.losses["load_balance"][0]).backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("mechanism", ["gated_linear", "aaren", "local"])
def test_any_attention_mechanism_can_be_wrapped(mechanism):
    layer = make_layer(mechanism=mechanism, shared_heads=2)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    expected = layer(x)
    assert expected.losses["load_balance"][1] == 1
    result = layer(x[:, :4], context=Context(want=frozenset({"state"})))
    outputs, state = [result.output], result.state
    for t in range(4, 9):
        y, state = layer.step(x[:, t], state)
        outputs.append(y[:, None])
    close(torch.cat(outputs, 1), expected.output)


def test_the_wrapped_mechanisms_own_merge_comes_first():
    options = {"noncausal": "bidirectional"}
    plain = regard.create_layer("aaren", 16, 8, pattern="noncausal-self", **options).double()
    layer = make_layer(
        mechanism="aaren", mechanism_options=options, pattern="noncausal-self", gates="binary", shared_heads=8
    )
    renamed = {k.replace("merge.", "merge.inner."): v for k, v in plain.state_dict().items()}
    layer.attention.load_state_dict(renamed)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    close(layer(x).output, plain(x).output)


def test_noise_is_drawn_in_training_only_from_the_generator():
    layer, x = make_layer(noise=5.0), torch.randn(2, 30, 16, dtype=torch.float64)

    def gates(seed):
        return layer(x, context=Context(want=WANT_GATES, generator=torch.Generator().manual_seed(seed))).extras["gates"]

    assert torch.equal(gates(0), gates(1))
    layer.train()
    assert torch.equal(gates(0), gates(0)) and not torch.equal(gates(0), gates(1))


def test_head_usage_counts_active_heads_of_the_chosen_tokens():
    gates = torch.tensor([[[1.0, 0, 2, 0], [1, 3, 0, 0]], [[1, 0, 1, 0], [9, 9, 9, 9]]])
    close(head_usage(gates), torch.tensor([1, 0.5, 0.75, 0.25], dtype=torch.float64))
    tokens = torch.tensor([[True, True], [True, False]])
    close(head_usage(gates, tokens), torch.tensor([1, 1 / 3, 2 / 3, 0], dtype=torch.float64))
    even, collapsed = torch.full((4,), 0.5), torch.tensor([1.0, 1, 0, 0])
    assert usage_entropy(even).item() == pytest.approx(1)
    assert usage_entropy(collapsed).item() == pytest.approx(math.log(2) / math.log(4))


def test_a_language_model_averages_the_loss_and_generates():
    plan = [("moh", {"active_heads": k}) for k in (1, 2)] + ["softmax"]
    model = LanguageModel(LanguageModelConfig(vocab_size=11, dim=32, plan=plan, num_heads=4))
    ids = torch.randint(11, (2, 6))
    result = model(ids)
    total, count = result.losses["load_balance"]
    assert count == 2 and 1 < float(total.detach()) < 8
    assert torch.equal(model.generate(ids, 4), model.generate(ids, 4, use_state=False))


def test_the_scale_multiplies_router_logits():
    inputs = inputs_of()
    scaled = {k: t if k == "o" else 3 * t for k, t in inputs.items()}
    close(gate(inputs, scale=3.0).output, gate(scaled).output)


def test_mistakes_are_refused():
    for options in (
        {"shared_heads": 9},
        {"shared_heads": 2, "active_heads": 7},
        {"shared_heads": 2, "active_heads": 0},
        {"mechanism": "mamba2"},
        {"mechanism": "aaren", "router": "query_norm"},
        {"router": "norm"},
        {"gates": "soft"},
        {"router": "query_norm", "gates": "weighted"},
        {"noise": -1.0},
        {"eps": 0.0},
        {"shared_heads": -1},
    ):
        with pytest.raises(Unsupported):
            make_layer(**options)
    inputs = inputs_of()
    for changed in ({"balance": None}, {"routed": inputs["routed"][..., :3]}):
        with pytest.raises(Unsupported, match="widths"):
            gate(inputs | changed)
    with pytest.raises(Unsupported, match="widths"):
        gate(inputs, gates="binary")


GATHERED = [
    {},
    {"shared_heads": 0, "active_heads": 1, "positions": "rotary"},
    {"shared_heads": (2, 7), "active_heads": 2, "num_kv_heads": 2, "positions": "rotary"},
    {"gates": "binary", "active_heads": 6},
    {"mechanism_options": {"query_key_norm": "rms", "bias": True}},
]


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("options", GATHERED, ids=str)
def test_gathered_heads_equal_computed_and_masked_ones(options, pattern):
    dense, gathered = (make_layer(pattern=pattern, compute=compute, **options) for compute in ("dense", "gather"))
    gathered.load_state_dict(dense.state_dict())
    x, memory = torch.randn(3, 9, 16, dtype=torch.float64), torch.randn(3, 5, 16, dtype=torch.float64)
    context = Context(mask=Mask(lengths=torch.tensor([9, 0, 4])), want=WANT_GATES)
    found = []
    for layer in (dense, gathered):
        own, other = x.clone().requires_grad_(), memory.clone().requires_grad_()
        given = (own, other) if Pattern.parse(pattern).cross else (own,)
        result = layer(*given, context=context)
        total = (result.output * torch.arange(16.0)).sum() + result.losses["load_balance"][0]
        gradients = torch.autograd.grad(total, [*given, *layer.parameters()], allow_unused=True)
        found.append([result.output, result.extras["gates"], *gradients])
    for first, second in zip(*found, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            close(second, first, atol=1e-12 * max(1, float(first.detach().abs().max())))


def test_all_tokens_on_one_head_and_heads_of_no_token_are_gathered():
    layers = [make_layer(shared_heads=0, active_heads=1, compute=compute) for compute in ("dense", "gather")]
    with torch.no_grad():
        layers[0].attention.merge.logits["routed"].weight.zero_()
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    gates = layers[1](x, context=Context(want=WANT_GATES)).extras["gates"]
    assert (gates[..., 0] == 1).all()
    assert (gates[..., 1:] == 0).all()
    close(layers[1](x).output, layers[0](x).output)


def test_gathered_heads_do_the_work_of_the_chosen_ones_alone(monkeypatch):
    """A query does nothing in a head that it has not chosen; keys, values and routers are as before."""
    heads, width, n, dim, pairs = 8, 4, 64, 32, []

    def counted(q, k, *rest, **options):
        pairs.append(q.shape[1] * q.shape[2] * k.shape[2])
        return attention(q, k, *rest, **options)

    monkeypatch.setattr(softmax, "attention", counted)
    monkeypatch.setattr(chosen_heads, "attention", counted)
    queries = {}
    for compute in ("dense", "gather"):
        options = {"shared_heads": 1, "active_heads": 2, "head_dim": width, "compute": compute}
        layer = regard.create_layer("moh", dim, heads, pattern="noncausal-self", **options)
        pairs.clear()
        with torch.no_grad(), backends.only("torch"), FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, n, dim))
        projected = counter.get_total_flops() - sum(
            2 * n * dim * outputs for outputs in (7, 2, heads * width, heads * width)
        )
        queries[compute] = sum(pairs) / n**2, projected / (2 * n * dim * width)
    assert queries == {"dense": (heads, 2 * heads), "gather": (3, 6)}


def test_straight_through_gates_learn_as_if_computed_whole():
    layers = [make_layer(router="query_norm", compute=compute) for compute in ("dense", "gather")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        close(layers[1](x).output, layers[0](x).output)
    gradients = [torch.autograd.grad(layer(x).output.square().sum(), list(layer.parameters())) for layer in layers]
    for first, second in zip(*gradients, strict=True):
        close(second, first)


@pytest.mark.parametrize(
    "options",
    [
        {"mechanism": "linear"},
        {"positions": "alibi"},
        {"dropout": 0.1},
        {"mechanism_options": {"softcap": 5.0}},
        {"mechanism_options": {"output_gate": "swish"}},
        {"mechanism_options": {"linear": "token_parameter"}},
        {"mechanism_options": {"short_convolution": 3}},
    ],
)
def test_what_cannot_be_gathered_is_refused(options):
    with pytest.raises(Unsupported, match='try compute="dense"'):
        make_layer(compute="gather", **options)
    bias = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    with pytest.raises(Unsupported, match="bias"):
        make_layer(compute="gather")(torch.randn(1, 5, 16, dtype=torch.float64), context=Context(mask=Mask(bias=bias)))


def trained_by_hand(plan, heads=4):
    return LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, plan=plan, num_heads=heads)).double()


def test_importance_is_the_derivative_of_a_gate_on_the_head():
    model = trained_by_hand(["softmax", "mamba2", ("gated_linear", {"num_heads": 2})])
    ids = torch.randint(11, (3, 8))
    found = head_importance(model, [ids[:2], ids[2:]], lambda m, batch: m(batch).output.square().sum())
    assert [None if x is None else len(x) for x in found] == [4, None, 2]
    assert all(p.grad is None for p in model.parameters())
    for head in range(4):
        expected = []
        for row in ids:
            xi = torch.ones(4, dtype=torch.float64, requires_grad=True)
            hook = model.blocks[0].mixer.output.register_forward_pre_hook(
                lambda _, given, xi=xi: (given[0] * xi.repeat_interleave(4),)
            )
            model(row[None]).output.square().sum().backward()
            hook.remove()
            expected.append(xi.grad[head].abs())
        close(found[0][head], torch.stack(expected).mean(), atol=1e-9)


def test_a_trained_model_becomes_a_mixture_whose_important_heads_are_shared(tmp_path):
    first = {"query_key_norm": "rms", "feed_forward": 24, "feed_forward_kind": "gelu"}
    plan = [("softmax", first | {"feed_forward_options": {"bias": True}}), "mamba2", "softmax"]
    model, ids = trained_by_hand(plan), torch.randint(11, (2, 8))
    importance = head_importance(model, [ids])
    whole = mix_heads(model, shared_heads=2, active_heads=2, importance=importance)
    close(whole(ids).output, model(ids).output)
    assert count_parameters(whole) == count_parameters(model)
    for block, scores in zip((whole.blocks[0], whole.blocks[2]), (importance[0], importance[2]), strict=True):
        kept = block.mixer.config.shared_heads
        assert min(scores[list(kept)]) >= max(scores[[h for h in range(4) if h not in kept]])
    fewer = mix_heads(model, shared_heads=1, active_heads=1, importance=importance)
    gates = fewer(ids, context=Context(want=WANT_GATES)).extras["gates"]
    assert all((g.detach().round() != 0).sum(-1).eq(2).all() for g in gates)
    shared = [fewer.blocks[i].mixer.config.shared_heads for i in (0, 2)]
    assert all((g[..., list(s)] == 1).all() for g, s in zip(gates, shared, strict=True))
    fewer.loss(ids).backward()
    save_pretrained(fewer, tmp_path)
    close(from_pretrained(tmp_path)(ids).output, fewer.eval()(ids).output)
    with pytest.raises(Unsupported):
        mix_heads(model, shared_heads=5, active_heads=0, importance=importance)
    with pytest.raises(Unsupported, match="without a sequence"):
        head_importance(model, [])


def test_shared_heads_by_number_are_checked():
    for heads in ((1, 1), (-1,), (8,)):
        with pytest.raises(Unsupported, match="shared_heads"):
            make_layer(shared_heads=heads)
