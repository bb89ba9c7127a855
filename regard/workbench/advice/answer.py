"""The answer to a question: what to use, why, what the others cost, and what would change it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from regard.catalogue import get_mechanism
from regard.measurement import units
from regard.workbench.advice.needs import NEEDS
from regard.workbench.advice.pasted import code_for
from regard.workbench.advice.probe import LENGTHS
from regard.workbench.advice.ranking import Conditions, Ranking
from regard.workbench.advice.samples import DOUBTFUL
from regard.workbench.advice.settings import AdviseSettings
from regard.workbench.comparison.cost import REFERENCE

SAID = {"training": "a training step", "forward": "a forward call", "decode": "a decoding step"}
"""Names of the kinds of work, for use in a sentence."""


@dataclass(frozen=True)
class Estimate:
    """The cost of one kind of work at one length.

    Attributes:
        milliseconds: time of one call of the layer.
        low, high: the interval around the time; it widens with the distance to the nearest measured length.
        memory_bytes: peak memory of a call in addition to weights and input; for decoding, including the state.
        state_bytes: size of the state alone, for decoding; None otherwise.
        basis: ``measured``, ``interpolated`` between measured lengths, or ``extrapolated`` beyond them.
    """

    what: str
    length: int
    milliseconds: float
    low: float
    high: float
    memory_bytes: int
    state_bytes: int | None
    basis: str


@dataclass(frozen=True)
class Candidate:
    """A mechanism that qualifies, with its rank, its costs and code to paste.

    `milliseconds` is the geometric mean over the lengths of the time that decides; `low` and `high` are the interval
    around it.
    """

    mechanism: str
    place: int
    milliseconds: float
    low: float
    high: float
    reason: str
    quality: str
    backend: str
    estimates: list[Estimate]
    code: str


@dataclass(frozen=True)
class Advice:
    """The answer to a question.

    Attributes:
        pick: the mechanism to use; None when none qualifies.
        text: the answer in one sentence.
        candidates: the mechanisms that qualify, best first.
        rejected: the mechanisms that do not qualify, with the reason.
        changes: what would change the answer.
        notes: how the figures were obtained.
    """

    settings: AdviseSettings
    pick: str | None
    text: str
    candidates: list[Candidate]
    rejected: dict[str, str]
    changes: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The advice as plain data, for JSON."""
        settings = asdict(self.settings) | {"pattern": self.settings.pattern.value}
        return {
            "settings": settings,
            "pick": self.pick,
            "text": self.text,
            "candidates": [asdict(c) for c in self.candidates],
            "rejected": self.rejected,
            "changes": self.changes,
            "notes": self.notes,
        }


def answer(ranking: Ranking) -> Advice:
    """Turn a ranking into the answer to the question that was asked."""
    order = ranking.ranked(ranking.asked)
    out = {n: ranking.obstacle(n, ranking.asked) or "" for n in ranking.names if n not in order}
    pick = order[0] if order else None
    return Advice(
        settings=ranking.settings,
        pick=pick,
        text=_text(ranking, order),
        candidates=[_candidate(ranking, name, i, order) for i, name in enumerate(order)],
        rejected=dict(sorted({**ranking.rejected, **out}.items())),
        changes=_changes(ranking, pick),
        notes=_notes(ranking, order),
    )


def _candidate(ranking: Ranking, name: str, place: int, order: Sequence[str]) -> Candidate:
    settings, known = ranking.settings, ranking.known
    estimates = []
    for length in settings.lengths:
        for what in settings.what:
            time, memory, state = (known.curve(what, name, of) for of in ("seconds", "memory", "state"))
            if time is None or memory is None or state is None:
                continue
            kept = round(state(length)) if what == "decode" else None
            interval = _interval(time(length), known.width(what, name, length))
            estimates.append(Estimate(what, length, *interval, round(memory(length)), kept, time.basis(length)))
    samples = known.samples[settings.deciding][name].values()
    return Candidate(
        name,
        place + 1,
        *_interval(*known.time(settings.deciding, name, settings.lengths)),
        _reason(ranking, name, order),
        ranking.quality.said.get(name, "not measured"),
        ", ".join(dict.fromkeys(s.backend for s in samples)),
        estimates,
        code_for(name, settings.layer, settings.use, settings.lengths[-1]),
    )


def _reason(ranking: Ranking, name: str, order: Sequence[str]) -> str:
    pick = order[0]
    if name == pick:
        first = _reason_of_pick(ranking, pick, order[1:])
    else:
        ratio = ranking.seconds(name) / ranking.seconds(pick)
        apart = ranking.surely_faster(pick, name) or ranking.surely_faster(name, pick)
        first = f"{ratio:.2f} times the time of {pick}{'' if apart else ', not distinguishable from it'}"
    return "; ".join([first, *(f"{need}: {found.reason}" for need, found in ranking.findings[name].items())])


def _reason_of_pick(ranking: Ranking, pick: str, rivals: Sequence[str]) -> str:
    if not rivals:
        return "the only one that qualifies"
    fastest = min(rivals, key=ranking.seconds)
    if ranking.seconds(fastest) >= ranking.seconds(pick):
        ratio = ranking.seconds(fastest) / ranking.seconds(pick)
        return f"the fastest; {fastest} takes {ratio:.2f} times as long"
    if pick == REFERENCE:
        return f"not clearly slower than {fastest}, and gives nothing up"
    return f"the fastest of the mechanisms in your results; {fastest} is faster, but your results do not include it"


