"""The result is softmax attention however the work is divided, and the lean schedule divides it evenly."""

from __future__ import annotations

import random

import pytest
import torch
from support import close, close_gradients, refused
from torch.nn import functional as F

from regard.backends.native import library
from regard.engines.lean_attention import SCHEMES, Units, lean_attention, make_schedule, makespans, worker_count
from regard.engines.lean_attention.schedule import choose_splits, lean_schedule
from regard.engines.merging import finish, merge_states

native = pytest.param("native", marks=pytest.mark.skipif(library.why_missing() is not None, reason="no native library"))


def problem(lengths, *, heads=6, kv_heads=2, n=1, width=8, value_width=5, dtype=torch.float64):
    shape = (len(lengths), kv_heads, max(lengths, default=0))
    q = torch.randn(len(lengths), heads, n, width, dtype=dtype)
    return q, torch.randn(*shape, width, dtype=dtype), torch.randn(*shape, value_width, dtype=dtype)


def expected(q, k, v, lengths, *, causal=False, mask=None):
    """Outputs of each request alone by PyTorch (0 for a query that sees nothing), and log-sum-exps by their definition."""
    outputs, lses = [], []
    for b, length in enumerate(lengths):
        n, groups = q.shape[2], q.shape[1] // k.shape[1]
        keys, values = (x[b, :, :length].repeat_interleave(groups, 0) for x in (k, v))
        seen = torch.ones(n, length, dtype=torch.bool)
        if causal:
            seen = torch.arange(length) <= torch.arange(length - n, length)[:, None]
        if mask is not None:
            seen = seen & mask[b, :length]
        scores = (q[b] @ keys.mT * q.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
        blind = ~seen.any(-1)
        output = F.scaled_dot_product_attention(q[b], keys, values, seen | blind[:, None])
        outputs.append(output.masked_fill(blind[:, None], 0) if length else torch.zeros_like(output))
        lses.append(scores.logsumexp(-1))
    return torch.stack(outputs), torch.stack(lses)


def near(found, wanted, tolerance=1e-12):
    output, lse = found
    close(output, wanted[0], tolerance)
    hidden = wanted[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, hidden)
    close(lse.masked_fill(hidden, 0), wanted[1].masked_fill(hidden, 0), tolerance)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", ["loop", "threads"])
def test_any_division_of_ragged_decoding_is_softmax_attention(scheme, backend):
    lengths = [13, 1, 64, 0, 30]
    q, k, v = problem(lengths)
    k[:, :, 40:] = torch.where(
        torch.arange(5)[:, None, None, None] == 2, k[:, :, 40:], torch.nan
    )  # padding is not read
    total = sum(Units(tuple(lengths), 2, 1, 4, 1).counts)
    for workers in (1, 2, 5, 7, total, total + 9):
        found = lean_attention(q, k, v, lengths, scheme=scheme, workers=workers, tile=4, backend=backend, want_lse=True)
        near(found, expected(q, k.nan_to_num(), v, lengths))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_prefill_in_blocks_of_queries_is_softmax_attention(causal, rows):
    lengths = [17, 9, 4, 0]  # the third request has fewer keys than queries
    q, k, v = problem(lengths, n=7)
    mask = torch.rand(4, 17) < 0.7
    for workers in (1, 3, 8):
        for given in (None, mask):
            found = lean_attention(
                q, k, v, lengths, workers=workers, tile=2, rows=rows, causal=causal, mask=given, want_lse=True
            )
            near(found, expected(q, k, v, lengths, causal=causal, mask=given))


@pytest.mark.parametrize("backend", ["loop", native])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_pages_are_read_in_their_order(scheme, backend):
    lengths, size = [70, 5, 33], 8
    q, k, v = problem(lengths, width=24, dtype=torch.float32, n=2)
    table = torch.randperm(40)[:27].view(3, 9)
    pools = [torch.full((40, 2, size, x.shape[3]), torch.nan) for x in (k, v)]
    for pool, x in zip(pools, (k, v), strict=True):
        for b, length in enumerate(lengths):
            for at in range(length):
                pool[table[b, at // size], :, at % size] = x[b, :, at]
    for workers in (1, 3, 5):
        options = {"scheme": scheme, "workers": workers, "tile": 16, "causal": True, "want_lse": True}
        found = lean_attention(q, *pools, lengths, pages=table, backend=backend, **options)
        wanted = [x.float() for x in expected(*(x.double() for x in (q, k, v)), lengths, causal=True)]
        near(found, wanted, 2e-6)


@pytest.mark.skipif(library.why_missing() is not None, reason="no native library")
def test_the_native_kernel_answers_parts_and_refuses_what_it_lacks():
    lengths = [64, 3, 40]
    q, k, v = problem(lengths, width=16, dtype=torch.float32)
    for scheme in SCHEMES:
        found = lean_attention(q, k, v, lengths, scheme=scheme, workers=4, tile=16, backend="native", want_lse=True)
        near(found, [x.float() for x in expected(*(x.double() for x in (q, k, v)), lengths)], 2e-6)
    refused("float32", lean_attention, *(x.double() for x in (q, k, v)), backend="native")
    refused("whole pages", lean_attention, q, k, v, tile=24, backend="native")
    refused("no mask", lean_attention, q, k, v, mask=torch.ones(3, 64, dtype=torch.bool), tile=16, backend="native")
    refused("no gradient", lean_attention, q.requires_grad_(), k, v, tile=16, backend="native")


def test_gradients_are_those_of_softmax_attention():
    lengths = [9, 20]
    leaves = [x.requires_grad_() for x in problem(lengths)]
    wanted = expected(*leaves, lengths)
    for backend in ("loop", "threads"):
        found = lean_attention(*leaves, lengths, workers=3, tile=4, backend=backend, want_lse=True)
        for one, other in zip(found, wanted, strict=True):
            close_gradients(one, other, leaves)


def test_large_scores_stay_finite_and_a_constant_added_to_all_changes_no_output():
    q, k, v = problem([50], dtype=torch.float32)
    found, lse = lean_attention(q, 1e4 * k, v, workers=3, tile=4, want_lse=True)
    assert found.isfinite().all() and lse.isfinite().all()
    moved, more = (torch.cat([x, torch.full_like(x[..., :1], 3.0)], -1).double() for x in (q, k))
    scale = 8**-0.5
    plain = lean_attention(q.double(), k.double(), v.double(), workers=3, tile=4, scale=scale)
    close(lean_attention(moved, more, v.double(), workers=3, tile=4, scale=scale), plain)


def test_empty_batches_queries_and_requests_give_nothing():
    for batch, n in ((0, 1), (2, 0)):
        q, k, v = torch.randn(batch, 4, n, 8), torch.randn(batch, 2, 5, 8), torch.randn(batch, 2, 5, 3)
        output, lse = lean_attention(q, k, v, want_lse=True)
        assert output.shape == (batch, 4, n, 3) and lse.shape == (batch, 4, n)


def state_of(scores, values):
    if not len(scores):
        return torch.tensor(-torch.inf).double(), torch.tensor(0.0).double(), torch.zeros(values.shape[1]).double()
    m = scores.max()
    return m, (scores - m).exp().sum(), (scores - m).exp() @ values


def test_states_merge_in_any_order_and_grouping():
    draws = random.Random(torch.initial_seed())
    for _ in range(50):
        n = draws.randint(1, 12)
        scores, values = 5 * torch.randn(n).double(), torch.randn(n, 3).double()
        names = torch.randint(0, 4, (n,))
        parts = [state_of(scores[names == i], values[names == i]) for i in range(4)]  # some parts are empty
        draws.shuffle(parts)

        def merged(*states):
            return merge_states(*(torch.stack(x) for x in zip(*states, strict=True)))

        output, lse = finish(*merged(*parts))
        close(output, scores.softmax(0) @ values)
        close(lse, scores.logsumexp(0))
        left = merged(merged(merged(parts[0], parts[1]), parts[2]), parts[3])
        right = merged(parts[0], merged(parts[1], merged(parts[2], parts[3])))
        for one, other in zip(left, right, strict=True):
            close(one, other)
        empty = state_of(scores[:0], values[:0])
        assert all(torch.equal(a, b) for a, b in zip(merged(parts[0], empty), parts[0], strict=True))
    output, lse = finish(*empty)
    assert output.tolist() == [0, 0, 0] and lse == -torch.inf


def covered(plan):
    return sorted((part.unit, tile) for parts in plan.workers for part in parts for tile in range(part.first, part.end))


def test_a_thousand_random_schedules_cover_every_tile_once_and_lean_loads_are_even():
    draws = random.Random(torch.initial_seed())
    for _ in range(1000):
        counts = [draws.choice([0, 1, draws.randint(1, 9), draws.randint(1, 60)]) for _ in range(draws.randint(0, 12))]
        workers = draws.randint(1, 20)
        every = [(unit, tile) for unit, count in enumerate(counts) for tile in range(count)]
        for scheme in SCHEMES:
            plan = make_schedule(counts, workers, scheme=scheme)
            assert covered(plan) == every and len(plan.workers) <= max(workers, 1)
            assert all(part.first < part.end for parts in plan.workers for part in parts)
        lean = lean_schedule(counts, workers)
        assert max(lean.loads) - min(lean.loads) <= 1 and lean.makespan == -(-len(every) // len(lean.workers))
        begun = [parts[0].first > 0 for parts in lean.workers if parts]  # units begun by another worker
        assert all(part.first == 0 for parts in lean.workers for part in parts[1:])
        ends = {sum(counts[: i + 1]) for i in range(len(counts))}
        starts = [sum(lean.loads[:i]) for i in range(1, len(lean.workers))]
        assert sum(begun) == sum(start not in ends for start in starts)
        assert lean.makespan <= min(make_schedule(counts, workers, scheme=s).makespan for s in SCHEMES)


def test_one_worker_and_whole_shares_are_the_other_schemes():
    counts = [6] * 4
    assert [len(parts) for parts in lean_schedule(counts, 1).workers] == [4]
    for workers, scheme, splits in ((4, "per_head", None), (2, "per_head", None), (12, "fixed_split", 3)):
        lean = lean_schedule(counts, workers)
        other = make_schedule(counts, workers, scheme=scheme, splits=splits)
        parts = [sorted((p.unit, p.first, p.end) for w in plan.workers for p in w) for plan in (lean, other)]
        assert parts[0] == parts[1] and lean.makespan == other.makespan


@pytest.mark.parametrize(
    ("heads", "tiles", "per_head", "fixed", "lean"),
    [(12, 64, 64, 10, 8), (56, 1024, 1024, 615, 531), (32, 2048, 2048, 683, 607), (112, 256, 512, 512, 266)],
)
def test_makespans_on_an_a100_are_those_of_the_model(heads, tiles, per_head, fixed, lean):
    found = makespans([tiles * 256], kv_heads=heads, workers=108)
    splits = choose_splits(heads, tiles, 108)
    assert (found["per_head"], found["lean"]) == (per_head, lean)
    assert -(-heads * splits // 108) * -(-tiles // splits) == fixed and found["fixed_split"] <= fixed


def test_causal_tiles_are_a_triangle_and_a_block_reaches_its_last_query():
    units = Units((10,), 1, 10, 2, 4, causal=True)
    assert units.counts == (2, 4, 5) and [units.keys(0, block) for block in range(3)] == [4, 8, 10]
    assert Units((3,), 2, 5, 2, 2, causal=True).counts == (0, 1, 2) * 2
    assert [units.at(2), Units((4, 4), 3, 4, 2, 2).at(9)] == [(0, 0, 2), (1, 1, 1)]


def test_workers_are_counted_as_the_authors_do():
    assert worker_count([8] * 4, 108) == 16  # two tiles for each worker
    assert worker_count([1024] * 32, 108) == 216 and worker_count([4000], 10) == 20 and worker_count([4000], 108) == 32
    assert worker_count([], 4) == worker_count([0], 4) == worker_count([1], 4) == 1


def test_calls_that_do_not_fit_are_refused():
    q, k, v = problem([5, 3])
    refused("lean", lean_attention, q, k, v, scheme="leen")
    refused("fixed_split", lean_attention, q, k, v, splits=2)
    refused("0 to 5", lean_attention, q, k, v, [6, 1])
    refused("multiple", lean_attention, q[:, :5], k, v)
    refused("four axes", lean_attention, q[0], k, v)
    refused("booleans", lean_attention, q, k, v, mask=torch.ones(2, 5))
    refused("workers >= 1", lean_attention, q, k, v, workers=0)
