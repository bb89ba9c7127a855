"""`regard compare`: train mechanisms on the same work, measure quality and cost on this machine, and recommend one.

Every mechanism gets the same backbone with the same number of parameters (the feed-forward width absorbs the
difference), the same surrounding parts (see :mod:`regard.models.frames`), the same batches in the same order, the same
learning-rate search and the same budget. Each measurement is stored as a row as soon as it exists, so the same command
resumes a comparison that was killed.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Context, Unsupported
from regard.measurement import provenance
from regard.measurement.sharding import shard
from regard.measurement.store import Store
from regard.measurement.sweeps import Sweep
from regard.measurement.units import counted
from regard.models import StackConfig
from regard.models.frames import MEANINGS
from regard.tasks import Task
from regard.workbench.comparison.ahead import make_ahead
from regard.workbench.comparison.conclusions import Conclusions
from regard.workbench.comparison.cost import model_costs
from regard.workbench.comparison.matching import match, sentence, with_options
from regard.workbench.comparison.planning import best_threads, cost_seconds, plan
from regard.workbench.comparison.recommend import Recommendation, listed
from regard.workbench.comparison.settings import MATCHED, CompareSettings
from regard.workbench.comparison.task_models import build, square_grid
from regard.workbench.comparison.trainer import Progress, Runs, Trainer
from regard.workbench.comparison.work import Work
from regard.workbench.reports.mask_pictures import shown
from regard.workbench.reports.report import write_report
from regard.workbench.reports.view import Measured
from regard.workbench.trained.card import loading


@dataclass
class Outcome:
    """The findings of a comparison.

    Attributes:
        summary: for each task, one entry per mechanism.
        recommendation: which mechanism to take, why, and what could not be separated.
        report: path of the HTML report.
        store: path of the database with the rows.
        models: for each task, the folder of the winner's model, if models are kept.
        baselines: for each task with a simple rule, the rule's name and score and whether higher is better.
        beside: for each task, the scores of the leading mechanisms in further frames.
    """

    summary: dict[str, list[dict[str, Any]]]
    recommendation: Recommendation
    report: Path
    store: Path
    models: dict[str, Path] = field(default_factory=dict)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    beside: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


Watch = Callable[[Progress], None]


def compare(
    tasks: Sequence[Task],
    settings: CompareSettings,
    output: str | Path,
    *,
    watch: Watch | None = None,
    say: Callable[[str], None] | None = None,
    command: str | None = None,
    sweep: Sweep | None = None,
) -> Outcome:
    """Run a comparison, or resume one.

    Args:
        tasks: tasks on which every mechanism is trained.
        settings: see :class:`CompareSettings`.
        output: folder for the store (``results.db``), the report and kept models. Rows already stored are not measured
            again.
        watch: called with the progress several times a second.
        say: called with messages about what happens.
        command: command line to record and to print next to each row; that of the process when None.
        sweep: runs the training on other machines; costs are always measured on this one. When None, everything runs
            here.

    Raises:
        Unsupported: before any training: if a task's pattern or size rules out a mechanism, the budget is too small,
            the output folder cannot be written, or a time budget is combined with `sweep`.
    """
    if sweep is not None and settings.budget.unit == "seconds":
        raise Unsupported(
            f"a budget of {settings.budget} for runs on other machines, which differ in speed",
            supported="work of each run: tokens, steps or flops",
            nearest='--budget "2M tokens"',
        )
    with _begun(tasks, settings, output, watch, say, command) as runner:
        runner.sweep = sweep
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
    """Make only the training runs of a share of the mechanisms, while other processes make the rest.

    :func:`compare` with the same tasks, settings and folder then finds their rows. It measures the costs, since
    parallel processes would disturb each other's measurements.

    Args:
        share: ``"i/n"``, share i of n of the mechanisms.

    Returns:
        The names of the mechanisms in the share.

    Raises:
        Unsupported: as for :func:`compare`, and for a malformed share.
    """
    names = shard(settings.names, share)
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
    """A comparison with its work planned and its store open."""
    if not tasks:
        raise Unsupported("a comparison on no tasks", supported="one task or more")
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Unsupported(
            f"two tasks named {twice[0]} in one comparison",
            supported="tasks of different names",
            nearest="a comparison for each, with an --output of its own",
        )
    say = say or (lambda _: None)
    started = time.monotonic()
    works = [Work(task, settings) for task in tasks]
    if settings.match is not None and len(tasks) > 1:
        raise Unsupported(
            f"match={settings.match} on {len(tasks)} tasks", supported="one task, at whose size it is measured"
        )
    for work in works:
        if work.few_items:
            say(work.few_items)
    output = Path(output)
    with Store(output / "results.db", command=command) as store:
        beginning = provenance.now()
        matched = ""
        if settings.match is not None:
            found = _match(store, works[0], say)
            matched = sentence(settings.match, found)
            settings = with_options(settings, found)
            works = [Work(task, settings) for task in tasks]
            say(matched)
        plan(store, works, settings, started, say)
        deadline = started + settings.budget.amount if settings.budget.unit == "seconds" else None
        trainer = Trainer(store, settings, output, command or store.command, watch or (lambda _: None), say, deadline)
        yield _Runner(store, works, settings, output, trainer, beginning, matched)


def _match(store: Store, work: Work, say: Callable[[str], None]) -> Any:
    """The options that match the backbones; a resumed comparison finds them in the store."""
    settings = work.settings
    key = {**work.identity, "quantity": settings.match, "backbones": [v.backbone for v in settings.variants.values()]}
    key |= work.code_of()
    if settings.match == "time":
        key["machine"] = provenance.fingerprint()["machine_id"]
    row = store.get("match", key)
    if row is None:
        say(f"scaling the backbones to equal {MATCHED[settings.match or '']}")
        if settings.match == "time":  # more threads than a busy machine has free cores would distort the times
            torch.set_num_threads(best_threads(work))
        store.put("match", key, match(work.task, settings))
        row = store.get("match", key)
        assert row is not None
    return row.payload


class _Runner:
    """Measures the cells that are missing from the store, then summarises."""

    def __init__(
        self,
        store: Store,
        works: Sequence[Work],
        settings: CompareSettings,
        output: Path,
        trainer: Trainer,
        beginning: str,
        matched: str = "",
    ) -> None:
        self.store, self.works, self.settings, self.output = store, works, settings, output
        self.trainer, self.beginning, self.matched = trainer, beginning, matched
        self.costed: list[dict[str, Any]] = []
        self.framed: dict[tuple[str, str], list[Runs]] = {}
        """Runs on each task, by frame after the first and mechanism..."""
        self.beside: list[Runs] = []
        """...and those of the leading mechanisms."""
        self.sweep: Sweep | None = None

    def run(self) -> Outcome:
        after = cost_seconds(self.works, self.settings)
        runs = self.train_all(self.settings.names, after)
        costs = self._costs()
        self.trainer.advance(after)
        self.trainer.reserved = self.trainer.beside = 0.0
        found = Conclusions(self.works, self.settings, runs, costs, self.matched)
        for name in self._framed_leaders(found):
            for frame in self.settings.frames[1:2]:  # for which time is reserved
                self._train_in_frame(frame, name)
        if (more := self._with_time_left(runs)) is not None:
            found = Conclusions(self.works, self.settings, more, costs, self.matched)
        found.look_beside(self._in_other_frames(found))
        self.trainer.progress.done = self.trainer.progress.total
        self.trainer.watch(self.trainer.progress)
        return self._conclude(found, costs)

    def train_all(self, names: Sequence[str], after: float = 0.0) -> dict[str, Runs]:
        """All runs of these mechanisms in the first frame, by task.

        Tasks that can be solved come first, before the time of the others is planned anew: with fewer steps their
        verdict could change.

        Args:
            after: planned seconds of the work that follows.
        """
        trainer = self.trainer
        runs = {work.task.name: Runs() for work in self.works}
        turns = sorted(self.works, key=lambda work: work.task.solved is None)
        for index, work in enumerate(turns):
            done, left = turns[:index], turns[index:]
            trainer.reserved = after + sum(map(self._beside_seconds, done))
            fewer = trainer.replan(left)
            following = sum(w.runs * w.run_seconds(name) for w in left[1:] for name in names)
            trainer.beside = sum(map(self._beside_seconds, self.works))
            trainer.reserved = after + trainer.beside + following
            own = sum(work.runs * work.run_seconds(name) for name in names)
            trainer.progress.total = trainer.progress.done + own + trainer.reserved
            runs[work.task.name] = self._train(work, names)
            runs[work.task.name].fewer = fewer
        return runs

    def _with_time_left(self, runs: Mapping[str, Runs]) -> dict[str, Runs] | None:
        """The runs, plus further ones if other work took less time than was reserved; None if nothing was added."""
        more = dict(runs)
        for work in self.works:
            before = runs[work.task.name]
            if before.left_out:
                made = self._train(work, self.settings.names)
                if made.cells != before.cells and len(made.rows) >= len(before.rows):
                    more[work.task.name] = replace(made, fewer=before.fewer)
        return None if all(more[task] is made for task, made in runs.items()) else more

    def _train(self, work: Work, names: Sequence[str]) -> Runs:
        if self.sweep is not None:
            make_ahead(self.sweep, self.trainer, work, names)
        return self.trainer.train(work, names)

    def _beside_seconds(self, work: Work) -> float:
        """Planned seconds of a task's runs in the further frame for which time is reserved."""
        return (work.all_runs - work.runs * len(work.configs)) * statistics.fmean(map(work.run_seconds, work.configs))

    def _framed_leaders(self, found: Conclusions) -> list[str]:
        """The leading mechanisms that are used in frames."""
        return [name for name in found.leaders() if self.settings.variants[name].backbone is None]

    def _in_other_frames(self, found: Conclusions) -> dict[str, list[dict[str, Any]]]:
        """Rows of the leading mechanisms, trained in further frames while time is left; by task."""
        self.beside = []
        rows: dict[str, list[dict[str, Any]]] = {work.task.name: [] for work in self.works}
        for frame in self.settings.frames[1:]:
            late = []
            for name in self._framed_leaders(found):
                if not self._train_in_frame(frame, name):
                    late.append(name)
                    continue
                self.beside += self.framed[frame, name]
                for work, made in zip(self.works, self.framed[frame, name], strict=True):
                    rows[work.task.name] += made.rows
            if late:
                found.left_out.append(
                    f"No time was left for {listed(late)} in the frame {frame}; use a larger --budget."
                )
        return rows

    def _train_in_frame(self, frame: str, name: str) -> bool:
        """Train a mechanism once on every task in another frame; return False if there is no time for it."""
        if (frame, name) in self.framed:
            return True
        works = [Work(work.task, self.settings, frame, [name]) for work in self.works]
        for other, work in zip(works, self.works, strict=True):
            other.follow(work)
        if not self.trainer.affords(works, name):
            return False
        self.trainer.expect(sum(work.runs * work.run_seconds(name) for work in works))
        self.framed[frame, name] = [self._train(other, [name]) for other in works]
        return True

    def _costs(self) -> list[dict[str, Any]]:
        """Inference, decoding, memory and state: once for each kind of backbone, with all mechanisms interleaved."""
        found = []
        for kind in dict.fromkeys(work.kind for work in self.works):
            works = [work for work in self.works if work.kind == kind]
            work = works[0]
            needed = {self.settings.measured_at(w.own_length) for w in works}
            left_out = [length for length in self.settings.lengths if length not in needed and not work.takes(length)]
            lengths = sorted({*self.settings.lengths, *needed} - {*left_out})
            if left_out:
                told = listed([f"{length:,}" for length in left_out])
                self.trainer.say(f"{work.task.name}: no costs at {told} tokens, which not every model takes")
            identity = {k: v for k, v in work.identity.items() if k not in ("metric", "batch_size")}
            keys = {
                name: {
                    **identity,
                    "mechanism": name,
                    "feed_forward": config.feed_forward,
                    "lengths": lengths,
                    "machine": provenance.fingerprint()["machine_id"],
                    "beside": list(self.settings.names),
                    **work.code_of(),
                }
                for name, config in work.configs.items()
            }
            self.costed += keys.values()
            rows = {name: self.store.get("cost", key) for name, key in keys.items()}
            if any(row is None for row in rows.values()):
                self.trainer.doing(f"{work.task.name}: time and memory against length")
                make_input = functools.partial(_input, work.task, device=self.settings.device)
                costs = model_costs(tuple(work.configs), _model_for(work), lengths, make_input, seconds=0.5)
                for name, cost in costs.items():
                    named = {"task": work.task.name, "mechanism": name, "pattern": str(work.task.pattern)}
                    self.store.put("cost", keys[name], named | cost)
                rows = {name: self.store.get("cost", key) for name, key in keys.items()}
            found += [row.payload for row in rows.values() if row is not None]
        return found

    def _conclude(self, found: Conclusions, costs: list[dict[str, Any]]) -> Outcome:
        settings, advice = self.settings, found.advice
        models = self._kept_models(found)
        run: dict[str, Any] = {
            "title": ("Which model? " if settings.all_backbones else "Which attention mechanism? ")
            + ", ".join(found.summary),
            "whole_models": settings.all_backbones,
            "command": self.trainer.command,
            "tasks": list(found.summary),
            "mechanisms": list(settings.names),
            "seeds": sorted({row["seed"] for made in found.runs.values() for row in made.rows}),
            "budget": str(settings.budget),
            "frame": settings.frames[0],
            "frames": {frame: MEANINGS[frame] for frame in settings.frames},
            "beside": found.beside,
            "parts": {work.task.name: work.parts() for work in self.works},
            "at_length": {work.task.name: settings.measured_at(work.own_length) for work in self.works},
            "settings": _described(self.works, settings) | ({"matched": self.matched} if self.matched else {}),
            "masks": {work.task.name: shown(work.task) for work in self.works},
            "descriptions": {work.task.name: work.task.describe() for work in self.works},
            "started": self.beginning,
            "finished": provenance.now(),
            "recommendation": advice.as_dict(),
            "resolution": {t: c.resolution for t, c in found.comparisons.items() if math.isfinite(c.resolution)},
            "baselines": {
                task: {"name": rule.name, "score": rule.score, "higher_is_better": found.metrics[task][1]}
                for task, rule in found.rules.items()
            },
        }
        made = [*found.runs.values(), *self.beside]
        cells = {kind: [key for runs in made for key in runs.cells[kind]] for kind in ("quality", "search")}
        cells["cost"] = self.costed
        self.store.put("run", {"run": self.store.run}, {**run, "summary": found.summary, "cells": cells})
        report = render_report(self.store, self.output / "report.html", self.store.run)
        return Outcome(found.summary, advice, report, self.store.path, models, run["baselines"], found.beside)

    def _kept_models(self, found: Conclusions) -> dict[str, Path]:
        """The winner's model for each task; the code that loads it is added to the notes."""
        advice, kept = found.advice, {}
        if not self.settings.keep_models or advice.winner is None:
            return {}
        for work in self.works:
            rate = found.runs[work.task.name].rates[advice.winner]
            folder = self.trainer.model_folder(work, advice.winner, rate)
            if not folder.exists():
                advice.notes.append(
                    f"The {work.task.name} model of {advice.winner} was trained by an earlier run and is not kept; another "
                    "--output trains it again."
                )
            else:
                kept[work.task.name] = folder
                lines = loading(folder, self.settings.plugins).splitlines()
                advice.notes.append(f"The {work.task.name} model: " + "; ".join(filter(None, lines)))
        self.trainer.keep_only(list(kept.values()))
        return kept


