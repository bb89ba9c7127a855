"""Writes regard/functional.pyi, which tells editors and type checkers about the functions generated from the catalogue.

    python docs/stubs.py

A test fails when the file is out of date.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from regard import functional
from regard.catalogue import get_mechanism, list_mechanisms
from regard.functional import function_name

PATH = Path(__file__).parent.parent / "regard" / "functional.pyi"
TYPES = {
    "pattern": "str | Pattern",
    "mask": "Mask | None",
    "memory_mask": "Mask | None",
    "state": "State | None",
    "return_state": "bool",
    "scale": "float | None",
    "chunk_size": "int | None",
    "backend": "str | None",
    "form": "str | None",
    "bias": "Tensor | None",
    "dropout": "float | None",
    "generator": "torch.Generator | None",
    "grid": "tuple[int, ...] | None",
    "roles": "Tensor | None",
    "training": "bool | None",
    "progress": "float | None",
    "want": "frozenset[str] | None",
}
"""Types of the arguments that all functions share; a mechanism's options have the type of their default."""

HEAD = '''"""Written by docs/stubs.py from the catalogue; see functional.py."""

from typing import Any

import torch
from torch import Tensor

from regard.apply import apply as apply
from regard.contract import Mask, Mechanism, Pattern, State

def function_name(card: Mechanism) -> str: ...
'''


def text() -> str:
    """The stub file."""
    parts = []
    for name in list_mechanisms():
        card = get_mechanism(name)
        function = getattr(functional, function_name(card))
        fields = card.config.__dataclass_fields__  # type: ignore[attr-defined]
        parameters, starred = [], False
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
                parameters, starred = [*parameters, "*"], True
            own = parameter.name in fields and parameter.name not in TYPES
            annotation = parameter.annotation if not starred else _option(fields[parameter.name]) if own else None
            annotation = annotation or TYPES.get(parameter.name, "Any")
            default = "" if parameter.default is inspect.Parameter.empty else " = ..."
            parameters.append(f"{parameter.name}: {annotation}{default}")
        lines = "".join(f"    {parameter},\n" for parameter in parameters)
        parts.append(f'def {function_name(card)}(\n{lines}) -> Any:\n    """{card.summary}"""\n')
    return HEAD + "\n".join(parts)


def _option(field: Any) -> str:
    """The type of an option if it is a common one, else Any."""
    known = {"bool", "int", "float", "str", "int | None", "float | None", "str | None", "bool | None"}
    said = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "Any")
    return said if said in known else "Any"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
    print(f"{PATH} is written")
