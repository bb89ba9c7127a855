"""Another process on the machine, beside which something is measured."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

BUSY = "import torch\ntorch.set_num_threads(1)\na = torch.randn(512, 512)\nwhile True: a @ a"


@contextmanager
def neighbour() -> Iterator[None]:
    """A PyTorch process that keeps one core busy with products of matrices."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        time.sleep(2)  # until it has imported torch
        yield
    finally:
        process.kill()
        process.wait()
