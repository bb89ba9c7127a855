"""A sweep whose cells are computed in the test's own process."""

from __future__ import annotations

from regard.measurement.sweeps import Origin, Plugins, made, take_over
from regard.version import VERSION

NO_PLUGINS = Plugins(list)


class Elsewhere:
    """Computes cells, the last one first, each in its own store, and copies the results into the shared store."""

    def __init__(self):
        self.cells = []

    def run(self, make, shared, cells, store, *, threads=1, device="cpu", on_done=lambda cell, left: None):
        origin = Origin(store.run, store.command, VERSION, NO_PLUGINS)
        for left, cell in reversed(list(enumerate(cells))):
            take_over(made(make, shared, cell, origin, threads), store)
            self.cells.append(cell)
            on_done(cell, left)
