"""Softmax in two levels in PyTorch: pairs of positions of some queries at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.contract import BlockMask
from regard.core.precision import wide
from regard.core.visibility import PositionBias, Ranks, Visibility, masked_scores_bias
from regard.engines.attention.torch_form import of_no_pairs

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

PAIRS_AT_ONCE = 1 << 18
"""Pairs of positions above which queries are taken block by block."""


@dataclass(frozen=True)
class Dropout:
    """The draws of dropout.

    Attributes:
        weights: probability of dropping a weight.
        gates: probability of dropping the gate of a group, not of the own one.
        generator: source of the draws.
    """

    weights: float = 0.0
    gates: float = 0.0
    generator: torch.Generator | None = None

    @property
    def random(self) -> bool:
        return self.weights > 0 or self.gates > 0

    def of_weights(self, weights: Tensor) -> Tensor:
        """Weights with some of them dropped."""
        if self.weights == 0:
            return weights
        kept = torch.rand(weights.shape, generator=self.generator, device=weights.device, dtype=weights.dtype)
        return weights * (kept >= self.weights) / (1 - self.weights)

    def of_gates(self, shape: torch.Size, like: Tensor) -> Tensor | None:
        """0 or 1 / (1 - gates) for each gate; None when no gate is dropped."""
        if self.gates == 0:
            return None
        kept = torch.rand(shape, generator=self.generator, device=like.device, dtype=wide(like).dtype) >= self.gates
        return kept / (1 - self.gates)


def product(a: Float[Tensor, "b h n x"], b: Float[Tensor, "b g x y"]) -> Float[Tensor, "b h n y"]:
    """a @ b, each group of b with its h / g heads of a."""
    groups = b.shape[1]
    if a.shape[1] == groups:
        return a @ b
    return (a.unflatten(1, (groups, -1)).flatten(2, 3) @ b).unflatten(2, (-1, a.shape[2])).flatten(1, 2)


def logits(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    ranks: Ranks,
    landmark: Bool[Tensor, "b m"],
    own: Int[Tensor, "#b n"] | None,
    causal: bool,
    scale: float,
    bias: Float[Tensor, "#b #h #n #m"] | None,
    position_bias: PositionBias | None,
    blocks: BlockMask | None,
    dropout: Dropout,
) -> tuple[Float[Tensor, "b h n m"], Float[Tensor, "b h n m"] | None]:
    """S + C, whose softmax is W, with -inf where W is 0; and factors of the weights when gates are dropped.

    C_ij is 0 for tokens of the own group, and the landmark's score minus the log-sum-exp of the group's tokens for
    others. Every key points to the landmark that closes its group; tables over groups are tables over landmark slots,
    filled by scattering along these pointers.
    """
    scores = scale * product(wide(q), wide(k).mT)
    visible, added = masked_scores_bias(ranks, Visibility(causal=causal), bias, position_bias, blocks, scores.dtype)
    scores = scores if added is None else scores + added
    marks = landmark[:, None, None]
    slots = torch.arange(k.shape[2], device=k.device)
    # Without a landmark after it a key points to the last slot, which does not open a gate unless it is a landmark.
    closing = torch.where(landmark, slots, k.shape[2] - 1).flip(-1).cummin(-1).values.flip(-1)
    tokens = visible & ~marks
    opened = (visible & marks).expand(landmark.shape[0], -1, scores.shape[2], -1)
    gated = tokens & opened.gather(-1, closing[:, None, None].expand_as(opened))
    local = torch.zeros_like(gated)
    if own is not None:
        group = landmark.cumsum(-1) - landmark.long()
        mine = (own[:, :, None] == group[:, None])[:, None]
        gated, local = gated & ~mine, tokens & mine

    index = closing[:, None, None].expand_as(scores)
    inner = torch.where(gated, scores, -torch.inf)
    peak = torch.full_like(scores, -torch.inf).scatter_reduce(-1, index, inner.detach(), "amax").detach()
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    total = torch.zeros_like(scores).scatter_add(-1, index, (inner - peak.gather(-1, index)).exp())
    gate = scores - peak - torch.where(total > 0, total, 1.0).log()  # C, where the slot is a landmark
    found = torch.where(gated, scores + gate.gather(-1, index), torch.where(local, scores, -torch.inf))
    kept = dropout.of_gates(scores.shape, q)
    return found, None if kept is None else torch.where(gated, kept.gather(-1, index), 1.0)


def normalized(logits: Tensor) -> Tensor:
    """Softmax; 0 where all logits are -inf. NaN stays NaN."""
    some = (logits != -torch.inf).any(-1, keepdim=True)
    return torch.where(some, logits, 0.0).softmax(-1) * some


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranks: Ranks,
    landmark: Tensor,
    own: Tensor | None,
    causal: bool,
    scale: float,
    bias: Tensor | None,
    position_bias: PositionBias | None,
    blocks: BlockMask | None,
    dropout: Dropout,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`regard.engines.grouped_attention.grouped_attention`."""
    n, m = q.shape[2], k.shape[2]
    if n == 0 or m == 0:
        output, weights, _ = of_no_pairs(q, k, v, want_weights, False)
        return output, weights
    size = n if n * m <= PAIRS_AT_ONCE else max(1, PAIRS_AT_ONCE // m)
    offset = ranks.offset if causal else None
    outputs, found_weights = [], []
    for start in range(0, n, size):
        rows = slice(start, start + size)
        columns = slice(0, m if offset is None else max(1, min(m, start + size + offset)))
        here = Ranks(ranks.queries[:, rows], ranks.keys[:, columns], offset=None, first=None, plain=False)
        some_bias = bias
        if bias is not None:
            every = slice(None)
            some_bias = bias[..., rows if bias.shape[-2] > 1 else every, columns if bias.shape[-1] > 1 else every]

        def attend(
            q_: Tensor,
            k_: Tensor,
            v_: Tensor,
            here: Ranks = here,
            marks: Tensor = landmark[:, columns],
            mine: Tensor | None = None if own is None else own[:, rows],
            bias: Tensor | None = some_bias,
        ) -> tuple[Tensor, Tensor]:
            found, factors = logits(q_, k_, here, marks, mine, causal, scale, bias, position_bias, blocks, dropout)
            found = normalized(found)
            found = dropout.of_weights(found if factors is None else found * factors)
            return product(found, wide(v_)).to(v_.dtype), found

        arguments = (q[:, :, rows], k[:, :, columns], v[:, :, columns])
        # A second draw from an explicit generator would differ: random weights are kept instead of computed again.
        if size < n and torch.is_grad_enabled() and not dropout.random and not want_weights:
            output, found = checkpoint(attend, *arguments, use_reentrant=False)
        else:
            output, found = attend(*arguments)
        outputs.append(output)
        if want_weights:
            found_weights.append(F.pad(found.to(v.dtype), (0, m - columns.stop)))
    return torch.cat(outputs, 2), torch.cat(found_weights, 2) if want_weights else None
