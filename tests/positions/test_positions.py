"""Position schemes against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from support import GRAPH, close
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


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def act(scheme: Positions, x: Tensor, positions: Tensor) -> Tensor:
    """The scheme's effect on heads x (b, h, n, d), wherever it acts."""
    if scheme.embed is not None:
        return scheme.embed(x.transpose(1, 2).flatten(2)[..., : SIZES["dim"]], positions)
    if scheme.rotate is not None:
        return scheme.rotate(x, positions)
    return scheme.bias(positions, positions, False)


def test_every_scheme_acts_at_its_place_alone():
    assert list_positions() == list(PLACES)
    for name, place in PLACES.items():
        scheme = create_positions(name, **SIZES)
        assert [p for p in ("embed", "rotate", "bias") if getattr(scheme, p) is not None] == ([place] if place else [])


DYNAMIC = {"fraction": 0.5, "trained_length": 3}
BY_PARTS = {"interpolation": 4.0, "wavelengths": (8.0, 200.0)}
OPTIONS = {name: {"encoder_layers": 1} if name.startswith("seqpe") else {} for name, place in PLACES.items() if place}


@pytest.mark.parametrize(("name", "options"), [*OPTIONS.items(), ("rotary", DYNAMIC), ("rotary", BY_PARTS)])
def test_each_token_depends_on_its_position_alone_and_compiled_equals_eager(name, options):
    scheme = create_positions(name, **SIZES, **options).double().eval()
    x, positions, order = normal(2, 6, 9, 8), torch.randint(0, 50, (2, 9)), torch.randperm(9)
    whole, permuted = act(scheme, x, positions), act(scheme, x[:, :, order], positions[:, order])
    torch._dynamo.reset()
    close(torch.compile(act, fullgraph=True, backend=GRAPH)(scheme, x, positions), whole, 1e-14)
    for axis in {"embed": [1], "rotate": [2], "bias": [2, 3]}[PLACES[name]]:
        whole = whole.index_select(axis, order)
    close(permuted, whole, 1e-14)


