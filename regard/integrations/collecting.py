"""Arguments that swapped modules need in addition to those of their model, and the auxiliary losses that they return.

A model of another library passes on neither. Both belong to a call, so :func:`collect_losses` keeps them per thread,
never on a module.
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
    """Losses and extras that the swapped modules of a model returned during calls inside :func:`collect_losses`.

    Attributes:
        losses: auxiliary losses by name, each (sum, count), added up over modules and calls.
        by_module: the same for each module, by its path.
        extras: the extras asked for, from the last call of each module, by its path: ``weights`` (B, H, N, M) and, with
            them, ``output``, the outputs of the heads (B, H, N, V), both right-padded.
    """

    def __init__(self, model: nn.Module, context: Context, teachers: Mapping[str, Any]) -> None:
        self.losses: dict[str, Loss] = {}
        self.by_module: dict[str, dict[str, Loss]] = {}
        self.extras: dict[str, dict[str, Any]] = {}
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.context, self.teachers = context, teachers
        self.differentiable = torch.is_grad_enabled()

    def total(self, weights: Mapping[str, float] | None = None) -> Tensor:
        """The sum of the losses, each a mean (sum / count) times its weight; 0 where there are none.

        Args:
            weights: weights of the losses by name; names that are missing get the weight they have in regard's own
                models.
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

    The calls that this thread makes inside the block are collected, except for recomputation by activation
    checkpointing. Blocks for different models may be nested.

    Args:
        generator, progress: for the calls, as in :class:`regard.Context`.
        teachers: what modules learn from (`Context.teacher`), by their path in the model.
        want: extras to keep from each module that has them: ``weights``.
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
    """The innermost enclosing block whose model contains `module`."""
    return next((collected for collected in reversed(_open()) if id(module) in collected.paths), None)


def is_collecting() -> bool:
    """Return whether this thread is inside a block of :func:`collect_losses`."""
    return bool(_open())


def context_of(module: nn.Module) -> Context:
    """The context that the enclosing block provides for a call of `module`."""
    collected = _collecting(module)
    if collected is None:
        return Context()
    teacher = collected.teachers.get(collected.paths[id(module)])
    return collected.context if teacher is None else collected.context.replace(teacher=teacher)


def hand_back(module: nn.Module, result: Result) -> None:
    """Report the losses and extras of a call of `module` to the enclosing block, unless the call is a recomputation for
    the backward pass."""
    collected = _collecting(module)
    if collected is not None and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1):
        collected._keep(collected.paths[id(module)], module.training, result)
