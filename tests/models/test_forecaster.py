from __future__ import annotations

import pytest
import torch

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Context, Mask, Unsupported
from regard.models import (
    Forecaster,
    ForecasterConfig,
    count_parameters,
    from_pretrained,
    match_parameters,
    save_pretrained,
)
from regard.models.forecaster import quantile_loss

CROSSING = [n for n in list_mechanisms(pattern="noncausal-cross") if get_mechanism(n).prepare is None]
PATCHES = (1, 3)


def make_model(cross="softmax", **options) -> Forecaster:
    sizes = {"target_features": (2, 0), "dim": 16, "num_heads": 2, "num_layers": 2}
    return Forecaster(ForecasterConfig(2, 3, **{**sizes, "cross_plan": cross, **options})).double().eval()


def batch(rows=3, horizon=5, past=8):
    inputs = torch.randn(rows, horizon, 2, dtype=torch.float64)
    return inputs, torch.randn(rows, past, 3, dtype=torch.float64).cumsum(1) + 3


def ragged(shape):
    valid = torch.rand(shape) < 0.6
    valid[:, shape[1] // 2] = True
    return valid


@pytest.fixture(params=CROSSING)
def model(request) -> Forecaster:
    return make_model(request.param)


@pytest.mark.parametrize("normalize", ["mean", "last", "none"])
@pytest.mark.parametrize("patch", PATCHES)
def test_padding_anywhere_equals_no_padding(patch, normalize):
    model = make_model(["linear", "softmax"], patch=patch, normalize=normalize)
    inputs, memory = batch(rows=4)
    valid, memory_valid = ragged(inputs.shape[:2]), ragged(memory.shape[:2])
    inputs[~valid], memory[~memory_valid] = torch.nan, torch.nan
    context = Context(mask=Mask(valid=valid), memory_mask=Mask(valid=memory_valid))
    output = model(inputs, memory, context=context).output
    for row in range(4):
        alone = model(inputs[row][valid[row]][None], memory[row][memory_valid[row]][None]).output[0]
        torch.testing.assert_close(output[row][valid[row]], alone)
    assert (output[~valid] == 0).all()


@pytest.mark.parametrize("patch", PATCHES)
def test_every_mechanism_forecasts_a_padded_past_with_finite_gradients(model, patch):
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


def test_packed_equals_separate():
    model = make_model(patch=3)
    inputs, memory = batch(rows=1, horizon=6, past=11)
    masks = [Mask(cu_seqlens=torch.tensor(borders)) for borders in ([0, 2, 6], [0, 7, 11])]
    output = model(inputs, memory, context=Context(mask=masks[0], memory_mask=masks[1])).output
    torch.testing.assert_close(output[:, :2], model(inputs[:, :2], memory[:, :7]).output)
    torch.testing.assert_close(output[:, 2:], model(inputs[:, 2:], memory[:, 7:]).output)


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


def test_numbers_as_they_are_do_not_move_forecasts_along():
    model = make_model(normalize="none")
    inputs, memory = batch()
    difference = model(inputs, memory + 100).output - model(inputs, memory).output
    assert difference.abs().max() < 50


def test_a_constant_past_is_centred_and_not_blown_up():
    model = make_model(normalize="mean")
    inputs, memory = batch()
    memory[..., [2, 0]] = torch.tensor([1e6, -4.0], dtype=torch.float64)
    output = model(inputs, memory).output - memory[:, :1, [2, 0]]
    assert output.abs().max() < 100


def test_each_point_has_its_own_forecast_and_depends_on_all_of_the_past(model):
    if model.config.cross_plan[0][0] == "aaren":
        pytest.skip("its query is learned, and the same for each point")
    inputs, memory = batch(rows=1)
    inputs = inputs[:, :1].expand(-1, 5, -1).clone()
    output = model(inputs, memory).output
    assert not torch.allclose(output[:, 0], output[:, 1])  # the time tells them apart
    for place in (0, 7):
        other = memory.clone()
        other[:, place, 1] += 1
        assert not torch.equal(model(inputs, other).output, output)


def test_points_do_not_see_each_other_where_queries_do_not_interact():
    model = make_model("softmax")
    inputs, memory = batch()
    changed = inputs.clone()
    changed[:, 2] += 1
    before, after = model(inputs, memory).output, model(changed, memory).output
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(before[:, kept], after[:, kept])
    assert not torch.allclose(before[:, 2], after[:, 2])


def test_the_last_points_make_up_whole_patches():
    model = make_model(patch=3, normalize="none")
    seen = []
    model.memory_embedding.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    _, memory = batch(rows=2, past=7)
    model(batch(rows=2)[0], memory, context=Context(memory_mask=Mask(lengths=torch.tensor([7, 4]))))
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
    assert seen[0].memory_positions.tolist() == times  # 0 in the padding


def test_quantiles_rise_and_are_learned_by_the_pinball_loss():
    model = make_model(quantiles=(0.1, 0.5, 0.9))
    output = model(*batch()).output
    assert output.shape == (3, 5, 2, 3)
    assert (output.diff(dim=-1) > 0).all()
    samples = torch.randn(4001, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)
    for level in (0.1, 0.5, 0.9):
        losses = quantile_loss(grid[:, None, None], samples[None].expand(601, -1), (level,)).mean(1)
        torch.testing.assert_close(grid[losses.argmin()], samples.quantile(level), atol=0.02, rtol=0)


def test_loss_counts_the_targets_that_exist():
    inputs, memory = batch()
    targets = torch.randn(3, 5, 2, dtype=torch.float64)
    targets[0, 2:] = torch.nan
    model = make_model()
    expected = (model(inputs, memory).output - targets)[~targets.isnan()].square().mean()
    torch.testing.assert_close(model.loss(inputs, memory, targets), expected)
    spread = make_model(quantiles=(0.2, 0.7))
    error = targets[..., None] - spread(inputs, memory).output
    level = torch.tensor([0.2, 0.7], dtype=torch.float64)
    pinball = torch.where(error > 0, level * error, (level - 1) * error)[~targets.isnan()].mean()
    torch.testing.assert_close(spread.loss(inputs, memory, targets), pinball)
    with pytest.raises(Unsupported, match=r"targets of shape .*\(3, 5, 2\)"):
        model.loss(inputs, memory, targets[..., :1])


def test_a_horizon_of_which_nothing_is_known():
    model = make_model().config
    bare = Forecaster(ForecasterConfig(0, 3, dim=16, num_heads=2, num_layers=1)).double()
    inputs, memory = batch()
    assert bare(inputs[..., :0], memory).output.shape == (3, 5, 1)
    assert count_parameters(bare.config) < count_parameters(model)


def test_gradients_reach_every_parameter():
    model = make_model(patch=3, quantiles=(0.1, 0.9)).train()
    model(*batch()).output.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_half_precision_is_near_single_and_keeps_the_level(model):
    if model.config.cross_plan[0][0] == "mixture_of_heads":
        pytest.skip("rounding may route a token to other heads")
    inputs, memory = batch()
    memory[..., [2, 0]] += 100
    rounded = memory.to(torch.bfloat16)
    exact = model(inputs.to(torch.bfloat16).double(), rounded.double()).output
    half = model.to(torch.bfloat16)
    output = half(inputs.to(torch.bfloat16), rounded).output
    assert output.dtype == torch.float32
    assert (output - exact).abs().max() < 0.1  # rounding the forecasts themselves would lose 0.25


@pytest.mark.parametrize("patch", PATCHES)
def test_compiled_whole_equals_eager(patch):
    model = make_model(num_layers=1, patch=patch, quantiles=(0.1, 0.9))
    inputs, memory = batch()
    context = Context(memory_mask=Mask(valid=ragged(memory.shape[:2])))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(inputs, memory, context=context).output
        torch.testing.assert_close(compiled(inputs, memory, context=context).output, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_bit_for_bit(dtype, tmp_path):
    model = make_model("linear", patch=3, quantiles=(0.1, 0.9), encoder_layers=1).to(dtype)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is Forecaster and loaded.config == model.config
    inputs, memory = (x.to(dtype) for x in batch())
    assert torch.equal(loaded(inputs, memory).output, model(inputs, memory).output)


def test_parameters_are_counted_and_matched():
    config = ForecasterConfig(2, 3, dim=32, num_heads=2, num_layers=2, cross_plan="mamba2", patch=4)
    assert count_parameters(config) == count_parameters(Forecaster(config))
    target = count_parameters(ForecasterConfig(2, 3, dim=32, num_heads=2, num_layers=2))
    assert abs(count_parameters(match_parameters(config, target)) - target) <= 0.02 * target


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cross_plan": "local"}, "noncausal-cross.*memory"),
        ({"cross_plan": "landmark"}, "inserts tokens"),
        ({"encoder_plan": "landmark"}, "inserts tokens"),
        ({"target_features": (3,)}, "from 0 to 2"),
        ({"target_features": (0, 0)}, "different numbers"),
        ({"target_features": ()}, "at least one"),
        ({"quantiles": (0.5, 0.1)}, "rising"),
        ({"quantiles": (0.5, 1.0)}, "between 0 and 1"),
        ({"normalize": "median"}, "mean, last, none"),
        ({"patch": 0}, "patch"),
        ({"positions": "learned"}, "learned positions"),
        ({"positions": "rotry"}, "try rotary"),
    ],
)
def test_what_cannot_be_built_is_refused_by_the_config(options, words):
    with pytest.raises(Unsupported, match=words):
        ForecasterConfig(2, 3, **options)


def test_an_encoder_layer_for_grids_is_refused_when_the_model_is_built():
    with pytest.raises(Unsupported, match=r"large_kernel for grids of 2 axes .* which has no grids") as caught:
        make_model(encoder_plan=["softmax", "large_kernel"], encoder_layers=2)
    assert caught.value.nearest.startswith("('large_kernel', {'axes': 1})")
    make_model(encoder_plan=["softmax", ("large_kernel", {"axes": 1})], encoder_layers=2)


def test_bad_calls_are_refused():
    model = make_model()
    inputs, memory = batch()
    for call, words in (
        (lambda: model(inputs[..., :1], memory), "inputs of dtype"),
        (lambda: model(inputs, memory.long()), "memory of dtype"),
        (lambda: model(inputs[:2], memory), "a past for each horizon"),
        (lambda: model(inputs, memory, context=Context(grid=(5, 1))), "a grid"),
        (lambda: model(inputs, memory, context=Context(positions=torch.zeros(3, 5).long())), "explicit positions"),
    ):
        with pytest.raises(Unsupported, match=words):
            call()
