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
from regard.training import PRECISIONS
from regard.workbench.advice.layer_work import check_device
from regard.workbench.comparison.recommend import PREFERENCES

RATES = (3e-3, 1e-2, 3e-2)
"""Of 96 best rates of 48 mechanisms on recall and text, all lay from 0.003 to 0.1, and half of them at 0.01."""
MORE_RATES = 3
"""Rates that are tried beyond those given, one at a time, while the best is at an end."""


MATCHED = {"parameters": "parameters", "flops": "FLOPs of an image", "time": "time of a training step"}
"""What image backbones may be matched in, in words."""


@dataclass(frozen=True)
class CompareSettings:
    """Mechanisms to compare, and how.

    Attributes:
        mechanisms: variants, or texts that :func:`regard.models.variants.read_model` reads; `softmax`, or else the
            first, sets the number of parameters.
        budget: time of the whole comparison, or tokens or FLOPs of each run.
        seeds: runs of each mechanism on each task; two or more let differences be judged. With four mechanisms two seeds tell
            differences apart that are 3.2 times the noise of a run, three 2.0 times, four 1.6 times.
        first_seed: the lowest of them; another gives other initial weights and another order of the data.
        frames: what surrounds the mechanisms in their layers, see :mod:`regard.models.frames`. All are compared in the
            first; those that lead are then trained in the others too. Of a budget of time a part is kept for the second; what
            follows is trained where time is left.
        leaders: how many of them.
        dim, layers, heads: of the backbone.
        batch_tokens: tokens of a training step; the batch size follows from the task's length.
        rates: learning rates tried, in full runs of the first seed; the best one trains the other seeds. While the best
            is at an end of them, the next one beyond is tried, at most `MORE_RATES` times; a single rate is kept.
        lengths: at which inference, decoding, memory and state are measured, beside the tasks' own.
        at_length: the length that the table and the recommendation use; each task's own when None.
        prefer: what decides among mechanisms of equal quality; one of `PREFERENCES`.
        keep_models: keep the winner's weights of the first seed.
        stack: how the backbone's blocks are stacked, as in the models' configs.
        precision: of training, as in :class:`regard.training.TrainConfig`.
        device: a device of torch, on which models are trained and measured.
        match: what image backbones are made equal in by scaling their widths, one of `MATCHED`; as published when None.
        model: the backbone, a name of :mod:`regard.models.registry`; the first that serves a task when None.
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

    def __post_init__(self) -> None:
        if not self.mechanisms:
            raise Unsupported("a comparison of no mechanisms", supported="one or more names from `regard list`")
        read = tuple(read_model(m) if isinstance(m, str) else m for m in self.mechanisms)
        object.__setattr__(self, "mechanisms", read)
        given = [variant.name for variant in read]
        if self.all_backbones:
            object.__setattr__(self, "frames", ("own",))  # their layers are theirs
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
        """Whether whole image models are compared, and no mechanisms."""
        return all(variant.backbone is not None for variant in self.variants.values())

    @property
    def unmatched(self) -> set[str]:
        """Names of image backbones, and of plans with all their widths, whose parameters are not matched."""
        return {name for name, variant in self.variants.items() if variant.backbone is not None or variant.sized}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the mechanisms, in order."""
        return tuple(self.variants)

    def only(self, names: Iterable[str]) -> CompareSettings:
        """The same for some of the mechanisms, by name."""
        return replace(self, mechanisms=tuple(self.variants[name] for name in names))

    def measured_at(self, own: int) -> int:
        """The length whose cost counts for a task whose own length is `own`."""
        return own if self.at_length is None else self.at_length
