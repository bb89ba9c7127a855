"""Softmax attention of a sequence split over virtual ranks: equal to the whole, with traffic as planned."""

from __future__ import annotations

import pytest
import torch
from support import close_gradients, refused

from regard.contract import PUBLISHED_TOLERANCES
from regard.core.visibility import CountedRanks
from regard.distributed import DistributedAttention, Layout, plan
from regard.engines.attention import Visibility, attention, part_gradients
from regard.functional import softmax_attention

CASES = [
    ("ring", 1, 12, None),
    ("ring", 2, 13, None),
    ("ring", 3, 12, None),
    ("ring", 4, 16, None),
    ("ring", 8, 5, None),
    ("head", 1, 9, None),
    ("head", 2, 13, None),
    ("head", 4, 16, None),
    ("grid", 2, 13, (1, 2)),
    ("grid", 4, 16, (2, 2)),
    ("grid", 6, 23, (3, 2)),
    ("grid", 8, 32, (2, 4)),
    ("gather", 3, 13, None),
    ("gather", 4, 24, None),
]


def tensors(length, heads=8, kv_heads=4, batch=2, width=6, value_width=5, dtype=torch.float64):
    sizes = ((heads, width), (kv_heads, width), (kv_heads, value_width))
    return [torch.randn(batch, h, length, w, dtype=dtype, requires_grad=True) for h, w in sizes]


