"""The kernel for few queries and long caches against the definition in float64."""

import ctypes
import itertools

import pytest
import torch

from regard import backends
from regard.backends.native import library
from regard.contract import Unsupported
from regard.core.visibility import Visibility
from regard.engines.attention import Ranks
from regard.engines.attention import attention as engine
from regard.engines.attention import decode as short_way
from regard.engines.attention import native_form as attention
from regard.engines.attention.paged import attention_decode

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def empty(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype)


def decode(
    q, k, v, queries, keys, visibility=None, scale=None, softcap=0.0, sink=None, bias=None, distance=None, zero=0
):
    """The kernel on keys and values in one tensor, as the attention engine calls it."""
    out = empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    lse = empty(*q.shape[:3])
    limits = attention._limits(visibility or Visibility())
    arguments, kept = attention._arguments(
        q, k, v, queries, keys, 0, limits, None, 0, scale or q.shape[3] ** -0.5, 0, 0.0, softcap, sink, bias, distance,
        zero, [], out, lse,
    )  # fmt: skip
    library.call(attention.AttentionDecode(forward=ctypes.addressof(arguments)))
    del kept
    return out, lse


def definition(
    q, k, v, queries, keys, visibility=None, scale=None, softcap=0.0, sink=None, bias=None, distance=None, zero=0
):
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = (scale or q.shape[3] ** -0.5) * q @ k.mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if distance is not None:
        index = (keys[:, None, :] - queries[:, :, None] + zero).clamp(0, distance.shape[1] - 1)
        scores = scores + distance.double()[:, index].transpose(0, 1)
    visible = (visibility or Visibility()).mask(queries, keys)[:, None]
    scores = torch.where(visible, scores, -torch.inf)
    lse = scores.logsumexp(-1)
    total = lse if sink is None else torch.logaddexp(lse, sink.double()[:, None].expand_as(lse))
    weights = torch.where(scores == -torch.inf, 0, (scores - total[..., None]).exp())
    return weights @ v, lse


def check(q, k, v, *arguments, **options):
    with library.poisoned_workspaces():
        output, lse = decode(q, k, v, *arguments, **options)
    wanted, wanted_lse = definition(q, k, v, *arguments, **options)
    assert output.isfinite().all()
    assert (output - wanted).abs().max() <= TOLERANCES[q.dtype] * max(wanted.abs().max(), 1e-3)
    seen = wanted_lse > -torch.inf
    assert torch.equal(seen, lse > -torch.inf)
    torch.testing.assert_close(lse[seen].double(), wanted_lse[seen], rtol=1e-6, atol=1e-5)
    assert output[~seen].eq(0).all()


