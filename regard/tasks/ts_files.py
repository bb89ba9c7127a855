"""Labelled series in the file format of the UEA and UCR archives (``.ts``), including sktime's packaged data sets.

Lines that begin with @ describe the file, lines that begin with # are comments. After ``@data`` each line is a series:
its channels, separated by colons, each with values separated by commas (? where one is missing), and its class last.

sktime (BSD-3) has some data sets of these archives in its package, which is read in place and not imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regard.contract import Unsupported
from regard.measurement.units import counted
from regard.tasks.documents import nearest_path, printable
from regard.tasks.packaged import package_folder

if TYPE_CHECKING:
    from jaxtyping import Float

SKTIME = "pip install --no-deps sktime"
SETS = (
    "JapaneseVowels",
    "BasicMotions",
    "ItalyPowerDemand",
    "GunPoint",
    "ArrowHead",
    "OSULeaf",
    "ACSF1",
    "PLAID",
)
"""Data sets in sktime's package, with their own split."""


@dataclass(frozen=True)
class Measured:
    """A series: its values (n, channels), nan where one is missing, and its class."""

    values: Float[np.ndarray, "n c"]
    label: str


def read_set(name: str, asked: str) -> tuple[list[Measured], list[Measured]]:
    """Training and test series of one of `SETS`; raises Unsupported, saying how to install the package, if it is
    missing."""
    folder = package_folder("sktime", asked, SKTIME) / "datasets" / "data" / name
    training, test = (read_ts(folder / f"{name}_{part}.ts") for part in ("TRAIN", "TEST"))
    return training, test


def is_series_file(path: Path) -> bool:
    """Return whether a ``.ts`` file, which could also be TypeScript, begins like those of the archives."""
    if path.suffix.lower() != ".ts" or not path.is_file():
        return False
    with path.open("rb") as file:
        lines = file.read(1 << 16).lower().splitlines()
    return any(line.strip().startswith((b"@problemname", b"@classlabel")) for line in lines)


def read_ts(path: Path) -> list[Measured]:
    """Read the series of a file.

    Raises:
        Unsupported: for files in another format, naming the line, and for series with timestamps, without classes or
            with channels of unequal length.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise Unsupported(
            f"{path}, which does not exist", supported="a .ts file of series with classes", nearest=nearest_path(path)
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise Unsupported(f"{path}, which cannot be read ({error})", supported="a .ts file in UTF-8") from None
    classes: set[str] | None = None
    series: list[Measured] = []
    begun = False
    for number, line in enumerate(text.splitlines(), 1):
        line, place = line.strip(), f"{path.name}, line {number}"
        if not line or line.startswith("#"):
            continue
        if begun:
            series.append(_series(line, place))
            if classes is not None and series[-1].label not in classes:
                raise Unsupported(
                    f"{place}, with the class {printable(series[-1].label[:40])}",
                    supported="the classes that @classLabel names: " + printable(", ".join(sorted(classes))),
                )
            if series[-1].values.shape[1] != series[0].values.shape[1]:
                raise Unsupported(
                    f"{place}, with {counted(series[-1].values.shape[1], 'channel')}",
                    supported=f"{series[0].values.shape[1]}, as the first series has",
                )
            continue
        tag, *words = line.split()
        if not tag.startswith("@"):
            raise Unsupported(
                f"{place}, before @data: {printable(line[:40])!r}", supported="lines that begin with @ or #"
            )
        tag = tag.lower()
        if tag == "@timestamps" and words[:1] == ["true"]:
            raise Unsupported(f"{place}: series with times", supported="values at equal intervals (@timeStamps false)")
        if tag == "@targetlabel" or (tag == "@classlabel" and words[:1] != ["true"]):
            raise Unsupported(f"{place}: series without classes", supported="@classLabel true, and the classes")
        if tag == "@classlabel":
            classes = set(words[1:])
        begun = tag == "@data"
    if not series:
        raise Unsupported(f"{path.name} without series", supported="a .ts file with series after @data")
    return series


def _series(line: str, place: str) -> Measured:
    *channels, label = (part.strip() for part in line.split(":"))
    if not channels or not label:
        raise Unsupported(f"{place}, without a class", supported="channels with colons between them, and a class last")
    values = [_values(channel, place) for channel in channels]
    lengths = {len(channel) for channel in values}
    if len(lengths) > 1:
        raise Unsupported(
            f"{place}, with channels of {min(lengths)} to {max(lengths)} values", supported="channels of equal length"
        )
    return Measured(np.stack(values, 1), label)


def _values(channel: str, place: str) -> Float[np.ndarray, " n"]:
    cells = channel.replace("?", "nan").split(",")
    try:
        found = np.array(cells, dtype=np.float64)
    except ValueError:
        found = np.empty(0)
    if not len(found) or np.isinf(found).any():
        wrong = next((cell for cell in cells if not _is_number(cell)), "")
        raise Unsupported(
            f"{place}: {printable(wrong.strip()[:40])!r}", supported="numbers, and ? where one is missing"
        )
    return found


def _is_number(cell: str) -> bool:
    try:
        return not np.isinf(float(cell))
    except ValueError:
        return False
