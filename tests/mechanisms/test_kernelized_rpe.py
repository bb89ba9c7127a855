"""Tests specific to kernelized attention with relative positions: the Toeplitz product by every method, closed forms,
random features, the constant state, grids, the layer's tables, and parity."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import calls, check_recorded, close_gradients, cut, in_pieces, load, qkv, refused
from support import close as close_within
from torch import Tensor

from regard.apply import absorb
from regard.contract import Context, Mask, Role, Shape
from regard.create import create_layer
from regard.functional import kernelized_rpe_attention, linear_attention
from regard.mechanisms.kernelized_rpe import MECHANISM, Config, cost, draw_features
from regard.positions import Alibi, Relative

run, close = calls(MECHANISM), functools.partial(close_within, tolerance=1e-11)
SELF = ("noncausal-self", "causal-self")
ELU = {"feature_map": "elu", "normalize": False}
by_every_method = pytest.mark.parametrize("method", ["fft", "blocks"])
in_self_patterns = pytest.mark.parametrize("pattern", SELF)


def inputs(n: int, m: int | None = None, reach: int = 3, batch: int = 2, heads: int = 2) -> dict[str, Tensor]:
    shapes = {"offset_bias": (heads, 2 * reach + 1), "random_features": (heads, 5, 4)}
    tables = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return qkv(n, m, batch=batch, heads=heads, value_dim=3) | tables


def on_grid(n: int, m: int | None = None, rows: int = 2, columns: int = 3) -> dict[str, Tensor]:
    """Inputs with biases for offsets of up to `rows` and `columns` on a grid."""
    tensors = inputs(n, m)
    del tensors["offset_bias"]
    return tensors | {"grid_bias": torch.randn(2, 2 * rows + 1, 2 * columns + 1, dtype=torch.float64)}


def class_tokens(m: int, *places: list[int]) -> Tensor:
    roles = torch.zeros(len(places), m, dtype=torch.long)
    for row, at in enumerate(places):
        roles[row, at] = int(Role.CLS)
    return roles


def phi(x: Tensor, w: Tensor) -> Tensor:
    x = x / x.norm(dim=-1, keepdim=True)
    return (torch.einsum("bhnd,hfd->bhnf", x, w) - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(w.shape[1])


def definition(tensors: dict[str, Tensor], causal: bool, columns: int = 1000, roles: Tensor | None = None) -> Tensor:
    """The equation, one pair at a time, on a grid with `columns` columns; tokens with a role have no place on it."""
    queries, keys = (phi(tensors[name], tensors["random_features"]) for name in "qk")
    (batch, heads, n, _), m = queries.shape, keys.shape[2]
    table = tensors["grid_bias"] if "grid_bias" in tensors else tensors["offset_bias"][:, None]
    down, right = table.shape[1] // 2, table.shape[2] // 2
    bias = torch.full((batch, heads, n, m), -torch.inf, dtype=torch.float64)
    for row in range(batch):
        placed = [t for t in range(m if causal else max(n, m)) if roles is None or not roles[row, t]]
        places = {t: divmod(place, columns) for place, t in enumerate(placed)}
        for i, j in itertools.product(range(n), range(m)):
            at = i + m - n if causal else i
            if causal and j > at:
                continue
            if at in places and j in places:
                y, x = (key - query for key, query in zip(places[j], places[at], strict=True))
                bias[row, :, i, j] = table[:, max(-down, min(down, y)) + down, max(-right, min(right, x)) + right]
            else:
                bias[row, :, i, j] = tensors.get("class_bias", 0.0)
    weights = bias.exp() * (queries @ keys.mT)
    return weights @ tensors["v"] / weights.sum(-1, keepdim=True).clamp(min=1e-300)


@by_every_method
@pytest.mark.parametrize(
    ("n", "reach"),
    [(1, 1), (1, 40), (8, 8), (13, 1), (13, 4), (13, 12), (16, 40), (31, 31), (64, 64), (71, 12), (71, 40)],
)
def test_every_method_equals_the_sum_over_pairs_and_offsets_do_not_wrap_around(n, reach, method):
    tensors = inputs(n, reach=reach, batch=1)
    for pattern in SELF:
        expected = definition(tensors, pattern == "causal-self")
        close(run(tensors, {"method": method}, pattern=pattern, chunk_size=8).output, expected)
        close(run(tensors, pattern=pattern, form="reference").output, expected)


@by_every_method
@pytest.mark.parametrize(("n", "m"), [(5, 17), (17, 5), (1, 9)])
def test_cross_patterns_count_both_sides_from_zero_and_causal_self_from_the_end(n, m, method):
    tensors = inputs(n, m, reach=4)
    close(run(tensors, {"method": method}, pattern="noncausal-cross").output, definition(tensors, False))
    close(run(tensors, {"method": method}).output, definition(tensors, True))


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


@by_every_method
@in_self_patterns
@pytest.mark.parametrize("bias", [None, torch.zeros(2, 9, dtype=torch.float64)], ids=["no biases", "biases of 0"])
def test_without_biases_it_is_linear_attention(bias, pattern, method):
    q, k, v = qkv(20).values()
    expected = linear_attention(q, k, v, pattern=pattern, eps=1e-300)
    options = {"pattern": pattern, "offset_bias": bias, "method": method, **ELU}
    close(kernelized_rpe_attention(q, k, v, **options), expected)
    if pattern == "noncausal-self":
        order = torch.randperm(20)
        close(kernelized_rpe_attention(q, k[:, :, order], v[:, :, order], **options), expected)


@by_every_method
def test_an_exponential_weight_is_a_decaying_state(method):
    tensors, decay = inputs(30, heads=1), 0.8
    queries, keys = (phi(tensors[name], tensors["random_features"]) for name in "qk")
    state, total, outputs = 0.0, 0.0, []
    for t in range(30):
        state = decay * state + keys[:, :, t, :, None] * tensors["v"][:, :, t, None]
        total = decay * total + keys[:, :, t]
        above = (queries[:, :, t, :, None] * state).sum(-2)
        outputs.append(above / (queries[:, :, t] * total).sum(-1, keepdim=True))
    # the larger values are in the future half of the table: it must not set the scale of a causal pattern
    offsets = torch.arange(-30, 31, dtype=torch.float64)
    tensors["offset_bias"] = (offsets.abs() * math.log(decay) + 200.0 * (offsets > 0))[None]
    close(run(tensors, {"method": method}).output, torch.stack(outputs, 2), tolerance=1e-9)


@by_every_method
@pytest.mark.parametrize(
    ("pattern", "offset"), [*itertools.product(SELF, (0, -1)), ("causal-self", -4), ("noncausal-self", 3)]
)
def test_one_offset_alone_copies_the_token_there(pattern, offset, method):
    """This shows that an offset is the key's rank minus the query's."""
    tensors = inputs(21, reach=5)
    tensors["offset_bias"] = torch.full((2, 11), -80.0, dtype=torch.float64)
    tensors["offset_bias"][:, 5 + offset] = 0.0
    found = run(tensors, {"method": method, "eps": 1e-12}, pattern=pattern).output
    inside = slice(max(0, -offset), 21 - max(0, offset))
    close(found[:, :, inside], tensors["v"].roll(-offset, 2)[:, :, inside], tolerance=1e-8)


@by_every_method
@in_self_patterns
@pytest.mark.parametrize("constant", [-300.0, 300.0])
def test_a_constant_added_to_all_biases_changes_nothing(constant, pattern, method):
    tensors, call = inputs(18), {"options": {"method": method}, "pattern": pattern}
    moved = tensors | {"offset_bias": tensors["offset_bias"] + constant}
    close(run(moved, **call).output, run(tensors, **call).output)


def test_random_features_converge_to_softmax_with_the_bias_but_not_for_long_vectors():
    tensors = inputs(24, reach=30, batch=1)
    offsets = (torch.arange(24) - torch.arange(24)[:, None]) + 30

    def error(features: int, norm: float, normalize: bool) -> float:
        q, k = (norm * F.normalize(tensors[name], dim=-1) for name in "qk")
        exact = (q @ k.mT + tensors["offset_bias"][:, offsets]).softmax(-1) @ tensors["v"]
        call = {"options": {"normalize": normalize, "eps": 1e-300}, "pattern": "noncausal-self"}
        draws = [{"random_features": draw_features(features, 4, heads=2).double()} for _ in range(6)]
        found = [run(tensors | {"q": q, "k": k} | w, **call).output for w in draws]
        return float(torch.stack([(x - exact).square().mean() for x in found]).mean().sqrt())

    few, many = error(64, 1.0, True), error(4096, 1.0, True)
    assert 4 < few / many < 16  # 8 if the error is m^-1/2
    assert many < 0.03
    assert error(4096, 4.0, False) > 10 * many


def test_the_scale_and_the_temperature_multiply_the_score():
    tensors = inputs(9)
    q, k = (math.sqrt(2.5) * F.normalize(tensors[name], dim=-1) for name in "qk")
    expected = run(tensors | {"q": q, "k": k}, {"normalize": False}).output
    close(run(tensors, scale=2.5).output, expected)
    temperature = torch.full((2,), math.log(2.5), dtype=torch.float64)
    close(run(tensors | {"log_temperature": temperature}).output, expected)


@in_self_patterns
@pytest.mark.parametrize("classes", [None, ([0], [5])])
def test_gradients_on_a_grid_with_class_tokens_are_those_of_the_definition(classes, pattern):
    tensors, call = on_grid(13), {"pattern": pattern, "grid": (3, 5)}
    if classes is not None:
        tensors["class_bias"] = torch.randn(2, dtype=torch.float64)
        call["roles"] = class_tokens(13, *classes)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    close_gradients(run(leaves, **call).output, run(leaves, form="reference", **call).output, leaves, 1e-10)


@pytest.mark.parametrize("n", [1, 50])
def test_the_state_is_a_window_and_a_matrix_of_the_size_that_the_card_says(n):
    state = run(inputs(n, reach=6, batch=1), return_state=True).state
    expected = cost(Shape(1, 2, 1, 1000, 4, 3), Config(max_offset=6, features=5)).state
    assert state.k.numel() + state.v.numel() + state.memory.numel() == expected
    assert MECHANISM.recurrent


PLACES = [  # pattern, (queries, keys), grid (None: a line), class tokens of each row, whether they have a weight
    *(("causal-self", (n, m), (4, 5), None, False) for n, m in ((13, 13), (5, 13), (13, 5), (1, 9), (20, 20))),
    *(("noncausal-self", (n, n), grid, None, False) for n, grid in ((15, (3, 5)), (7, (1, 7)), (16, (4, 4)))),
    *itertools.product(SELF, [(13, 13)], [(3, 4), None], [([0], [6, 9])], [False, True]),
    ("causal-self", (5, 13), (3, 4), ([0], [2, 12]), False),
    ("causal-self", (13, 5), (3, 4), ([0], [2, 4]), False),
]


@pytest.mark.parametrize(("pattern", "tokens", "grid", "classes", "weighted"), PLACES)
def test_every_form_equals_pairs_of_places_which_class_tokens_do_not_have(pattern, tokens, grid, classes, weighted):
    """In causal patterns a token sees the rows above it and the places to its left."""
    tensors, columns = (inputs(*tokens), 1000) if grid is None else (on_grid(*tokens), grid[1])
    roles = None if classes is None else class_tokens(tokens[1], *classes)
    if weighted:
        tensors["class_bias"] = torch.randn(2, dtype=torch.float64) + 1.0
    expected = definition(tensors, pattern == "causal-self", columns, roles)
    for form in ("parallel", "reference", *(["chunked"] if pattern == "causal-self" and roles is None else [])):
        close(run(tensors, pattern=pattern, grid=grid, roles=roles, form=form).output, expected)


@in_self_patterns
def test_a_class_token_may_outweigh_all_others_or_vanish(pattern):
    tensors, call = on_grid(13), {"pattern": pattern, "grid": (3, 4)}
    roles = class_tokens(13, [0], [0])
    heavy, light = (torch.full((2,), bias, dtype=torch.float64) for bias in (2000.0, -2000.0))
    found = run(tensors | {"class_bias": heavy}, roles=roles, **call).output
    close(found[:, :, 1:], tensors["v"][:, :, :1].expand(-1, -1, 12, -1))
    found = run(tensors | {"class_bias": light}, roles=roles, **call).output
    close(found[:, :, 1:], run(cut(tensors, slice(1, None)), **call).output)


@pytest.mark.parametrize("value", [-torch.inf, 700.0, torch.inf])
def test_the_later_half_of_a_table_plays_no_part_under_causality(value):
    tensors, later = on_grid(12), (torch.arange(35) > 17).view(5, 7)
    table = tensors["grid_bias"].masked_fill(later, value).requires_grad_()
    found = run(tensors | {"grid_bias": table}, grid=(3, 4)).output
    close(found, run(tensors, grid=(3, 4)).output)
    (gradient,) = torch.autograd.grad(found.square().sum(), table)
    assert (gradient[:, later] == 0).all() and gradient.isfinite().all()
    assert (gradient[:, :3] != 0).any()


def test_a_causal_grid_continues_from_a_state_of_all_its_tokens():
    tensors, grid = on_grid(18), (4, 5)
    whole = run(tensors, grid=grid).output
    state, done = None, torch.zeros(2, dtype=torch.long)
    for new in torch.tensor([[4, 2], [1, 0], [1, 1], [7, 6], [5, 8]]):
        slots = (done[:, None] + torch.arange(int(new.max()))).clamp(max=17)
        new_tokens = {name: torch.stack([tensors[name][row][:, slots[row]] for row in range(2)]) for name in "qkv"}
        result = run(tensors | new_tokens, grid=grid, mask=Mask(lengths=new), state=state, return_state=True)
        state = result.state
        for row in range(2):
            close(result.output[row, :, : new[row]], whole[row, :, done[row] : done[row] + new[row]])
        done = done + new
    assert torch.equal(state.length, done)
    used = state.k.shape[2] * (5 + 4) * 2  # per row: features, and values with a column of ones
    assert cost(Shape(1, 2, 1, state.k.shape[2], 4, 3), Config(max_offset=(2, 3), features=5)).state == used
    assert state.k[0].numel() + state.v[0].numel() == used
    again = run(cut(tensors, slice(0, 3)), grid=grid, state=state.reset(torch.tensor([True, True]))).output
    close(again, whole[:, :, :3])


@in_self_patterns
def test_padding_takes_no_place_on_a_grid_and_empty_rows_change_nothing(pattern):
    tensors, valid = on_grid(9, rows=2, columns=2), torch.ones(2, 14, dtype=torch.bool)
    valid[:, [0, 3, 4, 8, 13]] = False
    padded = {name: torch.full((2, 2, 14, tensors[name].shape[3]), torch.nan).double() for name in "qkv"}
    for name, x in padded.items():
        x[:, :, valid[0]] = tensors[name]
    expected = run(tensors, pattern=pattern, grid=(3, 3)).output
    for rows in (3, 5):
        found = run(tensors | padded, pattern=pattern, grid=(rows, 3), mask=Mask(valid=valid)).output
        close(found[:, :, valid[0]], expected)


@by_every_method
@pytest.mark.parametrize(
    ("name", "pattern"), [("noncausal", "noncausal-self"), ("causal", "noncausal-self"), ("causal", "causal-self")]
)
def test_parity_with_public_code(name, pattern, method):
    """The public code is bidirectional; biases of -inf for later keys make it causal."""
    fixture = load(f"kernelized_rpe_{name}")
    tensors = {key: fixture[key].requires_grad_() for key in ("q", "k", "v", "offset_bias")}
    output = run(tensors, {"feature_map": "exp", "normalize": False, "method": method}, pattern=pattern).output
    check_recorded(fixture, output, tensors, 1e-11)


def layer(pattern: str = "causal-self", **options: Any) -> Any:
    return create_layer("kernelized_rpe", 16, 4, pattern=pattern, **options).double()


def test_the_layer_starts_without_biases():
    made = layer(max_offset=8)
    assert made.projection.random_features.shape == (4, 4, 4)
    assert made.projection.offset_bias.shape == (4, 17) and not made.projection.offset_bias.any()
    assert layer(features=9, share_features=True).projection.random_features.shape == (1, 9, 4)


@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("name", ["alibi", "bucketed", "power"])
@pytest.mark.parametrize("feature_map", ["positive_random", "elu"])
def test_offsets_of_other_schemes_are_their_tables(feature_map, name, pattern):
    x, offsets, causal = torch.randn(2, 20, 16, dtype=torch.float64), torch.arange(-20, 21), pattern == "causal-self"
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
    refused("grid", made, x)
    refused("causal-self", layer, "causal-cross", max_offset=(2, 3))
    plain = layer("noncausal-self", feature_map="elu")
    assert plain.projection.random_features is None
    torch.nn.init.normal_(plain.projection.offset_bias)
    close(plain(x, context=Context(grid=(3, 4))).output, plain(x).output)  # a bias by rank ignores the grid


def test_a_causal_layer_on_a_grid_decodes_it():
    x, context = torch.randn(2, 12, 16, dtype=torch.float64), Context(grid=(3, 4), want=frozenset({"state"}))
    made = layer(max_offset=(2, 3)).eval()
    torch.nn.init.normal_(made.projection.grid_bias)
    found, _ = in_pieces(lambda token, s: made(token, context=context, state=s), x.split(1, 1), axis=1)
    close(found, made(x, context=context).output)


def test_a_layer_learns_the_weight_of_a_class_token():
    x, context = torch.randn(2, 12, 16, dtype=torch.float64), Context(roles=class_tokens(12, [0], [0]))
    made, fixed = layer("noncausal-self", learn_class_bias=True), layer("noncausal-self")
    fixed.load_state_dict(made.state_dict(), strict=False)
    close(made(x, context=context).output, fixed(x, context=context).output)
    made(x, context=context).output.square().sum().backward()
    assert made.projection.class_bias.grad.abs().max() > 0
    made.projection.class_bias.data += 1.0
    assert (made(x, context=context).output - fixed(x, context=context).output).abs().max() > 1e-3
    close(made(x).output, fixed(x).output)  # all tokens have a place


GRID = {"grid_bias": torch.zeros(2, 3, 3, dtype=torch.float64)}
ROLES = {"roles": torch.zeros(2, 6, dtype=torch.long)}


@pytest.mark.parametrize(
    ("words", "changed", "call"),
    [
        ("draw_features", {"random_features": None}, {}),
        ("R >= 1", {"offset_bias": torch.zeros(2, 4, dtype=torch.float64)}, {}),
        ("scale >= 0", {}, {"scale": -1.0}),
        ("grid_bias in causal-cross", GRID, {"pattern": "causal-cross", "grid": (2, 3)}),
        ("at most 4", GRID, {"grid": (2, 2), "return_state": True}),
        ("at most 4", GRID, {"grid": (2, 2), "pattern": "noncausal-self"}),
        ("rows, columns", GRID, {"grid": (1, 2, 3), "pattern": "noncausal-self"}),
        ("roles in noncausal-cross", {}, {"pattern": "noncausal-cross", **ROLES}),
        ("roles and a state", {}, {"return_state": True, **ROLES}),
    ],
)
def test_what_cannot_be_honoured_is_refused(words, changed, call):
    given = {name: x for name, x in {**inputs(6), **changed}.items() if x is not None}
    refused(words, run, given, **call)


def test_states_of_other_tables_and_memory_with_roles_are_refused():
    lines, places = inputs(6), on_grid(6)
    for words, given, other in (
        ("7 offsets", lines, inputs(6, reach=5)),
        ("the state of", lines, places),
        ("the state of", places, lines),
    ):
        state = run(given, grid=(4, 3), return_state=True).state
        refused(words, run, other, grid=(4, 3), state=state)
    memory = {name: lines[name] for name in ("k", "v", "random_features")}
    refused("roles in noncausal-cross", absorb, MECHANISM, memory, pattern="noncausal-cross", **ROLES)
