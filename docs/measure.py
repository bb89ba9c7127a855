"""Measures what the documentation's tables show, into docs/data: `make matrix`, `make reproductions`, `make scaling`.

python docs/measure.py                # parity, matrix, variants, random and integrations
python docs/measure.py matrix         # regard verify                    -> verify.json, cells; continues where it stopped
python docs/measure.py variants       # the same with other options      -> verify.json, variants; continues where it stopped
python docs/measure.py random         # regard verify --random           -> verify.json, random; continues where it stopped
python docs/measure.py parity         # the parity tests                 -> parity.json
python docs/measure.py restore        # published and kept cells         -> runs, so that they are not run again
python docs/measure.py reproductions  # what runs/reproduce holds        -> reproductions.json
python docs/measure.py studies        # what runs/studies holds          -> studies.json
python docs/measure.py scaling        # regard profile of each mechanism -> scaling.json; continues where it stopped
python docs/measure.py keep           # unfinished ranking in runs/all   -> ranking-cells.db.gz, to continue elsewhere
python docs/measure.py integrations   # each mechanism in models of other libraries -> integrations.json; continues where it stopped
python docs/measure.py ranking        # the comparison in runs/all       -> ranking.json
python docs/measure.py tasks          # the comparisons in runs/tasks    -> tasks.json
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Kind, Mechanism, Pattern, Shape, Unsupported
from regard.measurement.memory import keep_freed_memory
from regard.measurement.provenance import fingerprint
from regard.measurement.store import Store
from regard.reproductions import restore
from regard.studies import get_study, list_studies, opened
from regard.studies.framework.protocol import of_record
from regard.workbench.comparison.recommend import PUBLISHED
from regard.workbench.profile import ProfileSettings, growth, profile
from regard.workbench.verification.swap_hosts import HOSTS, hosts
from regard.workbench.verification.swapped import check_swap, swap_variants
from regard.workbench.verification.verify import PROGRAMS, PROPERTIES, Cell, verify

DATA = Path(__file__).parent / "data"
TESTS = Path(__file__).parents[1] / "tests"
READERS = {"load", "recorded_state"}
"""Functions of `tests/support.py` that read recordings."""
RECORDINGS = TESTS / "parity" / "fixtures"
COMPARISONS = ("close", "assert_close", "relative_error")
"""Functions with which these tests compare (found, expected)."""

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
GROWS_FROM = 1024
HEADS, WIDTH = 4, 64
MOST_BYTES = 2 << 30
REPRODUCED = Path("runs/reproduce/results.db")
STUDIED = Path("runs/studies/results.db")
COMPARED = Path("runs/all/results.db")
TASKS_COMPARED = Path("runs/tasks")
"""Comparisons of a few mechanisms on one task each."""
KEPT = DATA / "ranking-cells.db.gz"
"""Runs of an unfinished ranking."""

VERIFIED = Path("runs/verify/results.db")
SWAPPED = Path("runs/integrations/results.db")
BELOW = (
    "contract",
    "core",
    "backends",
    "engines",
    "positions",
    "layers",
    "apply",
    "catalogue.py",
    "create.py",
    "integrations/export.py",
    "workbench/verification",
    "../native",
)
"""The parts of the package that every mechanism's cells depend on."""

IN_MODELS = ("integrations", "models")
"""Further parts that the cells of mechanisms in models depend on."""

RANDOM_CASES = 100
"""Number of random cases of each mechanism on each backend."""

MEASURED = f"regard {regard.__version__}, torch {torch.__version__}, {platform.system()} {platform.machine()}"


