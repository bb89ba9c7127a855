"""The selective scan: its results, its numerical safety, and parity with the official definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import close, load, saved_for_backward

from regard.backends import NATIVE
from regard.contract import Unsupported
from regard.engines.selective_scan import selective_scan, selective_scan_reference
from regard.engines.selective_scan.torch_form import STRIDE
from regard.measurement.flops import flop_counter


def sample(n=37, *, batch=2, channels=6, groups=2, states=4, dtype=torch.float64):
    """Random x, dt, a, b, c."""
    x, dt = (torch.randn(batch, n, channels, dtype=torch.float64) for _ in range(2))
    a = -torch.rand(channels, states, dtype=torch.float64) * 8
    b, c = (torch.randn(batch, n, groups, states, dtype=torch.float64) for _ in range(2))
    return tuple(t.to(dtype) for t in (x, F.softplus(dt - 1), a, b, c))


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("n", [1, 2, STRIDE - 1, STRIDE, STRIDE + 1, 37, 64, 65])
def test_chunks_of_any_size_equal_the_recurrence(n, inclusive):
    x = sample(n)
    y, h = selective_scan_reference(*x, inclusive=inclusive)
    for size in (1, 3, STRIDE, 16, 64):
        found, last = selective_scan(*x, chunk_size=size, inclusive=inclusive)
        assert float((found - y).abs().max()) <= 1e-13 * float(h.abs().max())
        close(last, h)


def test_a_length_beyond_the_tokens_counts_all_of_them():
    given = sample()
    found, expected = (selective_scan(*given, lengths=torch.tensor([n, 1])) for n in (38, 37))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["torch", None])
def test_an_order_is_that_in_which_tokens_are_visited(backend):
    x, dt, a, b, c = sample(37, dtype=torch.float32)
    order = torch.randperm(37)
    leaves = [t.requires_grad_() for t in (x, dt, a, b, c)]
    y, last = selective_scan(*leaves, order=order, backend=backend)
    expected, after = selective_scan(*(t if t is a else t[:, order] for t in leaves), backend="torch")
    close(last, after, 2e-6)
    close(y[:, order], expected, 2e-6)
    weights = torch.randn_like(y)
    found = torch.autograd.grad((y * weights).sum(), leaves)
    for grad, same in zip(found, torch.autograd.grad((expected * weights[:, order]).sum(), leaves), strict=True):
        close(grad, same, 2e-5)


def test_strong_decays_stay_finite_and_accurate_with_finite_gradients():
    """Differences of cumulative sums would lose all digits here, or overflow."""
    x, dt, a, b, c = sample(130, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, dt * 100, a * 100, b, c)]
    y, _ = selective_scan(*leaves)
    close(y.double(), selective_scan_reference(*(t.detach().double() for t in leaves))[0], 2e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.square().sum(), leaves))


def test_long_sequences_without_decay_keep_their_precision():
    x, dt, a, b, c = sample(1000, batch=1, dtype=torch.float32)
    given = (x, dt, a * 1e-5, b, c)
    close(selective_scan(*given)[0].double(), selective_scan_reference(*(t.double() for t in given))[0], 2e-6)


def test_backward_keeps_the_inputs_and_a_state_for_each_chunk_only():
    leaves = [t.requires_grad_() for t in sample(128, batch=1, channels=8, groups=1, states=32)]
    kept = sum(saved_for_backward(lambda: selective_scan(*leaves, chunk_size=32))) // 8
    states = 128 // 32 * 8 * 32
    assert kept <= sum(t.numel() for t in leaves) + states < 128 * 8 * 32


def test_what_cannot_be_honoured_is_refused():
    x, dt, a, b, c = sample()
    for told, options in (("chunk_size=0", {"chunk_size": 0}), ("backend", {"backend": "none"})):
        with pytest.raises(Unsupported, match=told):
            selective_scan(x, dt, a, b, c, **options)
    with pytest.raises(Unsupported, match="groups"):
        selective_scan(x[..., :5], dt[..., :5], a[:5], b, c)
    with pytest.raises(Unsupported, match=r"an order of shape \(5,\)"):
        selective_scan(x, dt, a, b, c, order=torch.arange(5))
    with pytest.raises(Unsupported, match="an order beside lengths"):
        selective_scan(x, dt, a, b, c, order=torch.arange(37), lengths=torch.tensor([37, 5]))


@pytest.mark.parametrize("name", ["mamba_scan", "mamba_scan_strong_decay"])
def test_parity_with_the_official_reference(name):
    """Real A, grouped B and C, D, z, softplus with a bias, the last state, and gradients. Observed error up to 1e-15."""
    f = load(name)
    leaves = {key: f[key].clone().requires_grad_() for key in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")}
    main = [leaves[key] for key in ("x", "dt", "A", "B", "C")]
    y, h = selective_scan(*main, skip=leaves["D"], z=leaves["z"], dt_bias=leaves["dt_bias"], chunk_size=16)
    close(y, f["out"], 1e-10)
    close(h, f["state"], 1e-10)
    loss = (y * f["grad_out"]).sum() + (h * f["grad_state"]).sum()
    for key, found in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        close(found, f[f"grad_{key}"], 1e-10)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_seven_operations_are_counted_for_each_state_and_token_and_three_times_as_many_for_the_gradient(backend):
    if backend == "native" and NATIVE.missing is not None:
        pytest.skip(NATIVE.missing)
    given = sample(64, dtype=torch.float32)
    once = 7 * 2 * 64 * 6 * 4
    with torch.no_grad(), flop_counter() as counter:
        selective_scan(*given, backend=backend)
    assert counter.get_total_flops() == once
    with flop_counter() as counter:
        selective_scan(*(t.requires_grad_() for t in given), backend=backend)[0].sum().backward()
    assert counter.get_total_flops() == pytest.approx(4 * once, rel=0.1)
