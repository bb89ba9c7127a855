"""The best and the last weights of a run; a killed run on images continues to the same weights of both kinds."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from command_line import answer, run
from safetensors.torch import load_file

from regard import Unsupported
from regard.contract import Pattern
from regard.measurement.budget import Budget
from regard.tasks import Batch, Task, counter_generator
from regard.training import WeightAverage
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.trained.best_weights import BestWeights, moments
from regard.workbench.trained.folder import CHECKPOINT, LAST, open_trained
from regard.workbench.trained.run import BEST, train_model

Image = pytest.importorskip("PIL.Image")
SMALL_VAN = "van_nano:widths=[8,16],depths=[1,1],expansions=[2,2],strides=[2,2]"


class Drifting(Task):
    """Is the sum of the bits above half? Training labels are right for six steps and wrong from then on."""

    name, pattern, objective = "drifting", Pattern.NONCAUSAL_SELF, "classification"
    length, vocab_size, num_classes = 7, 2, 2

    def describe(self):
        return "bits"

    def training_batch(self, step, seed, batch_size):
        bits = counter_generator(seed, step).integers(0, 2, (batch_size, self.length))
        right = (bits.sum(1) > 3) ^ (6 < step < 1000)
        return Batch(torch.from_numpy(bits), torch.from_numpy(right.astype(np.int64)))

    def evaluation_batches(self, batch_size):
        whole = self.training_batch(1000, 5, 80)
        for start in range(0, 80, batch_size):
            yield whole.items(start, min(start + batch_size, 80))


def settings(**changes):
    small = {"mechanisms": ("linear",), "budget": Budget.parse("24 steps"), "dim": 16, "layers": 1, "heads": 2}
    small |= {"seeds": 1, "frames": ("bare",), "rates": (1e-2,), "lengths": (12,), "batch_tokens": 224}
    return CompareSettings(**(small | changes))


def test_the_moments_are_spread_and_the_last_step_is_among_them():
    assert moments(24, 4) == {6, 12, 18, 24}
    assert moments(3, 8) == {1, 2, 3}
    assert not moments(24, 0)


def test_a_run_that_gets_worse_keeps_its_best_weights_and_the_last_ones(tmp_path):
    last = train_model(Drifting(), settings(), tmp_path / "last", best_of=0)
    best = train_model(Drifting(), settings(), tmp_path / "best", best_of=4)
    assert last.record["weights"] is None and not (tmp_path / "last" / LAST).exists()
    told = best.record["weights"]
    assert told["step"] < 24 and told["items"] == 20
    assert best.record["settings"]["first_item"] == 20, "what chose is not scored"
    assert best.record["score"] > last.record["score"] + 0.2
    whole, other = (load_file(path / "model.safetensors") for path in (tmp_path / "last", tmp_path / "best" / LAST))
    assert all(torch.equal(whole[name], other[name]) for name in whole)
    assert f"after step {told['step']}" in (tmp_path / "best" / "README.md").read_text()
    assert not (tmp_path / "best" / BEST).exists()


def test_the_mean_of_the_weights_is_kept_where_it_is_better_and_the_model_goes_on_with_its_own(tmp_path):
    model = train_model(Drifting(), settings(), tmp_path / "run", best_of=8).model()
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    best = BestWeights(tmp_path / BEST, Drifting(), 20, 8, WeightAverage(model, 0.9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    bad = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    best.look(model, 3)
    assert best.found.averaged and best.found.score > 0.6
    assert all(torch.equal(tensor, bad[name]) for name, tensor in model.state_dict().items())
    best.take(model)
    assert all(torch.equal(tensor, good[name]) for name, tensor in model.state_dict().items())


def test_an_interrupted_look_is_finished_first(tmp_path, monkeypatch):
    from regard.workbench.trained import best_weights

    looks = []

    class Runner:
        def evaluate(self, *given, **more):
            looks.append(1)
            if len(looks) == 1:
                raise KeyboardInterrupt
            return whole.evaluate(*given, **more)

    whole = best_weights.runner_of(Drifting())
    monkeypatch.setattr(best_weights, "runner_of", lambda task: Runner())
    best = BestWeights(tmp_path / BEST, Drifting(), 20, 8, None)
    model = train_model(Drifting(), settings(), tmp_path / "run", best_of=0).model()
    with pytest.raises(KeyboardInterrupt):
        best.look(model, 3)
    assert len(looks) == 2 and BestWeights(tmp_path / BEST, Drifting(), 20, 8, None).found == best.found is not None


RUN = """
import os, signal, sys
from regard.tasks import create_task
from regard.workbench.trained import run as trained
from regard.measurement.budget import Budget
from regard.workbench.comparison.settings import CompareSettings

