"""What is peculiar to clipped softmax: exact zeros and ones, where they begin, what gradients they let through, and parity."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard.engines.attention.torch_form as backend
from regard.apply import absorb, apply
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, Mask, Unsupported
from regard.create import create_layer
from regard.mechanisms.clipped_softmax import MECHANISM, Config, SilentRows, silent_rows

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
OPTIONS = [
    {"gamma": -0.06},
    {"gamma": -0.04, "zeta": 1.2},
    {"length": 20},
    {"alpha": 1.0, "length": 16},
    {"gamma": 0.0},
]


def inputs(n: int, m: int | None = None, batch: int = 2, spread: float = 3.0) -> dict[str, Tensor]:
    sizes = {"q": n, "k": n if m is None else m, "v": n if m is None else m}
    tensors = {name: torch.randn(batch, 2, size, 4, dtype=torch.float64) for name, size in sizes.items()}
    return tensors | {"q": spread * tensors["q"]}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def weights_of_scores(scores: Tensor, **options) -> Tensor:
    """Weights of one query and head whose scores are given."""
    m = scores.shape[-1]
    tensors = {"q": torch.ones(1, 1, 1, 1), "k": scores.view(1, 1, m, 1), "v": torch.zeros(1, 1, m, 1)}
    tensors = {name: x.double() for name, x in tensors.items()}
    call = {"pattern": "noncausal-cross", "config": Config(**options), "scale": 1.0, "want": {"weights"}}
    return apply(MECHANISM, tensors, **call).extras["weights"].flatten()


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_has_all_forms(options, pattern):
    config = Config(**options)
    tensors = inputs(19, 13 if pattern.cross else None)
    call = {"pattern": pattern, "config": config}
    expected = apply(MECHANISM, tensors, form="reference", **call).output
    close(apply(MECHANISM, tensors, **call).output, expected)
    if pattern.cross:
        state = None
        for part in (slice(0, 5), slice(5, 13)):
            memory = {name: tensors[name][:, :, part] for name in "kv"}
            state = absorb(MECHANISM, memory, pattern=pattern, config=config, state=state)
        close(apply(MECHANISM, {"q": tensors["q"]}, state=state, **call).output, expected)
    elif pattern.causal:
        state, outputs = None, []
        for part in torch.arange(19).split([8, 1, 1, 9]):
            piece = {name: tensors[name][:, :, part] for name in "qkv"}
            result = apply(MECHANISM, piece, state=state, return_state=True, **call)
            state = result.state
            outputs.append(result.output)
        close(torch.cat(outputs, 2), expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_padding_changes_nothing_since_gamma_is_a_constant(options, pattern):
    tensors, valid = inputs(12), torch.rand(2, 12) > 0.3
    call = {"pattern": pattern, "config": Config(**options)}
    found = apply(MECHANISM, tensors, mask=Mask(valid=valid), **call).output
    for b in range(2):
        alone = {name: x[b : b + 1, :, valid[b]] for name, x in tensors.items()}
        close(found[b : b + 1, :, valid[b]], apply(MECHANISM, alone, **call).output)
    short = {name: x[:, :, :5] for name, x in tensors.items()}
    if pattern == "causal-self":
        whole = apply(MECHANISM, tensors, **call).output[:, :, :5]
        close(apply(MECHANISM, short, **call).output, whole)


def test_without_a_stretch_it_is_softmax_bit_for_bit():
    tensors = {name: x.requires_grad_() for name, x in inputs(9).items()}
    outputs = [
        apply(MECHANISM, tensors, config=Config(gamma=0.0)).output,
        apply(get_mechanism("softmax"), tensors).output,
    ]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(o.square().sum(), list(tensors.values())) for o in outputs]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_weights_have_the_values_of_the_worked_example():
    scores = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    close(weights_of_scores(scores, gamma=-0.25), torch.tensor([0.375, 0.125, 0.0], dtype=torch.float64), 1e-15)
    close(weights_of_scores(scores, gamma=0.0, zeta=2.0), torch.tensor([1.0, 0.6, 0.4], dtype=torch.float64), 1e-15)


@pytest.mark.parametrize(("gamma", "zeta"), [(-0.3, 1.0), (-0.03, 1.1), (0.0, 1.5), (-0.001, 1.003)])
def test_a_weight_is_exactly_0_or_1_beyond_its_threshold_and_nowhere_else(gamma, zeta):
    zero, one = -gamma / (zeta - gamma), (1 - gamma) / (zeta - gamma)
    for p in (zero - 1e-9, zero + 1e-9, one - 1e-9, one + 1e-9, *torch.rand(20).tolist()):
        if 0 < p < 1:
            scores = torch.tensor([p, 1 - p], dtype=torch.float64).log()
            weight = float(weights_of_scores(scores, gamma=gamma, zeta=zeta)[0])
            assert (weight == 0) == (p <= zero)
            assert (weight == 1) == (p >= one)


@pytest.mark.parametrize("m", [3, 20, 200])
def test_a_finite_score_makes_all_other_weights_exactly_zero(m):
    gamma = -0.02
    t = -gamma / (1 - gamma)
    if 1 / t <= m - 1:
        assert (weights_of_scores(torch.zeros(m), gamma=gamma)[1:] == 0).all()
        return
    switch = math.log(1 / t - (m - 1))
    for score, zeros in ((switch - 1e-6, False), (switch + 1e-6, True)):
        scores = torch.zeros(m, dtype=torch.float64)
        scores[0] = score
        weights = weights_of_scores(scores, gamma=gamma)
        assert bool((weights[1:] == 0).all()) == zeros
        assert weights[0] < 1 and weights.sum() <= 1


def test_rows_sum_to_at_most_one_and_to_zero_where_weights_are_spread_out():
    tensors = inputs(40)
    call = {"pattern": "noncausal-self", "config": Config(length=40), "want": {"weights"}}
    sums = apply(MECHANISM, tensors, **call).extras["weights"].sum(-1)
    assert (sums >= 0).all() and (sums <= 1 + 1e-12).all()
    assert (sums < 1 - 1e-3).any()
    dead = apply(MECHANISM, tensors | {"q": torch.zeros_like(tensors["q"])}, **call)
    assert (dead.output == 0).all() and silent_rows(dead.extras["weights"]).tolist() == [80, 80]


def test_equal_weights_over_the_training_length_die_from_the_stated_alpha_on():
    m = 50
    for alpha, dead in ((m / (m - 1) - 1e-6, False), (m / (m - 1) + 1e-6, True)):
        assert bool((weights_of_scores(torch.zeros(m), alpha=alpha, length=m) == 0).all()) == dead
    alive = apply(MECHANISM, inputs(1000, batch=1, spread=0.0), pattern="noncausal-self", want={"weights"})
    assert silent_rows(alive.extras["weights"]).tolist() == [0, 0]


def test_rows_that_never_spoke_are_dead_and_those_that_fell_silent_chose_to():
    def rows(spread: float) -> Tensor:
        tensors = inputs(50, spread=spread)
        return apply(MECHANISM, tensors, config=Config(alpha=2.0, length=40), want={"weights"}).extras["weights"]

    valid = torch.rand(2, 50) > 0.2
    found, seen = SilentRows(valid), torch.zeros(2, 2, 50, dtype=torch.bool)
    for spread in (0.1, 3.0, 0.5):
        weights = rows(spread)
        silent = (weights == 0).all(-1)
        fell, seen = seen & silent, seen | ~silent
        dead, chosen = found.measure(weights)
        for share, expected in ((dead, ~seen), (chosen, fell)):
            close(share, torch.stack([expected[:, h][valid].float().mean() for h in range(2)]), 1e-6)
        if spread == 0.1:
            assert (chosen == 0).all() and (dead > 0.1).all()
    assert (chosen > 0).all()
    with pytest.raises(Unsupported, match="the same batch"):
        found.measure(rows(1.0)[:, :, 1:])


def test_masked_keys_have_weight_exactly_zero():
    tensors = inputs(6)
    bias = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    bias[..., 2] = -torch.inf
    bias[..., 4, :] = -torch.inf
    call = {"config": Config(gamma=-0.01, zeta=1.2), "want": {"weights"}}
    found = apply(MECHANISM, tensors, pattern="noncausal-self", mask=Mask(bias=bias), **call)
    assert (found.extras["weights"][..., 2] == 0).all() and (found.output[:, :, 4] == 0).all()


def test_gradients_are_those_of_softmax_inside_and_zero_where_everything_is_clipped():
    tensors = {name: x.requires_grad_() for name, x in inputs(5, batch=1, spread=1.0).items()}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return apply(MECHANISM, {"q": q, "k": k, "v": v}, config=Config(gamma=-0.11, zeta=1.07)).output

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))
    still = {name: x.requires_grad_() for name, x in inputs(40, batch=1, spread=0.0).items()}
    output = apply(MECHANISM, still, pattern="noncausal-self", config=Config(length=40)).output
    for gradient in torch.autograd.grad(output.sum(), list(still.values())):
        assert (gradient == 0).all()


@pytest.mark.parametrize("pairs", [1 << 22, 64])
def test_blocks_of_queries_equal_the_definition_with_gradients(monkeypatch, pairs):
    monkeypatch.setattr(backend, "PAIRS_AT_ONCE", pairs)
    monkeypatch.setattr(backend, "SMALLEST_BLOCK", 3)
    tensors = {name: x.requires_grad_() for name, x in inputs(23).items()}
    config = Config(gamma=-0.05, zeta=1.1)
    found, expected = (
        torch.autograd.grad(
            apply(MECHANISM, tensors, config=config, form=form).output.square().sum(), list(tensors.values())
        )
        for form in ("parallel", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-11)


def test_dropout_comes_after_the_clip():
    m = 400
    tensors = {"q": torch.zeros(1, 1, 1, 4), "k": torch.zeros(1, 1, m, 4), "v": torch.eye(m)[None, None]}
    config = Config(gamma=-0.5 / m)
    output = apply(MECHANISM, tensors, pattern="noncausal-cross", config=config, dropout=0.25).output
    kept = output[output != 0]
    weight = (1 + 0.5 / m) / m - 0.5 / m
    torch.testing.assert_close(kept, torch.full_like(kept, weight / 0.75))
    assert abs(kept.numel() / m - 0.75) < 0.1


def test_gamma_follows_the_training_length_and_the_warm_up():
    assert Config(length=128).stretch() == (-0.025, 1.0)
    assert Config(alpha=12, length=512, zeta=1.01).stretch() == (-12 / 512, 1.01)
    warming = Config(gamma=-0.04, warmup=100)
    assert [warming.stretch(p)[0] for p in (0, 25, 100, 900, None)] == [0, -0.01, -0.04, -0.04, -0.04]
    layer = create_layer("clipped_softmax", 8, 2, gamma=-0.3, warmup=10).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    begun = layer(x, context=Context(progress=0.0)).output
    plain = create_layer("softmax", 8, 2).double()
    plain.load_state_dict(layer.state_dict())
    close(begun, plain(x).output)
    assert not torch.allclose(layer(x).output, begun)
    close(layer(x, context=Context(progress=10.0)).output, layer(x).output)


def test_half_precision_is_stretched_and_clipped_in_float32():
    tensors = inputs(30)
    call = {"pattern": "noncausal-self", "config": Config(length=30)}
    for dtype, tolerance in ((torch.bfloat16, 4e-3), (torch.float16, 1e-3)):
        half = {name: x.to(dtype) for name, x in tensors.items()}
        expected = apply(MECHANISM, {name: x.double() for name, x in half.items()}, form="reference", **call).output
        error = (apply(MECHANISM, half, **call).output - expected).abs().max() / expected.abs().max()
        assert error < tolerance


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("clipped_softmax_padded", "noncausal-self"), ("clipped_softmax_causal", "causal-self")],
)
def test_parity_with_the_authors_layer(name, pattern):
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    config = {"gamma": float(arrays["gamma"]), "zeta": float(arrays["zeta"])}
    layer = create_layer("clipped_softmax", 16, 2, pattern=pattern, bias=True, **config).double()
    weights = {
        f"{part}.{kind}": arrays[f"weight_{part}_{kind}"]
        for part in ("query", "key", "value")
        for kind in ("weight", "bias")
    }
    layer.load_state_dict(weights | {"output.weight": torch.eye(16), "output.bias": torch.zeros(16)})
    x, mask = arrays["x"].requires_grad_(), None
    if "mask" in arrays:  # the authors' code pads keys only
        mask = Mask(
            bias=torch.zeros(2, 1, 1, 14, dtype=torch.float64).masked_fill(~arrays["mask"][:, None, None], -torch.inf)
        )
    result = layer(x, context=Context(mask=mask, want=frozenset({"weights"})))
    close(result.extras["weights"], arrays["attn"], 1e-12)  # observed 3e-16
    close(result.output, arrays["core_out"], 1e-12)  # observed 4e-16
    (gradient,) = torch.autograd.grad(result.output, x, arrays["grad_out"])
    close(gradient, arrays["grad_x"], 1e-12)  # observed 4e-16


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.1},
        {"gamma": -math.inf},
        {"gamma": math.nan},
        {"zeta": 0.9},
        {"zeta": math.inf},
        {"alpha": -1.0, "length": 8},
        {"alpha": 2.0},
        {"length": 0},
        {"gamma": -0.1, "length": 8},
        {"gamma": -0.1, "alpha": 2.0},
        {"warmup": -1.0},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)
