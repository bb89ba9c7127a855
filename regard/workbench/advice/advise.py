"""`regard advise`: which mechanism will be fastest and smallest, before anything is trained.

Among the mechanisms that meet the needs (:mod:`regard.workbench.advice.needs`) and fit in memory, time decides: whole
layers are timed on this machine, at the lengths and for the use that were asked for. Measurements at shorter lengths
show which mechanisms are worth timing there (:mod:`regard.workbench.advice.probe`); everything else in the answer is
predicted (:mod:`regard.workbench.advice.prediction`). Quality is known only from stored results of `regard compare`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from regard.workbench.advice.answer import Advice, answer
from regard.workbench.advice.candidates import able_mechanisms, findings_of, likely
from regard.workbench.advice.probe import probe
from regard.workbench.advice.quality import Quality, read_quality
from regard.workbench.advice.ranking import Ranking
from regard.workbench.advice.samples import Measure
from regard.workbench.advice.settings import AdviseSettings


def advise(
    settings: AdviseSettings | None = None,
    *,
    results: str | Path | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
    on_sample: Callable[[str, int, int, int], None] | None = None,
    measure: Measure | None = None,
    **options: Any,
) -> Advice:
    """Answer a question; what is not known yet is measured first, for about ``settings.seconds``.

    Args:
        settings: the question, or its fields as keywords: ``advise(lengths=4096, use="train", needs="recall")``.
        results: output folder of a comparison, used to judge quality.
        fresh: ignore cached measurements.
        say: called, before anything is measured, with a sentence on what will be.
        on_sample: called after each group of measurements (see :func:`regard.workbench.advice.probe.probe`).
        measure: replaces the measurement of layers, in tests.

    Raises:
        Unsupported: for values that cannot be honoured.
    """
    settings = AdviseSettings(**options) if settings is None else settings
    quality = Quality() if results is None else read_quality(results)
    able, rejected, layers = able_mechanisms(settings)
    findings = findings_of(settings, able[settings.deciding], quality)
    known = probe(
        settings.layer,
        able,
        seconds=settings.seconds,
        asked=settings.lengths,
        likely=likely(settings, findings, quality),
        cap=settings.memory,
        measure=measure or layers,
        fresh=fresh,
        say=say,
        on_sample=on_sample,
    )
    return answer(Ranking(settings, known, able, rejected, quality, findings))
