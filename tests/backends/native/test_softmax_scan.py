"""The native softmax scan against the torch form in float64: sizes, instruction sets, gradients, extremes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from regard.contract import Unsupported
from regard.engines.softmax_scan import empty_carry, softmax_scan

from .kernels import SCAN, scanned

SIZES = [(1, 1, 1), (2, 3, 8), (31, 1, 64), (128, 2, 33), (129, 1, 7), (257, 5, 16), (97, 13, 130), (65, 49, 64)]
mixed_or_not = pytest.mark.parametrize("mix", [False, True])


@mixed_or_not
@pytest.mark.parametrize("decay", [False, True])
def test_outputs_and_gradients_equal_float64_for_every_size_and_instruction_set(decay, mix):
    for number, (n, queries, values) in enumerate(SIZES):
        torch.set_num_threads(1 + number % 3)
        SCAN.check_every_set(scanned(n, 1, 1 + number % 2, queries, values, decay, mix))


def test_a_long_sequence_keeps_its_precision():
    x = scanned(10_007, 1, 1, 1, 16, decay=True)
    x["log_decay"] = x["log_decay"] * 0.01
    exact = {name: y.double() for name, y in x.items()}
    found, expected = SCAN.run(x)["o"], SCAN.call(SCAN.plain, **exact, chunk=64)["o"]
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@mixed_or_not
def test_bfloat16_values_are_scanned_in_float32(mix):
    x = scanned(200, 2, 3, 3, 40, mix=mix, dtype=torch.bfloat16)
    SCAN.check(x, only=("o", "m", "u", "w"))
    replace(SCAN, float32=1e-2).check(x)  # score gradients use the rounded output


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 2, 5), (0, 2, 3, 1, 64), (5, 0, 3, 1, 4), (5, 2, 0, 1, 4), (5, 2, 3, 0, 4)]
)
def test_without_tokens_rows_heads_or_queries_the_carry_stays_and_has_its_gradient(shape):
    SCAN.check(scanned(*shape, decay=True), only=("o", "u", "w", "grad s", "grad v", "grad u", "grad w"))


@mixed_or_not
def test_extreme_scores_and_skipped_tokens(mix):
    x = scanned(90, 2, 3, 2, 20, mix=mix, seen=False)
    x["s"] *= 1e4 / 3
    x["s"][:, :, :5] = -torch.inf
    x["s"][:, 0, 30:60] = -torch.inf
    found = SCAN.gradients(x)
    assert (found["o"][:, :, :5] == 0).all()
    assert (found["grad s"][:, :, :5] == 0).all()
    SCAN.check(x)


@pytest.mark.parametrize("gate", [-50.0, -1e4, -torch.inf, 0.0])
def test_strong_decay_forgets_exactly_what_it_should(gate):
    x = scanned(40, 2, 3, 2, 17)
    decay = torch.zeros(1, 1, 40)
    decay[..., 23] = gate
    found = SCAN.run(x | {"log_decay": decay})["o"]
    exact = {name: y.double() for name, y in (x | {"log_decay": decay.clamp(min=-1e5)}).items()}
    expected = SCAN.call(SCAN.plain, **exact, chunk=64)["o"]
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    if gate == -torch.inf:
        s, v = x["s"][:, :, 23:], x["v"][:, :, 23:]
        alone = SCAN.run({"s": s, "v": v, **empty_carry(s, v)._asdict()})["o"]
        torch.testing.assert_close(found[:, :, 23:], alone, rtol=1e-5, atol=1e-6)


def test_the_maximum_carries_no_gradient():
    x = {name: y.requires_grad_() for name, y in scanned(9).items()}
    assert not softmax_scan(x["s"], x["v"], backend="native")[1].m.requires_grad


def test_what_is_in_float64_is_refused():
    s, v = scanned(9)["s"].double(), scanned(9)["v"].double()
    with pytest.raises(Unsupported, match="native"):
        softmax_scan(s, v, backend="native")
