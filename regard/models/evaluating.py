"""A thread-safe context manager that puts a model in evaluation mode."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_EVALUATING: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""The number of open :func:`evaluation_mode` blocks of each module that was in training mode before the first."""

_LOCK = threading.Lock()


@contextmanager
def evaluation_mode(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Put the model in evaluation mode inside the block and restore its mode afterwards.

    Where blocks of several threads overlap, the mode is restored after the last one.

    Args:
        modules: all modules of the model, if already known.
    """
    with _LOCK:
        every = model.modules() if modules is None else modules
        elsewhere = len(_EVALUATING) > 0
        held = [module for module in every if module.training or (elsewhere and module in _EVALUATING)]
        if any(module.training for module in held):
            model.eval()
        for module in held:
            _EVALUATING[module] = _EVALUATING.get(module, 0) + 1
    try:
        yield
    finally:
        with _LOCK:
            for module in held:
                _EVALUATING[module] -= 1
                if not _EVALUATING[module]:
                    del _EVALUATING[module]
                    module.training = True
