"""Mutation testing: changes the package in one place at a time with cosmic-ray, and counts how often a test notices.

    make mutants                                                          # or, with cosmic-ray and coverage installed:
    python benchmarks/mutants.py --count 400 --output runs/mutants.jsonl  # continues where it stopped
    python benchmarks/mutants.py --share 1/2 --output runs/1.jsonl        # with --share 2/2 in a second process
    python benchmarks/mutants.py --groups apply,ragged --count 72         # only these groups
    python benchmarks/mutants.py --again --output runs/mutants.jsonl      # the survivors, after tests were added
    python benchmarks/mutants.py --table runs/*.jsonl                     # the results, and the survivors

Mutants are drawn evenly from the groups of `GROUPS`, with a seed, among all that change what is computed: annotations and
code that only a type checker reads are left out. The tests of a group first run without any change, to record the lines
that each of them reaches. A mutant is then given the tests that reach it, the quickest first, until one fails; if none
reaches it, all tests of its group. A mutant that passes all of them has survived. A group has only the tests nearest to the
code, not the whole suite, so the share that is caught is a lower bound.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import difflib
import gc
import inspect
import json
import multiprocessing
import os
import py_compile
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
SECONDS = 60.0
"""A mutant that runs this long beyond ten times the time of its tests is taken to hang, and counts as caught."""

MATRIX = "tests/contract/test_matrix.py"
COUNTS = ["tests/contract/test_costs.py", "tests/contract/test_state_sizes.py"]


def cells(*names: str, only: str = "") -> list[str]:
    """Pytest arguments for some mechanisms' cells of the matrix, without compiled programs, which take seconds each."""
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
                *(f"tests/contract/test_{x}.py" for x in ("contract_types", "apply", "card_variants", "wrong_types")),
                "tests/test_catalogue.py",
                "tests/integrations/test_export.py",
            ],
            cells("softmax", "linear"),
        ],
    ),
    "apply": (
        [f"regard/apply/{name}.py" for name in ("__init__", "checks", "forms", "layout", "plans", "sizes")],
        [
            [
                *(f"tests/contract/test_{x}.py" for x in ("apply", "card_variants", "dropout")),
                "tests/layers/test_parts.py",
            ],
            cells("softmax", "linear", "agent"),
            ["tests/mechanisms/test_large_kernel.py", "tests/mechanisms/test_gated_linear.py"],
        ],
    ),
    "ragged": (
        ["regard/core/ragged.py"],
        [
            ["tests/layers/test_parts.py", "tests/contract/test_apply.py", "tests/mechanisms/test_moba.py"],
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
            ["tests/layers", "tests/positions", "tests/contract/test_layer_options.py"],
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
            [*(f"tests/mechanisms/test_{x}.py" for x in ("performer", "delta_rule", "local", "softmax"))],
            ["tests/backends/native/test_linear_attention.py"],
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
        [["tests/mechanisms/test_performer.py", "tests/mechanisms/test_draws.py"], COUNTS, cells("performer")],
    ),
    "delta_rule": (
        ["regard/mechanisms/delta_rule.py"],
        [["tests/mechanisms/test_delta_rule.py"], COUNTS, cells("delta_rule")],
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
        [["tests/models/vision/test_transnext.py"], ["tests/models/vision/test_backbones.py", "-k", "transnext"]],
    ),
}
"""For each group: the modules to change, and the tests that may notice, as the arguments of pytest runs."""


@dataclass(frozen=True)
class Mutant:
    """One change: one occurrence of a cosmic-ray operator in a module."""

    group: str
    module: str
    operator: str
    occurrence: int
    line: int

    @property
    def key(self) -> list[Any]:
        return [self.module, self.operator, self.occurrence]


