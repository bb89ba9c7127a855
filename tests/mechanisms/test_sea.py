"""What is peculiar to SEA: budgets, pixels, the gathered form, the mean, the loss, and the estimator of a layer."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import regard
import regard.mechanisms.sea as sea
from regard.contract import Call, Context, Mask, Pattern, Unsupported
from regard.create import create_layer
from regard.functional import sea_attention
from regard.layers.attention_map import CausalMap, NoncausalMap, orthogonal_features, softmax_features
from regard.layers.parts import LayerCall
from regard.mechanisms.sea import Config
from regard.training import peak_memory

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
PATTERNS = ["noncausal-self", "causal-self", "noncausal-cross", "causal-cross"]
WANT_STATE = Context(want=frozenset({"state"}))
WEIGHTS = frozenset({"weights"})


def sample(n=24, m=None, *, batch=2, heads=3, groups=None, d=4, v=5, pixels=8):
    m = n if m is None else m
    groups = heads if groups is None else groups
    shapes = ((heads, n, d), (groups, m, d), (groups, m, v), (heads, n, pixels), (heads, n), (heads, n))
    return [torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes]


def masked_softmax(q, k, v, visible):
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


@pytest.fixture
def gathering(monkeypatch):
    """The gathered form, whatever it costs."""
    monkeypatch.setattr(sea, "DENSE_ADVANTAGE", 0)


@pytest.mark.parametrize(("top_k", "heads", "pixels"), [(8, 4, 64), (4, 2, 32), (8, 1, 32)])
def test_a_query_reads_top_k_keys_a_head_on_average(top_k, heads, pixels):
    q, k, v, e, _, _ = sample(64, batch=16, heads=heads, pixels=pixels)
    weights = sea_attention(q, k, v, e, top_k=top_k, want=WEIGHTS).extras["weights"]
    read = (weights > 0).double().sum(-1).mean((0, 1))
    for t in (0, 1, 7, 15, 31, 63):
        expected = min(top_k, t + 1)
        assert float(read[t]) == pytest.approx(expected, abs=0 if t < 2 else 0.12 * expected + 0.1)


def test_heads_of_a_row_share_one_budget():
    q, k, v, e, _, _ = sample(32, heads=2, pixels=32)
    e[:, 0] *= 0.01
    weights = sea_attention(q, k, v, e, pattern="noncausal-self", top_k=4, want=WEIGHTS).extras["weights"]
    read = (weights > 0).sum(-1)
    assert (read.sum(1) == 8).all()
    assert (read[:, 0] != read[:, 1]).any()
    alone = sea_attention(q, k, v, e, pattern="noncausal-self", top_k=4, grouping="query", want=WEIGHTS)
    assert ((alone.extras["weights"] > 0).sum(-1) == 4).all()


def test_budgets_of_a_whole_head_and_of_a_whole_map():
    q, k, v, e, _, _ = sample(32, heads=2, pixels=32)
    call = {"pattern": "noncausal-self", "top_k": 4, "want": WEIGHTS}
    by_head = sea_attention(q, k, v, e, grouping="head", **call).extras["weights"] > 0
    assert (by_head.sum((-1, -2)) == 32 * 4).all()
    assert (by_head.sum(-1) != 4).any()
    whole = sea_attention(q, k, v, e, grouping="batch", **call).extras["weights"] > 0
    assert (whole.sum((-1, -2, -3)) == 2 * 32 * 4).all()
    assert (whole.sum((-1, -2)) != 32 * 4).any()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("gathered", [False, True])
def test_with_all_pixels_kept_it_is_softmax_attention(pattern, gathered, monkeypatch):
    monkeypatch.setattr(sea, "DENSE_ADVANTAGE", 0 if gathered else math.inf)
    q, k, v, e, a, _ = sample()
    open_gates = torch.full_like(a, 40.0)
    found = sea_attention(q, k, v, e, open_gates, open_gates, pattern=pattern, top_k=24)
    visible = torch.ones(24, 24, dtype=torch.bool)
    visible = visible.tril() if pattern == "causal-self" else visible
    torch.testing.assert_close(found, masked_softmax(q, k, v, visible), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", ["causal-self", "causal-cross", "noncausal-cross"])
def test_a_closed_gate_gives_the_mean_of_what_is_seen(pattern):
    q, k, v, e, a, b = sample()
    found = sea_attention(q, k, v, e, a, torch.full_like(b, -800.0), pattern=pattern)
    mean = v.cumsum(2) / torch.arange(1, 25)[:, None] if pattern == "causal-self" else v.mean(2, keepdim=True)
    torch.testing.assert_close(found, mean.expand_as(found), rtol=0, atol=1e-13)


def test_the_noncausal_mean_weighs_values_by_the_mean_map():
    q, k, v, e, a, b = sample(24, pixels=8)
    found = sea_attention(q, k, v, e, a, torch.full_like(b, -800.0), pattern="noncausal-self")
    stretched = e.softmax(-1).mean(2).repeat_interleave(3, -1)  # three tokens a pixel
    torch.testing.assert_close(found, (stretched[:, :, None] @ v).expand_as(found), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("n", "valid", "pixels"), [(40, 40, 8), (37, 37, 8), (16, 16, 16), (37, 29, 4)])
def test_the_map_resized_to_tokens_has_its_largest_weight_in_the_region_of_the_largest_pixel(n, valid, pixels):
    """All queries have one row of the map, and values are one-hot: a closed gate gives that row, as wide as the tokens."""
    q, k, _, e, a, b = sample(n, heads=3, pixels=pixels)
    e = e[:, :, :1].expand_as(e)
    v = torch.eye(n, dtype=torch.float64).expand(2, 3, -1, -1)
    mask = Mask(lengths=torch.tensor([valid, valid]))
    call = {"pattern": "noncausal-self", "mask": mask}
    resized = sea_attention(q, k, v, e, a, torch.full_like(b, -800.0), **call)[:, :, 0]
    largest = e[:, :, 0].argmax(-1)
    centre = (resized.argmax(-1) + 0.5) * pixels / valid
    assert ((largest <= centre) & (centre <= largest + 1)).all()
    assert (resized[..., valid:] == 0).all()


@pytest.mark.parametrize("n", [7, 8])
def test_the_noncausal_map_stretched_to_the_queries_has_the_same_largest_pixels(n):
    x = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    x[..., :-1, :] += 9 * F.one_hot(torch.randint(16, (2, 3, 1)), 16)  # rows that agree, beside noise
    found = NoncausalMap._stretch(x, n, None)
    assert (found.argmax(-1)[..., : n - 1] == x.argmax(-1)[..., : n - 1]).all()
    hot = F.one_hot(torch.arange(8), 8).double().view(1, 1, 8, 8)  # row r is hot in pixel r
    peaks = NoncausalMap._stretch(hot, n, None).argmax(-2)[0, 0]
    region = (torch.arange(8) * n) // 8, ((torch.arange(8) + 1) * n - 1) // 8
    assert ((region[0] <= peaks) & (peaks <= region[1])).all()


def test_as_many_pixels_as_tokens_are_the_tokens():
    keys = torch.arange(16)[None]
    pixel, visible = sea._pixels(keys, torch.tensor([[16, 5]]), 16)
    assert pixel[0, 0].tolist() == list(range(16))
    assert visible[0].sum(-1).tolist() == [16, 5]


@pytest.mark.parametrize("pixels", [1, 4, 7, 32])
def test_first_tokens_of_pixels_invert_the_pixels_of_tokens(pixels):
    totals = torch.arange(0, 70)[None]
    first = sea._first_tokens(totals, pixels)[0]
    pixel, visible = sea._pixels(torch.arange(70)[None], totals, pixels)
    for n in range(70):
        counted = torch.bincount(pixel[0, n][visible[0, n]], minlength=pixels)
        assert first[n].diff().tolist() == counted.tolist()
        formula = [min(max(math.floor((j + 0.5) / n * pixels - 1e-4), 0), pixels - 1) for j in range(n)]
        assert pixel[0, n][:n].tolist() == formula


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "options", [{}, {"grouping": "query"}, {"oversample": 2.5, "top_k": 2}], ids=["row", "query", "oversample"]
)
@pytest.mark.parametrize(("numbers", "pixels"), [(1 << 22, 8), (1 << 22, 40), (500, 8)])
def test_the_gathered_form_equals_masked_products_with_gradients(pattern, options, numbers, pixels, monkeypatch):
    inputs = [x.requires_grad_() for x in sample(30, 37, heads=4, groups=2, pixels=pixels)]
    if pattern == "noncausal-self":
        inputs = [x.requires_grad_() for x in sample(37, heads=4, groups=2, pixels=pixels)]
    options = {"pattern": pattern, "top_k": 3, **options}
    found = []
    for advantage, size in ((math.inf, 1 << 22), (0, numbers)):
        monkeypatch.setattr(sea, "DENSE_ADVANTAGE", advantage)
        monkeypatch.setattr(sea, "NUMBERS_AT_ONCE", size)
        output = sea_attention(*inputs, **options)
        found.append((output, *torch.autograd.grad(output.square().sum(), inputs, allow_unused=True)))
    for dense, gathered in zip(*found, strict=True):
        assert (dense is None) == (gathered is None)
        if dense is not None:
            torch.testing.assert_close(gathered, dense, rtol=0, atol=1e-11)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("top_k", "pixels", "oversample"), [(7, 128, 1.0), (64, 16, 1.0), (1, 5, 1.7), (3, 64, 2.0)])
@pytest.mark.parametrize("grouping", ["row", "query"])
def test_no_query_reads_more_than_the_bound(heads, top_k, pixels, oversample, grouping):
    config = Config(top_k=top_k, oversample=oversample, grouping=grouping)
    totals = torch.arange(1, 400)[None]
    estimate = 3 * torch.randn(1, heads, 399, pixels)
    kept = sea._kept(config, estimate, totals, None)
    read = (sea._first_tokens(totals, pixels).diff(dim=-1)[:, None] * kept).sum((1, 3))[0]
    for fewest, most in ((1, 399), (1, 40), (100, 399), (399, 399)):
        assert int(read[fewest - 1 : most].max()) <= sea._most_read(config, heads, pixels, fewest, most)


def test_memory_grows_with_the_length_not_its_square(monkeypatch):
    def peak(n):
        q, k, v, e, a, b = (x.float() for x in sample(n, batch=1, heads=2, d=4, v=4, pixels=16))
        return peak_memory(lambda: sea_attention(q, k, v, e, a, b, top_k=2)).bytes

    monkeypatch.setattr(sea, "NUMBERS_AT_ONCE", 1 << 18)
    assert peak(3000) < 2.5 * peak(1500)


def test_oversampling_keeps_the_number_of_keys():
    q, k, v, e, _, _ = sample(96, batch=8, pixels=12)
    for oversample in (1.0, 2.0, 3.0):
        found = sea_attention(q, k, v, e, pattern="noncausal-self", top_k=8, oversample=oversample, want=WEIGHTS)
        assert float((found.extras["weights"] > 0).double().sum(-1).mean()) == pytest.approx(8, rel=0.1)


def test_the_selection_has_no_gradient():
    q, k, v, e, a, b = sample()
    e.requires_grad_()
    q.requires_grad_()
    output = sea_attention(q, k, v, e, a, b, top_k=2)
    assert torch.autograd.grad(output.sum(), [q, e], allow_unused=True)[1] is None


def test_inputs_stay_as_they_were():
    inputs = sample()
    before = [x.clone() for x in inputs]
    sea_attention(*inputs, pattern="noncausal-self", mask=Mask(lengths=torch.tensor([24, 9])))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_weights_times_values_are_the_output_without_the_mean():
    q, k, v, e, a, _ = sample()
    found = sea_attention(q, k, v, e, a, top_k=3, want=WEIGHTS)
    torch.testing.assert_close(found.extras["weights"] @ v, found.output, rtol=0, atol=1e-13)
    sums = found.extras["weights"].sum(-1)
    read = (found.extras["weights"] > 0).any(-1)
    torch.testing.assert_close(sums, torch.where(read, a.sigmoid(), 0), rtol=0, atol=1e-13)


def dense_sums(teacher, q, k, e, pattern, exact_too):
    """KL and squared differences of one row, with everything as wide as the tokens."""
    n, pixels = e.shape[1:]
    kl, squares = 0.0, 0.0
    for t in range(n):
        seen = t + 1 if pattern == "causal-self" else k.shape[1]
        places = [min(max(math.floor((j + 0.5) / seen * pixels - 1e-4), 0), pixels - 1) for j in range(seen)]
        exact = (k[:, :seen] @ q[:, t, :, None])[..., 0] * q.shape[-1] ** -0.5
        p = teacher[:, t, :seen]
        for scores in (e[:, t][:, places], exact) if exact_too else (e[:, t][:, places],):
            kl = kl + F.kl_div(scores.log_softmax(-1), p, reduction="sum")
            squares = squares + (scores.softmax(-1) - p).square().sum()
    return kl, squares


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self", "noncausal-cross"])
@pytest.mark.parametrize("numbers", [1 << 22, 100])
def test_the_loss_is_that_of_the_paper(pattern, numbers, monkeypatch):
    monkeypatch.setattr(sea, "NUMBERS_AT_ONCE", numbers)
    q, k, v, e, a, b = sample(13, 13, batch=1)
    k.requires_grad_()
    e.requires_grad_()
    scores = torch.randn(1, 3, 13, 13, dtype=torch.float64)
    if pattern == "causal-self":
        scores = scores.masked_fill(~torch.ones(13, 13, dtype=torch.bool).tril(), -torch.inf)
    teacher = {"weights": scores.softmax(-1), "output": torch.randn(1, 3, 13, 5, dtype=torch.float64)}
    result = sea_attention(q, k, v, e, a, b, pattern=pattern, teacher=teacher)
    found, count = result.losses["distillation"]
    kl, squares = dense_sums(teacher["weights"][0], q[0], k[0], e[0], pattern, True)
    apart = (result.output - teacher["output"]).square().mean()
    expected = 0.1 * kl / (13 if pattern == "noncausal-self" else 3 * 13) + squares / (3 * 13 * 13) + apart
    assert int(count) == 1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, [k, e], retain_graph=True) for loss in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_loss_counts_neither_padding_nor_queries_without_keys():
    q, k, v, e, a, b = sample(11)
    scores = torch.randn(2, 3, 11, 11, dtype=torch.float64)
    scores[1, :, :, 6:] = -torch.inf
    teacher = {"weights": scores.softmax(-1)}
    mask = Mask(lengths=torch.tensor([11, 6]))
    call = {"pattern": "noncausal-self", "teacher": teacher}
    found = sea_attention(q, k, v, e, a, b, mask=mask, **call).losses["distillation"][0]
    kl, squares = 0.0, 0.0
    for row, n in ((0, 11), (1, 6)):
        own = [x[row, :, :n] for x in (q, k, e)]
        more = dense_sums(teacher["weights"][row, :, :n, :n], *own, "noncausal-self", True)
        kl, squares = kl + more[0], squares + more[1]
    torch.testing.assert_close(found, 0.1 * kl / 17 + squares / (3 * (121 + 36)), rtol=1e-12, atol=0)
    empty = sea_attention(q, k, v, e, a, b, mask=Mask(lengths=torch.tensor([0, 0])), **call).losses["distillation"]
    assert [float(x) for x in empty] == [0.0, 0.0]


def test_the_loss_is_zero_where_the_student_equals_the_teacher():
    q, k, v, _, _, _ = sample(12)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    teacher = {"weights": scores.softmax(-1), "output": scores.softmax(-1) @ v}
    result = sea_attention(q, k, v, scores, pattern="noncausal-self", top_k=12, teacher=teacher)
    assert float(result.losses["distillation"][0]) == pytest.approx(0.0, abs=1e-13)


def test_without_a_teacher_the_map_learns_from_the_exact_scores():
    q, k, v, e, _, _ = sample(12, batch=1)
    q.requires_grad_()
    e.requires_grad_()
    result = sea_attention(q, k, v, e, training=True, jitter=0.0)
    own = (q @ k.mT * 0.5).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf).softmax(-1).detach()
    loss = result.losses["distillation"][0]
    kl, squares = dense_sums(own[0], q[0], k[0], e[0], "causal-self", False)
    torch.testing.assert_close(loss, 0.1 * kl / (3 * 12) + squares / (3 * 144), rtol=1e-12, atol=0)
    assert torch.autograd.grad(loss, [q, e], allow_unused=True)[0] is None
    for call in ({}, {"training": True, "self_teacher": False}):
        assert not sea_attention(q, k, v, e, return_state=True, **call).losses


@pytest.mark.parametrize("numbers", [1, 1 << 30])
@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
def test_it_trains_under_autocast(pattern, numbers, monkeypatch):
    monkeypatch.setattr(sea, "NUMBERS_AT_ONCE", numbers)
    torch.manual_seed(0)
    layer = create_layer("sea", 32, 2, pattern=pattern)
    x = torch.randn(2, 20, 32)

    def run():
        total, count = layer(x).losses["distillation"]
        loss = total / count
        return loss, torch.autograd.grad(loss, [p for p in layer.parameters() if p.requires_grad], allow_unused=True)

    exact, gradients = run()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, found = run()
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)
    assert all(bool(g.isfinite().all()) for g in found if g is not None)
    assert [g is None for g in found] == [g is None for g in gradients]


def test_jitter_moves_tokens_in_training_only_and_repeats_with_the_generator():
    inputs = sample(40, pixels=8)
    plain = sea_attention(*inputs, top_k=2)
    torch.testing.assert_close(sea_attention(*inputs, top_k=2, jitter=1.0), plain)

    def trained(jitter, seed=0):
        rng = torch.Generator().manual_seed(seed)
        return sea_attention(*inputs, top_k=2, training=True, jitter=jitter, generator=rng).output

    torch.testing.assert_close(trained(0.0), plain)
    assert torch.equal(trained(1.0), trained(1.0))
    assert not torch.allclose(trained(1.0), plain)
    changed = sum(not torch.allclose(trained(0.1, seed), plain) for seed in range(60))
    assert 0 < changed < 20


def test_states_of_unequal_rows_read_the_right_keys(gathering):
    """Rows that advance unequally leave empty slots in the cache, so that slots are not ranks."""
    whole = sample(20)
    expected = sea_attention(*whole, top_k=2)
    counts, done, state = ((5, 1), (0, 6), (15, 13)), torch.zeros(2, dtype=torch.long), None
    for advance in counts:
        width = max(advance)
        part = [torch.zeros(*x.shape[:2], width, *x.shape[3:]).double() for x in whole]
        for row, count in enumerate(advance):
            for to, x in zip(part, whole, strict=True):
                to[row, :, :count] = x[row, :, int(done[row]) : int(done[row]) + count]
        result = sea_attention(*part, top_k=2, mask=Mask(lengths=torch.tensor(advance)), state=state, return_state=True)
        for row, count in enumerate(advance):
            at = int(done[row])
            torch.testing.assert_close(
                result.output[row, :, :count], expected[row, :, at : at + count], rtol=0, atol=1e-12
            )
        state, done = result.state, done + torch.tensor(advance)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"top_k": 0}, "top_k"),
        ({"oversample": 0.5}, "oversample"),
        ({"oversample": math.inf}, "oversample"),
        ({"grouping": "rows"}, "row"),
        ({"estimator": "mlp"}, "cnn"),
        ({"kernel": "elu"}, "performer"),
        ({"feature_divisor": 0.0}, "feature_divisor"),
        ({"jitter": 1.5}, "jitter"),
        ({"redraw_every": -1}, "redraw_every"),
        ({"length": 0}, "length"),
        ({"estimate_length": 0}, "estimate_length"),
    ],
)
def test_bad_options_are_refused(options, told):
    with pytest.raises(Unsupported, match=told):
        Config(**options)


def test_what_cannot_be_is_refused():
    q, k, v, e, _, _ = sample()
    for grouping in ("head", "batch"):
        with pytest.raises(Unsupported, match="depend on others"):
            sea_attention(q, k, v, e, grouping=grouping)
    for teacher in ({}, {"weights": torch.zeros(2, 3, 4, 4)}, torch.zeros(2, 3, 24, 24), {"scores": e}):
        with pytest.raises(Unsupported, match="teacher"):
            sea_attention(q, k, v, e, teacher=teacher)
    with pytest.raises(Unsupported, match="no pixels"):
        sea_attention(q, k, v, e[..., :0])
    state = sea_attention(q, k, v, e, return_state=True).state
    with pytest.raises(Unsupported, match="precede"):
        sea_attention(q, k[:, :, :2], v[:, :, :2], e, state=state)
    with pytest.raises(Unsupported, match="multiple of 4"):
        create_layer("sea", 16, 2, estimate_length=30)
    with pytest.raises(Unsupported, match="multiple of 16"):
        create_layer("sea", 16, 2, estimate_length=40, estimator="codebook")
    with pytest.raises(Unsupported, match="cosformer"):
        create_layer("sea", 16, 2, pattern="causal-cross", kernel="cosformer")


def layer(pattern="causal-self", **options):
    options = {"estimate_length": 32, "top_k": 3, **options}
    return create_layer("sea", 16, 2, pattern=pattern, **options).double().eval()


VARIANTS = [
    {},
    {"estimator": "codebook"},
    {"joint_encoder": True},
    {"kernel": "cosformer"},
    {"row_scale": False},
    {"oversample": 2.0},
    {"grouping": "query"},
    {"num_kv_heads": 1, "value_dim": 6, "positions": "rotary"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_variant_decodes_as_it_reads(options):
    module, x = layer(**options), torch.randn(2, 21, 16, dtype=torch.float64)
    whole = module(x).output
    result = module(x[:, :9], context=WANT_STATE)
    outputs, state = [result.output], result.state
    for t in range(9, 21):
        y, state = module.step(x[:, t], state)
        outputs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_variant_has_a_noncausal_form_that_sees_no_padding(options):
    module, x = layer("noncausal-self", **options), torch.randn(2, 17, 16, dtype=torch.float64)
    found = module(x, context=Context(mask=Mask(lengths=torch.tensor([17, 8])))).output
    torch.testing.assert_close(found[1, :8], module(x[1:, :8]).output[0], rtol=0, atol=1e-12)
    assert not torch.allclose(module(x).output[1, :8], found[1, :8])


def test_decoding_in_single_precision_stays_with_the_whole_call():
    module, x = layer(estimate_length=64).float(), torch.randn(1, 160, 16)
    whole = module(x).output
    state, outputs = None, []
    for t in range(160):
        y, state = module.step(x[:, t], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=0, atol=1e-4)


def test_a_row_of_the_causal_map_sees_only_every_other_of_the_last_eight_queries():
    module = CausalMap(6, 2, 32).double()
    z = torch.randn(1, 2, 30, 6, dtype=torch.float64)
    before = module(z, None, module.start(z))[0]
    changed = z.clone()
    changed[:, :, 12] += 1
    after = module(changed, None, module.start(z))[0]
    rows = [t for t in range(30) if not torch.equal(before[:, :, t], after[:, :, t])]
    assert rows == [12, 14, 16, 18, 20]


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_the_noncausal_map_equals_the_layers_that_it_is_made_of(n):
    module = NoncausalMap(6, 2, 16).double()
    z = torch.randn(1, 2, n, 6, dtype=torch.float64)
    x = module.expand(z).unflatten(-1, (4, 8)).transpose(2, 3).reshape(1, 8, n, 8)
    x = F.conv2d(x, module.shrink.weight, module.shrink.bias, (2, 1), 1).relu()
    x = F.conv2d(x, module.mix.weight, module.mix.bias, 1, 1).relu()
    x = F.interpolate(x, scale_factor=(2, 1), mode="nearest")
    x = F.conv2d(x, module.merge.weight, module.merge.bias, 1, 1)
    expected = F.interpolate(x, size=(n, 16), mode="bilinear")
    found = module(z, None, ())[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    padded = F.pad(z, (0, 0, 0, 5), value=9.0)
    found = module(padded, torch.tensor([n]), ())[0][:, :, :n]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def heads_of(module, x):
    return {
        name: part(x).unflatten(-1, (2, -1)).transpose(1, 2)
        for name, part in (("q", module.query), ("k", module.key), ("v", module.value))
    }


def test_the_causal_context_is_linear_attention_over_values_and_positions():
    module, x = layer(), torch.randn(1, 9, 16, dtype=torch.float64)
    heads = heads_of(module, x)
    estimator = module.projection
    found, state = estimator._attend_causal(heads, None, None)
    phi = [(heads[n] * 8**-0.25 @ estimator.random_features.mT).relu() + 1e-3 for n in "qk"]
    values = torch.cat([estimator.positions[:9].expand(1, 2, 9, 8), heads["v"]], -1)
    weights = (phi[0] @ phi[1].mT).tril()
    expected = weights @ values / (weights.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert estimator.random_features.shape == (int(8 * math.log(8)), 8)
    assert state.memory.shape == (1, 2, 16, 17)


def test_the_noncausal_context_reads_values_and_smooth_positions_by_the_softmax_kernel():
    module, x = layer("noncausal-self"), torch.randn(1, 15, 16, dtype=torch.float64)
    heads, w = heads_of(module, x), module.projection.random_features
    phi = []
    for name, axes in (("q", (-1,)), ("k", (-1, -2))):
        scaled = heads[name] * 8**-0.25
        products = scaled @ w.mT
        norms = scaled.square().sum(-1, keepdim=True) / 2
        phi.append((products - products.amax(axes, keepdim=True) - norms).exp() + 1e-4)
    codes = F.interpolate(torch.eye(8).double()[None, None], size=(15, 8), mode="bilinear", align_corners=True)[0]
    values = torch.cat([codes.expand(1, 2, 15, 8), heads["v"]], -1)
    weights = phi[0] @ phi[1].mT
    expected = weights @ values / (weights.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(module.projection._attend_all(heads, None), expected, rtol=0, atol=1e-12)


def test_the_softmax_kernel_approaches_softmax():
    q, k = (0.5 * torch.randn(1, 2, 15, 8, dtype=torch.float64) for _ in range(2))
    everything = torch.ones(1, 1, 15, 1, dtype=torch.bool)
    phi_q, phi_k = softmax_features(q, k, orthogonal_features(8000, 8).double(), everything)
    weights = phi_q @ phi_k.mT
    weights, exact = weights / weights.sum(-1, keepdim=True), (q @ k.mT * 8**-0.5).softmax(-1)
    assert float((weights - exact).square().mean()) < 0.3 * float((exact - 1 / 15).square().mean())


def test_random_features_are_orthogonal_in_blocks():
    rows = orthogonal_features(19, 8, torch.Generator().manual_seed(1))
    assert rows.shape == (19, 8)
    for block in rows.split(8):
        directions = block / block.norm(dim=1, keepdim=True)
        torch.testing.assert_close(directions @ directions.mT, torch.eye(len(block)), rtol=0, atol=1e-5)


def test_random_features_are_saved_kept_in_evaluation_and_drawn_anew_in_training():
    module, x = layer(redraw_every=2).train(), torch.randn(1, 5, 16, dtype=torch.float64)
    drawn = [module.projection.random_features.clone()]
    for _ in range(4):
        module(x)
        drawn.append(module.projection.random_features.clone())
    assert [torch.equal(a, b) for a, b in pairwise(drawn)] == [True, False, True, False]
    module.eval()
    module(x), module(x)
    assert torch.equal(module.projection.random_features, drawn[-1])
    assert "projection.random_features" in module.state_dict()


def test_the_number_of_keys_may_change_after_training():
    trained, x = layer(top_k=2), torch.randn(1, 30, 16, dtype=torch.float64)
    more = layer(top_k=30)
    more.load_state_dict(trained.state_dict())
    softmax = create_layer("softmax", 16, 2).double()
    softmax.load_state_dict({n: t for n, t in trained.state_dict().items() if "projection" not in n})
    with torch.no_grad():
        for module in (trained, more):
            module.projection.gates.weight.zero_()
            module.projection.gates.bias.fill_(50.0)
    torch.testing.assert_close(more(x).output, softmax(x).output, rtol=0, atol=1e-12)
    assert not torch.allclose(trained(x).output, softmax(x).output)


def test_sequences_beyond_the_table_of_positions_are_refused():
    module, x = layer(length=8), torch.randn(1, 9, 16, dtype=torch.float64)
    with pytest.raises(Unsupported, match="length=8"):
        module(x)
    state = module(x[:, :6], context=WANT_STATE).state
    state = module(x[:, :2], state=state).state
    with pytest.raises(Unsupported, match="length=8"):
        module.step(x[:, 0], state)
    layer("noncausal-self", length=8)(x)


def test_every_part_of_the_estimator_learns_from_the_loss():
    module, x = layer().train(), torch.randn(1, 12, 16, dtype=torch.float64)
    total, count = module(x).losses["distillation"]
    (total / count).backward()
    for name, parameter in module.projection.named_parameters():
        if "gates" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_the_estimate_of_a_layer_finds_the_keys_that_its_scores_prefer():
    """Trained on its own scores alone, the map leads queries to keys of high weight, more than chance would."""
    torch.manual_seed(0)
    module = layer(estimate_length=32, top_k=4, jitter=0.0).float().train()
    optimizer = torch.optim.AdamW(module.projection.parameters(), lr=3e-3)
    x = torch.randn(8, 48, 16)
    with torch.no_grad():
        module.query.weight.mul_(3)
        module.key.weight.mul_(3)

    def covered():
        with torch.no_grad():
            heads = heads_of(module, x)
            full = Call(Pattern.CAUSAL_SELF, Config(top_k=10**6), 8**-0.5, want=WEIGHTS)
            inputs, _ = module.projection(heads, LayerCall(x, None, Context()))
            gates = {"estimate": inputs["estimate"]}
            weights = sea.parallel(full, **heads, **gates).extras["weights"]
            chosen = sea.parallel(full.replace(config=module.config), **heads, **gates).extras["weights"] > 0
            return float((weights * chosen).sum(-1)[:, :, 24:].mean())

    before = covered()
    for _ in range(60):
        optimizer.zero_grad()
        module(x).losses["distillation"][0].backward()
        optimizer.step()
    assert covered() > before + 0.05


def load(name):
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def close(found, expected, atol):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("causal", [True, False])
def test_the_context_equals_the_recorded_performer(causal):
    a = load("sea_performer_causal" if causal else "sea_performer_noncausal")
    leaves = [a[name].clone().requires_grad_() for name in "qkv"]
    if causal:
        phi = [(x * 8**-0.25 @ a["projection"].mT).relu() + 1e-3 for x in leaves[:2]]
        found = sea.linear_attention(*phi, leaves[2], sea.Estimator.RULE)[0]
    else:
        everything = torch.ones(1, 1, 13, 1, dtype=torch.bool)
        phi = softmax_features(leaves[0], leaves[1], a["projection"], everything)
        found = phi[0] @ (phi[1].mT @ leaves[2]) / (phi[0] @ phi[1].sum(2)[..., None])
    # the code adds 1e-6 to each sum of features rather than to the denominator
    close(found, a["out"], 1e-5 if causal else 1e-12)
    for gradient, name in zip(torch.autograd.grad((found * a["grad_out"]).sum(), leaves), "qkv", strict=True):
        close(gradient, a[f"grad_{name}"], 1e-5 if causal else 1e-12)


def official(name, causal):
    """A layer with the recorded weights, and what its estimator makes of the recorded heads."""
    a = load(name)
    pattern = "causal-self" if causal else "noncausal-self"
    over = 2.0 if "oversampled" in name else 1.0
    module = create_layer("sea", 16, 2, pattern=pattern, top_k=5, estimate_length=32, oversample=over, length=64).eval()
    given = {n.removeprefix("weight_"): x for n, x in a.items() if n.startswith("weight_")}
    names = {"encode.0": "enc_0", "encode.1": "enc_1", "map.expand": "dec_row_0", "gates": "dec_scaler_0"}
    if causal:
        names |= {
            "map.first_norm": "cnn_0_module",
            "map.convolutions.0": "cnn_1_module_net_0_module",
            "map.convolutions.1": "cnn_1_module_net_2_module",
            "map.merge": "cnn_1_module_net_5_module",
            "map.last_norm": "cnn_2_module",
        }
    else:
        names |= {"map.shrink": "cnn_0_net_0", "map.mix": "cnn_0_net_2", "map.merge": "cnn_0_net_5"}
    weights = {
        f"{own}.{part}": given[f"{theirs}_{part}"] for own, theirs in names.items() for part in ("weight", "bias")
    }
    for part in ("weight", "bias"):
        weights[f"gates.{part}"] = weights[f"gates.{part}"].flip(0)
        if causal:
            for i in range(2):  # the rows of the kernel that would see later queries are masked
                weights[f"map.convolutions.{i}.weight"] = weights[f"map.convolutions.{i}.weight"][:, :, :3]
    weights["random_features"] = a["projection"]
    if causal:
        weights["positions"] = a["positions"]
    module.projection.load_state_dict(weights)
    heads = {n: a[n] for n in "qkv"}
    with torch.no_grad():
        inputs, _ = module.projection(heads, LayerCall(None, None, Context()))
    return a, module.config, pattern, inputs


@pytest.mark.parametrize("name", ["sea_causal", "sea_causal_oversampled", "sea_noncausal"])
def test_the_whole_mechanism_equals_the_recorded_code(name):
    a, config, pattern, inputs = official(name, "noncausal" not in name)
    close(inputs["estimate"], a["estimate"], 1e-4)  # the norm magnifies what the placement of an epsilon makes
    close(inputs["row_logit"], a["scales"][..., 0], 1e-4)
    close(inputs["mix_logit"], a["scales"][..., 1], 1e-4)
    inputs |= {"estimate": a["estimate"], "row_logit": a["scales"][..., 0], "mix_logit": a["scales"][..., 1]}
    scores = a["teacher_scores"]
    if pattern == "causal-self":
        scores = scores.masked_fill(~torch.ones(29, 29, dtype=torch.bool).tril(), -torch.inf)
    told = a["teacher_output"].unflatten(-1, (2, 8)).transpose(1, 2)
    teacher = {"weights": scores.softmax(-1), "output": told}
    call = {"pattern": pattern, "top_k": config.top_k, "oversample": config.oversample}
    result = sea_attention(**inputs, teacher=teacher, **call)
    without_mean = {n: x for n, x in inputs.items() if n != "mix_logit"}
    weights = sea_attention(**without_mean, want=WEIGHTS, **call).extras["weights"]
    rows = untied(a["estimate"], config, pattern)  # of equal probabilities the code keeps any
    assert rows.double().mean() > 0.4
    close(weights.transpose(1, 2)[rows], a["weights"].transpose(1, 2)[rows], 1e-6)
    output = result.output.transpose(1, 2).flatten(2)
    close(output[rows], a["out"][rows], 1e-5)
    apart, recorded_apart = ((x - a["teacher_output"]).square().mean() for x in (output, a["out"]))
    close(result.losses["distillation"][0] - apart, a["loss"] - recorded_apart, 1e-5)


def untied(estimate, config, pattern):
    """Queries whose last kept pixel and first lost one have different probabilities."""
    p = estimate.double().softmax(-1).transpose(1, 2).flatten(2).sort(descending=True).values
    seen = torch.arange(1, 30) if pattern == "causal-self" else torch.full((29,), 29)
    kept = (2 * config.top_k * config.oversample * 32 / seen).round().long().clamp(max=64)
    borders = F.pad(p, (0, 1), value=-1).gather(-1, (kept[None, :, None] + torch.tensor([-1, 0])).expand(2, -1, -1))
    return borders[..., 0] - borders[..., 1] > 1e-7


def test_put_into_an_encoder_of_torch_it_gathers_the_valid_tokens_first():
    encoder = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    ).double()
    report = regard.swap(encoder, "sea", top_k=3, estimate_length=32)
    assert any("attention.projection.map" in name or ".map." in name for name in report.learned)
    encoder.eval()
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    missing = torch.zeros(2, 13, dtype=torch.bool)
    missing[1, :5] = True
    found = encoder(x, src_key_padding_mask=missing)
    close(found[0], encoder(x[:1])[0], 1e-12)
    close(found[1, 5:], encoder(x[1:, 5:])[0], 1e-12)
    with pytest.raises(Unsupported, match="noncausal-self"):
        encoder(x, mask=torch.nn.Transformer.generate_square_subsequent_mask(13, dtype=torch.float64), is_causal=True)
