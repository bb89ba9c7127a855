"""Softmax attention over keys in several parts, merged from the parts' outputs and log-sum-exps.

LSE = log sum_p exp(LSE_p),   O = sum_p c_p exp(LSE_p - LSE) O_p,   c_p = 1 for softmax attention to all keys
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def merge(
    outputs: Sequence[Float[Tensor, "b h n v"]],
    lses: Sequence[Float[Tensor, "b h n"]],
    factors: Sequence[Float[Tensor, "#b #h #n"]] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The output over all keys, each of which is in one part; 0 for a query that sees none, with finite gradients.

    Without gradients, the first of `outputs` is overwritten with the result, except in a program, which may be run with
    gradients later.

    Args:
        factors: c of each part; ones when None.
    """
    if len(outputs) == 1 and factors is None:
        return outputs[0]
    lse = torch.stack(list(lses))
    empty = lse == -torch.inf
    nothing = empty.all(0)
    # a softmax over -inf only would have NaN gradients
    shares = torch.where(empty, 0, torch.where(nothing, 0, lse).softmax(0)).to(outputs[0].dtype)[..., None]
    if factors is not None:
        shares = torch.stack([share * c[..., None] for share, c in zip(shares, factors, strict=True)])
    if torch.compiler.is_compiling() or any(part.requires_grad for part in (shares, *outputs)):
        total = shares[0] * outputs[0]
        for share, output in zip(shares[1:], outputs[1:], strict=True):
            total = torch.addcmul(total, share, output)
        return total
    total = outputs[0].mul_(shares[0])
    for share, output in zip(shares[1:], outputs[1:], strict=True):
        total.addcmul_(share, output)
    return total


def merge_states(
    m: Float[Tensor, "parts *q"], total: Float[Tensor, "parts *q"], o: Float[Tensor, "parts *q v"]
) -> tuple[Float[Tensor, "*q"], Float[Tensor, "*q"], Float[Tensor, "*q v"]]:
    """Merge the states of queries on disjoint parts of the keys: associative, in any order.

    Args:
        m: the largest score of a part, or any number near it; -inf for a part of which a query sees nothing.
        total: sum of exp(score - m).
        o: sum of exp(score - m) times value.
    """
    largest = m.amax(0)
    factors = (m - torch.where(largest == -torch.inf, 0, largest)).exp()
    return largest, (factors * total).sum(0), (factors[..., None] * o).sum(0)


def finish(
    m: Float[Tensor, "*q"], total: Float[Tensor, "*q"], o: Float[Tensor, "*q v"]
) -> tuple[Float[Tensor, "*q v"], Float[Tensor, "*q"]]:
    """Output and log-sum-exp of a state; 0 and -inf for a query that sees nothing."""
    seen = total > 0
    safe = torch.where(seen, total, 1)
    return torch.where(seen[..., None], o / safe[..., None], 0), torch.where(seen, m + safe.log(), -torch.inf)