def unread(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Source ranges (start, end) where nothing is computed: annotations and code that only a type checker reads."""
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
    """All mutants of a module."""
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


def drawn(groups: Iterable[str], count: int, seed: int) -> list[Mutant]:
    """Draw `count` mutants, evenly from all groups as long as they have any left."""
    each = {group: [m for module in GROUPS[group][0] for m in mutants(group, module)] for group in groups}
    for group, found in each.items():
        random.Random(f"{seed} {group}").shuffle(found)
    chosen: list[Mutant] = []
    while len(chosen) < count and any(each.values()):
        next_ones = (next_that_compiles(found) for found in each.values())
        chosen += [mutant for mutant in next_ones if mutant is not None]
    return chosen[:count]


def next_that_compiles(found: list[Mutant]) -> Mutant | None:
    """Pop mutants until one is valid Python (a `+` for the `*` of keyword-only arguments is not)."""
    while found:
        mutant = found.pop()
        with contextlib.suppress(SyntaxError):
            compiled(HERE / mutant.module, changed(mutant, (HERE / mutant.module).read_text()))
            return mutant
    return None


def changed(mutant: Mutant, source: str) -> str:
    """Apply a mutant's change to the source of its module."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    assert code is not None, mutant
    return code


def compiled(path: Path, source: str) -> types.CodeType:
    """Compile a module, without warnings about `is` next to a literal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return compile(source, str(path), "exec", dont_inherit=True)


def copied(folder: Path) -> Path:
    """Copy the package, its tests and the kernel library into a folder of their own."""
    for name in ("regard", "tests", "docs", "pyproject.toml"):
        source = HERE / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    ask = "from regard.backends.native import library; print(*library._candidates()[:1])"
    place = subprocess.run([sys.executable, "-c", ask], cwd=HERE, capture_output=True, text=True).stdout.strip()
    if place:
        shutil.copy(place, folder / "regard" / "backends" / "native" / Path(place).name)
    by_content = py_compile.PycInvalidationMode.CHECKED_HASH  # notices a change made within the same second
    compileall.compile_dir(folder / "regard", quiet=1, invalidation_mode=by_content)
    return folder


@dataclass(eq=False)  # pytest needs plugins to be hashable
class Tests:
    """A pytest plugin that runs only some tests, the quickest first, and records how long each takes and which one fails.

    Attributes:
        wanted: names of the tests to run, with their seconds; None for all.
        covered: the coverage object, whose context is switched to each test.
        instead: called with the session in place of running the collected tests.
        seconds: time of each test that passed.
        failed: the first test that failed, and why.
    """

    wanted: dict[str, float] | None = None
    covered: Any = None
    instead: Callable[[Any], None] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    failed: str = ""

    @property
    def files(self) -> list[str]:
        """Files that contain the wanted tests."""
        return sorted({name.partition("::")[0] for name in self.wanted or ()})

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.wanted is not None:
            items[:] = sorted((x for x in items if x.nodeid in self.wanted), key=lambda x: self.wanted[x.nodeid])

    def pytest_runtestloop(self, session: Any) -> bool | None:
        return None if self.instead is None else self.instead(session) or True

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.covered is not None:
            self.covered.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.seconds[report.nodeid] = report.duration
        self.pytest_collectreport(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            words = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            self.failed = f"{report.nodeid} - {words.splitlines()[0] if words else ''}"[:200]


def apart(action: Callable[..., Any], *given: Any, seconds: float | None = None) -> Any:
    """The result of `action` in a forked process, which keeps this one's imports; None if it hangs or dies."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def answer() -> None:
        try:
            send.send((action(*given), ""))
        except Exception:
            send.send((None, traceback.format_exc()))

    process = context.Process(target=answer)
    process.start()
    send.close()
    try:
        found, wrong = receive.recv() if receive.poll(seconds) else (None, "")
    except EOFError:
        found, wrong = None, ""
    process.kill()
    process.join()
    if wrong:
        raise RuntimeError(wrong)
    return found


def run(folder: Path, arguments: Sequence[str], plugin: Tests) -> int:
    """Run pytest silently in the copy; returns its exit code."""
    import pytest

    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    return int(pytest.main(["-q", "-W", "ignore::SyntaxWarning", *arguments], plugins=[plugin]))


@dataclass
class Reach:
    """The tests of a group that pass without any change, and the lines that each of them reaches.

    Attributes:
        seconds: time of each test.
        lines: for each module, the tests that reach each line; "" stands for the import of the module.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]

    def of(self, mutant: Mutant, source: str) -> dict[str, float]:
        """The tests that may notice a mutant, with their seconds."""
        names = self._names(mutant, source)
        found = {name: x for name, x in self.seconds.items() if "" in names or name in names}
        return found or self.seconds

    def at_import(self, mutant: Mutant, source: str) -> bool:
        """Return whether a mutant changes code that runs at import, which replacing functions would not run again."""
        return "" in self._names(mutant, source)

    def _names(self, mutant: Mutant, source: str) -> set[str]:
        lines = self.lines.get(mutant.module, {})
        return {name for line in statement(source, mutant.line) for name in lines.get(line, ())}


def statement(source: str, line: int) -> range:
    """Lines of the innermost statement that contains `line`, without those of the statements nested in it."""
    found = range(line, line + 1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt | ast.excepthandler):
            first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
            if first <= line <= (node.end_lineno or first):
                body = getattr(node, "body", None)
                last = max(first, body[0].lineno - 1) if body else node.end_lineno or first
                found = range(first, max(last, line) + 1)
    return found


def reached(group: str, folder: Path) -> Reach:
    """Run the tests of a group without any change, and record the lines that they reach."""
    modules, runs = GROUPS[group]
    reach = Reach({}, {module: {} for module in modules})

    def noted(arguments: Sequence[str]) -> tuple[dict[str, float], dict[str, dict[int, list[str]]]]:
        import coverage

        files = {module: str(folder / module) for module in modules}
        covered = coverage.Coverage(data_file=None, config_file=False, include=[*files.values()])
        plugin = Tests(covered=covered)
        covered.start()
        run(folder, arguments, plugin)
        covered.stop()
        data = covered.get_data()
        return plugin.seconds, {module: data.contexts_by_lineno(file) for module, file in files.items()}

    for arguments in runs:
        seconds, lines = apart(noted, arguments)
        reach.seconds |= seconds
        for module, found in lines.items():
            for line, names in found.items():
                reach.lines[module].setdefault(line, []).extend(names)
    print(f"{group}: {len(reach.seconds)} tests in {sum(reach.seconds.values()):.0f} s", flush=True)
    return reach


def replaced(path: Path, before: str, after: str) -> bool:
    """Give the functions of an imported module the code of a changed source, and return whether that was possible: code
    that runs at import must be the same in both."""
    codes: dict[types.CodeType, types.CodeType] = {}

    def alike(old: types.CodeType, new: types.CodeType) -> bool:
        inner = [[c for c in code.co_consts if isinstance(c, types.CodeType)] for code in (old, new)]
        if [c.co_qualname for c in inner[0]] != [c.co_qualname for c in inner[1]] or old.co_freevars != new.co_freevars:
            return False
        if old.co_flags & inspect.CO_OPTIMIZED:  # a function's code
            codes[old] = new
        else:
            own = [[c for c in code.co_consts if not isinstance(c, types.CodeType)] for code in (old, new)]
            if (old.co_code, old.co_names, own[0]) != (new.co_code, new.co_names, own[1]):
                return False
        return all(map(alike, *inner))

    if not alike(*(compiled(path, source) for source in (before, after))):
        return False
    for x in gc.get_objects():
        if type(x) is types.FunctionType and x.__code__.co_filename == str(path) and x.__code__ in codes:
            x.__code__ = codes[x.__code__]
    return True


def tried(mutant: Mutant, folder: Path, reach: Reach, session: Any = None) -> dict[str, Any] | None:
    """Run a mutant's tests, and return its row of the results.

    Args:
        session: a pytest session that has imported the package and collected the tests. With it, the result is None for a
            mutant that needs a fresh import.
    """
    path = folder / mutant.module
    source = path.read_text()
    if session is not None and reach.at_import(mutant, source):
        return None
    after = changed(mutant, source)
    diff = [x for x in difflib.unified_diff(source.split("\n"), after.split("\n"), n=0, lineterm="")][3:]
    plugin, started = Tests(wanted=reach.of(mutant, source)), time.monotonic()

    def noticed() -> str:
        if session is None:
            code = run(folder, ["-x", *plugin.files], plugin)
            return plugin.failed or ("" if code in (0, 5) else "cannot be imported")  # 5: no tests were collected
        if not replaced(path, source, after):
            return "imported again"
        session.config.pluginmanager.register(plugin)
        items = list(session.items)
        plugin.pytest_collection_modifyitems(items)
        for item, following in zip(items, [*items[1:], None], strict=True):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if plugin.failed:
                break
        return plugin.failed

    path.write_text(after)
    try:
        caught = apart(noticed, seconds=SECONDS + 10 * sum(plugin.wanted.values()))
    finally:
        path.write_text(source)
    if caught == "imported again":
        return None
    where = {"group": mutant.group, "module": mutant.module, "line": mutant.line, "mutant": mutant.key}
    found = {"change": diff, "caught": "does not end, or dies" if caught is None else caught}
    return where | found | {"tests": len(plugin.wanted), "seconds": round(time.monotonic() - started, 1)}


def tried_of(chosen: Sequence[Mutant], folder: Path, output: Path) -> None:
    """Run the tests for the mutants of one group. The package is imported and its tests are collected once for all mutants
    that change only code of functions."""
    reach, out = reached(chosen[0].group, folder), os.fdopen(os.dup(1), "w")

    def each(mutants: Sequence[Mutant], session: Any = None) -> list[Mutant]:
        left = []
        for mutant in mutants:
            row = tried(mutant, folder, reach, session)
            if row is None:
                left.append(mutant)
                continue
            with output.open("a") as rows:
                print(json.dumps(row), file=rows)
            said = row["caught"][:100] or "SURVIVED"
            print(f"{mutant.module}:{mutant.line} {row['seconds']} s {said}", file=out, flush=True)
        return left

    def at_once() -> list[Mutant]:
        left: list[Mutant] = []
        wrong: list[str] = []  # pytest would swallow the error, and the remaining mutants would be lost

        def instead(session: Any) -> None:
            try:
                left.extend(each(chosen, session))
            except Exception:
                wrong.append(traceback.format_exc())

        plugin = Tests(wanted=reach.seconds, instead=instead)
        run(folder, plugin.files, plugin)
        if wrong:
            raise RuntimeError(wrong[0])
        return left

    each(apart(at_once))


def table(paths: Iterable[Path]) -> str:
    """A table of the share caught in each group, and the list of mutants that survived."""
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
    parser.add_argument("--groups", default=",".join(GROUPS), help="of code, separated by commas; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", default="1/1", help="i/n: every n-th mutant, beginning with the i-th")
    parser.add_argument("--output", type=Path, default=Path("runs/mutants.jsonl"))
    parser.add_argument("--again", action="store_true", help="try those again that survived before")
    parser.add_argument("--table", type=Path, nargs="+", help="print what these files found; run nothing")
    given = parser.parse_args()
    if given.table:
        print(table(given.table))
        return
    groups = given.groups.split(",")
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        parser.error(f"--groups: not {', '.join(unknown)}, but among {', '.join(GROUPS)}")
    first, step = map(int, given.share.split("/"))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    kept = given.output.read_text().splitlines() if given.output.exists() else []
    if given.again:
        kept = [line for line in kept if json.loads(line)["caught"]]
        given.output.write_text("".join(f"{line}\n" for line in kept))
    done = [json.loads(line)["mutant"] for line in kept]
    chosen = [m for m in drawn(groups, given.count, given.seed)[first - 1 :: step] if m.key not in done]

    import torch._dynamo  # once for all processes
    import torch.utils.flop_counter

    torch.set_num_threads(1)
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_")]  # editable installations
    with tempfile.TemporaryDirectory() as place:
        folder = copied(Path(place).resolve())
        for group in groups:
            of_group = [mutant for mutant in chosen if mutant.group == group]
            if of_group:
                tried_of(of_group, folder, given.output)
    print(table([given.output]))


if __name__ == "__main__":
    main()
