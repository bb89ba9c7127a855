"""Where the cells of a command run, and the files that they need there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from regard.cli.console import load_plugins
from regard.contract import Unsupported, one_of

if TYPE_CHECKING:
    from regard.measurement.sweeps import Sweep

ENGINES = ("local", "ray")


def enter_plugins(plugins: Sequence[Path]) -> list[str]:
    """Load plugins, and of ``file.py:Class`` somebody's module; the names of the mechanisms that entered."""
    from regard.workbench.detection.adopted import adopt
    from regard.workbench.detection.suspects import FILE

    names = []
    for file in plugins:
        module = FILE.fullmatch(str(file))
        if module is not None and module["name"]:
            names.append(adopt(module["path"], module["name"]).name)
        else:
            names += [one.MECHANISM.name for one in load_plugins([file]) if hasattr(one, "MECHANISM")]
    return names


def sweep_of(
    engine: str, address: str | None, plugins: Sequence[Path] | None = None
) -> AbstractContextManager[Sweep | None]:
    """Where cells run, by the name that a command is given, as a context that joins it; None for this process.

    What cannot be is refused here, before a command has read or made anything.

    Args:
        plugins: which this process has entered, and the workers will have to.

    Raises:
        Unsupported: for another name, an address of no cluster, and without Ray; on entering, where the cluster cannot be
            joined.
    """
    one_of("engine", engine, ENGINES)
    if engine == "local":
        if address is not None:
            raise Unsupported(f"--address {address} of this process", supported="--engine ray", nearest="--engine ray")
        return nullcontext()
    from regard.measurement.sweeps import Plugins, RaySweep

    return printing_apart(RaySweep(address, Plugins.read(enter_plugins, plugins or ())))


@contextmanager
def printing_apart(sweep: AbstractContextManager[Sweep]) -> Iterator[Sweep]:
    """A sweep during which standard output is standard error: Ray prints there of machines and workers that are lost, whatever it
    is asked to log, and would spoil what a program reads."""
    with redirect_stdout(sys.stderr), sweep as joined:
        yield joined
