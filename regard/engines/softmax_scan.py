"""The running softmax of attention with a fixed query, as a scan over (m, u, w).

For scores s_t and values v_t: m_t the running maximum, u_t = sum_{j<=t} exp(s_j - m_t), w_t = sum_{j<=t} exp(s_j - m_t) v_j;
the output is w_t / u_t. Pairs merge associatively (Attention as an RNN, arXiv 2405.13956, section 3.2), so prefixes are
found in chunks with a carried (m, u, w).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.backends import resolve
from regard.backends.torch.softmax_scan import Carry

if TYPE_CHECKING:
    from jaxtyping import Float


def empty_carry(s: Float[Tensor, "b h n q"], v: Float[Tensor, "b h n v"]) -> Carry:
    dtype = torch.promote_types(v.dtype, torch.float32)
    batch, heads, _, queries = s.shape
    return Carry(
        s.new_full((batch, heads, queries), -torch.inf, dtype=dtype),
        s.new_zeros((batch, heads, queries), dtype=dtype),
        v.new_zeros((batch, heads, queries, v.shape[-1]), dtype=dtype),
    )


def softmax_scan(
    s: Float[Tensor, "b h n q"],
    v: Float[Tensor, "b h n v"],
    *,
    state: Carry | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b h n q v"], Carry]:
    """Prefix outputs of q fixed queries and the carry after the last token.

    Args:
        s: scores of each token for each of the q queries; -inf skips the token.
        v: values, shared by the queries.
        state: carry to continue from.
        chunk_size: tokens computed together. Changes rounding only.

    Returns:
        Outputs in the dtype of v (0 where no token was seen yet); the carry in at least float32.
    """
    carry = empty_carry(s, v) if state is None else state
    return resolve("softmax_scan", v.device, backend)(s, v, carry, chunk_size)


__all__ = ["Carry", "empty_carry", "softmax_scan"]
