"""The templates of pages, and their number formats."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from regard.measurement import units
from regard.version import VERSION
from regard.workbench.reports.markers import COLOURS
from regard.workbench.reports.scales import Formatter, is_number


@functools.cache
def pages(*folders: Path) -> Environment:
    """The template environment: report templates with their style, and other folders; compiled once per process."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent / "templates"]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "score": or_dash("{:.4g}".format),
        "count": or_dash(units.count),
        "bytes": or_dash(units.size),
        "milliseconds": or_dash(units.milliseconds),
        "duration": or_dash(units.duration),
        "tick": or_dash(units.tick),
        "words": in_words,
        "sortable": lambda value: value if is_number(value) else "",
    }
    environment.globals |= {"colours": range(COLOURS), "version": VERSION}
    return environment


def in_words(command: str) -> Markup:
    """HTML of a command that breaks between its words; a word breaks only if it is longer than the line."""
    return Markup(" ").join(Markup('<span class="word">{}</span>').format(word) for word in command.split(" "))


def or_dash(form: Formatter) -> Any:
    """A filter that formats a number with `form`, and anything else as a dash."""
    return lambda value: form(value) if is_number(value) else "—"
