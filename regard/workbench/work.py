"""The work of a comparison: matched models, and how many steps each run takes within the budget."""

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
from regard.catalogue import get_mechanism
from regard.contract import Kind, Pattern, Unsupported
from regard.measurement import provenance
from regard.measurement.budget import Budget
from regard.measurement.flops import flop_counter
from regard.measurement.statistics import FEWEST_ITEMS
from regard.measurement.store import Store
from regard.models import StackConfig, build_model, config_for, count_parameters, match_parameters
from regard.models.blocks import Block
from regard.models.frames import in_frame, layer_parts
from regard.models.image_model import ImageModelConfig
from regard.models.segmentation_model import SegmentationModelConfig
from regard.models.variants import Variant
from regard.models.vision.segmentation import SEGMENTERS
from regard.tasks import Baseline, Task
from regard.training import TrainConfig, runner_of
from regard.workbench.cost import DECODE_STEPS
from regard.workbench.settings import CompareSettings

CALIBRATION_SECONDS = 20.0
FEWEST_STEPS = 20
GENERATED_AT_ONCE = 32
SAFETY = 0.93
"""Part of a time budget that is planned; the rest absorbs a machine that slows down."""
OF_SOLVABLE = 1.5
"""Time of a task that can be solved, where an open-ended one has 1: before it is solved it tells little, and with half the
steps that it needs it tells the wrong thing, while half the text only makes models worse alike."""
EXTENSION = 0.4
"""Runs of each mechanism that are allowed for learning rates beyond the grid."""


def model_config(
    variant: Variant, task: Task, settings: CompareSettings, frame: str, longest: int | None = None
) -> Any:
    """The backbone of a task with `variant` in its place: in every layer, as the pool, or as the projections.

    A mechanism with a constant that follows the training length gets the task's, or `longest`.

    In a cross pattern it is between the two sequences, and softmax stays within each: one pattern is replaced at a
    time, as in the Comprehensive Attention Benchmark (arXiv 2210.07661).
    """
    if variant.backbone is not None:
        return backbone_config(variant, task, settings, longest)
    # what a pixel or patch means depends on where it is, which relative positions along the rows do not tell
    placed = task.grid is not None and all("sinusoidal" in card.accepts_positions for card in variant.cards)
    plan = _plan(variant, variant.plan(settings.layers), task, task.pattern, frame, placed, longest)
    sizes: dict[str, Any] = {"dim": settings.dim, "num_layers": settings.layers, "num_heads": settings.heads}
    sizes |= {"stack": settings.stack, "positions": "sinusoidal" if placed else "auto"}
    sizes["max_length"] = max(task.length, task.memory_length or 0, *settings.lengths)
    if variant.cards[0].kind is Kind.POOLING:
        sizes["pool"], sizes["pool_options"] = variant.layers[0]
    within = (("encoder", variant.encoder, Pattern.NONCAUSAL_SELF), ("decoder", variant.decoder, Pattern.CAUSAL_SELF))
    for name, layers, pattern in within:
        if layers and task.pattern is not Pattern.CAUSAL_CROSS:
            raise Unsupported(
                f"{variant.name}, which names layers of the {name}, on the task {task.name}",
                supported="tasks that read a memory and write tokens",
            )
        if layers:
            sizes[f"{name}_plan"] = _plan(variant, layers, task, pattern, frame, placed, longest)
    if variant.encoder:
        sizes["encoder_layers"] = len(variant.encoder)
    return config_for(task, plan, settings.model, **sizes)


def _plan(
    variant: Variant,
    layers: Sequence[tuple[str, Mapping[str, Any]]],
    task: Task,
    pattern: Pattern,
    frame: str,
    placed: bool,
    longest: int | None,
) -> list[tuple[str, dict[str, Any]]]:
    """Layers of one pattern in their frame, with the lengths and axes of a task."""
    plan = []
    lengths = {Pattern.NONCAUSAL_SELF: task.memory_length, Pattern.CAUSAL_SELF: task.length}
    own_length = task.length if not task.pattern.cross else lengths.get(pattern, task.memory_length)
    for name, given in layers:
        card = get_mechanism(name)
        own: dict[str, Any] = {}
        if "length" in card.config.__dataclass_fields__:  # type: ignore[attr-defined]
            own["length"] = longest or own_length
        if card.module is not None and "axes" in inspect.signature(card.module).parameters:
            own["axes"] = len(task.grid) if task.grid else 1
        options = {**own, **given}
        if card.kind is Kind.PROJECTION:
            name, options = "softmax", {"linear": name, **({"linear_options": options} if options else {})}
        elif card.kind is not Kind.POOLING:
            card.require_pattern(pattern)
        elif task.objective != "classification" or len(variant.cards) > 1:
            raise Unsupported(
                f"{variant.name}, which pools a sequence, on the task {task.name}",
                supported="classification tasks: listops, images, documents, matching",
            )
        if card.kind is Kind.POOLING:
            name, options = "softmax", {}
        plan.append((name, in_frame(name, options, frame, pattern, rotary=not placed)))
    return plan


