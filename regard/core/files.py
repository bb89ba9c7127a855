"""Atomic replacement of files, checks that a folder can be written, and the folder for what is kept between runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from regard.contract import Unsupported


def check_folder(folder: Path) -> None:
    """Raise Unsupported unless a folder can be written to or created, so that long work does not start in vain."""
    there = next(place for place in (folder, *folder.parents) if place.exists() or place.is_symlink())
    if there.is_symlink() and not there.exists():
        raise Unsupported(f"{folder} as the output, where {there} is a broken link", supported="a folder")
    if not there.is_dir():
        raise Unsupported(f"{folder} as the output, where {there} is a file", supported="a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Unsupported(f"{folder} as the output, which is not writable", supported="a writable folder")


def user_cache() -> Path:
    """The folder of what regard keeps between runs for this user: ``$XDG_CACHE_HOME/regard`` (``~/.cache/regard``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard"


def is_same_place(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same place, which need not exist."""
    return os.path.realpath(one) == os.path.realpath(other)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary_path)`` and atomically move the result to `path`, synced to disk, with the permissions of any
    new file (safetensors would let nobody else read it).

    Raises:
        Unsupported: if it cannot be written, or the disk is full; an older file is then left unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            permissions = temporary.stat().st_mode
            write(temporary)
            if temporary.stat().st_mode != permissions:
                temporary.chmod(permissions)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise Unsupported(
            f"{path}, which cannot be written ({error})", supported="a folder that can be written, on a disk with room"
        ) from error


def write_text_atomically(path: Path, text: str) -> None:
    """Atomically replace a file by UTF-8 text; see :func:`write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
