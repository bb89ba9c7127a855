from __future__ import annotations

import pytest
import torch
from model_checks import made, read_by, small

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Context, Mask, Unsupported
from regard.models import Forecaster, count_parameters
from regard.models.forecaster import quantile_loss

CROSSING = [n for n in list_mechanisms(pattern="noncausal-cross") if get_mechanism(n).prepare is None]


def make_model(cross="softmax", **options) -> Forecaster:
    return made("forecaster", **{"num_layers": 2, "cross_plan": cross, **options})


def batch(rows=3, horizon=5, past=8):
    inputs, memory = read_by(small("forecaster"), rows, horizon, past)
    return inputs, memory.cumsum(1) + 3


@pytest.fixture(params=CROSSING)
def model(request) -> Forecaster:
    return make_model(request.param)


def test_every_mechanism_forecasts_a_padded_past_with_finite_gradients(model):
    patch = (1, 3)[CROSSING.index(model.config.cross_plan[0][0]) % 2]  # alternates
    model = make_model(model.config.cross_plan, patch=patch, dropout=0.1).train()
    inputs, memory = batch()
    memory[1, :3] = torch.nan
    context = Context(memory_mask=Mask(valid=~memory.isnan().any(-1)))
    model.loss(inputs, memory, torch.randn(3, 5, 2), context=context).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    whole = model.eval()(inputs, memory, context=context).output[1:2]
    torch.testing.assert_close(whole, model(inputs[1:2], memory[1:2, 3:]).output)


def test_an_empty_past_gives_finite_forecasts():
    model = make_model("linear", patch=3)
    inputs, memory = batch()
    output = model(inputs, memory, context=Context(memory_mask=Mask(lengths=torch.tensor([8, 0, 1])))).output
    assert output.isfinite().all()
    assert model(inputs, memory[:, :0]).output.isfinite().all()


@pytest.mark.parametrize("quantiles", [(), (0.1, 0.5, 0.9)])
@pytest.mark.parametrize("normalize", ["mean", "last"])
def test_forecasts_move_and_scale_with_the_past_of_their_targets(normalize, quantiles):
    model = make_model("gated_linear", normalize=normalize, quantiles=quantiles)
    inputs, memory = batch()
    moved = memory.clone()
    slope, shift = torch.tensor([5.0, 0.2]), torch.tensor([100.0, -3.0])
    moved[..., [2, 0]] = memory[..., [2, 0]] * slope + shift
    before, after = model(inputs, memory).output, model(inputs, moved).output
    axes = (..., None) if quantiles else (...,)
    torch.testing.assert_close(after, before * slope[axes] + shift[axes])


def test_numbers_as_they_are_do_not_move_forecasts_along_and_a_constant_past_is_not_blown_up():
    inputs, memory = batch()
    plain = make_model(normalize="none")
    assert (plain(inputs, memory + 100).output - plain(inputs, memory).output).abs().max() < 50
    memory[..., [2, 0]] = torch.tensor([1e6, -4.0], dtype=torch.float64)
    assert (make_model(normalize="mean")(inputs, memory).output - memory[:, :1, [2, 0]]).abs().max() < 100


def test_the_order_of_sets_changes_nothing_and_of_series_does():
    inputs, memory = batch()
    order = torch.randperm(8)
    for ordered in (False, True):
        model = make_model(ordered=ordered)
        output = model(inputs, memory).output
        same = torch.allclose(model(inputs, memory[:, order]).output, output)
        assert same is torch.allclose(model(inputs.flip(1), memory).output, output.flip(1)) is not ordered
    for wrong in ({"patch": 3}, {"normalize": "last"}, {"features": 0}, {"positions": "rotary"}):
        with pytest.raises(Unsupported, match="ordered=False"):
            make_model(ordered=False, **wrong)


def test_each_point_has_its_own_forecast_and_depends_on_all_of_the_past(model):
    if model.config.cross_plan[0][0] == "aaren":
        pytest.skip("its query is learned, and the same for each point")
    inputs, memory = batch(rows=1)
    inputs = inputs[:, :1].expand(-1, 5, -1).clone()
    output = model(inputs, memory).output
    assert not torch.allclose(output[:, 0], output[:, 1])  # the time features differ
    for place in (0, 7):
        other = memory.clone()
        other[:, place, 1] += 1
        assert not torch.equal(model(inputs, other).output, output)


def test_the_last_points_make_up_whole_patches():
    model = make_model(patch=3, normalize="none")
    seen = []
    model.memory_embedding.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    inputs, memory = batch(rows=2, past=7)
    model(inputs, memory, context=Context(memory_mask=Mask(lengths=torch.tensor([7, 4]))))
    patches = seen[0].unflatten(-1, (3, 4))
    torch.testing.assert_close(patches[0, 1:, :, :3].flatten(0, 1), memory[0, 1:])
    torch.testing.assert_close(patches[1, 1, :, :3], memory[1, 1:4])
    assert patches[..., 3].tolist() == [[[0, 0, 1], [1, 1, 1], [1, 1, 1]], [[0, 0, 1], [1, 1, 1], [0, 0, 0]]]


