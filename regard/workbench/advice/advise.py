"""`regard advise`: which mechanism will be fastest and smallest, before anything is trained.

Time decides among the mechanisms that have what is needed (:mod:`regard.workbench.advice.needs`) and fit in the memory: that of
whole layers, measured on this machine at the lengths and in the use that were asked for. Which of them are worth measuring
there follows from shorter lengths (:mod:`regard.workbench.advice.probe`); what else is told is predicted
(:mod:`regard.workbench.advice.prediction`). Quality is known only from stored results of `regard compare`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Kind, Pattern, Unsupported, one_of
from regard.measurement import units
from regard.measurement.store import Store
from regard.models.variants import known_name
from regard.workbench.advice.layer_work import MIXING, WHAT, LayerSettings
from regard.workbench.advice.needs import NEEDS, Finding, find, parse_needs, reach
from regard.workbench.advice.pasted import code_for
from regard.workbench.advice.probe import LENGTHS, probe
from regard.workbench.advice.samples import DOUBTFUL, LayerMeasure, Measure, Probe
from regard.workbench.comparison.cost import REFERENCE

USES = {"train": "training", "infer": "forward", "serve": "decode"}
"""Uses of a mechanism, each with the kind of work whose time then decides."""

SAID = {"training": "a training step", "forward": "a forward call", "decode": "a decoding step"}
TIE = 1.05
"""Along the lengths a winner stays one until another is faster by more than this."""

LONGEST = 1 << 20
STEPS_AN_OCTAVE = 4
"""Lengths tried to find where another mechanism wins."""


@dataclass(frozen=True)
class AdviseSettings:
    """The question.

    Attributes:
        lengths: one or several, from 1 to 2^20; with several, the geometric mean of the times decides.
        use: ``train``, ``infer`` or ``serve`` (one token after another, from a state).
        needs: of :data:`regard.workbench.advice.needs.NEEDS`.
        memory: most bytes that one layer may hold beside its weights and its input, at every length; None for no limit.
            Of serving it is the state and what a step needs.
        pattern, dim, heads, head_dim, batch, dtype, device, short_convolution: as in
            :class:`regard.workbench.advice.layer_work.LayerSettings`.
        mechanisms: candidates; all that mix tokens and have the pattern when None.
        exclude: no candidates.
        what: kinds of work that are predicted; that of `use` is among them in any case.
        seconds: time to measure. What decides is measured at 32 and 64 tokens however long it takes, since nothing can be
            predicted without.
    """

    lengths: tuple[int, ...] = (1024,)
    use: str = "infer"
    needs: tuple[str, ...] = ()
    memory: int | None = None
    pattern: Pattern = Pattern.CAUSAL_SELF
    dim: int = 512
    heads: int = 8
    head_dim: int | None = None
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    mechanisms: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    what: tuple[str, ...] = WHAT
    seconds: float = 120.0
    short_convolution: int | None = None

    def __post_init__(self) -> None:
        one_of("use", self.use, USES)
        lengths = (self.lengths,) if isinstance(self.lengths, int) else tuple(sorted(set(self.lengths)))
        if not lengths or lengths[0] < 1 or lengths[-1] > LONGEST:
            raise Unsupported(f"lengths {self.lengths}", supported=f"lengths from 1 to {LONGEST}", nearest="1024,4096")
        if self.memory is not None and self.memory < 1:
            raise Unsupported(f"memory={self.memory}", supported="a positive number of bytes", nearest="512MiB")
        if not self.seconds > 0:
            raise Unsupported(f"seconds={self.seconds}", supported="a positive time", nearest="seconds=120")
        for item in self.what:
            one_of("what", item, WHAT)
        if self.use == "serve" and self.layer.pattern is Pattern.NONCAUSAL_SELF:
            raise Unsupported(
                "use='serve' in noncausal-self, where every token sees the later ones",
                supported="causal-self and cross patterns",
                nearest="--use infer",
            )
        what = tuple(w for w in WHAT if w in self.what or w == USES[self.use])
        for name, value in (
            ("lengths", lengths),
            ("needs", parse_needs(self.needs)),
            ("pattern", self.layer.pattern),
            ("what", what),
        ):
            object.__setattr__(self, name, value)

    @property
    def layer(self) -> LayerSettings:
        """Settings with which measured layers are built and called."""
        sizes = (self.dim, self.heads, self.head_dim, self.batch)
        return LayerSettings(self.pattern, *sizes, self.dtype, self.device, self.short_convolution)

    @property
    def deciding(self) -> str:
        """The kind of work whose time decides."""
        return USES[self.use]


@dataclass(frozen=True)
class Estimate:
    """The cost of one kind of work at one length.

    Attributes:
        milliseconds: of one call of the layer.
        low, high: the interval in which that is known, wider the farther the nearest measured length is.
        memory_bytes: peak of what the call holds beside weights and input; of decoding, with the state.
        state_bytes: of decoding: the state alone.
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
    """A mechanism that qualifies, with its place in the order, its costs, and lines to paste.

    `milliseconds` are the geometric mean over the lengths of what decides, `low` and `high` the interval around it.
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
    """The answer.

    Attributes:
        pick: the mechanism to use; None when none qualifies.
        text: one sentence.
        candidates: those that qualify, best first.
        rejected: those that do not, with the reason.
        changes: what would change the answer.
        notes: what the figures rest on.
    """

    settings: AdviseSettings
    pick: str | None
    text: str
    candidates: list[Candidate]
    rejected: dict[str, str]
    changes: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The advice as plain data, as JSON has it."""
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


