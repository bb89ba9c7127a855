"""A study that asks a model long questions, dense and with each sparse method at several compressions."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from regard.compression.sparse import METHODS, Method, at_compression, compresses, sparsely, sparsify, written
from regard.compression.sparse.cost import (
    Sizes,
    decode_bytes,
    decode_flops,
    decode_index,
    prefill_flops,
    prefill_index,
)
from regard.compression.sparse.fidelity import Beside
from regard.contract import Unsupported
from regard.measurement.store import Store
from regard.models.weights import weights_digest
from regard.tasks.documents import Paths, read_documents
from regard.tasks.long_context import LONG_TASKS, LongTask, Sample, create_long_task
from regard.workbench.side_effects import Effects, Probes
from regard.workbench.sparse.analysis import (
    Observation,
    Point,
    mean_and_variance,
    noticeable_loss,
    safe_compression,
)
from regard.workbench.sparse.readers import Reader, reply
from regard.workbench.sparse.texts import TEXT, Continuation
from regard.workbench.trained.folder import beyond

KIND, EFFECTS, ERRORS = "sparse", "side_effects", "attention_error"
RATIOS = (2.0, 4.0, 8.0, 16.0, 20.0)
TASKS = (*LONG_TASKS, TEXT)
CONTINUED = 32
"""Tokens of a text that are predicted, each given those before it."""
ABLE = 0.1
"""Dense score from which a task is used to judge a model."""
NOTICEABLE = 1.02
"""Ratio from which one is called faster than the other."""
ALIKE = 1.05
"""Ratio up to which one method counts as about as fast as another."""
FIXED = "it always compresses by the same"
"""Why a method is left out at a ratio."""
FEWEST = 4
"""Fewest samples of a task for which a loss is judged."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a study asks.

    Attributes:
        lengths: prompt lengths in tokens.
        methods: names in :data:`regard.compression.sparse.METHODS`, or two joined by `` + ``.
        ratios: compression ratios.
        tasks: names in :data:`TASKS`.
        wording: wording of the prompts, ``full`` or ``brief``.
        samples: samples per task and length.
        data: text, or questions in SQuAD's format.
        effects: samples for the side effects, at the longest length; 0 for none.
    """

    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    ratios: tuple[float, ...] = RATIOS
    tasks: tuple[str, ...] = TASKS
    wording: str = "full"
    samples: int = 10
    data: Paths | None = None
    effects: int = 0


@dataclass(frozen=True)
class Cell:
    """A method at one compression, on one task at one length.

    Attributes:
        scores: scores of the samples.
        prefill, decode: measured sparsity of each phase, averaged over samples and layers.
        cache: share of the prompt that stays in the cache.
        prefill_seconds, token_seconds: medians; for tokens, without the first.
        flops: FLOPs for a prompt; token_flops and token_bytes: for one token after it.
    """

    method: str
    ratio: float
    task: str
    length: int
    written: str
    scores: tuple[float, ...]
    prefill: float
    decode: float
    cache: float
    prefill_seconds: float
    token_seconds: float | None
    flops: float
    token_flops: float
    token_bytes: float

    @property
    def score(self) -> float:
        """Mean score over the samples."""
        return mean_and_variance(self.scores)[0]


@dataclass(frozen=True)
class Found:
    """The results for a model.

    Attributes:
        name: name of the model.
        weights: number of weights in its matrices.
        cells: cells of every method, including ``dense`` at compression 1.
        refused: for each method, and each task and length, left out, the reason.
        beyond: a warning if the longest prompts exceed the length that the model was trained on.
        over: whether the budget ran out before everything was asked.
        effects: side effects of every method at every compression, with ``dense`` first.
        errors: by method, compression and length, the relative error of a layer's attention in the phases in which the
            method saves work, on one prompt and its reply (:class:`regard.compression.sparse.fidelity.Beside`).
    """

    name: str
    weights: int
    plan: Plan
    cells: list[Cell]
    refused: dict[str, str] = field(default_factory=dict)
    over: bool = False
    effects: dict[str, Effects] = field(default_factory=dict)
    beyond: str = ""
    errors: dict[tuple[str, float, int], float] = field(default_factory=dict)

    def cell(self, method: str, ratio: float, task: str, length: int) -> Cell | None:
        """The matching cell; None if it was not run."""
        keys = (method, ratio, task, length)
        return next((c for c in self.cells if (c.method, c.ratio, c.task, c.length) == keys), None)

    def able(self, length: int) -> list[str]:
        """Tasks that the dense model can do at a length, with enough samples to judge a loss."""
        return [c.task for c in self.cells if _judged(c) and c.length == length]

    def lengths(self) -> list[int]:
        """The lengths that were run, in ascending order."""
        return sorted({c.length for c in self.cells})

    def safe(self, method: str, length: int) -> dict[str, float]:
        """For each task, the largest compression of a method without a noticeable loss."""
        found = {}
        for task in self.able(length):
            dense = self.cell("dense", 1.0, task, length)
            assert dense is not None
            by_ratio = {
                c.ratio: c.scores
                for c in self.cells
                if (c.method, c.task, c.length) == (method, task, length) and len(c.scores) >= FEWEST
            }
            if by_ratio:
                found[task] = safe_compression(dense.scores, by_ratio)
        return found

    def relative(self, method: str, ratio: float, length: int) -> dict[str, float]:
        """Scores divided by those of the dense model, by task."""
        found = {}
        for task in self.able(length):
            dense, cell = self.cell("dense", 1.0, task, length), self.cell(method, ratio, task, length)
            if dense is not None and cell is not None:
                found[task] = cell.score / dense.score
        return found

    def faster(self, method: str, ratio: float, length: int, phase: str) -> float | None:
        """Speedup of a phase over dense: the median over tasks, whose replies were timed in turns."""
        name = "prefill_seconds" if phase == "prefill" else "token_seconds"
        ratios = []
        for cell in self.cells:
            dense = self.cell("dense", 1.0, cell.task, length)
            if (cell.method, cell.ratio, cell.length) != (method, ratio, length) or dense is None:
                continue
            before, after = getattr(dense, name), getattr(cell, name)
            if before and after:
                ratios.append(before / after)
        return statistics.median(ratios) if ratios else None

    def as_dict(self) -> dict[str, Any]:
        """The results for JSON."""
        cells = [
            {**asdict(c), "score": c.score, "variance": mean_and_variance(c.scores)[1], "samples": len(c.scores)}
            for c in self.cells
        ]
        safe = {m: {str(n): self.safe(m, n) for n in self.lengths()} for m in self.plan.methods}
        effects = {name: found.as_dict() for name, found in self.effects.items()}
        return {
            "name": self.name,
            "weights": self.weights,
            "cells": cells,
            "attention_error": [
                {"method": method, "ratio": ratio, "length": length, "error": error}
                for (method, ratio, length), error in self.errors.items()
            ],
            "safe": safe,
            "refused": self.refused,
            "beyond": self.beyond,
            "side_effects": {"length": max(self.plan.lengths), "rows": effects} if effects else None,
        }


def _judged(cell: Cell) -> bool:
    return cell.method == "dense" and cell.score >= ABLE and len(cell.scores) >= FEWEST


def study(
    reader: Reader,
    plan: Plan,
    store: Store,
    *,
    seconds: float | None = None,
    say: Say = lambda sentence: None,
    on_progress: Callable[[str, int, int], None] = lambda doing, done, count: None,
) -> Found:
    """Ask all questions of a plan, except for replies that are already stored.

    All methods answer a sample before the next one is asked, so that they have answered about as many when the time is
    over.

    Args:
        seconds: time limit; None for no limit.

    Raises:
        Unsupported: for lengths beyond the model's positions, and for models whose attention cannot be made sparse, or by
            none of the methods.
    """
    sizes = Sizes.of(reader.model)
    sparsify(reader.model, Method()).undo()
    chosen = [(method, ratio) for method in plan.methods for ratio in plan.ratios]
    fitting = [(method, ratio) for method, ratio in chosen if compresses(method, ratio)]
    for method, ratio in fitting or chosen:
        for length in plan.lengths:
            at_compression(method, ratio, length)
    if reader.longest is not None and max(plan.lengths) > reader.longest:
        raise Unsupported(
            f"{max(plan.lengths)} tokens with {reader.name}",
            supported=f"its positions, {reader.longest}",
            nearest=f"--lengths {reader.longest}",
        )
    farther = beyond(reader.trained, max(plan.lengths))
    if farther:
        say(farther)
    began, identity, data = time.monotonic(), weights_digest(reader.model), _data(plan.data)
    tasks: dict[str, Any] = {
        name: Continuation(reader, plan.data, CONTINUED) if name == TEXT else _task(name, plan) for name in plan.tasks
    }
    refused = {f"{method} at {ratio:g}x": FIXED for method, ratio in chosen if not compresses(method, ratio)}
    unfit = _unfit(reader.model, fitting, plan.lengths[0])
    refused |= {method: str(error) for method, error in unfit.items()}
    if fitting and unfit.keys() == {method for method, _ in fitting}:
        raise next(iter(unfit.values()))
    fitting = [(method, ratio) for method, ratio in fitting if method not in unfit]
    for what, why in refused.items():
        say(f"{what} is left out: {why}")
    variants = [("dense", 1.0), *fitting]
    total, done, over = plan.samples * len(plan.lengths) * len(tasks) * len(variants), 0, False
    rows: dict[tuple[str, float, str, int], list[dict[str, Any]]] = {}
    for number in range(plan.samples):
        for length in plan.lengths:
            for name, task in tasks.items():
                asked: tuple[list[int], Any] | None = None
                for method, ratio in variants:
                    done += 1
                    where = f"{name} at {length}"
                    if where in refused:
                        continue
                    key = {
                        "model": identity,
                        "task": name,
                        "wording": plan.wording,
                        "data": data,
                        "length": length,
                        "method": method,
                        "ratio": ratio,
                        "sample": number,
                    }
                    row = store.get(KIND, key)
                    if row is None:
                        if over or (seconds is not None and time.monotonic() - began > seconds):
                            over = True
                            continue
                        on_progress(f"{name} at {length}, sample {number + 1}: {method} {ratio:g}x", done, total)
                        try:
                            asked = asked or _prepared(reader, task, number, length)
                            payload = _asked(reader, task, asked, method, ratio, length)
                        except Unsupported as error:
                            refused[where] = str(error)
                            say(f"{where} is left out: {error}")
                            continue
                        store.put(KIND, key, payload)
                    else:
                        payload = row.payload
                    rows.setdefault((method, ratio, name, length), []).append(payload)
    cells = [_cell(sizes, *key, payloads) for key, payloads in rows.items()]

    def late() -> bool:
        return over or (seconds is not None and time.monotonic() - began > seconds)

    own = {"model": identity, "wording": plan.wording, "data": data}
    errors, over = _errors(reader, tasks, cells, store, own, late, on_progress)
    effects: dict[str, Effects] = {}
    if plan.effects:
        try:
            probes = Probes(reader, max(plan.lengths), plan.data)
        except Unsupported as error:
            refused["side effects"] = str(error)
            say(f"side effects are left out: {error}")
        else:
            own = {"model": identity, "data": data}
            effects, over = _effects(reader, plan, probes, variants, store, own, late, on_progress)
    return Found(reader.name, sizes.weights, plan, cells, refused, over, effects, farther, errors)


def _errors(
    reader: Reader,
    tasks: dict[str, Any],
    cells: Sequence[Cell],
    store: Store,
    identity: dict[str, Any],
    late: Callable[[], bool],
    on_progress: Callable[[str, int, int], None],
) -> tuple[dict[tuple[str, float, int], float], bool]:
    """The error of each method's attention on the first sample of the first task asked at a length; and whether the time
    ran out."""
    first: dict[int, str] = {}
    for cell in cells:
        first.setdefault(cell.length, cell.task)
    asked = [c for c in cells if c.method != "dense" and c.task == first[c.length]]
    found: dict[tuple[str, float, int], float] = {}
    over, prompts = late(), dict[int, list[int]]()
    for number, cell in enumerate(asked):
        key = identity | {"task": cell.task, "length": cell.length, "method": cell.method, "ratio": cell.ratio}
        row = store.get(ERRORS, key)
        if row is None:
            over = over or late()
            if over:
                continue
            on_progress(f"attention error: {cell.method} {cell.ratio:g}x", number, len(asked))
            if cell.length not in prompts:
                prompts[cell.length], _ = _prepared(reader, tasks[cell.task], 0, cell.length)
            beside = Beside(at_compression(cell.method, cell.ratio, cell.length))
            with sparsely(reader.model, beside):
                reply(reader, prompts[cell.length], CONTINUED)
            payload = {phase: beside.error(phase) for phase in phases_of(cell.method)}
            store.put(ERRORS, key, payload)
        else:
            payload = row.payload
        found[cell.method, cell.ratio, cell.length] = max(payload.values())
    return found, over


def _unfit(model: Any, variants: Iterable[tuple[str, float]], length: int) -> dict[str, Unsupported]:
    """Why the model cannot run some of the methods."""
    found = {}
    for method, ratio in dict(variants).items():
        try:
            sparsify(model, at_compression(method, ratio, length)).undo()
        except Unsupported as error:
            found[method] = error
    return found


def _effects(
    reader: Reader,
    plan: Plan,
    probes: Probes,
    variants: Sequence[tuple[str, float]],
    store: Store,
    identity: dict[str, Any],
    late: Callable[[], bool],
    on_progress: Callable[[str, int, int], None],
) -> tuple[dict[str, Effects], bool]:
    """Side effects by variant, for as many samples as all variants have answered; and whether the time ran out."""
    length = probes.length
    found: dict[tuple[str, float], list[dict[str, Any]]] = {variant: [] for variant in variants}
    total, over = plan.effects * len(variants), False
    for number in range(plan.effects):
        for i, (method, ratio) in enumerate(variants):
            key = identity | {"length": length, "method": method, "ratio": ratio, "sample": number}
            row = store.get(EFFECTS, key)
            if row is None:
                over = over or late()
                if over:
                    continue
                on_progress(f"side effects, {number + 1}: {method} {ratio:g}x", number * len(variants) + i, total)
                with sparsely(reader.model, at_compression(method, ratio, length)):
                    payload = asdict(probes.ask(reader, number))
                store.put(EFFECTS, key, payload)
            else:
                payload = row.payload
            found[method, ratio].append(payload)
    count = min(map(len, found.values()))
    if not count:
        return {}, over
    names = {v: "dense" if v[0] == "dense" else f"{v[0]} {v[1]:g}x" for v in variants}
    return {names[variant]: Effects.of(rows[:count]) for variant, rows in found.items()}, over


def _data(given: Paths | None) -> str | None:
    """A digest of the user's data."""
    if given is None:
        return None
    documents, _ = read_documents(given, "text")
    return hashlib.blake2b(b"\0".join(document.text for document in documents), digest_size=8).hexdigest()


