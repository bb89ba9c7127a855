"""Properties of every task: reproducible batches, separate held-out items, and refusals of nonsense."""

from __future__ import annotations

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch
from task_data import SMALL, for_any_task, items, made, refused, save_json, words

from regard.contract import Unsupported
from regard.models import build_model, config_for
from regard.tasks import TASKS, Scored, check_task, create_task, list_tasks
from regard.training import TrainConfig, evaluate, train

READERS = [
    "text",
    "masked",
    "replaced",
    "images",
    "pixels",
    "documents",
    "matching",
    "paraphrase",
    "summarize",
    "forecast",
    "speech",
    "time_series",
]
NAMES = [*SMALL, *READERS]


@pytest.fixture(params=NAMES)
def name(request):
    if request.param == "paraphrase":
        pytest.importorskip("sacrebleu", reason="scores the task")
    if request.param == "upscale":
        pytest.importorskip("sklearn", reason="has the photos")
        pytest.importorskip("PIL", reason="reads the photos")
    return request.param


def same(one, other):
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)]
    return all(torch.allclose(x, y, 0, 0, equal_nan=True) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_list_tasks_names_what_create_task_makes():
    assert sorted(list_tasks()) == sorted(NAMES)
    refused(lambda: create_task("recal"), "try recall")
    refused(lambda: create_task(None), "supported: text, masked, replaced, recall")


def test_a_training_batch_is_a_function_of_step_seed_and_size(name, tmp_path):
    one, other = (check_task(made(name, tmp_path)) for _ in range(2))
    list(other.evaluation_batches(7))
    other.training_batch(1, 2, 3)
    batch = one.training_batch(7, 2, 5)
    assert same(batch, other.training_batch(7, 2, 5))
    assert not same(batch, one.training_batch(8, 2, 5))
    assert not same(batch, one.training_batch(7, 3, 5))


def test_held_out_items_do_not_depend_on_the_batch_size(name, tmp_path):
    task = made(name, tmp_path)
    whole = items(task.evaluation_batches(64))
    assert whole == items(task.evaluation_batches(13)) == items(made(name, tmp_path).evaluation_batches(1))
    assert len(set(whole)) == len(whole)
    if name not in ("forecast", "upscale"):  # split by time and by photo
        assert whole != items(made(name, tmp_path, seed=1).evaluation_batches(64))


def test_its_model_is_trained_and_scored(name, tmp_path):
    task = made(name, tmp_path)
    longest = max(task.length, task.memory_length or 0)
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "positions": "auto", "max_length": longest}
    model = build_model(config_for(task, "softmax", **sizes))
    before = [parameter.clone() for parameter in model.parameters()]
    train(model, task, TrainConfig(steps=1, batch_size=2, measure_memory=False))
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert np.isfinite(evaluate(model, task, 64).score)


TEXTS = {"text": "documents", "documents": "items", "matching": "items", "summarize": "pairs"}
"""Text tasks, and the unit in which their data are counted."""


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_also_held_out_is_not_trained_on(tmp_path, name):
    rows = [for_any_task(f"{i} {words(5, i)}", i) for i in range(22)]
    data, other = save_json(tmp_path / "a.jsonl", rows[:20]), save_json(tmp_path / "b.jsonl", rows[15:])
    task = create_task(name, data=data, validation=other, length=32)
    if name == "text":
        training, held_out = ([d.text for d in part] for part in (task.training_documents, task.held_out_documents))
    else:
        training, held_out = items([task.training_batch(0, 0, 15)]), items(task.evaluation_batches(4))
    assert (len(set(training)), len(set(held_out))) == (15, len(held_out))
    assert not set(training) & set(held_out)
    told = f"5 {TEXTS[name]} of the held-out data (b.jsonl) also in the training data: not trained on; the first: '"
    assert told in task.describe()
    with pytest.raises(Unsupported, match="holds all of the training data"):
        create_task(name, data=data, validation=data, length=16)
    found = create_task(name, data=data, validation=data, length=32, scored=Scored())
    assert found.shared == (0 if name == "text" else 20), "of a trained model what it was trained on is scored too"
    assert "not trained on" not in found.describe()


