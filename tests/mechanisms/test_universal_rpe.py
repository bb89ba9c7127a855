"""Tests specific to universal relative positions: what a matrix after the softmax can express that a bias cannot, its
tables, weights that are not normalised, and recorded outputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import calls, check_gradients, close, load, qkv, refused
from torch import Tensor

from regard.backends import NATIVE, watch_backends
from regard.contract import ALL_PATTERNS, BlockMask, Context, LayerCall, Mask
from regard.core.visibility import DistanceBias
from regard.create import create_layer
from regard.functional import softmax_attention
from regard.mechanisms.universal_rpe import MECHANISM
from regard.mechanisms.universal_rpe import forms as universal_rpe
from regard.positions import Relative
from regard.positions.toeplitz import at_offsets
from regard.workbench.verification.verify import PROGRAMS, PROPERTIES, Place, check

run = calls(MECHANISM, "noncausal-self")


def inputs(n: int, m: int | None = None, reach: int = 4, **sizes: int) -> dict[str, Tensor]:
    tensors = qkv(n, m, value_dim=3, **sizes)
    return tensors | {"factors": torch.randn(tensors["q"].shape[1], 2 * reach + 1, dtype=torch.float64)}


def without_factors(n: int) -> dict[str, Tensor]:
    return {name: x for name, x in inputs(n).items() if name != "factors"}


def toeplitz(table: Tensor, n: int, m: int, first: int = 0) -> Tensor:
    """The matrix C, one entry at a time; query i has the rank first + i."""
    reach = table.shape[1] // 2
    rows = [[table[:, max(-reach, min(reach, j - i - first)) + reach] for j in range(m)] for i in range(n)]
    return torch.stack([torch.stack(row, -1) for row in rows], 1)


def explicit(tensors: dict[str, Tensor], pattern: str, bias: Tensor | float = 0.0, c: Tensor | None = None) -> Tensor:
    """Attention with weights multiplied by a matrix C, by default that of the offsets."""
    q, k, v = (tensors[name] for name in "qkv")
    n, m, causal = q.shape[2], k.shape[2], pattern == "causal-self"
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    if causal:
        scores = scores.masked_fill(~torch.ones(n, m).tril(m - n).bool(), -torch.inf)
    c = toeplitz(tensors["factors"], n, m, m - n if causal else 0) if c is None else c
    return (scores.softmax(-1) * c) @ v


def output_and_gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    gradients = torch.autograd.grad((output * weight).sum(), leaves, allow_unused=True)
    return [output, *(x for x in gradients if x is not None)]


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize(("reach", "groups"), [(1, 2), (4, 1), (30, 2)])
def test_blocks_of_any_size_equal_the_weights_times_an_explicit_matrix(reach, groups, pattern, monkeypatch):
    tensors = inputs(13, 17 if pattern != "noncausal-self" else None, reach=reach, groups=groups)
    leaves = [x.requires_grad_() for x in tensors.values()]
    expected = output_and_gradients(explicit(tensors, pattern), leaves)
    for numbers in (1, 200, 1 << 20):
        monkeypatch.setattr(universal_rpe, "NUMBERS_AT_ONCE", numbers)
        found = output_and_gradients(run(tensors, pattern=pattern).output, leaves)
        for a, b in zip(found, expected, strict=True):
            close(a, b)
    close(run(tensors, pattern=pattern, form="reference").output, expected[0])


def test_factors_of_one_give_softmax_attention():
    tensors = inputs(12)
    q, k, v = (tensors[name] for name in "qkv")
    for factors in (None, torch.ones(2, 9, dtype=torch.float64)):
        for pattern in ALL_PATTERNS:
            found = run(tensors | {"factors": factors}, pattern=pattern).output
            close(found, softmax_attention(q, k, v, pattern=pattern))


def test_equal_tokens_stay_equal_under_any_bias_but_not_under_factors():
    """The paper's counterexample, three layers deep; in a causal layer the mask alone would reveal positions."""
    token, n = torch.randn(1, 1, 16, dtype=torch.float64), 11
    for factors, told in (("none", False), ("unique", True)):
        x = token.expand(2, n, 16)
        for _ in range(3):
            made = layer(factors=factors)
            for table in (*made.positions.parameters(), *made.projection.parameters()):
                torch.nn.init.normal_(table)
            x = x + made(x).output
        spread = (x - x[:, :1]).abs().amax(-1)[:, 1:]
        assert (spread > 1e-3).all() if told else (spread < 1e-12).all()


def test_rows_of_weights_sum_to_anything_and_both_kinds_of_weights_are_given():
    tensors = inputs(8)
    result = run(tensors, want={"weights"})
    weights, softmax_weights = result.extras["weights"], result.extras["softmax_weights"]
    close(softmax_weights.sum(-1), torch.ones(2, 2, 8, dtype=torch.float64))
    close(weights, softmax_weights * toeplitz(tensors["factors"], 8, 8))
    assert (weights < 0).any()
    close(weights @ tensors["v"], result.output)


