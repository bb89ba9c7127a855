"""What is peculiar to ProbSparse attention: who is chosen, what the others get, rows of unequal lengths, recorded outputs."""

from __future__ import annotations

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
from regard.functional import probsparse_attention, softmax_attention
from regard.mechanisms.probsparse import MECHANISM, Config

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


def inputs(n: int, m: int | None = None, groups: int = 2, batch: int = 2) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {"q": (2, n, 4), "k": (groups, m, 4), "v": (groups, m, 3)}
    return {name: torch.randn(batch, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "noncausal-self", options: dict | None = None, **call: Any) -> Any:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**({"factor": 1} | (options or {}))), **call).output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def count(length: int, factor: int) -> int:
    return min(length, max(1, factor * math.ceil(math.log(length))))


def definition(tensors: dict[str, Tensor], factor: int = 1, places: np.ndarray | float = 0.5) -> Tensor:
    """One row, head and query after the other."""
    q, k, v = (tensors[name].numpy() for name in "qkv")
    found = np.zeros((*q.shape[:3], v.shape[3]))
    n, m = q.shape[2], k.shape[2]
    if not n or not m:
        return torch.from_numpy(found)
    u = count(m, factor)
    sample = np.floor((np.arange(u) + places) * m / u).astype(int)
    assert len(set(sample)) == u
    for b, h in np.ndindex(*q.shape[:2]):
        g = h * k.shape[1] // q.shape[1]
        scores = q[b, h] @ k[b, g][sample].T
        measure = scores.max(-1) - scores.sum(-1) / m
        found[b, h] = v[b, g].mean(0)
        for i in np.argsort(-measure)[: count(n, factor)]:
            weights = np.exp(q[b, h, i] @ k[b, g].T / 2)
            found[b, h, i] = weights / weights.sum() @ v[b, g]
    return torch.from_numpy(found)


@pytest.mark.parametrize(("n", "m"), [(30, 30), (7, 40), (40, 7), (1, 9), (9, 1), (1, 1), (0, 5), (5, 0)])
@pytest.mark.parametrize(("groups", "factor"), [(1, 1), (2, 3)])
def test_every_form_equals_the_definition(n, m, groups, factor):
    tensors = inputs(n, m, groups)
    for pattern in ("noncausal-cross", *(["noncausal-self"] if n == m else [])):
        for form in ("reference", "parallel"):
            close(run(tensors, pattern, {"factor": factor}, form=form), definition(tensors, factor))


def test_with_a_large_factor_it_is_softmax_attention():
    tensors = inputs(25)
    expected = softmax_attention(*tensors.values(), pattern="noncausal-self")
    for form in ("reference", "parallel"):
        close(run(tensors, options={"factor": 25}, form=form), expected)


def test_queries_that_stand_out_are_chosen_and_the_others_get_the_mean():
    tensors = inputs(50)
    tensors["q"] = 0.01 * tensors["q"]
    tensors["q"][0, :, [7, 31]] = 30.0
    tensors["q"][1, 1, 49] = -30.0
    found, mean = run(tensors), tensors["v"].mean(2, keepdim=True)
    attend = (found - mean).abs().amax(-1) > 1e-9
    assert (attend.sum(-1) == count(50, 1)).all()
    assert attend[0, :, [7, 31]].all() and attend[1, 1, 49]
    close(found[~attend], mean.expand_as(found)[~attend])
    assert not torch.equal(attend[0, 0], attend[0, 1])  # each head chooses for itself


@pytest.mark.parametrize("pattern", ["noncausal-self", "noncausal-cross"])
@pytest.mark.parametrize("factor", [1, 3])
def test_rows_of_unequal_lengths_sample_and_choose_by_their_own(pattern, factor):
    counts = torch.tensor([40, 21, 3, 1, 0, 7, 40])
    key_counts = torch.tensor([40, 3, 40, 8, 5, 0, 20]) if "cross" in pattern else counts
    tensors, lengths = inputs(40, batch=7), {"q": counts, "k": key_counts, "v": key_counts}
    leaves = {
        name: x.masked_fill(torch.arange(40)[:, None] >= lengths[name][:, None, None, None], torch.nan).requires_grad_()
        for name, x in tensors.items()
    }
    masks = {"mask": Mask(lengths=counts)}
    if "cross" in pattern:
        masks["memory_mask"] = Mask(lengths=key_counts)
    found = run(leaves, pattern, {"factor": factor}, **masks)
    for row in range(7):
        alone = {name: x[row : row + 1, :, : lengths[name][row]] for name, x in tensors.items()}
        close(found[row : row + 1, :, : counts[row]].detach(), definition(alone, factor))
    found.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())


@pytest.mark.parametrize("form", ["reference", "parallel"])
def test_training_moves_sampled_keys_within_their_strata(form):
    tensors = inputs(60)
    places = torch.rand(count(60, 1), generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    found = run(tensors, form=form, training=True, generator=torch.Generator().manual_seed(3))
    close(found, definition(tensors, places=places))
    assert torch.equal(run(tensors, form=form, training=True, options={"jitter": False}), run(tensors, form=form))


@pytest.mark.parametrize("pattern", ["noncausal-self", "noncausal-cross"])
def test_gradcheck_of_chosen_and_other_queries(pattern):
    tensors = [x.requires_grad_() for x in inputs(9, batch=1).values()]
    assert torch.autograd.gradcheck(lambda q, k, v: run({"q": q, "k": k, "v": v}, pattern), tensors)


def test_a_layer_is_random_in_training_only():
    layer = create_layer("probsparse", 16, 2, pattern="noncausal-self", factor=1)
    x = torch.randn(4, 60, 16)
    outputs = [layer(x, context=Context(generator=torch.Generator().manual_seed(seed))).output for seed in (0, 0, 1)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    layer.eval()
    assert torch.equal(layer(x).output, layer(x).output)


def test_bad_options_and_what_it_lacks_are_refused():
    with pytest.raises(Unsupported):
        Config(factor=0)
    tensors = inputs(6)
    for pattern in ("causal-self", "causal-cross"):
        with pytest.raises(Unsupported, match="later"):
            run(tensors, pattern)
    with pytest.raises(Unsupported, match="probsparse"):
        probsparse_attention(*tensors.values(), pattern="noncausal-self", mask=Mask(bias=torch.zeros(1, 1, 6, 6)))


def test_parity_with_the_benchmarks_code():
    """Recorded with the evenly spread sample in place of its random one."""
    with np.load(FIXTURES / "probsparse_cab.npz") as arrays:
        recorded = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    tensors = {x: recorded[x].requires_grad_() for x in "qkv"}
    output = run(tensors, options={"factor": 2})
    close(output, recorded["out"], 1e-10)
    found = torch.autograd.grad(output, list(tensors.values()), recorded["grad_out"])
    for x, gradient in zip("qkv", found, strict=True):
        close(gradient, recorded[f"grad_{x}"], 1e-10)
