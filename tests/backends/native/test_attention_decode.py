"""The kernel for few queries and long caches against the definition in float64."""

import ctypes
from dataclasses import replace

import pytest
import torch
from attention_problems import CAUSAL, Problem, plain, random_problem
from torch import Tensor

from regard import backends
from regard.backends.native import library
from regard.contract import Unsupported
from regard.core.visibility import Ranks, Visibility
from regard.engines.attention import decode as short_way
from regard.engines.attention import native_form as attention
from regard.engines.attention.packed import PackedProblem, limits_of
from regard.engines.attention.paged import attention_decode

from .test_attention import differentiate, gradients, in_float64

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCES)


def decode(problem: Problem) -> tuple[Tensor, Tensor]:
    """Run the kernel on contiguous keys and values, as the attention engine calls it."""
    out = torch.empty(*problem.q.shape[:3], problem.v.shape[3], dtype=problem.q.dtype)
    lse = torch.empty(problem.q.shape[:3])
    packed = PackedProblem(
        problem.q, problem.k, problem.v, problem.sink, problem.bias, problem.table, problem.ranks.queries,
        problem.ranks.keys, 0, limits_of(problem.visibility), None, 0, problem.scale, 0, 0.0,
        problem.softcap or 0.0, 0 if problem.table is None else problem.table.shape[1] // 2, [],
    )  # fmt: skip
    arguments, kept = attention._arguments(packed, out, lse)
    library.call(attention.AttentionDecode(forward=ctypes.addressof(arguments)))
    del kept
    return out, lse


def check(problem: Problem) -> None:
    output, lse = decode(problem)
    wanted, _, wanted_lse = in_float64(problem)
    assert output.isfinite().all()
    assert (output - wanted).abs().max() <= TOLERANCES[output.dtype] * max(wanted.abs().max(), 1e-3)
    seen = wanted_lse > -torch.inf
    assert torch.equal(seen, lse > -torch.inf)
    torch.testing.assert_close(lse[seen].double(), wanted_lse[seen], rtol=1e-6, atol=1e-5)
    assert output[~seen].eq(0).all()


@both_dtypes
def test_every_length_width_grouping_mask_and_option(instruction_set, dtype):
    for seed in range(60):
        torch.set_num_threads((1, 2, 5)[seed % 3])
        problem = random_problem(seed, dtype, (1, 3, 5, 16), (63, 64, 129, 301, 700, 1031), (8, 7, 33, 64, 128))
        scale = problem.q.shape[-1] ** -0.5
        check(replace(problem, rule="softmax", shift=0.0, blocks=None, scale=scale))


def test_large_scores_lose_nothing_of_their_differences(instruction_set):
    scores = torch.randint(-10_000, 10_000, (700,)).float()
    scores[::50] = scores.max() - torch.arange(14)
    problem = plain(1, 700, heads=1, width=2, values=8, scale=1.0)
    problem.q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    problem.k = torch.stack([scores, scores], 1)[None, None]
    check(problem)


def test_nan_propagates_and_what_no_query_sees_does_not_matter():
    problem = plain(2, 600, heads=1)
    problem.ranks = Ranks(torch.tensor([[398, 400]]), torch.arange(600)[None], None, None, False)
    q, k, v = (x[0, 0] for x in (problem.q, problem.k, problem.v))
    v[401:], k[401:] = torch.nan, torch.nan
    output, lse = decode(problem)
    assert output.isfinite().all() and lse.isfinite().all()
    k[400, 3] = torch.nan
    output, lse = decode(problem)
    assert output[0, 0, 0].isfinite().all() and lse[0, 0, 0].isfinite()
    assert output[0, 0, 1].isnan().all() and lse[0, 0, 1].isnan()
    v[7, 5] = torch.nan
    assert decode(problem)[0][..., 5].isnan().all()
    q[0, 0] = torch.nan
    assert decode(problem)[0].isnan().all()


def test_nothing_to_do():
    for batch, n, m in ((0, 1, 5), (1, 0, 5), (1, 3, 0)):
        output, lse = decode(plain(n, m, batch=batch, width=8))
        assert output.eq(0).all() and lse.eq(-torch.inf).all()


def paged(dtype=torch.float32):
    q, k, v = torch.randn(2, 4, 2, 16), torch.randn(9, 2, 16, 16), torch.randn(9, 2, 16, 8)
    pages = torch.tensor([[3, 0, 7, 5], [1, 8, -99, 10**12]])  # unused entries of a row may hold anything
    lengths, queries = torch.tensor([64, 20]), torch.tensor([[62, 63], [18, 19]])
    return *(x.to(dtype) for x in (q, k, v)), pages, lengths, queries, [1, -1, -1, 0, 0, 0], 0.25, 0.0, None


