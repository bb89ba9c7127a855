"""Tasks named on the command line, with the user's files."""

from __future__ import annotations

import csv
import inspect
import json
import os

import numpy as np
import pytest

from regard.cli import main
from regard.cli.arguments import read_tasks
from regard.contract import Pattern, Unsupported
from regard.models.registry import served
from regard.tasks import TASKS
from regard.workbench.budget import Budget
from regard.workbench.settings import CompareSettings
from regard.workbench.work import default_mechanisms, fitting


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
    (task,) = read_tasks([described], [table(tmp_path / "a.csv")], None, 12, "bytes", [])
    assert (task.length, task.memory_length) == (12, 48)
    assert "holiday" in task.describe()
    (task,) = read_tasks(
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
    (task,) = read_tasks([f"forecast:data={path},target=load,history=48"], None, None, 12, "bytes", [])
    assert "load of a.csv" in task.describe()


def test_files_for_tasks_that_read_none_are_refused(tmp_path):
    path = table(tmp_path / "a.csv")
    readers = [name for name, kind in TASKS.items() if "data" in inspect.signature(kind).parameters]
    assert {"text", "images", "documents", "matching", "paraphrase", "summarize", "forecast"} == set(readers)
    for given in ({"data": [path], "validation": None}, {"data": None, "validation": [path]}):
        with pytest.raises(Unsupported, match="supported: tasks that read data: " + ", ".join(readers)):
            read_tasks(["recall"], given["data"], given["validation"], None, "bytes", [])


def test_validation_without_data_is_not_ignored(tmp_path):
    path = tmp_path / "held.txt"
    path.write_text("held out text " * 100)
    (task,) = read_tasks(["text"], None, [str(path)], 16, "bytes", [])
    assert [document.name for document in task.held_out_documents] == ["held.txt"]
    with pytest.raises(Unsupported, match="validation for forecast without data"):
        read_tasks(["forecast"], None, [table(tmp_path / "a.csv")], None, "bytes", [])


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def word(generator, count=6):
    return " ".join("".join(map(chr, generator.integers(97, 123, 6))) for _ in range(count))


def series(generator, **more):
    return [
        {"when": f"2024-01-{1 + i // 24:02}T{i % 24:02}:00", "load": round(generator.normal(), 4)}
        | {k: v(i) for k, v in more.items()}
        for i in range(480)
    ]


def pairs(generator, **more):
    return [{"a": word(generator), "b": word(generator)} | {k: v(i) for k, v in more.items()} for i in range(60)]


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (
            lambda g: [{"review": word(g), "stars": i % 5, "id": i} for i in range(60)],
            "documents:text=review,label=stars",
        ),
        (
            lambda g: [{"t": word(g), "kind": "ab"[i % 2], "label": i % 3} for i in range(60)],
            "documents:text=t,label=label",
        ),
        (lambda g: [{"text": word(g), "label": f"c{i % 3}"} for i in range(60)], "documents"),
        (lambda g: pairs(g, same=lambda i: bool(i % 2)), "matching:first=a,second=b,label=same"),
        (pairs, "paraphrase:source=a,target=b"),
        (lambda g: [{"source": word(g, 2), "target": word(g, 2)} for _ in range(60)], "paraphrase"),
        (series, "forecast"),
        (
            lambda g: sorted(series(g, site=lambda i: "A") + series(g, site=lambda i: "B"), key=str),
            "forecast:groups=site",
        ),
        (lambda g: [{"text": word(g), "id": i} for i in range(60)], "text"),
        (
            lambda g: [{"chat": [{"role": "user", "content": word(g, 9)}], "id": i} for i in range(60)],
            "text:field=chat",
        ),
        (
            lambda g: [{"t": word(g), "kind": "ab"[i % 2], "tag": i % 3} for i in range(60)],
            "try --task documents:text=t,label=kind",
        ),
        (lambda g: series(g, price=lambda i: i / 9), "try --task forecast:target=load"),
        (
            lambda g: [{"x": i, "y": i / 7} for i in range(60)],
            r"columns are x \(numbers\), y \(numbers\); supported: --task documents:text=",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_table_without_a_task_is_recognised_or_the_line_says_what_to_add(tmp_path, make, found, suffix):
    records = make(np.random.default_rng(0))
    nested = "chat" in records[0]
    if suffix != "jsonl" and (nested or found == "text"):
        pytest.skip("in JSON lines only")
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        lines(path, records)
    elif suffix == "json":
        path.write_text(json.dumps(records))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    said = []
    if found.startswith("try ") or "columns" in found:
        with pytest.raises(Unsupported, match=found):
            read_tasks(None, [str(path)], None, None, "bytes", [], said.append)
        return
    name = found.partition(":")[0]
    (task,) = read_tasks(None, [str(path)], None, 16 if name == "text" else None, "bytes", [], said.append)
    assert task.name == name
    assert said == ([] if found == "text" else [found])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "good,bad words\n" * 9, "'good' is the name of a column and looks like a cell of it"),
        ("a.csv", "2024-01-01,1\n2024-01-02,2\n", "'2024-01-01' is the name of a column"),
        ("a.csv", "a\n" + "one text after another\n" * 9, r"columns are a \(other\)"),
        ("a.xlsx", "x", "save the sheet as CSV"),
    ],
)
def test_a_table_that_no_task_can_be_told_by_is_refused(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(Unsupported, match=told):
        read_tasks(None, [str(tmp_path / name)], None, None, "bytes", [])


def test_other_json_is_text(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": "text " * 999}))
    (task,) = read_tasks(None, [str(tmp_path / "a.json")], None, 16, "bytes", [])
    assert task.name == "text"


def test_a_folder_of_pictures_is_one_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i in range(8):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        image.new("RGB", (9, 9), (i * 20, 0, 0)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "README.md").write_text("pictures " * 99)
    said = []
    (task,) = read_tasks(None, [str(tmp_path)], None, None, "bytes", [], said.append)
    assert (task.name, said) == ("images", ["images"])


def test_default_mechanisms_fit_every_task(tmp_path):
    texts = lines(tmp_path / "a.jsonl", pairs(np.random.default_rng(0), label=lambda i: i % 2))
    described = ["recall", "listops:length=64", "documents:text=a", "paraphrase:source=a,target=b"]
    tasks = [read_tasks([one], None if one[0] in "rl" else [texts], None, None, "bytes", [])[0] for one in described]
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


def test_a_files_control_characters_do_not_reach_the_terminal(tmp_path, capsys, monkeypatch):
    path = os.fsencode(tmp_path) + b"/\x1b]0;title\x07\xff.csv"
    with open(path, "w") as file:
        file.write("a\x1b[31m,b\n" + "1,2\n" * 9)
    monkeypatch.setattr("sys.argv", ["regard", "compare", os.fsdecode(path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = "".join(capsys.readouterr())
    assert "without --task, whose columns are" in said
    assert not {"\x1b", "\x07"} & set(said)


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
