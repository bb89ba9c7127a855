"""The training runs of a comparison: for each mechanism one per learning rate, then one per seed, each a row of the
store.

A run that has a row is not made again. With a time budget, optional runs (rates beyond the grid, further seeds, further
frames) are made only while time is left for all the required ones. What was left out is reported.
"""

from __future__ import annotations

import copy
import itertools
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.measurement.store import Store
from regard.models import LanguageModel
from regard.tasks import Task, TextTask
from regard.training import runner_of
from regard.workbench.comparison.planning import FEWEST_STEPS, share_steps
from regard.workbench.comparison.recommend import listed
from regard.workbench.comparison.settings import MORE_RATES, CompareSettings
from regard.workbench.comparison.task_models import build
from regard.workbench.comparison.work import Work
from regard.workbench.reports import drawn_images, mask_pictures, predicted_images
from regard.workbench.trained.records import described, figures_of, keep, outcome, ran

Row = dict[str, Any]

REPLANNED = 0.1
"""A new plan is made, and reported, if the number of steps changes by at least this fraction."""

HALF_LIFE = 30.0
"""Half-life of a run's weight in the estimated pace of the machine, in planned seconds."""

LONGER = 2
"""Factor on the planned steps of a run that does not solve a task that other runs of its mechanism solve."""

MARGIN = 0.97
"""Share of the remaining time that a new plan uses."""

SAMPLE_PROMPT, SAMPLE_TOKENS = 48, 120
"""Tokens of a held-out text that a language model is given, and tokens that it writes."""

OVERTIME = 1.05
"""Share of the budget by which a round of further seeds must end."""


@dataclass
class Progress:
    """The state of a comparison, for progress displays.

    Attributes:
        doing: the current work, in words.
        done: planned seconds of work already done (estimates from the calibration).
        total: planned seconds of work.
        pace: actual seconds per planned second so far.
        loss: loss of the last training step.
    """

    doing: str = ""
    done: float = 0.0
    total: float = 0.0
    pace: float = 1.0
    loss: float = math.nan

    @property
    def remaining(self) -> float:
        """Expected remaining seconds, at the pace so far."""
        return max(0.0, self.total - self.done) * self.pace


@dataclass
class Runs:
    """The outcome of training on a task.

    Attributes:
        rows: rows of each mechanism's seeds at its best rate.
        trials: rows of each rate with the first seed.
        rates: the best learning rate for each mechanism.
        left_out: sentences about what there was no time for.
        cells: keys of the rows in the store, by kind.
        fewer: a sentence about runs with fewer steps than first planned; empty if none have.
        longer: sentences about runs that were given more steps than the others.
    """

    rows: list[Row] = field(default_factory=list)
    trials: list[Row] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    cells: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"quality": [], "search": []})
    fewer: str = ""
    longer: list[str] = field(default_factory=list)


