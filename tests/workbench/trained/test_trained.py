"""One model, trained into a folder: a stopped run continues, and afterwards the folder is all that is needed."""

import json
import random
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from command_line import answer, run
from task_data import HOURS, hours, photo, save

from regard import Unsupported
from regard.catalogue import unregister
from regard.measurement.budget import Budget
from regard.models import register_model
from regard.models.language_model import LanguageModel, LanguageModelConfig
from regard.models.registry import MODELS, models_for
from regard.tasks import create_task
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.trained.folder import CHECKPOINT, open_trained
from regard.workbench.trained.run import train_model

RECTIFIED = Path(__file__).parents[3] / "docs/examples/mechanisms/rectified.py"
MODULE = """
import torch

class Sums(torch.nn.Module):
    def forward(self, x):
        return x.cumsum(1)
"""
RECALL = {"pairs": 2, "queries": 4, "length": 12, "vocab_size": 8, "evaluation_items": 16}


@pytest.fixture
def recall():
    return create_task("recall", **RECALL)


def settings(**changes):
    small = {"mechanisms": ("gated_linear",), "budget": Budget.parse("24 steps"), "dim": 16, "layers": 1, "heads": 2}
    small |= {"seeds": 1, "frames": ("bare",), "rates": (1e-2,), "lengths": (12,), "batch_tokens": 48}
    return CompareSettings(**(small | changes))


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
    expected = whole.model().state_dict()
    for name, tensor in parts.model().state_dict().items():
        assert torch.equal(tensor, expected[name]), name


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
    def loss(self, output, batch):
        return output.sum((1, 2)) * torch.nan, output.sum((1, 2))

    monkeypatch.setattr(type(recall), "loss", loss)
    assert train_model(recall, settings(), tmp_path).record["state"] == "diverged"
    with pytest.raises(Unsupported, match="diverged"):
        open_trained(tmp_path)


def test_a_budget_of_time_becomes_steps_by_what_one_takes(recall, tmp_path, monkeypatch):
    def calibrate(self, seconds):
        self.step_seconds, self.evaluation_seconds = {"gated_linear": 0.5}, {"gated_linear": 0.5}

    monkeypatch.setattr("regard.workbench.comparison.work.Work.calibrate", calibrate)
    for budget in ("2s", "3 steps"):
        with pytest.raises(Unsupported, match="fewer than"):
            train_model(recall, settings(budget=Budget.parse(budget)), tmp_path)
    assert not list(tmp_path.iterdir())
    found = train_model(recall, settings(budget=Budget.parse("40s")), tmp_path)
    assert 60 < found.record["settings"]["steps"] <= (0.93 * 40 - 0.5) / 0.5


def test_a_run_that_is_refused_at_its_first_step_leaves_the_folder_to_others(recall, tmp_path):
    def refuse(point, total, left):
        raise Unsupported("a step")

    with pytest.raises(Unsupported, match="a step"):
        train_model(recall, settings(), tmp_path, on_step=refuse)
    assert not list(tmp_path.iterdir())


def test_several_mechanisms_are_refused(recall, tmp_path):
    with pytest.raises(Unsupported, match="compare"):
        train_model(recall, settings(mechanisms=("softmax", "linear")), tmp_path)


PANGRAMS = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 60
OTHER = "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg. " * 9


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text(PANGRAMS)
    (tmp_path / "other.txt").write_text(OTHER)
    return tmp_path / "corpus.txt"


