r"""Universal relative positions (URPE): softmax weights times a learned number for each offset.

When to pick it: a noncausal transformer with relative positions only that must know where its tokens are (positions in
language, graphs, images), at 2 R + 1 numbers a head.
When not: causal models, whose mask tells positions already; long sequences where no kernel runs (:func:`regard.which_backend`),
whose weights are computed one by one.

Definition (Luo et al., arXiv 2205.13401, section 3), with B and C constant along diagonals:

    A = softmax(tau Q K^T + B),     A'_ij = A_ij c_{j-i},     O = A' V

A bias inside the softmax leaves every row of A summing to 1, so tokens that are all equal stay all equal whatever B is: no
network of such layers, however deep or wide, can tell their positions, nor approximate every continuous function of
sequences. The rows of A' sum to anything and may be negative. C of ones gives the usual attention.

| paper | here |
|---|---|
| B = b_{j-i} | any scheme of the layer that adds to scores; `toeplitz` by default, T5's `relative` where C is bucketed |
| C = c_{j-i} | `factors` (H, 2 R + 1): offsets -R ... R, key minus query; farther ones have the factor of R |
| C on images | `grid_factors` (H, 2 R_y + 1, 2 R_x + 1) with `grid`, in whole calls of self patterns, tokens row by row |
| C on graphs | `pair_factors` (B, H, N, M), a factor for each pair, in whole calls; B is then `mask.bias` |
| tau | `scale`, D^-0.5 by default |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). Ranks count valid tokens. In cross patterns
both sides count from 0, which suits a memory that runs beside the queries. With ``want={"weights"}`` the extras are A'
as ``weights`` and A as ``softmax_weights``. A query that sees no key gives 0.

Nothing is normalised after C, and C cannot be a bias, since its logarithm would enter the normaliser. But with `factors` O is
a sum over parts P of the keys, of what softmax attention gives of each, an output and a log-sum-exp:

    O = sum_P c_P e^{L_P - L} O_P,    L = log sum_P e^{L_P}

Keys R or more before the query are one part, with the c of -R, and those R or more after it another, with that of R. Nearer
keys are in two parts, whose factors are kappa and -kappa, by the shares p and 1 - p of their weights, so that kappa (2 p - 1) is
their c; kappa > |c|, and log p and log(1 - p) are biases by offset. So it takes softmax attention and a window once more, for B
by distance, and where a kernel has enough pairs to run (`FEWEST_WEIGHTS`). All else (`grid_factors`, `pair_factors`, dropout,
wanted weights, `mask.bias`, blocks) is computed with explicit weights, for some queries at a time, and the backward pass
computes their weights again.

Deviations: the official network has one B and one C for all its layers; here each layer has its own without
``stack={"share": "tables"}`` in the model. A layer learns C - 1, so that weight decay pulls to plain attention, not to none.
Unused bucket rows are left out, and buckets grow as those of `relative`. Computed in at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    one_of,
)
from regard.core.precision import wide_dtype
from regard.core.ragged import check_pairs
from regard.core.sampling import attention_shapes, normals
from regard.core.visibility import DistanceBias, PositionBias
from regard.engines.attention import (
    Ranks,
    Visibility,
    attention,
    attention_reference,
    has_kernel,
    masked_scores_bias,
    ranks,
)
from regard.engines.cache import CountedState, extend_counted, read_on
from regard.engines.merging import merge
from regard.layers.parts import LayerCall, Projection
from regard.positions.relative import Relative
from regard.positions.toeplitz import Toeplitz, at_offsets

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "none": (lambda x: x, 1.0),
    "relu": (F.relu, 1.0),
    "softplus": (F.softplus, math.log(math.e - 1)),
}
"""Functions of C, with where each is 1."""
STD = 0.02
NUMBERS_AT_ONCE = 1 << 18
"""Weights that are computed at once: few enough to stay near a core."""
ABOVE_LARGEST = 1.25
"""kappa, in units of the largest |c| of a head: the closer to 1 the fewer digits differences lose, but the less of log p."""
FEWEST_WEIGHTS = 1 << 19
"""Weights, counted in every row and head, from which on O is put together from attention calls. With 8 heads of 64, R of 5 and
128 and one thread that was 1.1 to 3.4 times as fast from 2^19 weights (256 tokens) on, forward and training; 0.6 to 1.6 times
at 2^18."""


@dataclass(frozen=True)
class Config:
    """Options, all of layers.

    Attributes:
        factors: C of a layer: ``unique`` (one number an offset), ``bucketed`` (one a bucket of offsets) or ``none`` (ones).
        start: of C: ``ones``, or ``normal``: N(0, 0.02), from which a layer's output starts near 0.
        activation: of C: ``none``, ``relu`` or ``softplus``.
        share_heads: whether all heads of a layer have the same ``unique`` C.
        max_distance: R, >= 1 (``bucketed``: >= num_buckets / 2 + 1, beyond which all offsets share a bucket); or (R_y, R_x)
            on a grid.
        num_buckets: buckets of both signs together, even and >= 4.
    """

    factors: str = "unique"
    start: str = "ones"
    activation: str = "none"
    share_heads: bool = False
    max_distance: int | tuple[int, int] = 128
    num_buckets: int = 64

    def __post_init__(self) -> None:
        one_of("factors", self.factors, ("unique", "bucketed", "none"))
        one_of("start", self.start, ("ones", "normal"))
        one_of("activation", self.activation, ACTIVATIONS)
        sides = self.max_distance if isinstance(self.max_distance, tuple) else (self.max_distance,)
        for side in sides:
            at_least("max_distance", side, 1)
        if len(sides) > 1 and (len(sides) != 2 or self.factors == "bucketed"):
            raise Unsupported(
                f"max_distance={self.max_distance} with factors={self.factors!r}",
                supported="a number, or (rows, columns) with factors='unique'",
                nearest=f"max_distance={max(sides)}",
            )
        if self.factors == "bucketed":
            Relative(heads=1, num_buckets=self.num_buckets, max_distance=sides[0])  # refuses what it lacks


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    factors: Float[Tensor, "h offsets"] | None = None,
    grid_factors: Float[Tensor, "h rows columns"] | None = None,
    pair_factors: Float[Tensor, "b h n m"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the whole weight matrix."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, _visibility(call), call.bias, call.position_bias, call.blocks, q.dtype)
    table = _only_one(call, factors, grid_factors, pair_factors)
    c = torch.ones_like(q[..., :1])
    if pair_factors is not None:
        c = pair_factors
    elif table is not None:
        c = _by_rank(call, table)(where.queries, where.keys)
    return attention_reference(q, k, v, visible, lambda scores: scores.softmax(-1) * c, call.scale, bias)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    factors: Float[Tensor, "h offsets"] | None = None,
    grid_factors: Float[Tensor, "h rows columns"] | None = None,
    pair_factors: Float[Tensor, "b h n m"] | None = None,
) -> Result:
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    return _attend(call, q, k, v, _only_one(call, factors, grid_factors, pair_factors), where)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    factors: Float[Tensor, "h offsets"] | None = None,
    grid_factors: Float[Tensor, "h rows columns"] | None = None,
    pair_factors: Float[Tensor, "b h n m"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step."""
    table = _only_one(call, factors, grid_factors, pair_factors, stateful=True)
    state, where = extend_counted(call, k, v, q.shape[2])
    return _attend(call, q, state.k, state.v, table, where, state)


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> CountedState:
    """Memory into a cache; more may follow."""
    return extend_counted(call, k, v, 0)[0]


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    factors: Float[Tensor, "h offsets"] | None = None,
    grid_factors: Float[Tensor, "h rows columns"] | None = None,
    pair_factors: Float[Tensor, "b h n m"] | None = None,
) -> Result:
    """Queries on absorbed memory, counted on from those that have read it before."""
    table = _only_one(call, factors, grid_factors, pair_factors, stateful=True)
    call, state, where = read_on(call, q.shape[2], q.device)
    return _attend(call, q, state.k, state.v, table, where, state)


