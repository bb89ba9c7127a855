r"""Positional attention: the weight of a pair depends on its positions alone; only values carry content.

When to pick it: numeric and algorithmic regression of bounded length, where the route of data does not depend on the data
(prefix sums, sorting networks, tournaments), above all when test values are larger than training values.
When not: lookup, parsing, or anything whose route depends on content; lengths beyond the table, which it has no rows for.

Definition (Back de Luca et al., arXiv 2410.01686), for a head with positional encodings P, the same in all rows:

    Q = P W_Q + b_Q,   K = P W_K + b_K,   A = softmax(Q K^T / sqrt(D)),   O = A V

A has no batch axis, and O is linear in V: up to 2^15 pairs A is computed once for all rows; beyond, where reading a stored
matrix costs more than making its weights again, by the kernels of softmax attention, row by row. In causal-self A is masked before the
softmax; in cross patterns queries have the positions of their sequence and keys those of the memory.

| paper | here |
|---|---|
| P, F features wide | `encodings` (S, F): a row for each of S positions; sinusoids at any position when absent |
| W_Q, W_K, b_Q | `query_map`, `key_map` (H, F, D), `query_bias` (H, D); b_K adds the same to all scores of a query |
| P of a layer | `encoding`: one-hot in the paper, which fixes the longest length; sinusoidal, which does not, by default |
| d_k = width of P for each head | `key_width="encoding"`; ``"split"`` divides it between the heads |

Layout: (B, H, N, D). The position of a token is its rank among the valid tokens of its row; one without a row of P is
refused. `slots` (B, N), whose values are not read, says how many outputs are wanted where they are not as many as keys. The
paper's extra node, which keeps its row whatever the length, is put first here, not last. The scale multiplies D^-0.5 (1 by
default). Scores are computed as (Q W_K^T) P^T, so that no key is ever projected, and the state holds values only. With
padding in noncausal patterns the weights are those of each row, since its padding must not be counted.
Hybrid heads: `content_query` and `content_key` (B, C, N, E) are queries and keys of C further heads of softmax attention, the
last of V's heads; `content_heads` in a layer.

The paper's layer concatenates, MLP([x ; W_O O]), in place of a residual and a norm, and with no bias anywhere it is
positively homogeneous: f(a x) = a f(x). That is what carries over to larger values, and what a norm, or P in the values,
destroys. The network is in `regard/reproductions/positional_attention.py` alone, since it replaces the block around a
mechanism, which models here share among all mechanisms.

Deviations: each layer has encodings of its own, where they are learned. Maps start as in the paper, the other projections
as those of all layers here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    BlockMask,
    Call,
    Cost,
    Kind,
    LayerSpec,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    Tensors,
    Unsupported,
    at_least,
    one_of,
)
from regard.core.precision import wide, wide_dtype, without_autocast
from regard.core.visibility import DistanceBias, PositionBias
from regard.engines.attention import Ranks, Visibility, attention, attention_reference, masked_scores_bias, ranks
from regard.engines.cache import CountedState, extend_counted, read_on
from regard.layers.parts import LayerCall, Projection
from regard.positions.sinusoidal import Sinusoidal

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


@dataclass(frozen=True)
class Config:
    """Options, all of layers.

    Attributes:
        encoding: P: ``sinusoidal`` (`encoding_dim` features, any position), ``one_hot`` (`max_length` features), ``binary`` (the
            bits of the position as -1 and 1) or ``learned`` (`encoding_dim` features).
        max_length: positions that have one-hot, binary and learned encodings, >= 1.
        encoding_dim: features of sinusoidal and learned encodings, >= 1.
        key_width: D: ``encoding`` (as many as P has features, in each head) or ``split`` (as many divided by the heads).
        content_heads: heads whose weights come from content, 0 to all but one of them.
    """

    encoding: str = "sinusoidal"
    max_length: int = 128
    encoding_dim: int = 64
    key_width: str = "encoding"
    content_heads: int = 0

    def __post_init__(self) -> None:
        one_of("encoding", self.encoding, ("one_hot", "binary", "sinusoidal", "learned"))
        one_of("key_width", self.key_width, ("encoding", "split"))
        at_least("max_length", self.max_length, 1)
        at_least("encoding_dim", self.encoding_dim, 1)
        at_least("content_heads", self.content_heads, 0)

    @property
    def features(self) -> int:
        """Features of P."""
        if self.encoding == "one_hot":
            return self.max_length
        return max(1, (self.max_length - 1).bit_length()) if self.encoding == "binary" else self.encoding_dim


def reference(
    call: Call,
    query_map: Float[Tensor, "t f d"],
    key_map: Float[Tensor, "t f d"],
    v: Float[Tensor, "b h m v"],
    query_bias: Float[Tensor, "t d"] | None = None,
    encodings: Float[Tensor, "s f"] | None = None,
    slots: Shaped[Tensor, "b n"] | None = None,
    content_query: Float[Tensor, "b c n e"] | None = None,
    content_key: Float[Tensor, "b c m e"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with a weight matrix for each row."""
    t, m = _split(query_map, v, content_query), v.shape[2]
    where = ranks(call, _outputs(call, slots, content_query, m), m, v.device)

    def attend(heads: slice, q: Tensor, k: Tensor) -> Tensor:
        own = _of_heads(call, heads)
        visible, added = masked_scores_bias(where, _visibility(own), own.bias, own.position_bias, own.blocks, q.dtype)
        scale = call.scale * q.shape[-1] ** -0.5
        return attention_reference(q, k, v[:, heads], visible, lambda scores: scores.softmax(-1), scale, added)

    like = query_map[0]
    bias = 0 if query_bias is None else query_bias[:, None]
    queries = _encoded(encodings, where.queries, like)[:, None] @ query_map + bias
    keys = _encoded(encodings, where.keys, like)[:, None] @ key_map
    output = attend(slice(0, t), *(x.expand(v.shape[0], -1, -1, -1) for x in (queries, keys)))
    if content_query is None or content_key is None:
        return output
    return torch.cat([output, attend(slice(t, None), content_query, content_key)], 1)


