"""One file in the user's folder is all that a new mechanism of any kind needs."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from command_line import answer, run

from regard import catalogue
from regard.cli.app import COMMANDS, parser
from regard.contract import Kind, Pattern
from regard.layers import linear
from regard.measurement.store import Store
from regard.workbench.detection.adopted import adopt
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
    task += ",evaluation_items=32"
    small = "--frame bare --budget '20 steps' --rates 0.01 --seeds 1 --dim 16 --layers 1 --heads 2"
    small += " --lengths 16,32 --at-length 32 --output out"
    found = told(capsys, name, f"compare --task {task} --mechanisms softmax,{name} {small}")
    (entries,) = found["summary"].values()
    assert {e["mechanism"] for e in entries} == {"softmax", name}
    assert all(0 <= e["mean"] <= 1 and e["inference_ms"] > 0 for e in entries)
    sizes = [e["parameters"] for e in entries]
    assert max(sizes) <= 1.04 * min(sizes)
    assert name in (tmp_path / "out" / "report.html").read_text()


MODULE = """
import torch

class Sums(torch.nn.Module):
    def forward(self, x):
        return x.cumsum(1)
"""
TASK = "--task recall:length=16,pairs=2,queries=4,evaluation_items=8"
SIZES = "--dim 16 --heads 2 --batch-tokens 64 --layers 1"
NOWHERE = (2, "nowhere")
TO_A_MODULE = {
    "list": (0, "Sums"),
    "show Sums": (0, "Sums mixer, mine.py, no paper"),
    "verify": (2, "without a definition to verify it against; supported: mechanisms with a card; try regard detect"),
    "detect-patterns Sums": (0, "causal-self"),
    "profile Sums --lengths 8 --seconds 0.01": (2, "--layer of regard profile"),
    "profile Sums --lengths 8 --seconds 0.01 --layer --dim 16 --heads 2": (0, "Sums has no state that decodes"),
    "advise --mechanisms Sums --lengths 8": (2, "whose costs are not declared"),
    f"compare {TASK} --mechanisms nothing": (2, "mechanism 'nothing'"),
    "compare nowhere --from nowhere --mechanisms Sums": (2, "has no queries, keys and values"),
    f"search {TASK} --mechanisms Sums,nothing": (2, "mechanism 'nothing'"),
    f"train {TASK} {SIZES} --mechanism Sums --budget '20 steps' --output model": (0, "on held-out data"),
    "evaluate nowhere": NOWHERE,
    "generate nowhere text": NOWHERE,
    "serve nowhere": NOWHERE,
    "offload nowhere": NOWHERE,
    "predict nowhere a.png": NOWHERE,
    "explain nowhere a.png": NOWHERE,
    "compress nowhere --recipe int8 --output small": NOWHERE,
    "sparse nowhere": NOWHERE,
    "retrofit nowhere --mechanism Sums --data mine.py --output out": (2, "has no queries, keys and values"),
    "study nothing": (2, "study 'nothing'"),
    "study training-dynamics": (2, "Sums in training-dynamics, since a torch module has no card"),
}
"""Command lines, and what they say with a torch module as a plugin."""


def test_every_command_that_takes_plugins_is_tried_with_a_module():
    takes = {name for name in COMMANDS if any("--plugin" in one.opts for one in parser.commands[name].params)}
    assert takes == {line.split()[0] for line in TO_A_MODULE}


@pytest.mark.parametrize("line", TO_A_MODULE)
def test_a_module_enters_every_command_or_is_refused_with_the_reason(capsys, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MODULE)
    try:
        code, out, said = run(capsys, f"{line} --plugin mine.py:Sums")
        assert catalogue.find_mechanism("Sums") is not None, "the plugin is entered first"
    finally:
        catalogue.unregister("Sums")
    assert (code, TO_A_MODULE[line][1] in " ".join((out + said).split())) == (TO_A_MODULE[line][0], True), out + said


def test_a_module_that_cannot_enter_is_refused_with_the_reason(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MODULE + "\n    def __init__(self, window):\n        super().__init__()\n")
    for plugin, words in (
        ("mine.py", "mine.py:CLASS, of a torch module"),
        ("mine.py:Sum", "'Sum' in mine.py; supported: Sums; try Sums"),
        (
            "mine.py:Sums",
            "Sums without window; supported: a value for each argument that has none: a default, a function",
        ),
        ("min.py:Sums", "no such file; supported: a Python file; try mine.py"),
    ):
        code, _, said = run(capsys, f"search {TASK} --mechanisms Sums --plugin {plugin}")
        assert code == 2 and words in said and len(said.splitlines()) == 1


def test_a_module_is_compared_and_searched_like_a_mechanism(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regard.workbench.search.predictor.STEPS", 20)
    Path("mine.py").write_text(MODULE)
    small = "--frame bare --budget '20 steps' --rates 0.01 --seeds 1 --dim 16 --layers 1 --heads 2 --lengths 16"
    lines = (
        f"compare {TASK} --mechanisms softmax,Sums {small} --output compared",
        f"search {TASK} --mechanisms softmax,Sums --budget '90% flops' --dims 8 --layers 1,2 --heads 1 --feed-forward 8,16 "
        "--steps 2 --batch-tokens 64 --networks 10 --evaluations 20 --finalists 1 --retrain 2 --seeds 1 --output searched",
    )
    found = []
    for line in lines:
        try:
            found.append(answer(capsys, f"{line} --plugin mine.py:Sums"))
        finally:
            catalogue.unregister("Sums")
    (entries,) = found[0]["summary"].values()
    assert {one["mechanism"] for one in entries} == {"softmax", "Sums"}
    assert {row["name"] for row in found[1]["entrants"]} >= {"found", "Sums alone"}
    assert all(f" --plugin {tmp_path / 'mine.py'}:Sums" in command for command in found[1]["commands"])


def test_an_edited_plugin_is_measured_again_and_nothing_else(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "--frame bare --budget '20 steps' --rates 0.01 --seeds 1 --dim 16 --layers 1 --heads 2 --lengths 16"
    compared = f"compare {TASK} --mechanisms softmax,Sums {small} --output compared --plugin mine.py:Sums"
    trained = f"train {TASK} {SIZES} --mechanism Sums --budget '20 steps' --output model --plugin mine.py:Sums"
    rows, again, code = [], [], []
    for text in (MODULE, MODULE, MODULE.replace("cumsum(1)", "cumsum(1).sin()")):
        Path("mine.py").write_text(text)
        for line in (compared, trained):
            try:
                again.append(run(capsys, line))
                code.append(catalogue.plugin_code({"mechanism": ["softmax", "Sums:window=3"]}))
            finally:
                catalogue.unregister("Sums")
        with Store(Path("compared/results.db")) as store:
            rows.append([row.payload["mechanism"] for row in store.rows("quality")])
    assert rows == [["softmax", "Sums"]] * 2 + [["softmax", "Sums", "Sums"]]
    assert code[0] == code[3] != code[4] and len(code[4]) == 1
    assert [status for status, *_ in again] == [0] * 5 + [2] and "a run with other code of its plugins" in again[-1][2]


def test_the_code_of_a_plugin_has_the_files_beside_it_and_that_of_a_task(tmp_path, path):
    text = "from helper_beside import TASK\nclass Task:\n    pass\nTASK = Task()\n"
    one = written(tmp_path / "one", mine=text, helper_beside="TASK = 1\n")
    two = written(tmp_path / "two", mine=text, helper_beside="TASK = 2\n")
    found = [catalogue.plugin_code(catalogue.run_file(place / "mine.py").TASK) for place in (one, two, one)]
    assert found[0] == found[2] != found[1] and [len(code) for code in found] == [1, 1, 1]
    assert catalogue.plugin_code("softmax", {"mechanism": "linear"}, [1, None]) == []


@pytest.fixture
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    return sys.path


def written(folder, **files):
    """A folder with these files."""
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_plugin_imports_the_files_beside_it_at_once_and_later(tmp_path, path):
    text = "import torch\nfrom first_beside import Sums\ndef make():\n    import later_beside\n    return Sums()\n"
    folder = written(tmp_path / "one", mine=text, first_beside=MODULE, later_beside="")
    before = [*path]
    assert adopt(str(folder / "mine.py"), "make").patterns == (Pattern.CAUSAL_SELF,)
    catalogue.unregister("make")
    assert path == [*before, str(folder)], "installed modules come first again"


def test_files_beside_a_plugin_are_not_those_of_another_folder_or_of_a_package(tmp_path, path):
    """`tabnanny` is a module of Python."""
    found = []
    for value in (1, 2, 1):
        folder = tmp_path / f"folder {value}"
        if not folder.exists():
            said = f"VALUE = {value}\n"
            written(folder, mine="import shared_beside, tabnanny\n", shared_beside=said, tabnanny=said)
        module = catalogue.run_file(folder / "mine.py")
        found.append((module.shared_beside.VALUE, module.tabnanny.VALUE))
    del sys.modules["tabnanny"]
    assert found == [(1, 1), (2, 2), (1, 1)]


def test_what_a_plugin_lacks_is_named_and_the_path_is_as_before(capsys, tmp_path, path):
    folder = written(tmp_path / "one", mine="import nowhere_beside\n")
    code, _, said = run(capsys, f"list --plugin {folder / 'mine.py'}")
    assert code == 2 and "No module named 'nowhere_beside'" in said
    assert path[0] != str(folder)


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
