"""The work of a comparison on one task: matched models, number of steps, and their times."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from regard import backends
from regard.catalogue import plugin_code
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
"""Runs per mechanism reserved for learning rates beyond the grid."""
LEAST_SECONDS = 0.2
"""Least duration of the training steps from which their pace is measured."""


class Work:
    """One task's share of a comparison in one frame: matched models, step counts and times.

    Args:
        task, settings: the task and settings of the comparison.
        frame: one of the settings' frames; the first when None.
        names: the mechanisms' names; all when None.
        choosing: whether held-out items are reserved for a choice even if there is a single learning rate.
        prepare: wraps a model for training, for example together with its teacher.
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
        self.batch_size = settings.batch_size(task)
        # generation token by token takes about as long for many items as for few
        self.scored_at_once = max(self.batch_size, GENERATED_AT_ONCE) if task.generates else self.batch_size
        self.items = sum(batch.size for batch in task.evaluation_batches(64))
        choosing = choosing or len(settings.rates) > 1
        self.search_items = max(1, self.items // 4) if self.items > 1 and choosing else 0
        self.baseline = rule_after(task, self.items, self.search_items)
        self.identity = {
            **task_identity(task),
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

    def code_of(self, *names: str) -> dict[str, list[str]]:
        """The code of the plugins that define these entrants (all when none is named), as part of a key; empty where none
        is of a plugin."""
        code = plugin_code(
            [[self.settings.variants[name].record(), self.configs[name]] for name in names or self.configs]
        )
        return {"plugins": code} if code else {}

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
        """The backbone whose costs are measured at a length, which sets the maximum length of mechanisms that have
        one."""
        variant, config = self.settings.variants[name], self.configs[name]
        if variant.backbone is not None:
            return backbone_config(variant, self.task, self.settings, length)
        if all(card.length != "max" for card in variant.cards):
            return config
        made = model_config(variant, self.task, self.settings, self.frame, length + DECODE_STEPS)
        return replace(made, feed_forward=config.feed_forward)

    def takes(self, length: int) -> bool:
        """Whether every model accepts inputs of a length; networks for images of certain sizes do not."""
        try:
            for name in self.configs:
                count_parameters(self.config_for(name, length))  # builds the networks, some of which refuse more
        except Unsupported:
            return False
        return True

    def parts(self) -> dict[str, dict[str, str]]:
        """The parts of each model's layers other than the mechanism, with alternatives where layers of a hybrid differ.

        Empty for image models, which have layers of their own.
        """
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
        """The unmatched models (image backbones, plans that give all widths) with their sizes; empty without any."""
        named = {name: config for name, config in self.configs.items() if name in self.settings.unmatched}
        return ", ".join(f"{name} has {count_parameters(config):,} parameters" for name, config in named.items())

    @property
    def sizes(self) -> str:
        """The models' parameter counts, in words."""
        others = f"{self.target:,} parameters" if set(self.configs) - self.settings.unmatched else ""
        if not self.published:
            return others
        return f"{self.published}; the others {others}" if others else self.published

    @property
    def own_length(self) -> int:
        """Tokens in an item; in cross patterns, tokens in its memory."""
        return self.task.memory_length if self.task.memory_length is not None else self.task.length

    def calibrate(self, seconds: float) -> None:
        """Time training steps and an evaluation of each model twice and keep the smaller times, since a momentary
        disturbance of the machine would cost all models steps."""
        share = seconds / len(self.configs) / 2
        names = list(self.configs)
        for name in (*names, *reversed(names)):
            step, evaluation = self._timed(self.configs[name], share)
            self.step_seconds[name] = min(step, self.step_seconds.get(name, math.inf))
            self.evaluation_seconds[name] = min(evaluation, self.evaluation_seconds.get(name, math.inf))

    def _timed(self, config: Any, seconds: float) -> tuple[float, float]:
        """Seconds of a training step, with a small reserve, and of an evaluation."""
        model = self.prepare(build(config, 0, self.settings.device))
        timed = replace(self.train_config(TrainConfig.learning_rate, 0, 1_000_000), measure_memory=False)
        started = time.monotonic()
        runner = runner_of(self.task)
        runner.train(model, self.task, replace(timed, steps=2))
        began = time.monotonic()
        history = runner.train(model, self.task, timed, deadline=max(began + LEAST_SECONDS, started + 0.7 * seconds))
        # including the making of the batch, which takes a while if images are augmented
        step = (time.monotonic() - began) / len(history.curve) * 1.15 if history.curve else seconds
        some = next((batch.size for batch in self.task.evaluation_batches(self.scored_at_once)), 0)
        started = time.monotonic()
        runner.evaluate(model, self.task, self.scored_at_once, last=some)
        return step, (time.monotonic() - started) * max(1.0, self.items / max(1, some))

    def above_chance(self, score: float | None) -> bool:
        """Whether a score on the items that choose the learning rate is better than that of a model which ignores its
        input, an accuracy by over two standard errors; True if the task names no chance score. A run that diverged has
        no score."""
        chance = self.task.chance
        if chance is None or score is None:
            return score is not None
        noise = math.sqrt(chance * (1 - chance) / max(1, self.search_items)) if self.task.metric == "accuracy" else 0.0
        return (score - chance if self.task.higher_is_better else chance - score) > 2 * noise

    @property
    def kind(self) -> tuple[str, Pattern]:
        """Objective and pattern; tasks of the same kind share a backbone, whose costs are measured once."""
        return self.task.objective, self.task.pattern

    @property
    def batch(self) -> str:
        """The size of a training batch, in words."""
        memory = "" if self.task.memory_length is None else f"{self.task.memory_length} + "
        return f"{self.batch_size} x {memory}{self.task.length} tokens"

    @property
    def few_items(self) -> str:
        """A warning if few held-out items decide; empty if there are enough."""
        count = self.items - self.search_items
        if count >= FEWEST_ITEMS:
            return ""
        said = "a single held-out item decides" if count == 1 else f"only {count} held-out items decide"
        if not self.search_items and len(self.settings.rates) > 1:
            said += ", and the learning rate is chosen on the same"
        return (
            f"On {self.task.name} {said}: that a score is better there says little about other data. "
            f"{self._more_items}."
        )

    @property
    def _more_items(self) -> str:
        """What gives more held-out items, in words."""
        options = getattr(self.task, "origin", None) or {}
        if options.get("evaluation_items") == self.items:
            return "A larger evaluation_items of the task gives more items"
        more = "More data (also as --validation)"
        if getattr(self.task, "cut_from_stream", False):
            return f"{more} or a shorter --length gives more items"
        if "held_out" in inspect.signature(type(self.task)).parameters and options.get("validation") is None:
            return f"{more} or a larger share to hold out (held_out of the task) gives more items"
        return f"{more} gives more items"

    @property
    def runs(self) -> float:
        """Full runs per mechanism: one per rate with the first seed, one per further seed at the best rate, and a
        reserve for rates beyond the grid."""
        rates = len(self.settings.rates)
        return rates + self.settings.seeds - 1 + (EXTENSION if rates > 1 else 0)

    @property
    def all_runs(self) -> float:
        """Full runs of all mechanisms, plus those of the leading ones in the further frames for which time is reserved;
        image backbones have no other frame."""
        framed = [name for name in self.configs if self.settings.variants[name].backbone is None]
        frames = len(self.settings.frames) - 1
        kept = min(frames, 1) if self.settings.budget.unit == "seconds" else frames
        return self.runs * (len(self.configs) + min(self.settings.leaders, len(framed)) * kept)

    def seconds_a_step(self) -> float:
        """Seconds that one training step takes, summed over all runs of the task."""
        return self.all_runs * statistics.fmean(self.step_seconds.values())

    def seconds_besides(self) -> float:
        """Seconds of all evaluations, over all runs."""
        return self.all_runs * statistics.fmean(self.evaluation_seconds.values())

    def follow(self, other: Work) -> None:
        """Copy the number of steps and the times of the same mechanisms from another frame."""
        for name in self.configs:
            self.steps[name], self.step_seconds[name] = other.steps[name], other.step_seconds[name]
            self.evaluation_seconds[name] = other.evaluation_seconds[name]

    def run_seconds(self, name: str) -> float:
        """Planned seconds of one run."""
        return self.steps[name] * self.step_seconds[name] + self.evaluation_seconds[name]

    def train_config(
        self, rate: float, seed: int, steps: int, checkpoint_every: int = TrainConfig.checkpoint_every
    ) -> TrainConfig:
        """The training config for a run of `steps` steps, with the batch size and precision of this comparison."""
        return TrainConfig(
            steps=steps,
            batch_size=self.batch_size,
            learning_rate=rate,
            seed=seed,
            precision=self.settings.precision,
            checkpoint_every=checkpoint_every,
        )

    def steps_for(self, name: str, budget: Budget) -> int:
        """Steps of a run, for a budget that is not a time."""
        if budget.unit == "steps":
            return round(budget.amount)
        if budget.unit == "tokens":
            return round(budget.amount / (self.batch_size * self.item_tokens))
        return round(budget.amount / self.flops_a_step(name))

    def flops_a_step(self, name: str) -> float:
        """FLOPs of one training step of a mechanism's model, counted in PyTorch's own operators."""
        model = self.prepare(build(self.configs[name], 0, self.settings.device))
        config = replace(self.train_config(TrainConfig.learning_rate, 0, 1), measure_memory=False)
        # with the same operators on every machine: torch cannot count inside a native kernel
        with backends.only("torch"), flop_counter() as counter:
            runner_of(self.task).train(model, self.task, config)
        return float(counter.get_total_flops())


def rule_after(task: Task, items: int, chosen: int) -> Baseline | None:
    """The task's rule without training, on its `items` held-out items except the first `chosen`, which serve for
    choices.

    Raises:
        Unsupported: if the rule does not have one score per held-out item.
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


ELSEWHERE = ("data", "validation", "tokenizer", "seed", "length")
"""Options of tasks that :func:`data_digest` covers, or the length."""


def task_identity(task: Task) -> dict[str, Any]:
    """What stored results on a task depend on: its data, how it scores, and its code if it is of a plugin."""
    found = {"task": task.name, "metric": task.metric, "data": data_digest(task), "length": task.length}
    if options := other_options(task.origin):
        found["options"] = options
    if code := plugin_code(task):
        found["code"] = code
    return found


def other_options(origin: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a task that may change its score and not its data, such as `background` of segmentation."""
    return {name: value for name, value in (origin or {}).items() if name not in ELSEWHERE}


def data_digest(task: Task) -> str:
    """A fingerprint of the task's data: a hash of training and held-out batches."""
    digest = hashlib.blake2b(digest_size=12)
    batches = [task.training_batch(step, seed, 4) for step, seed in ((0, 0), (1, 0), (0, 1))]
    for batch in [*batches, *task.evaluation_batches(64)]:
        for tensor in (batch.inputs, batch.targets, batch.memory):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
