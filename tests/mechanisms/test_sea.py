"""Tests specific to SEA: budgets, pixels, the gathered form, the mean, the loss, and the estimator of a layer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import WANT_STATE, check_recorded, close, close_gradients, load, refused

from regard.contract import ALL_PATTERNS, Context, LayerCall, Mask, Pattern
from regard.core.visibility import CountedRanks
from regard.create import create_layer
from regard.engines.linear_attention import linear_attention
from regard.engines.pixel_attention import Problem, torch_form
from regard.functional import sea_attention, softmax_attention
from regard.layers.attention_map import CausalMap, NoncausalMap, softmax_features
from regard.mechanisms.sea import MECHANISM, Estimator
from regard.mechanisms.sea import layer as estimation
from regard.training import peak_memory
from regard.workbench.verification.properties.layers import LAYER_PROPERTIES
from regard.workbench.verification.properties.states import split_and_resume
from regard.workbench.verification.subjects import Subject
from regard.workbench.verification.verify import Place, check

WEIGHTS = frozenset({"weights"})


def sample(n=24, m=None, *, batch=2, heads=3, groups=None, d=4, v=5, pixels=8):
    """Random q, k, v, estimate, row_logit, mix_logit."""
    m, groups = m or n, groups or heads
    shapes = ((heads, n, d), (groups, m, d), (groups, m, v), (heads, n, pixels), (heads, n), (heads, n))
    return [torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes]


@pytest.fixture(params=["dense", "gathered"])
def route(request, monkeypatch):
    """Force the dense or the gathered form, whatever it costs."""
    monkeypatch.setattr(torch_form, "DENSE_ADVANTAGE", math.inf if request.param == "dense" else 0)


# budgets


@pytest.mark.parametrize(("top_k", "heads", "pixels"), [(8, 4, 64), (4, 2, 32), (8, 1, 32)])
def test_a_query_reads_top_k_keys_a_head_on_average(top_k, heads, pixels):
    q, k, v, e, _, _ = sample(64, batch=16, heads=heads, pixels=pixels)
    weights = sea_attention(q, k, v, e, top_k=top_k, want=WEIGHTS).extras["weights"]
    read = (weights > 0).double().sum(-1).mean((0, 1))
    for t in (0, 1, 7, 15, 31, 63):
        expected = min(top_k, t + 1)
        assert float(read[t]) == pytest.approx(expected, abs=0 if t < 2 else 0.12 * expected + 0.1)


def test_what_is_ranked_together_shares_one_budget():
    q, k, v, e, _, _ = sample(32, heads=2, pixels=32)
    e[:, 0] *= 0.01
    call = {"pattern": "noncausal-self", "top_k": 4, "want": WEIGHTS}
    row, query, head, batch = (
        (sea_attention(q, k, v, e, grouping=grouping, **call).extras["weights"] > 0).sum(-1)
        for grouping in ("row", "query", "head", "batch")
    )
    assert (row.sum(1) == 2 * 4).all() and (row != 4).any()
    assert (query == 4).all()
    assert (head.sum(2) == 32 * 4).all() and (head != 4).any()
    assert (batch.sum((1, 2)) == 2 * 32 * 4).all() and (batch.sum(2) != 32 * 4).any()


def test_oversampling_keeps_the_number_of_keys():
    q, k, v, e, _, _ = sample(96, batch=8, pixels=12)
    for oversample in (1.0, 2.0, 3.0):
        found = sea_attention(q, k, v, e, pattern="noncausal-self", top_k=8, oversample=oversample, want=WEIGHTS)
        assert float((found.extras["weights"] > 0).double().sum(-1).mean()) == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("top_k", "pixels", "oversample"), [(7, 128, 1.0), (64, 16, 1.0), (1, 5, 1.7), (3, 64, 2.0)])
@pytest.mark.parametrize("grouping", ["row", "query"])
def test_no_query_reads_more_than_the_bound(heads, top_k, pixels, oversample, grouping):
    totals, where = torch.arange(1, 400)[None], CountedRanks(399, 399, 0, True, torch.device("cpu"))
    estimate = 3 * torch.randn(1, heads, 399, pixels)
    kept = torch_form.kept_pixels(Problem(estimate, totals, where, top_k, oversample, grouping, 1.0))
    read = (torch_form.first_keys(totals, pixels).diff(dim=-1)[:, None] * kept).sum((1, 3))[0]
    for fewest, most in ((1, 399), (1, 40), (100, 399), (399, 399)):
        assert int(read[fewest - 1 : most].max()) <= torch_form.most_read(
            grouping, top_k * oversample, heads, pixels, fewest, most
        )


# pixels


@pytest.mark.parametrize("pixels", [1, 4, 7, 32])
def test_first_tokens_of_pixels_invert_the_pixels_of_tokens(pixels):
    totals = torch.arange(0, 70)[None]
    first = torch_form.first_keys(totals, pixels)[0]
    pixel, visible = torch_form.pixels_of_keys(torch.arange(70)[None], totals, pixels)
    for n in range(70):
        counted = torch.bincount(pixel[0, n][visible[0, n]], minlength=pixels)
        assert first[n].diff().tolist() == counted.tolist()
        formula = [min(max(math.floor((j + 0.5) / n * pixels - 1e-4), 0), pixels - 1) for j in range(n)]
        assert pixel[0, n][:n].tolist() == formula


# exact attention, and the mean


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_with_all_pixels_kept_it_is_softmax_attention(pattern, route):
    q, k, v, e, a, _ = sample()
    open_gates = torch.full_like(a, 40.0)
    found = sea_attention(q, k, v, e, open_gates, open_gates, pattern=pattern, top_k=24)
    close(found, softmax_attention(q, k, v, pattern=pattern))


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_a_closed_gate_gives_the_mean_of_what_is_seen(pattern):
    """In noncausal-self, the mean is weighted by the mean map, stretched to three tokens per pixel."""
    q, k, v, e, a, b = sample(24, pixels=8)
    found = sea_attention(q, k, v, e, a, torch.full_like(b, -800.0), pattern=pattern)
    mean = v.cumsum(2) / torch.arange(1, 25)[:, None] if pattern == "causal-self" else v.mean(2, keepdim=True)
    if pattern == "noncausal-self":
        mean = e.softmax(-1).mean(2).repeat_interleave(3, -1)[:, :, None] @ v
    close(found, mean.expand_as(found), 1e-13)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize(
    "options", [{}, {"grouping": "query"}, {"oversample": 2.5, "top_k": 2}], ids=["row", "query", "oversample"]
)
@pytest.mark.parametrize(("numbers", "pixels"), [(1 << 22, 8), (1 << 22, 40), (500, 8)])
def test_the_gathered_form_equals_masked_products_with_gradients(pattern, options, numbers, pixels, monkeypatch):
    n = 37 if pattern == "noncausal-self" else 30
    inputs = [x.requires_grad_() for x in sample(n, 37, heads=4, groups=2, pixels=pixels)]
    found = []
    for advantage, size in ((math.inf, 1 << 22), (0, numbers)):
        monkeypatch.setattr(torch_form, "DENSE_ADVANTAGE", advantage)
        monkeypatch.setattr(torch_form, "NUMBERS_AT_ONCE", size)
        output = sea_attention(*inputs, pattern=pattern, **{"top_k": 3, **options})
        found.append((output, *torch.autograd.grad(output.square().sum(), inputs, materialize_grads=True)))
    for dense, gathered in zip(*found, strict=True):
        close(gathered, dense, 1e-11)


def test_states_of_unequal_rows_read_the_right_keys(route):
    """Rows that advance unequally leave empty slots in the cache, so a key's slot is not its rank."""
    assert split_and_resume(Subject(MECHANISM, Pattern.CAUSAL_SELF, {"top_k": 2}), torch.float64) < 1e-12


