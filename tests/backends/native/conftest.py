"""Tests of the native kernels run only if the library is built, in memory filled with NaN."""

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
    """Fill results and workspaces with NaN until they are written, and restore the number of threads afterwards."""
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    with library.poisoned_workspaces():
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def _any_memory():
    """Allow arbitrary memory, for compiled programs and comparisons that include unwritten memory."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=SETS)
def instruction_set(request):
    """Each instruction set of this machine in turn, set for the whole process."""
    with library.using_instruction_set(request.param):
        yield request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    torch.set_num_threads(request.param)
    return request.param
