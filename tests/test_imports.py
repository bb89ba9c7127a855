"""The rules of imports in pyproject.toml, which `make test` checks on the code, find what would break them."""

import ast
import copy
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
PLANTED = [
    ("Imports point one way", "regard.engines.fourier", "regard.layers.norms"),
    ("Imports point one way", "regard.core.ragged", "regard.backends"),
    ("Imports point one way", "regard.mechanisms.linear", "regard.models.language_model"),
    ("Imports point one way", "regard.compression.quantization", "regard.workbench.compare"),
    ("Imports point one way", "regard.workbench.compare", "regard.reproductions.linear"),
    ("Imports point one way", "regard.workbench.compare", "regard.cli.console"),
    ("Only backends know which backend runs", "regard.mechanisms.linear", "regard.backends"),
    ("Only backends know which backend runs", "regard.layers.norms", "regard.backends.operators"),
    (
        "Only an engine's native form knows the native library",
        "regard.engines.attention",
        "regard.backends.native.library",
    ),
    (
        "Only an engine's native form knows the native library",
        "regard.engines.attention.torch_form",
        "regard.backends.native.library",
    ),
    ("Only an engine's native form knows the native library", "regard.layers.linear", "regard.backends.native.machine"),
]


@pytest.fixture(scope="module")
def imports():
    return grimp.build_graph("regard", exclude_type_checking_imports=True)


def kept(rule, graph):
    options = {n: str(v) if isinstance(v, bool) else v for n, v in rule.items() if n not in ("name", "type")}
    contract = KINDS[rule["type"]](rule["name"], {"root_packages": ["regard"]}, options)
    return contract.check(copy.deepcopy(graph), verbose=False).kept  # a check takes ignored imports out


@pytest.mark.parametrize(("rule", "importer", "imported"), PLANTED)
def test_a_planted_import_breaks_its_rule(rule, importer, imported, imports):
    assert not imports.direct_import_exists(importer=importer, imported=imported)
    imports.add_import(importer=importer, imported=imported, line_number=1, line_contents="planted")
    try:
        assert not kept(RULES[rule], imports)
    finally:
        imports.remove_import(importer=importer, imported=imported)


def test_every_rule_has_a_planted_violation():
    assert {rule for rule, _, _ in PLANTED} == RULES.keys()


def test_no_module_takes_the_name_of_what_its_package_defines():
    """Importing it later would put the module in the place of the function."""
    taken = []
    for package in (ROOT / "regard").rglob("__init__.py"):
        defined = {node.name for node in ast.parse(package.read_text()).body if isinstance(node, DEFINITIONS)}
        inside = {path.stem for path in package.parent.glob("*.py")}
        taken += [f"{package.parent.name}.{name}" for name in defined & inside]
    assert not taken
