"""The native softmax in two levels against the torch form in float64, and what it leaves to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regard.apply import apply
from regard.contract import BlockMask, Mask, Role, Unsupported
from regard.core.visibility import Ranks
from regard.engines.grouped_attention import own_groups
from regard.mechanisms.landmark import MECHANISM, Config

from .kernels import GROUPED, heads_of, last_of


def regular(m: int, block: int) -> Tensor:
    return (torch.arange(m) % (block + 1) == block).expand(2, -1)


def irregular(m: int, share: float = 0.25) -> Tensor:
    return torch.rand(2, m) < share


def options(
    n: int, landmark: Tensor, *, causal: bool = True, own: bool = True, where: Ranks | None = None
) -> dict[str, Any]:
    where = last_of(n, landmark.shape[1], counted=True) if where is None else where
    groups = own_groups(where, landmark) if own else None
    return {"ranks": where, "landmark": landmark, "own": groups, "causal": causal, "scale": 0.3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "block", "width", "values", "heads", "groups"),
    [
        (0, 3, 8, 8, 1, 1),
        (1, 3, 8, 8, 1, 1),
        (67, 10, 17, 33, 2, 1),
        (64, 15, 64, 64, 1, 1),
        (97, 1, 5, 130, 3, 1),
        (131, 100, 8, 16, 2, 2),
    ],
)
def test_outputs_and_gradients_equal_float64(instruction_set, dtype, n, block, width, values, heads, groups):
    x = heads_of(n, heads=heads, groups=groups, width=width, values=values, dtype=dtype)
    GROUPED.check(x, **options(n, regular(n, block)))


def test_wide_heads_and_a_long_sequence():
    GROUPED.check(heads_of(29, heads=1, groups=1, width=256, values=256), **options(29, regular(29, 7)))
    GROUPED.check(heads_of(1500, heads=1, groups=1, width=16), **options(1500, regular(1500, 50)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("n", "m"), [(37, 37), (5, 70), (70, 23), (3, 1), (3, 0)])
def test_any_pattern_equals_float64(n, m, causal, own):
    GROUPED.check(heads_of(n, m, heads=2, groups=1), **options(n, irregular(m), causal=causal, own=own))


def test_groups_of_all_lengths_equal_float64(threads):
    for share in (0.0, 0.02, 0.5, 1.0):
        GROUPED.check(heads_of(90, heads=1, groups=1), **options(90, irregular(90, share)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[40, 17], [0, 1], [33, 0]])
@pytest.mark.parametrize("side", ["right", "left", "inside"])
def test_places_without_tokens_equal_float64(side, lengths, causal):
    valid = torch.arange(40) < torch.tensor(lengths)[:, None]
    valid = {"right": valid, "left": valid.flip(1), "inside": valid[:, torch.randperm(40)]}[side]
    ranks = torch.where(valid, valid.cumsum(-1) - 1, -1)
    where = Ranks(ranks, ranks, None, None, False)
    GROUPED.check(heads_of(40), **options(40, irregular(40) & valid, causal=causal, where=where))


def test_values_may_be_less_precise_than_rotated_keys():
    x = heads_of(33, heads=2)
    GROUPED.check(x | {"v": x["v"].bfloat16()}, **options(33, regular(33, 5)))


def test_large_scores_stay_exact():
    x, given = heads_of(70, heads=2), options(70, regular(70, 6)) | {"scale": 1.0}
    x |= {"q": (x["q"] * 8).round() * 512, "k": (x["k"] * 8).round() / 8}
    GROUPED.check(x, only=("o",), **given)
    assert all(y.isfinite().all() for y in GROUPED.gradients(x, **given).values())


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_spreads_to_all_that_see_it(name):
    x = heads_of(70, batch=2, heads=2)
    x[name][0, 1, 30] = torch.nan
    found = GROUPED.run(x, **options(70, regular(70, 6)))["o"].isnan()
    seeing = torch.arange(70) == 30 if name == "q" else torch.arange(70) >= 30
    assert found[0, 1, seeing].all()
    assert not found[0, 0].any() and not found[1].any()
    if name != "v":  # a weight of 0 times NaN is NaN
        assert not found[0, 1, ~seeing].any()


def test_what_it_lacks_is_left_to_torch():
    x, roles = heads_of(9, heads=2), regular(9, 3).long() * int(Role.LANDMARK)
    blocks = BlockMask(torch.ones(1, 1, 5, 5, dtype=torch.bool), 2)
    for call in (
        {"mask": Mask(bias=torch.zeros(1, 1, 9, 9))},
        {"mask": Mask(blocks=blocks)},
        {"dropout": 0.5},
        {"want": {"weights"}},
    ):
        apply(MECHANISM, x, roles=roles, **call)
        with pytest.raises(Unsupported, match="try torch"):
            apply(MECHANISM, x, roles=roles, backend="native", **call)
    config, start = Config(block=3, top_k=1), {name: y[:, :, :8] for name, y in x.items()}
    state = apply(MECHANISM, start, roles=roles[:, :8], config=config, return_state=True).state
    step = {name: y[:, :, 8:] for name, y in x.items()}
    with pytest.raises(Unsupported, match="try torch"):
        apply(MECHANISM, step, roles=roles[:, 8:], config=config, state=state, backend="native")
