"""Tests specific to Combiner: which tokens are reached and how, what a group weighs, and parity with the official code."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import calls, check_recorded, close, cut, in_pieces, load, refused
from torch import Tensor

from regard.contract import Pattern, Shape
from regard.create import create_layer
from regard.functional import softmax_attention
from regard.mechanisms.combiner import AXIAL, FACTORIZATIONS, MECHANISM, Config, cost, partition, sample_inputs

CAUSAL, NONCAUSAL = Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF


def sample(n: int, config: Config, pattern: Pattern = CAUSAL, m: int | None = None, **sizes: int) -> dict[str, Tensor]:
    made = {"batch": 2, "n": n, "m": n if m is None else m, "dtype": torch.float64, "pattern": pattern}
    return sample_inputs(torch.default_generator, config=config, sizes=sizes, **made)


def run(inputs: dict[str, Tensor], config: Config, pattern: Pattern = CAUSAL, **call) -> Tensor:
    return calls(MECHANISM)(inputs, config=config, pattern=pattern, **call).output


def effective_weights(inputs: dict[str, Tensor], config: Config, pattern: Pattern = CAUSAL, **call) -> Tensor:
    """The effective weights: outputs for unit vectors as values."""
    n = inputs["k"].shape[2]
    units = torch.eye(n, dtype=torch.float64).expand(2, 2, n, n)
    return run({**inputs, "v": units}, config, pattern, **call)


def differ(outputs: list[Tensor]) -> bool:
    return all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(outputs, 2))


# Which tokens are reached


@pytest.mark.parametrize("n", [1, 2, 5, 16, 17, 22, 33])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_every_token_that_may_be_seen_is_reached(factorization, n):
    config = Config(factorization, 4, row_keys="none")
    weights = effective_weights(sample(n, config), config)
    close(weights.sum(-1), torch.ones(2, 2, n, dtype=torch.float64))
    assert ((weights > 0) == torch.ones(n, n).tril().bool()).all()
    if factorization != "logn":
        weights = effective_weights(sample(n, config, NONCAUSAL), config, NONCAUSAL)
        close(weights.sum(-1), torch.ones(2, 2, n, dtype=torch.float64))
        assert (weights > 0).all()


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_parts_of_the_causal_partition_hold_each_token_once_or_twice_in_a_mixture(factorization):
    for i in range(23):
        direct, groups = partition(Config(factorization, 4), True, i, 23)
        members = direct + [j for group in groups for j in group.members]
        assert set(members) == set(range(i + 1))
        assert sorted(direct) == sorted(set(direct))
        far = len(set(range(i + 1)) - set(direct))
        routes = 2 if factorization == "axial_mixture" else 1
        assert len(members) == len(direct) + routes * far


def test_blocks_of_logn_are_the_binary_digits_of_the_rank():
    for i in range(40):
        direct, groups = partition(Config("logn"), True, i, 40)
        assert direct == [i]
        assert sorted(len(group.members) for group in groups) == [1 << b for b in range(6) if i >> b & 1]


# Cases that are softmax attention


@pytest.mark.parametrize("form", ["reference", "parallel", "chunked"])
def test_it_is_softmax_where_every_group_is_a_token_or_there_is_none(form):
    one_row = [Config(f, 30, row_keys="none") for f in FACTORIZATIONS if f != "logn"]
    tokens = [Config("fixed", 1), Config("axial_rowmajor", 1, row_keys="none")]
    for config, n in [*itertools.product(one_row + tokens, (19,)), (Config("logn"), 1), (Config("logn"), 2)]:
        inputs = sample(n, config)
        close(run(inputs, config, form=form), softmax_attention(*(inputs[x] for x in "qkv"), pattern=CAUSAL))


@pytest.mark.parametrize("factorization", ["fixed", "axial_rowmajor"])
def test_noncausal_rows_of_one_token_are_softmax_if_the_own_is_not_counted_twice(factorization):
    config = Config(factorization, 1, exclude_self_segment=True, row_keys="none")
    counted_twice = Config(factorization, 1, row_keys="none")
    inputs = sample(11, config, NONCAUSAL)
    expected = softmax_attention(*(inputs[x] for x in "qkv"), pattern=NONCAUSAL)
    close(run(inputs, config, NONCAUSAL), expected)
    assert differ([run(inputs, counted_twice, NONCAUSAL), expected])


# What a group weighs


@pytest.mark.parametrize("form", ["reference", "parallel"])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_a_group_of_equal_keys_is_one_token_with_the_mean_value(factorization, form):
    """Softmax over the direct tokens and one token per group, with its shared key and mean value; groups' keys differ."""
    config, n = Config(factorization, 4, row_keys="none"), 23
    for i in (7, 13, 18, 22):
        direct, groups = partition(config, True, i, n)
        inputs = sample(n, config)
        keys = inputs["k"].clone()
        for group in groups:
            # the mixture's two families of groups overlap, so all of its groups share one key
            source = groups[0] if factorization == "axial_mixture" else group
            keys[:, :, list(group.members)] = inputs["k"][:, :, [source.members[0]]]
        parts = [[j] for j in direct] + [list(group.members) for group in groups]
        own = inputs["q"][:, :, i : i + 1], keys[:, :, [part[0] for part in parts]]
        means = torch.stack([inputs["v"][:, :, part].mean(2) for part in parts], 2)
        expected = softmax_attention(*own, means, pattern=Pattern.NONCAUSAL_CROSS)
        close(run({**inputs, "k": keys}, config, form=form)[:, :, i : i + 1], expected)


