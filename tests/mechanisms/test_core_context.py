"""Tests specific to core context aware attention: cores, the moving window, decoding across group ends, and parity."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import calls, check_recorded, close, cut, in_pieces, load, qkv, refused
from torch import Tensor

from regard.contract import Mask
from regard.create import create_layer
from regard.functional import local_attention, softmax_attention
from regard.mechanisms.core_context import MECHANISM, Config
from regard.positions import create_positions

FORMS = ["reference", "parallel", "chunked"]


def run(inputs: dict[str, Tensor], config: Config, pattern: str = "causal-self", **call) -> Tensor:
    return calls(MECHANISM)(inputs, config=config, pattern=pattern, **call).output


def state_of(inputs: dict[str, Tensor], config: Config, **call):
    return calls(MECHANISM)(inputs, config=config, return_state=True, **call).state


def softmax(inputs: dict[str, Tensor], pattern: str = "causal-self") -> Tensor:
    return softmax_attention(*inputs.values(), pattern=pattern)


def steps(inputs: dict[str, Tensor], config: Config, state=None, **call) -> Tensor:
    tokens = (cut(inputs, slice(t, t + 1)) for t in range(inputs["q"].shape[2]))
    call |= {"config": config, "return_state": True}
    return in_pieces(lambda token, s: calls(MECHANISM)(token, state=s, **call), tokens, state)[0]


def rotary():
    return create_positions("rotary", dim=4, heads=1, head_dim=4).rotate


def differ(outputs: list[Tensor]) -> bool:
    return all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(outputs, 2))


# Cases that are softmax attention

IN_WINDOW = [Config(4, 17), Config(5, 40)]
ONE_BY_ONE = [Config(1, 0), Config(1, 1), Config(1, 6), Config(1, 3, share_gqa=True)]


@pytest.mark.parametrize("form", FORMS)
def test_it_is_softmax_within_the_window_and_with_groups_of_one(form):
    inputs = qkv(17)
    for config in IN_WINDOW + ONE_BY_ONE:
        close(run(inputs, config, form=form), softmax(inputs))
    assert differ([run(inputs, Config(4, 8), form=form), softmax(inputs)])


def test_so_it_is_without_a_direction():
    inputs = qkv(17)
    for config in IN_WINDOW + ONE_BY_ONE:
        close(run(inputs, config, "noncausal-self"), softmax(inputs, "noncausal-self"))
    inputs = qkv(5, 14)
    close(run(inputs, Config(1), "noncausal-cross"), softmax(inputs, "noncausal-cross"))


# Which tokens are read, and how


@pytest.mark.parametrize(("n", "g", "s"), [(23, 4, 8), (30, 3, 7), (19, 5, 1), (16, 4, 4), (40, 6, 10), (21, 4, 0)])
def test_tokens_and_cores_part_the_past(n, g, s):
    """With equal keys, a token read by itself counts 1 and a token of a group 1 / g, divided by the number of terms."""
    inputs = qkv(n)
    inputs["k"] = inputs["k"][:, :, :1].expand(-1, -1, n, -1)
    inputs["v"] = torch.eye(n, dtype=torch.float64).expand(2, 2, n, n)
    weights = run(inputs, Config(g, s))
    for i in range(1, n + 1):
        left = max(0, (i - s) // g)
        near = i - left * g
        assert near == (i if i <= s else s + (i - s) % g)
        expected = torch.cat([torch.full((left * g,), 1 / g, dtype=torch.float64), torch.ones(near)]) / (left + near)
        close(weights[:, :, i - 1, :i], expected.expand(2, 2, -1))
        assert (weights[:, :, i - 1, i:] == 0).all()


def test_equal_tokens_in_a_group_count_once():
    inputs = qkv(16)
    for name in "kv":
        inputs[name] = inputs[name][:, :, ::4].repeat_interleave(4, 2)
    read = [0, 4, 8, 12, 13, 14, 15]
    last = {"q": inputs["q"][:, :, 15:], "k": inputs["k"][:, :, read], "v": inputs["v"][:, :, read]}
    close(run(inputs, Config(4, 4))[:, :, 15:], softmax(last, "noncausal-cross"))


def test_a_mean_pool_is_that_of_queries_that_are_zero():
    inputs = qkv(30)
    inputs["q"][:, :, 3::4] = 0
    others = [t for t in range(30) if t % 4 != 3]
    close(run(inputs, Config(4, 6))[:, :, others], run(inputs, Config(4, 6, "mean"))[:, :, others])


def test_a_mean_query_pools_as_a_last_query_that_is_the_mean():
    inputs = qkv(28)
    asked = {**inputs, "q": inputs["q"].clone()}
    asked["q"][:, :, 3::4] = inputs["q"].unflatten(2, (7, 4)).mean(3)
    others = [t for t in range(28) if t % 4 != 3]
    close(run(inputs, Config(4, 6, pool_query="mean"))[:, :, others], run(asked, Config(4, 6))[:, :, others])


def test_shared_cores_are_asked_for_by_the_mean_query_of_their_heads():
    inputs = qkv(20, heads=4, groups=2)
    mean = inputs["q"].unflatten(1, (2, 2)).mean(2, keepdim=True).expand(-1, -1, 2, -1, -1).flatten(1, 2)
    shared = {**inputs, "q": mean}
    close(run(shared, Config(3, 4, share_gqa=True)), run(shared, Config(3, 4)))
    for share_gqa, cores in ((True, 2), (False, 4)):
        assert state_of(inputs, Config(3, 4, share_gqa=share_gqa)).keys.shape[1] == cores


def test_a_gate_weighs_cores_against_tokens():
    inputs = qkv(20)
    gates = (torch.full((2,), x, dtype=torch.float64) for x in (-60, 0, 60))
    far, half, near = (run(inputs | {"gate": gate}, Config(4, 4, fusion="gated")) for gate in gates)
    window = local_attention(*inputs.values(), pattern="causal-self", window=4)
    close(near[:, :, 3::4], window[:, :, 3::4])
    close(far[:, :, :7], softmax(inputs)[:, :, :7])  # before the first core is read
    close(half[:, :, 8:], (near + far)[:, :, 8:] / 2)


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_without_a_window_the_kernels_read_what_the_definition_reads(pattern):
    inputs, config = qkv(70, dim=8, value_dim=6), Config(4, 0)
    found = run({name: x.float() for name, x in inputs.items()}, config, pattern)
    close(found.double(), run(inputs, config, pattern, form="reference"), 1e-5)


# Rotary positions


@pytest.mark.parametrize("form", FORMS)
def test_pooling_before_and_after_rotation_differ_with_rotation_only(form):
    inputs, ranks = qkv(26), torch.arange(26)[None]
    before, after = Config(4, 6, pool_keys="pre_rope"), Config(4, 6)
    close(run(inputs, before, form=form), run(inputs, after, form=form))
    turned = [run(inputs, config, form=form, rotate=rotary()) for config in (before, after)]
    assert differ(turned)
    rotated = {**inputs, "q": rotary()(inputs["q"], ranks), "k": rotary()(inputs["k"], ranks)}
    close(turned[1], run(rotated, after))


@pytest.mark.parametrize("pool_keys", ["post_rope", "pre_rope"])
def test_rotated_steps_equal_the_definition(pool_keys):
    inputs, config = qkv(26, heads=4, groups=2), Config(4, 5, pool_keys=pool_keys, pool_query="mean")
    close(steps(inputs, config, rotate=rotary()), run(inputs, config, form="reference", rotate=rotary()))


def test_a_core_before_rotation_turns_with_the_last_place_of_its_group():
    inputs, config = qkv(8), Config(4, 4, pool_keys="pre_rope")
    plain = state_of(inputs, config).keys
    close(state_of(inputs, config, rotate=rotary()).keys, rotary()(plain, torch.tensor([[3, 7]])))


# States


def test_thousands_of_steps_after_a_prefill_equal_the_whole():
    config, first = Config(5, 12), 137
    inputs = qkv(1500, batch=1, heads=1)
    tail = steps(cut(inputs, slice(first, None)), config, state_of(cut(inputs, slice(first)), config))
    close(tail, run(inputs, config)[:, :, first:])


@pytest.mark.parametrize("options", [{}, {"share_gqa": True}, {"pool_keys": "pre_rope"}, {"pool_query": "mean"}])
def test_kernels_step_as_the_definition_from_a_state_that_stays_as_it_was(options):
    """Stepping again from the same state, or from a reordered one, is not affected by the first continuation."""
    config, inputs = Config(4, 9, **options), qkv(60, heads=4, groups=2, dim=4)
    turn = {"rotate": rotary()}
    told = {name: x.float() for name, x in inputs.items()}
    expected = run(inputs, config, form="reference", **turn)
    past = state_of(cut(told, slice(30)), config, **turn)
    first, after = in_pieces(
        lambda token, s: calls(MECHANISM)(token, state=s, config=config, return_state=True, **turn),
        (cut(told, slice(t, t + 1)) for t in range(30, 60)),
        past,
    )
    close(first.double(), expected[:, :, 30:], 1e-5)
    rows = torch.tensor([1, 0])
    others = {name: x.index_select(0, rows) for name, x in told.items()}
    close(steps(cut(others, slice(30, 60)), config, past.select(rows), **turn), first.index_select(0, rows), 1e-5)
    close(steps(cut(told, slice(30, 45)), config, past, **turn), first[:, :, :15], 1e-5)
    assert after.length.tolist() == [60, 60]


def test_most_steps_move_neither_the_window_nor_cores():
    inputs, config = qkv(300, batch=1), Config(2, 100)
    state = state_of(cut(inputs, slice(200)), config)
    places = {"k": set(), "keys": set()}
    for t in range(200, 300):
        state = state_of(cut(inputs, slice(t, t + 1)), config, state=state)
        places["k"].add(state.window.k.untyped_storage().data_ptr())
        places["keys"].add(state.keys.untyped_storage().data_ptr())
    assert max(map(len, places.values())) <= 6


def test_rows_of_unequal_length_step_as_alone():
    inputs, config = qkv(29, heads=4, groups=2), Config(3, 4)
    lengths = torch.tensor([13, 8])
    state = state_of(cut(inputs, slice(13)), config, mask=Mask(lengths=lengths))
    tail = cut(inputs, slice(13, None))
    found = steps(tail, config, state)
    for row, length in enumerate(lengths.tolist()):
        alone = {
            name: torch.cat([x[row : row + 1, :, :length], tail[name][row : row + 1]], 2) for name, x in inputs.items()
        }
        close(found[row : row + 1], run(alone, config, form="reference")[:, :, length:])


# Parity

RECORDED = {
    "core_context_cca": Config(4, 8),
    "core_context_max": Config(3, 6, "max"),
    "core_context_mean": Config(3, 6, "mean"),
    "core_context_uneven_window": Config(3, 7),
}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_official_code(name, form):
    fixture = load(name)
    inputs = {n: fixture[n].requires_grad_() for n in "qkv"}
    output = run(inputs, RECORDED[name], form=form)
    check_recorded(fixture, output, inputs)


# The layer, and refusals


@pytest.mark.parametrize("options", [{}, {"pool_keys": "pre_rope"}, {"share_gqa": True}])
def test_a_layer_takes_the_weights_of_softmax_for_any_group_and_window(options):
    shared = {"num_kv_heads": 2, "positions": "rotary"}
    plain = create_layer("softmax", 16, 4, **shared)
    layer, other = (create_layer("core_context", 16, 4, group=g, window=4, **shared, **options) for g in (3, 2))
    layer.load_state_dict(plain.state_dict())
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 21, 16)
    close(layer(x[:, :4]).output, plain(x[:, :4]).output, 1e-5)
    assert (layer(x).output - other(x).output).abs().max() > 1e-4


def test_what_a_pattern_lacks_is_refused():
    for pattern in ("noncausal-self", "noncausal-cross", "causal-cross"):
        refused("post_rope", run, qkv(6), Config(pool_keys="pre_rope"), pattern)
        refused("post_rope", create_layer, "core_context", 16, 2, pattern=pattern, pool_keys="pre_rope")
    refused("reads cores alone", create_layer, "core_context", 16, 2, pattern="causal-cross", fusion="gated")
    refused("fusion='joint'", run, qkv(6), Config(fusion="gated"))
    refused("with a gate", run, qkv(6) | {"gate": torch.zeros(2).double()}, Config())
    refused("N = M", run, qkv(6, 9), Config())
    refused("a query for each key", run, qkv(1, 2), Config(), state=state_of(qkv(6), Config()))
