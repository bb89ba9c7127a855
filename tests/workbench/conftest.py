"""What tests of the workbench share: short timings, and measurements of their own."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from regard.measurement.timing import interleaved


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.workbench.work.CALIBRATION_SECONDS", 1.0)
    monkeypatch.setattr("regard.workbench.cost.interleaved", functools.partial(interleaved, most=3))
