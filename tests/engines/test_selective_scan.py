"""The selective scan: what it computes, its state, its numerical safety, and parity with the official definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regard.contract import Unsupported
from regard.engines.selective_scan import selective_read, selective_scan, selective_scan_reference
from regard.engines.selective_scan.torch_form import STRIDE

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


def sample(n=37, *, batch=2, channels=6, groups=2, states=4, dtype=torch.float64):
    """x, dt, a, b, c."""
    x, dt = (torch.randn(batch, n, channels, dtype=torch.float64) for _ in range(2))
    a = -torch.rand(channels, states, dtype=torch.float64) * 8
    b, c = (torch.randn(batch, n, groups, states, dtype=torch.float64) for _ in range(2))
    return tuple(t.to(dtype) for t in (x, F.softplus(dt - 1), a, b, c))


def surroundings(n=37, *, batch=2, channels=6, dtype=torch.float64):
    return {
        "skip": torch.randn(channels, dtype=torch.float64).to(dtype),
        "dt_bias": torch.randn(channels, dtype=torch.float64).to(dtype) - 1,
        "z": torch.randn(batch, n, channels, dtype=torch.float64).to(dtype),
        "state": torch.randn(batch, channels, 4, dtype=torch.float64).to(dtype),
    }


def close(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).detach().abs().max()) <= tolerance * float(expected.detach().abs().max())


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("n", [1, 2, STRIDE - 1, STRIDE, STRIDE + 1, 37, 64, 65])
def test_chunks_of_any_size_equal_the_recurrence(n, inclusive):
    x = sample(n)
    y, h = selective_scan_reference(*x, inclusive=inclusive)
    for size in (1, 3, STRIDE, 16, 64):
        found, last = selective_scan(*x, chunk_size=size, inclusive=inclusive)
        assert float((found - y).abs().max()) <= 1e-13 * float(h.abs().max())
        close(last, h)


def test_an_associative_scan_by_doubling_distances_equals_the_engine():
    """Pairs (a, b) of h -> a h + b, merged as (a2, b2) o (a1, b1) = (a1 a2, a2 b1 + b2)."""
    x, dt, a, b, c = sample(29)
    b_, c_ = (t.repeat_interleave(3, 2) for t in (b, c))
    keep, h = (dt[..., None] * a).exp(), (dt * x)[..., None] * b_
    distance = 1
    while distance < 29:
        earlier = slice(None, -distance)
        h = torch.cat([h[:, :distance], keep[:, distance:] * h[:, earlier] + h[:, distance:]], 1)
        keep = torch.cat([keep[:, :distance], keep[:, distance:] * keep[:, earlier]], 1)
        distance *= 2
    y, last = selective_scan(x, dt, a, b, c, chunk_size=8)
    close(y, (h * c_).sum(-1))
    close(last, h[:, -1])


def test_softplus_skip_and_gate_surround_the_recurrence_in_this_order():
    x, dt, a, b, c = sample()
    options = surroundings()
    y, h = selective_scan_reference(x, F.softplus(dt + options["dt_bias"]), a, b, c, state=options["state"])
    found, last = selective_scan(x, dt, a, b, c, **options)
    close(found, (y + options["skip"] * x) * F.silu(options["z"]))
    close(last, h)
    assert (selective_scan(x, dt, a, b, c)[0] - y).abs().max() > 1e-2


def test_split_anywhere_and_resumed_equals_whole():
    x, dt, a, b, c = sample()
    whole, last = selective_scan(x, dt, a, b, c, chunk_size=16)
    for borders in ((0, 1), (5, 5, 20), (16, 36)):
        outputs, state = [], None
        for start, stop in zip((0, *borders), (*borders, 37), strict=True):
            part = slice(start, stop)
            y, state = selective_scan(x[:, part], dt[:, part], a, b[:, part], c[:, part], state=state, chunk_size=16)
            outputs.append(y)
        close(torch.cat(outputs, 1), whole)
        close(state, last)


def test_tokens_beyond_a_rows_length_neither_decay_nor_write_and_give_zero():
    """Even where softplus(dt_bias) is a step and the padding holds numbers."""
    x, dt, a, b, c = sample(batch=3)
    options = surroundings(batch=3)
    lengths = torch.tensor([37, 0, 11])
    y, h = selective_scan(x, dt, a, b, c, **options, lengths=lengths, chunk_size=4)
    assert torch.equal(h[1], options["state"][1])
    for row, length in enumerate(lengths.tolist()):
        own = {n: options[n][row : row + 1] for n in ("state", "z")}
        own["z"] = own["z"][:, :length]
        alone = [t[row : row + 1, :length] for t in (x, dt, b, c)]
        expected, last = selective_scan(
            *alone[:2], a, *alone[2:], **own, skip=options["skip"], dt_bias=options["dt_bias"]
        )
        assert (y[row, length:] == 0).all()
        close(h[row], last[0])
        if length:
            close(y[row, :length], expected[0])


def test_groups_serve_consecutive_channels():
    x, dt, a, b, c = sample(channels=6, groups=3)
    whole = selective_scan(x, dt, a, b, c)[0]
    for channel in range(6):
        one, group = slice(channel, channel + 1), slice(channel // 2, channel // 2 + 1)
        close(whole[..., one], selective_scan(x[..., one], dt[..., one], a[one], b[:, :, group], c[:, :, group])[0])


@pytest.mark.parametrize("n", [5, 37])
def test_without_readers_only_the_state_is_computed_and_it_can_be_read_later(n):
    x, dt, a, b, c = sample(n)
    y, h = selective_scan(x, dt, a, b, c)
    nothing, state = selective_scan(x, dt, a, b, None)
    assert nothing is None
    close(state, h)
    close(selective_read(state, c[:, -1:]), y[:, -1:])
    assert selective_read(state, c[:, :0]).shape == (2, 0, 6)


def test_the_step_is_exact_for_the_decay_and_euler_for_the_write():
    """Exact zero-order hold would write (exp(dt A) - 1) / A instead of dt."""
    x, dt, a, b, c = sample(1)
    _, h = selective_scan(x, dt, a, b, c)
    close(h, (dt * x)[:, 0, :, None] * b[:, 0].repeat_interleave(3, 1))
    state = torch.randn_like(h)
    close(selective_scan(x * 0, dt, a, b, c, state=state)[1], (dt[:, 0, :, None] * a).exp() * state)


def test_a_zero_step_freezes_the_state_and_a_long_one_forgets_it():
    x, dt, a, b, c = sample(1)
    state = torch.randn(2, 6, 4, dtype=torch.float64)
    y, frozen = selective_scan(x, 0 * dt, a, b, c, state=state)
    assert torch.equal(frozen, state)
    close(y, selective_read(state, c))
    dt = torch.full_like(dt, 1e6)
    _, forgot = selective_scan(x, dt, a - 0.1, b, c, state=state)
    close(forgot, selective_scan(x, dt, a - 0.1, b, c)[1])


@pytest.mark.parametrize("inclusive", [True, False])
def test_gradients_equal_numerical_ones(inclusive):
    x = sample(5, batch=1, channels=2, groups=1, states=2)
    state = torch.randn(1, 2, 2, dtype=torch.float64)
    more = [state, *(t for n, t in surroundings(5, batch=1, channels=2).items() if n != "state")]

    def run(x, dt, a, b, c, state, skip, dt_bias, z):
        options = {"state": state, "skip": skip, "dt_bias": dt_bias, "z": z, "inclusive": inclusive}
        return selective_scan(x, dt, a, b, c, **options, chunk_size=2)

    leaves = [t.requires_grad_() for t in (*x, *more)]
    assert torch.autograd.gradcheck(run, leaves)
    if inclusive:
        assert torch.autograd.gradgradcheck(run, leaves)


def test_gradients_of_padded_rows_do_not_reach_the_padding():
    x, dt, a, b, c = (t.requires_grad_() for t in sample())
    y, h = selective_scan(x, dt, a, b, c, lengths=torch.tensor([37, 9]), dt_bias=torch.zeros(6).double())
    (y.sum() + h.square().sum()).backward()
    for t in (x, dt, b, c):
        assert (t.grad[1, 9:] == 0).all()
        assert t.grad[1, :9].abs().max() > 0


def test_strong_decays_stay_finite_and_accurate_with_finite_gradients():
    """A difference of cumulative sums would lose all digits here, or overflow."""
    x, dt, a, b, c = sample(130, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, dt * 100, a * 100, b, c)]
    y, _ = selective_scan(*leaves)
    expected, _ = selective_scan_reference(*(t.detach().double() for t in leaves))
    assert float((y.detach() - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
    for gradient in torch.autograd.grad(y.square().sum(), leaves):
        assert gradient.isfinite().all()


def test_long_sequences_without_decay_keep_their_precision():
    x, dt, a, b, c = sample(1000, batch=1, dtype=torch.float32)
    y, _ = selective_scan(x, dt, a * 1e-5, b, c)
    expected, _ = selective_scan_reference(*(t.double() for t in (x, dt, a * 1e-5, b, c)))
    assert float((y - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


def test_backward_keeps_the_inputs_and_a_state_for_each_chunk_only():
    x, dt, a, b, c = (t.requires_grad_() for t in sample(128, batch=1, channels=8, groups=1, states=32))
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 8
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selective_scan(x, dt, a, b, c, chunk_size=32)
    inputs = sum(t.numel() for t in (x, dt, a, b, c))
    states = 128 // 32 * 8 * 32
    assert sum(kept.values()) <= inputs + states < 128 * 8 * 32


def test_compiled_with_gradients_equals_eager():
    x = [t.requires_grad_() for t in sample(20)]
    lengths = torch.tensor([20, 7])

    def run(*x):
        return selective_scan(*x, lengths=lengths, chunk_size=8)[0]

    torch.compiler.reset()
    y, found = run(*x), torch.compile(run, fullgraph=True, backend="aot_eager")(*x)
    close(found, y)
    for one, two in zip(torch.autograd.grad(found.sum(), x), torch.autograd.grad(y.sum(), x), strict=True):
        close(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype):
    x = sample(70, dtype=dtype)
    y, h = selective_scan(*x, z=x[0])
    assert (y.dtype, h.dtype) == (dtype, torch.float32)
    wide, last = selective_scan(*(t.double() for t in x), z=x[0].double())
    assert float((y.double() - wide).abs().max()) <= 4e-3 * float(wide.abs().max())
    assert float((h.double() - last).abs().max()) <= 2e-6 * float(last.abs().max())


def test_autocast_does_not_reach_in():
    x = sample(70, dtype=torch.float32)
    y, h = selective_scan(*x)
    read = selective_read(h, x[4])
    with torch.autocast("cpu", torch.bfloat16):
        found, last = selective_scan(*x)
        assert torch.equal(selective_read(h, x[4]), read)
    assert torch.equal(found, y)
    assert torch.equal(last, h)


def test_no_tokens_give_no_output_and_keep_the_state():
    x, dt, a, b, c = sample(0)
    state = torch.randn(2, 6, 4, dtype=torch.float64)
    y, h = selective_scan(x, dt, a, b, c, state=state)
    assert y.shape == (2, 0, 6)
    assert torch.equal(h, state)
    assert (selective_scan(x, dt, a, b, c)[1] == 0).all()


def test_what_cannot_be_honoured_is_refused():
    x, dt, a, b, c = sample()
    with pytest.raises(Unsupported, match="chunk_size=0"):
        selective_scan(x, dt, a, b, c, chunk_size=0)
    with pytest.raises(Unsupported, match="groups"):
        selective_scan(x[..., :5], dt[..., :5], a[:5], b, c)
    with pytest.raises(Unsupported, match="backend"):
        selective_scan(x, dt, a, b, c, backend="none")


def test_a_length_beyond_the_tokens_counts_all_of_them():
    inputs = sample()
    n = inputs[0].shape[1]
    found = selective_scan(*inputs, lengths=torch.tensor([n + 1, 1]))
    expected = selective_scan(*inputs, lengths=torch.tensor([n, 1]))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["mamba_scan", "mamba_scan_strong_decay"])
def test_parity_with_the_official_reference(name):
    """Real A, groups of B and C, D, z, softplus with a bias, and the last state; with gradients."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        f = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    leaves = {key: f[key].clone().requires_grad_() for key in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")}
    main = [leaves[key] for key in ("x", "dt", "A", "B", "C")]
    y, h = selective_scan(*main, skip=leaves["D"], z=leaves["z"], dt_bias=leaves["dt_bias"], chunk_size=16)
    close(y, f["out"], 1e-10)  # observed up to 3e-16
    close(h, f["state"], 1e-10)  # observed up to 3e-16
    loss = (y * f["grad_out"]).sum() + (h * f["grad_state"]).sum()
    for key, found in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        close(found, f[f"grad_{key}"], 1e-10)  # observed up to 1e-15
