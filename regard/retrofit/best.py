"""The weights that were best on held-out data, of what a stage of a retrofit trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regard.core.files import write_atomically
from regard.retrofit.folder import Folder

LOOKS, APART = 4, 20
"""How often held-out data is asked after the start of a stage, at most, and how many steps apart, at least."""


class Best:
    """Keeps, of each part that a stage trains, the weights with the lowest loss on held-out data, the start among them.

    New attention often begins near what it is to learn, and a few hundred small batches can leave it farther away: then the
    stage ends with what was best, not with what was last.

    Args:
        parts: modules that are judged, and put back, each alone.
        measure: losses on held-out data, one a part.
        folder: where the weights are kept meanwhile.
        name: of the stage.

    Attributes:
        looks: what was found, in order: the number of steps before, and the loss of each part.
    """

    def __init__(
        self, parts: Sequence[nn.Module], measure: Callable[[], Sequence[float]], folder: Folder, name: str
    ) -> None:
        self.parts, self.measure = parts, measure
        self.files = [folder.checkpoint(f"{name}-best-{i}") for i in range(len(parts))]
        self.looks: list[tuple[int, list[float]]] = []

    def due(self, done: int, steps: int) -> bool:
        """Whether held-out data is asked before the next step."""
        looks = min(LOOKS, max(1, steps // APART))
        return done in {round(steps * i / looks) for i in range(looks)} and done not in dict(self.looks)

    def look(self, done: int) -> None:
        """Ask held-out data, and keep the parts that are better than ever."""
        losses = [loss if math.isfinite(loss) else math.inf for loss in self.measure()]
        for i, loss in enumerate(losses):
            if loss < self._least(i):
                tensors = {name: tensor.detach().clone() for name, tensor in self._kept(i).items()}
                write_atomically(self.files[i], partial(save_file, tensors))
        self.looks.append((done, losses))

    def put_back(self) -> None:
        """Give every part the weights that were best; those of the last step where none ever gave a number."""
        with torch.no_grad():
            for i, last in enumerate(self.looks[-1][1]):
                if last > self._least(i):
                    kept, now = load_file(self.files[i]), self._kept(i)
                    for name, tensor in kept.items():
                        now[name].copy_(tensor)
        for file in self.files:
            file.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """For each part, the number of steps after which it was best."""
        return [min(self.looks, key=lambda look: look[1][i])[0] for i in range(len(self.parts))]

    def mean(self, at: int | None = None) -> float:
        """The mean of the parts' losses at a look; of the best of each when None."""
        losses = [self._least(i) for i in range(len(self.parts))]
        return math.fsum(losses if at is None else self.looks[at][1]) / len(losses)

    def record(self) -> list[Any]:
        """The looks as plain data, for a checkpoint."""
        return [list(look) for look in self.looks]

    def restore(self, record: Sequence[Any]) -> None:
        """Go on from :meth:`record`."""
        self.looks = [(done, list(losses)) for done, losses in record]

    def _least(self, i: int) -> float:
        """The least loss of a part so far."""
        return min((losses[i] for _, losses in self.looks), default=math.inf)

    def _kept(self, i: int) -> dict[str, Tensor]:
        """What training changes in a part: weights that want gradients, and buffers that belong to a saved model."""
        part = self.parts[i]
        trained = {name: p for name, p in part.named_parameters() if p.requires_grad}
        saved = part.state_dict().keys()
        return {**trained, **{name: buffer for name, buffer in part.named_buffers() if name in saved}}
