"""What is peculiar to softmax attention: its log-sum-exp, softcap, sink and windows, block masks, memory, and parity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regard.engines.attention.torch_form as backend
from regard.apply import absorb, apply
from regard.contract import ALL_PATTERNS, BlockMask, Context, Mask, Shape, Unsupported
from regard.create import create_layer
from regard.engines.block_patterns import butterfly_blocks, local_global_blocks, random_blocks
from regard.functional import softmax_attention
from regard.mechanisms.softmax import MECHANISM, Config, cost
from regard.workbench.subjects import Subject

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 1.5},
    {"learn_sink": True},
    {"softcap": 0.8, "learn_sink": True},
    {"window": (3, 0)},
    {"window": (2, None), "softcap": 2.0, "learn_sink": True},
]
LARGE = 1e4


def load(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def inputs(n: int, m: int | None = None, batch: int = 2, heads: int = 2, groups: int = 2) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {"q": (heads, n), "k": (groups, m), "v": (groups, m)}
    return {name: torch.randn(batch, *shape, 4, dtype=torch.float64) for name, shape in shapes.items()}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", options: dict | None = None, **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call).output


def cut_small(monkeypatch: pytest.MonkeyPatch, pairs: int, smallest: int, band: int) -> None:
    """Make the engine cut small problems into blocks as it cuts large ones."""
    monkeypatch.setattr(backend, "PAIRS_AT_ONCE", pairs)
    monkeypatch.setattr(backend, "SMALLEST_BLOCK", smallest)
    monkeypatch.setattr(backend, "LARGEST_BAND", band)


def seen(n: int, m: int, pattern: str, window: tuple[int | None, int | None] | None) -> Tensor:
    """Visible pairs, from the definition in words."""
    left, right = window or (None, None)
    visible = torch.ones(n, m, dtype=torch.bool)
    for i in range(n):
        for j in range(m):
            at = i if pattern.endswith("cross") else i + m - n
            visible[i, j] = (
                (pattern != "causal-self" or j <= at)
                and (left is None or at - j <= left)
                and (right is None or j - at <= right)
            )
    return visible


def dense(
    tensors: dict[str, Tensor], visible: Tensor, options: dict, bias: Tensor | float = 0.0, keep: Tensor | float = 1.0
) -> Tensor:
    """The formula with exponentials written out."""
    k, v = (tensors[x].repeat_interleave(tensors["q"].shape[1] // tensors[x].shape[1], 1) for x in "kv")
    scores = tensors["q"] @ k.mT / tensors["q"].shape[-1] ** 0.5
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    odds = torch.where(visible, (scores + bias).exp(), 0)
    total = odds.sum(-1, keepdim=True)
    if "sink" in tensors:
        total = total + tensors["sink"].exp()[:, None, None]
    weights = odds / torch.where(total > 0, total, 1)
    return (weights * keep) @ v


def problem(options: dict, pattern: str, n: int, m: int, groups: int = 1) -> dict[str, Tensor]:
    tensors = inputs(n, m, heads=4, groups=groups)
    if options.get("learn_sink"):
        tensors["sink"] = torch.randn(4, dtype=torch.float64)
    return {name: x.requires_grad_() for name, x in tensors.items()}


def same_with_gradients(found: Tensor, expected: Tensor, tensors: dict[str, Tensor]) -> None:
    close(found, expected)
    cotangent, leaves = torch.randn_like(expected), list(tensors.values())
    pairs = zip(
        torch.autograd.grad(found, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    )
    for a, b in pairs:
        close(a, b)


# exactness


@pytest.mark.parametrize("cut", [(1, 5, 4), (1 << 9, 4, 8), (1 << 22, 64, 512)])
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self", "noncausal-cross"])
@pytest.mark.parametrize("options", OPTIONS)
def test_output_and_gradients_equal_the_dense_formula_for_every_block_size(monkeypatch, options, pattern, cut):
    if pattern.endswith("cross") and "window" in options:
        pytest.skip("windows are for self patterns")
    cut_small(monkeypatch, *cut)
    for n, m in ((17, 17), (13, 29), (23, 11), (1, 6)):
        if pattern == "noncausal-self" and n != m:
            continue
        tensors = problem(options, pattern, n, m)
        visible = seen(n, m, pattern, options.get("window"))
        same_with_gradients(run(tensors, pattern, options), dense(tensors, visible, options), tensors)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_bias_and_padding_with_every_option_equal_the_dense_formula(options, pattern):
    tensors = problem(options, pattern, 14, 14, groups=2)
    bias = torch.randn(1, 4, 14, 14, dtype=torch.float64)
    visible = seen(14, 14, pattern, options.get("window"))
    lengths = torch.tensor([14, 9])
    valid = torch.arange(14) < lengths[:, None, None, None]
    found = run(tensors, pattern, options, mask=Mask(lengths=lengths, bias=bias))
    same_with_gradients(found, dense(tensors, visible & valid, options, bias) * valid.mT, tensors)


@pytest.mark.parametrize("options", OPTIONS[1:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softcap_and_sink_keep_the_published_tolerances(options, dtype):
    for pattern in ("causal-self", "noncausal-cross"):
        subject = Subject(MECHANISM, next(p for p in ALL_PATTERNS if p == pattern), options)
        tensors = subject.inputs(65, dtype=dtype)
        found, expected = subject.run(tensors).output, subject.reference(tensors)
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= MECHANISM.tolerances[dtype] * expected.abs().max()


def test_weights_after_a_seeded_dropout_follow_the_formula_and_gradcheck():
    tensors = {name: x.requires_grad_() for name, x in inputs(6, batch=1).items()}
    for options in OPTIONS[:4]:
        sink = {"sink": torch.randn(2, dtype=torch.float64, requires_grad=True)} if "learn_sink" in options else {}

        def dropped(v: Tensor, options=options, sink=sink) -> Tensor:
            generator = torch.Generator().manual_seed(11)
            return run(tensors | sink | {"v": v}, options=options, dropout=0.3, generator=generator)

        eye = torch.eye(6, dtype=torch.float64).expand(1, 2, 6, 6)
        keep = (dropped(eye) != 0).double() / 0.7
        visible = seen(6, 6, "causal-self", None)
        same_with_gradients(dropped(tensors["v"]), dense(tensors | sink, visible, options, keep=keep), tensors | sink)
        names = list(tensors | sink)

        def function(*leaves: Tensor, options=options, names=names) -> Tensor:
            generator = torch.Generator().manual_seed(11)
            given = dict(zip(names, leaves, strict=True))
            return run(given, options=options, dropout=0.3, generator=generator)

        assert torch.autograd.gradcheck(function, tuple((tensors | sink).values()))


# the log-sum-exp


@pytest.mark.parametrize("cut", [(1, 5, 4), (1 << 22, 64, 512)])
@pytest.mark.parametrize("options", OPTIONS)
def test_lse_is_torchs_logsumexp_over_visible_keys_without_the_sink(monkeypatch, options, cut):
    cut_small(monkeypatch, *cut)
    tensors = problem(options, "causal-self", 9, 21)
    result = apply(MECHANISM, tensors, config=Config(**options), want={"lse", "weights"})
    scores = tensors["q"] @ tensors["k"].repeat_interleave(4, 1).mT / 2
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    visible = seen(9, 21, "causal-self", options.get("window"))
    expected = scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
    close(result.extras["lse"], expected)
    leaves = [tensors["q"], tensors["k"]]
    for a, b in zip(
        torch.autograd.grad(result.extras["lse"].sum(), leaves, retain_graph=True),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        close(a, b)
    sums = torch.ones_like(expected)
    if "sink" in tensors:
        sums = torch.sigmoid(expected - tensors["sink"][:, None])
    close(result.extras["weights"].sum(-1), sums)
    close(result.output, run(tensors, options=options))  # asking for extras changes nothing


def test_lse_equals_the_one_of_pytorchs_own_kernel():
    tensors = {name: x.float() for name, x in inputs(40, batch=1).items()}
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors.values())
    result = apply(MECHANISM, tensors, pattern="noncausal-self", want={"lse"})
    close(result.output, output, 2e-6)
    close(result.extras["lse"], lse, 2e-6)  # observed 5e-7


def test_lse_is_in_float32_for_half_precision():
    tensors = {name: x.bfloat16() for name, x in inputs(5).items()}
    assert apply(MECHANISM, tensors, want={"lse"}).extras["lse"].dtype == torch.float32


def test_outputs_over_parts_of_the_keys_merge_by_their_lse():
    tensors = inputs(5, 30)
    whole = apply(MECHANISM, tensors, pattern="noncausal-cross", want={"lse"})
    outputs, totals = [], []
    for part in torch.randperm(30).split([4, 19, 7]):
        piece = {"q": tensors["q"]} | {name: tensors[name][:, :, part] for name in "kv"}
        result = apply(MECHANISM, piece, pattern="noncausal-cross", want={"lse"})
        outputs.append(result.output)
        totals.append(result.extras["lse"])
    shares = torch.stack(totals).softmax(0)[..., None]
    close((shares * torch.stack(outputs)).sum(0), whole.output)
    close(torch.stack(totals).logsumexp(0), whole.extras["lse"])


def test_adding_a_constant_to_all_scores_moves_lse_by_it_and_the_output_by_nothing():
    tensors = inputs(12)
    shift = torch.full((1, 1, 1, 1), 3.7, dtype=torch.float64)
    before = apply(MECHANISM, tensors, want={"lse"})
    after = apply(MECHANISM, tensors, want={"lse"}, mask=Mask(bias=shift.expand(1, 1, 12, 12)))
    close(after.extras["lse"], before.extras["lse"] + 3.7)
    close(after.output, before.output)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("options", OPTIONS[:2])
def test_output_times_cotangent_equals_weights_times_their_gradient(options, dropout):
    """D_i = rowsum(dO * O) = rowsum(P * dP): so the gradient of a number added to all scores of a query is 0."""
    tensors = inputs(10)
    bias = torch.zeros(2, 2, 10, 1, dtype=torch.float64, requires_grad=True)

    def output(v: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        mask = Mask(bias=bias.expand(-1, -1, -1, 10))
        return run(tensors | {"v": v}, options=options, mask=mask, dropout=dropout, generator=generator)

    found = output(tensors["v"])
    cotangent = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, bias, cotangent, retain_graph=True)
    close(gradient, torch.zeros_like(gradient))
    kept_weights = output(torch.eye(10, dtype=torch.float64).expand(2, 2, 10, 10))
    close((cotangent * found).sum(-1), (kept_weights * (cotangent @ tensors["v"].mT)).sum(-1))


def test_dropped_weights_do_not_change_the_normaliser():
    tensors = inputs(30) | {"v": torch.eye(30, dtype=torch.float64).expand(2, 2, 30, 30)}
    weights = apply(MECHANISM, tensors, want={"weights"}).extras["weights"]
    output = run(tensors, dropout=0.25, generator=torch.Generator().manual_seed(0))
    kept = output != 0
    close(output[kept], weights[kept] / 0.75)
    assert kept.sum() < (weights != 0).sum()


# block masks


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_a_block_mask_of_ones_is_dense_and_of_the_identity_is_attention_by_blocks(pattern):
    tensors = inputs(18)
    ones = BlockMask(torch.ones(1, 1, 4, 4, dtype=torch.bool), 5)
    close(run(tensors, pattern, mask=Mask(blocks=ones)), run(tensors, pattern))
    identity = BlockMask(torch.eye(4, dtype=torch.bool)[None, None], 5)
    found = run(tensors, pattern, mask=Mask(blocks=identity))
    for start in range(0, 18, 5):
        part = {name: x[:, :, start : start + 5] for name, x in tensors.items()}
        close(found[:, :, start : start + 5], run(part, pattern))


def test_causality_as_a_block_mask_of_single_tokens_is_the_causal_pattern():
    tensors = inputs(13)
    blocks = BlockMask(torch.ones(13, 13, dtype=torch.bool).tril()[None, None], 1)
    close(run(tensors, "noncausal-self", mask=Mask(blocks=blocks)), run(tensors))


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize("cut", [(1, 3, 4), (1 << 22, 64, 512)])
def test_a_block_mask_for_each_head_and_fully_masked_tiles_equal_the_dense_formula(monkeypatch, pattern, cut):
    """Tiles without a visible key must leave zeros, an lse of -inf and finite gradients."""
    cut_small(monkeypatch, *cut)
    visible = torch.rand(1, 2, 5, 5) > 0.5
    visible[:, 0, 2] = False
    visible[:, 1] = False
    tensors = {name: x.requires_grad_() for name, x in inputs(19).items()}
    pairs = visible.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :19, :19] & seen(19, 19, pattern, None)
    mask = Mask(blocks=BlockMask(visible, 4))
    same_with_gradients(run(tensors, pattern, mask=mask), dense(tensors, pairs, {}), tensors)
    result = apply(MECHANISM, tensors, pattern=pattern, mask=mask, want={"lse"})
    assert torch.equal(result.extras["lse"] == -torch.inf, ~pairs.any(-1).expand(2, -1, -1))
    result.output.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in tensors.values())


def reached(layout: Tensor, layers: int) -> Tensor:
    """Pairs of blocks connected by `layers` layers."""
    hops = layout.long()
    total = hops
    for _ in range(layers - 1):
        total = (total @ hops).clamp(max=1)
    return total > 0


@pytest.mark.parametrize("blocks", [1, 2, 3, 8, 13, 16, 37, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_a_butterfly_reaches_every_pair_in_log2_of_the_blocks_layers_and_no_sooner(blocks, causal):
    mask = butterfly_blocks(blocks * 4 - 3, 4, causal=causal, global_blocks=0)
    layout = mask.visible[0, 0]
    assert layout.shape == (blocks, blocks) and mask.block_size == 4
    assert torch.equal(layout, layout.tril() if causal else layout.mT)
    wanted = torch.ones(blocks, blocks, dtype=torch.bool)
    wanted = wanted.tril() if causal else wanted
    layers = max(1, math.ceil(math.log2(blocks)))
    assert torch.equal(reached(layout, layers), wanted)
    assert layout.sum(-1).max() <= layers + 1
    if blocks > 2 and blocks & (blocks - 1) == 0:
        assert not torch.equal(reached(layout, layers - 1), wanted)


def test_a_butterfly_pairs_blocks_that_differ_in_one_bit_beside_the_first():
    layout = butterfly_blocks(8, 1).visible[0, 0]
    for i in range(8):
        expected = {0, i, *(i ^ 1 << t for t in range(3))} if i else set(range(8))
        assert set(layout[i].nonzero()[:, 0].tolist()) == expected


def test_the_butterfly_of_the_noncausal_form_does_not_survive_causality():
    """Block 2 (10) would never hear of block 1 (01): this is why the causal layout differs."""
    layout = butterfly_blocks(16, 1, global_blocks=0).visible[0, 0].tril()
    assert not reached(layout, 16)[2, 1]


@pytest.mark.parametrize("make", [butterfly_blocks, local_global_blocks])
def test_more_blocks_do_not_change_what_earlier_blocks_see_of_each_other(make):
    options = {"causal": True} if make is butterfly_blocks else {}
    short, long = make(7 * 4, 4, **options).visible, make(20 * 4, 4, **options).visible
    assert torch.equal(short, long[..., :7, :7])


def test_stacked_butterfly_attention_carries_the_first_token_to_the_last():
    blocks = Mask(blocks=butterfly_blocks(32, 2, causal=True, global_blocks=0))
    x = torch.randn(1, 1, 32, 4, dtype=torch.float64, requires_grad=True)
    for layers in (3, 4):  # 16 blocks; the first is 15 away, a sum of four powers of two
        y = x
        for _ in range(layers):
            y = y + run(dict.fromkeys("qkv", y), mask=blocks)
        (gradient,) = torch.autograd.grad(y[0, 0, 31].sum(), x)
        assert bool((gradient[0, 0, 0] != 0).any()) == (layers == 4)


def test_local_and_global_blocks_are_the_union_of_a_band_and_a_cross():
    layout = local_global_blocks(30, 4, neighbours=1, global_blocks=2).visible[0, 0]
    for i in range(8):
        for j in range(8):
            assert layout[i, j] == (abs(i - j) <= 1 or i < 2 or j < 2)


@pytest.mark.parametrize("causal", [False, True])
def test_random_blocks_see_themselves_and_as_many_others_as_asked(causal):
    generator = torch.Generator().manual_seed(0)
    layout = random_blocks(50, 5, others=3, heads=4, causal=causal, generator=generator).visible
    assert layout.shape == (1, 4, 10, 10)
    assert layout.diagonal(dim1=-2, dim2=-1).all()
    available = torch.arange(1, 11) if causal else torch.full((10,), 10)
    assert torch.equal(layout.sum(-1), available.clamp(max=4).expand(1, 4, 10))
    assert not causal or torch.equal(layout, layout.tril())
    assert not torch.equal(layout[:, 0], layout[:, 1])
    again = random_blocks(50, 5, others=3, heads=4, causal=causal, generator=torch.Generator().manual_seed(0)).visible
    assert torch.equal(layout, again)
    assert random_blocks(50, 5, others=99).visible.all()


@pytest.mark.parametrize("make", [butterfly_blocks, local_global_blocks, random_blocks])
def test_block_patterns_refuse_impossible_sizes(make):
    assert make(0, 4).visible.shape[-2:] == (0, 0)
    for length, size in ((-1, 4), (8, 0)):
        with pytest.raises(Unsupported):
            make(length, size)
    for options in ({"others": -1}, {"heads": 0}) if make is random_blocks else ({"global_blocks": -1},):
        with pytest.raises(Unsupported):
            make(8, 2, **options)
    with pytest.raises(Unsupported, match="neighbours"):
        local_global_blocks(8, 2, neighbours=-1)


# invariances, alignment and numerics


def test_permuting_keys_with_their_values_changes_nothing():
    tensors, order = inputs(7, 31), torch.randperm(31)
    moved = {"q": tensors["q"]} | {name: tensors[name][:, :, order] for name in "kv"}
    for options in OPTIONS[:2]:
        close(run(moved, "noncausal-cross", options), run(tensors, "noncausal-cross", options))


@pytest.mark.parametrize("options", OPTIONS[:4])
def test_causality_aligns_bottom_right_not_top_left(options):
    sink = {"sink": torch.randn(2, dtype=torch.float64)} if options.get("learn_sink") else {}
    more_keys = inputs(4, 9) | sink
    for i in range(4):
        seen_by_i = {"q": more_keys["q"][:, :, i : i + 1]} | {x: more_keys[x][:, :, : i + 6] for x in "kv"} | sink
        close(run(more_keys, options=options)[:, :, i : i + 1], run(seen_by_i, "noncausal-cross", options))
    more_queries = inputs(9, 4) | sink
    result = apply(MECHANISM, more_queries, config=Config(**options), want={"lse"})
    assert (result.output[:, :, :5] == 0).all() and (result.extras["lse"][:, :, :5] == -torch.inf).all()
    last = more_queries | {"q": more_queries["q"][:, :, 5:]}
    close(result.output[:, :, 5:], run(last, options=options))


@pytest.mark.parametrize("want", [(), ("lse",)])
@pytest.mark.parametrize("with_sink", [False, True])
def test_scores_of_ten_thousand_stay_finite_in_float32(with_sink, want):
    tensors = {name: x.float() for name, x in inputs(16).items()}
    tensors["q"] = torch.where(torch.rand(2, 2, 16, 1) < 0.5, -1.0, 1.0) * torch.tensor([2 * LARGE, 0, 0, 0])
    tensors["k"] = torch.where(torch.rand(2, 2, 16, 1) < 0.5, -1.0, 1.0) * torch.tensor([1.0, 0, 0, 0])
    if with_sink:
        tensors["sink"] = torch.tensor([-LARGE, LARGE])
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    result = apply(MECHANISM, leaves, want=set(want))
    double = {name: x.detach().double() for name, x in leaves.items()}
    close(result.output.double(), run(double, form="reference"), 1e-5)
    result.output.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())
    if want:
        assert (result.extras["lse"].abs() > LARGE / 2).all() and result.extras["lse"].isfinite().all()


@pytest.mark.parametrize("score", [-LARGE, LARGE])
def test_a_single_visible_key_gives_its_value_whatever_its_score(score):
    tensors = {name: x.float().requires_grad_() for name, x in inputs(6).items()}
    bias = torch.full((1, 1, 6, 6), -torch.inf).masked_fill(torch.eye(6, dtype=torch.bool), score)
    output = run(tensors, "noncausal-self", mask=Mask(bias=bias))
    close(output, tensors["v"], 1e-6)
    output.sum().backward()
    assert all(x.grad.isfinite().all() for x in tensors.values())


def test_softcap_bounds_the_scores_and_leaves_small_ones_alone():
    tensors = inputs(10)
    bounded = tensors | {"q": 1e6 * tensors["q"]}
    weights = apply(MECHANISM, bounded, config=Config(softcap=0.5), want={"weights"}).extras["weights"]
    visible = weights[..., -1, :]
    assert visible.max() <= math.exp(0.5) / (math.exp(0.5) + 9 * math.exp(-0.5)) + 1e-12
    close(run(tensors, options={"softcap": 1e7}), run(tensors), 1e-10)


def test_softcap_comes_before_biases():
    tensors, bias = inputs(5), torch.randn(1, 1, 5, 5, dtype=torch.float64)
    found = apply(
        MECHANISM,
        tensors,
        pattern="noncausal-self",
        config=Config(softcap=0.3),
        mask=Mask(bias=bias),
        want={"weights"},
    ).extras["weights"]
    close(found, (0.3 * torch.tanh(tensors["q"] @ tensors["k"].mT / 2 / 0.3) + bias).softmax(-1))


# the sink


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-cross"])
def test_a_sink_reweights_the_output_by_the_sigmoid_of_lse_minus_sink(pattern):
    tensors, sink = inputs(11, 15), torch.tensor([0.7, -2.0], dtype=torch.float64)
    plain = apply(MECHANISM, tensors, pattern=pattern, want={"lse"})
    share = torch.sigmoid(plain.extras["lse"] - sink[:, None])[..., None]
    close(run(tensors | {"sink": sink}, pattern), plain.output * share)


@pytest.mark.parametrize("want", [(), ("weights",)])
def test_infinite_sinks_take_everything_or_nothing(want):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensors = {name: x.to(dtype) for name, x in inputs(9).items()}
        sink = torch.tensor([-torch.inf, torch.inf], dtype=dtype)
        for mask in (None, Mask(lengths=torch.tensor([9, 4]))):
            found = apply(MECHANISM, tensors | {"sink": sink}, want=set(want), mask=mask).output
            tolerance = MECHANISM.tolerances[dtype]
            close(found[:, 0], apply(MECHANISM, tensors, mask=mask).output[:, 0], 4 * tolerance)
            assert (found[:, 1] == 0).all()


def test_a_scale_of_zero_with_a_sink_gives_the_mean():
    tensors = inputs(8) | {"sink": torch.zeros(2, dtype=torch.float64)}
    close(run(tensors, "noncausal-self", scale=0.0)[:, :, 0], tensors["v"].sum(2) / 9)


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_defaults_and_sinks_go_to_one_call_of_pytorchs_kernel_without_a_mask(monkeypatch, with_sink, pattern):
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return original(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    tensors = inputs(300, heads=4, groups=2)
    if with_sink:
        tensors["sink"] = torch.zeros(4, dtype=torch.float64)
    run(tensors, pattern)
    assert len(calls) == 1 and calls[0].get("attn_mask") is None and calls[0]["is_causal"] == (pattern == "causal-self")


# memory


def saved(n: int, pattern: str, options: dict, dim: int = 8, **call: Any) -> tuple[int, int]:
    """Elements of all storages saved by forward and backward, and of the largest."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    tensors = {x: torch.randn(1, 1, n, dim, requires_grad=True) for x in "qkv"}
    if options.get("learn_sink"):
        tensors["sink"] = torch.zeros(1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run(tensors, pattern, options, **call).sum().backward()
    return sum(storages.values()), max(storages.values())


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_forward_and_backward_save_the_inputs_the_output_and_one_number_a_query(pattern):
    for n in (256, 1024, 4096):
        total, largest = saved(n, pattern, {})
        assert 4 * n * 8 + n <= total <= 4 * n * 8 + n + 64
        assert largest == n * 8


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize("options", OPTIONS[1:5])
def test_every_option_saves_memory_linear_in_length(monkeypatch, options, pattern):
    monkeypatch.setattr(backend, "PAIRS_AT_ONCE", 1 << 16)
    (short, _), (long, largest) = (saved(n, pattern, options) for n in (1024, 4096))
    assert long < 4.4 * short and largest < 4096 * 4096 / 32


# layers and decoding


def test_a_layer_learns_one_sink_a_head_that_starts_at_zero():
    torch.manual_seed(0)
    layer = create_layer("softmax", 8, 2, learn_sink=True, softcap=3.0).double()
    plain = create_layer("softmax", 8, 2, softcap=3.0).double()
    assert not list(plain.projection.parameters())
    missing = layer.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["projection.sink"] and layer.projection.sink.tolist() == [0.0, 0.0]
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    layer(x).output.square().sum().backward()
    assert layer.projection.sink.grad.abs().min() > 0
    with torch.no_grad():
        layer.projection.sink.fill_(-torch.inf)
    close(layer(x).output, plain(x).output)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_decodes_token_by_token_with_padded_rows(options):
    torch.manual_seed(0)
    layer = create_layer("softmax", 8, 2, positions="rotary", **options).double()
    if options.get("learn_sink"):
        layer.projection.sink.data += torch.tensor([0.5, -1.0])
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    lengths = torch.tensor([5, 3])
    state = layer(x[:, :5], context=Context(mask=Mask(lengths=lengths), want=frozenset({"state"}))).state
    rows = [x[:1], torch.cat([x[1:, :3], x[1:, 5:]], 1)]
    for t in range(5, 9):
        y, state = layer.step(x[:, t], state)
        for row, whole in enumerate(rows):
            at = int(lengths[row]) + t - 5
            close(y[row], layer(whole).output[0, at])


def test_a_sink_works_on_encoded_memory():
    layer = create_layer("softmax", 8, 2, pattern="causal-cross", learn_sink=True).double()
    layer.projection.sink.data += torch.tensor([0.5, -2.0])
    x, memory = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    close(layer(x, state=layer.encode_memory(memory)).output, layer(x, memory).output)


def test_memory_is_absorbed_without_the_sink_and_read_with_it():
    tensors, sink = inputs(3, 7), torch.randn(2, dtype=torch.float64)
    state = absorb(MECHANISM, {"k": tensors["k"], "v": tensors["v"], "sink": sink}, pattern="noncausal-cross")
    found = run({"q": tensors["q"], "sink": sink}, "noncausal-cross", state=state)
    close(found, run(tensors | {"sink": sink}, "noncausal-cross"))


def test_the_function_takes_the_sink_as_a_tensor_and_options_by_name():
    tensors, sink = inputs(6), torch.randn(2, dtype=torch.float64)
    found = softmax_attention(*tensors.values(), sink=sink, window=(2, 0), softcap=1.0)
    close(found, run(tensors | {"sink": sink}, options={"window": (2, 0), "softcap": 1.0}))


def test_the_cost_counts_the_pairs_in_a_window():
    shape = Shape(2, 3, 100, 100, 4, 5)
    assert cost(shape, Config()).flops == 2 * 2 * 3 * 100 * 100 * 9
    narrow = cost(shape, Config(window=(7, 0)))
    assert narrow.flops == 2 * 2 * 3 * 100 * 8 * 9 and narrow.state == cost(shape, Config()).state


# refusals


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 0.0},
        {"softcap": -1.0},
        {"softcap": math.inf},
        {"softcap": math.nan},
        {"window": (-1, 0)},
        {"window": (1,)},
        {"window": (None, -2)},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_options_that_do_not_fit_the_call_are_refused():
    tensors = inputs(4)
    with pytest.raises(Unsupported, match="window"):
        run(tensors, options={"window": (2, 1)})
    for pattern in ("noncausal-cross", "causal-cross"):
        with pytest.raises(Unsupported, match="window"):
            run(tensors, pattern, {"window": (2, 0)})
        with pytest.raises(Unsupported, match="window"):
            create_layer("softmax", 8, 2, pattern=pattern, window=(2, 0))
    with pytest.raises(Unsupported, match="window"):
        create_layer("softmax", 8, 2, window=(2, 1))
    with pytest.raises(Unsupported, match="sink"):
        run(tensors | {"sink": torch.zeros(3, dtype=torch.float64)})
    with pytest.raises(Unsupported, match="sink"):
        run(tensors | {"sink": torch.zeros(2, 4, dtype=torch.float64)})


