r"""Landmark attention: a landmark token after each block gates attention to the block, and later finds it in a cache.

When to pick it: to use a context far longer than the one trained on, at a bounded number of attended tokens for each
query, with every past token still reachable.
When not: short sequences (plain softmax is cheaper: landmarks lengthen the sequence by a token a block), or when the
state must not grow (`cache_blocks` bounds it by forgetting the oldest blocks).

Definition (Mohtashami and Jaggi, arXiv 2305.16300, sections 3.1-3.3). A landmark belongs to the block that it closes.
With S = tau Q K^T, for query i in block b, over visible keys:

    t_i   = softmax of S_i over { normal tokens of block b } and { landmarks of the other blocks that hold tokens }
    u_i^c = softmax of S_i over the normal tokens of block c,             for each other block c
    W_ij  = t_ij                      for normal j in block b
          = t_{i,landmark(c)} u_ij^c  for normal j in another block c
          = 0                         for landmarks,                      O = W V

Rows sum to 1, except for a query without keys, which gives 0. The fast forms use the same thing in one softmax: with
LSE_ic the log-sum-exp of S_i over the normal tokens of block c, W_i = softmax over normal tokens of S_ij + C_ij, where
C_ij = S_{i,landmark(c)} - LSE_ic for j in another block c and 0 in the query's own.

- A query never attends to the landmark of its own block, and a landmark never to itself: a landmark query reads its
  block's tokens and the earlier blocks.
- causal-self: other blocks are the earlier ones. noncausal-self: all others. Cross patterns: all blocks of the memory
  are gated; tokens after its last landmark cannot be reached, so end the memory with a landmark.
- A block of which the query sees no token (an empty one, or one hidden by a bias) loses its landmark too; a block whose
  landmark is hidden loses its tokens.

Retrieval (section 3.3; causal-self with a state, `top_k` = k): the state keeps keys before rotation, values, and which
tokens are landmarks. A call is one chunk, or is read in chunks of `chunk_size`. For each token and head the k blocks of
highest landmark score, among the complete blocks cached before the chunk, are attended to together with the incomplete
block and the chunk. `selection` shares the choice: with the softmax of a token's and head's scores over the landmarks,
the k blocks of the largest maximum over the heads, or over the tokens of the chunk. The latter lets later tokens of a
chunk influence which blocks an earlier one sees; it is what `offload` needs, so that few blocks are moved for a chunk. With rotary positions blocks take slots of `block` + 1 positions instead of their distant true
places: to be scored, the k newest blocks have the slots 1 to k and older ones slot 0; the m-th chosen block in order of
time (from 0) has slot m, or m + 1 if it is one of the k newest; the incomplete block follows at slot k + 1. While no
more than k blocks are cached, slots are true places. So positions never exceed (k + 1)(`block` + 1) + `block` + chunk.
In cross patterns each query and head chooses k blocks of the memory (of its newest `cache_blocks`), in whole calls and from a
state alike, by keys at their true places; not by `max_over_tokens`, with which queries that are read one by one would see
other blocks than together.
noncausal-self has nothing to choose from: each call sees its sequence whole, and no state goes on from it.

Miss token (of the authors' code, after the paper): a key, the same for all queries and rotated as at position -1, whose
score r_i joins the softmax t_i. The landmarks C that it controls leave t_i for a softmax of their own,

    z_i = softmax of S_i over C,     the gate of c in C: t_{i,miss} z_ic,

so that a query which wants none of them lets t_{i,miss} fall. Rows sum to 1, or without a landmark in C to 1 - t_{i,miss}.
Controlled are the landmarks of retrieved blocks, and in training each landmark with the probability `miss_share`; outside
training a t_{i,miss} below `miss_cutoff` opens no gate.

| paper | here |
|---|---|
| context miss token; t_{i,miss} | `miss` (G, D), one key a head, which the layer learns with `miss=True`; its weight |
| block length l_block | `block`: normal tokens before each landmark |
| k retrieved blocks | `top_k`; None attends to all cached blocks, which is W above |
| memory size (cache of blocks) | `cache_blocks`; the oldest complete block is dropped first; None keeps all |
| landmark token | `roles == Role.LANDMARK`; :func:`prepare` inserts them |
| GroupedSoftmax | `softmax="grouped"`; "ignore" hides landmarks, "plain" treats them as normal tokens |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). `roles` (B, M) goes with the keys. Blocks
may have any length in whole calls that attend to all of them; with `top_k` a block has exactly `block` tokens (the first
of a sequence may have fewer), and with `cache_blocks` at most `block`.
Deviations: noncausal and cross patterns are not in the paper. Blocks without a visible token lose their landmark; the
original code lets an empty block keep its share, so that rows sum to less than 1. The miss token's key is a parameter of the
layer; there it is the key of a token that no layer lets attend, which is a constant too. There landmarks of the chunk may be
controlled outside training as well. Models always leave inserted tokens out of the loss, where there an option decides. They
draw the embedding of a landmark like any other; the new token that the authors add to a pretrained vocabulary starts as the
mean of the existing embeddings, but no pretrained model is given landmarks here.
`group_dropout` drops gates (not the own block), `position_jump` adds a random number below it to the positions after
each landmark; both act in training only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    LayerSpec,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Role,
    Shape,
    State,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    one_of,
    state_field,
)
from regard.core.precision import wide
from regard.core.sampling import attention_shapes, normals
from regard.core.visibility import Ranks, Visibility, masked_scores_bias, ranks
from regard.engines.cache import append, take
from regard.engines.grouped_attention import (
    PAIRS_AT_ONCE,
    Dropout,
    grouped_attention,
    logits,
    normalized,
    own_groups,
    product,
)
from regard.layers.parts import LayerCall, Projection

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

SELECTIONS = ("per_token_and_head", "max_over_heads", "max_over_tokens")

NUMBERS_AT_ONCE = 1 << 24
"""Numbers of retrieved keys above which queries are taken block by block."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        block: normal tokens in a block, >= 1; its landmark comes after them.
        top_k: blocks that each token and head retrieves from the cache, >= 1; None for all.
        cache_blocks: complete blocks that are cached, >= 1; None for all.
        group_dropout: probability in [0, 1) of dropping the gate of a block, in training.
        softmax: ``grouped``, ``ignore`` (softmax over normal tokens) or ``plain`` (landmarks are tokens like others).
        position_jump: in training, positions after a landmark grow by a random integer below it; 0 for none.
        selection: how the retrieved blocks are chosen: ``per_token_and_head``, ``max_over_heads`` (one set for all heads
            of a token) or ``max_over_tokens`` (one set for all tokens of a chunk, for each head), by the largest share
            that a block's landmark has among the landmarks.
        offload: device that holds the cached keys and values, as ``"cpu"``, with ``selection="max_over_tokens"``; only
            landmark keys, the incomplete block and the retrieved blocks are on the call's device. None for that device.
        miss: whether the layer learns a miss key, in causal-self.
        miss_share: share of the landmarks that a miss key controls in training, from 0 to 1.
        miss_cutoff: see Miss token; 0 for none.
    """

    block: int = 50
    top_k: int | None = None
    cache_blocks: int | None = None
    group_dropout: float = 0.0
    softmax: str = "grouped"
    position_jump: int = 0
    selection: str = "per_token_and_head"
    offload: str | None = None
    miss: bool = False
    miss_share: float = 0.5
    miss_cutoff: float = 0.0

    def __post_init__(self) -> None:
        at_least("block", self.block, 1)
        for name in ("top_k", "cache_blocks"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if not 0.0 <= self.group_dropout < 1.0:
            raise Unsupported(f"group_dropout={self.group_dropout}", supported="0 <= group_dropout < 1")
        one_of("softmax", self.softmax, ("grouped", "ignore", "plain"))
        at_least("position_jump", self.position_jump, 0)
        one_of("selection", self.selection, SELECTIONS)
        for name in ("miss_share", "miss_cutoff"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise Unsupported(f"{name}={getattr(self, name)}", supported=f"0 <= {name} <= 1")
        if self.selection != SELECTIONS[0] and self.top_k is None:
            raise Unsupported(
                f"selection={self.selection!r} with top_k=None", supported="top_k >= 1", nearest="top_k=4"
            )
        if self.offload is not None and self.selection != "max_over_tokens":
            raise Unsupported(
                f"offload={self.offload!r} with selection={self.selection!r}, which needs other blocks for each token",
                supported="selection='max_over_tokens'",
                nearest="selection='max_over_tokens'",
            )

    @property
    def bounded(self) -> bool:
        """Whether a continued sequence sees less than its whole past."""
        return self.top_k is not None or self.cache_blocks is not None


@dataclass(frozen=True)
class LandmarkState(State):
    """Cached tokens of each row: complete blocks, then the incomplete one.

    The last `cached` slots of a row hold tokens, in order; the slots before them are empty. Keys are rotated at their
    ranks, but with `top_k`, where they take other places each time that their block is retrieved, they are not.
    """

    k: Float[Tensor, "b g past d"] = state_field()
    v: Float[Tensor, "b g past v"] = state_field()
    landmark: Bool[Tensor, "b past"] = state_field()
    cached: Int[Tensor, " b"] = state_field()
    length: Int[Tensor, " b"] = state_field()
    marks: Float[Tensor, "b g blocks d"] | None = None
    """With `offload` the landmarks' keys of the complete blocks that hold a token, the newest last; k and v are there."""

    def select(self, indices: Int[Tensor, " rows"]) -> LandmarkState:
        return self._map(lambda t, _: t.index_select(0, indices.to(t.device)))

    def reset(self, rows: Bool[Tensor, " b"]) -> LandmarkState:
        def emptied(t: Tensor, fill: float) -> Tensor:
            marked = rows.to(t.device).view(-1, *[1] * (t.ndim - 1))
            return torch.where(marked, torch.full_like(t, fill), t)

        return self._map(emptied)

    def present(self) -> Bool[Tensor, "b past"]:
        """Slots that hold a token."""
        past = self.k.shape[2]
        return torch.arange(past, device=self.cached.device) >= past - self.cached[:, None]

    def ranks(self) -> Int[Tensor, "b past"]:
        """Rank of each slot's token in its sequence; -1 for an empty slot."""
        past = self.k.shape[2]
        rank = torch.arange(past, device=self.length.device) + (self.length[:, None] - past)
        return torch.where(self.present(), rank, -1)


