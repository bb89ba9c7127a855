"""Tests specific to FNet: its transform, rows of unequal length, and parity with known code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import calls, close, load
from torch import Tensor

from regard.contract import Mask
from regard.create import create_layer
from regard.engines.fourier import transform_rows
from regard.mechanisms.fnet import MECHANISM


def run(x: Tensor, **call) -> Tensor:
    return calls(MECHANISM, "noncausal-self")({"x": x}, **call).output


@pytest.mark.parametrize(("n", "width"), [(1, 1), (1, 5), (5, 1), (12, 2), (13, 9), (16, 10)])
def test_each_output_is_a_sum_over_places_and_features(n, width):
    x = torch.randn(1, n, width, dtype=torch.float64)
    places, features = torch.arange(n).double(), torch.arange(width).double()
    turns = (places[:, None] * places / n)[:, None, :, None] + (features[:, None] * features / width)[None, :, None]
    expected = torch.einsum("jetf,btf->bje", torch.cos(2 * math.pi * turns), x)
    for form in ("reference", "parallel"):
        close(run(x, form=form), expected)


def test_it_is_the_real_part_of_a_transform_over_two_axes():
    x = torch.randn(2, 31, 12, dtype=torch.float64)
    close(run(x), torch.fft.fft2(x).real)
    close(run(x, scale=0.5), 0.5 * torch.fft.fft2(x).real)
    close(run(x, options={"orthonormal": True}), torch.fft.fft2(x, norm="ortho").real)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 100])
def test_rows_are_transformed_at_their_own_length(n):
    lengths = torch.tensor([n, 0, 1, n // 2, n - 1])
    x = torch.randn(5, 3, n, dtype=torch.complex128)
    x = torch.where(torch.arange(n) < lengths[:, None, None], x, 0)
    found = transform_rows(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        if length:
            close(found[row, :, :length], torch.fft.fft(x[row, :, :length]))


def test_long_rows_keep_their_digits_in_single_precision():
    """A chirp's phase is the square of the position, which would lose all digits in float32 at 10000."""
    x = torch.randn(2, 10007, 3)
    lengths = torch.tensor([10007, 9973])
    found = run(x, mask=Mask(lengths=lengths))
    for row, length in enumerate(lengths.tolist()):
        close(found[row, :length].double(), torch.fft.fft2(x[row, :length].double()).real, 2e-6)


@pytest.mark.parametrize("suffix", ["", "_even"])
def test_parity_of_the_transform(suffix):
    recorded = load("fnet_transformers")
    names = ("x", "mixed", "weight_norm", "bias_norm", "out", "grad_mixed", "grad_x")
    x, mixed, weight, bias, out, grad_mixed, grad_x = (recorded[name + suffix] for name in names)
    layer, x = create_layer("fnet", x.shape[2], pattern="noncausal-self"), x.requires_grad_()
    found = layer(x).output
    close(found, mixed, 1e-13)  # observed 7e-15, of values up to 30
    close(F.layer_norm(x + found, x.shape[-1:], weight, bias, 1e-12), out, 1e-13)
    found.backward(grad_mixed)
    close(x.grad, grad_x, 1e-13)
