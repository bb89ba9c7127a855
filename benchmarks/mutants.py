"""How much the tests catch: copies of the package with one change each, by cosmic-ray, and the tests that notice.

    make mutants                                                          # or, with cosmic-ray installed:
    python benchmarks/mutants.py --count 400 --output runs/mutants.jsonl  # goes on where it stopped
    python benchmarks/mutants.py --share 1/2 --output runs/1.jsonl        # beside a second process with --share 2/2
    python benchmarks/mutants.py --again --output runs/mutants.jsonl      # those that survived, after tests were added
    python benchmarks/mutants.py --table runs/*.jsonl                     # what was found, and what survived

Mutants are drawn alike from each group of `GROUPS`, with a seed, among all that change what is computed: annotations and
what a type checker alone reads are left out. The tests of a group run one after another until one fails; a mutant that
all of them pass has survived. They are those nearest to the code, not the whole suite, so the share that is caught is a
lower bound.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
SECONDS = 300.0
"""Of a run of tests, after which a mutant counts as caught: it does not end."""

MATRIX = "tests/contract/test_matrix.py"


def cells(*names: str, only: str = "") -> list[str]:
    """The cells of the matrix for some mechanisms, without programs, which take seconds each."""
    these = " or ".join(f"[{name}-" for name in names)
    words = [f"({these})", "not (compile or export or onnx or lengths)", *([only] if only else [])]
    return [MATRIX, "-k", " and ".join(words)]


GROUPS: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
    "contract": (
        [
            f"regard/contract/{name}.py"
            for name in ("call", "card", "context", "errors", "patterns", "state", "trees", "types")
        ],
        [
            [
                *(f"tests/contract/test_{name}.py" for name in ("contract_types", "apply", "wrong_types")),
                "tests/test_catalogue.py",
                "tests/integrations/test_export.py",
            ],
            cells("softmax", "linear"),
        ],
    ),
    "apply": (
        [f"regard/apply/{name}.py" for name in ("__init__", "checks", "forms", "layout", "plans", "sizes")],
        [
            ["tests/contract/test_apply.py", "tests/layers/test_parts.py"],
            cells("softmax", "linear", "agent"),
            ["tests/mechanisms/test_large_kernel.py", "tests/mechanisms/test_gated_linear.py"],
        ],
    ),
    "ragged": (
        ["regard/core/ragged.py"],
        [
            ["tests/layers/test_parts.py", "tests/contract/test_apply.py"],
            cells("linear", "landmark", "large_kernel", "routing"),
        ],
    ),
    "visibility": (
        ["regard/core/visibility.py"],
        [
            [
                "tests/layers/test_parts.py",
                "tests/engines/test_attention.py",
                "tests/backends/native/test_attention.py",
            ],
            cells("softmax", "local", "longformer"),
        ],
    ),
    "layers": (
        [
            "regard/layers/attention.py",
            "regard/layers/options.py",
            "regard/layers/convolution.py",
            "regard/layers/norms.py",
        ],
        [
            ["tests/layers", "tests/contract/test_layer_options.py"],
            cells("softmax", "gated_linear", only="layer"),
        ],
    ),
    "engines": (
        [
            "regard/engines/attention/torch_form.py",
            "regard/engines/gated_recurrence/torch_form.py",
            "regard/engines/linear_attention/torch_form.py",
            "regard/engines/recurrent_forms.py",
            "regard/engines/cache.py",
            "regard/engines/scan.py",
        ],
        [
            ["tests/engines", "tests/distributed/test_distributed_attention.py"],
            cells("softmax", "gated_linear", "linear", "local"),
            ["tests/backends/native/test_linear_attention.py", "tests/mechanisms/test_performer.py"],
        ],
    ),
    "landmark": (
        [f"regard/mechanisms/landmark/{name}.py" for name in ("cache", "forms", "retrieval")],
        [["tests/mechanisms/test_landmark.py"], cells("landmark")],
    ),
    "combiner": (
        [f"regard/mechanisms/combiner/{name}.py" for name in ("fixed", "forms", "grid", "logn", "pooling")],
        [["tests/mechanisms/test_combiner.py"], cells("combiner")],
    ),
    "performer": (
        ["regard/mechanisms/performer.py"],
        [["tests/mechanisms/test_performer.py"], ["tests/contract/test_costs.py"], cells("performer")],
    ),
    "delta_rule": (
        ["regard/mechanisms/delta_rule.py"],
        [["tests/mechanisms/test_delta_rule.py"], ["tests/contract/test_costs.py"], cells("delta_rule")],
    ),
    "sea": (
        [
            "regard/mechanisms/sea/forms.py",
            "regard/engines/pixel_attention/torch_form.py",
            "regard/engines/map_distance/torch_form.py",
        ],
        [["tests/mechanisms/test_sea.py"], cells("sea")],
    ),
    "transnext": (
        ["regard/models/vision/transnext.py", "regard/engines/aggregated_attention/torch_form.py"],
        [["tests/models/vision/test_transnext.py"]],
    ),
}
"""Of each group: the modules that are changed, and the tests that may notice, in runs one after another."""

RUN = """
import sys
sys.meta_path = [f for f in sys.meta_path if not type(f).__module__.startswith("_")]  # an editable installation's
sys.path.insert(0, sys.argv[1])
import pytest
sys.exit(pytest.main(["-x", "-q", *sys.argv[2:]]))
"""


@dataclass(frozen=True)
class Mutant:
    """One change: the occurrence of an operator of cosmic-ray in a module."""

    group: str
    module: str
    operator: str
    occurrence: int
    line: int

    @property
    def key(self) -> list[Any]:
        return [self.module, self.operator, self.occurrence]


def unread(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where nothing is computed: annotations, and what a type checker alone reads."""
    found: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found += [node.returns, *(a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg))]
        elif isinstance(node, ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            found += node.body
    return [
        ((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0))
        for n in found
        if isinstance(n, ast.expr | ast.stmt)
    ]


def mutants(group: str, module: str) -> Iterator[Mutant]:
    """All changes of a module."""
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.plugins import get_operator, operator_names

    path = HERE / module
    skipped, nodes = unread(path.read_text()), list(ast_nodes(get_ast_from_path(path)))
    for name in sorted(operator_names()):
        kind = get_operator(name)
        if kind.arguments() or "no-op" in name.lower():
            continue
        operator, occurrence = kind(), -1
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                occurrence += 1
                if not any(begin <= start < end for begin, end in skipped):
                    yield Mutant(group, module, name, occurrence, start[0])


def drawn(count: int, seed: int) -> list[Mutant]:
    """`count` mutants, as many of each group as others as far as it has them."""
    each = {group: [m for module in modules for m in mutants(group, module)] for group, (modules, _) in GROUPS.items()}
    for group, found in each.items():
        random.Random(f"{seed} {group}").shuffle(found)
    chosen: list[Mutant] = []
    while len(chosen) < count and any(each.values()):
        chosen += [found.pop() for found in each.values() if found]
    return chosen[:count]


def copied(folder: Path) -> Path:
    """The package and its tests in a folder of their own, with the library of kernels."""
    for name in ("regard", "tests", "docs", "pyproject.toml"):
        source = HERE / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    sys.path.insert(0, str(HERE))
    from regard.backends.native import library

    for place in library._candidates()[:1]:
        shutil.copy(place, folder / "regard" / "backends" / "native" / place.name)
    return folder


def tried(mutant: Mutant, folder: Path) -> dict[str, Any]:
    """What the tests of its group say of a mutant."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    path = folder / mutant.module
    source = path.read_text()
    changed = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    assert changed is not None, mutant
    diff = [x for x in difflib.unified_diff(source.split("\n"), changed.split("\n"), n=0, lineterm="")][3:]
    started, caught = time.monotonic(), ""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    path.write_text(changed)
    try:
        for tests in GROUPS[mutant.group][1]:
            command = [sys.executable, "-c", RUN, str(folder), *tests]
            try:
                done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                caught = "does not end"
                break
            if done.returncode:
                words = done.stdout.decode().splitlines()
                caught = next((line for line in words if line.startswith(("FAILED", "ERROR"))), "cannot be imported")
                break
    finally:
        path.write_text(source)
    where = {"group": mutant.group, "module": mutant.module, "line": mutant.line, "mutant": mutant.key}
    return where | {"change": diff, "caught": caught, "seconds": round(time.monotonic() - started, 1)}


def table(paths: Iterable[Path]) -> str:
    """What was caught, by group, and each mutant that survived."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    lines = ["| code | mutants | caught |", "|---|---:|---:|"]
    for group in [*dict.fromkeys(row["group"] for row in rows), "all"]:
        own = [row for row in rows if group in (row["group"], "all")]
        lines.append(f"| {group} | {len(own)} | {sum(bool(row['caught']) for row in own) / len(own):.0%} |")
    lines += ["", "Survived:"]
    for row in sorted(rows, key=lambda row: (row["module"], row["line"])):
        if not row["caught"]:
            lines += ["", f"{row['module']}:{row['line']}", *(f"    {line}" for line in row["change"])]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", default="1/1", help="i/n: every n-th mutant, beginning with the i-th")
    parser.add_argument("--output", type=Path, default=Path("runs/mutants.jsonl"))
    parser.add_argument("--again", action="store_true", help="try those again that survived before")
    parser.add_argument("--table", type=Path, nargs="+", help="print what these files found; run nothing")
    given = parser.parse_args()
    if given.table:
        print(table(given.table))
        return
    first, step = map(int, given.share.split("/"))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    kept = given.output.read_text().splitlines() if given.output.exists() else []
    if given.again:
        kept = [line for line in kept if json.loads(line)["caught"]]
        given.output.write_text("".join(f"{line}\n" for line in kept))
    done = [json.loads(line)["mutant"] for line in kept]
    chosen = [m for m in drawn(given.count, given.seed)[first - 1 :: step] if m.key not in done]
    with tempfile.TemporaryDirectory() as place, given.output.open("a") as out:
        folder = copied(Path(place))
        for number, mutant in enumerate(chosen, 1):
            row = tried(mutant, folder)
            print(json.dumps(row), file=out, flush=True)
            said = row["caught"][:100] or "SURVIVED"
            print(f"{number} of {len(chosen)}: {mutant.module}:{mutant.line} {row['seconds']} s {said}", flush=True)
    print(table([given.output]))


if __name__ == "__main__":
    main()
