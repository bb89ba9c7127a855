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
    """Those of models that read a memory, too."""
    return check_task(request.param())


@pytest.fixture
def build(task):
    """Builds a small model for the task."""
    return partial(build_model, task)