def test_biases_of_schemes_and_of_the_call_are_inside_the_softmax(monkeypatch):
    monkeypatch.setattr(universal_rpe, "NUMBERS_AT_ONCE", 150)
    tensors, scheme = inputs(11), Relative(heads=2, std=1.0).double()
    bias = torch.randn(2, 1, 11, 11, dtype=torch.float64, requires_grad=True)
    leaves = [x.requires_grad_() for x in (*tensors.values(), bias, scheme.table)]
    by_distance = DistanceBias(lambda d: scheme.by_distance(d, False))
    ranks = torch.arange(11)[None]
    scores = bias + scheme.bias(ranks, ranks, False)
    expected = output_and_gradients(explicit(tensors, "noncausal-self", scores), leaves)
    for told in (by_distance, lambda i, j: by_distance(i, j)):
        found = output_and_gradients(run(tensors, mask=Mask(bias=bias), position_bias=told).output, leaves)
        for a, b in zip(found, expected, strict=True):
            close(a, b)


def test_a_query_hidden_from_every_key_gives_zero_with_finite_gradients():
    tensors = {name: x.requires_grad_() for name, x in inputs(6).items()}
    bias = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    bias[..., 4, :] = -torch.inf
    for pattern in ("noncausal-self", "causal-self"):
        result = run(tensors, pattern=pattern, mask=Mask(bias=bias), want={"weights"})
        for x in (result.output, result.extras["weights"], result.extras["softmax_weights"]):
            assert (x[:, :, 4] == 0).all() and (x[:, :, 5] != 0).any()
        for gradient in torch.autograd.grad(result.output.square().sum(), list(tensors.values())):
            assert gradient.isfinite().all()


def test_dropout_comes_after_the_factors():
    tensors = inputs(40) | {"v": torch.eye(40, dtype=torch.float64).expand(2, 2, -1, -1)}  # outputs are weights
    whole = run(tensors).output
    found = run(tensors, dropout=0.25).output
    kept = found != 0
    close(found[kept], whole[kept] / 0.75)
    assert abs(kept.double().mean().item() - 0.75) < 0.03


@pytest.mark.parametrize("seeded", [True, False])
def test_blocks_computed_again_for_their_gradients_drop_the_same_weights(seeded, monkeypatch):
    monkeypatch.setattr(universal_rpe, "NUMBERS_AT_ONCE", 100)
    tensors = {name: x.requires_grad_() for name, x in inputs(9).items()}
    weight = torch.randn(2, 2, 9, 3, dtype=torch.float64)

    def total(v: Tensor) -> Tensor:
        torch.manual_seed(3)
        rng = torch.Generator().manual_seed(3) if seeded else None
        return (run(tensors | {"v": v}, dropout=0.5, generator=rng).output * weight).sum()

    (gradient,) = torch.autograd.grad(total(tensors["v"]), tensors["v"])
    step = torch.randn_like(gradient)
    change = total(tensors["v"] + step) - total(tensors["v"])  # the output is linear in v
    assert (gradient * step).sum().item() == pytest.approx(change.item())


# the two ways to compute O


