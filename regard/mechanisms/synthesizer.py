r"""Synthesizer: scores of positions, computed from the query token alone or learned directly, instead of dot products.

When to pick it: to ask whether a task needs token-to-token scores at all; inputs with a known maximum length whose
positions have fixed meanings.
When not: lookups by content, or lengths beyond those trained on: scores belong to positions. Its cost is quadratic,
like that of softmax attention.

Definition (Tay et al., arXiv 2005.00743, equations 1-8; survey arXiv 2103.14636, C6), for query i and key position j:

    S_ij = (W_2 relu(W_1 x_i))_j                      `dense`
    S_ij = R_ij, trained or not                       `random`
    S_ij = a(x_i)_{j div B} b(x_i)_{j mod B}          `factorised_dense`, A B >= L
    S_ij = (R_1 R_2^T)_ij, of small rank              `factorised_random`
    S_ij = s q_i . k_j                                `dot`
    S_ij = sum_t softmax(w)_t S^t_ij                  of several of these
    o_i  = sum_j softmax_j(S_ij) v_j                  over visible keys; causal-self hides later places

with linear maps a to A features and b to B features.

| paper | here |
|---|---|
| the kinds of S, and their mixture | `kinds`: one, or several to mix; `projection.mix` of the layer holds w |
| l, the maximum length | `length` (L) |
| k, the rank of factorised random scores | `rank` |
| scores of all L places | `dense` (B, H, N, L), `random` (H, L, L): passed to a function as they are, and added |
| dot products | `query` (B, H, N, D), `key` (B, G, M, D), added too |

Layout: v (B, G, M, V). A position is a rank among the valid tokens of a row; in cross patterns queries and memory are
each counted from 0, and all four patterns exist. `slots` (B, N), whose values are not read, gives the number of queries
if no other input does. The scale multiplies dot products and is 1 by default: a layer scales its queries by D^-0.5. The
state caches values (and keys for dot products).
Deviations: the factorised dense scores are the outer product of both factors, so that each position has its own pair;
tiling both, as in the paper's text, gives some positions equal scores. Dropout is applied to the layer's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    LayerCall,
    LayerSpec,
    Mechanism,
    Paper,
    Pattern,
    Projection,
    Result,
    Shape,
    State,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    lengths_after,
    one_of,
    state_field,
)
from regard.core.precision import wide_dtype, without_autocast
from regard.engines.attention import Ranks, Visibility, ranks
from regard.engines.cache import append
from regard.engines.recurrent_forms import length_after

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

KINDS = ("dense", "random", "factorised_dense", "factorised_random", "dot")


@dataclass(frozen=True)
class Config:
    """Options, all for the layer; a function takes scores.

    Attributes:
        kinds: one or several of ``dense``, ``random``, ``factorised_dense``, ``factorised_random`` and ``dot``.
        length: L, the maximum number of keys in a sequence, and with random scores also of queries; >= 1.
        rank: rank of factorised random scores, >= 1.
        train_random: whether random scores are trained.
    """

    kinds: tuple[str, ...] | str = ("dense",)
    length: int = 1024
    rank: int = 8
    train_random: bool = True

    def __post_init__(self) -> None:
        kinds = (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)
        object.__setattr__(self, "kinds", kinds)
        if not kinds or len(set(kinds)) < len(kinds):
            raise Unsupported(f"kinds={kinds}", supported=f"different ones of {', '.join(KINDS)}", nearest="('dense',)")
        for kind in kinds:
            one_of("kinds", kind, KINDS)
        at_least("length", self.length, 1)
        at_least("rank", self.rank, 1)


@dataclass(frozen=True)
class PlaceState(State):
    """Values so far, with keys if there are dot products (else of width 0). An empty slot has rank -1."""

    v: Float[Tensor, "b g past v"] = state_field()
    key: Float[Tensor, "b g past d"] = state_field()
    ranks: Int[Tensor, "b past"] = state_field(fill=-1)
    queries: Int[Tensor, " b"] = state_field()
    """Number of queries so far, in cross patterns."""
    length: Int[Tensor, " b"] = state_field()


def reference(
    call: Call,
    v: Float[Tensor, "b g m v"],
    dense: Float[Tensor, "b h n l"] | None = None,
    random: Float[Tensor, "h l l"] | None = None,
    query: Float[Tensor, "b h n d"] | None = None,
    key: Float[Tensor, "b g m d"] | None = None,
    slots: Shaped[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, one query at a time."""
    n, m, heads = _queries(call, v, dense, query, slots), v.shape[2], _heads(v, dense, random, query)
    _check(dense, random, query, key, m, n)
    v = v.repeat_interleave(heads // v.shape[1], 1)
    outputs = []
    for i in range(n):
        place = i + m - n if call.pattern is Pattern.CAUSAL_SELF else i
        seen = max(place + 1, 0) if call.pattern is Pattern.CAUSAL_SELF else m
        scores = v.new_zeros(*v.shape[:2], seen)
        if dense is not None:
            scores = scores + dense[:, :, i, :seen]
        if random is not None and seen:
            scores = scores + random[:, place, :seen]
        if query is not None and key is not None:
            keys = key[:, :, :seen].repeat_interleave(heads // key.shape[1], 1)
            scores = scores + call.scale * (query[:, :, i, None] * keys).sum(-1)
        outputs.append((scores.softmax(-1)[..., None] * v[:, :, :seen]).sum(2))
    return torch.stack(outputs, 2) if outputs else v.new_zeros(*v.shape[:2], 0, v.shape[3])


def parallel(
    call: Call,
    v: Float[Tensor, "b g m v"],
    dense: Float[Tensor, "b h n l"] | None = None,
    random: Float[Tensor, "h l l"] | None = None,
    query: Float[Tensor, "b h n d"] | None = None,
    key: Float[Tensor, "b g m d"] | None = None,
    slots: Shaped[Tensor, "b n"] | None = None,
) -> Result:
    """All scores and their softmax at once: O(N M) time and memory.

    Raises:
        Unsupported: without scores, with one of `query` and `key`, or for positions that have no score.
    """
    n, m = _queries(call, v, dense, query, slots), v.shape[2]
    keys = m if call.memory_lengths is None else call.memory_lengths
    _check(dense, random, query, key, keys, n if call.lengths is None else call.lengths)
    where = ranks(call, n, m, v.device)
    return _attend(call, where, v, dense, random, query, key)


def chunked(
    call: Call,
    v: Float[Tensor, "b g m v"],
    dense: Float[Tensor, "b h n l"] | None = None,
    random: Float[Tensor, "h l l"] | None = None,
    query: Float[Tensor, "b h n d"] | None = None,
    key: Float[Tensor, "b g m d"] | None = None,
    slots: Shaped[Tensor, "b n"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also used as the step."""
    state, where = _extend(call, v, key, _queries(call, v, dense, query, slots))
    _check(dense, random, query, key, state.length)
    result = _attend(call, where, state.v, dense, random, query, None if key is None else state.key)
    result.state = state
    return result


def absorb(call: Call, v: Float[Tensor, "b g m v"], key: Float[Tensor, "b g m d"] | None = None) -> PlaceState:
    """Append memory to the cache; more may follow."""
    return _extend(call, v, key, 0)[0]


def read(
    call: Call,
    dense: Float[Tensor, "b h n l"] | None = None,
    random: Float[Tensor, "h l l"] | None = None,
    query: Float[Tensor, "b h n d"] | None = None,
    slots: Shaped[Tensor, "b n"] | None = None,
) -> Result:
    """Read absorbed memory with queries, whose positions continue those of earlier queries."""
    state: PlaceState = call.state
    n = _queries(call, state.v, dense, query, slots)
    queries = lengths_after(state.queries, call.lengths, state.v.shape[0], n, state.v.device)
    key = None if query is None else state.key
    _check(dense, random, query, key, state.length, queries)
    where = ranks(call, n, 0, state.v.device, state.ranks)
    result = _attend(call, where, state.v, dense, random, query, key, state.queries)
    result.state = PlaceState(state.v, state.key, state.ranks, queries, state.length)
    return result


def _queries(call: Call, v: Tensor, *of_queries: Tensor | None) -> int:
    """The number of queries: from their inputs, else one per key, or one in cross patterns."""
    dense, query, slots = of_queries
    if slots is not None:
        return slots.shape[1]
    for x in (dense, query):
        if x is not None:
            return x.shape[2]
    return 1 if call.pattern.cross else v.shape[2]


def _heads(v: Tensor, dense: Tensor | None, random: Tensor | None, query: Tensor | None) -> int:
    found = [x.shape[axis] for x, axis in ((dense, 1), (random, 0), (query, 1)) if x is not None]
    return max(found, default=v.shape[1])


def _extend(call: Call, v: Tensor, key: Tensor | None, n: int) -> tuple[PlaceState, Ranks]:
    """The cache of `call.state` with new values and keys appended, and the ranks of `n` queries that come with them."""
    past: PlaceState | None = call.state
    length, m = length_after(call, v), v.shape[2]
    key = v.new_zeros(*v.shape[:3], 0) if key is None else key
    if past is None:
        where = ranks(call, n, m, v.device)
        return PlaceState(v, key, where.keys.expand(v.shape[0], -1), torch.zeros_like(length), length), where
    where = ranks(call, n, m, v.device, past.ranks, past.length)
    v, key = append(past.v, v.to(past.v.dtype), 2), append(past.key, key.to(past.key.dtype), 2)
    return PlaceState(v, key, where.keys, past.queries, length), where


def _attend(
    call: Call,
    where: Ranks,
    v: Float[Tensor, "b g m v"],
    dense: Tensor | None,
    random: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    before: Int[Tensor, " b"] | None = None,
) -> Result:
    heads, out_dtype = _heads(v, dense, random, query), v.dtype
    dtype = wide_dtype(v)
    queries = where.queries if before is None else where.queries + before[:, None]
    scores: Tensor | None = None
    if random is not None:
        rows = random[:, queries.clamp(0, random.shape[1] - 1)].transpose(0, 1)
        scores = _at_keys(rows.to(dtype), where, cached=call.state is not None)
    if dense is not None:
        places = _at_keys(dense.to(dtype), where, cached=call.state is not None)
        scores = places if scores is None else scores + places
    with without_autocast(v.device):
        if query is not None and key is not None:
            keys = key.to(dtype).repeat_interleave(heads // key.shape[1], 1)
            products = call.scale * query.to(dtype) @ keys.mT
            scores = products if scores is None else scores + products
        assert scores is not None
        visible = Visibility(causal=call.pattern is Pattern.CAUSAL_SELF).mask(where.queries, where.keys)[:, None]
        seeing = visible.any(-1, keepdim=True)
        weights = scores.masked_fill(~visible, torch.finfo(dtype).min).softmax(-1)
        output = torch.where(seeing, weights @ v.to(dtype).repeat_interleave(heads // v.shape[1], 1), 0)
    extras = {}
    if "weights" in call.want:
        extras["weights"] = torch.where(seeing, weights, 0).expand(v.shape[0], -1, -1, -1).to(out_dtype)
    return Result(output.to(out_dtype), extras=extras)


def _at_keys(x: Float[Tensor, "#b h n l"], where: Ranks, *, cached: bool) -> Float[Tensor, "#b h n m"]:
    """Scores of positions, selected by the ranks of the key slots."""
    m = where.keys.shape[1]
    if not cached:
        return x[..., :m] if m <= x.shape[3] else F.pad(x, (0, m - x.shape[3]))
    batch = max(x.shape[0], where.keys.shape[0])
    index = where.keys.clamp(0, x.shape[3] - 1)[:, None, None].expand(batch, *x.shape[1:3], m)
    return x.expand(batch, -1, -1, -1).gather(3, index)


def _check(
    dense: Tensor | None,
    random: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    keys: int | Tensor,
    queries: int | Tensor = 0,
) -> None:
    """Refuse calls without scores and positions without a score; positions in tensors are not checked in a graph."""
    if dense is None and random is None and query is None:
        raise Unsupported(
            "synthesizer without scores", supported="dense, random, or query and key", nearest="dense=..."
        )
    if (query is None) != (key is None):
        raise Unsupported("synthesizer with one of query and key", supported="both, or neither")
    limits = [(keys, x.shape[-1]) for x in (dense, random) if x is not None]
    limits += [(queries, random.shape[1])] if random is not None else []
    for found, most in limits:
        if isinstance(found, Tensor):
            if torch.compiler.is_compiling():
                continue
            found = int(found.max()) if found.numel() else 0
        if found > most:
            raise Unsupported(
                f"synthesizer on {found} tokens", supported=f"at most {most}", nearest=f"length={found} in the layer"
            )


class Scores(Projection):
    """Computes a layer's scores, of each kind in its options.

    Args:
        spec: the layer's specification.
    """

    random: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        self.config, self.heads, self.scale = config, spec.heads, spec.head_dim**-0.5
        length, width, kinds = config.length, spec.head_dim, config.kinds
        self.mix = nn.Parameter(torch.zeros(len(kinds))) if len(kinds) > 1 else None
        if "dense" in kinds:
            self.hidden = spec.linear(spec.dim, spec.heads * width)
            self.places = nn.Parameter(torch.empty(spec.heads, width, length))
            nn.init.normal_(self.places, std=width**-0.5)
        if "factorised_dense" in kinds:
            self.second = math.isqrt(length - 1) + 1
            self.first = -(-length // self.second)
            self.factors = spec.linear(spec.dim, spec.heads * (self.first + self.second))
        if "random" in kinds:
            scores = torch.randn(spec.heads, length, length)
            if config.train_random:
                self.random = nn.Parameter(scores)
            else:
                self.register_buffer("random", scores)
        if "factorised_random" in kinds:
            shape = (2, spec.heads, length, config.rank)
            self.low_rank = nn.Parameter(torch.randn(shape) * config.rank**-0.25)
            self.low_rank.requires_grad_(config.train_random)
        if "dot" in kinds:
            self.query = spec.linear(spec.dim, spec.heads * width)
            self.key = spec.linear(spec.memory_dim, spec.kv_heads * width)

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x, memory = call.x, call.memory
        found, kinds = dict(heads), self.config.kinds
        shares: dict[str, float | Tensor] = {kind: 1.0 for kind in kinds}
        if self.mix is not None:
            shares = dict(zip(kinds, self.mix.softmax(0), strict=True))
        if x is not None:
            found["slots"] = x.detach()[..., 0]
            found |= self._of_tokens(x, shares) | self._of_places(shares)
            if "dot" in kinds:
                found["query"] = shares["dot"] * self.scale * self._split(self.query(x))
        if "dot" in kinds and memory is not None:
            found["key"] = self._split(self.key(memory), found["v"].shape[1])
        return found

    def _of_tokens(self, x: Tensor, shares: dict[str, float | Tensor]) -> Tensors:
        terms = []
        if "dense" in shares:
            terms.append(shares["dense"] * (self._split(self.hidden(x)).relu() @ self.places))
        if "factorised_dense" in shares:
            first, second = self._split(self.factors(x)).split([self.first, self.second], -1)
            product = (first[..., None] * second[..., None, :]).flatten(-2)[..., : self.config.length]
            terms.append(shares["factorised_dense"] * product)
        return {"dense": sum(terms[1:], terms[0])} if terms else {}

    def _of_places(self, shares: dict[str, float | Tensor]) -> Tensors:
        terms = []
        if "random" in shares:
            terms.append(shares["random"] * self.random)
        if "factorised_random" in shares:
            terms.append(shares["factorised_random"] * (self.low_rank[0] @ self.low_rank[1].mT))
        return {"random": sum(terms[1:], terms[0])} if terms else {}

    def _split(self, x: Float[Tensor, "b n c"], heads: int | None = None) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (self.heads if heads is None else heads, -1)).transpose(1, 2)


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    pattern: Pattern,
    config: Config,
    sizes: dict[str, int] | None = None,
) -> Tensors:
    """Normal inputs for tests: scores of at least 96 positions, of the kinds in the options, and `slots`."""
    widths = {"h": 2, "g": 2, "d": 8, "v": 6, **(sizes or {})}
    places = max(96, m)
    shapes: dict[str, tuple[int, ...]] = {"v": (batch, widths["g"], m, widths["v"])}
    if {"dense", "factorised_dense"} & set(config.kinds):
        shapes["dense"] = (batch, widths["h"], n, places)
    if {"random", "factorised_random"} & set(config.kinds):
        shapes["random"] = (widths["h"], places, places)
    if "dot" in config.kinds:
        shapes["query"] = (batch, widths["h"], n, widths["d"])
        shapes["key"] = (batch, widths["g"], m, widths["d"])
    found = {name: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for name, s in shapes.items()}
    found["slots"] = torch.zeros(batch, n, dtype=torch.long)
    return found


def cost(shape: Shape, config: Config) -> Cost:
    """Cost with given scores; only dot products are computed."""
    heads, width = shape.batch * shape.heads, shape.dim_value + ("dot" in config.kinds) * shape.dim_key
    return Cost(
        flops=2.0 * heads * shape.n * shape.m * width,
        memory=2.0 * heads * shape.n * shape.m,
        state=float(shape.heads * shape.m * width),
        step_flops=2.0 * heads * shape.m * width,
    )


MECHANISM = Mechanism(
    name="synthesizer",
    aliases=("dense_synthesizer", "random_synthesizer"),
    alias_options={"dense_synthesizer": {"kinds": ("dense",)}, "random_synthesizer": {"kinds": ("random",)}},
    kind=Kind.ATTENTION,
    summary="Scores of positions, computed from the query token alone or learned directly, instead of dot products with keys.",
    paper=Paper("Synthesizer: Rethinking Self-Attention in Transformer Models", "2005.00743", 2020, 18),
    inputs={
        "v": "bgmv",
        "dense?": "bhnl",
        "random?": "hll",
        "query?": "bhnd",
        "key?": "bgmd",
        "slots?": "bn",
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
        "random": {"kinds": "random", "length": 200},
        "factorised": {"kinds": ("factorised_dense",), "rank": 3, "length": 200},
        "factorised random": {"kinds": ("factorised_random",), "rank": 3, "train_random": False},
        "dot products": {"kinds": ("dot",)},
        "mixed": {"kinds": ("dense", "random", "factorised_dense", "factorised_random", "dot"), "length": 200},
    },
    state=PlaceState,
    cost=cost,
    default_scale=1.0,
    honours=frozenset({"weights"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned"),
    refused_positions="its scores belong to positions, not to queries and keys",
    length="max",
    sample_inputs=sample_inputs,
    projection=Scores,
    waivers=(Waiver("layer_gradient", "its scores are not trained", variants=("factorised random",)),),
)
