"""Tasks named on the command line, with the user's files."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest

from regard.cli import _tasks, main
from regard.contract import Unsupported
from regard.tasks import TASKS


def table(path, count=400):
    generator = np.random.default_rng(0)
    lines = ["time,load,holiday"]
    for i in range(count):
        time = np.datetime64("2024-01-01T00") + i
        lines.append(f"{time}:00,{np.sin(i / 4) + generator.normal() / 9:.4f},{int(i // 24 % 7 > 4)}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def reviews(path, count=60, first=0):
    numbers = range(first, first + count)
    rows = [{"body": f"{'good' if i % 2 else 'bad'} food number {i}", "stars": 5 * (i % 2)} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_described_task_reads_the_given_files(tmp_path):
    described = "forecast:target=load,covariates=holiday,history=48"
    (task,) = _tasks([described], [table(tmp_path / "a.csv")], None, 12, "bytes", [])
    assert (task.length, task.memory_length) == (12, 48)
    assert "holiday" in task.describe()
    (task,) = _tasks(
        ["documents:text=body,label=stars"],
        [reviews(tmp_path / "a.jsonl")],
        [reviews(tmp_path / "b.jsonl", 20, first=55)],
        32,
        "bpe:300",
        [],
    )
    assert task.classes == ("0", "5")
    assert "training: 55 items of 2 classes" in task.describe()
    assert task.tokenizer.name == "bpe:300"


def test_an_option_may_say_where_the_data_are(tmp_path):
    path = table(tmp_path / "a.csv")
    (task,) = _tasks([f"forecast:data={path},target=load,history=48"], None, None, 12, "bytes", [])
    assert "load of a.csv" in task.describe()


def test_files_for_tasks_that_read_none_are_refused(tmp_path):
    path = table(tmp_path / "a.csv")
    readers = [name for name, kind in TASKS.items() if "data" in inspect.signature(kind).parameters]
    assert {"text", "images", "documents", "matching", "paraphrase", "summarize", "forecast"} == set(readers)
    for given in ({"data": [path], "validation": None}, {"data": None, "validation": [path]}):
        with pytest.raises(Unsupported, match="supported: tasks that read data: " + ", ".join(readers)):
            _tasks(["recall"], given["data"], given["validation"], None, "bytes", [])


def test_validation_without_data_is_not_ignored(tmp_path):
    path = tmp_path / "held.txt"
    path.write_text("held out text " * 100)
    (task,) = _tasks(["text"], None, [str(path)], 16, "bytes", [])
    assert [document.name for document in task.held_out_documents] == ["held.txt"]
    with pytest.raises(Unsupported, match="validation for forecast without data"):
        _tasks(["forecast"], None, [table(tmp_path / "a.csv")], None, "bytes", [])


def test_documents_are_compared_from_the_command_line(tmp_path, capsys, monkeypatch):
    words = ["compare", reviews(tmp_path / "a.jsonl", 200), "--task", "documents:text=body,label=stars"]
    words += ["--validation", reviews(tmp_path / "b.jsonl", 40, first=190)]
    words += ["--length", "32", "--mechanisms", "softmax", "--budget", "60k tokens", "--seeds", "1", "--dim", "16"]
    words += ["--layers", "1", "--rates", "0.01", "--lengths", "16,32", "--at-length", "32"]
    monkeypatch.setattr("sys.argv", ["regard", *words, "--output", str(tmp_path / "run"), "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["summary"]["documents"]
    assert row["mean"] > 0.8
    assert found["baselines"]["documents"]["name"] == "majority class"
    assert row["beside_baseline"] == "ahead"
    warned = "10 items of the held-out data (b.jsonl) are also in the training data: not trained on"
    assert warned in found["tasks"]["documents"]
    assert warned in (tmp_path / "run" / "report.html").read_text()
