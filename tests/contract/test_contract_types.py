"""How the contract's own types validate, compare and save."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.utils._pytree as pytree

from regard import get_mechanism
from regard.contract import BlockMask, Context, Mask, Pattern, State, Unsupported, check_options
from regard.contract.types import Types
from regard.core.ragged import gathering


@pytest.mark.parametrize(
    "valid", [torch.ones(2, 3), torch.ones(3, dtype=torch.bool), torch.ones(2, 3, 1, dtype=torch.bool)]
)
def test_a_mask_is_of_booleans_a_row_and_token(valid):
    with pytest.raises(Unsupported, match=r"boolean \(B, N\)"):
        Mask(valid=valid)


@pytest.mark.parametrize("name", ["lengths", "cu_seqlens"])
@pytest.mark.parametrize("wrong", [torch.tensor([0.0, 2.0]), torch.tensor([[0, 2]])], ids=["floating", "two axes"])
def test_lengths_are_integers_with_one_axis(name, wrong):
    with pytest.raises(Unsupported, match=rf"mask\.{name} that is not an integer"):
        Mask(**{name: wrong})


def test_a_mask_says_in_one_way_what_is_valid():
    with pytest.raises(Unsupported, match="both valid and lengths"):
        Mask(valid=torch.ones(2, 3, dtype=torch.bool), lengths=torch.tensor([3, 3]))


def test_a_bias_has_an_axis_for_rows_heads_queries_and_keys():
    for axes in (3, 5):
        with pytest.raises(Unsupported, match=f"mask.bias of dtype torch.float32 and {axes} axes"):
            Mask(bias=torch.zeros((1,) * axes))


def test_what_to_try_is_said_of_tokens_where_it_would_do():
    for valid, nearest in ((torch.ones(2, 3), "valid.bool()"), (torch.ones(2, 3, 1), "Mask(bias=...)")):
        with pytest.raises(Unsupported) as refused:
            Mask(valid=valid)
        assert refused.value.nearest.startswith(nearest)


@dataclasses.dataclass(frozen=True)
class Halves(State):
    sums: torch.Tensor
    most: torch.Tensor = dataclasses.field(metadata={"fill": -torch.inf})


def test_rows_of_a_state_begin_anew_with_zeros_or_what_a_field_says():
    state = Halves(torch.rand(2, 3), torch.rand(2, 3))
    fresh = state.reset(torch.tensor([True, False]))
    assert fresh.sums[0].eq(0).all() and fresh.most[0].isneginf().all()
    assert fresh.sums[1].equal(state.sums[1]) and fresh.most[1].equal(state.most[1])


def test_the_bytes_of_a_state_are_those_of_its_tensors():
    assert Halves(torch.rand(2, 3), torch.rand(2, 5, dtype=torch.float64)).nbytes == 6 * 4 + 10 * 8


@pytest.mark.parametrize("sides", [(3,), (3, 4, 5)])
def test_options_that_are_so_many_numbers_are_refused_with_more_or_fewer(sides):
    check = Types({"sides": tuple[int, int]}).check
    check("grids", {"sides": (3, 4)})
    with pytest.raises(Unsupported, match="sides of tuple of grids"):
        check("grids", {"sides": sides})


def test_what_to_try_is_said_of_blocks_where_it_would_do():
    for visible, nearest in ((torch.ones(1, 1, 2, 2), "visible.bool()"), (torch.ones(1, 2, 2), "")):
        with pytest.raises(Unsupported) as refused:
            BlockMask(visible, 4)
        assert refused.value.nearest == nearest


def test_a_refused_pattern_comes_with_the_cards_reason():
    card = get_mechanism("bigbird")
    (pattern, reason), *_ = card.refused.items()
    with pytest.raises(Unsupported) as refused:
        card.require_pattern(pattern)
    assert reason in str(refused.value) and pattern.value in str(refused.value)


def test_a_refused_pattern_comes_with_one_of_its_kind_that_is_there():
    card = dataclasses.replace(get_mechanism("softmax"), patterns=(Pattern.CAUSAL_CROSS, Pattern.NONCAUSAL_SELF))
    for pattern, nearest in (
        (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF),
        (Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS),
    ):
        with pytest.raises(Unsupported) as refused:
            card.require_pattern(pattern)
        assert refused.value.nearest == nearest.value


def test_an_unknown_option_comes_with_what_it_was_meant_to_be():
    with pytest.raises(Unsupported) as refused:
        check_options(get_mechanism("local").config, ["window", "windo"], "local")
    assert "'windo' of local" in str(refused.value) and refused.value.nearest == "window"


def test_a_card_takes_a_scheme_of_positions_that_acts_like_those_it_names_and_like_no_others():
    card = dataclasses.replace(get_mechanism("softmax"), accepts_positions=("none", "rotary"), honours=frozenset())
    assert set(card.accepts_positions) == {"none", "rotary", "lrpe", "seqpe_mul", "seqpe_add"}


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("landmark", {Pattern.CAUSAL_SELF}),
        ("norm_linear", {Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF}),
        ("softmax", set()),
    ],
)
def test_a_card_places_its_keys_where_it_rotates_them_itself(name, patterns):
    assert {pattern for pattern in Pattern if get_mechanism(name).places_keys(pattern)} == patterns


def test_tokens_keep_their_places_on_a_grid_alone():
    assert get_mechanism("mlp_mixer").keeps_places and not get_mechanism("softmax").keeps_places


def test_contexts_of_the_same_wishes_are_equal_whoever_laid_them_out():
    lengths = torch.tensor([2, 1])
    masks = [Mask(lengths=lengths, layout=gathering(Mask(lengths=lengths), 2, 3)) for _ in range(2)]
    assert masks[0].layout is not masks[1].layout
    assert dataclasses.replace(masks[0], lengths=None) == dataclasses.replace(masks[1], lengths=None)


def test_a_contexts_structure_is_saved_and_loaded():
    context = Context(want=frozenset({"state", "weights"}))
    leaves, structure = pytree.tree_flatten(context)
    loaded = pytree.treespec_loads(pytree.treespec_dumps(structure))
    assert pytree.tree_unflatten(leaves, loaded).want == context.want