@pytest.mark.parametrize("name", ["documents", "matching"])
def test_longer_texts_are_scored_with_the_length_of_the_training(name, tmp_path):
    rows = [for_any_task(f"{i} {words(3 if i < 20 else 30, i)}", i) for i in range(24)]
    data, other = save_json(tmp_path / "a.jsonl", rows[:20]), save_json(tmp_path / "b.jsonl", rows[20:])
    task = create_task(name, data=data)
    found = create_task(name, data=data, validation=other, scored=Scored(fitted=task.fitted))
    assert found.length == task.length < create_task(name, data=data, validation=other).length


@pytest.mark.parametrize("name", ["documents", "matching", "summarize", "forecast"])
def test_held_out_data_alone_are_refused(name):
    refused(lambda: create_task(name, validation="x.csv"), f"validation for {name} without data")


@pytest.mark.parametrize("name", TEXTS)
def test_samples_and_labels_are_safe_on_a_terminal(tmp_path, name):
    rows = [for_any_task(f"\x1b[31mred {words(5, i)}", i) | {"label": f"\x07{i % 2}"} for i in range(20)]
    told = create_task(name, data=save_json(tmp_path / "a.jsonl", rows), length=16).describe()
    assert "red" in told
    assert not {"\x1b", "\x07"} & set(told)


@pytest.mark.parametrize("name", TEXTS)
def test_tasks_of_text_tell_what_share_is_known_and_warn_above_five_per_cent(tmp_path, name):
    generator = np.random.default_rng()

    def told(copied):
        shared, *own = (
            generator.integers(97, 123, count, np.uint8).tobytes().decode() for count in [copied] + [150] * 40
        )
        rows = [for_any_task(text + shared, i) for i, text in enumerate(own)]
        data = save_json(tmp_path / "a.jsonl", rows)
        return create_task(name, data=data, length=16 if name == "text" else None).describe()

    (line,) = [line for line in told(200).splitlines() if "word for word" in line]
    assert line.startswith("warning: ")
    assert float(line.split()[1].removesuffix("%")) == pytest.approx(100 * 151 / 301, abs=1.5)
    assert "\noverlap: 0.0% of the held-out text" in told(0)


