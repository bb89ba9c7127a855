"""The folder of a retrofit: its identity, its progress, and the results of its parts; files are replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regard.contract import Unsupported
from regard.core.files import check_folder, write_text_atomically

WORK, RECORD, LOCK = ".retrofit", "retrofit.json", "lock"
"""The subfolder for checkpoints and results of parts, the file with the final record, and the lock file that a process
holds while it works."""


class Folder:
    """The output folder of one retrofit.

    Args:
        path: the folder; nothing is written before :meth:`alone`.
        identity: everything that the retrofit depends on, as JSON.

    Raises:
        Unsupported: for a folder that holds something else, such as another retrofit.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.work = path, path / WORK
        self.identity = json.loads(json.dumps(identity))
        self._check()

    def _check(self) -> None:
        path, identity = self.path, self.identity
        check_folder(path)
        known = self.read("identity")
        if known is None and path.is_dir() and any(path.iterdir()):
            raise Unsupported(
                f"{path}, which holds other files, as the output of a retrofit", supported="a new or empty folder"
            )
        if known is not None and known != identity:
            differing = [name for name in {**known, **identity} if known.get(name) != identity.get(name)]
            told = "; ".join(f"{name} {known.get(name)!r}, now {identity.get(name)!r}" for name in differing)
            raise Unsupported(
                f"{path}, which holds another retrofit ({told})", supported="the same settings, or a new folder"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make the folder if it is new, and lock it within the context against other processes; the lock of a killed
        process is released.

        Raises:
            Unsupported: if another process holds the lock, or has put something else into the folder.
        """
        self._check()
        if self.read("identity") is None:
            self.write("identity", self.identity)
        try:
            import fcntl
        except ImportError:  # on Windows
            yield
            return
        with open(self.work / LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Unsupported(
                    f"{self.path}, in which another process is at work", supported="one at a time"
                ) from None
            yield

    def read(self, name: str) -> Any:
        """Read the result of a part; None if there is none yet."""
        try:
            return json.loads((self.work / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write(self, name: str, value: Any) -> None:
        """Save the result of a part, replacing an older one atomically."""
        text = json.dumps(value, indent=1, ensure_ascii=False)
        write_text_atomically(self.work / f"{name}.json", text)

    def checkpoint(self, name: str) -> Path:
        """Path of the checkpoint of a training stage."""
        return self.work / f"{name}.safetensors"

    def discard_empty(self) -> None:
        """Remove the folder with its identity and plan if nothing was trained in it."""
        files = list(self.work.iterdir())
        if {file.name for file in files} <= {"identity.json", "plan.json", LOCK}:
            for file in files:
                file.unlink()
            self.work.rmdir()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    @staticmethod
    def finished(path: Path) -> Any:
        """The record of a finished retrofit in a folder; None if there is none."""
        try:
            return json.loads((path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
