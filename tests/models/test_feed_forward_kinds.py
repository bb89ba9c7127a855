"""The feed-forward network of a block: which kinds a plan can name, in every model."""

from __future__ import annotations

import copy

import pytest
import torch
from language_model_checks import check_decodes_as_it_reads_and_comes_back_from_disk

from regard.contract import Context, Unsupported
from regard.models import (
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Forecaster,
    ForecasterConfig,
    FunnelEncoder,
    FunnelEncoderConfig,
    LanguageModel,
    LanguageModelConfig,
    from_pretrained,
    match_parameters,
    save_pretrained,
)

KINDS = {
    "swiglu": {"feed_forward_kind": "swiglu", "feed_forward_options": {"bias": True}},
    "gelu": {"feed_forward_kind": "gelu", "feed_forward": 20},
    "bilinear": {"feed_forward_kind": "bilinear", "feed_forward_options": {"bias": True}, "feed_forward": 20},
    "token_parameter": {"feed_forward_kind": "token_parameter", "feed_forward_options": {"num_tokens": 24}},
    "an alias": {"feed_forward_kind": "pattention", "feed_forward_options": {"theta": "softmax"}},
    "dense": {"feed_forward_kind": "dense"},
}


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.double().eval()


def language_model(plan, **options) -> LanguageModel:
    return randomised(LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan, **options)))


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_any_network_decodes_as_it_reads_and_comes_back_from_disk(kind, tmp_path):
    model = language_model([("linear", KINDS[kind]), "softmax"])
    check_decodes_as_it_reads_and_comes_back_from_disk(model, torch.randint(11, (2, 9)), 4, tmp_path)


OTHERS = {
    "encoder": (Encoder, EncoderConfig, {"num_classes": 3, "vocab_size": 11}, ("plan",)),
    "encoder-decoder": (
        EncoderDecoder,
        EncoderDecoderConfig,
        {"vocab_size": 11, "memory_vocab_size": 11},
        ("encoder_plan", "cross_plan"),
    ),
    "forecaster": (Forecaster, ForecasterConfig, {"features": 2, "memory_features": 2}, ("encoder_plan", "cross_plan")),
    "funnel encoder": (
        FunnelEncoder,
        FunnelEncoderConfig,
        {"num_classes": 3, "vocab_size": 11, "funnel": {"blocks": 1}},
        ("plan", "decoder_plan"),
    ),
}


@pytest.mark.parametrize("kind", ["bilinear", "token_parameter"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_model_takes_any_network_in_each_of_its_plans(name, kind, tmp_path):
    made, config, own, plans = OTHERS[name]
    model = randomised(made(config(dim=16, num_heads=2, **own, **{plan: [("softmax", KINDS[kind])] for plan in plans})))
    wanted = "feed_forward.value_tokens" if kind == "token_parameter" else "feed_forward.down.bias"
    assert sum(n.endswith(wanted) for n in model.state_dict() if "funnel." not in n) == len(plans)
    given = (torch.randint(11, (2, 8)), torch.randint(11, (2, 5)))
    if name == "forecaster":
        given = tuple(torch.randn(2, n, 2, dtype=torch.float64) for n in (3, 7))
    given = given if name in ("encoder-decoder", "forecaster") else given[:1]
    output = model(*given).output
    output.square().sum().backward()
    found = [p.grad for n, p in model.named_parameters() if n.endswith(wanted) and "funnel." not in n]
    assert all(gradient.abs().max() > 0 for gradient in found)
    save_pretrained(model, tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(*given).output, output)


def test_the_model_s_width_is_of_networks_that_have_one():
    plan = [("linear", KINDS["token_parameter"]), ("linear", {"feed_forward_kind": "gelu"})]
    model = language_model(plan, feed_forward=12)
    assert model.blocks[0].feed_forward.key_tokens.shape == (24, 16)
    assert model.blocks[1].feed_forward.up.weight.shape == (12, 16)
    target = sum(p.numel() for p in model.parameters()) + 40 * 2 * 16
    assert match_parameters(model.config, target).feed_forward == 52


def test_networks_of_different_kinds_are_not_shared():
    for first, second in (("swiglu", "bilinear"), ("token_parameter", "an alias")):
        entries = [
            ("linear", {k: v for k, v in KINDS[kind].items() if k != "feed_forward"}) for kind in (first, second)
        ]
        entries[1][1].setdefault("feed_forward_options", {})["bias"] = True
        if first == "token_parameter":
            entries[1][1]["feed_forward_options"] = {"num_tokens": 24, "theta": "softmax"}
        with pytest.raises(Unsupported, match="one kind"):
            language_model(entries, stack={"share": "feed_forward"})
    shared = language_model([("linear", copy.deepcopy(KINDS["bilinear"]))] * 2, stack={"share": "feed_forward"})
    assert shared.blocks[0].feed_forward is shared.blocks[1].feed_forward


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feed_forward_kind": "swigly"}, "try swiglu"),
        (
            {"feed_forward_kind": "bilinear", "feed_forward_options": {"dropout": 0.1}},
            "'dropout' of feed-forward 'bilinear'",
        ),
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
    plan = [("softmax", {"feed_forward_kind": "gelu"})]
    with pytest.raises(Unsupported, match="encoder_plan and cross_plan"):
        EncoderDecoder(EncoderDecoderConfig(vocab_size=11, memory_vocab_size=11, dim=16, decoder_plan=plan))