@pytest.mark.parametrize("dim", [1, 6, 7])
def test_sinusoidal_equals_its_definition(dim):
    positions = torch.randint(0, 5000, (2, 4))
    found = Sinusoidal(dim=dim).embed(torch.zeros(2, 4, dim, dtype=torch.float64), positions)
    for row, column in ((0, 0), (1, 3)):
        p = int(positions[row, column])
        expected = [(math.cos if j % 2 else math.sin)(p / 10_000 ** (2 * (j // 2) / dim)) for j in range(dim)]
        close(found[row, column], torch.tensor(expected, dtype=torch.float64), 1e-11)


def test_learned_adds_rows_and_refuses_positions_beyond_its_table():
    scheme = Learned(dim=4, max_length=10).double()
    x, positions = normal(2, 3, 4), torch.tensor([[0, 9, 9], [1, 2, 3]])
    assert torch.equal(scheme.embed(x, positions), x + scheme.table[positions])
    with pytest.raises(Unsupported, match="max_length - 1 = 9"):
        scheme.embed(x, positions + 1)
    with pytest.raises(Unsupported, match="position -1"):
        scheme.embed(x, positions - 1)
    assert scheme.embed(x[:, :0], positions[:, :0]).shape == (2, 0, 4)
    with pytest.raises(Unsupported, match="max_length"):
        create_positions("learned", dim=4, heads=1, head_dim=4)


# schemes that rotate


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
def test_rotary_equals_complex_rotation(fraction):
    scheme = Rotary(head_dim=16, fraction=fraction, interpolation=2.0)
    x, positions = normal(2, 3, 5, 16), torch.randint(0, 300, (2, 5))
    r = int(16 * fraction)
    theta = 10_000.0 ** (-2 * torch.arange(r // 2, dtype=torch.float64) / r)
    turn = torch.exp(1j * positions[:, None, :, None] / 2 * theta)
    turned = torch.complex(x[..., : r // 2], x[..., r // 2 : r]) * turn
    close(scheme.rotate(x, positions), torch.cat([turned.real, turned.imag, x[..., r:]], -1))


def test_lrpe_equals_a_reflection_and_a_complex_rotation_of_neighbouring_features():
    scheme = Lrpe(head_dim=8).double()
    x, positions = normal(2, 3, 5, 8), torch.randint(0, 300, (2, 5))
    u = scheme.reflection
    mirror = torch.eye(8, dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u)
    turn = torch.exp(1j * positions[:, None, :, None] * scheme.angles.detach())
    turned = torch.view_as_complex((x @ mirror).unflatten(-1, (4, 2))) * turn
    found = scheme.rotate(x, positions)
    close(found, torch.view_as_real(turned).flatten(-2))
    close(found.norm(dim=-1), x.norm(dim=-1), 1e-14)


def test_lrpe_learns_its_angles_and_keeps_its_reflection():
    scheme = Lrpe(head_dim=6).double()
    expected = 10_000.0 ** (-torch.arange(0, 6, 2).double() / 6)
    torch.testing.assert_close(scheme.angles.detach(), expected, rtol=1e-6, atol=0)
    assert [name for name, _ in scheme.named_parameters()] == ["angles"]
    assert "reflection" in scheme.state_dict()  # a saved model rotates as before


@pytest.mark.parametrize("name", ["rotary", "lrpe"])
def test_products_depend_on_the_difference_of_positions_alone(name):
    scheme, (q, k) = create_positions(name, **SIZES), normal(2, 1, 2, 7, 8)
    i, j = torch.randint(0, 100, (2, 1, 7))

    def product(ahead: int, apart: int) -> Tensor:
        return scheme.rotate(q, i + ahead + apart) @ scheme.rotate(k, j + ahead).mT

    close(product(12345, 0), product(0, 0), 1e-10)
    assert (product(0, 1) - product(0, 0)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["rotary", "lrpe", "sinusoidal"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_far_positions_are_as_exact_as_near_ones(dtype, tolerance, name):
    scheme, x = create_positions(name, **SIZES), torch.randn(1, 6, 5, 8).to(dtype)
    positions = torch.randint(1_000_000, 2_000_000, (1, 5))
    found = act(scheme, x, positions)
    assert found.dtype == dtype
    close(found.double(), act(scheme, x.double(), positions), tolerance)


def test_ntk_slows_the_slowest_plane_by_the_factor_and_keeps_the_fastest():
    plain, scaled = Rotary(head_dim=16), Rotary(head_dim=16, ntk=4.0)
    assert scaled.base ** (-14 / 16) == pytest.approx(plain.base ** (-14 / 16) / 4)
    fastest, at = torch.eye(16, dtype=torch.float64)[None, None, :1], torch.tensor([[7]])
    close(scaled.rotate(fastest, at), plain.rotate(fastest, at))


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("linear", {}, {"interpolation": 4.0}),
        ("dynamic", {}, {"ntk": 4.0, "trained_length": 16}),
        ("llama3", LLAMA3, {"interpolation": 4.0, "wavelengths": (64.0, 256.0)}),
    ],
)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_scaled_rotary_turns_as_that_of_transformers(kind, theirs, ours, fraction):
    """Compare inverse frequencies at each length, as a decoder needs them token by token."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    trained, width = 16, 12
    options = {"rope_type": kind, "factor": 4.0, "rope_theta": 500.0, "partial_rotary_factor": fraction, **theirs}
    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, max_position_embeddings=trained, rope_parameters=options
    )
    scheme = Rotary(head_dim=width, base=500.0, fraction=fraction, **ours)
    half = int(width * fraction) // 2
    x = torch.zeros(1, 1, 1, width, dtype=torch.float64)
    x[..., :half] = 1
    for p in (0, 3, 15, 16, 40, 100):
        frequencies, factor_of_attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=p + 1)
        turn = p * frequencies.double()
        expected = torch.cat([turn.cos(), turn.sin(), x[0, 0, 0, 2 * half :]])
        close(scheme.rotate(x, torch.tensor([[p]]))[0, 0, 0], expected, 2e-5)  # theirs are computed in float32
        assert factor_of_attention == 1.0


# schemes that add to scores


def test_alibi_subtracts_distances_times_slopes_by_the_authors_rule():
    assert Alibi(heads=8).slopes().tolist() == [2.0**-h for h in range(1, 9)]
    assert Alibi(heads=1).slopes().tolist() == [2.0**-8]
    twelve = [2.0**-h for h in range(1, 9)] + [2.0 ** -(h - 0.5) for h in range(1, 5)]
    close(Alibi(heads=12).slopes(), torch.tensor(twelve), 1e-6)
    scheme, i, j = Alibi(heads=3), torch.randint(0, 99, (2, 4)), torch.randint(-1, 99, (2, 5))
    expected = -scheme.slopes().view(3, 1, 1) * (i[:, None, :, None] - j[:, None, None]).abs()
    for rows, keys in ((i, j), (i[:1], j[:1]), (i[:1], j)):
        found = scheme.bias(rows, keys, False)
        assert torch.equal(found[0], expected[0]) and found.shape == (len(keys), 3, 4, 5)
    assert torch.equal(scheme.bias(i, j, True), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"),
    [(32, 128), (16, 64), (64, 256), (8, 20), (32, 100), (12, 50), (64, 1000), (4, 5), (10, 20), (18, 128)],
)
def test_relative_buckets_are_those_of_t5_in_transformers(num_buckets, max_distance, causal):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    scheme = Relative(heads=2, num_buckets=num_buckets, max_distance=max_distance)
    queries, keys = torch.tensor([[1500]]), torch.arange(3001)[None]
    expected = t5.T5Attention._relative_position_bucket(
        keys - 1500, bidirectional=not causal, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(scheme.buckets(queries, keys, causal)[0], expected)
    assert torch.equal(scheme.bias(queries, keys, causal)[0, :, 0], scheme.table[expected[0]].T)


def test_toeplitz_has_one_number_an_offset_whose_gradient_sums_over_the_diagonal():
    scheme = Toeplitz(heads=3, max_distance=4, std=1.0).double()
    i, j = torch.arange(7)[None], torch.randint(0, 12, (2, 9))
    found = scheme.bias(i, j, False)
    assert found.shape == (2, 3, 7, 9)
    for row, query, key in ((0, 0, 0), (1, 6, 8), (1, 3, 2)):
        offset = max(-4, min(4, int(j[row, key]) - query))
        assert torch.equal(found[row, :, query, key], scheme.table[:, offset + 4])
    weights = normal(3, 7, 7)
    (gradient,) = torch.autograd.grad((scheme.bias(i, i, True)[0] * weights).sum(), scheme.table)
    diagonals = [weights.diagonal(k, 1, 2).sum(-1) for k in range(-6, 7)]
    close(gradient, torch.stack([sum(diagonals[:3]), *diagonals[3:10], sum(diagonals[10:])], -1), 1e-13)


# refusals


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
        ("rotary", {"wavelengths": (9.0, 3.0)}, "0 < a < b"),
        ("rotary", {"wavelengths": (3.0, 9.0), "ntk": 2.0}, "NTK-aware"),
        ("lrpe", {"head_dim": 0}, "even head_dim"),
        ("lrpe", {"head_dim": 5}, "even head_dim"),
        ("relative", {"num_buckets": 7}, "even"),
        ("relative", {"max_distance": 16}, "max_distance >= 17"),
        ("toeplitz", {"max_distance": 0}, "max_distance >= 1"),
        ("sinusoidal", {"base": 0.0}, "base > 1"),
    ],
)
def test_mistakes_are_refused_with_the_nearest_alternative(name, options, message):
    with pytest.raises(Unsupported, match=message):
        create_positions(name, **{**SIZES, **options})


def test_positions_that_do_not_fit_are_refused():
    x = torch.randn(2, 1, 3, 8)
    for positions in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)):
        with pytest.raises(Unsupported):
            Rotary(head_dim=8).rotate(x, positions)
    with pytest.raises(Unsupported, match="head_dim=8"):
        Rotary(head_dim=8).rotate(x[..., :4], torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(Unsupported):
        Alibi(heads=2).bias(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, 3, dtype=torch.long), True)
