"""Attention to the pages that may hold a token's largest scores: the definition, the backends, and refusals."""

from __future__ import annotations

import pytest
import torch

from regard import Unsupported, watch_backends
from regard.backends import prefers_native
from regard.engines.quest_attention import page_bounds, quest_attention


def case(dtype=torch.float64, batch=2, heads=6, groups=3, slots=48, page=8):
    """A query token and a cache whose heads hold different counts of keys; everything beyond them is NaN."""
    q, k = torch.randn(batch, heads, 1, 7, dtype=dtype), torch.randn(batch, groups, slots, 7, dtype=dtype)
    v, counts = torch.randn(batch, groups, slots, 5, dtype=dtype), torch.randint(1, slots + 1, (batch, groups))
    counts[0] = torch.tensor([0, slots, slots - page - 3])
    pages = k.unflatten(2, (slots // page, page))
    low, high = pages.amin(3), pages.amax(3)
    beyond = torch.arange(slots) >= counts[..., None]
    whole = (torch.arange(slots // page) + 1) * page <= counts[..., None]
    for x in (k, v):
        x.masked_fill_(beyond[..., None], torch.nan)
    for x in (low, high):
        x.masked_fill_(~whole[..., None], torch.nan)
    return q, k, v, low, high, counts


def by_loops(q, k, v, low, high, counts, page, chosen, shared, scale):
    """The definition, one head at a time."""
    batch, heads = q.shape[:2]
    groups = k.shape[1]
    each = heads // groups
    output = torch.zeros(batch, heads, 1, v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            g, count = h // each, int(counts[b, h // each])
            if not count:
                continue
            newest = (count - 1) // page

            def bound(head, p, b=b, g=g):
                pairs = zip(q[b, head, 0].tolist(), low[b, g, p].tolist(), high[b, g, p].tolist(), strict=True)
                return sum(max(x * least, x * most) for x, least, most in pairs)

            together = range(g * each, (g + 1) * each) if shared else [h]
            worth = {p: sum(bound(head, p) for head in together) for p in range(newest)}
            read = [*sorted(worth, key=worth.get, reverse=True)[:chosen], newest]
            keys = [j for j in range(count) if j // page in read]
            output[b, h, 0] = (scale * k[b, g, keys] @ q[b, h, 0]).softmax(0) @ v[b, g, keys]
    return output


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("chosen", [0, 2, 9])
def test_a_token_reads_the_pages_of_the_largest_bounds_and_the_newest(shared, chosen):
    given = case()
    expected = by_loops(*given, 8, chosen, shared, 0.4)
    options = {"page": 8, "chosen": chosen, "shared": shared, "scale": 0.4}
    assert (quest_attention(*given, **options) - expected).abs().max() < 1e-12
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        narrow = [x.to(dtype) for x in given[:5]]
        if dtype == torch.bfloat16:  # rounding may change the choice
            expected = by_loops(*(x.double() for x in narrow), given[5], 8, chosen, shared, 0.4)
        for backend in ("torch", "native") if prefers_native() else ("torch",):
            found = quest_attention(*narrow, given[5], backend=backend, **options)
            assert found.dtype == dtype and (found.double() - expected).abs().max() < tolerance


def test_bounds_are_never_below_a_score_and_equal_it_for_single_keys():
    q, k, *_ = case()
    k = torch.randn_like(k)
    pages = k.unflatten(2, (6, 8))
    scores = (q[:, :, 0].unflatten(1, (3, 2)) @ k.mT).unflatten(-1, (6, 8))
    assert (page_bounds(q, pages.amin(3), pages.amax(3)) >= scores.amax(-1) - 1e-12).all()
    assert torch.allclose(page_bounds(q, k, k), scores.flatten(-2))


def test_gradients_are_those_of_the_pages_that_were_read():
    q, k, v, low, high, counts = case(batch=1)
    k, v = k.nan_to_num(), v.nan_to_num()
    options = {"page": 8, "chosen": 2, "scale": 0.4}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: quest_attention(*x, low, high, counts, **options), leaves)
    single = [x.float().requires_grad_() for x in (q, k, v)]
    with watch_backends() as ran:
        quest_attention(*single, low.float(), high.float(), counts, **options).sum().backward()
    assert ran.backends == {"torch"} and all(x.grad.isfinite().all() for x in single)


def test_a_program_is_whole_and_equal():
    given = [x.float() for x in case()[:5]]
    counts = torch.full((2, 3), 41)
    options = {"page": 8, "chosen": 2, "scale": 0.4}
    program = torch.compile(lambda *x: quest_attention(*x, **options), fullgraph=True, backend="aot_eager")
    given = [x.nan_to_num() for x in given]
    with torch.no_grad():
        assert torch.allclose(program(*given, counts), quest_attention(*given, counts, **options), atol=1e-6)


def test_tensors_that_do_not_fit_are_refused():
    q, k, v, low, high, counts = good = case()
    options = {"page": 8, "chosen": 2, "scale": 0.4}
    for wrong in (
        (q.expand(2, 6, 2, 7), *good[1:]),
        (q[:, :4], *good[1:]),
        (q, k[:, :, :40], *good[2:]),
        (q, k, v, low[:, :, :5], high, counts),
        (q, k, v, low, high, counts.int()),
        (q, k, v, low, high, counts[:1]),
    ):
        with pytest.raises(Unsupported):
            quest_attention(*wrong, **options)
    for changed in ({"page": 0}, {"page": 7}, {"chosen": -1}):
        with pytest.raises(Unsupported):
            quest_attention(*good, **options | changed)