class Trainer:
    """Makes the runs that are missing from the store.

    Args:
        store: the store of the rows.
        settings: settings of the comparison.
        output: folder for the models.
        command: command line to print next to each row.
        watch: called with the progress.
        say: called with sentences on what was decided.
        deadline: time on the clock of `time.monotonic`; None if the budget is not a time.
    """

    def __init__(
        self,
        store: Store,
        settings: CompareSettings,
        output: Path,
        command: str,
        watch: Callable[[Progress], None],
        say: Callable[[str], None],
        deadline: float | None,
    ) -> None:
        self.store, self.settings, self.output, self.command = store, settings, output, command
        self.watch, self.say, self.deadline = watch, say, deadline
        self.began = time.monotonic()
        self.progress = Progress()
        self.reserved = 0.0
        """Planned seconds to leave for the work that follows the current task."""
        self.beside = 0.0
        """The part of them for further frames; further seeds in the first frame take priority over these."""
        self._planned = self._taken = 0.0
        self._told: set[str] = set()
        self.counted: set[tuple[str, str, str, float, int]] = set()
        """Runs already counted in the progress, though another process may have made them."""

    def replan(self, works: Sequence[Work]) -> str:
        """Reduce or raise the steps of the remaining tasks to fit the remaining time, if the plan is off.

        Returns a sentence if the first of them gets fewer steps, otherwise an empty string.
        """
        first, key = (
            works[0],
            {
                **works[0].identity,
                "replanned": str(self.settings.budget),
                "mechanisms": [*works[0].configs],
                **works[0].code_of(),
            },
        )
        row = self.store.get("plan", key)
        if row is not None:
            first.steps = row.payload["steps"]
            return str(row.payload.get("fewer", ""))
        if self.deadline is None or not self._taken:
            return ""
        left = MARGIN * (self.deadline - time.monotonic()) / self.pace - self.reserved
        before = dict(first.steps)
        share_steps(works, left)
        first.steps = {name: max(FEWEST_STEPS, steps) for name, steps in first.steps.items()}
        name, fewer = next(iter(before)), ""
        if abs(first.steps[name] - before[name]) < REPLANNED * before[name]:
            first.steps = before
        else:
            told = (
                f"{first.task.name}: {first.steps[name]} steps per run instead of {before[name]}, which is what fits: training "
                f"has taken {self.pace:.2g} times what the calibration said"
            )
            self.say(told)
            fewer = f"{told}." if first.steps[name] < before[name] else ""
        self.store.put("plan", key, {"steps": first.steps, "fewer": fewer})
        return fewer

    @property
    def pace(self) -> float:
        """Seconds per planned second of training, weighting recent runs most: a busy machine may become idle."""
        return self._taken / self._planned if self._planned > 0 else 1.0

    def train(self, work: Work, names: Sequence[str] | None = None) -> Runs:
        """Make all runs of these mechanisms (all when None) on a task."""
        names = list(work.configs) if names is None else list(names)
        first, runs = self.settings.first_seed, Runs()
        rounds = self.settings.seeds - 1
        tried = {name: [self._try(work, name, rate, runs) for rate in self.settings.rates] for name in names}
        unseeded = [n for n in names if self.stored(work, n, best_of(tried[n])["lr"], first + 1) is None]
        untried: dict[float, list[str]] = {}
        for name in names:
            best, lacking = self._extend(work, name, tried[name], runs, rounds * max(1, len(unseeded)))
            runs.rates[name] = best["lr"]
            runs.rows.append(best)
            if lacking is not None:
                untried.setdefault(lacking, []).append(name)
        for rate, without in untried.items():
            self._leave_out(runs, f"{work.task.name}: no time was left to try {listed(without)} at a rate of {rate:g}.")
        self.expect(rounds * sum(work.run_seconds(name) for name in unseeded) + self.reserved)
        for seed in range(first + 1, first + self.settings.seeds):
            missing = [n for n in names if self.stored(work, n, runs.rates[n], seed) is None]
            if not self._affords(sum(work.run_seconds(name) for name in missing) - self.beside, OVERTIME):
                self._leave_out(runs, f"{work.task.name}: no time was left for seeds from {seed} on.")
                break
            runs.rows += [self.run(work, name, runs.rates[name], seed) for name in names]
        runs.cells["quality"] += [self._key(work, r["mechanism"], r["lr"], r["seed"]) for r in runs.rows]
        self._insist(work, runs)
        return runs

    def longer(self, work: Work, rows: Sequence[Row]) -> tuple[Work, list[int]]:
        """The work with more steps, and the indices of the rows that get them: unsolved rows of mechanisms that solve
        the task in other runs, so that presumably the budget was too small."""
        longer = copy.copy(work)
        longer.steps = {name: LONGER * steps for name, steps in work.steps.items()}
        if work.task.solved is None or work.frame != self.settings.frames[0]:
            return longer, []
        solving = {row["mechanism"] for row in rows if row["solved"]}
        return longer, [i for i, row in enumerate(rows) if not row["solved"] and row["mechanism"] in solving]

    def affords_run(self, work: Work, name: str) -> bool:
        """Whether there is time for one run."""
        return self._affords(work.run_seconds(name))

    def _insist(self, work: Work, runs: Runs) -> None:
        longer, chosen = self.longer(work, runs.rows)
        again: dict[str, list[int]] = {}
        for i in chosen:
            row = runs.rows[i]
            name = row["mechanism"]
            run = name, row["lr"], row["seed"]
            if self.stored(longer, *run) is None and not self.affords_run(longer, name):
                self._leave_out(
                    runs, f"{work.task.name}: no time was left for more steps of {name}, which solves it in some runs."
                )
                break
            runs.rows[i] = self.run(longer, *run)
            runs.cells["quality"][i] = self._key(longer, *run)
            again.setdefault(name, []).append(row["seed"])
        for name, seeds in again.items():
            others = f"seed{'s' if len(seeds) > 1 else ''} {listed([str(s) for s in seeds])}"
            runs.longer.append(
                f"{work.task.name}: {name} solves it in some runs of {work.steps[name]} steps; {others} did not and had "
                f"{longer.steps[name]}."
            )

    def _try(self, work: Work, name: str, rate: float, runs: Runs) -> Row:
        row = self.run(work, name, rate, self.settings.first_seed)
        trial = {k: row[k] for k in ("task", "mechanism", "frame", "lr", "seed")} | row["search"]
        key = {**self._key(work, name, rate, row["seed"]), "items": work.search_items}
        self.store.put("search", key, trial)
        runs.cells["search"].append(key)
        runs.trials.append(trial)
        return row

    def _extend(self, work: Work, name: str, tried: list[Row], runs: Runs, after: int) -> tuple[Row, float | None]:
        """The run with the lowest loss on the items for choosing, after trying further rates as long as
        :func:`further_rate` names one; and the rate for which there was no time."""
        tried = list(tried)
        for _ in range(MORE_RATES if len(tried) > 1 else 0):
            rate = further_rate(work, tried)
            if rate is None:
                break
            needed = work.run_seconds(name) + after * work.run_seconds(name)
            stored = self.stored(work, name, rate, self.settings.first_seed) is not None
            if not stored and not self._affords(needed):
                return best_of(tried), rate
            tried.append(self._try(work, name, rate, runs))
        return best_of(tried), None

    def affords(self, works: Sequence[Work], name: str) -> bool:
        """Whether there is time for all runs of a mechanism on these tasks."""
        return self._affords(sum(work.runs * work.run_seconds(name) for work in works))

    def _affords(self, planned: float, share: float = 1.0) -> bool:
        if self.deadline is None:
            return True
        end = time.monotonic() + (planned + self.reserved) * self.pace
        return end <= self.began + share * (self.deadline - self.began)

    def _leave_out(self, runs: Runs, sentence: str) -> None:
        runs.left_out.append(sentence)
        if sentence not in self._told:
            self._told.add(sentence)
            self.say(sentence)

    def _key(self, work: Work, name: str, rate: float, seed: int) -> dict[str, Any]:
        items = [work.search_items, work.items]
        return {
            **work.identity,
            "mechanism": name,
            **self.settings.variants[name].record(),
            **work.code_of(name),
            "feed_forward": work.configs[name].feed_forward,
            "lr": rate,
            "seed": seed,
            "steps": work.steps[name],
            "items": items,
        }

    def stored(self, work: Work, name: str, rate: float, seed: int) -> Row | None:
        """The stored result of a run; None if there is none."""
        row = self.store.get("quality", self._key(work, name, rate, seed))
        return None if row is None else row.payload

    def run(self, work: Work, name: str, rate: float, seed: int) -> Row:
        """The row of one full run, from the store if it is there."""
        row = self.stored(work, name, rate, seed)
        cell = (work.task.name, work.frame, name, rate, seed)
        counted = cell in self.counted
        self.counted.add(cell)
        if row is not None:
            if not counted:
                self.advance(work.run_seconds(name))
            return row
        within = "" if work.frame == self.settings.frames[0] else f" in the frame {work.frame}"
        self.doing(f"{work.task.name}: {name}{within}, learning rate {rate:g}, seed {seed}")
        started = time.monotonic()
        measured = self._measure(work, name, rate, seed)
        faded = 0.5 ** (work.run_seconds(name) / HALF_LIFE)
        self._taken = faded * self._taken + time.monotonic() - started
        self._planned = faded * self._planned + work.run_seconds(name)
        self.progress.pace = self.pace
        self.store.put("quality", self._key(work, name, rate, seed), measured)
        self.advance(work.evaluation_seconds[name])  # its steps have already been counted one by one
        row = self.stored(work, name, rate, seed)
        assert row is not None
        return row

    def _measure(self, work: Work, name: str, rate: float, seed: int) -> Row:
        """Train and score: the first held-out items choose the learning rate, the remaining ones give the result."""
        task = work.task
        model = build(work.configs[name], seed, self.settings.device)
        config = work.train_config(rate, seed, work.steps[name])
        runner = runner_of(task)
        history = runner.train(model, task, config, on_step=self._on_step(work, name))
        items: list[tuple[float, float]] = []
        found, score, choice = None, math.nan, {"score": math.nan, "loss": math.nan, "diverged": history.diverged}
        if not history.diverged:
            found = runner.evaluate(model, task, work.scored_at_once, first=work.search_items)
            items, score = found.items, found.score
            sliced = found
            if work.search_items:
                sliced = runner.evaluate(model, task, work.scored_at_once, last=work.search_items)
            choice = {"score": sliced.score, "loss": sliced.loss, "diverged": not math.isfinite(sliced.loss)}
        first = seed == self.settings.first_seed and work.frame == self.settings.frames[0]
        shows = first and not history.diverged
        if self.settings.keep_models and first:
            record = {**described(work, name, rate, seed), **outcome(work, model, history, found)}
            keep(self.model_folder(work, name, rate), model, task, record)
        return {
            "task": task.name,
            "mechanism": name,
            "frame": work.frame,
            "seed": seed,
            "lr": rate,
            **ran(task, model, history),
            "score": score,
            "solved": None if task.solved is None else _reaches(task, score),
            "items": items,
            "search": choice,
            "sample": written(model, task) if shows else None,
            "masks": mask_pictures.predicted(model, task) if shows else None,
            "completed": drawn_images.completed(model, task) if shows else None,
            "figures": figures_of(found),
            "predicted": predicted_images.predicted(model, task, work.scored_at_once, work.search_items)
            if shows
            else None,
            "feed_forward": work.configs[name].feed_forward,
            "skipped": history.skipped,
            "tokens_per_second": history.tokens_per_second,
            "training_memory_bytes": history.peak_memory,
            "reproduce": self.command,
        }

    def model_folder(self, work: Work, name: str, rate: float) -> Path:
        """The folder in which a run's model is kept."""
        plain = "".join(letter if letter.isalnum() or letter in "_-." else "_" for letter in name)
        return self.output / "models" / f"{work.task.name}-{plain}-{rate:g}"

    def keep_only(self, folders: Sequence[Path]) -> None:
        """Delete the models of all other runs."""
        for folder in (self.output / "models").glob("*"):
            if folder not in folders:
                shutil.rmtree(folder, ignore_errors=True)

    def doing(self, what: str) -> None:
        """Announce the next piece of work."""
        self.progress.doing, self.progress.loss = what, math.nan
        self.watch(self.progress)

    def expect(self, seconds: float) -> None:
        """Raise the total if more planned seconds are to come: more runs than planned may be tried."""
        self.progress.total = max(self.progress.total, self.progress.done + seconds)

    def advance(self, seconds: float) -> None:
        """Count planned seconds of work as done."""
        self.progress.done += seconds
        self.expect(0.0)
        self.watch(self.progress)

    def _on_step(self, work: Work, name: str) -> Callable[[Any], None]:
        def on_step(point: Any) -> None:
            self.progress.loss = point.loss
            self.advance(work.step_seconds[name])

        return on_step