@pytest.mark.parametrize(("patch", "times"), [(1, [[-4, -3, -2, -1], [-2, -1, 0, 0]]), (2, [[-3, -1], [-1, 0]])])
def test_the_past_is_placed_by_its_distance_to_the_horizon(patch, times):
    model = make_model(patch=patch, num_layers=1)
    seen = []
    model.blocks[0].mixer.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["context"]), with_kwargs=True
    )
    model(*batch(rows=2, horizon=3, past=4), context=Context(memory_mask=Mask(lengths=torch.tensor([4, 2]))))
    assert seen[0].positions.tolist() == [[0, 1, 2]] * 2
    assert seen[0].memory_positions.tolist() == times  # padding holds 0


def test_quantiles_rise_and_are_learned_by_the_pinball_loss():
    output = make_model(quantiles=(0.1, 0.5, 0.9))(*batch()).output
    assert output.shape == (3, 5, 2, 3)
    assert (output.diff(dim=-1) > 0).all()
    samples = torch.randn(4001, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)
    for level in (0.1, 0.5, 0.9):
        losses = quantile_loss(grid[:, None, None], samples[None].expand(601, -1), (level,)).mean(1)
        torch.testing.assert_close(grid[losses.argmin()], samples.quantile(level), atol=0.02, rtol=0)


@pytest.mark.parametrize("quantiles", [(), (0.2, 0.7)])
def test_loss_counts_the_targets_that_exist(quantiles):
    inputs, memory = batch()
    targets = torch.randn(3, 5, 2, dtype=torch.float64)
    targets[0, 2:] = torch.nan
    model, level = make_model(quantiles=quantiles), torch.tensor(quantiles, dtype=torch.float64)
    output = model(inputs, memory).output
    if quantiles:
        error = targets[..., None] - output
        losses = torch.where(error > 0, level * error, (level - 1) * error)
    else:
        losses = (output - targets).square()
    torch.testing.assert_close(model.loss(inputs, memory, targets), losses[~targets.isnan()].mean())


def test_a_horizon_of_which_nothing_is_known():
    bare = make_model(features=0, target_features=(0,))
    inputs, memory = batch()
    assert bare(inputs[..., :0], memory).output.shape == (3, 5, 1)
    assert count_parameters(bare.config) < count_parameters(make_model().config)


@pytest.mark.parametrize("quantiles", [(), (0.1, 0.9)])
def test_values_that_the_memory_does_not_hold_are_predicted_as_they_are(quantiles):
    model = make_model(target_features=(), num_targets=7, quantiles=quantiles)
    inputs, memory = batch()
    output = model(inputs, memory).output
    assert output.shape == (3, 5, 7, *([2] if quantiles else []))
    raw = make_model(target_features=(), num_targets=7, quantiles=quantiles, normalize="none")
    raw.load_state_dict(model.state_dict())
    assert torch.equal(raw(inputs, memory).output, output)
    assert torch.isfinite(model.loss(inputs, memory, torch.randn(3, 5, 7, dtype=torch.float64)))


@pytest.mark.parametrize("cross", ["softmax", "linear", "mamba2"])
def test_half_precision_is_near_single_and_keeps_the_level(cross):
    model = make_model(cross)
    inputs, memory = batch()
    memory[..., [2, 0]] += 100
    inputs, memory = inputs.to(torch.bfloat16), memory.to(torch.bfloat16)
    exact = model(inputs.double(), memory.double()).output
    output = model.to(torch.bfloat16)(inputs, memory).output
    assert output.dtype == torch.float32
    assert (output - exact).abs().max() < 0.1  # rounding the forecasts would cost 0.25


def test_bad_calls_are_refused():
    model = make_model()
    inputs, memory = batch()
    targets = torch.randn(3, 5, 1)
    for call, words in (
        (lambda: model(inputs[..., :1], memory), "inputs of dtype"),
        (lambda: model(inputs, memory.long()), "memory of dtype"),
        (lambda: model(inputs[:2], memory), "a past for each horizon"),
        (lambda: model(inputs, memory, context=Context(grid=(5, 1))), "a grid"),
        (lambda: model(inputs, memory, context=Context(positions=torch.zeros(3, 5).long())), "explicit positions"),
        (lambda: model.loss(inputs, memory, targets), r"targets of shape .*\(3, 5, 2\)"),
    ):
        with pytest.raises(Unsupported, match=words):
            call()
