"""A sweep whose cells are made in the process of the test."""

from __future__ import annotations

from regard.measurement.sweeps import Origin, Plugins, made, take_over
from regard.version import VERSION

NO_PLUGINS = Plugins(list)


class Elsewhere:
    """Makes cells, the last one first, in stores of their own, and takes over what comes of them."""

    def __init__(self):
        self.cells = []

    def run(self, make, shared, cells, store, *, threads=1, device="cpu", on_done=lambda cell, left: None):
        origin = Origin(store.run, store.command, VERSION, NO_PLUGINS)
        for left, cell in reversed(list(enumerate(cells))):
            take_over(made(make, shared, cell, origin, threads), store)
            self.cells.append(cell)
            on_done(cell, left)
