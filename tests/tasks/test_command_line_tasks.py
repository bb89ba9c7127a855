"""Tasks named on the command line, with users' files."""

from __future__ import annotations

import inspect
import json
import os

import numpy as np
import pytest
from command_line import SMALL_COMPARISON, answer, run
from task_data import HOURS, hours, masked, photo, refused, save, save_json, save_series, scans

from regard.cli.arguments import read_tasks
from regard.contract import Pattern
from regard.measurement.budget import Budget
from regard.models.registry import served
from regard.tasks import TASKS, create_task
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.task_models import default_frames, default_mechanisms, fitting


def table(path):
    return str(save(path, hours(400), HOURS, ","))


def reviews(path, count=60, first=0):
    numbers = range(first, first + count)
    rows = [{"body": f"{'good' if i % 2 else 'bad'} food number {i}", "stars": 5 * (i % 2)} for i in numbers]
    return str(save_json(path, rows))


def test_a_described_task_reads_the_given_files(tmp_path):
    path, described = table(tmp_path / "a.csv"), "forecast:target=load,covariates=open,history=48"
    (task,) = read_tasks([described], [path], None, 12, "bytes", [])
    assert (task.length, task.memory_length) == (12, 48)
    assert "open" in task.describe()
    (task,) = read_tasks([f"{described},data={path}"], None, None, 12, "bytes", [])
    assert "load of a.csv" in task.describe()
    data, validation = reviews(tmp_path / "a.jsonl"), reviews(tmp_path / "b.jsonl", 20, first=55)
    (task,) = read_tasks(["documents:text=body,label=stars"], [data], [validation], 32, "bpe:300", [])
    assert task.classes == ("0", "5")
    assert "training: 55 items of 2 classes" in task.describe()
    assert task.tokenizer.name == "bpe:300"


def test_files_for_tasks_that_read_none_are_refused(tmp_path):
    path = table(tmp_path / "a.csv")
    readers = [name for name, kind in TASKS.items() if "data" in inspect.signature(kind).parameters]
    texts = {"text", "masked", "replaced", "documents", "matching", "paraphrase", "summarize"}
    assert texts | {
        "images",
        "pixels",
        "long_range",
        "segmentation",
        "segmentation_3d",
        "upscale",
        "time_series",
        "forecast",
        "completion",
        "speech",
    } == set(readers)
    for given in (([path], None), (None, [path])):
        told = "supported: tasks that read data: " + ", ".join(readers)
        refused(lambda given=given: read_tasks(["recall"], *given, None, "bytes", []), told)


def test_validation_without_data_is_not_ignored(tmp_path):
    path = tmp_path / "held.txt"
    path.write_text("held out text " * 100)
    (task,) = read_tasks(["text"], None, [str(path)], 16, "bytes", [])
    assert [document.name for document in task.held_out_documents] == ["held.txt"]


def word(generator, count=6):
    return " ".join("".join(map(chr, generator.integers(97, 123, 6))) for _ in range(count))


def pair(generator, **more):
    return {"a": word(generator), "b": word(generator), **more}


def load(generator, i, **more):
    return {"when": f"2024-01-{1 + i // 24:02}T{i % 24:02}:00", "load": round(generator.normal(), 4), **more}


