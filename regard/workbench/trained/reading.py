"""Check of the input files of a trained model before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regard.contract import Unsupported
from regard.tasks.images import ImageReader
from regard.tasks.segmentation_3d import VolumeReader


def readable(reader: ImageReader | VolumeReader, paths: Sequence[Path], skipped: list[str] | None) -> list[Path]:
    """The files that a model can read; the problems with the other files are appended to `skipped`.

    Raises:
        Unsupported: for a file that cannot be read if `skipped` is None; and if none can be read.
    """
    kept = []
    for path in paths:
        try:
            if isinstance(reader, VolumeReader):
                reader.read(path)
            else:
                reader.read([path])
        except Unsupported as error:
            if skipped is None:
                raise
            skipped.append(error.asked)
        else:
            kept.append(path)
    if not kept:
        raise Unsupported("files of which none can be read", supported="one file or more")
    return kept
