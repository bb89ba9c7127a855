"""Attention to a paged cache equals attention to the same tokens in one tensor."""

import pytest
import torch
from attention_problems import Problem

from regard.apply import apply
from regard.backends.native import library
from regard.contract import Mask, Unsupported
from regard.core.visibility import Ranks, Visibility
from regard.engines.cache import KeyValueState
from regard.engines.paged_cache import PagedCache, PagedState, Rows, paged_attention
from regard.mechanisms.softmax import MECHANISM as SOFTMAX

native = pytest.param("native", marks=pytest.mark.skipif(library.why_missing() is not None, reason="no native library"))
each_backend = pytest.mark.parametrize("backend", [native, "torch"])


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def expected(rows, q, causal=True, window=None, scale=24**-0.5, **options):
    """Output and log-sum-exp of attention to each row's tokens in a single tensor, by the definition in float64."""
    found = []
    for (k, v), x in zip(rows, q, strict=True):
        n, m = x.shape[1], k.shape[1]
        where = Ranks(torch.arange(m - n, m)[None], torch.arange(m)[None], None, None, False)
        problem = Problem(x[None], k[None], v[None], where, Visibility(causal, window), scale, **options)
        found.append([y.detach()[0] for y in problem.leaves(torch.float64)[0].expected()[::2]])
    return [torch.stack(x) for x in zip(*found, strict=True)]


def near(output, wanted, tolerance=2e-6):
    assert (output - wanted).abs().max() <= tolerance * wanted.abs().max()


def filled(lengths, page_size, pages=64, dtype=torch.float32):
    """A cache grown by several ragged appends, with pages in mixed order, and the tokens of its rows."""
    cache = PagedCache(len(lengths), 2, 24, 20, pages=pages, page_size=page_size, dtype=dtype)
    cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)  # unwritten memory must not be read
    rows = [tuple(random(2, m, width, dtype=dtype) for width in (24, 20)) for m in lengths]
    done, all_of = torch.zeros(len(lengths), dtype=torch.int64), torch.tensor(lengths)
    while bool((done < all_of).any()):
        new = torch.minimum(torch.randint(0, 40, done.shape), all_of - done)
        given = [random(len(lengths), 2, int(new.max()), width, dtype=dtype) for width in (24, 20)]
        for b, (start, count) in enumerate(zip(done.tolist(), new.tolist(), strict=True)):
            for x, tokens in zip(given, rows[b], strict=True):
                x[b, :, :count] = tokens[:, start : start + count]
        cache.append(*given, new)
        done = done + new
    return cache, rows


@each_backend
@pytest.mark.parametrize("page_size", [1, 16, 24, 64, 100])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"window": 9}, {"window": 0, "scale": 1.5}, {"softcap": 2.0}, {"sink": True}],
    ids=str,
)
def test_equals_attention_to_one_tensor(backend, page_size, options):
    options = options | ({"sink": torch.randn(6)} if "sink" in options else {})
    cache, rows = filled([70, 5, 131], page_size, pages=300 if page_size < 16 else 64)
    for n in (1, 4):
        q = torch.randn(3, 6, n, 24)
        output, lse = paged_attention(q, cache, backend=backend, want_lse=True, **options)
        wanted, wanted_lse = expected(rows, q, **options)
        near(output, wanted)
        assert (lse - wanted_lse).abs().max() <= 1e-5


@each_backend
def test_pages_are_reused_after_reset(backend):
    cache, rows = filled([100, 60], 16, pages=12)  # 7 + 4 pages
    k, v = torch.randn(2, 2, 40, 24), torch.randn(2, 2, 40, 20)
    with pytest.raises(Unsupported, match="more pages"):
        cache.append(k, v)
    assert cache.lengths.tolist() == [100, 60] and len(cache.free) == 1
    cache.reset(torch.tensor([True, False]))
    assert cache.lengths.tolist() == [0, 60] and len(cache.free) == 8
    cache.append(k, v, torch.tensor([40, 8]))
    rows = [(k[0], v[0]), [torch.cat([x, y[1, :, :8]], 1) for x, y in zip(rows[1], (k, v), strict=True)]]
    q = torch.randn(2, 4, 2, 24)
    near(paged_attention(q, cache, backend=backend), expected(rows, q)[0])
    held = cache.table[cache.table >= 0].tolist() + cache.free
    assert sorted(held) == list(range(12))