def _visibility(call: Call) -> Visibility:
    return Visibility(causal=call.pattern is Pattern.CAUSAL_SELF)


def _only_one(
    call: Call,
    factors: Tensor | None,
    grid_factors: Tensor | None,
    pair_factors: Tensor | None,
    *,
    stateful: bool = False,
) -> Tensor | None:
    """The one input that tells C: a table by offset, by place or by pair (2, 3 or 4 axes); None for ones."""
    given = [x for x in (factors, grid_factors, pair_factors) if x is not None]
    if len(given) > 1:
        raise Unsupported("universal_rpe with more than one kind of factors", supported="one of them")
    if pair_factors is not None and stateful:
        raise Unsupported("universal_rpe with pair_factors and a state", supported="whole calls", nearest="factors")
    if grid_factors is not None and stateful:
        raise Unsupported(
            "universal_rpe with grid_factors and a state, which does not keep the width of a grid",
            supported="whole calls",
            nearest="factors",
        )
    placed = not call.pattern.cross and call.grid is not None and len(call.grid) == 2
    if grid_factors is not None and not placed:
        raise Unsupported(
            f"universal_rpe with grid_factors in {call.pattern.value} on a grid {call.grid}",
            supported="self patterns with grid=(rows, columns)",
            nearest="factors",
        )
    for x in (factors, grid_factors):
        if x is not None and any(size < 3 or size % 2 == 0 for size in x.shape[1:]):
            raise Unsupported(
                f"universal_rpe with factors of {tuple(x.shape[1:])} offsets", supported="2 R + 1 of them, with R >= 1"
            )
    return given[0] if given else None


