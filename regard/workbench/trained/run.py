"""One model trained on one task, in a folder that it can be loaded from, scored again and written with.

The folder holds ``model.safetensors`` and ``config.json`` (:func:`regard.models.from_pretrained`), ``training.json`` (what was
trained on what, and what came of it), ``README.md`` (the same for a reader) and ``tokenizer.json`` where the tokenizer was
trained too; ``last`` has the last weights where others were better. While the run lasts there are
``checkpoint.safetensors``, from which the same call goes on, and ``best.safetensors``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from regard.compression.folders import load_own
from regard.contract import Unsupported, at_least
from regard.distributed import train_together
from regard.measurement import provenance
from regard.measurement.statistics import score_of_items
from regard.models import count_parameters, save_pretrained
from regard.models.exit_rules import HALTING
from regard.models.weights import distinct_tensors, load_tensors, sharded, write_atomically
from regard.tasks import Task, create_task
from regard.tasks.documents import nearest_path
from regard.tasks.images import ImageReader
from regard.tasks.segmentation import MaskReader
from regard.tasks.segmentation_3d import VolumeReader
from regard.tasks.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer
from regard.training import Evaluation, History, Point, WeightAverage, runner_of
from regard.training.average import check_decay
from regard.training.step import Alone
from regard.workbench.comparison.planning import FEWEST_STEPS, SAFETY, best_threads, calibration_seconds
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.summary import by_tokens, thin
from regard.workbench.comparison.task_models import build
from regard.workbench.comparison.work import Work
from regard.workbench.trained.best_weights import MOMENTS, BestWeights, Found, moments

if TYPE_CHECKING:
    from regard.workbench.trained.frozen import Frozen
    from regard.workbench.trained.teacher import Teacher

RECORD, CHECKPOINT, TOKENIZER, CARD = "training.json", "checkpoint.safetensors", "tokenizer.json", "README.md"
BEST, LAST = "best.safetensors", "last"
FINISHED, DIVERGED, BEGUN = "finished", "diverged", "begun"
SUPPORTED = "a folder written by `regard train`"
UNFINISHED = {"retrofit": (".retrofit", "retrofit.json"), "compress": (".work", "compression.json")}
"""Of commands that leave their work in a folder until they are done: its name, and the file that comes last."""
STATISTICS = ("mean", "deviation", "scale")
"""Of a reader: what it normalises by."""
UNTOLD = ("steps", "step_seconds", "first_item")
"""Settings that a reader of the card has no use for."""
CHECKPOINT_SECONDS = 30.0
"""About the time between checkpoints, which is what a killed run loses at most."""


@dataclass(frozen=True)
class TrainedModel:
    """A folder with a trained model.

    Attributes:
        folder: its place.
        record: what ``training.json`` says.
    """

    folder: Path
    record: Mapping[str, Any]

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The model, in evaluation mode."""
        return load_own(self.folder, device=device)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the text was read with; raises Unsupported where the task reads no text."""
        name = self.record["tokenizer"]
        if name is None:
            raise Unsupported(
                f"text for the model in {self.folder}, which was trained on {self.record['task']['name']}",
                supported="models trained on a task that reads text",
            )
        return ByteTokenizer() if name == ByteTokenizer.name else BpeTokenizer.load(self.folder / TOKENIZER)

    @property
    def reader(self) -> ImageReader | VolumeReader:
        """What turns files of images or volumes into inputs; raises Unsupported where the task reads no images."""
        record = self.record.get("reader")
        if record is None:
            raise Unsupported(
                f"images for the model in {self.folder}, which was trained on {self.record['task']['name']}",
                supported="models trained on the tasks images, segmentation and segmentation_3d",
            )
        if "overlap" in record:
            return VolumeReader.of_record(record)
        return (MaskReader if "colours" in record else ImageReader).of_record(record)

    def task(self, data: str | list[str] | None = None) -> Task:
        """The task that it was trained on, with `data` instead of its held-out items where given.

        Raises:
            Unsupported: for a task of a plugin, for data that are no longer where they were, and for new data of a task that
                makes its own.
        """
        name, options = self.record["task"]["name"], self.record["task"]["options"]
        if options is None:
            raise Unsupported(f"the task {name} of a plugin", supported="the plugin's task, given to `score`")
        if self.record["tokenizer"] not in (None, ByteTokenizer.name):
            options = {**options, "tokenizer": str(self.folder / TOKENIZER)}
        task = create_task(name, **(options if data is None else {**options, "validation": data}))
        if self.record.get("reader") is not None:
            self._read_as_trained(task)
        return task

    def _read_as_trained(self, task: Any) -> None:
        """Let a task normalise as in training: what is held out now, and so what is not, may be others than then."""
        known, now = self.reader, task.reader
        statistics = {name: getattr(known, name) for name in STATISTICS if hasattr(known, name)}
        if dataclasses.replace(now, **statistics) != known:
            raise Unsupported(
                f"the data of {self.folder}, whose classes or pixels are others than those that it was trained on",
                supported="the data as they were",
            )
        task.reader = known

    @property
    def chosen_by(self) -> int:
        """The first so many held-out items of its own, which the weights were chosen by; no score counts them."""
        return int(self.record["settings"]["first_item"])

    def score(
        self, task: Task | None = None, *, device: torch.device | str = "cpu", model: nn.Module | None = None
    ) -> Evaluation:
        """Score and loss on the held-out items of a task, or on those of its own that no weights were chosen by; of
        another form of the model where there is one."""
        first = self.chosen_by if task is None else 0
        chosen = self.task() if task is None else task
        return runner_of(chosen).evaluate(
            self.model(device) if model is None else model, chosen, self.record["settings"]["batch_size"], first=first
        )


def trained_length(folder: Path, model: nn.Module) -> int | None:
    """Tokens at a time that the model of a folder was trained on, as its record or its config says; None where none does."""
    if (folder / RECORD).is_file():
        return open_trained(folder).record["settings"].get("length")
    return getattr(model.config, "max_position_embeddings", None)


def beyond(trained: int | None, asked: int) -> str:
    """What to say where a model is asked for more tokens than it was trained on; nothing elsewhere."""
    if trained is None or asked <= trained:
        return ""
    return f"The model was trained on {trained} tokens at a time: what it does with {asked} it has not learned."


def open_trained(folder: Path | str, *, supported: str = SUPPORTED) -> TrainedModel:
    """The model of a folder that :func:`train_model` has finished; `supported` is what to say of another place.

    Raises:
        Unsupported: where there is none, or its training is not finished.
    """
    found = _read(Path(folder))
    if found is None:
        raise _not_trained(Path(folder), supported)
    if found["state"] != FINISHED:
        ended = {DIVERGED: "diverged", BEGUN: "is not finished"}[found["state"]]
        nearest = "a smaller --learning-rate" if found["state"] == DIVERGED else "the same `regard train` again"
        raise Unsupported(f"{folder}, whose training {ended}", supported="a finished run", nearest=nearest)
    return TrainedModel(Path(folder), found)


class Monitor(Protocol):
    """Looks at a model while it is trained."""

    def check(self, model: nn.Module) -> None:
        """Raise Unsupported for a model in which it sees nothing."""
        ...

    def due(self, steps: int) -> Collection[int]:
        """The steps of a run of `steps` after which it looks; 0 is before the first."""
        ...

    def look(self, model: nn.Module, step: int) -> None:
        """Look at the model after so many steps; a run that is resumed may come by a step again."""
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
    """Train the one mechanism of `settings` on a task, at its first rate and seed, in its first frame.

    The same call goes on where an earlier one was stopped, at most half a minute back. With a budget of time the number of
    steps is measured once, and then stays.

    Args:
        folder: for everything that is written; a run with other settings or data is not overwritten.
        ema: decay of a mean of the weights (:class:`regard.training.WeightAverage`), which is looked at beside them.
        best_of: steps at which the first quarter of the held-out items chooses the best weights, which is then not scored; 0
            keeps the last weights. When None 8, and 0 for tasks that generate or train in a way of their own, but 1 with
            `ema`.
        monitor: looks at the model during the run, which it does not change.
        teacher: which the model learns from beside the task; nothing of it is in the folder.
        frozen: a model of the same settings whose layers are taken over and stay as they are: the exits alone learn, and the
            last weights are kept.
        parallel: how the processes of torch's default group train the model together, all of which make this call with a
            folder that all can read and the first one writes; see :func:`regard.distributed.train_together`. A run may go on
            in another number of processes, or in one.
        on_step: called after each step with it, the number of steps, and the seconds that are left at the pace so far.
        say: told in sentences what is decided.

    Returns:
        The folder, whose record's `state` is ``diverged`` where a loss stopped being finite: then there is no model.

    Raises:
        Unsupported: for more than one mechanism, a budget too small, a folder with another run, and `ema` of a task that
            trains in a way of its own, and for a teacher whose method does not fit the model; for what `parallel` cannot do.
    """
    if len(settings.names) != 1 or settings.seeds != 1 or len(settings.rates) != 1:
        raise Unsupported(
            "a training of several mechanisms, seeds or rates", supported="one of each", nearest="compare"
        )
    place, (name,) = Path(folder), settings.names
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
    record = {"state": BEGUN, **described(work, name, settings.rates[0], settings.first_seed)}
    record["settings"] |= {"budget": str(settings.budget), "best_of": best_of, "ema": ema}
    record["settings"] |= (
        {"teacher": None, "teacher_weights": None, "distil": None} if teacher is None else teacher.settings
    )
    record["settings"]["frozen"] = None if frozen is None else str(frozen.trained.folder.resolve())
    if teacher is not None:
        record["teacher"] = teacher.described
    model = build(work.configs[name], settings.first_seed, settings.device)
    trainee = taught(model)
    together = Alone(trainee) if parallel is None else train_together(parallel, trainee)
    before = together.agreed(_read(place))
    if before is not None:
        _check_same(place, before, record)
        if before["state"] != BEGUN:
            return TrainedModel(place, before)
        record = before
        say(f"going on with the run in {place}")
    else:
        looks = best_of * (2 if ema is not None else 1) if work.search_items else 0
        record["settings"] |= together.agreed(_planned(work, name, looks, say))
        if together.writes:
            _write(place, record)
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
        if together.writes and not (place / CHECKPOINT).exists():  # nothing is there that could be gone on with
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
    together.wait()  # all have read what is deleted here
    if together.writes:
        keep(place, trained, task, record)
        for file in (CHECKPOINT, BEST):
            (place / file).unlink(missing_ok=True)
    together.wait()
    return TrainedModel(place, record)


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
    """The model, or where several processes have shards of its weights a copy with whole ones; all of them call."""
    if not any(map(sharded, model.parameters())):
        return model
    copy = build(config, 0)
    load_tensors(copy, distinct_tensors(model), source="the shards of the processes")
    return copy


def keep(folder: Path, model: nn.Module, task: Task, record: Mapping[str, Any]) -> TrainedModel:
    """Write a model into its folder; of one that diverged the record alone. The record comes last."""
    if record["state"] == FINISHED:
        save_pretrained(model, folder)
        tokenizer = getattr(task, "tokenizer", None)
        if isinstance(tokenizer, BpeTokenizer):
            write_atomically(folder / TOKENIZER, tokenizer.save)
    trained = TrainedModel(folder, record)
    write_atomically(folder / CARD, lambda path: path.write_text(card(trained), encoding="utf-8"))
    _write(folder, record)
    return trained


def described(work: Work, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Facts about a run that are known before its first step."""
    task, variant = work.task, work.settings.variants[name]
    tokenizer = getattr(task, "tokenizer", None)
    sizes = () if variant.backbone is not None else ("dim", "layers", "heads")
    own = {
        "frame": work.frame,
        "learning_rate": rate,
        "seed": seed,
        "batch_size": work.batch_size,
        "precision": work.settings.precision,
        "device": work.settings.device,
        "stack": work.settings.stack.changed or None,
        "first_item": work.search_items,
    }
    return {
        "regard": provenance.regard_version(),
        "task": {
            "name": getattr(task, "registered", None) or task.name,
            "options": getattr(task, "origin", None),
            "data": work.identity["data"],
        },
        "described": task.describe(),
        "mechanism": name,
        **variant.record(),
        **({} if variant.backbone is None else {"backbone": [variant.backbone[0], dict(variant.backbone[1])]}),
        "tokenizer": None if tokenizer is None else tokenizer.name,
        "reader": None if (reader := getattr(task, "reader", None)) is None else reader.as_record(),
        "settings": own | {key: work.identity[key] for key in ("length", *sizes, "parameters")},
    }


