"""One model, trained into a folder: the run goes on where it was stopped, and the folder is all that is needed afterwards."""

import json
import sys

import pytest
import torch

from regard import Unsupported
from regard.cli import main
from regard.models import register_model
from regard.models.language_model import LanguageModel, LanguageModelConfig
from regard.models.registry import MODELS, models_for
from regard.tasks import create_task
from regard.workbench.budget import Budget
from regard.workbench.settings import CompareSettings
from regard.workbench.trained import CHECKPOINT, open_trained, train_model

RECALL = {"pairs": 2, "queries": 4, "length": 12, "vocab_size": 8, "evaluation_items": 16}


@pytest.fixture
def recall():
    return create_task("recall", **RECALL)


def settings(**changes):
    small = {"mechanisms": ("gated_linear",), "budget": Budget.parse("24 steps"), "dim": 16, "layers": 1, "heads": 2}
    small |= {"seeds": 1, "frames": ("bare",), "rates": (1e-2,), "lengths": (12,), "batch_tokens": 48}
    return CompareSettings(**(small | changes))


def weights(trained):
    return trained.model().state_dict()


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(recall, tmp_path):
    whole = train_model(recall, settings(), tmp_path / "whole")
    steps = []

    def stop(point, total, left):
        steps.append((point.step, total))
        if point.step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_model(recall, settings(), tmp_path / "parts", on_step=stop)
    assert (tmp_path / "parts" / CHECKPOINT).is_file()
    with pytest.raises(Unsupported, match="not finished"):
        open_trained(tmp_path / "parts")
    parts = train_model(recall, settings(), tmp_path / "parts", on_step=stop)
    assert steps == [(step, 24) for step in range(24)]
    assert not (tmp_path / "parts" / CHECKPOINT).exists()
    assert parts.record["score"] == whole.record["score"] and parts.record["tokens"] == 24 * 48
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name


def test_a_finished_run_is_not_made_again_and_another_one_does_not_replace_it(recall, tmp_path):
    train_model(recall, settings(), tmp_path)
    again = train_model(recall, settings(), tmp_path, on_step=lambda *told: pytest.fail("a step was made"))
    assert again.record["state"] == "finished"
    other = create_task("recall", **RECALL, seed=1)
    for task, changes, word in (
        (recall, {"dim": 32}, "dim=16"),
        (recall, {"rates": (1e-3,)}, "learning_rate"),
        (recall, {"mechanisms": ("softmax",)}, "mechanism"),
        (other, {}, "other data"),
    ):
        with pytest.raises(Unsupported, match=word):
            train_model(task, settings(**changes), tmp_path)
    assert open_trained(tmp_path).record == again.record


def test_what_diverges_leaves_no_model(recall, tmp_path, monkeypatch):
    monkeypatch.setattr(
        type(recall), "loss", lambda self, output, batch: (output.sum((1, 2)) * torch.nan, output.sum((1, 2)))
    )
    assert train_model(recall, settings(), tmp_path).record["state"] == "diverged"
    with pytest.raises(Unsupported, match="diverged"):
        open_trained(tmp_path)


def test_a_budget_of_time_becomes_steps_by_what_one_takes(recall, tmp_path, monkeypatch):
    def calibrate(self, seconds):
        self.step_seconds, self.evaluation_seconds = {"gated_linear": 0.1}, {"gated_linear": 0.5}

    monkeypatch.setattr("regard.workbench.work.Work.calibrate", calibrate)
    with pytest.raises(Unsupported, match="fewer than"):
        train_model(recall, settings(budget=Budget.parse("2s")), tmp_path)
    assert not list(tmp_path.iterdir())
    found = train_model(recall, settings(budget=Budget.parse("40s")), tmp_path)
    assert 300 < found.record["settings"]["steps"] <= (0.93 * 40 - 0.5) / 0.1
    with pytest.raises(Unsupported, match="fewer than"):
        train_model(recall, settings(budget=Budget.parse("3 steps")), tmp_path / "other")


def test_several_mechanisms_are_refused(recall, tmp_path):
    with pytest.raises(Unsupported, match="compare"):
        train_model(recall, settings(mechanisms=("softmax", "linear")), tmp_path)


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 60)
    return file


