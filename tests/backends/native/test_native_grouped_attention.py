"""Native two-level softmax against the torch form in float64, and the cases that it leaves to torch."""

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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("n", "m"), [(37, 37), (5, 70), (70, 23), (3, 1), (3, 0)])
def test_any_pattern_equals_float64(n, m, causal, own):
    GROUPED.check(heads_of(n, m, heads=2, groups=1), **options(n, irregular(m), causal=causal, own=own))


def test_groups_of_all_lengths_equal_float64(threads):
    for share in (0.0, 0.02, 0.5, 1.0):
        GROUPED.check(heads_of(90, heads=1, groups=1), **options(90, irregular(90, share)))


def test_values_may_be_less_precise_than_rotated_keys():
    x = heads_of(33, heads=2)
    GROUPED.check(x | {"v": x["v"].bfloat16()}, **options(33, regular(33, 5)))


def test_large_scores_stay_exact():
    x, given = heads_of(70, heads=2), options(70, regular(70, 6)) | {"scale": 1.0}
    x |= {"q": (x["q"] * 8).round() * 512, "k": (x["k"] * 8).round() / 8}
    GROUPED.check(x, only=("o",), **given)
    assert all(y.isfinite().all() for y in GROUPED.gradients(x, **given).values())


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
    native, torch_ = (
        apply(MECHANISM, step, roles=roles[:, 8:], config=config, state=state, backend=backend).output
        for backend in ("native", "torch")
    )
    torch.testing.assert_close(native, torch_, rtol=0, atol=1e-5)
