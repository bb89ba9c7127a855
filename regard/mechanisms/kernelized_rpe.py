r"""Kernelized attention with relative positions: a product of feature maps times a learned weight for each offset.

When to pick it: long sequences, or images, that want a learned bias for each relative position without a matrix of all
pairs; training linear attention from scratch, which unit queries and keys make stable.
When not: exact recall of single tokens (features blur what they weigh), or relative terms that depend on the query.

Definition (Luo et al., arXiv 2106.12566, section 3), with b_{j-i} a number for each offset (key minus query):

    z_i = (phi(q_i) . sum_j e^{b_{j-i}} phi(k_j) v_j^T) / (phi(q_i) . sum_j e^{b_{j-i}} phi(k_j))
    phi(x) = e^{-|x|^2 / 2} F^-1/2 (e^{w_1 . x}, ..., e^{w_F . x}),   w_f ~ N(0, I)        (positive random features)
    q_i <- q_i / |q_i|,   k_j <- k_j / |k_j|                                                  (normalised, NKA)

phi(q) . phi(k) estimates e^{q . k}, so z approximates softmax(q k + b) v. Its error at a given F grows exponentially with
the norms of q and k, which is why they are normalised. The sums over j are products with a Toeplitz matrix: one FFT for
each pair of a feature and a value column.

| paper | here |
|---|---|
| b_{j-i} | `offset_bias` (H, 2 R + 1): offsets -R ... R; farther ones have the weight of R |
| w | `random_features` (H, F, D), drawn by :func:`draw_features`; a buffer of the layer |
| m, number of features | F: `features`, the width of a head by default |
| phi | `feature_map`: ``positive_random``, or elu + 1, relu, ... which need no `random_features` |
| NKA | `normalize`; sharpness then comes from b, and from `log_temperature` (H) where it is learned |
| c_{j-i} on images | `grid_bias` (H, 2 R_y + 1, 2 R_x + 1) with `grid` (rows, columns), in self patterns |
| weight of a class token | e^a, `class_bias` a (H), 0 where not given; a layer has it with `learn_class_bias` |

Layout: (B, H, N, D). The scale (1 by default; e^log_temperature multiplies it) is that of q . k: its root multiplies both
sides before phi. Ranks count valid tokens; in causal-self keys after the query have weight 0. In cross patterns both
sides count from 0, which suits a memory that runs beside the queries. On a grid the tokens fill it row by row, and an
earlier token is one of a row above or to the left, which the offset alone decides: so causality is half of the table.
Tokens whose role is not TOKEN (a class token) have no place: all their pairs have the weight e^a.

Since far offsets share a weight, the sum over them is linear attention's, and only the near ones are pairs: the causal
state is that sum and the last R - 1 tokens, of constant size. The same split computes whole sequences by blocks, which is
chosen instead of the FFT where it takes less time (`method`): on a CPU for all but long sequences whose offsets all have
weights of their own. The error of an FFT is relative to the largest of its numbers, so it is computed in float64.
On a grid far offsets share a weight by column at best: whole grids take the FFT, the state is every token, and a step
weighs all of them. With tokens that have no place there is no state, since places of later tokens depend on how many of
the earlier ones have one.

Deviations: the paper gives every offset of a sequence its own number; here that is R >= N - 1. Weights e^b and the
features of each query are divided by their largest, which cancels; `eps` bounds the denominator after that. Without
normalisation the Performer scales by D^-0.5: that is `scale`. Dropout is that of the layer's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    LayerSpec,
    Mask,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Role,
    Shape,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    one_of,
    state_field,
)
from regard.core.precision import wide, wide_dtype, without_autocast
from regard.core.ragged import gathering, place_queries, take_queries
from regard.core.sampling import normals
from regard.engines.cache import KeyValueState, WindowState, extend, extend_window
from regard.engines.feature_maps import FEATURE_MAPS, NONNEGATIVE
from regard.engines.fourier import fast_size
from regard.engines.gated_recurrence import gated_recurrence
from regard.layers.parts import LayerCall, Projection
from regard.positions.alibi import Alibi
from regard.positions.protocol import Positions
from regard.positions.relative import Relative

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

POSITIVE_RANDOM = "positive_random"
NORM_EPS = 1e-6
NUMBERS_AT_ONCE = 1 << 22
"""Numbers of one product of features and values that are transformed at once."""
OFFSETS = ("learned", "bucketed", "alibi", "power", "none")


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        feature_map: ``positive_random``, or a map that is never negative: ``elu``, ``relu``, ``relu_squared``,
            ``sigmoid``, ``exp``.
        normalize: divide each query and key by its norm.
        eps: least denominator, > 0 and finite.
        method: how whole sequences are computed: ``fft``, ``blocks`` (pairs near, a running sum far), or ``auto``. Grids
            and sequences with roles are always computed by FFT.
        features: F of a layer's random features, >= 1; the width of a head when None.
        orthogonal: whether random features of a layer are orthogonal, D at a time.
        share_features: whether all heads of a layer have the same random features.
        redraw: a layer in training draws new features every so many calls; 0 for never.
        offsets: b of a layer: ``learned`` (one number an offset, 0 at the start), ``bucketed`` (T5's buckets), ``alibi``
            (fixed slopes), ``power`` (e^b = (1 + distance)^-a with a learned a >= 0 for each head, 1 at the start) or ``none``.
        share_offsets: whether all heads of a layer have the same ``learned`` b.
        max_offset: R of a layer, >= 1; or (R_y, R_x) for learned offsets on a grid.
        learn_temperature: whether a layer learns log_temperature, 0 at the start.
        learn_class_bias: whether a layer learns class_bias, 0 at the start.
    """

    feature_map: str = POSITIVE_RANDOM
    normalize: bool = True
    eps: float = 1e-6
    method: str = "auto"
    features: int | None = None
    orthogonal: bool = False
    share_features: bool = False
    redraw: int = 0
    offsets: str = "learned"
    share_offsets: bool = False
    max_offset: int | tuple[int, int] = 128
    learn_temperature: bool = False
    learn_class_bias: bool = False

    def __post_init__(self) -> None:
        one_of("feature_map", self.feature_map, (POSITIVE_RANDOM, *NONNEGATIVE))
        one_of("method", self.method, ("auto", "fft", "blocks"))
        one_of("offsets", self.offsets, OFFSETS)
        if not 0 < self.eps < math.inf:
            raise Unsupported(f"eps={self.eps}", supported="a finite eps > 0", nearest="eps=1e-6")
        if self.features is not None:
            at_least("features", self.features, 1)
        at_least("redraw", self.redraw, 0)
        sides = self.max_offset if isinstance(self.max_offset, tuple) else (self.max_offset,)
        for side in sides:
            at_least("max_offset", side, 1)
        if len(sides) > 1 and (len(sides) != 2 or self.offsets not in ("learned", "none")):
            raise Unsupported(
                f"max_offset={self.max_offset} with offsets={self.offsets!r}",
                supported="a number, or (rows, columns) with offsets='learned'",
                nearest=f"max_offset={max(sides)}",
            )
        if self.offsets == "bucketed" and sides[0] < 17:
            raise Unsupported(
                f"max_offset={self.max_offset} with offsets='bucketed' (32 buckets)",
                supported="max_offset >= 17",
                nearest="offsets='learned'",
            )


