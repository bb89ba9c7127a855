"""What swapped modules are handed beside the arguments of their model, and what they hand back: auxiliary losses.

A model of another library passes neither on. Both belong to a call, so they are kept for the thread that makes it, inside
:func:`collect_losses`, and never on a module.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Context, Loss, Result, Unsupported
from regard.models.losses import add_losses, auxiliary_loss

_CALLS = threading.local()


class Collected:
    """What the swapped modules of a model gave in the calls of :func:`collect_losses`.

    Attributes:
        losses: auxiliary losses by name, each (sum, count), added up over modules and calls.
        by_module: likewise of each module, by its path.
        extras: what was wanted of the last call of each module, by its path: ``weights`` (B, H, N, M), and then ``output``,
            the outputs of the heads (B, H, N, V), both right-padded.
    """

    def __init__(self, model: nn.Module, context: Context, teachers: Mapping[str, Any]) -> None:
        self.losses: dict[str, Loss] = {}
        self.by_module: dict[str, dict[str, Loss]] = {}
        self.extras: dict[str, dict[str, Any]] = {}
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.context, self.teachers = context, teachers
        self.differentiable = torch.is_grad_enabled()

    def total(self, weights: Mapping[str, float] | None = None) -> Tensor:
        """The losses, each a mean (sum / count), weighted by name and added; 0 where there are none.

        Args:
            weights: of losses by name; those of regard's own models for names that are not there.
        """
        return torch.as_tensor(auxiliary_loss(self.losses, weights or {}))

    def _keep(self, path: str, training: bool, result: Result) -> None:
        if result.losses and training and self.differentiable and not torch.is_grad_enabled():
            raise Unsupported(
                f"losses of {path} without gradients, as in reentrant activation checkpointing",
                supported="activation checkpointing that is not reentrant",
                nearest='{"use_reentrant": False}',
            )
        add_losses(self.losses, result.losses)
        add_losses(self.by_module.setdefault(path, {}), result.losses)
        if result.extras:
            self.extras[path] = result.extras


@contextmanager
def collect_losses(
    model: nn.Module,
    *,
    generator: torch.Generator | None = None,
    progress: float | None = None,
    teachers: Mapping[str, Any] | None = None,
    want: frozenset[str] = frozenset(),
) -> Iterator[Collected]:
    """Collect the auxiliary losses of the modules of `model` that :func:`regard.swap` changed::

        with collect_losses(model) as collected:
            loss = model(**batch).loss
        (loss + collected.total({"load_balance": 0.01})).backward()

    Calls of this thread inside the block are collected; what activation checkpointing computes again is not. A block for
    another model may lie inside.

    Args:
        generator, progress: of the calls, as in :class:`regard.Context`.
        teachers: what modules learn from, by their path in the model, as `Context.teacher`.
        want: extras to keep of each module that has them: ``weights``.
    """
    collected = Collected(model, Context(generator=generator, progress=progress, want=frozenset(want)), teachers or {})
    before = _open()
    _CALLS.open = (*before, collected)
    try:
        yield collected
    finally:
        _CALLS.open = before


def _open() -> tuple[Collected, ...]:
    return getattr(_CALLS, "open", ())


def _collecting(module: nn.Module) -> Collected | None:
    """The innermost block around this call that is for a model with `module`."""
    return next((collected for collected in reversed(_open()) if id(module) in collected.paths), None)


def is_collecting() -> bool:
    """Whether this thread is inside a block of :func:`collect_losses`."""
    return bool(_open())


def context_of(module: nn.Module) -> Context:
    """What a call of `module` is handed by the block around it."""
    collected = _collecting(module)
    if collected is None:
        return Context()
    teacher = collected.teachers.get(collected.paths[id(module)])
    return collected.context if teacher is None else collected.context.replace(teacher=teacher)


def hand_back(module: nn.Module, result: Result) -> None:
    """Give the losses and extras of a call of `module` to the block around it, but for what is computed again for a
    gradient."""
    collected = _collecting(module)
    if collected is not None and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1):
        collected._keep(collected.paths[id(module)], module.training, result)
