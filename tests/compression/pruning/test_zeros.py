"""Weights set to 0: which ones, compensation by the others, and that zeros stay zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, refused
from torch import Tensor, nn

import regard
from regard.compression import load_compressed
from regard.compression.pruning.weights import magnitude, sparsegpt, wanda
from regard.compression.weights.gptq import gptq
from regard.layers.quantized import Format
from regard.models import LanguageModel, LanguageModelConfig

MASKS = ("magnitude", "wanda", "sparsegpt")


def problem(rows: int = 24, columns: int = 32, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs, so that columns can compensate for one another."""
    mixing = torch.randn(columns, columns, dtype=torch.float64) / columns**0.5
    scales = torch.logspace(-0.5, 0.5, columns, dtype=torch.float64)[torch.randperm(columns)]
    return torch.randn(rows, columns, dtype=torch.float64), torch.randn(
        tokens, columns, dtype=torch.float64
    ) @ mixing * scales


def pruned(name: str, weight: Tensor, x: Tensor, ratio: float = 0.5, pattern: str = "free") -> Tensor:
    if name == "sparsegpt":
        return sparsegpt(weight, x.T @ x, ratio, pattern)[0]
    mask = (
        magnitude(weight, ratio, pattern) if name == "magnitude" else wanda(weight, x.square().sum(0), ratio, pattern)
    )
    return weight * mask


@pytest.mark.parametrize("name", MASKS)
def test_a_pattern_leaves_exactly_so_many_of_each_so_many(name):
    weight, x = problem()
    for pattern, kept, of in (("2:4", 2, 4), ("1:2", 1, 2), ("4:8", 4, 8)):
        found = pruned(name, weight, x, pattern=pattern)
        assert bool(((found != 0).unflatten(1, (-1, of)).sum(-1) == kept).all())
    for ratio in (0.0, 0.25, 0.5):
        assert int((pruned(name, weight, x, ratio) == 0).sum()) == ratio * weight.numel()


def test_each_method_loses_less_on_the_calibration_data_than_the_one_before():
    errors = {name: 0.0 for name in MASKS}
    for _ in range(5):
        weight, x = problem()
        for name in MASKS:
            errors[name] += float((x @ (pruned(name, weight, x) - weight).T).norm() / (x @ weight.T).norm())
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"], errors


def test_inputs_of_equal_size_that_do_not_go_together_make_all_three_one():
    weight, _ = problem()
    squares, second = torch.ones(32, dtype=torch.float64), 3.0 * torch.eye(32, dtype=torch.float64)
    rowwise = torch.stack([magnitude(row[None], 0.5)[0] for row in weight])
    assert torch.equal(wanda(weight, squares, 0.5), rowwise)
    found, mask = sparsegpt(weight, second, 0.5, block=32)
    assert torch.equal(mask, magnitude(weight, 0.5))
    close(found, weight * mask, 0.0)


def test_sparsegpt_takes_the_optimal_step_for_the_one_weight_that_goes():
    """When a row loses its last weight nothing else can change; when it loses an earlier one, later weights compensate."""
    weight, x = problem(rows=1, columns=8)
    second = x.T @ x
    factor = second + 0.01 * second.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    found, mask = sparsegpt(weight, second, 1 / 8, block=8)
    (j,) = (~mask[0]).nonzero()[0].tolist()
    scores = [float(weight[0, i] ** 2 / torch.linalg.inv(factor[i:, i:])[0, 0]) for i in range(8)]
    assert j == min(range(8), key=scores.__getitem__)
    inverse = torch.linalg.inv(factor[j:, j:])
    expected = weight.clone()
    expected[0, j:] -= weight[0, j] / inverse[0, 0] * inverse[0]
    close(found, expected * mask)


def test_gptq_after_a_mask_keeps_its_zeros_and_still_makes_up_for_errors():
    weight, x = problem()
    second = x.T @ x
    mask = magnitude(weight, 0.5)
    for format, order in ((Format(4, 32), "columns"), (Format(8), "activations")):
        codes = gptq(weight * mask, second, format, mask=mask, order=order).weight(torch.float64)
        assert bool((codes[~mask] == 0).all()) and bool((codes[mask] != 0).any())
    without = gptq(weight * mask, second, Format(4, 32)).weight(torch.float64)
    assert bool((without[~mask] != 0).any()), "this is why gptq has to know the mask"


def language_model() -> LanguageModel:
    return LanguageModel(LanguageModelConfig(vocab_size=30, dim=32, num_layers=2, num_heads=2, feed_forward=64)).eval()


def zeros(layer: Any) -> Tensor:
    return (layer.weight if isinstance(layer, nn.Linear) else layer.dequantized()) == 0


@pytest.mark.parametrize(
    "recipe", ["magnitude", "wanda:ratio=0.3 + int8", "sparsegpt:pattern=2:4 + gptq", "wanda + awq + int4"]
)
def test_a_recipe_of_masks_is_saved_loaded_and_undone(recipe, tmp_path):
    model, data = language_model(), [torch.randint(30, (2, 40)) for _ in range(3)]
    before = model(data[0]).output
    small = regard.compress(model, recipe, data)
    for layer in small.report.layers:
        if layer.name != "head":
            assert (
                layer.zeros is not None and float(zeros(model.get_submodule(layer.name)).float().mean()) >= layer.zeros
            )
    assert "does not make the model faster" in str(small.report)
    after = model(data[0]).output
    assert not torch.equal(after, before)
    small.save(tmp_path)
    again: Any = load_compressed(tmp_path)
    assert torch.equal(again(data[0]).output, after)
    model = language_model()
    before = model(data[0]).output
    assert torch.equal(regard.compress(model, recipe, data).undo()(data[0]).output, before)


def test_a_run_of_masks_that_was_stopped_goes_on(tmp_path):
    data = [torch.randint(30, (2, 40)) for _ in range(3)]
    model = language_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = regard.compress(model, "wanda", data)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole.undo()

    def stop(name: str, done: int, count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regard.compress(model, "wanda", data, work=tmp_path, on_layer=stop)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(list(tmp_path.glob("block-*.safetensors"))) == 1
    regard.compress(model, "wanda", data, work=tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_columns_that_do_not_fit_a_pattern_are_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    refused(r"0: pattern 2:4 in 6 columns", regard.compress, model, "magnitude:pattern=2:4")
