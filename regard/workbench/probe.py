"""Short measurements of layers at a few lengths, kept on disk, from which `regard advise` predicts the others.

Measurements are kept in ``$XDG_CACHE_HOME/regard/probes/`` (``~/.cache`` when the variable is not set), one file for each
machine, version, number of threads and size of layer. Each is written as soon as it is made, so that a probe that is
interrupted goes on where it stopped; a file that cannot be read counts as empty.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from regard.backends.native import library
from regard.catalogue import get_mechanism
from regard.measurement import provenance
from regard.measurement.timing import interleaved
from regard.workbench.layer_work import Decoding, LayerSettings, LayerWork
from regard.workbench.prediction import Curve
from regard.workbench.profile import measure_memory

LENGTHS = (32, 64, 128, 256, 512, 2048, 8192)
FEWEST = 2
"""Measured lengths without which nothing is predicted."""

RUNS = 6
"""Calls that a measurement takes: two for the memory, one to warm up, three to time."""

LARGEST_SHARE = 1 / 20
"""Of the time for probing, the most that one measurement may take; longer lengths are extrapolated."""

GROUP_SECONDS = 0.4


@dataclass(frozen=True)
class Sample:
    """One measurement: seconds (median), bytes of the peak, bytes of the state, and the backend that ran its engines."""

    seconds: float
    memory: int
    state: int = 0
    backend: str = "torch"

    @classmethod
    def read(cls, stored: Any) -> Sample | None:
        """The sample of a cache entry; None for anything that is not one."""
        if not isinstance(stored, dict):
            return None
        numbers = [stored.get("seconds"), stored.get("memory"), stored.get("state", 0)]
        backend = stored.get("backend", "torch")
        if not isinstance(backend, str) or not all(isinstance(x, int | float) for x in numbers):
            return None
        seconds, memory, state = map(float, numbers)
        if not (0 < seconds < math.inf and 0 <= memory < math.inf and 0 <= state < math.inf):
            return None
        return cls(seconds, int(memory), int(state), backend)


Samples = dict[str, dict[str, dict[int, Sample]]]
"""By kind of work, mechanism and length."""

Measure = Callable[[str, int, Sequence[str]], Mapping[str, Sample]]
"""Measures some mechanisms at one kind of work and length, interleaved."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard" / "probes"


def identity(settings: LayerSettings) -> dict[str, Any]:
    """What measurements are valid for: the machine, the software, the threads, the backend, the sizes."""
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


class Cache:
    """Samples on disk for one :func:`identity`.

    Args:
        settings: sizes of the layers.
        section: ``probe``, or another name for samples that are not to be mixed with those.
        fresh: forget what was kept.
    """

    def __init__(self, settings: LayerSettings, *, section: str = "probe", fresh: bool = False) -> None:
        self.identity = identity(settings)
        text = json.dumps(self.identity, sort_keys=True)
        self.path = cache_folder() / f"{section}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if fresh:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def read(self) -> Samples:
        """All samples; none when the file is missing, damaged, or of something else."""
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
            name, _, length = rest.rpartition(" ")
            sample = Sample.read(value)
            if name and length.isdecimal() and sample is not None:
                found.setdefault(what, {}).setdefault(name, {})[int(length)] = sample
        return found

    def add(self, what: str, length: int, samples: Mapping[str, Sample]) -> None:
        """Keep samples beside those that are there, also those that another process wrote meanwhile. A folder that cannot
        be written keeps nothing."""
        every = self.read()
        for name, sample in samples.items():
            every.setdefault(what, {}).setdefault(name, {})[length] = sample
        flat = {
            f"{kind} {name} {n}": asdict(sample)
            for kind, names in every.items()
            for name, lengths in names.items()
            for n, sample in lengths.items()
        }
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({"identity": self.identity, "samples": flat}, file)
                os.replace(temporary, self.path)
            except BaseException:
                os.unlink(temporary)
                raise


@dataclass
class LayerMeasure:
    """Measures layers on this machine. Layers are built once and kept."""

    settings: LayerSettings
    group_seconds: float = GROUP_SECONDS
    works: dict[str, LayerWork] = field(default_factory=dict)

    def work(self, name: str) -> LayerWork:
        if name not in self.works:
            self.works[name] = LayerWork(get_mechanism(name), self.settings)
        return self.works[name]

    def __call__(self, what: str, length: int, names: Sequence[str]) -> dict[str, Sample]:
        device = torch.device(self.settings.device)
        # a work's actions of training and of the rest set its layer's mode: each group is of one kind
        actions = {name: self.work(name).action(what, length) for name in names}
        memory = {name: measure_memory(action, self.settings.device) for name, action in actions.items()}
        timings = interleaved(actions, seconds=self.group_seconds, device=device)
        found = {}
        for name, action in actions.items():
            state = action.state_bytes if isinstance(action, Decoding) else 0
            found[name] = Sample(timings[name].median, memory[name][0], state, memory[name][1])
        return found


