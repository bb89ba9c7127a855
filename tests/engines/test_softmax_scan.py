"""The softmax scan: softmax over prefixes with fixed queries, merging of prefixes, and numerical safety."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from regard.contract import Unsupported
from regard.engines.softmax_scan import Problem, absorb, empty_carry, pairs_form, running_normalizer, softmax_scan


def near(found, expected, relative=0.0):
    torch.testing.assert_close(found, expected, rtol=relative, atol=1e-13)


def sample(n=23, q=3, v=5, *, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(2, 2, n, q)).to(dtype), torch.randn(2, 2, n, v).to(dtype)


def gates(decayed=True, n=23):
    return -torch.rand(2, 1, n, dtype=torch.float64) if decayed else None


def prefixes(s, v, log_decay=None):
    """Softmax over each prefix, computed with the full matrix."""
    n = s.shape[2]
    exponents = s.mT[..., None, :]
    if log_decay is not None:
        total = log_decay.cumsum(-1)
        exponents = exponents + (total[..., :, None] - total[..., None, :])[:, :, None]
    past = torch.ones(n, n, dtype=torch.bool).tril()
    weights = exponents.masked_fill(~past, -torch.inf).softmax(-1)
    return torch.einsum("bhqtj,bhjv->bhtqv", weights, v)


@pytest.mark.parametrize("pairs", [1, 1000, 1 << 22])
@pytest.mark.parametrize("chunk_size", [1, 5, 7, 23, 64])
@pytest.mark.parametrize(("decayed", "scale"), [(False, 300.0), (True, 1.0)])
def test_prefixes_equal_the_masked_softmax_and_decay_multiplies_the_weights_of_earlier_tokens(
    monkeypatch, decayed, scale, chunk_size, pairs
):
    monkeypatch.setattr("regard.engines.softmax_scan.torch_form.PAIRS_AT_ONCE", pairs)
    s, v = sample(scale=scale)
    decay = gates(decayed)
    near(softmax_scan(s, v, log_decay=decay, chunk_size=chunk_size)[0], prefixes(s, v, decay))


def test_skipped_tokens_leave_no_trace_and_an_empty_prefix_gives_zero_with_finite_gradients():
    s, v = (x.requires_grad_() for x in sample(n=6))
    kept = [1, 2, 4, 5]
    skipped = s.index_fill(2, torch.tensor([0, 3]), -torch.inf)
    output, carry = softmax_scan(skipped, v, chunk_size=2)
    assert (output[:, :, 0] == 0).all()
    torch.testing.assert_close(output[:, :, 3], output[:, :, 2], rtol=0, atol=1e-15)
    near(carry, softmax_scan(s[:, :, kept], v[:, :, kept])[1], 1e-13)
    output.sum().backward()
    assert torch.isfinite(s.grad).all() and torch.isfinite(v.grad).all()
    assert s.grad[:, :, 4].abs().max() > 0


def test_gradients_reach_scores_values_and_carry():
    s, v = (x[:1, :1] for x in sample(n=5, q=2, v=2))
    decay, mix = gates(n=5)[:1], torch.randn(1, 1, 5, 2, dtype=torch.float64)

    def whole(s, v, decay, mix):
        _, carry = softmax_scan(s[:, :, :2], v[:, :, :2], log_decay=decay[:, :, :2], chunk_size=2)
        rest = {"log_decay": decay[:, :, 2:], "mix": mix[:, :, 2:], "state": carry}
        return softmax_scan(s[:, :, 2:], v[:, :, 2:], **rest, chunk_size=2)[0]

    assert torch.autograd.gradcheck(whole, [x.requires_grad_() for x in (s, v, decay, mix)])


def one_by_one(p):
    """The recurrence of arXiv 2405.13956, section 3.1, one token at a time."""
    m, u, w = p.carry
    outputs = []
    for t in range(p.s.shape[2]):
        faded = m if p.log_decay is None else m + p.log_decay[:, :, t, None]
        largest = torch.maximum(faded, p.s[:, :, t]).detach()
        shift = largest.masked_fill(largest == -torch.inf, 0.0)
        old, new = (faded - shift).exp(), (p.s[:, :, t] - shift).exp()
        m, u, w = largest, old * u + new, old[..., None] * w + new[..., None] * p.v[:, :, t, None]
        outputs.append(torch.where((u == 0)[..., None], 0, w / torch.where(u == 0, 1, u)[..., None]))
    return torch.stack(outputs, 2), m, u, w


@pytest.mark.parametrize("n", [1, 2, 3, 8, 21])
@pytest.mark.parametrize(("decayed", "scale", "continued"), [(False, 300.0, False), (True, 1.0, True)])
def test_the_scan_in_pairs_equals_the_recurrence_with_gradients(n, decayed, scale, continued):
    s, v = sample(n=n, scale=scale)
    s[:, 1, 0] = -torch.inf  # a skipped token; first there is nothing to see
    carry = absorb(*sample()) if continued else empty_carry(s, v)
    leaves = [x.clone().requires_grad_() for x in (s, v, carry.u, carry.w, *([gates(n=n)] if decayed else []))]
    s, v, u, w, *decay = leaves
    problem = Problem(s, v, decay[0] if decay else None, None, carry.m, u, w)
    expected = one_by_one(problem)
    output, found = pairs_form.run(problem)
    near((output, *found), expected, 1e-12)
    up = torch.randn_like(output), torch.randn_like(found.u), torch.randn_like(found.w)
    one, other = (
        torch.autograd.grad([x for x, _ in pairs], leaves, [y for _, y in pairs])
        for pairs in (list(zip((x[0], x[-2], x[-1]), up, strict=True)) for x in (expected, (output, *found)))
    )
    near(other, one, 1e-12)


@pytest.mark.parametrize(
    ("scores", "options", "in_pairs"),
    [
        ((2, 4, 600, 1), {}, True),
        ((2, 4, 60, 1), {}, False),
        ((2, 4, 600, 1), {"chunk_size": 64}, False),
        ((2, 4, 600, 1), {"mix": torch.ones(2, 4, 600, 1, dtype=torch.float64)}, False),
    ],
)
def test_torch_merges_in_pairs_where_that_is_faster(monkeypatch, scores, options, in_pairs):
    ran = []
    run = pairs_form.run
    monkeypatch.setattr(pairs_form, "run", lambda problem: ran.append(problem) or run(problem))
    s, v = torch.randn(scores, dtype=torch.float64), torch.randn(2, 4, scores[2], 3, dtype=torch.float64)
    found, carry = softmax_scan(s, v, backend="torch", **options)
    assert bool(ran) is in_pairs
    chunked, after = softmax_scan(s, v, backend="torch", **{"chunk_size": 64, **options})
    near((found, *carry), (chunked, *after), 1e-12)


class Operations(TorchDispatchMode):
    """Counts the torch operations that run inside the block."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("chunk_size", "times"), [(4, 2), (None, 3)])
