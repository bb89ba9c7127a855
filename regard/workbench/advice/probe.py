"""The measurements of `regard advise`: which ones it makes, in which order, and which it repeats.

The deciding work comes first, at the lengths that were asked for, then whatever the other predictions need. A
measurement with a large spread, or one that contradicts others, is repeated; see :mod:`regard.workbench.advice.samples`
for what is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from regard.workbench.advice.layer_work import LayerSettings
from regard.workbench.advice.samples import (
    DOUBTFUL,
    FEWEST,
    Cache,
    LayerMeasure,
    Measure,
    Probe,
    best_pulse,
    calm,
    room,
)

LENGTHS = (32, 64, 128, 256, 512, 2048, 8192)

RUNS = 6
"""Calls per measurement: two for the memory, at least three for the time."""

LARGEST_SHARE = 1 / 20
"""Largest share of the probing time for one measurement that does not decide; longer lengths are extrapolated."""

IMPOSSIBLE = 1.2
"""Largest plausible ratio of a forward call to a training step, or of a shorter input to a longer one. Beyond it the
longer time was a disturbance and is measured again."""

BUMP = 1.25
"""Largest plausible ratio of a time to the line between its neighbours on logarithmic axes. The costs per call, per
token and per pair of tokens add up to a curve below those lines, so a larger ratio means a disturbance or a step in the
kernel's cost."""

FAR = 8
"""Contenders are first measured at lengths from this multiple of the second-shortest length on, on the way to the
lengths that were asked for."""

TRIES = 3
"""How often the set of contenders is checked again for new ones."""

SAME = 1.1
"""Measurements whose pulses differ by a smaller ratio were made on an equally fast machine."""


def probe(
    settings: LayerSettings,
    able: Mapping[str, Sequence[str]],
    *,
    seconds: float,
    asked: Sequence[int] = (),
    likely: Sequence[str] | None = None,
    cap: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    always: Sequence[str] = (),
    measure: Measure | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
    on_sample: Callable[[str, int, int, int], None] | None = None,
) -> Probe:
    """Measure what is not known yet.

    First the deciding work at the two shortest lengths, without which nothing can be predicted. Then the deciding work
    at the lengths that were asked for, for the mechanisms that may still be the fastest; they become fewer as the
    lengths grow (see :meth:`Probe.contenders`). Then the rest, short lengths first.

    Args:
        settings: sizes of the layers.
        able: the mechanisms that can do each kind of work; the first kind is the deciding one.
        seconds: time limit. No measurement starts that would, judging by shorter lengths, end later; nor one of the
            rest that would take more than a twentieth of this. The first two lengths are exempt: see `always`.
        asked: the lengths at which the fastest mechanism is wanted.
        likely: mechanisms that may be picked; all that can do the deciding work when None.
        cap: most bytes that the pick may hold.
        lengths: lengths to measure at. Without `asked`, cached measurements at other lengths are ignored.
        always: the kinds of work that are measured at the first two lengths however long it takes; the first kind of
            `able` when empty.
        measure: replaces the measurement of layers.
        fresh: ignore cached measurements.
        say: called once, before anything is measured, with how much there is to do and how long it may take.
        on_sample: called after each group with the kind of work, the length, the measurements done and their total.
    """
    deciding = next(iter(able))
    names = able[deciding] if likely is None else likely
    probing = _Probing(settings, able, seconds, measure or LayerMeasure(settings), fresh, None if asked else lengths)
    shortest = sorted(lengths)[:FEWEST]
    first = [(what, n) for n in shortest for what in always or (deciding,)]
    rest = sorted(
        ((what, n) for what in able for n in lengths if (what, n) not in first),
        key=lambda key: (key[1], list(able).index(key[0])),
    )
    total = sum(len(probing.missing(what, n, able[what])) for what, n in first + rest)
    wanted = sum(len(probing.missing(deciding, n, names)) for n in asked if n not in lengths)
    if total or wanted:
        told = sorted({n for what, n in first + rest if probing.missing(what, n, able[what])})
        said = f", {probing.found.recalled} are known" if probing.found.recalled else ""
        needed = [str(n) for n in shortest if any(probing.missing(what, n, able[what]) for what, m in first if m == n)]
        said += f"; {' and '.join(needed)} tokens in any case, then" if needed else ";"
        those = f" and of the fastest at {', '.join(map(str, asked))}" if wanted else ""
        say(
            f"Measuring layers at lengths {', '.join(map(str, told)) or 'that are known'}: {total} short "
            f"measurements{those}{said} until about {seconds:.0f} seconds have passed, once for this machine and size."
        )
    done = 0

    def tell(what: str, length: int, count: int) -> None:
        nonlocal done
        done += count
        if on_sample is not None and count:
            on_sample(what, length, min(done, total), total)

    for what, n in first:
        tell(what, n, probing.take(what, n, able[what], seconds=math.inf))
    if asked:
        for n in sorted({n for n in lengths if FAR * shortest[-1] <= n < max(asked)} | set(asked)):
            close = probing.found.contenders(deciding, names, asked, cap)
            share = 1.0 if n in asked else 0.25
            tell(deciding, n, probing.take(deciding, n, close, seconds=share * probing.remaining()))
        probing.settle(deciding, names, asked, cap)
    for what, n in rest:
        most = min(probing.remaining(), seconds * LARGEST_SHARE)
        tell(what, n, probing.take(what, n, able[what], seconds=probing.remaining(), each=most))
    probing.found.seconds = probing.spent()
    return probing.found


