"""Memory of large results is reused once nothing refers to it any more."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from regard.backends.native import recycled

SHAPE = (3, 50)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(recycled, "THRESHOLD", 64)


def test_memory_is_used_again_only_after_the_last_view_of_it():
    first = recycled.empty(SHAPE)
    where, view = first.data_ptr(), first[0]
    del first
    assert recycled.empty(SHAPE).data_ptr() != where
    del view
    assert recycled.empty(SHAPE).data_ptr() == where


def test_a_block_serves_one_thread_at_a_time(monkeypatch):
    class Slow(list):
        """Gives other threads time between the check of a block and its removal."""

        def __iter__(self):
            for block in super().__iter__():
                time.sleep(0.05)
                yield block

        def pop(self, *at):
            block = super().pop(*at)
            time.sleep(0.05)
            return block

    monkeypatch.setattr(recycled, "_kept", Slow())
    recycled.empty(SHAPE)  # returns to the pool at once
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(recycled.empty, [SHAPE] * 2)
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("threshold", [64, 1 << 20])
def test_the_default_dtype_and_device_do_not_matter(monkeypatch, threshold):
    monkeypatch.setattr(recycled, "THRESHOLD", threshold)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            x = recycled.empty(SHAPE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert x.dtype == torch.float32 and x.is_cpu and x.shape == SHAPE
