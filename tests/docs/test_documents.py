"""README, CONTRIBUTING and the documentation are correct: snippets run, and tables agree with the catalogue."""

from __future__ import annotations

import importlib.util
import inspect
import json
import pkgutil
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import answer

from regard import catalogue, get_mechanism, list_mechanisms
from regard.cli.app import parser
from regard.contract import Kind, Pattern
from regard.models.variants import read_variant
from regard.reproductions import list_reproductions
from regard.workbench.verification.verify import PROPERTIES

ROOT = Path(__file__).parents[2]
GENERATED = {
    "fashion.md",
    "integrations.md",
    "matrix.md",
    "parity.md",
    "ranking.md",
    "scaling.md",
    "verdicts.md",
    "findings.md",
    "mixing.md",
}
DOCUMENTS = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in GENERATED)]
MORE = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
SHORT = {"NS": "noncausal-self", "CS": "causal-self", "NC": "noncausal-cross", "CC": "causal-cross"}


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load("generate")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


SNIPPETS = [
    pytest.param(code, id=f"{path.stem}-{i}")
    for path in DOCUMENTS
    for i, code in enumerate(blocks(path.read_text(), "python"))
]
COMMANDS = [
    pytest.param(line.split("#")[0].strip(), id=f"{path.stem}-{i}")
    for path in MORE
    for i, line in enumerate("\n".join(blocks(path.read_text(), "sh")).replace("; ", "\n").splitlines())
    if line.startswith("regard ")
]


def execute(code, folder):
    file = folder / "snippet.py"
    file.write_text(code)
    runpy.run_path(str(file))


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(code, tmp_path)


@pytest.mark.parametrize("line", COMMANDS)
def test_command_exists_with_these_options(line):
    words = shlex.split(line.split(">")[0])
    command = parser.commands[words[1]]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words[2:] if word.startswith("--")} <= options
    if "--mechanisms" in words:
        for name in words[words.index("--mechanisms") + 1].split(","):
            assert name in ("all", "mine", "uniform") or name.endswith(".json") or read_variant(name)


def test_the_stub_of_functions_is_that_of_the_catalogue():
    stubs = load("stubs")
    assert stubs.PATH.read_text() == stubs.text(), "python docs/stubs.py writes it again"


def test_the_readme_lists_the_catalogue_by_family():
    text = (ROOT / "README.md").read_text()
    families = generate.by_family(list_mechanisms())
    expected = [(title, ", ".join(f"`{card.name}`" for card in cards)) for title, cards in families.items()]
    assert sorted(re.findall(r"^- \*\*(.+)\*\*: (`\w+`(?:, `\w+`)*)$", text, re.M)) == sorted(expected)
    assert f"{len(list_mechanisms())} of them" in text


@pytest.mark.parametrize("path", MORE, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(path):
    made = {"mechanisms/index.md", *GENERATED}
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert target in made or (path.parent / target).exists(), target


def test_the_api_reference_names_what_exists():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"^::: ([\w.]+)$", pages, re.M)
    assert len(named) > 20
    for path in named:
        pkgutil.resolve_name(path)


ASKED = """KV cache, padding, variable lengths, GPU, ONNX, torch.export, torch.compile, pretrained, long documents, dash, seqpe,
rotary, PagedCache, io_count, sliding window, mixed precision, save, load, cross attention, beam search, generate text,
flash attention, grouped-query, attention weights, streaming, quantization, hybrid, license, huggingface, Hugging Face,
MultiheadAttention, cite, own data CSV, dropout, Windows macOS, wheels, refused, resume, seed, learning rate, out of memory,
fine-tune, RoPE, GQA, bf16, add and test my own, faster FlashAttention"""


