"""Short measurements of layers, kept on disk, and the predictions that `regard advise` makes from them.

Measurements are kept in ``$XDG_CACHE_HOME/regard/probes/`` (``~/.cache`` if the variable is not set), one file for each
machine, version, number of threads and layer size. Each is written as soon as it is made, so an interrupted probe
resumes; an unreadable file counts as empty.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from regard.backends.native import library
from regard.catalogue import get_mechanism, plugin_code
from regard.contract import Unsupported
from regard.core.files import user_cache, write_text_atomically
from regard.measurement import provenance
from regard.measurement.timing import Timing, calm_clock, rounds
from regard.workbench.advice.layer_work import Decoding, LayerSettings, LayerWork
from regard.workbench.advice.prediction import Curve
from regard.workbench.profile import measure_memory

FEWEST = 2
"""The fewest measured lengths from which anything is predicted."""

GROUP_SECONDS = 0.5
LONG_ROUND = 2.0
"""A round of calls that takes this many seconds or more need only be run twice."""

DOUBTFUL = 0.2
"""A measurement with a larger spread is repeated, and not kept."""

CALM = 1.25
"""Nor is a measurement kept if a fixed matrix product took this many times its best time meanwhile."""

SURE = 0.03
"""Relative half-width of the interval around the best measurement..."""
INSIDE, OUTSIDE = 0.1, 0.2
"""...and what each octave to the nearest measured length adds between and beyond the measured ones."""


@dataclass(frozen=True)
class Sample:
    """One measurement.

    Attributes:
        seconds: lower quartile of the times of the calls: less affected by other work than the median, and less
            accidental than the minimum.
        memory: peak bytes.
        state: bytes of the state.
        backend: the backend that ran the mechanism's engines.
        spread: relative excess of the median over the lower quartile.
        setup: seconds until the first call could start; for decoding, the prefill.
        pulse: seconds that :func:`pulse` took around the measurement; 0 if it was not run.
    """

    seconds: float
    memory: int
    state: int = 0
    backend: str = "torch"
    spread: float = 0.0
    setup: float = 0.0
    pulse: float = 0.0

    @classmethod
    def read(cls, stored: Any) -> Sample | None:
        """Read the sample of a cache entry; None for anything that is not a sample."""
        if not isinstance(stored, dict):
            return None
        numbers = [stored.get(name) for name in ("seconds", "memory", "state", "spread", "setup", "pulse")]
        backend = stored.get("backend")
        if not isinstance(backend, str) or not all(isinstance(x, int | float) for x in numbers):
            return None
        seconds, memory, state, spread, setup, beat = map(float, numbers)  # type: ignore[arg-type]
        if not (seconds > 0 and all(0 <= x < math.inf for x in (seconds, memory, state, spread, setup, beat))):
            return None
        return cls(seconds, int(memory), int(state), backend, spread, setup, beat)

    def agreeing(self, other: Sample) -> Sample:
        """The faster, less disturbed of two measurements of the same work; its spread is at most their difference."""
        least, most = sorted((self, other), key=lambda sample: sample.seconds)
        return replace(least, spread=min(least.spread, most.seconds / least.seconds - 1))


def pulse() -> float:
    """Seconds that a fixed matrix product takes at the moment: the median of a few runs."""
    a = torch.full((256, 256), 0.5, dtype=torch.float32, device="cpu")
    times = rounds({"product": lambda: torch.mm(a, a)}, most=15, clock=calm_clock())
    return Timing.of(times["product"]).median


Samples = dict[str, dict[str, dict[int, Sample]]]
"""Samples by kind of work, mechanism and length."""

Measure = Callable[[str, int, Sequence[str]], Mapping[str, Sample]]
"""Measures some mechanisms for one kind of work at one length, interleaved."""


def cache_folder() -> Path:
    """The folder of cached measurements, for this user."""
    return user_cache() / "probes"


def identity(settings: LayerSettings) -> dict[str, Any]:
    """The conditions under which measurements are valid: machine, software, threads, backend and sizes."""
    facts = provenance.fingerprint()
    names = ("machine_id", "torch", "regard", "threads", "usable_cores")
    kernels = "missing" if library.why_missing() else library.instruction_set()
    return {
        **{name: facts[name] for name in names},
        "revision": provenance.git_revision(),
        "kernels": kernels,
        **asdict(settings),
        "pattern": settings.pattern.value,
    }


def room() -> float:
    """Bytes that a measurement may hold: half of the machine's memory; infinite if that is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    except (AttributeError, ValueError):
        return math.inf


