r"""Positional attention: the weight of a pair depends on its positions alone; only values carry content.

When to pick it: numeric and algorithmic regression of bounded length, where the route of data does not depend on the data
(prefix sums, sorting networks, tournaments), above all when test values are larger than training values.
When not: lookup, parsing, or anything whose route depends on content; lengths beyond the table, which it has no rows for.

Definition (Back de Luca et al., arXiv 2410.01686), for a head with positional encodings P, the same in all rows:

    Q = P W_Q + b_Q,   K = P W_K + b_K,   A = softmax(Q K^T / sqrt(D)),   O = A V

A has no batch axis and is computed once for all rows, and O is linear in V. In causal-self A is masked before the
softmax; in cross patterns queries have the positions of their sequence and keys those of the memory.

| paper | here |
|---|---|
| Q, K | `query_table` (H, P, D), `key_table` (H, S, D): a row for each position, at most P and S of them |
| P | `encoding`: one-hot, as in the paper, or sinusoidal, learned, binary |
| d_k = width of P for each head | `key_width="encoding"`; ``"split"`` divides it between the heads |

Layout: (B, H, N, D). The position of a token is its rank among the valid tokens of its row; one beyond the tables is
refused. `slots` (B, N), whose values are not read, says how many outputs are wanted where they are not as many as keys. The
paper's extra node, which keeps its row whatever the length, is put first here, not last. The scale multiplies D^-0.5 (1 by
default). The state holds values only, one for each token and head. With padding in noncausal patterns the weights are those
of each row, since its padding must not be counted.
Hybrid heads: `content_query` and `content_key` (B, C, N, E) are queries and keys of C further heads of softmax attention, the
last of V's heads; `content_heads` in a layer.

The paper's layer concatenates, MLP([x ; W_O O]), in place of a residual and a norm, and with no bias anywhere it is
positively homogeneous: f(a x) = a f(x). That is what carries over to larger values, and what a norm destroys. The network
is in `regard/reproductions/positional_attention.py`; blocks of models here are the usual ones.

Deviations: each layer has encodings of its own, where they are learned. Keys and queries start as in the paper, the other
projections as those of all layers here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    BlockMask,
    Call,
    Context,
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
from regard.engines.attention import Ranks, Visibility, attention, attention_reference, masked_scores_bias, ranks
from regard.engines.cache import CountedState, extend_counted, read_on
from regard.engines.gated_recurrence import without_autocast
from regard.positions.sinusoidal import Sinusoidal

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


@dataclass(frozen=True)
class Config:
    """Options, all of layers.

    Attributes:
        encoding: P: ``one_hot`` (`max_length` features), ``binary`` (the bits of the position as -1 and 1), ``sinusoidal`` or
            ``learned`` (`encoding_dim` features).
        max_length: positions, >= 1, of queries and of keys.
        encoding_dim: features of sinusoidal and learned encodings, >= 1.
        key_width: D: ``encoding`` (as many as P has features, in each head) or ``split`` (as many divided by the heads).
        content_heads: heads whose weights come from content, 0 to all but one of them.
    """

    encoding: str = "one_hot"
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
    query_table: Float[Tensor, "t p d"],
    key_table: Float[Tensor, "t s d"],
    v: Float[Tensor, "b h m v"],
    slots: Shaped[Tensor, "b n"] | None = None,
    content_query: Float[Tensor, "b c n e"] | None = None,
    content_key: Float[Tensor, "b c m e"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with a weight matrix for each row."""
    t = _split(query_table, v, content_query)
    m = v.shape[2]
    where = ranks(call, _outputs(call, slots, content_query, m), m, v.device)

    def attend(heads: slice, q: Tensor, k: Tensor) -> Tensor:
        own = _of_heads(call, heads)
        bias = masked_scores_bias(where, _visibility(own), own.bias, own.position_bias, own.blocks, q.dtype)
        scale = call.scale * q.shape[-1] ** -0.5
        return attention_reference(q, k, v[:, heads], bias[0], lambda scores: scores.softmax(-1), scale, bias[1])

    rows = (
        _rows(table, r, what).expand(v.shape[0], -1, -1, -1)
        for table, r, what in ((query_table, where.queries, "queries"), (key_table, where.keys, "keys"))
    )
    output = attend(slice(0, t), *rows)
    if content_query is None or content_key is None:
        return output
    return torch.cat([output, attend(slice(t, None), content_query, content_key)], 1)


