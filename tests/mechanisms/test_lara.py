"""What is peculiar to randomised attention: its proposals, their noise, rows with few tokens, and recorded outputs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from support import calls, close, load, qkv
from torch import Tensor

from regard.contract import Context, Mask, Unsupported
from regard.create import create_layer
from regard.functional import lara_attention
from regard.mechanisms.lara import MECHANISM, Config

run = calls(MECHANISM, "noncausal-self")
FOUR = {"landmarks": 4}


def means(x: np.ndarray, c: int) -> np.ndarray:
    """Of c segments, the shorter ones first."""
    size, longer = divmod(len(x), c)
    borders = np.cumsum([0] + [size] * (c - longer) + [size + 1] * longer)
    return np.stack([x[a:b].mean(0) for a, b in itertools.pairwise(borders)])


def definition(tensors: dict[str, Tensor], noise: np.ndarray | None = None, c: int = 4) -> Tensor:
    """Sums over pairs of the weights that the docstring implies, in the space of exponentials."""
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


def test_thousands_of_tokens_stay_precise_in_float32():
    tensors = qkv(4000, batch=1)
    expected = run(tensors, FOUR).output
    single = run({name: x.float() for name, x in tensors.items()}, FOUR).output
    close(single.double(), expected, MECHANISM.tolerances[torch.float32])


def test_gradcheck_with_noise():
    def function(*tensors: Tensor) -> Tensor:
        call = {"training": True, "generator": torch.Generator().manual_seed(0)}
        return run(dict(zip("qkv", tensors, strict=True)), FOUR, **call).output

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in qkv(6, batch=1).values()])


def test_a_layer_draws_in_training_only_from_the_generator_of_the_call():
    layer = create_layer("lara", 16, 2, pattern="noncausal-self", landmarks=3)
    x = torch.randn(2, 9, 16)
    first, second, third = (
        layer(x, context=Context(generator=torch.Generator().manual_seed(seed))).output for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    layer.eval()
    assert torch.equal(layer(x).output, layer(x).output)


@pytest.mark.parametrize("options", [{"landmarks": 0}, {"noise": -1.0}, {"noise": math.nan}, {"noise": math.inf}])
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"pattern": "causal-self"}, "later"),
        ({"pattern": "causal-cross"}, "later"),
        ({"pattern": "noncausal-self", "scale": -1.0}, "scale"),
        ({"pattern": "noncausal-self", "mask": Mask(bias=torch.zeros(1, 1, 6, 6))}, "lara"),
    ],
)
def test_what_it_lacks_is_refused(call, words):
    with pytest.raises(Unsupported, match=words):
        lara_attention(*qkv(6).values(), **call)


def test_parity_with_the_benchmarks_code():
    recorded = load("lara_cab")
    tensors = {name: recorded[name].requires_grad_() for name in "qkv"}
    output = run(tensors, FOUR).output
    close(output, recorded["out"], 1e-10)
    found = torch.autograd.grad(output, list(tensors.values()), recorded["grad_out"])
    for name, gradient in zip("qkv", found, strict=True):
        close(gradient, recorded[f"grad_{name}"], 1e-10)