def test_scale_enters_the_summary_once():
    config = Config(segment=3)
    inputs = sample(12, config)
    close(run(inputs, config, scale=0.6), run({**inputs, "q": 2 * inputs["q"]}, config, scale=0.3))


def test_poolings_and_row_keys_differ():
    inputs = sample(20, Config())
    poolings = itertools.product(("fixed", "logn", "axial_mixture"), ("identity", "relu"), ("max", "mean", "sum"))
    assert differ([run(inputs, Config(f, 4, pool=pool, reduce=reduce)) for f, pool, reduce in poolings])
    made = sample(20, Config("axial_rowmajor", 4, row_keys="proj"), v=8)
    plain = {name: made[name] for name in "qkv"}
    given = {"none": plain, "wsum": plain, "proj": made, "wsum_proj": made}
    assert differ([run(x, Config("axial_rowmajor", 4, row_keys=keys)) for keys, x in given.items()])


def test_dropout_spares_the_far_weights():
    config = Config(segment=1)  # every group is a single token
    diagonal = effective_weights(sample(9, config), config, dropout=0.5).diagonal(dim1=-2, dim2=-1)
    assert (diagonal == 0).any()
    assert (diagonal > 0).any()


def test_dropout_spares_the_far_weights_of_a_step_too():
    config, call, units = Config("axial_vertical", 4), calls(MECHANISM), torch.eye(9, dtype=torch.float64)
    inputs = sample(9, config) | {"v": units.expand(2, 2, 9, 9)}
    state = call(cut(inputs, slice(0, 8)), config=config, return_state=True).state
    kept, dropped = (
        call(cut(inputs, slice(8, 9)), config=config, state=state, dropout=rate).output[:, :, 0] for rate in (0.0, 0.9)
    )
    direct, far = [0, 4, 8], [1, 2, 3, 5, 6, 7]  # its own column and itself; tokens read through sums
    close(dropped[..., far], kept[..., far])
    assert (dropped[..., direct] == 0).any() and (kept[..., direct] > 0).all()


# States


@pytest.mark.parametrize("factorization", ["fixed", "logn", "axial_mixture", "axial_rowmajor"])
def test_steps_in_float32_stay_equal_over_many_rows(factorization):
    config = Config(factorization, 8, row_keys="none")
    inputs = {name: x.float() for name, x in sample(300, config).items()}
    tokens = (cut(inputs, slice(t, t + 1)) for t in range(300))
    found, _ = in_pieces(lambda x, s: calls(MECHANISM)(x, config=config, state=s, return_state=True), tokens)
    close(found, run(inputs, config), 3e-6)


@pytest.mark.parametrize("factorization", ["fixed", "axial_vertical", "axial_mixture", "logn"])
def test_states_have_the_size_that_the_card_says(factorization):
    config = Config(factorization, 8)
    for n in (64, 128):
        state = calls(MECHANISM)(sample(n, config), config=config, return_state=True).state
        numbers = sum(x[:1].numel() for x in state.tensors().values() if x.is_floating_point())
        assert cost(Shape(1, 2, n, n, 8, 6), config).state == numbers


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
def test_equals_the_official_code(name, form):
    fixture = load(name)
    inputs = {n: fixture[n].requires_grad_() for n in "qkv"}
    maps = {}
    if "x" in fixture:
        ones = torch.ones(fixture["x"].shape[-1], dtype=torch.float64)
        maps = {"residual": fixture["x"], "norm_weight": ones, "norm_bias": 0 * ones}
        maps |= {n: fixture[n] for n in ("row_in", "row_out")}
    output = run(inputs | maps, RECORDED[name], form=form)
    check_recorded(fixture, output, inputs)


# The layer, and refusals


def test_a_shared_pool_is_one_parameter():
    shared = create_layer("combiner", 16, 2, pool="deepset", share_pool=True)
    apart = create_layer("combiner", 16, 2, pool="deepset")
    assert len(list(apart.parameters())) == len(list(shared.parameters())) + 1
    assert len(shared.state_dict()) == len(list(shared.parameters()))


@pytest.mark.parametrize("factorization", ["logn", *AXIAL, "axial_rowmajor"])
def test_patterns_that_a_factorization_lacks_are_refused(factorization):
    config = Config(factorization, 4, row_keys="none")
    lacking = [Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS, *([NONCAUSAL] if factorization == "logn" else [])]
    for pattern in lacking:
        refused("try ", run, sample(6, config, pattern), config, pattern)
        own = {"pattern": pattern, "factorization": factorization}
        refused("try ", create_layer, "combiner", 16, 2, **own)


def test_learned_maps_that_are_missing_or_too_many_are_refused():
    inputs = sample(6, Config())
    state = calls(MECHANISM)(inputs, return_state=True).state
    refused("row_keys='none'", run, inputs, Config("axial_rowmajor", 3))
    refused("pool='relu'", run, inputs, Config(pool="deepset"))
    refused("q, k and v only", run, inputs | {"pool_q": torch.eye(8, dtype=torch.float64)}, Config())
    refused("N = M", run, sample(6, Config(), m=9), Config())
    refused("a query for each key", run, sample(1, Config(), m=2), Config(), state=state)
