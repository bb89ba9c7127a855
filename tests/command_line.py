"""Runs `regard` command lines in the test's own process."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from regard.cli import main

SMALL_COMPARISON = "--mechanisms softmax --seeds 1 --dim 16 --layers 1 --rates 0.01 --lengths 16,32 --at-length 32"


def run(capsys: pytest.CaptureFixture[str], line: str, *more: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `regard LINE`, with further arguments that are not split into words."""
    code: Any = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["regard", *shlex.split(line), *map(str, more)])
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return code, *capsys.readouterr()


def answer(capsys: pytest.CaptureFixture[str], line: str, *more: object) -> Any:
    """The JSON that a command prints; it must succeed."""
    code, out, messages = run(capsys, line, *more, "--json")
    assert code == 0, out[-2000:] + messages
    return json.loads(out, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
