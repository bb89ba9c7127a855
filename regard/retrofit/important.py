"""The heads that matter most to the original on the user's data, for a mixture of heads that is to share these.

Their importance is that of Michel et al. (arXiv 1905.10650, equation 2), as in :func:`regard.training.head_importance`: how
much the loss would change, to first order, if the output of a head were scaled; the mean over blocks (or images) of
|d loss / d gate|, at gates of 1. One backward pass gives it for all heads of all layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Result, Unsupported, an_instance
from regard.integrations.swap import Choice
from regard.models.variants import read_variant, written_layers
from regard.retrofit.hosts import Host
from regard.retrofit.settings import RetrofitSettings
from regard.retrofit.stage import Progress, Watch

BATCHES = 8
"""Batches of the training data on which the importance of heads is measured."""
ALL_ACTIVE = "mixture_of_heads:router=query_norm,shared_heads={},active_heads=0"
"""The mixture of a number of heads that is softmax attention."""
PASSES = 3
"""Passes over a block that the measurement of a block takes: one for the loss, two for its gradient."""


def passes(host: Host, settings: RetrofitSettings) -> float:
    """The passes over data of the usual size that the measurement takes; 0 where the first heads are shared."""
    if not settings.shares_important:
        return 0.0
    return PASSES * BATCHES * (1.0 if host.rows is None else settings.rows / host.rows)


def check_importance(host: Host, data: Any, settings: RetrofitSettings) -> None:
    """Raise Unsupported if the importance of heads is asked for where right answers, and so a loss, are not known."""
    if settings.shares_important and not host.knows_answers(data):
        raise Unsupported(
            f"shared_heads={settings.shared_heads!r} of {an_instance(host.model)} on data without right answers, of whose "
            "loss a head could have a share",
            supported="models that predict tokens, or images in a sub-folder for each class of the model",
            nearest="shared_heads='first'",
        )


def head_importance(
    host: Host, data: Any, settings: RetrofitSettings, watch: Watch, after: float
) -> dict[int, list[float]]:
    """The importance of each head of the original, by the number of its layer.

    Args:
        after: seconds planned for later stages.
    """
    numbers = [layer.number for layer in host.layers]
    model = host.on_same_weights({n: ALL_ACTIVE.format(host.heads(n)[0]) for n in numbers})
    gates, totals = dict[int, Tensor](), dict[int, Tensor]()

    def gated(number: int) -> Any:
        def gate(_: nn.Module, args: tuple[Any, ...], result: Result) -> Result:
            gates[number] = result.output.new_ones(result.output.shape[:2]).requires_grad_()  # (B, H)
            result.output = result.output * gates[number][..., None, None]
            return result

        return gate

    for number in numbers:
        placed = host.placed(model, number)
        assert placed is not None
        placed.register_forward_hook(gated(number))
    started, rows = time.monotonic(), 0
    with torch.enable_grad():
        for step in range(BATCHES):
            for part in host.parts(host.batch(data, step, settings.seed + 3, settings)):
                loss = host.own_loss(host.answers(model, part), part) * len(part.inputs)
                for number, slope in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                    found = slope.double().abs().sum(0)
                    totals[number] = totals[number] + found if number in totals else found
                rows += len(part.inputs)
            left = (BATCHES - step - 1) * (time.monotonic() - started) / (step + 1)
            watch(Progress("importance of each head", math.nan, step + 1, BATCHES, left + after))
    return {number: (totals[number] / rows).tolist() for number in sorted(totals)}


def most_important(written: str, importance: Mapping[int, Sequence[float]]) -> dict[int, list[int]]:
    """The heads that a mixture of heads shares in each layer: as many as it shares, of the greatest importance.

    Args:
        written: the mechanism with its options, such as the number of shared heads.
        importance: the result of :func:`head_importance`.
    """
    config: Any = Choice.of(written).chosen.wrapper_config
    found = {}
    for number, scores in importance.items():
        shared, _, _ = config.groups(len(scores))
        ranked = torch.tensor(scores, dtype=torch.float64).argsort(descending=True, stable=True)
        found[number] = sorted(ranked[:shared].tolist())
    return found


def sharing(written: str, heads: Mapping[int, Sequence[int]]) -> dict[int, str]:
    """The mechanism of each layer that always has these heads, by the layer's number."""
    ((name, options),) = read_variant(written).layers
    return {n: written_layers(((name, {**options, "shared_heads": list(its)}),)) for n, its in heads.items()}
