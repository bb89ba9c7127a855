from __future__ import annotations

import platform
import subprocess
import sys

import torch

from regard.training import TensorMemory, peak_memory

MEGABYTE = 1 << 20
FLOATS = MEGABYTE // 4


def test_tensors_alive_together_count_together():
    def work():
        a = torch.zeros(FLOATS)
        b = torch.zeros(2 * FLOATS)
        del a, b
        c = torch.zeros(FLOATS)
        return c

    peak = peak_memory(work)
    assert (peak.bytes, peak.counted) == (3 * MEGABYTE, "tensors")
    assert peak.value.numel() == FLOATS


def test_views_and_changes_in_place_cost_nothing():
    def work():
        a = torch.zeros(FLOATS)
        views = [a.view(-1, 4), a[:10], a.view(2, -1).t()]
        a.add_(1).mul_(2)
        return views

    assert peak_memory(work).bytes == MEGABYTE


def test_a_view_keeps_its_storage_alive():
    with TensorMemory() as memory:
        part = torch.zeros(FLOATS)[:4]
        torch.zeros(4)
        assert memory.alive == MEGABYTE
        del part
        assert memory.alive == 0
    assert memory.peak == MEGABYTE + 16


def test_tensors_from_before_do_not_count_even_when_returned():
    before = torch.zeros(FLOATS)
    assert peak_memory(lambda: before.add_(1).view(-1, 4).t()).bytes == 0


def test_what_the_backward_pass_needs_counts_until_it_has_run():
    x = torch.rand(FLOATS, requires_grad=True)

    def chain(depth):
        def work():
            y = x
            for _ in range(depth):
                y = y.exp()  # keeps its output
            y.sum().backward()
            x.grad = None

        return work

    few, many = peak_memory(chain(2)).bytes, peak_memory(chain(6)).bytes
    assert many - few == 4 * MEGABYTE
    assert peak_memory(lambda: torch.no_grad()(chain_without_graph)(x)).bytes == 2 * MEGABYTE


def chain_without_graph(x):
    for _ in range(6):
        x = x.exp()


def test_a_storage_that_grows_counts_at_its_new_size():
    def work():
        a = torch.zeros(FLOATS)
        a.resize_(3 * FLOATS)
        a.resize_(FLOATS)

    assert peak_memory(work).bytes == 3 * MEGABYTE


def test_freed_memory_is_kept_where_the_c_library_is_the_gnu_one():
    """In a process of its own, since the setting is the whole process's."""
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
        assert int(faults) < 1000  # five tensors of 4,096 pages