def bumps(seconds: Mapping[int, float]) -> Iterator[int]:
    """The lengths whose times are far above the line between their neighbours on logarithmic axes."""
    lengths = sorted(seconds)
    for shorter, n, longer in zip(lengths, lengths[1:], lengths[2:], strict=False):
        part = math.log(n / shorter) / math.log(longer / shorter)
        if seconds[n] > BUMP * seconds[shorter] ** (1 - part) * seconds[longer] ** part:
            yield n


class _Probing:
    """The measurements: made while there is time for them, and cached."""

    def __init__(
        self,
        settings: LayerSettings,
        able: Mapping[str, Sequence[str]],
        seconds: float,
        measure: Measure,
        fresh: bool,
        lengths: Sequence[int] | None,
    ) -> None:
        self.measure, self.seconds = measure, seconds
        self.cache = Cache(settings, fresh=fresh)
        kept = self.cache.read()
        self.best = best_pulse(kept)
        self.found = Probe(settings, {what: {name: {} for name in names} for what, names in able.items()})
        self.again: set[tuple[str, str, int]] = set()
        for what, names in self.found.samples.items():
            for name in names:
                for n, sample in kept.get(what, {}).get(name, {}).items():
                    if lengths is None or n in lengths:
                        names[name][n] = sample
                        self.found.recalled += 1
        self.room = room()
        self.started = time.monotonic()

    def spent(self) -> float:
        return time.monotonic() - self.started

    def remaining(self) -> float:
        return self.seconds - self.spent()

    def missing(self, what: str, length: int, names: Sequence[str]) -> list[str]:
        return [name for name in names if length not in self.found.samples[what][name]]

    def take(self, what: str, length: int, names: Sequence[str], *, seconds: float, each: float = math.inf) -> int:
        """Measure the mechanisms not known yet, in order, as time and memory permit; return how many were not known."""
        missing = self.missing(what, length, names)
        chosen, spent = [], 0.0
        for name in missing:
            expected = 0.0 if math.isinf(seconds) else self.expected(what, name, length)
            curve = self.found.curve(what, name, "memory")
            if expected > min(seconds - spent, each) or (curve is not None and curve(length) > self.room):
                self.found.left.append((what, name, length))
            else:
                spent += expected
                chosen.append(name)
        if chosen:
            self.found.measured += len(chosen)
            self.store(what, length, chosen)
            for (kind, n), doubtful in self.doubtful(what, length, chosen).items():
                self.store(kind, n, doubtful)
        return len(missing)

    def store(self, what: str, length: int, names: Sequence[str]) -> None:
        for name, sample in self.measure(what, length, names).items():
            self.found.add(what, name, length, sample)
        samples = {name: self.found.samples[what][name][length] for name in names}
        self.best = min(self.best, best_pulse({what: {name: {length: s} for name, s in samples.items()}}))
        self.cache.add(what, length, {name: s for name, s in samples.items() if calm(s, self.best)})

    def doubtful(self, what: str, length: int, names: Sequence[str]) -> dict[tuple[str, int], list[str]]:
        """Measurements to repeat, each at most once: those with a large spread, or that contradict those of `names`."""
        found: dict[tuple[str, int], list[str]] = {}
        for name in names:
            for kind, n in self.suspects(what, name, length):
                key = (kind, name, n)
                if key not in self.again and self.expected(kind, name, n) <= self.remaining():
                    self.again.add(key)
                    found.setdefault((kind, n), []).append(name)
        return found

    def suspects(self, what: str, name: str, length: int) -> Iterator[tuple[str, int]]:
        samples = self.found.samples
        own = samples[what][name]
        if own[length].spread > DOUBTFUL:
            yield what, length
        for n in own:
            shorter, longer = (n, length) if n < length else (length, n)
            if own[shorter].seconds > IMPOSSIBLE * own[longer].seconds:
                yield what, shorter
        yield from ((what, n) for n in bumps({n: sample.seconds for n, sample in own.items()}))
        forward = samples.get("forward", {}).get(name, {}).get(length)
        training = samples.get("training", {}).get(name, {}).get(length)
        if forward and training and forward.seconds > IMPOSSIBLE * training.seconds:
            yield "forward", length

    def settle(self, what: str, names: Sequence[str], asked: Sequence[int], cap: int | None) -> None:
        """Measure mechanisms that have become contenders because others were slower than expected. Then measure all
        contenders once more, interleaved, if the machine was not equally fast for all of them."""
        for _ in range(TRIES):
            close = self.found.contenders(what, names, asked, cap)
            if not sum(self.take(what, n, close, seconds=self.remaining()) for n in asked):
                break
        for n in asked:
            samples = {name: s for name in close if (s := self.found.samples[what][name].get(n)) is not None}
            beats = [s.pulse for s in samples.values() if s.pulse > 0]
            unequal = len(beats) > 1 and max(beats) > SAME * min(beats)
            if unequal and sum(self.expected(what, name, n) for name in samples) <= self.remaining():
                self.store(what, n, list(samples))

    def expected(self, what: str, name: str, length: int) -> float:
        """Expected seconds of a measurement; if too little is known, judged by other lengths or other kinds of work."""
        samples = self.found.samples[what][name]
        if length in samples:
            return samples[length].setup + RUNS * samples[length].seconds
        if len(samples) < FEWEST:
            known = samples or {n: s for kinds in self.found.samples.values() for n, s in kinds.get(name, {}).items()}
            return RUNS * max((s.seconds for s in known.values()), default=0.0)
        curve = self.found.curve(what, name, "seconds")
        assert curve is not None
        nearest = min(samples, key=lambda n: abs(math.log(n / length)))
        growth = self.found._growth("forward", name, "seconds")
        return samples[nearest].setup * growth(length) / max(growth(nearest), 1.0) + RUNS * curve(length)