def backbone_config(variant: Variant, task: Task, settings: CompareSettings, longest: int | None) -> ImageModelConfig:
    """An image backbone or segmenter of its published size for a task, or for squares or cubes of about `longest` patches."""
    name, options = variant.backbone or ("", {})
    if settings.model is not None or settings.stack != StackConfig():
        raise Unsupported(f"{name} with --model or --stack", supported="the layers that it has")
    config = (SegmentationModelConfig if name in SEGMENTERS else ImageModelConfig).for_task(task, name, options)
    return config if longest is None else replace(config, grid=square_grid(longest, len(config.grid)))


def square_grid(length: int, axes: int) -> tuple[int, ...]:
    """The sides of the largest square or cube of at most `length` tokens."""
    side = round(length ** (1 / axes))
    return (side - (side**axes > length),) * axes


def matched(variant: Variant, task: Task, settings: CompareSettings, frame: str, target: int) -> Any:
    """The backbone of a task with about `target` parameters; an image backbone, and a plan with all its widths, as it is."""
    config = model_config(variant, task, settings, frame)
    return config if variant.backbone is not None or variant.sized else match_parameters(config, target)


def _parameters(variant: Variant, task: Task, settings: CompareSettings, frame: str) -> int:
    """Parameters of the backbone before it is matched.

    Raises:
        Unsupported: for a width or a number of heads that the mechanism cannot have, with others that it can.
    """
    config = model_config(variant, task, settings, frame)
    try:
        return count_parameters(config)
    except Unsupported as error:
        sizes = _other_sizes(variant, task, settings, frame)
        if not sizes:  # another width would not help
            raise
        raise Unsupported(
            f"{variant.name} with --dim {settings.dim} and --heads {settings.heads} ({error.asked})",
            supported=error.supported,
            nearest=", or ".join([*sizes, f"--mechanisms without {variant.name}"][:2]),
        ) from None


def _other_sizes(variant: Variant, task: Task, settings: CompareSettings, frame: str) -> list[str]:
    """What to ask for instead of sizes that a mechanism refuses: heads for its width, and a width for its heads."""
    found = []
    for name, asked, reach in (("heads", settings.heads, settings.heads), ("dim", settings.dim, 2 * settings.heads)):
        for value in sorted(range(max(1, asked - reach), asked + reach + 1), key=lambda value: abs(value - asked)):
            other = replace(settings, **{name: value})  # type: ignore[arg-type]
            try:
                count_parameters(model_config(variant, task, other, frame))
            except Unsupported:
                continue
            found.append(f"--{name} {value}")
            break
    return found


def _target(task: Task, settings: CompareSettings) -> int:
    """The number of parameters of every model: that of softmax, or else of the first mechanism, in the first frame."""
    names = [name for name in settings.names if name not in settings.unmatched] or settings.names
    measure = "softmax" if "softmax" in names else names[0]
    return _parameters(settings.variants[measure], task, settings, settings.frames[0])


DEFAULTS = ("softmax", "local", "gated_linear", "delta_rule", "linear", "flow_attention")
"""Exact attention, attention to neighbours, and recurrences: the kinds whose costs and whose recall differ most."""


def default_mechanisms(*tasks: Task) -> tuple[str, ...]:
    """The mechanisms compared where none is named: the first four of `DEFAULTS` that have the pattern of every task."""
    patterns = {task.pattern for task in tasks}
    return tuple(name for name in DEFAULTS if patterns <= set(get_mechanism(name).patterns))[:4]


def fitting(tasks: Sequence[Task], settings: CompareSettings) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of the settings' mechanisms that every task has a matched model for, and why not of the others."""
    targets = [_target(task, settings) for task in tasks]
    kept, refused = [], {}
    for name, variant in settings.variants.items():
        try:
            for task, target in zip(tasks, targets, strict=True):
                matched(variant, task, settings, settings.frames[0], target)
        except Unsupported as error:
            refused[name] = f"{error.asked}; supported: {error.supported}"
        else:
            kept.append(name)
    return tuple(kept), refused


