"""Plans from papers: which layer is what, and what follows from it in a model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from language_model_checks import check_decodes_as_it_reads_and_comes_back_from_disk

from regard.contract import Context, Unsupported
from regard.mechanisms.local import Config, visible_pairs
from regard.models import (
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    LanguageModel,
    LanguageModelConfig,
    attention_share,
    count_parameters,
    masformer_plan,
    masformer_schedule,
    tokenformer_plan,
    transnormer_plan,
)

FULL = {
    "bottom:2": [0, 1],
    "top:2": [5, 6],
    "middle:3": [2, 3, 4],
    "spread:3": [0, 2, 4],
    "bottom:0": [],
    (6, 1): [1, 6],
}


def model(plan, **options) -> LanguageModel:
    config = LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan, **options)
    return LanguageModel(config).double().eval()


@pytest.mark.parametrize(
    ("variant", "activation", "feature_map"), [("T1", "relu", "plain_elu"), ("T2", "softmax", "elu")]
)
def test_transnormer_has_diagonal_layers_first(variant, activation, feature_map):
    plan = transnormer_plan(5, variant, block=7)
    assert [name for name, _ in plan] == ["diagonal"] * 2 + ["norm_linear"] * 3
    assert plan[0][1] == {"activation": activation, "block": 7, "positions": "lrpe"}
    assert plan[4][1] == {"feature_map": feature_map, "positions": "lrpe"}


def test_transnormer_orders():
    def order(name: str) -> str:
        return "".join(mechanism[0] for mechanism, _ in transnormer_plan(5, order=name))

    assert (order("diagonal_first"), order("norm_first"), order("interleaved")) == ("ddnnn", "nnndd", "dndnn")


@pytest.mark.parametrize(("activation", "apply"), [("identity", lambda z: z), ("silu", lambda z: z * z.sigmoid())])
def test_transnormers_have_the_authors_networks_where_they_are_asked_for(activation, apply):
    plain, asked = transnormer_plan(3, block=7), transnormer_plan(3, block=7, glu_act=activation)
    assert [(name, set(new) - set(old)) for (name, old), (_, new) in zip(plain, asked, strict=True)] == [
        (name, {"feed_forward_kind", "feed_forward_options"}) for name, _ in plain
    ]
    norms = {"norm": "rms_nonparametric", "embedding_norm": "rms_nonparametric"}
    transnormer = model(asked, feed_forward=8 * 16 // 3, **norms)
    for block in transnormer.blocks:
        network, x = block.feed_forward, 3 * torch.randn(2, 5, 16, dtype=torch.float64)
        for linear in (network.gate, network.up, network.down):
            torch.nn.init.normal_(linear.bias)
        y = x / (x.norm(dim=-1, keepdim=True) / 4)
        hidden = apply(y @ network.gate.weight.T + network.gate.bias) * (y @ network.up.weight.T + network.up.bias)
        expected = hidden @ network.down.weight.T + network.down.bias
        torch.testing.assert_close(block.feed(x, context=Context()), expected, rtol=1e-5, atol=1e-5)  # eps of the norm
        assert hidden.shape[-1] == 42


@pytest.mark.parametrize("kind", ["language model", "encoder"])
def test_the_embedding_is_normalised_where_it_is_asked_for(kind):
    own = {"dim": 16, "num_heads": 2, "plan": ["linear"], "embedding_norm": "rms_nonparametric", "feed_forward": 0}
    if kind == "encoder":
        made = Encoder(EncoderConfig(num_classes=3, vocab_size=11, **own)).double().eval()
    else:
        made = LanguageModel(LanguageModelConfig(vocab_size=11, **own)).double().eval()
    ids, seen = torch.randint(11, (2, 5)), []
    made.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    made(ids)
    x = made.embedding(ids)
    torch.testing.assert_close(seen[0], x / x.square().mean(-1, keepdim=True).sqrt(), rtol=1e-5, atol=1e-5)
    learned = type(made)(dataclasses.replace(made.config, embedding_norm="layer"))
    assert {"embedding_norm.weight", "embedding_norm.bias"} <= set(learned.state_dict())
    assert "embedding_norm.weight" not in made.state_dict()


@pytest.mark.parametrize("variant", ["T1", "T2"])
@pytest.mark.parametrize("glu_act", [None, "identity"])
def test_transnormers_decode_as_they_read_and_come_back_from_disk(variant, glu_act, tmp_path):
    plan = transnormer_plan(4, variant, block=4, glu_act=glu_act)
    embedding_norm = "none" if glu_act is None else "rms_nonparametric"
    transnormer = model(plan, norm="rms_nonparametric", embedding_norm=embedding_norm, tie_embeddings=True)
    check_decodes_as_it_reads_and_comes_back_from_disk(transnormer, torch.randint(11, (2, 14)), 3, tmp_path)


@pytest.mark.parametrize("variant", ["T1", "T2"])
def test_every_parameter_of_a_bidirectional_transnormer_learns(variant):
    plan = transnormer_plan(2, variant, block=4)
    encoder = Encoder(EncoderConfig(num_classes=3, vocab_size=11, dim=16, num_heads=2, plan=plan))
    encoder(torch.randint(11, (2, 9))).output.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())


def tokenformer(plan, **options) -> LanguageModel:
    return model(plan, norm="layer_nonparametric", tie_embeddings=True, **options)


SIZES = {"150M": (12, 768, 12), "450M": (24, 1024, 16), "900M": (32, 1280, 16), "1.5B": (40, 1536, 16)}


@pytest.mark.parametrize("size", SIZES)
def test_a_tokenformer_has_16_dim_squared_parameters_a_layer_and_its_embedding(size):
    layers, dim, heads = SIZES[size]
    config = LanguageModelConfig(
        vocab_size=50304,
        dim=dim,
        num_heads=heads,
        plan=tokenformer_plan(layers, dim),
        norm="layer_nonparametric",
        tie_embeddings=True,
    )
    assert count_parameters(config) == 16 * dim**2 * layers + 50304 * dim


def test_a_tokenformer_is_made_of_parameter_tokens_and_an_embedding_alone():
    made = tokenformer(tokenformer_plan(3, 24, feed_forward_tokens=40))
    names = {name.split(".", 2)[-1] for name in made.state_dict()} - {"weight"}  # of the embedding
    parts = [f"mixer.{part}" for part in ("query", "key", "value", "output")] + ["feed_forward"]
    assert names == {f"{part}.{name}" for part in parts for name in ("key_tokens", "value_tokens", "tau")}
    for block in made.blocks:
        assert len(block.mixer.query.keys) == 24 and len(block.feed_forward.keys) == 40
        assert block.mixer.positions.rotated == 2  # a quarter of 8
    drawn = model(tokenformer_plan(2, 4000)).blocks[0]
    for module in (drawn.mixer.value, drawn.feed_forward):
        assert module.key_tokens.std().item() == pytest.approx(0.02, rel=0.05)
        assert module.value_tokens.std().item() == pytest.approx(2 / (2 * 4), rel=0.05)


@pytest.mark.parametrize("options", [{}, {"theta": "gelu_l2_norm", "tau_mode": "sqrt_n"}, {"top_k": 7}])
def test_a_tokenformer_decodes_as_it_reads_and_comes_back_from_disk(options, tmp_path):
    made = tokenformer(tokenformer_plan(2, 20, **options))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    check_decodes_as_it_reads_and_comes_back_from_disk(made, torch.randint(11, (2, 9)), 4, tmp_path)


def test_an_encoder_decoder_can_be_a_tokenformer():
    config = EncoderDecoderConfig(
        vocab_size=11,
        memory_vocab_size=11,
        dim=16,
        num_heads=2,
        encoder_plan=tokenformer_plan(1, 8),
        decoder_plan=tokenformer_plan(2, 8, feed_forward_tokens=0),
        cross_plan=tokenformer_plan(2, 8, positions="none"),
        norm="layer_nonparametric",
        tie_embeddings=True,
    )
    # projections of encoder, decoder and cross layers, and the networks of encoder and cross layers
    assert count_parameters(config) == 2 * 16 * 8 * (4 * (1 + 2 + 2) + 4 * (1 + 2)) + 2 * 11 * 16
    made, memory, ids = EncoderDecoder(config).double().eval(), torch.randint(11, (2, 6)), torch.randint(11, (2, 4))
    state, outputs = made.encode_memory(memory), []
    for t in range(4):
        result = made(ids[:, t : t + 1], state=state)
        outputs.append(result.output)
        state = result.state
    torch.testing.assert_close(torch.cat(outputs, 1), made(ids, memory).output)


@pytest.mark.parametrize(("wanted", "full"), FULL.items())
def test_masformer_has_full_attention_where_it_is_asked_for(wanted, full):
    plan = masformer_plan(7, wanted, block=9, lookback=0)
    assert [i for i, (name, _) in enumerate(plan) if name == "softmax"] == full
    assert all(options == {"form": "block", "block": 9, "lookback": 0} for name, options in plan if name == "local")


WINDOW = {"form": "window", "window": 6, "global_tokens": 2}


@pytest.mark.parametrize("options", [{"block": 5}, {"form": "window", "window": 5}, WINDOW, {"block": 20}])
def test_masformer_has_the_weights_of_the_full_model(options):
    plain, mixed = model(["softmax"] * 3), model(masformer_plan(3, "bottom:1", **options))
    mixed.load_state_dict(plain.state_dict(), strict=True)
    ids = torch.randint(11, (2, 17))
    same = torch.equal(mixed(ids).output, plain(ids).output)
    assert same == (options == {"block": 20})
    everywhere = model(masformer_plan(3, "top:3", **options))
    everywhere.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(everywhere(ids).output, plain(ids).output)


def reached(plan) -> int:
    """The earliest token that the last of 40 depends on."""
    mixed = model(plan)
    x = mixed.embedding(torch.randint(11, (1, 40))).detach().requires_grad_()
    y = x
    for block in mixed.blocks:
        y = block(y, context=Context()).output
    gradient = torch.autograd.grad(y[0, -1].sum(), x)[0]
    return int((gradient[0].abs().sum(-1) > 0).nonzero().min())


def test_one_full_layer_carries_information_across_any_distance():
    assert reached(masformer_plan(3, "middle:1", block=4)) == 0
    assert reached(masformer_plan(3, "bottom:0", block=4)) == 40 - (3 * 4 + 4)
    assert reached(masformer_plan(3, "bottom:0", block=4, lookback=0)) == 36


@pytest.mark.parametrize("global_tokens", [1, 3])
def test_global_tokens_are_seen_from_anywhere_and_others_within_reach_alone(global_tokens):
    span = {"form": "window", "window": 4, "global_tokens": global_tokens}
    plan = masformer_plan(3, "bottom:0", **span)
    assert plan[0] == ("longformer", {"window": 4, "global_tokens": global_tokens, "separate_projections": False})
    mixed = model(plan)
    x = mixed.embedding(torch.randint(11, (1, 40))).detach().requires_grad_()
    y = x
    for block in mixed.blocks:
        y = block(y, context=Context()).output
    gradient = torch.autograd.grad(y[0, -1].sum(), x)[0]
    near = list(range(39 - 3 * 3, 40))
    assert (gradient[0].abs().sum(-1) > 0).nonzero().flatten().tolist() == [*range(global_tokens), *near]


def test_global_tokens_beside_windows_of_all_keys_change_nothing():
    plain, ids = model(["softmax"] * 3), torch.randint(11, (2, 17))
    mixed = model(masformer_plan(3, "top:1", form="window", window=18, global_tokens=2))
    mixed.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(mixed(ids).output, plain(ids).output, rtol=0, atol=1e-12)


def test_the_share_of_attention_counts_pairs():
    n = 100
    plan = masformer_plan(4, "bottom:1", block=8)
    local = visible_pairs(Config(form="block", block=8), n)
    assert attention_share(plan, n) == pytest.approx((n * (n + 1) / 2 + 3 * local) / (4 * n * (n + 1) / 2))
    assert attention_share(masformer_plan(24, "bottom:6"), 1 << 20) == pytest.approx(0.25, abs=2e-3)
    assert attention_share(["softmax", ("local", {"window": 1, "positions": "none"})], 3) == pytest.approx(9 / 12)
    plan = masformer_plan(2, "top:1", form="window", window=2, global_tokens=1)
    assert attention_share(plan, 4) == pytest.approx((10 + 1 + 2 + 3 + 3) / 20)


def test_mistakes_are_refused_with_the_nearest_alternative():
    for call, message in (
        (lambda: transnormer_plan(4, "T3"), "T1, T2"),
        (lambda: transnormer_plan(4, order="mixed"), "interleaved"),
        (lambda: transnormer_plan(0), "num_layers >= 1"),
        (lambda: transnormer_plan(4, glu_act="swish"), "identity, silu"),
        (lambda: tokenformer_plan(0, 8), "num_layers >= 1"),
        (lambda: tokenformer_plan(2, 0), "num_tokens >= 1"),
        (lambda: tokenformer_plan(2, 8, feed_forward_tokens=-1), "num_tokens >= 1"),
        (lambda: tokenformer_plan(2, 8, thetas="softmax"), "try theta"),
        (lambda: masformer_plan(4, "bottom"), "bottom:1"),
        (lambda: masformer_plan(4, "left:2"), "spread"),
        (lambda: masformer_plan(4, "top:5"), "a number of layers"),
        (lambda: masformer_plan(4, [4]), "from 0 to 3"),
        (lambda: masformer_plan(4, "top:1", block=0), "block >= 1"),
        (lambda: masformer_plan(4, "top:1", global_tokens=1), "form='window'"),
        (lambda: masformer_plan(4, "top:1", form="window", window=5, global_tokens=1), "an even number"),
        (lambda: masformer_plan(4, "top:1", global_tokens=-1), "global_tokens >= 0"),
        (lambda: masformer_schedule(4, "top:1", 0), "steps >= 1"),
        (lambda: masformer_plan(4, "top:1", form="dilated"), "window"),
        (lambda: attention_share(["linear"], 5), "softmax, local and longformer"),
        (lambda: attention_share(["softmax"], 0), "length >= 1"),
    ):
        with pytest.raises(Unsupported, match=message):
            call()
