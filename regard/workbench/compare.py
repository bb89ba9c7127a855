"""`regard compare`: train mechanisms on the same work, measure quality and cost on this machine, and say which to take.

Every mechanism gets the same backbone at the same number of parameters (the feed-forward width absorbs the difference),
the same batches in the same order, the same small learning-rate search and the same budget. Each measurement is a row of
the store the moment it exists, so a comparison that is killed goes on with the same command.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Context, Unsupported
from regard.measurement import provenance
from regard.measurement.sharding import shard
from regard.measurement.store import Store
from regard.models import StackConfig, count_parameters, save_pretrained
from regard.tasks import Task
from regard.training import evaluate, train
from regard.workbench.cost import model_costs
from regard.workbench.recommend import Recommendation, recommend
from regard.workbench.report import write_report
from regard.workbench.settings import CompareSettings
from regard.workbench.summary import (
    beside_baseline,
    by_tokens,
    comparison_of,
    rates_on_edge,
    skipped_steps,
    summarise,
    thin,
)
from regard.workbench.work import Work, build, cost_seconds, plan


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
        models: the winner's model of each task, where models are kept.
        baselines: name and score of the simple rule of each task that has one, and whether higher is better.
    """

    summary: dict[str, list[dict[str, Any]]]
    recommendation: Recommendation
    report: Path
    store: Path
    models: dict[str, Path] = field(default_factory=dict)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)


Watch = Callable[[Progress], None]


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
    with _begun(tasks, settings, output, watch, say, command) as runner:
        return runner.run()


def train_share(
    tasks: Sequence[Task],
    settings: CompareSettings,
    output: str | Path,
    share: str,
    *,
    watch: Watch | None = None,
    say: Callable[[str], None] | None = None,
    command: str | None = None,
) -> list[str]:
    """Only the training runs of some of a comparison's mechanisms, beside processes that do the others'.

    :func:`compare` with the same tasks, settings and folder then finds their rows, and measures costs, which such
    processes would disturb for each other.

    Args:
        share: ``"i/n"`` for share i of n of the mechanisms.

    Returns:
        The mechanisms of the share.

    Raises:
        Unsupported: as :func:`compare`, and for a share of another form.
    """
    names = shard(settings.mechanisms, share)
    with _begun(tasks, settings, output, watch, say, command) as runner:
        runner.train_all(names)
    return names


@contextmanager
def _begun(
    tasks: Sequence[Task],
    settings: CompareSettings,
    output: str | Path,
    watch: Watch | None,
    say: Callable[[str], None] | None,
    command: str | None,
) -> Iterator[_Runner]:
    """A comparison whose work is planned and whose store is open."""
    if not tasks:
        raise Unsupported("a comparison on no tasks", supported="one task or more")
    say = say or (lambda _: None)
    started = time.monotonic()
    works = [Work(task, settings) for task in tasks]
    for work in works:
        if work.few_items:
            say(work.few_items)
    output = Path(output)
    with Store(output / "results.db", command=command) as store:
        beginning = provenance.now()
        plan(store, works, settings, started, say)
        watch = watch or (lambda _: None)
        yield _Runner(store, works, settings, output, watch, say, command or store.command, beginning)


