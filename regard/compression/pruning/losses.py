"""The loss of each item of a batch, for methods that judge a part by the loss without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.compression.layers import Run
from regard.contract import Unsupported, an_instance
from regard.core.precision import wide
from regard.tasks.protocol import IGNORED, Batch

if TYPE_CHECKING:
    from jaxtyping import Float

Losses = Callable[[nn.Module, Any, Run], Tensor]
"""Takes a model, a batch and a function that runs it; returns the loss of each item (B,)."""

SUPPORTED = "batches of a task, mappings with labels, windows of text for a language model; or losses="


def item_losses(model: nn.Module, batch: Any, run: Run) -> Float[Tensor, " b"]:
    """Cross entropy of each item in nats, averaged over its targets; mean squared error if targets are real numbers.

    Args:
        batch: a task's batch; a mapping of arguments with ``labels``, as in transformers; or tokens (B, N), whose next
            tokens are the targets.

    Raises:
        Unsupported: for a batch without targets.
    """
    if isinstance(batch, Batch):
        return _losses(_output(run(model, batch)), batch.targets)
    if isinstance(batch, Mapping) and "labels" in batch:
        given = {name: value for name, value in batch.items() if name != "labels"}
        output, labels = _output(run(model, given)), batch["labels"]
        if output.shape[-1] == 1 and labels.ndim < output.ndim:  # one number is regression, whatever its dtype
            return _losses(output, labels[..., None].to(output.dtype))
        if _predicts_next(model) and labels.ndim == 2:
            return _losses(output[:, :-1], labels[:, 1:])
        return _losses(output, labels)
    if isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point():
        return _losses(_output(run(model, batch))[:, :-1], batch[:, 1:])
    if isinstance(batch, Mapping):
        raise Unsupported("steps that go by the model's own loss, on data without right answers", supported=SUPPORTED)
    raise Unsupported(f"the losses of a batch of type {type(batch).__name__}", supported=SUPPORTED)


def _output(found: Any) -> Tensor:
    for name in ("output", "logits"):
        if isinstance(getattr(found, name, None), Tensor):
            return wide(getattr(found, name))
    if isinstance(found, Tensor):
        return wide(found)
    raise Unsupported(f"the losses of a model that returns {an_instance(found)}", supported="logits; or losses=")


def _predicts_next(model: Any) -> bool:
    return hasattr(model, "get_output_embeddings") and hasattr(model, "can_generate") and model.can_generate()


def _losses(output: Float[Tensor, "b *n c"], targets: Tensor) -> Float[Tensor, " b"]:
    if targets.is_floating_point():
        if output.shape != targets.shape:
            raise Unsupported(
                f"targets {tuple(targets.shape)} for outputs {tuple(output.shape)}",
                supported="a number for each output",
            )
        known = ~targets.isnan()
        errors = torch.where(known, output - targets.nan_to_num(), 0).square()
        return errors.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
    if targets.ndim == output.ndim:  # classes of several pixels at each position
        output = output.unflatten(-1, (targets.shape[-1], -1))
    if targets.shape != output.shape[:-1]:
        raise Unsupported(
            f"targets {tuple(targets.shape)} for outputs {tuple(output.shape)}",
            supported="a class for each row of logits",
        )
    flat = F.cross_entropy(output.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    rows = flat.view(len(targets), -1)
    return rows.sum(1) / (targets != IGNORED).view(len(targets), -1).sum(1).clamp(min=1)