@both_dtypes
def test_pages_equal_one_tensor(dtype):
    q, k, v, pages, lengths, queries, *rest = paged(dtype)
    output, lse = attention_decode(q, k, v, pages, lengths, queries, *rest)
    for b, m in enumerate(lengths.tolist()):
        used = pages[b, : -(-m // 16)]
        gathered = [x[used].transpose(0, 1).flatten(1, 2)[None, :, :m] for x in (k, v)]
        where = Ranks(queries[b : b + 1], torch.arange(m)[None], None, None, False)
        wanted, _, wanted_lse = in_float64(Problem(q[b : b + 1], *gathered, where, CAUSAL, 0.25))
        assert (output[b] - wanted[0]).abs().max() <= TOLERANCES[dtype] * wanted.abs().max()
        assert (lse[b] - wanted_lse[0]).abs().max() <= 1e-5


def test_pages_compile_whole_and_their_gradients_are_refused():
    q, *rest = paged()
    compiled = torch.compile(lambda *a: attention_decode(*a)[0], fullgraph=True, backend="aot_eager")
    torch.use_deterministic_algorithms(False)
    assert torch.equal(compiled(q, *rest), attention_decode(q, *rest)[0])
    with pytest.raises(Unsupported, match="gradient"):
        attention_decode(q.requires_grad_(), *rest)[0].sum().backward()


def test_pages_lengths_and_sinks_that_do_not_exist_are_refused():
    good = paged()
    bad = {3: [good[3].clamp(max=1) - 5, good[3] + 7], 4: [good[4] + 1, good[4] - 30], 6: [[1, 2]]}
    bad[9] = [torch.zeros(3), torch.zeros(4, dtype=torch.float64)]
    for at, values in bad.items():
        for value in values:
            with pytest.raises(Unsupported):
                attention_decode(*good[:at], value, *good[at + 1 :])


@pytest.mark.parametrize(
    ("n", "m", "kernel"),
    [(1, 9, "attention_decode"), (8, 9, "attention_decode"), (9, 20, "attention"), (16, 5000, "attention_decode")],
)
def test_the_engine_takes_it_for_few_queries_with_gradients(monkeypatch, n, m, kernel):
    called = []
    run = library.call
    monkeypatch.setattr(library, "call", lambda arguments: (called.append(arguments.kernel), run(arguments))[1])
    problem, weights = plain(n, m, width=8, scale=0.3), [torch.randn(1, 2, n, 8)]
    given, leaves = problem.leaves()
    output, _, _ = given.found("native")
    assert called == [kernel]
    found, wanted = differentiate([output], weights, leaves), gradients(problem, weights, torch.float64)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 3e-6 * gradient.abs().max()


# The fast path of decoding, which supports fewer options and has little overhead.


@both_dtypes
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "n", "m", "width"), [(1, 9, 3, 1, 531, 64), (3, 4, 4, 1, 1, 17), (2, 6, 2, 3, 97, 8)]
)
def test_the_short_way_of_decoding_is_the_definition(dtype, batch, heads, groups, n, m, width):
    # keys and values are views of memory with room to grow, as in a cache
    options = {"heads": heads, "groups": groups, "visibility": Visibility(), "scale": 0.3, "dtype": dtype}
    problem = plain(n, m + 7, batch=batch, width=width, values=width + 1, **options)
    q = problem.q.transpose(1, 2).contiguous().transpose(1, 2)
    k, v = problem.k[:, :, :m], problem.v[:, :, :m]
    with torch.no_grad():
        output = short_way(q, k, v, 0.3)
    where = Ranks(torch.arange(n)[None] + m - n, torch.arange(m)[None], None, None, False)
    wanted = in_float64(replace(problem, k=k, v=v, ranks=where))[0]
    assert output.dtype == dtype
    assert (output - wanted).abs().max() <= TOLERANCES[dtype] * wanted.abs().max()


def test_the_short_way_leaves_to_the_general_one_what_it_does_not_do():
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    assert short_way(q, k, v, 1.0) is not None
    other_calls = {
        "float64": (q.double(), k.double(), v.double()),
        "mixed dtypes": (q, k.bfloat16(), v),
        "features apart": (q, torch.randn(1, 2, 8, 5).mT, v),
        "no keys": (q, k[:, :, :0], v[:, :, :0]),
        "heads that do not divide": (torch.randn(1, 3, 1, 8), k, v),
        "another width": (torch.randn(1, 4, 1, 7), k, v),
        "other rows": (q, torch.randn(2, 2, 5, 8), v),
        "other values": (q, k, torch.randn(1, 2, 4, 8)),
        "a gradient": (q.clone().requires_grad_(), k, v),
        "another device": (q.to("meta"), k.to("meta"), v.to("meta")),
    }
    for what, (a, b, c) in other_calls.items():
        assert short_way(a, b, c, 1.0) is None, what
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert short_way(q, k, v, 1.0) is None
    for block in (backends.only("torch"), backends.watch_backends()):
        with block:
            assert short_way(q, k, v, 1.0) is None
