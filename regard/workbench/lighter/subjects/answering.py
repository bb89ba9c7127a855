"""Models that answer an item in a single pass: encoders, classifiers and vision transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.compression import Compressed
from regard.compression.layers import answers_of, run_batch
from regard.contract import Unsupported, an_instance
from regard.measurement.timing import Action
from regard.workbench.lighter.subjects.base import CHOOSING
from regard.workbench.lighter.subjects.items import LABELS, Items
from regard.workbench.lighter.subjects.scores import Score, Sum
from regard.workbench.sparse.readers import Reader

AT_ONCE = 16
"""Items per batch for training and scoring."""


@dataclass(frozen=True)
class Answering:
    """A transformers or timm model with data; implements :class:`regard.workbench.lighter.subjects.base.Subject`.

    Attributes:
        of: description of model and data.
        opened: loads the model.
        score: how its answers are scored.
        before, held_out: items for calibration and training, and items for scoring; None if no data were given.
        tokenizer: tokenizer of a transformers model, saved with the model.
    """

    of: str
    opened: Callable[[], nn.Module]
    score: Score
    before: Items | None
    held_out: Items | None
    tokenizer: Any = None

    @property
    def described(self) -> str:
        """A description of model and data, which also says if answers are compared with the original's."""
        return self.of if self.score.known else f"{self.of}; answers beside the original's"

    @property
    def metric(self) -> str:
        """The score's metric."""
        return self.score.metric

    @property
    def higher_is_better(self) -> bool:
        """Whether higher scores are better."""
        return self.score.higher_is_better

    @property
    def items(self) -> int:
        """Number of held-out items."""
        return 0 if self.held_out is None else len(self.held_out)

    @staticmethod
    def run(model: nn.Module, batch: Any) -> Any:
        """Run the model on a batch, without the right answers."""
        return run_batch(model, {name: value for name, value in batch.items() if name != LABELS})

    def load(self) -> nn.Module:
        return self.opened().eval()

    def calibration(self, count: int) -> list[Any]:
        """Calibration batches of one item each, so that none is padded."""
        assert self.before is not None
        kept = min(count, len(self.before))
        return [self.before.batch([i * len(self.before) // kept]) for i in range(kept)]

    def training(self, steps: int) -> list[Any]:
        assert self.before is not None
        return list(itertools.islice(_batches(self.before, len(self.before)), steps))

    def choosing(self) -> list[Any]:
        assert self.before is not None
        return list(_batches(self.before, CHOOSING))

    def looked_at(self) -> Any:
        assert self.held_out is not None
        return self.calibration(AT_ONCE), self.choosing(), list(_batches(self.held_out, CHOOSING))

    def quality(self, model: nn.Module, items: int) -> float:
        original = None if self.score.known else self.load()
        return self.scored(model, items, self.score.begin(), original=original)[0].value()[0]

    @torch.inference_mode()
    def scored(
        self,
        model: nn.Module,
        items: int,
        *sums: Sum,
        original: nn.Module | None = None,
        on_items: Callable[[int], None] = lambda done: None,
    ) -> tuple[Sum, ...]:
        """Add the model's answers for the first held-out items to some sums.

        Args:
            original: model whose answers stand in for the right ones, if those are not known.
            on_items: called with the number of items done.
        """
        assert self.held_out is not None
        done = 0
        for batch in _batches(self.held_out, items):
            found = self._answers(model, batch)
            right = batch[LABELS] if original is None else self._answers(original, batch)
            for one in sums:
                one.add(found, right)
            done += len(found)
            on_items(done)
        return sums

    def _answers(self, model: nn.Module, batch: Any) -> Tensor:
        found = answers_of(self.run(model, batch))
        if found is None:
            raise Unsupported(f"the answers of {an_instance(model)}", supported="logits, hidden states or features")
        return found

    def timed(self, model: nn.Module) -> dict[str, Action]:
        assert self.held_out is not None

        def action(count: int) -> Action:
            batch = self.held_out.batch([i % len(self.held_out) for i in range(count)])  # type: ignore[union-attr,arg-type]

            def run() -> Any:
                with torch.inference_mode():
                    return self.run(model, batch)

            return run

        return {"one item": action(1), f"{AT_ONCE} items": action(AT_ONCE)}

    def reader(self, model: nn.Module) -> Reader:
        raise Unsupported(f"side effects of {an_instance(model)}", supported="models that write text")

    def save(self, compressed: Compressed, folder: Path) -> None:
        compressed.save(folder, tokenizer=self.tokenizer)


def _batches(items: Items, most: int) -> Iterator[dict[str, Tensor]]:
    """The first `most` items in batches, in order."""
    count = min(most, len(items))
    for first in range(0, count, AT_ONCE):
        yield items.batch(range(first, min(first + AT_ONCE, count)))
