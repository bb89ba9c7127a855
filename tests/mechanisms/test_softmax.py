"""Tests specific to softmax attention: its log-sum-exp, softcap, sink and windows, block masks, memory, and parity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import calls, check_recorded, close, close_gradients, load, qkv, refused, saved_for_backward, watched
from torch import Tensor

import regard.engines.attention.torch_form as backend
from regard.contract import BlockMask, Mask, Shape, Unsupported
from regard.create import create_layer
from regard.engines.block_patterns import butterfly_blocks, local_global_blocks, random_blocks
from regard.mechanisms.softmax import MECHANISM, Config, cost

OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 1.5},
    {"learn_sink": True},
    {"softcap": 0.8, "learn_sink": True},
    {"window": (3, 0)},
    {"window": (2, None), "softcap": 2.0, "learn_sink": True},
]
SELF = ["causal-self", "noncausal-self"]
LARGE = 1e4
run = calls(MECHANISM)


def cut_small(monkeypatch: pytest.MonkeyPatch, pairs: int, smallest: int, band: int) -> None:
    """Make the engine cut small problems into blocks as it cuts large ones."""
    monkeypatch.setattr(backend, "PAIRS_AT_ONCE", pairs)
    monkeypatch.setattr(backend, "SMALLEST_BLOCK", smallest)
    monkeypatch.setattr(backend, "LARGEST_BAND", band)


def seen(n: int, m: int, pattern: str, window: tuple[int | None, int | None] | None = None) -> Tensor:
    """Visible pairs, by the definition in words."""
    left, right = window or (None, None)
    at = torch.arange(n)[:, None] + (0 if pattern.endswith("cross") else m - n)
    ahead = torch.arange(m) - at
    visible = ahead <= (0 if pattern == "causal-self" else m)
    visible &= ahead >= (-math.inf if left is None else -left)
    return visible & (ahead <= (math.inf if right is None else right))


def dense(
    tensors: dict[str, Tensor], visible: Tensor, options: dict, bias: Tensor | float = 0.0, keep: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention with the exponentials written out: output, weights, and sums of exponentials of visible keys."""
    k, v = (tensors[x].repeat_interleave(tensors["q"].shape[1] // tensors[x].shape[1], 1) for x in "kv")
    scores = tensors["q"] @ k.mT / tensors["q"].shape[-1] ** 0.5
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    odds = torch.where(visible, (scores + bias).exp(), 0)
    sums = odds.sum(-1, keepdim=True)
    total = sums + tensors["sink"].exp()[:, None, None] if "sink" in tensors else sums
    weights = odds / torch.where(total > 0, total, 1)
    return (weights * keep) @ v, weights, sums[..., 0]


def problem(options: dict, n: int, m: int) -> dict[str, Tensor]:
    tensors = qkv(n, m, heads=4, groups=2)
    if options.get("learn_sink"):
        tensors["sink"] = torch.randn(4, dtype=torch.float64)
    return {name: x.requires_grad_() for name, x in tensors.items()}


def equals_dense(tensors: dict[str, Tensor], visible: Tensor, options: dict, **call: Any) -> None:
    """Compare output, weights, log-sum-exp (without the sink) and gradients, with and without extras."""
    bias = call["mask"].bias if "mask" in call else None
    output, weights, sums = dense(tensors, visible, options, 0.0 if bias is None else bias)
    result = run(tensors, options, want={"lse", "weights"}, **call)
    close(result.extras["weights"], weights)
    close_gradients(result.extras["lse"].exp(), sums, tensors)
    for found in (result.output, run(tensors, options, **call).output):
        close_gradients(found, output, tensors)


# exactness


@pytest.mark.parametrize("cut", [(1, 5, 4), (1 << 9, 4, 8), (1 << 22, 64, 512)])
@pytest.mark.parametrize(
    ("options", "pattern"),
    [(o, p) for o in OPTIONS for p in (*SELF, "noncausal-cross") if p in SELF or "window" not in o],
)
def test_every_option_equals_the_dense_formula_for_every_block_size(monkeypatch, options, pattern, cut):
    cut_small(monkeypatch, *cut)
    for n, m in ((17, 17), (13, 29), (23, 11), (1, 6)):
        if pattern != "noncausal-self" or n == m:
            tensors = problem(options, n, m)
            visible = seen(n, m, pattern, options.get("window"))
            bias = Mask(bias=torch.randn(1, 4, n, m, dtype=torch.float64))
            for mask in ({}, {"mask": bias}):
                equals_dense(tensors, visible, options, pattern=pattern, **mask)


@pytest.mark.parametrize("options", OPTIONS[:4])
def test_weights_after_a_seeded_dropout_follow_the_formula_and_gradcheck(options):
    tensors = {name: x.requires_grad_() for name, x in qkv(6, batch=1).items()}
    if "learn_sink" in options:
        tensors["sink"] = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def dropped(*given: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(11)
        return run(dict(zip(tensors, given, strict=True)), options, dropout=0.3, generator=generator).output

    eye = torch.eye(6, dtype=torch.float64).expand(1, 2, 6, 6)
    keep = (dropped(*(tensors | {"v": eye}).values()) != 0).double() / 0.7
    visible = seen(6, 6, "causal-self")
    assert not (keep > 0)[..., visible].all()
    close_gradients(dropped(*tensors.values()), dense(tensors, visible, options, keep=keep)[0], tensors)
    assert torch.autograd.gradcheck(dropped, tuple(tensors.values()))


# the log-sum-exp


def test_lse_equals_the_one_of_pytorchs_own_kernel_in_at_least_float32():
    tensors = qkv(40, batch=1, dtype=torch.float32)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors.values())
    result = run(tensors, pattern="noncausal-self", want={"lse"})
    close(result.output, output, 2e-6)
    close(result.extras["lse"], lse, 2e-6)  # observed 5e-7
    assert run(qkv(5, dtype=torch.bfloat16), want={"lse"}).extras["lse"].dtype == torch.float32


# block masks


def layout(kind: str) -> BlockMask:
    """A block mask for 19 tokens."""
    if kind == "causality":
        return BlockMask(torch.ones(19, 19, dtype=torch.bool).tril()[None, None], 1)
    if kind == "by heads":
        visible = torch.rand(1, 2, 5, 5) > 0.5
        visible[:, 0, 2] = False
        visible[:, 1] = False  # tiles have no visible key
        return BlockMask(visible, 4)
    visible = torch.ones(5, 5) if kind == "ones" else torch.eye(5)
    return BlockMask(visible.bool()[None, None], 4)


@pytest.mark.parametrize("kind", ["ones", "identity", "causality", "by heads"])
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("cut", [(1, 3, 4), (1 << 22, 64, 512)])
def test_a_block_mask_shows_its_blocks_alone(monkeypatch, pattern, cut, kind):
    cut_small(monkeypatch, *cut)
    tensors = {name: x.requires_grad_() for name, x in qkv(19).items()}
    blocks = layout(kind)
    size = blocks.block_size
    pairs = blocks.visible.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :19, :19] & seen(19, 19, pattern)
    equals_dense(tensors, pairs, {}, pattern=pattern, mask=Mask(blocks=blocks))


def reached(layout: Tensor, layers: int) -> Tensor:
    """Pairs of blocks connected by `layers` layers."""
    hops = layout.long()
    total = hops
    for _ in range(layers - 1):
        total = (total @ hops).clamp(max=1)
    return total > 0


@pytest.mark.parametrize("blocks", [1, 2, 3, 8, 13, 37, 64])
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


@pytest.mark.parametrize("make", [butterfly_blocks, local_global_blocks])
def test_more_blocks_do_not_change_what_earlier_blocks_see_of_each_other(make):
    options = {"causal": True} if make is butterfly_blocks else {}
    short, long = make(7 * 4, 4, **options).visible, make(20 * 4, 4, **options).visible
    assert torch.equal(short, long[..., :7, :7])


def test_local_and_global_blocks_are_the_union_of_a_band_and_a_cross():
    layout = local_global_blocks(30, 4, neighbours=1, global_blocks=2).visible[0, 0]
    for i in range(8):
        for j in range(8):
            assert layout[i, j] == (abs(i - j) <= 1 or i < 2 or j < 2)


@pytest.mark.parametrize("causal", [False, True])
def test_random_blocks_see_themselves_and_as_many_others_as_asked(causal):
    layout, again = (
        random_blocks(50, 5, others=3, heads=4, causal=causal, generator=torch.Generator().manual_seed(0)).visible
        for _ in range(2)
    )
    assert torch.equal(layout, again)
    assert layout.shape == (1, 4, 10, 10)
    assert layout.diagonal(dim1=-2, dim2=-1).all()
    available = torch.arange(1, 11) if causal else torch.full((10,), 10)
    assert torch.equal(layout.sum(-1), available.clamp(max=4).expand(1, 4, 10))
    assert not causal or torch.equal(layout, layout.tril())
    assert not torch.equal(layout[:, 0], layout[:, 1])
    assert random_blocks(50, 5, others=99).visible.all()


@pytest.mark.parametrize("make", [butterfly_blocks, local_global_blocks, random_blocks])
def test_block_patterns_refuse_impossible_sizes(make):
    assert make(0, 4).visible.shape[-2:] == (0, 0)
    more = {
        random_blocks: [{"others": -1}, {"heads": 0}],
        local_global_blocks: [{"global_blocks": -1}, {"neighbours": -1}],
        butterfly_blocks: [{"global_blocks": -1}],
    }[make]
    for options in ({"length": -1}, {"block_size": 0}, *more):
        with pytest.raises(Unsupported):
            make(**{"length": 8, "block_size": 2, **options})


# numerics


@pytest.mark.parametrize("want", [(), ("lse",)])
@pytest.mark.parametrize("with_sink", [False, True])
def test_scores_of_ten_thousand_stay_finite_in_float32(with_sink, want):
    tensors = qkv(16, dtype=torch.float32)
    for name, size in (("q", 2 * LARGE), ("k", 1.0)):
        tensors[name] = torch.where(torch.rand(2, 2, 16, 1) < 0.5, -1.0, 1.0) * torch.tensor([size, 0, 0, 0])
    if with_sink:
        tensors["sink"] = torch.tensor([-LARGE, LARGE])
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    result = run(leaves, want=set(want))
    double = {name: x.detach().double() for name, x in leaves.items()}
    close(result.output.double(), run(double, form="reference").output, 1e-5)
    result.output.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())
    if want:
        assert (result.extras["lse"].abs() > LARGE / 2).all() and result.extras["lse"].isfinite().all()


