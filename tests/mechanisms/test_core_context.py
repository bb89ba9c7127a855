"""What is peculiar to core context aware attention: cores, the moving window, decoding across group ends, and parity."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Shape, Unsupported
from regard.create import create_layer
from regard.mechanisms.core_context import MECHANISM, Config, cost
from regard.models.language_model import LanguageModel, LanguageModelConfig
from regard.positions import create_positions

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
FORMS = ["reference", "parallel", "chunked"]
WANT_STATE = Context(want=frozenset({"state"}))


def sample(n: int, m: int | None = None, *, batch: int = 2, heads: int = 2, groups: int = 2, width: int = 6):
    m = n if m is None else m
    make = {"q": (batch, heads, n, 8), "k": (batch, groups, m, 8), "v": (batch, groups, m, width)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in make.items()}


def run(inputs, config: Config, pattern: str = "causal-self", **call) -> Tensor:
    return apply(MECHANISM, inputs, config=config, pattern=pattern, **call).output


def softmax(inputs, pattern: str = "causal-self") -> Tensor:
    return apply(get_mechanism("softmax"), inputs, pattern=pattern).output


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def steps(inputs, config: Config, state=None, **call) -> Tensor:
    outputs = []
    for t in range(inputs["q"].shape[2]):
        token = {name: x[:, :, t : t + 1] for name, x in inputs.items()}
        result = apply(MECHANISM, token, config=config, state=state, return_state=True, **call)
        outputs.append(result.output)
        state = result.state
    return torch.cat(outputs, 2)


def rotary():
    return create_positions("rotary", dim=8, heads=1, head_dim=8).rotate


# Where it is softmax


@pytest.mark.parametrize("form", FORMS)
def test_it_is_softmax_within_the_window_and_with_groups_of_one(form: str) -> None:
    inputs = sample(17)
    for config in (
        Config(4, 17),
        Config(5, 40),
        Config(1, 0),
        Config(1, 1),
        Config(1, 6),
        Config(1, 3, share_gqa=True),
    ):
        close(run(inputs, config, form=form), softmax(inputs))
    assert (run(inputs, Config(4, 8), form=form) - softmax(inputs)).abs().max() > 1e-3


def test_noncausal_it_is_softmax_within_the_window_and_with_groups_of_one() -> None:
    inputs = sample(17)
    for config in (Config(4, 17), Config(1, 2)):
        close(run(inputs, config, "noncausal-self"), softmax(inputs, "noncausal-self"))


def test_cross_groups_of_one_are_softmax() -> None:
    inputs = sample(5, 14)
    close(run(inputs, Config(1), "noncausal-cross"), softmax(inputs, "noncausal-cross"))


# Who is read, and how


@pytest.mark.parametrize(("n", "g", "s"), [(23, 4, 8), (30, 3, 7), (19, 5, 1), (16, 4, 4), (40, 6, 10), (21, 4, 0)])
def test_tokens_and_cores_part_the_past(n: int, g: int, s: int) -> None:
    """With equal keys a token read by itself weighs 1 and one in a group 1 / g, of as many as there are."""
    inputs = sample(n, width=n)
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


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_without_a_window_the_kernels_read_what_the_definition_reads(pattern: str) -> None:
    inputs, config = sample(70), Config(4, 0)
    found = run({name: x.float() for name, x in inputs.items()}, config, pattern)
    close(found.double(), run(inputs, config, pattern, form="reference"), 1e-5)


def test_equal_tokens_in_a_group_count_once() -> None:
    config, g = Config(4, 4), 4
    inputs = sample(16)
    for name in "kv":
        inputs[name] = inputs[name][:, :, ::g].repeat_interleave(g, 2)
    scores = inputs["q"][:, :, 15:] @ inputs["k"][:, :, [0, 4, 8, 12, 13, 14, 15]].mT * 8**-0.5
    expected = scores.softmax(-1) @ inputs["v"][:, :, [0, 4, 8, 12, 13, 14, 15]]
    close(run(inputs, config)[:, :, 15:], expected)


def test_a_far_change_reaches_the_output_through_its_core_only() -> None:
    config, n = Config(4, 8), 24
    inputs = sample(n)
    changed = {name: x.clone() for name, x in inputs.items()}
    changed["v"][:, :, 5] += 10
    moved = (run(changed, config) - run(inputs, config)).abs().amax((0, 1, 3))
    assert (moved[:5] == 0).all()
    assert (moved[5:] > 0).all()
    # the query of a group's last token alone weighs the group
    changed = {name: x.clone() for name, x in inputs.items()}
    changed["q"][:, :, 6] += 10
    moved = (run(changed, config) - run(inputs, config)).abs().amax((0, 1, 3))
    assert (moved > 0).nonzero().flatten().tolist() == [6]
    changed["q"][:, :, 7] += 10
    moved = (run(changed, config) - run(inputs, config)).abs().amax((0, 1, 3))
    assert (moved > 0).nonzero().flatten().tolist() == [6, 7, *range(15, n)]


def test_a_mean_pool_is_that_of_queries_that_are_zero() -> None:
    inputs = sample(30)
    inputs["q"][:, :, 3::4] = 0
    others = [t for t in range(30) if t % 4 != 3]
    close(run(inputs, Config(4, 6))[:, :, others], run(inputs, Config(4, 6, "mean"))[:, :, others])


def test_pools_differ() -> None:
    inputs = sample(30, heads=4)
    found = [
        run(inputs, config)
        for config in (
            Config(4, 6),
            Config(4, 6, "mean"),
            Config(4, 6, "max"),
            Config(4, 6, pool_query="mean"),
            Config(4, 6, share_gqa=True),
        )
    ]
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 1e-3


def test_shared_cores_are_asked_for_by_the_mean_query_of_their_heads() -> None:
    inputs = sample(20, heads=4, groups=2)
    shared = dict(inputs)
    shared["q"] = inputs["q"].unflatten(1, (2, 2)).mean(2, keepdim=True).expand(-1, -1, 2, -1, -1).flatten(1, 2)
    close(run(shared, Config(3, 4, share_gqa=True)), run(shared, Config(3, 4)))
    state = apply(MECHANISM, inputs, config=Config(3, 4, share_gqa=True), return_state=True).state
    assert state.keys.shape[1] == 2
    assert apply(MECHANISM, inputs, config=Config(3, 4), return_state=True).state.keys.shape[1] == 4


def test_a_gate_weighs_cores_against_tokens() -> None:
    inputs, n = sample(20), 20
    far, near = (run(inputs | {"gate": torch.full((2,), x).double()}, Config(4, 4, fusion="gated")) for x in (-60, 60))
    window = apply(get_mechanism("local"), inputs, config=get_mechanism("local").options(window=4)).output
    close(near[:, :, 3::4], window[:, :, 3::4])
    close(far[:, :, :7], softmax(inputs)[:, :, :7])  # no core yet
    half = run(inputs | {"gate": torch.zeros(2).double()}, Config(4, 4, fusion="gated"))
    close(half[:, :, 8:n], (near + far)[:, :, 8:n] / 2)


# Rotary positions


@pytest.mark.parametrize("form", FORMS)
def test_pooling_before_and_after_rotation_differ_with_rotation_only(form: str) -> None:
    inputs = sample(26)
    before, after = Config(4, 6, pool_keys="pre_rope"), Config(4, 6)
    close(run(inputs, before, form=form), run(inputs, after, form=form))
    turned = [run(inputs, config, form=form, rotate=rotary()) for config in (before, after)]
    assert (turned[0] - turned[1]).abs().max() > 1e-3
    rotated = {n: rotary()(x, torch.arange(26)[None]) if n in "qk" else x for n, x in inputs.items()}
    close(turned[1], run(rotated, after))


@pytest.mark.parametrize("pool_keys", ["post_rope", "pre_rope"])
def test_rotated_steps_equal_the_definition(pool_keys: str) -> None:
    inputs, config = sample(26, heads=4), Config(4, 5, pool_keys=pool_keys, pool_query="mean")
    close(steps(inputs, config, rotate=rotary()), run(inputs, config, form="reference", rotate=rotary()))


def test_a_core_before_rotation_turns_with_the_last_place_of_its_group() -> None:
    inputs, config = sample(8), Config(4, 4, pool_keys="pre_rope")
    state = apply(MECHANISM, inputs, config=config, return_state=True, rotate=rotary()).state
    plain = apply(MECHANISM, inputs, config=config, return_state=True).state
    close(state.keys, rotary()(plain.keys, torch.tensor([[3, 7]])))


# Forms, padding, states and gradients of the variants


def test_thousands_of_steps_after_a_prefill_equal_the_whole() -> None:
    config, n, first = Config(5, 12), 1500, 137
    inputs = sample(n, batch=1, heads=1, groups=1)
    head, tail = ({name: x[:, :, part] for name, x in inputs.items()} for part in (slice(first), slice(first, n)))
    state = apply(MECHANISM, head, config=config, return_state=True).state
    close(steps(tail, config, state), run(inputs, config)[:, :, first:])


def test_cores_are_the_keys_of_tokens_that_are_pooled_before_their_projection() -> None:
    """Section 3.2 of the paper: c_r W^K, with c_r = sum of w_rj x_j, where the weights are those of the head."""
    g, heads, n = 4, 2, 12
    x = torch.randn(2, n, 10, dtype=torch.float64)
    w_q, w_k, w_v = (torch.randn(heads, 10, 8, dtype=torch.float64) for _ in "qkv")
    inputs = {name: x[:, None] @ w for name, w in zip("qkv", (w_q, w_k, w_v), strict=True)}
    state = apply(MECHANISM, inputs, config=Config(g, 3), return_state=True).state
    for group, head in itertools.product(range(n // g), range(heads)):
        tokens = x[:, group * g : (group + 1) * g]
        scores = (tokens[:, -1:] @ w_q[head]) @ (tokens @ w_k[head]).mT * 8**-0.5
        core = (scores.softmax(-1) @ tokens)[:, 0]
        close(state.keys[:, head, group], core @ w_k[head])
        close(state.values[:, head, group], core @ w_v[head])


def test_the_state_has_the_size_that_the_card_says() -> None:
    configs = (Config(4, 8), Config(3, 7, "mean"), Config(1, 1), Config(4, 0))
    for config, n in itertools.product(configs, (12, 40)):
        state = apply(MECHANISM, sample(n, batch=1), config=config, return_state=True).state
        numbers = sum(x.numel() for x in state.tensors().values() if x.is_floating_point())
        assert cost(Shape(1, 2, n, n, 8, 6), config).state == numbers


def test_group_and_window_may_change_without_training() -> None:
    layer, other = (create_layer("core_context", 16, 2, group=g, window=s) for g, s in ((4, 8), (2, 4)))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 30, 16)
    assert (layer(x).output - other(x).output).abs().max() > 1e-4


def test_left_padding_does_not_move_the_groups() -> None:
    config, inputs = Config(4, 5), sample(20)
    padded = {n: torch.cat([torch.full_like(x[:, :, :3], torch.nan), x], 2) for n, x in inputs.items()}
    valid = (torch.arange(23) >= 3).expand(2, -1)
    close(run(padded, config, mask=Mask(valid=valid))[:, :, 3:], run(inputs, config))


def test_dropout_repeats_under_a_generator() -> None:
    inputs, config = sample(30), Config(4, 6)
    one, two = (run(inputs, config, dropout=0.5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert (one == two).all()
    assert (one - run(inputs, config)).abs().max() > 1e-3


# Parity

RECORDED = {
    "core_context_cca": Config(4, 8),
    "core_context_max": Config(3, 6, "max"),
    "core_context_mean": Config(3, 6, "mean"),
    "core_context_uneven_window": Config(3, 7),
}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_official_code(name: str, form: str) -> None:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        fixture = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    inputs = {n: fixture[n].clone().requires_grad_() for n in "qkv"}
    output = run(inputs, RECORDED[name], form=form)
    torch.testing.assert_close(output, fixture["out"], rtol=1e-12, atol=1e-12)
    output.backward(fixture["grad_out"])
    for n, x in inputs.items():
        torch.testing.assert_close(x.grad, fixture[f"grad_{n}"], rtol=1e-12, atol=1e-12)


# Models


@pytest.mark.parametrize("options", [{}, {"pool_keys": "pre_rope"}, {"fusion": "gated"}, {"share_gqa": True}])
def test_a_language_model_takes_the_weights_of_softmax_and_decodes(options) -> None:
    plan = [("core_context", {"group": 3, "window": 4, "num_kv_heads": 2, "positions": "rotary", **options})] * 2
    model = LanguageModel(LanguageModelConfig(vocab_size=11, plan=plan, dim=16, num_heads=4))
    plain = [("softmax", {"num_kv_heads": 2, "positions": "rotary"})] * 2
    trained = LanguageModel(LanguageModelConfig(vocab_size=11, plan=plain, dim=16, num_heads=4))
    if "fusion" not in options:
        model.load_state_dict(trained.state_dict())
    ids = torch.randint(11, (2, 21))
    torch.nn.functional.cross_entropy(model(ids).output.flatten(0, 1), ids.flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        if "fusion" not in options:
            close(model(ids[:, :4]).output, trained(ids[:, :4]).output, 1e-5)
        result = model(ids[:, :6], context=WANT_STATE)
        outputs, state = [result.output], result.state
        for t in range(6, 21):
            result = model(ids[:, t : t + 1], context=WANT_STATE, state=state)
            outputs.append(result.output)
            state = result.state
        close(torch.cat(outputs, 1), model(ids).output, 1e-5)


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": 0}, "group >= 1"),
        ({"window": -1}, "window >= 0"),
        ({"pool": "min"}, "cca, mean, max"),
        ({"pool_query": "first"}, "last, mean"),
        ({"pool_keys": "rope"}, "post_rope, pre_rope"),
        ({"fusion": "sum"}, "joint, gated"),
        ({"pool": "max", "pool_query": "mean"}, "pool='cca'"),
        ({"pool": "mean", "share_gqa": True}, "pool='cca'"),
    ],
)
def test_options_out_of_range_are_refused(options, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        Config(**options)


def test_what_a_pattern_lacks_is_refused() -> None:
    for pattern in ("noncausal-self", "noncausal-cross", "causal-cross"):
        with pytest.raises(Unsupported, match="post_rope"):
            run(sample(6), Config(pool_keys="pre_rope"), pattern)
        with pytest.raises(Unsupported, match="post_rope"):
            create_layer("core_context", 16, 2, pattern=pattern, pool_keys="pre_rope")
    with pytest.raises(Unsupported, match="reads cores alone"):
        create_layer("core_context", 16, 2, pattern="causal-cross", fusion="gated")
    with pytest.raises(Unsupported, match="fusion='joint'"):
        run(sample(6), Config(fusion="gated"))
    with pytest.raises(Unsupported, match="with a gate"):
        run(sample(6) | {"gate": torch.zeros(2).double()}, Config())
    with pytest.raises(Unsupported, match="N = M"):
        run(sample(6, 9), Config())
    state = apply(MECHANISM, sample(6), return_state=True).state
    with pytest.raises(Unsupported, match="a query for each key"):
        run(sample(1, 2), Config(), state=state)