def parallel(
    call: Call,
    query_table: Float[Tensor, "t p d"],
    key_table: Float[Tensor, "t s d"],
    v: Float[Tensor, "b h m v"],
    slots: Shaped[Tensor, "b n"] | None = None,
    content_query: Float[Tensor, "b c n e"] | None = None,
    content_key: Float[Tensor, "b c m e"] | None = None,
) -> Result:
    """One weight matrix a head for all rows, where nothing differs between rows."""
    where = ranks(call, _outputs(call, slots, content_query, v.shape[2]), v.shape[2], v.device)
    return _attend(call, query_table, key_table, v, content_query, content_key, where)


def chunked(
    call: Call,
    query_table: Float[Tensor, "t p d"],
    key_table: Float[Tensor, "t s d"],
    v: Float[Tensor, "b h m v"],
    slots: Shaped[Tensor, "b n"] | None = None,
    content_query: Float[Tensor, "b c n e"] | None = None,
    content_key: Float[Tensor, "b c m e"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step."""
    n = _outputs(call, slots, content_query, v.shape[2])
    state, where = extend_counted(call, v[:, :0] if content_key is None else content_key, v, n)
    return _attend(call, query_table, key_table, state.v, content_query, state.k, where, state)


def absorb(
    call: Call, v: Float[Tensor, "b h m v"], content_key: Float[Tensor, "b c m e"] | None = None
) -> CountedState:
    """Memory into a cache; more may follow."""
    return extend_counted(call, v[:, :0] if content_key is None else content_key, v, 0)[0]


def read(
    call: Call,
    query_table: Float[Tensor, "t p d"],
    key_table: Float[Tensor, "t s d"],
    slots: Shaped[Tensor, "b n"] | None = None,
    content_query: Float[Tensor, "b c n e"] | None = None,
) -> Result:
    """Queries on absorbed memory, counted on from those that have read it before."""
    call, state, where = read_on(call, _outputs(call, slots, content_query, 1), call.state.v.device)
    return _attend(call, query_table, key_table, state.v, content_query, state.k, where, state)


def _outputs(call: Call, slots: Tensor | None, content_query: Tensor | None, keys: int) -> int:
    if content_query is not None:
        return content_query.shape[2]
    if slots is not None:
        return slots.shape[1]
    return 1 if call.pattern.cross else keys


def _split(query_table: Tensor, v: Tensor, content_query: Tensor | None) -> int:
    """Heads that are positional."""
    content = 0 if content_query is None else content_query.shape[1]
    if query_table.shape[0] + content != v.shape[1]:
        raise Unsupported(
            f"positional_attention with {query_table.shape[0]} heads of tables, {content} of content and {v.shape[1]} of values",
            supported="as many heads of values as of tables and of content together",
        )
    return query_table.shape[0]


def _visibility(call: Call) -> Visibility:
    return Visibility(causal=call.pattern is Pattern.CAUSAL_SELF)


def _of_heads(call: Call, heads: slice) -> Call:
    """The call as some of its heads see it."""
    bias, blocks = call.bias, call.blocks
    if bias is not None and bias.shape[1] > 1:
        bias = bias[:, heads]
    if blocks is not None and blocks.visible.shape[1] > 1:
        blocks = BlockMask(blocks.visible[:, heads], blocks.block_size)
    return call.replace(bias=bias, blocks=blocks)


def _rows(table: Float[Tensor, "t p d"], positions: Int[Tensor, "#b n"], what: str) -> Float[Tensor, "#b t n d"]:
    """The row of each position; some row for one that is negative, whose token does not exist or sees nothing."""
    if not torch.compiler.is_compiling() and positions.numel():
        last = int(positions.max())
        if last >= table.shape[1]:
            raise Unsupported(
                f"positional_attention with {what} at position {last} and a table of {table.shape[1]}",
                supported=f"positions 0 to {table.shape[1] - 1}",
                nearest=f"max_length={last + 1}",
            )
    return table[:, positions.clamp(min=0)].transpose(0, 1)


def _attend(
    call: Call,
    query_table: Tensor,
    key_table: Tensor,
    v: Tensor,
    content_query: Tensor | None,
    content_key: Tensor | None,
    where: Ranks,
    state: CountedState | None = None,
) -> Result:
    t = _split(query_table, v, content_query)
    if state is None and _same_for_all_rows(call, where):
        parts = [_shared(call, query_table, key_table, v[:, :t], where)]
    else:
        queries, keys = _rows(query_table, where.queries, "queries"), _rows(key_table, where.keys, "keys")
        parts = [_engine(_of_heads(call, slice(0, t)), queries, keys, v[:, :t], where)]
    if content_query is not None and content_key is not None:
        parts.append(_engine(_of_heads(call, slice(t, None)), content_query, content_key, v[:, t:], where))
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
    call: Call,
    query_table: Float[Tensor, "t p d"],
    key_table: Float[Tensor, "t s d"],
    v: Float[Tensor, "b t m v"],
    where: Ranks,
) -> tuple[Float[Tensor, "b t n v"], Float[Tensor, "b t n m"] | None]:
    batch, n, m = v.shape[0], where.queries.shape[1], v.shape[2]
    i = torch.arange(n, device=v.device) + (m - n if call.pattern is Pattern.CAUSAL_SELF else 0)
    j = torch.arange(m, device=v.device)  # also where a row is shorter
    q, k = _rows(query_table, i[None], "queries")[0], _rows(key_table, j[None], "keys")[0]
    dtype = torch.promote_types(v.dtype, torch.float32)
    if n == 0 or m == 0:
        none = v.new_zeros(batch, q.shape[0], n, m)
        return v.new_zeros(*none.shape[:3], v.shape[-1]), none if "weights" in call.want else None
    with without_autocast(v.device):
        a = (call.scale * q.shape[-1] ** -0.5 * q.to(dtype)) @ k.to(dtype).mT
        if call.pattern is Pattern.CAUSAL_SELF:
            # of a padded row only queries past its tokens see its padding
            i = i[:, None]
            a = a.masked_fill((j > i) & (i >= 0), -torch.inf).softmax(-1).masked_fill(i < 0, 0)
        else:
            a = a.softmax(-1)
        columns = v.to(dtype).permute(1, 2, 0, 3).flatten(2)  # (t, m, b v): one product for all rows
        output = (a @ columns).unflatten(-1, (batch, -1)).permute(2, 0, 1, 3)
    weights = a.to(v.dtype).expand(batch, -1, -1, -1) if "weights" in call.want else None
    return output.to(v.dtype), weights


def _engine(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks
) -> tuple[Float[Tensor, "b t n v"], Float[Tensor, "b t n m"] | None]:
    output, weights, _ = attention(
        q.to(torch.promote_types(v.dtype, q.dtype)).expand(v.shape[0], -1, -1, -1),
        k.expand(v.shape[0], -1, -1, -1),
        v,
        where,
        visibility=_visibility(call),
        scale=call.scale * q.shape[-1] ** -0.5,
        bias=call.bias,
        position_bias=call.position_bias,
        blocks=call.blocks,
        dropout=call.dropout,
        generator=call.generator,
        want_weights="weights" in call.want,
        backend=call.backend,
    )
    return output.to(v.dtype), weights


class Tables(nn.Module):
    """Gives a layer's heads their tables from encodings of positions, and content heads their queries and keys."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        content = config.content_heads
        if content >= spec.heads:
            raise Unsupported(
                f"content_heads={content} of {spec.heads} heads",
                supported=f"0 to {spec.heads - 1}",
                nearest="softmax" if content == spec.heads else f"content_heads={spec.heads - 1}",
            )
        self.config, self.cross, self.heads, self.width = (
            config,
            spec.pattern.cross,
            spec.heads - content,
            config.features,
        )
        if config.key_width == "split":
            if config.features % self.heads:
                raise Unsupported(
                    f"key_width='split' of {config.features} features over {self.heads} positional heads",
                    supported="a multiple of the heads",
                    nearest="key_width='encoding'",
                )
            self.width = config.features // self.heads
        self.encoding = (
            nn.Parameter(torch.randn(config.max_length, config.features)) if config.encoding == "learned" else None
        )
        self.tables = spec.linear(config.features, 2 * self.heads * self.width)
        with torch.no_grad():
            for parameter in self.tables.parameters():
                nn.init.xavier_uniform_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)
        self.content_query = spec.linear(spec.dim, content * spec.head_dim) if content else None
        self.content_key = spec.linear(spec.memory_dim, content * spec.head_dim) if content else None
        self.content_heads = content

    def encodings(self) -> Float[Tensor, "p features"]:
        """P, a row for each position."""
        config = self.config
        if self.encoding is not None:
            return self.encoding
        some = next(self.tables.parameters())
        positions = torch.arange(config.max_length, device=some.device)
        if config.encoding == "one_hot":
            return torch.eye(config.max_length, dtype=some.dtype, device=some.device)
        if config.encoding == "binary":
            bits = positions[:, None] >> torch.arange(config.features, device=some.device) & 1
            return (2 * bits - 1).to(some.dtype)
        zeros = torch.zeros(1, config.max_length, config.features, dtype=some.dtype, device=some.device)
        return Sinusoidal(dim=config.features).embed(zeros, positions[None])[0]

    def forward(self, heads: Tensors, x: Tensor | None, memory: Tensor | None, context: Context) -> Tensors:
        if self.config.encoding == "one_hot" and isinstance(self.tables, nn.Linear):
            tables: Tensor = self.tables.weight.mT  # the product with the identity
            tables = tables if self.tables.bias is None else tables + self.tables.bias
        else:
            tables = self.tables(self.encodings())
        by_head = tables.unflatten(-1, (self.heads, 2 * self.width)).transpose(0, 1)
        query, key = by_head.split(self.width, -1)
        heads = heads | {"query_table": query, "key_table": key}
        if self.cross and x is not None:
            heads["slots"] = x.detach()[..., 0]
        for name, module, source in (
            ("content_query", self.content_query, x),
            ("content_key", self.content_key, memory),
        ):
            if module is not None and source is not None:
                heads[name] = module(source).unflatten(-1, (self.content_heads, -1)).transpose(1, 2)
        return heads


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
    """Inputs for tests and timings: tables with room for sequences that go on; content where the options have heads for it."""
    size = {"h": 2, "d": 8, "v": 6} | (sizes or {})
    heads, content, rows = size["h"], min(config.content_heads, size["h"] - 1), max(80, n, m)
    shapes: dict[str, tuple[int, ...]] = {
        "query_table": (heads - content, rows, size["d"]),
        "key_table": (heads - content, rows, size["d"]),
        "v": (batch, heads, m, size["v"]),
    }
    if content:
        shapes |= {"content_query": (batch, content, n, 4), "content_key": (batch, content, m, 4)}
    found = {name: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for name, s in shapes.items()}
    found["slots"] = torch.zeros(batch, n, dtype=torch.long)
    return found


def cost(shape: Shape, config: Config) -> Cost:
    """One weight matrix a head for all rows, and its product with each."""
    pairs = shape.heads * shape.n * shape.m
    return Cost(
        flops=2.0 * pairs * (shape.dim_key + shape.batch * shape.dim_value),
        memory=float(pairs + shape.batch * shape.heads * (shape.n + shape.m) * shape.dim_value),
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
        "query_table": "tpd",
        "key_table": "tsd",
        "v": "bhmv",
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
    engine="attention",
    state=CountedState,
    cost=cost,
    default_scale=1.0,
    honours=frozenset({"bias", "blocks", "dropout", "weights"}),
    weights="exact",
    accepts_positions=("none", "alibi", "relative", "toeplitz"),
    projection=Tables,
    sample_inputs=sample_inputs,
    layer_defaults={"bias": True},
)