def _by_rank(call: Call, table: Float[Tensor, "h *offsets"]) -> PositionBias:
    """A table of offsets as a function of ranks; on a grid of their places, which tokens fill row by row."""
    if table.ndim == 2:
        return DistanceBias(lambda offsets: at_offsets(table, offsets))
    assert call.grid is not None
    width = call.grid[1]

    def by_place(i: Int[Tensor, "b n"], j: Int[Tensor, "b m"]) -> Float[Tensor, "b h n m"]:
        down = j[:, None] // width - i[:, :, None] // width
        along = j[:, None] % width - i[:, :, None] % width
        rows, columns = ((size - 1) // 2 for size in table.shape[1:])
        return table[:, (down + rows).clamp(0, 2 * rows), (along + columns).clamp(0, 2 * columns)].transpose(0, 1)

    return by_place


def _attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    where: Ranks,
    state: CountedState | None = None,
) -> Result:
    batch, heads, n, _ = q.shape
    m, dtype = k.shape[2], wide_dtype(q)
    if call.bias is not None:
        check_pairs(call.bias, batch, heads, n, m)
    if q.numel() == 0 or m == 0:
        empty = {"weights": v.new_zeros(batch, heads, n, m), "softmax_weights": v.new_zeros(batch, heads, n, m)}
        return Result(v.new_zeros(batch, heads, n, v.shape[-1]), state, extras=empty if "weights" in call.want else {})
    wide = q.to(dtype)
    if _has_parts(call, wide, m, table):
        return Result(_in_parts(call, wide, k, v, table, where).to(v.dtype), state)
    return _explicitly(call, wide, k, v, table, where, state)


def _has_parts(call: Call, q: Tensor, m: int, table: Tensor | None) -> bool:
    """Whether O is put together from attention calls: where a kernel runs them, and from `FEWEST_WEIGHTS` on, or when its
    backend was asked for."""
    by_offset = table is None or table.ndim == 2
    by_distance = call.position_bias is None or isinstance(call.position_bias, DistanceBias)
    by_pair = call.bias is not None or call.blocks is not None or call.dropout > 0 or "weights" in call.want
    enough = q.shape[0] * q.shape[1] * q.shape[2] * m >= FEWEST_WEIGHTS or call.backend is not None
    return by_offset and by_distance and not by_pair and enough and has_kernel(q, call.backend)