def _planned(work: Work, name: str, looks: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Steps, and how long one takes, where the items that choose are scored `looks` times."""
    started, budget = time.monotonic(), work.settings.budget
    # where the budget is not a time, the time of a step only says how often to save and what is left
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


def outcome(work: Work, model: nn.Module, history: History, found: Evaluation | None) -> dict[str, Any]:
    """Results of a run; `found` is None where it diverged."""
    task, rule = work.task, work.baseline
    return {
        "state": DIVERGED if found is None else FINISHED,
        **ran(task, model, history),
        "score": None if found is None else found.score,
        "loss": None if found is None else found.loss,
        "figures": figures_of(found),
        "baseline": None if rule is None else {"name": rule.name, "score": rule.score},
        "machine": provenance.fingerprint()["cpu"],
    }


def figures_of(found: Evaluation | None) -> dict[str, list[float]]:
    """What a task tells beside its score: mean over the held-out items and its standard error, by name."""
    return {} if found is None else {name: list(score_of_items(items)) for name, items in found.figures.items()}


def ran(task: Task, model: nn.Module, history: History) -> dict[str, Any]:
    """The scores of a run, and by which measure."""
    return {
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "parameters": count_parameters(model),
        "steps": len(history.curve),
        "tokens": history.tokens,
        "seconds": history.seconds,
        "curve": thin([[tokens, point.loss] for tokens, point in by_tokens(history)]),
    }


def chosen_weights(record: Mapping[str, Any]) -> str:
    """Which weights of a run were kept, in words."""
    found = Found(**record["weights"])
    others = found.averaged or found.step < record["steps"]
    return f"{found}" + (f"; the last ones are in {LAST}/" if others else "")


def learned_from(record: Mapping[str, Any]) -> str:
    """What a student learned from, in words."""
    told = record["teacher"]
    return (
        f"Distilled by {record['settings']['distil']} from {record['settings']['teacher']}: {told['mechanism']}, "
        f"{told['parameters']:,} parameters, {told['score']:.4g} {told['metric']}"
    )


def _check_same(place: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise Unsupported unless a run that was begun there is the one that is asked for."""
    pairs = {key: (before[key], now[key]) for key in ("mechanism", "layers")}
    pairs["task"] = (before["task"]["name"], now["task"]["name"])
    pairs["data"] = (before["task"]["data"], now["task"]["data"])
    pairs |= {key: (before["settings"].get(key), value) for key, value in now["settings"].items()}
    for key, (old, new) in pairs.items():
        if json.loads(json.dumps(new)) != old:
            what = "other data" if key == "data" else f"{key}={old!r} instead of {new!r}"
            raise Unsupported(
                f"{place}, which holds a run with {what}",
                supported="a new folder, or the same run again",
                nearest="another --output",
            )


def _not_trained(place: Path, supported: str) -> Unsupported:
    """What a place is that has no record of a training."""
    if not place.exists():
        return Unsupported(f"{place}, which does not exist", supported=supported, nearest=nearest_path(place))
    if not place.is_dir():
        return Unsupported(f"{place}, which is no folder", supported=supported)
    for command, (work, last) in UNFINISHED.items():
        if (place / work).is_dir() and not (place / last).is_file():
            return Unsupported(
                f"{place}, whose {command} is not finished",
                supported="a finished run",
                nearest=f"the same `regard {command}` again",
            )
    beside = ": it holds " + ", ".join(sorted(path.name for path in place.iterdir())[:4])
    return Unsupported(f"{place} without {RECORD}" + (beside if any(place.iterdir()) else ""), supported=supported)


def _read(place: Path) -> dict[str, Any] | None:
    file = place / RECORD
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not {"state", "task", "mechanism", "layers", "tokenizer", "settings"} <= set(found):
            raise ValueError("parts are missing")
    except (ValueError, TypeError) as error:
        raise Unsupported(f"{file}, which cannot be read ({error})", supported="a file of `regard train`") from None
    return found


def _write(place: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomically(place / RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def card(trained: TrainedModel) -> str:
    """The folder's README: what was trained, how well it does, and how to use it."""
    record = trained.record
    title = f"# {record['mechanism']} on {record['task']['name']}"
    if record["state"] == DIVERGED:
        rate = record["settings"]["learning_rate"]
        return (
            f"{title}\n\nThe training diverged at a learning rate of {rate:g}: there is no model. Try a smaller one.\n"
        )
    rule = record["baseline"]
    beside = f" (without training, {rule['name']}: {rule['score']:.4g})" if rule else ""
    own = record["settings"]
    lines = [
        title,
        f"Held out: {record['score']:.4g} {record['metric']}{beside}. {record['parameters']:,} parameters, "
        f"{record['tokens']:,} tokens in {record['steps']} steps, {record['seconds']:.0f} s of training on {record['machine']}.",
        *([f"The weights are {chosen_weights(record)}."] if record.get("weights") else []),
        *([f"{learned_from(record)}."] if record.get("teacher") else []),
        "\n".join(
            f"- {key.replace('_', ' ')}: {value}"
            for key, value in own.items()
            if key not in UNTOLD and value is not None
        ),
        "```\n" + record["described"] + "\n```",
        "## Use",
        "```python\nfrom regard.models import from_pretrained\n\nmodel = from_pretrained("
        + repr(str(trained.folder))
        + ")\n```",
    ]
    commands = [f"regard evaluate {trained.folder}"]
    reader = record.get("reader")
    if reader is not None and "colours" in reader:
        files = "scan.nii.gz --output mask.nii.gz" if "overlap" in reader else "picture.jpg --output mask.png"
        commands.append(f"regard predict {trained.folder} {files}")
    elif reader is not None:
        commands += [f"regard {verb} {trained.folder} picture.jpg" for verb in ("predict", "explain")]
    if (own.get("stack") or {}).get("exits"):
        halts = str(own["stack"].get("exit_rule")).startswith(HALTING)
        commands.append(f"regard evaluate {trained.folder} --exit {f'{HALTING}:0.1' if halts else 'entropy:0.3'}")
    if record["tokenizer"] is not None and record["task"]["name"] == "text":
        commands.append(f'regard generate {trained.folder} "..."')
    return "\n\n".join([*lines, "```\n" + "\n".join(commands) + "\n```"]) + "\n"
