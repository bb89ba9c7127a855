"""One model trained on one task, in a folder from which it can be loaded, evaluated and sampled.

The folder holds ``model.safetensors`` and ``config.json`` (:func:`regard.models.from_pretrained`), ``training.json``
(what was trained on what, and the results), ``README.md`` (the same for humans) and, if a tokenizer was trained too,
``tokenizer.json``; ``last`` holds the last weights if earlier ones were better. During the run there are also
``checkpoint.safetensors``, from which the same call resumes, and ``best.safetensors``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from regard.contract import Unsupported, at_least
from regard.core.files import check_folder
from regard.distributed import train_together
from regard.models import save_pretrained
from regard.models.pretrained import CONFIG, WEIGHTS
from regard.models.weights import distinct_tensors, load_tensors, sharded
from regard.tasks import Task
from regard.training import Point, WeightAverage, runner_of
from regard.training.average import check_decay
from regard.training.step import Alone
from regard.workbench.comparison.planning import FEWEST_STEPS, SAFETY, best_threads, calibration_seconds
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.task_models import build
from regard.workbench.comparison.work import Work, other_options
from regard.workbench.trained.best_weights import MOMENTS, BestWeights, moments
from regard.workbench.trained.folder import (
    BEGUN,
    CARD,
    CHECKPOINT,
    LAST,
    RECORD,
    TOKENIZER,
    TrainedModel,
    read_record,
    write_record,
)
from regard.workbench.trained.records import described, keep, outcome

if TYPE_CHECKING:
    from regard.workbench.trained.frozen import Frozen
    from regard.workbench.trained.teacher import Teacher

BEST = "best.safetensors"
"""The file with the best weights so far, during the run."""

CHECKPOINT_SECONDS = 30.0
"""Approximate time between checkpoints, and so the most that a killed run loses."""


class Monitor(Protocol):
    """Observes a model during training."""

    def check(self, model: nn.Module) -> None:
        """Raise Unsupported for a model that it cannot observe."""
        ...

    def due(self, steps: int) -> Collection[int]:
        """The steps, in a run of `steps`, after which it looks; 0 is before the first step."""
        ...

    def look(self, model: nn.Module, step: int) -> None:
        """Look at the model after `step` steps; a resumed run may repeat a step."""
        ...


def train_model(
    task: Task,
    settings: CompareSettings,
    folder: Path | str,
    *,
    ema: float | None = None,
    best_of: int | None = None,
    monitor: Monitor | None = None,
    teacher: Teacher | None = None,
    frozen: Frozen | None = None,
    parallel: str | None = None,
    on_step: Callable[[Point, int, float], None] = lambda point, steps, left: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> TrainedModel:
    """Train the single mechanism in `settings` on a task, with its first learning rate, seed and frame.

    The same call resumes an interrupted run, losing at most half a minute. With a time budget, the number of steps is
    determined once and then kept.

    Args:
        folder: folder for all output; a run with other settings or data is not overwritten.
        ema: decay of a running mean of the weights (:class:`regard.training.WeightAverage`), which is a candidate for
            the best weights too.
        best_of: number of times in the run that the first quarter of the held-out items, which is then not scored,
            chooses the best weights; 0 keeps the last weights. When None: 8; but for tasks that generate or have their
            own training, 0, or 1 with `ema`.
        monitor: observes the model during the run, without changing it.
        teacher: a model that the student also learns from; it is not saved in the folder.
        frozen: a trained model whose layers are copied and frozen: only the exits learn, and the last weights are kept.
        parallel: how the processes in torch's default group train the model together. All of them make this call with a
            folder that all can read and the first one writes; see :func:`regard.distributed.train_together`. A run can
            be resumed with another number of processes, or with one.
        on_step: called after each step with its point, the number of steps, and the expected remaining seconds.
        say: called with sentences on what was decided.

    Returns:
        The folder; `state` in its record is ``diverged`` if a loss was not finite: then there is no model.

    Raises:
        Unsupported: for more than one mechanism, a budget that is too small, a folder with another run or with other
            files that the model would replace, `ema` for a task with its own training, a teacher whose method does not
            fit the model, and combinations that `parallel` does not support.
    """
    if len(settings.names) != 1 or settings.seeds != 1 or len(settings.rates) != 1:
        raise Unsupported(
            "a training of several mechanisms, seeds or rates", supported="one of each", nearest="compare"
        )
    place, (name,) = Path(folder), settings.names
    best_of = _looks(task, best_of, ema, frozen)
    if parallel is not None:
        _check_together(
            task, settings, parallel, {"ema": ema, "monitor": monitor, "teacher": teacher, "frozen": frozen}
        )

    def taught(student: nn.Module) -> nn.Module:
        if frozen is not None:
            return frozen.take_over(student)
        return student if teacher is None else teacher.teach(student, settings.first_seed)

    work = Work(task, settings, choosing=best_of > 0, prepare=taught)
    if frozen is not None:
        work.configs[name] = frozen.config(settings.stack)
    if monitor is not None or teacher is not None:
        some = build(work.configs[name], settings.first_seed, settings.device)
        taught(some)
        if monitor is not None:
            monitor.check(some)
    record = _begun(work, name, best_of, ema, teacher, frozen)
    model = build(work.configs[name], settings.first_seed, settings.device)
    trainee = taught(model)
    together = Alone(trainee) if parallel is None else train_together(parallel, trainee)
    before = together.agreed(read_record(place))
    if before is not None:
        _check_same(place, before, record)
        if before["state"] != BEGUN:
            return TrainedModel(place, before)
        record = before
        say(f"going on with the run in {place}")
    else:
        _check_free(place)
        looks = best_of * (2 if ema is not None else 1) if work.search_items else 0
        record["settings"] |= together.agreed(_planned(work, name, looks, say))
        if together.writes:
            write_record(place, record)
    torch.set_num_threads(record["settings"]["threads"])
    steps, seconds = record["settings"]["steps"], record["settings"]["step_seconds"]
    config = work.train_config(
        settings.rates[0], settings.first_seed, steps, max(1, round(CHECKPOINT_SECONDS / seconds))
    )
    average = None if ema is None else WeightAverage(trainee, ema)
    best = BestWeights(place / BEST, task, work.search_items, work.scored_at_once, average, together)
    looked = moments(steps, best_of) if work.search_items else frozenset()
    watched = frozenset[int]() if monitor is None else frozenset(monitor.due(steps))
    if monitor is not None and 0 in watched and not (place / CHECKPOINT).exists():
        monitor.look(model, 0)
    began, taken = time.monotonic(), 0

    def watch(point: Point) -> None:
        nonlocal taken
        taken += 1
        if monitor is not None and point.step + 1 in watched:
            monitor.look(model, point.step + 1)
        if point.step + 1 in looked:
            best.look(trainee, point.step + 1)
        on_step(point, steps, (steps - point.step - 1) * (time.monotonic() - began) / taken)

    runner = runner_of(task)
    more: dict[str, Any] = {} if average is None else {"average": average}
    more |= {} if parallel is None else {"together": together}
    try:
        history = runner.train(trainee, task, config, checkpoint=place / CHECKPOINT, on_step=watch, **more)
    except Unsupported:
        if together.writes and not (place / CHECKPOINT).exists():  # there is nothing to resume from
            (place / RECORD).unlink()
        raise
    found = None
    if not history.diverged:
        if best.found is not None and (best.found.averaged or best.found.step < steps):
            last = _whole(model, work.configs[name])
            if together.writes:
                save_pretrained(last, place / LAST)
            best.take(trainee)
        found = runner.evaluate(model, task, work.scored_at_once, first=work.search_items)
    trained = _whole(model, work.configs[name])
    record = {**record, **outcome(work, trained, history, found), "weights": best.as_record()}
    together.wait()  # until all have read the files that are deleted here
    if together.writes:
        keep(place, trained, task, record)
        for file in (CHECKPOINT, BEST):
            (place / file).unlink(missing_ok=True)
    together.wait()
    return TrainedModel(place, record)


def _looks(task: Task, best_of: int | None, ema: float | None, frozen: Frozen | None) -> int:
    """How often held-out items choose the best weights; raises Unsupported if they cannot."""
    own_way = getattr(task, "runner", None) is not None
    if ema is not None and check_decay(ema) and own_way:
        raise Unsupported(f"ema={ema} on {task.name}, which trains in a way of its own", supported="no ema")
    if frozen is not None and (ema is not None or best_of):
        raise Unsupported(
            "weights that held-out items choose by an output that does not change", supported="ema=None and best_of=0"
        )
    if best_of is None:
        best_of = int(ema is not None) if own_way or task.generates or frozen is not None else MOMENTS
    at_least("best_of", best_of, int(ema is not None))
    return best_of


def _begun(
    work: Work, name: str, best_of: int, ema: float | None, teacher: Teacher | None, frozen: Frozen | None
) -> dict[str, Any]:
    """The record of a run before its first step."""
    settings = work.settings
    record = {"state": BEGUN, **described(work, name, settings.rates[0], settings.first_seed)}
    record["settings"] |= {
        "budget": str(settings.budget),
        "best_of": best_of,
        "ema": ema,
        **({"teacher": None, "teacher_weights": None, "distil": None} if teacher is None else teacher.settings),
        "frozen": None if frozen is None else str(frozen.trained.folder.resolve()),
    }
    if teacher is not None:
        record["teacher"] = teacher.described
    return record


def _check_together(task: Task, settings: CompareSettings, parallel: str, others: Mapping[str, Any]) -> None:
    """Raise Unsupported for what several processes cannot do together."""
    beside = [name for name, given in others.items() if given is not None]
    if getattr(task, "runner", None) is not None:
        beside.append(f"{task.name}, which trains in a way of its own")
    if parallel == "fsdp" and task.generates:
        beside.append(f"{task.name}, whose answers are generated")
    if beside:
        raise Unsupported(f"parallel='{parallel}' with {beside[0]}", supported="parallel without it")
    if settings.budget.unit == "seconds":
        raise Unsupported(
            f"a budget of {settings.budget} with parallel='{parallel}', whose steps are not measured",
            supported="steps, tokens or flops",
            nearest='--budget "500 steps"',
        )


def _whole(model: nn.Module, config: Any) -> nn.Module:
    """The model, or a copy with whole weights if they are sharded over processes; all processes must call this."""
    if not any(map(sharded, model.parameters())):
        return model
    copy = build(config, 0)
    load_tensors(copy, distinct_tensors(model), source="the shards of the processes")
    return copy


def _planned(work: Work, name: str, looks: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Number of steps, and seconds per step, if the choosing items are scored `looks` times."""
    started, budget = time.monotonic(), work.settings.budget
    # unless the budget is a time, the step time only determines checkpoint intervals and the remaining time
    seconds = calibration_seconds(budget) / (1 if budget.unit == "seconds" else 5)
    say(f"calibrating for about {seconds:.0f} s")
    threads = best_threads(work)
    torch.set_num_threads(threads)
    work.calibrate(seconds)
    step = work.step_seconds[name]
    scoring = work.evaluation_seconds[name] * (1 + looks * work.search_items / work.items)
    if budget.unit == "seconds":
        left = SAFETY * budget.amount - (time.monotonic() - started) - scoring
        steps = int(left / step)
    else:
        steps = work.steps_for(name, budget)
    if steps < FEWEST_STEPS:
        least = math.ceil((2 * FEWEST_STEPS * step + scoring + 2 * seconds) / SAFETY)
        raise Unsupported(
            f"budget {budget}, which leaves fewer than {FEWEST_STEPS} steps",
            supported="a larger budget",
            nearest=f"--budget {least}s" if budget.unit == "seconds" else f'--budget "{2 * FEWEST_STEPS} steps"',
        )
    say(f"{steps} steps of {work.batch} ({steps * work.batch_size * work.item_tokens:,} tokens)")
    return {"steps": steps, "step_seconds": step, "threads": threads}


