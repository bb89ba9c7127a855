"""What is peculiar to universal relative positions: what a matrix after the softmax can tell that a bias cannot, its tables,
that nothing is normalised after it, and recorded outputs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import absorb, apply
from regard.backends import NATIVE, recording
from regard.contract import ALL_PATTERNS, BlockMask, Context, Mask, Shape, Unsupported
from regard.core.visibility import DistanceBias
from regard.create import create_layer
from regard.functional import softmax_attention
from regard.layers.parts import LayerCall
from regard.mechanisms.universal_rpe import MECHANISM, Config, cost
from regard.mechanisms.universal_rpe import forms as universal_rpe
from regard.models import Encoder, EncoderConfig, count_parameters, from_pretrained, save_pretrained
from regard.positions import Relative
from regard.positions.relative import bucket_starts
from regard.positions.toeplitz import at_offsets
from regard.workbench.verify import PROPERTIES, Place, check

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


def inputs(n: int, m: int | None = None, reach: int = 4, heads: int = 2, groups: int = 2) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {"q": (2, heads, n, 4), "k": (2, groups, m, 4), "v": (2, groups, m, 3), "factors": (heads, 2 * reach + 1)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "noncausal-self", **call: Any) -> Any:
    return apply(MECHANISM, tensors, pattern=pattern, **call)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def toeplitz(table: Tensor, n: int, m: int, first: int = 0) -> Tensor:
    """C, one entry at a time; query i has the rank first + i."""
    reach = table.shape[1] // 2
    rows = [[table[:, max(-reach, min(reach, j - i - first)) + reach] for j in range(m)] for i in range(n)]
    return torch.stack([torch.stack(row, -1) for row in rows], 1)


def explicit(tensors: dict[str, Tensor], pattern: str, bias: Tensor | float = 0.0) -> Tensor:
    q, k, v, table = tensors.values()
    n, m, causal = q.shape[2], k.shape[2], pattern == "causal-self"
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    if causal:
        scores = scores.masked_fill(~torch.ones(n, m).tril(m - n).bool(), -torch.inf)
    return (scores.softmax(-1) * toeplitz(table, n, m, m - n if causal else 0)) @ v


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize(("reach", "groups"), [(1, 2), (4, 1), (30, 2)])
def test_every_form_equals_the_weights_times_an_explicit_matrix(reach, groups, pattern, monkeypatch):
    tensors = inputs(13, 17 if pattern != "noncausal-self" else None, reach=reach, groups=groups)
    expected = explicit(tensors, pattern)
    for numbers in (1, 200, 1 << 20):
        monkeypatch.setattr(universal_rpe, "NUMBERS_AT_ONCE", numbers)
        close(run(tensors, pattern).output, expected)
    close(run(tensors, pattern, form="reference").output, expected)


def test_an_offset_is_the_key_minus_the_query():
    tensors = inputs(9)
    for offset in (-3, 0, 2):
        tensors["factors"] = torch.zeros(2, 9, dtype=torch.float64)
        tensors["factors"][:, 4 + offset] = 1.0
        weights = run(tensors, want={"weights"}).extras["weights"]
        only = weights.diagonal(offset, 2, 3)
        close(weights.sum((2, 3)), only.sum(-1))
        assert (only > 0).all()


def test_factors_of_one_give_softmax_attention():
    tensors = inputs(12)
    q, k, v = (tensors[name] for name in "qkv")
    for factors in (None, torch.ones(2, 9, dtype=torch.float64)):
        for pattern in ALL_PATTERNS:
            found = apply(MECHANISM, {"q": q, "k": k, "v": v, "factors": factors}, pattern=pattern).output
            close(found, softmax_attention(q, k, v, pattern=pattern))


def test_equal_tokens_stay_equal_under_any_bias_but_not_under_factors():
    """The counterexample of the paper, three layers deep; the mask of a causal layer would tell positions by itself."""
    token, n = torch.randn(1, 1, 16, dtype=torch.float64), 11
    for factors, told in (("none", False), ("unique", True)):
        x = token.expand(2, n, 16)
        for _ in range(3):
            layer = create_layer("universal_rpe", 16, 4, pattern="noncausal-self", factors=factors).double()
            for table in (*layer.positions.parameters(), *layer.projection.parameters()):
                torch.nn.init.normal_(table)
            x = x + layer(x).output
        spread = (x - x[:, :1]).abs().amax(-1)[:, 1:]
        assert (spread > 1e-3).all() if told else (spread < 1e-12).all()


def test_factors_of_the_past_alone_count_the_tokens_before():
    n = 10
    tensors = inputs(n, reach=n)
    tensors["q"] = torch.zeros_like(tensors["q"])
    tensors["v"] = tensors["v"][:, :, :1].expand(-1, -1, n, -1)
    tensors["factors"] = (torch.arange(-n, n + 1) <= 0).double().expand(2, -1)
    share = torch.arange(1.0, n + 1, dtype=torch.float64)[:, None] / n
    close(run(tensors).output, share * tensors["v"])


def test_the_output_is_linear_in_the_factors_and_rows_of_weights_sum_to_anything():
    tensors = inputs(8)
    other = torch.randn_like(tensors["factors"])
    mixed = 0.3 * tensors["factors"] - 2.0 * other
    expected = 0.3 * run(tensors).output - 2.0 * run(tensors | {"factors": other}).output
    close(run(tensors | {"factors": mixed}).output, expected)
    extras = run(tensors, want={"weights"}).extras
    close(extras["softmax_weights"].sum(-1), torch.ones(2, 2, 8, dtype=torch.float64))
    close(extras["weights"], extras["softmax_weights"] * toeplitz(tensors["factors"], 8, 8))
    assert (extras["weights"] < 0).any()
    close(extras["weights"] @ tensors["v"], run(tensors).output)


def test_factors_of_zero_give_zero_and_still_learn():
    tensors = {name: x.requires_grad_() for name, x in inputs(7).items()}
    tensors["factors"].data.zero_()
    bias = torch.zeros(1, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    output = run(tensors, mask=Mask(bias=bias)).output
    assert (output == 0).all()
    of_bias, of_factors = torch.autograd.grad(output.sum(), [bias, tensors["factors"]])
    assert (of_bias == 0).all() and (of_factors[:, 1:-1] != 0).all()


def test_an_interior_that_sees_a_band_moves_with_its_sequence():
    n, reach = 24, 2
    tensors = inputs(n, reach=reach)
    offsets = torch.arange(n) - torch.arange(n)[:, None]
    band = torch.zeros(1, 1, n, n, dtype=torch.float64).masked_fill(offsets.abs() > reach, -torch.inf)
    moved = {name: x.roll(5, 2) if name in "qkv" else x for name, x in tensors.items()}
    found, expected = (run(t, mask=Mask(bias=band)).output for t in (moved, tensors))
    close(found[:, :, 5 + reach : -reach], expected[:, :, reach : n - 5 - reach])


@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
def test_padding_enters_neither_weights_nor_offsets(pattern):
    tensors = inputs(12)
    valid = torch.rand(2, 12) > 0.4
    valid[1] = False
    padded = {name: x.masked_fill(~valid[:, None, :, None], torch.nan) for name, x in tensors.items() if name in "qkv"}
    found = run(tensors | padded, pattern, mask=Mask(valid=valid)).output
    alone = {name: x[:1, :, valid[0]] if name in "qkv" else x for name, x in tensors.items()}
    close(found[:1, :, valid[0]], explicit(alone, pattern))
    assert (found[0, :, ~valid[0]] == 0).all() and (found[1] == 0).all()


def test_biases_of_schemes_and_of_the_call_are_inside_the_softmax(monkeypatch):
    monkeypatch.setattr(universal_rpe, "NUMBERS_AT_ONCE", 150)
    tensors, scheme = inputs(11), Relative(heads=2, std=1.0).double()
    bias = torch.randn(2, 1, 11, 11, dtype=torch.float64)
    by_distance = DistanceBias(lambda d: scheme.by_distance(d, False))
    ranks = torch.arange(11)[None]
    expected = explicit(tensors, "noncausal-self", bias + scheme.bias(ranks, ranks, False))
    close(run(tensors, mask=Mask(bias=bias), position_bias=by_distance).output, expected)
    by_rank = lambda i, j: by_distance(i, j)  # noqa: E731
    close(run(tensors, mask=Mask(bias=bias), position_bias=by_rank).output, expected)


def test_a_query_hidden_from_every_key_gives_zero_with_finite_gradients():
    tensors = {name: x.requires_grad_() for name, x in inputs(6).items()}
    bias = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    bias[..., 4, :] = -torch.inf
    for pattern in ("noncausal-self", "causal-self"):
        result = run(tensors, pattern, mask=Mask(bias=bias), want={"weights"})
        for x in (result.output, result.extras["weights"], result.extras["softmax_weights"]):
            assert (x[:, :, 4] == 0).all() and (x[:, :, 5] != 0).any()
        for gradient in torch.autograd.grad(result.output.square().sum(), list(tensors.values())):
            assert gradient.isfinite().all()


def test_dropout_comes_after_the_factors_and_draws_from_the_generator(monkeypatch):
    tensors = inputs(40)
    tensors["v"] = torch.eye(40, dtype=torch.float64).expand(2, 2, -1, -1)  # outputs are weights

    def drop(seed: int) -> Tensor:
        return run(tensors, dropout=0.25, generator=torch.Generator().manual_seed(seed)).output

    whole, found = run(tensors).output, drop(0)
    kept = found != 0
    close(found[kept], whole[kept] / 0.75)
    assert abs(kept.double().mean().item() - 0.75) < 0.03
    assert torch.equal(drop(0), found) and not torch.equal(drop(1), found)
    # blocks that are computed again in the backward pass drop the same weights
    leaves = {name: x.requires_grad_() for name, x in inputs(9).items()}
    weight = torch.randn(2, 2, 9, 3, dtype=torch.float64)
    monkeypatch.setattr(universal_rpe, "NUMBERS_AT_ONCE", 100)
    for generator in (True, False):

        def output(values: Tensor, generator: bool = generator) -> Tensor:
            torch.manual_seed(3)
            rng = torch.Generator().manual_seed(3) if generator else None
            return run(leaves | {"v": values}, dropout=0.5, generator=rng).output

        (gradient,) = torch.autograd.grad((output(leaves["v"]) * weight).sum(), leaves["v"])
        step = torch.randn_like(leaves["v"])
        change = ((output(leaves["v"] + step) - output(leaves["v"])) * weight).sum()  # the output is linear in v
        assert (gradient * step).sum().item() == pytest.approx(change.item())


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_gradients_in_blocks_are_those_of_the_definition(pattern, monkeypatch):
    tensors = {name: x.requires_grad_() for name, x in inputs(9, reach=3).items()}
    leaves = list(tensors.values())

    def gradients(form: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(tensors, pattern, form=form).output.square().sum(), leaves)

    expected = gradients("reference")
    for numbers in (40, 1 << 20):
        monkeypatch.setattr(universal_rpe, "NUMBERS_AT_ONCE", numbers)
        for a, b in zip(gradients("parallel"), expected, strict=True):
            close(a, b, 1e-11)


def test_gradcheck_of_a_bias_and_the_factors():
    tensors = [x[:1, :1, :4].requires_grad_() if x.ndim == 4 else x[:1].requires_grad_() for x in inputs(4).values()]
    bias = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
        return run({"q": q, "k": k, "v": v, "factors": factors}, mask=Mask(bias=bias)).output

    assert torch.autograd.gradcheck(function, (*tensors, bias))


def test_queries_of_a_memory_are_counted_on_from_call_to_call():
    tensors = inputs(9, 14)
    expected = explicit(tensors, "causal-cross")
    state = absorb(MECHANISM, {name: tensors[name] for name in "kv"}, pattern="causal-cross")
    outputs = []
    for part in torch.arange(9).split([1, 1, 5, 2]):
        result = run({"q": tensors["q"][:, :, part], "factors": tensors["factors"]}, "causal-cross", state=state)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 2), expected)


def test_the_cache_is_one_of_keys_and_values():
    state = run(inputs(50), "causal-self", return_state=True).state
    one = state.k[:1].numel() + state.v[:1].numel()
    assert one == cost(Shape(1, 2, 1, 50, 4, 3), Config()).state
    assert not MECHANISM.recurrent


# the two ways to O


@pytest.fixture
def way(monkeypatch):
    """Takes one of the ways whatever the size and the dtype: "parts", from attention calls, or "explicit"."""

    def take(name: str) -> None:
        monkeypatch.setattr(universal_rpe, "FEWEST_WEIGHTS", 0 if name == "parts" else math.inf)
        monkeypatch.setattr(universal_rpe, "has_kernel", lambda *_: True)

    return take


def mixed_factors(heads: int, reach: int) -> Tensor:
    """Of both signs, some of them 0; those of the first head far larger."""
    table = torch.randn(heads, 2 * reach + 1, dtype=torch.float64)
    table[0] *= 1e3
    table[:, ::3] = 0.0
    return table


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("reach", [1, 4, 30])
@pytest.mark.parametrize("biased", ["none", "toeplitz", "alibi"])
def test_attention_in_parts_equals_explicit_weights_with_its_gradients(biased, reach, pattern, way):
    uneven = pattern != "noncausal-self"
    for n, m in ((19, 19), (7, 23), (23, 7)) if uneven else ((19, 19),):
        tensors = inputs(n, m, reach=reach, heads=4) | {"factors": mixed_factors(4, reach)}
        numbers = torch.randn(4, 13, dtype=torch.float64)
        leaves = [x.requires_grad_() for x in (*tensors.values(), numbers)]
        bias = {
            "none": None,
            "toeplitz": DistanceBias(lambda d, numbers=numbers: at_offsets(numbers, d)),
            "alibi": DistanceBias(lambda d, numbers=numbers: numbers[:, 0].view(-1, *[1] * d.ndim) * d.abs()),
        }[biased]
        mask = Mask(lengths=torch.tensor([n, 5]))
        memory_mask = Mask(lengths=torch.tensor([m - 1, 3])) if uneven else None
        for masks in ({}, {"mask": mask, "memory_mask": memory_mask}):
            found = {}
            for name in ("parts", "explicit"):
                way(name)
                output = run(tensors, pattern, position_bias=bias, **masks).output
                weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
                gradients = torch.autograd.grad((output * weight).sum(), leaves, allow_unused=biased == "none")
                found[name] = [output, *(x for x in gradients if x is not None)]
            for a, b in zip(found["parts"], found["explicit"], strict=True):
                close(a, b, 1e-12 * float(b.detach().abs().max().clamp(min=1)))


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_no_offset_is_left_out_in_parts(pattern, way):
    way("parts")
    for n in range(1, 8):
        tensors = inputs(n, reach=4)
        close(run(tensors, pattern).output, explicit(tensors, pattern))


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_gradcheck_of_attention_in_parts(pattern, way):
    way("parts")
    tensors = {name: x[:1].requires_grad_() if x.ndim == 4 else x for name, x in inputs(5, reach=2).items()}
    factors = mixed_factors(2, 2).requires_grad_()
    numbers = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, factors: Tensor, numbers: Tensor) -> Tensor:
        bias = DistanceBias(lambda d: at_offsets(numbers, d))
        return run({"q": q, "k": k, "v": v, "factors": factors}, pattern, position_bias=bias).output

    assert torch.autograd.gradcheck(function, (*(tensors[name] for name in "qkv"), factors, numbers))


def test_queries_that_see_no_key_give_zero_with_finite_gradients_in_parts(way):
    way("parts")
    tensors = {name: x.requires_grad_() for name, x in inputs(12, 5, reach=2).items()}
    output = run(tensors, "causal-self").output
    assert (output[:, :, :7] == 0).all() and (output[:, :, 7:] != 0).all()
    masks = {"mask": Mask(lengths=torch.tensor([12, 12])), "memory_mask": Mask(lengths=torch.tensor([0, 4]))}
    for pattern, kept in (("noncausal-cross", masks), ("causal-self", {})):
        output = run(tensors, pattern, **kept).output
        assert pattern == "causal-self" or ((output[0] == 0).all() and (output[1] != 0).all())
        for gradient in torch.autograd.grad(output.square().sum(), list(tensors.values())):
            assert gradient.isfinite().all()


def test_factors_of_zero_give_zero_and_still_learn_in_parts(way):
    way("parts")
    tensors = {name: x.requires_grad_() for name, x in inputs(17).items()}
    tensors["factors"].data.zero_()
    output = run(tensors).output
    close(output, torch.zeros_like(output))
    (gradient,) = torch.autograd.grad(output.sum(), [tensors["factors"]])
    tensors["factors"].data.normal_()
    (elsewhere,) = torch.autograd.grad(run(tensors).output.sum(), [tensors["factors"]])
    assert (gradient != 0).all()
    close(gradient, elsewhere)  # O is linear in the factors


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_packed_documents_in_parts_are_those_alone(pattern, way):
    way("parts")
    tensors, borders = inputs(31), [0, 3, 3, 20, 31]
    one = {name: x[:1] if name in "qkv" else x for name, x in tensors.items()}
    found = run(one, pattern, mask=Mask(cu_seqlens=torch.tensor(borders))).output
    for start, end in itertools.pairwise(borders):
        alone = {name: x[:, :, start:end] if name in "qkv" else x for name, x in one.items()}
        if end > start:
            close(found[:, :, start:end], explicit(alone, pattern))


def test_decoding_in_parts_equals_the_whole(way):
    tensors = inputs(24, reach=3)
    for pattern in ("causal-self", "causal-cross"):
        expected, outputs = explicit(tensors, pattern), []
        way("parts")
        state = None
        if pattern == "causal-cross":
            state = absorb(MECHANISM, {name: tensors[name] for name in "kv"}, pattern=pattern)
        for part in torch.arange(24).split([9, 1, 1, 13]):
            names = "qkv" if pattern == "causal-self" else "q"
            given = {name: tensors[name][:, :, part] for name in names} | {"factors": tensors["factors"]}
            result = run(given, pattern, state=state, return_state=True)
            state = result.state
            outputs.append(result.output)
        close(torch.cat(outputs, 2), expected)


def backends(tensors: dict[str, Tensor], **call: Any) -> set[str]:
    """Those that ran an engine; none for explicit weights."""
    with recording() as used:
        run(tensors, **call)
    return used


@pytest.mark.skipif(NATIVE.missing is not None, reason="needs the native library")
def test_long_calls_run_in_parts_where_a_kernel_can_answer_them():
    long = {name: x.float() for name, x in inputs(400).items()}
    short = {name: x[:, :, :9] if name in "qkv" else x for name, x in long.items()}
    assert 2 * 2 * 400 * 400 >= universal_rpe.FEWEST_WEIGHTS > 2 * 2 * 9 * 9
    by_distance = DistanceBias(lambda d: d.abs() * torch.ones(2, *[1] * d.ndim))
    in_parts: list[dict[str, Any]] = [{}, {"position_bias": by_distance}, {"backend": "native"}]
    for call in in_parts:
        assert backends(long, **call) == {"native"}
    assert backends({name: x for name, x in long.items() if name != "factors"}) == {"native"}
    assert backends(short, backend="native") == {"native"}
    explicitly: list[dict[str, Any]] = [
        {"backend": "torch"},
        {"dropout": 0.1},
        {"want": {"weights"}},
        {"mask": Mask(bias=torch.zeros(1, 1, 400, 400))},
        {"mask": Mask(blocks=BlockMask(torch.ones(1, 1, 4, 4, dtype=torch.bool), 100))},
        {"position_bias": lambda i, j: by_distance(i, j)},
    ]
    for call in explicitly:
        assert backends(long, **call) == set()
    assert backends(short) == backends(inputs(400)) == set()
    with pytest.raises(Unsupported, match="native"):
        run(short, backend="native", dropout=0.1)


@pytest.mark.skipif(NATIVE.missing is not None, reason="needs the native library")
@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_attention_in_parts_on_the_kernel_has_every_property_of_the_matrix(pattern, monkeypatch):
    monkeypatch.setattr(universal_rpe, "FEWEST_WEIGHTS", 0)
    cells = [
        check(Place(MECHANISM, pattern, prop, dtype, "native"))
        for prop in PROPERTIES
        if prop.level == "function"
        for dtype in prop.dtypes_on("native")
    ]
    ran = [cell for cell in cells if cell is not None]
    assert len(ran) >= 10
    assert not [(cell.property, cell.dtype, cell.detail) for cell in ran if cell.status == "fail"]


@pytest.mark.skipif(NATIVE.missing is not None, reason="needs the native library")
def test_a_long_call_compiles_whole():
    long = {name: x.float() for name, x in inputs(400).items()}

    def function(q: Tensor, k: Tensor, v: Tensor, factors: Tensor) -> Tensor:
        return run({"q": q, "k": k, "v": v, "factors": factors}).output

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    close(compiled(*long.values()), function(*long.values()), 1e-5)


# grids and graphs


@pytest.mark.parametrize("numbers", [50, 1 << 20])
def test_factors_on_a_grid_are_those_of_both_offsets(numbers, monkeypatch):
    monkeypatch.setattr(universal_rpe, "NUMBERS_AT_ONCE", numbers)
    tensors = inputs(12)
    del tensors["factors"]
    table = torch.randn(2, 3, 7, dtype=torch.float64)
    y, x = torch.arange(12) // 4, torch.arange(12) % 4
    c = table[:, (y - y[:, None]).clamp(-1, 1) + 1, (x - x[:, None]).clamp(-3, 3) + 3]
    expected = (tensors["q"] @ tensors["k"].mT / 2).softmax(-1) * c @ tensors["v"]
    for form in ("parallel", "reference"):
        close(run(tensors | {"grid_factors": table}, grid=(3, 4), form=form).output, expected)
    close(run(tensors | {"pair_factors": c.expand(2, -1, -1, -1)}).output, expected)


@pytest.mark.parametrize("numbers", [50, 1 << 20])
@pytest.mark.parametrize("lengths", [[12, 12], [12, 5]])
def test_causal_factors_on_a_grid_are_those_of_both_offsets_row_by_row(lengths, numbers, monkeypatch):
    monkeypatch.setattr(universal_rpe, "NUMBERS_AT_ONCE", numbers)
    tensors, width = inputs(12), 4
    table = torch.randn(2, 3, 5, dtype=torch.float64)
    tensors["grid_factors"] = table
    del tensors["factors"]
    q, k, v = (tensors[name] for name in "qkv")
    call: dict[str, Any] = {"grid": (3, width), "mask": Mask(lengths=torch.tensor(lengths))}
    found = [run(tensors, "causal-self", **call).output]
    if lengths == [12, 12]:
        found.append(run(tensors, "causal-self", grid=(3, width), form="reference").output)
    for output, b, h, i in itertools.product(found, range(2), range(2), range(12)):
        if i < lengths[b]:
            weights = (q[b, h, i] @ k[b, h, : i + 1].mT / 2).softmax(-1)
            expected = torch.zeros(3, dtype=torch.float64)
            for j in range(i + 1):
                down, along = j // width - i // width, j % width - i % width
                c = table[h, max(down, -1) + 1, min(max(along, -2), 2) + 2]
                expected += weights[j] * c * v[b, h, j]
            close(output[b, h, i], expected)
    later = {name: x.clone() for name, x in tensors.items()}
    later["v"][:, :, 7] += 1
    assert torch.equal(run(later, "causal-self", **call).output[:, :, :7], found[0][:, :, :7])


@pytest.mark.parametrize("numbers", [50, 1 << 20])
def test_factors_of_a_graph_are_learned_by_distance(numbers, monkeypatch):
    monkeypatch.setattr(universal_rpe, "NUMBERS_AT_ONCE", numbers)
    tensors, distance = inputs(7), torch.randint(0, 4, (2, 7, 7))
    del tensors["factors"]
    by_distance = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    c = by_distance[:, distance].transpose(0, 1)
    lengths = torch.tensor([7, 4])
    found = run(tensors | {"pair_factors": c}, mask=Mask(lengths=lengths)).output
    for row, size in enumerate(lengths.tolist()):
        q, k, v = (tensors[name][row, :, :size] for name in "qkv")
        close(found[row, :, :size], (q @ k.mT / 2).softmax(-1) * c[row, :, :size, :size] @ v)
    (gradient,) = torch.autograd.grad(found.sum(), by_distance)
    assert (gradient != 0).any(-1).all()


# the layer


def layer(pattern: str = "noncausal-self", **options: Any) -> Any:
    return create_layer("universal_rpe", 16, 4, pattern=pattern, **options).double()


def test_a_layer_starts_as_attention_with_a_relative_bias_and_learns_the_difference():
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    made, plain = layer(), layer(factors="none")
    loaded = made.load_state_dict(plain.state_dict(), strict=False)
    assert loaded.missing_keys == ["projection.table.table"]
    assert made.positions.name == "toeplitz" and 0.01 < made.positions.table.std() < 0.04
    close(made(x).output, plain(x).output)
    assert not made.projection.table.table.any()  # weight decay then pulls C to 1
    for activation in ("relu", "softplus"):
        other = layer(activation=activation)
        other.load_state_dict(made.state_dict())
        close(other(x).output, plain(x).output)
    assert layer(share_heads=True).projection.table.table.shape == (1, 257)
    near_zero = layer(start="normal")
    near_zero.output.bias.data.zero_()
    assert near_zero(x).output.abs().max() < 0.1 * made(x).output.abs().max()


def test_activations_keep_factors_from_being_negative():
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    for activation, low in (("none", None), ("relu", 0.0), ("softplus", 1e-9)):
        made = layer(activation=activation)
        torch.nn.init.normal_(made.projection.table.table, std=3.0)
        made(x)
        factors = made.projection.inputs({}, LayerCall(x, x, Context()))["factors"]
        assert (factors < 0).any() if low is None else (factors >= low).all()


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_tell_small_offsets_apart_and_both_signs(causal):
    made = layer("causal-self" if causal else "noncausal-self", factors="bucketed", num_buckets=16, max_distance=40)
    torch.nn.init.normal_(made.projection.table.table)
    factors = made.projection.inputs({}, LayerCall(None, None, Context()))["factors"]
    assert factors.shape == (4, 81)
    past = factors[0, :41].flip(0)
    exact = 8 if causal else 4
    assert past[: exact + 1].unique().numel() == exact + 1
    assert past.unique().numel() == (16 if causal else 8)
    if not causal:
        future = factors[0, 41:]
        starts = bucket_starts(8, 40)
        assert future.unique().numel() == 7 and not set(past.tolist()) & set(future.tolist())
        for start in starts[1:]:
            assert past[start] != past[start - 1] and future[start - 1] != future[start - 2]


def test_a_layer_on_a_grid():
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    made = layer(max_distance=(2, 3))
    torch.nn.init.normal_(made.projection.grid_table)
    wide, tall = (made(x, context=Context(grid=grid)).output for grid in ((3, 4), (4, 3)))
    assert (wide - tall).abs().max() > 1e-3
    with pytest.raises(Unsupported, match="grid"):
        made(x)
    causal = layer("causal-self", max_distance=(2, 3))
    causal.load_state_dict(made.state_dict())
    image = Context(grid=(3, 4))
    close(causal(x, context=image).output[:, -1], made(x, context=image).output[:, -1])  # which sees all tokens
    with pytest.raises(Unsupported, match="does not keep the width"):
        causal(x, context=image.replace(want=frozenset({"state"})))
    with pytest.raises(Unsupported, match="self patterns"):
        layer("causal-cross", max_distance=(2, 3))


def test_a_model_whose_layers_share_both_tables_is_saved_and_loaded(tmp_path):
    options = {"num_classes": 3, "vocab_size": 9, "plan": "universal_rpe", "num_layers": 3, "dim": 16, "num_heads": 4}
    apart, model = (Encoder(EncoderConfig(**options, stack={"share": share})) for share in ("none", "tables"))
    assert count_parameters(apart) - count_parameters(model) == 2 * 2 * 4 * 257
    ids = torch.randint(0, 9, (2, 7))
    model(ids).output.sum().backward()
    first = model.blocks[0].mixer
    assert first.projection.table.table.grad.abs().sum() > 0
    with torch.no_grad():
        first.projection.table.table.normal_()
        first.positions.table.normal_()
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    for other in again.blocks[1:]:
        assert other.mixer.projection is again.blocks[0].mixer.projection
        assert other.mixer.positions is again.blocks[0].mixer.positions
        assert other.mixer.query is not again.blocks[0].mixer.query
    assert torch.equal(again(ids).output, model.eval()(ids).output)


@pytest.mark.parametrize(
    "options",
    [
        {"factors": "learned"},
        {"start": "zeros"},
        {"activation": "exp"},
        {"max_distance": 0},
        {"max_distance": (1, 0)},
        {"max_distance": (1, 2, 3)},
        {"max_distance": (1, 2), "factors": "bucketed"},
        {"factors": "bucketed", "num_buckets": 7},
        {"factors": "bucketed", "num_buckets": 64, "max_distance": 30},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_calls_that_cannot_be_honoured_are_refused():
    tensors = inputs(6)
    pairs = {"pair_factors": torch.ones(2, 2, 6, 6, dtype=torch.float64)}
    with pytest.raises(Unsupported, match="one of them"):
        run(tensors | pairs)
    alone = {name: tensors[name] for name in "qkv"}
    with pytest.raises(Unsupported, match="whole calls"):
        run(alone | pairs, "causal-self", return_state=True)
    with pytest.raises(Unsupported, match="R >= 1"):
        run(alone | {"factors": torch.ones(2, 4, dtype=torch.float64)})
    grid = {"grid_factors": torch.ones(2, 3, 3, dtype=torch.float64)}
    for call in ({}, {"grid": (6,)}, {"grid": (2, 3), "pattern": "causal-cross"}):
        with pytest.raises(Unsupported, match="self patterns with grid"):
            run(alone | grid, **call)
    with pytest.raises(Unsupported, match="width of a grid"):
        run(alone | grid, "causal-self", grid=(2, 3), return_state=True)


# parity


@pytest.mark.parametrize("name", ["universal_rpe_self", "universal_rpe_padded"])
def test_equals_the_official_code(name):
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        recorded = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    made = create_layer(
        "universal_rpe", 12, 2, pattern="noncausal-self", max_distance=5, position_options={"max_distance": 5}
    )
    weights = {"positions.table": recorded["b"], "projection.table.table": recorded["c"] - 1}  # it learns C - 1
    for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "out"}.items():
        weights |= {f"{ours}.{part}": recorded[f"{theirs}_{part}"] for part in ("weight", "bias")}
    made.double().load_state_dict(weights)
    x = recorded["x"].requires_grad_()
    context = Context(mask=Mask(lengths=recorded["lengths"]), want=frozenset({"weights"}))
    result = made(x, context=context)
    valid = torch.arange(x.shape[1]) < recorded["lengths"][:, None]
    close(result.output[valid], recorded["out"][valid])
    softmax_weights = result.extras["softmax_weights"].transpose(1, 2)
    close(softmax_weights[valid], recorded["weights"].transpose(1, 2)[valid])
    leaves = [x, made.positions.table, made.projection.table.table, made.query.weight]
    found = torch.autograd.grad(result.output, leaves, recorded["grad_out"])
    for gradient, leaf in zip(found, ("x", "b", "c", "q_weight"), strict=True):
        close(gradient, recorded[f"grad_{leaf}"])
