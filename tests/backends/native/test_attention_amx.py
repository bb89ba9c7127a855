"""Attention on AMX tiles: cases that need more keys than the tests of all instruction sets, or concern only tiles."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from attention_problems import Problem, plain, random_problem
from torch.nn.functional import scaled_dot_product_attention

from regard.backends.native import library
from regard.core.visibility import Visibility

from .kernels import SETS
from .test_attention import beyond_rounding, in_float64

NAME = "amx_bf16"
pytestmark = pytest.mark.skipif(NAME not in SETS, reason="the processor has no AMX, or the system does not permit it")

LONG = 700  # several whole batches of keys and a part of one
ALL = Visibility()
narrow = partial(plain, batch=2, groups=1, width=40, values=48, scale=0.15, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _on_tiles():
    with library.using_instruction_set(NAME):
        yield


def check(problem: Problem) -> None:
    out, _, lse = problem.found("native")
    expected, _, expected_lse = in_float64(problem)
    some = expected_lse > -torch.inf
    assert (out[~some] == 0).all()
    assert beyond_rounding(out, expected) <= 3e-3  # weights are rounded to bfloat16
    assert torch.equal(lse == -torch.inf, ~some)
    torch.testing.assert_close(lse.double()[some], expected_lse[some], rtol=2e-5, atol=2e-5)


def test_many_keys_under_every_mask_equal_the_definition():
    for seed in range(16):
        problem = random_problem(
            seed, torch.bfloat16, (50, 130, LONG), (LONG,), (40, 48), block=(7, 32, 48, 64)[seed % 4]
        )
        check(replace(problem, rule="softmax", shift=0.0, scale=0.15))


@pytest.mark.parametrize("scale", [0.5, -3.0])
def test_references_that_move_within_a_batch_and_between_batches(scale):
    """Scores grow by hundreds, at different keys for each query."""
    problem = narrow(90, LONG, visibility=ALL, scale=scale)
    problem.k *= torch.linspace(0, 3, LONG)[:, None].bfloat16()
    check(problem)


@pytest.mark.parametrize("values", [1, 15, 16, 17, 31, 32, 33, 64, 130])
def test_any_width_of_values(values):
    for width in (1, 31, 32, 33, 65):
        problem = narrow(45, 300, visibility=ALL, width=width, values=values)
        check(replace(problem, v=problem.v + 1))  # means are not near 0


def test_torch_and_tiles_do_not_disturb_each_other():
    """Torch's own bfloat16 products run on the same threads and tiles, with another tile configuration."""
    problem, a = narrow(130, groups=2, values=40), torch.randn(200, 200).bfloat16()
    ours, products, theirs = [], [], []
    for _ in range(3):
        ours.append(problem.found("native")[0])
        products.append(a @ a)
        ours.append(problem.found("native")[0])
        theirs.append(scaled_dot_product_attention(problem.q, problem.k, problem.v))
    for found in (ours, products, theirs):
        assert all(torch.equal(x, found[0]) for x in found)


def test_a_thread_of_the_program_has_tiles_of_its_own():
    problem = narrow(130)
    expected, found = problem.found("native")[0], []

    def work():
        found.extend(problem.found("native")[0] for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60 and all(torch.equal(x, expected) for x in found)


SMALL_SIGNAL_STACK = """
import ctypes, sys
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 4096)), None) == 0
library = ctypes.CDLL(sys.argv[1])
library.regard_instruction_sets.restype = ctypes.c_char_p
library.regard_instruction_set.restype = ctypes.c_char_p
refused = library.regard_set_instruction_set(b"amx_bf16")
print(library.regard_instruction_sets().decode(), library.regard_instruction_set().decode(), refused)
"""


def test_where_the_system_refuses_tiles_there_is_no_such_set():
    """Linux refuses tiles to a process whose signal stack is too small for them."""
    command = [sys.executable, "-c", SMALL_SIGNAL_STACK, library.load()._name]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found == ["baseline,avx2,avx512,avx512_bf16", "avx512_bf16", "2"]
