"""Tests specific to randomised attention: its proposals, their noise, rows with few tokens, and recorded outputs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support import calls, check_recorded, close, load, qkv, refused
from torch import Tensor

from regard.contract import Mask
from regard.mechanisms.lara import MECHANISM

run = calls(MECHANISM, "noncausal-self")
FOUR = {"landmarks": 4}


def means(x: np.ndarray, c: int) -> np.ndarray:
    """Means of c segments, the shorter ones first."""
    size, longer = divmod(len(x), c)
    borders = np.cumsum([0] + [size] * (c - longer) + [size + 1] * longer)
    return np.stack([x[a:b].mean(0) for a, b in itertools.pairwise(borders)])


def definition(tensors: dict[str, Tensor], noise: np.ndarray | None = None, c: int = 4) -> Tensor:
    """Sums over pairs with the weights implied by the mechanism's docstring, with plain exponentials."""
    q, k, v = (tensors[name].numpy() for name in "qkv")
    found, t = np.zeros((*q.shape[:3], v.shape[3])), 0.5
    count = min(c, q.shape[2], k.shape[2])
    for b, h in np.ndindex(*q.shape[:2]):
        g = h * k.shape[1] // q.shape[1]
        if count == 0:
            continue
        mu = means(q[b, h], count) + means(k[b, g], count)
        w = mu if noise is None else mu + noise[b, h, :count]
        phi = lambda x, w=w: np.exp(t * x @ w.T - t / 2 * (x * x).sum(-1, keepdims=True))  # noqa: E731
        own = np.exp(t * (w * mu).sum(-1) - t / 2 * (mu * mu).sum(-1))
        keys = phi(k[b, g])
        shares = np.exp(t * q[b, h] @ mu.T) * phi(q[b, h]) * keys.sum(0) / own
        weights = (shares / shares.sum(-1, keepdims=True)) @ (keys / keys.sum(0)).T
        np.testing.assert_allclose(weights.sum(-1), 1)
        found[b, h] = weights @ v[b, g]
    return torch.from_numpy(found)


@pytest.mark.parametrize(
    ("n", "m"), [(16, 16), (19, 19), (5, 23), (23, 5), (3, 9), (9, 2), (1, 1), (2, 2), (0, 3), (3, 0)]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_form_equals_the_definition_at_even_and_uneven_lengths(n, m, groups):
    tensors = qkv(n, m, groups=groups, value_dim=3)
    for pattern in ("noncausal-cross", *(["noncausal-self"] if n == m else [])):
        for form in ("reference", "parallel"):
            close(run(tensors, FOUR, pattern=pattern, form=form).output, definition(tensors))


@pytest.mark.parametrize("form", ["reference", "parallel"])
def test_training_moves_the_proposals_and_not_mu(form):
    tensors, generator = qkv(13), torch.Generator().manual_seed(3)
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(3)).double().numpy()
    found = run(tensors, {**FOUR, "noise": 0.7}, form=form, training=True, generator=generator).output
    close(found, definition(tensors, 0.7 * noise))
    still = {**FOUR, "noise": 0.0}
    assert torch.equal(run(tensors, still, training=True).output, run(tensors, FOUR).output)


@pytest.mark.parametrize("given", [("mask",), ("memory_mask",), ("mask", "memory_mask")])
def test_rows_with_few_and_many_queries_and_keys_lie_in_one_batch(given):
    tensors = qkv(17, batch=7)
    counts = {"mask": torch.tensor([17, 4, 2, 9, 0, 3, 17]), "memory_mask": torch.tensor([17, 17, 3, 2, 5, 0, 6])}
    masks = {name: Mask(lengths=counts[name]) for name in given}
    found = run(tensors, FOUR, pattern="noncausal-cross", **masks).output
    for row in range(7):
        n, m = (int(counts[name][row]) if name in given else 17 for name in counts)
        alone = {name: x[row : row + 1, :, : n if name == "q" else m] for name, x in tensors.items()}
        close(found[row : row + 1, :, :n], definition(alone))


def test_gradcheck_with_noise():
    def function(*tensors: Tensor) -> Tensor:
        call = {"training": True, "generator": torch.Generator().manual_seed(0)}
        return run(dict(zip("qkv", tensors, strict=True)), FOUR, **call).output

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in qkv(6, batch=1).values()])


def test_a_negative_scale_is_refused():
    refused("scale", run, qkv(6), scale=-1.0)


def test_parity_with_the_benchmarks_code():
    recorded = load("lara_cab")
    tensors = {name: recorded[name].requires_grad_() for name in "qkv"}
    output = run(tensors, FOUR).output
    check_recorded(recorded, output, tensors, 1e-10)
