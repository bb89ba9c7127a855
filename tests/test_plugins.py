"""One file in the user's folder is all that a new mechanism of any kind needs."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from command_line import answer

from regard import catalogue
from regard.contract import Kind, Pattern
from regard.layers import linear
from regard.workbench.verification.verify import PROGRAMS, PROPERTIES

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples" / "mechanisms"
PLUGINS = {
    "rectified": Kind.ATTENTION,
    "moving_average": Kind.MIXER,
    "query_pooling": Kind.POOLING,
    "low_rank": Kind.PROJECTION,
    "scaled_heads": Kind.WRAPPER,
}


@pytest.fixture(params=PLUGINS)
def name(request, tmp_path, monkeypatch):
    """The name of a mechanism whose file is alone in the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLES / f"{request.param}.py", tmp_path)
    return request.param


def told(capsys, name, line):
    """The JSON answer of `regard LINE` with the plugin, which is unregistered afterwards, as in a new process."""
    try:
        return answer(capsys, f"{line} --plugin {name}.py")
    finally:
        catalogue.unregister(name)
        linear.FACTORIES.pop(name, None)


def test_there_is_one_of_each_kind():
    assert set(PLUGINS.values()) == set(Kind)
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PLUGINS)


def test_it_is_listed_by_kind_and_pattern_and_shown(capsys, name):
    (card,) = [card for card in told(capsys, name, f"list --kind {PLUGINS[name]}") if card["name"] == name]
    for pattern in Pattern:
        listed = told(capsys, name, f"list --pattern {pattern}")
        assert (name in [c["name"] for c in listed]) == (pattern in card["patterns"])
    assert set(card["patterns"]) | set(card["refused"]) == set(Pattern)
    shown = told(capsys, name, f"show {name}")
    assert shown["kind"] == PLUGINS[name] and "When to pick it" in shown["documentation"]


def test_every_cell_of_its_matrix_holds(capsys, name):
    """Compiled programs take seconds, so they are tried in causal-self only; other properties in all patterns."""
    plain = " ".join(f"--property {p.name}" for p in PROPERTIES if p.name not in PROGRAMS)
    cells = told(capsys, name, f"verify {name} {plain}")["cells"]
    if any(cell["pattern"] == "causal-self" for cell in cells):
        cells += told(capsys, name, f"verify {name} --property layer_compile --pattern causal-self")["cells"]
    assert {(c["status"], c["mechanism"]) for c in cells} == {("pass", name)}
    assert {"reference", "padding", "gradient", "layer_padding", "layer_save"} <= {c["property"] for c in cells}


def test_it_is_profiled_beside_softmax(capsys, name):
    pattern = "noncausal-self" if name == "query_pooling" else "causal-self"
    layer = "--layer" if PLUGINS[name] is Kind.WRAPPER else ""
    sizes = "--lengths 16,32 --seconds 0.01 --head-dim 8"
    found = told(capsys, name, f"profile {name} --pattern {pattern} {sizes} {layer}")
    assert {m["mechanism"] for m in found["measurements"]} == {"softmax", name}
    assert "forward time" in found["efficiency_length"][name]


def test_it_is_compared(capsys, name, tmp_path):
    task = "listops:length=32" if name == "query_pooling" else "recall:length=32,pairs=2,queries=4"
    small = "--frame bare --budget '20 steps' --rates 0.01 --seeds 1 --dim 16 --layers 1 --heads 2"
    small += " --lengths 16,32 --at-length 32 --output out"
    found = told(capsys, name, f"compare --task {task} --mechanisms softmax,{name} {small}")
    (entries,) = found["summary"].values()
    assert {e["mechanism"] for e in entries} == {"softmax", name}
    assert all(0 <= e["mean"] <= 1 and e["inference_ms"] > 0 for e in entries)
    sizes = [e["parameters"] for e in entries]
    assert max(sizes) <= 1.04 * min(sizes)
    assert name in (tmp_path / "out" / "report.html").read_text()


def test_their_pages_are_written(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    files = [word for name in PLUGINS for word in ("--plugin", str(EXAMPLES / f"{name}.py"))]
    monkeypatch.setattr(sys, "argv", ["generate.py", *files, "--output", str(tmp_path)])
    try:
        generate.main()
    finally:
        for name in PLUGINS:
            catalogue.unregister(name)
            linear.FACTORIES.pop(name, None)
    for name in PLUGINS:
        page = (tmp_path / "mechanisms" / f"{name}.md").read_text()
        shown = ("When to pick it", "| paper | here |", "## Patterns", "## Cost", f'create_layer("{name}"')
        assert [part for part in (*shown, "arxiv.org/abs/") if part not in page] == []
        assert f"[{name}]({name}.md)" in (tmp_path / "mechanisms" / "index.md").read_text()
