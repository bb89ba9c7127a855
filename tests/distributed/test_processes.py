"""Two processes with gloo on the loopback."""

from __future__ import annotations

import torch.multiprocessing as multiprocessing
from processes import both


def test_two_processes_compute_the_parts_of_the_whole_and_train_as_one(tmp_path):
    multiprocessing.spawn(both, (2, tmp_path), nprocs=2)
