"""Registration of dataclasses as pytrees that torch can export, save and load."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import GetAttrKey, register_pytree_node


def register_pytree(cls: type, constants: Mapping[str, Callable[[Any], Any]] | None = None) -> None:
    """Register a dataclass as a pytree node, so that `torch.export` can accept, return, save and load it.

    Args:
        constants: fields that belong to the tree's structure rather than its data. Each comes with a function that
            restores its value from the list, number or None that a saved program holds instead.
    """
    fixed = constants or {}

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        held = [(GetAttrKey(f.name), getattr(value, f.name)) for f in dataclasses.fields(cls) if f.name not in fixed]
        return held, tuple(getattr(value, name) for name in fixed)

    def flatten(value: Any) -> tuple[list[Any], Any]:
        held, structure = flatten_with_keys(value)
        return [data for _, data in held], structure

    def unflatten(data: Iterable[Any], structure: Any) -> Any:
        value: Any = object.__new__(cls)  # skips __init__, whose checks torch's placeholders for tensors would fail
        names = [f.name for f in dataclasses.fields(cls) if f.name not in fixed]
        for name, held in (*zip(names, data, strict=True), *zip(fixed, structure, strict=True)):
            object.__setattr__(value, name, held)
        return value

    def dump(structure: Any) -> str:
        return json.dumps([sorted(x) if isinstance(x, frozenset) else x for x in structure])

    def load(text: Any) -> Any:
        return tuple(x if x is None else make(x) for make, x in zip(fixed.values(), json.loads(text), strict=True))

    # programs are saved under the name by which callers import the class
    name = f"{re.sub(r'^regard[.]contract[.].*', 'regard.contract', cls.__module__)}.{cls.__qualname__}"
    register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=name,
        to_dumpable_context=dump,
        from_dumpable_context=load,
        flatten_with_keys_fn=flatten_with_keys,
    )
    torch.serialization.add_safe_globals(
        [cls, (cls, name), *(made for made in fixed.values() if isinstance(made, type))]
    )
