"""`regard compare`: train mechanisms on the same work, measure quality and cost on this machine, and say which to take.

Every mechanism gets the same backbone at the same number of parameters (the feed-forward width absorbs the difference),
the same batches in the same order, the same small learning-rate search and the same budget. Each measurement is a row of
the store the moment it exists, so a comparison that is killed goes on with the same command.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regard.catalogue import get_mechanism
from regard.contract import Context, Kind, Mechanism, Pattern, Unsupported, at_least, one_of
from regard.models import (
    Encoder,
    EncoderConfig,
    LanguageModel,
    LanguageModelConfig,
    count_parameters,
    match_parameters,
    save_pretrained,
)
from regard.tasks import Task, cross_entropy
from regard.training import TrainConfig, evaluate, train
from regard.workbench import provenance
from regard.workbench.budget import Budget
from regard.workbench.cost import model_costs
from regard.workbench.recommend import PREFERENCES, Recommendation, recommend
from regard.workbench.report import write_report
from regard.workbench.statistics import Comparison, Scores, items_array, pareto_front
from regard.workbench.store import Store

RATES = (1e-3, 3e-3, 1e-2)
SEARCH_SHARE = 0.2
CALIBRATION_SECONDS = 20.0
FEWEST_STEPS = 20
CURVE_POINTS = 100
SAFETY = 0.85
"""Part of a time budget that is planned; the rest absorbs a machine that slows down."""


@dataclass(frozen=True)
class CompareSettings:
    """What to compare and how.

    Attributes:
        mechanisms: catalogue names. `softmax`, or else the first, sets the number of parameters.
        budget: time of the whole comparison, or tokens or FLOPs of each run.
        seeds: runs of each mechanism on each task; two or more let differences be judged.
        dim, layers, heads: of the backbone.
        batch_tokens: tokens of a training step; the batch size follows from the task's length.
        rates: learning rates tried, in runs of a fifth of the steps.
        lengths: at which inference, decoding, memory and state are measured.
        at_length: the one of them that the table and the recommendation use.
        prefer: what decides among mechanisms of equal quality; one of `PREFERENCES`.
        keep_models: keep the winner's weights of the first seed.
    """

    mechanisms: tuple[str, ...]
    budget: Budget
    seeds: int = 2
    dim: int = 64
    layers: int = 2
    heads: int = 4
    batch_tokens: int = 2048
    rates: tuple[float, ...] = RATES
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    at_length: int = 2048
    prefer: str = "inference"
    keep_models: bool = False

    def __post_init__(self) -> None:
        if not self.mechanisms:
            raise Unsupported("a comparison of no mechanisms", supported="one or more names from `regard list`")
        twice = {m for m in self.mechanisms if self.mechanisms.count(m) > 1}
        if twice:
            raise Unsupported(f"mechanism {sorted(twice)[0]!r} twice", supported="each mechanism once")
        for name in ("seeds", "dim", "layers", "heads", "batch_tokens"):
            at_least(name, getattr(self, name), 1)
        one_of("prefer", self.prefer, PREFERENCES)
        if not self.rates or min(self.rates) <= 0:
            raise Unsupported(f"rates={self.rates}", supported="positive learning rates", nearest=f"rates={RATES}")
        if self.at_length not in self.lengths:
            raise Unsupported(
                f"at_length={self.at_length}",
                supported=f"one of the measured lengths {', '.join(map(str, self.lengths))}",
                nearest=f"at_length={min(self.lengths, key=lambda n: abs(n - self.at_length))}",
            )


@dataclass
class Progress:
    """Where a comparison stands, for whoever shows it.

    Attributes:
        doing: the cell in flight, in words.
        done: planned seconds of work that are behind (estimates from the calibration).
        total: planned seconds of work.
        loss: of the last training step.
    """

    doing: str = ""
    done: float = 0.0
    total: float = 0.0
    loss: float = math.nan


@dataclass
class Outcome:
    """What a comparison found.

    Attributes:
        summary: of each task, an entry for each mechanism.
        recommendation: which to take, why, and what could not be separated.
        report: the HTML file.
        store: the rows behind it.
    """

    summary: dict[str, list[dict[str, Any]]]
    recommendation: Recommendation
    report: Path
    store: Path
    models: dict[str, Path] = field(default_factory=dict)


Watch = Callable[[Progress], None]


def model_config(card: Mechanism, task: Task, settings: CompareSettings) -> Any:
    """The backbone of a task with `card` in its place: in every layer, as the pool, or as the projections."""
    if task.pattern not in (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF):
        raise Unsupported(
            f"task {task.name} of pattern {task.pattern}", supported="causal-self and noncausal-self tasks"
        )
    plan: Any = card.name
    if "length" in card.config.__dataclass_fields__:  # type: ignore[attr-defined]
        plan = [(card.name, {"length": task.length})] * settings.layers  # a constant that follows the training length
    if card.kind is Kind.PROJECTION:
        plan = [("softmax", {"linear": card.name})] * settings.layers
    shared: dict[str, Any] = {
        "dim": settings.dim,
        "num_layers": settings.layers if isinstance(plan, str) else None,
        "num_heads": settings.heads,
        "max_length": max(task.length, *settings.lengths),
    }
    if card.kind is Kind.POOLING:
        if task.objective != "classification":
            raise Unsupported(
                f"{card.name}, which pools a sequence, on the task {task.name}",
                supported="classification tasks: listops, images",
            )
        return EncoderConfig(
            task.num_classes or 0, task.vocab_size, task.features, plan="softmax", pool=card.name, **shared
        )
    card.require_pattern(task.pattern)
    if task.objective == "next-token":
        return LanguageModelConfig(task.vocab_size or 0, plan=plan, **shared)
    return EncoderConfig(task.num_classes or 0, task.vocab_size, task.features, plan=plan, **shared)


def build(config: Any, seed: int) -> nn.Module:
    """A model with the initial weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(config) if isinstance(config, LanguageModelConfig) else Encoder(config)


