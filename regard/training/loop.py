"""The training loop: deterministic, resumable, and honest about divergence.

All randomness in step s is derived from (seed, s): the task draws the batch from it, and dropout and the layers draw
from generators seeded here. So there is no random state to carry over, and a run resumed from a checkpoint equals an
uninterrupted one bit for bit, on the same machine with the same number of threads; the routes of linear layers, which a
process chooses by measuring, are stored in the checkpoint. On CUDA a few of torch's backward kernels sum in a varying
order; see `torch.use_deterministic_algorithms`.
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Unsupported, at_least, one_of
from regard.core.precision import PRECISIONS, mixed
from regard.engines.linear import chosen_routes, take_routes
from regard.measurement.memory import peak_memory
from regard.models.evaluating import evaluation_mode
from regard.tasks.protocol import Batch, Task
from regard.training.average import WeightAverage
from regard.training.checkpoint import damaged, load_checkpoint, restore, save_checkpoint
from regard.training.optimizer import SCHEDULES, make_optimizer, scheduled_rate
from regard.training.step import Alone, answered, batch_context, run_model

LONGEST_UNSAVED = 60.0
"""Seconds after which a checkpoint is due whatever `checkpoint_every` says, in case steps become slow."""

LEAST_SCALE = 1.0
"""The loss scale in float16 at or below which an overflow counts as divergence: unscaled gradients do not fit."""


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a training run.

    Attributes:
        steps: number of optimizer steps.
        batch_size: items per step.
        learning_rate: peak of the schedule.
        weight_decay: weight decay of matrices; see :func:`regard.training.optimizer.parameter_groups`.
        warmup: share of the steps in which the rate rises to its peak.
        schedule: ``cosine`` or ``constant``.
        clip: maximum norm of the whole gradient; None for no limit.
        seed: seed of batches, dropout and the layers' draws. The model's initial weights are up to the caller.
        precision: ``float32`` computes in the parameters' own dtype, ``bfloat16`` under torch's autocast. ``float16``
            also uses autocast, with the loss scaled so that small gradients are not lost (mixed precision training,
            arXiv 1710.03740): if gradients overflow, the step is skipped and the scale halved; after 2000 steps without
            overflow it is doubled. The parameters must be wider than float16.
        checkpoint_every: steps between checkpoints, if there is a path for them.
        measure_memory: whether to measure the second step's peak memory, which slows that step down.
    """

    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    schedule: str = "cosine"
    clip: float | None = 1.0
    seed: int = 0
    precision: str = "float32"
    checkpoint_every: int = 100
    measure_memory: bool = True

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("seed", 0), ("checkpoint_every", 1)):
            at_least(name, getattr(self, name), low)
        at_least("weight_decay", self.weight_decay, 0.0)
        if not self.learning_rate > 0:
            raise Unsupported(f"learning_rate={self.learning_rate}", supported="a positive rate", nearest="1e-3")
        if not 0 <= self.warmup <= 1:
            raise Unsupported(f"warmup={self.warmup}", supported="a share of the steps, 0 to 1", nearest="warmup=0.05")
        if self.clip is not None and not self.clip > 0:
            raise Unsupported(f"clip={self.clip}", supported="a positive norm, or None", nearest="clip=None")
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("precision", self.precision, PRECISIONS)


NOT_OF_THE_RESULT = ("checkpoint_every", "measure_memory")
"""Settings that may change between a run and its resumption."""


@dataclass(frozen=True)
class Point:
    """One step of a run.

    Attributes:
        step: index of the step, from 0.
        loss: the task's loss per target: nats, or squared error.
        auxiliary: what is added to the loss: weighted auxiliary losses of the layers, and the difference between the
            mean loss over a model's exits (or stages, in deep supervision) and the loss of its output.
        gradient_norm: norm of the gradient before clipping.
        learning_rate: learning rate of the step.
        seconds: time of forward, backward and update, without making the batch.
        skipped: whether the scaled gradients overflowed in float16, so that the weights were not updated.
    """

    step: int
    loss: float
    auxiliary: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    skipped: bool = False