def test_the_folder_scores_as_the_run_did_and_on_other_text(corpus, tmp_path):
    options = {"data": str(corpus), "length": 16, "tokenizer": "bpe:300", "held_out": 0.3, "evaluation_items": 8}
    trained = train_model(create_task("text", **options), settings(), tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    found = open_trained(tmp_path / "model")
    assert found.score().score == pytest.approx(trained.record["score"], rel=1e-6)
    other = tmp_path / "other.txt"
    other.write_text("Falsches Üben von Xylophonmusik quält jeden größeren Zwerg. " * 9)
    assert found.score(found.task(str(other))).score != trained.record["score"]
    assert "from_pretrained" in (tmp_path / "model" / "README.md").read_text()


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["regard", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return ended.value.code or 0, said.out, said.err


SMALL = ["--budget", "24 steps", "--dim", 16, "--layers", 1, "--heads", 2, "--batch-tokens", 64, "--length", 16]


def test_train_evaluate_and_generate_on_the_command_line(corpus, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    code, out, _ = run(monkeypatch, capsys, "train", corpus, *SMALL, "--output", folder, "--json")
    assert code == 0 and json.loads(out)["state"] == "finished"
    code, out, _ = run(monkeypatch, capsys, "evaluate", folder, "--json")
    assert code == 0 and json.loads(out)["score"] == pytest.approx(open_trained(folder).record["score"], rel=1e-6)
    (tmp_path / "other.txt").write_text("Falsches Üben von Xylophonmusik quält jeden größeren Zwerg. " * 9)
    code, out, _ = run(monkeypatch, capsys, "evaluate", folder, tmp_path / "other.txt")
    assert code == 0 and "bits per byte" in out
    code, out, _ = run(monkeypatch, capsys, "generate", folder, "Zwölf", "--tokens", 30, "--temperature", 1)
    code, told, _ = run(monkeypatch, capsys, "generate", folder, "Zwölf", "--tokens", 30, "--temperature", 1, "--json")
    assert out == "Zwölf" + json.loads(told)["text"] + "\n"
    again = run(monkeypatch, capsys, "train", corpus, *SMALL, "--output", folder, "--dim", 32)
    assert again[0] == 2 and "dim=16" in again[2]


def test_text_is_asked_of_models_of_text_alone(tmp_path, monkeypatch, capsys):
    task = ["--task", "recall:pairs=2,queries=4,vocab_size=8,evaluation_items=16", *SMALL]
    assert run(monkeypatch, capsys, "train", *task, "--output", tmp_path)[0] == 0
    code, _, said = run(monkeypatch, capsys, "generate", tmp_path, "a")
    assert code == 2 and "text" in said and "recall" in said
    code, _, said = run(monkeypatch, capsys, "generate", tmp_path / "none", "a")
    assert code == 2 and "regard train" in said


PLUGIN = """
from regard.models.language_model import LanguageModel, LanguageModelConfig

class NarrowConfig(LanguageModelConfig):
    @classmethod
    def for_task(cls, task, plan, **sizes):
        return cls(task.vocab_size, plan=plan, **{**sizes, "norm": "layer"})

class Narrow(LanguageModel):
    pass

MODEL = (Narrow, NarrowConfig)
"""


@pytest.fixture
def models():
    before = dict(MODELS)
    yield
    MODELS.clear()
    MODELS.update(before)


def test_a_plugin_brings_a_model_that_is_found_by_its_name(models, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(PLUGIN)
    plugged = [
        "--plugin",
        tmp_path / "mine.py",
        "--task",
        "recall:pairs=2,queries=4,vocab_size=8,evaluation_items=16",
        *SMALL,
    ]
    code, *_ = run(monkeypatch, capsys, "train", *plugged, "--model", "Narrow", "--output", tmp_path / "out")
    assert code == 0 and json.loads((tmp_path / "out" / "config.json").read_text())["model"] == "Narrow"
    code, _, said = run(monkeypatch, capsys, "train", *plugged, "--model", "Narow", "--output", tmp_path / "other")
    assert code == 2 and "Narrow" in said
    (tmp_path / "bad.py").write_text("MODEL = 3")
    code, _, said = run(monkeypatch, capsys, "train", "--plugin", tmp_path / "bad.py", "--output", tmp_path / "other")
    assert code == 2 and "class" in said


def test_models_say_what_they_serve(recall):
    assert models_for(recall) == ["LanguageModel"]
    assert models_for(create_task("listops", length=32, evaluation_items=4)) == ["Encoder"]
    with pytest.raises(Unsupported, match="another model"):
        register_model(type("Encoder", (LanguageModel,), {}), LanguageModelConfig)
