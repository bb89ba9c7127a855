"""`regard.swap` on PyTorch and timm modules: equal with softmax, trainable with others, unsafe swaps refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support import GRAPH
from torch import nn

import regard
from regard import Pattern, Unsupported, get_mechanism
from regard.integrations import collect_losses
from regard.integrations.transformers import attention_names

CAUSAL = torch.ones(9, 9, dtype=torch.bool).triu(1)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dtype=torch.float64, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def decoder():
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), 1).double().eval()


def both(model, *mechanism, **options):
    """The original model, and a copy with another mechanism."""
    regard.swap(swapped := copy.deepcopy(model), *mechanism, **options)
    return model, swapped


def padding():
    missing = torch.zeros(3, 9, dtype=torch.bool)
    missing[1, 6:] = True
    missing[2, [0, 4]] = True
    return missing


def random_pairs():
    hidden = torch.rand(9, 9) > 0.6
    hidden.fill_diagonal_(False)
    return hidden


MASKS = {
    "none": dict,
    "causal": lambda: {"mask": CAUSAL},
    "causal in scores": lambda: {"mask": nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)},
    "causal with its hint": lambda: {"mask": CAUSAL, "is_causal": True},
    "padding": lambda: {"src_key_padding_mask": padding()},
    "pairs": lambda: {"mask": random_pairs()},
    "scores": lambda: {"mask": random(9, 9)},
    "scores for each head": lambda: {"mask": random(12, 9, 9)},
    "causal and padding": lambda: {"mask": CAUSAL, "src_key_padding_mask": padding()},
    "scores and padding": lambda: {"mask": random(9, 9), "src_key_padding_mask": padding()},
}


def quietly(function, *args, **options):
    """Call without warnings: torch deprecates masks of two dtypes, but its own modules pass them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_swapped_to_softmax_stays_equal(mask, norm_first):
    model = encoder(norm_first=norm_first)
    swapped = copy.deepcopy(model)
    report = regard.swap(swapped, "softmax")
    assert list(report.changed) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert report.learned == []
    x, given = random(3, 9, 16), MASKS[mask]()
    with torch.no_grad():
        found, expected = quietly(swapped, x, **given), quietly(model, x, **given)
    seen = ~expected.isnan().any(-1)  # torch gives NaN for a query that sees nothing
    if "padding" in mask:
        seen &= ~padding()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-12, rtol=1e-10)


def test_scores_that_are_almost_only_causal_leave_a_window_that_looks_back():
    _, model = both(nn.ModuleList([nn.MultiheadAttention(16, 4, batch_first=True)]).double(), "local:window=3")
    x, hidden = random(2, 9, 16), torch.zeros(9, 9, dtype=torch.float64).masked_fill(CAUSAL, -torch.inf)
    expected, _ = model[0](x, x, x, attn_mask=hidden)
    torch.testing.assert_close(model[0](x, x, x, attn_mask=hidden + 1e-12)[0], expected)