@pytest.mark.parametrize("n", [1, 3])
def test_a_row_alone_that_was_padded_goes_on_from_its_own_tokens(n, route):
    """The cache has empty slots, so a key's slot is not its rank."""
    q, k, v, e, a, b = sample(9 + n, batch=1)
    whole = sea_attention(*(x[:, :, [*range(6), *range(9, 9 + n)]] for x in (q, k, v, e, a, b)), top_k=2)
    first = [x[:, :, :9] for x in (q, k, v, e, a, b)]
    state = sea_attention(*first, top_k=2, mask=Mask(lengths=torch.tensor([6])), return_state=True).state
    rest = sea_attention(*(x[:, :, 9:] for x in (q, k, v, e, a, b)), top_k=2, state=state)
    close(rest.output, whole[:, :, 6:])


def test_memory_grows_with_the_length_not_its_square(monkeypatch):
    def peak(n):
        inputs = [x.float() for x in sample(n, batch=1, heads=2, d=4, v=4, pixels=16)]
        return peak_memory(lambda: sea_attention(*inputs, top_k=2)).bytes

    monkeypatch.setattr(torch_form, "NUMBERS_AT_ONCE", 1 << 18)
    assert peak(3000) < 2.5 * peak(1500)


def test_inputs_beside_padding_stay_as_they_were():
    inputs = sample()
    before = [x.clone() for x in inputs]
    sea_attention(*inputs, pattern="noncausal-self", mask=Mask(lengths=torch.tensor([24, 9])))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_weights_times_values_are_the_output_without_the_mean():
    q, k, v, e, a, _ = (x.requires_grad_() for x in sample())
    found = sea_attention(q, k, v, e, a, top_k=3, want=WEIGHTS)
    weights = found.extras["weights"]
    close(weights @ v, found.output, 1e-13)
    close(weights.sum(-1), torch.where((weights > 0).any(-1), a.sigmoid(), 0), 1e-13)
    assert torch.autograd.grad(found.output.sum(), [q, e], allow_unused=True)[1] is None  # selection has none


