"""`regard compare`: train mechanisms on the same work, measure quality and cost on this machine, and say which to take.

Every mechanism gets the same backbone at the same number of parameters (the feed-forward width absorbs the difference),
the same batches in the same order, the same small learning-rate search and the same budget. Each measurement is a row of
the store the moment it exists, so a comparison that is killed goes on with the same command.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.contract import Context, Unsupported
from regard.models import count_parameters, save_pretrained
from regard.tasks import Task
from regard.training import evaluate, train
from regard.workbench import provenance
from regard.workbench.cost import model_costs
from regard.workbench.recommend import Recommendation, recommend
from regard.workbench.report import write_report
from regard.workbench.settings import CompareSettings
from regard.workbench.store import Store
from regard.workbench.summary import by_tokens, comparison_of, rates_on_edge, summarise, thin
from regard.workbench.work import SEARCH_SHARE, Work, build, cost_seconds, plan


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
    works = [Work(task, settings) for task in tasks]
    output = Path(output)
    with Store(output / "results.db", command=command) as store:
        beginning = provenance.now()
        plan(store, works, settings, started, say)
        runner = _Runner(store, works, settings, output, watch or (lambda _: None), say, command or store.command)
        return runner.run(beginning)


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
    ) -> None:
        self.store, self.works, self.settings, self.output = store, works, settings, output
        self.watch, self.say, self.command = watch, say, command
        self.cells: dict[str, list[dict[str, Any]]] = {"quality": [], "cost": [], "search": []}
        self.progress = Progress(total=sum(self._planned(w) for w in works) + cost_seconds(works, settings))

    def _planned(self, work: Work) -> float:
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

    def _cell(self, work: Work, name: str, **settings: Any) -> dict[str, Any]:
        return {**work.identity, "mechanism": name, "feed_forward": work.configs[name].feed_forward, **settings}

    def _search(self, work: Work, name: str) -> tuple[float, list[dict[str, Any]]]:
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

    def _train(self, work: Work, name: str, rate: float, seed: int) -> dict[str, Any]:
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
                "curve": thin([[sum_, p.loss] for sum_, p in by_tokens(history)]),
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
        comparisons = {task: comparison_of(rows) for task, rows in quality.items()}
        objective = {w.task.name: w.task.objective for w in self.works}
        cost_of = {(objective[row["task"]], row["mechanism"]): row for row in costs}
        summary = {
            task: summarise(
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
        edges = rates_on_edge(searches, settings.rates)
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

    def _model_folder(self, work: Work, name: str) -> Path:
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


def _described(works: Sequence[Work], settings: CompareSettings) -> dict[str, Any]:
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
