"""Tests of the native kernels run where the library is built, in memory that is full of NaN."""

import pytest
import torch

from regard.backends.native import library

from .kernels import SETS


def pytest_collection_modifyitems(items):
    reason = library.why_missing()
    if reason is not None:
        here = [item for item in items if "backends/native" in item.path.as_posix()]
        for item in here:
            item.add_marker(pytest.mark.skip(reason=f"no native library: {reason}"))


@pytest.fixture(autouse=True)
def _poisoned():
    """Results and workspaces are NaN until they are written; the number of threads is afterwards what it was."""
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    with library.poisoned_workspaces():
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def _any_memory():
    """For programs, and for comparisons of memory that nobody writes."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=SETS)
def instruction_set(request):
    """Each that works here, in the whole process."""
    with library.using_instruction_set(request.param):
        yield request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    torch.set_num_threads(request.param)
    return request.param