def _in_parts(call: Call, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, where: Ranks) -> Tensor:
    """Keys left of the band, right of it and in it, each by the attention engine: see the module."""
    n, m, causal = q.shape[2], k.shape[2], call.pattern is Pattern.CAUSAL_SELF
    told = call.position_bias
    assert told is None or isinstance(told, DistanceBias)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, where: Ranks, visibility: Visibility, bias: DistanceBias | None
    ) -> tuple[Tensor, Tensor]:
        output, _, lse = attention(
            q,
            k,
            v,
            where,
            visibility=visibility,
            scale=call.scale,
            position_bias=bias,
            want_lse=True,
            backend=call.backend,
        )
        assert lse is not None
        return output, lse

    if table is None:
        return attend(q, k, v, where, _visibility(call), told)[0]
    table, reach = table.to(q.dtype), table.shape[1] // 2
    parts = []
    most = table.detach().abs().amax(1, keepdim=True)
    kappa = ABOVE_LARGEST * torch.where(most > 0, most, 1)  # without gradient: O is the same for all
    for sign in (1, -1):
        shares = (sign * table / kappa).log1p() - math.log(2)
        biased = DistanceBias(partial(_sum_by_distance, shares, told))
        output, lse = attend(q, k, v, where, Visibility(causal, reach - 1, reach - 1), biased)
        parts.append((output, lse, sign * kappa))
    far = Visibility(causal=True)
    if where.first is None or where.first + n > reach:
        # what is at or before a query whose rank is moved back by R is R or more before the query
        bias = None if told is None else DistanceBias(partial(_by_distance, told, 1, -reach))
        output, lse = attend(q, k, v, _moved_back(where, reach), far, bias)
        parts.append((output, lse, table[:, :1]))
    if not causal and m > reach:
        # the same, seen from the other end
        bias = None if told is None else DistanceBias(partial(_by_distance, told, -1, reach))
        output, lse = attend(q.flip(2), k.flip(2), v.flip(2), _moved_back(_from_the_end(where, n, m), reach), far, bias)
        parts.append((output.flip(2), lse.flip(2), table[:, -1:]))
    return merge(*zip(*parts, strict=True))


def _sum_by_distance(
    table: Float[Tensor, "#h offsets"], told: DistanceBias | None, distances: Int[Tensor, "..."]
) -> Float[Tensor, "h ..."]:
    found = at_offsets(table, distances)
    return found if told is None else found + told.by_distance(distances)


def _by_distance(told: DistanceBias, sign: int, first: int, distances: Int[Tensor, "..."]) -> Float[Tensor, "h ..."]:
    return told.by_distance(first + sign * distances)


def _moved_back(where: Ranks, by: int) -> Ranks:
    """Query ranks less `by`."""
    offset, first = (None if x is None else x - by for x in (where.offset, where.first))
    return Ranks(where.queries - by, where.keys, offset, first, where.plain)


def _from_the_end(where: Ranks, n: int, m: int) -> Ranks:
    """Ranks of reversed slots, counted down to 0 at rank m - 1, for `n` queries and `m` keys."""
    keys = torch.where(where.keys < 0, where.keys, m - 1 - where.keys)
    offset, first = (None if x is None else m - n - x for x in (where.offset, where.first))
    return Ranks((m - 1 - where.queries).flip(1), keys.flip(1), offset, first, where.plain)


