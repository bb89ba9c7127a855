"""A fixture shared by the workbench's tests: a separate cache for measurements."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
