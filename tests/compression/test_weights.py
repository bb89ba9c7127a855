"""How codes are chosen: grids, calibrators, GPTQ against its definition, and scales that do not change the product."""

from __future__ import annotations

import pytest
import torch
from support import refused
from torch import Tensor

from regard.compression.weights.gptq import gptq
from regard.compression.weights.grids import make_grids, round_to_nearest
from regard.compression.weights.limits import CALIBRATORS
from regard.compression.weights.scaling import activation_scale, smooth_scale
from regard.layers.quantized import Format

FORMATS = [Format(8), Format(4, 32), Format(4, 64, False), Format(3, 32, False), Format(2, 32)]
IDS = [str(format) for format in FORMATS]


def correlated(rows: int, columns: int) -> Tensor:
    """Inputs with correlated columns, some of which are large."""
    mixing = torch.randn(columns, columns, dtype=torch.float64) / columns**0.5
    return (
        torch.randn(rows, columns, dtype=torch.float64) @ mixing * torch.logspace(-1, 1, columns, dtype=torch.float64)
    )


def weights(n: int = 24, k: int = 96) -> Tensor:
    return torch.randn(n, k, dtype=torch.float64)


def lost(x: Tensor, weight: Tensor, codes) -> float:
    found = codes.weight(torch.float64)[:, : weight.shape[1]]
    return float((x @ (found - weight).T).square().sum())


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_rounding_moves_no_number_by_more_than_half_a_step_and_codes_round_to_themselves(format):
    weight = weights() * torch.logspace(-4, 2, 24, dtype=torch.float64)[:, None]
    weight[3] = 0
    codes = round_to_nearest(weight, format)
    found, (low, high) = codes.weight(torch.float64)[:, :96], format.codes
    group = format.group or 96
    step = codes.scale.double().abs().repeat_interleave(group, 1)[:, :96]
    assert bool(((found - weight).abs() <= step / 2 * (1 + 1e-9)).all())
    assert int(codes.values.min()) >= low and int(codes.values.max()) <= high
    if format.symmetric:
        assert not bool(found[3].any())
    again = make_grids(weight[:, :32], format)
    assert torch.equal(
        again.codes(again.numbers(again.codes(weight[:, :32]), torch.float64)), again.codes(weight[:, :32])
    )


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_symmetric_grids_have_their_longer_side_where_steps_are_smaller(bits):
    """No step is larger than on a grid with the shorter side at both ends, and all codes are used."""
    format = Format(bits, 32)
    low, high = format.codes
    weight = torch.rand(40, 32, dtype=torch.float64) - torch.rand(40, 1, dtype=torch.float64)
    grids = make_grids(weight, format)
    both, codes = weight.abs().amax(1) / high, grids.codes(weight)
    assert bool((grids.scale.double().abs() <= both * (1 + 2.0**-7)).all())
    assert float((grids.scale.double().abs() / both).mean()) < 0.97
    assert int(codes.min()) == low and int(codes.max()) == high and bool((grids.scale < 0).any())
    turned = make_grids(-weight, format)
    assert torch.equal(turned.scale, -grids.scale) and torch.equal(turned.codes(-weight), codes)


@pytest.mark.parametrize("format", [Format(3, 32), Format(4, 32, False)], ids=str)
def test_errors_of_important_columns_count_for_more(format):
    weight, importance = weights(80, 64), torch.logspace(-2, 2, 64, dtype=torch.float64)
    lost = [
        float(
            ((round_to_nearest(weight, format, "mse", importance=one).weight(torch.float64) - weight) ** 2).sum(0)
            @ importance
        )
        for one in (importance, None)
    ]
    assert lost[0] < 0.98 * lost[1]


def test_offsets_reach_groups_that_lie_on_one_side_of_zero():
    weight = weights(8, 64) + 20
    plain, moved = (
        round_to_nearest(weight, Format(4, 32, symmetric)).weight(torch.float64) for symmetric in (True, False)
    )
    assert float((moved - weight).abs().max()) < 0.3 < float((plain - weight).abs().max())


@pytest.mark.parametrize("name", CALIBRATORS)
def test_calibrators_keep_a_share_of_the_largest(name):
    weight = weights(16, 2000)
    share = make_grids(weight, Format(3, 32), name).scale.double() / make_grids(weight, Format(3, 32)).scale.double()
    assert bool((share > 0).all()) and bool((share <= 1).all())
    assert (float(share.max()) == 1) == (name == "minmax")
    if name == "kl":
        assert float(share.max() - share.min()) < 0.02
    if name == "percentile":
        reach = 127 * make_grids(weight, Format(8), name).scale.double()
        beyond = (weight.abs() > reach[:, None]).double().mean(1)
        assert bool((beyond <= 0.002).all()) and bool((beyond > 0).all())
    zeros = torch.zeros(2, 32, dtype=torch.float64)
    assert not bool(make_grids(zeros, Format(3, 32), name).codes(zeros).any())