def written(model: nn.Module, task: Task) -> dict[str, str] | None:
    """A language model's continuation of the first held-out text; None for other tasks."""
    if not isinstance(task, TextTask) or not isinstance(model, LanguageModel):
        return None
    device = next(model.parameters()).device
    begun = next(iter(task.evaluation_batches(1))).inputs[:, :SAMPLE_PROMPT].to(device)
    generator = torch.Generator(device).manual_seed(0)
    new = model.generate(begun, SAMPLE_TOKENS, temperature=0.8, generator=generator)
    prompt, text = (task.tokenizer.decode(ids[0].tolist()) for ids in (begun, new))
    return {"prompt": prompt, "text": text}


def beyond(rate: float, *, up: bool) -> float:
    """The next rate up or down the ladder 1, 3, 10, 30, ..., rounded to one digit."""
    halves = 2 * math.log10(rate)
    step = math.floor(halves + 0.3) + 1 if up else math.ceil(halves - 0.3) - 1
    return float(f"{10 ** (step / 2):.1g}")


def further_rate(work: Work, tried: Sequence[Row]) -> float | None:
    """The rate to try next: the one beyond the best if that is at an end of those tried, otherwise None.

    Where no run is above chance the losses are noise around the same value, unless they fall with every higher rate:
    the next rate is then the one below all, since too high a rate is why runs learn nothing.
    """
    rates = [row["lr"] for row in tried]
    if not any(work.above_chance(row["search"]["score"]) for row in tried):
        losses = [_choosing_loss(row) for row in sorted(tried, key=lambda row: row["lr"])]
        falling = all(after < before for before, after in itertools.pairwise(losses))
        return beyond(max(rates), up=True) if falling else beyond(min(rates), up=False)
    best = best_of(tried)["lr"]
    return beyond(best, up=best == max(rates)) if best in (min(rates), max(rates)) else None


def best_of(rows: Sequence[Row]) -> Row:
    """The run with the lowest loss on the items that choose the learning rate."""
    return min(rows, key=_choosing_loss)


def _choosing_loss(row: Row) -> float:
    loss = row["search"]["loss"]
    return math.inf if loss is None or math.isnan(loss) else float(loss)


def _reaches(task: Task, score: float) -> bool:
    assert task.solved is not None
    return score >= task.solved if task.higher_is_better else score <= task.solved