def build(config: Any, seed: int, device: str = "cpu") -> nn.Module:
    """A model with the initial weights of a seed, which are the same on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(config).to(device)


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
        self.target = _target(task, settings)
        self.configs = {name: self._matched(name) for name in (settings.names if names is None else names)}
        self.item_tokens = task.length + (task.memory_length or 0)
        self.batch_size = max(1, settings.batch_tokens // self.item_tokens)
        # generating token by token takes about as long for many items as for few
        self.scored_at_once = max(self.batch_size, GENERATED_AT_ONCE) if task.generates else self.batch_size
        self.items = sum(batch.size for batch in task.evaluation_batches(64))
        choosing = choosing or len(settings.rates) > 1
        self.search_items = max(1, self.items // 4) if self.items > 1 and choosing else 0
        self.baseline = self._baseline()
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
        _parameters(variant, self.task, self.settings, self.frame)
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
                self.config_for(name, length)
        except Unsupported:
            return False
        return True

    def parts(self) -> dict[str, dict[str, str]]:
        """The parts of each model's layers beside the mechanism; layers of a hybrid that differ are told apart."""
        found = {}
        for name, config in self.configs.items():
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
        history = runner.train(model, self.task, timed, deadline=max(began + 0.2, started + 0.7 * seconds))
        # with the making of its batch, which takes a while where images are varied
        step = (time.monotonic() - began) / len(history.curve) * 1.15 if history.curve else seconds
        some = next((batch.size for batch in self.task.evaluation_batches(self.scored_at_once)), 0)
        started = time.monotonic()
        runner.evaluate(model, self.task, self.scored_at_once, last=some)
        return step, (time.monotonic() - started) * max(1.0, self.items / max(1, some))

    def _baseline(self) -> Baseline | None:
        """The task's rule, on the held-out items that are the result."""
        found: Baseline | None = getattr(self.task, "baseline", None)
        if found is None:
            return None
        if len(found.items) != self.items:
            raise Unsupported(
                f"the task {self.task.name} with {len(found.items)} scores of its baseline for {self.items} held-out items",
                supported="a score of each held-out item, in their order",
            )
        return Baseline(found.name, found.items[self.search_items :])

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
        """Full runs of all mechanisms, and of those that lead in the other frames; a backbone has no other frame."""
        framed = [name for name in self.configs if self.settings.variants[name].backbone is None]
        leaders = min(self.settings.leaders, len(framed)) * (len(self.settings.frames) - 1)
        return self.runs * (len(self.configs) + leaders)

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
        model = self.prepare(build(self.configs[name], 0, self.settings.device))
        config = replace(self.train_config(TrainConfig.learning_rate, 0, 1), measure_memory=False)
        # of the same operators on every machine: torch does not look into a native kernel
        with backends.only("torch"), flop_counter() as counter:
            runner_of(self.task).train(model, self.task, config)
        return float(counter.get_total_flops())


def data_digest(task: Task) -> str:
    """A fingerprint of the task's data, however they were made: a hash of training and held-out batches."""
    digest = hashlib.blake2b(digest_size=12)
    batches = [task.training_batch(step, seed, 4) for step, seed in ((0, 0), (1, 0), (0, 1))]
    for batch in [*batches, *task.evaluation_batches(64)]:
        for tensor in (batch.inputs, batch.targets, batch.memory):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def plan(
    store: Store, works: Sequence[Work], settings: CompareSettings, started: float, say: Callable[[str], None]
) -> None:
    """Decide how many steps each run takes; with a time budget this is stored, so that a resumed comparison agrees."""
    key = {
        "works": [w.identity for w in works],
        "mechanisms": list(settings.names),
        "budget": str(settings.budget),
        "seeds": [settings.first_seed, settings.seeds],
        "frames": [*settings.frames, settings.leaders],
        "rates": list(settings.rates),
        "machine": provenance.fingerprint()["machine_id"],
    }
    row = store.get("plan", key)
    if row is None:
        seconds = calibration_seconds(settings.budget)
        say(f"calibrating for about {seconds:.0f} s")
        threads = best_threads(works[0])
        torch.set_num_threads(threads)
        for work in works:
            work.calibrate(seconds / len(works))
        _count_steps(works, settings, time.monotonic() - started)
        planned = [
            {"steps": w.steps, "step_seconds": w.step_seconds, "evaluation_seconds": w.evaluation_seconds}
            for w in works
        ]
        store.put("plan", key, {"threads": threads, "works": planned})
        row = store.get("plan", key)
        assert row is not None
    torch.set_num_threads(row.payload["threads"])
    for work, planned in zip(works, row.payload["works"], strict=True):
        work.steps = planned["steps"]
        work.step_seconds, work.evaluation_seconds = planned["step_seconds"], planned["evaluation_seconds"]
        counts = sorted(set(work.steps.values()))
        tokens = " to ".join(f"{n * work.batch_size * work.item_tokens:,}" for n in counts[:1] + counts[1:][-1:])
        say(
            f"{work.task.name}: {work.sizes}, {' to '.join(map(str, counts[:1] + counts[1:][-1:]))} steps of "
            f"{work.batch} ({tokens} tokens a run)"
        )