class _Runner:
    """Measures the cells that are missing from the store, then summarises."""

    def __init__(
        self,
        store: Store,
        works: Sequence[Work],
        settings: CompareSettings,
        output: Path,
        watch: Watch,
        say: Callable[[str], None],
        command: str,
        started: str,
    ) -> None:
        self.started = started
        self.store, self.works, self.settings, self.output = store, works, settings, output
        self.watch, self.say, self.command = watch, say, command
        self.cells: dict[str, list[dict[str, Any]]] = {"quality": [], "cost": [], "search": []}
        self.rates: dict[str, dict[str, float]] = {}
        self.progress = Progress()

    def _planned(self, names: Sequence[str]) -> float:
        return sum(
            work.runs * (work.steps[name] * work.step_seconds[name] + work.evaluation_seconds[name])
            for work in self.works
            for name in names
        )

    def run(self) -> Outcome:
        names = self.settings.mechanisms
        after = cost_seconds(self.works, self.settings)
        quality, searches = self.train_all(names, after)
        costs = self._costs()
        self.progress.done = self.progress.total
        self.watch(self.progress)
        return self._conclude(quality, searches, costs)

    def train_all(
        self, names: Sequence[str], after: float = 0.0
    ) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
        """All runs of these mechanisms: of each task its rows, and the trials of learning rates.

        Args:
            after: planned seconds of what follows, for the progress.
        """
        self.progress.total = self._planned(names) + after
        quality: dict[str, list[dict[str, Any]]] = {}
        searches: list[dict[str, Any]] = []
        for work in self.works:
            best = {}
            for name in names:
                best[name], trials = self._best_of_rates(work, name)
                searches += trials
            self.rates[work.task.name] = {name: row["lr"] for name, row in best.items()}
            rows = list(best.values())
            for seed in range(1, self.settings.seeds):
                rows += [self._train(work, name, row["lr"], seed) for name, row in best.items()]
            self.cells["quality"] += [self._quality_key(work, r["mechanism"], r["lr"], r["seed"]) for r in rows]
            quality[work.task.name] = rows
        return quality, searches

    def _cell(self, work: Work, name: str, **settings: Any) -> dict[str, Any]:
        return {**work.identity, "mechanism": name, "feed_forward": work.configs[name].feed_forward, **settings}

    def _best_of_rates(self, work: Work, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The full run of seed 0 with the lowest loss on the items kept for the choice, and all trials."""
        runs, trials = [], []
        for rate in self.settings.rates:
            run = self._train(work, name, rate, 0)
            trial = {k: run[k] for k in ("task", "mechanism", "lr", "seed")} | run["search"]
            key = self._cell(work, name, lr=rate, seed=0, steps=work.steps[name], items=work.search_items)
            self.store.put("search", key, trial)
            self.cells["search"].append(key)
            runs.append(run)
            trials.append(trial)
        return min(runs, key=lambda r: math.inf if r["search"]["loss"] is None else r["search"]["loss"]), trials

    def _quality_key(self, work: Work, name: str, rate: float, seed: int) -> dict[str, Any]:
        items = [work.search_items, work.items]
        return self._cell(work, name, lr=rate, seed=seed, steps=work.steps[name], items=items)

    def _train(self, work: Work, name: str, rate: float, seed: int) -> dict[str, Any]:
        """One full run, from its row where there is one."""
        steps = work.steps[name]
        key = self._quality_key(work, name, rate, seed)
        row = self.store.get("quality", key)
        planned = steps * work.step_seconds[name]
        if row is None:
            self._doing(f"{work.task.name}: {name}, learning rate {rate:g}, seed {seed}")
            self.store.put("quality", key, self._measure(work, name, rate, seed))
            row = self.store.get("quality", key)
            assert row is not None
            planned = 0.0  # its steps have advanced the progress one by one
        self._advance(planned + work.evaluation_seconds[name])
        return row.payload

    def _measure(self, work: Work, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Train and score: the first held-out items choose the learning rate, the others are the result."""
        task = work.task
        model = build(work.configs[name], seed)
        config = work.train_config(rate, seed, work.steps[name])
        history = train(model, task, config, on_step=self._on_step(work, name))
        items: list[tuple[float, float]] = []
        score, choice = math.nan, {"score": math.nan, "loss": math.nan, "diverged": history.diverged}
        if not history.diverged:
            found = evaluate(model, task, work.scored_at_once, first=work.search_items)
            items, score = found.items, found.score
            sliced = evaluate(model, task, work.scored_at_once, last=work.search_items) if work.search_items else found
            choice = {"score": sliced.score, "loss": sliced.loss, "diverged": not math.isfinite(sliced.loss)}
        if self.settings.keep_models and seed == 0:
            save_pretrained(model, self._model_folder(work, name, rate))
        return {
            "task": task.name,
            "mechanism": name,
            "seed": seed,
            "lr": rate,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "score": score,
            "solved": None if task.solved is None else _reaches(task, score),
            "items": items,
            "search": choice,
            "curve": thin([[tokens, point.loss] for tokens, point in by_tokens(history)]),
            "parameters": count_parameters(model),
            "feed_forward": work.configs[name].feed_forward,
            "tokens": history.tokens,
            "steps": len(history.curve),
            "skipped": history.skipped,
            "seconds": history.seconds,
            "tokens_per_second": history.tokens_per_second,
            "peak_memory_bytes": history.peak_memory,
            "reproduce": self.command,
        }

    def _costs(self) -> list[dict[str, Any]]:
        """Inference, decoding, memory and state, once for each kind of backbone, all mechanisms interleaved."""
        found = []
        measured = set()
        for work in self.works:
            if work.kind in measured:
                continue
            measured.add(work.kind)
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
                make_input = functools.partial(_input, work.task)
                costs = model_costs(_models_for(work), self.settings.lengths, make_input, seconds=0.5)
                for name, cost in costs.items():
                    named = {"task": work.task.name, "mechanism": name, "pattern": str(work.task.pattern)}
                    self.store.put("cost", keys[name], named | cost)
                rows = {name: self.store.get("cost", key) for name, key in keys.items()}
            found += [row.payload for row in rows.values() if row is not None]
        return found

    def _conclude(
        self,
        quality: Mapping[str, list[dict[str, Any]]],
        searches: list[dict[str, Any]],
        costs: list[dict[str, Any]],
    ) -> Outcome:
        settings = self.settings
        comparisons = {task: comparison_of(rows) for task, rows in quality.items()}
        kind = {w.task.name: w.kind for w in self.works}
        rules = {w.task.name: w.baseline for w in self.works if w.baseline is not None}
        cost_of = {(kind[row["task"]], row["mechanism"]): row for row in costs}
        summary = {
            task: summarise(
                rows,
                comparisons[task],
                {m: cost_of.get((kind[task], m), {}) for m in settings.mechanisms},
                settings,
                rules.get(task),
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
        advice.notes[:0] = [beside_baseline(task, summary[task], rule, advice.winner) for task, rule in rules.items()]
        advice.notes[:0] = [work.few_items for work in self.works if work.few_items]
        advice.notes += [said for task, rows in quality.items() if (said := skipped_steps(task, rows))]
        models = self._kept_models(advice)
        edges = rates_on_edge(searches, settings.rates) if len(settings.rates) > 2 else []
        if edges:
            advice.notes.append(f"The best learning rate lay on the edge of the grid for {', '.join(edges)}.")
        run: dict[str, Any] = {
            "title": "Which attention mechanism? " + ", ".join(quality),
            "command": self.command,
            "tasks": list(quality),
            "mechanisms": list(settings.mechanisms),
            "seeds": list(range(settings.seeds)),
            "budget": str(settings.budget),
            "settings": _described(self.works, settings),
            "descriptions": {work.task.name: work.task.describe() for work in self.works},
            "started": self.started,
            "finished": provenance.now(),
            "recommendation": advice.as_dict(),
            "resolution": {t: c.resolution for t, c in comparisons.items() if math.isfinite(c.resolution)},
            "baselines": {
                task: {"name": rule.name, "score": rule.score, "higher_is_better": metrics[task][1]}
                for task, rule in rules.items()
            },
        }
        self.store.put("run", {"run": self.store.run}, {**run, "summary": summary, "cells": self.cells})
        report = render_report(self.store, self.output / "report.html", self.store.run)
        return Outcome(summary, advice, report, self.store.path, models, run["baselines"])

    def _model_folder(self, work: Work, name: str, rate: float) -> Path:
        return self.output / "models" / f"{work.task.name}-{name}-{rate:g}"

    def _kept_models(self, advice: Recommendation) -> dict[str, Path]:
        """The winner's model of each task; the lines that load it go into the notes."""
        if not self.settings.keep_models or advice.winner is None:
            return {}
        found = {}
        for work in self.works:
            folder = self._model_folder(work, advice.winner, self.rates[work.task.name][advice.winner])
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

    def _on_step(self, work: Work, name: str) -> Callable[[Any], None]:
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


def _models_for(work: Work) -> Callable[[int], dict[str, nn.Module]]:
    """A comparison's models for inputs of a length: the same for all, but for mechanisms with a greatest length."""
    kept = {name: build(config, 0) for name, config in work.configs.items()}

    def models(length: int) -> dict[str, nn.Module]:
        made = {name: work.config_for(name, length) for name in kept}
        return {n: kept[n] if config is work.configs[n] else build(config, 0) for n, config in made.items()}

    return models


def _input(task: Task, length: int) -> tuple[tuple[Tensor, ...], Context]:
    """Inputs of `length` tokens; in a cross pattern the task's own, and a memory of `length`."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int, vocab_size: int | None, features: int | None) -> Tensor:
        if vocab_size is not None:
            return torch.randint(vocab_size, (1, count), generator=generator)
        return torch.randn(1, count, features or 0, generator=generator)

    if task.pattern.cross:
        memory = tokens(length, task.memory_vocab_size, task.memory_features)
        return (tokens(task.length, task.vocab_size, task.features), memory), Context()
    if task.grid is None or task.vocab_size is not None:
        return (tokens(length, task.vocab_size, task.features),), Context()
    width = math.isqrt(length)
    return (tokens(width * width, None, task.features),), Context(grid=(width, width))


def _reaches(task: Task, score: float) -> bool:
    assert task.solved is not None
    return score >= task.solved if task.higher_is_better else score <= task.solved


def _described(works: Sequence[Work], settings: CompareSettings) -> dict[str, Any]:
    cross = " (of the memory, in cross patterns)" if any(work.task.pattern.cross for work in works) else ""
    described: dict[str, Any] = {
        "backbone": f"{settings.layers} layers, width {settings.dim}, {settings.heads} heads",
        "learning rates tried": ", ".join(f"{r:g}" for r in settings.rates),
        "table and picture at": f"{settings.at_length} tokens{cross}, batch 1",
        "threads": torch.get_num_threads(),
    }
    if settings.precision != "float32":
        described["training"] = f"mixed precision, {settings.precision} products and float32 weights"
    if settings.stack != StackConfig():
        plain = asdict(StackConfig())
        changed = {name: value for name, value in asdict(settings.stack).items() if value != plain[name]}
        described["stack"] = ", ".join(f"{name}={value}" for name, value in changed.items())
    for work in works:
        steps = sorted(set(work.steps.values()))
        described[f"{work.task.name}: run"] = (
            f"{work.target:,} parameters, {' to '.join(map(str, steps[:1] + steps[1:][-1:]))} steps of "
            f"{work.batch}; {work.items - work.search_items} held-out {'item' if work.items - work.search_items == 1 else 'items'} "
            f"({work.search_items} others chose the learning rate)"
        )
    return described
