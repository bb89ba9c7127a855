"""What is peculiar to kernelized attention with relative positions: the Toeplitz product by every method, its closed forms,
random features, the constant state, grids, the layer's tables, and parity."""

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
from regard.contract import Context, Mask, Role, Shape, Unsupported
from regard.create import create_layer
from regard.functional import kernelized_rpe_attention, linear_attention
from regard.mechanisms.kernelized_rpe import MECHANISM, Config, cost, draw_features
from regard.positions import Alibi, Relative

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
METHODS = ("fft", "blocks")
ELU = {"feature_map": "elu", "normalize": False}


def inputs(n: int, m: int | None = None, reach: int = 3, batch: int = 2, heads: int = 2) -> dict[str, Tensor]:
    shapes = {
        "q": (batch, heads, n, 4),
        "k": (batch, heads, n if m is None else m, 4),
        "v": (batch, heads, n if m is None else m, 3),
        "offset_bias": (heads, 2 * reach + 1),
        "random_features": (heads, 5, 4),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", options: dict | None = None, **call: Any) -> Any:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def phi(x: Tensor, w: Tensor, normalize: bool = True) -> Tensor:
    x = x / x.norm(dim=-1, keepdim=True) if normalize else x
    return (torch.einsum("bhnd,hfd->bhnf", x, w) - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(w.shape[1])


def pairwise(tensors: dict[str, Tensor], causal: bool) -> Tensor:
    """The equation, one pair at a time."""
    q, k, v, b, w = tensors.values()
    queries, keys, reach, n, m = phi(q, w), phi(k, w), b.shape[1] // 2, q.shape[2], k.shape[2]
    rows = []
    for i in range(n):
        above, below = torch.zeros_like(v[:, :, 0]), torch.zeros_like(v[:, :, 0, :1])
        for j in range(m):
            offset = j - i - (m - n if causal else 0)
            if not (causal and offset > 0):
                weight = b[:, max(-reach, min(reach, offset)) + reach].exp()[:, None]
                weight = weight * (queries[:, :, i] * keys[:, :, j]).sum(-1, keepdim=True)
                above, below = above + weight * v[:, :, j], below + weight
        rows.append(above / below.clamp(min=1e-300))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reach", [1, 4, 12, 40])
@pytest.mark.parametrize("n", [1, 13, 71])
def test_every_method_equals_the_sum_over_pairs(n, reach, method):
    tensors = inputs(n, reach=reach, batch=1)
    for pattern in ("causal-self", "noncausal-self"):
        expected = pairwise(tensors, pattern == "causal-self")
        close(run(tensors, pattern, {"method": method}, chunk_size=8).output, expected)
        close(run(tensors, pattern, form="reference").output, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "m"), [(5, 17), (17, 5), (1, 9)])
def test_cross_patterns_count_both_sides_from_zero_and_causal_self_from_the_end(n, m, method):
    tensors = inputs(n, m, reach=4)
    close(run(tensors, "noncausal-cross", {"method": method}).output, pairwise(tensors, False))
    close(run(tensors, "causal-self", {"method": method}).output, pairwise(tensors, True))


def test_the_fft_is_chosen_for_tables_as_long_as_long_sequences_only():
    long, short = Shape(1, 1, 1 << 15, 1 << 15, 16, 16), Shape(1, 1, 256, 256, 64, 64)
    everything = Config(max_offset=1 << 15)
    assert cost(long, everything) == cost(long, Config(max_offset=1 << 15, method="fft"))
    for shape, config in ((short, everything), (long, Config())):
        assert cost(shape, config) == cost(shape, Config(max_offset=config.max_offset, method="blocks"))


def test_the_operations_of_the_fft_grow_almost_linearly_and_those_of_all_pairs_as_the_square():
    def growth(**options: Any) -> float:
        sizes = [cost(Shape(1, 1, n, n, 16, 16), Config(**options)).flops for n in (1 << 12, 1 << 14)]
        return math.log(sizes[1] / sizes[0], 4)

    assert growth(max_offset=1 << 14, method="fft") < 1.2
    assert growth(max_offset=1 << 14, method="blocks") > 1.9
    assert growth(method="blocks") < 1.01


# closed forms


@pytest.mark.parametrize("method", METHODS)
def test_without_biases_it_is_linear_attention(method):
    tensors = inputs(20)
    q, k, v = (tensors[name] for name in "qkv")
    for pattern in ("causal-self", "noncausal-self"):
        expected = linear_attention(q, k, v, pattern=pattern, eps=1e-300)
        for bias in (None, torch.zeros(2, 9, dtype=torch.float64)):
            options = {"pattern": pattern, "offset_bias": bias, "method": method, **ELU}
            close(kernelized_rpe_attention(q, k, v, **options), expected)
    order = torch.randperm(20)
    shuffled = kernelized_rpe_attention(q, k[:, :, order], v[:, :, order], pattern="noncausal-self", **ELU)
    close(shuffled, linear_attention(q, k, v, pattern="noncausal-self", eps=1e-300))


@pytest.mark.parametrize("method", METHODS)
def test_an_exponential_weight_is_a_decaying_state(method):
    tensors, decay, n = inputs(30, reach=30, heads=1), 0.8, 30
    tensors["offset_bias"] = torch.arange(-30, 31, dtype=torch.float64)[None] * -math.log(decay)
    queries, keys = (phi(tensors[name], tensors["random_features"]) for name in "qk")
    state, total, outputs = 0.0, 0.0, []
    for t in range(n):
        state = decay * state + keys[:, :, t, :, None] * tensors["v"][:, :, t, None]
        total = decay * total + keys[:, :, t]
        above = (queries[:, :, t, :, None] * state).sum(-2)
        outputs.append(above / (queries[:, :, t] * total).sum(-1, keepdim=True))
    # the future half of the table is the larger one: a causal pattern must not be scaled by it
    tensors["offset_bias"] = -tensors["offset_bias"].abs() + 200.0 * (torch.arange(-30, 31) > 0)
    close(run(tensors, options={"method": method}).output, torch.stack(outputs, 2), 1e-9)


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize("method", METHODS)
def test_one_offset_alone_copies_the_token_there(method, pattern):
    """So an offset is the key's rank minus the query's."""
    tensors = inputs(21, reach=5)
    for offset in (0, -1, -4) if pattern == "causal-self" else (0, -1, 3):
        tensors["offset_bias"] = torch.full((2, 11), -80.0, dtype=torch.float64)
        tensors["offset_bias"][:, 5 + offset] = 0.0
        found = run(tensors, pattern, {"method": method, "eps": 1e-12}).output
        inside = slice(max(0, -offset), 21 - max(0, offset))
        close(found[:, :, inside], tensors["v"].roll(-offset, 2)[:, :, inside], 1e-8)


@pytest.mark.parametrize("n", [8, 16, 31, 64])
def test_the_largest_offset_does_not_wrap_around(n):
    tensors = inputs(n, reach=n)
    tensors["offset_bias"] = torch.zeros(2, 2 * n + 1, dtype=torch.float64)
    tensors["offset_bias"][:, [1, -2]] = 4.0  # offsets n - 1 either way
    for pattern in ("causal-self", "noncausal-self"):
        expected = pairwise(tensors, pattern == "causal-self")
        close(run(tensors, pattern, {"method": "fft"}).output, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_added_to_all_biases_changes_nothing(method):
    tensors = inputs(18)
    for pattern in ("causal-self", "noncausal-self"):
        expected = run(tensors, pattern, {"method": method}).output
        for constant in (-300.0, 300.0):
            moved = tensors | {"offset_bias": tensors["offset_bias"] + constant}
            close(run(moved, pattern, {"method": method}).output, expected)


def test_random_features_converge_to_softmax_with_the_bias_but_not_for_long_vectors():
    tensors = inputs(24, reach=30, batch=1)
    b = tensors["offset_bias"]
    offsets = (torch.arange(24) - torch.arange(24)[:, None]) + 30

    def error(features: int, norm: float, normalize: bool) -> float:
        q, k = (norm * torch.nn.functional.normalize(tensors[name], dim=-1) for name in "qk")
        exact = (q @ k.mT + b[:, offsets]).softmax(-1) @ tensors["v"]
        draws = [draw_features(features, 4, heads=2).double() for _ in range(6)]
        config = {"normalize": normalize, "eps": 1e-300}
        found = [run(tensors | {"q": q, "k": k, "random_features": w}, "noncausal-self", config).output for w in draws]
        return float(torch.stack([(x - exact).square().mean() for x in found]).mean().sqrt())

    few, many = error(64, 1.0, True), error(4096, 1.0, True)
    assert 4 < few / many < 16  # 8 for an error of m^-1/2
    assert many < 0.03
    assert error(4096, 4.0, False) > 10 * many


def test_orthogonal_features_are_orthogonal_with_the_norms_of_independent_ones():
    w = draw_features(12, 8, heads=3, orthogonal=True)
    assert w.shape == (3, 12, 8)
    product = w @ w.mT
    inside = torch.block_diag(torch.ones(8, 8), torch.ones(4, 4)).bool() & ~torch.eye(12, dtype=torch.bool)
    assert product[:, inside].abs().max() < 1e-4
    square = draw_features(4000, 8, orthogonal=True).square().sum(-1)
    assert square.mean().item() == pytest.approx(8, rel=0.05) and square.std().item() == pytest.approx(4, rel=0.15)
    rng = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(*(draw_features(5, 8, generator=g) for g in rng))


def test_norms_are_those_of_each_token_and_head():
    tensors = inputs(12)
    scaled = dict(tensors)
    for name in "qk":
        scaled[name] = tensors[name] * torch.rand(2, 2, 12, 1, dtype=torch.float64).exp() * 5
    close(run(scaled).output, run(tensors).output)
    assert (run(scaled, options=ELU).output - run(tensors, options=ELU).output).abs().max() > 1e-3


def test_the_scale_and_the_temperature_multiply_the_score():
    tensors = inputs(9)
    q, k = (torch.nn.functional.normalize(tensors[name], dim=-1) for name in "qk")
    stretched = tensors | {"q": q * math.sqrt(2.5), "k": k * math.sqrt(2.5)}
    expected = run(stretched, options={"normalize": False}).output
    close(run(tensors, scale=2.5).output, expected)
    temperature = torch.full((2,), math.log(2.5), dtype=torch.float64)
    close(run(tensors | {"log_temperature": temperature}).output, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_sequence_moved_inside_padding_moves_its_output(method):
    tensors = inputs(14)
    valid = torch.zeros(2, 30, dtype=torch.bool)
    valid[0, 3:17], valid[1, 16:] = True, True
    padded = {name: tensors[name].new_full((2, 2, 30, tensors[name].shape[-1]), torch.nan) for name in "qkv"}
    for name, x in padded.items():
        for row in range(2):
            x[row, :, valid[row]] = tensors[name][row]
    for pattern in ("causal-self", "noncausal-self"):
        found = run(tensors | padded, pattern, {"method": method}, mask=Mask(valid=valid)).output
        expected = run(tensors, pattern, {"method": method}).output
        for row in range(2):
            close(found[row, :, valid[row]], expected[row])
            assert (found[row, :, ~valid[row]] == 0).all()


# gradients


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_gradients_of_every_method_are_those_of_the_definition(pattern, method):
    tensors = {name: x.requires_grad_() for name, x in inputs(17, reach=4).items()}
    tensors["log_temperature"] = torch.randn(2, dtype=torch.float64, requires_grad=True)
    leaves = list(tensors.values())
    found, expected = (
        torch.autograd.grad(run(tensors, pattern, {"method": method}, form=form).output.square().sum(), leaves)
        for form in ("parallel", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-10)
    small = [x[:, :1, :5].detach().requires_grad_() if x.ndim == 4 else x[:1].detach() for x in leaves]
    small[3].requires_grad_()

    def function(*given: Tensor) -> Tensor:
        return run(dict(zip(tensors, given, strict=True)), pattern, {"method": method}).output

    assert torch.autograd.gradcheck(function, small)


def test_products_made_in_pieces_have_the_same_gradients(monkeypatch):
    tensors = {name: x.requires_grad_() for name, x in inputs(15).items()}
    leaves = list(tensors.values())

    def gradients(pattern: str, method: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(tensors, pattern, {"method": method}).output.square().sum(), leaves)

    for case in (("causal-self", "fft"), ("noncausal-cross", "blocks")):
        whole = gradients(*case)
        with monkeypatch.context() as patch:
            patch.setattr("regard.mechanisms.kernelized_rpe.forms.NUMBERS_AT_ONCE", 1)
            pieces = gradients(*case)
        for a, b in zip(pieces, whole, strict=True):
            close(a, b)


# state


def test_the_state_is_a_window_and_a_matrix_of_the_size_that_the_card_says():
    config = Config(max_offset=6, features=5)
    expected = cost(Shape(1, 2, 1, 1000, 4, 3), config).state
    for n in (1, 50):
        state = run(inputs(n, reach=6, batch=1), return_state=True).state
        assert state.k.numel() + state.v.numel() + state.memory.numel() == expected
    assert MECHANISM.recurrent


def test_a_state_continues_with_the_offsets_it_was_made_with():
    state = run(inputs(10, reach=4), return_state=True).state
    with pytest.raises(Unsupported, match="9 offsets"):
        run(inputs(3, reach=5), state=state)


def test_queries_of_a_memory_are_counted_on_from_call_to_call():
    tensors = inputs(9, 14, reach=4)
    whole = pairwise(tensors, False)
    names = ("k", "v", "random_features")
    state = absorb(MECHANISM, {name: tensors[name] for name in names}, pattern="causal-cross")
    outputs = []
    for part in torch.arange(9).split([1, 1, 5, 2]):
        queries = {name: tensors[name] for name in ("offset_bias", "random_features")} | {"q": tensors["q"][:, :, part]}
        result = run(queries, "causal-cross", state=state)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 2), whole)


def test_autocast_does_not_reach_in():
    tensors = {name: x.float() for name, x in inputs(20).items()}
    plain = run(tensors, return_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(tensors, return_state=True)
    assert torch.equal(found.output, plain.output) and torch.equal(found.state.memory, plain.state.memory)


# grids


@pytest.mark.parametrize("grid", [(3, 5), (1, 7), (4, 4)])
def test_a_separable_bias_on_a_grid_equals_pairs_of_its_places(grid):
    n = math.prod(grid)
    tensors = inputs(n)
    rows, columns = (torch.randn(2, 2 * side + 1, dtype=torch.float64) for side in (2, 6))
    del tensors["offset_bias"]
    tensors["grid_bias"] = rows[:, :, None] + columns[:, None]
    y, x = torch.arange(n) // grid[1], torch.arange(n) % grid[1]
    bias = rows[:, (y - y[:, None]).clamp(-2, 2) + 2] + columns[:, (x - x[:, None]).clamp(-6, 6) + 6]
    queries, keys = (phi(tensors[name], tensors["random_features"]) for name in "qk")
    weights = queries @ keys.mT * bias.exp()
    expected = weights @ tensors["v"] / weights.sum(-1, keepdim=True)
    close(run(tensors, "noncausal-self", grid=grid).output, expected)
    close(run(tensors, "noncausal-self", grid=grid, form="reference").output, expected)


def pair_weights(
    tensors: dict[str, Tensor], row: int, n: int, m: int, causal: bool, columns: int, outside: list[int]
) -> Tensor:
    """Weight of each pair of one row of a batch, one pair at a time. Tokens `outside` have no place."""
    queries, keys = (phi(tensors[name], tensors["random_features"])[row] for name in "qk")
    weights = torch.zeros(2, n, m, dtype=torch.float64)
    places = {t: place for place, t in enumerate(t for t in range(m) if t not in outside)}
    table = tensors["grid_bias"] if "grid_bias" in tensors else tensors["offset_bias"][:, None]
    reach_y, reach_x = table.shape[1] // 2, table.shape[2] // 2
    for i in range(n):
        for j in range(m):
            at = i + (m - n if causal else 0)
            if causal and j > at:
                continue
            bias = tensors.get("class_bias", torch.zeros(2, dtype=torch.float64))
            if at in places and j in places:
                y, x = (places[j] // columns - places[at] // columns, places[j] % columns - places[at] % columns)
                bias = table[:, max(-reach_y, min(reach_y, y)) + reach_y, max(-reach_x, min(reach_x, x)) + reach_x]
            weights[:, i, j] = bias.exp() * (queries[:, i] * keys[:, j]).sum(-1)
    return weights


def over_pairs(tensors: dict[str, Tensor], columns: int, roles: Tensor | None = None, causal: bool = False) -> Tensor:
    batch, _, n, m = (*tensors["q"].shape[:3], tensors["k"].shape[2])
    outputs = []
    for row in range(batch):
        outside = [] if roles is None else roles[row].nonzero()[:, 0].tolist()
        weights = pair_weights(tensors, row, n, m, causal, columns, outside)
        outputs.append(weights @ tensors["v"][row] / weights.sum(-1, keepdim=True).clamp(min=1e-300))
    return torch.stack(outputs)


def on_grid(n: int, m: int | None = None) -> dict[str, Tensor]:
    tensors = inputs(n, m)
    tensors["grid_bias"] = torch.randn(2, 5, 7, dtype=torch.float64)
    del tensors["offset_bias"]
    return tensors


SELF = ("noncausal-self", "causal-self")


@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("given", ["places", "places and weight", "line", "line and weight"])
def test_tokens_without_a_place_pair_at_one_weight(given, pattern):
    """A class token, wherever it stands."""
    tensors, grid = (on_grid(13), (3, 4)) if given.startswith("places") else (inputs(13, reach=4), None)
    if given.endswith("weight"):
        tensors["class_bias"] = torch.randn(2, dtype=torch.float64) + 1.0
    roles = torch.zeros(2, 13, dtype=torch.long)
    roles[0, 0] = roles[1, 6] = roles[1, 9] = int(Role.CLS)
    expected = over_pairs(tensors, 4 if grid else 99, roles, pattern == "causal-self")
    for form in ("parallel", "reference"):
        close(run(tensors, pattern, grid=grid, roles=roles, form=form).output, expected)


@pytest.mark.parametrize(("n", "m"), [(5, 13), (13, 5)])
def test_roles_are_those_of_the_keys_where_queries_are_fewer_or_more(n, m):
    tensors, roles = on_grid(n, m), torch.zeros(2, m, dtype=torch.long)
    roles[0, 0] = roles[1, 2] = roles[1, m - 1] = int(Role.CLS)
    expected = over_pairs(tensors, 4, roles, causal=True)
    for form in ("parallel", "reference"):
        close(run(tensors, grid=(3, 4), roles=roles, form=form).output, expected)


@pytest.mark.parametrize("pattern", SELF)
def test_a_class_token_may_outweigh_all_others_or_vanish(pattern):
    roles = torch.zeros(2, 13, dtype=torch.long)
    roles[:, 0] = int(Role.CLS)
    tensors = on_grid(13)
    heavy, light = (torch.full((2,), bias, dtype=torch.float64) for bias in (2000.0, -2000.0))
    found = run(tensors | {"class_bias": heavy}, pattern, grid=(3, 4), roles=roles).output
    close(found[:, :, 1:], tensors["v"][:, :, :1].expand(-1, -1, 12, -1))
    found = run(tensors | {"class_bias": light}, pattern, grid=(3, 4), roles=roles).output
    others = {name: x[:, :, 1:] if name in "qkv" else x for name, x in tensors.items()}
    close(found[:, :, 1:], run(others, pattern, grid=(3, 4)).output)


@pytest.mark.parametrize(("n", "m"), [(13, 13), (5, 13), (13, 5), (1, 9), (20, 20)])
def test_a_causal_grid_sees_the_rows_above_and_what_is_left(n, m):
    """Every form and both alignments; 20 tokens fill the grid."""
    tensors = on_grid(n, m)
    expected = over_pairs(tensors, 5, causal=True)
    for form in ("parallel", "reference", "chunked"):
        close(run(tensors, grid=(4, 5), form=form).output, expected)
    if n == m:
        later = {name: x.clone() for name, x in tensors.items()}
        for name in "qkv":
            later[name][:, :, 7:] = torch.randn_like(later[name][:, :, 7:])
        close(run(later, grid=(4, 5)).output[:, :, :7], run(tensors, grid=(4, 5)).output[:, :, :7])


def test_the_later_half_of_a_table_plays_no_part_under_causality():
    tensors = on_grid(12)
    expected = run(tensors, grid=(3, 4)).output
    later = (torch.arange(35) > 17).view(5, 7)
    for value in (-torch.inf, 700.0, torch.inf):
        table = tensors["grid_bias"].masked_fill(later, value).requires_grad_()
        found = run(tensors | {"grid_bias": table}, grid=(3, 4)).output
        close(found, expected)
        (gradient,) = torch.autograd.grad(found.square().sum(), table)
        assert (gradient[:, later] == 0).all() and gradient.isfinite().all()
        assert (gradient[:, :3] != 0).any()


@pytest.mark.parametrize("roles", [False, True])
def test_gradients_on_a_causal_grid_are_those_of_the_definition(roles):
    tensors = on_grid(13) | {"class_bias": torch.randn(2, dtype=torch.float64)}
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    given = torch.zeros(2, 13, dtype=torch.long)
    given[0, 0] = given[1, 5] = int(Role.CLS)
    call = {"grid": (3, 5), "roles": given} if roles else {"grid": (3, 5)}
    leaves = [x for name, x in tensors.items() if roles or name != "class_bias"]
    found, expected = (
        torch.autograd.grad(run(tensors, form=form, **call).output.square().sum(), leaves)
        for form in ("parallel", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-10)


def test_a_causal_grid_continues_from_a_state_of_all_its_tokens():
    tensors, grid = on_grid(18), (4, 5)
    whole = run(tensors, grid=grid).output
    lengths = [
        torch.tensor([4, 2]),
        torch.tensor([1, 0]),
        torch.tensor([1, 1]),
        torch.tensor([7, 6]),
        torch.tensor([5, 8]),
    ]
    state, done = None, torch.zeros(2, dtype=torch.long)
    for new in lengths:
        slots = (done[:, None] + torch.arange(int(new.max()))).clamp(max=17)
        piece = {
            name: torch.stack([x[row][:, slots[row]] for row in range(2)]) if name in "qkv" else x
            for name, x in tensors.items()
        }
        result = run(piece, grid=grid, mask=Mask(lengths=new), state=state, return_state=True)
        state = result.state
        for row in range(2):
            close(result.output[row, :, : new[row]], whole[row, :, done[row] : done[row] + new[row]])
        done = done + new
    assert torch.equal(state.length, done)
    used = state.k.shape[2] * (5 + 4) * 2  # of one row: features, and values with a column of ones
    assert cost(Shape(1, 2, 1, state.k.shape[2], 4, 3), Config(max_offset=(2, 3), features=5)).state == used
    assert state.k[0].numel() + state.v[0].numel() == used
    fresh = run({name: x[:, :, :3] if name in "qkv" else x for name, x in tensors.items()}, grid=grid)
    again = state.reset(torch.tensor([True, True]))
    first = {name: x[:, :, :3] if name in "qkv" else x for name, x in tensors.items()}
    close(run(first, grid=grid, state=again).output, fresh.output)


def test_a_padded_grid_is_a_shorter_one():
    tensors = inputs(12)
    del tensors["offset_bias"]
    tensors["grid_bias"] = torch.randn(2, 5, 5, dtype=torch.float64)
    short = {name: x[:, :, :9] if name in "qkv" else x for name, x in tensors.items()}
    found = run(tensors, "noncausal-self", grid=(4, 3), mask=Mask(lengths=torch.tensor([12, 9]))).output
    close(found[1, :, :9], run(short, "noncausal-self", grid=(3, 3)).output[1])
    close(found[0], run(tensors, "noncausal-self", grid=(4, 3)).output[0])
    causal = run(tensors, grid=(4, 3), mask=Mask(lengths=torch.tensor([12, 9]))).output
    close(causal[1, :, :9], run(short, grid=(3, 3)).output[1])


@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self"])
def test_padding_takes_no_place_on_a_grid(pattern):
    tensors = inputs(9)
    tensors["grid_bias"] = torch.randn(2, 5, 5, dtype=torch.float64)
    del tensors["offset_bias"]
    valid = torch.ones(len(tensors["q"]), 14, dtype=torch.bool)
    valid[:, [0, 3, 4, 8, 13]] = False
    padded = {
        n: torch.full((len(x), 2, 14, x.shape[3]), torch.nan).double() if n in "qkv" else x for n, x in tensors.items()
    }
    for name in "qkv":
        padded[name][:, :, valid[0]] = tensors[name]
    found = run(padded, pattern, grid=(3, 3), mask=Mask(valid=valid)).output
    close(found[:, :, valid[0]], run(tensors, pattern, grid=(3, 3)).output)


# parity


@pytest.mark.parametrize("name", ["noncausal", "causal"])
@pytest.mark.parametrize("method", METHODS)
def test_parity_with_public_code(name, method):
    """Whose bidirectional attention is causal where all biases of later keys are -inf."""
    with np.load(FIXTURES / f"kernelized_rpe_{name}.npz") as arrays:
        fixture = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    names = ("q", "k", "v", "offset_bias")
    options = {"feature_map": "exp", "normalize": False, "method": method}
    for pattern in {"noncausal-self", f"{name}-self"}:
        tensors = {key: fixture[key].clone().requires_grad_() for key in names}
        output = run(tensors, pattern, options).output
        torch.testing.assert_close(output, fixture["out"], rtol=1e-12, atol=1e-12)
        output.backward(fixture["grad_out"])
        for key, x in tensors.items():
            torch.testing.assert_close(x.grad, fixture[f"grad_{key}"], rtol=1e-11, atol=1e-11)


# the layer


def layer(pattern: str = "causal-self", **options: Any) -> Any:
    return create_layer("kernelized_rpe", 16, 4, pattern=pattern, **options).double()


def test_the_layer_starts_without_biases_and_counts_what_it_learns():
    made = layer(max_offset=8)
    assert made.projection.random_features.shape == (4, 4, 4)
    assert made.projection.offset_bias.shape == (4, 17) and not made.projection.offset_bias.any()
    own = sum(p.numel() for p in made.parameters()) - 4 * 16 * 16
    assert own == 4 * 17
    assert sum(p.numel() for p in layer(max_offset=8, share_offsets=True, learn_temperature=True).parameters()) == (
        4 * 16 * 16 + 17 + 4
    )
    assert layer(features=9, share_features=True).projection.random_features.shape == (1, 9, 4)


def test_offsets_of_other_schemes_are_their_tables():
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    offsets = torch.arange(-20, 21)
    for pattern, causal in (("causal-self", True), ("noncausal-self", False)):
        for name, feature_map in itertools.product(("alibi", "bucketed", "power"), ("positive_random", "elu")):
            made = layer(pattern, offsets=name, max_offset=20, feature_map=feature_map)
            if name == "alibi":
                table = Alibi(heads=4).by_distance(offsets, causal)
            elif name == "bucketed":
                torch.nn.init.normal_(made.projection.scheme.table)
                scheme = Relative(heads=4, max_distance=20).double()
                scheme.load_state_dict(made.projection.scheme.state_dict())
                table = scheme.by_distance(offsets, causal)
            else:
                made.projection.exponent.data = torch.tensor([0.0, 0.5, 1.0, -3.0], dtype=torch.float64)
                table = -torch.tensor([[0.0], [0.5], [1.0], [0.0]]) * offsets.double().abs().log1p()
            free = layer(pattern, max_offset=20, feature_map=feature_map)
            free.load_state_dict(made.state_dict(), strict=False)
            free.projection.offset_bias.data = table.double()
            close(made(x).output, free(x).output)


def test_a_layer_on_a_grid_and_one_without_features_of_its_own():
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    made = layer("noncausal-self", max_offset=(2, 3))
    assert made.projection.grid_bias.shape == (4, 5, 7)
    torch.nn.init.normal_(made.projection.grid_bias)
    outputs = [made(x, context=Context(grid=grid)).output for grid in ((3, 4), (4, 3))]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    with pytest.raises(Unsupported, match="grid"):
        made(x)
    with pytest.raises(Unsupported, match="causal-self"):
        layer("causal-cross", max_offset=(2, 3))
    plain = layer("noncausal-self", feature_map="elu")
    assert plain.projection.random_features is None
    torch.nn.init.normal_(plain.projection.offset_bias)
    close(plain(x, context=Context(grid=(3, 4))).output, plain(x).output)  # a bias by rank knows no grid


def test_a_causal_layer_on_a_grid_decodes_it():
    x, grid = torch.randn(2, 12, 16, dtype=torch.float64), (3, 4)
    made = layer(max_offset=(2, 3)).eval()
    torch.nn.init.normal_(made.projection.grid_bias)
    state, outputs = None, []
    for t in range(12):
        want = Context(grid=grid, want=frozenset({"state"}))
        result = made(x[:, t : t + 1], context=want, state=state)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 1), made(x, context=Context(grid=grid)).output)


def test_a_layer_learns_the_weight_of_a_class_token():
    x, roles = torch.randn(2, 12, 16, dtype=torch.float64), torch.zeros(2, 12, dtype=torch.long)
    roles[:, 0] = int(Role.CLS)
    made, fixed = layer("noncausal-self", learn_class_bias=True), layer("noncausal-self")
    fixed.load_state_dict(made.state_dict(), strict=False)
    context = Context(roles=roles)
    close(made(x, context=context).output, fixed(x, context=context).output)
    made(x, context=context).output.square().sum().backward()
    assert made.projection.class_bias.grad.abs().max() > 0
    made.projection.class_bias.data += 1.0
    assert (made(x, context=context).output - fixed(x, context=context).output).abs().max() > 1e-3
    close(made(x).output, fixed(x).output)  # all tokens have a place


def test_features_are_redrawn_in_training_from_the_generator_of_the_call():
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    made = layer(redraw=2)
    first = made.projection.random_features.clone()

    def call(seed: int) -> Tensor:
        made(x, context=Context(generator=torch.Generator().manual_seed(seed)))
        return made.projection.random_features.clone()

    assert torch.equal(call(0), first)
    second = call(1)
    assert not torch.equal(second, first)
    made.eval()
    assert torch.equal(call(2), second) and torch.equal(call(2), second)
    made.train()
    call(3)
    assert torch.equal(call(1), second)
    assert "projection.random_features" in made.state_dict()


# refusals


@pytest.mark.parametrize(
    "options",
    [
        {"feature_map": "silu"},
        {"feature_map": "tanh"},
        {"eps": 0.0},
        {"eps": math.inf},
        {"method": "dense"},
        {"features": 0},
        {"redraw": -1},
        {"offsets": "rotary"},
        {"max_offset": 0},
        {"max_offset": (3, 0)},
        {"max_offset": (3, 3, 3)},
        {"max_offset": (3, 3), "offsets": "alibi"},
        {"max_offset": 16, "offsets": "bucketed"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_calls_that_cannot_be_honoured_are_refused():
    tensors = inputs(6)
    with pytest.raises(Unsupported, match="draw_features"):
        run({name: tensors[name] for name in "qkv"})
    with pytest.raises(Unsupported, match="R >= 1"):
        run(tensors | {"offset_bias": torch.zeros(2, 4, dtype=torch.float64)})
    with pytest.raises(Unsupported, match="scale >= 0"):
        run(tensors, scale=-1.0)
    with pytest.raises(Unsupported, match="dropout"):
        run(tensors, dropout=0.1)
    grid = {"grid_bias": torch.zeros(2, 3, 3, dtype=torch.float64)}
    with pytest.raises(Unsupported, match="grid_bias in causal-cross"):
        run(tensors | grid, "causal-cross", grid=(2, 3))
    with pytest.raises(Unsupported, match="at most 4"):
        run(tensors | grid, grid=(2, 2), return_state=True)
    plain = {name: x for name, x in tensors.items() if name != "offset_bias"}
    for given, other in ((plain | grid, tensors), (tensors, plain | grid)):
        state = run(given, grid=(4, 3), return_state=True).state
        with pytest.raises(Unsupported, match="the state of"):
            run(other, grid=(4, 3), state=state)
    with pytest.raises(Unsupported, match="at most 4"):
        run(tensors | grid, "noncausal-self", grid=(2, 2))
    with pytest.raises(Unsupported, match="rows, columns"):
        run(tensors | grid, "noncausal-self", grid=(1, 2, 3))
    roles = torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(Unsupported, match="roles in noncausal-cross"):
        run(tensors, "noncausal-cross", roles=roles)
    with pytest.raises(Unsupported, match="roles in noncausal-cross"):
        absorb(
            MECHANISM, {x: tensors[x] for x in ("k", "v", "random_features")}, pattern="noncausal-cross", roles=roles
        )
    with pytest.raises(Unsupported, match="roles and a state"):
        run(tensors, roles=roles, return_state=True)