def whole(q, k, v, causal, scale=None):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True, scale=scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("scheme", "ranks", "length", "grid"), CASES)
def test_pieces_equal_the_whole_with_gradients_and_what_is_sent_is_what_was_planned(
    scheme, ranks, length, grid, causal, monkeypatch
):
    # at most three of the four heads travel around the ring together
    monkeypatch.setattr("regard.distributed.plans.LEAST_ROUND", 3 * 2 * (6 + 5) * 8 * max(length // ranks, 1))
    q, k, v = tensors(length)
    distributed = DistributedAttention(scheme, ranks=ranks, causal=causal, grid=grid)
    close_gradients(distributed(q, k, v), whole(q, k, v, causal), (q, k, v))
    (planned,) = plan(
        length,
        ranks,
        8,
        6,
        batch=2,
        kv_heads=4,
        value_dim=5,
        causal=causal,
        dtype=torch.float64,
        grid=grid,
        schemes=[scheme],
    )
    forward, backward = distributed.forward_traffic, distributed.backward_traffic
    assert sum(t.bytes for t in forward) == planned.forward_bytes
    assert sum(t.bytes for t in backward) == planned.backward_bytes
    assert {t.steps for t in forward} == {planned.forward_steps}
    assert {t.steps for t in backward} == {planned.backward_steps}
    if length % (2 * ranks) == 0:  # equal for all ranks
        assert {t.bytes * ranks for t in forward} == {planned.forward_bytes}
        assert {t.bytes * ranks for t in backward} == {planned.backward_bytes}
    work = [t.scores for t in forward]
    assert max(work) == planned.scores and [t.scores for t in backward] == work
    pairs = length * (length + 1) // 2 if causal else length**2
    assert sum(work) == 2 * 8 * pairs


@pytest.mark.parametrize(("ranks", "length"), [(2, 64), (4, 64), (8, 128)])
def test_closed_forms_are_those_of_the_paper_s_schemes_for_equal_widths(ranks, length):
    d = 8 * 16
    sent = {p.scheme: p.forward_bytes / ranks / 4 for p in plan(length, ranks, 8, 16)}
    assert sent["ring"] == sent["gather"] == 2 * (ranks - 1) / ranks * length * d
    assert sent["head"] == 4 * (ranks - 1) / ranks**2 * length * d


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zig_zag_gives_all_ranks_the_same_causal_work_and_contiguous_pieces_do_not(ranks):
    length = 512
    for scheme in ("ring", "grid"):
        (balanced,) = plan(length, ranks, 1, 8, schemes=[scheme])
        assert balanced.balance < 1.05
    (contiguous,) = plan(length, ranks, 1, 8, schemes=["ring"], zigzag=False)
    assert contiguous.balance == pytest.approx((2 * ranks - 1) / ranks, rel=0.02)
    assert all(p.balance == 1 for p in plan(length, ranks, 8, 8, causal=False))


def test_virtual_ranks_count_work_as_the_plan_does_without_zig_zag():
    q, k, v = tensors(24, heads=1, kv_heads=1)
    distributed = DistributedAttention("ring", ranks=4, zigzag=False)
    close_gradients(distributed(q, k, v), whole(q, k, v, True), (q, k, v))
    work = [t.scores for t in distributed.forward_traffic]
    (planned,) = plan(24, 4, 1, 6, batch=2, schemes=["ring"], zigzag=False)
    assert work == sorted(work) and work[-1] == planned.scores > 6 * work[0]


@pytest.mark.parametrize(("length", "ranks", "zigzag"), [(17, 4, True), (3, 4, True), (16, 4, False), (0, 2, True)])
def test_a_layout_takes_every_token_once_and_joins_them_in_order(length, ranks, zigzag):
    layout, x = Layout(length, ranks, zigzag), torch.randn(2, length, 3)
    pieces = [layout.take(x, r) for r in range(ranks)]
    assert [len(p[0]) for p in pieces] == [layout.size(r) for r in range(ranks)]
    assert torch.equal(layout.join(pieces), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_in_narrow_dtypes_add_no_more_than_the_published_tolerance_to_the_error_of_one_rank(dtype):
    given = tensors(96, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    grad = torch.randn(2, 8, 96, 5).to(dtype)
    output = whole(*exact, True)
    expected = [output, *torch.autograd.grad(output, exact, grad.double())]

    def errors(attend):
        output = attend(*given)
        found = [output, *torch.autograd.grad(output, given, grad)]
        assert {x.dtype for x in found} == {dtype}
        return [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]

    alone = errors(softmax_attention)
    for scheme in ("ring", "grid", "head", "gather"):
        together = errors(DistributedAttention(scheme, ranks=4))
        assert all(a < b + PUBLISHED_TOLERANCES[dtype] for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_by_parts_of_the_keys_add_up_to_those_by_all(dtype):
    q, k, v = tensors(70, dtype=dtype)
    where = CountedRanks(70, 70, 0, True, q.device)
    out, _, lse = attention(q, k, v, where, visibility=Visibility(), scale=0.3, want_lse=True)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))
    parts = [slice(0, 13), slice(13, 70)]
    found = [part_gradients(grad, q, k[:, :, p], v[:, :, p], out, lse, causal=False, scale=0.3) for p in parts]
    dq = sum(part[0] for part in found)
    dk, dv = (torch.cat([part[i] for part in found], 2) for i in (1, 2))
    for one, other in zip((dq, dk, dv), expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=float({torch.float64: 1e-12, torch.float32: 4e-6}[dtype] * other.abs().max())
        )


def test_what_cannot_be_is_refused_in_words():
    q, k, v = tensors(8)
    refused("scheme='rings'", DistributedAttention, "rings", ranks=2)
    refused("not initialised", DistributedAttention, "ring")
    refused("ranks=0", DistributedAttention, "ring", ranks=0)
    refused("3, 1.*for 4 ranks", DistributedAttention, "grid", ranks=4, grid=(3, 1))
    refused("with a grid", DistributedAttention, "ring", ranks=4, grid=(2, 2))
    refused("4 key/value heads on 3 ranks", DistributedAttention("head", ranks=3), q, k, v)
    refused("7 tokens of 8|q \\(2, 8, 7", DistributedAttention("ring", ranks=2), q[:, :, :7], k, v)
    refused("8 tokens of 9", DistributedAttention("ring", ranks=2), q, k, v, length=9)
    refused("float32", DistributedAttention("ring", ranks=2), q.float(), k, v)
    refused("scheme", plan, 8, 2, 2, 8, schemes=["tree"])
    assert "head" not in {p.scheme for p in plan(8, 3, 4, 8)}