def test_the_folder_scores_as_the_run_did_and_on_other_text(corpus, tmp_path):
    options = {"length": 16, "tokenizer": "bpe:300", "held_out": 0.3, "evaluation_items": 8}
    trained = train_model(create_task("text", data=str(corpus), **options), settings(), tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    found = open_trained(tmp_path / "model")
    assert found.score().score == pytest.approx(trained.record["score"], rel=1e-6)
    assert found.score(found.task(str(tmp_path / "other.txt"))).score != trained.record["score"]
    assert "from_pretrained" in (tmp_path / "model" / "README.md").read_text()


SMALL = "--budget '24 steps' --dim 16 --layers 1 --heads 2 --batch-tokens 64 --length 16"
TASK = f"--task recall:pairs=2,queries=4,vocab_size=8,evaluation_items=16 {SMALL}"


def test_train_evaluate_and_generate_on_the_command_line(corpus, tmp_path, capsys):
    folder = tmp_path / "model"
    train = f"train {corpus} {SMALL} --output {folder}"
    assert answer(capsys, train)["state"] == "finished"
    score = answer(capsys, "evaluate", folder)["score"]
    assert score == pytest.approx(open_trained(folder).record["score"], rel=1e-6)
    code, out, _ = run(capsys, "evaluate", folder, tmp_path / "other.txt")
    assert code == 0 and "bits per byte" in out
    (tmp_path / "one.txt").write_text("one item of text.")
    alone = answer(capsys, "evaluate", folder, tmp_path / "one.txt")
    assert (alone["items"], alone["standard_error"]) == (1, None)
    generate = f"generate {folder} Zwölf --tokens 30 --temperature 1"
    assert run(capsys, generate)[1] == f"Zwölf{answer(capsys, generate)['text']}\n"
    greedy = f"generate {folder} Zwölf --tokens 30 --temperature 0"
    alone = answer(capsys, greedy)["text"]
    for draft in ("lookup", folder):
        found = answer(capsys, f"{greedy} --draft {draft} --proposals 3")
        assert found["text"] == alone and found["speculation"]["tokens"] == 30
    assert found["speculation"]["passes"] == 8, "its own proposals are all kept"
    farther = "trained on 16 tokens at a time: it has not learned to handle 36"
    assert farther in found["beyond"] and farther in " ".join(run(capsys, greedy)[2].split())
    assert "beyond" not in answer(capsys, f"generate {folder} Zwölf --tokens 10")
    code, _, said = run(capsys, f"{train} --dim 32")
    assert code == 2 and "dim=16" in said
    for asked in ("--temperature -1", "--top-p 2", "--tokens -5", "--seed 4294967296", "--draft lookup --tokens -5"):
        code, out, said = run(capsys, f"generate {folder} Zwölf {asked}")
        assert (code, out) == (2, "") and "Traceback" not in said, "a refusal has nothing before it"


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "tokenizer.json"])
def test_what_a_folder_has_of_others_is_not_overwritten_by_a_model(corpus, tmp_path, capsys, name):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text("of somebody else")
    code, _, said = run(capsys, f"train {corpus} {SMALL} --output {tmp_path / 'model'}")
    assert code == 2 and f"{name}, which is not of a training" in said and "calibrating" not in said
    assert [(path.name, path.read_text()) for path in (tmp_path / "model").iterdir()] == [(name, "of somebody else")]


def test_a_folder_that_is_not_whole_is_told_from_one_that_is_none(tmp_path, capsys):
    def said(name):
        code, out, messages = run(capsys, f"generate {tmp_path / name} a")
        assert (code, out) == (2, "")
        return messages

    for name, work in (("retrofit", ".retrofit"), ("compress", ".work")):
        (tmp_path / name / work).mkdir(parents=True)
        assert f"whose {name} is not finished" in said(name) and f"try the same `regard {name}` again" in said(name)
    assert "which does not exist" in said("retrofti") and f"try {tmp_path / 'retrofit'}" in said("retrofti")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text('{"model_type": ')
    assert "config.json, which cannot be read" in said("cut")
    (tmp_path / "cut" / "config.json").rename(tmp_path / "cut" / "photo.png")
    assert "without training.json: it holds photo.png; supported: a folder of `regard train` on text" in said("cut")
    assert "which is not a folder" in said("cut/photo.png")