@dataclass(frozen=True)
class Quality:
    """Scores of mechanisms in stored results.

    Attributes:
        said: of each mechanism its scores in words.
        behind: why a mechanism is not as good as the best.
        solved: of a recall task, who solved it.
        source: the folder.
    """

    said: Mapping[str, str] = field(default_factory=dict)
    behind: Mapping[str, str] = field(default_factory=dict)
    solved: Mapping[str, bool] = field(default_factory=dict)
    source: str = ""


def read_quality(folder: str | Path) -> Quality:
    """Scores of the newest comparison in the output folder of `regard compare`, or in its ``results.db``.

    Raises:
        Unsupported: when there is none.
    """
    path = Path(folder)
    file = path / "results.db" if path.is_dir() else path
    if not file.is_file():
        raise Unsupported(f"results in {folder}: no results.db there", supported="the output folder of regard compare")
    with Store(file) as store:
        rows = store.rows("run")
    if not rows:
        raise Unsupported(
            f"results in {folder}, which holds no finished comparison", supported="a comparison that has ended"
        )
    said: dict[str, list[str]] = {}
    behind: dict[str, str] = {}
    solved: dict[str, bool] = {}
    for task, entries in rows[-1].payload["summary"].items():
        won = any(e["solved"] for e in entries)
        for entry in entries:
            name = entry["mechanism"]
            if entry["mean"] is None:
                continue
            error = "" if entry["standard_error"] is None else f" ± {entry['standard_error']:.2g}"
            solves = {True: ", solved", False: ", not solved", None: ""}[entry["solved"]]
            said.setdefault(name, []).append(f"{task} {entry['mean']:.4g}{error}{solves}")
            if entry["solved"] is not None and task == "recall":
                solved[name] = entry["solved"]
            if won and not entry["solved"]:
                behind.setdefault(name, f"it does not solve {task} in your results, others do")
            elif not won and entry["separable_from_best"]:
                behind.setdefault(name, f"it is measurably behind the best on {task} in your results")
    return Quality({n: "; ".join(parts) for n, parts in said.items()}, behind, solved, str(folder))


FEW = 64
"""Tokens at which it is measured whether a mechanism mixes them."""


