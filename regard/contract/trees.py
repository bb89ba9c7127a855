"""What makes dataclasses nodes that torch exports, saves and loads."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import GetAttrKey, register_pytree_node


def register_pytree(cls: type, constants: Mapping[str, Callable[[Any], Any]] | None = None) -> None:
    """Make a dataclass a node of `torch.utils._pytree`, so that `torch.export` takes and returns it, saves and loads it.

    Args:
        constants: fields that belong to the structure, not to the data, each with what makes its value of the list,
            number or None that a saved program has in its place.
    """
    fixed = constants or {}

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        held = [(GetAttrKey(f.name), getattr(value, f.name)) for f in dataclasses.fields(cls) if f.name not in fixed]
        return held, tuple(getattr(value, name) for name in fixed)

    def flatten(value: Any) -> tuple[list[Any], Any]:
        held, structure = flatten_with_keys(value)
        return [data for _, data in held], structure

    def unflatten(data: Iterable[Any], structure: Any) -> Any:
        value: Any = object.__new__(cls)  # what torch puts in the place of tensors would not pass the checks of a call
        names = [f.name for f in dataclasses.fields(cls) if f.name not in fixed]
        for name, held in (*zip(names, data, strict=True), *zip(fixed, structure, strict=True)):
            object.__setattr__(value, name, held)
        return value

    def dump(structure: Any) -> str:
        return json.dumps([sorted(x) if isinstance(x, frozenset) else x for x in structure])

    def load(text: Any) -> Any:
        return tuple(x if x is None else make(x) for make, x in zip(fixed.values(), json.loads(text), strict=True))

    # the name by which callers import it, under which programs are saved
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