def _task(name: str, plan: Plan) -> LongTask:
    takes = name.startswith("qa_") and not (name != "qa_squad" and str(plan.data).endswith(".json"))
    return create_long_task(name, plan.wording, **({"data": plan.data} if takes and plan.data is not None else {}))


def _prepared(reader: Reader, task: Any, number: int, length: int) -> tuple[list[int], Any]:
    """The token ids of a prompt, and what its reply is scored against; raises Unsupported if the model lacks positions for
    a prompt of this length and a reply, or the :data:`CONTINUED` tokens by which errors of attention are judged."""
    if isinstance(task, Continuation):
        return task.sample(number, length)

    def count(text: str) -> int:
        return len(reader.encode(text))

    framed = (lambda text: text) if task.brief else reader.prompt
    sample: Sample = task.sample(number, length, lambda text: count(framed(text)))
    reader.check_positions(length + max(task.new_tokens(sample, count), CONTINUED))
    return reader.encode(framed(sample.prompt)), sample


def _asked(
    reader: Reader, task: Any, asked: tuple[list[int], Any], method: str, ratio: float, length: int
) -> dict[str, Any]:
    """A reply's score and measurements."""
    prompt, expected = asked
    chosen = at_compression(method, ratio, length)
    with sparsely(reader.model, chosen) as sparse:
        if isinstance(task, Continuation):
            found = reply(reader, prompt, len(expected), forced=expected)
            score = sum(a == b for a, b in zip(found.tokens, expected, strict=True)) / len(expected)
        else:
            most = task.new_tokens(expected, lambda text: len(reader.encode(text)))
            found = reply(reader, prompt, most, until="\n" if task.brief else "</answer>")
            score = task.score(reader.decode(found.tokens), expected)
        measured = sparse.measured()
    return {
        "score": score,
        "written": written(chosen),
        "tokens": len(prompt),
        "reply": len(found.tokens),
        "prefill_seconds": found.prefill,
        "token_seconds": found.decode / found.steps if found.steps else None,
        **{name: measured[name] for name in ("prefill", "decode", "cache")},
    }


