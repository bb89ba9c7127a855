"""Linear attention in PyTorch: the chunked recurrence of mapped queries and keys, with a column of ones in values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import valid_from_lengths
from regard.core.precision import wide_dtype
from regard.engines.feature_maps import FEATURE_MAPS
from regard.engines.gated_recurrence import torch_form as gated_recurrence
from regard.engines.gated_recurrence.problem import Problem as Recurrence
from regard.engines.linear_attention.problem import Problem, Rule

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def run(problem: Problem, rule: Rule, chunk_size: int) -> tuple[Tensor, Tensor]:
    """See :func:`regard.engines.linear_attention.linear_attention`."""
    p = problem
    recurrence = Recurrence(map_queries(p.q, rule), *map_memory(p.k, p.v, rule, p.valid), None, None, p.state, True)
    o, state = gated_recurrence.run(recurrence, chunk_size, 16)
    assert o is not None
    return divide(o, rule).to(p.v.dtype), state


def map_queries(q: Float[Tensor, "b h n k"], rule: Rule) -> Float[Tensor, "b h n k"]:
    """Queries after the feature map, in at least float32."""
    dtype = wide_dtype(q)
    return _mapped(rule.scale * q.to(dtype), rule)


def _mapped(x: Float[Tensor, "b h n k"], rule: Rule) -> Float[Tensor, "b h n k"]:
    features = FEATURE_MAPS[rule.feature_map](x)
    return features + rule.shift if rule.shift else features


def map_memory(
    k: Float[Tensor, "b h n k"], v: Float[Tensor, "b h n v"], rule: Rule, valid: Int[Tensor, " b"] | None
) -> tuple[Float[Tensor, "b h n k"], Float[Tensor, "b h n c"]]:
    """Mapped keys (zeroed at padding, as phi(0) need not be 0) and values with a column of ones for the denominator."""
    dtype = wide_dtype(k)
    keys, values = _mapped(k.to(dtype), rule), v.to(dtype)
    if valid is not None:
        keys = torch.where(valid_from_lengths(valid, k.shape[2])[:, None, :, None], keys, 0)
    return keys, values if rule.eps is None else F.pad(values, (0, 1), value=1.0)


def divide(o: Float[Tensor, "b h n c"], rule: Rule) -> Float[Tensor, "b h n v"]:
    """Divide what queries read from the values by what they read from the column of ones."""
    return o if rule.eps is None else o[..., :-1] / (o[..., -1:] + rule.eps)