class Recorder:
    """A pytest plugin that keeps, for each recording, the largest error of the comparisons made after it was loaded.

    It sees comparisons made by `COMPARISONS` and torch.testing.assert_close; without one, a recording's error stays None.
    """

    def __init__(self, tests: Mapping[Path, set[str]] | None = None) -> None:
        """`tests`: names of the tests to run, by file; None runs all."""
        self.tests = tests
        self.fixtures: dict[str, dict[str, Any]] = {}
        self._loaded: str | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._loaded = None
        module = getattr(item, "module", None)
        watched = {name: self._watch(getattr(module, name)) for name in COMPARISONS if hasattr(module, name)}
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(np, "load", self._noting(np.load, item)))
            torch_compares = self._watch(torch.testing.assert_close)
            patches.enter_context(mock.patch.object(torch.testing, "assert_close", torch_compares))
            for name, function in watched.items():
                patches.enter_context(mock.patch.object(module, name, function))
            return (yield)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.tests is None:
            return
        items[:] = [item for item in items if getattr(item, "originalname", item.name) in self.tests[item.path]]

    def _noting(self, load: Callable[..., Any], item: pytest.Item) -> Callable[..., Any]:
        def noting(file: Any, *args: Any, **options: Any) -> Any:
            if Path(file).parent == RECORDINGS:
                self._loaded = Path(file).name
                tests = self.fixtures.setdefault(self._loaded, {"error": None, "tests": []})["tests"]
                name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
                if name not in tests:
                    tests.append(name)
            return load(file, *args, **options)

        return noting

    def _watch(self, compare: Callable[..., Any]) -> Callable[..., Any]:
        def watching(found: Any, expected: Any, *args: Any, **options: Any) -> Any:
            result = compare(found, expected, *args, **options)
            if self._loaded is not None and isinstance(found, Tensor) and isinstance(expected, Tensor):
                self._note(found.detach().double(), expected.detach().double())
            return result

        return watching

    def _note(self, found: Tensor, expected: Tensor) -> None:
        if self._loaded is None or not expected.numel() or not expected.isfinite().all():
            return
        error = float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
        entry = self.fixtures[self._loaded]
        entry["error"] = max(entry["error"] or 0.0, error)


def readers(source: str, known: Collection[str]) -> set[str]:
    """Names of a file's functions that read recordings, through `known` readers or through each other."""
    if not any(f"{name}(" in source for name in known):
        return set()
    defined = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    used = {
        name: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        for name, node in defined.items()
    }
    found = set(known)
    while more := {name for name, names in used.items() if names & found} - found:
        found |= more
    return found & defined.keys()


def tests_of_recordings() -> dict[Path, set[str]]:
    """Names of the tests that read recordings, by file."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(TESTS.rglob("*.py"))}
    known = READERS.union(
        *(readers(text, READERS) for path, text in sources.items() if path.name.endswith("_checks.py"))
    )
    found = {path: readers(text, known) for path, text in sources.items() if path.parent != TESTS / "docs"}
    return {path: names for path, names in found.items() if names and path.name.startswith("test_")}


def measure_parity() -> None:
    recorder = Recorder(tests := tests_of_recordings())
    code = pytest.main([*map(str, tests), "-q", "-p", "no:xdist", "-p", "no:cacheprovider"], plugins=[recorder])
    if code:
        raise SystemExit("tests of recordings fail: parity.json is left as it was")
    fixtures = dict(sorted(recorder.fixtures.items()))
    _write("parity.json", {"measured": MEASURED, "fixtures": fixtures}, "fixtures")


def measure_matrix() -> None:
    def verified(name: str) -> dict[str, Any]:
        cells = [dataclasses.asdict(cell) for cell in verify([name])]
        return {"cells": [{n: v for n, v in cell.items() if n not in ("seconds", "variant")} for cell in cells]}

    with Store(VERIFIED) as store:
        cells = [
            cell
            for name in list_mechanisms()
            for cell in _kept(store, "matrix", {"mechanism": name}, partial(verified, name))["cells"]
        ]
    failures = sum(cell["status"] == "fail" for cell in cells)
    more = {name: value for name, value in _verified().items() if name in ("variants", "random")}
    _write("verify.json", {"measured": MEASURED, "failures": failures, "cells": cells, **more}, "cells")
    if failures:
        raise SystemExit(f"{failures} cells fail")


def _kept(store: Store, table: str, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The stored measurement made with the current sources; it is made now if there is none."""
    key = {"table": table, **key, "sources": sources()[key["mechanism"]]}
    row = store.get("verify", key)
    if row is None:
        store.put("verify", key, measure())
        row = store.get("verify", key)
        print(*list(key.values())[:-1], flush=True)
    return row.payload


@functools.cache
def sources(more: tuple[str, ...] = ()) -> dict[str, str]:
    """A digest of each mechanism's sources and all that they depend on, so that unrelated changes do not restart a run.

    All digests are computed at once, before anything is measured: files changed during the run are not the code that runs.

    Args:
        more: parts of the package to include in addition to `BELOW`.
    """
    package = Path(regard.__file__).parent
    shared = _digest([package / part for part in (*BELOW, *more)])
    return {name: f"{shared}-{_digest(own_sources(name))}" for name in list_mechanisms()}