def _text(ranking: Ranking, order: Sequence[str]) -> str:
    settings = ranking.settings
    where = _lengths(settings.lengths)
    if not order:
        return f"No mechanism qualifies at {where}; the list says what each one lacks."
    pick = order[0]
    took = f"{SAID[settings.deciding]} of one layer takes about {units.milliseconds(1e3 * ranking.seconds(pick))}"
    mean = " on (geometric) average" if len(settings.lengths) > 1 else ""
    text = f"Use {pick}: at {where} {took}{mean}"
    if pick == REFERENCE:
        if len(order) > 1:
            text += ", and nothing else that qualifies is clearly faster"
    elif REFERENCE in ranking.names:
        text += f"; softmax takes {ranking.seconds(REFERENCE) / ranking.seconds(pick):.2g} times as long"
    guessed = [n for n in settings.lengths if n not in ranking.known.samples[settings.deciding][pick]]
    if guessed:
        text += f". It was not measured at {_lengths(guessed)} for lack of time: give more --seconds"
    return text + "."


def _changes(ranking: Ranking, pick: str | None) -> list[str]:
    settings, asked = ranking.settings, ranking.asked
    found = _along_lengths(ranking)
    for need in settings.needs:
        fewer = replace(asked, needs=tuple(n for n in settings.needs if n != need))
        if (other := _other(ranking, pick, fewer)) is not None:
            found.append(f"Without the need {need!r}: {other}, {_compared(ranking, other, pick)}.")
    if settings.memory is not None and (other := _other(ranking, pick, replace(asked, cap=None))) is not None:
        needed = units.size(ranking.memory(other))
        found.append(f"With {needed} of memory: {other}, {_compared(ranking, other, pick)}.")
    if pick is not None:
        found.append(f"Less than {units.size(ranking.memory(pick))} of memory rules out {pick}.")
    if not ranking.quality.said:
        found.append("Results of a comparison on your data (--results): quality was not measured here.")
    elif ranking.quality.behind and (other := _other(ranking, pick, replace(asked, results=False))) is not None:
        found.append(f"Without your results: {other}, {_compared(ranking, other, pick)}.")
    return found


def _along_lengths(ranking: Ranking) -> list[str]:
    winners = ranking.winners()
    if len(winners) > 1:
        parts = ", ".join(f"{name} up to {end}" for name, end in winners[:-1])
        last = winners[-1][0]
        return [f"The length: {parts}, then {last} (to {ranking.horizon} tokens, the same needs and memory)."]
    return [f"Not the length: {name} wins from {LENGTHS[0]} to {ranking.horizon} tokens." for name, _ in winners]


def _other(ranking: Ranking, pick: str | None, conditions: Conditions) -> str | None:
    """The best mechanism under other conditions; None if it is the same one or none qualifies."""
    best = next(iter(ranking.ranked(conditions)), None)
    return None if best == pick else best


def _compared(ranking: Ranking, other: str, pick: str | None) -> str:
    took = units.milliseconds(1e3 * ranking.seconds(other))
    if pick is None:
        return f"at {took}"
    return f"at {took} ({ranking.seconds(pick) / ranking.seconds(other):.2g} times as fast)"


def _notes(ranking: Ranking, order: Sequence[str]) -> list[str]:
    known, settings, quality = ranking.known, ranking.settings, ranking.quality
    notes = [
        "Times and memory are for one layer with its projections: multiply by the layers of your model, and add its "
        "embedding, feed-forward parts and weights."
    ]
    lengths = sorted({n for names in known.samples.values() for s in names.values() for n in s})
    source = f"{known.measured} measured now in {known.seconds:.0f} s, {known.recalled} measured before"
    notes.append(
        f"Measured at {', '.join(map(str, lengths))} tokens on this machine ({source}); the rest is predicted."
    )
    if known.left:
        cut = sorted({f"{name} {what} at {n}" for what, name, n in known.left})
        shown = "; ".join(cut[:4]) + (f" and {len(cut) - 4} more" if len(cut) > 4 else "")
        notes.append(
            f"Not measured for lack of time or memory, so extrapolated, or omitted where nothing was measured: {shown}. More "
            "--seconds would measure them."
        )
    if order:
        own = known.samples[settings.deciding][order[0]]
        spread = max((own[n].spread for n in settings.lengths if n in own), default=0.0)
        if spread > DOUBTFUL:
            notes.append(
                f"The machine was busy: calls of {order[0]} differed by {spread:.0%}. The intervals are widened "
                "accordingly, and nothing was cached; run it again on a quieter machine."
            )
    for need in settings.needs:
        notes.append(f"{need}: {NEEDS[need]}.")
    if "recall" in settings.needs and not quality.solved:
        notes.append("recall was judged with small models on 48 tokens, as no recall results were given (--results).")
    if quality.said:
        notes.append(f"Quality is that of {quality.source}.")
    if any(get_mechanism(n).prepare is not None for n in order):
        names = [n for n in order if get_mechanism(n).prepare is not None]
        notes.append(f"{', '.join(names)}: with the tokens that it inserts.")
    return notes


def _interval(seconds: float, width: float) -> tuple[float, float, float]:
    """Milliseconds, and the ends of their interval."""
    return 1e3 * seconds, 1e3 * seconds * math.exp(-width), 1e3 * seconds * math.exp(width)


def _lengths(lengths: Sequence[int]) -> str:
    return f"{', '.join(map(str, lengths))} tokens" if lengths != (1,) else "1 token"