def test_the_fused_and_packed_paths_of_an_encoder_are_left():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model, swapped = both(nn.TransformerEncoder(layer, 2).eval(), "linear")
    x = torch.randn(3, 9, 16)
    with torch.no_grad():
        found = quietly(swapped, x, src_key_padding_mask=padding())
        assert not torch.allclose(found[0], quietly(model, x, src_key_padding_mask=padding())[0], atol=1e-4)
        torch.testing.assert_close(found[0], swapped(x[:1])[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("average", "pattern"), [(True, "noncausal-cross"), (False, None)])
def test_a_single_module_gives_what_torch_gives(batch_first, average, pattern):
    module = nn.MultiheadAttention(16, 4, batch_first=batch_first, kdim=6, vdim=6).double()
    _, swapped = both(nn.ModuleDict({"attend": module}), "softmax", pattern=pattern)
    q, m = random(2, 5, 16), random(2, 7, 6)
    if not batch_first:
        q, m = q.transpose(0, 1), m.transpose(0, 1)
    missing = torch.arange(7) >= torch.tensor([[5], [7]])
    options = {"key_padding_mask": missing, "average_attn_weights": average}
    torch.testing.assert_close(swapped["attend"](q, m, m, **options), module(q, m, m, **options))
    one = [x[0] if batch_first else x[:, 0] for x in (q, m, m)]
    torch.testing.assert_close(swapped["attend"](*one)[0], module(*one)[0])


def test_state_dicts_keep_their_names():
    model, swapped = both(encoder(), "softmax")
    assert swapped.state_dict().keys() == model.state_dict().keys()
    report = regard.swap(model, "gated_linear")
    assert set(report.learned) == set(model.state_dict()) - set(swapped.state_dict())
    assert "new, untrained parameters: layers.0.self_attn.attend" in str(report)


@pytest.mark.parametrize("mask", ["none", "causal", "causal with its hint", "pairs", "scores"])
def test_a_transformer_is_swapped_by_the_place_of_each_module_and_stays_equal_with_softmax(mask):
    model = nn.Transformer(16, 4, 1, 1, 32, batch_first=True, dtype=torch.float64).eval()
    source, target = random(3, 5, 16), random(3, 9, 16)
    given = {f"tgt_{name}": value for name, value in MASKS[mask]().items()}
    with torch.no_grad():
        expected = model(source, target, **given)
        assert regard.swap(model, "softmax").changed == {
            "encoder.layers.0.self_attn": "MultiheadAttention, softmax, noncausal-self",
            "decoder.layers.0.self_attn": "MultiheadAttention, softmax, causal-self",
            "decoder.layers.0.multihead_attn": "MultiheadAttention, softmax, causal-cross",
        }
        torch.testing.assert_close(model(source, target, **given), expected)


def test_a_target_without_a_mask_is_read_both_ways_or_refused_by_what_is_learned_for_one():
    model, both_ways = both(decoder(), "linear", pattern="noncausal-self", only="*.self_attn")
    x, memory = random(3, 9, 16), random(3, 5, 16)
    regard.swap(model, {"*.self_attn": "linear", "*": "softmax"})
    assert not torch.equal(model(x, memory)[:, 0], model(x, memory, tgt_mask=CAUSAL)[:, 0])
    assert torch.equal(both_ways.layers[0].self_attn(x, x, x)[0], model.layers[0].self_attn(x, x, x)[0])
    regard.swap(model, "long_short", only="*.self_attn")
    with pytest.raises(Unsupported, match="learned parts are made for causal-self"):
        model(x, memory)


def test_a_mechanism_whose_queries_see_later_ones_reads_memory_in_a_decoder_only_where_it_is_asked_to():
    model = decoder()
    with pytest.raises(Unsupported, match=r"flow_attention in the pattern causal-cross .*; try noncausal-cross"):
        regard.swap(model, "flow_attention", only="*.multihead_attn")
    report = regard.swap(model, "flow_attention", pattern="noncausal-cross", only="*.multihead_attn")
    assert all("noncausal-cross" in told for told in report.changed.values())


@pytest.mark.parametrize("mask", ["none", "causal and padding"])
def test_unswap_gives_back_what_was_there_and_a_second_swap_is_as_the_first(mask):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2).eval()
    (before, once), names = both(copy.deepcopy(model), "softmax"), list(model.state_dict())
    x, given = random(3, 9, 16), MASKS[mask]()
    regard.swap(model, "gated_linear")
    regard.swap(model, "softmax")
    with torch.no_grad():
        assert torch.equal(*(quietly(m, x, **given).nan_to_num() for m in (model, once)))
        assert list(regard.unswap(model, only="layers.1.*").changed) == ["layers.1.self_attn"]
        assert not model.use_nested_tensor
        regard.unswap(model)
        assert torch.equal(*(quietly(m, x, **given).nan_to_num() for m in (model, before)))
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert model.use_nested_tensor and list(model.state_dict()) == names
    with pytest.raises(Unsupported, match="without swapped modules"):
        regard.unswap(model)


def test_unswap_keeps_what_was_trained_and_where_it_is():
    model = encoder()
    regard.swap(model, "gated_linear")
    model.float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    regard.unswap(copied := copy.deepcopy(model))
    for name, parameter in copied.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert all(module.training for module in copied.modules())
    assert copied.layers[0].self_attn.in_proj_weight.dtype == torch.float32


