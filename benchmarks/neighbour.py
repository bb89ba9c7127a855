"""A second process that keeps the machine busy during a measurement."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

BUSY = "import torch\ntorch.set_num_threads(1)\na = torch.randn(512, 512)\nwhile True: a @ a"


@contextmanager
def neighbour() -> Iterator[None]:
    """Run a PyTorch process that keeps one core busy with matrix products while the block runs."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        time.sleep(2)  # time for it to import torch
        yield
    finally:
        process.kill()
        process.wait()
