"""Tests of the native kernels run where the library is built."""

import pytest

from regard.backends.native import library


def pytest_collection_modifyitems(items):
    reason = library.why_missing()
    if reason is not None:
        here = [item for item in items if "backends/native" in item.path.as_posix()]
        for item in here:
            item.add_marker(pytest.mark.skip(reason=f"no native library: {reason}"))
