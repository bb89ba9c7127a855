"""A teacher's answers on disk: each is computed once, by the first run that needs it.

::

    cache = AnswerCache("answers/", teacher)
    taught = Taught(student, teacher, method, task, cache=cache)

This pays where the same items come again, in later epochs or in runs of other students; items that are varied at random
are new each time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from regard.compression.resume import digest
from regard.contract import Unsupported
from regard.core.files import check_folder
from regard.models.weights import weights_digest

FILE = "answers.db"
SECONDS_TO_WAIT = 60
"""How long a process waits while another one writes."""

Tensors = dict[str, Tensor]


class AnswerCache:
    """Tensors that a teacher computed, found by its inputs.

    The folder's file :data:`FILE` is an SQLite table of safetensors. Several teachers and runs may share it: answers are
    told apart by the teacher's class, config and weights.

    Args:
        folder: created if it does not exist.
        teacher: the model whose answers are kept; it must not change afterwards.

    Attributes:
        read: answers that were found so far.
        written: answers that were computed so far.

    Raises:
        Unsupported: for a folder that cannot be written, and a file of something else there.
    """

    def __init__(self, folder: Path | str, teacher: nn.Module) -> None:
        check_folder(Path(folder))
        self.path = Path(folder) / FILE
        described = (repr(teacher), repr(getattr(teacher, "config", None)), weights_digest(teacher))
        self._teacher = digest(described)
        self.read = self.written = 0
        with self._open() as table:
            table.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, tensors BLOB NOT NULL)")

    def answers(
        self,
        inputs: Sequence[object],
        compute: Callable[[list[int]], Sequence[Tensors]],
        device: torch.device | str = "cpu",
    ) -> list[Tensors]:
        """The teacher's answers to some inputs.

        Args:
            inputs: tensors, or mappings, sequences and dataclasses with tensors, whose values identify an answer.
            compute: called with the indices of the inputs that are not in the cache, at most once.
            device: where the returned tensors are.

        Returns:
            Of each input, tensors by name, as `compute` returned them.
        """
        keys = [digest((self._teacher, one)) for one in inputs]
        with self._open() as table:
            find = "SELECT tensors FROM answers WHERE key = ?"
            blobs = [table.execute(find, (key,)).fetchone() for key in keys]
            found = [None if blob is None else {n: x.to(device) for n, x in load(blob[0]).items()} for blob in blobs]
        missing = [number for number, one in enumerate(found) if one is None]
        if missing:
            made = dict(zip(missing, compute(missing), strict=True))
            rows = [(keys[i], save({n: x.cpu().contiguous() for n, x in one.items()})) for i, one in made.items()]
            with self._open() as table:
                table.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
            self.written += len(missing)
        self.read += len(keys) - len(missing)
        return [made[number] if one is None else one for number, one in enumerate(found)]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection, whose changes are committed together."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=SECONDS_TO_WAIT)) as table, table:
                yield table
        except (OSError, sqlite3.Error, SafetensorError) as error:
            raise Unsupported(
                f"{self.path} for a teacher's answers ({error})",
                supported="a folder that can be written, on a disk with room",
            ) from error
