r"""Landmark attention: a landmark token after each block gates attention to it, and later retrieves it from a cache.

When to pick it: to use a context far longer than the one trained on, with a bounded number of attended tokens for each
query and every past token still reachable.
When not: short sequences (plain softmax is cheaper: landmarks lengthen the sequence by one token per block), or when
the state must not grow (`cache_blocks` bounds it by dropping the oldest blocks).

Definition (Mohtashami and Jaggi, arXiv 2305.16300, sections 3.1-3.3). A landmark belongs to the block that it ends.
With S = tau Q K^T, for query i in block b, over visible keys:

    t_i   = softmax of S_i over { normal tokens of block b } and { landmarks of the other blocks that hold tokens }
    u_i^c = softmax of S_i over the normal tokens of block c,             for each other block c
    W_ij  = t_ij                      for normal j in block b
          = t_{i,landmark(c)} u_ij^c  for normal j in another block c
          = 0                         for landmarks,                      O = W V

Rows sum to 1, except that a query without keys gives 0. The fast forms compute the same weights with one softmax: with
LSE_ic the log-sum-exp of S_i over the normal tokens of block c, W_i = softmax over normal tokens of S_ij + C_ij, where
C_ij = S_{i,landmark(c)} - LSE_ic for j in another block c, and 0 for j in the query's own block.

- A query never attends to the landmark of its own block, and a landmark never attends to itself: a landmark query reads
  its block's tokens and the earlier blocks.
- causal-self: the other blocks are the earlier ones. noncausal-self: all others. Cross patterns: all blocks of the
  memory are gated; tokens after its last landmark cannot be reached, so end the memory with a landmark.
- If the query sees no token of a block (the block is empty, or hidden by a bias), it does not see the block's landmark
  either; if a block's landmark is hidden, so are its tokens.

Retrieval (section 3.3; causal-self with a state, `top_k` = k): the state keeps keys before rotation, values, and which
tokens are landmarks. A call is processed as one chunk, or in chunks of `chunk_size` (an argument of the call) or
`chunk` (an option). Each token and head attends to the k blocks with the highest landmark scores among the complete
blocks cached before the chunk, together with the incomplete block and the chunk. `selection` can make the choice joint:
with the softmax of a token's and head's scores over the landmarks, it takes the k blocks with the largest maximum over
the heads, or over the tokens of the chunk. The latter lets later tokens of a chunk influence which blocks an earlier
one sees; `offload` needs it, so that few blocks are moved per chunk. With rotary positions, blocks occupy slots of
`block` + 1 positions instead of their distant true positions: for scoring, the k newest blocks have slots 1 to k and
older ones slot 0; the m-th chosen block in temporal order (from 0) has slot m, or m + 1 if it is one of the k newest;
the incomplete block follows at slot k + 1. While no more than k blocks are cached, slots are true positions. So
positions never exceed (k + 1)(`block` + 1) + `block` + chunk.

Ties: in the first layer of a model all landmarks have the same embedding and so, but for rounding, the same key before
rotation, and older blocks share slot 0. Among blocks that tie, the newest are chosen. Scores are ties if they differ from
the lowest one that is high enough by no more than rounding may: 16 units in the last place of the product of the lengths
of the query and of the longest landmark key (:func:`regard.engines.retrieved_attention.problem.tolerance`), in joint choices
of the logarithms of the shares likewise. So neither the other rows of a batch nor padding nor the engine decides.

In cross patterns each query and head chooses k blocks of the memory (of its newest `cache_blocks`), both in whole calls
and from a state, by keys at their true positions. `max_over_tokens` is refused there: queries read one by one would see
other blocks than queries read together.
noncausal-self has no retrieval: each call sees its whole sequence and leaves no state.

Miss token (from the authors' code, later than the paper): a key, the same for all queries and rotated as at position
-1, whose score r_i joins the softmax t_i. The landmarks C that it controls leave t_i for a separate softmax,

    z_i = softmax of S_i over C,     the gate of c in C: t_{i,miss} z_ic,

so that a query which needs none of these blocks can lower t_{i,miss}. Rows sum to 1, or to 1 - t_{i,miss} if C is
empty. The miss token controls the landmarks of retrieved blocks and, in training, each landmark with probability
`miss_share`; outside training a t_{i,miss} below `miss_cutoff` is set to 0, which closes all these gates.

| paper | here |
|---|---|
| context miss token; t_{i,miss} | `miss` (G, D), one key per head, learned by the layer with `miss=True`; its weight |
| block length l_block | `block`: normal tokens before each landmark |
| k retrieved blocks | `top_k`; None attends to all cached blocks, which is W above |
| memory size (cache of blocks) | `cache_blocks`; the oldest complete block is dropped first; None keeps all |
| landmark token | `roles == Role.LANDMARK`; :func:`prepare` inserts them |
| GroupedSoftmax | `softmax="grouped"`; "ignore" hides landmarks, "plain" treats them as normal tokens |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). `roles` (B, M) belongs to the keys. Blocks
may have any length in whole calls that attend to all of them; with `top_k` a block has exactly `block` tokens (the
first of a sequence may have fewer), and with `cache_blocks` at most `block`.
Deviations: noncausal and cross patterns are not in the paper. Blocks without a visible token lose their landmark; the
original code lets an empty block keep its share, so that rows sum to less than 1. The miss token's key is a parameter
of the layer; in the original it is the key of a token that attends to nothing in any layer, which is a constant too.
The original may also control landmarks of the chunk outside training. Models always exclude inserted tokens from the
loss; the original has an option. Models initialise the embedding of a landmark like any other; the new token that
`regard retrofit` adds to a pretrained vocabulary starts as the mean of the existing embeddings, as the authors' does.
The authors leave ties to the order in which scores are sorted.
`group_dropout` drops gates (except that of the own block), and `position_jump` adds a random number below it to the
positions after each landmark; both act in training only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    ALL_PATTERNS,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Role,
    Shape,
    Tensors,
    TrainedModel,
    Unsupported,
    Waiver,
)
from regard.core.sampling import attention_shapes, normals
from regard.mechanisms.landmark.cache import LandmarkState
from regard.mechanisms.landmark.definition import SELECTIONS, Config, reference
from regard.mechanisms.landmark.forms import absorb, chunked, parallel, read
from regard.mechanisms.landmark.layer import MissKey

if TYPE_CHECKING:
    from jaxtyping import Int


def prepare(
    ids: Int[Tensor, "b n"],
    config: Config,
    *,
    landmark_id: int = 0,
    lengths: Int[Tensor, " b"] | None = None,
    phase: int | Int[Tensor, " b"] = 0,
) -> tuple[Int[Tensor, "b n2"], Int[Tensor, "b n2"]]:
    """Insert a landmark after every `config.block` tokens.

    A landmark stays in the same call as the token before it, so a stream may be split anywhere.

    Args:
        ids: tokens, right-padded.
        config: provides the block length.
        landmark_id: id of the inserted tokens.
        lengths: number of valid tokens in each row; all when None.
        phase: tokens already read of the incomplete block, from 0 to block - 1: the number of tokens read so far
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
    token = place - (before + place) // size  # number of normal tokens of this call before each place
    valid = torch.full((batch, 1), n, device=ids.device) if lengths is None else lengths[:, None]
    inside = torch.where(landmark, token <= valid, token < valid)
    taken = F.pad(ids, (0, 1)).gather(1, token.clamp(max=n))
    prepared = torch.where(landmark, landmark_id, taken)
    return torch.where(inside, prepared, 0), torch.where(inside & landmark, int(Role.LANDMARK), int(Role.TOKEN))


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


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of all pairs, as in training; with `top_k`, step and state are those of retrieval."""
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
        state=float(shape.heads * (past * width + scored * shape.dim_key)),  # plus the landmarks of complete blocks
        step_flops=2.0 * step,
    )


def sample_context(generator: torch.Generator, *, batch: int, n: int, m: int, pattern: Pattern) -> Tensors:
    """Roles (batch, m) with landmarks at random places: blocks of all lengths, empty ones and unfinished ones."""
    return {"roles": (torch.rand(batch, m, generator=generator) < 0.25).long() * int(Role.LANDMARK)}


def in_trained_models(model: TrainedModel) -> dict[str, Any]:
    """Options of retrieval at positions within those of training, with up to four blocks, as in the paper.

    Raises:
        Unsupported: for given options with which positions exceed the length of training.
    """
    if model.given.get("top_k", 1) is None:
        return {}
    named = [name for name in ("block", "top_k", "chunk") if model.given.get(name) is not None]
    fitted = [
        _fitted(model.length, {name: model.given[name] for name in named[:kept]}) for kept in range(len(named), -1, -1)
    ]
    reached = _reached(**fitted[0])
    if reached > model.length:
        fitting = [_written({**model.given, **options}) for options in fitted if _reached(**options) <= model.length]
        raise Unsupported(
            f"{_written(fitted[0])} in a model trained on texts of {model.length} tokens, which would read positions up to "
            f"{reached}",
            supported=f"(top_k + 1)(block + 1) + block + chunk of at most {model.length}",
            nearest=" or ".join([*fitting[:1], f"length={reached}"]),
        )
    return fitted[0]


def _fitted(length: int, given: Mapping[str, int]) -> dict[str, int]:
    """The given options and others, within a length if that is possible."""
    block = given.get("block", min(64, max(4, length // 16)) - 1)

    def room(top_k: int) -> int:
        return length - _reached(block, top_k, 0)

    wanted = given.get("chunk", block + 1)
    top_k = given.get("top_k", next((k for k in (4, 3, 2) if room(k) >= wanted), 1))
    return {"block": block, "top_k": top_k, "chunk": given.get("chunk", room(top_k) if room(top_k) > 0 else wanted)}


def _reached(block: int, top_k: int, chunk: int) -> int:
    """The number of positions that retrieval may use."""
    return (top_k + 1) * (block + 1) + block + chunk


def _written(options: Mapping[str, Any]) -> str:
    return "landmark:" + ",".join(f"{name}={value}" for name, value in options.items())


def most_positions(config: Config) -> int | None:
    """The number of positions in use, however long the sequence is; None if tokens are read where they are."""
    if config.top_k is None or config.chunk is None:
        return None
    return _reached(config.block, config.top_k, config.chunk)


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
        "one set for all heads": {
            "block": 100,
            "cache_blocks": 50,
            "top_k": 2,
            "selection": "max_over_heads",
            "chunk": 1000,
        },
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
        "dropped groups": {"block": 3, "group_dropout": 0.2},
        "jumps of positions": {"block": 3, "position_jump": 5, "positions": "rotary"},
    },
    variant_patterns={
        "miss key": (Pattern.CAUSAL_SELF,),
        "jumps of positions": (Pattern.CAUSAL_SELF,),
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
    refused_positions="retrieved blocks take positions that a bias on ranks does not know",
    weights="exact",
    sample_inputs=sample_inputs,
    sample_context=sample_context,
    projection=MissKey,
    prepare=prepare,
    in_trained_models=in_trained_models,
    most_positions=most_positions,
    waivers=(
        Waiver("layer_lengths", "its number of blocks is fixed when the program is compiled"),
        _waiver("chunk_size", "a chunk sees itself whole, but of the blocks before it only those it retrieves"),
        _waiver("step", "a step retrieves among all complete blocks, a whole call attends to all of them"),
        _waiver("split_resume", "what comes after a split retrieves blocks that the whole call attends to"),
        _waiver("packing", "documents that continue retrieve blocks that a whole call attends to"),
        _waiver("layer_decoding", "a step retrieves among all complete blocks, a whole call attends to all of them"),
        _waiver("layer_ragged", "a step retrieves among all complete blocks, a whole call attends to all of them"),
        Waiver("state_dtype", "the cache grows until it holds `cache_blocks` blocks", variants=BOUNDED),
        Waiver(
            "pair_masks",
            "blocks that a mask hides in part cannot be chosen by their landmarks",
            patterns=(Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS),
            variants=BOUNDED,
        ),
    ),
)


__all__ = [
    "BOUNDED",
    "MECHANISM",
    "RETRIEVING",
    "SELECTIONS",
    "WHOLE_PAST",
    "Config",
    "LandmarkState",
    "MissKey",
    "absorb",
    "chunked",
    "cost",
    "most_positions",
    "parallel",
    "prepare",
    "read",
    "reference",
    "sample_context",
    "sample_inputs",
]
