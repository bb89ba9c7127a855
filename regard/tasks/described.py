"""What a task is and which options it has, read from its class: shown by `regard show` and on a page of the docs."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from regard.tasks.protocol import Task


@dataclass(frozen=True)
class TaskOption:
    """An option of a task, as in ``--task recall:pairs=16``.

    Attributes:
        name: its name.
        default: its value when not given.
        meaning: what it does, in words.
    """

    name: str
    default: object
    meaning: str


def described(task: type[Task]) -> tuple[str, list[TaskOption]]:
    """A task's description without its options, and the options in the order of its signature."""
    meanings: dict[str, str] = {}
    for base in task.__mro__:
        if "__doc__" in vars(base):
            meanings = documented(inspect.getdoc(base) or "", "Args") | meanings
    text = _plain(re.split(r"\n\w+:\n", inspect.getdoc(task) or "", maxsplit=1)[0].strip())
    parameters = inspect.signature(task).parameters.values()
    return text, [TaskOption(p.name, p.default, _plain(meanings.get(p.name, ""))) for p in parameters]


def documented(documentation: str, section: str) -> dict[str, str]:
    """The meaning of each name in a section of a docstring, such as "Args" or "Attributes", each in one line."""
    listed = re.search(rf"\n{section}:\n((?:    .*\n|\n)*)", documentation + "\n")
    found: dict[str, str] = {}
    for names, meaning in re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", listed[1] if listed else "", re.M):
        found |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return found


def _plain(text: str) -> str:
    """Text without the marks of reStructuredText, its paragraphs in one line each."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", text).replace("``", "`").replace("::\n", ":\n")
    return re.sub(r"(?m)(?<=^\S)(.*)\n(?=[^\s-])", r"\1 ", text)