# the loss


def dense_sums(teacher, q, k, e, pattern, exact_too):
    """KL and squared differences for one row, with all maps at the tokens' resolution."""
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


def causal(scores):
    return scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self", "noncausal-cross"])
@pytest.mark.parametrize("numbers", [1 << 22, 100])
def test_the_loss_is_that_of_the_paper(pattern, numbers, monkeypatch):
    monkeypatch.setattr(torch_form, "NUMBERS_AT_ONCE", numbers)
    q, k, v, e, a, b = (x.requires_grad_() for x in sample(13, batch=1))
    scores = torch.randn(1, 3, 13, 13, dtype=torch.float64)
    weights = (causal(scores) if pattern == "causal-self" else scores).softmax(-1)
    teacher = {"weights": weights, "output": torch.randn(1, 3, 13, 5, dtype=torch.float64)}
    result = sea_attention(q, k, v, e, a, b, pattern=pattern, teacher=teacher)
    found, count = result.losses["distillation"]
    kl, squares = dense_sums(weights[0], q[0], k[0], e[0], pattern, True)
    apart = (result.output - teacher["output"]).square().mean()
    expected = 0.1 * kl / (13 if pattern == "noncausal-self" else 3 * 13) + squares / (3 * 13 * 13) + apart
    assert int(count) == 1
    close_gradients(found, expected, [k, e])


def test_the_loss_counts_neither_padding_nor_queries_without_keys():
    q, k, v, e, a, b = sample(11)
    scores = torch.randn(2, 3, 11, 11, dtype=torch.float64)
    scores[1, :, :, 6:] = -torch.inf
    teacher = {"weights": scores.softmax(-1)}
    call = {"pattern": "noncausal-self", "teacher": teacher}
    found = sea_attention(q, k, v, e, a, b, mask=Mask(lengths=torch.tensor([11, 6])), **call).losses["distillation"][0]
    kl, squares = 0.0, 0.0
    for row, n in ((0, 11), (1, 6)):
        own = [x[row, :, :n] for x in (q, k, e)]
        more = dense_sums(teacher["weights"][row, :, :n, :n], *own, "noncausal-self", True)
        kl, squares = kl + more[0], squares + more[1]
    close(found, 0.1 * kl / 17 + squares / (3 * (121 + 36)))
    empty = sea_attention(q, k, v, e, a, b, mask=Mask(lengths=torch.tensor([0, 0])), **call).losses["distillation"]
    assert [float(x) for x in empty] == [0.0, 0.0]


def test_without_a_teacher_the_map_learns_from_the_exact_scores():
    q, k, v, e, _, _ = (x.requires_grad_() for x in sample(12, batch=1))
    result = sea_attention(q, k, v, e, training=True, jitter=0.0)
    own = causal(q @ k.mT * 0.5).softmax(-1).detach()
    loss = result.losses["distillation"][0]
    kl, squares = dense_sums(own[0], q[0], k[0], e[0], "causal-self", False)
    close(loss, 0.1 * kl / (3 * 12) + squares / (3 * 144))
    assert torch.autograd.grad(loss, [q, e], allow_unused=True)[0] is None
    for call in ({}, {"training": True, "self_teacher": False}):
        assert not sea_attention(q, k, v, e, return_state=True, **call).losses


@pytest.mark.parametrize("numbers", [1, 1 << 30])
@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
def test_it_trains_under_autocast(pattern, numbers, monkeypatch):
    monkeypatch.setattr(torch_form, "NUMBERS_AT_ONCE", numbers)
    torch.manual_seed(0)
    layer, x = create_layer("sea", 32, 2, pattern=pattern), torch.randn(2, 20, 32)

    def run():
        total, count = layer(x).losses["distillation"]
        loss = total / count
        return loss, torch.autograd.grad(loss, [p for p in layer.parameters() if p.requires_grad], allow_unused=True)

    exact, gradients = run()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, found = run()
    close(rounded, exact, 0.05)
    assert all(bool(g.isfinite().all()) for g in found if g is not None)
    assert [g is None for g in found] == [g is None for g in gradients]


