"""Position schemes against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.contract import Unsupported
from regard.positions import (
    Alibi,
    Learned,
    Lrpe,
    Positions,
    Relative,
    Rotary,
    Sinusoidal,
    Toeplitz,
    create_positions,
    list_positions,
)

SIZES = {"dim": 12, "heads": 6, "head_dim": 8, "max_length": 50}
PLACES = {
    "none": None,
    "sinusoidal": "embed",
    "learned": "embed",
    "rotary": "rotate",
    "lrpe": "rotate",
    "alibi": "bias",
    "relative": "bias",
    "toeplitz": "bias",
    "seqpe": "embed",
    "seqpe_mul": "rotate",
    "seqpe_add": "rotate",
    "seqpe_scalar": "rotate",
}


def act(scheme: Positions, x: Tensor, positions: Tensor) -> Tensor:
    """The scheme's effect on heads x (b, h, n, d), whatever its place."""
    if scheme.embed is not None:
        return scheme.embed(x.transpose(1, 2).flatten(2)[..., : SIZES["dim"]], positions)
    if scheme.rotate is not None:
        return scheme.rotate(x, positions)
    assert scheme.bias is not None
    return scheme.bias(positions, positions, False)


def test_every_scheme_acts_at_its_place_alone() -> None:
    assert list_positions() == list(PLACES)
    for name, place in PLACES.items():
        scheme = create_positions(name, **SIZES)
        assert [p for p in ("embed", "rotate", "bias") if getattr(scheme, p) is not None] == ([place] if place else [])


