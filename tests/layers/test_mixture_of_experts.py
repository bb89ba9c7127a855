"""A mixture of experts equals its dense definition, however tokens are gathered; its capacity and its balance loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from regard.contract import Context, Mask, Unsupported
from regard.layers.feed_forward import MixtureOfExperts, make_feed_forward
from regard.models import LanguageModel, LanguageModelConfig, count_parameters, from_pretrained, save_pretrained

EXPERTS = {"feed_forward_kind": "mixture_of_experts", "feed_forward": 12}


def mixture(**options) -> MixtureOfExperts:
    network = make_feed_forward("mixture_of_experts", 8, 12, **options).double()
    nn.init.normal_(network.router.weight)
    return network


def language_model(plan="gated_linear", **options) -> LanguageModel:
    layers = [(plan, {**EXPERTS, "feed_forward_options": {"experts": 3, **options}})] * 2
    model = LanguageModel(LanguageModelConfig(11, dim=16, num_heads=2, plan=layers)).double().eval()
    for block in model.blocks:
        nn.init.normal_(block.feed_forward.router.weight)
    return model


def dense(network: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """The definition: every expert computes every token, and most gates are 0."""
    p = (x @ network.router.weight.T).softmax(-1)
    outputs = torch.stack([expert(x) for expert in network.experts], -1)
    smallest = p.sort(-1, descending=True).values[..., network.active - 1, None]
    gates = p.where(p >= smallest, 0)
    gates = gates / gates.sum(-1, keepdim=True) if network.active > 1 else gates
    return (outputs * gates[..., None, :]).sum(-1)


@pytest.mark.parametrize("options", [{}, {"active": 2, "network": "gelu", "bias": True}, {"experts": 3, "active": 3}])
def test_gathered_experts_equal_all_of_them_with_gates_of_zero_and_so_do_gradients(options):
    network, x = mixture(**options), torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    found = []
    for run in (network, lambda x: dense(network, x)):
        output = run(x)
        leaves = [x, *network.parameters()]
        gradients = torch.autograd.grad((output * weight).sum(), leaves, allow_unused=True)
        found.append(
            [output, *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True))]
        )
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)


def test_an_expert_computes_its_own_tokens_alone():
    network, x, seen = mixture(active=2), torch.randn(2, 9, 8, dtype=torch.float64), []
    for expert in network.experts:
        expert.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    network(x)
    assert sum(seen) == 2 * 18


@pytest.mark.parametrize("active", [1, 2])
def test_with_a_capacity_those_beyond_it_get_nothing_by_position_and_none_for_the_sake_of_a_later_one(active):
    network, x = mixture(active=active, capacity=0.5).train(), torch.randn(3, 8, 8, dtype=torch.float64)
    most = math.ceil(0.5 * active * 24 / 4)
    p = (x @ network.router.weight.T).softmax(-1)
    chosen = p.topk(active).indices
    gates = p.gather(-1, chosen)
    gates = gates / gates.sum(-1, keepdim=True) if active > 1 else gates
    expected, used = torch.zeros_like(x), [0] * 4
    for i in range(8):
        for b in range(3):
            for slot in range(active):
                expert = int(chosen[b, i, slot])
                used[expert] += 1
                if used[expert] <= most:
                    expected[b, i] += gates[b, i, slot] * network.experts[expert](x[b, i])
    assert max(used) > most
    torch.testing.assert_close(network(x), expected)
    changed = x.clone()
    changed[:, 5:] = torch.randn(3, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(network(changed)[:, :5], expected[:, :5])
    torch.testing.assert_close(network.eval()(x), dense(network, x))


def test_the_balance_is_the_number_of_active_experts_when_even_and_sees_no_padding():
    network, losses = mixture(active=2), {}
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    valid = torch.arange(7) < torch.tensor([[7], [3]])
    output = network(x, valid=valid, losses=losses)
    assert not output[~valid].any()
    p = (x[valid] @ network.router.weight.T).softmax(-1)
    share = nn.functional.one_hot(p.topk(2).indices, 4).sum(1).double().mean(0)
    assert losses["load_balance"][1] == 1
    torch.testing.assert_close(losses["load_balance"][0], 4 * (share * p.mean(0)).sum())
    nn.init.zeros_(network.router.weight)
    network(x, losses=losses)
    torch.testing.assert_close(losses["load_balance"][0], torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("stack", [{}, {"reversible": True}, {"exits": (1,), "exit_rule": "confidence:0.2"}])
def test_a_model_with_experts_is_stepped_as_it_is_read_wherever_the_padding_is(stack, tmp_path):
    model = language_model(active=2, capacity=1.0)
    model = (
        LanguageModel(LanguageModelConfig(11, dim=16, num_heads=2, plan=model.config.plan, stack=stack)).double().eval()
    )
    ids = torch.randint(11, (2, 8))
    whole = model(ids)
    pieces, state = [], None
    for token in ids.split(1, 1):
        result = model(token, state=state, context=Context(want=frozenset({"state"})))
        state = result.state
        pieces.append(result.output)
    torch.testing.assert_close(torch.cat(pieces, 1), whole.output)
    padded = nn.functional.pad(ids, (3, 0))
    found = model(padded, context=Context(mask=Mask(valid=(torch.arange(11) >= 3).expand(2, -1))))
    torch.testing.assert_close(found.output[:, 3:], whole.output)
    torch.testing.assert_close(found.losses["load_balance"], whole.losses["load_balance"])
    assert whole.losses["load_balance"][1] == 2 or stack.get("exits")
    save_pretrained(model, tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(ids).output, whole.output)


def test_losses_of_a_router_of_heads_and_of_one_of_experts_are_added_and_both_learn():
    model = language_model("mixture_of_heads").train()
    assert model(torch.randint(11, (2, 8))).losses["load_balance"][1] == 4
    model.loss(torch.randint(11, (2, 8))).backward()
    assert all(block.feed_forward.router.weight.grad.any() for block in model.blocks)


def test_parameters_are_those_of_all_experts_and_a_router():
    one = LanguageModelConfig(11, dim=16, num_heads=2, plan=[("linear", {"feed_forward": 12})])
    some = LanguageModelConfig(
        11, dim=16, num_heads=2, plan=[("linear", {**EXPERTS, "feed_forward_options": {"experts": 5}})]
    )
    assert count_parameters(some) - count_parameters(one) == 4 * 3 * 12 * 16 + 5 * 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": 0}, "experts"),
        ({"active": 5}, "active=5 of 4 experts"),
        ({"capacity": 0}, "capacity"),
        ({"network": "swigly"}, "swiglu"),
        ({"expert": 3}, "experts"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(Unsupported, match=words):
        make_feed_forward("mixture_of_experts", 8, **options)