@dataclass(frozen=True)
class KernelizedState(KeyValueState):
    """State of causal-self: mapped keys and values (with a column of ones) of the last R - 1 tokens, right-aligned, and the sum
    `memory` of phi(k) v^T over those before; on a grid those of every token. Of cross patterns: the whole memory, and the
    queries that have read it."""

    memory: Float[Tensor, "b h f v"] = state_field()
    queries: Int[Tensor, " b"] = state_field()


def draw_features(
    features: int, dim: int, *, heads: int = 1, orthogonal: bool = False, generator: torch.Generator | None = None
) -> Float[Tensor, "heads features dim"]:
    """Directions w of positive random features, N(0, I) each, in float32.

    Args:
        features: F, >= 1.
        dim: width of a head.
        heads: independent draws; 1 serves all heads.
        orthogonal: directions orthogonal within each group of `dim`, with norms drawn as those of independent ones.
        generator: source of the draws.
    """
    at_least("features", features, 1)
    if not orthogonal:
        return torch.randn(heads, features, dim, generator=generator)
    groups = math.ceil(features / dim)
    directions = torch.linalg.qr(torch.randn(heads, groups, dim, dim, generator=generator)).Q.mT
    norms = torch.randn(heads, features, dim, generator=generator).norm(dim=-1, keepdim=True)
    return norms * directions.flatten(1, 2)[:, :features]


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    offset_bias: Float[Tensor, "h offsets"] | None = None,
    grid_bias: Float[Tensor, "h rows columns"] | None = None,
    random_features: Float[Tensor, "h f d"] | None = None,
    log_temperature: Float[Tensor, " h"] | None = None,
    class_bias: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the whole weight matrix."""
    n, m = q.shape[2], k.shape[2]
    c, outside = _offset_weights(call, q, offset_bias, grid_bias, class_bias)
    i, j = torch.arange(n, device=q.device), torch.arange(m, device=q.device)
    if call.pattern is Pattern.CAUSAL_SELF:
        i = i + m - n
    grid = _grid(call, c, m)
    if grid is None:
        by_offset = c[:, None, _index(j - i[:, None], c.shape[-1])]  # (h, 1, n, m)
    else:
        token = _with_place(call, grid, k)
        places: tuple[Tensor, ...] = torch.unravel_index((token.cumsum(-1) - 1).clamp(min=0), tuple(grid))
        sides = zip(places, c.shape[1:], strict=True)
        i = i.clamp(min=0)  # of queries before the first key, which see nothing
        at: tuple[Any, ...] = (slice(None), *(_index(p[:, None] - p[:, i, None], size) for p, size in sides))
        both = token[:, None] & token[:, i, None]
        by_offset = torch.where(both, c[at], outside[:, None, None, None])  # (h, b, n, m)
    weights = by_offset.transpose(0, 1) * (
        _queries(call, q, random_features, log_temperature) @ _keys(call, k, random_features, log_temperature).mT
    )
    if call.pattern is Pattern.CAUSAL_SELF:
        weights = weights.tril(m - n)
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=call.config.eps)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    offset_bias: Float[Tensor, "h offsets"] | None = None,
    grid_bias: Float[Tensor, "h rows columns"] | None = None,
    random_features: Float[Tensor, "h f d"] | None = None,
    log_temperature: Float[Tensor, " h"] | None = None,
    class_bias: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Whole sequences, by FFT or by blocks."""
    causal = call.pattern is Pattern.CAUSAL_SELF
    n, m = q.shape[2], k.shape[2]
    with without_autocast(q.device):
        c, outside = _offset_weights(call, q, offset_bias, grid_bias, class_bias)
        queries = _queries(call, q, random_features, log_temperature)
        keys, values = _keys(call, k, random_features, log_temperature), _with_ones(v)
        grid = _grid(call, c, m)
        aligned = not causal or (n == m and call.lengths is call.memory_lengths)
        if not aligned:
            queries = place_queries(queries, m, call.lengths, call.memory_lengths)
        if grid is not None:
            output = _on_grid(call, queries, keys, values, c, outside, grid)
        else:
            output = _on_sequence(call, n, queries, keys, values, c)
        if not aligned:
            output = take_queries(output, n, call.lengths, call.memory_lengths)
        return _divide(call, output, v)