def _check_free(place: Path) -> None:
    """Raise Unsupported if a folder is not writable, or has no run but files that the model would replace."""
    check_folder(place)
    taken = [name for name in (CARD, CONFIG, WEIGHTS, TOKENIZER, LAST) if (place / name).exists()]
    if taken:
        raise Unsupported(
            f"a model in {place} over its {taken[0]}, which is not of a training",
            supported="a new folder, or that of the same run",
            nearest="another --output",
        )


OTHER = {"data": "other data", "code": "other code of its plugins"}


def _check_same(place: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise Unsupported unless the run begun in the folder is the requested one."""
    pairs = {key: (before[key], now[key]) for key in ("mechanism", "layers")}
    pairs["task"] = (before["task"]["name"], now["task"]["name"])
    pairs["data"] = (before["task"]["data"], now["task"]["data"])
    pairs["code"] = (before.get("code", now["code"]), now["code"])
    options = [other_options(record["task"]["options"]) for record in (before, now)]
    pairs |= {key: (options[0].get(key), options[1].get(key)) for key in options[0] | options[1]}
    pairs |= {key: (before["settings"].get(key), value) for key, value in now["settings"].items()}
    for key, (old, new) in pairs.items():
        if json.loads(json.dumps(new)) != old:
            what = OTHER.get(key, f"{key}={old!r} instead of {new!r}")
            raise Unsupported(
                f"{place}, which holds a run with {what}",
                supported="a new folder, or the same run again",
                nearest="another --output",
            )
