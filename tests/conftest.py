"""Settings and fixtures that every test shares."""

from __future__ import annotations

import functools
import gc
import os
import random
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

from regard import catalogue
from regard.measurement import timing
from regard.tasks import documents as texts

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers would look online for kernels for its models

_device_constructors()  # caches the constructors that a device context affects, before any test replaces some

with torch.device("meta"):
    torch.empty(0)  # at the first use torch lists the functions that follow a device, before they are replaced below


def pytest_collection_finish() -> None:
    """Exempt everything imported and collected so far from garbage collection, which saves a twentieth of the time, and
    collect more rarely what the tests leave, which saves another."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _at_most(seconds: float, rounds: Callable[..., dict[str, list[float]]]) -> Callable[..., dict[str, list[float]]]:
    @functools.wraps(rounds)
    def few(actions: Mapping[str, Callable[[], Any]], **options: Any) -> dict[str, list[float]]:
        return rounds(actions, **{**options, "seconds": min(seconds, options.get("seconds", seconds))})

    return few


timing.rounds = _at_most(0.005, timing.rounds)  # tests need no exact timings; set before other modules import it


if (
    not torch.accelerator.is_available()
):  # torch's own version formats the stack for each kind of accelerator, which takes milliseconds
    torch.manual_seed = torch.default_generator.manual_seed


@pytest.fixture(autouse=True, scope="session")
def _short_calibrations() -> Iterator[None]:
    """Shorten the calibrations of a comparison, which only affect the remaining time that it reports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regard.workbench.comparison.planning.CALIBRATION_SECONDS", 0.4)
        patch.setattr("regard.workbench.comparison.work.LEAST_SECONDS", 0.02)
        yield


@pytest.fixture(autouse=True, scope="session")
def _cases_of_the_seed_alone() -> Iterator[None]:
    """Hypothesis also draws constants that it finds in the sources of all loaded files that are not installed: seconds to
    read them, and other cases for other tests before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypothesis.internal.conjecture.providers.is_local_module_file", lambda _: False, raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what regard measures about the machine under test load out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _part_of_the_standard_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Read every sixth file of Python's sources where no text is given: tasks made of all of them take seconds each.
    The fixture `whole_standard_library` has them all."""
    documents, _ = texts.read_standard_library()
    part = tmp_path_factory.mktemp("stdlib")
    for document in documents[::6]:
        (part / document.name).parent.mkdir(parents=True, exist_ok=True)
        (part / document.name).write_bytes(document.text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "sysconfig", SimpleNamespace(get_path=lambda _: str(part)))
        yield


@pytest.fixture
def whole_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read all of Python's sources where no text is given, as users do."""
    monkeypatch.setattr(texts, "sysconfig", sysconfig)


@pytest.fixture(autouse=True, scope="module")
def _catalogue_as_it_was() -> Iterator[None]:
    """Undo what a file's tests add to the catalogue (plugins, names with options) before the next file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "_plugins", dict(catalogue._plugins))
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised memory with NaN, so that reading it is noticed."""
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
    """Give each test its own seed, the same in every run."""
    seed = sum(ord(c) * 31**i for i, c in enumerate(request.node.nodeid)) % (1 << 31)
    torch.manual_seed(seed)
    random.seed(seed)