@dataclass
class History:
    """The record of a run, apart from the weights.

    Attributes:
        curve: a point for each step taken, including skipped ones.
        tokens: number of valid input tokens read by those steps.
        peak_memory: bytes that a training step needs in addition to the model, the optimizer and everything else
            allocated before: activations, gradients, temporaries. None if not measured.
        memory_counted: how memory was counted; see :class:`regard.measurement.memory.Peak`.
        finished: whether all steps were taken (otherwise a deadline passed, or the run diverged).
        diverged: whether a loss or gradient became non-finite; the weights are those before that step.
    """

    curve: list[Point] = field(default_factory=list)
    tokens: int = 0
    peak_memory: int | None = None
    memory_counted: str | None = None
    finished: bool = False
    diverged: bool = False

    @property
    def skipped(self) -> int:
        """Number of steps whose gradients overflowed in float16."""
        return sum(point.skipped for point in self.curve)

    @property
    def seconds(self) -> float:
        """Total time of the steps."""
        return sum(point.seconds for point in self.curve)

    @property
    def tokens_per_second(self) -> float:
        """Mean tokens per step divided by the median time of a step (robust to warm-up); nan without steps."""
        if not self.curve:
            return math.nan
        return self.tokens / len(self.curve) / statistics.median(point.seconds for point in self.curve)

    @property
    def final_loss(self) -> float:
        """Mean loss of the last tenth of the curve; nan without steps."""
        last = self.curve[-max(1, len(self.curve) // 10) :]
        return statistics.fmean(point.loss for point in last) if last else math.nan

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> History:
        """Restore a history from its `dataclasses.asdict`."""
        return cls(**{**record, "curve": [Point(**point) for point in record["curve"]]})


def count_tokens(batch: Batch) -> int:
    """Count the valid tokens of a batch, in its inputs and its memory if there is one."""
    counted = [(batch.inputs, batch.valid)]
    if batch.memory is not None:
        counted.append((batch.memory, batch.memory_valid))
    return sum(x.shape[0] * x.shape[1] if valid is None else int(valid.sum()) for x, valid in counted)


def step_seed(seed: int, step: int) -> int:
    """Return a seed for the draws of a step, unrelated to those of other steps and seeds."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest(), "big") >> 1


def train(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    *,
    on_step: Callable[[Point], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    deadline: float | None = None,
    average: WeightAverage | None = None,
    together: Alone | None = None,
) -> History:
    """Train `model` in place on `task`.

    If the process is killed, at most the steps since the last checkpoint are lost; a KeyboardInterrupt saves another
    checkpoint before it is raised, so that only the current step is lost.

    Args:
        model: called as ``model(inputs, context=context) -> Result`` with logits as its output; its
            ``config.loss_weights``, if there are any, weight auxiliary losses.
        on_step: called after each step.
        checkpoint: file to save to, and to resume from if it exists.
        resume: if False, start anew even if the checkpoint exists, and replace it.
        deadline: a time of `time.monotonic` after which no new step is started.
        average: an average of the weights, updated after each step and kept in the checkpoint.
        together: the process group that takes the steps together; see :func:`regard.distributed.train_together`. All
            processes call this function with a checkpoint that all can read and one of them writes. A single process
            when None.

    Raises:
        Unsupported: for a checkpoint of another model, task or config; for ``precision="float16"`` with parameters in
            float16, whose updates would be lost; and for that precision or a deadline with several processes.
    """
    history, together = History(), together or Alone(model)
    if together.count > 1 and (deadline is not None or config.precision == "float16"):
        raise Unsupported(
            f"a deadline or precision='float16' in {together.count} processes",
            supported="a number of steps, in float32 or bfloat16",
        )
    device = next(model.parameters()).device
    scaler = _loss_scaler(model, config, device)
    optimizer = make_optimizer(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    path = None if checkpoint is None else Path(checkpoint)
    identity = _identity(task, config, average)
    if path is not None and resume and together.agreed(path.exists()):
        history = _resume(path, identity, model, optimizer, scaler, average)
        if history.finished or history.diverged:
            return history

    saved = time.monotonic()

    def save() -> None:
        if path is not None:
            nonlocal saved
            record: dict[str, Any] = {"run": identity, "history": asdict(history), "scaler": scaler.state_dict()}
            record["routes"] = chosen_routes()
            mean = None if average is None else average.tensors
            if average is not None:
                record["updates"] = average.updates
            save_checkpoint(path, model, optimizer, record, mean, write=together.writes)
            saved = time.monotonic()

    was_training, updating = model.training, False
    model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            while len(history.curve) < config.steps and (deadline is None or time.monotonic() < deadline):
                step = len(history.curve)
                batch = task.training_batch(step, config.seed, config.batch_size).to(device)
                rate = scheduled_rate(
                    step, config.steps, peak=config.learning_rate, warmup=config.warmup, schedule=config.schedule
                )
                measured = config.measure_memory and step == min(1, config.steps - 1)
                start = time.perf_counter()
                loss, auxiliary, norm = _gradients(
                    together, task, optimizer, scaler, batch, config, step, history if measured else None
                )
                overflown = scaler.is_enabled() and not math.isfinite(norm) and scaler.get_scale() > LEAST_SCALE
                if not (math.isfinite(loss) and math.isfinite(auxiliary) and (math.isfinite(norm) or overflown)):
                    history.diverged = True
                    break
                updating = True
                for group in optimizer.param_groups:
                    group["lr"] = rate
                scaler.step(optimizer)  # the scaler skips the step if unscaling found an overflow
                scaler.update()
                if average is not None and not overflown:
                    average.update(model)
                _synchronise(device)
                point = Point(step, loss, auxiliary, norm, rate, time.perf_counter() - start, overflown)
                history.curve.append(point)
                history.tokens += count_tokens(batch)
                updating = False
                if on_step is not None:
                    on_step(point)
                late = together.count == 1 and time.monotonic() - saved > LONGEST_UNSAVED  # clocks differ
                due = len(history.curve) % config.checkpoint_every == 0 or late
                if due and len(history.curve) < config.steps:
                    save()
        history.finished = len(history.curve) == config.steps
        save()
    except KeyboardInterrupt:
        if not updating and together.count == 1:  # other processes may be at another step
            save()
        raise
    finally:
        model.train(was_training)
        optimizer.zero_grad()
    return history


def _loss_scaler(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """Create the loss scaler of a run, which does nothing unless the precision is float16."""
    narrow = config.precision == "float16" and any(p.dtype == torch.float16 for p in model.parameters())
    if narrow:
        raise Unsupported(
            "precision='float16' of a model whose parameters are float16, in which updates are lost",
            supported="wider parameters: products alone are float16",
            nearest="model.float()",
        )
    return torch.amp.GradScaler(device.type, enabled=config.precision == "float16")


def _gradients(
    together: Alone,
    task: Task,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    config: TrainConfig,
    step: int,
    measure: History | None,
) -> tuple[float, float, float]:
    """Compute the clipped gradients of a step; returns the task's loss, the auxiliary loss and the gradient norm."""
    device = batch.inputs.device
    seed = step_seed(config.seed, step) + together.draws
    # seeding all kinds of devices takes 0.2 ms, and on a CPU only its own generator matters
    (torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed)(seed)
    generator = torch.Generator(device).manual_seed(seed)
    batch = together.part(batch)
    context = batch_context(batch, generator=generator, progress=float(step))
    optimizer.zero_grad(set_to_none=True)

    def run() -> tuple[Tensor, Tensor | float, Tensor]:
        loss, auxiliary = together.losses(task, batch, context, mixed(config.precision, device))
        scaler.scale(loss + auxiliary).backward()
        together.add_gradients()
        if scaler.is_enabled():
            scaler.unscale_(optimizer)
        return loss, auxiliary, together.clip(math.inf if config.clip is None else config.clip)

    if measure is None:
        loss, auxiliary, norm = run()
    else:
        peak = peak_memory(run, device=device)
        measure.peak_memory, measure.memory_counted = peak.bytes, peak.counted
        loss, auxiliary, norm = peak.value
    return *together.told(loss, auxiliary), norm.item()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _identity(task: Task, config: TrainConfig, average: WeightAverage | None) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_OF_THE_RESULT}
    return {"task": task.name, **settings, "ema": None if average is None else average.decay}


def _resume(
    path: Path,
    identity: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None,
) -> History:
    found = load_checkpoint(path)
    try:
        run, history = dict(found.record["run"]), History.from_record(found.record["history"])
        scale = dict(found.record["scaler"])
        updates = int(found.record.get("updates", 0))
        if "routes" in found.record:
            take_routes(found.record["routes"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    for name, value in identity.items():
        before = run.get(name)
        if before != value:
            raise Unsupported(
                f"resuming {path}, a run with {name}={before!r}, with {name}={value!r}",
                supported="the same task and settings",
                nearest=f"{name}={before!r}, another path, or resume=False",
            )
    restore(found, model, optimizer)
    if average is not None:
        average.load(found.average, updates)
    if scaler.is_enabled():
        scaler.load_state_dict(scale)
    return history


@dataclass(frozen=True)
class Evaluation:
    """Scores on a task's held-out items.

    Attributes:
        items: (sum, weight) of each item, in the task's order, so that two models can be paired item by item.
        score: total sum / total weight.
        loss: mean of the task's loss over the targets: cross entropy in nats, or squared error.
        figures: other metrics of the task: the items of each, by name.
    """

    items: list[tuple[float, float]]
    score: float
    loss: float
    figures: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batch_size: int, *, first: int = 0, last: int | None = None) -> Evaluation:
    """Score `model` on the held-out items from index `first` up to but not including `last`.

    Without items, score and loss are nan.
    """
    device = next(model.parameters()).device
    items: list[tuple[float, float]] = []
    figures: dict[str, list[tuple[float, float]]] = {}
    loss, targets, seen = 0.0, 0.0, 0

    def run(part: Batch) -> Tensor:
        return run_model(model, part, batch_context(part)).output

    with evaluation_mode(model):
        for batch in task.evaluation_batches(batch_size):
            if last is not None and seen >= last:
                break
            begin, end = max(first - seen, 0), batch.size if last is None else min(last - seen, batch.size)
            seen += batch.size
            if begin >= end:
                continue
            chosen = batch.items(begin, end).to(device)
            context = batch_context(chosen)
            output = answered(task, run, chosen)
            if task.generates is None:
                sums, weights = task.score(output, chosen)
            else:
                memory = {} if chosen.memory is None else {"memory": chosen.memory, "memory_mask": context.memory_mask}
                tokens = model.generate(  # type: ignore[operator]
                    chosen.inputs[:, :1], task.generates, stop_tokens=task.stop_tokens, **memory
                )
                sums, weights = task.score_generated(tokens, chosen)
            items += list(zip(sums.tolist(), weights.tolist(), strict=True))
            more = task.figures(output, chosen) if hasattr(task, "figures") else {}
            for name, (sums, weights) in more.items():
                figures.setdefault(name, []).extend(zip(sums.tolist(), weights.tolist(), strict=True))
            losses, counts = task.loss(output, chosen)
            loss, targets = loss + float(losses.sum()), targets + float(counts.sum())
    total, weight = sum(s for s, _ in items), sum(w for _, w in items)
    score = total / weight if weight else math.nan
    return Evaluation(items, score, loss / targets if targets else math.nan, figures)