def best_pulse(samples: Samples) -> float:
    """The shortest pulse of all samples."""
    every = (s.pulse for names in samples.values() for lengths in names.values() for s in lengths.values())
    return min((beat for beat in every if beat > 0), default=math.inf)


def calm(sample: Sample, best: float) -> bool:
    """Whether a measurement was, as far as is known, undisturbed."""
    return sample.spread <= DOUBTFUL and sample.pulse <= CALM * best


CODE = "@"


def _stored(name: str) -> str:
    """The name under which samples of a mechanism are kept: with the hash of its code if it is a plugin's."""
    return CODE.join([name, *plugin_code(name)])


class Cache:
    """Samples on disk for one :func:`identity`.

    Args:
        settings: sizes of the layers.
        section: ``probe``, or another name for samples to be kept apart from those.
        fresh: delete what was kept.
    """

    def __init__(self, settings: LayerSettings, *, section: str = "probe", fresh: bool = False) -> None:
        self.identity = identity(settings)
        text = json.dumps(self.identity, sort_keys=True)
        self.path = cache_folder() / f"{section}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if fresh:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def read(self) -> Samples:
        """All samples except those that appear to come from a busy machine; none if the file is missing, damaged, or
        belongs to another identity."""
        try:
            stored = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(stored, dict) or stored.get("identity") != self.identity:
            return {}
        samples = stored.get("samples")
        found: Samples = {}
        for key, value in samples.items() if isinstance(samples, dict) else ():
            what, _, rest = key.partition(" ")
            stored_name, _, length = rest.rpartition(" ")
            name, sample = stored_name.partition(CODE)[0], Sample.read(value)
            if name and stored_name == _stored(name) and length.isdecimal() and sample is not None:
                found.setdefault(what, {}).setdefault(name, {})[int(length)] = sample
        best = best_pulse(found)
        return {
            what: {name: {n: s for n, s in lengths.items() if calm(s, best)} for name, lengths in names.items()}
            for what, names in found.items()
        }

    def add(self, what: str, length: int, samples: Mapping[str, Sample]) -> None:
        """Add samples to the file, keeping those already there, including any that another process has just written. If
        the folder cannot be written, nothing is kept."""
        every = self.read()
        for name, sample in samples.items():
            every.setdefault(what, {}).setdefault(name, {})[length] = sample
        flat = {
            f"{kind} {_stored(name)} {n}": asdict(sample)
            for kind, names in every.items()
            for name, lengths in names.items()
            for n, sample in lengths.items()
        }
        text = json.dumps({"identity": self.identity, "samples": flat})
        with suppress(Unsupported):
            write_text_atomically(self.path, text)


@dataclass
class LayerMeasure:
    """Measures layers on this machine. Layers are built once and kept."""

    settings: LayerSettings
    group_seconds: float = GROUP_SECONDS
    works: dict[str, LayerWork] = field(default_factory=dict)

    def work(self, name: str) -> LayerWork:
        """The layer of a mechanism with the actions that are timed; built at the first call and kept."""
        if name not in self.works:
            self.works[name] = LayerWork(get_mechanism(name), self.settings)
        return self.works[name]

    def __call__(self, what: str, length: int, names: Sequence[str]) -> dict[str, Sample]:
        device = torch.device(self.settings.device)
        # preparing an action sets the layer's training mode, so each group has one kind of work only
        actions, setup, memory, first = {}, {}, {}, 0.0
        for name in names:
            started = time.perf_counter()
            actions[name] = self.work(name).action(what, length)
            setup[name] = time.perf_counter() - started
            memory[name] = measure_memory(actions[name], self.settings.device)
            first += time.perf_counter() - started - setup[name]
        before = pulse()
        least = 3 if first / 2 < LONG_ROUND else 2
        clock = calm_clock(device)
        times = rounds(actions, seconds=self.group_seconds, least=least, device=device, clock=clock, warm=True)
        beat = max(before, pulse()) if device.type == "cpu" else 0.0
        found = {}
        for name, action in actions.items():
            timing = Timing.of(times[name])
            state = action.state_bytes if isinstance(action, Decoding) else 0
            spread = timing.median / timing.low - 1
            found[name] = Sample(timing.low, memory[name][0], state, memory[name][1], spread, setup[name], beat)
        return found


