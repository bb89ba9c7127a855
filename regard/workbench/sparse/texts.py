"""Texts that a model goes on with."""

from __future__ import annotations

from pathlib import Path

from regard.contract import Unsupported
from regard.tasks.documents import Paths
from regard.tasks.long_context.questions import paragraphs
from regard.tasks.long_context.samples import draws
from regard.workbench.sparse.readers import Reader

TEXT = "text"
"""A tenth task: the next tokens of a text, after as much of it as fits."""


class Continuation:
    """The next tokens of a text, each after those before it: the share that is predicted right.

    Args:
        reader: whose tokens they are.
        data: the text; Python's language reference when None.
        continued: how many tokens follow a prompt.
    """

    name = TEXT

    def __init__(self, reader: Reader, data: Paths | None, continued: int) -> None:
        paths = None if data is None else [data] if isinstance(data, str | Path) else data
        given = None if paths is None else tuple(map(str, paths))
        self.continued = continued
        self.ids = reader.encode("\n\n".join(paragraphs(given, 20, 10**6)))

    def sample(self, number: int, length: int) -> tuple[list[int], list[int]]:
        """Tokens of a prompt, and those that follow: `length` together."""
        room, continued = len(self.ids) - length, self.continued
        if room < continued:
            raise Unsupported(
                f"a text of {len(self.ids)} tokens for {length}",
                supported="a text that is longer",
                nearest="more --data",
            )
        start = draws(number, TEXT).randrange(room - continued + 1)
        end = start + length
        return self.ids[start : end - continued], self.ids[end - continued : end]
