"""What is peculiar to Combiner: who is reached and through what, all factorizations' forms and states, and parity."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.mechanisms.combiner import AXIAL, FACTORIZATIONS, MECHANISM, Config, cost, partition, sample_inputs
from regard.models.language_model import LanguageModel, LanguageModelConfig

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
CAUSAL, NONCAUSAL = Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF


def sample(n: int, config: Config, *, batch: int = 2, pattern: Pattern = CAUSAL, m: int | None = None, **sizes: int):
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 31, ())))
    made = {"batch": batch, "n": n, "m": n if m is None else m, "dtype": torch.float64, "pattern": pattern}
    return sample_inputs(generator, config=config, sizes=sizes, **made)


def run(inputs, config: Config, pattern: Pattern | str = CAUSAL, **call) -> Tensor:
    return apply(MECHANISM, inputs, config=config, pattern=pattern, **call).output


def weights_of(n: int, config: Config, pattern: Pattern = CAUSAL, **call) -> Tensor:
    """Effective attention: the outputs of values that are unit vectors."""
    inputs = sample(n, config, pattern=pattern, v=n)
    inputs["v"] = torch.eye(n, dtype=torch.float64).expand(2, 2, n, n)
    return run(inputs, config, pattern, **call)


def softmax(inputs, pattern: Pattern = CAUSAL) -> Tensor:
    return apply(get_mechanism("softmax"), {name: inputs[name] for name in "qkv"}, pattern=pattern).output


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# Who is reached


@pytest.mark.parametrize("n", [1, 2, 9, 16, 17, 22])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_every_token_that_may_be_seen_is_reached(factorization: str, n: int) -> None:
    config = Config(factorization, 4, row_keys="none")
    weights = weights_of(n, config)
    close(weights.sum(-1), torch.ones(2, 2, n, dtype=torch.float64))
    assert ((weights > 0) == torch.ones(n, n).tril().bool()).all()
    if factorization != "logn":
        weights = weights_of(n, config, NONCAUSAL)
        close(weights.sum(-1), torch.ones(2, 2, n, dtype=torch.float64))
        assert (weights > 0).all()


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_parts_of_the_causal_partition_hold_each_token_once_or_twice_in_a_mixture(factorization: str) -> None:
    config, n = Config(factorization, 4), 23
    for i in range(n):
        direct, groups = partition(config, True, i, n)
        members = direct + [j for group in groups for j in group.members]
        assert set(members) == set(range(i + 1))
        assert sorted(direct) == sorted(set(direct))
        far = len(set(range(i + 1)) - set(direct))
        routes = 2 if factorization == "axial_mixture" else 1
        assert len(members) == len(direct) + routes * far


def test_blocks_of_logn_are_the_binary_digits_of_the_rank() -> None:
    for i in range(40):
        direct, groups = partition(Config("logn"), True, i, 40)
        assert direct == [i]
        assert sum(len(group.members) for group in groups) == i
        assert sorted(len(group.members) for group in groups) == [1 << b for b in range(6) if i >> b & 1]


@pytest.mark.parametrize("n", [3, 5, 9, 17, 33])
def test_logn_reaches_the_first_token_from_the_power_of_two(n: int) -> None:
    assert (weights_of(n, Config("logn"))[:, :, -1] > 0).all()


# Where it is softmax


@pytest.mark.parametrize("form", ["reference", "parallel", "chunked"])
def test_it_is_softmax_where_every_group_is_a_token_or_there_is_none(form: str) -> None:
    one_row = [Config(f, 30, row_keys="none") for f in FACTORIZATIONS if f != "logn"]
    tokens = [Config("fixed", 1), Config("axial_rowmajor", 1, row_keys="none")]
    for config, n in [*itertools.product(one_row + tokens, (19,)), (Config("logn"), 1), (Config("logn"), 2)]:
        inputs = sample(n, config)
        close(run(inputs, config, form=form), softmax(inputs))


def test_noncausal_rows_of_one_token_without_the_own_are_softmax() -> None:
    for factorization in ("fixed", "axial_rowmajor"):
        config = Config(factorization, 1, exclude_self_segment=True, row_keys="none")
        inputs = sample(11, config, pattern=NONCAUSAL)
        close(run(inputs, config, NONCAUSAL), softmax(inputs, NONCAUSAL))
        counted_twice = Config(factorization, 1, row_keys="none")
        assert (run(inputs, counted_twice, NONCAUSAL) - softmax(inputs, NONCAUSAL)).abs().max() > 1e-3


# What a group weighs


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_a_group_of_equal_keys_is_one_token_with_the_mean_value(factorization: str) -> None:
    """Softmax over the direct tokens and, for each group, its one key and its mean value; groups differ in their keys."""
    config, n = Config(factorization, 4, row_keys="none"), 23
    for i in (7, 13, 18, 22):
        direct, groups = partition(config, True, i, n)
        inputs = sample(n, config)
        keys = inputs["k"].clone()
        for group in groups:
            # the two families of groups of a mixture overlap, so that all their keys are one
            source = groups[0] if factorization == "axial_mixture" else group
            keys[:, :, list(group.members)] = inputs["k"][:, :, [source.members[0]]]
        inputs["k"] = keys
        parts = [[j] for j in direct] + [list(group.members) for group in groups]
        means = [inputs["v"][:, :, part].mean(2) for part in parts]
        scores = (
            torch.einsum("bhd,bhmd->bhm", inputs["q"][:, :, i], keys[:, :, [part[0] for part in parts]])
            * keys.shape[-1] ** -0.5
        )
        expected = torch.einsum("bhm,bhmv->bhv", scores.softmax(-1), torch.stack(means, 2))
        for form in ("reference", "parallel"):
            close(run(inputs, config, form=form)[:, :, i], expected)


def test_groups_and_tokens_weigh_the_same_where_all_keys_are_equal() -> None:
    s, n = 4, 14
    config = Config(segment=s)
    inputs = sample(n, config, v=n)
    inputs["k"] = inputs["k"][:, :, :1].expand(-1, -1, n, -1)
    inputs["v"] = torch.eye(n, dtype=torch.float64).expand(2, 2, n, n)
    weights = run(inputs, config)
    for i in range(n):
        row, parts = i // s, i // s + i % s + 1  # groups, and tokens of the own row
        expected = torch.full((i + 1,), 1 / parts, dtype=torch.float64)
        expected[: row * s] /= s
        close(weights[:, :, i, : i + 1], expected.expand(2, 2, -1))


def test_scale_enters_the_summary_once() -> None:
    config = Config(segment=3)
    inputs = sample(12, config)
    doubled = {**inputs, "q": 2 * inputs["q"]}
    close(run(inputs, config, scale=0.6), run(doubled, config, scale=0.3))


def test_poolings_differ() -> None:
    inputs = sample(20, Config())
    found = [
        run(inputs, Config(f, 4, pool=pool, reduce=reduce))
        for f in ("fixed", "logn", "axial_mixture")
        for pool in ("identity", "relu")
        for reduce in ("max", "mean", "sum")
    ]
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 1e-3


def test_row_keys_differ_and_groups_of_one_row_key_are_exchangeable() -> None:
    made = sample(20, Config("axial_rowmajor", 4, row_keys="proj"), v=8)
    plain = {name: made[name] for name in "qkv"}
    found = [run(plain, Config("axial_rowmajor", 4, row_keys=keys)) for keys in ("none", "wsum")]
    found += [run(made, Config("axial_rowmajor", 4, row_keys=keys)) for keys in ("proj", "wsum_proj")]
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 1e-3


# Forms, padding, states and gradients of all factorizations


@pytest.mark.parametrize("factorization", ["fixed", "logn", "axial_mixture", "axial_rowmajor"])
def test_steps_in_float32_stay_equal_over_many_rows(factorization: str) -> None:
    config = Config(factorization, 8, row_keys="none")
    inputs = {name: x.float() for name, x in sample(300, config, batch=1).items()}
    state, outputs = None, []
    for t in range(300):
        token = {name: x[:, :, t : t + 1] for name, x in inputs.items()}
        result = apply(MECHANISM, token, config=config, state=state, return_state=True)
        outputs.append(result.output)
        state = result.state
    close(torch.cat(outputs, 2), run(inputs, config), 3e-6)


def test_states_have_the_size_that_the_card_says() -> None:
    for config in (Config("fixed", 8), Config("axial_vertical", 8), Config("axial_mixture", 8), Config("logn")):
        for n in (64, 128):
            state = apply(MECHANISM, sample(n, config, batch=1), config=config, return_state=True).state
            numbers = sum(x.numel() for x in state.tensors().values() if x.is_floating_point())
            assert cost(Shape(1, 2, n, n, 8, 6), config).state == numbers


def test_an_unfinished_row_is_a_group_of_the_tokens_that_exist() -> None:
    config = Config(segment=5)
    inputs = sample(12, config, pattern=NONCAUSAL)
    changed = {name: torch.cat([x, 9 * torch.ones_like(x[:, :, :3])], 2) for name, x in inputs.items()}
    found = run(changed, config, NONCAUSAL, mask=Mask(lengths=torch.tensor([12, 12])))
    close(found[:, :, :12], run(inputs, config, NONCAUSAL))


def test_dropout_repeats_under_a_generator_and_spares_the_far_weights() -> None:
    for factorization in FACTORIZATIONS:
        config = Config(factorization, 4, row_keys="none")
        inputs = sample(18, config)
        one, two = (run(inputs, config, dropout=0.5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert (one == two).all()
        assert (one - run(inputs, config)).abs().max() > 1e-3
    config = Config(segment=1)  # each far weight is that of a group of one token
    weights = weights_of(9, config, dropout=0.5)
    diagonal = torch.diagonal(weights, dim1=-2, dim2=-1)
    assert (diagonal == 0).any()
    assert (diagonal > 0).any()


# Parity

RECORDED = {
    "combiner_fixed": Config("fixed", 6),
    "combiner_logn": Config("logn"),
    "combiner_axial_mixture": Config("axial_mixture", 5),
    "combiner_axial_mixture_wide": Config("axial_mixture", 6),
    "combiner_axial_rowmajor": Config("axial_rowmajor", 5),
}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("form", ["reference", "parallel", "chunked"])
def test_equals_the_official_code(name: str, form: str) -> None:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        fixture = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    inputs = {n: fixture[n].clone().requires_grad_() for n in "qkv"}
    maps = {}
    if "x" in fixture:
        ones = torch.ones(fixture["x"].shape[-1], dtype=torch.float64)
        maps = {"residual": fixture["x"], "norm_weight": ones, "norm_bias": 0 * ones}
        maps |= {n: fixture[n] for n in ("row_in", "row_out")}
    output = run(inputs | maps, RECORDED[name], form=form)
    torch.testing.assert_close(output, fixture["out"], rtol=1e-12, atol=1e-12)
    output.backward(fixture["grad_out"])
    for n, x in inputs.items():
        torch.testing.assert_close(x.grad, fixture[f"grad_{n}"], rtol=1e-12, atol=1e-12)


# Layers and models


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_a_language_model_trains_and_decodes(factorization: str) -> None:
    plan = [("combiner", {"factorization": factorization, "segment": 4})] * 2
    model = LanguageModel(LanguageModelConfig(vocab_size=11, plan=plan, dim=16, num_heads=2))
    ids = torch.randint(11, (2, 19))
    logits = model(ids).output
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    want = Context(want=frozenset({"state"}))
    with torch.no_grad():
        result = model(ids[:, :6], context=want)
        outputs, state = [result.output], result.state
        for t in range(6, 19):
            result = model(ids[:, t : t + 1], context=want, state=state)
            outputs.append(result.output)
            state = result.state
        close(torch.cat(outputs, 1), model(ids).output, 1e-5)


def test_a_shared_pool_is_one_parameter() -> None:
    shared = create_layer("combiner", 16, 2, pool="deepset", share_pool=True)
    apart = create_layer("combiner", 16, 2, pool="deepset")
    assert len(list(apart.parameters())) == len(list(shared.parameters())) + 1
    assert len(shared.state_dict()) == len(list(shared.parameters()))


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factorization": "axial"}, "try axial_"),
        ({"segment": 0}, "segment >= 1"),
        ({"pool": "gelu"}, "identity, relu, deepset"),
        ({"reduce": "min"}, "max, mean, sum"),
        ({"row_keys": "sum"}, "wsum"),
        ({"factorization": "axial_rowmajor", "reduce": "sum"}, "pools nothing"),
        ({"share_pool": True}, "pool='deepset'"),
        ({"factorization": "logn", "exclude_self_segment": True}, "fixed, axial_rowmajor"),
    ],
)
def test_options_out_of_range_are_refused(options, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        Config(**options)


@pytest.mark.parametrize("factorization", ["logn", *AXIAL, "axial_rowmajor"])
def test_patterns_that_a_factorization_lacks_are_refused(factorization: str) -> None:
    config = Config(factorization, 4, row_keys="none")
    lacking = [Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS, *([NONCAUSAL] if factorization == "logn" else [])]
    for pattern in lacking:
        with pytest.raises(Unsupported, match="try "):
            run(sample(6, config, pattern=pattern), config, pattern)
        with pytest.raises(Unsupported, match="try "):
            create_layer("combiner", 16, 2, pattern=pattern, factorization=factorization)


def test_learned_maps_that_are_missing_or_too_many_are_refused() -> None:
    inputs = sample(6, Config())
    with pytest.raises(Unsupported, match="row_keys='none'"):
        run(inputs, Config("axial_rowmajor", 3))
    with pytest.raises(Unsupported, match="pool='relu'"):
        run(inputs, Config(pool="deepset"))
    with pytest.raises(Unsupported, match="q, k and v only"):
        run(inputs | {"pool_q": torch.eye(8, dtype=torch.float64)}, Config())
    with pytest.raises(Unsupported, match="N = M"):
        run(sample(6, Config(), m=9), Config())
    state = apply(MECHANISM, inputs, return_state=True).state
    with pytest.raises(Unsupported, match="a query for each key"):
        run(sample(1, Config(), m=2), Config(), state=state)
