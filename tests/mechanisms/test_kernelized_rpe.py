"""What is peculiar to kernelized attention with relative positions: the Toeplitz product by every method, its closed forms,
random features, the constant state, grids, and the layer's tables. No code for it runs on a CPU from the registries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.apply import absorb, apply
from regard.contract import Context, Mask, Role, Shape, Unsupported
from regard.create import create_layer
from regard.functional import kernelized_rpe_attention, linear_attention
from regard.mechanisms.kernelized_rpe import MECHANISM, Config, cost, draw_features
from regard.positions import Alibi, Relative
from regard.workbench.properties import FUNCTION_PROPERTIES, NotApplicable
from regard.workbench.subjects import Subject

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


PROPERTIES = [p for p in FUNCTION_PROPERTIES if p.name not in ("compile", "grouped_heads", "refusals", "pair_masks")]


@pytest.mark.parametrize("pattern", MECHANISM.patterns)
@pytest.mark.parametrize("options", [{"method": "fft"}, {**ELU, "learn_temperature": True}, {"features": 3}])
def test_the_matrix_holds_with_other_options(options, pattern):
    """The matrix measures the default, whose sequences are too short for the FFT to be chosen."""
    for prop in PROPERTIES:
        for dtype in prop.dtypes:
            try:
                error = prop.check(Subject(MECHANISM, pattern, options, seed=3), dtype)
            except NotApplicable:
                continue
            assert error <= MECHANISM.tolerances[dtype], prop.name


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
            patch.setattr("regard.mechanisms.kernelized_rpe.NUMBERS_AT_ONCE", 1)
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


@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_tokens_without_a_place_pair_at_weight_one(grid):
    """A class token, wherever it stands."""
    tensors, table = inputs(13, reach=4), torch.randn(2, 5, 7, dtype=torch.float64)
    if grid is not None:
        del tensors["offset_bias"]
        tensors["grid_bias"] = table
    roles = torch.zeros(2, 13, dtype=torch.long)
    roles[0, 0] = roles[1, 6] = int(Role.CLS)
    found = run(tensors, "noncausal-self", grid=grid, roles=roles).output
    close(run(tensors, "noncausal-self", grid=grid, roles=roles, form="reference").output, found)
    queries, keys = (phi(tensors[name], tensors["random_features"]) for name in "qk")
    plain = queries @ keys.mT
    for row in range(2):
        place = {int(t): rank for rank, t in enumerate((roles[row] == 0).nonzero()[:, 0])}
        for i in range(13):
            for j in set(place) & {i} and place:
                a, b = place[i], place[j]
                if grid is None:
                    bias = tensors["offset_bias"][:, max(-4, min(4, b - a)) + 4]
                else:
                    y, x = b // 4 - a // 4, b % 4 - a % 4
                    bias = table[:, max(-2, min(2, y)) + 2, max(-3, min(3, x)) + 3]
                plain[row, :, i, j] *= bias.exp()
    close(found, plain @ tensors["v"] / plain.sum(-1, keepdim=True))


def test_a_padded_grid_is_a_shorter_one():
    tensors = inputs(12)
    del tensors["offset_bias"]
    tensors["grid_bias"] = torch.randn(2, 5, 5, dtype=torch.float64)
    short = {name: x[:, :, :9] if name in "qkv" else x for name, x in tensors.items()}
    found = run(tensors, "noncausal-self", grid=(4, 3), mask=Mask(lengths=torch.tensor([12, 9]))).output
    close(found[1, :, :9], run(short, "noncausal-self", grid=(3, 3)).output[1])
    close(found[0], run(tensors, "noncausal-self", grid=(4, 3)).output[0])


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
        for name in ("alibi", "bucketed", "power"):
            made = layer(pattern, offsets=name, max_offset=20)
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
            free = layer(pattern, max_offset=20)
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
    with pytest.raises(Unsupported, match="noncausal-self"):
        layer(max_offset=(2, 3))
    plain = layer("noncausal-self", feature_map="elu")
    assert plain.projection.random_features is None
    torch.nn.init.normal_(plain.projection.offset_bias)
    close(plain(x, context=Context(grid=(3, 4))).output, plain(x).output)  # a bias by rank knows no grid


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
    with pytest.raises(Unsupported, match="grid_bias in causal-self"):
        run(tensors | grid, grid=(2, 3))
    with pytest.raises(Unsupported, match="at most 4"):
        run(tensors | grid, "noncausal-self", grid=(2, 2))
    with pytest.raises(Unsupported, match="rows, columns"):
        run(tensors | grid, "noncausal-self", grid=(1, 2, 3))
    with pytest.raises(Unsupported, match="roles"):
        run(tensors, roles=torch.zeros(2, 6, dtype=torch.long))