def _cell(sizes: Sizes, method: str, ratio: float, task: str, length: int, payloads: Sequence[dict[str, Any]]) -> Cell:
    chosen = at_compression(method, ratio, length)

    def mean(name: str) -> float:
        return statistics.fmean(payload[name] for payload in payloads)

    tokens = [p["token_seconds"] for p in payloads if p["token_seconds"] is not None]
    n, prefill, decode = round(mean("tokens")), mean("prefill"), mean("decode")
    return Cell(
        method,
        ratio,
        task,
        length,
        payloads[0]["written"],
        tuple(payload["score"] for payload in payloads),
        prefill,
        decode,
        mean("cache"),
        statistics.median(p["prefill_seconds"] for p in payloads),
        statistics.median(tokens) if tokens else None,
        prefill_flops(sizes, n, prefill, prefill_index(chosen, sizes, n)),
        decode_flops(sizes, n + 1, decode, decode_index(chosen, sizes, n + 1)),
        decode_bytes(chosen, sizes, n + 1, decode),
    )


def phases_of(method: str) -> tuple[str, ...]:
    """The phases in which a method, or a pair of methods, saves work."""
    return tuple(phase for part in method.split(" + ") for phase in METHODS[part].phases)


def recommend(found: Found) -> tuple[dict[str, dict[str, float]], str]:
    """The safe compression of each method at each length, and sentences on what to use at the longest length.

    A compression is safe if no task that the dense model can do shows a loss there or at smaller ones.
    """
    safe = {
        method: {str(n): min(by_task.values()) for n in found.lengths() if (by_task := found.safe(method, n))}
        for method in found.plan.methods
    }
    lengths = found.lengths()
    judged = [n for n in lengths if any(str(n) in by_length for by_length in safe.values())]
    if not judged:
        asked = max((len(c.scores) for c in found.cells), default=0)
        reason = (
            f"{asked} samples per task are too few (--samples {FEWEST} or more, or a longer --budget)"
            if asked < FEWEST
            else f"the dense model scores below {ABLE} on every task (try --wording brief, or --tasks text)"
        )
        return safe, f"Nothing can be said: {reason}."
    length = judged[-1]
    sentences = []
    for phases, what in ((("prefill",), "reading prompts"), (("decode",), "writing"), (("prefill", "decode"), "both")):
        here = {m: r[str(length)] for m, r in safe.items() if phases_of(m) == phases and str(length) in r}
        phase = phases[-1]
        if not here:
            continue
        best = _best(found, here, length, phase)
        if here[best] <= 1:
            sentences.append(f"For {what} keep dense attention: every method loses at the smallest compression tried.")
            continue
        faster = found.faster(best, here[best], length, phase)
        safely = f"{best} is safe up to {here[best]:g}x"
        if faster is not None and faster < NOTICEABLE:
            sentences.append(
                f"For {what} {safely}, but saves no time at this length ({faster:.2g} times as fast as dense)."
            )
        else:
            timed = "" if faster is None else f", {faster:.2g} times as fast as dense here"
            sentences.append(f"For {what} use {best}, safe up to {here[best]:g}x{timed}.")
    able = found.able(length)
    dense = [cell for task in able if (cell := found.cell("dense", 1.0, task, length)) is not None]
    blind = max(noticeable_loss(cell.scores) for cell in dense)
    told = f"At {length} tokens, by {', '.join(able)}: "
    missing = [task for task in found.plan.tasks if task not in able and f"{task} at {length}" not in found.refused]
    tail = f" Losses below about {blind:.2g} could not be noticed with {min(len(c.scores) for c in dense)} samples."
    if missing:
        tail += f" The dense model cannot do {', '.join(missing)}, so these say nothing."
    return safe, told + " ".join(sentences) + tail


