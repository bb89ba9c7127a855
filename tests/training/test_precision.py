"""Training in float16: small gradients survive, overflows are skipped and told, and resumed runs equal whole ones."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from small_runs import LastToken, Repeat

from regard import Pattern, get_mechanism, list_mechanisms
from regard.contract import Result, Unsupported
from regard.models import Encoder, EncoderConfig, LanguageModel, LanguageModelConfig
from regard.training import TrainConfig, train
from regard.training.checkpoint import load_checkpoint

CONFIG = TrainConfig(
    steps=12, batch_size=4, learning_rate=3e-3, checkpoint_every=4, precision="float16", measure_memory=False
)
FIRST_SCALE = 2.0**16


class WithGradients(torch.nn.Module):
    """A model whose output's gradient is multiplied by a factor, at some steps or at all."""

    def __init__(self, inner, factor, steps=None):
        super().__init__()
        self.inner, self.factor, self.steps = inner, factor, steps

    def forward(self, inputs, *, context):
        result = self.inner(inputs, context=context)
        if self.steps is None or context.progress in self.steps:
            result.output.register_hook(lambda gradient: gradient * self.factor)
        return result


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_an_overflow_leaves_the_weights_and_halves_the_scale(task, build, tmp_path):
    path, model, before = tmp_path / "run", WithGradients(build(), math.inf, {5}), []

    def look(point):
        before.append(weights(model))

    history = train(model, task, CONFIG, on_step=look, checkpoint=path)
    assert [point.step for point in history.curve if point.skipped] == [5] and history.skipped == 1
    assert history.finished and not history.diverged
    assert_same(before[4], before[5])
    assert not all(torch.equal(before[5][name], before[6][name]) for name in before[5])
    found = load_checkpoint(path)
    assert found.record["scaler"]["scale"] == FIRST_SCALE / 2
    steps = [tensor for name, tensor in found.optimizer.items() if name.endswith(".step")]
    assert steps and all(int(count) == CONFIG.steps - 1 for count in steps)


@pytest.mark.parametrize("stop_after", [1, 3, 6, 11])
def test_a_run_interrupted_between_overflows_resumes_to_the_undisturbed_one(task, build, tmp_path, stop_after):
    overflows = {2, 5, 8}
    undisturbed = WithGradients(build(), math.inf, overflows)
    expected = train(undisturbed, task, CONFIG, checkpoint=tmp_path / "whole")

    def interrupt(point):
        if point.step + 1 == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(WithGradients(build(), math.inf, overflows), task, CONFIG, on_step=interrupt, checkpoint=tmp_path / "run")
    resumed = WithGradients(build(), math.inf, overflows)
    history = train(resumed, task, CONFIG, checkpoint=tmp_path / "run")
    assert_same(weights(resumed), weights(undisturbed))
    assert [p.skipped for p in history.curve] == [p.skipped for p in expected.curve]
    scalers = [load_checkpoint(tmp_path / name).record["scaler"] for name in ("run", "whole")]
    assert scalers[0] == scalers[1] and scalers[0]["scale"] == FIRST_SCALE / 2 ** len(overflows)


def test_gradients_that_float16_alone_would_lose_reach_the_weights(task, build):
    """They are of the size of 1e-9, below half of the smallest number of float16."""
    norms = {}
    for precision in ("float32", "float16"):
        model = WithGradients(build(), 1e-6)
        history = train(model, task, dataclasses.replace(CONFIG, precision=precision, steps=1))
        norms[precision] = history.curve[0].gradient_norm
    assert 0 < norms["float32"] < 1e-5
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.02)


def test_gradients_are_unscaled_before_they_are_clipped(task, build, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def look(optimizer, *args):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt().item())
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    narrow, wide = (
        train(build(), task, dataclasses.replace(CONFIG, clip=1e-3, steps=3, precision=precision))
        for precision in ("float16", "float32")
    )
    assert norms == pytest.approx([1e-3] * 6, rel=1e-3)
    for first, second in zip(narrow.curve, wide.curve, strict=True):
        assert first.gradient_norm == pytest.approx(second.gradient_norm, rel=0.05)


def test_gradients_that_overflow_unscaled_too_are_a_divergence(task, build):
    model = build()
    before = weights(model)
    history = train(WithGradients(model, math.inf), task, dataclasses.replace(CONFIG, steps=40))
    assert history.diverged and not history.finished
    assert history.skipped == len(history.curve) == int(math.log2(FIRST_SCALE))
    assert_same(weights(model), before)


def test_a_loss_that_is_not_finite_is_a_divergence(task, build):
    class Exploding(WithGradients):
        def forward(self, inputs, *, context):
            result = self.inner(inputs, context=context)
            return Result(result.output * (math.inf if context.progress == 4 else 1.0))

    history = train(Exploding(build(), 1.0), task, CONFIG)
    assert history.diverged and len(history.curve) == 4


def test_parameters_in_float16_are_refused(task, build):
    with pytest.raises(Unsupported, match="parameters are float16") as caught:
        train(build().half(), task, CONFIG)
    assert caught.value.nearest == "model.float()"


def model_of(name):
    """A small model with the mechanism in its layers, its pool or its projections, and a task for it."""
    card = get_mechanism(name)
    sizes = {"vocab_size": 5, "dim": 16, "num_heads": 2, "plan": [name]}
    if card.kind == "projection":
        sizes["plan"] = [("softmax", {"linear": name})]
    if card.kind == "pooling":
        return LastToken(), Encoder(EncoderConfig(num_classes=5, **{**sizes, "plan": "softmax", "pool": name}))
    if Pattern.CAUSAL_SELF in card.patterns or card.kind == "projection":
        return Repeat(), LanguageModel(LanguageModelConfig(**sizes))
    return LastToken(), Encoder(EncoderConfig(num_classes=5, **sizes))


@pytest.mark.parametrize("name", list_mechanisms())
def test_losses_and_gradients_of_every_mechanism_are_those_of_float32(name):
    """At a learning rate that hardly moves the weights, so that a skipped step changes nothing for the others."""
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
