"""What is peculiar to stochastic subsampling: draws, windows, the own key, the schedule, the ensemble, and recorded outputs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import regard.mechanisms.stochastic_subsampling.definition as definition
import regard.mechanisms.stochastic_subsampling.forms as ssa
from regard.contract import BlockMask, Context, Mask, Shape, Unsupported
from regard.create import create_layer
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

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


def sample(n=19, m=None, *, batch=2, heads=4, groups=2, d=4, v=3):
    m = n if m is None else m
    shapes = ((heads, n, d), (groups, m, d), (groups, m, v))
    return [torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes]


def train(q, k, v, *, seed=0, **options):
    """A call in training, with draws of its own."""
    rng = torch.Generator().manual_seed(seed)
    return stochastic_subsampling_attention(q, k, v, training=True, generator=rng, **options)


def weights_of(n=16, *, heads=1, seed=0, batch=1, **options):
    """The weights of a call whose scores are all equal."""
    q, k, _ = sample(n, batch=batch, heads=heads, groups=heads)
    unit = torch.eye(n, dtype=torch.float64).expand(batch, heads, -1, -1)
    return train(0 * q, k, unit, seed=seed, **options)


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


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
        bias = torch.randn(2, 4, 19, m, dtype=torch.float64)
        bias = bias.masked_fill(torch.rand(bias.shape) < 0.2, -torch.inf)
        call["bias"] = bias
    if masked == "blocks":
        call["mask"] = Mask(blocks=BlockMask(torch.rand(2, 4, 5, 6) < 0.7, 4))
    if masked == "padded":
        lengths, keys = torch.tensor([19, 8]), torch.tensor([m, 9 if "cross" in pattern else 8])
        call |= {"mask": Mask(lengths=lengths), "memory_mask": Mask(lengths=keys) if "cross" in pattern else None}
    found = train(q, k, v, **call)
    if masked == "padded":  # the definition has no padding: hide the same keys by a bias
        kept = record_of_draw(q, k, v, call)
        hidden = torch.arange(m) >= keys[:, None]
        expected = dense(q, k, v, kept & ~hidden[:, None, None], pattern)
        expected = torch.where((torch.arange(19) < lengths[:, None])[:, None, :, None], expected, 0)
    else:
        expected = train(q, k, v, form="reference", **call)
    close(found, expected)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        close(one, other)


def record_of_draw(q, k, v, call):
    """Pairs of non-zero weight in a call with equal scores."""
    m = k.shape[2]
    unit = torch.eye(m, dtype=torch.float64).expand(2, 4, -1, -1)
    wide = torch.zeros(2, 4, m, 4, dtype=torch.float64)
    return train(0 * q.detach(), wide, unit, **call) > 0


def dense(q, k, v, visible, pattern):
    if pattern == "causal-self":
        visible = visible & torch.ones(visible.shape[-2:], dtype=torch.bool).tril()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.where(visible, q @ k.mT * q.shape[-1] ** -0.5, -1e9)
    return torch.where(visible, scores.softmax(-1), 0) @ v


@pytest.mark.parametrize("pattern", PATTERNS)
def test_in_evaluation_and_with_all_keys_it_is_softmax_attention(pattern):
    q, k, v = sample()
    expected = softmax_attention(q, k, v, pattern=pattern)
    close(stochastic_subsampling_attention(q, k, v, pattern=pattern, ratio=0.1), expected)
    close(train(q, k, v, pattern=pattern, ratio=1.0), expected)


@pytest.mark.parametrize("pattern", SELF)
def test_one_window_is_dense_attention(pattern):
    q, k, v = sample()
    close(train(q, k, v, pattern=pattern, mode="local", window=40), softmax_attention(q, k, v, pattern=pattern))


@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("n", [16, 18])
def test_without_noise_it_is_attention_in_blocks(pattern, n):
    q, k, v = sample(n)
    block = torch.arange(n) // 4
    found = train(q, k, v, pattern=pattern, mode="local", window=4, sigma=0.0)
    close(found, dense(q, k, v, block[:, None] == block, pattern))
    q, k, v = sample(n, heads=2, groups=2)
    expected = dense(q, k, v, block[:, None] == block, pattern)
    close(stochastic_subsampling_attention(q, k, v, pattern=pattern, host_window=4), expected)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.1])
def test_every_query_sees_the_same_number_of_distinct_keys(ratio):
    for options in ({}, {"per_head": True}, {"mode": "local"}):
        weights = weights_of(20, heads=2, batch=3, ratio=ratio, pattern="noncausal-self", **options)
        seen = weights > 0
        assert (seen.sum(-1) == round(20 * ratio)).all()
        assert (seen == seen[:1]).all(), "sequences share the draw"
        assert bool((seen == seen[:, :1]).all()) != ("per_head" in options)
    alone = weights_of(20, batch=3, ratio=ratio, pattern="noncausal-self", per_sample=True) > 0
    assert (alone != alone[:1]).any()


def test_all_queries_share_an_unbiased_draw_in_which_every_key_is_as_likely():
    counts = torch.zeros(16, dtype=torch.float64)
    for seed in range(600):
        seen = weights_of(seed=seed, pattern="noncausal-self")[0, 0] > 0
        assert (seen == seen[:1]).all()
        counts += seen[0]
    share = counts / 600
    assert float(share.mean()) == pytest.approx(0.25, abs=1e-12)
    assert float((share - 0.25).abs().max()) < 4.5 * math.sqrt(0.25 * 0.75 / 600)


def test_locally_biased_draws_prefer_near_keys_the_less_the_more_noise():
    distance = (torch.arange(32)[:, None] - torch.arange(32)).abs()
    near, slopes = distance < 8, []
    for sigma in (2.0, 8.0, 1000.0):
        share = torch.zeros(32, 32, dtype=torch.float64)
        for seed in range(150):
            share += weights_of(32, seed=seed, pattern="noncausal-self", mode="local", window=8, sigma=sigma)[0, 0] > 0
        share /= 150
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
    options = {"pattern": "noncausal-self", "mode": "local", "grid": (4, 6)}
    seen = weights_of(24, window=2, sigma=0.0, **options)[0, 0] > 0
    assert torch.equal(seen, window[:, None] == window)
    noisy = weights_of(24, window=2, sigma=2.0, **options)[0, 0] > 0
    assert (noisy.sum(-1) == 4).all()
    assert (noisy.sum(0) == 4).all()
    assert not torch.equal(noisy, seen)
    q, k, v = sample(24)
    for pattern in SELF:
        call = {**options, "pattern": pattern, "window": 2}
        close(train(q, k, v, **call), train(q, k, v, form="reference", **call))


@pytest.mark.parametrize("options", [*SHARED[:3], *WINDOWED], ids=str)
def test_causal_outputs_depend_on_no_later_token_and_every_query_has_a_key(options):
    q, k, v = sample()
    before = train(q, k, v, **options)
    assert torch.isfinite(before).all()
    for t in (1, 6, 18):
        later = [torch.cat([x[:, :, :t], 9 * torch.randn_like(x[:, :, t:])], 2) for x in (q, k, v)]
        close(train(*later, **options)[:, :, :t], before[:, :, :t])
    close(before[:, :, 0], v[:, :, 0].repeat_interleave(2, 1))


def test_the_own_key_is_counted_once():
    for seed in range(20):
        weights = weights_of(seed=seed, pattern="causal-self")[0, 0]
        close(weights.sum(-1), torch.ones(16).double())
        for row in weights:
            close(row[row > 0], torch.full_like(row[row > 0], 1 / int((row > 0).sum())))
        assert (weights.diagonal() > 0).all()


@pytest.mark.parametrize("positions", ["alibi", "relative", "rotary"])
@pytest.mark.parametrize("options", [{}, {"mode": "local"}, {"per_head": True}], ids=str)
def test_positions_are_those_of_the_original_places(positions, options):
    layer = create_layer("ssa", 16, 4, positions=positions, in_evaluation=True, ratio=0.4, **options).double().eval()
    if positions == "relative":
        for parameter in layer.positions.parameters():
            torch.nn.init.normal_(parameter)
    x = torch.randn(2, 15, 16, dtype=torch.float64)

    def run(form):
        forms = layer.card.forms
        layer.card = dataclasses.replace(layer.card, forms={**forms, "parallel": forms[form]})
        rng = torch.Generator().manual_seed(5)
        return layer(x, context=Context(generator=rng)).output

    close(run("parallel"), run("reference"))


@pytest.mark.parametrize("options", [*SHARED, *WINDOWED], ids=str)
def test_constant_values_come_out_as_they_are(options):
    q, k, v = sample()
    found = train(q, k, torch.full_like(v, 2.5), **options)
    close(found, torch.full_like(found, 2.5))


def test_the_mean_of_many_draws_of_equal_scores_is_the_mean_of_the_values():
    q, k, v = sample(16, batch=1, heads=1, groups=1)
    total = sum(train(0 * q, k, v, seed=seed, pattern="noncausal-self") for seed in range(1500)) / 1500
    assert float((total - v.mean(2, keepdim=True)).abs().max()) < 0.08


def test_keys_that_are_not_drawn_get_no_gradient():
    q, k, v = (x.requires_grad_() for x in sample(16, heads=2, groups=2))
    train(q, k, v, pattern="noncausal-self").square().sum().backward()
    for leaf in (k, v):
        assert (leaf.grad.abs().sum((0, 1, 3)) > 0).sum() == 4


def test_only_the_drawn_keys_are_computed(monkeypatch):
    given, original = [], ssa.attention

    def attention(q, k, *rest, **options):
        given.append((q.shape[0], q.shape[2], k.shape[2]))
        return original(q, k, *rest, **options)

    monkeypatch.setattr(ssa, "attention", attention)
    q, k, v = sample(64)
    train(q, k, v)
    train(q, k, v, mode="local")
    train(q, k, v, host_window=16)
    assert given == [(2, 64, 16), (8, 16, 16), (8, 16, 4)]


def test_a_draw_repeats_with_its_seed_and_differs_between_calls():
    q, k, v = sample()
    assert torch.equal(train(q, k, v, seed=3), train(q, k, v, seed=3))
    rng = torch.Generator().manual_seed(3)
    first, second = (stochastic_subsampling_attention(q, k, v, training=True, generator=rng) for _ in range(2))
    assert not torch.allclose(first, second)


def test_dropout_leaves_the_mean_as_it_is():
    q, k, v = sample(8, batch=1, heads=1, groups=1)
    rng, total = torch.Generator().manual_seed(0), 0
    options = {"training": True, "host_window": 8, "ratio": 0.99, "mode": "bernoulli"}
    for _ in range(3000):
        total = total + stochastic_subsampling_attention(q, k, v, dropout=0.3, generator=rng, **options)
    plain = sum(train(q, k, v, seed=s, host_window=8, ratio=0.99, mode="bernoulli") for s in range(300)) / 300
    assert float((total / 3000 - plain).abs().max()) < 0.12


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
    with pytest.raises(Unsupported, match=r"without context\.progress"):
        train(q, k, v, **options)
    counts = [
        int((weights_of(40, pattern="noncausal-self", anneal=True, progress=p, **options)[0, 0, 0] > 0).sum())
        for p in (0.0, 45.0, 89.9, 90.0)
    ]
    assert counts == [8, 24, 40, 40]


def model(**options):
    plan = [("stochastic_subsampling", {"ratio": 0.3, **options})] * 2
    return LanguageModel(LanguageModelConfig(vocab_size=13, dim=16, plan=plan, num_heads=2)).double()


def test_layers_draw_for_themselves():
    own, ids = model().train(), torch.randint(13, (2, 16))
    drawn, original = [], ssa.draw_keys

    def draw(*arguments):
        drawn.append(original(*arguments))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssa, "draw_keys", draw)
        own(ids)
    assert len(drawn) == 2
    assert not torch.equal(*drawn)


def test_an_ensemble_is_the_mean_of_its_passes_and_the_model_stays_as_it_was():
    own, ids = model().train(), torch.randint(13, (2, 16))
    configs = [block.mixer.config for block in own.blocks]
    rng = torch.Generator().manual_seed(1)
    found = ensemble_predict(own, ids, passes=3, context=Context(generator=rng))
    rng = torch.Generator().manual_seed(1)
    with subsampled(own.eval()), torch.no_grad():
        passes = [own(ids, context=Context(generator=rng)).output for _ in range(3)]
    close(found, sum(p.softmax(-1) for p in passes) / 3)
    rng = torch.Generator().manual_seed(1)
    logits = ensemble_predict(own, ids, passes=3, average="logits", context=Context(generator=rng))
    close(logits, sum(passes) / 3)
    assert [block.mixer.config for block in own.blocks] == configs
    assert torch.equal(own(ids).output, own(ids).output)
    own.train()
    ensemble_predict(own, ids, passes=1)
    assert all(module.training for module in own.modules())
    with subsampled(own, ratio=1.0):
        close(own(ids).output, own.eval()(ids).output)


def test_with_all_keys_an_ensemble_is_the_dense_model():
    own, ids = model().eval(), torch.randint(13, (2, 16))
    close(ensemble_predict(own, ids, passes=2, ratio=1.0), own(ids).output.softmax(-1))


def test_subsample_gives_keys_values_and_their_places():
    _, k, v = sample(20)
    few_k, few_v, places = subsample(k, v, ratio=0.3, generator=torch.Generator().manual_seed(2))
    assert places.tolist() == sorted(set(places.tolist()))
    assert len(places) == 6
    assert torch.equal(few_k, k[:, :, places])
    assert torch.equal(few_v, v[:, :, places])
    assert subsample(k[:, :, :0], v[:, :, :0])[0].shape[2] == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": 0.0}, "0 < ratio <= 1"),
        ({"ratio": 1.5}, "0 < ratio <= 1"),
        ({"ratio": math.nan}, "0 < ratio <= 1"),
        ({"mode": "locally"}, "local"),
        ({"noise": "gaussian"}, "normal"),
        ({"window": 0}, "window >= 1"),
        ({"sigma": -1.0}, "sigma >= 0"),
        ({"sigma": math.inf}, "finite"),
        ({"neighbours": -1}, "neighbours >= 0"),
        ({"finetune": 1.1}, "finetune <= 1"),
        ({"anneal": True}, "anneal with steps"),
        ({"per_head": True, "mode": "local"}, "per_head"),
        ({"host_window": 4, "mode": "local"}, "host_window"),
        ({"steps": 0}, "steps >= 1"),
    ],
)
def test_bad_options_are_refused(options, told):
    with pytest.raises(Unsupported, match=told):
        Config(**options)


def test_what_cannot_be_is_refused():
    q, k, v = sample()
    with pytest.raises(Unsupported, match="whole sequences in self patterns"):
        train(q, k, v, pattern="noncausal-cross", mode="local")
    with pytest.raises(Unsupported, match="whole sequences"):
        train(q[:, :, 4:], k, v, mode="local")
    with pytest.raises(Unsupported, match="host_window"):
        stochastic_subsampling_attention(q, k, v, pattern="causal-cross", host_window=4)
    for want in ("weights", "lse"):
        with pytest.raises(Unsupported, match="log-sum-exp"):
            train(q, k, v, want=frozenset({want}))
    grid = {"mode": "local", "pattern": "noncausal-self"}
    q, k, v = sample(24)
    with pytest.raises(Unsupported, match="divide"):
        train(q, k, v, grid=(4, 6), window=4, **grid)
    with pytest.raises(Unsupported, match="neighbours=1"):
        train(q, k, v, grid=(4, 6), window=2, neighbours=1, **grid)
    with pytest.raises(Unsupported, match="padding"):
        train(q, k, v, grid=(4, 6), window=2, mask=Mask(lengths=torch.tensor([24, 7])), **grid)
    with pytest.raises(Unsupported, match="without layers"), subsampled(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(Unsupported, match="passes"):
        ensemble_predict(model(), torch.zeros(1, 2, dtype=torch.long), passes=0)


@pytest.mark.parametrize("options", [{}, {"mode": "local"}, {"mode": "bernoulli"}], ids=str)
def test_a_training_step_compiles_whole(options):
    q, k, v = sample()

    def step(q, k, v):
        return stochastic_subsampling_attention(q, k, v, training=True, **options)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = compiled(q, k, v)
    assert found.shape == v.repeat_interleave(2, 1).shape
    assert not torch.allclose(found, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("form", ["parallel", "reference"])
def test_the_bernoulli_form_equals_source_dropout_of_the_authors(form, monkeypatch):
    """With their draw, and their gates all 1."""
    with np.load(FIXTURES / "stochastic_subsampling_tgt.npz") as arrays:
        recorded = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    for module in (ssa, definition):
        monkeypatch.setattr(module, "draw_keys", lambda *_: recorded["kept"])
    leaves = [recorded[name].requires_grad_() for name in "qkv"]
    options = {"mode": "bernoulli", "ratio": 0.6, "pattern": "noncausal-self", "form": form}
    found = train(*leaves, mask=Mask(bias=recorded["bias"]), **options)
    close(found, recorded["out"])
    for name, gradient in zip("qkv", torch.autograd.grad(found, leaves, recorded["grad_out"]), strict=True):
        close(gradient, recorded[f"grad_{name}"])


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.5},
        {"mode": "local"},
        {"mode": "local", "window": 4, "neighbours": 1},
        {"host_window": 8, "ratio": 0.5},
    ],
)
def test_the_cost_is_that_of_the_pairs_which_are_computed(options):
    n = 32
    seen = (weights_of(n, pattern="noncausal-self", **options) > 0).sum(-1)
    shape = Shape(1, 1, n, n, 4, n)
    drawn, dense = (cost(shape, Config(in_evaluation=x, **options)) for x in (True, False))
    assert drawn.flops == 2 * (4 + n) * n * seen.max()
    assert dense.flops == 2 * (4 + n) * n * options.get("host_window", n)