def _best(found: Found, safe: dict[str, float], length: int, phase: str) -> str:
    """The method with the largest safe compression; of several the fastest, and of those that are about as fast the one
    whose worst task keeps most."""
    most = max(safe.values())
    faster = {m: found.faster(m, most, length, phase) or 0.0 for m, ratio in safe.items() if ratio == most}
    alike = [m for m in faster if faster[m] * ALIKE >= max(faster.values())]
    return max(alike, key=lambda m: (min(found.relative(m, most, length).values(), default=0.0), faster[m]))


def points(studies: Iterable[Found], method: str) -> dict[int, list[Point]]:
    """Points by length for models of several sizes, dense and with one method: scores are averaged over tasks for each
    sample number; the cost is that of a prompt and one more token."""
    found: dict[int, list[Point]] = {}
    for one in studies:
        for length in one.lengths():
            for ratio in (1.0, *one.plan.ratios):
                name = "dense" if ratio == 1 else method
                cells = [c for task in one.plan.tasks if (c := one.cell(name, ratio, task, length)) is not None]
                if not cells:
                    continue
                count = min(len(c.scores) for c in cells)
                scores = tuple(statistics.fmean(c.scores[i] for c in cells) for i in range(count))
                cost = statistics.fmean(c.flops + c.token_flops for c in cells)
                found.setdefault(length, []).append(Point(one.weights, ratio, cost, scores))
    return found


def observations(studies: Iterable[Found], method: str) -> list[Observation]:
    """The data for a method's scaling law: mean scores over tasks for each size, length and compression."""
    return [
        Observation(point.size, length, point.ratio, point.score)
        for length, at in points(studies, method).items()
        for point in at
    ]
