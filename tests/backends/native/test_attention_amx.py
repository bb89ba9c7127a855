"""Attention on AMX tiles: what needs more keys than the tests of all instruction sets have, or concerns tiles alone."""

from __future__ import annotations

import math
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.backends.native import library
from regard.contract import BlockMask, Call, Pattern
from regard.core.visibility import Ranks, Visibility, masked_scores_bias, ranks
from regard.engines.attention import native_form as native

NAME = "amx_bf16"
HERE = library.why_missing() is None and NAME in library.instruction_sets()
pytestmark = pytest.mark.skipif(not HERE, reason="the processor has no AMX, or the system does not permit it")

CAUSAL = Visibility(causal=True)
LONG = 700  # keys of several batches and a part of one


@pytest.fixture(autouse=True)
def _on_tiles():
    with library.using_instruction_set(NAME), library.poisoned_workspaces():
        yield


def tensors(n: int, m: int, heads: int = 2, groups: int = 1, width: int = 40, value_width: int = 48) -> list[Tensor]:
    shapes = ((2, heads, n, width), (2, groups, m, width), (2, groups, m, value_width))
    return [torch.randn(shape).bfloat16() for shape in shapes]


def counted(n: int, m: int, lengths: list[int] | None = None, pattern: Pattern = Pattern.CAUSAL_SELF) -> Ranks:
    valid = None if lengths is None else torch.tensor(lengths)
    return ranks(Call(pattern, lengths=valid, memory_lengths=valid), n, m, torch.device("cpu"))


def run(q, k, v, where, visibility, scale=0.15, sink=None, blocks=None):
    arguments = (
        q,
        k,
        v,
        where,
        visibility,
        scale,
        "softmax",
        0.0,
        None,
        sink,
        None,
        None,
        blocks,
        0.0,
        None,
        False,
        True,
    )
    assert native.refuses(*arguments) is None
    out, _, lse = native.run(*arguments)
    return out, lse


def check(q, k, v, where, visibility, scale=0.15, sink=None, blocks=None):
    out, lse = run(q, k, v, where, visibility, scale, sink, blocks)
    heads, n, m = q.shape[1], q.shape[2], k.shape[2]
    visible, _ = masked_scores_bias(where, visibility, None, None, blocks, torch.float64)
    visible = visible.expand(q.shape[0], heads, n, m)
    k, v = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = (q.double() @ k.mT * scale).masked_fill(~visible, -math.inf)
    some = visible.any(-1)
    column = torch.full((1, heads, 1, 1), -math.inf) if sink is None else sink.double().view(1, -1, 1, 1)
    weights = torch.cat([scores, column.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
    expected = weights.where(some[..., None], 0) @ v
    assert (out[~some] == 0).all()
    half = 2.0 ** (expected.abs().log2().floor() - 8)  # of a last place, which rounding the output takes
    beyond = ((out.double() - expected).abs() - half).max() / expected.abs().max()
    assert beyond <= 3e-3  # by weights rounded to bfloat16
    assert torch.equal(lse == -math.inf, ~some)
    torch.testing.assert_close(lse.double()[some], scores.logsumexp(-1)[some], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "visibility",
    [
        Visibility(),
        CAUSAL,
        Visibility(causal=True, left=300),
        Visibility(left=20, right=45),
        Visibility(block=50, lookback=3, lookahead=1),
    ],
)
@pytest.mark.parametrize("lengths", [None, [LONG, 333]])
def test_many_keys_equal_the_definition(visibility, lengths):
    where = counted(LONG, LONG, lengths, Pattern.NONCAUSAL_SELF)
    check(*tensors(LONG, LONG), where, visibility, sink=torch.randn(2))


@pytest.mark.parametrize("size", [7, 32, 48, 64])
def test_block_masks_over_many_keys_equal_the_definition(size):
    side = -(-LONG // size)
    blocks = BlockMask(torch.rand(2, 2, side, side) > 0.7, size)
    for visibility in (Visibility(), CAUSAL):
        check(*tensors(LONG, LONG), counted(LONG, LONG), visibility, blocks=blocks)


def test_unordered_keys_and_gaps_equal_the_definition():
    keys = torch.stack([torch.randperm(LONG), torch.arange(LONG)])
    keys[0, ::5] = -1
    keys[1, 100:500] = -1
    where = Ranks(torch.randint(-5, LONG, (2, 50)), keys, None, None, False)
    for visibility in (Visibility(), CAUSAL, Visibility(causal=True, left=90)):
        check(*tensors(50, LONG), where, visibility)


@pytest.mark.parametrize("scale", [0.5, -3.0])
def test_references_that_move_within_a_batch_and_between_batches(scale):
    """Scores that grow by hundreds, at different keys for each query."""
    q, k, v = tensors(90, LONG)
    k *= torch.linspace(0, 3, LONG)[:, None].bfloat16()
    check(q, k, v, counted(90, LONG, pattern=Pattern.NONCAUSAL_CROSS), Visibility(), scale)


@pytest.mark.parametrize("value_width", [1, 15, 16, 17, 31, 32, 33, 64, 130])
def test_any_width_of_values(value_width):
    for width in (1, 31, 32, 33, 65):
        q, k, v = tensors(45, 300, width=width, value_width=value_width)
        check(q, k, v + 1, counted(45, 300), Visibility())  # means that are not near 0


def test_torch_and_tiles_do_not_disturb_each_other():
    """Torch's own bfloat16 products run on the same threads and tiles, in another configuration."""
    q, k, v = tensors(130, 130, groups=2, value_width=40)
    where = counted(130, 130)
    a = torch.randn(200, 200).bfloat16()
    ours, products, theirs = [], [], []
    for _ in range(3):
        ours.append(run(q, k, v, where, CAUSAL)[0])
        products.append(a @ a)
        ours.append(run(q, k, v, where, CAUSAL)[0])
        theirs.append(scaled_dot_product_attention(q, k, v))
    for found in (ours, products, theirs):
        assert all(torch.equal(x, found[0]) for x in found)


def test_a_thread_of_the_program_has_tiles_of_its_own():
    q, k, v = tensors(130, 130)
    where = counted(130, 130)
    expected = run(q, k, v, where, CAUSAL)[0]
    found = []

    def work():
        found.extend(run(q, k, v, where, CAUSAL)[0] for _ in range(20))

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
    """Linux does not permit tiles to a process with a signal stack that cannot hold them."""
    command = [sys.executable, "-c", SMALL_SIGNAL_STACK, library.load()._name]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found == ["baseline,avx2,avx512,avx512_bf16", "avx512_bf16", "2"]