def render_report(store: Store, path: Path, run: str | None = None) -> Path:
    """Write the report of a finished comparison from its rows: of the one with id `run`, or of the newest.

    Raises:
        Unsupported: if the store holds no finished comparison, or the file cannot be written.
    """
    finished = store.rows("run", run)
    if not finished:
        raise Unsupported(
            f"a report from {store.path}, which holds no finished comparison",
            supported="the output folder of a comparison that has ended",
            nearest="regard compare with the same options, which resumes the comparison",
        )
    row = finished[-1]
    rows = {
        kind: [found.payload for key in keys if (found := store.get(kind, key)) is not None]
        for kind, keys in row.payload["cells"].items()
    }
    measured = Measured(
        run=row.payload,
        quality=rows["quality"],
        cost=rows["cost"],
        search=rows["search"],
        summary=row.payload["summary"],
        machine=row.machine,
        revision=row.git_revision,
    )
    return write_report(path, measured)


def _model_for(work: Work) -> Callable[[str, int], nn.Module]:
    """Maps mechanism and input length to a model: one per mechanism, unless the mechanism has a maximum length."""
    device = work.settings.device
    kept = {name: build(config, 0, device) for name, config in work.configs.items()}

    def model(name: str, length: int) -> nn.Module:
        config = work.config_for(name, length)
        return kept[name] if config is work.configs[name] else build(config, 0, device)

    return model


