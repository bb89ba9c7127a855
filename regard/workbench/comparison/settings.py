"""The settings of a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from regard.contract import Unsupported, at_least, one_of
from regard.measurement.budget import Budget
from regard.models import StackConfig
from regard.models.frames import FRAMES
from regard.models.variants import Variant, read_model
from regard.tasks import Task
from regard.training import PRECISIONS
from regard.workbench.advice.layer_work import check_device
from regard.workbench.comparison.recommend import PREFERENCES

RATES = (3e-3, 1e-2, 3e-2)
"""For 48 mechanisms on recall and text, all 96 best rates were between 0.003 and 0.1, and half of them were 0.01."""
MORE_RATES = 3
"""Rates beyond the given ones that are tried, one at a time, while these do not settle which is best."""

LEAST_IMAGES, LEAST_SCENES = 16, 4
"""Images of a training step of an image backbone, at least, and images with masks of a segmentation network."""

MATCHED = {"parameters": "parameters", "flops": "FLOPs of an image", "time": "time of a training step"}
"""Quantities in which image backbones can be matched, in words."""


@dataclass(frozen=True)
class CompareSettings:
    """Mechanisms to compare, and how.

    Attributes:
        mechanisms: variants, or strings that :func:`regard.models.variants.read_model` parses; `softmax`, or the first
            if it is missing, sets the number of parameters.
        budget: time for the whole comparison, or steps, tokens or FLOPs for each run.
        seeds: runs of each mechanism on each task; with two or more, differences can be judged. With four mechanisms,
            the smallest difference that can be told from noise is 3.2 times the noise of a run with two seeds, 2.0
            times with three, 1.6 times with four.
        first_seed: the lowest seed; another one changes the initial weights and the order of the data.
        frames: the parts around the mechanisms in their layers, see :mod:`regard.models.frames`. All mechanisms are
            compared in the first frame; the leading ones are then trained in the others too. Part of a time budget is
            reserved for the second frame; further frames are trained if time is left.
        leaders: number of leading mechanisms that are trained in further frames.
        dim, layers, heads: sizes of the backbone.
        batch_tokens: tokens per training step; the batch size follows from the task's length.
        whole_batches: whether a step of image backbones has at least 16 images, or 4 with masks, whatever
            `batch_tokens` says: they cut images into patches of their own, and their norms are of a batch.
        rates: learning rates, each tried in a full run of the first seed; the best one trains the other seeds. While
            the best is at an end of the range, the next one beyond is tried, and while no run is above chance the next
            lower one, at most `MORE_RATES` times. A single rate is not varied.
        lengths: lengths, in addition to the tasks' own, at which inference, decoding, memory and state are measured.
        at_length: the length that the table and the recommendation use; each task's own when None.
        prefer: the cost that decides among mechanisms of equal quality; one of `PREFERENCES`.
        keep_models: whether to keep the winner's weights of the first seed.
        stack: how the backbone's blocks are stacked, as in model configs.
        precision: training precision, as in :class:`regard.training.TrainConfig`.
        device: torch device on which models are trained and measured.
        match: the quantity in which image backbones are made equal by scaling their widths, one of `MATCHED`; None to
            leave them as published.
        model: the backbone, a name in :mod:`regard.models.registry`; the first that serves a task when None.
        plugins: plugins that define what is compared, for the instructions that are written next to kept models.
    """

    mechanisms: tuple[str | Variant, ...]
    budget: Budget
    seeds: int = 3
    first_seed: int = 0
    frames: tuple[str, ...] = ("convolution", "bare", "unnormed")
    leaders: int = 2
    dim: int = 64
    layers: int = 2
    heads: int = 2
    batch_tokens: int = 2048
    whole_batches: bool = True
    rates: tuple[float, ...] = RATES
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    at_length: int | None = None
    prefer: str = "inference"
    keep_models: bool = False
    stack: StackConfig = StackConfig()
    precision: str = "float32"
    device: str = "cpu"
    match: str | None = None
    model: str | None = None
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.mechanisms:
            raise Unsupported("a comparison of no mechanisms", supported="one or more names from `regard list`")
        read = tuple(read_model(m) if isinstance(m, str) else m for m in self.mechanisms)
        object.__setattr__(self, "mechanisms", read)
        given = [variant.name for variant in read]
        if self.all_backbones:
            object.__setattr__(self, "frames", ("own",))  # whole backbones bring their own layers
        twice = {name for name in given if given.count(name) > 1}
        if twice:
            raise Unsupported(f"mechanism {sorted(twice)[0]!r} twice", supported="each mechanism once")
        for name in ("seeds", "dim", "layers", "heads", "batch_tokens"):
            at_least(name, getattr(self, name), 1)
        at_least("first_seed", self.first_seed, 0)
        at_least("leaders", self.leaders, 0)
        if not self.frames or len(set(self.frames)) < len(self.frames):
            raise Unsupported(f"frames={self.frames}", supported=f"one or more of {', '.join(FRAMES)}, each once")
        for frame in self.frames:
            one_of("frame", frame, FRAMES)
        one_of("prefer", self.prefer, PREFERENCES)
        if self.match is not None:
            one_of("match", self.match, MATCHED)
            if not self.all_backbones or len(read) < 2:
                raise Unsupported(
                    f"match={self.match} of {', '.join(given)}",
                    supported="two or more image backbones, and no mechanisms, whose parameters are matched anyway",
                )
        one_of("precision", self.precision, PRECISIONS)
        check_device(self.device)
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise Unsupported(f"rates={self.rates}", supported="positive learning rates", nearest=f"rates={RATES}")
        for length in (*self.lengths, *([] if self.at_length is None else [self.at_length])):
            at_least("length", length, 1)

    @property
    def variants(self) -> dict[str, Variant]:
        """The mechanisms by name."""
        return {m.name: m for m in self.mechanisms if isinstance(m, Variant)}

    @property
    def all_backbones(self) -> bool:
        """Whether whole image models are compared, not mechanisms."""
        return all(variant.backbone is not None for variant in self.variants.values())

    def batch_size(self, task: Task) -> int:
        """Items of a training step.

        Raises:
            Unsupported: for steps of one image, of which the norms of many backbones learn nothing.
        """
        tokens = task.length + (task.memory_length or 0)
        size = max(1, self.batch_tokens // tokens)
        if not self.all_backbones:
            return size
        if self.whole_batches:
            return max(size, LEAST_IMAGES if task.objective == "classification" else LEAST_SCENES)
        if size == 1 and task.objective == "classification":
            raise Unsupported(
                f"batch_tokens={self.batch_tokens}, a step of one image of {tokens} tokens",
                supported="two images or more",
                nearest=f"--batch-tokens {LEAST_IMAGES * tokens}",
            )
        return size

    @property
    def unmatched(self) -> set[str]:
        """Names of image backbones, and of plans that give all their widths, whose parameters are not matched."""
        return {name for name, variant in self.variants.items() if variant.backbone is not None or variant.sized}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the mechanisms, in order."""
        return tuple(self.variants)

    def only(self, names: Iterable[str]) -> CompareSettings:
        """The same settings with only these mechanisms."""
        return replace(self, mechanisms=tuple(self.variants[name] for name in names))

    def measured_at(self, own: int) -> int:
        """The length at which costs count for a task with length `own`."""
        return own if self.at_length is None else self.at_length