def test_what_newcomers_look_for_is_in_a_heading_with_an_answer_of_one_screen():
    answers = (ROOT / "docs" / "faq.md").read_text().split("\n## ")[1:]
    headings = [answer.splitlines()[0].lower() for answer in answers]
    for words in re.split(r",\s", ASKED.lower()):
        assert any(all(word in heading for word in words.split()) for heading in headings), words
    assert max(len(answer.splitlines()) + len(answer) // 100 for answer in answers) < 30


@pytest.fixture
def minimal(tmp_path, monkeypatch):
    """The complete mechanism that CONTRIBUTING shows, as a plugin."""
    monkeypatch.chdir(tmp_path)
    (code,) = blocks((ROOT / "CONTRIBUTING.md").read_text(), "python")
    (tmp_path / "uniform.py").write_text(code)
    yield tmp_path / "uniform.py"
    catalogue.unregister("uniform")


def test_the_minimal_mechanism_verifies(minimal, capsys):
    cells = answer(capsys, "verify --plugin uniform.py")["cells"]
    assert {(c["status"], c["pattern"]) for c in cells} == {("pass", "noncausal-self"), ("pass", "causal-self")}


@pytest.mark.parametrize("name", list_mechanisms())
def test_a_mechanisms_page_is_complete_and_its_snippets_run(name, tmp_path):
    card = get_mechanism(name)
    page = generate.mechanism_page(card, [])
    for code in blocks(page, "python"):
        execute(code, tmp_path)
    assert f"arxiv.org/abs/{card.paper.arxiv}" in page and "| paper | here |" in page
    assert all(pattern.value in page for pattern in Pattern)
    assert all(reason.replace("|", "\\|") in page for reason in card.refused.values())
    assert not re.search(r":(class|func|mod|data|meth):`", page)
    meanings = generate.attributes_of(inspect.getdoc(card.config))
    assert set(card.config.__dataclass_fields__) <= set(meanings), "options without a meaning"
    width = None
    for line in page.splitlines():
        cells = re.sub(r"`[^`]*`", "", line).replace("\\|", "").count("|") if line.startswith("|") else None
        assert cells is None or width in (None, cells), line
        width = cells


CELL = {"mechanism": "softmax", "pattern": "causal-self", "property": "step", "dtype": "float64", "backend": "torch"}


def test_the_table_of_swapped_models_shows_numbers_refusals_and_failures():
    measured = [{"model": name, "errors": {"float64": 2e-16, "float32": 3e-7}} for name in generate.HOSTS]
    measured[0] |= {
        "cache": "state",
        "variants": {"number": 2, "errors": {"cache": 4e-16}, "refused": {"wide": "wide"}},
    }
    measured[1] |= {"errors": {"float64": 1e-3}}
    linear = [{"mechanism": "linear", **cell} for cell in measured]
    refused = [{"mechanism": "mamba", "model": name, "refused": "mamba is a mixer"} for name in generate.HOSTS]
    page = generate.integrations_page({"measured": "this", "cells": linear + refused}, ["linear", "mamba"])
    assert "| [linear](mechanisms/linear.md) | 4e-16 state | **fails** | 2e-16 |" in page
    assert f"| [mamba](mechanisms/mamba.md) |{' **no** |' * len(generate.HOSTS)}" in page
    assert "| [mamba](mechanisms/mamba.md) | all | mamba is a mixer |" in page
    assert "| [linear](mechanisms/linear.md), wide | Llama (transformers) | wide |" in page
    assert "2 further sets of options" in page and "Not measured" in generate.integrations_page(None, [])


def test_a_measured_cell_stays_until_what_it_is_made_of_changes(monkeypatch, tmp_path):
    measure, package = load("measure"), tmp_path / "regard"
    shutil.copytree(ROOT / "regard", package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    monkeypatch.setattr(measure.regard, "__file__", str(package / "__init__.py"))
    before = measure.sources()

    def changed_by(file):
        with (package / file).open("a") as more:
            more.write("# another\n")
        measure.sources.cache_clear()
        after = measure.sources()
        changed = {name for name in before if before[name] != after[name]}
        before.update(after)
        return changed

    wrappers = {name for name in before if get_mechanism(name).kind is Kind.WRAPPER}
    assert changed_by("models/language_model.py") == set()
    assert changed_by("mechanisms/linear.py") == {"linear", "gated_linear"} | wrappers
    assert changed_by("mechanisms/landmark/forms.py") == {"landmark"} | wrappers
    assert changed_by("engines/cache.py") == before.keys()


def test_the_matrix_shows_errors_failures_and_waivers():
    cells = [
        CELL | {"status": "pass", "error": 2e-16, "tolerance": 1e-12, "detail": ""},
        CELL | {"property": "packing", "status": "fail", "error": 1.0, "tolerance": 1e-12, "detail": "error 1"},
        CELL | {"property": "causality", "status": "waived", "error": None, "tolerance": 1e-12, "detail": "the reason"},
    ]
    page = generate.matrix_page({"measured": "this", "cells": cells}, ["linear", "softmax"])
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert all(prop.name in rows and prop.meaning in page for prop in PROPERTIES)
    for part in ("2e-16", "[softmax](mechanisms/softmax.md) | 3 | 1 | 1 |", "the reason", "**fails**"):
        assert part in page
    assert "| softmax](mechanisms" not in page and "[linear]" not in page
    own = generate.mechanism_page(get_mechanism("softmax"), cells)
    assert "1 fail" in own and "2.0e-16" in own and "the reason" in own


def test_growth_is_shown_beside_what_the_card_says_and_what_was_refused_is_named():
    growth = {"time": 1.07, "time_by_cost": 1.0, "memory": 0.98, "memory_by_cost": 1.0}
    found = {"pattern": "causal-self", "longest": 4096, "efficiency": {"forward time": 512, "training time": None}}
    found |= {"growth": growth, "time over softmax": 0.5}
    other = {**found, "growth": growth | {"time": 1.2}, "time over softmax": 1.5}
    refused = {"pattern": "noncausal-self", "longest": 64, "refused": "too long"}
    rows = {"linear": found, "sigmoid": other, "performer": other, "linformer": refused}
    page = generate.scaling_page({"measured": "this", "mechanisms": rows})
    (row,) = [line for line in page.splitlines() if line.startswith("| [linear]")]
    assert "| 1.07 / 1.00 | 0.98 / 1.00 | 512 | — | — | 4096 | 0.5 |" in row
    assert "linformer.md): too long" in page
    otherwise, slower = page.split("## ")[1:3]
    assert "linear.md" not in otherwise + slower
    assert "performer.md): not explained yet" in otherwise
    assert generate.SLOWER_THAN_SOFTMAX["sigmoid"] in slower
    assert "Not measured" in generate.scaling_page(None)
    assert {*generate.GROWS_OTHERWISE, *generate.SLOWER_THAN_SOFTMAX} <= set(list_mechanisms())


def test_backbones_are_in_the_order_of_their_accuracy_with_its_error():
    who = {"cpu": "a CPU", "threads": 2, "precision": "bfloat16", "parameters": 1000, "steps": 50}

    def cell(model, seed, accuracy, minutes=20.0, augment="none"):
        told = {"model": model, "seed": seed, "accuracy": accuracy, "minutes": minutes, "augment": augment}
        return {**told, "items": 10_000, **who}

    cells = [cell("van_nano", 0, 0.9), cell("vit_nano", 0, 0.92), cell("vit_nano", 1, 0.94), cell("vim_nano", 0, None)]
    cells += [cell("mixer_nano", 0, 0.99, minutes=1.0), cell("van_nano", 0, 0.91, augment="light")]
    speed = {"training": 1200.4, "inference": 5000.0, "training_bytes": 2**25, "inference_bytes": 2**23}
    page = generate.fashion_page({"cells": cells, "speeds": {"van_nano": speed}}, None)
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows[0].startswith("| `vit_nano` | none | bfloat16 | 93.00% ± 1.00% | 2 | 1,000 | 50 | — |")
    assert rows[1].startswith("| `van_nano` | light | bfloat16 | 91.00% ± 0.29% | 1 |")
    assert rows[2].startswith("| `van_nano` | none | bfloat16 | 90.00% ± 0.30% | 1 |") and rows[2].endswith(
        "| 1,200 | 5,000 | 32 | 8 |"
    )
    assert "vim_nano` | none | bfloat16 | diverged" in rows[3] and len(rows) == 4
    assert "20 minutes a run; 10,000 test images; trained on a CPU with 2 threads." in page
    slower = {**cells[1], "cpu": "another CPU"}
    page = generate.fashion_page({"cells": [*cells, slower], "speeds": {}}, None)
    assert "trained on a CPU with 2 threads (A), on another CPU with 2 threads (B). A slower" in page
    assert "| 3 | 1,000 | 50 | AB | —" in page and "| 1 | 1,000 | 50 | A | —" in page
    assert "python benchmarks/resolution.py" in page and "benchmarks/fashion_mnist.py` does it" not in page


def test_accuracy_at_larger_sizes_has_its_error_over_seeds():
    accuracies = [{"28": 0.8, "42": 0.6, "42 stretched": 0.7}, {"28": 0.9, "42": 0.6, "42 stretched": None}]
    cells = [
        {"positions": "learned", "seed": seed, "steps": 100, "items": 50, "accuracy": accuracy}
        for seed, accuracy in enumerate(accuracies)
    ]
    page = generate.fashion_page(None, {"cells": [*cells, {**cells[0], "steps": 10}]})
    assert "| learned | 85.00% ± 5.00% | 60.00% ± 0.00% |" in page
    assert "| learned, stretched | — | diverged |" in page and "100 steps, 50 test images, 2 seeds" in page
    assert "benchmarks/fashion_mnist.py` does it" in page


def reproduced(name, outcome, *, mean=None):
    measured = {"mean": mean, "standard_error": 0.0125, "low": 0.1, "high": 0.2, "seeds": 3, "outcome": outcome}
    measured |= {"seeds_to_decide": 7}
    absent = dict.fromkeys(("mean", "standard_error", "low", "high"))
    return {
        "name": name,
        "mechanisms": [name],
        "paper": {"title": "", "arxiv": "1234.56789", "year": 2024, "number": 1},
        "claim": f"The claim of {name}.",
        "instead": "A small one.",
        "outcome": outcome,
        "findings": [{"says": "more", **(measured if mean is not None else absent | {"seeds": 0, "outcome": outcome})}],
        "needs": [{"says": "the control learns", **measured, "outcome": "held"}],
        "left_out": ["speed: no GPU here."],
        "hours_to_decide": 0.25,
        "done": 5,
        "planned": 6,
        "missing": ["b 2"] if outcome == "held" else [],
        "cells": [],
    }


def test_verdicts_show_failures_first_with_what_was_measured():
    outcomes = {"delta_rule": "held", "sigmoid": "undecided at this size", "linear": "did not hold"}
    means = zip(outcomes, (0.15, 0.25, -0.35), strict=True)
    records = [reproduced(name, outcomes[name], mean=mean) for name, mean in means]
    found = generate.reproductions({"measured": "this", "reproductions": records})
    assert [one["name"] for one in found][:3] == ["linear", "sigmoid", "delta_rule"]
    assert {one["name"] for one in found} == set(list_reproductions())
    assert all(one["outcome"] == "not run" for one in found[3:])
    page = generate.verdicts_page(found, "this")
    assert page.index("## linear") < page.index("## sigmoid") < page.index("## delta_rule") < page.index("## mamba")
    for part in ("-0.35 ± 0.013 (0.1 to 0.2)", "**did not hold**", "5 of 6 cells, missing: b 2"):
        assert part in page
    assert "it can tell only if the control learns" in page
    assert page.count("Left out: speed: no GPU here.") == 3
    assert page.count("To decide it: 7 seeds, about 0.25 hours") == 1
    own = generate.mechanism_page(get_mechanism("linear"), [], found)
    assert "At a small size: **did not hold**." in own
    assert "The claim of sigmoid." not in own


def test_a_table_with_a_picture_is_drawn_where_both_columns_are_measured():
    rows = [
        {"method": name, "accuracy": score, "images/s": rate}
        for name, score, rate in (
            ("all", 0.9, 100.0),
            ("ToMe", 0.85, 150.0),
            ("ToMe", 0.8, 120.0),
            ("EViT", None, 130.0),
        )
    ]
    one = reproduced("linear", "held") | {"table": rows, "picture": ["method", "images/s", "accuracy"]}
    drawn = generate._drawn(one)
    assert drawn.count("<title>") == 3 and drawn.count(">ToMe<") == 1 and "EViT" not in drawn
    front = re.search(r'class="front" points="([^"]*)"', drawn)
    assert front is not None and len(front[1].split()) == 2  # the third point is dominated
    page = generate.verdicts_page([one], "this")
    assert drawn in page and "| ToMe" in page
    assert "<svg" not in generate.verdicts_page([one | {"picture": None}], "this")


def test_the_parity_page_names_every_recording_with_its_error():
    sources = json.loads(generate.SOURCES.read_text())
    first = sources["fixtures"][0]["file"]
    measured = {"measured": "this", "fixtures": {first: {"error": 3e-16, "tests": ["a"]}}}
    page = generate.parity_page(sources, measured, list_mechanisms())
    for entry in sources["fixtures"]:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{entry['file'].removesuffix('.npz')}` |")]
        assert ("3.0e-16" in row) == (entry["file"] == first)
        assert entry["repository"] in row
    assert "## other" not in page


def test_every_recording_has_a_test_whose_error_is_told():
    """Tests that read recordings are found, also through helper functions; no recording is shown as *not tested*."""
    measure = load("measure")
    source = "def reads(): load('a')\ndef between(x): return reads()\ndef test_a(between): pass\ndef test_b(): pass\n"
    assert measure.readers(source, {"load"}) == {"reads", "between", "test_a"}
    found = {path.name: names for path, names in measure.tests_of_recordings().items()}
    assert {"test_van.py", "test_tokens.py", "test_norm_linear.py"} <= found.keys() and "test_documents.py" not in found
    kept = json.loads((generate.DATA / "parity.json").read_text())["fixtures"]
    assert kept.keys() == {entry["file"] for entry in json.loads(generate.SOURCES.read_text())["fixtures"]}


def test_measured_errors_are_those_of_comparisons_with_a_recording():
    measure = load("measure")
    recorder = measure.Recorder()
    item = pytest.Item.__new__(pytest.Function)
    item.path, item.name, item.originalname = Path("test_x.py"), "test_a[1]", "test_a"
    compare = recorder._watch(torch.testing.assert_close)
    one = torch.ones(3)
    compare(one, one)
    assert recorder.fixtures == {}
    name = json.loads(generate.SOURCES.read_text())["fixtures"][0]["file"]
    recorder._noting(np.load, item)(measure.RECORDINGS / name).close()
    assert recorder.fixtures[name] == {"error": None, "tests": ["test_x.py::test_a"]}
    compare(2 * one + 1e-6, 2 * one)
    with pytest.raises(AssertionError):
        compare(one, 2 * one)
    assert 1e-7 < recorder.fixtures[name]["error"] < 1e-6


def test_the_chooser_has_a_row_for_each_mechanism_in_a_family(minimal):
    catalogue.load_plugin(str(minimal))
    names = list_mechanisms()
    means = {("recall", "softmax"): 0.75, ("recall", "linear"): 0.25, ("text", "softmax"): 2.5, ("text", "linear"): 3.5}
    entries = [{"task": task, "mechanism": name, "mean": mean} for (task, name), mean in means.items()]
    ranking = {"tasks": ["recall", "text"], "entries": entries}
    scaling = {"mechanisms": {"linear": {"time over softmax": 0.0625, "longest": 16384}}}
    found = [reproduced("linear", "did not hold"), reproduced("softmax", "not run")]
    page = generate.index_page(names, scaling, ranking, found)
    chooser, *families = page.split("\n## ")
    heading, _, *rows = [line.strip("| ").split(" | ") for line in chooser.splitlines() if line.startswith("|")]
    assert heading[-3:-1] == ["recall ↑", "text ↓"]
    rows = {row[0].split("]")[0].strip("["): dict(zip(heading[1:], row[1:], strict=True)) for row in rows}
    assert sorted(rows) == names
    for name, row in rows.items():
        (own,) = [part for part in families if f"[{name}]" in part]
        assert own.startswith(row["family"])
        assert {SHORT[p] for p in row["patterns"].split()} == set(get_mechanism(name).patterns)
        assert ("fixed" in row["state"]) == (get_mechanism(name).state is not None and get_mechanism(name).recurrent)
    assert list(rows["linear"].values())[4:] == ["0.062", "0.25", "3.5", "[did not hold](../verdicts.md#linear)"]
    assert list(rows["softmax"].values())[3:] == ["1", "—", "0.75", "2.5", "—"]
    assert rows["uniform"]["family"] in generate.FAMILIES
    assert set(generate.PLACED) <= set(names)
    assert set(generate.PLACED.values()) <= set(generate.FAMILIES)


def test_other_tasks_have_sections_of_their_own_in_the_ranking(tmp_path, monkeypatch, capsys):
    measure = load("measure")
    monkeypatch.setattr(measure, "TASKS_COMPARED", tmp_path / "tasks")
    monkeypatch.setattr(measure, "DATA", tmp_path)
    sizes = ["--dim", "16", "--layers", "1", "--heads", "1", "--seeds", "2", "--rates", "0.003", "--lengths", "8"]
    for task, names in (("copying:length=17,tokens=4", "softmax,linear"), ("recall:pairs=2", "linear")):
        folder = measure.TASKS_COMPARED / task.replace(":", "+")
        budget = ["--budget", "41k tokens", "--frame", "convolution", "--output", str(folder)]
        assert answer(capsys, "compare", "--task", task, "--mechanisms", names, *sizes, *budget)["tasks"]
    measure.measure_tasks()
    page = generate.ranking_page(None, json.loads((tmp_path / "tasks.json").read_text()))
    sections = page.split("\n### ")[1:]
    assert [section.splitlines()[0] for section in sections] == ["copying:length=17,tokens=4", "recall:pairs=2"]
    assert all("Budget 41k tokens" in section for section in sections)
    rows = [re.findall(r"^\| (?:\d+|—) \| \[(\w+)\]", section, re.MULTILINE) for section in sections]
    assert sorted(rows[0]) == ["linear", "softmax"] and rows[1] == ["linear"]


def test_the_ranking_says_which_mechanisms_are_not_better_than_the_rule():
    def told(*standings):
        entries = [{"task": "pairs", "mechanism": f"m{i}", "beside_baseline": it} for i, it in enumerate(standings)]
        more = {"mean": 0.5, "standard_error": 0.1, "inference_ms": 1.0, "seeds": 3, "solved": None, "rank": 1}
        more |= dict.fromkeys(("decode_tokens_per_second", "state_bytes", "separable_from_best"))
        data = {"tasks": ["pairs"], "entries": [{**entry, **more} for entry in entries]}
        data |= {"settings": {"table and picture at": "8 tokens"}, "descriptions": {"pairs": "pairs"}}
        data["baselines"] = {"pairs": {"name": "a rule", "score": 0.4}}
        return "\n".join(generate._ranked_tasks(data)).partition("a rule scores 0.4.")[2]

    one = {"mechanism": "softmax", "mean": 0.5, "standard_error": None, "rank": None, "solved": None}
    one |= dict.fromkeys(("separable_from_best", "inference_ms", "decode_tokens_per_second", "state_bytes"))
    assert generate._ranked(one)[2] == "0.5"  # a single seed has no error
    assert told("ahead", "ahead") == told(None) == ""
    assert told("ahead", "level", "behind", "level") == " `m1`, `m3`: not told apart from it. `m2`: worse."
    assert told("behind", "level") == " No mechanism is shown to be better."