def test_paths_choose_mechanisms_and_the_first_that_matches_decides():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 3, enable_nested_tensor=False)
    swapped = copy.deepcopy(model)
    report = regard.swap(swapped, {"layers.0.*": None, "*.1.*": "local:window=3", "*": "linear"})
    assert report.kept == ["layers.0.self_attn"]
    assert [what.split(", ")[1] for what in report.changed.values()] == ["local", "linear"]
    assert swapped.layers[1].self_attn.attend.config.window == 3
    by_hand = copy.deepcopy(model)
    regard.swap(by_hand, "linear", only="layers.2.*")
    regard.swap(by_hand, "local", only="layers.1.*", window=3)
    x = torch.randn(9, 2, 16)
    assert torch.equal(swapped.eval()(x), by_hand.eval()(x))


TRAINED = [
    (name, pattern)
    for name in attention_names()
    for pattern in ("noncausal-self", "causal-self")
    if pattern in regard.get_mechanism(name).patterns
]


@pytest.mark.parametrize(("name", "pattern"), TRAINED)
def test_swapped_to_any_mechanism_an_encoder_trains_with_all_that_it_learns(name, pattern):
    model = encoder(dropout=0.0).float().train()
    learned = regard.swap(model, name, pattern=pattern).learned
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1) if pattern == "causal-self" else None
    x, optimizer, losses = torch.randn(2, 12, 16), torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(6):
        with collect_losses(model) as collected:
            loss = (model(x, mask=mask) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        (loss + collected.total()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert set(learned) <= set(gradients) and all(g.isfinite().all() for g in gradients.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "name", [name for name in attention_names() if Pattern.NONCAUSAL_SELF in get_mechanism(name).patterns]
)
def test_padding_has_no_effect_after_a_swap(name):
    model = encoder()
    regard.swap(model, name)
    x, there = random(3, 9, 16), ~padding()
    with torch.no_grad():
        found = quietly(model, x, src_key_padding_mask=padding())
        for row in (1, 2):
            torch.testing.assert_close(found[row][there[row]], model(x[row][there[row]][None])[0])


@pytest.mark.parametrize("name", ["softmax", "agent", "long_short"])
def test_dropout_of_weights_reaches_mechanisms_whose_projection_mixes_tokens_too(name):
    torch.manual_seed(0)
    module = nn.ModuleList([nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True, dtype=torch.float64)])
    regard.swap(module, name)
    x = random(2, 9, 16)

    def run():
        return module[0](x, x, x, need_weights=False)[0]

    module.eval()
    assert torch.equal(run(), run())
    module.train()
    assert not torch.equal(run(), run())


@pytest.mark.parametrize("name", ["agent", "sea", "long_short"])
def test_what_is_learned_for_one_pattern_refuses_a_mask_of_another_with_the_swap_that_takes_it(name):
    model = encoder()
    regard.swap(model, name)
    x = random(3, 9, 16)
    with pytest.raises(Unsupported, match="learned parts are made for noncausal-self") as caught:
        model(x, mask=CAUSAL)
    with pytest.raises(Unsupported, match="a mask of pairs that is neither causality nor missing keys"):
        model(x, mask=random_pairs())
    again = encoder()
    assert caught.value.nearest == 'regard.swap(..., pattern="causal-self")'
    regard.swap(again, name, pattern="causal-self")
    assert again(x, mask=CAUSAL).isfinite().all()


REFUSED = [
    ("mamba", {}, "is a mixer"),
    ("aaren", {}, "learns its own query"),
    ("reformer", {}, "takes no keys and would drop"),
    ("synthesizer", {}, "takes no queries and no keys and would drop"),
    ("landmark", {}, "inserts tokens"),
    ("low_rank_pooling", {}, "is a pooling"),
    ({"*": ("mixture_of_heads", {"mechanism": "aaren"})}, {}, "learns its own query"),
    ({"*": ("mixture_of_heads", {"compute": "gather", "mechanism": "linear"})}, {}, 'compute="gather" with linear'),
    ("mixture_of_heads", {"active_heads": 9}, "active_heads=9 of 3 routed heads"),
    ("softmx", {}, "did you mean|try softmax"),
    ("local", {"widow": 3}, "option 'widow'"),
    ("local", {"pattern": "noncausal-cross"}, "noncausal-cross"),
    (3, {}, "mechanism 3"),
    ({"layer.0.*": "linear", "*": None}, {}, "'layer.0.*'.*chooses no attention module"),
    ({"*": 3}, {}, "3 for a module"),
    ({"*": "linear*2+local"}, {}, "one mechanism"),
    ({"*": ("local", {"widow": 3})}, {}, "option 'widow'"),
    ({"*": None}, {}, "chooses no attention module"),
    ({"*": "local"}, {"window": 3}, "window together with a mapping"),
]


@pytest.mark.parametrize(("mechanism", "options", "told"), REFUSED, ids=[told for *_, told in REFUSED])
def test_what_cannot_be_swapped_to_is_refused_with_the_reason_before_any_change(mechanism, options, told):
    model = encoder()
    with pytest.raises(Unsupported, match=told):
        regard.swap(model, mechanism, **options)
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in model.layers)


