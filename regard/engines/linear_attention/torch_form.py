"""Linear attention in PyTorch: the chunked recurrence of mapped queries and keys, with a column of ones on the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import valid_from_lengths
from regard.core.precision import wide_dtype
from regard.engines.feature_maps import FEATURE_MAPS
from regard.engines.gated_recurrence import torch_form as gated_recurrence
from regard.engines.gated_recurrence.problem import Problem

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Rule:
    """How queries and keys become weights.

    Attributes:
        feature_map: phi, a name in :data:`regard.engines.feature_maps.FEATURE_MAPS`.
        scale: multiplies queries before phi.
        eps: added to the denominators; None for no denominators.
    """

    feature_map: str
    scale: float
    eps: float | None


def run(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, state: Tensor | None, valid: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """See :func:`regard.engines.linear_attention.linear_attention`."""
    keys, values = map_memory(k, v, rule, valid)
    problem = Problem(map_queries(q, rule), keys, values, None, None, state, True)
    o, state = gated_recurrence.run(problem, chunk_size, 16)
    assert o is not None
    return divide(o, rule).to(v.dtype), state


def map_queries(q: Float[Tensor, "b h n k"], rule: Rule) -> Float[Tensor, "b h n k"]:
    """Mapped queries, in at least float32."""
    dtype = wide_dtype(q)
    return FEATURE_MAPS[rule.feature_map](rule.scale * q.to(dtype))


def map_memory(
    k: Float[Tensor, "b h n k"], v: Float[Tensor, "b h n v"], rule: Rule, valid: Int[Tensor, " b"] | None
) -> tuple[Float[Tensor, "b h n k"], Float[Tensor, "b h n c"]]:
    """Mapped keys (zero at padding, where phi(0) is not) and values with a column of ones for the denominator."""
    dtype = wide_dtype(k)
    keys, values = FEATURE_MAPS[rule.feature_map](k.to(dtype)), v.to(dtype)
    if valid is not None:
        keys = torch.where(valid_from_lengths(valid, k.shape[2])[:, None, :, None], keys, 0)
    return keys, values if rule.eps is None else F.pad(values, (0, 1), value=1.0)


def divide(o: Float[Tensor, "b h n c"], rule: Rule) -> Float[Tensor, "b h n v"]:
    """Outputs from what queries read of values and of the column of ones."""
    return o if rule.eps is None else o[..., :-1] / (o[..., -1:] + rule.eps)
