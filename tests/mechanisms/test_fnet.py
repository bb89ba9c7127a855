"""What is peculiar to FNet: its transform, rows of unequal length, and parity with known code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.apply import apply
from regard.contract import Context, Mask, Unsupported
from regard.create import create_layer
from regard.engines.fourier import transform_rows
from regard.mechanisms.fnet import MECHANISM, Config
from regard.models import Encoder, EncoderConfig

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


def load(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def run(x: Tensor, config: Config | None = None, **call) -> Tensor:
    return apply(MECHANISM, {"x": x}, pattern="noncausal-self", config=config or Config(), **call).output


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).detach().abs().max()) <= tolerance * float(expected.detach().abs().max())


@pytest.mark.parametrize(("n", "width"), [(1, 1), (1, 5), (5, 1), (12, 2), (13, 9), (16, 10)])
def test_each_output_is_a_sum_over_places_and_features(n, width):
    x = torch.randn(1, n, width, dtype=torch.float64)
    expected = torch.zeros(1, n, width, dtype=torch.float64)
    for j in range(n):
        for e in range(width):
            for t in range(n):
                for f in range(width):
                    expected[0, j, e] += math.cos(2 * math.pi * (j * t / n + e * f / width)) * x[0, t, f]
    close(run(x), expected)
    close(run(x, form="reference"), expected)


def test_it_is_the_real_part_of_a_transform_over_two_axes():
    x = torch.randn(2, 31, 12, dtype=torch.float64)
    close(run(x), torch.fft.fft2(x).real)
    close(run(x, scale=0.5), 0.5 * torch.fft.fft2(x).real)
    close(run(x, Config(orthonormal=True)), torch.fft.fft2(x, norm="ortho").real)


def test_twice_orthonormal_is_the_even_part():
    """Re F is the cosine of a sum: applied twice it gives half of x and half of x turned round on both axes."""
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    turned = x.flip(1, 2).roll((1, 1), (1, 2))
    config = Config(orthonormal=True)
    close(run(run(x, config), config), (x + turned) / 2)


def test_the_mean_token_alone_reaches_the_first_place():
    x = torch.randn(1, 7, 4, dtype=torch.float64)
    close(run(x)[0, 0], torch.fft.fft(x[0].sum(0)).real)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 100])
def test_rows_are_transformed_at_their_own_length(n):
    lengths = torch.tensor([n, 0, 1, n // 2, max(n - 1, 0)])
    x = torch.randn(5, 3, n, dtype=torch.complex128)
    x = torch.where(torch.arange(n) < lengths[:, None, None], x, 0)
    found = transform_rows(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        if length:
            close(found[row, :, :length], torch.fft.fft(x[row, :, :length]))


def test_long_rows_keep_their_digits_in_single_precision():
    """The phase of a chirp is a square of the place; as a float its digits would be gone at 10000."""
    x = torch.randn(2, 10007, 3)
    lengths = torch.tensor([10007, 9973])
    found = run(x, mask=Mask(lengths=lengths))
    for row, length in enumerate(lengths.tolist()):
        close(found[row, :length].double(), torch.fft.fft2(x[row, :length].double()).real, 2e-6)


def test_a_row_does_not_depend_on_how_far_it_is_padded():
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    for total in (6, 7, 20):
        padded = torch.full((1, total, 8), float("nan"), dtype=torch.float64)
        padded[:, :6] = x
        found = run(padded, mask=Mask(lengths=torch.tensor([6])))
        close(found[:, :6], run(x))
        assert (found[:, 6:] == 0).all()


def test_padding_inside_a_row_is_gathered_away():
    layer, x = create_layer("fnet", 6, pattern="noncausal-self"), torch.randn(1, 4, 6, dtype=torch.float64)
    valid = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0]], dtype=torch.bool)
    padded = torch.full((1, 8, 6), float("nan"), dtype=torch.float64)
    padded[valid] = x[0]
    output = layer(padded, context=Context(mask=Mask(valid=valid))).output
    close(output[valid][None], layer(x).output)
    assert (output[~valid] == 0).all()


@pytest.mark.parametrize("suffix", ["", "_even"])
def test_parity_of_the_transform(suffix):
    f = {
        name.removesuffix(suffix): t
        for name, t in load("fnet_transformers").items()
        if name.endswith("_even") == bool(suffix)
    }
    layer, x = create_layer("fnet", f["x"].shape[2], pattern="noncausal-self"), f["x"].requires_grad_()
    mixed = layer(x).output
    torch.testing.assert_close(mixed, f["mixed"], rtol=0, atol=1e-11)  # observed 7e-15, of values up to 30
    out = F.layer_norm(x + mixed, x.shape[-1:], f["weight_norm"], f["bias_norm"], 1e-12)
    torch.testing.assert_close(out, f["out"], rtol=0, atol=1e-12)
    (mixed * f["grad_mixed"]).sum().backward()
    torch.testing.assert_close(x.grad, f["grad_x"], rtol=0, atol=1e-11)


def test_it_has_no_parameters_and_trains_in_an_encoder():
    assert list(create_layer("fnet", 8, pattern="noncausal-self").parameters()) == []
    model = Encoder(EncoderConfig(num_classes=3, vocab_size=11, dim=8, num_heads=2, plan=["fnet", "softmax"]))
    ids = torch.randint(0, 11, (2, 7))
    loss = F.cross_entropy(
        model(ids, context=Context(mask=Mask(lengths=torch.tensor([7, 4])))).output, torch.tensor([0, 2])
    )
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_it_cannot_do_is_refused():
    for pattern in ("causal-self", "noncausal-cross", "causal-cross"):
        with pytest.raises(Unsupported, match=pattern):
            create_layer("fnet", 8, pattern=pattern)
    with pytest.raises(Unsupported, match="unitary"):
        create_layer("fnet", 8, pattern="noncausal-self", unitary=True)
    layer, x = create_layer("fnet", 8, pattern="noncausal-self"), torch.randn(1, 4, 8)
    with pytest.raises(Unsupported, match="state"):
        layer(x, context=Context(want=frozenset({"state"})))
    with pytest.raises(Unsupported, match="bias"):
        layer(x, context=Context(mask=Mask(bias=torch.zeros(1, 1, 4, 4))))