@dataclass
class Probe:
    """Measurements of some mechanisms, and predictions from them.

    Attributes:
        samples: all measurements, from now or from disk.
        measured: how many were measured now.
        recalled: how many came from disk.
        seconds: time spent on measuring now.
        left: (what, mechanism, length) of measurements skipped for lack of time or memory.
    """

    settings: LayerSettings
    samples: Samples
    measured: int = 0
    recalled: int = 0
    seconds: float = 0.0
    left: list[tuple[str, str, int]] = field(default_factory=list)
    _curves: dict[tuple[str, str, str], Curve | None] = field(default_factory=dict)

    def add(self, what: str, name: str, length: int, sample: Sample) -> None:
        """Add a sample; if the length already has one, the two are combined."""
        samples = self.samples[what][name]
        samples[length] = sample.agreeing(samples[length]) if length in samples else sample
        for of in ("seconds", "memory", "state"):
            self._curves.pop((what, name, of), None)

    def curve(self, what: str, name: str, of: str) -> Curve | None:
        """The prediction of ``seconds``, ``memory`` (with the state, for decoding) or ``state``; None if too little was
        measured."""
        key = what, name, of
        if key not in self._curves:
            samples = self.samples.get(what, {}).get(name, {})
            self._curves[key] = None
            if len(samples) >= FEWEST:
                self._curves[key] = Curve({n: _value(s, of) for n, s in samples.items()}, self._growth(what, name, of))
        return self._curves[key]

    def width(self, what: str, name: str, length: int) -> float:
        """Half-width of the interval around a predicted time, on a logarithmic axis.

        It is that of the nearest measurement plus an amount per octave of distance: little between measured lengths,
        much beyond.
        """
        samples = self.samples[what][name]
        nearest = min(samples, key=lambda n: abs(math.log(n / length)))
        return max(SURE, samples[nearest].spread) + self.away(what, name, length)

    def away(self, what: str, name: str, length: int) -> float:
        """The part of :meth:`width` due to the distance from the nearest measured length; 0 at a measured one.

        Beyond the longest measured length it includes an error that two measurements may hide: if a fixed overhead
        seems to be the whole cost at 64 tokens, that says little about thousands.
        """
        known = self.samples[what][name]
        rate = INSIDE if min(known) <= length <= max(known) else OUTSIDE
        hidden = math.log1p(2 * SURE * max(0.0, length / max(known) - 1))
        return rate * min(abs(math.log2(n / length)) for n in known) + hidden

    def time(self, what: str, name: str, lengths: Sequence[int]) -> tuple[float, float]:
        """Geometric mean of the times at some lengths, and the half-width of its interval on a logarithmic axis.

        Raises:
            KeyError: if too little was measured.
        """
        curve = self.curve(what, name, "seconds")
        if curve is None:
            raise KeyError(name)
        mean = math.exp(sum(math.log(curve(n)) for n in lengths) / len(lengths))
        return mean, sum(self.width(what, name, n) for n in lengths) / len(lengths)

    def memory(self, what: str, name: str, lengths: Sequence[int]) -> float:
        """The largest memory at some lengths."""
        curve = self.curve(what, name, "memory")
        if curve is None:
            raise KeyError(name)
        return max(curve(n) for n in lengths)

    def contenders(self, what: str, names: Sequence[str], lengths: Sequence[int], cap: int | None = None) -> list[str]:
        """The mechanisms that, as far as is known, may be the fastest at some lengths, the most likely first.

        Excluded are those that surely take longer than one that surely fits in `cap` bytes, and those that surely do
        not fit.
        """
        times = {n: self.time(what, n, lengths) for n in names if self.curve(what, n, "seconds") is not None}
        least = math.inf
        fitting = []
        for name, (seconds, width) in times.items():
            held = 0.0 if cap is None else self.memory(what, name, lengths) / cap
            unsure = max(self.away(what, name, n) for n in lengths)
            if held * math.exp(-unsure) > 1:
                continue
            fitting.append(name)
            if held * math.exp(unsure) <= 1:
                least = min(least, seconds * math.exp(width))
        kept = [name for name in fitting if times[name][0] * math.exp(-times[name][1]) <= least]
        return sorted(kept, key=lambda name: times[name][0])

    def _growth(self, what: str, name: str, of: str) -> Callable[[int], float]:
        card = get_mechanism(name)
        config = card.options()

        def growth(length: int) -> float:
            cost = card.cost(self.settings.shape(length), config)
            if of == "seconds":
                return cost.step_flops if what == "decode" else cost.flops
            return cost.state if what == "decode" else cost.memory

        return growth


def _value(sample: Sample, of: str) -> float:
    if of == "seconds":
        return sample.seconds
    return float(sample.state if of == "state" else sample.memory + sample.state)
