"""Texts for a model to continue."""

from __future__ import annotations

from pathlib import Path

from regard.contract import Unsupported
from regard.tasks.documents import Paths
from regard.tasks.long_context.questions import paragraphs
from regard.tasks.long_context.samples import draws
from regard.workbench.sparse.readers import Reader

TEXT = "text"
"""Name of an additional task: the next tokens of a text, after as much of it as fits."""


class Continuation:
    """The next tokens of a text, each given those before it; scored by the share predicted correctly.

    Args:
        reader: the reader whose tokens are used.
        data: the text; Python's language reference when None.
        continued: number of tokens that follow the prompt.
    """

    name = TEXT

    def __init__(self, reader: Reader, data: Paths | None, continued: int) -> None:
        paths = None if data is None else [data] if isinstance(data, str | Path) else data
        given = None if paths is None else tuple(map(str, paths))
        self.continued = continued
        self.ids = reader.encode("\n\n".join(paragraphs(given, 20, 10**6)))

    def sample(self, number: int, length: int) -> tuple[list[int], list[int]]:
        """The prompt's tokens and those that follow; `length` tokens together."""
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
