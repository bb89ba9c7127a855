from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from regard.training import TensorMemory, peak_memory

MEGABYTE = 1 << 20
FLOATS = MEGABYTE // 4


BEFORE = torch.zeros(FLOATS)


def freed_before_others():
    a, b = torch.zeros(FLOATS), torch.zeros(2 * FLOATS)
    del a, b
    return torch.zeros(FLOATS)


def views_and_changes_in_place():
    a = torch.zeros(FLOATS)
    return [a.view(-1, 4), a[:10], a.view(2, -1).t(), a.add_(1).mul_(2)]


@torch.no_grad()
def a_chain_without_a_graph():
    x = BEFORE
    for _ in range(6):
        x = x.exp()


@pytest.mark.parametrize(
    ("work", "megabytes"),
    [
        (freed_before_others, 3),
        (views_and_changes_in_place, 1),
        (lambda: torch.zeros(FLOATS).resize_(3 * FLOATS).resize_(FLOATS), 3),
        (lambda: BEFORE.add_(1).view(-1, 4).t(), 0),
        (a_chain_without_a_graph, 2),
    ],
)
def test_the_peak_is_of_storages_alive_together(work, megabytes):
    peak = peak_memory(work)
    assert (peak.bytes, peak.counted) == (megabytes * MEGABYTE, "tensors")


def test_a_view_keeps_its_storage_alive():
    with TensorMemory() as memory:
        part = torch.zeros(FLOATS)[:4]
        torch.zeros(4)
        assert memory.alive == MEGABYTE
        del part
        assert memory.alive == 0
    assert memory.peak == MEGABYTE + 16


def test_what_the_backward_pass_needs_counts_until_it_has_run():
    x = torch.rand(FLOATS, requires_grad=True)

    def chain(depth):
        y = x
        for _ in range(depth):
            y = y.exp()  # saves its output
        y.sum().backward()
        x.grad = None
        return depth

    few, many = peak_memory(lambda: chain(2)), peak_memory(lambda: chain(6))
    assert many.bytes - few.bytes == 4 * MEGABYTE
    assert many.value == 6


def test_freed_memory_is_kept_where_the_c_library_is_the_gnu_one():
    """Runs in its own process, since the setting affects the whole process."""
    code = (
        "import resource, torch\n"
        "from regard.training import keep_freed_memory\n"
        "kept = keep_freed_memory()\n"
        "for _ in range(3): torch.ones(1 << 22)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): torch.ones(1 << 22)\n"
        "print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    assert kept == str(platform.libc_ver()[0] == "glibc")
    if kept == "True":
        assert int(faults) < 1000  # for five tensors of 4,096 pages
