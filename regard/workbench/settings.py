"""What a comparison compares, and how."""

from __future__ import annotations

from dataclasses import dataclass

from regard.contract import Unsupported, at_least, one_of
from regard.models import StackConfig
from regard.training import PRECISIONS
from regard.workbench.budget import Budget
from regard.workbench.recommend import PREFERENCES

RATES = (3e-3, 1e-2)


@dataclass(frozen=True)
class CompareSettings:
    """What to compare and how.

    Attributes:
        mechanisms: catalogue names. `softmax`, or else the first, sets the number of parameters.
        budget: time of the whole comparison, or tokens or FLOPs of each run.
        seeds: runs of each mechanism on each task; two or more let differences be judged.
        dim, layers, heads: of the backbone.
        batch_tokens: tokens of a training step; the batch size follows from the task's length.
        rates: learning rates tried, in full runs of the first seed; the best one trains the other seeds.
        lengths: at which inference, decoding, memory and state are measured.
        at_length: the one of them that the table and the recommendation use.
        prefer: what decides among mechanisms of equal quality; one of `PREFERENCES`.
        keep_models: keep the winner's weights of the first seed.
        stack: how the backbone's blocks are stacked, as in the models' configs.
        precision: of training, as in :class:`regard.training.TrainConfig`.
    """

    mechanisms: tuple[str, ...]
    budget: Budget
    seeds: int = 2
    dim: int = 64
    layers: int = 2
    heads: int = 2
    batch_tokens: int = 2048
    rates: tuple[float, ...] = RATES
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    at_length: int = 2048
    prefer: str = "inference"
    keep_models: bool = False
    stack: StackConfig = StackConfig()
    precision: str = "float32"

    def __post_init__(self) -> None:
        if not self.mechanisms:
            raise Unsupported("a comparison of no mechanisms", supported="one or more names from `regard list`")
        twice = {m for m in self.mechanisms if self.mechanisms.count(m) > 1}
        if twice:
            raise Unsupported(f"mechanism {sorted(twice)[0]!r} twice", supported="each mechanism once")
        for name in ("seeds", "dim", "layers", "heads", "batch_tokens"):
            at_least(name, getattr(self, name), 1)
        one_of("prefer", self.prefer, PREFERENCES)
        one_of("precision", self.precision, PRECISIONS)
        if not self.rates or min(self.rates) <= 0:
            raise Unsupported(f"rates={self.rates}", supported="positive learning rates", nearest=f"rates={RATES}")
        if self.at_length not in self.lengths:
            raise Unsupported(
                f"at_length={self.at_length}",
                supported=f"one of the measured lengths {', '.join(map(str, self.lengths))}",
                nearest=f"at_length={min(self.lengths, key=lambda n: abs(n - self.at_length))}",
            )