def best_threads(work: Work) -> int:
    """The number of threads that trains the first model fastest, right now.

    More threads than idle cores can be many times slower than one, since they wait for each other in every operator.
    The number is part of the plan: sums are split over threads, so scores depend on it in their last digits.
    """
    counts = sorted({1, torch.get_num_threads()})
    if len(counts) == 1:
        return counts[0]
    config = next(iter(work.configs.values()))
    seconds = {}
    for count in counts:
        torch.set_num_threads(count)
        few = TrainConfig(steps=6, batch_size=work.batch_size, measure_memory=False)
        model = work.prepare(build(config, 0, work.settings.device))
        history = runner_of(work.task).train(model, work.task, few, deadline=time.monotonic() + 5.0)
        # on a machine so busy that no step was done in time, any number is as good
        seconds[count] = statistics.median(point.seconds for point in history.curve) if history.curve else math.inf
    return min(seconds, key=lambda count: seconds[count])


def calibration_seconds(budget: Budget) -> float:
    """Work that is counted in tokens or FLOPs needs the calibration only to tell the remaining time."""
    share = CALIBRATION_SECONDS / 4 if budget.unit != "seconds" else 0.1 * budget.amount
    return min(CALIBRATION_SECONDS, share)


def _count_steps(works: Sequence[Work], settings: CompareSettings, spent: float) -> None:
    if settings.budget.unit == "seconds":
        share_steps(works, SAFETY * settings.budget.amount - spent - cost_seconds(works, settings))
    else:
        for work in works:
            work.steps = {name: work.steps_for(name, settings.budget) for name in work.configs}
    for work in works:
        if min(work.steps.values()) < FEWEST_STEPS:
            least = _least_budget(works, settings, spent)
            raise Unsupported(
                f"budget {settings.budget}, which leaves fewer than {FEWEST_STEPS} steps a run on {work.task.name}",
                supported="a larger budget, fewer mechanisms, tasks or seeds",
                nearest=f"--budget {least}",
            )


def share_steps(works: Sequence[Work], seconds: float) -> None:
    """Give each of these tasks its share of the seconds, and all runs of a task the same number of steps."""
    shares = [OF_SOLVABLE if work.task.solved is not None else 1.0 for work in works]
    for work, share in zip(works, shares, strict=True):
        steps = int((seconds * share / sum(shares) - work.seconds_besides()) / work.seconds_a_step())
        work.steps = dict.fromkeys(work.configs, steps)


def cost_seconds(works: Sequence[Work], settings: CompareSettings) -> float:
    """A generous estimate of the time that measuring costs takes: it is bounded by its own settings."""
    kinds = {work.kind for work in works}
    return len(kinds) * (len(settings.lengths) + 1) * 0.5 * len(settings.mechanisms) + 5.0


def _least_budget(works: Sequence[Work], settings: CompareSettings, spent: float) -> Budget:
    if settings.budget.unit == "steps":
        return Budget("steps", 2.0 * FEWEST_STEPS)
    if settings.budget.unit == "tokens":
        return Budget("tokens", float(max(2 * FEWEST_STEPS * w.batch_size * w.item_tokens for w in works)))
    if settings.budget.unit == "flops":
        return Budget("flops", max(2 * FEWEST_STEPS * w.flops_a_step(n) for w in works for n in w.configs))
    work = max(w.seconds_besides() + 2 * FEWEST_STEPS * w.seconds_a_step() for w in works)
    minutes = math.ceil((work * len(works) + cost_seconds(works, settings) + spent) / SAFETY / 60)
    return Budget("seconds", 60.0 * minutes)