@pytest.mark.parametrize(
    ("name", "told"), [("documents", "without a text or a label"), ("summarize", "without a source or a target")]
)
def test_empty_rows_are_left_out_with_a_note(tmp_path, name, told):
    rows = [for_any_task(words(5, i), i) for i in range(20)]
    rows += [for_any_task("", 0), for_any_task("x", 1) | {"label": " ", "target": " "}]
    task = create_task(name, data=save_json(tmp_path / "a.jsonl", rows))
    assert f"a.jsonl: 2 rows {told} left out, the first: a.jsonl, line 21" in task.describe()


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("length", 0, "length="),
        ("held_out", 0.9, "to 0.5"),
        ("evaluation_items", 0, "try evaluation_items=1"),
        ("seed", -1, "try seed=0"),
        ("tokenizer", "byte", "try bytes"),
        ("evaluation_itms", 1, "option 'evaluation_itms' of the task"),
    ],
)
def test_nonsense_is_refused_by_every_task_that_has_the_option(name, tmp_path, option, value, told):
    if option not in inspect.signature(TASKS[name]).parameters and option != "evaluation_itms":
        told = f"option {option!r} of the task {name}"
    refused(lambda: made(name, tmp_path, **{option: value}), told)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("recall", {"length": 10}, "try length=12"),
        ("recall", {"pairs": 99}, "from 1 to 8; try pairs=8"),
        ("recall", {"pairs": 2.5}, "an integer"),
        ("recall", {"vocab_size": True}, "an integer"),
        ("recall", {"overwrite": "yes"}, "true or false"),
        ("recall", {"data": "x.txt"}, "option 'data' of the task recall"),
        ("recall", {"tokenizer": "bpe:512"}, "option 'tokenizer' of the task recall"),
        ("copying", {"length": 8, "tokens": 16}, "try length=32"),
        ("copying", {"alphabet": 1}, "try alphabet=2"),
        ("copying", {"tokens": 1, "length": 2, "alphabet": 2}, "items"),
        ("listops", {"length": 200, "depth": 1, "arguments": 2}, "try length=8"),
        ("listops", {"depth": 0}, "try depth=1"),
        ("text", {"tokenizer": "bpe"}, "try bpe:4096"),
        ("text", {"tokenizer": "bpe:100"}, "try the size of tokenizer bpe=257"),
        ("text", {"tokenizer": "bpe:-5"}, "bpe:SIZE"),
        ("text", {"tokenizer": "none.json"}, "does not exist"),
        ("text", {"field": ""}, "field of JSON lines"),
        ("images", {"patch": 3}, "supported: 1, 2, 4, 8; try patch=2"),
        ("images", {"patch": "x"}, "supported: 1, 2, 4, 8"),
        ("images", {"size": 2}, "try size=4"),
        ("images", {"channels": 2}, "3 (colour) or 1"),
        ("images", {"data": "digits", "channels": 3}, "digits, which comes as it is"),
        ("images", {"validation": "digits", "data": "digits", "size": None}, "digits, which comes as it is"),
        ("images", {"length": 20}, "lengths 64, 16, 4, 1; try length=16"),
        ("images", {"length": 64, "patch": 2}, "length=64 for images of 8x8 with patch=2"),
        ("pathfinder", {"size": 8}, "try size=16"),
        ("pathfinder", {"dashes": 1}, "try dashes=2"),
        ("pathfinder", {"distractors": 64}, "try dashes=3,distractors=1"),
        ("pathfinder", {"dashes": 9}, "a larger size; try size=45"),
        ("pixels", {"palette": 1}, "try palette=2"),
        ("pixels", {"size": 200}, "sequences of 120,000 tokens; supported: up to 65,536 tokens; try size=147"),
        ("pixels", {"data": "digits", "channels": 3, "size": None}, "digits, which comes as it is"),
        ("long_range", {"which": "pathx"}, "listops, text, retrieval, image, pathfinder"),
        ("long_range", {"data": "x.txt"}, "whose items are generated"),
        ("long_range", {"which": "pathfinder", "length": 300}, "try length=289"),
        ("documents", {"text": "txet"}, "try text=text"),
        ("documents", {"label": "class"}, "label=class, which is not a column"),
        ("documents", {"text": "label"}, "supported: two columns"),
        ("documents", {"balance": "yes"}, "supported: true or false"),
        ("matching", {"first": "second"}, "supported: three columns"),
        ("matching", {"second": "secnd"}, "try second=second"),
        ("summarize", {"source": "sorce"}, "try source=source"),
        ("summarize", {"target": "n"}, "target=n, which is not a column"),
        ("summarize", {"source": "target"}, "supported: two columns"),
        ("summarize", {"source_length": 0}, "try source_length=1"),
        ("forecast", {"target": None, "covariates": None, "past_covariates": None}, "one of load, wind, open"),
        ("forecast", {"target": "laod"}, "try target=load"),
        ("forecast", {"time": "tiem"}, "try time=time"),
        ("forecast", {"covariates": "open+windy"}, "covariates=windy, which is not a column"),
        ("forecast", {"past_covariates": "open"}, "the column open used twice"),
        ("forecast", {"time": "load", "target": "wind", "past_covariates": None}, "line 2, where the column load has"),
        (
            "forecast",
            {"history": 12},
            "history=12 with a season of 24 points; supported: a season or more; try history=24",
        ),
        ("forecast", {"season": 0}, "try season=1"),
        ("forecast", {"metric": "rmse"}, "supported: mae, mse; try mse"),
        ("forecast", {"source": "weather"}, "together with data"),
        ("forecast", {"groups": "region"}, "groups=region, which is not a column"),
    ],
)
def test_nonsense_options_are_refused_with_what_is_accepted(tmp_path, name, options, told):
    refused(lambda: list(made(name, tmp_path, **options).evaluation_batches(64)), told)


def test_batch_size_must_be_positive(name, tmp_path):
    refused(lambda: made(name, tmp_path).training_batch(0, 0, 0), "try batch_size=1")


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("images", {"flip": "no"}, "flip='no'.*true or false"),
        ("images", {"data": "photos", "skip_unreadable": "no"}, "skip_unreadable='no'.*true or false"),
        ("images", {"data": "photos", "channels": True}, "channels=True.*an integer"),
        ("images", {"data": "photos", "validation": ["a", "b"]}, "2 paths as validation.*one folder"),
        ("segmentation", {"flip": 0.5}, "flip=0.5.*true or false"),
        ("segmentation_3d", {"data": "scans", "validation": ["a", "b"]}, "2 paths as validation.*one folder"),
    ],
)
def test_a_value_of_another_kind_is_refused_before_data_are_read(name, options, told):
    with pytest.raises(Unsupported, match=told):
        create_task(name, **options)
