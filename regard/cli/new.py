"""`regard new`: the file in which a new mechanism starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from regard.cli.console import console


def new(
    name: Annotated[str, typer.Argument(help="Name of the mechanism: lower-case letters, digits and underscores.")],
    output: Annotated[Path, typer.Option(help="Folder to write the file to.")] = Path(),
) -> None:
    """Start a mechanism: write a file with its card and a definition that fails until you write it.

    Examples:

    \b
        regard new my_mechanism
        regard verify --plugin my_mechanism.py my_mechanism
    """
    from regard.workbench.scaffold import new_mechanism

    path = new_mechanism(name, output)
    console.print(Text(f"{path} is written. Next:"))
    console.print(Text("- write `reference`, the definition, and the lines of the docstring"))
    console.print(Text(f"- regard verify --plugin {path} {name}"), soft_wrap=True)
    console.print(Text(f"- regard compare --plugin {path} --mechanisms softmax,{name}"), soft_wrap=True)