def prepare(
    ids: Int[Tensor, "b n"],
    config: Config,
    *,
    landmark_id: int = 0,
    lengths: Int[Tensor, " b"] | None = None,
    phase: int | Int[Tensor, " b"] = 0,
) -> tuple[Int[Tensor, "b n2"], Int[Tensor, "b n2"]]:
    """Insert a landmark after every `config.block` tokens.

    What is inserted after a token is read together with it, so a stream may be cut anywhere.

    Args:
        ids: tokens, right-padded.
        config: gives the block length.
        landmark_id: id of the inserted tokens.
        lengths: valid tokens of each row; all when None.
        phase: tokens of the incomplete block that came before, from 0 to block - 1: the number of tokens read so far
            modulo `config.block`.

    Returns:
        ids and roles, right-padded with zeros; row r has ``lengths + (phase + lengths) // config.block`` valid ones.
    """
    batch, n = ids.shape
    size = config.block + 1
    before = torch.as_tensor(phase, device=ids.device).expand(batch)[:, None]
    if not torch.compiler.is_compiling() and batch and not 0 <= int(before.min()) <= int(before.max()) < config.block:
        raise Unsupported(
            f"phase from {int(before.min())} to {int(before.max())}",
            supported=f"0 to {config.block - 1}",
            nearest=f"phase % {config.block}",
        )
    longest = phase if isinstance(phase, int) else config.block - 1
    place = torch.arange(n + (longest + n) // config.block, device=ids.device)
    landmark = (before + place) % size == config.block
    token = place - (before + place) // size  # normal tokens of this call before each place
    valid = torch.full((batch, 1), n, device=ids.device) if lengths is None else lengths[:, None]
    inside = torch.where(landmark, token <= valid, token < valid)
    taken = F.pad(ids, (0, 1)).gather(1, token.clamp(max=n))
    prepared = torch.where(landmark, landmark_id, taken)
    return torch.where(inside, prepared, 0), torch.where(inside & landmark, int(Role.LANDMARK), int(Role.TOKEN))


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    miss: Float[Tensor, "g d"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the two levels of softmax one block after the other."""
    _check(call, miss)
    n, m = q.shape[2], k.shape[2]
    landmark = _landmarks(call, k)[:, None, None]  # (b, 1, 1, m)
    where = ranks(call, n, m, q.device)
    q, k = _rotated(call, q, k, where, landmark[:, 0, 0])
    controlled = _controlled(call, landmark, miss)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    visibility = Visibility(causal=call.pattern.causal and not call.pattern.cross)
    visible, added = masked_scores_bias(where, visibility, call.bias, call.position_bias, call.blocks, q.dtype)
    if call.pattern.cross and call.config.cache_blocks is not None:
        visible = visible & (_from_end(visible & landmark) <= call.config.cache_blocks)
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
            share = softmax(every)
            share = share.amax(1, keepdim=True) if call.config.selection == "max_over_heads" else share
            best = share.masked_fill(~every, -1.0).topk(min(call.config.top_k, m), -1).indices
            every = every & torch.zeros_like(scores, dtype=torch.bool).scatter(
                -1, best.expand(-1, q.shape[1], -1, -1), True
            )
        top = softmax(every & ~controlled)
        if miss is not None:
            column = _miss_scores(call, q, miss)[..., None]
            beside = torch.cat([scores.masked_fill(~(every & ~controlled), -torch.inf), column], -1).softmax(-1)
            top, share = beside[..., :-1], beside[..., -1:]
            top = top + _opened(call, share) * softmax(every & controlled)
        weights = top * local
        kept = _dropout(call).of_gates(scores.shape, q)
        top = top if kept is None else top * kept
        for gate, some in zip(gates, tokens, strict=True):
            weights = weights + (top * gate).sum(-1, keepdim=True) * softmax(some)
    return _dropout(call).of_weights(weights) @ v


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    miss: Float[Tensor, "g d"] | None = None,
) -> Result:
    _check(call, miss)
    if call.pattern.cross and call.config.bounded:
        return read(call.replace(state=absorb(call, k, v)), q)
    landmark = _landmarks(call, k)
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    q, k = _rotated(call, q, k, where, landmark)
    return _attend(call, q, k, v, landmark, where, miss)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    miss: Float[Tensor, "g d"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens, in chunks of `call.chunk_size`; also the step.

    The chunk size matters only where the past is not seen whole (`top_k`, `cache_blocks`).
    """
    _check(call, miss)
    if call.state is not None and (call.bias is not None or call.blocks is not None):
        raise Unsupported("landmark with a bias or a block mask beside a state", supported="whole calls")
    if call.config.position_jump and call.training:
        raise Unsupported("position_jump in training with a state", supported="whole calls")
    if miss is not None and call.training:
        raise Unsupported("a miss key in training with a state", supported="whole calls")
    if not call.config.bounded:
        return _continue(call, q, k, v, miss)
    n = q.shape[2]
    if n != k.shape[2] or call.lengths is not call.memory_lengths:
        raise Unsupported(
            "landmark with top_k or cache_blocks and other queries than keys", supported="one query for each key"
        )
    _check_plain(call)
    size = call.chunk_size or max(n, 1)
    outputs, state = [], call.state
    for start in range(0, max(n, 1), size):
        rows = slice(start, start + size)
        lengths = None if call.lengths is None else (call.lengths - start).clamp(0, min(size, n - start))
        part = call.replace(
            state=state,
            lengths=lengths,
            memory_lengths=lengths,
            roles=None if call.roles is None else call.roles[:, rows],
        )
        result = _continue(part, q[:, :, rows], k[:, :, rows], v[:, :, rows], miss)
        outputs.append(result.output)
        state = result.state
    return Result(torch.cat(outputs, 2), state)


def absorb(
    call: Call,
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    miss: Float[Tensor, "g d"] | None = None,
) -> LandmarkState:
    """Memory with its landmarks into a cache; more may follow."""
    _check(call, miss)
    return _append(_past(call, k, v), k, v, _landmarks(call, k), call.memory_lengths, call.config)


def read(call: Call, q: Float[Tensor, "b h n d"], miss: Float[Tensor, "g d"] | None = None) -> Result:
    """Queries on absorbed memory; with `top_k` each on the blocks that it chooses."""
    _check_miss(call, miss)
    _check_choice(call)
    state: LandmarkState = call.state
    if call.config.bounded:
        _check_plain(call)
    if call.config.top_k is not None and q.shape[2] and state.k.shape[2]:
        return Result(_read_blocks(call, q, state), state)
    where = _ranks(torch.arange(q.shape[2], device=q.device)[None], state.ranks())
    return _attend(call, q, state.k, state.v, state.landmark, where, miss, state)


def _check_miss(call: Call, miss: Tensor | None) -> None:
    if miss is not None and (call.pattern is not Pattern.CAUSAL_SELF or call.config.softmax != "grouped"):
        raise Unsupported(
            f"a miss key in {call.pattern.value} with softmax={call.config.softmax!r}",
            supported="causal-self with softmax='grouped'",
        )


def _check_choice(call: Call) -> None:
    """Refuse patterns and options in which no blocks can be chosen or dropped."""
    config: Config = call.config
    if call.pattern is Pattern.NONCAUSAL_SELF and config.bounded:
        raise Unsupported(
            "landmark with top_k or cache_blocks in noncausal-self, where nothing is cached",
            supported="causal-self and cross patterns",
            nearest="top_k=None, cache_blocks=None",
        )
    if call.pattern.cross and config.selection == "max_over_tokens":
        raise Unsupported(
            f"landmark with selection='max_over_tokens' in {call.pattern.value}",
            supported=" or ".join(SELECTIONS[:2]),
            nearest="selection='per_token_and_head'",
        )
    if call.pattern.cross and config.top_k is not None and config.softmax != "grouped":
        raise Unsupported(
            f"landmark with top_k and softmax={config.softmax!r} in {call.pattern.value}",
            supported="softmax='grouped'",
            nearest="top_k=None",
        )


def _check(call: Call, miss: Tensor | None) -> None:
    config: Config = call.config
    _check_miss(call, miss)
    _check_choice(call)
    if call.rotate is not None and call.pattern.cross:
        raise Unsupported(f"landmark that rotates in {call.pattern.value}", supported="queries and keys rotated before")
    if call.pattern.cross and call.roles is None and config.softmax == "grouped":
        raise Unsupported(
            f"landmark in {call.pattern.value} without roles of the keys, of which none could then be reached",
            supported="roles with a landmark after each block",
        )
    if config.position_jump and call.training and call.rotate is None:
        raise Unsupported("position_jump without rotary positions", supported="causal-self with rotary positions")


def _check_plain(call: Call) -> None:
    """Refuse what choosing among blocks, or dropping them, does not honour."""
    if call.bias is not None or call.blocks is not None or call.position_bias is not None or "weights" in call.want:
        raise Unsupported(
            "landmark with a bias, a block mask, position biases or weights under top_k or cache_blocks",
            supported="these with top_k=None and cache_blocks=None, or in causal-self without a state",
        )


def _landmarks(call: Call, k: Tensor) -> Bool[Tensor, "b m"]:
    batch, m = k.shape[0], k.shape[2]
    if call.roles is None:
        return torch.zeros(batch, m, dtype=torch.bool, device=k.device)
    return call.roles == int(Role.LANDMARK)


def _ranks(queries: Tensor, keys: Tensor) -> Ranks:
    return Ranks(queries, keys, offset=None, first=None, plain=False)


def _rotated(call: Call, q: Tensor, k: Tensor, where: Ranks, landmark: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their ranks, with the jumps of training at landmarks; unchanged without `rotate`."""
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


def _dropout(call: Call) -> Dropout:
    gates = call.config.group_dropout if call.training and call.config.softmax == "grouped" else 0.0
    return Dropout(call.dropout, gates, call.generator)


def _groups(call: Call, landmark: Tensor, where: Ranks) -> tuple[Ranks, Tensor, Tensor | None]:
    """Ranks, landmarks and own groups that the engine is given: without a second level, one group that is everyone's."""
    if call.config.softmax == "grouped":
        return where, landmark, None if call.pattern.cross else own_groups(where, landmark)
    if call.config.softmax == "ignore":
        where = Ranks(where.queries, torch.where(landmark, -1, where.keys), where.offset, where.first, plain=False)
    return where, torch.zeros_like(landmark), torch.zeros_like(where.queries)


def _attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmark: Tensor,
    where: Ranks,
    miss: Tensor | None,
    state: LandmarkState | None = None,
) -> Result:
    """Grouped softmax over the given keys."""
    if miss is not None and q.shape[2] and k.shape[2]:
        return _attend_missing(call, q, k, v, landmark, where, miss, state)
    output, weights = grouped_attention(
        q,
        k,
        v,
        *_groups(call, landmark, where),
        causal=call.pattern.causal and not call.pattern.cross,
        scale=call.scale,
        bias=call.bias,
        position_bias=call.position_bias,
        blocks=call.blocks,
        dropout=_dropout(call),
        want_weights="weights" in call.want,
        backend=call.backend,
    )
    return Result(output, state, extras={} if weights is None else {"weights": weights})


def _controlled(call: Call, landmark: Bool[Tensor, "..."], miss: Tensor | None) -> Bool[Tensor, "..."]:
    """Landmarks of a whole call that the miss key controls: in training, at random."""
    if miss is None or not call.training:
        return torch.zeros_like(landmark)
    draw = torch.rand(landmark.shape, generator=call.generator, device=landmark.device)
    return landmark & (draw < call.config.miss_share)


def _miss_scores(call: Call, q: Float[Tensor, "b h n d"], miss: Float[Tensor, "g d"]) -> Float[Tensor, "b h n"]:
    """Scores of the miss key, for rotated queries."""
    key = wide(miss)[None, :, None]  # (1, g, 1, d)
    if call.rotate is not None:
        key = call.rotate(key, torch.full((1, 1), -1, device=q.device))
    return (call.scale * product(wide(q), key.mT.expand(q.shape[0], -1, -1, -1)))[..., 0]


def _opened(call: Call, share: Float[Tensor, "b h n 1"]) -> Float[Tensor, "b h n 1"]:
    """The share that the weight of the miss key leaves to the blocks that it controls."""
    if call.training:
        return share
    return share.masked_fill(share < call.config.miss_cutoff, 0.0)


def _with_miss(
    call: Call, near: Float[Tensor, "b h n m"], apart: Float[Tensor, "b h n r"], scores: Float[Tensor, "b h n"]
) -> tuple[Float[Tensor, "b h n m"], Float[Tensor, "b h n r"]]:
    """Weights of the tokens beside the miss key and of those that it controls, from their logits and its scores."""
    weights = normalized(torch.cat([near, scores[..., None]], -1))
    return weights[..., :-1], _opened(call, weights[..., -1:]) * normalized(apart)


def _attend_missing(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmark: Tensor,
    where: Ranks,
    miss: Tensor,
    state: LandmarkState | None,
) -> Result:
    """Grouped softmax beside a miss key, which in training controls some landmarks."""
    controlled = _controlled(call, landmark[:, None, None], miss)[:, 0, 0]
    slots = torch.arange(k.shape[2], device=k.device)
    closing = torch.where(landmark, slots, k.shape[2] - 1).flip(-1).cummin(-1).values.flip(-1)
    group = landmark.cumsum(-1) - landmark.long()
    own = own_groups(where, landmark)
    step = max(1, PAIRS_AT_ONCE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    outputs, all_weights = [], []
    for start in range(0, q.shape[2], step):
        rows, mine = q[:, :, start : start + step], own[:, start : start + step]
        here = _ranks(where.queries[:, start : start + step], where.keys)
        found, factors = logits(
            rows,
            k,
            here,
            landmark,
            mine,
            causal=True,
            scale=call.scale,
            bias=None if call.bias is None else _rows(call.bias, start, step),
            position_bias=call.position_bias,
            blocks=call.blocks,
            dropout=_dropout(call),
        )
        apart = (controlled.gather(-1, closing)[:, None] & (group[:, None] != mine[..., None]))[:, None]
        near, far = (found.masked_fill(hidden, -torch.inf) for hidden in (apart, ~apart))
        weights, opened = _with_miss(call, near, far, _miss_scores(call, rows, miss))
        weights = weights + opened
        all_weights.append(weights if factors is None else weights * factors)
        outputs.append(product(_dropout(call).of_weights(all_weights[-1]), wide(v)).to(v.dtype))
    extras = {"weights": torch.cat(all_weights, 2)} if "weights" in call.want else {}
    return Result(torch.cat(outputs, 2), state, extras=extras)


def _rows(bias: Float[Tensor, "#b #h #n #m"], start: int, step: int) -> Float[Tensor, "#b #h #n #m"]:
    return bias if bias.shape[2] == 1 else bias[:, :, start : start + step]


class MissKey(Projection):
    """Gives a layer's heads their learned miss keys, when `miss` asks for them."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        if spec.config.miss and spec.pattern is not Pattern.CAUSAL_SELF:
            raise Unsupported(f"miss=True in {spec.pattern.value}", supported="causal-self", nearest="miss=False")
        self.miss = nn.Parameter(0.02 * torch.randn(spec.kv_heads, spec.head_dim)) if spec.config.miss else None

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        return heads if self.miss is None else heads | {"miss": self.miss}


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    sizes: dict[str, int] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests, without a miss key."""
    return normals(generator, attention_shapes(batch, n, m, {"h": 2, "g": 2, "d": 8, "v": 6} | (sizes or {})), dtype)


def _past(call: Call, k: Tensor, v: Tensor) -> LandmarkState:
    if call.state is not None:
        return call.state
    none = torch.zeros(k.shape[0], dtype=torch.long, device=k.device)
    landmark = torch.zeros(k.shape[0], 0, dtype=torch.bool, device=k.device)
    marks = None if call.config.offload is None else k[:, :, :0]
    return LandmarkState(_moved(k[:, :, :0], call), _moved(v[:, :, :0], call), landmark, none, none, marks)


def _moved(x: Tensor, call: Call) -> Tensor:
    """Where the cache is."""
    return x if call.config.offload is None else x.to(call.config.offload)


def _continue(call: Call, q: Tensor, k: Tensor, v: Tensor, miss: Tensor | None) -> Result:
    """One chunk: attend to the cache and the chunk, then cache the chunk."""
    config, past, landmark = call.config, _past(call, k, v), _landmarks(call, k)
    if config.top_k is not None and past.k.shape[2] > 0 and q.shape[2] > 0:
        state = _append(past, k, v, landmark, call.memory_lengths, config)
        return Result(_retrieve(call, q, k, v, landmark, past, miss), state)
    where = ranks(call, q.shape[2], k.shape[2], q.device, past.ranks(), past.length)
    new = _ranks(where.queries, where.keys[:, past.k.shape[2] :])
    q, rotated = _rotated(call, q, k, new, landmark)
    state = _append(past, rotated if config.top_k is None else k, v, landmark, call.memory_lengths, config)
    if config.bounded or call.memory_lengths is not None:
        # the state has lost what this call still sees, or has it in other slots
        keys = torch.cat([past.k.to(k.device), rotated.to(past.k.dtype)], 2)
        values = torch.cat([past.v.to(v.device), v.to(past.v.dtype)], 2)
        landmark = torch.cat([past.landmark, landmark], -1)
    else:
        keys, values, landmark = state.k, state.v, state.landmark
    return _attend(call, q, keys, values, landmark, where, miss, state)


def _append(
    past: LandmarkState, k: Tensor, v: Tensor, landmark: Tensor, lengths: Tensor | None, config: Config
) -> LandmarkState:
    """The cache with new tokens, and without the oldest blocks when it is full."""
    batch, m = k.shape[0], k.shape[2]
    new = torch.full((batch,), m, device=k.device) if lengths is None else lengths
    keys, values = append(past.k, k.to(past.k), 2), append(past.v, v.to(past.v), 2)
    flags = append(past.landmark, landmark, 1)
    if lengths is not None and flags.shape[1]:
        # Move each row to the right over its padding, so that tokens stay next to each other.
        index = torch.arange(flags.shape[1], device=k.device) - (m - lengths)[:, None]
        first = index.clamp(min=0)
        keys, values = (take(x, first.to(x.device)) for x in (keys, values))
        # The first slot is copied over the slots that become empty: a landmark there must not count again.
        flags = flags.gather(1, first) & (index >= 0)
    state = LandmarkState(keys, values, flags, past.cached + new, past.length + new)
    if not config.bounded:
        return state
    if past.marks is not None:
        state = dataclasses.replace(state, marks=_marked(past, k, state, new, config))
    _check_blocks(state, config)
    if config.cache_blocks is None:
        return state
    kept = _from_end(state.landmark) <= config.cache_blocks
    most = config.cache_blocks * (config.block + 1) + config.block
    return LandmarkState(
        state.k[:, :, -most:],
        state.v[:, :, -most:],
        (state.landmark & kept)[:, -most:],
        (state.present() & kept).sum(-1),
        state.length,
        state.marks,
    )


def _closes(state: LandmarkState) -> Bool[Tensor, "b past"]:
    """Landmarks that close a block with a token; one right after another, or before any token, closes nothing."""
    token = state.present() & ~state.landmark
    return state.landmark & F.pad(token[:, :-1], (1, 0))


def _marked(
    past: LandmarkState, k: Tensor, state: LandmarkState, new: Tensor, config: Config
) -> Float[Tensor, "b g blocks d"]:
    """Keys of the landmarks that close a block, with those of the `new` tokens, which are the last ones of `state`."""
    assert past.marks is not None
    m, slots = k.shape[2], state.k.shape[2]
    if m == 0:
        return past.marks
    blocks = min(past.marks.shape[2] + (m + 1) // 2, _most_blocks(slots, config))
    closes = _closes(state)
    fresh = closes & (torch.arange(slots, device=k.device) >= slots - new[:, None])
    added = fresh.sum(-1)  # of each row
    column = torch.arange(blocks, device=k.device) - (
        blocks - added[:, None]
    )  # among the new ones; negative: an old one
    order = fresh.int().argsort(dim=-1, descending=True, stable=True)  # slots of the new ones first
    slot = order.gather(1, column.clamp(min=0).clamp(max=slots - 1)) - (slots - new[:, None])  # place in k
    old = past.marks.shape[2] + column  # place among the old ones
    both = torch.cat([past.marks, k.to(past.marks.dtype)], 2)
    index = torch.where(column >= 0, past.marks.shape[2] + slot.clamp(min=0, max=m - 1), old.clamp(min=0))
    return both.gather(2, index[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3]))


def _from_end(ends: Bool[Tensor, "b past"]) -> Int[Tensor, "b past"]:
    """Ends of blocks in or after each slot: 0 in the incomplete block, 1 in the newest complete block, and so on."""
    return ends.long().flip(-1).cumsum(-1).flip(-1)


def _most_blocks(past: int, config: Config) -> int:
    """Most complete blocks among `past` slots."""
    return past // (config.block + 1) + 1 if config.cache_blocks is None else min(config.cache_blocks, past)


def _check_blocks(state: LandmarkState, config: Config) -> None:
    past = state.k.shape[2]
    if torch.compiler.is_compiling() or state.landmark.numel() == 0:
        return
    slots = torch.arange(past, device=state.landmark.device)
    ends = torch.where(state.landmark, slots, -1).cummax(-1).values
    ends = torch.maximum(F.pad(ends[:, :-1], (1, 0), value=-1), (past - 1) - state.cached[:, None])
    tokens = torch.where(state.present() & ~state.landmark, slots - ends, 0)
    longest = int(tokens.max())
    if longest > config.block:
        raise Unsupported(
            f"a block of {longest} tokens or more with block={config.block} and top_k or cache_blocks",
            supported="a landmark after each block",
            nearest=f"block={longest}",
        )
    if config.cache_blocks is None and int(state.landmark.sum(-1).max()) > _most_blocks(past, config):
        raise Unsupported(
            f"blocks of fewer than block={config.block} tokens with top_k={config.top_k}",
            supported="fewer tokens in the first block only, or any number of them with cache_blocks",
        )


def _retrieve(
    call: Call, q: Tensor, k: Tensor, v: Tensor, landmark: Tensor, past: LandmarkState, miss: Tensor | None
) -> Float[Tensor, "b h t v"]:
    """Grouped softmax over the blocks that each token and head retrieves, the incomplete block and the chunk."""
    config: Config = call.config
    batch, _, t = q.shape[:3]
    size, slots, top_k = config.block + 1, past.k.shape[2], config.top_k
    assert top_k is not None
    blocks = _cached_blocks(call, past)
    unfinished = past.present() & (_from_end(past.landmark) == 0)
    chunk_start = blocks.count.clamp(max=top_k + 1) * size + unfinished.sum(-1)

    width = min(slots, config.block)
    near = torch.arange(width + t, device=q.device)
    exists = torch.ones(batch, t, dtype=torch.bool, device=q.device)
    if call.memory_lengths is not None:
        exists = near[:t] < call.memory_lengths[:, None]
    exists = torch.cat([unfinished[:, slots - width :], exists], -1)
    near_keys = torch.cat([past.k[:, :, slots - width :].to(q.device), k.to(past.k.dtype)], 2)
    near_values = torch.cat([past.v[:, :, slots - width :].to(q.device), v.to(past.v.dtype)], 2)
    near_landmark = torch.cat([torch.zeros_like(unfinished[:, slots - width :]), landmark], -1)
    key_ranks = torch.where(exists, near, -1)
    q = wide(q)
    if call.rotate is not None:
        positions = (chunk_start[:, None] - width + near).clamp(min=0)
        q, near_keys = call.rotate(q, positions[:, width:]), call.rotate(wide(near_keys), positions)

    chosen = _chosen(call, q, blocks)
    together = config.selection == "max_over_tokens"
    far = _gathered(call, chosen, past, blocks) if together else None
    step = t if together else _at_once(call, q, v, chosen)
    outputs = []
    for start in range(0, t, step):
        rows = q[:, :, start : start + step]
        here = _ranks(near[None, width + start : width + start + rows.shape[2]], key_ranks)
        close_logits, factors = logits(
            rows,
            near_keys,
            *_groups(call, near_landmark, here),
            causal=True,
            scale=call.scale,
            bias=None,
            position_bias=None,
            blocks=None,
            dropout=_dropout(call),
        )
        taken = _gathered(call, chosen[:, :, start : start + step], past, blocks) if far is None else far
        far_logits, far_factors = _far_logits(call, rows, taken)
        if miss is None:
            weights = normalized(torch.cat([far_logits, close_logits], -1))
        else:
            beside, apart = _with_miss(call, close_logits, far_logits, _miss_scores(call, rows, miss))
            weights = torch.cat([apart, beside], -1)
        if factors is not None and far_factors is not None:
            weights = weights * torch.cat([far_factors, factors], -1)
        weights = _dropout(call).of_weights(weights)
        distant, close = weights.split([far_logits.shape[-1], close_logits.shape[-1]], -1)
        output = taken.read(distant) + product(close, wide(near_values))
        outputs.append(output.to(v.dtype))
    return torch.cat(outputs, 2)


def _read_blocks(call: Call, q: Tensor, memory: LandmarkState) -> Float[Tensor, "b h n v"]:
    """Grouped softmax over the blocks of a memory that each query and head chooses."""
    blocks = _cached_blocks(call, memory)
    q = wide(q)
    chosen = _chosen(call, q, blocks)
    outputs = []
    for rows, block in zip(*(x.split(_at_once(call, q, memory.v, chosen), 2) for x in (q, chosen)), strict=True):
        taken = _gathered(call, block, memory, blocks)
        found, factors = _far_logits(call, rows, taken)
        weights = normalized(found) if factors is None else normalized(found) * factors
        outputs.append(taken.read(_dropout(call).of_weights(weights)).to(memory.v.dtype))
    return torch.cat(outputs, 2)


def _at_once(call: Call, q: Tensor, v: Tensor, chosen: Tensor) -> int:
    """Queries whose retrieved keys and values are gathered at once."""
    numbers = q.shape[0] * q.shape[1] * chosen.shape[-1] * (call.config.block + 1) * max(q.shape[3], v.shape[3])
    return max(1, min(q.shape[2], NUMBERS_AT_ONCE // max(numbers, 1)))


@dataclass(frozen=True)
class _CachedBlocks:
    """The complete blocks of a cache that hold a token, in order of time: the newest is the last column.

    Attributes:
        count: how many there are.
        ends: slot of each one's landmark.
        exists: whether a column is a block; there may be fewer blocks than columns.
        keys: landmark keys, rotated for scoring.
        column: column of each slot's block.
        member: whether a slot holds a token of its block, or its landmark.
    """

    count: Int[Tensor, " b"]
    ends: Int[Tensor, "b blocks"]
    exists: Bool[Tensor, "b blocks"]
    keys: Float[Tensor, "b g blocks d"]
    column: Int[Tensor, "b past"]
    member: Bool[Tensor, "b past"]


def _cached_blocks(call: Call, past: LandmarkState) -> _CachedBlocks:
    config: Config = call.config
    assert config.top_k is not None
    slots, size = past.k.shape[2], config.block + 1
    blocks = _most_blocks(slots, config)
    closes = _closes(past)
    count, column = closes.sum(-1), blocks - _from_end(closes)
    named = torch.where(closes & (column >= 0), column, blocks)  # slots that end no block go to an extra column
    where = torch.arange(slots, device=named.device).expand_as(named)
    ends = named.new_zeros(named.shape[0], blocks + 1).scatter(1, named, where)[:, :blocks]
    number = torch.arange(blocks, device=named.device)
    if past.marks is None:
        keys = wide(past.k.gather(2, ends[:, None, :, None].expand(-1, past.k.shape[1], -1, past.k.shape[3])))
    else:
        keys = wide(F.pad(past.marks, (0, 0, blocks - past.marks.shape[2], 0)))  # a negative pad cuts the oldest
    if call.rotate is not None:
        place = (number - blocks + count.clamp(max=config.top_k + 1)[:, None]).clamp(min=0)
        keys = call.rotate(keys, place * size + config.block)
    return _CachedBlocks(
        count, ends, number >= blocks - count[:, None], keys, column, (past.present() & ~past.landmark) | closes
    )


def _chosen(call: Call, q: Float[Tensor, "b h t d"], cached: _CachedBlocks) -> Int[Tensor, "b h #t k"]:
    """Columns of the blocks that are retrieved, in order of time; -1 where there are fewer."""
    config: Config = call.config
    assert config.top_k is not None
    scores = (call.scale * product(q, cached.keys.mT)).detach()
    scores = scores.masked_fill(~cached.exists[:, None, None], -torch.inf)
    if config.selection != "per_token_and_head":
        scores = torch.where(cached.exists[:, None, None], normalized(scores), -torch.inf)
        if config.selection == "max_over_heads":
            scores = scores.amax(1, keepdim=True).expand(-1, q.shape[1], -1, -1)
        else:
            valid = call.valid_keys(q.shape[2])
            seen = scores if valid is None else scores.masked_fill(~valid[:, None, :, None], 0.0)
            scores = torch.where(cached.exists[:, None, None], seen, -torch.inf).amax(2, keepdim=True)
    best = scores.topk(min(config.top_k, scores.shape[-1]), -1)
    return torch.where(best.values != -torch.inf, best.indices, -1).sort(-1).values


@dataclass(frozen=True)
class _Gathered:
    """Tokens of retrieved blocks, on the device of the call.

    Attributes:
        keys, values: placed keys, and values; the axis of queries has size 1 where all retrieve the same.
        inside: whether a place holds a token of its block, or its landmark, which is the last.
        found: whether there is a block.
    """

    keys: Float[Tensor, "b h #t k size d"]
    values: Float[Tensor, "b h #t k size v"]
    inside: Bool[Tensor, "b h #t k size"]
    found: Bool[Tensor, "b h #t k"]

    def scores(self, q: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t k size"]:
        keys = self.keys.flatten(3, 4)
        found = q @ keys[:, :, 0].mT if keys.shape[2] == 1 else (keys @ q[..., None])[..., 0]
        return found.unflatten(-1, self.keys.shape[3:5])

    def read(self, weights: Float[Tensor, "b h t r"]) -> Float[Tensor, "b h t v"]:
        values = self.values.flatten(3, 4)
        if values.shape[2] == 1:
            return weights @ wide(values[:, :, 0])
        return (weights[..., None, :] @ wide(values))[..., 0, :]


def _gathered(call: Call, block: Int[Tensor, "b h #t k"], past: LandmarkState, cached: _CachedBlocks) -> _Gathered:
    """The tokens of the chosen blocks, in the places that they take."""
    config: Config = call.config
    assert config.top_k is not None
    blocks, size, chosen = cached.ends.shape[1], config.block + 1, block.shape[-1]
    found, block = block >= 0, block.clamp(min=0)
    row = torch.arange(block.shape[0], device=block.device)[:, None, None, None]
    within = torch.arange(size, device=block.device)
    slot = cached.ends[row, block][..., None] + (within - config.block)  # (b, h, t, k, size)
    inside = (slot >= 0) & found[..., None]
    slot = slot.clamp(min=0)
    row = row[..., None]
    inside = inside & cached.member[row, slot] & (cached.column[row, slot] == block[..., None])
    head = torch.arange(block.shape[1], device=block.device) // (block.shape[1] // past.k.shape[1])
    place = [index.to(past.k.device) for index in (row, head[None, :, None, None, None], slot)]
    keys, values = (x[tuple(place)].to(block.device) for x in (past.k, past.v))  # (b, h, t, k, size, d)
    keys = wide(keys)
    if call.rotate is not None:
        order = config.top_k - chosen + torch.arange(chosen, device=block.device)
        newest = (block >= blocks - config.top_k).long()
        count = cached.count[:, None, None, None]
        at = torch.where(count <= config.top_k, block - blocks + count, order + newest).clamp(min=0)
        positions = at[..., None] * size + within
        flat = call.rotate(keys.flatten(3, 4).flatten(0, 2)[:, None], positions.flatten(3, 4).flatten(0, 2))
        keys = flat[:, 0].view(keys.shape)
    if config.softmax != "plain":
        inside = torch.cat([inside[..., :-1], torch.zeros_like(inside[..., -1:])], -1)
    return _Gathered(keys, values, inside, found)


def _far_logits(
    call: Call, q: Float[Tensor, "b h t d"], taken: _Gathered
) -> tuple[Float[Tensor, "b h t r"], Float[Tensor, "b h t r"] | None]:
    """Logits of the tokens of retrieved blocks, for each query and head; factors when gates are dropped."""
    config: Config = call.config
    scores, inside = call.scale * taken.scores(q), taken.inside
    if config.softmax != "grouped":
        return scores.masked_fill(~inside, -torch.inf).flatten(3), None
    gate = scores[..., -1:]
    total = torch.where(inside | ~taken.found[..., None], scores, -torch.inf).logsumexp(-1, keepdim=True)
    found = torch.where(inside, scores - total + gate, -torch.inf)
    kept = _dropout(call).of_gates(gate.shape, q)
    return found.flatten(3), None if kept is None else kept.expand_as(found).flatten(3)


def cost(shape: Shape, config: Config) -> Cost:
    pairs = shape.batch * shape.heads * shape.n * shape.m
    width = shape.dim_key + shape.dim_value
    size = config.block + 1
    past = shape.m if config.cache_blocks is None else min(shape.m, config.cache_blocks * size + config.block)
    attended, scored = past, 0
    if config.top_k is not None:
        scored = past // size
        attended = min(past, config.top_k * size + config.block)
    step = shape.batch * shape.heads * (attended * width + scored * shape.dim_key)
    return Cost(
        flops=2.0 * pairs * width,
        memory=3.0 * shape.batch * shape.heads * (shape.n + shape.m),
        state=float(shape.heads * past * width),
        step_flops=2.0 * step,
    )


def sample_context(generator: torch.Generator, *, batch: int, n: int, m: int, pattern: Pattern) -> Tensors:
    """Roles (batch, m) with landmarks at random places: blocks of all lengths, empty ones and unfinished ones."""
    return {"roles": (torch.rand(batch, m, generator=generator) < 0.25).long() * int(Role.LANDMARK)}


WHOLE_PAST = {"top_k": None, "cache_blocks": None, "selection": SELECTIONS[0], "offload": None}
"""Options under which a continued sequence sees all of its past."""

RETRIEVING = ("retrieved", "one set for all heads", "one set for all tokens", "miss key", "bounded, retrieved")
BOUNDED = (*RETRIEVING, "bounded cache")


def _waiver(name: str, reason: str) -> Waiver:
    return Waiver(name, reason, holds_with=WHOLE_PAST, patterns=(Pattern.CAUSAL_SELF,), variants=BOUNDED)


MECHANISM = Mechanism(
    name="landmark",
    aliases=("landmark_attention", "grouped_softmax"),
    kind=Kind.ATTENTION,
    summary="A landmark token after each block gates attention to the block, and later finds it in a cache.",
    paper=Paper("Landmark Attention: Random-Access Infinite Context Length for Transformers", "2305.16300", 2023, 9),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "miss?": "gd"},
    patterns=ALL_PATTERNS,
    forms={
        "reference": reference,
        "parallel": parallel,
        "chunked": chunked,
        "step": chunked,
        "absorb": absorb,
        "read": read,
    },
    config=Config,
    variants={
        "small blocks": {"block": 3},
        "retrieved": {"block": 100, "cache_blocks": 50, "top_k": 2},
        "one set for all heads": {"block": 100, "cache_blocks": 50, "top_k": 2, "selection": "max_over_heads"},
        "one set for all tokens": {
            "block": 100,
            "cache_blocks": 50,
            "top_k": 2,
            "selection": "max_over_tokens",
            "offload": "cpu",
        },
        "bounded cache": {"block": 100, "cache_blocks": 3},
        "bounded, retrieved": {"block": 100, "cache_blocks": 3, "top_k": 2},
        "landmarks ignored": {"block": 3, "softmax": "ignore"},
        "landmarks as tokens": {"block": 3, "softmax": "plain"},
        "miss key": {"block": 100, "cache_blocks": 50, "top_k": 2, "miss": True, "miss_share": 0.3, "miss_cutoff": 0.1},
        "in training": {"block": 3, "group_dropout": 0.2, "position_jump": 5},
    },
    variant_patterns={
        "miss key": (Pattern.CAUSAL_SELF,),
        "one set for all tokens": (Pattern.CAUSAL_SELF,),
        **dict.fromkeys(
            ("retrieved", "one set for all heads", "bounded cache", "bounded, retrieved"),
            (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS),
        ),
    },
    engine="grouped_attention",
    state=LandmarkState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "roles", "rotate"}),
    refused_positions="retrieved blocks take places that a bias on ranks does not know",
    weights="exact",
    sample_inputs=sample_inputs,
    sample_context=sample_context,
    projection=MissKey,
    prepare=prepare,
    waivers=(
        Waiver("layer_lengths", "its number of blocks is a constant of the program"),
        Waiver("layer_onnx", "ONNX has no binary search"),
        _waiver("chunk_size", "a chunk sees itself whole, but of the blocks before it only those it retrieves"),
        _waiver("step", "a step retrieves among all complete blocks, a whole call attends to all of them"),
        _waiver("split_resume", "what comes after a split retrieves blocks that the whole call attends to"),
        _waiver("packing", "documents that continue retrieve blocks that a whole call attends to"),
        _waiver("layer_decoding", "a step retrieves among all complete blocks, a whole call attends to all of them"),
        Waiver("state_dtype", "the cache grows until it holds `cache_blocks` blocks", variants=BOUNDED),
        Waiver(
            "pair_masks",
            "blocks that a mask hides in part cannot be chosen by their landmarks",
            patterns=(Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS),
            variants=BOUNDED,
        ),
    ),
)
