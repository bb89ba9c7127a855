"""The user's data for tasks of the benchmark, written as ``LM=novel.txt`` or ``LSTF=load.csv,target=load``."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.contract import Unsupported, closest, read_options
from regard.tasks.documents import nearest_path, walk


@dataclass(frozen=True)
class Reader:
    """What a task of the benchmark reads.

    Attributes:
        holds: what its data are, in words.
        options: options of the task in :mod:`regard.tasks` that say how the data are read.
    """

    holds: str
    options: tuple[str, ...] = ()


_TEXT = Reader("a text file, a folder of them, or JSON lines", ("field",))
READERS: dict[str, Reader] = {
    "LM": _TEXT,
    "MLM": _TEXT,
    "LSTF": Reader(
        "a table with times and numbers", ("target", "time", "covariates", "past_covariates", "groups", "season")
    ),
    "SR": Reader("a folder of photos"),
    "Sum": Reader("a table with two texts in a row", ("source", "target")),
    "PCC": Reader("a folder of meshes"),
    "TTS": Reader("a folder of recordings named 7_ann_0.wav"),
}
"""What each task reads; its reader in :mod:`regard.tasks` says more."""


@dataclass(frozen=True)
class OwnData:
    """The user's data for a task.

    Attributes:
        task: a name of `READERS`.
        path: a file or folder.
        options: options that say how the data are read.
    """

    task: str
    path: str
    options: Mapping[str, Any]

    @classmethod
    def read(cls, given: str) -> OwnData:
        """Read what the user wrote: TASK=PATH, and options after commas.

        Raises:
            Unsupported: for an unknown task or option, and for a path that does not exist.
        """
        task, _, rest = given.partition("=")
        if task not in READERS:
            near = closest(task, READERS)
            raise Unsupported(
                f"data for {task!r}",
                supported=f"{', '.join(READERS)}, as LM=novel.txt",
                nearest=f"{near}={rest}" if near else "",
            )
        path, _, written = (rest, "", "") if rest and Path(rest).exists() else rest.partition(",")
        reader = READERS[task]
        if not path or not Path(path).exists():
            near = nearest_path(Path(path)) if path else ""
            raise Unsupported(
                f"{task}={path}, which does not exist" if path else f"{task}= without a path",
                supported=reader.holds,
                nearest=f"{task}={near}" if near else "",
            )
        options = read_options(written, task, before=f"{task}={path},")
        for option in options:
            if option not in reader.options:
                raise Unsupported(
                    f"option {option!r} of data for {task}",
                    supported=", ".join(reader.options) or "none",
                    nearest=closest(option, reader.options),
                )
        return cls(task, path, options)

    def setting(self) -> dict[str, Any]:
        """What a cell depends on: path, options, and a digest of the content of all files.

        Raises:
            Unsupported: for a file that cannot be read.
        """
        return {"path": self.path, "options": dict(self.options), "digest": digest(Path(self.path))}

    def refused(self, error: Unsupported, preset: str) -> Unsupported:
        """The error of the task's reader, which names the data. Sizes are the preset's, so none is suggested."""
        option = re.match(r"(\w+)=", error.nearest)
        if option is not None and option[1] not in READERS[self.task].options:
            return Unsupported(
                f"{self.task}={self.path} in the preset {preset}: {error.asked}",
                supported="data that suit the sizes of the preset, or another preset",
            )
        return Unsupported(f"{self.task}={self.path}: {error.asked}", supported=error.supported, nearest=error.nearest)


def own_data(given: Sequence[str]) -> dict[str, OwnData]:
    """The data for tasks among what the user gave, by task.

    Raises:
        Unsupported: for a task given twice, and as :meth:`OwnData.read` does.
    """
    found: dict[str, OwnData] = {}
    for one in given:
        if not _is_data(one):
            continue
        data = OwnData.read(one)
        if data.task in found:
            raise Unsupported(f"data for {data.task} given twice", supported="one file or folder for each task")
        found[data.task] = data
    return found


def score_files(given: Sequence[str]) -> list[str]:
    """The files of scores among what the user gave: all that is not data for a task."""
    return [one for one in given if not _is_data(one)]


def _is_data(given: str) -> bool:
    return "=" in given and not Path(given).exists()


def digest(path: Path) -> str:
    """A digest of a file's content, or of the names and contents of all files of a folder."""
    found = hashlib.blake2b(digest_size=16)
    for file in walk(path)[0] if path.is_dir() else [path]:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise Unsupported(f"{file}, which cannot be read ({error.strerror})", supported="readable files") from None
        found.update(os.fsencode(file.relative_to(path)) + b"\0" + str(len(content)).encode() + b"\0")
        found.update(content)
    return found.hexdigest()
