"""Chunked softmax scan in PyTorch: inside a chunk each prefix is a masked product with its own running maximum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Carry(NamedTuple):
    """What a prefix leaves behind. An empty prefix has m = -inf, u = 0, w = 0."""

    m: Tensor
    """Running maximum of each query, (B, H, Q)."""
    u: Tensor
    """Sum of exponentials, (B, H, Q)."""
    w: Tensor
    """Sum of exponentials times values, (B, H, Q, V)."""


def run(s: Tensor, v: Tensor, carry: Carry, chunk_size: int) -> tuple[Tensor, Carry]:
    """See :func:`regard.engines.softmax_scan.softmax_scan`."""
    dtype = carry.u.dtype
    m, u, w = carry
    outputs = []
    for s_, v_ in zip(s.to(dtype).split(chunk_size, 2), v.to(dtype).split(chunk_size, 2), strict=True):
        scores = s_.transpose(2, 3)  # b h q c
        # the maximum only shifts the exponents: its gradient cancels, so it is held constant
        running = torch.maximum(scores.detach().cummax(-1).values, m[..., None])
        shift = running.masked_fill(running == -torch.inf, 0.0)
        causal = torch.ones(*[scores.shape[-1]] * 2, dtype=torch.bool, device=s.device).tril()
        exponents = torch.where(causal, scores[..., None, :] - shift[..., :, None], -torch.inf)
        weights = exponents.exp()  # b h q t j
        carried = (m[..., None] - shift).exp()
        denominators = weights.sum(-1) + carried * u[..., None]
        numerators = weights @ v_[:, :, None] + carried[..., None] * w[..., None, :]
        seen = denominators > 0
        outputs.append(torch.where(seen[..., None], numerators / torch.where(seen, denominators, 1)[..., None], 0))
        m, u, w = running[..., -1], denominators[..., -1], numerators[..., -1, :]
    if not outputs:
        return v.new_zeros(*s.shape[:2], 0, s.shape[-1], v.shape[-1]), carry
    return torch.cat(outputs, 3).transpose(2, 3).to(v.dtype), Carry(m, u, w)
