"""Tests specific to Nystrom attention: segments, the pseudoinverse, rows too short for landmarks, and recorded outputs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support import calls, check_recorded, close, load, qkv, refused
from torch import Tensor

from regard.contract import Mask
from regard.create import create_layer
from regard.mechanisms.nystrom import MECHANISM, pseudoinverse

FOUR = {"landmarks": 4}
run = calls(MECHANISM, "noncausal-self")


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def segments(n: int, c: int) -> list[range]:
    """The segments of n tokens, the shorter ones first."""
    borders, size, longer = [0], n // c, n % c
    for i in range(c):
        borders.append(borders[-1] + size + (i >= c - longer))
    return [range(a, b) for a, b in itertools.pairwise(borders)]


def definition(tensors: dict[str, Tensor], c: int = 4, scale: float = 0.5) -> Tensor:
    """The definition, one row and head at a time; rows with at most c tokens use softmax attention."""
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


EVEN_AND_UNEVEN = [(16, 16), (19, 19), (5, 23), (23, 5), (9, 10)]
FEW = [(4, 4), (3, 3), (4, 20), (20, 4), (1, 9)]


@pytest.mark.parametrize(("n", "m"), EVEN_AND_UNEVEN + FEW)
@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_the_definition_which_is_softmax_attention_of_as_many_tokens_as_landmarks(n, m, groups):
    tensors = qkv(n, m, groups=groups, value_dim=3)
    for pattern in ("noncausal-cross", *(["noncausal-self"] if n == m else [])):
        close(run(tensors, FOUR, pattern=pattern).output, definition(tensors))


@pytest.mark.parametrize("pattern", ["noncausal-self", "noncausal-cross"])
def test_rows_with_few_and_many_tokens_lie_in_one_batch(pattern):
    """Padded rows with at most c tokens use softmax attention while longer rows of the batch do not."""
    counts = torch.tensor([17, 4, 2, 9, 0, 3, 17])
    key_counts = torch.tensor([17, 17, 3, 2, 5, 0, 6]) if "cross" in pattern else counts
    masks = {"mask": Mask(lengths=counts)}
    if "cross" in pattern:
        masks["memory_mask"] = Mask(lengths=key_counts)
    tensors = qkv(17, batch=7)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    found = run(leaves, FOUR, pattern=pattern, **masks).output
    for row in range(7):
        lengths = {"q": counts[row], "k": key_counts[row], "v": key_counts[row]}
        alone = {name: x[row : row + 1, :, : lengths[name]] for name, x in tensors.items()}
        close(found[row : row + 1, :, : counts[row]].detach(), definition(alone))
    found.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())


def test_the_iteration_inverts_attention_matrices():
    logits = torch.randn(50, 2, 16, 16, dtype=torch.float64)
    clear, any_other = (4 * torch.eye(16) + logits / 2).softmax(-1), logits.softmax(-1)

    def residual(a: Tensor, iterations: int | None) -> float:
        return float((a @ pseudoinverse(a, iterations) @ a - a).abs().max())

    assert residual(clear, 6) < 1e-3
    assert residual(any_other, 6) < 0.02  # small singular values converge last
    assert residual(any_other, None) < 1e-12
    close(pseudoinverse(clear, 20), torch.linalg.pinv(clear), 1e-9)


@pytest.mark.parametrize("iterations", [6, None])
@pytest.mark.parametrize("pattern", ["noncausal-self", "noncausal-cross"])
def test_gradients_through_landmarks_are_numerical_ones(pattern, iterations):
    tensors, options = (
        [x.requires_grad_() for x in qkv(6, batch=1).values()],
        {"landmarks": 3, "iterations": iterations},
    )
    function = lambda q, k, v: run({"q": q, "k": k, "v": v}, options, pattern=pattern).output  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors)


# convolution


@pytest.mark.parametrize("n", [3, 11])
def test_the_convolution_adds_shifted_values_and_stops_at_the_ends_of_a_row(n):
    tensors = qkv(n, groups=1)
    values = tensors["v"].expand(-1, 2, -1, -1)
    kernel = torch.zeros(2, 5, dtype=torch.float64)
    kernel[0, 2], kernel[1, 4] = 2.0, 1.0  # the token itself; two tokens later
    added = run(tensors | {"convolution": kernel}, FOUR).output - run(tensors, FOUR).output
    close(added[:, 0], 2 * values[:, 0])
    close(added[:, 1, : n - 2], values[:, 1, 2:])
    close(added[:, 1, n - 2 :], torch.zeros_like(added[:, 1, n - 2 :]))


def kernel_of_a_layer(**options) -> Tensor | None:
    return create_layer("nystrom", 16, 4, **options).projection.convolution


def test_a_layer_has_a_convolution_in_noncausal_self():
    assert kernel_of_a_layer(pattern="noncausal-self").shape == (4, 33)
    assert kernel_of_a_layer(pattern="noncausal-self", convolution=5).shape == (4, 5)
    assert kernel_of_a_layer(pattern="noncausal-self", convolution=0) is None
    assert kernel_of_a_layer(pattern="noncausal-cross") is None
    refused("noncausal-self", kernel_of_a_layer, pattern="noncausal-cross", convolution=5)


# refusals


def test_a_convolution_is_refused_across_and_with_an_even_kernel():
    refused("convolution", run, qkv(6) | {"convolution": torch.zeros(2, 3).double()}, pattern="noncausal-cross")
    refused("odd", run, qkv(6) | {"convolution": torch.zeros(2, 4).double()})


# parity


@pytest.mark.parametrize("name", ["nystrom_transformers", "nystrom_transformers_conv", "nystrom_transformers_exact"])
def test_parity_with_the_layer_of_transformers(name):
    recorded = load(name)
    x = recorded["x"].requires_grad_()
    heads = {
        short: torch.nn.functional.linear(x, recorded[long], recorded[f"{long}_bias"])
        .unflatten(-1, (2, 8))
        .transpose(1, 2)
        for short, long in (("q", "query"), ("k", "key"), ("v", "value"))
    }
    if "convolution" in recorded:
        heads["convolution"] = recorded["convolution"]
    output = run(heads, FOUR).output.transpose(1, 2).flatten(2)
    check_recorded(recorded, output, {"x": x}, 1e-10)


def test_parity_with_the_benchmarks_code_at_an_uneven_length():
    recorded = load("nystrom_uneven_cab")
    tensors = {x: recorded[x].requires_grad_() for x in "qkv"}
    output = run(tensors, FOUR, scale=1 / 8).output
    check_recorded(recorded, output, tensors, 1e-10)
