"""The native gated recurrence, with and without the delta rule, and its step, against the torch form in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from regard.contract import Unsupported
from regard.engines.gated_recurrence import native_form as native
from regard.engines.gated_recurrence import step
from regard.engines.gated_recurrence import torch_form as plain
from regard.engines.gated_recurrence.problem import Problem

from .kernels import DELTA, GATED, STEP, Tensors, one_token, recurrent

WIDTHS = [(64, 64), (8, 8), (13, 19), (33, 1), (1, 40)]
SHAPES = [
    *((1, 2, n, *WIDTHS[i % 5]) for i, n in enumerate((1, 7, 16, 31, 32, 33, 64, 101))),
    (1, 2, 0, 8, 8), (2, 3, 1, 8, 8), (1, 1, 61, 33, 65), (1, 1, 31, 7, 130), (1, 3, 48, 130, 9), (1, 1, 40, 256, 256),
    (0, 2, 5, 8, 8), *((1, 1, n, 24, values) for n, values in ((1, 40), (33, 64), (300, 100), (0, 40), (40, 8))),
]  # fmt: skip
"""Cases with more heads than threads, and with fewer, where value features are split."""

each_decay = pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
each_kernel = pytest.mark.parametrize("delta", [False, True])


def kernel_of(delta: bool):
    return DELTA if delta else GATED


def sample(shape: tuple[int, ...], decay: str = "vector", delta: bool = False, **more) -> Tensors:
    batch, heads, n, width, values = shape
    return recurrent(n, batch, heads, width, values, decay, delta=delta, **more)


def strong(gates: torch.Tensor | None) -> torch.Tensor | None:
    """Replace some gates by values from no decay at all to forgetting everything."""
    for share, value in ((0.3, 0.0), (0.08, -50.0), (0.04, -1e4), (0.04, -math.inf)):
        gates = None if gates is None else torch.where(torch.rand(gates.shape) < share, value, gates)
    return gates


@each_kernel
@each_decay
def test_outputs_states_and_gradients_are_those_of_float64(decay, delta):
    shapes = SHAPES if delta else [shape for shape in SHAPES if 1 not in shape[3:]]  # their gradients nearly cancel
    for number, shape in enumerate(shapes):
        torch.set_num_threads(1 + number % 3)
        x = sample(shape, decay, delta)
        if delta:  # rates of zero write nothing
            x["beta"] = x["beta"].masked_fill(torch.rand(shape[:3]) < 0.3, 0)
        else:
            x["log_decay"] = strong(x["log_decay"])
        kernel_of(delta).check_every_set(x if number % 3 else x | {"state": None}, inclusive=number % 5 < 3)


@each_kernel
@each_decay
def test_every_option_is_that_of_float64(decay, delta):
    torch.set_num_threads(2)
    for inclusive, read, state in itertools.product((True, False), repeat=3):
        dtype = torch.float32 if (inclusive + read + state) % 2 else torch.bfloat16
        x = sample((1, 1 + inclusive, 37, 24, 20), decay, delta, dtype=dtype)
        x["log_decay"] = x["log_decay"] if delta else strong(x["log_decay"])
        x |= {} if read else {"q": None}
        kernel_of(delta).check_every_set(x if state else x | {"state": None}, inclusive=inclusive)


@each_kernel
@each_decay
@pytest.mark.parametrize("threads", [1, 2])
def test_queries_and_keys_shared_by_groups_of_heads(decay, delta, threads):
    torch.set_num_threads(threads)
    kernel_of(delta).check(sample((2, 6, 37, 16, 8), decay, delta, groups=2))
    x = sample((1, 4, 37, 16, 8), decay, delta, groups=1)
    kernel_of(delta).check(x | {"q": torch.randn(1, 2, 37, 16)})


@each_decay
def test_ten_thousand_tokens_of_weak_decay_lose_nothing(decay):
    x = sample((1, 1, 10_000, 32, 32), decay)
    x["log_decay"] = None if x["log_decay"] is None else -1e-3 * torch.rand_like(x["log_decay"])
    GATED.check(x, only=("o", "last"))
    x = sample((1, 1, 10_000, 16, 8), decay, delta=True)
    x["log_decay"] = None if x["log_decay"] is None else 0.01 * x["log_decay"]
    DELTA.check(x)


def test_a_gate_that_is_always_the_same_does_not_drift():
    # a decay rounded to float32 at every block would accumulate hundreds of roundings in the same direction
    candidates = -1e-4 * (1 + 0.1 * torch.rand(1000))
    exact = (16 * candidates.double()).exp()
    gate = candidates[(exact.float() - exact).abs().argmax()]  # the worst rounding over 16 tokens
    x = sample((1, 1, 10_000, 8, 8))
    x |= {"k": torch.rand_like(x["k"]), "v": torch.rand_like(x["v"]), "log_decay": gate.expand(1, 1, 10_000, 8)}
    GATED.check(x, only=("o", "last"))
    x = sample((1, 1, 4000, 16, 16), "scalar", delta=True)
    DELTA.check(x | {"log_decay": torch.full_like(x["log_decay"], -1e-3), "beta": 0.01 * x["beta"]})


@each_kernel
@pytest.mark.parametrize("gate", [0.0, -1.0, -50.0, -1e4, -math.inf])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_strong_gates_everywhere_and_somewhere(instruction_set, gate, decay, delta):
    # in the delta rule a forgotten state's gradient nearly vanishes: errors are relative to the largest number, or to 1
    kernel = replace(DELTA, least={"*": 1.0}) if delta else GATED
    for share in (0.2, 1.0):
        x = sample((1, 2, 90, 16, 16), decay, delta)
        forgotten = torch.rand(x["log_decay"].shape) < share
        x["log_decay"] = x["log_decay"].masked_fill(forgotten, gate)
        kernel.check(x)
        if gate == -math.inf:
            assert not kernel.gradients(x)["grad log_decay"][forgotten].any()
    if gate < -1:  # only a token's own write is left
        found = kernel.run(x)
        written = x["v"] if not delta else x["beta"][..., None] * x["v"]
        kernel.close(found["o"], ((x["q"] * x["k"]).sum(-1, keepdim=True) * written).double())
        kernel.close(found["last"], (x["k"][:, :, -1, :, None] * written[:, :, -1, None, :]).double())


@each_kernel
def test_tensors_of_several_dtypes_are_computed_in_float32(delta):
    x = sample((1, 2, 40, 16, 16), "vector", delta)
    for chosen in [{name} for name in x] + [{"q", "k", "v"}, {*x} - {"state"}, {*x} - {"q", "k"}]:
        kernel_of(delta).check({name: y.bfloat16() if name in chosen else y for name, y in x.items()})


# One token.


@each_decay
@pytest.mark.parametrize("correcting", [False, True])
def test_a_step_is_one_token_of_the_recurrence(instruction_set, decay, correcting):
    for batch, heads, groups, width, values in ((2, 4, 4, 64, 64), (3, 4, 2, 33, 65), (1, 2, 1, 7, 5)):
        x = one_token(sample((batch, heads, 1, width, values), decay, groups=groups))
        x["log_decay"] = strong(x["log_decay"])
        x["beta"] = torch.rand(batch, heads) if correcting else None
        STEP.check(x)
        STEP.check({name: y if y is None or name == "state" else y.bfloat16() for name, y in x.items()})


def test_states_larger_than_the_caches_take_a_step():
    q, k, v = torch.randn(3, 130, 8, 64)
    g, state = -torch.rand(130, 8, 64), torch.randn(130, 8, 64, 64)
    expected = plain.run_step(q, k, v, g, None, state)
    for _ in range(3):  # memory of a freed state is reused for the next
        found = step.run_step(q, k, v, g, None, state)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
        del found, x
    view = step.run_step(q, k, v, g, None, state)[1][3]
    copy = view.clone()
    step.run_step(q, k, v, g, None, 2 * state)
    assert torch.equal(view, copy)


# Calls that the kernel does not take.


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(1, 2, 11, 8)},
        {"k": torch.randn(1, 3, 10, 8)},
        {"k": torch.randn(1, 2, 10, 8).half()},
        {"k": torch.randn(1, 2, 10, 8, device="meta")},
        {"v": torch.randn(1, 2, 10)},
        {"v": torch.randn(1, 2, 10, 0)},
        {"log_decay": torch.randn(1, 2, 10, 3)},
        {"log_decay": torch.randn(1, 1, 10, 8)},
        {"state": torch.randn(1, 2, 8, 7)},
        {"state": torch.randn(1, 2, 8, 4).double()},
    ],
)
@each_kernel
def test_what_does_not_fit_is_left_to_torch_or_refused(delta, change):
    x = sample((1, 2, 10, 8, 4), delta=delta) | change
    problem = Problem(x["q"], x["k"], x["v"], x["log_decay"], x.get("beta"), x["state"], True)
    assert native.refuses(problem, 64, 16) is not None
    if all(y.dtype == torch.float32 and not y.is_meta for y in x.values()):  # others may be converted
        with pytest.raises(Unsupported):
            kernel_of(delta).run(x)
