"""What a study of recipes asks of a model, whatever kind it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from regard.compression import Compressed
from regard.measurement.timing import Action
from regard.workbench.sparse.readers import Reader

HELD_OUT = 0.5
"""Share of a user's data that is scored; calibration has the part before it."""

LENGTH = 512
"""Tokens of a window."""

SPREAD = 64
"""Windows of a text, spread over it, that a model is scored on where all of the text counts."""

CHOOSING, SHARE = 512, 0.25
"""Items that a search goes by at the most, and their share of held-out ones where none were set aside in training."""

MODELS = (
    "a folder of `regard train`; a causal language model, encoder or text classifier of transformers (config.json, or a .gguf "
    "file); a model of timm (its folder, or timm:NAME)"
)


class Subject(Protocol):
    """A model that is compressed."""

    @property
    def metric(self) -> str:
        """Of its quality."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Which way."""
        ...

    @property
    def described(self) -> str:
        """Model and data in words."""
        ...

    @property
    def items(self) -> int:
        """How many items its quality can be measured on."""
        ...

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Give the model, as it is or compressed, a batch."""
        ...

    def load(self) -> nn.Module:
        """The model in floating point, in evaluation mode."""
        ...

    def calibration(self, count: int) -> list[Any]:
        """Batches, at most so many items in all."""
        ...

    def training(self, steps: int) -> list[Any]:
        """Batches to train on, one a step, or as many as there are."""
        ...

    def choosing(self) -> list[Any]:
        """Batches that a search may go by: of items that the model was not trained on, and that its quality leaves out."""
        ...

    def quality(self, model: nn.Module, items: int) -> float:
        """By the first items that are held out."""
        ...

    def timed(self, model: nn.Module) -> dict[str, Action]:
        """What is timed, by name; the first decides what is fastest."""
        ...

    def reader(self, model: nn.Module) -> Reader:
        """The model, as it is or compressed, as one that reads text and answers; raises Unsupported where it does not."""
        ...

    def save(self, compressed: Compressed, folder: Path) -> None:
        """Write a compressed model so that it can be used as this one."""
        ...