def parallel(
    call: Call,
    query_map: Float[Tensor, "t f d"],
    key_map: Float[Tensor, "t f d"],
    v: Float[Tensor, "b h m v"],
    query_bias: Float[Tensor, "t d"] | None = None,
    encodings: Float[Tensor, "s f"] | None = None,
    slots: Shaped[Tensor, "b n"] | None = None,
    content_query: Float[Tensor, "b c n e"] | None = None,
    content_key: Float[Tensor, "b c m e"] | None = None,
) -> Result:
    """One weight matrix a head for all rows, where nothing differs between rows and it is small."""
    where = ranks(call, _outputs(call, slots, content_query, v.shape[2]), v.shape[2], v.device)
    positions = Positions(query_map, key_map, query_bias, encodings)
    return _attend(call, positions, v, content_query, content_key, where)


def chunked(
    call: Call,
    query_map: Float[Tensor, "t f d"],
    key_map: Float[Tensor, "t f d"],
    v: Float[Tensor, "b h m v"],
    query_bias: Float[Tensor, "t d"] | None = None,
    encodings: Float[Tensor, "s f"] | None = None,
    slots: Shaped[Tensor, "b n"] | None = None,
    content_query: Float[Tensor, "b c n e"] | None = None,
    content_key: Float[Tensor, "b c m e"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step."""
    n = _outputs(call, slots, content_query, v.shape[2])
    state, where = extend_counted(call, v[:, :0] if content_key is None else content_key, v, n)
    positions = Positions(query_map, key_map, query_bias, encodings)
    return _attend(call, positions, state.v, content_query, state.k, where, state)


def absorb(
    call: Call, v: Float[Tensor, "b h m v"], content_key: Float[Tensor, "b c m e"] | None = None
) -> CountedState:
    """Memory into a cache; more may follow."""
    return extend_counted(call, v[:, :0] if content_key is None else content_key, v, 0)[0]


def read(
    call: Call,
    query_map: Float[Tensor, "t f d"],
    key_map: Float[Tensor, "t f d"],
    query_bias: Float[Tensor, "t d"] | None = None,
    encodings: Float[Tensor, "s f"] | None = None,
    slots: Shaped[Tensor, "b n"] | None = None,
    content_query: Float[Tensor, "b c n e"] | None = None,
) -> Result:
    """Queries on absorbed memory, counted on from those that have read it before."""
    call, state, where = read_on(call, _outputs(call, slots, content_query, 1), call.state.v.device)
    positions = Positions(query_map, key_map, query_bias, encodings)
    return _attend(call, positions, state.v, content_query, state.k, where, state)


def _outputs(call: Call, slots: Tensor | None, content_query: Tensor | None, keys: int) -> int:
    if content_query is not None:
        return content_query.shape[2]
    if slots is not None:
        return slots.shape[1]
    return 1 if call.pattern.cross else keys


def _split(query_map: Tensor, v: Tensor, content_query: Tensor | None) -> int:
    """Heads that are positional."""
    content = 0 if content_query is None else content_query.shape[1]
    if query_map.shape[0] + content != v.shape[1]:
        raise Unsupported(
            f"positional_attention with {query_map.shape[0]} positional heads, {content} of content and {v.shape[1]} of values",
            supported="as many heads of values as of both others together",
        )
    return query_map.shape[0]


def _visibility(call: Call) -> Visibility:
    return Visibility(causal=call.pattern is Pattern.CAUSAL_SELF)


def _of_heads(call: Call, heads: slice) -> Call:
    """The call as some of its heads see it."""
    bias, blocks, told = call.bias, call.blocks, call.position_bias
    if bias is not None and bias.shape[1] > 1:
        bias = bias[:, heads]
    if blocks is not None and blocks.visible.shape[1] > 1:
        blocks = BlockMask(blocks.visible[:, heads], blocks.block_size)
    if isinstance(told, DistanceBias):
        told = DistanceBias(partial(_by_distance, told, heads))
    elif told is not None:
        told = partial(_by_rank, told, heads)
    return call.replace(bias=bias, blocks=blocks, position_bias=told)


def _by_distance(told: DistanceBias, heads: slice, distances: Int[Tensor, "..."]) -> Float[Tensor, "h ..."]:
    return told.by_distance(distances)[heads]


def _by_rank(
    told: PositionBias, heads: slice, i: Int[Tensor, "b n"], j: Int[Tensor, "b m"]
) -> Float[Tensor, "#b #h n m"]:
    found = told(i, j)
    return found[:, heads] if found.shape[1] > 1 else found


def _encoded(
    encodings: Float[Tensor, "s f"] | None, positions: Int[Tensor, "#b n"], like: Float[Tensor, "f d"]
) -> Float[Tensor, "#b n f"]:
    """P at the positions; anything at one that is negative, whose token does not exist or sees nothing."""
    positions = positions.clamp(min=0)
    if encodings is None:
        dtype = wide_dtype(like)
        zeros = torch.zeros(*positions.shape, like.shape[0], dtype=dtype, device=like.device)
        return Sinusoidal(dim=like.shape[0]).embed(zeros, positions)
    if not torch.compiler.is_compiling() and positions.numel():
        last = int(positions.max())
        if last >= encodings.shape[0]:
            raise Unsupported(
                f"positional_attention at position {last} with {encodings.shape[0]} encodings",
                supported=f"positions 0 to {encodings.shape[0] - 1}",
                nearest=f"max_length={last + 1}, or encoding='sinusoidal'",
            )
    return encodings[positions]


SHARED_PAIRS = 1 << 15
"""Most queries times keys whose weights are stored for all rows. From 256 tokens on the kernels were faster in most measured
cases, 1.0 to 1.9 times at 256 tokens and 1 to 32 rows, 5 to 13 times at 2048 and one row; below 128 they were slower."""


@dataclass(frozen=True)
class Positions:
    """The sources of the weights, in place of queries and keys."""

    query_map: Float[Tensor, "t f d"]
    key_map: Float[Tensor, "t f d"]
    query_bias: Float[Tensor, "t d"] | None
    encodings: Float[Tensor, "s f"] | None

    def queries(self, at: Int[Tensor, "#b n"]) -> Float[Tensor, "#b t n f"]:
        """(Q W_K^T) / sqrt(D), in at least float32."""
        dtype = wide_dtype(self.query_map)
        q = self.keys(at) @ self.query_map.to(dtype)
        q = q if self.query_bias is None else q + self.query_bias[:, None].to(dtype)
        return q.shape[-1] ** -0.5 * q @ self.key_map.to(dtype).mT

    def keys(self, at: Int[Tensor, "#b n"]) -> Float[Tensor, "#b 1 n f"]:
        """P, which all heads share."""
        found = _encoded(self.encodings, at, self.query_map[0])
        return wide(found)[:, None]


def _attend(
    call: Call,
    positions: Positions,
    v: Tensor,
    content_query: Tensor | None,
    content_key: Tensor | None,
    where: Ranks,
    state: CountedState | None = None,
) -> Result:
    t = _split(positions.query_map, v, content_query)
    with without_autocast(v.device):
        pairs = where.queries.shape[1] * v.shape[2]
        if state is None and pairs <= SHARED_PAIRS and _same_for_all_rows(call, where):
            parts = [_shared(call, positions, v[:, :t], where)]
        else:
            valid = call.valid_queries(where.queries.shape[1])
            asked = where.queries if valid is None else where.queries.where(valid, 0)
            queries, keys = (
                x.expand(v.shape[0], t, -1, -1) for x in (positions.queries(asked), positions.keys(where.keys))
            )
            parts = [_engine(_of_heads(call, slice(0, t)), queries, keys, v[:, :t], where, call.scale)]
    if content_query is not None and content_key is not None:
        scale = call.scale * content_query.shape[-1] ** -0.5
        parts.append(_engine(_of_heads(call, slice(t, None)), content_query, content_key, v[:, t:], where, scale))
    output = torch.cat([part[0] for part in parts], 1)
    found = [part[1] for part in parts if part[1] is not None]
    return Result(output, state, extras={"weights": torch.cat(found, 1)} if found else {})


def _same_for_all_rows(call: Call, where: Ranks) -> bool:
    """Whether all rows have the same weights: padding only matters where it would be counted."""
    pairs = call.bias is not None or call.position_bias is not None or call.blocks is not None
    if pairs or call.dropout > 0:
        return False
    return where.offset is not None if call.pattern is Pattern.CAUSAL_SELF else call.memory_lengths is None


def _shared(
    call: Call, positions: Positions, v: Float[Tensor, "b t m v"], where: Ranks
) -> tuple[Float[Tensor, "b t n v"], Float[Tensor, "b t n m"] | None]:
    """One matrix for each head, and one product of it with the values of all rows."""
    batch, n, m = v.shape[0], where.queries.shape[1], v.shape[2]
    i = torch.arange(n, device=v.device) + (m - n if call.pattern is Pattern.CAUSAL_SELF else 0)
    j = torch.arange(m, device=v.device)  # also where a row is shorter
    if n == 0 or m == 0:
        none = v.new_zeros(*v.shape[:2], n, m)
        return v.new_zeros(*none.shape[:3], v.shape[-1]), none if "weights" in call.want else None
    asked, found = _within(i, call.lengths), _within(j, call.memory_lengths)
    a = (call.scale * positions.queries(asked[None]) @ positions.keys(found[None]).mT)[0]
    if call.pattern is Pattern.CAUSAL_SELF:
        # of a padded row only queries past its tokens see its padding
        i = i[:, None]
        a = a.masked_fill((j > i) & (i >= 0), -torch.inf).softmax(-1).masked_fill(i < 0, 0)
    else:
        a = a.softmax(-1)
    columns = v.to(torch.promote_types(v.dtype, a.dtype)).permute(1, 2, 0, 3).flatten(2)  # (t, m, b v)
    output = (a.to(columns.dtype) @ columns).unflatten(-1, (batch, v.shape[-1])).permute(2, 0, 1, 3)
    return output.to(v.dtype), a.to(v.dtype).expand(batch, -1, -1, -1) if "weights" in call.want else None


def _within(positions: Int[Tensor, " n"], lengths: Int[Tensor, " b"] | None) -> Int[Tensor, " n"]:
    """Positions, of which those that are padding in every row are replaced by that of the last token."""
    if lengths is None or lengths.shape[0] == 0:
        return positions
    return torch.minimum(positions, lengths.amax() - 1)


def _engine(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, scale: float
) -> tuple[Float[Tensor, "b t n v"], Float[Tensor, "b t n m"] | None]:
    output, weights, _ = attention(
        q.to(torch.promote_types(v.dtype, q.dtype)),
        k,
        v,
        where,
        visibility=_visibility(call),
        scale=scale,
        bias=call.bias,
        position_bias=call.position_bias,
        blocks=call.blocks,
        dropout=call.dropout,
        generator=call.generator,
        want_weights="weights" in call.want,
        backend=call.backend,
    )
    return output.to(v.dtype), weights


class Maps(Projection):
    """Gives a layer's heads the encodings of positions and their maps, and content heads their queries and keys."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        if spec.kv_heads != spec.heads:
            raise Unsupported(
                f"num_kv_heads={spec.kv_heads} of positional_attention with num_heads={spec.heads}",
                supported="values of every head",
                nearest="num_kv_heads=None",
            )
        content = config.content_heads
        if content >= spec.heads:
            raise Unsupported(
                f"content_heads={content} of {spec.heads} heads",
                supported=f"0 to {spec.heads - 1}",
                nearest="softmax" if content == spec.heads else f"content_heads={spec.heads - 1}",
            )
        self.config, self.cross = config, spec.pattern.cross
        self.heads, self.content_heads, self.width = spec.heads - content, content, config.features
        if config.key_width == "split":
            if config.features % self.heads:
                raise Unsupported(
                    f"key_width='split' of {config.features} features over {self.heads} positional heads",
                    supported="a multiple of the heads",
                    nearest="key_width='encoding'",
                )
            self.width = config.features // self.heads
        # queries and keys of each head side by side, as in the paper's code
        self.weight = nn.Parameter(torch.empty(2 * self.heads * self.width, config.features))
        self.bias = nn.Parameter(torch.empty(2 * self.heads * self.width))
        self.encoding = (
            nn.Parameter(torch.empty(config.max_length, config.features)) if config.encoding == "learned" else None
        )
        self.content_query = spec.linear(spec.dim, content * spec.head_dim) if content else None
        self.content_key = spec.linear(spec.memory_dim, content * spec.head_dim) if content else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)
        if self.encoding is not None:
            nn.init.normal_(self.encoding)

    def encodings(self) -> Float[Tensor, "s f"] | None:
        """P, a row for each position; None for sinusoids, which exist at all positions."""
        config, device, dtype = self.config, self.weight.device, self.weight.dtype
        if config.encoding == "one_hot":
            return torch.eye(config.max_length, dtype=dtype, device=device)
        if config.encoding == "binary":
            positions = torch.arange(config.max_length, device=device)
            bits = positions[:, None] >> torch.arange(config.features, device=device) & 1
            return (2 * bits - 1).to(dtype)
        return self.encoding

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x, memory = call.x, call.memory
        maps = self.weight.mT.unflatten(-1, (self.heads, 2, self.width)).movedim(0, 2)  # (h, 2, f, d)
        made = {
            "query_map": maps[:, 0],
            "key_map": maps[:, 1],
            "query_bias": self.bias.unflatten(0, (self.heads, 2, self.width))[:, 0],
            "encodings": self.encodings(),
            "slots": x.detach()[..., 0] if self.cross and x is not None else None,
        }
        for name, module, source in (
            ("content_query", self.content_query, x),
            ("content_key", self.content_key, memory),
        ):
            if module is not None and source is not None:
                made[name] = module(source).unflatten(-1, (self.content_heads, -1)).transpose(1, 2)
        return heads | {name: tensor for name, tensor in made.items() if tensor is not None}


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    config: Config,
    sizes: dict[str, int] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests and timings: encodings with room for sequences that go on, content where the options have heads for it."""
    size = {"h": 2, "d": 8, "v": 6, "f": 5} | (sizes or {})
    heads, content, rows = size["h"], min(config.content_heads, size["h"] - 1), max(80, n, m)
    shapes: dict[str, tuple[int, ...]] = {
        "query_map": (heads - content, size["f"], size["d"]),
        "key_map": (heads - content, size["f"], size["d"]),
        "query_bias": (heads - content, size["d"]),
        "v": (batch, heads, m, size["v"]),
    }
    if config.encoding == "learned":
        shapes["encodings"] = (rows, size["f"])
    if content:
        shapes |= {"content_query": (batch, content, n, 4), "content_key": (batch, content, m, 4)}
    found = {name: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for name, s in shapes.items()}
    found["slots"] = torch.zeros(batch, n, dtype=torch.long)
    return found


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    return {"f": config.features}


def cost(shape: Shape, config: Config) -> Cost:
    """One weight matrix a head for all rows, where it is small, and its product with each."""
    pairs = shape.heads * shape.n * shape.m
    shared = shape.n * shape.m <= SHARED_PAIRS
    rows = 1 if shared else shape.batch
    stored = pairs + shape.batch * shape.heads * (shape.n + shape.m) * shape.dim_value
    return Cost(
        flops=2.0 * pairs * (rows * shape.dim_key + shape.batch * shape.dim_value),
        memory=float(stored if shared else shape.heads * (shape.n + shape.m) * shape.dim_key + shape.batch * shape.n),
        state=float(shape.heads * shape.m * shape.dim_value),
        step_flops=2.0 * shape.batch * shape.heads * shape.m * (shape.dim_key + shape.dim_value),
    )


MECHANISM = Mechanism(
    name="positional_attention",
    aliases=("positional", "positional_transformer"),
    kind=Kind.ATTENTION,
    summary="The weight of a pair depends on its positions alone; only values carry content.",
    paper=Paper(
        "Positional Attention: Expressivity and Learnability of Algorithmic Computation", "2410.01686", 2024, 32
    ),
    inputs={
        "query_map": "tfd",
        "key_map": "tfd",
        "v": "bhmv",
        "query_bias?": "td",
        "encodings?": "sf",
        "slots?": "bn",
        "content_query?": "bcne",
        "content_key?": "bcme",
    },
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
        "one-hot": {"encoding": "one_hot", "max_length": 200},
        "binary": {"encoding": "binary", "max_length": 256, "key_width": "split"},
        "learned": {"encoding": "learned", "encoding_dim": 6, "max_length": 200},
        "content": {"content_heads": 1},
    },
    engine="attention",
    state=CountedState,
    cost=cost,
    axis_sizes=axis_sizes,
    default_scale=1.0,
    honours=frozenset({"bias", "blocks", "dropout", "weights"}),
    weights="exact",
    accepts_positions=("none", "alibi", "relative", "toeplitz"),
    refused_positions="its weights come of positions already, and its values carry content alone",
    projection=Maps,
    sample_inputs=sample_inputs,
    layer_defaults={"bias": True},
)