@dataclass
class Probe:
    """What is known of some mechanisms.

    Attributes:
        samples: all that were measured, now or before.
        measured: how many were measured now.
        recalled: how many came from disk.
        seconds: that measuring took now.
        left: (what, mechanism, length) that were not measured for lack of time.
    """

    settings: LayerSettings
    samples: Samples
    measured: int = 0
    recalled: int = 0
    seconds: float = 0.0
    left: list[tuple[str, str, int]] = field(default_factory=list)
    _curves: dict[tuple[str, str, str], Curve | None] = field(default_factory=dict)

    def curve(self, what: str, name: str, of: str) -> Curve | None:
        """The prediction of ``seconds``, ``memory`` (of decoding: with the state) or ``state``; None when too little
        was measured."""
        key = what, name, of
        if key not in self._curves:
            samples = self.samples.get(what, {}).get(name, {})
            self._curves[key] = None
            if len(samples) >= FEWEST:
                self._curves[key] = Curve({n: _value(s, of) for n, s in samples.items()}, self._growth(what, name, of))
        return self._curves[key]

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


def probe(
    settings: LayerSettings,
    able: Mapping[str, Sequence[str]],
    *,
    seconds: float,
    lengths: Sequence[int] = LENGTHS,
    always: Sequence[str] = (),
    measure: Measure | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
    on_sample: Callable[[str, int, int, int], None] | None = None,
) -> Probe:
    """Measure what is not known yet, what nothing can be predicted without first, then the shortest lengths.

    Args:
        settings: sizes of the layers.
        able: the mechanisms that can do each kind of work.
        seconds: no measurement starts that would end later, by what the shorter lengths took; nor one that would take more
            than a twentieth of this. Without the first two lengths nothing can be predicted: see `always`.
        lengths: at which to measure.
        always: the kinds of work that are measured at the first two lengths however long it takes; when empty the first
            kind of `able`.
        measure: what measures; the layers themselves when None.
        fresh: measure again what is known.
        say: told once, before anything is measured, how much there is to do and how long it may take.
        on_sample: called after each group with the kind of work, the length, and how many measurements of how many are
            done.
    """
    measure = measure or LayerMeasure(settings)
    cache = Cache(settings, fresh=fresh)
    kept = cache.read()
    found = Probe(settings, {what: {} for what in able})
    missing: dict[tuple[int, str], list[str]] = {}
    for what, names in able.items():
        for name in names:
            known = kept.get(what, {}).get(name, {})
            found.samples[what][name] = {n: known[n] for n in lengths if n in known}
            found.recalled += len(found.samples[what][name])
            for length in lengths:
                if length not in known:
                    missing.setdefault((length, what), []).append(name)
    total = sum(map(len, missing.values()))
    first = [(length, what) for length in sorted(lengths)[:FEWEST] for what in always or list(able)[:1]]
    if total:
        said = f", {found.recalled} are known" if found.recalled else ""
        needed = sorted({n for n, what in first if (n, what) in missing})
        said += f"; {' and '.join(map(str, needed))} tokens in any case, then" if needed else ";"
        say(
            f"Measuring layers at lengths {', '.join(map(str, sorted({n for n, _ in missing})))}: {total} short "
            f"measurements{said} until about {seconds:.0f} seconds have passed, once for this machine and size."
        )
    started = time.monotonic()
    done = 0
    order = list(able)
    for key in sorted(missing, key=lambda key: (key not in first, key[0], order.index(key[1]))):
        (length, what), names = key, missing[key]
        chosen = []
        spent = time.monotonic() - started
        for name in names:
            expected = 0.0 if key in first else _expected(found, what, name, length)
            if key not in first and expected > min(seconds - spent, seconds * LARGEST_SHARE):
                found.left.append((what, name, length))
            else:
                spent += expected
                chosen.append(name)
        if chosen:
            samples = measure(what, length, chosen)
            cache.add(what, length, samples)
            for name, sample in samples.items():
                found.samples[what][name][length] = sample
            found.measured += len(samples)
        done += len(names)
        if on_sample is not None:
            on_sample(what, length, done, total)
    found.seconds = time.monotonic() - started
    return found


def _expected(found: Probe, what: str, name: str, length: int) -> float:
    """Seconds that a measurement will take; where too little is known, those of a shorter length or of other work."""
    samples = found.samples[what][name]
    if len(samples) < FEWEST:
        known = samples or {n: s for names in found.samples.values() for n, s in names.get(name, {}).items()}
        return RUNS * max((s.seconds for s in known.values()), default=0.0)
    growth = found._growth(what, name, "seconds")
    curve = Curve({n: s.seconds for n, s in samples.items()}, growth)
    return RUNS * curve(length)
