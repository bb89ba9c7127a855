from __future__ import annotations

from functools import partial

import pytest
from small_runs import Continue, LastToken, Repeat, Reverse, build_model

from regard.tasks.protocol import check_task


@pytest.fixture(params=[Repeat, LastToken])
def task(request):
    return request.param()


@pytest.fixture(params=[Repeat, LastToken, Reverse, Continue])
def any_task(request):
    """Each task in turn, including those of models that read a memory."""
    return check_task(request.param())


@pytest.fixture
def build(task):
    """A function that builds a small model for the task."""
    return partial(build_model, task)
