"""The same heads in more or fewer layers, and each head's contribution: counts, exact sums, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.contract import Context, Mask, Unsupported
from regard.layers.attention import AttentionLayer
from regard.models import Encoder, EncoderConfig, LanguageModelConfig, aspects, read_heads, with_aspect

DEEP = EncoderConfig(
    3, vocab_size=20, dim=24, plan="softmax", num_layers=6, num_heads=2, head_dim=8, feed_forward=10, max_length=64
)


def parameters(config):
    """Parameter counts of all attention layers and of all feed-forward networks."""
    model = Encoder(config)
    attention = sum(p.numel() for m in model.modules() if isinstance(m, AttentionLayer) for p in m.parameters())
    network = sum(p.numel() for block in model.blocks for p in block.feed_forward.parameters())
    return attention, network


def test_attention_has_as_many_parameters_in_any_number_of_layers():
    assert aspects(DEEP) == (1, 2, 3, 4, 6, 12)
    for layers in aspects(DEEP):
        config = with_aspect(DEEP, layers)
        assert (len(config.plan), config.num_layers * config.num_heads, config.head_dim) == (layers, 12, 8)
        assert parameters(config) == (4 * 24 * 8 * 12, layers * 3 * 24 * 10)
        even = with_aspect(DEEP, layers, feed_forward="total")
        assert parameters(even) == (4 * 24 * 8 * 12, 6 * 3 * 24 * 10)
    assert with_aspect(with_aspect(DEEP, 1), 6) == with_aspect(DEEP, 6) == DEEP


def test_heads_keep_the_width_that_the_model_gives_them_and_groups_of_keys_their_share():
    config = LanguageModelConfig(9, dim=32, plan="local:window=4", num_layers=2, num_heads=4, num_kv_heads=2)
    wide = with_aspect(config, 1)
    assert (wide.num_heads, wide.num_kv_heads, wide.head_dim) == (8, 4, 8)
    assert wide.plan == (("local", {"window": 4}),)
    assert aspects(config) == (1, 2, 4)


@pytest.mark.parametrize(
    ("config", "options", "told"),
    [
        (DEEP, {"num_layers": 5}, "12 heads in 5 layers; supported: 1, 2, 3, 4, 6, 12; try num_layers=4"),
        (DEEP, {"num_layers": 1, "feed_forward": "none"}, "supported: layer, total"),
        (EncoderConfig(2, 9, plan="softmax"), {"num_layers": 1, "feed_forward": "total"}, "does not set the width"),
        (EncoderConfig(2, 9, plan=["softmax", "linear"]), {"num_layers": 1}, "layers differ"),
        (EncoderConfig(2, 9, plan="s4d"), {"num_layers": 1}, "the heads of s4d"),
        (EncoderConfig(2, 9, plan=[("softmax", {"num_heads": 2})]), {"num_layers": 1}, "num_heads in the plan"),
    ],
)
def test_what_has_no_other_aspect_is_refused(config, options, told):
    with pytest.raises(Unsupported) as error:
        with_aspect(config, **options)
    assert told in str(error.value)


def randomised(model):
    """The model in float64 with all parameters, including norms and biases, away from their initial values."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize(
    ("plan", "sizes"),
    [
        ("softmax", {"norm": "layer", "pool": "first"}),
        ("linear:output_norm=rms", {"norm": "rms", "num_heads": 3, "head_dim": 5}),
        ("local:window=3", {"norm": "none", "feed_forward": 0, "pool": "last"}),
    ],
)
def test_parts_of_the_logits_add_up_to_them_under_padding(plan, sizes):
    config = EncoderConfig(4, vocab_size=11, plan=plan, num_layers=2, **{"dim": 16, "num_heads": 2, **sizes})
    model = randomised(Encoder(config))
    tokens = torch.randint(11, (3, 9))
    context = Context(mask=Mask(lengths=torch.tensor([9, 4, 7])))
    found = read_heads(model, tokens, context=context)
    logits = model(tokens, context=context).output
    torch.testing.assert_close(found.total, logits, rtol=0, atol=1e-10)
    assert [x.shape for x in found.heads] == [(3, config.num_heads, 4)] * 2
    weights = found.weights[0]
    if plan == "softmax":
        torch.testing.assert_close(weights.sum(-1)[0], torch.ones(2, 9).double())
    else:
        assert weights is None or weights.shape == (3, config.num_heads, 9, 9)


def test_in_one_layer_a_head_is_what_the_logits_lose_without_its_rows():
    config = EncoderConfig(3, vocab_size=11, dim=16, plan="softmax", num_layers=1, feed_forward=0, norm="none")
    model = randomised(Encoder(config))
    tokens = torch.randint(11, (2, 7))
    found, whole = read_heads(model, tokens), model(tokens).output
    output = model.blocks[0].mixer.output
    for head in range(4):
        kept = output.weight.detach().clone()
        with torch.no_grad():
            output.weight[:, 4 * head : 4 * head + 4] = 0
            torch.testing.assert_close(whole - model(tokens).output, found.heads[0][:, head], rtol=0, atol=1e-12)
            output.weight.copy_(kept)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pool": "max"}, "pool='max'"),
        ({"plan": "mamba2"}, "the heads of mamba2"),
        ({"stack": {"layer_scale": 0.1}}, "supported: the default stack"),
    ],
)
def test_models_whose_logits_are_no_sum_of_heads_are_refused(options, told):
    model = Encoder(EncoderConfig(2, vocab_size=9, **{"dim": 16, "num_layers": 1, **options}))
    with pytest.raises(Unsupported) as error:
        read_heads(model, torch.zeros(1, 4, dtype=torch.long))
    assert told in str(error.value)