def test_nothing_is_changed_when_one_module_is_unsafe():
    model = nn.ModuleList([nn.MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4, add_zero_attn=True)])
    with pytest.raises(Unsupported, match=r"1: .*MultiheadAttention with learned or zero keys"):
        regard.swap(model, "softmax")
    assert isinstance(model[0], nn.MultiheadAttention)
    report = regard.swap(model, "softmax", only="0")
    assert (list(report.changed), report.kept) == (["0"], ["1"])


def test_models_without_attention_are_refused():
    with pytest.raises(Unsupported, match="without attention modules that are known"):
        regard.swap(nn.Linear(3, 3), "softmax")
    with pytest.raises(Unsupported, match=r"attention in a str; .*try swap\(model"):
        regard.swap("linear", encoder())
    with pytest.raises(Unsupported, match="itself the attention module"):
        regard.swap(nn.MultiheadAttention(16, 4), "softmax")


def test_a_swapped_encoder_compiles_whole():
    _, model = both(encoder(), "softmax")
    x = random(2, 9, 16)
    compiled = torch.compile(model, fullgraph=True, backend=GRAPH)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


class TestVision:
    """Swaps in timm's Vision Transformer."""

    def model(self, **options):
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
        return pytest.importorskip("timm").create_model("vit_tiny_patch16_224", **sizes, **options).eval()

    def test_it_stays_equal_with_softmax_and_is_given_back_by_unswap(self):
        model = self.model(qk_norm=True)
        before, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
        assert list(regard.swap(model, "softmax").changed) == ["blocks.0.attn", "blocks.1.attn"]
        torch.testing.assert_close(model(x), before(x), atol=1e-5, rtol=1e-5)
        assert model.state_dict().keys() == before.state_dict().keys()
        regard.swap(model, "agent")
        regard.unswap(model)
        assert torch.equal(model(x), before(x))
        assert model.state_dict().keys() == before.state_dict().keys()
        assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]

    @pytest.mark.parametrize("before", [0, 1])
    def test_mechanisms_that_lay_tokens_out_refuse_other_tokens_than_those_of_the_grid(self, before):
        model = self.model(class_token=before == 1, global_pool="avg").double()
        regard.swap(model, "agent")
        with pytest.raises(Unsupported, match=f"12 tokens of a grid of 4 x 4 and {before} before it"):
            model.blocks[0].attn(random(2, 12, 32))

    def test_tokens_are_laid_out_only_in_models_that_keep_their_grid(self):
        model = pytest.importorskip("timm").create_model("pit_ti_224", img_size=32, num_classes=4).eval()
        for name in ("agent", "longformer", "kernelized_rpe"):
            with pytest.raises(Unsupported, match="in a PoolingVisionTransformer, which does not say how"):
                regard.swap(model, name)
        regard.swap(model, "bilevel_routing")
        assert model(torch.randn(1, 3, 32, 32)).isfinite().all()

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("swin_tiny_patch4_window7_224", "windows of tokens"),
            ("swinv2_tiny_window8_256", "cosines of windows"),
            ("beit_base_patch16_224", "a learned bias for each offset"),
            ("eva02_tiny_patch14_224", "rotary positions"),
            ("vit_relpos_small_patch16_224", "a learned bias for each offset"),
        ],
    )
    def test_attention_that_does_more_is_refused(self, name, told):
        timm = pytest.importorskip("timm")
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises(Unsupported, match=f"computes more than attention: {told}") as refusal:
            regard.swap(model, "softmax")
        assert str(refusal.value).count(told) == str(refusal.value).count("not supported") == 1
        assert "blocks.0.attn, " in str(refusal.value) and " more: " in str(refusal.value)
