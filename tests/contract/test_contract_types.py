"""What the contract's own types refuse, compare and save."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.utils._pytree as pytree

from regard import get_mechanism
from regard.contract import BlockMask, Context, Mask, Unsupported
from regard.core.ragged import gathering


@pytest.mark.parametrize(
    "valid", [torch.ones(2, 3), torch.ones(3, dtype=torch.bool), torch.ones(2, 3, 1, dtype=torch.bool)]
)
def test_a_mask_is_of_booleans_a_row_and_token(valid):
    with pytest.raises(Unsupported, match=r"boolean \(B, N\)"):
        Mask(valid=valid)


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