def _on_sequence(
    call: Call,
    n: int,
    q: Float[Tensor, "b h slots f"],
    k: Float[Tensor, "b h m f"],
    v: Float[Tensor, "b h m v"],
    c: Float[Tensor, "h offsets"],
) -> Float[Tensor, "b h slots v"]:
    """Sums of a call of n queries over a plain sequence, by the method that takes less time."""
    m, causal = k.shape[2], call.pattern is Pattern.CAUSAL_SELF
    reach = min(c.shape[-1] // 2, max(n, m, 1))
    c = c[:, c.shape[-1] // 2 - reach : c.shape[-1] // 2 + reach + 1]  # no pair is farther apart
    reach = max(n, m) if call.pattern.cross else reach
    if _fft_is_best(call.config, n, m, k.shape[-1], v.shape[-1], reach, causal=causal):
        return _by_fft(q, k, v, c, (max(q.shape[2], m),))
    if call.pattern.cross:
        offsets = torch.arange(m, device=q.device) - torch.arange(n, device=q.device)[:, None]
        return _by_pairs(q, k, v, c, _index(offsets[None], c.shape[-1]))
    return _by_blocks(call, q, *_surrounded(k, v, c, causal), c, causal=causal)[0]


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    offset_bias: Float[Tensor, "h offsets"] | None = None,
    grid_bias: Float[Tensor, "h rows columns"] | None = None,
    random_features: Float[Tensor, "h f d"] | None = None,
    log_temperature: Float[Tensor, " h"] | None = None,
    class_bias: Float[Tensor, " h"] | None = None,
) -> Result:
    """Causal-self with state in and out, by blocks; on a grid by pairs. Also the step."""
    n, m = q.shape[2], k.shape[2]
    if call.roles is not None:
        raise Unsupported(
            "kernelized_rpe with roles and a state, which does not know how many of its tokens have a place",
            supported="whole sequences",
            nearest="roles=None",
        )
    with without_autocast(q.device):
        c, _ = _offset_weights(call, q, offset_bias, grid_bias, class_bias)
        queries = _queries(call, q, random_features, log_temperature)
        keys, values = _keys(call, k, random_features, log_temperature), _with_ones(v)
        if grid_bias is not None:
            output, state = _continued_on_grid(call, queries, keys, values, c)
            return Result(_divide(call, output, v), state)
        past = _past(call, keys, values, c.shape[-1] // 2 - 1)
        aligned = n == m and call.lengths is call.memory_lengths
        if not aligned:
            queries = place_queries(queries, m, call.lengths, call.memory_lengths)
        window = call.replace(state=WindowState(past.k, past.v, past.length))
        near, keys, values, _ = extend_window(window, keys, values, m, past.k.shape[2])
        output, memory = _by_blocks(call, queries, keys, values, c, causal=True, memory=past.memory)
        assert memory is not None
        if not aligned:
            output = take_queries(output, n, call.lengths, call.memory_lengths)
    ranks = near.length[:, None] + torch.arange(-near.k.shape[2], 0, device=q.device)
    state = KernelizedState(near.k, near.v, ranks.clamp(min=-1), near.length, memory, past.queries)
    return Result(_divide(call, output, v), state)


def absorb(
    call: Call,
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    random_features: Float[Tensor, "h f d"] | None = None,
    log_temperature: Float[Tensor, " h"] | None = None,
) -> KernelizedState:
    """Mapped memory into a cache; more may follow."""
    _check_roles(call)
    with without_autocast(k.device):
        keys, values = _keys(call, k, random_features, log_temperature), _with_ones(v)
    cache, _ = extend(call, keys, values, 0)
    queries = torch.zeros_like(cache.length) if call.state is None else call.state.queries
    return KernelizedState(cache.k, cache.v, cache.ranks, cache.length, keys[:, :, 0:0, :0], queries)


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    offset_bias: Float[Tensor, "h offsets"] | None = None,
    grid_bias: Float[Tensor, "h rows columns"] | None = None,
    random_features: Float[Tensor, "h f d"] | None = None,
    log_temperature: Float[Tensor, " h"] | None = None,
    class_bias: Float[Tensor, " h"] | None = None,
) -> Result:
    """Queries on absorbed memory, counted on from those that have read it before."""
    state: KernelizedState = call.state
    n = q.shape[2]
    with without_autocast(q.device):
        c, _ = _offset_weights(call, q, offset_bias, grid_bias, class_bias)
        queries = _queries(call, q, random_features, log_temperature)
        where = torch.arange(n, device=q.device) + state.queries[:, None]
        offsets = state.ranks[:, None] - where[:, :, None]
        output = _by_pairs(queries, state.k, state.v, c, _index(offsets, c.shape[-1]))
    after = state.queries + (n if call.lengths is None else call.lengths)
    state = KernelizedState(state.k, state.v, state.ranks, state.length, state.memory, after)
    return Result(_divide(call, output, q), state)


def _mapped(
    call: Call, x: Tensor, random_features: Tensor | None, log_temperature: Tensor | None
) -> tuple[Float[Tensor, "b h n f"], Float[Tensor, "b h n 1"]]:
    """The arguments of phi, in at least float32: projections on the random features, or phi itself; and |x|^2 / 2."""
    config: Config = call.config
    if call.scale < 0:
        raise Unsupported(f"kernelized_rpe with scale={call.scale}", supported="scale >= 0", nearest="scale=1.0")
    dtype = wide_dtype(x)
    x = x.to(dtype)
    x = F.normalize(x, dim=-1, eps=NORM_EPS) if config.normalize else x
    x = x if call.scale == 1 else math.sqrt(call.scale) * x
    if log_temperature is not None:
        x = (log_temperature.to(dtype) / 2).exp()[:, None, None] * x
    if config.feature_map != POSITIVE_RANDOM:
        return FEATURE_MAPS[config.feature_map](x), x[..., :1]
    if random_features is None:
        raise Unsupported(
            "kernelized_rpe with positive random features but without random_features",
            supported="random_features=draw_features(features, head_dim) of regard.mechanisms.kernelized_rpe",
            nearest="feature_map='elu'",
        )
    return x @ random_features.to(dtype).mT, x.square().sum(-1, keepdim=True) / 2


def _queries(call: Call, q: Tensor, random_features: Tensor | None, log_temperature: Tensor | None) -> Tensor:
    """phi(q); of random features relative to the largest of each query."""
    found, _ = _mapped(call, q, random_features, log_temperature)
    if call.config.feature_map != POSITIVE_RANDOM:
        return found
    return (found - found.detach().amax(-1, keepdim=True)).exp()


def _keys(call: Call, k: Tensor, random_features: Tensor | None, log_temperature: Tensor | None) -> Tensor:
    """phi(k), zero at padding."""
    found, half_square = _mapped(call, k, random_features, log_temperature)
    if call.config.feature_map == POSITIVE_RANDOM:
        found = (found - half_square).exp() / found.shape[-1]
    valid = call.valid_keys(k.shape[2])
    return found if valid is None else torch.where(valid[:, None, :, None], found, 0)


def _with_ones(v: Float[Tensor, "b h m v"]) -> Float[Tensor, "b h m v+1"]:
    return F.pad(wide(v), (0, 1), value=1.0)


def _divide(call: Call, output: Float[Tensor, "b h n v+1"], like: Tensor) -> Float[Tensor, "b h n v"]:
    return (output[..., :-1] / output[..., -1:].clamp(min=call.config.eps)).to(like.dtype)


def _check_roles(call: Call) -> None:
    if call.roles is not None and call.pattern.cross:
        raise Unsupported(
            f"kernelized_rpe with roles in {call.pattern.value}",
            supported="noncausal-self, causal-self",
            nearest="roles=None",
        )


def _offset_weights(
    call: Call, q: Tensor, offset_bias: Tensor | None, grid_bias: Tensor | None, class_bias: Tensor | None
) -> tuple[Float[Tensor, "h *offsets"], Float[Tensor, " h"]]:
    """e^b of each offset and e^a, relative to the largest that is used; 0 of offsets that the pattern does not see."""
    _check_roles(call)
    table = offset_bias if grid_bias is None else grid_bias
    if grid_bias is not None and (call.grid is None or call.pattern.cross):
        raise Unsupported(
            f"kernelized_rpe with grid_bias in {call.pattern.value} {'without' if call.grid is None else 'with'} a grid",
            supported="noncausal-self and causal-self with grid=(rows, columns)",
            nearest="offset_bias",
        )
    if table is None:
        table = q.new_zeros(q.shape[1], 3)
    if any(size < 3 or size % 2 == 0 for size in table.shape[1:]):
        raise Unsupported(
            f"kernelized_rpe with biases of {tuple(table.shape[1:])} offsets", supported="2 R + 1 of them, with R >= 1"
        )
    dtype = wide_dtype(q)
    flat = table.to(dtype).flatten(1)
    if call.pattern is Pattern.CAUSAL_SELF:
        # in a table, as in a sequence or on a grid, what comes after the middle comes later
        later = torch.arange(flat.shape[1], device=flat.device) > flat.shape[1] // 2
        flat = flat.masked_fill(later, -torch.inf)
    outside = flat.new_zeros(1) if class_bias is None else class_bias.to(dtype)
    largest = flat.amax(-1)
    if call.roles is not None:
        largest = torch.maximum(largest, outside)
    largest = largest.detach()
    return (flat - largest[:, None]).exp().unflatten(1, table.shape[1:]), (outside - largest).exp()


def _index(offsets: Int[Tensor, "..."], size: int) -> Int[Tensor, "..."]:
    """Where a table of `size` offsets has each offset."""
    return (offsets + size // 2).clamp(0, size - 1)


def _grid(call: Call, c: Float[Tensor, "h *offsets"], n: int) -> tuple[int, ...] | None:
    """Sides of the grid that tokens fill: (rows, columns), or (n,) where some tokens have no place; None for a plain
    sequence."""
    if c.ndim == 2:
        return None if call.roles is None else (n,)
    if call.grid is None or len(call.grid) != 2:
        raise Unsupported(f"kernelized_rpe on a grid {call.grid}", supported="(rows, columns)")
    return call.grid


def _with_place(call: Call, grid: Sequence[int], k: Float[Tensor, "b h m d"]) -> Bool[Tensor, "b m"]:
    """Tokens that have a place on the grid."""
    batch, m = k.shape[0], k.shape[2]
    token = k.new_ones(batch, m, dtype=torch.bool) if call.roles is None else call.roles == Role.TOKEN
    valid = call.valid_keys(m)
    token = token if valid is None else token & valid
    if not torch.compiler.is_compiling() and token.numel():
        most = int(token.sum(-1).max())
        if most > math.prod(grid):
            raise Unsupported(
                f"kernelized_rpe with {most} tokens on a grid {tuple(grid)}", supported=f"at most {math.prod(grid)}"
            )
    return token


def _past(call: Call, keys: Tensor, values: Tensor, width: int) -> KernelizedState:
    """The state that a call continues, or an empty one."""
    if call.state is not None:
        if call.state.memory.shape[2] != keys.shape[3]:
            raise Unsupported(
                "kernelized_rpe with the state of a grid but without grid_bias",
                supported="the grid_bias that the state was made with",
            )
        if call.state.k.shape[2] != width:
            raise Unsupported(
                f"kernelized_rpe with biases of {2 * width + 3} offsets and a state of {call.state.k.shape[2]} tokens",
                supported=f"the {2 * call.state.k.shape[2] + 3} offsets that the state was made with",
            )
        return call.state
    batch, heads, _, features = keys.shape
    none = torch.zeros(batch, dtype=torch.long, device=keys.device)
    return KernelizedState(
        keys.new_zeros(batch, heads, width, features),
        values.new_zeros(batch, heads, width, values.shape[-1]),
        none.new_full((batch, width), -1),
        none,
        keys.new_zeros(batch, heads, features, values.shape[-1]),
        none,
    )


def _surrounded(keys: Tensor, values: Tensor, c: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Keys and values with R - 1 empty slots before them, and as many after them unless causal."""
    reach = c.shape[-1] // 2 - 1
    sides = (0, 0, reach, 0 if causal else reach)
    return F.pad(keys, sides), F.pad(values, sides)


def _by_blocks(
    call: Call,
    q: Float[Tensor, "b h n f"],
    k: Float[Tensor, "b h slots f"],
    v: Float[Tensor, "b h slots v"],
    c: Float[Tensor, "h offsets"],
    *,
    causal: bool,
    memory: Float[Tensor, "b h f v"] | None = None,
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h f v"] | None]:
    """Sums over near keys by pairs and over far ones, which share a weight, by recurrence; and the memory after them.

    Args:
        k: query i is at the slot i + R - 1, and `memory` holds what came before the first slot.
    """
    n, reach = q.shape[2], c.shape[-1] // 2 - 1
    if n == 0:
        return v.new_zeros(*q.shape[:3], v.shape[-1]), memory
    size = min(call.chunk_size or 64, n)
    extent, empty = size + reach * (1 if causal else 2), -n % size
    rows = F.pad(q, (0, 0, 0, empty)).unflatten(2, (-1, size))  # (b, h, blocks, size, f)
    keys, values = (F.pad(x, (0, 0, 0, empty)).unfold(2, extent, size) for x in (k, v))  # (b, h, blocks, width, extent)
    slots = torch.arange(extent, device=q.device)
    offsets = slots - reach - slots[:size, None]
    near = (offsets.abs() <= reach) & (offsets <= (0 if causal else reach))
    weights = torch.where(near, c[:, _index(offsets, c.shape[-1])], 0)
    output = (rows @ keys * weights[:, None] @ values.mT).flatten(2, 3)[:, :, :n]
    if memory is None and n <= reach + 1:
        return output, None

    # the last key that is far from a query is in the slot before the query's; a row's memory ends with its queries
    valid, past = call.valid_keys(n), k[:, :, :n]
    past = past if valid is None else torch.where(valid[:, None, :, None], past, 0)
    before, memory = gated_recurrence(q, past, v[:, :, :n], state=memory, inclusive=False, backend=call.backend)
    assert before is not None
    output = output + c[:, :1, None] * before
    if not causal:
        flipped = (x.flip(2)[:, :, :n] for x in (q, k, v))
        after, _ = gated_recurrence(*flipped, inclusive=False, backend=call.backend)
        assert after is not None
        output = output + c[:, -1:, None] * after.flip(2)
    return output, memory


def _by_pairs(
    q: Float[Tensor, "b h n f"],
    k: Float[Tensor, "b h m f"],
    v: Float[Tensor, "b h m v"],
    c: Float[Tensor, "h offsets"],
    at: Int[Tensor, "#b n m"],
) -> Float[Tensor, "b h n v"]:
    """Every pair, some queries at a time; `at` says where c has its weight."""
    rows = max(1, NUMBERS_AT_ONCE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))

    def mix(q: Tensor, k: Tensor, v: Tensor, c: Tensor, at: Tensor) -> Tensor:
        return (q @ k.mT * c[:, at].transpose(0, 1)) @ v

    pieces = [
        _mixed(mix, rows < q.shape[2], a, k, v, c, o) for a, o in zip(q.split(rows, 2), at.split(rows, 1), strict=True)
    ]
    return torch.cat(pieces, 2)


def _mixed(mix: Callable[..., Tensor], again: bool, *tensors: Tensor) -> Tensor:
    """``mix(*tensors)``; with `again` its inner numbers are not kept for a backward pass, but computed again."""
    if again and torch.is_grad_enabled():
        return checkpoint(mix, *tensors, use_reentrant=False)
    return mix(*tensors)


def _by_fft(
    q: Float[Tensor, "b h n f"],
    k: Float[Tensor, "b h m f"],
    v: Float[Tensor, "b h m v"],
    c: Float[Tensor, "h *offsets"],
    grid: Sequence[int],
) -> Float[Tensor, "b h n v"]:
    """Products with the Toeplitz matrix of c, embedded in a circulant one, for some value columns at a time.

    Tokens fill `grid` row by row; a sequence is a grid of one side.
    """
    n, places = q.shape[2], math.prod(grid)
    if v.numel() == 0 or q.numel() == 0:
        return v.new_zeros(*q.shape[:3], v.shape[-1])
    sizes = [fast_size(2 * side - 1) for side in grid]
    # an error of a transform is as large for a query that sees few keys as for one that sees all
    dtype = v.dtype if v.device.type == "mps" else torch.float64
    kernel = c.to(dtype)
    for axis, (size, side) in enumerate(zip(sizes, grid, strict=True), 1):
        t = torch.arange(size, device=c.device)
        offsets = torch.where(t < side, -t, size - t)
        kernel = kernel.index_select(axis, _index(offsets, c.shape[axis]))
        kernel = torch.where((offsets < side).view(-1, *[1] * (c.ndim - 1 - axis)), kernel, 0)
    axes = tuple(range(-len(sizes), 0))
    spectrum = torch.fft.rfftn(kernel, dim=axes)[:, None, None]  # of (h, 1 feature, 1 column, *grid)
    q, k, v = (F.pad(x, (0, 0, 0, places - x.shape[2])).mT.unflatten(-1, tuple(grid)) for x in (q, k, v))

    def mix(columns: Float[Tensor, "b h columns *grid"], q: Tensor, k: Tensor, spectrum: Tensor) -> Tensor:
        products = k[:, :, :, None] * columns[:, :, None].to(dtype)  # (b, h, f, columns, *grid)
        mixed = torch.fft.irfftn(torch.fft.rfftn(products, s=sizes, dim=axes) * spectrum, s=sizes, dim=axes)
        for axis, side in zip(axes, grid, strict=True):
            mixed = mixed.narrow(axis, 0, side)
        return (q[:, :, :, None] * mixed).sum(2).to(columns.dtype)

    width = max(1, NUMBERS_AT_ONCE // max(1, math.prod(q.shape[:3]) * math.prod(sizes)))
    pieces = [_mixed(mix, width < v.shape[2], part, q, k, spectrum) for part in v.split(width, 2)]
    return torch.cat(pieces, 2).flatten(3).mT[:, :, :n]


def _on_grid(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Float[Tensor, "h *offsets"],
    outside: Float[Tensor, " h"],
    grid: Sequence[int],
) -> Float[Tensor, "b h n v"]:
    """Tokens with a place by FFT; pairs with a token that has none weigh `outside`."""
    token = _with_place(call, grid, k)
    if call.roles is None:
        output = _by_fft(q, k, v, c, grid)
        return F.pad(output, (0, 0, 0, q.shape[2] - output.shape[2]))  # padding may need more places than the grid has
    batch, n = token.shape
    layout = gathering(Mask(valid=token), batch, n, q.device)
    placed = (layout.gather(x, axis=2)[:, :, : math.prod(grid)] for x in (q, k, v))
    queries, keys, values = placed
    inside = _by_fft(queries, keys, values, c, grid)
    inside = layout.scatter(F.pad(inside, (0, 0, 0, n - inside.shape[2])), axis=2)
    token = token[:, None, :, None]

    def read(q: Tensor, k: Tensor) -> Tensor:
        if call.pattern is not Pattern.CAUSAL_SELF:
            return q @ (k.mT @ v)
        output, _ = gated_recurrence(q, k, v, backend=call.backend)
        assert output is not None
        return output

    # all queries read the tokens without a place, and those without one the others too
    pairs = read(q, torch.where(token, 0, k)) + read(torch.where(token, 0, q), torch.where(token, k, 0))
    return inside + outside[:, None, None] * pairs


def _continued_on_grid(
    call: Call,
    q: Float[Tensor, "b h n f"],
    k: Float[Tensor, "b h m f"],
    v: Float[Tensor, "b h m v"],
    c: Float[Tensor, "h rows columns"],
) -> tuple[Float[Tensor, "b h n v"], KernelizedState]:
    """Sums over every token of a grid so far, and the state that holds them all."""
    if call.state is not None and call.state.memory.shape[2] != 0:
        raise Unsupported(
            "kernelized_rpe with grid_bias and the state of a plain sequence", supported="the state of a grid"
        )
    grid = _grid(call, c, k.shape[2])
    assert grid is not None
    cache, where = extend(call, k, v, q.shape[2])
    if not torch.compiler.is_compiling() and cache.length.numel() and int(cache.length.max()) > math.prod(grid):
        raise Unsupported(
            f"kernelized_rpe with {int(cache.length.max())} tokens on a grid {tuple(grid)}",
            supported=f"at most {math.prod(grid)}",
        )

    def between(place: Callable[[Tensor], Tensor], size: int) -> Int[Tensor, "b n m"]:
        return _index(place(where.keys)[:, None] - place(where.queries)[:, :, None], size)

    # an empty slot has a key of zeros, and a query before the first key only offsets that are not seen
    rows = between(lambda rank: rank // grid[1], c.shape[1])
    at = rows * c.shape[2] + between(lambda rank: rank % grid[1], c.shape[2])
    output = _by_pairs(q, cache.k, cache.v, c.flatten(1), at)
    none = torch.zeros_like(cache.length)
    return output, KernelizedState(cache.k, cache.v, cache.ranks, cache.length, k[:, :, 0:0, :0], none)


FFT_SLOWNESS = 8.0
"""Time of an operation of an FFT over that of a matrix product, on one core."""


def _fft_operations(size: int, f: int, v: int) -> float:
    """Multiply-adds counted twice of one head's transforms of `size` points."""
    rounds = 0
    while 1 << rounds < size:  # the logarithm, also of a size that is a symbol of a graph
        rounds += 1
    return f * v * (5.0 * size * rounds + 8.0 * size)


def _operations(n: int, m: int, f: int, v: int, reach: int, *, causal: bool) -> tuple[float, float]:
    """Multiply-adds counted twice of one head: by FFT, and by blocks."""
    longest = max(n, m, 1)
    fft = _fft_operations(2 * longest, f, v)
    near = 64 + min(reach, longest) * (1 if causal else 2)
    far = 4.0 * m * f * v * (1 if causal else 2) if longest > reach else 0.0
    return fft, 2.0 * n * near * (f + v) + far


def _fft_is_best(config: Config, n: int, m: int, f: int, v: int, reach: int, *, causal: bool) -> bool:
    if config.method != "auto":
        return config.method == "fft"
    fft, blocks = _operations(n, m, f, v, reach, causal=causal)
    return FFT_SLOWNESS * fft < blocks


class Offsets(Projection):
    """Gives a layer's heads their random features, biases of offsets and temperature."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        self.config, self.heads, self.head_dim = config, spec.heads, spec.head_dim
        self.causal = spec.pattern is Pattern.CAUSAL_SELF
        self.calls = 0
        self.random_features: Tensor | None
        self.register_buffer("random_features", self._draw(None) if config.feature_map == POSITIVE_RANDOM else None)
        self.log_temperature = nn.Parameter(torch.zeros(spec.heads)) if config.learn_temperature else None
        self.class_bias = nn.Parameter(torch.zeros(spec.heads)) if config.learn_class_bias else None
        self.offset_bias = self.grid_bias = self.exponent = None
        self.scheme: Positions | None = None
        heads = 1 if config.share_offsets else spec.heads
        if isinstance(config.max_offset, tuple):
            if spec.pattern.cross:
                raise Unsupported(
                    f"kernelized_rpe with max_offset={config.max_offset} in {spec.pattern.value}",
                    supported="noncausal-self, causal-self",
                    nearest=f"max_offset={max(config.max_offset)}",
                )
            if config.offsets == "learned":
                self.grid_bias = nn.Parameter(torch.zeros(heads, *(2 * side + 1 for side in config.max_offset)))
        elif config.offsets == "learned":
            self.offset_bias = nn.Parameter(torch.zeros(heads, 2 * config.max_offset + 1))
        elif config.offsets == "power":
            self.exponent = nn.Parameter(torch.ones(spec.heads))
        elif config.offsets == "bucketed":
            self.scheme = Relative(heads=spec.heads, max_distance=config.max_offset, std=0.0)
        elif config.offsets == "alibi":
            self.scheme = Alibi(heads=spec.heads)

    def _draw(self, generator: torch.Generator | None) -> Float[Tensor, "h f d"]:
        config = self.config
        features = self.head_dim if config.features is None else config.features
        heads = 1 if config.share_features else self.heads
        return draw_features(features, self.head_dim, heads=heads, orthogonal=config.orthogonal, generator=generator)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Replace the random features by new ones."""
        if self.random_features is not None:
            self.random_features.copy_(self._draw(generator))

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        context = call.context
        if self.training and self.config.redraw:
            self.calls += 1
            if self.calls % self.config.redraw == 0:
                self.redraw(context.generator)
        made = {
            "offset_bias": self._table(next(iter(heads.values())).device),
            "grid_bias": self.grid_bias,
            "random_features": self.random_features,
            "log_temperature": self.log_temperature,
            "class_bias": self.class_bias,
        }
        return heads | {name: x for name, x in made.items() if x is not None}

    def _table(self, device: torch.device) -> Float[Tensor, "h offsets"] | None:
        if self.exponent is None and self.scheme is None:
            return self.offset_bias
        assert isinstance(self.config.max_offset, int)
        offsets = torch.arange(-self.config.max_offset, self.config.max_offset + 1, device=device)
        if self.scheme is not None:
            assert self.scheme.by_distance is not None
            return self.scheme.by_distance(offsets, self.causal)
        assert self.exponent is not None
        precise = wide_dtype(self.exponent)
        return -self.exponent.clamp(min=0)[:, None] * offsets.abs().to(precise).log1p()


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    config: Config,
    sizes: dict[str, int] | None = None,
    grid: tuple[int, ...] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests and timings: biases of 11 offsets, or 3 x 5 on a grid, fewer than the tests' sequences have."""
    size = {"h": 2, "d": 8, "v": 6} | (sizes or {})
    heads, width = size["h"], size["d"]
    shapes = {
        "q": (batch, heads, n, width),
        "k": (batch, heads, m, width),
        "v": (batch, heads, m, size["v"]),
    }
    shapes |= {"offset_bias": (heads, size.get("o", 11))} if grid is None else {"grid_bias": (heads, 3, 5)}
    if config.feature_map == POSITIVE_RANDOM:
        shapes["random_features"] = (heads, config.features or width, width)
    if config.learn_temperature:
        shapes["log_temperature"] = (heads,)
    return normals(generator, shapes, dtype)


def _farthest(config: Config) -> int:
    """Largest offset with a number of its own, on any side of a grid."""
    return config.max_offset if isinstance(config.max_offset, int) else max(config.max_offset)


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    return {"o": 2 * _farthest(config) + 1}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of causal-self by the method that is chosen; on a grid (a tuple `max_offset`) of as many places as keys."""
    reach = _farthest(config)
    features = config.features if config.features and config.feature_map == POSITIVE_RANDOM else shape.dim_key
    width = shape.dim_value + 1
    heads = shape.batch * shape.heads
    size = (shape.n, shape.m, features, width, reach)
    fft, blocks = _operations(*size, causal=True)
    by_fft = _fft_is_best(config, *size, causal=True)
    maps = 2.0 * (shape.n + shape.m) * shape.dim_key * features if config.feature_map == POSITIVE_RANDOM else 0.0
    if isinstance(config.max_offset, tuple):
        points = 4 * max(shape.m, 1)  # twice as many along either side
        return Cost(
            flops=heads * (maps + _fft_operations(points, features, width)),
            memory=float(heads * shape.m * (5 * features + width)),
            state=float(shape.heads * shape.m * (features + width)),
            step_flops=heads * (2.0 * (shape.m + 1) * (features + width) + maps / max(shape.n + shape.m, 1)),
        )
    near = 64 + min(reach, shape.m)
    table = (reach - 1) * (features + width) + features * width
    step = (
        2.0 * min(reach, shape.m + 1) * (features + width) + 4.0 * features * width + maps / max(shape.n + shape.m, 1)
    )
    return Cost(
        flops=heads * (maps + (fft if by_fft else blocks)),
        memory=float(heads * shape.m * (features + width + (2 * features if by_fft else near * (1 + features / 64)))),
        state=float(shape.heads * table),
        step_flops=heads * step,
    )


MECHANISM = Mechanism(
    name="kernelized_rpe",
    aliases=("nka_rpe", "kernelized_attention_rpe", "nprf_rpe", "kernelized"),
    kind=Kind.ATTENTION,
    summary="A product of feature maps times a learned weight for each offset, which no matrix of pairs is needed for.",
    paper=Paper(
        "Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding", "2106.12566", 2021, 36
    ),
    inputs={
        "q": "bhnd",
        "k": "bhmd",
        "v": "bhmv",
        "offset_bias?": "ho",
        "grid_bias?": "hyx",
        "random_features?": "hfd",
        "log_temperature?": "h",
        "class_bias?": "h",
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
        "fft": {"method": "fft", "max_offset": 20},
        "blocks": {"method": "blocks", "share_offsets": True, "max_offset": 5, "eps": 1e-3},
        "orthogonal features": {"features": 3, "orthogonal": True, "share_features": True, "redraw": 7},
        "elu": {"feature_map": "elu", "learn_temperature": True, "offsets": "bucketed"},
        "relu": {"feature_map": "relu", "offsets": "alibi"},
        "squared relu": {"feature_map": "relu_squared", "offsets": "power"},
        "sigmoid": {"feature_map": "sigmoid", "offsets": "none", "normalize": False},
        "exp": {"feature_map": "exp", "learn_class_bias": True},
        "on a grid": {"max_offset": (12, 12), "learn_class_bias": True},
    },
    variant_patterns={
        "on a grid": (Pattern.NONCAUSAL_SELF,),
    },
    grid_variants=frozenset({"on a grid"}),
    engine="gated_recurrence",
    state=KernelizedState,
    cost=cost,
    axis_sizes=axis_sizes,
    default_scale=1.0,
    honours=frozenset({"roles"}),
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned"),
    refused_positions="it has a weight for each relative position already",
    projection=Offsets,
    sample_inputs=sample_inputs,
    waivers=(Waiver("layer_lengths", "the size of its Fourier transform is a constant of the program"),),
)