def tokens(batch, m, kind):
    """Ranks of keys and the number of them in each row."""
    slots = torch.arange(m).expand(batch, m)
    if kind == "whole":
        return slots, torch.full((batch,), m)
    if kind == "ragged":
        lengths = torch.randint(0, m + 1, (batch,))
        return torch.where(slots < lengths[:, None], slots, -1), lengths
    there = torch.rand(batch, m) < 0.6
    return torch.where(there, there.cumsum(-1) - 1, -1), there.sum(-1)


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def instruction_set(request):
    if request.param not in library.instruction_sets():
        pytest.skip(f"the processor has no {request.param}")
    with library.using_instruction_set(request.param):
        yield request.param


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_every_length_width_and_grouping(instruction_set, threads, dtype):
    lengths, widths = [1, 63, 64, 129, 1031], [(64, 64), (8, 128), (7, 33), (80, 16)]
    shapes = itertools.product([1, 3, 16], lengths)
    for i, (n, m) in enumerate(shapes):
        width, value_width = widths[i % len(widths)]
        kv_heads, groups = [(2, 1), (1, 4), (3, 2), (1, 6)][i // 2 % 4]
        q = random(2, kv_heads * groups, n, width, dtype=dtype)
        k, v = random(2, kv_heads, m, width, dtype=dtype), random(2, kv_heads, m, value_width, dtype=dtype)
        keys, lengths_of_rows = tokens(2, m, ["whole", "ragged", "holes"][i % 3])
        queries = lengths_of_rows[:, None] - n + torch.arange(n)
        check(q, k, v, queries, keys, visibility=Visibility(causal=True))


@pytest.mark.parametrize(
    "visibility",
    [
        Visibility(),
        Visibility(causal=True, left=70),
        Visibility(left=0, right=0),
        Visibility(left=3, right=130),
        Visibility(causal=True, block=16, lookback=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["whole", "ragged", "holes"])
def test_visibility(instruction_set, visibility, kind):
    q, k, v = random(3, 4, 5, 24), random(3, 2, 700, 24), random(3, 2, 700, 24)
    keys, lengths = tokens(3, 700, kind)
    check(q, k, v, lengths[:, None] - torch.tensor([600, 5, 3, 2, 1]), keys, visibility=visibility)


@pytest.mark.parametrize("n", [1, 4])
def test_scores_options(instruction_set, n):
    batch, heads, m = 2, 6, 301
    q, k, v = random(batch, heads, n, 40), random(batch, 2, m, 40), random(batch, 2, m, 40)
    for kind in ("whole", "holes"):
        keys, lengths = tokens(batch, m, kind)
        queries = lengths[:, None] - n + torch.arange(n)
        more = {"visibility": Visibility(causal=True)}
        check(q, k, v, queries, keys, sink=torch.randn(heads), softcap=3.0, **more)
        for shape in ((1, 1, 1, 1), (batch, heads, n, m), (1, heads, 1, m), (batch, 1, n, 1)):
            bias = torch.randn(shape)
            check(q, k, v, queries, keys, bias=bias, **more)
            bias[torch.rand(shape) < 0.2] = -torch.inf
            check(q, k, v, queries, keys, bias=bias, softcap=2.0, **more)
        check(q, k, v, queries, keys, bias=torch.randn(n, m, batch, heads).permute(2, 3, 0, 1), **more)
        for distances in (torch.randn(heads, m + 1), torch.randn(1, m + 1)):
            check(q, k, v, queries, keys, distance=distances, zero=m, **more)


def test_strides_of_any_kind():
    q, k, v = random(2, 1, 64, 4).transpose(1, 3), random(2, 300, 2, 80)[..., 3:67], random(300, 2, 2, 64)
    keys = torch.arange(300)[None]
    q = random(2, 1, 4, 64).transpose(1, 2)
    check(q, k.transpose(1, 2), v.permute(1, 2, 0, 3), torch.tensor([[299]]), keys)


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_scores(instruction_set, size):
    q, k, v = random(1, 2, 2, 16), random(1, 2, 600, 16), random(1, 2, 600, 16)
    q = q * size
    output, lse = decode(q, k, v, torch.tensor([[598, 599]]), torch.arange(600)[None])
    wanted, wanted_lse = definition(q, k, v, torch.tensor([[598, 599]]), torch.arange(600)[None])
    assert (output - wanted).abs().max() <= max(1e-6, 1e-6 * size) * wanted.abs().max()
    assert (lse - wanted_lse).abs().max() <= 1e-6 * wanted_lse.abs().max()


def test_large_scores_lose_nothing_of_their_differences(instruction_set):
    scores = torch.randint(-10_000, 10_000, (700,)).float()
    scores[::50] = scores.max() - torch.arange(14)
    q, k, v = (
        torch.tensor([1.0, 0.0]).view(1, 1, 1, 2),
        torch.stack([scores, scores], 1)[None, None],
        random(1, 1, 700, 8),
    )
    check(q, k, v, torch.tensor([[699]]), torch.arange(700)[None], scale=1.0)


def test_nan_propagates_and_what_no_query_sees_does_not_matter():
    q, k, v = random(1, 1, 2, 16), random(1, 1, 600, 16), random(1, 1, 600, 16)
    keys, causal = torch.arange(600)[None], Visibility(causal=True)
    v[0, 0, 401:], k[0, 0, 401:] = torch.nan, torch.nan
    output, lse = decode(q, k, v, torch.tensor([[398, 400]]), keys, causal)
    assert output.isfinite().all() and lse.isfinite().all()
    k[0, 0, 400, 3] = torch.nan
    output, lse = decode(q, k, v, torch.tensor([[398, 400]]), keys, causal)
    assert output[0, 0, 0].isfinite().all() and lse[0, 0, 0].isfinite()
    assert output[0, 0, 1].isnan().all() and lse[0, 0, 1].isnan()
    v[0, 0, 7, 5] = torch.nan
    assert decode(q, k, v, torch.tensor([[398, 400]]), keys, causal)[0][..., 5].isnan().all()
    q[0, 0, 0, 0] = torch.nan
    assert decode(q, k, v, torch.tensor([[398, 400]]), keys, causal)[0].isnan().all()


def test_any_number_of_threads_is_repeatable():
    q, k, v = random(3, 4, 1, 64), random(3, 2, 900, 64), random(3, 2, 900, 64)
    keys, lengths = tokens(3, 900, "ragged")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7, 40):
            torch.set_num_threads(threads)
            found = [decode(q, k, v, lengths[:, None] - 1, keys)[0] for _ in range(3)]
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
            check(q, k, v, lengths[:, None] - 1, keys)
    finally:
        torch.set_num_threads(before)


def paged(dtype=torch.float32, n=2):
    q = random(2, 4, n, 16, dtype=dtype)
    k, v = random(9, 2, 16, 16, dtype=dtype), random(9, 2, 16, 8, dtype=dtype)
    pages = torch.tensor([[3, 0, 7, 5], [1, 8, -99, 10**12]])  # what a row does not use may be anything
    lengths = torch.tensor([64, 20])
    queries = lengths[:, None] - n + torch.arange(n)
    return q, k, v, pages, lengths, queries, [1, -1, -1, 0, 0, 0], 0.25, 0.0, None


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_paged_op(dtype):
    q, k, v, pages, lengths, queries, *rest = paged(dtype)
    output, lse = attention_decode(q, k, v, pages, lengths, queries, *rest)
    for b in range(2):
        m = int(lengths[b])
        used = pages[b, : -(-m // 16)]
        gathered = [x[used].transpose(0, 1).flatten(1, 2)[None, :, :m] for x in (k, v)]
        wanted, wanted_lse = definition(
            q[b : b + 1], *gathered, queries[b : b + 1], torch.arange(m)[None], Visibility(causal=True), 0.25
        )
        assert (output[b] - wanted[0]).abs().max() <= TOLERANCES[dtype] * wanted.abs().max()
        assert (lse[b] - wanted_lse[0]).abs().max() <= 1e-5


def test_paged_op_follows_the_rules_of_ops():
    torch.library.opcheck(attention_decode.overload, paged())
    compiled = torch.compile(lambda *a: attention_decode(*a)[0], fullgraph=True, backend="aot_eager")
    arguments = paged()
    assert torch.equal(compiled(*arguments), attention_decode(*arguments)[0])


def test_gradients_are_refused():
    q, *rest = paged()
    with pytest.raises(Unsupported, match="gradient"):
        attention_decode(q.requires_grad_(), *rest)[0].sum().backward()


def test_bad_calls_never_reach_the_kernel():
    good = paged()
    bad = {
        0: [good[0].double(), good[0][:, :3], good[0][0], good[0].bfloat16()],
        1: [good[1][:, :, :, :3], good[1].double(), good[1][:2]],
        2: [good[2][0]],
        3: [good[3][:1], good[3].int(), good[3].clamp(max=1) - 5, good[3] + 7],
        4: [good[4] + 1, good[4] - 30, good[4][:1], good[4].int()],
        5: [good[5][:, :1], good[5].int()],
        6: [[1, 2]],
        9: [torch.zeros(3), torch.zeros(4, dtype=torch.float64)],
    }
    for at, values in bad.items():
        for value in values:
            with pytest.raises(Unsupported):
                attention_decode(*good[:at], value, *good[at + 1 :])


def test_nothing_to_do():
    for q, m in ((random(0, 2, 1, 8), 5), (random(1, 2, 0, 8), 5), (random(1, 2, 3, 8), 0)):
        k, v = random(q.shape[0], 2, m, 8), random(q.shape[0], 2, m, 8)
        output, lse = decode(q, k, v, torch.zeros(1, q.shape[2], dtype=torch.int64), torch.arange(m)[None])
        assert output.eq(0).all() and lse.eq(-torch.inf).all()


@pytest.mark.parametrize(
    ("n", "m", "kernel"),
    [(1, 9, "attention_decode"), (8, 9, "attention_decode"), (9, 20, "attention"), (16, 5000, "attention_decode")],
)
def test_the_engine_takes_it_for_few_queries_with_gradients(monkeypatch, n, m, kernel):
    called = []
    run = library.call
    monkeypatch.setattr(library, "call", lambda arguments: (called.append(arguments.kernel), run(arguments))[1])
    q, k, v = (random(1, 2, size, 8).requires_grad_() for size in (n, m, m))
    where = Ranks(torch.arange(m - n, m)[None], torch.arange(m)[None], m - n, m - n, True)
    causal = Visibility(causal=True)
    output, _, _ = engine(q, k, v, where, visibility=causal, scale=0.3, backend="native")
    assert called == [kernel]
    weight = random(1, 2, n, 8)
    found = torch.autograd.grad((output * weight).sum(), (q, k, v))
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted_output, _, _ = engine(*inputs, where, visibility=causal, scale=0.3, backend="torch")
    for gradient, wanted in zip(found, torch.autograd.grad((wanted_output * weight).sum(), inputs), strict=True):
        assert (gradient - wanted).abs().max() <= 3e-6 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "n", "m", "width"), [(1, 9, 3, 1, 531, 64), (3, 4, 4, 1, 1, 17), (2, 6, 2, 3, 97, 8)]
)
def test_the_short_way_of_decoding_is_the_definition(dtype, batch, heads, groups, n, m, width):
    room = m + 7  # keys and values are views of memory with room behind them, as a growing cache has
    q = random(batch, n, heads, width, dtype=dtype).transpose(1, 2)
    k = random(batch, groups, room, width, dtype=dtype)[:, :, :m]
    v = random(batch, groups, room, width + 1, dtype=dtype)[:, :, :m]
    with library.poisoned_workspaces(), torch.no_grad():
        output = short_way(q, k, v, 0.3)
    places = torch.arange(n)[None] + m - n, torch.arange(m)[None]
    wanted, _ = definition(q, k, v, *places, scale=0.3)
    assert output.dtype == dtype
    assert (output - wanted).abs().max() <= TOLERANCES[dtype] * wanted.abs().max()


def test_the_short_way_leaves_to_the_general_one_what_it_does_not_do():
    q, k, v = random(1, 4, 1, 8), random(1, 2, 5, 8), random(1, 2, 5, 8)
    assert short_way(q, k, v, 1.0) is not None
    wide = random(1, 2, 8, 5).mT
    other_calls = {
        "float64": (q.double(), k.double(), v.double()),
        "mixed dtypes": (q, k.bfloat16(), v),
        "features apart": (q, wide, v),
        "many queries": (random(1, 4, 9, 8), k, v),
        "no keys": (q, k[:, :, :0], v[:, :, :0]),
        "heads that do not divide": (random(1, 3, 1, 8), k, v),
        "another width": (random(1, 4, 1, 7), k, v),
        "other rows": (q, random(2, 2, 5, 8), v),
        "other values": (q, k, random(1, 2, 4, 8)),
        "a gradient": (q.clone().requires_grad_(), k, v),
        "another device": (q.to("meta"), k.to("meta"), v.to("meta")),
    }
    for what, (a, b, c) in other_calls.items():
        assert short_way(a, b, c, 1.0) is None, what
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert short_way(q, k, v, 1.0) is None
    with backends.only("torch"):
        assert short_way(q, k, v, 1.0) is None
    with backends.recording():
        assert short_way(q, k, v, 1.0) is None
