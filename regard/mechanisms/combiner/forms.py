"""The fast forms of combiner: whole sequences, and tokens after a state. Factorizations have their own modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, Result
from regard.mechanisms.combiner import fixed, grid, logn
from regard.mechanisms.combiner.definition import check

if TYPE_CHECKING:
    from jaxtyping import Float


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    residual: Float[Tensor, "b m c"] | None = None,
    **learned: Tensor,
) -> Float[Tensor, "b h n v"]:
    """Whole sequences: local and summarised parts in one softmax, without an N x N matrix."""
    maps = check(call, q, k, residual, learned)
    factorization = call.config.factorization
    if factorization == "fixed":
        return fixed.whole(call, q, k, v, maps)
    if factorization == "logn":
        return logn.whole(call, q, k, v, maps)[0]
    return grid.whole(call, q, k, v, residual, maps)[0]


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    residual: Float[Tensor, "b m c"] | None = None,
    **learned: Tensor,
) -> Result:
    """Causal-self from state to state; also the step."""
    maps = check(call, q, k, residual, learned)
    factorization = call.config.factorization
    if factorization == "fixed":
        return fixed.continued(call, q, k, v, maps)
    if call.state is None:
        if factorization == "logn":
            return Result(*logn.whole(call, q, k, v, maps))
        output, summaries = grid.whole(call, q, k, v, residual, maps)
        return Result(output, grid.rows_so_far(call, q, k, v, residual, maps, summaries))
    state, outputs = call.state, []
    for t in range(q.shape[2]):
        lengths = None if call.lengths is None else (call.lengths > t).long()
        part = call.replace(state=state, lengths=lengths, memory_lengths=lengths)
        token = q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1]
        if factorization == "logn":
            output, state = logn.step(part, *token, maps)
        else:
            output, state = grid.step(part, *token, None if residual is None else residual[:, t : t + 1], maps)
        outputs.append(output)
    return Result(torch.cat(outputs, 2) if outputs else torch.zeros_like(v), state)
