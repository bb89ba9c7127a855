"""Which layers matter: the model's loss of quality when only one layer has the new attention."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from torch import nn

from regard.retrofit.folder import Folder
from regard.retrofit.hosts import Batch, Host
from regard.retrofit.stage import Progress, Watch


@torch.no_grad()
def measure_sensitivity(
    host: Host, modules: Mapping[int, nn.Module], held_out: Batch, folder: Folder, watch: Watch, after: float
) -> dict[int, float]:
    """The distance of the model's answers on held-out data from the original's with one new module, for each module
    alone: in nats, or as a share of the squared hidden states.

    Args:
        modules: new modules by layer number, after some training (untrained modules say nothing about the layer).
        held_out: some of the held-out data.
        after: seconds planned for later stages.
    """
    known: dict[str, float] = folder.read("sensitivity") or {}
    left = [number for number in modules if str(number) not in known]
    rows = host.parts(held_out)
    expected = [host.answers(host.model, row) for row in rows] if left else []
    started = time.monotonic()
    for at, number in enumerate(left):
        with host.with_attention({number: modules[number]}):
            parts = [
                host.distance(host.answers(host.model, row), told) for row, told in zip(rows, expected, strict=True)
            ]
        known[str(number)] = float(torch.stack(parts).double().mean())
        folder.write("sensitivity", known)
        pace = (time.monotonic() - started) / (at + 1)
        remaining = (len(left) - at - 1) * pace + after
        watch(Progress("sensitivity of each layer", known[str(number)], len(known), len(modules), remaining))
    return {number: known[str(number)] for number in modules}


def choose(sensitivity: Mapping[int, float], kept: int) -> tuple[int, ...]:
    """Choose the layers that keep their attention: the ones with the largest loss."""
    lost = {number: loss if math.isfinite(loss) else math.inf for number, loss in sensitivity.items()}
    worst = sorted(lost, key=lambda number: (-lost[number], number))
    return tuple(sorted(worst[:kept]))