class _Work:
    """One task's share of a comparison: matched models, step counts and the cells to measure."""

    def __init__(self, task: Task, settings: CompareSettings) -> None:
        self.task, self.settings = task, settings
        cards = [get_mechanism(name) for name in settings.mechanisms]
        configs = {card.name: model_config(card, task, settings) for card in cards}
        self.target = count_parameters(configs.get("softmax", next(iter(configs.values()))))
        self.configs = {name: match_parameters(config, self.target) for name, config in configs.items()}
        self.batch_size = max(1, settings.batch_tokens // task.length)
        self.items = sum(batch.size for batch in task.evaluation_batches(64))
        self.search_items = max(1, self.items // 4) if self.items > 1 and len(settings.rates) > 1 else 0
        self.identity = {
            "task": task.name,
            "data": _digest(task),
            "length": task.length,
            "dim": settings.dim,
            "layers": settings.layers,
            "heads": settings.heads,
            "parameters": self.target,
            "batch_size": self.batch_size,
        }
        self.steps: dict[str, int] = {}
        self.step_seconds: dict[str, float] = {}
        self.evaluation_seconds: dict[str, float] = {}

    def calibrate(self, seconds: float) -> None:
        """Time training steps and an evaluation of each model."""
        share = seconds / len(self.configs)
        for name, config in self.configs.items():
            model = build(config, 0)
            timed = TrainConfig(steps=1_000_000, batch_size=self.batch_size, measure_memory=False)
            started = time.monotonic()
            train(model, self.task, TrainConfig(steps=2, batch_size=self.batch_size, measure_memory=False))
            history = train(model, self.task, timed, deadline=max(time.monotonic() + 0.2, started + 0.7 * share))
            steps = max(1, len(history.curve))
            self.step_seconds[name] = history.seconds / steps * 1.15 if history.curve else share
            started = time.monotonic()
            evaluate(model, self.task, self.batch_size, last=min(self.items, self.batch_size))
            self.evaluation_seconds[name] = (time.monotonic() - started) * max(1.0, self.items / self.batch_size)

    def seconds_a_step(self) -> float:
        """Seconds of all cells of the task for each step of a full run."""
        runs = self.settings.seeds + self.search_runs * SEARCH_SHARE
        return runs * sum(self.step_seconds.values())

    def seconds_besides(self) -> float:
        """Seconds of all evaluations."""
        return sum(self.evaluation_seconds.values()) * (self.settings.seeds + self.search_runs * 0.25)

    @property
    def search_runs(self) -> int:
        return len(self.settings.rates) if len(self.settings.rates) > 1 else 0

    def search_steps(self, name: str) -> int:
        return max(1, round(self.steps[name] * SEARCH_SHARE))

    def train_config(self, name: str, rate: float, seed: int, steps: int) -> TrainConfig:
        return TrainConfig(
            steps=steps,
            batch_size=self.batch_size,
            learning_rate=rate,
            seed=seed,
            measure_memory=steps == self.steps[name],
        )

    def flops_a_step(self, name: str) -> float:
        model = build(self.configs[name], 0)
        batch = self.task.training_batch(0, 0, self.batch_size)
        with FlopCounterMode(display=False) as counter:
            cross_entropy(model(batch.inputs, context=Context(grid=batch.grid)).output, batch).backward()
        return float(counter.get_total_flops())


def _digest(task: Task) -> str:
    """What the task's data are, however they were made: a hash of training and held-out batches."""
    digest = hashlib.blake2b(digest_size=12)
    batches = [task.training_batch(step, seed, 4) for step, seed in ((0, 0), (1, 0), (0, 1))]
    for batch in [*batches, *task.evaluation_batches(64)]:
        for tensor in (batch.inputs, batch.targets):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def compare(
    tasks: Sequence[Task],
    settings: CompareSettings,
    output: str | Path,
    *,
    watch: Watch | None = None,
    say: Callable[[str], None] | None = None,
    command: str | None = None,
) -> Outcome:
    """Run a comparison, or go on with one.

    Args:
        tasks: each is trained on by every mechanism.
        settings: see :class:`CompareSettings`.
        output: folder of the store (``results.db``), the report and kept models. Rows that it has are not measured again.
        watch: called with the progress several times a second.
        say: called with sentences about what happens.
        command: command line to record and to print beside each row; that of the process when None.

    Raises:
        Unsupported: before any training, for a mechanism that a task's pattern or size rules out, a budget that is too
            small, or an output folder that cannot be written.
    """
    say = say or (lambda _: None)
    if not tasks:
        raise Unsupported("a comparison on no tasks", supported="one task or more")
    started = time.monotonic()
    works = [_Work(task, settings) for task in tasks]
    output = Path(output)
    with Store(output / "results.db", command=command) as store:
        beginning = provenance.now()
        _plan(store, works, settings, started, say)
        runner = _Runner(store, works, settings, output, watch or (lambda _: None), say, command or store.command)
        return runner.run(beginning)


def _plan(
    store: Store, works: Sequence[_Work], settings: CompareSettings, started: float, say: Callable[[str], None]
) -> None:
    """Decide how many steps each run takes; with a time budget this is stored, so that a resumed comparison agrees."""
    key = {
        "works": [w.identity for w in works],
        "mechanisms": list(settings.mechanisms),
        "budget": str(settings.budget),
        "seeds": settings.seeds,
        "rates": list(settings.rates),
        "machine": provenance.fingerprint()["machine_id"],
    }
    row = store.get("plan", key)
    if row is None:
        seconds = _calibration_seconds(settings.budget)
        say(f"calibrating for about {seconds:.0f} s")
        for work in works:
            work.calibrate(seconds / len(works))
        _count_steps(works, settings, time.monotonic() - started)
        payload = [
            {"steps": w.steps, "step_seconds": w.step_seconds, "evaluation_seconds": w.evaluation_seconds}
            for w in works
        ]
        store.put("plan", key, payload)
        row = store.get("plan", key)
        assert row is not None
    for work, planned in zip(works, row.payload, strict=True):
        work.steps = planned["steps"]
        work.step_seconds, work.evaluation_seconds = planned["step_seconds"], planned["evaluation_seconds"]
        counts = sorted(set(work.steps.values()))
        tokens = " to ".join(f"{n * work.batch_size * work.task.length:,}" for n in counts[:1] + counts[1:][-1:])
        say(
            f"{work.task.name}: {work.target:,} parameters, {' to '.join(map(str, counts[:1] + counts[1:][-1:]))} steps of "
            f"{work.batch_size} x {work.task.length} tokens ({tokens} tokens a run)"
        )


def _calibration_seconds(budget: Budget) -> float:
    """Work that is counted in tokens or FLOPs needs the calibration only to tell the remaining time."""
    share = CALIBRATION_SECONDS / 4 if budget.unit != "seconds" else 0.1 * budget.amount
    return min(CALIBRATION_SECONDS, share)


def _count_steps(works: Sequence[_Work], settings: CompareSettings, spent: float) -> None:
    unit, amount = settings.budget.unit, settings.budget.amount
    for work in works:
        for name in work.configs:
            if unit == "tokens":
                work.steps[name] = round(amount / (work.batch_size * work.task.length))
            elif unit == "flops":
                work.steps[name] = round(amount / work.flops_a_step(name))
    if unit == "seconds":
        available = SAFETY * amount - spent - _cost_seconds(works, settings)
        for work in works:
            share = available / len(works) - work.seconds_besides()
            steps = int(share / work.seconds_a_step())
            work.steps = dict.fromkeys(work.configs, steps)
    for work in works:
        if min(work.steps.values()) < FEWEST_STEPS:
            least = _least_budget(works, settings, spent)
            raise Unsupported(
                f"budget {settings.budget}, which leaves fewer than {FEWEST_STEPS} steps a run on {work.task.name}",
                supported="a larger budget, fewer mechanisms, tasks or seeds",
                nearest=f"--budget {least}",
            )


def _cost_seconds(works: Sequence[_Work], settings: CompareSettings) -> float:
    """A generous estimate of the time that measuring costs takes: it is bounded by its own settings."""
    objectives = {work.task.objective for work in works}
    return len(objectives) * len(settings.lengths) * 0.5 * len(settings.mechanisms) + 5.0


def _least_budget(works: Sequence[_Work], settings: CompareSettings, spent: float) -> Budget:
    if settings.budget.unit == "tokens":
        return Budget("tokens", float(max(2 * FEWEST_STEPS * w.batch_size * w.task.length for w in works)))
    if settings.budget.unit == "flops":
        return Budget("flops", max(2 * FEWEST_STEPS * w.flops_a_step(n) for w in works for n in w.configs))
    work = max(w.seconds_besides() + 2 * FEWEST_STEPS * w.seconds_a_step() for w in works)
    minutes = math.ceil((work * len(works) + _cost_seconds(works, settings) + spent) / SAFETY / 60)
    return Budget("seconds", 60.0 * minutes)


class _Runner:
    """Measures the cells that are missing from the store, then summarises."""

    def __init__(
        self,
        store: Store,
        works: Sequence[_Work],
        settings: CompareSettings,
        output: Path,
        watch: Watch,
        say: Callable[[str], None],
        command: str,
    ) -> None:
        self.store, self.works, self.settings, self.output = store, works, settings, output
        self.watch, self.say, self.command = watch, say, command
        self.cells: dict[str, list[dict[str, Any]]] = {"quality": [], "cost": [], "search": []}
        self.progress = Progress(total=sum(self._planned(w) for w in works) + _cost_seconds(works, settings))

    def _planned(self, work: _Work) -> float:
        return (
            sum(work.steps[n] * s for n, s in work.step_seconds.items())
            * (self.settings.seeds + work.search_runs * SEARCH_SHARE)
            + work.seconds_besides()
        )

    def run(self, started: str) -> Outcome:
        quality: dict[str, list[dict[str, Any]]] = {}
        searches: list[dict[str, Any]] = []
        for work in self.works:
            rates = {}
            for name in work.configs:
                rates[name], trials = self._search(work, name)
                searches += trials
            quality[work.task.name] = [
                self._train(work, name, rates[name], seed)
                for seed in range(self.settings.seeds)
                for name in work.configs
            ]
        costs = self._costs()
        self.progress.done = self.progress.total
        self.watch(self.progress)
        return self._conclude(started, quality, searches, costs)

    def _cell(self, work: _Work, name: str, **settings: Any) -> dict[str, Any]:
        return {**work.identity, "mechanism": name, "feed_forward": work.configs[name].feed_forward, **settings}

    def _search(self, work: _Work, name: str) -> tuple[float, list[dict[str, Any]]]:
        """The learning rate with the lowest held-out loss after short runs, from rows where there are some."""
        settings = self.settings
        if len(settings.rates) == 1:
            return settings.rates[0], []
        trials = []
        steps = work.search_steps(name)
        for rate in settings.rates:
            key = self._cell(work, name, lr=rate, seed=0, steps=steps, items=work.search_items)
            self.cells["search"].append(key)
            row = self.store.get("search", key)
            cost = steps * work.step_seconds[name] + 0.25 * work.evaluation_seconds[name]
            if row is None:
                self._doing(f"{work.task.name}: learning rate {rate:g} of {name}")
                model = build(work.configs[name], 0)
                history = train(
                    model, work.task, work.train_config(name, rate, 0, steps), on_step=self._on_step(work, name)
                )
                loss = score = math.nan
                if not history.diverged:
                    found = evaluate(model, work.task, work.batch_size, last=work.search_items)
                    loss, score = found.loss, found.score
                payload = {
                    "task": work.task.name,
                    "mechanism": name,
                    "lr": rate,
                    "seed": 0,
                    "score": score,
                    "loss": loss,
                    "diverged": history.diverged or not math.isfinite(loss),
                }
                self.store.put("search", key, payload)
                row = self.store.get("search", key)
                assert row is not None
                cost -= steps * work.step_seconds[name]
            self._advance(cost)
            trials.append(row.payload)
        sound = [t for t in trials if t["loss"] is not None]
        best = min(sound, key=lambda t: t["loss"])["lr"] if sound else min(settings.rates)
        return best, trials

    def _train(self, work: _Work, name: str, rate: float, seed: int) -> dict[str, Any]:
        """One full run, scored on the held-out items that did not choose the learning rate."""
        steps = work.steps[name]
        key = self._cell(work, name, lr=rate, seed=seed, steps=steps, items=[work.search_items, work.items])
        self.cells["quality"].append(key)
        row = self.store.get("quality", key)
        cost = steps * work.step_seconds[name] + work.evaluation_seconds[name]
        if row is None:
            self._doing(f"{work.task.name}: {name}, seed {seed}")
            model = build(work.configs[name], seed)
            history = train(
                model, work.task, work.train_config(name, rate, seed, steps), on_step=self._on_step(work, name)
            )
            items: list[tuple[float, float]] = []
            score = math.nan
            if not history.diverged:
                found = evaluate(model, work.task, work.batch_size, first=work.search_items)
                items, score = found.items, found.score
            if self.settings.keep_models and seed == 0:
                save_pretrained(model, self._model_folder(work, name))
            solved = None if work.task.solved is None else _reaches(work.task, score)
            payload = {
                "task": work.task.name,
                "mechanism": name,
                "seed": seed,
                "lr": rate,
                "metric": work.task.metric,
                "higher_is_better": work.task.higher_is_better,
                "score": score,
                "solved": solved,
                "items": items,
                "curve": _thin([[sum_, p.loss] for sum_, p in _tokens(history)]),
                "parameters": count_parameters(model),
                "feed_forward": work.configs[name].feed_forward,
                "tokens": history.tokens,
                "steps": len(history.curve),
                "seconds": history.seconds,
                "tokens_per_second": history.tokens_per_second,
                "peak_memory_bytes": history.peak_memory,
                "reproduce": self.command,
            }
            self.store.put("quality", key, payload)
            row = self.store.get("quality", key)
            assert row is not None
            cost -= steps * work.step_seconds[name]
        self._advance(cost)
        return row.payload

    def _costs(self) -> list[dict[str, Any]]:
        """Inference, decoding, memory and state, once for each kind of backbone, all mechanisms interleaved."""
        found = []
        measured = set()
        for work in self.works:
            if work.task.objective in measured:
                continue
            measured.add(work.task.objective)
            keys = {
                name: self._cell(
                    work,
                    name,
                    lengths=list(self.settings.lengths),
                    machine=provenance.fingerprint()["machine_id"],
                    beside=list(self.settings.mechanisms),
                )
                for name in work.configs
            }
            self.cells["cost"] += keys.values()
            rows = {name: self.store.get("cost", key) for name, key in keys.items()}
            if any(row is None for row in rows.values()):
                self._doing(f"{work.task.name}: time and memory against length")
                models = {name: build(config, 0) for name, config in work.configs.items()}
                make_input = functools.partial(_input, work.task)
                costs = model_costs(models, self.settings.lengths, make_input, seconds=0.5)
                for name, cost in costs.items():
                    self.store.put("cost", keys[name], {"task": work.task.name, "mechanism": name, **cost})
                rows = {name: self.store.get("cost", key) for name, key in keys.items()}
            found += [row.payload for row in rows.values() if row is not None]
        return found

    def _conclude(
        self,
        started: str,
        quality: Mapping[str, list[dict[str, Any]]],
        searches: list[dict[str, Any]],
        costs: list[dict[str, Any]],
    ) -> Outcome:
        settings = self.settings
        comparisons = {task: _comparison(rows) for task, rows in quality.items()}
        objective = {w.task.name: w.task.objective for w in self.works}
        cost_of = {(objective[row["task"]], row["mechanism"]): row for row in costs}
        summary = {
            task: _summarise(
                rows,
                comparisons[task],
                {m: cost_of.get((objective[task], m), {}) for m in settings.mechanisms},
                settings,
            )
            for task, rows in quality.items()
        }
        metrics = {w.task.name: (w.task.metric, w.task.higher_is_better) for w in self.works}
        advice = recommend(
            summary,
            comparisons,
            metrics,
            prefer=settings.prefer,
            budget=str(settings.budget),
            at_length=settings.at_length,
        )
        models = self._kept_models(advice)
        edges = _edges(searches, settings.rates)
        if edges:
            advice.notes.append(f"The best learning rate lay on the edge of the grid for {', '.join(edges)}.")
        run = {
            "title": "Which attention mechanism? " + ", ".join(quality),
            "command": self.command,
            "tasks": list(quality),
            "mechanisms": list(settings.mechanisms),
            "seeds": list(range(settings.seeds)),
            "budget": str(settings.budget),
            "settings": _described(self.works, settings),
            "started": started,
            "finished": provenance.now(),
            "recommendation": advice.as_dict(),
            "resolution": {t: c.resolution for t, c in comparisons.items() if math.isfinite(c.resolution)},
        }
        self.store.put("run", {"run": self.store.run}, {**run, "summary": summary, "cells": self.cells})
        report = render_report(self.store, self.output / "report.html", self.store.run)
        return Outcome(summary, advice, report, self.store.path, models)

    def _model_folder(self, work: _Work, name: str) -> Path:
        return self.output / "models" / f"{work.task.name}-{name}"

    def _kept_models(self, advice: Recommendation) -> dict[str, Path]:
        """The winner's model of each task; the lines that load it go into the notes."""
        if not self.settings.keep_models or advice.winner is None:
            return {}
        found = {}
        for work in self.works:
            folder = self._model_folder(work, advice.winner)
            if folder.exists():
                found[work.task.name] = folder
                advice.notes.append(
                    f"The {work.task.name} model: from regard.models import from_pretrained; "
                    f"model = from_pretrained({str(folder)!r})"
                )
        return found

    def _doing(self, what: str) -> None:
        self.progress.doing = what
        self.watch(self.progress)

    def _advance(self, seconds: float) -> None:
        self.progress.done += seconds
        self.watch(self.progress)

    def _on_step(self, work: _Work, name: str) -> Callable[[Any], None]:
        def on_step(point: Any) -> None:
            self.progress.loss = point.loss
            self._advance(work.step_seconds[name])

        return on_step


def render_report(store: Store, path: Path, run: str | None = None) -> Path:
    """Write the report of a finished comparison from its rows: the one of id `run`, or the newest.

    Raises:
        Unsupported: when the store holds no finished comparison, or the file cannot be written.
    """
    finished = store.rows("run", run)
    if not finished:
        raise Unsupported(
            f"a report from {store.path}, which holds no finished comparison",
            supported="the output folder of a comparison that has ended",
            nearest="regard compare with the same options, which goes on where it stopped",
        )
    row = finished[-1]
    rows = {
        kind: [found.payload for key in keys if (found := store.get(kind, key)) is not None]
        for kind, keys in row.payload["cells"].items()
    }
    return write_report(
        path,
        run=row.payload,
        quality=rows["quality"],
        cost=rows["cost"],
        search=rows["search"],
        summary=row.payload["summary"],
        machine=row.machine,
        revision=row.git_revision,
    )


def _input(task: Task, length: int) -> tuple[Tensor, Context]:
    generator = torch.Generator().manual_seed(0)
    if task.vocab_size is not None:
        return torch.randint(task.vocab_size, (1, length), generator=generator), Context()
    width = math.isqrt(length)
    grid = (width, width) if task.grid is not None else None
    tokens = width * width if grid is not None else length
    return torch.randn(1, tokens, task.features or 1, generator=generator), Context(grid=grid)


def _reaches(task: Task, score: float) -> bool:
    assert task.solved is not None
    return score >= task.solved if task.higher_is_better else score <= task.solved


def _tokens(history: Any) -> list[tuple[int, Any]]:
    each = history.tokens / max(1, len(history.curve))
    return [(round(each * (i + 1)), point) for i, point in enumerate(history.curve)]


def _thin(points: list[list[float]]) -> list[list[float]]:
    """At most CURVE_POINTS points, each the mean of a stretch of steps."""
    size = max(1, math.ceil(len(points) / CURVE_POINTS))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [[part[-1][0], sum(loss for _, loss in part) / len(part)] for part in parts]


def _comparison(rows: Sequence[Mapping[str, Any]]) -> Comparison:
    items: dict[str, dict[int, Any]] = {}
    for row in rows:
        if row["score"] is not None:
            items.setdefault(row["mechanism"], {})[row["seed"]] = items_array(row["items"])
    return Comparison({name: Scores(by_seed) for name, by_seed in items.items()})


def _at(rows: Sequence[Sequence[float]] | None, length: int) -> float | None:
    return next((row[1] for row in rows or () if row[0] == length), None)


def _summarise(
    rows: Sequence[Mapping[str, Any]],
    comparison: Comparison,
    costs: Mapping[str, Mapping[str, Any]],
    settings: CompareSettings,
) -> list[dict[str, Any]]:
    """One entry a mechanism, best first."""
    higher = rows[0]["higher_is_better"]
    entries = []
    for name in settings.mechanisms:
        own = [row for row in rows if row["mechanism"] == name]
        scores = comparison.scores.get(name)
        complete = scores is not None and len(scores.items) == len(own)
        speeds = sorted(row["tokens_per_second"] for row in own if row["tokens_per_second"] is not None)
        peaks = [row["peak_memory_bytes"] for row in own if row["peak_memory_bytes"] is not None]
        solved = [row["solved"] for row in own if row["solved"] is not None]
        entries.append(
            {
                "mechanism": name,
                "mean": scores.mean if scores is not None and complete else None,
                "standard_error": scores.standard_error if scores is not None and complete else None,
                "seeds": len(own),
                "parameters": own[0]["parameters"],
                "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
                "inference_ms": _at(costs[name].get("latency"), settings.at_length),
                "decode_tokens_per_second": _at(costs[name].get("decode"), settings.at_length),
                "peak_memory_bytes": max(peaks) if peaks else None,
                "state_bytes": _at(costs[name].get("state_bytes"), settings.at_length),
                "solved": all(solved) if solved else None,
                "on_front": False,
                "separable_from_best": None,
            }
        )
    scored = [e for e in entries if e["mean"] is not None and math.isfinite(e["mean"])]
    sign = 1 if higher else -1
    points = {e["mechanism"]: (-e["inference_ms"], sign * e["mean"]) for e in scored if e["inference_ms"] is not None}
    front = pareto_front(points)
    best = max(scored, key=lambda e: sign * e["mean"])["mechanism"] if scored else None
    for entry in entries:
        entry["on_front"] = entry["mechanism"] in front
        if best is not None and entry in scored and comparison.degrees > 0:
            difference = comparison.difference(best, entry["mechanism"])
            entry["separable_from_best"] = entry["mechanism"] != best and difference.separable
    return sorted(entries, key=lambda e: -sign * e["mean"] if e["mean"] is not None else math.inf)


def _edges(searches: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> list[str]:
    """Mechanisms (and tasks) whose best rate is the first or last of the grid."""
    found = []
    for task, name in dict.fromkeys((t["task"], t["mechanism"]) for t in searches):
        own = [t for t in searches if (t["task"], t["mechanism"]) == (task, name) and t["loss"] is not None]
        if own and min(own, key=lambda t: t["loss"])["lr"] in (min(rates), max(rates)):
            found.append(f"{name} on {task}")
    return found


def _described(works: Sequence[_Work], settings: CompareSettings) -> dict[str, Any]:
    described: dict[str, Any] = {
        "backbone": f"{settings.layers} layers, width {settings.dim}, {settings.heads} heads",
        "learning rates tried": ", ".join(f"{r:g}" for r in settings.rates),
        "table and picture at": f"{settings.at_length} tokens, batch 1",
        "threads": torch.get_num_threads(),
    }
    for work in works:
        steps = sorted(set(work.steps.values()))
        described[f"{work.task.name}: run"] = (
            f"{work.target:,} parameters, {' to '.join(map(str, steps[:1] + steps[1:][-1:]))} steps of "
            f"{work.batch_size} x {work.task.length} tokens; {work.items - work.search_items} held-out items "
            f"({work.search_items} others chose the learning rate)"
        )
    return described
