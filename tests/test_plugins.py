"""One file in a folder of the user's is all that a new mechanism of any kind needs."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from regard import catalogue
from regard.cli import main
from regard.contract import Kind, Pattern
from regard.layers import linear
from regard.workbench.verify import PROGRAMS, PROPERTIES

HERE = Path(__file__).parent
PLUGINS = {
    "rectified": Kind.ATTENTION,
    "moving_average": Kind.MIXER,
    "query_pooling": Kind.POOLING,
    "low_rank": Kind.PROJECTION,
    "scaled_heads": Kind.WRAPPER,
}
SMALL = ["--budget", "45k tokens", "--seeds", "1", "--dim", "16", "--layers", "1", "--heads", "2"]
SMALL += ["--lengths", "16,32", "--at-length", "32"]


@pytest.fixture(params=PLUGINS)
def plugin(request, tmp_path, monkeypatch):
    """Name and file of a mechanism that lies alone in a temporary folder."""
    monkeypatch.setattr("regard.workbench.work.CALIBRATION_SECONDS", 1.0)
    monkeypatch.chdir(tmp_path)
    return request.param, shutil.copy(HERE / "plugins" / f"{request.param}.py", tmp_path)


def run(capsys, plugin, command, *arguments):
    """What `regard COMMAND --plugin FILE ... --json` prints; the plugin is forgotten afterwards, as by a new process."""
    name, file = plugin
    before = sys.argv
    sys.argv = ["regard", command, "--plugin", file, *map(str, arguments), "--json"]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
        catalogue.unregister(name)
        linear.FACTORIES.pop(name, None)
    captured = capsys.readouterr()
    assert code == 0, captured.out[-2000:] + captured.err
    return json.loads(captured.out)


def test_there_is_one_of_each_kind():
    assert set(PLUGINS.values()) == set(Kind)
    assert {path.stem for path in (HERE / "plugins").glob("*.py")} == set(PLUGINS)


def test_it_is_listed_by_kind_and_pattern(capsys, plugin):
    name, _ = plugin
    listed = run(capsys, plugin, "list", "--kind", PLUGINS[name])
    card = next(card for card in listed if card["name"] == name)
    for pattern in Pattern:
        listed = run(capsys, plugin, "list", "--pattern", pattern)
        assert (name in [c["name"] for c in listed]) == (pattern in card["patterns"])
    assert set(card["patterns"]) | set(card["refused"]) == set(Pattern)


def test_it_is_shown(capsys, plugin):
    name, _ = plugin
    shown = run(capsys, plugin, "show", name)
    assert shown["kind"] == PLUGINS[name]
    assert "When to pick it" in shown["documentation"]


def test_every_cell_of_its_matrix_holds(capsys, plugin):
    """Programs, which take seconds each, in causal-self and of that what there is; all else in all patterns."""
    name, _ = plugin
    plain = [word for p in PROPERTIES if p.name not in PROGRAMS for word in ("--property", p.name)]
    cells = run(capsys, plugin, "verify", name, *plain)["cells"]
    compiled = [word for p in PROGRAMS for word in ("--property", p)]
    cells += run(capsys, plugin, "verify", name, *compiled, "--pattern", "causal-self")["cells"]
    assert {c["status"] for c in cells} == {"pass"}
    assert {c["mechanism"] for c in cells} == {name}
    assert {"reference", "padding", "gradient", "layer_padding", "layer_save"} <= {c["property"] for c in cells}


def test_it_is_profiled_beside_softmax(capsys, plugin):
    name, _ = plugin
    pattern = "noncausal-self" if name == "query_pooling" else "causal-self"
    found = run(
        capsys,
        plugin,
        "profile",
        name,
        "--pattern",
        pattern,
        "--lengths",
        "16,32",
        "--seconds",
        "0.01",
        "--head-dim",
        "8",
        *(["--layer"] if PLUGINS[name] is Kind.WRAPPER else []),
    )
    assert {m["mechanism"] for m in found["measurements"]} == {"softmax", name}
    assert "forward time" in found["efficiency_length"][name]


def test_it_is_compared(capsys, plugin, tmp_path):
    name, _ = plugin
    task = "listops:length=32" if name == "query_pooling" else "recall:length=32,pairs=2,queries=4"
    found = run(
        capsys,
        plugin,
        "compare",
        "--task",
        task,
        "--mechanisms",
        f"softmax,{name}",
        "--frame",
        "bare",
        *SMALL,
        "--output",
        tmp_path / "out",
    )
    (entries,) = found["summary"].values()
    assert {e["mechanism"] for e in entries} == {"softmax", name}
    assert all(0 <= e["mean"] <= 1 and e["inference_ms"] > 0 for e in entries)
    sizes = [e["parameters"] for e in entries]
    assert max(sizes) <= 1.04 * min(sizes)
    assert name in (tmp_path / "out" / "report.html").read_text()


def test_its_page_is_written(plugin, tmp_path, monkeypatch):
    name, file = plugin
    spec = importlib.util.spec_from_file_location("generate", HERE.parent / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--plugin", file, "--output", str(tmp_path / "pages")])
    try:
        generate.main()
    finally:
        catalogue.unregister(name)
    page = (tmp_path / "pages" / "mechanisms" / f"{name}.md").read_text()
    for part in (
        "When to pick it",
        "| paper | here |",
        "## Patterns",
        "## Cost",
        f'create_layer("{name}"',
        "arxiv.org/abs/",
    ):
        assert part in page
    assert f"[{name}]({name}.md)" in (tmp_path / "pages" / "mechanisms" / "index.md").read_text()