def test_text_is_asked_of_models_of_text_alone(tmp_path, capsys):
    assert run(capsys, f"train {TASK} --output {tmp_path}")[0] == 0
    for folder, words in ((tmp_path, ("text", "recall")), (tmp_path / "none", ("regard train",))):
        code, _, said = run(capsys, f"generate {folder} a")
        assert code == 2 and all(word in said for word in words)


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
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "bad.py").write_text("MODEL = 3")
    assert run(capsys, f"train --plugin mine.py {TASK} --model Narrow --output out")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"] == "Narrow"
    for asked, words in ((f"--plugin mine.py {TASK} --model Narow", "Narrow"), ("--plugin bad.py", "class")):
        code, _, said = run(capsys, f"train {asked} --output other")
        assert code == 2 and words in said


def test_a_model_s_readme_says_how_to_use_it_with_its_plugins(tmp_path, monkeypatch, capsys):
    """Its commands and its Python, given as they stand there."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my files"
    folder.mkdir()
    (folder / "text.txt").write_text("".join(str(random.random()) for _ in range(200)))
    shutil.copy(RECTIFIED, folder)
    (folder / "module.py").write_text(MODULE)
    small = "--task text:length=16 --dim 8 --layers 1 --heads 2 --batch-tokens 64 --budget '20 steps'"
    for name, plugin in (("rectified", "rectified.py"), ("Sums", "module.py:Sums")):
        try:
            line = f"train 'my files/text.txt' {small} --mechanism {name} --plugin 'my files/{plugin}' --output {name}"
            answer(capsys, line)
            unregister(name)
            python, commands = (
                part.split("```")[0] for part in Path(name, "README.md").read_text().split("```")[-4::2]
            )
            for command in commands.strip().splitlines():
                assert run(capsys, command.removeprefix("regard "))[0] == 0
                unregister(name)
            space = {}
            exec(python.removeprefix("python"), space)
            assert type(space["model"]) is LanguageModel
        finally:
            unregister(name)


def test_models_say_what_they_serve(recall):
    assert models_for(recall) == ["LanguageModel"]
    assert models_for(create_task("listops", length=32, evaluation_items=4)) == ["Encoder", "PyramidEncoder"]
    with pytest.raises(Unsupported, match="another model"):
        register_model(type("Encoder", (LanguageModel,), {}), LanguageModelConfig)


def test_images_as_sequences_are_scored_on_other_images_as_they_were_read(tmp_path):
    for part in ("a", "b"):
        for number in range(12):
            photo(tmp_path / part / "xy"[number % 2] / f"{number}.png", number + 50 * (part == "b"), (8, 8))
    task = create_task("long_range", which="image", length=64, data=str(tmp_path / "a"))
    trained = train_model(task, settings(batch_tokens=256, lengths=(64,)), tmp_path / "model")
    scored = trained.task(str(tmp_path / "b"))
    assert scored.reader == task.reader and scored.task.reader is scored.reader and scored.shared == 0
    assert sum(batch.size for batch in scored.evaluation_batches(5)) == 12
    assert 0 <= trained.score(scored).score <= 1


def test_a_forecast_of_other_data_is_on_the_scale_of_the_training(tmp_path):
    data = save(tmp_path / "a.csv", hours(300), HOURS, ",")
    task = create_task("forecast", data=str(data), target="load", length=6, history=24)
    trained = train_model(task, settings(batch_tokens=240, lengths=(6,)), tmp_path / "model")
    scored = trained.task(str(save(tmp_path / "b.csv", hours(100, seed=1), HOURS, ",")))
    assert scored.fitted == task.fitted and not trained.task().shared
    assert trained.task(str(data)).shared > 0


def test_a_run_with_another_way_of_scoring_is_another(tmp_path):
    data = str(save(tmp_path / "a.csv", hours(300), HOURS, ","))
    options = {"data": data, "target": "load", "length": 6, "history": 24}
    for words, metric in (("", "mae"), ("", "mae"), ("metric='mae' instead of 'mse'", "mse")):
        task = create_task("forecast", **options, metric=metric)
        with pytest.raises(Unsupported, match=words) if words else nullcontext():
            train_model(task, settings(batch_tokens=240, lengths=(6,)), tmp_path / "model")
