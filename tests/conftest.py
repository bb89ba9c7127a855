"""What every test shares."""

from __future__ import annotations

import functools
import gc
import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

from regard import catalogue
from regard.measurement import timing

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers would look for kernels of its models in the network

_device_constructors()  # remembers the constructors that a device context steers, before any test replaces some

with torch.device("meta"):
    torch.empty(0)  # at the first use torch lists what follows a device, which must not be the replacements below


def pytest_collection_finish() -> None:
    """What was imported and collected stays: the garbage collector need not look through it again, a twentieth of the time."""
    gc.collect()
    gc.freeze()


def _at_most(seconds: float, rounds: Callable[..., dict[str, list[float]]]) -> Callable[..., dict[str, list[float]]]:
    @functools.wraps(rounds)
    def few(actions: Mapping[str, Callable[[], Any]], **options: Any) -> dict[str, list[float]]:
        return rounds(actions, **{**options, "seconds": min(seconds, options.get("seconds", seconds))})

    return few


timing.rounds = _at_most(0.005, timing.rounds)  # no test asks how long anything takes; before other modules import it


if (
    not torch.accelerator.is_available()
):  # torch's own formats the stack once for each kind of accelerator: milliseconds
    torch.manual_seed = torch.default_generator.manual_seed


@pytest.fixture(autouse=True, scope="session")
def _short_calibrations() -> Iterator[None]:
    """Of a comparison, which then tells another remaining time and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regard.workbench.comparison.planning.CALIBRATION_SECONDS", 0.4)
        patch.setattr("regard.workbench.comparison.work.LEAST_SECONDS", 0.02)
        yield


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What regard measures about the machine under test load is not kept for the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def _catalogue_as_it_was() -> Iterator[None]:
    """Mechanisms that a file's tests enter (plugins, names with options) are not in the catalogue of the next file's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "_plugins", dict(catalogue._plugins))
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, so that reading it shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args: object, _original: object = original, **kwargs: object) -> torch.Tensor:
            tensor = _original(*args, **kwargs)  # type: ignore[operator]
            if tensor.is_floating_point() and not tensor.is_meta and not torch.compiler.is_compiling():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(autouse=True)
def _fresh_seed(request: pytest.FixtureRequest) -> None:
    """A seed of its own for each test, the same in every run."""
    seed = sum(ord(c) * 31**i for i, c in enumerate(request.node.nodeid)) % (1 << 31)
    torch.manual_seed(seed)
    random.seed(seed)
