"""Plans from papers: the kind of each layer, and the consequences in a model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from model_checks import (
    check_decodes_as_it_reads_and_comes_back_from_disk,
    made,
    small,
)

from regard.contract import Context, Unsupported
from regard.mechanisms.local import Config, visible_pairs
from regard.models import (
    LanguageModel,
    attention_share,
    count_parameters,
    masformer_plan,
    masformer_schedule,
    tokenformer_plan,
    transnormer_plan,
)


def model(plan, **options) -> LanguageModel:
    return made("language model", plan=plan, **options)


@pytest.mark.parametrize(
    ("variant", "activation", "feature_map"), [("T1", "relu", "plain_elu"), ("T2", "softmax", "elu")]
)
def test_transnormer_has_diagonal_layers_first_unless_another_order_is_asked_for(variant, activation, feature_map):
    diagonal = ("diagonal", {"activation": activation, "block": 7, "positions": "lrpe"})
    norm = ("norm_linear", {"feature_map": feature_map, "positions": "lrpe"})
    orders = {"diagonal_first": [diagonal] * 2 + [norm] * 3, "norm_first": [norm] * 3 + [diagonal] * 2}
    orders["interleaved"] = [diagonal, norm] * 2 + [norm]
    assert transnormer_plan(5, variant, block=7) == orders["diagonal_first"]
    for order, plan in orders.items():
        assert transnormer_plan(5, variant, block=7, order=order) == plan


@pytest.mark.parametrize(("activation", "kind"), [("identity", "bilinear"), ("silu", "swiglu")])
def test_transnormers_have_the_authors_networks_where_they_are_asked_for(activation, kind):
    network = {"feed_forward_kind": kind, "feed_forward_options": {"bias": True}}
    plain = transnormer_plan(3, block=7)
    assert transnormer_plan(3, block=7, glu_act=activation) == [(name, own | network) for name, own in plain]


@pytest.mark.parametrize("kind", ["language model", "encoder"])
def test_the_embedding_is_normalised_where_it_is_asked_for(kind):
    words = {"vocab_size": 11} | ({"features": None} if kind == "encoder" else {})
    plain = made(kind, plan=["linear"], embedding_norm="rms_nonparametric", **words)
    ids, seen = torch.randint(11, (2, 5)), []
    plain.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    plain(ids)
    x = plain.embedding(ids)
    torch.testing.assert_close(seen[0], x / x.square().mean(-1, keepdim=True).sqrt(), rtol=1e-5, atol=1e-5)
    learned = type(plain)(dataclasses.replace(plain.config, embedding_norm="layer"))
    assert set(learned.state_dict()) - set(plain.state_dict()) == {"embedding_norm.weight", "embedding_norm.bias"}


@pytest.mark.parametrize("variant", ["T1", "T2"])
@pytest.mark.parametrize("glu_act", [None, "identity"])
def test_transnormers_decode_as_they_read_and_come_back_from_disk(variant, glu_act, tmp_path):
    plan = transnormer_plan(4, variant, block=4, glu_act=glu_act)
    embedding_norm = "none" if glu_act is None else "rms_nonparametric"
    transnormer = model(plan, norm="rms_nonparametric", embedding_norm=embedding_norm, tie_embeddings=True)
    check_decodes_as_it_reads_and_comes_back_from_disk(transnormer, torch.randint(11, (2, 14)), 3, tmp_path)


TOKENFORMER = {"norm": "layer_nonparametric", "tie_embeddings": True}
SIZES = {"150M": (12, 768, 12), "450M": (24, 1024, 16), "900M": (32, 1280, 16), "1.5B": (40, 1536, 16)}


@pytest.mark.parametrize(("layers", "dim", "heads"), SIZES.values(), ids=SIZES)
def test_a_tokenformer_has_16_dim_squared_parameters_a_layer_and_its_embedding(layers, dim, heads):
    sizes = {"vocab_size": 50304, "dim": dim, "num_heads": heads}
    config = small("language model", plan=tokenformer_plan(layers, dim), **sizes, **TOKENFORMER)
    assert count_parameters(config) == 16 * dim**2 * layers + 50304 * dim


def test_a_tokenformer_is_made_of_parameter_tokens_and_an_embedding_alone():
    whole = model(tokenformer_plan(3, 24, feed_forward_tokens=40), **TOKENFORMER)
    names = {name.split(".", 2)[-1] for name in whole.state_dict()} - {"weight"}  # "weight": the embedding's
    parts = [f"mixer.{part}" for part in ("query", "key", "value", "output")] + ["feed_forward"]
    assert names == {f"{part}.{name}" for part in parts for name in ("key_tokens", "value_tokens", "tau")}
    for block in whole.blocks:
        assert len(block.mixer.query.keys) == 24 and len(block.feed_forward.keys) == 40
        assert block.mixer.positions.rotated == 2  # a quarter of the width 8
    assert model(tokenformer_plan(1, 24, feed_forward_tokens=0)).blocks[0].feed_forward is None
    drawn = model(tokenformer_plan(2, 4000)).blocks[0]
    for module in (drawn.mixer.value, drawn.feed_forward):
        assert module.key_tokens.std().item() == pytest.approx(0.02, rel=0.05)
        assert module.value_tokens.std().item() == pytest.approx(2 / (2 * 4), rel=0.05)


@pytest.mark.parametrize(
    ("wanted", "full"),
    [
        ("bottom:2", [0, 1]),
        ("top:2", [5, 6]),
        ("middle:3", [2, 3, 4]),
        ("spread:3", [0, 2, 4]),
        ("bottom:0", []),
        ((6, 1), [1, 6]),
    ],
)
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


def reached(plan) -> list[int]:
    """The tokens on which the last of 40 depends."""
    mixed = model(plan)
    x = mixed.embedding(torch.randint(11, (1, 40))).detach().requires_grad_()
    y = x
    for block in mixed.blocks:
        y = block(y, context=Context()).output
    gradient = torch.autograd.grad(y[0, -1].sum(), x)[0]
    return (gradient[0].abs().sum(-1) > 0).nonzero().flatten().tolist()


def test_one_full_layer_carries_information_across_any_distance():
    assert min(reached(masformer_plan(3, "middle:1", block=4))) == 0
    assert min(reached(masformer_plan(3, "bottom:0", block=4))) == 40 - (3 * 4 + 4)
    assert min(reached(masformer_plan(3, "bottom:0", block=4, lookback=0))) == 36


@pytest.mark.parametrize("global_tokens", [1, 3])
def test_global_tokens_are_seen_from_anywhere_and_others_within_reach_alone(global_tokens):
    plan = masformer_plan(3, "bottom:0", form="window", window=4, global_tokens=global_tokens)
    assert plan[0] == ("longformer", {"window": 4, "global_tokens": global_tokens, "separate_projections": False})
    assert reached(plan) == [*range(global_tokens), *range(39 - 3 * 3, 40)]


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
