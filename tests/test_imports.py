"""The import rules in pyproject.toml, which `make test` checks on the code, detect violations."""

import ast
import copy
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
from importlinter.configuration import configure
from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.contracts.layers import LayersContract

configure()
ROOT = Path(__file__).parents[1]
DEFINITIONS = ast.FunctionDef | ast.ClassDef
KINDS = {"layers": LayersContract, "forbidden": ForbiddenContract}
RULES = {
    rule["name"]: rule
    for rule in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}
ONE_WAY, WHICH_BACKEND, LIBRARY = (
    "Imports point one way",
    "Only backends know which backend runs",
    "Only an engine's native form knows the native library",
)
PLANTED = [
    (ONE_WAY, "engines.fourier", "layers.norms"),
    (ONE_WAY, "core.ragged", "backends"),
    (ONE_WAY, "mechanisms.linear", "models.language_model"),
    (ONE_WAY, "workbench.comparison.compare", "reproductions.linear"),
    (WHICH_BACKEND, "mechanisms.linear", "backends"),
    (WHICH_BACKEND, "layers.norms", "backends.operators"),
    (LIBRARY, "engines.attention", "backends.native.library"),
    (LIBRARY, "engines.attention.torch_form", "backends.native.library"),
    (LIBRARY, "layers.linear", "backends.native.machine"),
]


@pytest.fixture(scope="module")
def imports():
    return grimp.build_graph("regard", exclude_type_checking_imports=True)


def kept(rule, graph):
    options = {n: str(v) if isinstance(v, bool) else v for n, v in rule.items() if n not in ("name", "type")}
    contract = KINDS[rule["type"]](rule["name"], {"root_packages": ["regard"]}, options)
    return contract.check(copy.deepcopy(graph), verbose=False).kept  # a check removes ignored imports from the graph


@pytest.mark.parametrize(("rule", "importer", "imported"), PLANTED)
def test_a_planted_import_breaks_its_rule(rule, importer, imported, imports):
    planted = {"importer": f"regard.{importer}", "imported": f"regard.{imported}"}
    assert not imports.direct_import_exists(**planted)
    imports.add_import(**planted, line_number=1, line_contents="planted")
    try:
        assert not kept(RULES[rule], imports)
    finally:
        imports.remove_import(**planted)


def test_every_rule_has_a_planted_violation():
    assert {rule for rule, _, _ in PLANTED} == RULES.keys()


def test_no_module_takes_the_name_of_what_its_package_defines():
    """Importing such a module later would replace the function in its package."""
    taken = []
    for package in (ROOT / "regard").rglob("__init__.py"):
        defined = {node.name for node in ast.parse(package.read_text()).body if isinstance(node, DEFINITIONS)}
        inside = {path.stem for path in package.parent.glob("*.py")}
        taken += [f"{package.parent.name}.{name}" for name in defined & inside]
    assert not taken


def test_commands_and_training_start_without_what_takes_seconds_to_import():
    slow = "{'torch._dynamo', 'sympy', 'transformers', 'timm', 'sklearn', 'matplotlib', 'uvicorn'}"
    code = f"import sys, regard.cli.app, regard.training; print(sorted({slow} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_imported_that_only_tests_install():
    """Shapes in annotations are jaxtyping's, which is imported for type checkers and tests alone."""
    found = [
        f"{path.name}: {name}"
        for path in (ROOT / "regard").rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
        if name.split(".")[0] in {"jaxtyping", "hypothesis", "pytest"}
    ]
    assert not found
