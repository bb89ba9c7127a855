"""The best weights on held-out data of the modules that a stage of a retrofit trains."""

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
"""The most evaluations on held-out data after the start of a stage, and the least number of steps between them."""


class Best:
    """Keeps the weights with the lowest held-out loss, initial ones included, for each module that a stage trains.

    New attention often starts close to what it should learn, and a few hundred small batches can move it away: then the
    stage ends with the best weights, not with the last.

    Args:
        parts: modules that are judged, and restored, separately.
        measure: returns the losses on held-out data, one per part.
        folder: where the weights are kept in the meantime.
        name: name of the stage.

    Attributes:
        looks: the evaluations so far, in order: the number of steps before each, and the loss of each part.
    """

    def __init__(
        self, parts: Sequence[nn.Module], measure: Callable[[], Sequence[float]], folder: Folder, name: str
    ) -> None:
        self.parts, self.measure = parts, measure
        self.files = [folder.checkpoint(f"{name}-best-{i}") for i in range(len(parts))]
        self.looks: list[tuple[int, list[float]]] = []

    def due(self, done: int, steps: int) -> bool:
        """Return whether held-out data is evaluated before the next step."""
        looks = min(LOOKS, max(1, steps // APART))
        return done in {round(steps * i / looks) for i in range(looks)} and done not in dict(self.looks)

    def look(self, done: int) -> None:
        """Evaluate on held-out data, and keep the weights of parts that improved."""
        losses = [loss if math.isfinite(loss) else math.inf for loss in self.measure()]
        for i, loss in enumerate(losses):
            if loss < self._least(i):
                tensors = {name: tensor.detach().clone() for name, tensor in self._kept(i).items()}
                write_atomically(self.files[i], partial(save_file, tensors))
        self.looks.append((done, losses))

    def put_back(self) -> None:
        """Restore the best weights of every part; the last weights stay where no loss was ever finite. The files stay, for
        a process that has to do this again."""
        with torch.no_grad():
            for i, last in enumerate(self.looks[-1][1]):
                if last > self._least(i):
                    kept, now = load_file(self.files[i]), self._kept(i)
                    for name, tensor in kept.items():
                        now[name].copy_(tensor)

    def discard(self) -> None:
        """Remove the files, once the restored weights are saved elsewhere."""
        for file in self.files:
            file.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """The number of training steps at which each part was best."""
        return [min(self.looks, key=lambda look: look[1][i])[0] for i in range(len(self.parts))]

    def mean(self, at: int | None = None) -> float:
        """The mean of the parts' losses at one evaluation, by index; of each part's best loss when None."""
        losses = [self._least(i) for i in range(len(self.parts))]
        return math.fsum(losses if at is None else self.looks[at][1]) / len(losses)

    def record(self) -> list[Any]:
        """The evaluations as plain data, for a checkpoint."""
        return [list(look) for look in self.looks]

    def restore(self, record: Sequence[Any]) -> None:
        """Resume from :meth:`record`."""
        self.looks = [(done, list(losses)) for done, losses in record]

    def _least(self, i: int) -> float:
        """The lowest loss of a part so far."""
        return min((losses[i] for _, losses in self.looks), default=math.inf)

    def _kept(self, i: int) -> dict[str, Tensor]:
        """The tensors of a part that training changes: weights that require gradients, and saved buffers."""
        part = self.parts[i]
        trained = {name: p for name, p in part.named_parameters() if p.requires_grad}
        saved = part.state_dict().keys()
        return {**trained, **{name: buffer for name, buffer in part.named_buffers() if name in saved}}