def own_sources(name: str) -> list[Path]:
    """Source files of a mechanism and of those it imports; for a wrapper, which may take any, the whole folder."""
    folder = Path(regard.__file__).parent / "mechanisms"
    if get_mechanism(name).kind is Kind.WRAPPER:
        return [folder]
    found: dict[str, Path] = {}
    left = [name]
    while left:
        one = left.pop()
        found[one] = folder / one if (folder / one).is_dir() else folder / f"{one}.py"
        texts = (file.read_text(encoding="utf-8") for file in _files(found[one]))
        named = {other for text in texts for other in re.findall(r"regard\.mechanisms\.(\w+)", text)}
        left += named - found.keys() - set(left)
    return list(found.values())


def _files(place: Path) -> list[Path]:
    return (
        [place] if place.is_file() else [f for f in place.rglob("*") if f.is_file() and f.suffix not in (".pyc", ".so")]
    )


def _digest(places: Iterable[Path]) -> str:
    found = hashlib.sha256(MEASURED.encode())
    for place in places:
        for file in sorted(_files(place)):
            found.update(b"\0".join((file.name.encode(), file.read_bytes())))
    return found.hexdigest()[:12]


def _verified() -> dict[str, Any]:
    file = DATA / "verify.json"
    return json.loads(file.read_text()) if file.is_file() else {"measured": MEASURED, "failures": 0, "cells": []}


def measure_variants() -> None:
    """Measure one row for each variant. Compiled programs, seconds each, are left to `regard verify --variant all`."""
    properties = [p.name for p in PROPERTIES if p.name not in PROGRAMS]

    def verified(name: str, variant: str) -> dict[str, Any]:
        cells = verify([name], variants=[variant], properties=properties)
        return {"mechanism": name, "variant": variant, **_counted(cells)}

    with Store(VERIFIED) as store:
        found = [
            _kept(
                store,
                "variants",
                {"mechanism": name, "variant": variant, "options": repr(options)},
                partial(verified, name, variant),
            )
            for name in list_mechanisms()
            for variant, options in get_mechanism(name).variants.items()
        ]
    _write("verify.json", {**_verified(), "variants": found}, "variants")


def _counted(cells: list[Cell]) -> dict[str, Any]:
    def worst(dtype: str, backend: str) -> float | None:
        of = [c.error for c in cells if (c.dtype, c.backend) == (dtype, backend) and c.error is not None]
        return max(of, default=None)

    return {
        "cells": len(cells),
        "waived": sum(c.status == "waived" for c in cells),
        "failed": sum(c.status == "fail" for c in cells),
        "float64": worst("float64", "torch"),
        "native float32": worst("float32", "native"),
    }


def measure_random() -> None:
    def drawn(name: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "regard", "verify", name, "--random", str(RANDOM_CASES), "--json"]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(printed)["searches"]
        return {"searches": [{n: v for n, v in one.items() if n != "unreached"} for one in found]}

    with Store(VERIFIED) as store:
        found = [
            one
            for name in list_mechanisms()
            for one in _kept(store, "random", {"mechanism": name}, partial(drawn, name))["searches"]
        ]
    _write("verify.json", {**_verified(), "random": found}, "random")


def restore_cells() -> None:
    """Copy the cells in docs/data back into runs, so that they need not be run again."""
    published = json.loads((DATA / "reproductions.json").read_text())["reproductions"]
    with Store(REPRODUCED) as store:
        print(f"{restore(published, store)} published cells restored into {REPRODUCED}")
    file = DATA / "studies.json"
    if file.is_file():
        with Store(STUDIED) as store:
            records = json.loads(file.read_text())["studies"]
            put = restore(records, store, lambda record: of_record(record, get_study(record["study"])))
            print(f"{put} published cells restored into {STUDIED}")
    if KEPT.is_file():
        with tempfile.TemporaryDirectory() as folder, Store(COMPARED) as store:
            unpacked = Path(folder, "cells.db")
            unpacked.write_bytes(gzip.decompress(KEPT.read_bytes()))
            print(f"{store.merge(unpacked)} kept rows restored into {COMPARED}")


def keep_cells() -> None:
    """Save the runs of an unfinished ranking; plans and costs depend on the machine and are made again."""
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder, "cells.db")
        with Store(packed) as store:
            taken = store.merge(COMPARED, ["search", "quality"])
        KEPT.write_bytes(gzip.compress(packed.read_bytes(), mtime=0))
    print(f"{taken} rows of {COMPARED} kept in {KEPT}")