@pytest.mark.parametrize("score", [-LARGE, LARGE])
def test_a_single_visible_key_gives_its_value_whatever_its_score(score):
    tensors = {name: x.requires_grad_() for name, x in qkv(6, dtype=torch.float32).items()}
    bias = torch.full((1, 1, 6, 6), -torch.inf).masked_fill(torch.eye(6, dtype=torch.bool), score)
    output = run(tensors, pattern="noncausal-self", mask=Mask(bias=bias)).output
    close(output, tensors["v"], 1e-6)
    output.sum().backward()
    assert all(x.grad.isfinite().all() for x in tensors.values())


@pytest.mark.parametrize("want", [(), ("weights",)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_infinite_sinks_take_everything_or_nothing(dtype, want):
    tensors, sink = qkv(9, dtype=dtype), torch.tensor([-torch.inf, torch.inf], dtype=dtype)
    for mask in (None, Mask(lengths=torch.tensor([9, 4]))):
        found = run(tensors | {"sink": sink}, want=set(want), mask=mask).output
        close(found[:, 0], run(tensors, mask=mask).output[:, 0], 4 * MECHANISM.tolerances[dtype])
        assert (found[:, 1] == 0).all()


def test_a_scale_of_zero_with_a_sink_gives_the_mean():
    tensors = qkv(8) | {"sink": torch.zeros(2, dtype=torch.float64)}
    close(run(tensors, pattern="noncausal-self", scale=0.0).output[:, :, 0], tensors["v"].sum(2) / 9)


# memory


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("pattern", SELF)
def test_defaults_and_sinks_go_to_one_call_of_pytorchs_kernel_without_a_mask(monkeypatch, with_sink, pattern):
    functions = torch.nn.functional
    seen = watched(monkeypatch, functions, "scaled_dot_product_attention", lambda *tensors, **options: options)
    sink = {"sink": torch.zeros(4, dtype=torch.float64)} if with_sink else {}
    run(qkv(300, heads=4, groups=2) | sink, pattern=pattern)
    assert len(seen) == 1 and seen[0].get("attn_mask") is None and seen[0]["is_causal"] == (pattern == "causal-self")


def saved(n: int, pattern: str, options: dict) -> tuple[float, float]:
    """Sizes, in float32 numbers, of all storages saved for the backward pass and of the largest one."""
    tensors = {x: torch.randn(1, 1, n, 8, requires_grad=True) for x in "qkv"}
    if options.get("learn_sink"):
        tensors["sink"] = torch.zeros(1, requires_grad=True)
    sizes = saved_for_backward(lambda: run(tensors, options, pattern=pattern).output.sum().backward())
    return sum(sizes) / 4, max(sizes) / 4


@pytest.mark.parametrize("pattern", SELF)
def test_forward_and_backward_save_the_inputs_the_output_and_one_number_a_query(pattern):
    for n in (256, 1024):
        total, largest = saved(n, pattern, {})
        assert 4 * n * 8 + n <= total <= 4 * n * 8 + n + 64
        assert largest == n * 8


@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("options", OPTIONS[1:5])
def test_every_option_saves_memory_linear_in_length(monkeypatch, options, pattern):
    monkeypatch.setattr(backend, "PAIRS_AT_ONCE", 1 << 14)
    (short, _), (long, largest) = (saved(n, pattern, options) for n in (512, 2048))
    assert long < 4.4 * short and largest < 2048 * 2048 / 32


# layers and options


def test_a_layer_learns_one_sink_a_head_that_starts_at_zero():
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


def test_a_sink_works_on_encoded_memory():
    layer = create_layer("softmax", 8, 2, pattern="causal-cross", learn_sink=True).double()
    layer.projection.sink.data += torch.tensor([0.5, -2.0])
    x, memory = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    close(layer(x, state=layer.encode_memory(memory)).output, layer(x, memory).output)


def test_the_cost_counts_the_pairs_in_a_window():
    shape = Shape(2, 3, 100, 100, 4, 5)
    assert cost(shape, Config()).flops == 2 * 2 * 3 * 100 * 100 * 9
    narrow = cost(shape, Config(window=(7, 0)))
    assert narrow.flops == 2 * 2 * 3 * 100 * 8 * 9 and narrow.state == cost(shape, Config()).state


@pytest.mark.parametrize(
    ("pattern", "window"), [("causal-self", (2, 1)), ("noncausal-cross", (2, 0)), ("causal-cross", (2, 0))]
)
def test_windows_that_do_not_fit_the_pattern_are_refused(pattern, window):
    refused("window", run, qkv(4), {"window": window}, pattern=pattern)
    refused("window", create_layer, "softmax", 8, 2, pattern=pattern, window=window)


@pytest.mark.parametrize("shape", [(3,), (2, 4)])
def test_a_sink_is_one_number_a_head(shape):
    refused("sink", run, qkv(4) | {"sink": torch.zeros(shape, dtype=torch.float64)})


# parity


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("softmax_causal", "causal-self"),
        ("softmax_causal_more_keys", "causal-self"),
        ("softmax_causal_more_queries", "causal-self"),
        ("softmax_causal_right_padded", "causal-self"),
        ("softmax_gqa_bias", "causal-self"),
        ("softmax_noncausal_masked", "noncausal-cross"),
        ("softmax_softcap", "noncausal-cross"),
    ],
)
def test_parity_of_output_weights_and_gradients(name, pattern):
    arrays, masks = load(name), {}
    options = {"softcap": float(arrays["softcap"])} if "softcap" in arrays else {}
    if "query_mask" in arrays:
        masks["mask"] = Mask(valid=arrays["query_mask"])
    if "attn_bias" in arrays:
        masks["mask"] = Mask(bias=arrays["attn_bias"])
    if "key_mask" in arrays:
        masks["memory_mask"] = Mask(valid=arrays["key_mask"])
    tensors = {x: arrays[x].requires_grad_() for x in "qkv"}
    result = run(tensors, options, pattern=pattern, want={"weights"}, **masks)
    if "key_mask" not in arrays:  # here weights of padded tokens are gathered to the right
        close(result.extras["weights"], arrays["attn"], 1e-10)
    for output in (result.output, run(tensors, options, pattern=pattern, **masks).output):
        close(output, arrays["out"], 1e-10)  # observed 2e-15
        if "grad_out" in arrays:
            check_recorded(arrays, output, tensors, 1e-10)  # observed 9e-15