def test_chunks_and_pairs_are_merged_in_few_steps(monkeypatch, chunk_size, times):
    """Thirty-two times as many tokens take at most `times` as many operations."""
    monkeypatch.setattr("regard.engines.softmax_scan.PAIRS_FROM", 1)

    def operations(n):
        with Operations() as seen:
            softmax_scan(*sample(n=n), chunk_size=chunk_size, backend="torch")
        return seen.count

    assert operations(256 * 4) < times * operations(8 * 4)


def test_running_normalizer_is_the_running_log_sum_exp_in_parts():
    s = 400 * torch.randn(2, 3, 19, dtype=torch.float64)
    empty = torch.full((2, 3), -torch.inf, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    m, u = running_normalizer(s[:, :, :8], *empty, chunk_size=3)
    rest = running_normalizer(s[:, :, 8:], m[..., -1], u[..., -1], chunk_size=4)
    found = torch.cat([m + u.log(), rest[0] + rest[1].log()], 2)
    torch.testing.assert_close(found, s.logcumsumexp(-1), rtol=1e-13, atol=0)
    assert running_normalizer(s[:, :, :0], *empty)[0].shape == (2, 3, 0)


def test_a_chunk_of_no_tokens_is_refused():
    with pytest.raises(Unsupported, match="chunk_size=0"):
        softmax_scan(*sample(), chunk_size=0)


def test_autocast_does_not_reach_in():
    s, v = sample(70, dtype=torch.float32)
    mix = torch.rand(2, 2, 70, 3)
    expected, carry = softmax_scan(s, v, mix=mix, chunk_size=16)
    with torch.autocast("cpu", torch.bfloat16):
        found, carry_found = softmax_scan(s, v, mix=mix, chunk_size=16)
        absorbed = absorb(s, v)
    assert torch.equal(found, expected)
    for one, two, other in zip(carry_found, absorbed, carry, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(two, other, rtol=1e-5, atol=1e-5)
