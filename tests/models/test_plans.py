"""Plans from papers: which layer is what, and what follows from it in a model."""

from __future__ import annotations

import pytest
import torch

from regard.contract import Context, Unsupported
from regard.mechanisms.local import Config, visible_pairs
from regard.models import (
    Encoder,
    EncoderConfig,
    LanguageModel,
    LanguageModelConfig,
    attention_share,
    from_pretrained,
    masformer_plan,
    masformer_schedule,
    save_pretrained,
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


@pytest.mark.parametrize("variant", ["T1", "T2"])
def test_transnormers_decode_as_they_read_and_come_back_from_disk(variant, tmp_path):
    plan = transnormer_plan(4, variant, block=4)
    transnormer = model(plan, norm="rms_nonparametric", tie_embeddings=True)
    ids = torch.randint(11, (2, 14))
    whole = transnormer(ids).output
    state = transnormer(ids[:, :3], context=Context(want=frozenset({"state"}))).state
    for t in range(3, 14):
        result = transnormer(ids[:, t : t + 1], state=state)
        torch.testing.assert_close(result.output[:, 0], whole[:, t])
        state = result.state
    save_pretrained(transnormer, tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(ids).output, whole)


@pytest.mark.parametrize("variant", ["T1", "T2"])
def test_every_parameter_of_a_bidirectional_transnormer_learns(variant):
    plan = transnormer_plan(2, variant, block=4)
    encoder = Encoder(EncoderConfig(num_classes=3, vocab_size=11, dim=16, num_heads=2, plan=plan))
    encoder(torch.randint(11, (2, 9))).output.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())


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
