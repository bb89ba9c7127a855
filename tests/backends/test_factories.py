"""How backends and engines create tensors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import regard

FACTORIES = {made.__name__ for made in _device_constructors()}
INTEGERS = {"arange", "randint"}
"""Factories that return 64-bit integers, whatever the default dtype."""


def careless(source: str) -> Iterator[str]:
    """Yield calls that leave a new tensor's device or dtype to a default that users may change."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        module, name = ast.unparse(node.func.value), node.func.attr
        if module in ("torch", "pytorch") and name in FACTORIES:
            needed = {"device"} if name in INTEGERS else {"device", "dtype"}
            if not needed <= {keyword.arg for keyword in node.keywords}:
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("folder", ["backends", "engines"])
def test_every_new_tensor_names_its_device_and_dtype(folder):
    found = []
    for path in sorted((Path(regard.__file__).parent / folder).rglob("*.py")):
        found += [f"{path.name}, {call}" for call in careless(path.read_text())]
    assert not found, found
    assert list(careless("torch.zeros(3, device=x.device)\ntorch.arange(n, device=d)\nx.new_zeros(3)")) == [
        "line 1: torch.zeros(3, device=x.device)"
    ]


def test_addresses_of_tensors_are_taken_in_one_place():
    folder = Path(regard.__file__).parent / "backends/native"
    assert [path.name for path in folder.glob("*.py") if ".data_ptr(" in path.read_text()] == ["library.py"]
