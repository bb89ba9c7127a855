from __future__ import annotations

import threading

import pytest
import torch

import regard
from regard.backends import NATIVE, Ran, prefers_native

FIRST = "the first of native, torch"


@pytest.mark.skipif(NATIVE.missing is not None, reason="needs the native library")
def test_what_ran_is_told_with_its_reason_and_how_often():
    layer, x = regard.create_layer("softmax", 16, 2, positions=None), torch.randn(1, 6, 16)
    with torch.no_grad(), regard.watch_backends() as ran:
        layer(x), layer(x)
        with regard.watch_backends() as inside:
            regard.functional.softmax_attention(*torch.randn(3, 1, 2, 4, 8).double())
    assert ran[Ran("attention", "native", FIRST)] == 2
    (alone,) = inside
    assert (alone.engine, alone.backend) == ("attention", "torch") and "not in float64" in alone.reason
    assert ran[alone] == 1 and ran.backends == {"native", "torch"}
    assert "attention: native, 2 times (the first of native, torch)" in str(ran)
    before = dict(ran)
    layer(x)
    assert dict(ran) == before
    assert regard.which_backend("softmax", dtype=torch.float64).name == "torch"


def test_what_no_engine_runs_is_said():
    with regard.watch_backends() as ran:
        torch.zeros(1)
    assert "no engine" in str(ran)


def test_a_backend_that_was_asked_for_is_the_reason():
    with regard.watch_backends() as ran:
        regard.functional.linear_attention(*torch.randn(3, 1, 2, 4, 8), backend="torch")
    assert {(name.backend, name.reason) for name in ran} == {("torch", "requested")}


def test_watchers_inside_each_other_and_in_other_threads_keep_their_own():
    inputs = torch.randn(3, 1, 2, 4, 8)
    with regard.watch_backends() as outer, regard.watch_backends() as inner:
        regard.functional.linear_attention(*inputs, backend="torch")
        thread = threading.Thread(target=lambda: regard.functional.linear_attention(*inputs, backend="torch"))
        thread.start()
        thread.join()
    with regard.watch_backends() as after:
        pass
    assert sum(outer.values()) == sum(inner.values()) == 1 and not after
    assert prefers_native() == (NATIVE.missing is None)
