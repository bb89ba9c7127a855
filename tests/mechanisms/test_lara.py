"""What is peculiar to randomised attention: its proposals, their noise, rows with few tokens, and recorded outputs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import apply
from regard.contract import Context, Mask, Unsupported
from regard.create import create_layer
from regard.functional import lara_attention
from regard.mechanisms.lara import MECHANISM, Config

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


def inputs(n: int, m: int | None = None, groups: int = 2, batch: int = 2) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {"q": (2, n, 4), "k": (groups, m, 4), "v": (groups, m, 3)}
    return {name: torch.randn(batch, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "noncausal-self", options: dict | None = None, **call: Any) -> Any:
    return apply(
        MECHANISM, tensors, pattern=pattern, config=Config(**({"landmarks": 4} | (options or {}))), **call
    ).output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


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
    tensors = inputs(n, m, groups)
    for pattern in ("noncausal-cross", *(["noncausal-self"] if n == m else [])):
        for form in ("reference", "parallel"):
            close(run(tensors, pattern, form=form), definition(tensors))


@pytest.mark.parametrize("form", ["reference", "parallel"])
def test_training_moves_the_proposals_and_not_mu(form):
    tensors, generator = inputs(13), torch.Generator().manual_seed(3)
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(3)).double().numpy()
    found = run(tensors, options={"noise": 0.7}, form=form, training=True, generator=generator)
    close(found, definition(tensors, 0.7 * noise))
    assert torch.equal(run(tensors, training=True, options={"noise": 0.0}), run(tensors))


@pytest.mark.parametrize("pattern", ["noncausal-self", "noncausal-cross"])
def test_rows_with_few_and_many_tokens_lie_in_one_batch(pattern):
    counts = torch.tensor([17, 4, 2, 9, 0, 3, 17])
    key_counts = torch.tensor([17, 17, 3, 2, 5, 0, 6]) if "cross" in pattern else counts
    tensors, lengths = inputs(17, batch=7), {"q": counts, "k": key_counts, "v": key_counts}
    leaves = {
        name: x.masked_fill(torch.arange(17)[:, None] >= lengths[name][:, None, None, None], torch.nan).requires_grad_()
        for name, x in tensors.items()
    }
    masks = {"mask": Mask(lengths=counts)}
    if "cross" in pattern:
        masks["memory_mask"] = Mask(lengths=key_counts)
    found = run(leaves, pattern, **masks)
    for row in range(7):
        alone = {name: x[row : row + 1, :, : lengths[name][row]] for name, x in tensors.items()}
        close(found[row : row + 1, :, : counts[row]].detach(), definition(alone))
    found.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())


@pytest.mark.parametrize("given", ["mask", "memory_mask"])
def test_one_of_the_two_sequences_may_be_padded_alone(given):
    tensors = inputs(9, 11)
    name, n = ("q", 9) if given == "mask" else ("k", 11)
    found = run(tensors, "noncausal-cross", **{given: Mask(lengths=torch.tensor([n, 6]))})
    cut = {x: t[1:, :, :6] if x == name or (name == "k" and x == "v") else t[1:] for x, t in tensors.items()}
    close(found[1:, :, : cut["q"].shape[2]], definition(cut))


def test_equal_values_come_back_whatever_the_weights():
    tensors = inputs(12) | {"v": torch.full((2, 2, 12, 3), 5.0, dtype=torch.float64)}
    close(run(tensors, training=True), tensors["v"])


def test_large_scores_stay_finite_in_float32():
    tensors = {name: (100 * x).float().requires_grad_() for name, x in inputs(40).items()}
    output = run(tensors, training=True)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(x.grad.isfinite().all() for x in tensors.values())


def test_thousands_of_tokens_stay_precise_in_float32():
    tensors = inputs(4000, batch=1)
    expected = run(tensors)
    single = run({name: x.float() for name, x in tensors.items()})
    assert (single - expected).abs().max() <= MECHANISM.tolerances[torch.float32] * expected.abs().max()


@pytest.mark.parametrize("pattern", ["noncausal-self", "noncausal-cross"])
def test_gradcheck_with_noise(pattern):
    tensors = [x.requires_grad_() for x in inputs(6, batch=1).values()]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return run({"q": q, "k": k, "v": v}, pattern, training=True, generator=generator)

    assert torch.autograd.gradcheck(function, tensors)


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


def test_what_it_lacks_is_refused():
    tensors = inputs(6)
    for pattern in ("causal-self", "causal-cross"):
        with pytest.raises(Unsupported, match="later"):
            run(tensors, pattern)
    with pytest.raises(Unsupported, match="scale"):
        run(tensors, scale=-1.0)
    with pytest.raises(Unsupported, match="lara"):
        lara_attention(*tensors.values(), pattern="noncausal-self", mask=Mask(bias=torch.zeros(1, 1, 6, 6)))


def test_parity_with_the_benchmarks_code():
    with np.load(FIXTURES / "lara_cab.npz") as arrays:
        recorded = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    tensors = {x: recorded[x].requires_grad_() for x in "qkv"}
    output = run(tensors)
    close(output, recorded["out"], 1e-10)
    found = torch.autograd.grad(output, list(tensors.values()), recorded["grad_out"])
    for x, gradient in zip("qkv", found, strict=True):
        close(gradient, recorded[f"grad_{x}"], 1e-10)