CASES = {  # the task's words (with or without column names), and a function of (generator, index) that makes a row
    "documents:text=review,label=stars": lambda g, i: {"review": word(g), "stars": i % 5, "id": i},
    "documents:text=t,label=label": lambda g, i: {"t": word(g), "kind": "ab"[i % 2], "label": i % 3},
    "documents": lambda g, i: {"text": word(g), "label": f"c{i % 3}"},
    "matching:first=a,second=b,label=same": lambda g, i: pair(g, same=bool(i % 2)),
    "paraphrase:source=a,target=b": lambda g, i: pair(g),
    "paraphrase": lambda g, i: {"source": word(g, 2), "target": word(g, 2)},
    "forecast": load,
    "forecast:groups=site": lambda g, i: load(g, i // 2, site="AB"[i % 2]),
    "text": lambda g, i: {"text": word(g), "id": i},
    "text:field=chat": lambda g, i: {"chat": [{"role": "user", "content": word(g, 9)}], "id": i},
    "try --task documents:text=t,label=kind": lambda g, i: {"t": word(g), "kind": "ab"[i % 2], "tag": i % 3},
    "try --task forecast:target=load": lambda g, i: {"row": i, **load(g, i, price=i / 9)},
    "columns are x (numbers), y (numbers); supported: --task documents:text=": lambda g, i: {"x": i, "y": i / 7},
}


@pytest.mark.parametrize("found", CASES)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_table_without_a_task_is_recognised_or_the_line_says_what_to_add(tmp_path, found, suffix):
    if suffix != "jsonl" and found.startswith("text"):
        pytest.skip("in JSON lines only")
    generator = np.random.default_rng(0)
    records = [CASES[found](generator, i) for i in range(720 if found.startswith("forecast") else 60)]
    path = save_json(tmp_path / f"a.{suffix}", records)
    if suffix == "json":
        path.write_text(json.dumps(records))
    elif suffix == "csv":
        save(path, [map(str, record.values()) for record in records], records[0], ",")
    said = []

    def read(length):
        return read_tasks(None, [str(path)], None, length, "bytes", [], said.append)

    if found.startswith(("try ", "columns")):
        refused(lambda: read(None), found)
        return
    name = found.partition(":")[0]
    (task,) = read(16 if name == "text" else None)
    assert task.name == name
    assert said == ([] if found == "text" else [found])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "good,bad words\n" * 9, "'good' is the name of a column and looks like a cell of it"),
        ("a.csv", "2024-01-01,1\n2024-01-02,2\n", "'2024-01-01' is the name of a column"),
        ("a.csv", "a\n" + "one text after another\n" * 9, "columns are a (other)"),
        ("a.xlsx", "x", "save the sheet as CSV"),
    ],
)
def test_a_table_that_no_task_can_be_told_by_is_refused(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    refused(lambda: read_tasks(None, [str(tmp_path / name)], None, None, "bytes", []), told)


def test_other_json_is_text(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": "text " * 999}))
    (task,) = read_tasks(None, [str(tmp_path / "a.json")], None, 16, "bytes", [])
    assert task.name == "text"


def test_a_folder_of_pictures_is_one_of_images(tmp_path):
    for i in range(8):
        photo(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    (tmp_path / "README.md").write_text("pictures " * 99)
    said = []
    (task,) = read_tasks(None, [str(tmp_path)], None, None, "bytes", [], said.append)
    assert (task.name, said) == ("images", ["images"])


def test_a_folder_of_images_and_masks_is_one_of_segmentation(tmp_path):
    said = []
    (task,) = read_tasks(None, [str(masked(tmp_path))], None, None, "bytes", [], said.append)
    assert (task.name, said) == ("segmentation", ["segmentation"])


def test_a_folder_of_volumes_and_masks_is_one_of_segmentation_3d(tmp_path):
    said = []
    scans(tmp_path, sides=[(32, 33, 32)])
    (task,) = read_tasks(None, [str(tmp_path)], None, None, "bytes", [], said.append)
    assert (task.name, said) == ("segmentation_3d", ["segmentation_3d"])


def test_default_mechanisms_fit_every_task(tmp_path):
    generator = np.random.default_rng(0)
    texts = str(save_json(tmp_path / "a.jsonl", [pair(generator, label=i % 2) for i in range(60)]))
    described = [
        "recall",
        "listops:length=64",
        "in_context_functions:length=16",
        "events:length=16",
        "masked:field=a,length=32",
        "replaced:field=a,length=32",
        "documents:text=a",
        "paraphrase:source=a,target=b",
    ]
    tasks = [read_tasks([one], None if one[0] in "rlie" else [texts], None, None, "bytes", [])[0] for one in described]
    tasks += read_tasks(["segmentation:size=16,evaluation_items=4"], None, None, None, "bytes", [])
    tasks += read_tasks(["forecast:target=load,history=48"], [table(tmp_path / "a.csv")], None, 12, "bytes", [])
    assert {(task.pattern, task.objective) for task in tasks} == set(served()) - {
        (Pattern.NONCAUSAL_SELF, "regression")
    }
    for task in tasks:
        names = default_mechanisms(task)
        assert len(names) == 4 and "softmax" in names
        kept, left_out = fitting([task], CompareSettings(names, Budget.parse("1m"), dim=16, layers=1))
        assert (kept, left_out) == (names, {})
    assert default_mechanisms(tasks[0]) == ("softmax", "local", "gated_linear", "delta_rule")
    assert set(default_mechanisms(*tasks)) <= set(default_mechanisms(tasks[-1]))
    assert default_frames(*tasks) == CompareSettings.frames and "convolution" in CompareSettings.frames
    cloud = create_task("completion", length=16, seen=8)
    assert default_frames(tasks[0], cloud) == default_frames(cloud) == ("bare",)  # points have no order


def test_a_files_control_characters_do_not_reach_the_terminal(tmp_path, capsys):
    path = os.fsencode(tmp_path) + b"/\x1b]0;title\x07\xff.csv"
    with open(path, "w") as file:
        file.write("a\x1b[31m,b\n" + "1,2\n" * 9)
    code, *shown = run(capsys, "compare", os.fsdecode(path))
    said = "".join(shown)
    assert code == 2
    assert "without --task, whose columns are" in said
    assert not {"\x1b", "\x07"} & set(said)


def test_documents_are_compared_from_the_command_line(tmp_path, capsys):
    files = f"{reviews(tmp_path / 'a.jsonl', 200)} --validation {reviews(tmp_path / 'b.jsonl', 40, first=190)}"
    line = f"compare {files} --task documents:text=body,label=stars --length 32 {SMALL_COMPARISON}"
    found = answer(capsys, f"{line} --budget '40k tokens' --batch-tokens 1024 --output", tmp_path / "run")
    (row,) = found["summary"]["documents"]
    assert row["mean"] > 0.8
    assert found["baselines"]["documents"]["name"] == "majority class"
    assert row["beside_baseline"] == "ahead"
    warned = "10 items of the held-out data (b.jsonl) also in the training data: not trained on"
    assert warned in found["tasks"]["documents"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert warned in report and "of 32 x 32 tokens" in report


def test_a_file_of_series_is_one_of_time_series_and_typescript_is_text(tmp_path):
    said = []
    (task,) = read_tasks(None, [str(save_series(tmp_path / "a.ts", 60))], None, None, "bytes", [], said.append)
    assert (task.name, said) == ("time_series", ["time_series"])
    (tmp_path / "b.ts").write_text("@Component({})\nexport class Thing {}\n" * 99)
    (task,) = read_tasks(None, [str(tmp_path / "b.ts")], None, 16, "bytes", [])
    assert task.name == "text"
