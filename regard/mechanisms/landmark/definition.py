"""The definition of landmark: its options and its reference, written to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, Role, Unsupported, at_least, one_of
from regard.core.draws import uniform
from regard.core.precision import wide
from regard.core.visibility import Ranks, Visibility, masked_scores_bias, ranks
from regard.engines import retrieved_attention as retrieved
from regard.engines.grouped_attention import Dropout, product
from regard.mechanisms.landmark.checks import check

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


DISK, MEMORY = "disk", "memory"
SELECTIONS = ("per_token_and_head", "max_over_heads", "max_over_tokens")


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        block: normal tokens in a block, >= 1; its landmark comes after them.
        top_k: blocks that each token and head retrieves from the cache, >= 1; None for all.
        cache_blocks: complete blocks that are cached, >= 1; None for all.
        group_dropout: probability in [0, 1) of dropping the gate of a block, in training.
        softmax: ``grouped``, ``ignore`` (softmax over normal tokens) or ``plain`` (landmarks are treated as normal
            tokens).
        position_jump: in training, positions after a landmark grow by a random integer below this value; 0 for none.
        selection: how the retrieved blocks are chosen, with `top_k`: ``per_token_and_head``, ``max_over_heads`` (one set
            for all heads of a token) or ``max_over_tokens`` (one set for all tokens of a chunk, for each head), by the
            largest share that a block's landmark has in the softmax over landmarks. None for ``per_token_and_head``, or
            ``max_over_tokens`` with `offload`.
        offload: what holds the cached keys and values: ``"memory"`` of the computer, ``"disk"`` (a memory-mapped file),
            or a device of PyTorch, with ``selection="max_over_tokens"``; only landmark keys, the incomplete block and the
            retrieved blocks are read from it. None for the call's device.
        chunk: number of tokens, including landmarks, processed at once when a state is kept, >= 1, with `top_k` or
            `cache_blocks`; None for all tokens of a call.
        miss: whether the layer learns a miss key, in causal-self.
        miss_share: share of the landmarks that a miss key controls in training, from 0 to 1.
        miss_cutoff: outside training, a smaller weight of the miss key is set to 0 (see Miss token); 0 for no cutoff.
    """

    block: int = 50
    top_k: int | None = None
    cache_blocks: int | None = None
    group_dropout: float = 0.0
    softmax: str = "grouped"
    position_jump: int = 0
    selection: str | None = None
    offload: str | None = None
    chunk: int | None = None
    miss: bool = False
    miss_share: float = 0.5
    miss_cutoff: float = 0.0

    def __post_init__(self) -> None:
        at_least("block", self.block, 1)
        for name in ("top_k", "cache_blocks", "chunk"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if not 0.0 <= self.group_dropout < 1.0:
            raise Unsupported(f"group_dropout={self.group_dropout}", supported="0 <= group_dropout < 1")
        one_of("softmax", self.softmax, ("grouped", "ignore", "plain"))
        at_least("position_jump", self.position_jump, 0)
        if self.selection is None:
            object.__setattr__(self, "selection", SELECTIONS[0 if self.offload is None else 2])
        one_of("selection", self.selection, SELECTIONS)
        _check_place(self.offload)
        for name in ("miss_share", "miss_cutoff"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise Unsupported(f"{name}={getattr(self, name)}", supported=f"0 <= {name} <= 1")
        if self.selection != SELECTIONS[0] and self.top_k is None:
            asked = f"selection={self.selection!r}" if self.offload is None else f"offload={self.offload!r}"
            raise Unsupported(f"{asked} with top_k=None", supported="top_k >= 1", nearest="top_k=4")
        if self.offload is not None and self.selection != "max_over_tokens":
            raise Unsupported(
                f"offload={self.offload!r} with selection={self.selection!r}, which needs other blocks for each token",
                supported="selection='max_over_tokens'",
                nearest="selection='max_over_tokens'",
            )

    @property
    def cache_device(self) -> str | None:
        """The device that holds the cached keys and values; None for the call's device."""
        return "cpu" if self.offload in (DISK, MEMORY) else self.offload

    @property
    def bounded(self) -> bool:
        """Whether a continued sequence may see less than its whole past."""
        return self.top_k is not None or self.cache_blocks is not None


def _check_place(offload: str | None) -> None:
    if offload in (None, DISK, MEMORY):
        return
    try:
        torch.device(offload)
    except RuntimeError:
        raise Unsupported(
            f"offload={offload!r}", supported="memory or disk, or a device of PyTorch", nearest="offload='memory'"
        ) from None


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    miss: Float[Tensor, "g d"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with both levels of softmax, one block at a time."""
    check(call, miss)
    n, m = q.shape[2], k.shape[2]
    landmark = landmarks_of(call, k)[:, None, None]  # (b, 1, 1, m)
    where = ranks(call, n, m, q.device)
    q, k = rotated(call, q, k, where, landmark[:, 0, 0])
    controlled = controlled_by_miss(call, landmark, miss)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    visibility = Visibility(causal=call.pattern.causal and not call.pattern.cross)
    visible, added = masked_scores_bias(where, visibility, call.bias, call.position_bias, call.blocks, q.dtype)
    if call.pattern.cross and call.config.cache_blocks is not None:
        visible = visible & (from_end(visible & landmark) <= call.config.cache_blocks)
    scores = call.scale * q @ k.mT + (0 if added is None else added)
    block = landmark.cumsum(-1) - landmark.long()
    if call.pattern.cross or m == 0:
        own = torch.zeros_like(visible)
    else:
        own = block == block.mT[:, :, (torch.arange(n, device=q.device) + m - n).clamp(0, m - 1)]

    def softmax(members: Tensor) -> Tensor:
        some = members.any(-1, keepdim=True)
        return torch.where(members, scores.masked_fill(some & ~members, -torch.inf).softmax(-1), 0)

    if call.config.softmax != "grouped":
        weights = softmax(visible if call.config.softmax == "plain" else visible & ~landmark)
    else:
        others = [visible & ~own & (block == c) for c in range(m)]
        tokens = [other & ~landmark for other in others]
        gates = [other & landmark & some.any(-1, keepdim=True) for other, some in zip(others, tokens, strict=True)]
        local = visible & own & ~landmark
        every = torch.stack([local, *(gate.expand_as(local) for gate in gates)]).any(0) if m else local
        if call.pattern.cross and call.config.top_k is not None and m:
            every = every & _best(call, q, k, scores.masked_fill(~every, -torch.inf))
        top = softmax(every & ~controlled)
        if miss is not None:
            column = miss_scores(call, q, miss)[..., None]
            beside = torch.cat([scores.masked_fill(~(every & ~controlled), -torch.inf), column], -1).softmax(-1)
            top = beside[..., :-1] + opened(call, beside[..., -1:]) * softmax(every & controlled)
        weights = top * local
        kept = dropout_of(call).of_gates(scores.shape, q)
        top = top if kept is None else top * kept
        for gate, some in zip(gates, tokens, strict=True):
            weights = weights + (top * gate).sum(-1, keepdim=True) * softmax(some)
    return dropout_of(call).of_weights(weights) @ v


def _best(call: Call, q: Tensor, k: Tensor, scores: Float[Tensor, "b h n m"]) -> Bool[Tensor, "b #h n m"]:
    """The landmarks with the largest shares, which a query of a cross pattern retrieves; among ties the newest."""
    there = scores > -torch.inf
    shares = torch.where(there, scores - scores.logsumexp(-1, keepdim=True), -torch.inf)
    longest = torch.where(there, k.norm(dim=-1)[:, :, None], 0).amax(-1, keepdim=True)
    margin = retrieved.tolerance(k.dtype) * abs(call.scale) * q.norm(dim=-1, keepdim=True) * longest
    if call.config.selection == "max_over_heads":
        shares, margin = (x.amax(1, keepdim=True) for x in (shares, margin))
    least = shares.topk(min(call.config.top_k, shares.shape[-1]), -1).values[..., -1:]
    sure = shares > least + margin
    tied = (shares > -torch.inf) & ~sure & (shares >= least - margin)
    return sure | tied & (from_end(tied) <= call.config.top_k - sure.sum(-1, keepdim=True))


def landmarks_of(call: Call, k: Tensor) -> Bool[Tensor, "b m"]:
    """True where a key is a landmark by the call's roles; False everywhere without roles."""
    batch, m = k.shape[0], k.shape[2]
    if call.roles is None:
        return torch.zeros(batch, m, dtype=torch.bool, device=k.device)
    return call.roles == int(Role.LANDMARK)


def rotated(call: Call, q: Tensor, k: Tensor, where: Ranks, landmark: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated by their ranks, in training with jumps at landmarks; unchanged without `rotate`."""
    if call.rotate is None:
        return q, k
    queries, keys = where.queries.clamp(min=0), where.keys.clamp(min=0)
    if call.config.position_jump and call.training and k.shape[2]:
        jumps = torch.randint(
            0, call.config.position_jump, landmark.shape, generator=call.generator, device=landmark.device
        )
        jumps = torch.where(landmark, jumps, 0)
        gained = jumps.cumsum(-1) - jumps
        at = queries.clamp(max=k.shape[2] - 1).expand(k.shape[0], -1)
        queries, keys = queries + gained.gather(-1, at), keys + gained
    return call.rotate(wide(q), queries), call.rotate(wide(k), keys)


def dropout_of(call: Call) -> Dropout:
    """The call's dropout of weights and, in training, of whole groups."""
    gates = call.config.group_dropout if call.training and call.config.softmax == "grouped" else 0.0
    return Dropout(call.dropout, gates, call.generator)


def controlled_by_miss(call: Call, landmark: Bool[Tensor, "..."], miss: Tensor | None) -> Bool[Tensor, "..."]:
    """Landmarks of a whole call that the miss key controls: a random share in training, else none."""
    if miss is None or not call.training:
        return torch.zeros_like(landmark)
    draw = uniform(landmark.shape, call.generator, device=landmark.device)
    return landmark & (draw < call.config.miss_share)


def miss_scores(call: Call, q: Float[Tensor, "b h n d"], miss: Float[Tensor, "g d"]) -> Float[Tensor, "b h n"]:
    """Scores of the miss key, given rotated queries."""
    key = wide(miss)[None, :, None]  # (1, g, 1, d)
    if call.rotate is not None:
        key = call.rotate(key, torch.full((1, 1), -1, device=q.device))
    return (call.scale * product(wide(q), key.mT.expand(q.shape[0], -1, -1, -1)))[..., 0]


def opened(call: Call, share: Float[Tensor, "b h n 1"]) -> Float[Tensor, "b h n 1"]:
    """The miss key's weight as the gate of the blocks it controls; outside training, 0 below `miss_cutoff`."""
    if call.training:
        return share
    return share.masked_fill(share < call.config.miss_cutoff, 0.0)


def from_end(ends: Bool[Tensor, "b past"]) -> Int[Tensor, "b past"]:
    """The number of block ends in or after each slot: 0 in the incomplete block, 1 in the newest complete one, ..."""
    return ends.long().flip(-1).cumsum(-1).flip(-1)
