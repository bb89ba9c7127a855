from __future__ import annotations

from functools import partial

import pytest
from small_runs import LastToken, Repeat, build_model


@pytest.fixture(params=[Repeat, LastToken])
def task(request):
    return request.param()


@pytest.fixture
def build(task):
    """Builds a small model for the task."""
    return partial(build_model, task)
