"""Training in float16: small gradients survive, overflows are skipped and reported, resumed runs equal whole ones."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from small_runs import LastToken, Repeat, assert_same, train_on, train_until, weights

from regard import Pattern, get_mechanism, list_mechanisms
from regard.contract import Unsupported
from regard.models import Encoder, EncoderConfig, LanguageModel, LanguageModelConfig
from regard.training import TrainConfig, train
from regard.training.checkpoint import load_checkpoint

CONFIG = TrainConfig(
    steps=12, batch_size=4, learning_rate=3e-3, checkpoint_every=4, precision="float16", measure_memory=False
)
FIRST_SCALE = 2.0**16


class WithGradients(torch.nn.Module):
    """A model whose output gradient is multiplied by a factor, at some steps or at all steps."""

    def __init__(self, inner, factor, steps=None):
        super().__init__()
        self.inner, self.factor, self.steps = inner, factor, steps

    def forward(self, inputs, *, context):
        result = self.inner(inputs, context=context)
        if self.steps is None or context.progress in self.steps:
            result.output.register_hook(lambda gradient: gradient * self.factor)
        return result


def test_an_overflow_leaves_the_weights_and_halves_the_scale(task, build, tmp_path):
    path, model, before = tmp_path / "run", WithGradients(build(), math.inf, {5}), []
    history = train(model, task, CONFIG, on_step=lambda _: before.append(weights(model)), checkpoint=path)
    assert [point.step for point in history.curve if point.skipped] == [5] and history.skipped == 1
    assert history.finished and not history.diverged
    assert_same(before[4], before[5])
    assert not all(torch.equal(before[5][name], before[6][name]) for name in before[5])
    found = load_checkpoint(path)
    assert found.record["scaler"]["scale"] == FIRST_SCALE / 2
    steps = [tensor for name, tensor in found.optimizer.items() if name.endswith(".step")]
    assert steps and all(int(count) == CONFIG.steps - 1 for count in steps)


@pytest.mark.parametrize("stop_after", [3, 6])
def test_a_run_interrupted_between_overflows_resumes_to_the_undisturbed_one(task, build, tmp_path, stop_after):
    undisturbed, interrupted, resumed = (WithGradients(build(), math.inf, {2, 5, 8}) for _ in range(3))
    expected = train(undisturbed, task, CONFIG, checkpoint=tmp_path / "whole")
    train_until(stop_after, interrupted, task, CONFIG, tmp_path / "run")
    history, _ = train_on(resumed, task, CONFIG, tmp_path / "run")
    assert_same(resumed, undisturbed)
    assert [p.skipped for p in history.curve] == [p.skipped for p in expected.curve]
    scalers = [load_checkpoint(tmp_path / name).record["scaler"] for name in ("run", "whole")]
    assert scalers[0] == scalers[1] and scalers[0]["scale"] == FIRST_SCALE / 2**3


def test_gradients_that_float16_alone_would_lose_reach_the_weights(task, build):
    """They are around 1e-9, less than half of the smallest float16 number."""
    norms = {}
    for precision in ("float32", "float16"):
        model = WithGradients(build(), 1e-6)
        history = train(model, task, dataclasses.replace(CONFIG, precision=precision, steps=1))
        norms[precision] = history.curve[0].gradient_norm
    assert 0 < norms["float32"] < 1e-5
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.02)


def test_gradients_that_overflow_unscaled_too_are_a_divergence(task, build):
    model = build()
    before = weights(model)
    history = train(WithGradients(model, math.inf), task, dataclasses.replace(CONFIG, steps=40))
    assert history.diverged and not history.finished
    assert history.skipped == len(history.curve) == int(math.log2(FIRST_SCALE))
    assert_same(model, before)


def test_parameters_in_float16_are_refused(task, build):
    with pytest.raises(Unsupported, match="parameters are float16") as caught:
        train(build().half(), task, CONFIG)
    assert caught.value.nearest == "model.float()"


def model_of(name):
    """A small model with the mechanism in its layers, its pool or its projections, and a task for it."""
    card = get_mechanism(name)
    sizes = {"vocab_size": 5, "dim": 16, "num_heads": 2}
    if card.kind == "pooling":
        return LastToken(), Encoder(EncoderConfig(num_classes=5, pool=name, **sizes))
    plan = [("softmax", {"linear": name})] if card.kind == "projection" else [name]
    if card.kind == "projection" or Pattern.CAUSAL_SELF in card.patterns:
        return Repeat(), LanguageModel(LanguageModelConfig(plan=plan, **sizes))
    return LastToken(), Encoder(EncoderConfig(num_classes=5, plan=plan, **sizes))


@pytest.mark.parametrize("name", list_mechanisms())
def test_losses_and_gradients_of_every_mechanism_are_those_of_float32(name):
    """The learning rate hardly moves the weights, so that a skipped step does not affect the others."""
    curves = {}
    for precision in ("float32", "float16"):
        torch.manual_seed(0)
        task, model = model_of(name)
        config = dataclasses.replace(CONFIG, precision=precision, steps=5, learning_rate=1e-9)
        curves[precision] = train(model, task, config).curve
    assert len(curves["float16"]) == 5
    assert sum(point.skipped for point in curves["float16"]) <= 3
    for narrow, wide in zip(curves["float16"], curves["float32"], strict=True):
        assert narrow.loss == pytest.approx(wide.loss, rel=0.01)
        if not narrow.skipped:
            assert narrow.gradient_norm == pytest.approx(wide.gradient_norm, rel=0.05)
    assert [p.loss for p in curves["float16"]] != [p.loss for p in curves["float32"]]
