"""A model without dropout for a while, also while other threads use it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_EVALUATING: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""In how many blocks of :func:`evaluation_mode` each module is that was in training mode before the first."""

_LOCK = threading.Lock()


@contextmanager
def evaluation_mode(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """The model without dropout inside the block, and as it was after it, or after the last of several threads' blocks.

    Args:
        modules: all of the model's, if they are known.
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
