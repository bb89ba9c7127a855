"""What is peculiar to Sinkhorn attention: the soft permutation, no leak through its columns, the mixed block kept, parity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.apply import apply
from regard.backends import only
from regard.catalogue import get_mechanism
from regard.contract import Call, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.mechanisms import sinkhorn
from regard.mechanisms.sinkhorn import MECHANISM, Config, cost, sorting_weights
from regard.models import LanguageModel, LanguageModelConfig

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
PATTERNS = [p.value for p in MECHANISM.patterns]
NONCAUSAL = ["noncausal-self", "noncausal-cross"]


def inputs(n: int, m: int | None = None, batch: int = 2) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {"q": (batch, 2, n, 4), "k": (batch, 2, m, 4), "v": (batch, 2, m, 5)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", options: dict | None = None, **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call).output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def one_row_in_words(q: Tensor, k: Tensor, v: Tensor, pattern: str, config: Config) -> Tensor:
    """One head of one row."""
    size, n, m = config.block, len(q), len(k)
    causal, own = pattern == "causal-self", pattern.endswith("self")
    rows, columns = math.ceil(n / size), math.ceil(m / size)
    p = torch.zeros(rows, columns, dtype=torch.float64)
    pairs = [(i, j) for i in range(rows) for j in range(columns) if j < i or not causal]
    for i, j in pairs:
        query = q[: i * size + 1].mean(0) if causal else q[i * size : (i + 1) * size].mean(0)
        key = k[: (j + 1) * size].mean(0) if causal else k[j * size : (j + 1) * size].mean(0)
        p[i, j] = (max(0.0, float(query @ key) / 2) + 1e-6) ** (1 / config.temperature)
    for _ in range(config.iterations):
        total = p.sum(1)
        for i, j in pairs:
            p[i, j] /= total[i]
        before = p.clone()
        for i, j in pairs:
            p[i, j] /= before[: i + 1, j].sum() if causal else before[:, j].sum()
    places = min(size, m)
    mixed_k, mixed_v = torch.zeros(rows, places, 4).double(), torch.zeros(rows, places, 5).double()
    for i in range(rows):
        for j in range(columns):
            for t in range(min(size, m - j * size)):
                mixed_k[i, t] += p[i, j] * k[j * size + t]
                mixed_v[i, t] += p[i, j] * v[j * size + t]
    outputs = []
    for i in range(n):
        block = i // size
        keys, values = mixed_k[block], mixed_v[block]
        if config.sortcut is not None:
            keys, values = mixed_k[: config.sortcut].flatten(0, 1), mixed_v[: config.sortcut].flatten(0, 1)
        if causal and block == 0:
            keys, values = keys[:0], values[:0]
        if own and config.sortcut is None:
            local = slice(block * size, i + 1 if causal else (block + 1) * size)
            keys, values = torch.cat([keys, k[local]]), torch.cat([values, v[local]])
        outputs.append((keys @ q[i] / 2).softmax(0) @ values)
    return torch.stack(outputs)


def in_words(tensors: dict[str, Tensor], pattern: str, options: dict) -> Tensor:
    flat = [x.flatten(0, 1) for x in tensors.values()]
    rows = [one_row_in_words(*row, pattern, Config(**options)) for row in zip(*flat, strict=True)]
    return torch.stack(rows).unflatten(0, (-1, 2))


OPTIONS = [
    {"block": 3},
    {"block": 1, "iterations": 2},
    {"block": 4, "iterations": 0, "temperature": 2.0},
    {"block": 30},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_form_equals_the_definition_in_words(options, pattern):
    for n, m in ((1, 1), (12, 12), (20, 20), (7, 17)):
        if n != m and "self" in pattern:
            continue
        tensors = inputs(n, m, batch=1)
        expected = in_words(tensors, pattern, options)
        close(run(tensors, pattern, options), expected)
        close(run(tensors, pattern, options, form="reference"), expected)


@pytest.mark.parametrize("pattern", NONCAUSAL)
@pytest.mark.parametrize("cut", [1, 2, 50])
def test_sortcut_shows_the_first_sorted_blocks(pattern, cut):
    options = {"block": 4, "sortcut": cut}
    tensors = inputs(18, 18 if "self" in pattern else 11, batch=1)
    expected = in_words(tensors, pattern, options)
    close(run(tensors, pattern, options), expected)
    close(run(tensors, pattern, options, form="reference"), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_block_is_dense_attention(pattern):
    tensors = inputs(9, 9 if "self" in pattern else 14)
    expected = scaled_dot_product_attention(*tensors.values(), is_causal=pattern == "causal-self")
    close(run(tensors, pattern, {"block": 14}), expected)


def test_without_causality_rows_and_columns_sum_to_one():
    call = Call(Pattern.NONCAUSAL_SELF, Config(iterations=200, temperature=5.0), scale=0.5)
    weights = sorting_weights(call, *torch.randn(2, 3, 2, 6, 4, dtype=torch.float64))
    close(weights.sum(3), torch.ones(3, 2, 6, dtype=torch.float64), 1e-4)
    close(weights.sum(2), torch.ones(3, 2, 6, dtype=torch.float64), 1e-10)


def test_a_later_block_takes_no_share_of_a_column_from_earlier_ones():
    """Columns summed over all rows would tell earlier blocks what later ones ask for."""
    tensors = inputs(30)
    before = run(tensors, options={"block": 3})
    for start in (13, 15, 17):
        altered = {name: x.clone() for name, x in tensors.items()}
        for name in "qkv":
            altered[name][:, :, start:] = 10 * torch.randn_like(altered[name][:, :, start:])
        close(run(altered, options={"block": 3})[:, :, :start], before[:, :, :start])


def test_noise_is_drawn_in_training_only_from_the_generator():
    tensors = inputs(24)
    for pattern in ("noncausal-self", "causal-self"):
        plain = run(tensors, pattern, {"block": 4})
        noisy = [
            run(tensors, pattern, {"block": 4}, training=True, generator=torch.Generator().manual_seed(1), form=form)
            for form in (None, "reference")
        ]
        close(*noisy)
        assert not torch.allclose(noisy[0], plain)
        close(run(tensors, pattern, {"block": 4, "noise": False}, training=True), plain)


def test_a_temperature_near_zero_with_noise_is_nearly_a_permutation():
    call = Call(Pattern.NONCAUSAL_SELF, Config(temperature=0.02, iterations=500), scale=1.0, training=True)
    weights = sorting_weights(call, *torch.randn(2, 1, 1, 5, 4, dtype=torch.float64))[0, 0]
    assert (weights.max(1).values > 0.9).all() or (weights.max(0).values > 0.9).all()


def test_gradients_through_the_sorting_stay_precise_in_float32():
    """ln(x + 1e-6) amplifies errors of x."""
    tensors, upstream, found = inputs(40), torch.randn(2, 2, 40, 5), []
    for dtype in (torch.float32, torch.float64):
        leaves = {name: x.float().to(dtype).requires_grad_() for name, x in tensors.items()}
        output = run(leaves, "noncausal-self", {"block": 4})
        gradients = torch.autograd.grad(output, list(leaves.values()), upstream.to(dtype))
        found.append([gradient.double() for gradient in gradients])
    for single, double in zip(*found, strict=True):
        assert (single - double).abs().max() <= 2e-6 * double.abs().max()


def test_blocks_are_sorted_once_for_each_block_of_steps(monkeypatch):
    tensors, config, calls = inputs(40), Config(block=5), []
    whole = run(tensors, options={"block": 5})
    inner = sinkhorn.sorting_weights
    state = apply(MECHANISM, {n: x[:, :, :10] for n, x in tensors.items()}, config=config, return_state=True).state
    monkeypatch.setattr(sinkhorn, "sorting_weights", lambda *a: calls.append(1) or inner(*a))
    for t in range(10, 40):
        result = apply(MECHANISM, {n: x[:, :, t : t + 1] for n, x in tensors.items()}, config=config, state=state)
        close(result.output, whole[:, :, t : t + 1])
        state = result.state
    assert len(calls) == 6
    counted = sum(x[0].numel() for n, x in state.tensors().items() if n not in ("length", "ranks"))
    assert counted == cost(Shape(1, 2, 1, 40, 4, 5), config).state


def test_the_place_that_a_short_block_lacks_adds_nothing():
    tensors = inputs(7)
    longer = {name: torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for name, x in tensors.items()}
    found = run(longer, "noncausal-self", {"block": 4}, mask=Mask(lengths=torch.tensor([7, 7])))
    close(found[:, :, :7], run(tensors, "noncausal-self", {"block": 4}))


def test_a_model_decodes_as_it_reads():
    plan = [("sinkhorn", {"block": block}) for block in (4, 3)]
    model = LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan)).double().eval()
    ids = torch.randint(11, (2, 10))
    assert torch.equal(model.generate(ids, 20), model.generate(ids, 20, use_state=False))


@pytest.mark.parametrize("pattern", NONCAUSAL)
def test_parity_with_a_third_partys_code(pattern):
    with np.load(FIXTURES / f"sinkhorn_{pattern.removeprefix('noncausal-')}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    q, k = arrays["q"].requires_grad_(), arrays["k"].requires_grad_()
    output = run({"q": q, "k": k, "v": k}, pattern, {"block": 4})
    close(output, arrays["out"], 1e-10)
    for name, gradient in zip("qk", torch.autograd.grad(output, (q, k), arrays["grad_out"]), strict=True):
        close(gradient, arrays[f"grad_{name}"], 1e-10)


def test_the_native_kernel_runs_the_blocks():
    tensors = {name: x.float() for name, x in inputs(70).items()}
    for pattern in ("causal-self", "noncausal-self"):
        with only("native"):
            found = run(tensors, pattern, {"block": 8})
        expected = run({n: x.double() for n, x in tensors.items()}, pattern, {"block": 8}, form="reference")
        close(found.double(), expected, 2e-6)


def test_what_it_lacks_is_refused_with_the_reason():
    assert get_mechanism("sparse_sinkhorn") is MECHANISM
    for options in ({"block": 0}, {"temperature": 0.0}, {"iterations": -1}, {"sortcut": 0}):
        with pytest.raises(Unsupported):
            Config(**options)
    with pytest.raises(Unsupported, match="later tokens"):
        run(inputs(5), "causal-self", {"sortcut": 1})
    with pytest.raises(Unsupported, match="shared out"):
        create_layer("sinkhorn", 8, 2, pattern="causal-cross")
    with pytest.raises(Unsupported):
        run(inputs(5, 7))
    layer = create_layer("sinkhorn", 8, 2, pattern="noncausal-cross")
    with pytest.raises(Unsupported, match="absorbing memory"):
        layer.encode_memory(torch.randn(1, 4, 8))