@each_backend
@pytest.mark.parametrize("causal", [True, False])
def test_queries_before_the_first_token_of_their_row_give_zero(backend, causal):
    cache, rows = filled([2, 9], 4)
    q = torch.randn(2, 4, 5, 24)
    output, lse = paged_attention(q, cache, causal=causal, want_lse=True, backend=backend)
    assert (output[0, :, :3] == 0).all() and (lse[0, :, :3] == -torch.inf).all()
    for row, first in ((0, 3), (1, 0)):
        alone = expected(rows[row : row + 1], q[row : row + 1, :, first:], causal=causal)[0]
        near(output[row, :, first:], alone[0], 1e-5)
    cache, _ = filled([0, 3], 16)
    output, lse = paged_attention(torch.randn(2, 2, 5, 24), cache, backend=backend, want_lse=True)
    assert output[0].eq(0).all() and lse[0].eq(-torch.inf).all()
    assert output[1, :, :2].eq(0).all() and output[1, :, 2:].ne(0).all()


def test_gradients_and_prompts_take_gathered_pages():
    cache, rows = filled([70, 41], 16)
    q = torch.randn(2, 2, 1, 24).requires_grad_()
    paged_attention(q, cache).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    with pytest.raises(Unsupported, match=r"no gradient|not built|off"):
        paged_attention(q, cache, backend="native")
    q = torch.randn(2, 2, 30, 24)
    near(paged_attention(q, cache), expected(rows, q)[0])


def test_bad_calls_are_refused():
    cache, _ = filled([3, 3], 16)
    k, v, q = torch.randn(2, 2, 4, 24), torch.randn(2, 2, 4, 20), torch.randn(2, 2, 1, 24)
    for arguments in ((k[:1], v[:1]), (k, v[..., :3]), (k, v, torch.tensor([5, 0])), (k, v, torch.tensor([1]))):
        with pytest.raises(Unsupported):
            cache.append(*arguments)
    for bad, options in ((torch.randn(2, 3, 1, 24), {}), (q[:1], {}), (q[..., :20], {}), (q, {"softcap": 0.0})):
        with pytest.raises(Unsupported):
            paged_attention(bad, cache, **options)
    with pytest.raises(Unsupported):
        PagedCache(0, 2, 8, pages=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"window": (5, 0), "softcap": 2.0}], ids=str)
def test_a_state_in_pages_goes_on_as_one_in_a_tensor(dtype, options):
    """In float32 a few tokens are read from their pages, in float64 they are gathered; padding is never written."""
    pools = [torch.full((30, 2, 4, width), torch.nan, dtype=dtype) for width in (24, 20)]
    table = torch.randperm(29)[:27].view(3, 9)
    table = torch.where(torch.arange(9) < torch.tensor([[9], [2], [5]]), table, -1)  # room for 36, 8 and 20 tokens
    counts, length = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    plain = None
    for new in ([20, 3, 1], [1, 1, 1], [0, 2, 3], [1, 1, 1], [14, 1, 14]):
        n, added = max(new), torch.tensor(new)
        inputs = {
            name: random(3, heads, n, width, dtype=dtype)
            for name, heads, width in (("q", 6, 24), ("k", 2, 24), ("v", 2, 20))
        }
        mask = None if min(new) == n else Mask(lengths=added)
        call = {"pattern": "causal-self", "config": SOFTMAX.options(**options), "mask": mask, "return_state": True}
        with torch.no_grad():
            state = PagedState.of(*pools, Rows(table, counts))
            found = apply(SOFTMAX, inputs, state=state, **call).output
            wanted = apply(SOFTMAX, inputs, state=plain, **call)
        near(found, wanted.output, 2e-6)
        plain, counts, length = wanted.state, counts + added, length + added
        assert type(plain) is KeyValueState and torch.equal(plain.length, length)
    untouched = torch.ones(30, 4, dtype=torch.bool)
    for row, count in zip(table.tolist(), counts.tolist(), strict=True):
        for at in range(count):
            untouched[row[at // 4], at % 4] = False
    assert torch.equal(pools[0][:, 0, :, 0].isnan(), untouched)


def test_tokens_without_queries_go_into_their_pages_and_are_read_later():
    pools = torch.zeros(6, 2, 4, 8), torch.zeros(6, 2, 4, 8)
    state = PagedState.of(*pools, Rows(torch.tensor([[3, 0, 5], [1, 4, 2]]), torch.tensor([0, 0])))
    q, k, v = random(2, 4, 5, 8), random(2, 2, 5, 8), random(2, 2, 5, 8)
    call = {"pattern": "causal-self", "return_state": True}
    with torch.no_grad():
        taken = apply(SOFTMAX, {"q": q[:, :, :0], "k": k[:, :, :4], "v": v[:, :, :4]}, state=state, **call)
        assert taken.output.shape == (2, 4, 0, 8) and type(taken.state) is PagedState
        last = {name: x[:, :, 4:] for name, x in (("q", q), ("k", k), ("v", v))}
        found = apply(SOFTMAX, last, state=taken.state, **call).output
        wanted = apply(SOFTMAX, {"q": q, "k": k, "v": v}, **call).output
    near(found, wanted[:, :, 4:])