def candidates_of(settings: AdviseSettings) -> tuple[list[str], dict[str, str]]:
    """The mechanisms in question, and why others that were named or have the pattern are not."""
    excluded = {known_name(name) for name in settings.exclude}
    if settings.mechanisms is None:
        names = list_mechanisms(pattern=settings.pattern, where=lambda c: c.kind in MIXING)
    else:
        names = list(dict.fromkeys(known_name(name) for name in settings.mechanisms))
    chosen, rejected = [], {}
    for name in names:
        card = get_mechanism(name)
        if name in excluded:
            rejected[name] = "excluded by you"
        elif card.kind not in MIXING:
            replaced = {Kind.POOLING: "the pool of an encoder", Kind.PROJECTION: "a linear layer"}[card.kind]
            raise Unsupported(
                f"advice on {name}, a {card.kind.value}, which takes the place of {replaced}",
                supported="mechanisms that mix tokens: attention, mixers and wrappers",
                nearest=REFERENCE,
            )
        elif settings.pattern not in card.patterns:
            rejected[name] = f"lacks {settings.pattern.value}: {card.refused.get(settings.pattern, 'not defined')}"
        elif card.kind is Kind.MIXER and reach(name, settings.pattern, FEW)[0] < 2:
            rejected[name] = "mixes no tokens: an output depends on its own token alone (measured)"
        else:
            chosen.append(name)
    if not chosen:
        why = "; ".join(f"{name} {reason}" for name, reason in rejected.items())
        raise Unsupported(
            f"advice with no candidate left ({why or 'none was named'})",
            supported="other mechanisms, fewer exclusions",
            nearest=REFERENCE,
        )
    return chosen, rejected


def able_mechanisms(settings: AdviseSettings) -> tuple[dict[str, list[str]], dict[str, str], LayerMeasure]:
    """The candidates that can do each kind of work (what decides first, should the time not suffice for the rest), why
    others cannot, and their layers."""
    names, rejected = candidates_of(settings)
    layers = LayerMeasure(settings.layer)
    built, decoding = [], []
    for name in names:
        try:
            work = layers.work(name)
        except Unsupported as error:
            rejected[name] = f"its layer cannot have this size: {error}"
            continue
        built.append(name)
        if work.decodes:
            decoding.append(name)
    if not built:
        raise Unsupported(
            f"layers of dim={settings.dim}, heads={settings.heads}, head_dim={settings.head_dim}",
            supported="; ".join(f"{name}: {reason}" for name, reason in rejected.items()),
        )
    order = sorted(settings.what, key=lambda what: what != settings.deciding)
    return {what: decoding if what == "decode" else built for what in order}, rejected, layers


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
    """Answer a question; measures what is not known yet, for about ``settings.seconds``.

    Args:
        settings: the question, or its fields as keywords: ``advise(lengths=4096, use="train", needs="recall")``.
        results: output folder of a comparison, which informs quality.
        fresh: measure again what is known.
        say: told before anything is measured what will be.
        on_sample: called as measurements end (see :func:`regard.workbench.advice.probe.probe`).
        measure: measures layers; for tests.

    Raises:
        Unsupported: for values that cannot be honoured.
    """
    settings = AdviseSettings(**options) if settings is None else settings
    quality = Quality() if results is None else read_quality(results)
    able, rejected, layers = able_mechanisms(settings)
    findings = _findings(settings, able[settings.deciding], quality)
    known = probe(
        settings.layer,
        able,
        seconds=settings.seconds,
        asked=settings.lengths,
        likely=_likely(settings, findings, quality),
        cap=settings.memory,
        measure=measure or layers,
        fresh=fresh,
        say=say,
        on_sample=on_sample,
    )
    return _Answer(settings, known, able, rejected, quality, findings).advice()


Findings = dict[str, dict[str, Finding]]
"""By mechanism and need."""


def _findings(settings: AdviseSettings, names: Sequence[str], quality: Quality) -> Findings:
    longest = settings.lengths[-1]
    return {
        name: {
            need: find(need, name, settings.pattern, longest, quality.solved, settings.short_convolution)
            for need in settings.needs
        }
        for name in names
    }


def _lack(findings: Mapping[str, Finding], needs: Sequence[str]) -> str | None:
    """The first need that a mechanism does not have, with the reason; None when it has all."""
    missing = next((need for need in needs if not findings[need].holds), None)
    return missing and f"{missing}: {findings[missing].reason} ({findings[missing].source})"


