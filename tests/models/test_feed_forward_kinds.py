"""The feed-forward network of a block: which kinds a plan can name, in every model."""

from __future__ import annotations

import copy

import pytest
import torch
from model_checks import check_comes_back_from_disk, made, read_by, without_gradient

from regard.contract import Context, Unsupported
from regard.models import match_parameters

KINDS = {
    "swiglu": {"feed_forward_kind": "swiglu", "feed_forward_options": {"bias": True}},
    "gelu": {"feed_forward_kind": "gelu", "feed_forward": 20},
    "bilinear": {"feed_forward_kind": "bilinear", "feed_forward_options": {"bias": True}, "feed_forward": 20},
    "token_parameter": {"feed_forward_kind": "token_parameter", "feed_forward_options": {"num_tokens": 24}},
    "an alias": {"feed_forward_kind": "pattention", "feed_forward_options": {"theta": "softmax"}},
    "dense": {"feed_forward_kind": "dense"},
}


def randomised(kind, **options):
    model = made(kind, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def language_model(plan, **options):
    return randomised("language model", plan=plan, **options)


def expected_network(kind: str, network, x):
    if kind == "dense":
        return x @ network.weight.T
    if kind in ("token_parameter", "an alias"):
        s = x @ network.key_tokens.T
        if kind == "an alias":
            return network.tau**2 * s.softmax(-1) @ network.value_tokens
        z = network.tau * s / s.norm(dim=-1, keepdim=True)
        return z * (1 + torch.erf(z / 2**0.5)) / 2 @ network.value_tokens
    up, down = network.up, network.down
    if kind == "gelu":
        z = x @ up.weight.T
        return z * (1 + torch.erf(z / 2**0.5)) / 2 @ down.weight.T
    gate = x @ network.gate.weight.T + network.gate.bias
    gate = gate * torch.sigmoid(gate) if kind == "swiglu" else gate
    return gate * (x @ up.weight.T + up.bias) @ down.weight.T + down.bias


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_adds_the_network_that_its_entry_names(kind):
    model = language_model([("linear", KINDS[kind])], norm="none")
    block, x = model.blocks[0], torch.randn(2, 5, 16, dtype=torch.float64)
    mixed = x + block.mix(x, context=Context()).output
    expected = mixed + expected_network(kind, block.feed_forward, mixed)
    torch.testing.assert_close(block(x, context=Context()).output, expected)


PLANS = {
    "language model": ("plan",),
    "encoder": ("plan",),
    "encoder-decoder": ("encoder_plan", "cross_plan"),
    "forecaster": ("encoder_plan", "cross_plan"),
    "funnel encoder": ("plan", "decoder_plan"),
}


@pytest.mark.parametrize("network", ["bilinear", "token_parameter"])
@pytest.mark.parametrize("kind", PLANS)
def test_every_model_takes_any_network_in_each_of_its_plans(kind, network, tmp_path):
    plans = {plan: [("softmax", KINDS[network])] for plan in PLANS[kind]}
    if kind == "funnel encoder":
        plans |= {"num_layers": None, "funnel": {"blocks": 1}}
    model = randomised(kind, **plans)
    wanted = "feed_forward.value_tokens" if network == "token_parameter" else "feed_forward.down.bias"
    names = [name for name in model.state_dict() if name.endswith(wanted) and "funnel." not in name]
    assert len(names) == len(PLANS[kind])
    inputs = read_by(model.config)
    model(*inputs).output.square().sum().backward()
    assert not set(names) & set(without_gradient(model))
    check_comes_back_from_disk(model, inputs, tmp_path)


def test_the_model_s_width_is_of_networks_that_have_one():
    plan = [("linear", KINDS["token_parameter"]), ("linear", {"feed_forward_kind": "gelu"})]
    model = language_model(plan, feed_forward=12)
    assert model.blocks[0].feed_forward.key_tokens.shape == (24, 16)
    assert model.blocks[1].feed_forward.up.weight.shape == (12, 16)
    target = sum(p.numel() for p in model.parameters()) + 40 * 2 * 16
    assert match_parameters(model.config, target).feed_forward == 52


def test_networks_of_one_kind_alone_are_shared():
    swiglu = {"feed_forward_kind": "swiglu", "feed_forward_options": {"bias": True}}
    bilinear = swiglu | {"feed_forward_kind": "bilinear"}
    tokens, normed = KINDS["token_parameter"], copy.deepcopy(KINDS["token_parameter"])
    normed["feed_forward_options"]["theta"] = "softmax"
    for first, second in ((swiglu, bilinear), (tokens, normed)):
        with pytest.raises(Unsupported, match="one kind"):
            language_model([("linear", first), ("linear", second)], stack={"share": "feed_forward"})
    shared = language_model(
        [("linear", bilinear), ("linear", copy.deepcopy(bilinear))], stack={"share": "feed_forward"}
    )
    assert shared.blocks[0].feed_forward is shared.blocks[1].feed_forward


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feed_forward_kind": "swigly"}, "try swiglu"),
        ({"feed_forward_kind": "bilinear", "feed_forward_options": {"dropout": 0.1}}, "'dropout' of .* 'bilinear'"),
        ({"feed_forward_options": {"num_tokens": 3}}, "'num_tokens' of feed-forward 'swiglu'"),
        ({"feed_forward_kind": "token_parameter", "feed_forward_options": {"theta": "gelu"}}, "theta"),
        ({"feed_forward_kind": "token_parameter", "feed_forward": 8}, "a hidden width"),
        ({"feed_forward_kind": "gelu", "feed_forward": 0}, "without a feed-forward network"),
        ({"feed_forward_options": {"bias": True}, "feed_forward": 0}, "without a feed-forward network"),
    ],
)
def test_what_a_network_cannot_be_is_refused(options, message):
    with pytest.raises(Unsupported, match=message):
        language_model([("softmax", options)])


def test_a_kind_where_an_encoder_decoder_has_no_network_is_refused():
    with pytest.raises(Unsupported, match="encoder_plan and cross_plan"):
        made("encoder-decoder", decoder_plan=[("softmax", {"feed_forward_kind": "gelu"})])
