"""Training: the loop, the optimizer, learning rates, checkpoints, distillation, growth and peak memory."""

from __future__ import annotations

from regard.core.precision import PRECISIONS
from regard.measurement.memory import Peak, TensorMemory, keep_freed_memory, peak_memory
from regard.training.average import WeightAverage
from regard.training.distillation import (
    BeginReport,
    DistillationWeights,
    begin_as,
    distillation_groups,
    distillation_loss,
)
from regard.training.growth import grow, shrink, token_usage
from regard.training.heads import head_importance, mix_heads, skip_attention
from regard.training.learning_rate import Search, Trial, search
from regard.training.loop import Evaluation, History, Point, TrainConfig, evaluate, train
from regard.training.optimizer import make_optimizer, parameter_groups
from regard.training.runner import Runner, Supervised, runner_of

__all__ = [
    "PRECISIONS",
    "BeginReport",
    "DistillationWeights",
    "Evaluation",
    "History",
    "Peak",
    "Point",
    "Runner",
    "Search",
    "Supervised",
    "TensorMemory",
    "TrainConfig",
    "Trial",
    "WeightAverage",
    "begin_as",
    "distillation_groups",
    "distillation_loss",
    "evaluate",
    "grow",
    "head_importance",
    "keep_freed_memory",
    "make_optimizer",
    "mix_heads",
    "parameter_groups",
    "peak_memory",
    "runner_of",
    "search",
    "shrink",
    "skip_attention",
    "token_usage",
    "train",
]
