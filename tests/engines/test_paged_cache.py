"""Attention to a paged cache equals attention to the same tokens in one tensor."""

import pytest
import torch

from regard.backends.native import library
from regard.contract import Unsupported
from regard.engines.attention import Ranks, Visibility, attention
from regard.engines.paged_cache import PagedCache, paged_attention

native = pytest.param("native", marks=pytest.mark.skipif(library.why_missing() is not None, reason="no native library"))
BACKENDS = [native, "torch"]


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def expected(rows, q, **options):
    """Each row's tokens in one tensor, in float64."""
    found = []
    for (k, v), x in zip(rows, q.double(), strict=True):
        n, m = x.shape[1], k.shape[1]
        where = Ranks(torch.arange(m - n, m)[None], torch.arange(m)[None], m - n, m - n, True)
        visibility = Visibility(causal=options.get("causal", True), left=options.get("window"))
        output, _, lse = attention(
            x[None],
            k[None].double(),
            v[None].double(),
            where,
            visibility=visibility,
            scale=options.get("scale", x.shape[-1] ** -0.5),
            softcap=options.get("softcap"),
            sink=options.get("sink"),
            want_lse=True,
        )
        found.append((output[0], lse[0]))
    return torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])


def filled(lengths, page_size, pages=64, width=24, value_width=20, dtype=torch.float32):
    """A cache that grew in several ragged appends, with pages in mixed order, and its rows' tokens."""
    cache = PagedCache(len(lengths), 2, width, value_width, pages=pages, page_size=page_size, dtype=dtype)
    cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)  # what was never written is never read
    rows = [(random(2, m, width, dtype=dtype), random(2, m, value_width, dtype=dtype)) for m in lengths]
    done = torch.zeros(len(lengths), dtype=torch.int64)
    while bool((done < torch.tensor(lengths)).any()):
        new = torch.minimum(torch.randint(0, 40, done.shape), torch.tensor(lengths) - done)
        n = int(new.max())
        k, v = random(len(lengths), 2, n, width), random(len(lengths), 2, n, value_width)
        for b, (start, count) in enumerate(zip(done.tolist(), new.tolist(), strict=True)):
            k[b, :, :count] = rows[b][0][:, start : start + count]
            v[b, :, :count] = rows[b][1][:, start : start + count]
        cache.append(k.to(dtype), v.to(dtype), new)
        done = done + new
    return cache, rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [1, 16, 24, 64, 100])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"window": 9}, {"window": 0, "scale": 1.5}, {"softcap": 2.0}, {"sink": True}],
    ids=str,
)
def test_equals_attention_to_one_tensor(backend, page_size, options):
    options = options | ({"sink": torch.randn(6)} if "sink" in options else {})
    lengths = [70, 5, 131]
    cache, rows = filled(lengths, page_size, pages=300 if page_size < 16 else 64)
    for n in (1, 4):
        q = random(3, 6, n, 24)
        output, lse = paged_attention(q, cache, backend=backend, want_lse=True, **options)
        wanted, wanted_lse = expected(rows, q, **options)
        assert (output - wanted).abs().max() <= 2e-6 * wanted.abs().max()
        assert (lse - wanted_lse).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    cache, rows = filled([70, 33], 16, dtype=torch.bfloat16)
    q = random(2, 4, 1, 24, dtype=torch.bfloat16)
    output = paged_attention(q, cache, backend=backend)
    wanted, _ = expected(rows, q)
    assert output.dtype == torch.bfloat16
    assert (output - wanted).abs().max() <= 4e-3 * wanted.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_are_reused_after_reset(backend):
    cache, rows = filled([100, 60], 16, pages=12)  # 7 + 4 pages
    k, v = random(2, 2, 40, 24), random(2, 2, 40, 20)
    with pytest.raises(Unsupported, match="more pages"):
        cache.append(k, v)
    assert cache.lengths.tolist() == [100, 60] and len(cache.free) == 1
    cache.reset(torch.tensor([True, False]))
    assert cache.lengths.tolist() == [0, 60] and len(cache.free) == 8
    cache.append(k, v, torch.tensor([40, 8]))
    rows = [
        (k[0], v[0]),
        (torch.cat([rows[1][0], k[1, :, :8]], 1), torch.cat([rows[1][1], v[1, :, :8]], 1)),
    ]
    q = random(2, 4, 2, 24)
    wanted, _ = expected(rows, q)
    assert (paged_attention(q, cache, backend=backend) - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    held = cache.table[cache.table >= 0].tolist() + cache.free
    assert sorted(held) == list(range(12))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_before_the_first_token_of_their_row_give_zero(backend, causal):
    cache, rows = filled([2, 9], 4)
    q = random(2, 4, 5, 24)
    output, lse = paged_attention(q, cache, causal=causal, want_lse=True, backend=backend)
    assert (output[0, :, :3] == 0).all() and (lse[0, :, :3] == -torch.inf).all()
    for row, first in ((0, 3), (1, 0)):
        alone = expected(rows[row : row + 1], q[row : row + 1, :, first:], causal=causal)[0]
        torch.testing.assert_close(output[row, :, first:].double(), alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_tokens_give_zero(backend):
    cache, _ = filled([0, 3], 16)
    output, lse = paged_attention(random(2, 2, 5, 24), cache, backend=backend, want_lse=True)
    assert output[0].eq(0).all() and lse[0].eq(-torch.inf).all()
    assert output[1, :, :2].eq(0).all() and output[1, :, 2:].ne(0).all()


def test_gradients_and_prompts_take_gathered_pages():
    cache, rows = filled([70, 41], 16)
    q = random(2, 2, 1, 24).requires_grad_()
    paged_attention(q, cache).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    with pytest.raises(Unsupported, match=r"no gradient|not built|off"):
        paged_attention(q, cache, backend="native")
    q = random(2, 2, 30, 24)
    wanted, _ = expected(rows, q)
    assert (paged_attention(q, cache) - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_bad_calls_are_refused():
    cache, _ = filled([3, 3], 16)
    k, v = random(2, 2, 4, 24), random(2, 2, 4, 20)
    for arguments in ((k[:1], v[:1]), (k, v[..., :3]), (k, v, torch.tensor([5, 0])), (k, v, torch.tensor([1]))):
        with pytest.raises(Unsupported):
            cache.append(*arguments)
    for q in (random(2, 3, 1, 24), random(1, 2, 1, 24), random(2, 2, 1, 20)):
        with pytest.raises(Unsupported):
            paged_attention(q, cache)
    with pytest.raises(Unsupported):
        paged_attention(random(2, 2, 1, 24), cache, softcap=0.0)
    with pytest.raises(Unsupported):
        PagedCache(0, 2, 8, pages=4)
