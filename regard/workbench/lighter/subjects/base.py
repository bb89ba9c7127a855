"""The interface that a study of compression recipes needs from a model of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from regard.compression import Compressed
from regard.measurement.timing import Action
from regard.workbench.sparse.readers import Reader

HELD_OUT = 0.5
"""Share of a user's data that is held out for scoring; calibration uses the part before it."""

LENGTH = 512
"""Tokens in a window."""

SPREAD = 64
"""Number of windows, spread over a whole text, on which a model is scored."""

CHOOSING, SHARE = 512, 0.25
"""Most items that a search may use, and their share of the held-out items if none were set aside in training."""

MODELS = (
    "a folder of `regard train`; a causal language model, encoder or text classifier of transformers (config.json, or a .gguf "
    "file); a model of timm (its folder, or timm:NAME)"
)


class Subject(Protocol):
    """A model to compress."""

    @property
    def metric(self) -> str:
        """The metric of its quality."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether higher values of the metric are better."""
        ...

    @property
    def described(self) -> str:
        """A description of model and data."""
        ...

    @property
    def items(self) -> int:
        """Number of items on which its quality can be measured."""
        ...

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Run the model, original or compressed, on a batch."""
        ...

    def load(self) -> nn.Module:
        """Load the model in floating point and evaluation mode."""
        ...

    def calibration(self, count: int) -> list[Any]:
        """Calibration batches with at most `count` items in all."""
        ...

    def training(self, steps: int) -> list[Any]:
        """Training batches, one per step, or as many as there are."""
        ...

    def choosing(self) -> list[Any]:
        """Batches that a search may use: items that were neither trained on nor count for the quality."""
        ...

    def looked_at(self) -> Any:
        """The data that recipes are judged by, by which a study is known again: held-out and calibration items."""
        ...

    def quality(self, model: nn.Module, items: int) -> float:
        """The quality on the first `items` held-out items."""
        ...

    def timed(self, model: nn.Module) -> dict[str, Action]:
        """Actions to time, by name; the first one decides which recipe is fastest."""
        ...

    def reader(self, model: nn.Module) -> Reader:
        """The model, original or compressed, as a reader that answers prompts; raises Unsupported for other models."""
        ...

    def save(self, compressed: Compressed, folder: Path) -> None:
        """Write a compressed model so that it can be used like the original."""
        ...
