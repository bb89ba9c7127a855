"""The comparison of a retrofit with the original, for each kind of model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from regard.retrofit.folder import Folder
from regard.retrofit.hosts import Host
from regard.retrofit.measures import encoder, language, vision
from regard.retrofit.measures.shared import MODELS, ORIGINAL, RETROFIT, Loss, Row, change
from regard.retrofit.pace import Plan
from regard.retrofit.settings import RetrofitSettings
from regard.retrofit.stage import Progress, Watch


class Measures(Protocol):
    """The measurements for one kind of model."""

    def parts(
        self, host: Any, student: Any, data: Any, settings: RetrofitSettings, plan: Plan
    ) -> dict[str, Callable[[], Any]]:
        """The measurements by name, each independent; of as many blocks, batches or texts as the plan says."""

    def results(
        self, host: Any, student: Any, data: Any, settings: RetrofitSettings, found: Mapping[str, Any]
    ) -> dict[str, Any]:
        """All figures, from the results of the parts."""

    def rows(self, results: Mapping[str, Any]) -> list[Row]:
        """Table rows of the figures: a label, the original's value, the retrofit's value."""

    def loss(self, results: Mapping[str, Any]) -> Loss:
        """The loss by which retrofits of one model are compared, on the deciding source: the last, which is another
        source if there is one."""

    def recommend(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The recommendation for or against the retrofit: ``take`` (bool), ``text`` (a sentence or two), ``notes``."""


KINDS = cast(dict[str, Measures], {"language": language, "encoder": encoder, "vision": vision})


def kind_of(record: Mapping[str, Any]) -> str:
    """The kind of a record's model; records of earlier versions are about language models."""
    return record.get("kind", "language")


def measures_of(record: Mapping[str, Any]) -> Measures:
    """The measurements for a record's kind of model."""
    return KINDS[kind_of(record)]


def evaluate(
    host: Host,
    student: Any,
    data: Any,
    settings: RetrofitSettings,
    plan: Plan,
    folder: Folder,
    watch: Watch,
) -> dict[str, Any]:
    """All figures, each measured once: results in the folder are reused."""
    measures = KINDS[host.kind]
    parts = measures.parts(host, student, data, settings, plan)
    known: dict[str, Any] = folder.read("evaluation") or {}
    found = {name: known[name] for name in parts if name in known}  # earlier versions measured others too
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
