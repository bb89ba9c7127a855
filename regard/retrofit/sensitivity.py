"""Which layers matter: what the model loses when one layer alone has the new attention."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.retrofit.folder import Folder
from regard.retrofit.hosts import Host
from regard.retrofit.stage import Progress, Watch

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def measure_sensitivity(
    host: Host, modules: Mapping[int, nn.Module], blocks: Int[Tensor, "w n"], folder: Folder, watch: Watch, after: float
) -> dict[int, float]:
    """KL(the model, the model with one new module) of the next tokens of held-out text, in nats a token, for each module alone.

    Args:
        modules: by the number of their layer, a little trained (what is new and untrained tells nothing).
        blocks: of held-out text.
        after: seconds planned for later stages.
    """
    known: dict[str, float] = folder.read("sensitivity") or {}
    left = [number for number in modules if str(number) not in known]
    rows = blocks.split(1)
    expected = [_next_tokens(host, row) for row in rows] if left else []
    started = time.monotonic()
    for at, number in enumerate(left):
        with host.with_attention({number: modules[number]}):
            parts = [
                F.kl_div(_next_tokens(host, row), told, reduction="sum", log_target=True) / len(told)
                for row, told in zip(rows, expected, strict=True)
            ]
        known[str(number)] = float(torch.stack(parts).double().mean())
        folder.write("sensitivity", known)
        pace = (time.monotonic() - started) / (at + 1)
        remaining = (len(left) - at - 1) * pace + after
        watch(Progress("sensitivity of each layer", known[str(number)], len(known), len(modules), remaining))
    return {number: known[str(number)] for number in modules}


def choose(sensitivity: Mapping[int, float], kept: int) -> tuple[int, ...]:
    """The layers that keep their attention: those without which the model loses the most."""
    lost = {number: loss if math.isfinite(loss) else math.inf for number, loss in sensitivity.items()}
    worst = sorted(lost, key=lambda number: (-lost[number], number))
    return tuple(sorted(worst[:kept]))


@torch.no_grad()
def _next_tokens(host: Host, row: Int[Tensor, "1 n"]) -> Float[Tensor, "n v"]:
    return host.model(row, use_cache=False).logits[0].float().log_softmax(-1)
