"""Learned grids: their gradients, the gain from training, and a run that was stopped."""

from __future__ import annotations

import math

import pytest
import torch
from support import refused

import regard
from regard.compression.recipes import read_recipe
from regard.compression.weights.learned import KEPT, LearnedSteps
from regard.layers.quantized import Format, QuantizedLinear
from regard.models import LanguageModel, LanguageModelConfig


def language_model() -> LanguageModel:
    return LanguageModel(LanguageModelConfig(vocab_size=23, dim=32, num_heads=2, num_layers=2)).eval()


def windows(count: int = 4) -> list[torch.Tensor]:
    return [torch.arange(24)[None].mul(step + 1).remainder(23) for step in range(count)]


def loss(model: LanguageModel) -> float:
    with torch.no_grad():
        return sum(float(model.loss(ids)) for ids in windows())


@pytest.mark.parametrize("format", [Format(3, 32), Format(8)], ids=str)
def test_gradients_of_weights_and_steps_are_those_of_the_paper(format):
    weight = torch.randn(5, 64, dtype=torch.float64)
    steps = LearnedSteps(weight, format).double()
    with torch.no_grad():
        steps.scale.copy_(steps.scale.to(torch.bfloat16))  # as codes store it: gradients are for that number
    weight.requires_grad_(True)
    outer = torch.randn(5, 64, dtype=torch.float64)
    (steps(weight) * outer).sum().backward()
    rows, given = weight.detach().reshape(len(steps.scale), -1), outer.reshape(len(steps.scale), -1)
    low, high = format.codes
    places = rows / steps.scale.detach()[:, None]
    inside = (places > low) & (places < high)
    by_step = torch.where(inside, places.round() - places, places.clamp(low, high))
    expected = (by_step * given).sum(1) / math.sqrt(rows.shape[1] * high)
    assert torch.allclose(weight.grad.reshape_as(rows), given * inside, rtol=1e-12, atol=1e-12)
    assert torch.allclose(steps.scale.grad, expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(steps(weight).float(), steps.codes(weight).weight()[:, :64], rtol=1e-6)


def test_the_step_of_a_padded_group_counts_its_own_columns_alone():
    weight = torch.ones(3, 48)
    steps, alone = LearnedSteps(weight, Format(3, 32)), LearnedSteps(weight[:, 32:], Format(3, 32))
    assert torch.allclose(steps.scale, torch.full_like(steps.scale, 2 / math.sqrt(3)))
    assert torch.allclose(alone.scale, steps.scale[1::2])
    for made, given in ((steps, weight), (alone, weight[:, 32:])):
        made(given)[:, -16:].sum().backward()
    assert torch.allclose(steps.scale.grad[1::2], alone.scale.grad)


def test_steps_that_training_drove_to_nothing_leave_gradients_finite():
    weight = torch.randn(4, 32)
    weight[0] = 0
    steps = LearnedSteps(weight, Format(4, 32))
    with torch.no_grad():
        steps.scale[1], steps.scale[2] = -0.5, 1e-13
    steps(weight.requires_grad_(True)).sum().backward()
    assert weight.grad.isfinite().all() and steps.scale.grad.isfinite().all()


def test_learned_grids_lose_less_than_the_nearest_and_the_model_comes_back():
    model = language_model()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        for ids in windows():
            optimizer.zero_grad()
            model.loss(ids).backward()
            optimizer.step()
    before, weights = loss(model), {name: p.clone() for name, p in model.named_parameters()}
    lost = {}
    for recipe in ("int4:bits=2,head=keep", "lsq:bits=2,head=keep,steps=60,learning_rate=0.003"):
        small = regard.compress(model, recipe, windows())
        assert all(isinstance(model.get_submodule(layer.name), QuantizedLinear) for layer in small.report.layers)
        lost[recipe[:3]] = loss(model) - before
        told = small.report.notes
        small.undo()
    assert lost["lsq"] < 0.5 * lost["int"], lost
    (said,) = told
    first, last = (
        float(word.split()[-1]) for word in said.replace(" before", "").replace(" after", "").split(",")[-2:]
    )
    assert (
        "learned in 60 steps" in said and last < first and last == pytest.approx((before + lost["lsq"]) / 4, abs=0.002)
    )
    assert all(torch.equal(p, weights[name]) and p.requires_grad for name, p in model.named_parameters())


def test_a_run_that_was_stopped_goes_on_to_the_same_codes(tmp_path):
    recipe, model = "lsq:steps=9,learning_rate=0.01", language_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = regard.compress(model, recipe, windows())
    expected = model(windows()[0]).output
    whole.undo()
    seen: list[int] = []

    def stop(name: str, done: int, count: int) -> None:
        seen.append(done)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regard.compress(model, recipe, windows(), work=tmp_path, on_layer=stop)
    assert (tmp_path / KEPT).is_file() and not any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    regard.compress(model, recipe, windows(), work=tmp_path, on_layer=stop)
    assert seen == list(range(1, 10)) and torch.equal(model(windows()[0]).output, expected)


def test_what_learned_grids_cannot_do_is_refused():
    refused("weights it would train anew", read_recipe, "wanda + lsq")
    refused("weights it would train anew", read_recipe, "awq + lsq")
    refused("learning_rate=0", read_recipe, "lsq:learning_rate=0")
    refused("grids are learned", read_recipe, "lsq:calibrate=mse")
    refused("without data", regard.compress, language_model(), "lsq")
    refused(
        "loss is nan", regard.compress, language_model(), "lsq", windows(), losses=lambda *_: torch.tensor([math.nan])
    )