def _input(task: Task, length: int, device: str = "cpu") -> tuple[tuple[Tensor, ...], Context]:
    """Inputs of `length` tokens; in cross patterns, inputs of the task's length and a memory of `length` tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int, vocab_size: int | None, features: int | None) -> Tensor:
        if vocab_size is not None:
            return torch.randint(vocab_size, (1, count), generator=generator).to(device)
        return torch.randn(1, count, features or 0, generator=generator).to(device)

    if task.pattern.cross:
        memory = tokens(length, task.memory_vocab_size, task.memory_features)
        return (tokens(task.length, task.vocab_size, task.features), memory), Context()
    if task.grid is None or task.vocab_size is not None:
        return (tokens(length, task.vocab_size, task.features),), Context()
    grid = square_grid(length, len(task.grid))
    return (tokens(math.prod(grid), None, task.features),), Context(grid=grid)


def _described(works: Sequence[Work], settings: CompareSettings) -> dict[str, Any]:
    cross = " (of the memory, in cross patterns)" if any(work.task.pattern.cross for work in works) else ""
    framed = {
        "backbone": f"{counted(settings.layers, 'layer')}, width {settings.dim}, {counted(settings.heads, 'head')}",
        "frame": settings.frames[0],
    }
    described: dict[str, Any] = {
        **({} if settings.all_backbones else framed),
        "learning rates tried": ", ".join(f"{r:g}" for r in settings.rates)
        + (", and beyond while the best is at an end" if len(settings.rates) > 1 else ""),
        "table and picture at": "; ".join(
            f"{work.task.name}: {settings.measured_at(work.own_length)} tokens{cross}" for work in works
        )
        + ", batch 1",
        "threads": torch.get_num_threads(),
    }
    if settings.device != "cpu":
        described["device"] = settings.device
    if settings.precision != "float32":
        described["training"] = f"mixed precision, {settings.precision} products and float32 weights"
    if settings.stack != StackConfig():
        plain = asdict(StackConfig())
        changed = {name: value for name, value in asdict(settings.stack).items() if value != plain[name]}
        described["stack"] = ", ".join(f"{name}={value}" for name, value in changed.items())
    for work in works:
        steps = sorted(set(work.steps.values()))
        described[f"{work.task.name}: run"] = (
            f"{work.sizes}, {' to '.join(map(str, steps[:1] + steps[1:][-1:]))} steps of "
            f"{work.batch}; {work.items - work.search_items} held-out {'item' if work.items - work.search_items == 1 else 'items'} "
            f"({work.search_items} others chose the learning rate)"
        )
    return described
