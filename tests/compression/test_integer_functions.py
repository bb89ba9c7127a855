"""Integer-only functions: close to the functions they approximate, free of floating point, and equal to public code."""

import math

import pytest
import torch

from regard.compression import integer
from regard.contract import Unsupported


def test_the_integer_gelu_erf_and_exponential_are_near_their_functions():
    q, scale = integer.quantized(torch.linspace(-4, 4, 4001, dtype=torch.float64), bits=12)
    x = q * scale
    assert (integer.integer_erf(q, scale).number - torch.erf(x)).abs().max() < 0.1
    assert (integer.integer_gelu(q, scale).number - torch.nn.functional.gelu(x)).abs().max() < 0.02
    low = -q.abs()
    assert (integer.integer_exp(low, scale).number - (low * scale).exp()).abs().max() < 3e-3
    far = integer.integer_exp(torch.tensor([-(1 << 40)]), scale)
    assert far.values.item() == 0


def test_the_integer_softmax_sums_to_one_but_for_what_is_cut_off():
    q, scale = integer.quantized(4 * torch.randn(5, 3, 33, dtype=torch.float64), bits=12)
    for bits in (8, 16):
        found = integer.integer_softmax(q, scale, bits=bits)
        assert found.values.dtype == torch.int64 and found.values.min() >= 0
        missing = 2**bits - found.values.sum(-1)
        assert missing.min() >= 0 and missing.max() <= 33
        assert (found.number - (q * scale).softmax(-1)).abs().max() < 2.0**-bits + 0.01


def test_the_integer_square_root_is_that_of_python():
    q = torch.cat([torch.arange(300), torch.randint(0, 1 << 62, (200,)), torch.tensor([(1 << 62) - 1, 1 << 62])])
    assert integer.integer_sqrt(q).tolist() == [math.isqrt(n) for n in q.tolist()]


def test_the_integer_layer_norm_is_near_that_of_its_numbers_and_of_no_scale():
    x = torch.randn(7, 64, dtype=torch.float64) * torch.rand(7, 1, dtype=torch.float64).exp() + 0.3
    q, _ = integer.quantized(x, bits=14)
    found = integer.integer_layer_norm(q).number
    expected = torch.nn.functional.layer_norm(q.double(), (64,), eps=0)
    assert (found - expected).abs().max() < 2e-3
    assert integer.integer_layer_norm(torch.full((2, 8), 5)).values.eq(0).all()


def test_the_integer_logarithm_rounds_up_from_one_and_a_half_times_a_power():
    q = torch.arange(1, 5000)
    expected = [p + (n >= 1.5 * 2**p and p > 0) for n in q.tolist() for p in [n.bit_length() - 1]]
    assert integer.integer_log2(q).tolist() == expected


def test_weights_as_powers_of_two_are_near_the_softmax_and_multiply_by_shifts():
    q, scale = integer.quantized(3 * torch.randn(4, 6, 9, dtype=torch.float64), bits=12)
    codes = integer.log_softmax_codes(q, scale)
    weights = (q * scale).softmax(-1)
    assert codes.min() >= 0 and codes.max() <= 15
    assert (codes - integer.log2_codes(weights)).abs().max() <= 1
    kept = weights > 2.0**-14
    assert ((2.0**-codes / weights)[kept].log2().abs() < 0.75).all()
    values = torch.randint(-127, 128, (4, 9, 5))
    assert integer.shifted_sum(codes, values).number.equal((2.0 ** -codes.double()) @ values.double())


def test_factors_of_channels_are_those_of_the_least_error_and_shift():
    x = torch.randn(50, 4, dtype=torch.float64) * torch.tensor([0.02, 0.2, 1.0, 8.0], dtype=torch.float64)
    found = integer.channel_factors(x)
    assert found.factors[0] == 0 and found.factors[3] == integer.MOST_FACTOR and found.factors.diff().ge(0).all()
    assert found.values.min() >= 0 and found.values.max() <= 255
    plain = integer.quantized(x)
    errors = [(one.number - x).square().sum(0) for one in (found, plain)]
    assert (errors[0][:2] < errors[1][:2]).all(), "small channels gain nothing from their factors"
    assert found.integers.equal((found.values - found.zero) * 2**found.factors)
    normed = integer.integer_layer_norm(found.integers).number
    assert (normed - torch.nn.functional.layer_norm(found.number, (4,), eps=0)).abs().max() < 2e-3


def test_integer_functions_agree_with_those_of_transformers():
    modules = pytest.importorskip("transformers.models.ibert.quant_modules")
    fine = torch.tensor([1e-4])
    q = torch.randint(-40_000, 40_001, (3, 17))
    theirs, _ = modules.IntGELU(quant_mode=True)(q * fine, fine)
    ours = integer.integer_gelu(q, float(fine))
    assert (ours.number - theirs.double()).abs().max() < 2e-3, "theirs drops 14 bits in between"
    scale, q = torch.tensor([0.01]), torch.randint(-500, 501, (3, 17))
    soft = modules.IntSoftmax(8, quant_mode=True)
    own = integer.integer_softmax(q, float(scale))
    expected = soft(q * scale, scale)[0].double()
    assert (own.number - expected).abs().max() <= 2 / 256


def test_what_integer_functions_cannot_take_is_refused():
    one = torch.tensor([1])
    for call in (
        lambda: integer.integer_exp(one, 0.1),
        lambda: integer.integer_exp(-one, 1.0),
        lambda: integer.integer_sqrt(-one),
        lambda: integer.integer_log2(one - 1),
        lambda: integer.integer_layer_norm(one << 20),
        lambda: integer.integer_layer_norm(one, bits=40),
    ):
        with pytest.raises(Unsupported, match="integer"):
            call()