def measure_reproductions() -> None:
    """Judge what `regard reproduce` has left in runs/reproduce; nothing is run here, since that takes hours."""
    command = [sys.executable, "-m", "regard", "reproduce", "all", "--table", "--json"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(found.stdout)
    machines = sorted({cell["machine"] for one in result["reproductions"] for cell in one["cells"]})
    _write("reproductions.json", {"measured": f"{MEASURED}; {' and '.join(machines)}", **result}, "reproductions")


def measure_studies() -> None:
    """Collect what `regard study` has left in runs/studies: each study's preset with the most results (presets share some
    cells), with all mechanisms that have entered; nothing is run here."""
    found = []
    with Store(STUDIED, read_only=True) as store:
        rows = store.rows("reproduction")
        for name in list_studies():
            study = get_study(name)
            if study.folder != str(STUDIED.parent):
                continue
            entered = {row.key["options"].get("mechanism") for row in rows if row.key["reproduction"] == study.name}
            more = tuple(m for m in regard.list_mechanisms() if m in entered and m not in study.mechanisms)
            chosen = (
                dataclasses.replace(study.choose(preset), mechanisms=(*study.mechanisms, *more))
                for preset in reversed(study.presets)
            )
            record = max((opened(study, one, store) for one in chosen), key=lambda record: int(record["done"]))
            if record["done"]:
                found.append(record)
    machines = sorted({cell["machine"] for one in found for cell in one["cells"]})
    _write("studies.json", {"measured": f"{MEASURED}; {' and '.join(machines)}", "studies": found}, "studies")


def measure_integrations() -> None:
    """Measure each mechanism in each model: first default options everywhere, then the worst of the variants."""
    if missing := HOSTS.keys() - hosts():
        raise SystemExit(
            f"{', '.join(sorted(missing))} need transformers and timm: integrations.json is left as it was"
        )
    names, made_of = list_mechanisms(), sources(IN_MODELS)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with Store(SWAPPED) as store:

        def measured(name: str, model: str, variant: str = "") -> dict[str, Any]:
            key = {"mechanism": name, "model": model, "variant": variant, "sources": made_of[name]}
            row = store.get("verify", key)
            if row is None:
                store.put("verify", key, check_swap(model, name, variant).row())
                row = store.get("verify", key)
                print(name, model, variant, flush=True)
            return dict(row.payload)

        for name, model in itertools.product(names, HOSTS):
            rows[name, model] = measured(name, model)
        _write_integrations(rows)
        for (name, model), row in rows.items():
            if "refused" not in row:
                row["variants"] = _worst_of([measured(name, model, variant) for variant in swap_variants(name)])
    _write_integrations(rows)


def _write_integrations(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    _write("integrations.json", {"measured": MEASURED, "cells": list(rows.values())}, "cells")


def _worst_of(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the variants of a mechanism in a model: which are refused, and the largest errors of the rest."""
    errors: dict[str, float] = {}
    for cell in cells:
        for name, error in cell.get("errors", {}).items():
            errors[name] = max(error, errors.get(name, 0.0))
    refused = {cell["variant"]: cell["refused"] for cell in cells if "refused" in cell}
    return {"number": len(cells), "errors": errors, "refused": refused}


def measure_ranking() -> None:
    """Publish the newest finished comparison of all mechanisms; nothing is run here, since that takes hours."""
    data = _finished(COMPARED)
    if data is None:
        raise SystemExit("runs/all holds no finished comparison: make ranking runs it")
    _write("ranking.json", data, "entries")
    scored = [entry for entry in data["entries"] if entry["mean"] is not None]
    means = {task: {e["mechanism"]: round(e["mean"], 6) for e in scored if e["task"] == task} for task in data["tasks"]}
    text = json.dumps({"frame": data["frame"], "budget": data["budget"], "means": means}, indent=1) + "\n"
    PUBLISHED.write_text(text, encoding="utf-8")
    KEPT.unlink(missing_ok=True)


def measure_tasks() -> None:
    """Publish the newest finished comparison in each folder of runs/tasks, named TASK or TASK+OPTIONS, beside those
    published before."""
    path = DATA / "tasks.json"
    known = json.loads(path.read_text())["comparisons"] if path.is_file() else {}
    for store in sorted(TASKS_COMPARED.glob("*/results.db")):
        data = _finished(store)
        if data is not None:
            known[store.parent.name.replace("+", ":")] = data
    if not known:
        raise SystemExit("runs/tasks holds no finished comparison: make tasks runs them")
    _write("tasks.json", {"comparisons": known}, "comparisons")


def _finished(path: Path) -> dict[str, Any] | None:
    """What the pages need of the newest finished comparison in a store; None without one."""
    with Store(path) as store:
        finished = store.rows("run")
    if not finished:
        return None
    found = finished[-1].payload
    kept = (
        "tasks",
        "mechanisms",
        "seeds",
        "budget",
        "frame",
        "frames",
        "parts",
        "beside",
        "settings",
        "descriptions",
        "baselines",
        "resolution",
    )
    entries = [{"task": task, **entry} for task, rows in found["summary"].items() for entry in rows]
    measured = f"{MEASURED}, {finished[-1].machine['cpu']}"
    return {"measured": measured, **{key: found[key] for key in kept}, "entries": entries}


def measure_scaling() -> None:
    """Measure growth with length and efficiency lengths of every mechanism missing from scaling.json; a row names its
    machine if that differs from most rows'. Without the file everything is measured anew."""
    measured = f"{MEASURED}, {fingerprint()['cpu']}, {torch.get_num_threads()} threads"
    path = DATA / "scaling.json"
    known = json.loads(path.read_text()) if path.is_file() else {"measured": measured, "mechanisms": {}}
    rows, most = known["mechanisms"], known["measured"]
    keep_freed_memory()
    for name in regard.list_mechanisms():
        if name not in rows:
            rows[name] = scaling(regard.get_mechanism(name)) | ({} if measured == most else {"measured": measured})
            print(name, rows[name], flush=True)
            _write("scaling.json", {"measured": most, "mechanisms": rows}, "mechanisms")


def scaling(card: Mechanism) -> dict[str, Any]:
    """Efficiency lengths, and growth exponents from 1024 tokens on, both measured and by the card's cost.

    Lengths whose temporary storage would reach `MOST_BYTES` are left out.
    """
    pattern = Pattern.CAUSAL_SELF if Pattern.CAUSAL_SELF in card.patterns else card.patterns[0]
    storage = {n: 4 * card.cost(Shape(1, HEADS, n, n, WIDTH, WIDTH), card.options()).memory for n in LENGTHS}
    lengths = tuple(n for n in LENGTHS if storage[n] < MOST_BYTES)
    found: dict[str, Any] = {"pattern": pattern.value, "longest": max(lengths)}
    settings = ProfileSettings((card.name,), pattern, lengths, ("forward", "training"), heads=HEADS, head_dim=WIDTH)
    fitted = dataclasses.replace(settings, lengths=tuple(n for n in lengths if n >= GROWS_FROM), seconds=2.0)
    try:
        result = profile(settings)
        grown = growth(fitted)[card.name]
    except Unsupported as error:
        return found | {"refused": str(error)}
    by_name = {m.mechanism: m for m in result.measurements if (m.what, m.length) == ("forward", max(lengths))}
    times = {name: measurement.milliseconds for name, measurement in by_name.items()}
    return found | {
        "efficiency": result.efficiency.get(card.name, {}),
        "growth": dataclasses.asdict(grown),
        "time over softmax": times[card.name] / times["softmax"],
    }


def _write(name: str, data: dict[str, Any], rows: str) -> None:
    """Write one line for each entry of `rows`, so that a changed entry is a one-line diff."""
    many = data[rows]
    if isinstance(many, dict):
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in many.items()]
        body = "{\n" + ",\n".join(lines) + "\n}"
    else:
        body = "[\n" + ",\n".join(map(json.dumps, many)) + "\n]"
    head = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items() if key != rows]
    DATA.mkdir(exist_ok=True)
    (DATA / name).write_text("{\n" + ",\n".join([*head, f"{json.dumps(rows)}: {body}"]) + "\n}\n")


def main() -> None:
    chosen = sys.argv[1:] or ["parity", "matrix", "variants", "random", "integrations"]
    measures = {
        "parity": measure_parity,
        "matrix": measure_matrix,
        "variants": measure_variants,
        "random": measure_random,
        "restore": restore_cells,
        "keep": keep_cells,
        "reproductions": measure_reproductions,
        "scaling": measure_scaling,
        "integrations": measure_integrations,
        "ranking": measure_ranking,
        "tasks": measure_tasks,
        "studies": measure_studies,
    }
    for name in chosen:
        if name not in measures:
            raise SystemExit(f"measure {name!r}; supported: {', '.join(measures)}")
    for name in chosen:
        measures[name]()


if __name__ == "__main__":
    main()