@pytest.fixture
def way(monkeypatch):
    """Force one of the ways, whatever the size and dtype: "parts", made of attention calls, or "explicit" weights."""

    def take(name: str) -> None:
        monkeypatch.setattr(universal_rpe, "FEWEST_WEIGHTS", 0 if name == "parts" else math.inf)
        monkeypatch.setattr(universal_rpe, "has_kernel", lambda *_: True)

    return take


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("reach", [1, 4, 30])
@pytest.mark.parametrize("biased", ["none", "toeplitz", "alibi"])
def test_attention_in_parts_equals_explicit_weights_with_its_gradients(biased, reach, pattern, way):
    uneven = pattern != "noncausal-self"
    sizes = [(19, 19), *((n, n) for n in (reach, reach + 1) if n < 19), *([(7, 23), (23, 7)] if uneven else [])]
    for n, m in sizes:
        tensors = inputs(n, m, reach=reach, heads=4)
        tensors["factors"][0] *= 1e3  # both signs, some zeros, the first head far larger
        tensors["factors"][:, ::3] = 0.0
        numbers = torch.randn(4, 13, dtype=torch.float64)
        leaves = [x.requires_grad_() for x in (*tensors.values(), numbers)]
        bias = {
            "none": None,
            "toeplitz": DistanceBias(lambda d, numbers=numbers: at_offsets(numbers, d)),
            "alibi": DistanceBias(lambda d, numbers=numbers: numbers[:, 0].view(-1, *[1] * d.ndim) * d.abs()),
        }[biased]
        masks = {"mask": Mask(lengths=torch.tensor([n, n // 3]))}
        masks["memory_mask"] = Mask(lengths=torch.tensor([m - 1, m // 7])) if uneven else None
        for masked in ({}, masks):
            found = {}
            for name in ("parts", "explicit"):
                way(name)
                output = run(tensors, pattern=pattern, position_bias=bias, **masked).output
                found[name] = output_and_gradients(output, leaves)
            for a, b in zip(found["parts"], found["explicit"], strict=True):
                close(a, b)


@pytest.mark.parametrize("name", ["parts", "explicit"])
def test_factors_of_zero_give_zero_and_still_learn(name, way):
    way(name)
    tensors = {name: x.requires_grad_() for name, x in inputs(17).items()}
    values = tensors["factors"].detach().clone()
    tensors["factors"].data.zero_()
    output = run(tensors).output
    close(output, torch.zeros_like(output))
    of_scores, of_factors = torch.autograd.grad(output.sum(), [tensors["q"], tensors["factors"]])
    close(of_scores, torch.zeros_like(of_scores))
    tensors["factors"].data.copy_(values)
    (elsewhere,) = torch.autograd.grad(run(tensors).output.sum(), [tensors["factors"]])
    assert (of_factors != 0).all()
    close(of_factors, elsewhere)  # O is linear in the factors


def backends(tensors: dict[str, Tensor], **call: Any) -> set[str]:
    """The backends that ran an engine; none for explicit weights."""
    with watch_backends() as ran:
        run(tensors, **call)
    return ran.backends


@pytest.mark.skipif(NATIVE.missing is not None, reason="needs the native library")
def test_long_calls_run_in_parts_where_a_kernel_can_answer_them():
    long = {name: x.float() for name, x in inputs(400).items()}
    short = {name: x[:, :, :9] if name in "qkv" else x for name, x in long.items()}
    assert 2 * 2 * 400 * 400 >= universal_rpe.FEWEST_WEIGHTS > 2 * 2 * 9 * 9
    by_distance = DistanceBias(lambda d: d.abs() * torch.ones(2, *[1] * d.ndim))
    for call in ({}, {"position_bias": by_distance}, {"backend": "native"}):
        assert backends(long, **call) == {"native"}
    assert backends({name: x for name, x in long.items() if name != "factors"}) == {"native"}
    assert backends(short, backend="native") == {"native"}
    explicitly = [
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
    refused("native", run, short, backend="native", dropout=0.1)


@pytest.mark.skipif(NATIVE.missing is not None, reason="needs the native library")
@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_attention_in_parts_on_the_kernel_has_every_property_of_the_matrix(pattern, monkeypatch):
    monkeypatch.setattr(universal_rpe, "FEWEST_WEIGHTS", 0)
    cells = [
        check(Place(MECHANISM, pattern, prop, dtype, "native"))
        for prop in PROPERTIES
        if prop.level == "function"
        and (prop.name not in PROGRAMS or pattern == "causal-self")  # one compiled program is enough
        for dtype in prop.dtypes_on("native")
    ]
    ran = [cell for cell in cells if cell is not None]
    assert len(ran) >= 10
    assert not [(cell.property, cell.dtype, cell.detail) for cell in ran if cell.status == "fail"]


# grids and graphs


@pytest.mark.parametrize("numbers", [50, 1 << 20])
@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
def test_factors_on_a_grid_are_those_of_both_offsets(pattern, numbers, monkeypatch):
    monkeypatch.setattr(universal_rpe, "NUMBERS_AT_ONCE", numbers)
    tensors, table = without_factors(12), torch.randn(2, 3, 5, dtype=torch.float64)
    y, x = torch.arange(12) // 4, torch.arange(12) % 4
    c = table[:, (y - y[:, None]).clamp(-1, 1) + 1, (x - x[:, None]).clamp(-2, 2) + 2]
    expected = explicit(tensors, pattern, c=c)
    call = {"pattern": pattern, "grid": (3, 4)}
    for form in ("parallel", "reference"):
        close(run(tensors | {"grid_factors": table}, form=form, **call).output, expected)
    close(run(tensors | {"pair_factors": c.expand(2, -1, -1, -1)}, pattern=pattern).output, expected)
    if pattern == "causal-self":
        found = run(tensors | {"grid_factors": table}, mask=Mask(lengths=torch.tensor([12, 5])), **call).output
        close(found[0], expected[0])
        close(found[1, :, :5], expected[1, :, :5])


@pytest.mark.parametrize("numbers", [50, 1 << 20])
def test_factors_of_a_graph_are_learned_by_distance(numbers, monkeypatch):
    monkeypatch.setattr(universal_rpe, "NUMBERS_AT_ONCE", numbers)
    tensors, distance = without_factors(7), torch.randint(0, 4, (2, 7, 7))
    by_distance = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    c = by_distance[:, distance].transpose(0, 1)
    found = run(tensors | {"pair_factors": c}, mask=Mask(lengths=torch.tensor([7, 4]))).output
    for row, size in enumerate((7, 4)):
        alone = {name: x[row : row + 1, :, :size] for name, x in tensors.items()}
        close(found[row : row + 1, :, :size], explicit(alone, "noncausal-self", c=c[row, :, :size, :size]))
    (gradient,) = torch.autograd.grad(found.sum(), by_distance)
    assert (gradient != 0).any(-1).all()


# the layer


def layer(pattern: str = "noncausal-self", **options: Any) -> Any:
    return create_layer("universal_rpe", 16, 4, pattern=pattern, **options).double()


def factors_of(made: Any) -> Tensor:
    return made.projection.inputs({}, LayerCall(None, None, Context()))["factors"]


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


@pytest.mark.parametrize(("activation", "low"), [("none", None), ("relu", 0.0), ("softplus", 1e-9)])
def test_activations_keep_factors_from_being_negative(activation, low):
    made = layer(activation=activation)
    torch.nn.init.normal_(made.projection.table.table, std=3.0)
    factors = factors_of(made)
    assert (factors < 0).any() if low is None else (factors >= low).all()


@pytest.mark.parametrize("causal", [True, False])
def test_bucketed_factors_are_those_of_the_buckets_of_relative_positions(causal):
    made = layer("causal-self" if causal else "noncausal-self", factors="bucketed", num_buckets=16, max_distance=40)
    torch.nn.init.normal_(made.projection.table.table)
    offsets = torch.arange(-40, 41)[None]
    rows = Relative(heads=4, num_buckets=16, max_distance=40).buckets(torch.zeros_like(offsets[:, :1]), offsets, causal)
    close(factors_of(made), 1 + made.projection.table.table[rows[0, 0]].mT)


def test_a_layer_on_a_grid():
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    made = layer(max_distance=(2, 3))
    torch.nn.init.normal_(made.projection.grid_table)
    wide, tall = (made(x, context=Context(grid=grid)).output for grid in ((3, 4), (4, 3)))
    assert (wide - tall).abs().max() > 1e-3
    refused("grid", made, x)
    causal = layer("causal-self", max_distance=(2, 3))
    causal.load_state_dict(made.state_dict())
    image = Context(grid=(3, 4))
    close(causal(x, context=image).output[:, -1], wide[:, -1])  # it sees all tokens
    refused("does not keep the width", causal, x, context=image.replace(want=frozenset({"state"})))
    refused("self patterns", layer, "causal-cross", max_distance=(2, 3))


ONES = torch.ones(2, 2, 6, 6, dtype=torch.float64)
PAIRS, ON_GRID = {"pair_factors": ONES}, {"grid_factors": ONES[0, :, :3, :3]}
STATE = {"pattern": "causal-self", "return_state": True}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run(inputs(6) | PAIRS), "one of them"),
        (lambda: run(without_factors(6) | PAIRS, **STATE), "whole calls"),
        (lambda: run(without_factors(6) | {"factors": ONES[0, :, 0, :4]}), "R >= 1"),
        (lambda: run(without_factors(6) | ON_GRID), "self patterns with grid"),
        (lambda: run(without_factors(6) | ON_GRID, grid=(6,)), "self patterns with grid"),
        (lambda: run(without_factors(6) | ON_GRID, grid=(2, 3), pattern="causal-cross"), "self patterns with grid"),
        (lambda: run(without_factors(6) | ON_GRID, grid=(2, 3), **STATE), "width of a grid"),
    ],
)
def test_what_cannot_be_honoured_is_refused(call, message):
    refused(message, call)


# parity


@pytest.mark.parametrize("name", ["universal_rpe_self", "universal_rpe_padded"])
def test_equals_the_official_code(name):
    recorded = load(name)
    made = create_layer(
        "universal_rpe", 12, 2, pattern="noncausal-self", max_distance=5, position_options={"max_distance": 5}
    )
    weights = {"positions.table": recorded["b"], "projection.table.table": recorded["c"] - 1}  # the layer learns C - 1
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
    leaves = {"x": x, "b": made.positions.table, "c": made.projection.table.table, "q_weight": made.query.weight}
    check_gradients(recorded, result.output, leaves)


def test_buckets_of_a_function_compile_whole():
    call = torch.compile(lambda x: run(x, {"factors": "bucketed"}).output, fullgraph=True, backend="aot_eager")
    given = {name: x for name, x in inputs(7).items() if name != "factors"}
    close(call(given), run(given, {"factors": "bucketed"}).output, 1e-12)
