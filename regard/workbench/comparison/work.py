"""The work of a comparison on one task: matched models, steps, and what they take."""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from regard import backends
from regard.contract import Pattern, Unsupported
from regard.measurement.budget import Budget
from regard.measurement.flops import flop_counter
from regard.measurement.statistics import FEWEST_ITEMS
from regard.models import StackConfig, build_model, count_parameters
from regard.models.blocks import Block
from regard.models.frames import layer_parts
from regard.models.image_model import ImageModelConfig
from regard.tasks import Baseline, Task
from regard.training import TrainConfig, runner_of
from regard.workbench.comparison.cost import DECODE_STEPS
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.task_models import (
    backbone_config,
    build,
    matched,
    model_config,
    parameters_of,
    target_of,
)

GENERATED_AT_ONCE = 32
EXTENSION = 0.4
"""Runs of each mechanism that are allowed for learning rates beyond the grid."""
LEAST_SECONDS = 0.2
"""Of training steps, from which their pace is told."""


class Work:
    """One task's share of a comparison in one frame: matched models, step counts and the cells to measure.

    Args:
        task, settings: of the comparison.
        frame: one of the settings'; the first when None.
        names: of the mechanisms; all when None.
        choosing: whether held-out items are kept for a choice even where one learning rate is given.
        prepare: what a model is trained in, as beside its teacher, where that is not the model alone.
    """

    def __init__(
        self,
        task: Task,
        settings: CompareSettings,
        frame: str | None = None,
        names: Sequence[str] | None = None,
        *,
        choosing: bool = False,
        prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        self.task, self.settings, self.prepare = task, settings, prepare
        self.frame = settings.frames[0] if frame is None else frame
        self.target = target_of(task, settings)
        self.configs = {name: self._matched(name) for name in (settings.names if names is None else names)}
        self.item_tokens = task.length + (task.memory_length or 0)
        self.batch_size = max(1, settings.batch_tokens // self.item_tokens)
        # generating token by token takes about as long for many items as for few
        self.scored_at_once = max(self.batch_size, GENERATED_AT_ONCE) if task.generates else self.batch_size
        self.items = sum(batch.size for batch in task.evaluation_batches(64))
        choosing = choosing or len(settings.rates) > 1
        self.search_items = max(1, self.items // 4) if self.items > 1 and choosing else 0
        self.baseline = rule_after(task, self.items, self.search_items)
        self.identity = {
            "task": task.name,
            "metric": task.metric,
            "data": data_digest(task),
            "length": task.length,
            "dim": settings.dim,
            "layers": settings.layers,
            "heads": settings.heads,
            "parameters": self.target,
            "batch_size": self.batch_size,
            "frame": self.frame,
        }
        if task.memory_length is not None:
            self.identity |= {"pattern": str(task.pattern), "memory_length": task.memory_length}
        if settings.stack != StackConfig():
            self.identity["stack"] = asdict(settings.stack)
        if settings.precision != "float32":
            self.identity["precision"] = settings.precision
        if settings.model is not None:
            self.identity["model"] = settings.model
        if settings.match is not None:
            self.identity["match"] = {name: dict((v.backbone or ("", {}))[1]) for name, v in settings.variants.items()}
        if getattr(task, "runner", None) is not None:
            self.identity["runner"] = type(task.runner).__name__
        if settings.device != "cpu":
            self.identity["device"] = settings.device
        self.steps: dict[str, int] = {}
        self.step_seconds: dict[str, float] = {}
        self.evaluation_seconds: dict[str, float] = {}

    def _matched(self, name: str) -> Any:
        variant = self.settings.variants[name]
        parameters_of(variant, self.task, self.settings, self.frame)
        try:
            return matched(variant, self.task, self.settings, self.frame, self.target)
        except Unsupported as error:
            raise Unsupported(
                f"{name} with {error.asked}, as the others have",
                supported=error.supported,
                nearest=f"a larger --dim, or --mechanisms without {name}",
            ) from None

    def config_for(self, name: str, length: int) -> Any:
        """The backbone whose costs are measured at a length: where the mechanism has a greatest length, made for this
        one."""
        variant, config = self.settings.variants[name], self.configs[name]
        if variant.backbone is not None:
            return backbone_config(variant, self.task, self.settings, length)
        if all(card.length != "max" for card in variant.cards):
            return config
        made = model_config(variant, self.task, self.settings, self.frame, length + DECODE_STEPS)
        return replace(made, feed_forward=config.feed_forward)

    def takes(self, length: int) -> bool:
        """Whether every model takes inputs of a length, as networks for images of some sizes do not."""
        try:
            for name in self.configs:
                count_parameters(self.config_for(name, length))  # of networks that are built, which refuse more
        except Unsupported:
            return False
        return True

    def parts(self) -> dict[str, dict[str, str]]:
        """The parts of each model's layers beside the mechanism, none of image models, whose layers are their own; layers of a
        hybrid that differ are told apart."""
        found: dict[str, dict[str, str]] = {}
        for name, config in self.configs.items():
            if isinstance(config, ImageModelConfig):
                found[name] = {}
                continue
            with torch.device("meta"):
                model = build_model(config)
            blocks = [module for module in model.modules() if isinstance(module, Block)]
            each = [layer_parts(block.mixer) for block in blocks if block.cross == self.task.pattern.cross]
            names = dict.fromkeys(part for parts in each for part in parts)
            found[name] = {part: " or ".join(dict.fromkeys(p[part] for p in each if part in p)) for part in names}
            added = getattr(getattr(model, "positions", None), "name", None)
            if added is not None and found[name].get("positions") == "none":
                found[name]["positions"] = f"{added}, added to the model's input"
        return found

    @functools.cached_property
    def published(self) -> str:
        """What is not matched, image backbones and plans with all their widths, with its parameters; empty without any."""
        named = {name: config for name, config in self.configs.items() if name in self.settings.unmatched}
        return ", ".join(f"{name} has {count_parameters(config):,} parameters" for name, config in named.items())

    @property
    def sizes(self) -> str:
        """Parameters of the models, in words."""
        others = f"{self.target:,} parameters" if set(self.configs) - self.settings.unmatched else ""
        if not self.published:
            return others
        return f"{self.published}; the others {others}" if others else self.published

    @property
    def own_length(self) -> int:
        """Tokens of an item; in cross patterns of its memory."""
        return self.task.memory_length if self.task.memory_length is not None else self.task.length

    def calibrate(self, seconds: float) -> None:
        """Time training steps and an evaluation of each model, twice: the smaller times count, since what disturbs the machine
        for a moment would take steps from all models."""
        share = seconds / len(self.configs) / 2
        names = list(self.configs)
        for name in (*names, *reversed(names)):
            step, evaluation = self._timed(self.configs[name], share)
            self.step_seconds[name] = min(step, self.step_seconds.get(name, math.inf))
            self.evaluation_seconds[name] = min(evaluation, self.evaluation_seconds.get(name, math.inf))

    def _timed(self, config: Any, seconds: float) -> tuple[float, float]:
        """Seconds of a training step, with a little to spare, and of an evaluation."""
        model = self.prepare(build(config, 0, self.settings.device))
        timed = replace(self.train_config(TrainConfig.learning_rate, 0, 1_000_000), measure_memory=False)
        started = time.monotonic()
        runner = runner_of(self.task)
        runner.train(model, self.task, replace(timed, steps=2))
        began = time.monotonic()
        history = runner.train(model, self.task, timed, deadline=max(began + LEAST_SECONDS, started + 0.7 * seconds))
        # with the making of its batch, which takes a while where images are varied
        step = (time.monotonic() - began) / len(history.curve) * 1.15 if history.curve else seconds
        some = next((batch.size for batch in self.task.evaluation_batches(self.scored_at_once)), 0)
        started = time.monotonic()
        runner.evaluate(model, self.task, self.scored_at_once, last=some)
        return step, (time.monotonic() - started) * max(1.0, self.items / max(1, some))

    @property
    def kind(self) -> tuple[str, Pattern]:
        """Tasks of one kind share a backbone, whose costs are measured once."""
        return self.task.objective, self.task.pattern

    @property
    def batch(self) -> str:
        """The size of a training step, in words."""
        memory = "" if self.task.memory_length is None else f"{self.task.memory_length} + "
        return f"{self.batch_size} x {memory}{self.task.length} tokens"

    @property
    def few_items(self) -> str:
        """A warning where few held-out items decide; empty where enough do."""
        count = self.items - self.search_items
        if count >= FEWEST_ITEMS:
            return ""
        said = "a single held-out item decides" if count == 1 else f"only {count} held-out items decide"
        if not self.search_items and len(self.settings.rates) > 1:
            said += ", and the learning rate is chosen on the same"
        return (
            f"On {self.task.name} {said}: that a score is better there says little about other data. "
            "More data (also as --validation) or a shorter --length gives more items."
        )

    @property
    def runs(self) -> float:
        """Full runs of each mechanism: one a rate with the first seed, then the other seeds at the best rate; and what is
        allowed for rates beyond the grid."""
        rates = len(self.settings.rates)
        return rates + self.settings.seeds - 1 + (EXTENSION if rates > 1 else 0)

    @property
    def all_runs(self) -> float:
        """Full runs of all mechanisms, and of those that lead in the other frames that time is kept for; a backbone has no
        other frame."""
        framed = [name for name in self.configs if self.settings.variants[name].backbone is None]
        frames = len(self.settings.frames) - 1
        kept = min(frames, 1) if self.settings.budget.unit == "seconds" else frames
        return self.runs * (len(self.configs) + min(self.settings.leaders, len(framed)) * kept)

    def seconds_a_step(self) -> float:
        """Seconds of all runs of the task for each of their steps."""
        return self.all_runs * statistics.fmean(self.step_seconds.values())

    def seconds_besides(self) -> float:
        """Seconds of all evaluations."""
        return self.all_runs * statistics.fmean(self.evaluation_seconds.values())

    def follow(self, other: Work) -> None:
        """Take the steps of the same mechanisms in another frame, and what they take."""
        for name in self.configs:
            self.steps[name], self.step_seconds[name] = other.steps[name], other.step_seconds[name]
            self.evaluation_seconds[name] = other.evaluation_seconds[name]

    def run_seconds(self, name: str) -> float:
        """Seconds that one run is planned to take."""
        return self.steps[name] * self.step_seconds[name] + self.evaluation_seconds[name]

    def train_config(
        self, rate: float, seed: int, steps: int, checkpoint_every: int = TrainConfig.checkpoint_every
    ) -> TrainConfig:
        """How a run of so many steps is trained, with the batch size and precision of this comparison."""
        return TrainConfig(
            steps=steps,
            batch_size=self.batch_size,
            learning_rate=rate,
            seed=seed,
            precision=self.settings.precision,
            checkpoint_every=checkpoint_every,
        )

    def steps_for(self, name: str, budget: Budget) -> int:
        """Steps of a run whose budget is not a time."""
        if budget.unit == "steps":
            return round(budget.amount)
        if budget.unit == "tokens":
            return round(budget.amount / (self.batch_size * self.item_tokens))
        return round(budget.amount / self.flops_a_step(name))

    def flops_a_step(self, name: str) -> float:
        """FLOPs of one training step of a mechanism's model, counted in PyTorch's own operators."""
        model = self.prepare(build(self.configs[name], 0, self.settings.device))
        config = replace(self.train_config(TrainConfig.learning_rate, 0, 1), measure_memory=False)
        # of the same operators on every machine: torch does not look into a native kernel
        with backends.only("torch"), flop_counter() as counter:
            runner_of(self.task).train(model, self.task, config)
        return float(counter.get_total_flops())


def rule_after(task: Task, items: int, chosen: int) -> Baseline | None:
    """The task's rule without training, on its `items` held-out items but the first `chosen`, which something is chosen by.

    Raises:
        Unsupported: for a rule with another number of scores.
    """
    found: Baseline | None = getattr(task, "baseline", None)
    if found is None:
        return None
    if len(found.items) != items:
        raise Unsupported(
            f"the task {task.name} with {len(found.items)} scores of its baseline for {items} held-out items",
            supported="a score of each held-out item, in their order",
        )
    return found.after(chosen)


def data_digest(task: Task) -> str:
    """A fingerprint of the task's data, however they were made: a hash of training and held-out batches."""
    digest = hashlib.blake2b(digest_size=12)
    batches = [task.training_batch(step, seed, 4) for step, seed in ((0, 0), (1, 0), (0, 1))]
    for batch in [*batches, *task.evaluation_batches(64)]:
        for tensor in (batch.inputs, batch.targets, batch.memory):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
