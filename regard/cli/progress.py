"""The progress display of long commands."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from regard.cli.console import errors
from regard.measurement import units


class _Remaining(ProgressColumn):
    """Elapsed time, and the remaining time at the present pace."""

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        if not task.total or task.completed <= 0:
            return Text(f"{elapsed:.0f}s", style="dim")
        left = elapsed * max(0.0, task.total - task.completed) / task.completed
        return Text(f"{units.clock(elapsed)} elapsed, about {units.clock(left)} left", style="dim")


@contextmanager
def progress(*, quiet: bool) -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """A live progress bar on a terminal; elsewhere, a line from time to time."""
    started, last = time.monotonic(), [time.monotonic()]
    live = errors.is_terminal and not quiet

    def line(text: str) -> None:
        now = time.monotonic()
        if not live and not quiet and now - last[0] >= 15:
            last[0] = now
            print(f"[{units.clock(now - started)}] {text}", file=sys.stderr, flush=True)

    columns = (BarColumn(bar_width=28), TextColumn("{task.description}", markup=False), _Remaining())
    with Progress(*columns, console=errors, disable=not live, transient=True) as bar:
        yield bar, line