def test_jitter_moves_tokens_in_training_only_and_so_many():
    inputs = sample(40, pixels=8)
    plain = sea_attention(*inputs, top_k=2)
    close(sea_attention(*inputs, top_k=2, jitter=1.0), plain)

    def trained(jitter, seed=0):
        rng = torch.Generator().manual_seed(seed)
        return sea_attention(*inputs, top_k=2, training=True, jitter=jitter, generator=rng).output

    close(trained(0.0), plain)
    changed = sum(not torch.allclose(trained(0.1, seed), plain) for seed in range(60))
    assert 0 < changed < 20


# layers


def layer(pattern="causal-self", **options):
    options = {"estimate_length": 32, "top_k": 3, **options}
    return create_layer("sea", 16, 2, pattern=pattern, **options).double().eval()


@pytest.mark.parametrize("variant", ["codebook", "joint encoder", "cosines"])
@pytest.mark.parametrize(("pattern", "name"), [("causal-self", "layer_decoding"), ("noncausal-self", "layer_padding")])
def test_every_estimator_decodes_as_it_reads_and_sees_no_padding(variant, pattern, name):
    prop = next(p for p in LAYER_PROPERTIES if p.name == name)
    assert check(Place(MECHANISM, Pattern(pattern), prop, torch.float64, variant=variant)).status == "pass"


def test_an_estimate_in_parts_has_the_gradients_of_the_whole(monkeypatch):
    """This holds although new random features are drawn before the parts are recomputed."""
    module, x = layer(jitter=0.0, redraw_every=0).train(), torch.randn(2, 24, 16, dtype=torch.float64)
    leaves = [x.requires_grad_(), *module.parameters()]

    def trained():
        result = module(x, context=Context(mask=Mask(lengths=torch.tensor([24, 17]))))
        return torch.cat([result.output.flatten(), result.losses["distillation"][0][None]])

    whole = trained()
    monkeypatch.setattr(estimation, "QUERIES_AT_ONCE", 7)
    parts = trained()
    module.projection.redraw()
    cotangent = torch.randn_like(whole)
    found, expected = (torch.autograd.grad(y, leaves, cotangent) for y in (parts, whole))
    close(parts, whole)
    close(*(torch.cat([x.flatten() for x in grads]) for grads in (found, expected)), 1e-11)


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
    close(module(z, None, ())[0], expected, 1e-13)
    padded = F.pad(z, (0, 0, 0, 5), value=9.0)
    close(module(padded, torch.tensor([n]), ())[0][:, :, :n], expected, 1e-13)


def test_sequences_beyond_the_table_of_positions_are_refused():
    module, x = layer(length=8), torch.randn(1, 9, 16, dtype=torch.float64)
    refused("length=8", module, x)
    state = module(x[:, :6], context=WANT_STATE).state
    state = module(x[:, :2], state=state).state
    refused("length=8", module.step, x[:, 0], state)
    layer("noncausal-self", length=8)(x)


# refusals


def test_sizes_that_do_not_fit_an_estimator_are_refused():
    refused("estimate_length", layer, estimate_length=30)
    refused("estimate_length", layer, estimate_length=40, estimator="codebook")
    refused("kernel", layer, "causal-cross", kernel="cosformer")


def test_calls_that_cannot_be_are_refused():
    q, k, v, e, _, _ = sample()
    for grouping in ("head", "batch"):
        refused("depend on others", sea_attention, q, k, v, e, grouping=grouping)
    for teacher in ({}, {"weights": torch.zeros(2, 3, 4, 4)}, torch.zeros(2, 3, 24, 24), {"scores": e}):
        refused("teacher", sea_attention, q, k, v, e, teacher=teacher)
    refused("no pixels", sea_attention, q, k, v, e[..., :0])
    state = sea_attention(q, k, v, e, return_state=True).state
    refused("precede", sea_attention, q, k[:, :, :2], v[:, :, :2], e, state=state)


# parity


@pytest.mark.parametrize("kind", ["causal", "noncausal"])
def test_the_context_equals_the_recorded_performer(kind):
    a = load(f"sea_performer_{kind}")
    leaves = [a[name].clone().requires_grad_() for name in "qkv"]
    if kind == "causal":
        projected = [x * 8**-0.25 @ a["projection"].mT for x in leaves[:2]]
        found = linear_attention(*projected, leaves[2], Estimator.PERFORMER)[0]
    else:
        everything = torch.ones(1, 1, 13, 1, dtype=torch.bool)
        phi = softmax_features(leaves[0], leaves[1], a["projection"], everything)
        found = phi[0] @ (phi[1].mT @ leaves[2]) / (phi[0] @ phi[1].sum(2)[..., None])
    # the official code adds 1e-6 to each sum of features rather than to the denominator
    tolerance = 1e-5 if kind == "causal" else 1e-12
    check_recorded(a, found, dict(zip("qkv", leaves, strict=True)), tolerance)


