"""The accuracy of `regard advise` on this machine: its predictions against `regard profile --layer` at other lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.workbench.advice.candidates import able_mechanisms
from regard.workbench.advice.layer_work import LayerSettings
from regard.workbench.advice.probe import probe
from regard.workbench.advice.samples import Cache, Probe, Sample
from regard.workbench.advice.settings import AdviseSettings
from regard.workbench.profile import ProfileSettings, profile

UNSEEN = (96, 320, 768, 1536, 3072)
"""Lengths at which nothing is measured for the predictions."""

SECONDS = 0.5
"""Seconds of timing for each kind of work and length."""

PASSES = ("profiled", "profiled-again")
"""Each measurement that predictions are compared with is made twice, some minutes apart: among hundreds of timings
other programs disturb a few, but rarely the same ones twice."""


@dataclass(frozen=True)
class Errors:
    """Relative errors of the predictions of one quantity.

    `where` is the mechanism and length of the worst error; `inside` is the share of times within their predicted
    interval, None for memory.
    """

    what: str
    of: str
    count: int
    median: float
    worst: float
    where: str
    inside: float | None

    def as_dict(self) -> dict[str, Any]:
        """The errors as plain data."""
        return self.__dict__.copy()


def profiled(
    settings: LayerSettings,
    what: str,
    length: int,
    names: Sequence[str],
    *,
    fresh: bool = False,
    seconds: float = SECONDS,
    section: str = PASSES[0],
) -> dict[str, Sample]:
    """Measure with `regard profile --layer`; results are kept on disk, so an interrupted check resumes."""
    cache = Cache(settings, section=section, fresh=fresh)
    kept = cache.read().get(what, {})
    missing = [name for name in names if length not in kept.get(name, {})]
    if missing:
        found = profile(
            ProfileSettings(
                tuple(missing),
                settings.pattern,
                (length,),
                (what,),
                settings.batch,
                settings.heads,
                settings.head_dim,
                settings.dtype,
                seconds,
                layer=True,
                dim=settings.dim,
                device=settings.device,
                short_convolution=settings.short_convolution,
            )
        )
        samples = {
            m.mechanism: Sample(m.low / 1e3, m.memory_bytes or 0, m.state_bytes or 0, m.backend)
            for m in found.measurements
        }
        cache.add(what, length, samples)
        for name, sample in samples.items():
            kept.setdefault(name, {})[length] = sample
    return {name: kept[name][length] for name in names}


def errors_of(known: Probe, measured: dict[tuple[str, str, int], Sample]) -> list[Errors]:
    """Errors of time and memory, for each kind of work.

    Args:
        measured: samples by kind of work, mechanism and length.
    """
    found = []
    for what in dict.fromkeys(key[0] for key in measured):
        for of in ("seconds", "memory"):
            errors, inside = {}, []
            for (kind, name, length), sample in measured.items():
                curve = known.curve(what, name, of)
                if kind != what or curve is None:
                    continue
                value = sample.seconds if of == "seconds" else float(sample.memory + sample.state)
                errors[f"{name} at {length}"] = abs(curve(length) / value - 1)
                inside.append(abs(math.log(curve(length) / value)) <= known.width(what, name, length))
            if errors:
                worst = max(errors, key=errors.__getitem__)
                median = float(np.median(list(errors.values())))
                told = sum(inside) / len(inside) if of == "seconds" else None
                found.append(Errors(what, of, len(errors), median, errors[worst], worst, told))
    return found


def check(
    settings: AdviseSettings,
    *,
    lengths: Sequence[int] = UNSEEN,
    fresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> list[Errors]:
    """Predict and measure all candidates at lengths that were not used for the predictions.

    Args:
        settings: sizes, candidates and the time for probing; its own lengths do not matter.
        fresh: measure everything again instead of resuming an interrupted check.
        say: called, before anything is measured, with a sentence on what will be.
        on_step: called after each step with its name, its number and the number of steps.
    """
    able, _, layers = able_mechanisms(settings)
    known = probe(
        settings.layer, able, seconds=settings.seconds, always=tuple(able), measure=layers, fresh=fresh, say=say
    )
    steps = [(section, what, length) for section in PASSES for what in able for length in lengths]
    say(f"Profiling all of them at {', '.join(map(str, lengths))} tokens, {len(steps)} steps.")
    measured: dict[tuple[str, str, int], Sample] = {}
    begun = set()
    for i, (section, what, length) in enumerate(steps):
        forget = fresh and section not in begun
        begun.add(section)
        for name, sample in profiled(settings.layer, what, length, able[what], fresh=forget, section=section).items():
            key = what, name, length
            measured[key] = sample.agreeing(measured[key]) if key in measured else sample
        if on_step is not None:
            on_step(f"{what} at {length}", i + 1, len(steps))
    return errors_of(known, measured)