def train(data, folder, kill=None):
    task = create_task("images", data=data, size=16, patch=4, augment="standard", mix=0.7, held_out=0.5)
    settings = CompareSettings(({model!r},), Budget.parse("20 steps"), seeds=1, rates=(1e-2,), lengths=(16,), batch_tokens=96)
    def on_step(point, steps, left):
        if point.step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
    trained.CHECKPOINT_SECONDS = 1e-9
    return trained.train_model(task, settings, folder, ema=0.9, best_of=5, on_step=on_step)
""".replace("{model!r}", repr(SMALL_VAN))


@pytest.fixture
def shades(tmp_path):
    """Noisy images whose class is the brighter side."""
    generator = np.random.default_rng(3)
    for i in range(48):
        image = generator.normal(110, 60, (20, 24, 3))
        image[:, :12] += 70 * (i % 2)
        path = tmp_path / "shades" / ("left", "right")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    return tmp_path / "shades"


def test_a_killed_run_of_a_backbone_on_varied_images_goes_on_to_the_same_weights_and_mean(shades, tmp_path):
    pytest.importorskip("torchvision")
    space: dict = {}
    exec(RUN, space)
    whole = space["train"](shades, tmp_path / "whole")
    killed = subprocess.run(
        [sys.executable, "-c", f"{RUN}\ntrain({str(shades)!r}, {str(tmp_path / 'parts')!r}, kill=11)"],
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (tmp_path / "parts" / CHECKPOINT).is_file()
    with pytest.raises(Unsupported, match="not finished"):
        open_trained(tmp_path / "parts")
    parts = space["train"](shades, tmp_path / "parts")
    for name in ("score", "loss", "weights", "tokens"):
        assert parts.record[name] == whole.record[name], name
    for file in ("model.safetensors", f"{LAST}/model.safetensors"):
        if not (tmp_path / "whole" / file).exists():
            assert not (tmp_path / "parts" / file).exists()
            continue
        first, second = (load_file(tmp_path / run / file) for run in ("whole", "parts"))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_recipe_on_the_command_line(tmp_path, capsys):
    small = "--budget '24 steps' --dim 16 --layers 1 --heads 2 --batch-tokens 64 --length 16"
    task = "--task recall:pairs=2,queries=4,vocab_size=8,evaluation_items=16"
    folder = tmp_path / "out"
    found = answer(capsys, f"train {task} {small} --ema 0.9 --best-of 3 --output {folder}")
    assert found["settings"]["ema"] == 0.9 and found["settings"]["first_item"] == found["weights"]["items"] == 4
    assert answer(capsys, "evaluate", folder)["score"] == pytest.approx(found["score"], rel=1e-6)
    code, _, said = run(capsys, f"train {task} {small} --ema 0.99 --best-of 3 --output {folder}")
    assert code == 2 and "ema=0.9 instead of 0.99" in said
    for options, words in (("--ema 1.5", "ema=1.5"), ("--best-of -1", "best_of"), ("--ema 0.9 --best-of 0", "best_of")):
        code, _, said = run(capsys, f"train {task} {small} {options} --output {tmp_path / 'other'}")
        assert code == 2 and words in said
    assert not (tmp_path / "other").exists()