def test_the_mse_calibrator_loses_no_more_than_the_whole_range():
    weight = torch.distributions.StudentT(3.0).sample((20, 96)).double()
    for format in (Format(4, 32), Format(3, 32, False)):
        errors = [
            (round_to_nearest(weight, format, how).weight(torch.float64) - weight).square().sum()
            for how in ("mse", "minmax")
        ]
        assert errors[0] < errors[1]


def plain_gptq(weight: Tensor, second: Tensor, format: Format, damping: float) -> Tensor:
    """The definition: after each column, later ones are updated by the inverse of H, from which it is then removed."""
    work, found = weight.clone(), torch.zeros_like(weight)
    h = second + damping * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    inverse = torch.linalg.inv(h)
    group = format.group or weight.shape[1]
    cost = torch.linalg.cholesky(inverse, upper=True).diagonal() ** -2
    for j in range(weight.shape[1]):
        if j % group == 0:
            grids = make_grids(work[:, j : j + group], format, "mse", importance=cost[j : j + group])
        found[:, j] = grids.numbers(grids.codes(work[:, j : j + 1]), work.dtype)[:, 0]
        error = (work[:, j] - found[:, j]) / inverse[j, j]
        work[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return found


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_gptq_in_blocks_equals_its_definition(format):
    weight, x = weights(10, 128), correlated(400, 128)
    second = x.T @ x
    expected = plain_gptq(weight, second, format, 0.01)
    for block in (32, 128):
        found = gptq(weight, second, format, block=block, order="columns", damping=0.01).weight(torch.float64)
        assert float((found - expected).abs().max()) < 1e-9


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_gptq_in_the_order_of_activations_is_gptq_of_a_layer_whose_columns_are_in_that_order(format):
    weight, x = weights(10, 128), correlated(400, 128)
    second, group = x.T @ x, format.group or 128
    sizes = second.diagonal().view(-1, group)
    order = [
        g * group + int(j)
        for g in sizes.sum(1).argsort(descending=True).tolist()
        for j in sizes[g].argsort(descending=True)
    ]
    found = gptq(weight, second, format).weight(torch.float64)
    expected = gptq(weight[:, order], second[order][:, order], format, order="columns").weight(torch.float64)
    assert float((found[:, order] - expected).abs().max()) < 1e-9


@pytest.mark.parametrize("order", ["columns", "activations"])
@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_gptq_loses_less_than_rounding_to_nearest(format, order):
    weight, x = weights(), correlated(500, 96)
    found = gptq(weight, x.T @ x, format, order=order)
    assert lost(x, weight, found) < lost(x, weight, round_to_nearest(weight, format))


@pytest.mark.parametrize("order", ["columns", "activations"])
def test_gptq_of_inputs_that_are_equal_and_unrelated_is_rounding_to_nearest(order):
    weight = weights(12, 80)  # pads the last group
    for format in FORMATS:
        for calibrate in ("minmax", "mse"):
            found = gptq(weight, 3 * torch.eye(80, dtype=torch.float64), format, order=order, calibrate=calibrate)
            nearest = round_to_nearest(weight, format, calibrate)
            assert torch.equal(found.weight()[:, :80], nearest.weight()[:, :80])


def test_a_column_without_inputs_is_rounded_to_nearest():
    weight, x = weights(12, 64), correlated(300, 64)
    x[:, 5] = 0
    format = Format(8)
    found = gptq(weight, x.T @ x, format, calibrate="minmax")
    assert torch.equal(found.values[:, 5], round_to_nearest(weight, format).values[:, 5])


def test_second_moments_that_are_not_finite_are_refused():
    refused("not finite", gptq, weights(4, 32), torch.full((32, 32), torch.nan), Format(4, 32))


def test_smoothquant_leaves_the_product_and_makes_both_sides_equally_large():
    weight, x = weights(), correlated(300, 96)
    scale = smooth_scale(x.abs().amax(0), weight, 0.5)
    assert float(((x / scale) @ (weight * scale).T - x @ weight.T).abs().max()) < 1e-10
    largest = (x / scale).abs().amax(0), (weight * scale).abs().amax(0)
    assert float((largest[0] / largest[1] - 1).abs().max()) < 1e-9
    whole = smooth_scale(x.abs().amax(0), weight, 1.0)
    assert float(((x / whole).abs().amax(0) - 1).abs().max()) < 1e-9


def test_awq_leaves_the_product_and_loses_no_more_than_without_scales():
    weight, x = weights(), correlated(300, 96)
    format, second = Format(4, 32), x.T @ x
    scale, alpha = activation_scale(x.abs().mean(0), second, weight, lambda scaled: round_to_nearest(scaled, format))
    assert float(((x / scale) @ (weight * scale).T - x @ weight.T).abs().max()) < 1e-10
    codes = round_to_nearest(weight * scale, format)
    without = lost(x, weight, round_to_nearest(weight, format))
    error = (x / scale) @ codes.weight(torch.float64).T - x @ weight.T
    assert 0 < alpha < 1 and float(error.square().sum()) < without