def _likely(settings: AdviseSettings, findings: Findings, quality: Quality) -> list[str]:
    """Who may be taken, whatever the time: of those that qualify the ones that results know, where there are such."""
    able = [n for n in findings if _lack(findings[n], settings.needs) is None and n not in quality.behind]
    return [name for name in able if name in quality.said] or able


class _Answer:
    def __init__(
        self,
        settings: AdviseSettings,
        known: Probe,
        able: Mapping[str, Sequence[str]],
        rejected: Mapping[str, str],
        quality: Quality,
        findings: Findings,
    ) -> None:
        self.settings, self.known, self.quality, self.findings = settings, known, quality, findings
        self.rejected = dict(rejected)
        self.names = []
        for name in dict.fromkeys(n for names in able.values() for n in names):
            if name not in able[settings.deciding]:
                self.rejected[name] = f"has no state that decodes in {settings.pattern.value}"
            elif known.curve(settings.deciding, name, "seconds") is None:
                lack = _lack(findings[name], settings.needs)
                self.rejected[name] = lack or "not measured within the time; give more --seconds"
            else:
                self.names.append(name)

    def seconds(self, name: str, lengths: Sequence[int]) -> float:
        """Geometric mean of the deciding time."""
        return self.known.time(self.settings.deciding, name, lengths)[0]

    def memory(self, name: str, lengths: Sequence[int]) -> float:
        """The most that the deciding work holds."""
        return self.known.memory(self.settings.deciding, name, lengths)

    def surely_faster(self, name: str, other: str, lengths: Sequence[int]) -> bool:
        """Whether the intervals of the deciding times leave no doubt."""
        (own, width), (rival, width_of_rival) = (
            self.known.time(self.settings.deciding, n, lengths) for n in (name, other)
        )
        return math.log(rival / own) > width + width_of_rival

    def obstacle(
        self, name: str, lengths: Sequence[int], *, cap: int | None, needs: Sequence[str], results: bool = True
    ) -> str | None:
        """Why a mechanism does not qualify; None when it does."""
        if (lack := _lack(self.findings[name], needs)) is not None:
            return lack
        if results and name in self.quality.behind:
            return self.quality.behind[name]
        if cap is not None and (held := self.memory(name, lengths)) > cap:
            return f"needs {units.size(held)} of memory, more than {units.size(cap)}"
        return None

    def ranked(self, lengths: Sequence[int], **conditions: Any) -> list[str]:
        """Mechanisms that qualify, best first: what results know before what they do not, then by time; in front the
        fastest that is surely faster than softmax, and softmax where none is."""
        chosen = [n for n in self.names if self.obstacle(n, lengths, **conditions) is None]
        times = {n: self.seconds(n, lengths) for n in chosen}
        unknown = {n: bool(self.quality.said) and n not in self.quality.said for n in chosen}
        order = sorted(chosen, key=lambda n: (unknown[n], times[n]))
        if REFERENCE in order and not unknown[REFERENCE]:
            known = [n for n in order if n != REFERENCE and not unknown[n]]
            first = next((n for n in known if self.surely_faster(n, REFERENCE, lengths)), REFERENCE)
            order.remove(first)
            order.insert(0, first)
        return order

    def conditions(self) -> dict[str, Any]:
        return {"cap": self.settings.memory, "needs": self.settings.needs}

    def advice(self) -> Advice:
        lengths = self.settings.lengths
        order = self.ranked(lengths, **self.conditions())
        for name in self.names:
            if name not in order:
                self.rejected[name] = self.obstacle(name, lengths, **self.conditions()) or ""
        candidates = [self._candidate(name, i, order) for i, name in enumerate(order)]
        pick = order[0] if order else None
        changes = self._changes(pick)
        return Advice(
            self.settings,
            pick,
            self._text(order),
            candidates,
            dict(sorted(self.rejected.items())),
            changes,
            self._notes(order),
        )

    def _candidate(self, name: str, place: int, order: Sequence[str]) -> Candidate:
        settings = self.settings
        estimates = []
        for length in settings.lengths:
            for what in settings.what:
                time, memory, state = (self.known.curve(what, name, of) for of in ("seconds", "memory", "state"))
                if time is None or memory is None or state is None:
                    continue
                kept = round(state(length)) if what == "decode" else None
                interval = _interval(time(length), self.known.width(what, name, length))
                estimates.append(Estimate(what, length, *interval, round(memory(length)), kept, time.basis(length)))
        samples = self.known.samples[settings.deciding][name].values()
        return Candidate(
            name,
            place + 1,
            *_interval(*self.known.time(settings.deciding, name, settings.lengths)),
            self._reason(name, order),
            self.quality.said.get(name, "not measured"),
            ", ".join(dict.fromkeys(s.backend for s in samples)),
            estimates,
            code_for(name, settings.layer, settings.use, settings.lengths[-1]),
        )

    def _reason(self, name: str, order: Sequence[str]) -> str:
        lengths, pick = self.settings.lengths, order[0]
        if name == pick:
            rivals = [n for n in order if n != pick]
            fastest = min(rivals, key=lambda n: self.seconds(n, lengths), default=None)
            if fastest is None:
                parts = ["the only one that qualifies"]
            elif self.seconds(fastest, lengths) < self.seconds(pick, lengths):
                parts = [
                    f"not surely slower than {fastest}, and gives nothing up"
                    if pick == REFERENCE
                    else f"the fastest of those your results know; {fastest} is faster, but not among them"
                ]
            else:
                ratio = self.seconds(fastest, lengths) / self.seconds(pick, lengths)
                parts = [f"the fastest; {fastest} takes {ratio:.2f} times as long"]
        else:
            ratio = self.seconds(name, lengths) / self.seconds(pick, lengths)
            apart = self.surely_faster(pick, name, lengths) or self.surely_faster(name, pick, lengths)
            parts = [f"{ratio:.2f} times the time of {pick}{'' if apart else ', not told apart from it'}"]
        parts += [f"{need}: {finding.reason}" for need, finding in self.findings[name].items()]
        return "; ".join(parts)

    def _text(self, order: Sequence[str]) -> str:
        settings = self.settings
        where = _lengths(settings.lengths)
        if not order:
            return f"No mechanism qualifies at {where}; the list says what each one lacks."
        pick = order[0]
        took = f"{SAID[settings.deciding]} of one layer takes about {units.milliseconds(1e3 * self.seconds(pick, settings.lengths))}"
        mean = " on (geometric) average" if len(settings.lengths) > 1 else ""
        text = f"Use {pick}: at {where} {took}{mean}"
        if pick == REFERENCE:
            if len(order) > 1:
                text += ", and nothing else that qualifies is faster beyond doubt"
        elif REFERENCE in self.names:
            ratio = self.seconds(REFERENCE, settings.lengths) / self.seconds(pick, settings.lengths)
            text += f"; softmax takes {ratio:.2g} times as long"
        guessed = [n for n in settings.lengths if n not in self.known.samples[settings.deciding][pick]]
        if guessed:
            text += f". It was not measured at {_lengths(guessed)} for lack of time: give more --seconds"
        return text + "."

    def _changes(self, pick: str | None) -> list[str]:
        settings, conditions = self.settings, self.conditions()
        found = []
        winners = self._winners(conditions)
        if len(winners) > 1:
            parts = [f"{name} up to {end}" for name, end in winners[:-1]]
            beyond = f", then {winners[-1][0]}"
            found.append(
                f"The length: {', '.join(parts)}{beyond} (to {self._horizon()} tokens, the same needs and memory)."
            )
        elif winners:
            found.append(f"Not the length: {winners[0][0]} wins from {LENGTHS[0]} to {self._horizon()} tokens.")
        for need in settings.needs:
            fewer = [n for n in settings.needs if n != need]
            other = next(iter(self.ranked(settings.lengths, cap=settings.memory, needs=fewer)), None)
            if other != pick and other is not None:
                found.append(f"Without the need {need!r}: {other}, {self._compared(other, pick)}.")
        if settings.memory is not None:
            other = next(iter(self.ranked(settings.lengths, cap=None, needs=settings.needs)), None)
            if other != pick and other is not None:
                needed = units.size(self.memory(other, settings.lengths))
                found.append(f"With {needed} of memory: {other}, {self._compared(other, pick)}.")
        if pick is not None:
            held = self.memory(pick, settings.lengths)
            found.append(f"Less than {units.size(held)} of memory rules {pick} out.")
        if not self.quality.said:
            found.append("Results of a comparison on your data (--results): quality was not measured here.")
        elif self.quality.behind:
            other = next(iter(self.ranked(settings.lengths, **conditions, results=False)), None)
            if other != pick and other is not None:
                found.append(f"Without your results: {other}, {self._compared(other, pick)}.")
        return found

    def _compared(self, other: str, pick: str | None) -> str:
        took = units.milliseconds(1e3 * self.seconds(other, self.settings.lengths))
        if pick is None:
            return f"at {took}"
        ratio = self.seconds(pick, self.settings.lengths) / self.seconds(other, self.settings.lengths)
        return f"at {took} ({ratio:.2g} times as fast)"

    def _horizon(self) -> int:
        return max(LENGTHS[-1], 4 * self.settings.lengths[-1])

    def _winners(self, conditions: Mapping[str, Any]) -> list[tuple[str, int]]:
        """Who wins up to which length, by predictions; needs are judged at the longest length that was asked for. A winner
        stays one until another is clearly faster."""
        octaves = math.log2(self._horizon() / LENGTHS[0])
        found: list[tuple[str, int]] = []
        for i in range(math.ceil(octaves * STEPS_AN_OCTAVE) + 1):
            length = round(LENGTHS[0] * 2 ** (i / STEPS_AN_OCTAVE))
            order = self.ranked((length,), **conditions)
            winner = next(iter(order), "none")
            if found:
                before = found[-1][0]
                if before in order and self.seconds(before, (length,)) <= TIE * self.seconds(winner, (length,)):
                    winner = before
                if before == winner:
                    found.pop()
            found.append((winner, length))
        return found

    def _notes(self, order: Sequence[str]) -> list[str]:
        known, settings = self.known, self.settings
        notes = [
            "Times and memory are of one layer with its projections: multiply by the layers of your model, and add its "
            "embedding, feed-forward parts and weights."
        ]
        lengths = sorted({n for names in known.samples.values() for s in names.values() for n in s})
        source = f"{known.measured} measured now in {known.seconds:.0f} s, {known.recalled} from before"
        notes.append(
            f"Measured at {', '.join(map(str, lengths))} tokens on this machine ({source}); the rest is predicted."
        )
        if known.left:
            cut = sorted({f"{name} {what} at {n}" for what, name, n in known.left})
            shown = "; ".join(cut[:4]) + (f" and {len(cut) - 4} more" if len(cut) > 4 else "")
            notes.append(
                f"Not measured for lack of time or memory, so extrapolated, or not told where nothing was measured: {shown}. More "
                "--seconds would measure them."
            )
        if order:
            own = known.samples[settings.deciding][order[0]]
            spread = max((own[n].spread for n in settings.lengths if n in own), default=0.0)
            if spread > DOUBTFUL:
                notes.append(
                    f"The machine was busy: calls of {order[0]} differed by {spread:.0%}. The intervals are as wide, and "
                    "nothing of it was kept; ask again on a calmer machine."
                )
        for need in settings.needs:
            notes.append(f"{need}: {NEEDS[need]}.")
        if "recall" in settings.needs and not self.quality.solved:
            notes.append(
                "recall was judged by small models of 48 tokens; no recall result of yours was given (--results)."
            )
        if self.quality.said:
            notes.append(f"Quality is that of {self.quality.source}.")
        if any(get_mechanism(n).prepare is not None for n in order):
            names = [n for n in order if get_mechanism(n).prepare is not None]
            notes.append(f"{', '.join(names)}: with the tokens that it inserts.")
        return notes


def _interval(seconds: float, width: float) -> tuple[float, float, float]:
    """Milliseconds, and the ends of their interval."""
    return 1e3 * seconds, 1e3 * seconds * math.exp(-width), 1e3 * seconds * math.exp(width)


def _lengths(lengths: Sequence[int]) -> str:
    return f"{', '.join(map(str, lengths))} tokens" if lengths != (1,) else "1 token"