CNN = {
    "causal": {
        "map.first_norm": "cnn_0_module",
        "map.convolutions.0": "cnn_1_module_net_0_module",
        "map.convolutions.1": "cnn_1_module_net_2_module",
        "map.merge": "cnn_1_module_net_5_module",
        "map.last_norm": "cnn_2_module",
    },
    "noncausal": {"map.shrink": "cnn_0_net_0", "map.mix": "cnn_0_net_2", "map.merge": "cnn_0_net_5"},
}


def recorded_layer(a, kind, oversample):
    """The options of a layer with the recorded weights, and its estimator's output for the recorded heads."""
    module = create_layer(
        "sea", 16, 2, pattern=f"{kind}-self", top_k=5, estimate_length=32, oversample=oversample, length=64
    ).eval()
    names = {"encode.0": "enc_0", "encode.1": "enc_1", "map.expand": "dec_row_0", "gates": "dec_scaler_0", **CNN[kind]}
    weights = {f"{own}.{p}": a[f"weight_{theirs}_{p}"] for own, theirs in names.items() for p in ("weight", "bias")}
    for part in ("weight", "bias"):
        weights[f"gates.{part}"] = weights[f"gates.{part}"].flip(0)
    weights["random_features"] = a["projection"]
    if kind == "causal":
        weights["positions"] = a["positions"]
        for i in range(2):  # the rows of the kernel that would see later queries are masked
            weights[f"map.convolutions.{i}.weight"] = weights[f"map.convolutions.{i}.weight"][:, :, :3]
    module.projection.load_state_dict(weights)
    with torch.no_grad():
        inputs, _ = module.projection({n: a[n] for n in "qkv"}, LayerCall(None, None, Context()))
    return module.config, inputs


def untied(estimate, config, kind):
    """A mask of queries whose last kept pixel and first dropped one have different probabilities."""
    p = estimate.double().softmax(-1).transpose(1, 2).flatten(2).sort(descending=True).values
    seen = torch.arange(1, 30) if kind == "causal" else torch.full((29,), 29)
    kept = (2 * config.top_k * config.oversample * 32 / seen).round().long().clamp(max=64)
    borders = F.pad(p, (0, 1), value=-1).gather(-1, (kept[None, :, None] + torch.tensor([-1, 0])).expand(2, -1, -1))
    return borders[..., 0] - borders[..., 1] > 1e-7


@pytest.mark.parametrize(
    ("name", "kind", "oversample"),
    [("sea_causal", "causal", 1.0), ("sea_causal_oversampled", "causal", 2.0), ("sea_noncausal", "noncausal", 1.0)],
)
def test_the_whole_mechanism_equals_the_recorded_code(name, kind, oversample):
    a = load(name)
    config, inputs = recorded_layer(a, kind, oversample)
    recorded = {"estimate": a["estimate"], "row_logit": a["scales"][..., 0], "mix_logit": a["scales"][..., 1]}
    for given, x in recorded.items():
        close(inputs[given], x, 1e-4)  # the norm magnifies the effect of a differently placed epsilon
    inputs |= recorded
    scores = causal(a["teacher_scores"]) if kind == "causal" else a["teacher_scores"]
    told = a["teacher_output"].unflatten(-1, (2, 8)).transpose(1, 2)
    call = {"pattern": f"{kind}-self", "top_k": config.top_k, "oversample": oversample}
    result = sea_attention(**inputs, teacher={"weights": scores.softmax(-1), "output": told}, **call)
    without_mean = {n: x for n, x in inputs.items() if n != "mix_logit"}
    weights = sea_attention(**without_mean, want=WEIGHTS, **call).extras["weights"]
    rows = untied(a["estimate"], config, kind)  # among ties the code keeps any
    assert rows.double().mean() > 0.4
    close(weights.transpose(1, 2)[rows], a["weights"].transpose(1, 2)[rows], 1e-6)
    output = result.output.transpose(1, 2).flatten(2)
    close(output[rows], a["out"][rows], 1e-5)
    apart, recorded_apart = ((x - a["teacher_output"]).square().mean() for x in (output, a["out"]))
    close(result.losses["distillation"][0] - apart, a["loss"] - recorded_apart, 1e-5)
