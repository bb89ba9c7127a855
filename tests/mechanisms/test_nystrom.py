"""What is peculiar to Nystrom attention: segments, the pseudoinverse, rows too short for landmarks, recorded outputs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import apply
from regard.contract import Mask, Unsupported
from regard.create import create_layer
from regard.engines.segments import segment_means
from regard.functional import nystrom_attention, softmax_attention
from regard.mechanisms.nystrom import MECHANISM, Config, pseudoinverse

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
FOUR = {"landmarks": 4}


def inputs(n: int, m: int | None = None, groups: int = 2, batch: int = 2) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {"q": (2, n, 4), "k": (groups, m, 4), "v": (groups, m, 3)}
    return {name: torch.randn(batch, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "noncausal-self", options: dict | None = None, **call: Any) -> Any:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(FOUR | (options or {}))), **call).output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def segments(n: int, c: int) -> list[range]:
    """Of n tokens: the shorter ones first."""
    borders, size, longer = [0], n // c, n % c
    for i in range(c):
        borders.append(borders[-1] + size + (i >= c - longer))
    return [range(a, b) for a, b in itertools.pairwise(borders)]


def definition(tensors: dict[str, Tensor], c: int = 4, scale: float = 0.5) -> Tensor:
    """One row and head after the other; softmax attention where a row has c tokens or fewer."""
    q, k, v = (tensors[name].numpy() for name in "qkv")
    found = np.zeros((*q.shape[:3], v.shape[3]))
    for b, h in np.ndindex(*q.shape[:2]):
        g = h * k.shape[1] // q.shape[1]
        query, key, value = q[b, h], k[b, g], v[b, g]
        if min(len(query), len(key)) <= c:
            found[b, h] = softmax(scale * query @ key.T) @ value if len(key) else 0
            continue
        queries = np.stack([query[list(s)].mean(0) for s in segments(len(query), c)])
        keys = np.stack([key[list(s)].mean(0) for s in segments(len(key), c)])
        a = softmax(scale * queries @ keys.T)
        z = a.T / (a.sum(0).max() * a.sum(1).max())
        for _ in range(6):
            z = 0.25 * z @ (13 * np.eye(c) - a @ z @ (15 * np.eye(c) - a @ z @ (7 * np.eye(c) - a @ z)))
        found[b, h] = softmax(scale * query @ keys.T) @ z @ softmax(scale * queries @ key.T) @ value
    return torch.from_numpy(found)


@pytest.mark.parametrize(("n", "m"), [(16, 16), (19, 19), (5, 23), (23, 5), (9, 10)])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_form_equals_the_definition_at_even_and_uneven_lengths(n, m, groups):
    tensors = inputs(n, m, groups)
    for pattern in ("noncausal-cross", *(["noncausal-self"] if n == m else [])):
        for form in ("reference", "parallel"):
            close(run(tensors, pattern, form=form), definition(tensors))


@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 3), (4, 20), (20, 4), (1, 9)])
def test_with_as_many_landmarks_as_tokens_it_is_softmax_attention(n, m):
    tensors = inputs(n, m)
    expected = softmax_attention(*tensors.values(), pattern="noncausal-cross")
    for form in ("reference", "parallel"):
        close(run(tensors, "noncausal-cross", form=form), expected)


def test_segments_of_each_row_are_those_of_its_own_tokens():
    x = torch.randn(5, 2, 13, 3, dtype=torch.float64)
    lengths = torch.tensor([13, 8, 4, 3, 0])
    found = segment_means(x.masked_fill(torch.arange(13)[:, None] >= lengths[:, None, None, None], 0), 4, lengths)
    for row, length in enumerate(lengths.tolist()):
        own = segment_means(x[row : row + 1, :, :length], 4)[0]
        expected = [x[row][:, list(s)].mean(1) for s in segments(length, min(4, length))] if length else []
        close(own, torch.stack(expected, 1) if expected else own)
        close(found[row, :, : own.shape[1]], own)
        assert (found[row, :, own.shape[1] :] == 0).all()


@pytest.mark.parametrize("pattern", ["noncausal-self", "noncausal-cross"])
def test_rows_with_few_and_many_tokens_lie_in_one_batch(pattern):
    """Padded rows of c tokens or fewer are softmax attention beside others that are not."""
    counts = torch.tensor([17, 4, 2, 9, 0, 3, 17])
    key_counts = torch.tensor([17, 17, 3, 2, 5, 0, 6]) if "cross" in pattern else counts
    tensors = inputs(17, batch=7)
    lengths = {"q": counts, "k": key_counts, "v": key_counts}
    padded = {
        name: x.masked_fill(torch.arange(17)[:, None] >= lengths[name][:, None, None, None], torch.nan)
        for name, x in tensors.items()
    }
    leaves = {name: x.requires_grad_() for name, x in padded.items()}
    masks = {"mask": Mask(lengths=counts)}
    if "cross" in pattern:
        masks["memory_mask"] = Mask(lengths=key_counts)
    found = run(leaves, pattern, **masks)
    for row in range(7):
        alone = {name: x[row : row + 1, :, : lengths[name][row]] for name, x in tensors.items()}
        close(found[row : row + 1, :, : counts[row]].detach(), definition(alone))
    found.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())


def test_the_iteration_inverts_attention_matrices():
    logits = torch.randn(50, 2, 16, 16, dtype=torch.float64)
    clear, any_other = (4 * torch.eye(16) + logits / 2).softmax(-1), logits.softmax(-1)

    def residual(a: Tensor, iterations: int | None) -> float:
        return float((a @ pseudoinverse(a, iterations) @ a - a).abs().max())

    assert residual(clear, 6) < 1e-3
    errors = [residual(any_other, iterations) for iterations in (4, 6, 8, 12)]
    assert errors[3] < errors[2] < errors[1] < errors[0]  # small singular values converge last
    assert errors[1] < 0.02
    assert residual(any_other, None) < 1e-12
    exact = torch.linalg.pinv(clear)
    close(pseudoinverse(clear, 20), exact, 1e-9)


def test_each_matrix_has_its_own_factor():
    """A factor shared over the batch, as in the original code, would let one row slow the inversion of another."""
    tensors = inputs(20)
    other = {name: x.clone() for name, x in tensors.items()}
    other["q"][1], other["k"][1] = 5.0, torch.linspace(-9, 9, 20)[:, None]
    assert torch.equal(run(tensors)[0], run(other)[0])


def test_more_landmarks_come_closer_to_softmax_on_smooth_sequences():
    t = torch.linspace(0, 6, 256, dtype=torch.float64)[:, None]
    waves = torch.cat([torch.sin(t * f) for f in (1.0, 2.0, 3.0)] + [torch.cos(t)], -1)[None, None]
    tensors = {"q": waves, "k": waves.flip(3), "v": waves[..., :3]}
    expected = softmax_attention(*tensors.values(), pattern="noncausal-self")
    errors = [float((run(tensors, options={"landmarks": c}) - expected).abs().max()) for c in (4, 8, 32)]
    assert errors[2] < 0.01 < errors[1] < 0.1 < errors[0]


@pytest.mark.parametrize("options", [{}, {"iterations": None}])
@pytest.mark.parametrize("pattern", ["noncausal-self", "noncausal-cross"])
def test_gradcheck_with_landmarks(pattern, options):
    tensors = [x.requires_grad_() for x in inputs(6, batch=1).values()]
    function = lambda q, k, v: run({"q": q, "k": k, "v": v}, pattern, {"landmarks": 3} | options)  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors)


def test_thousands_of_tokens_stay_precise_in_float32():
    tensors = inputs(4000, batch=1)
    expected = run(tensors, options={"landmarks": 64})
    single = run({name: x.float() for name, x in tensors.items()}, options={"landmarks": 64})
    assert (single - expected).abs().max() <= MECHANISM.tolerances[torch.float32] * expected.abs().max()


# convolution


@pytest.mark.parametrize("n", [3, 11])
def test_the_convolution_adds_shifted_values_and_stops_at_the_ends_of_a_row(n):
    tensors = inputs(n, groups=1)
    plain, values = run(tensors), tensors["v"].expand(-1, 2, -1, -1)
    kernel = torch.zeros(2, 5, dtype=torch.float64)
    kernel[0, 2], kernel[1, 4] = 2.0, 1.0  # the token itself; two tokens later
    for form in ("reference", "parallel"):
        added = run(tensors | {"convolution": kernel}, form=form) - plain
        close(added[:, 0], 2 * values[:, 0])
        close(added[:, 1, : n - 2], values[:, 1, 2:])
        close(added[:, 1, n - 2 :], torch.zeros_like(added[:, 1, n - 2 :]))
    padded = {name: torch.cat([x, torch.full_like(x, torch.nan)], 2) for name, x in tensors.items()}
    whole = run(padded | {"convolution": kernel}, mask=Mask(lengths=torch.tensor([n, n])))
    close(whole[:, :, :n], run(tensors | {"convolution": kernel}))


def test_a_layer_has_a_convolution_in_noncausal_self():
    shape = lambda **options: create_layer("nystrom", 16, 4, **options).projection.convolution  # noqa: E731
    assert shape(pattern="noncausal-self").shape == (4, 33)
    assert shape(pattern="noncausal-self", convolution=5).shape == (4, 5)
    assert shape(pattern="noncausal-self", convolution=0) is None
    assert shape(pattern="noncausal-cross") is None
    with pytest.raises(Unsupported, match="noncausal-self"):
        shape(pattern="noncausal-cross", convolution=5)


# refusals


@pytest.mark.parametrize("options", [{"landmarks": 0}, {"iterations": 0}, {"convolution": 4}, {"convolution": -3}])
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_what_it_lacks_is_refused():
    tensors = inputs(6)
    for pattern in ("causal-self", "causal-cross"):
        with pytest.raises(Unsupported, match="later"):
            run(tensors, pattern)
    with pytest.raises(Unsupported, match="convolution"):
        run(tensors | {"convolution": torch.zeros(2, 3).double()}, "noncausal-cross")
    with pytest.raises(Unsupported, match="odd"):
        run(tensors | {"convolution": torch.zeros(2, 4).double()})
    with pytest.raises(Unsupported, match="nystrom"):
        nystrom_attention(*tensors.values(), pattern="noncausal-self", mask=Mask(bias=torch.zeros(1, 1, 6, 6)))


# parity


def load(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.mark.parametrize("name", ["nystrom_transformers", "nystrom_transformers_conv", "nystrom_transformers_exact"])
def test_parity_with_the_layer_of_transformers(name):
    recorded = load(name)
    x = recorded["x"].requires_grad_()
    linear = torch.nn.functional.linear
    heads = {
        short: linear(x, recorded[long], recorded[f"{long}_bias"]).unflatten(-1, (2, 8)).transpose(1, 2)
        for short, long in (("q", "query"), ("k", "key"), ("v", "value"))
    }
    if "convolution" in recorded:
        heads["convolution"] = recorded["convolution"]
    output = run(heads).transpose(1, 2).flatten(2)
    close(output, recorded["out"], 1e-10)
    close(torch.autograd.grad(output, x, recorded["grad_out"])[0], recorded["grad_x"], 1e-10)


def test_parity_with_the_benchmarks_code_at_an_uneven_length():
    recorded = load("nystrom_uneven_cab")
    tensors = {x: recorded[x].requires_grad_() for x in "qkv"}
    output = run(tensors, scale=1 / 8)
    close(output, recorded["out"], 1e-10)
    found = torch.autograd.grad(output, list(tensors.values()), recorded["grad_out"])
    for x, gradient in zip("qkv", found, strict=True):
        close(gradient, recorded[f"grad_{x}"], 1e-10)