def _explicitly(
    call: Call, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, where: Ranks, state: CountedState | None
) -> Result:
    """Blocks of queries, each with the keys that it may see."""
    batch, heads, n, _ = q.shape
    m, groups = k.shape[2], k.shape[1]
    queries, keys, values = call.scale * q, k.to(q.dtype), v.to(q.dtype)
    if groups < heads:
        keys, values = (x.repeat_interleave(heads // groups, 1) for x in (keys, values))
    step = min(n, max(1, NUMBERS_AT_ONCE // (batch * heads * m)))
    pieces = []
    for start in range(0, n, step):
        stop = min(start + step, n)
        last = m
        if where.offset is not None and call.pattern is Pattern.CAUSAL_SELF:
            last = max(1, min(m, stop + where.offset))
        tensors = queries[:, :, start:stop], keys[:, :, :last], values[:, :, :last]
        mix = _mixer(call, table, where, start, stop, last)
        again = step < n and torch.is_grad_enabled() and "weights" not in call.want
        output, *weights = checkpoint(mix, *tensors, use_reentrant=False) if again else mix(*tensors)
        pieces.append((output, *(F.pad(w, (0, m - last)) for w in weights)))
    output, *weights = (torch.cat(parts, 2).to(v.dtype) for parts in zip(*pieces, strict=True))
    return Result(output, state, extras=dict(zip(("weights", "softmax_weights"), weights, strict=False)))


def _mixer(
    call: Call, table: Tensor | None, where: Ranks, start: int, stop: int, last: int
) -> Callable[..., tuple[Tensor, ...]]:
    """From the queries start ... stop - 1 and the first `last` keys and values to outputs, and A' and A when wanted."""
    here = Ranks(where.queries[:, start:stop], where.keys[:, :last], None, None, plain=False)
    bias = None if call.bias is None else _part(call.bias, start, stop, last)
    finite = call.bias is None and (call.position_bias is None or isinstance(call.position_bias, DistanceBias))
    everything = where.plain and call.pattern is not Pattern.CAUSAL_SELF and finite and call.blocks is None
    seed = None
    if call.generator is not None and call.dropout > 0:
        # a block that is computed again must draw the same numbers again
        seed = int(torch.randint(1 << 62, (), generator=call.generator, device=call.generator.device))

    def mix(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        visible, added = masked_scores_bias(here, _visibility(call), bias, call.position_bias, call.blocks, q.dtype)
        scores = q @ k.mT
        scores = scores if added is None else scores + added
        some = visible.any(-1, keepdim=True)
        if not everything:
            scores = scores.masked_fill(~visible & some, -torch.inf)  # not throughout a row: its gradient would be NaN
        softmax = scores.softmax(-1)
        weights = softmax
        if table is not None:
            weights = softmax * _factors(call, table, where, here, start, stop, last).to(q.dtype)
        kept = weights
        if call.dropout > 0:
            generator = None if seed is None else torch.Generator(q.device).manual_seed(seed)
            keep = torch.rand(weights.shape, generator=generator, device=q.device, dtype=q.dtype) >= call.dropout
            kept = weights * keep / (1 - call.dropout)
        output = (kept @ v).masked_fill(~some, 0)
        if "weights" not in call.want:
            return (output,)
        return output, weights.masked_fill(~some, 0), softmax.masked_fill(~some, 0)

    return mix


def _factors(
    call: Call, table: Tensor, where: Ranks, here: Ranks, start: int, stop: int, last: int
) -> Float[Tensor, "#b h n m"]:
    """C of one block."""
    if table.ndim == 4:
        return _part(table, start, stop, last)
    if table.ndim == 2 and where.offset is not None:
        first = start + where.offset
        offsets = torch.arange(1 - first - (stop - start), last - first, device=table.device)
        return at_offsets(table, offsets).unfold(1, last, 1).flip(1)  # a row for each query is a view of one line
    return _by_rank(call, table)(here.queries, here.keys)


def _part(x: Float[Tensor, "b h #n #m"], start: int, stop: int, last: int) -> Float[Tensor, "b h #rows #last"]:
    x = x[:, :, start:stop] if x.shape[2] > 1 else x
    return x[..., :last] if x.shape[3] > 1 else x


class Factors(Projection):
    """Gives a layer's heads their C."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        self.config, self.causal = config, spec.pattern is Pattern.CAUSAL_SELF
        heads, self.heads = 1 if config.share_heads else spec.heads, spec.heads
        on_grid = isinstance(config.max_distance, tuple)
        if on_grid and spec.pattern.cross:
            raise Unsupported(
                f"universal_rpe with max_distance={config.max_distance} in {spec.pattern.value}",
                supported="self patterns",
                nearest="a number",
            )
        self.table: nn.Module | None = None
        self.grid_table: nn.Parameter | None = None
        if config.factors == "bucketed":
            assert isinstance(config.max_distance, int)
            self.table = Relative(heads=spec.heads, num_buckets=config.num_buckets, max_distance=config.max_distance)
        elif config.factors == "unique" and isinstance(config.max_distance, int):
            self.table = Toeplitz(heads=heads, max_distance=config.max_distance)
        elif config.factors == "unique":
            assert isinstance(config.max_distance, tuple)
            self.grid_table = nn.Parameter(torch.empty(heads, *(2 * side + 1 for side in config.max_distance)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for table in self.parameters():
                if self.config.start == "ones":
                    table.zero_()
                else:
                    table.normal_(std=STD).sub_(ACTIVATIONS[self.config.activation][1])

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        activation, one = ACTIVATIONS[self.config.activation]
        if self.grid_table is not None:
            return heads | {"grid_factors": activation(self.grid_table + one)}
        if self.table is None:
            return heads
        assert isinstance(self.config.max_distance, int)
        if isinstance(self.table, Toeplitz):
            table: Tensor = self.table.table
        else:
            reach = self.config.max_distance
            offsets = torch.arange(-reach, reach + 1, device=next(self.parameters()).device)
            table = self.table.by_distance(offsets, self.causal)  # type: ignore[operator]
        return heads | {"factors": activation(table + one)}


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    sizes: dict[str, int] | None = None,
    grid: tuple[int, ...] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests and timings: factors of both signs for 11 offsets, or 3 x 5 on a grid, fewer than the tests'
    sequences have."""
    size = {"h": 2, "g": 2, "d": 8, "v": 6, "o": 11} | (sizes or {})
    shapes = attention_shapes(batch, n, m, size)
    shapes |= {"factors": (size["h"], size["o"])} if grid is None else {"grid_factors": (size["h"], 3, 5)}
    return normals(generator, shapes, dtype)


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    distance = config.max_distance
    return {"o": 2 * (distance if isinstance(distance, int) else max(distance)) + 1}


def cost(shape: Shape, config: Config) -> Cost:
    """As softmax attention and a window once more; of few pairs, or on a grid, as softmax attention and a product for each
    pair. With a kernel, and the factors of a layer."""
    width = shape.dim_key + shape.dim_value
    heads = shape.batch * shape.heads
    pairs = heads * shape.n * shape.m
    flops, memory = pairs * (2.0 * width + 1), float(min(pairs, NUMBERS_AT_ONCE))
    if pairs >= FEWEST_WEIGHTS and isinstance(config.max_distance, int):
        again = 0 if config.factors == "none" else min(shape.m, 2 * config.max_distance - 1)
        parts = 1 if config.factors == "none" else 4
        flops, memory = (
            heads * shape.n * (shape.m + again) * 2.0 * width,
            float(parts * heads * shape.n * shape.dim_value),
        )
    return Cost(
        flops=flops,
        memory=float(heads * (shape.n + shape.m)) + memory,
        state=float(shape.heads * shape.m * width),
        step_flops=heads * shape.m * (2.0 * width + 1),
    )


MECHANISM = Mechanism(
    name="universal_rpe",
    aliases=("urpe", "urpe_attention", "universal_relative_positions"),
    kind=Kind.ATTENTION,
    summary="Softmax weights times a learned number for each offset, which makes relative positions tell absolute ones.",
    paper=Paper("Your Transformer May Not be as Powerful as You Expect", "2205.13401", 2022, 40),
    inputs={
        "q": "bhnd",
        "k": "bgmd",
        "v": "bgmv",
        "factors?": "ho",
        "grid_factors?": "hyx",
        "pair_factors?": "bhnm",
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
        "bucketed": {"factors": "bucketed", "num_buckets": 8, "max_distance": 20},
        "no factors": {"factors": "none"},
        "shared, relu": {"share_heads": True, "activation": "relu", "max_distance": 10},
        "normal, softplus": {"start": "normal", "activation": "softplus"},
        "on a grid": {"max_distance": (12, 12)},
    },
    variant_patterns={
        "on a grid": (Pattern.NONCAUSAL_SELF,),
    },
    grid_variants=frozenset({"on a grid"}),
    engine="attention",
    state=CountedState,
    cost=cost,
    axis_sizes=axis_sizes,
    honours=frozenset({"bias", "blocks", "dropout", "weights"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative", "toeplitz"),
    projection=Factors,
    sample_inputs=sample_inputs,
    layer_defaults={"positions": "toeplitz", "bias": True},
    waivers=(Waiver("layer_lengths", "the size of its table is a constant of the program"),),
)
