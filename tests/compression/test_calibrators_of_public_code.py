"""Ends of grids, and activations and weights on them, are those of public code; `tests/parity/fixtures/SOURCES.json` tells
which."""

from __future__ import annotations

import pytest
import torch
from support import close, load
from torch import Tensor

from regard.compression.quantization import RunningRange, asymmetric_grid, simulate, symmetric_grid
from regard.compression.weights.limits import BINS, STEPS, kl, mse, percentile


def never(share: Tensor) -> Tensor:
    raise AssertionError("a calibrator that does not compare losses")


@pytest.mark.parametrize("name", ["all", "percentile"])
def test_running_ranges_and_activations_on_them_are_those_of_the_code_of_clipped_softmax(name):
    found = load("compression_uniform_quantizers")
    running = RunningRange(momentum=0.9, percentile=None if name == "all" else 99.0)
    for i in range(3):
        running.update(found[f"x{i}"].double())
    close(torch.tensor([running.low, running.high], dtype=torch.float64), found[f"range_{name}"])
    assert running.low is not None and running.high is not None
    for bits in (8, 4):
        x = found["x2"].double().requires_grad_()
        out = simulate(x, asymmetric_grid(running.low, running.high, bits))
        close(out.detach(), found[f"asymmetric_{name}_{bits}"])
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        close(gradient, found[f"grad_{name}_{bits}"])


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_with_one_scale_are_those_of_the_code_of_clipped_softmax(bits):
    found = load("compression_uniform_quantizers")
    close(simulate(found["weight"], symmetric_grid(found["weight"], bits)), found[f"symmetric_{bits}"])


def test_percentiles_of_rows_are_those_of_the_code_of_clipped_softmax():
    found = load("compression_uniform_quantizers")
    rows = found["weight"]
    close(percentile(rows, never, 8) * rows.abs().amax(1), found["percentile_rows"])


@pytest.mark.parametrize("bits", [3, 4])
def test_the_search_for_the_least_error_finds_what_a_search_over_all_shares_finds(bits):
    """In few steps, so that a row may miss the best share, by at most 2 % of its error."""
    found = load("compression_mse")
    rows, best = found["weight"].double(), found[f"share_{bits}"].double() / 100
    half = 2 ** (bits - 1)

    def lost(share: Tensor) -> Tensor:
        step = (rows.abs().amax(1) * share)[:, None] / (half - 1)
        return ((rows / step).round().clamp(-half, half - 1) * step - rows).square().sum(1)

    share = mse(rows, lost, bits)
    assert (lost(best) <= lost(share) * (1 + 1e-9)).all()
    assert (lost(share) <= 1.02 * lost(best)).all()
    assert ((share - best).abs() < 1e-9).double().mean() > 0.8


@pytest.mark.parametrize("name", ["spread", "heavy"])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_end_with_the_least_divergence_is_that_of_pytorch_quantization(name, bits):
    """Among the ends that are tried here; pytorch-quantization tries all, and its best one is hardly better."""
    found = load("compression_kl")
    divergence, rows = found[f"{name}_divergence_{bits}"], found[f"{name}_weight"]
    ends = torch.linspace(max(2 ** (bits - 1), BINS // 5), BINS, STEPS).round().long()
    share = kl(rows, never, bits)
    close(share, (ends[divergence[ends - 128].argmin()] / BINS).expand_as(share), 0.0)
    best = round(float(found[f"{name}_most_{bits}"]) * BINS)
    assert divergence[best - 128] == divergence.min()
    assert divergence[round(float(share[0]) * BINS) - 128] < 1.05 * divergence.min()
    activations = rows / rows.abs().amax(1, keepdim=True)  # with the same histogram
    running = RunningRange(kl=True, bits=bits)
    running.update(activations)
    ends = torch.linspace(128, BINS, STEPS).round().long()
    share = ends[divergence[ends - 128].argmin()] / BINS
    close(torch.tensor([running.low, running.high]), torch.stack([-share, share]), 0.0)
