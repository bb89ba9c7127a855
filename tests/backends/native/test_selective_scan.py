"""The native selective scan against the torch form in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import saved_for_backward

from regard.engines.selective_scan import native_form as native
from regard.engines.selective_scan.problem import Problem

from .kernels import SELECTIVE, differentiated, selective

OPTIONAL = ("skip", "dt_bias", "z", "state")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_states_and_gradients_equal_float64(dtype):
    for n, (channels, groups, states), surrounded in itertools.product(
        (1, 7, 63, 64, 65, 131), ((40, 1, 16), (33, 3, 5), (17, 1, 8), (12, 12, 12)), (True, False)
    ):
        torch.set_num_threads(1 + n % 3)
        more = {"lengths": [n, n // 3, 0]} if surrounded else {}
        x = selective(n, 3, channels, groups, states, dtype=dtype, surrounded=surrounded, **more)
        SELECTIVE.check_every_set(x, inclusive=n % 2 == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_visited_in_another_order_stay_where_they_are(dtype):
    for n, groups in itertools.product((1, 63, 64, 131), (1, 3)):
        torch.set_num_threads(1 + n % 3)
        x = selective(n, 3, 33, groups, 5, dtype=dtype) | {"order": torch.randperm(n)}
        SELECTIVE.check_every_set(x)


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("read", [True, False])
def test_each_option_alone_and_all_together(inclusive, read):
    for kept in (OPTIONAL, (), *((name,) for name in OPTIONAL)):
        x = selective(70, 2, 24, 2, 6, read=read)
        x |= {"dt": x["dt"].abs(), **dict.fromkeys(set(OPTIONAL) - set(kept))}
        SELECTIVE.check(x, inclusive=inclusive)


@pytest.mark.parametrize(
    "shape", [(0, 2, 8, 1, 4), (9, 0, 8, 1, 4), (9, 2, 0, 1, 4), (9, 1, 5, 1, 1), (5, 1, 8, 1, 40)]
)
def test_empty_and_narrow_shapes(shape):
    SELECTIVE.check(selective(*shape))
    SELECTIVE.check(selective(*shape, read=False, surrounded=False))


def test_a_long_sequence_keeps_its_precision():
    x = selective(10_000, 1, 8, 1, 4)
    x["a"] = x["a"] * 1e-4
    weights = {}
    found = SELECTIVE.gradients(x, weights)
    expected = differentiated(lambda **x: SELECTIVE.call(SELECTIVE.plain, **x), x, weights, torch.float64)
    for name, y in expected.items():
        if name in ("grad a", "grad dt", "grad skip", "grad dt_bias"):
            # sums over all tokens in float32; torch's own error is 4e-5
            assert (found[name] - y).abs().max() <= 1e-4 * y.abs().max(), name
        else:
            SELECTIVE.close(found[name], y, name)


def test_extreme_steps_and_gates(instruction_set):
    for value in (-1e4, -50.0, 0.0, 50.0, 1e4):
        x = selective(40, 1, 18, 1, 8)
        x["dt"][:, 1::2] = value
        x["z"][:, ::3] = value
        SELECTIVE.check(x)
    x = selective(30, 1, 18, 1, 8, surrounded=False)
    x["a"][:, 3], x["a"][:, 4], x["dt"][:, 5] = -1e30, 0.0, 0.0
    # rates of -1e30 make the gradient of dt equally large
    SELECTIVE.check(x, only=("o", "last", "grad x", "grad a", "grad b", "grad c"))
    x["dt"][:, 7] = math.inf
    assert SELECTIVE.run(x)["last"].isnan().logical_not().any()


def test_inputs_of_several_dtypes_are_computed_in_float32():
    x = selective(50, 2, 24, 1, 6, dtype=torch.bfloat16)
    SELECTIVE.check(x | {"dt": x["dt"].float() + 1e-4})


def test_backward_keeps_the_inputs_and_few_states():
    leaves = {name: t.requires_grad_() for name, t in selective(256, 1, 64, 1, 16).items()}
    kept = sum(saved_for_backward(lambda: SELECTIVE.run(leaves)))
    assert kept == sum(4 * t.numel() for t in leaves.values()) + 4 * 256 // native.EVERY * 64 * 16
    assert native._scan(Problem(*(t.detach() for t in leaves.values()), None, None, True), False)[2].numel() == 0


def test_what_does_not_fit_is_left_to_torch():
    good = selective(9, 2, 8, 2, 4, lengths=[9, 1])
    assert native.refuses(Problem(*good.values(), None, True), 64) is None
    for change in (
        {"x": torch.randn(2, 9, 6)},
        {"b": torch.randn(2, 9, 2, 4).half()},
        {"a": torch.randn(8, 4).double()},
        {"lengths": torch.tensor([9, 1], dtype=torch.int32)},
    ):
        assert native.refuses(Problem(*(good | change).values(), None, True), 64) is not None
    for order in (torch.arange(9), torch.arange(8), torch.arange(9, dtype=torch.int32)):
        assert native.refuses(Problem(*(good | {"lengths": order.new_tensor([9, 1])}).values(), order, True), 64)
    assert native.refuses(Problem(*(good | {"lengths": None}).values(), torch.randperm(9), True), 64) is None
