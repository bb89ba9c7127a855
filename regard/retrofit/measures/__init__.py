"""What is measured of a retrofit beside the original, for each kind of model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from regard.retrofit.folder import Folder
from regard.retrofit.hosts import Host
from regard.retrofit.measures import encoder, language, vision
from regard.retrofit.measures.shared import MODELS, ORIGINAL, RETROFIT, Loss, Row, change
from regard.retrofit.settings import RetrofitSettings
from regard.retrofit.stage import Progress, Watch


class Measures(Protocol):
    """The figures of a kind of model."""

    def parts(
        self, host: Any, student: Any, data: Any, settings: RetrofitSettings, windows: int
    ) -> dict[str, Callable[[], Any]]:
        """What is measured, by name, each part by itself; `windows` blocks or batches of each source, at most."""

    def results(
        self, host: Any, student: Any, data: Any, settings: RetrofitSettings, found: Mapping[str, Any]
    ) -> dict[str, Any]:
        """All figures, of the parts that were measured."""

    def rows(self, results: Mapping[str, Any]) -> list[Row]:
        """The figures in words: what, of the original, of the retrofit."""

    def loss(self, results: Mapping[str, Any]) -> Loss:
        """What retrofits of one model are compared by, on the source that decides: the last, which is another where there is
        one."""

    def recommend(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Whether to take the retrofit: ``take`` (bool), ``text`` (a sentence), ``notes``."""


KINDS = cast(dict[str, Measures], {"language": language, "encoder": encoder, "vision": vision})


def kind_of(record: Mapping[str, Any]) -> str:
    """The kind of a record's model; records of earlier versions are of language models."""
    return record.get("kind", "language")


def measures_of(record: Mapping[str, Any]) -> Measures:
    """The measures of a record's kind."""
    return KINDS[kind_of(record)]


def evaluate(
    host: Host,
    student: Any,
    data: Any,
    settings: RetrofitSettings,
    windows: int,
    folder: Folder,
    watch: Watch,
) -> dict[str, Any]:
    """All figures, each made once: what is in the folder is not measured again.

    Args:
        windows: blocks (or batches of images) of each source, at most.
    """
    measures = KINDS[host.kind]
    parts = measures.parts(host, student, data, settings, windows)
    found: dict[str, Any] = folder.read("evaluation") or {}
    started, begun = time.monotonic(), len(found)
    for name, measure in parts.items():
        if name not in found:
            found[name] = measure()
            folder.write("evaluation", found)
            pace = (time.monotonic() - started) / (len(found) - begun)
            watch(Progress(f"evaluation: {name}", math.nan, len(found), len(parts), (len(parts) - len(found)) * pace))
    return measures.results(host, student, data, settings, found)


__all__ = [
    "KINDS",
    "MODELS",
    "ORIGINAL",
    "RETROFIT",
    "Loss",
    "Measures",
    "Row",
    "change",
    "evaluate",
    "kind_of",
    "measures_of",
]
