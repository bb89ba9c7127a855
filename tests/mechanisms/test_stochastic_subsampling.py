"""Tests specific to stochastic subsampling: draws, windows, a query's own key, the schedule, the ensemble, and recorded outputs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from support import check_recorded, close, close_gradients, load, qkv, refused, watched

import regard.mechanisms.stochastic_subsampling.definition as definition
import regard.mechanisms.stochastic_subsampling.forms as ssa
from regard.contract import BlockMask, Context, Mask, Shape, Unsupported
from regard.create import create_layer
from regard.engines import attention_forms
from regard.functional import softmax_attention, stochastic_subsampling_attention
from regard.mechanisms.stochastic_subsampling import Config, cost, ensemble_predict, subsample, subsampled
from regard.models import LanguageModel, LanguageModelConfig

PATTERNS = ["noncausal-self", "causal-self", "noncausal-cross", "causal-cross"]
SELF = PATTERNS[:2]
WINDOWED = [
    {"mode": "local"},
    {"mode": "local", "window": 4, "sigma": 2.0, "neighbours": 1},
    {"mode": "local", "window": 5, "noise": "laplace", "per_sample": True},
    {"host_window": 6, "ratio": 0.5},
    {"host_window": 5, "ratio": 0.4, "per_sample": True},
]
SHARED = [{}, {"ratio": 0.01}, {"per_sample": True}, {"per_head": True}, {"mode": "bernoulli", "ratio": 0.6}]


def sample(n=19, m=None, **sizes):
    return qkv(n, m, **{"heads": 4, "groups": 2, "value_dim": 3, **sizes}).values()


def train(q, k, v, *, seed=0, **options):
    """A training call with its own random draws."""
    rng = torch.Generator().manual_seed(seed)
    return stochastic_subsampling_attention(q, k, v, training=True, generator=rng, **options)


def weights_of(n=16, *, heads=1, batch=1, **options):
    """The weights of a training call whose scores are all equal."""
    q, k, _ = sample(n, batch=batch, heads=heads, groups=heads)
    unit = torch.eye(n, dtype=torch.float64).expand(batch, heads, -1, -1)
    return train(0 * q, k, unit, **options)


def dense(q, k, v, visible, pattern):
    if pattern == "causal-self":
        visible = visible & torch.ones(visible.shape[-2:], dtype=torch.bool).tril()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.where(visible, q @ k.mT * q.shape[-1] ** -0.5, -1e9)
    return torch.where(visible, scores.softmax(-1), 0) @ v


@pytest.mark.parametrize(
    ("pattern", "options"),
    [(p, o) for p in PATTERNS for o in SHARED] + [(p, o) for p in SELF for o in WINDOWED],
    ids=str,
)
@pytest.mark.parametrize("masked", ["whole", "bias", "blocks", "padded"])
def test_gathering_equals_masked_softmax_with_gradients(pattern, options, masked):
    q, k, v = (x.requires_grad_() for x in sample(19, 23 if "cross" in pattern else None))
    m, call = k.shape[2], {"pattern": pattern, **options}
    if masked == "bias":
        hidden = torch.rand(2, 4, 19, m) < 0.2
        call["bias"] = torch.randn(2, 4, 19, m, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    if masked == "blocks":
        call["mask"] = Mask(blocks=BlockMask(torch.rand(2, 4, 5, 6) < 0.7, 4))
    if masked == "padded":  # the definition has no padding: take the drawn pairs from a call with equal scores
        lengths, keys = torch.tensor([19, 8]), torch.tensor([m, 9 if "cross" in pattern else 8])
        call |= {"mask": Mask(lengths=lengths), "memory_mask": Mask(lengths=keys) if "cross" in pattern else None}
        drawn = train(0 * q, k, torch.eye(m, dtype=torch.float64).expand(2, 2, -1, -1), **call) > 0
        there = torch.arange(m) < keys[:, None]
        expected = dense(q, k, v, drawn & there[:, None, None], pattern)
        expected = expected * (torch.arange(19) < lengths[:, None])[:, None, :, None]
    else:
        expected = train(q, k, v, form="reference", **call)
    found = train(q, k, v, **call)
    close_gradients(found, expected, (q, k, v))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_in_evaluation_with_all_keys_and_in_one_window_it_is_softmax_attention(pattern):
    q, k, v = sample()
    expected = softmax_attention(q, k, v, pattern=pattern)
    close(stochastic_subsampling_attention(q, k, v, pattern=pattern, ratio=0.1), expected)
    close(train(q, k, v, pattern=pattern, ratio=1.0), expected)
    if pattern in SELF:
        close(train(q, k, v, pattern=pattern, mode="local", window=40), expected)


@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("n", [16, 18])
def test_without_noise_it_is_attention_in_blocks(pattern, n):
    q, k, v = sample(n)
    block = torch.arange(n) // 4
    expected = dense(q, k, v, block[:, None] == block, pattern)
    close(train(q, k, v, pattern=pattern, mode="local", window=4, sigma=0.0), expected)
    close(stochastic_subsampling_attention(q, k, v, pattern=pattern, host_window=4), expected)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.1])
def test_every_query_sees_the_same_number_of_distinct_keys(ratio):
    call = {"batch": 3, "ratio": ratio, "pattern": "noncausal-self"}
    for options in ({}, {"per_head": True}, {"mode": "local"}):
        seen = weights_of(20, heads=2, **call, **options) > 0
        assert (seen.sum(-1) == round(20 * ratio)).all()
        assert (seen == seen[:1]).all(), "sequences share the draw"
        assert bool((seen == seen[:, :1]).all()) != ("per_head" in options)
    alone = weights_of(20, per_sample=True, **call) > 0
    assert (alone != alone[:1]).any()


def test_all_queries_share_an_unbiased_draw_in_which_every_key_is_as_likely():
    """With equal scores the mean over many passes is therefore the mean of the values."""
    mean = torch.zeros(16, dtype=torch.float64)
    for seed in range(600):
        weights = weights_of(seed=seed, pattern="noncausal-self")[0, 0]
        assert (weights == weights[:1]).all()
        mean += weights[0] / 600
    assert float(mean.sum()) == pytest.approx(1, abs=1e-12)
    assert float((4 * mean - 0.25).abs().max()) < 4.5 * math.sqrt(0.25 * 0.75 / 600)


def test_locally_biased_draws_prefer_near_keys_the_less_the_more_noise():
    distance = (torch.arange(32)[:, None] - torch.arange(32)).abs()
    near, slopes = distance < 8, []
    for sigma in (2.0, 8.0, 1000.0):
        options = {"pattern": "noncausal-self", "mode": "local", "window": 8, "sigma": sigma}
        share = sum((weights_of(32, seed=seed, **options)[0, 0] > 0).double() for seed in range(150)) / 150
        assert float(share.mean()) == pytest.approx(0.25, abs=1e-12)
        slopes.append(float(share[near].mean() - share[~near].mean()))
    assert slopes[0] > slopes[1] + 0.1 > slopes[2] + 0.2
    assert abs(slopes[2]) < 0.03


@pytest.mark.parametrize("noise", ["normal", "uniform", "laplace"])
def test_noise_has_the_deviation_sigma(noise):
    call = ssa.Call(ssa.Pattern.CAUSAL_SELF, Config(mode="local", sigma=3.0, noise=noise))
    draws = definition._noise(call, (200_000,), 7, torch.device("cpu"))
    assert float(draws.std()) == pytest.approx(3.0, rel=0.02)
    assert float(draws.mean()) == pytest.approx(0.0, abs=0.05)


def test_a_grid_without_noise_has_square_windows():
    rows, columns = torch.arange(24) // 6, torch.arange(24) % 6
    window = rows // 2 * 3 + columns // 2
    options = {"mode": "local", "grid": (4, 6), "window": 2}
    seen, noisy = (weights_of(24, pattern="noncausal-self", sigma=s, **options)[0, 0] > 0 for s in (0.0, 2.0))
    assert torch.equal(seen, window[:, None] == window)
    assert (noisy.sum(-1) == 4).all()
    assert (noisy.sum(0) == 4).all()
    assert not torch.equal(noisy, seen)
    q, k, v = sample(24)
    for pattern in SELF:
        found, expected = (train(q, k, v, pattern=pattern, form=form, **options) for form in ("parallel", "reference"))
        close(found, expected)


@pytest.mark.parametrize("options", [*SHARED, *WINDOWED], ids=str)
def test_the_own_key_is_counted_once_and_equal_values_come_out_as_they_are(options):
    for seed in range(5):
        weights = weights_of(seed=seed, pattern="causal-self", **options)
        seen = (weights > 0).double()
        close(weights, seen / seen.sum(-1, keepdim=True))
        assert seen.diagonal(dim1=-2, dim2=-1).all()
    q, k, v = sample()
    found = train(q, k, torch.full_like(v, 2.5), **options)
    close(found, torch.full_like(found, 2.5))


@pytest.mark.parametrize("positions", ["alibi", "relative", "rotary"])
@pytest.mark.parametrize("options", [{}, {"mode": "local"}, {"per_head": True}], ids=str)
def test_positions_are_those_of_the_original_places(positions, options):
    layer = create_layer("ssa", 16, 4, positions=positions, in_evaluation=True, ratio=0.4, **options).double().eval()
    for parameter in layer.positions.parameters():
        torch.nn.init.normal_(parameter)
    x, card, outputs = torch.randn(2, 15, 16, dtype=torch.float64), layer.card, []
    for form in ("parallel", "reference"):
        layer.card = dataclasses.replace(card, forms={**card.forms, "parallel": card.forms[form]})
        outputs.append(layer(x, context=Context(generator=torch.Generator().manual_seed(5))).output)
    close(*outputs)


def test_only_the_drawn_keys_are_computed(monkeypatch):
    sizes = lambda q, k, *rest, **options: (q.shape[0], q.shape[2], k.shape[2])  # noqa: E731
    given = watched(monkeypatch, attention_forms, "attention", sizes)
    for options in ({}, {"mode": "local"}, {"host_window": 16}):
        train(*sample(64), **options)
    assert given == [(2, 64, 16), (8, 16, 16), (8, 16, 4)]


@pytest.mark.parametrize("options", [{}, {"mode": "local"}, {"mode": "bernoulli"}, {"host_window": 16}], ids=str)
def test_dropout_hides_weights_and_scales_the_others(options):
    plain, found = (weights_of(64, pattern="causal-self", dropout=share, **options) for share in (0.0, 0.3))
    kept = found > 0
    close(found[kept], plain[kept] / 0.7)
    assert float(kept.sum() / (plain > 0).sum()) == pytest.approx(0.7, abs=0.06)
    assert not kept.diagonal(dim1=-2, dim2=-1).all()  # own keys too


def test_decoding_in_passes_draws_among_the_cached_keys():
    layer = create_layer("ssa", 16, 2, ratio=0.25).double().eval()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    state = layer(x[:, :19], context=Context(want=frozenset({"state"}))).state
    dense_step = layer.step(x[:, 19], state)[0]
    close(dense_step, layer(x).output[:, 19])
    with subsampled(layer):
        steps = [layer.step(x[:, 19], state)[0] for _ in range(3)]
    assert not any(torch.allclose(step, dense_step) for step in steps)
    assert not torch.allclose(steps[0], steps[1])
    with subsampled(layer, mode="local"), pytest.raises(Unsupported, match="with a state"):
        layer.step(x[:, 19], state)


def test_the_schedule_ends_dense():
    q, k, v = sample()
    options = {"steps": 100, "finetune": 0.1, "ratio": 0.2}
    expected = softmax_attention(q, k, v)
    assert not torch.allclose(train(q, k, v, progress=89.0, **options), expected)
    close(train(q, k, v, progress=90.0, **options), expected)
    refused(r"without context\.progress", train, q, k, v, **options)
    counts = [
        int((weights_of(40, pattern="noncausal-self", anneal=True, progress=p, **options)[0, 0, 0] > 0).sum())
        for p in (0.0, 45.0, 89.9, 90.0)
    ]
    assert counts == [8, 24, 40, 40]


def model_and_ids():
    plan = [("stochastic_subsampling", {"ratio": 0.3})] * 2
    model = LanguageModel(LanguageModelConfig(vocab_size=13, dim=16, plan=plan, num_heads=2)).double()
    return model, torch.randint(13, (2, 16))


def test_layers_draw_for_themselves(monkeypatch):
    model, ids = model_and_ids()
    drawn, original = [], ssa.draw_keys
    monkeypatch.setattr(ssa, "draw_keys", lambda *arguments: drawn.append(original(*arguments)) or drawn[-1])
    model.train()(ids)
    assert len(drawn) == 2
    assert not torch.equal(*drawn)


def test_an_ensemble_is_the_mean_of_its_passes_and_the_model_stays_as_it_was():
    model, ids = model_and_ids()
    configs = [block.mixer.config for block in model.blocks]

    def context():
        return Context(generator=torch.Generator().manual_seed(1))

    with subsampled(model.eval()), torch.no_grad():
        same = context()
        passes = [model(ids, context=same).output for _ in range(3)]
    model.train()
    found = ensemble_predict(model, ids, passes=3, context=context())
    close(found, sum(p.softmax(-1) for p in passes) / 3)
    close(ensemble_predict(model, ids, passes=3, average="logits", context=context()), sum(passes) / 3)
    assert [block.mixer.config for block in model.blocks] == configs
    assert all(module.training for module in model.modules())
    output = model.eval()(ids).output
    assert torch.equal(model(ids).output, output)
    close(ensemble_predict(model, ids, passes=2, ratio=1.0), output.softmax(-1))
    with subsampled(model.train(), ratio=1.0):
        close(model(ids).output, output)


def test_subsample_gives_keys_values_and_their_places():
    _, k, v = sample(20)
    few_k, few_v, places = subsample(k, v, ratio=0.3, generator=torch.Generator().manual_seed(2))
    assert places.tolist() == sorted(set(places.tolist()))
    assert len(places) == 6
    assert torch.equal(few_k, k[:, :, places])
    assert torch.equal(few_v, v[:, :, places])
    assert subsample(k[:, :, :0], v[:, :, :0])[0].shape[2] == 0


GRID = {"mode": "local", "pattern": "noncausal-self", "grid": (4, 6)}


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: train(*sample(), mode="local", pattern="noncausal-cross"), "whole sequences in self patterns"),
        (lambda: train(*sample(15, 19), mode="local"), "whole sequences"),
        (lambda: stochastic_subsampling_attention(*sample(), pattern="causal-cross", host_window=4), "host_window"),
        *[(lambda w=w: train(*sample(), want=frozenset({w})), "log-sum-exp") for w in ("weights", "lse")],
        (lambda: train(*sample(24), window=4, **GRID), "divide"),
        (lambda: train(*sample(24), window=2, neighbours=1, **GRID), "neighbours=1"),
        (lambda: train(*sample(24), window=2, mask=Mask(lengths=torch.tensor([24, 7])), **GRID), "padding"),
        (lambda: subsampled(torch.nn.Linear(2, 2)).__enter__(), "without layers"),
        (lambda: ensemble_predict(*model_and_ids(), passes=0), "passes"),
    ],
)
def test_what_cannot_be_is_refused(call, told):
    refused(told, call)


@pytest.mark.parametrize("options", [{}, {"mode": "local"}, {"mode": "bernoulli"}], ids=str)
def test_a_training_step_compiles_whole(options):
    def step(q, k, v):
        return stochastic_subsampling_attention(q, k, v, training=True, **options)

    q, k, v = sample()
    torch.compiler.reset()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    assert found.shape == (2, 4, 19, 3)
    assert not torch.allclose(found, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("form", ["parallel", "reference"])
def test_the_bernoulli_form_equals_source_dropout_of_the_authors(form, monkeypatch):
    """With the authors' draw, and with all of their gates set to 1."""
    recorded = load("stochastic_subsampling_tgt")
    for module in (ssa, definition):
        monkeypatch.setattr(module, "draw_keys", lambda *_: recorded["kept"])
    leaves = [recorded[name].requires_grad_() for name in "qkv"]
    options = {"mode": "bernoulli", "ratio": 0.6, "pattern": "noncausal-self", "form": form}
    found = train(*leaves, mask=Mask(bias=recorded["bias"]), **options)
    check_recorded(recorded, found, dict(zip("qkv", leaves, strict=True)))


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "local"}, {"mode": "local", "window": 4, "neighbours": 1}, {"host_window": 8, "ratio": 0.5}],
)
def test_the_cost_is_that_of_the_pairs_which_are_computed(options):
    n = 32
    seen = (weights_of(n, pattern="noncausal-self", **options) > 0).sum(-1)
    shape = Shape(1, 1, n, n, 4, n)
    drawn, dense = (cost(shape, Config(in_evaluation=x, **options)) for x in (True, False))
    assert drawn.flops == 2 * (4 + n) * n * seen.max()
    assert dense.flops == 2 * (4 + n) * n * options.get("host_window", n)
