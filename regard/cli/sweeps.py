"""The place where a command's cells run, and the files that they need there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from regard.contract import Unsupported, one_of

if TYPE_CHECKING:
    from regard.measurement.sweeps import Sweep

ENGINES = ("local", "ray")


def sweep_of(
    engine: str, address: str | None, plugins: Sequence[Path] | None = None
) -> AbstractContextManager[Sweep | None]:
    """The place where cells run, as a context manager that joins it; None for this process.

    Impossible requests are refused here, before the command has read or written anything.

    Args:
        plugins: plugins loaded in this process, which the workers must load too.

    Raises:
        Unsupported: for an unknown name, an address that is not a cluster's, and without Ray; on entering, if the
            cluster cannot be joined.
    """
    one_of("engine", engine, ENGINES)
    if engine == "local":
        if address is not None:
            raise Unsupported(f"--address {address} of this process", supported="--engine ray", nearest="--engine ray")
        return nullcontext()
    from regard.measurement.sweeps import Plugins, RaySweep
    from regard.workbench.plugins import enter_plugins

    return printing_apart(RaySweep(address, Plugins.read(enter_plugins, plugins or ())))


@contextmanager
def printing_apart(sweep: AbstractContextManager[Sweep]) -> Iterator[Sweep]:
    """A sweep during which standard output goes to standard error: whatever its log level, Ray prints there about lost
    machines and workers, which would spoil output meant for programs."""
    with redirect_stdout(sys.stderr), sweep as joined:
        yield joined