# parity


def _parity(arrays: dict[str, Tensor], pattern: str, *, weights: bool = True, **call: Any) -> None:
    tensors = {name: arrays[name].requires_grad_() for name in "qkv"}
    plain = run(tensors, pattern, **call)
    result = apply(MECHANISM, tensors, pattern=pattern, want={"weights"}, **call)
    if weights:  # those of padded tokens are gathered to the right here
        close(result.extras["weights"], arrays["attn"], 1e-10)
    for output in (plain, result.output):
        close(output, arrays["out"], 1e-10)  # observed 2e-15
        found = torch.autograd.grad(output, list(tensors.values()), arrays["grad_out"])
        for name, gradient in zip("qkv", found, strict=True):
            close(gradient, arrays[f"grad_{name}"], 1e-10)  # observed 9e-15


@pytest.mark.parametrize("name", ["softmax_causal", "softmax_causal_more_keys", "softmax_causal_more_queries"])
def test_parity_causal(name):
    _parity(load(name), "causal-self")


def test_parity_causal_with_padded_queries_and_keys():
    arrays = load("softmax_causal_right_padded")
    masks = {"mask": Mask(valid=arrays["query_mask"]), "memory_mask": Mask(valid=arrays["key_mask"])}
    _parity(arrays, "causal-self", weights=False, **masks)


def test_parity_grouped_queries_and_bias():
    arrays = load("softmax_gqa_bias")
    _parity(arrays, "causal-self", mask=Mask(bias=arrays["attn_bias"]))


def test_parity_with_masked_memory():
    arrays = load("softmax_noncausal_masked")
    _parity(arrays, "noncausal-cross", weights=False, memory_mask=Mask(valid=arrays["key_mask"]))


@pytest.mark.parametrize("form", ["reference", "parallel"])
def test_parity_with_softcap(form):
    arrays = load("softmax_softcap")
    config = Config(softcap=float(arrays["softcap"]))
    tensors = {name: arrays[name] for name in "qkv"}
    result = apply(MECHANISM, tensors, pattern="noncausal-cross", config=config, form=form, want={"weights"})
    close(result.output, arrays["out"], 1e-10)  # observed 3e-16
    if form == "parallel":
        close(result.extras["weights"], arrays["attn"], 1e-10)