@pytest.mark.parametrize("name", [n for n, place in PLACES.items() if place])
def test_each_token_depends_on_its_position_alone(name: str) -> None:
    scheme = create_positions(name, **SIZES).double().eval()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    positions = torch.randint(0, 50, (2, 9))
    order = torch.randperm(9)
    whole, permuted = act(scheme, x, positions), act(scheme, x[:, :, order], positions[:, order])
    if PLACES[name] == "embed":
        whole = whole[:, order]
    elif PLACES[name] == "rotate":
        whole = whole[:, :, order]
    else:
        whole = whole[:, :, order][..., order]
    torch.testing.assert_close(permuted, whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", [n for n, place in PLACES.items() if place])
def test_compiled_equals_eager(name: str) -> None:
    scheme = create_positions(name, **SIZES).double().eval()
    x, positions = torch.randn(2, 6, 9, 8, dtype=torch.float64), torch.randint(0, 50, (2, 9))
    torch._dynamo.reset()
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scheme, x, positions), act(scheme, x, positions), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dim", [1, 6, 7])
def test_sinusoidal_equals_its_definition(dim: int) -> None:
    positions = torch.randint(0, 5000, (2, 4))
    found = Sinusoidal(dim=dim).embed(torch.zeros(2, 4, dim, dtype=torch.float64), positions)
    for row, column in ((0, 0), (1, 3)):
        p = int(positions[row, column])
        expected = [(math.cos if j % 2 else math.sin)(p / 10_000 ** (2 * (j // 2) / dim)) for j in range(dim)]
        torch.testing.assert_close(found[row, column], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)


def test_learned_adds_rows_and_refuses_positions_beyond_its_table() -> None:
    scheme = Learned(dim=4, max_length=10).double()
    x, positions = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[0, 9, 9], [1, 2, 3]])
    assert torch.equal(scheme.embed(x, positions), x + scheme.table[positions])
    with pytest.raises(Unsupported, match="max_length - 1 = 9"):
        scheme.embed(x, positions + 1)
    with pytest.raises(Unsupported, match="position -1"):
        scheme.embed(x, positions - 1)
    assert scheme.embed(x[:, :0], positions[:, :0]).shape == (2, 0, 4)
    with pytest.raises(Unsupported, match="max_length"):
        create_positions("learned", dim=4, heads=1, head_dim=4)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
def test_rotary_equals_complex_rotation(fraction: float) -> None:
    scheme = Rotary(head_dim=16, fraction=fraction, interpolation=2.0)
    x, positions = torch.randn(2, 3, 5, 16, dtype=torch.float64), torch.randint(0, 300, (2, 5))
    r = int(16 * fraction)
    theta = 10_000.0 ** (-2 * torch.arange(r // 2, dtype=torch.float64) / r)
    turn = torch.polar(torch.ones(2, 1, 5, r // 2, dtype=torch.float64), positions[:, None, :, None] / 2 * theta)
    turned = torch.complex(x[..., : r // 2], x[..., r // 2 : r]) * turn
    expected = torch.cat([turned.real, turned.imag, x[..., r:]], -1)
    torch.testing.assert_close(scheme.rotate(x, positions), expected, rtol=0, atol=1e-12)


def test_rotary_products_depend_on_the_difference_of_positions_alone() -> None:
    scheme = Rotary(head_dim=8)
    q, k = torch.randn(2, 1, 2, 7, 8, dtype=torch.float64)
    i, j = torch.randint(0, 100, (2, 1, 7))
    product = scheme.rotate(q, i) @ scheme.rotate(k, j).mT
    moved = scheme.rotate(q, i + 12345) @ scheme.rotate(k, j + 12345).mT
    torch.testing.assert_close(moved, product, rtol=0, atol=1e-10)
    apart = scheme.rotate(q, i + 1) @ scheme.rotate(k, j).mT
    assert (apart - product).abs().max() > 1e-2


def test_rotary_decoding_equals_prefill() -> None:
    scheme = Rotary(head_dim=8, fraction=0.5)
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    whole = scheme.rotate(x, torch.arange(6)[None])
    steps = [scheme.rotate(x[:, :, t : t + 1], torch.full((2, 1), t)) for t in range(6)]
    torch.testing.assert_close(torch.cat(steps, 2), whole, rtol=0, atol=1e-14)


def test_ntk_slows_the_slowest_plane_by_the_factor_and_keeps_the_fastest() -> None:
    plain, scaled = Rotary(head_dim=16), Rotary(head_dim=16, ntk=4.0)
    assert scaled.base ** (-14 / 16) == pytest.approx(plain.base ** (-14 / 16) / 4)
    fastest = torch.zeros(1, 1, 1, 16, dtype=torch.float64)
    fastest[..., 0] = 1
    at = torch.tensor([[7]])
    torch.testing.assert_close(plain.rotate(fastest, at), scaled.rotate(fastest, at))


def turned_by_base(x: Tensor, position: int, base: float) -> Tensor:
    """One token, plane by plane."""
    half, found = x.shape[-1] // 2, x.clone()
    for i in range(half):
        angle = position * base ** (-2 * i / (2 * half))
        found[..., i] = x[..., i] * math.cos(angle) - x[..., i + half] * math.sin(angle)
        found[..., i + half] = x[..., i] * math.sin(angle) + x[..., i + half] * math.cos(angle)
    return found


@pytest.mark.parametrize("ntk", [1.0, 2.5])
def test_dynamic_ntk_turns_each_token_by_the_base_of_its_own_length(ntk: float) -> None:
    scheme, plain = Rotary(head_dim=8, ntk=ntk, trained_length=20), Rotary(head_dim=8)
    x, positions = torch.randn(2, 3, 60, 8, dtype=torch.float64), torch.arange(60)[None]
    found = scheme.rotate(x, positions)
    torch.testing.assert_close(found[:, :, :20], plain.rotate(x[:, :, :20], positions[:, :20]), rtol=0, atol=1e-13)
    for p in (20, 21, 59):
        base = 10_000.0 * (ntk * (p + 1) / 20 - (ntk - 1)) ** (8 / 6)
        torch.testing.assert_close(found[:, :, p], turned_by_base(x[:, :, p], p, base), rtol=0, atol=1e-12)
    steps = [scheme.rotate(x[:, :, t : t + 1], torch.full((2, 1), t)) for t in range(60)]
    torch.testing.assert_close(torch.cat(steps, 2), found, rtol=0, atol=1e-14)
    halves = scheme.rotate(x.bfloat16(), positions)
    torch.testing.assert_close(halves.double(), scheme.rotate(x.bfloat16().double(), positions), rtol=0, atol=2e-2)


def test_dynamic_ntk_takes_parts_of_heads_and_has_exact_gradients() -> None:
    whole, part = Rotary(head_dim=8, trained_length=3), Rotary(head_dim=16, fraction=0.5, trained_length=3)
    x, positions = torch.randn(2, 1, 5, 16, dtype=torch.float64), torch.randint(0, 99, (2, 5))
    found = part.rotate(x, positions)
    torch.testing.assert_close(found[..., :8], whole.rotate(x[..., :8], positions), rtol=0, atol=1e-14)
    assert torch.equal(found[..., 8:], x[..., 8:])
    leaf = x[..., :8].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: whole.rotate(y, positions), leaf)
    torch._dynamo.reset()
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(part, x, positions), found, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_scaled_rotary_turns_as_that_of_transformers(kind: str, fraction: float) -> None:
    """Their inverse frequencies at each length, which a decoder asks for token by token."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factor, trained, width = 4.0, 16, 12
    options = {"rope_type": kind, "factor": factor, "rope_theta": 500.0, "partial_rotary_factor": fraction}
    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, max_position_embeddings=trained, rope_parameters=options
    )
    scale = {"interpolation": factor} if kind == "linear" else {"ntk": factor, "trained_length": trained}
    scheme = Rotary(head_dim=width, base=500.0, fraction=fraction, **scale)
    half = int(width * fraction) // 2
    x = torch.zeros(1, 1, 1, width, dtype=torch.float64)
    x[..., :half] = 1
    for p in (0, 3, 15, 16, 40, 100):
        frequencies, factor_of_attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=p + 1)
        turn = p * frequencies.double()
        expected = torch.cat([turn.cos(), turn.sin(), x[0, 0, 0, 2 * half :]])
        found = scheme.rotate(x, torch.tensor([[p]]))[0, 0, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # their frequencies are of float32
        assert factor_of_attention == 1.0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (16, 64), (64, 256), (8, 20), (32, 100), (12, 50), (64, 1000)]
)
def test_relative_buckets_are_those_of_t5_in_transformers(num_buckets: int, max_distance: int, causal: bool) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    scheme = Relative(heads=2, num_buckets=num_buckets, max_distance=max_distance)
    queries, keys = torch.tensor([[1500]]), torch.arange(3001)[None]
    expected = t5.T5Attention._relative_position_bucket(
        keys - 1500, bidirectional=not causal, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(scheme.buckets(queries, keys, causal)[0], expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_far_positions_are_as_exact_as_near_ones(dtype: torch.dtype, tolerance: float) -> None:
    scheme = Rotary(head_dim=8)
    x = torch.randn(1, 2, 5, 8).to(dtype)
    positions = torch.randint(1_000_000, 2_000_000, (1, 5))
    found = scheme.rotate(x, positions)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), scheme.rotate(x.double(), positions), rtol=0, atol=4 * tolerance)
    added = Sinusoidal(dim=8).to(dtype).embed(torch.zeros(1, 5, 8, dtype=dtype), positions)
    exact = Sinusoidal(dim=8).embed(torch.zeros(1, 5, 8, dtype=torch.float64), positions)
    torch.testing.assert_close(added.double(), exact, rtol=0, atol=tolerance)


def test_alibi_slopes_follow_the_authors_rule() -> None:
    assert Alibi(heads=8).slopes().tolist() == [2.0**-h for h in range(1, 9)]
    assert Alibi(heads=1).slopes().tolist() == [2.0**-8]
    twelve = [2.0**-h for h in range(1, 9)] + [2.0 ** -(h - 0.5) for h in range(1, 5)]
    torch.testing.assert_close(Alibi(heads=12).slopes(), torch.tensor(twelve))


def test_alibi_equals_its_definition() -> None:
    scheme, i, j = Alibi(heads=3), torch.randint(0, 99, (2, 4)), torch.randint(-1, 99, (2, 5))
    found = scheme.bias(i, j, True)
    assert found.shape == (2, 3, 4, 5)
    assert found[1, 2, 3, 4].item() == pytest.approx(-scheme.slopes()[2].item() * abs(int(i[1, 3]) - int(j[1, 4])))
    assert scheme.bias(i[:1], j[:1], False).shape == (1, 3, 4, 5)
    assert scheme.bias(i[:1], j, False).shape == (2, 3, 4, 5)


def t5_bucket(distance: int, buckets: int, max_distance: int) -> int:
    exact = buckets // 2
    if distance < exact:
        return distance
    step = math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact)
    return min(exact + int(step + 1e-9), buckets - 1)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (4, 5), (10, 20), (18, 128)])
@pytest.mark.parametrize("causal", [True, False])
def test_relative_buckets_equal_the_logarithm(num_buckets: int, max_distance: int, causal: bool) -> None:
    scheme = Relative(heads=2, num_buckets=num_buckets, max_distance=max_distance).double()
    i, j = torch.tensor([[1000]]), torch.arange(2001)[None]
    expected = []
    for ahead in range(-1000, 1001):
        if causal:
            expected.append(t5_bucket(max(-ahead, 0), num_buckets, max_distance))
        else:
            half = num_buckets // 2
            expected.append(t5_bucket(abs(ahead), half, max_distance) + (half if ahead > 0 else 0))
    assert scheme.buckets(i, j, causal)[0, 0].tolist() == expected
    assert torch.equal(scheme.bias(i, j, causal)[0, :, 0], scheme.table[torch.tensor(expected)].T)


def test_relative_bias_has_exact_gradients() -> None:
    scheme = Relative(heads=2, num_buckets=4, max_distance=6).double()
    i, j = torch.randint(0, 9, (2, 3)), torch.randint(0, 9, (2, 4))
    weights = torch.randn(2, 2, 3, 4, dtype=torch.float64)

    def loss(table: Tensor) -> Tensor:
        return (torch.func.functional_call(scheme, {"table": table}, (i, j)) * weights).sum()

    scheme.forward = lambda i, j: scheme.bias(i, j, False)  # type: ignore[method-assign]
    assert torch.autograd.gradcheck(loss, scheme.table.detach().clone().requires_grad_())


def test_toeplitz_has_one_number_an_offset_whose_gradient_sums_over_the_diagonal() -> None:
    scheme = Toeplitz(heads=3, max_distance=4, std=1.0).double()
    i, j = torch.arange(7)[None], torch.randint(0, 12, (2, 9))
    found = scheme.bias(i, j, False)
    assert found.shape == (2, 3, 7, 9)
    for row, query, key in ((0, 0, 0), (1, 6, 8), (1, 3, 2)):
        offset = max(-4, min(4, int(j[row, key]) - query))
        assert torch.equal(found[row, :, query, key], scheme.table[:, offset + 4])
    square = scheme.bias(i, i, True)[0]
    weights = torch.randn(3, 7, 7, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((square * weights).sum(), scheme.table)
    diagonals = [weights.diagonal(k, 1, 2).sum(-1) for k in range(-6, 7)]
    expected = [sum(diagonals[:3]), *diagonals[3:10], sum(diagonals[10:])]
    torch.testing.assert_close(gradient, torch.stack(expected, -1), rtol=0, atol=1e-13)


def test_rotary_and_sinusoidal_have_exact_gradients() -> None:
    positions = torch.randint(0, 99, (2, 3))
    heads = torch.randn(2, 1, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Rotary(head_dim=8, fraction=0.5).rotate(x, positions), heads)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Sinusoidal(dim=5).embed(x, positions), x)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rotery", {}, "try rotary"),
        ("rotary", {"fracton": 0.5}, "try fraction"),
        ("none", {"base": 2}, "no options"),
        ("rotary", {"fraction": 0.1}, "rotated features"),
        ("rotary", {"fraction": 1.5}, "fraction <= 1"),
        ("rotary", {"interpolation": 0.5}, "interpolation >= 1"),
        ("rotary", {"fraction": 0.25, "ntk": 2.0}, "at least 4"),
        ("rotary", {"fraction": 0.25, "trained_length": 9}, "at least 4"),
        ("rotary", {"trained_length": 0}, "trained_length >= 1"),
        ("relative", {"num_buckets": 7}, "even"),
        ("relative", {"max_distance": 16}, "max_distance >= 17"),
        ("toeplitz", {"max_distance": 0}, "max_distance >= 1"),
        ("sinusoidal", {"base": 0.0}, "base > 1"),
    ],
)
def test_mistakes_are_refused_with_the_nearest_alternative(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        create_positions(name, **SIZES, **options)


def test_positions_that_do_not_fit_are_refused() -> None:
    x = torch.randn(2, 1, 3, 8)
    for positions in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)):
        with pytest.raises(Unsupported):
            Rotary(head_dim=8).rotate(x, positions)
    with pytest.raises(Unsupported, match="head_dim=8"):
        Rotary(head_dim=8).rotate(x[..., :4], torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(Unsupported):
        Alibi(heads=2).bias(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, 3, dtype=torch.long), True)


def test_lrpe_equals_a_reflection_and_a_complex_rotation_of_neighbouring_features() -> None:
    scheme = Lrpe(head_dim=8).double()
    x, positions = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randint(0, 300, (2, 5))
    u = scheme.reflection
    mirror = torch.eye(8, dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u)
    torch.testing.assert_close(mirror @ mirror.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-14)
    turn = torch.polar(
        torch.ones(2, 1, 5, 4, dtype=torch.float64), positions[:, None, :, None] * scheme.angles.detach()
    )
    turned = torch.view_as_complex((x @ mirror).unflatten(-1, (4, 2))) * turn
    found = scheme.rotate(x, positions)
    torch.testing.assert_close(found, torch.view_as_real(turned).flatten(-2), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)


def test_lrpe_products_depend_on_the_difference_of_positions_alone() -> None:
    scheme = Lrpe(head_dim=8)
    q, k = torch.randn(2, 1, 2, 7, 8, dtype=torch.float64)
    i, j = torch.randint(0, 100, (2, 1, 7))
    product = scheme.rotate(q, i) @ scheme.rotate(k, j).mT
    torch.testing.assert_close(
        scheme.rotate(q, i + 12345) @ scheme.rotate(k, j + 12345).mT, product, rtol=0, atol=1e-10
    )
    assert (scheme.rotate(q, i + 1) @ scheme.rotate(k, j).mT - product).abs().max() > 1e-2


def test_lrpe_learns_its_angles_and_keeps_its_reflection() -> None:
    scheme = Lrpe(head_dim=6).double()
    torch.testing.assert_close(
        scheme.angles.detach(), 10_000.0 ** (-torch.arange(0, 6, 2).double() / 6), rtol=1e-6, atol=0
    )
    assert [name for name, _ in scheme.named_parameters()] == ["angles"]
    assert "reflection" in scheme.state_dict()  # a saved model turns as it did
    x, positions = torch.randn(1, 2, 3, 6, dtype=torch.float64), torch.randint(0, 9, (1, 3))

    def turned(x: Tensor, angles: Tensor) -> Tensor:
        return torch.func.functional_call(scheme, {"angles": angles}, (x, positions))

    scheme.forward = scheme.rotate  # type: ignore[method-assign]
    assert torch.autograd.gradcheck(turned, (x.requires_grad_(), scheme.angles.detach().clone().requires_grad_()))


def test_lrpe_is_as_exact_far_away_as_near() -> None:
    scheme = Lrpe(head_dim=8)
    x, positions = torch.randn(1, 2, 5, 8), torch.randint(1_000_000, 2_000_000, (1, 5))
    found = scheme.rotate(x, positions)
    torch.testing.assert_close(found.double(), scheme.rotate(x.double(), positions), rtol=0, atol=4e-6)
    for width in (0, 5):
        with pytest.raises(Unsupported, match="even head_dim"):
            Lrpe(head_dim=width)
