r"""Bi-level routing attention: each region of an image reads the few regions whose mean keys match its mean query best.

When to pick it: high-resolution images and other grids, where what matters may be anywhere; within the chosen regions
attention is dense.
When not: tokens that arrive one by one, or no more regions than are chosen (it is then the same as `softmax`).

Definition (Zhu et al., BiFormer, arXiv 2303.08810, equations 3-7), R_a the tokens of region a, C = m d for m heads of width d:

    q'_ah = mean of q_ih over i in R_a
    k'_bh = mean of k_jh over j in R_b
    s_ab = sum_h q'_ah . k'_bh
    I_a = the k regions b of the largest s_ab
    o_ih = sum_j softmax_j(C^-1/2 q_ih . k_jh) v_jh over the j in R_b with b in I_a, for i in R_a
    y = W_O (o + LCE(v))      (the layer)

No gradient flows through the choice. A region need not choose itself.

| paper | here |
|---|---|
| S regions per side | `windows`: a region has ceil(side / S) places per side, so there are at most S |
| k | `top` |
| Q^r, K^r, A^r, I^r | q', k', s and I, in at least float32; the same for all heads unless ``routing="head"`` |
| the scale C^-1/2 | ``scale_by="dim"``: the call's scale, by default d^-1/2, divided by sqrt(m) |
| LCE, 5 x 5 depthwise | `lce` of the layer: `merge.convolution`; without `grid` a sequence is a grid of one row |

Layout: q (B, H, N, D), k and v (B, G, M, D), on the `grid` of the call, of any number of axes, row by row; without a grid
regions are segments of a sequence. The last regions of a side may be smaller. On a grid, invalid places stay where they
are: they are left out of means and keys, and a region without a token is not chosen. Without a grid, padding is
gathered away, and `windows` divides each row's own length. In cross patterns both sequences have regions, each with its
own sizes. The keys of the chosen regions are copied for each region of queries, k / S^2 of the pairs are scored, and no
N x M matrix is made; if no region is left out, it is softmax attention to all keys, without copies. If a quarter of the
regions or more are read, native kernels read the keys in place and skip the blocks of other regions.
Deviations: the authors' older code pads x to a multiple of S before the projection, which adds keys; their newer code
has regions of floor(side / S) places, so possibly more than S per side (set `region_size` for this), and pads with zero
keys, which ``padded_keys=True`` reproduces. Sequences, cross patterns, routing by head and the forced own region are
not in the paper. Left out are the paper's pooling of keys within regions and its weights on the chosen regions, which
no released model has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    BlockMask,
    Call,
    Cost,
    Kind,
    LayerSpec,
    Mechanism,
    Paper,
    Pattern,
    Shape,
    Unsupported,
    Waiver,
    at_least,
    one_of,
    valid_from_lengths,
)
from regard.core.precision import wide, without_autocast
from regard.core.ragged import take_tokens
from regard.core.visibility import CountedRanks
from regard.engines.attention import Ranks, Visibility, attention, ranks, skips_blocks
from regard.layers.grid_convolution import GridConvolution

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped


@dataclass(frozen=True)
class Config:
    """Options. `lce` and `lce_of` belong to the layer.

    Attributes:
        windows: S >= 1, the largest number of regions along each side; must be 7 if `region_size` is given.
        region_size: places of a region along each side (or one number for all sides); None to derive it from `windows`.
        top: k >= 1, number of regions that each region reads.
        routing: ``shared``: all heads read the same regions; ``head``: each head chooses its own.
        include_self: whether a region always reads itself, as one of the k; noncausal-self only.
        scale_by: the width in the scale: ``dim`` (all heads together, as in the released weights) or ``head_dim``.
        padded_keys: whether empty places of chosen regions are zero keys, as in the authors' newer code.
        lce: side of the depthwise convolution, odd; 0 for none, None for 5 in noncausal-self and none in cross patterns.
        lce_of: what is convolved: ``value``, or ``input``, the layer's input.
    """

    windows: int = 7
    region_size: int | tuple[int, ...] | None = None
    top: int = 4
    routing: str = "shared"
    include_self: bool = False
    scale_by: str = "dim"
    padded_keys: bool = False
    lce: int | None = None
    lce_of: str = "value"

    def __post_init__(self) -> None:
        at_least("windows", self.windows, 1)
        at_least("top", self.top, 1)
        if self.region_size is not None:
            if not isinstance(self.region_size, int):
                object.__setattr__(self, "region_size", tuple(self.region_size))
            sizes = (self.region_size,) if isinstance(self.region_size, int) else self.region_size
            if not sizes or min(sizes) < 1:
                raise Unsupported(
                    f"region_size={self.region_size}", supported="places >= 1 for each side", nearest="region_size=None"
                )
            if self.windows != 7:
                raise Unsupported(
                    f"windows={self.windows} with region_size={self.region_size}",
                    supported="one of them",
                    nearest="region_size=None",
                )
        one_of("routing", self.routing, ("shared", "head"))
        one_of("scale_by", self.scale_by, ("dim", "head_dim"))
        one_of("lce_of", self.lce_of, ("value", "input"))
        if self.lce is not None and (self.lce < 0 or (self.lce and self.lce % 2 == 0)):
            raise Unsupported(f"lce={self.lce}", supported="an odd side, or 0 for none", nearest=f"lce={self.lce + 1}")

    def sizes(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Places of a region along each side; raises Unsupported if `region_size` does not fit the grid's axes."""
        if self.region_size is None:
            return tuple(max(-(-side // self.windows), 1) for side in sides)
        found = (self.region_size,) * len(sides) if isinstance(self.region_size, int) else self.region_size
        if len(found) != len(sides):
            what = f"a grid {sides}" if len(sides) > 1 else "sequences"
            raise Unsupported(
                f"region_size={self.region_size} on {what}", supported="a size for each side", nearest="windows"
            )
        return found


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, region by region."""
    config, scale = call.config, _scale(call, q.shape[1])
    _check(call)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    output = v.new_zeros(*q.shape[:3], v.shape[3])
    for row in range(q.shape[0]):
        valid = None if call.valid is None else call.valid[row].tolist()
        own, size = _regions_of(call, q.shape[2], valid)
        others, size = _regions_of(call, k.shape[2], valid) if call.pattern.cross else (own, size)
        if not (own and others):
            continue
        query_means, key_means = (
            torch.stack([x[row][:, tokens].mean(1) for tokens in regions], 1).detach()
            for x, regions in ((q, own), (k, others))
        )
        affinity = query_means @ key_means.mT
        if config.routing == "shared":
            affinity = affinity.sum(0, keepdim=True).expand_as(affinity)
        if config.include_self:
            affinity = affinity.masked_fill(torch.eye(len(own), dtype=torch.bool, device=q.device), torch.inf)
        chosen = affinity.topk(min(config.top, len(others))).indices.tolist()
        for head, region in itertools.product(range(q.shape[1]), range(len(own))):
            seen = [token for other in chosen[head][region] for token in others[other]]
            keys, values = k[row, head, seen], v[row, head, seen]
            if config.padded_keys:
                zeros = size * len(chosen[head][region]) - len(seen)
                keys, values = F.pad(keys, (0, 0, 0, zeros)), F.pad(values, (0, 0, 0, zeros))
            weights = (scale * q[row, head, own[region]] @ keys.mT).softmax(-1)
            output[row, head, own[region]] = weights @ values
    return output


def _regions_of(call: Call, n: int, valid: list[bool] | None) -> tuple[list[list[int]], int]:
    """The tokens of each region that has any, and the number of places of a region."""
    sides = (n,) if call.grid is None else tuple(call.grid)
    sizes = call.config.sizes(sides)
    regions: dict[tuple[int, ...], list[int]] = {}
    for token, place in enumerate(itertools.product(*map(range, sides))):
        if valid is None or valid[token]:
            regions.setdefault(tuple(p // size for p, size in zip(place, sizes, strict=True)), []).append(token)
    return list(regions.values()), math.prod(sizes)


def _scale(call: Call, heads: int) -> float:
    return call.scale / math.sqrt(heads) if call.config.scale_by == "dim" else call.scale


def _check(call: Call) -> None:
    if not call.pattern.cross:
        return
    for asked, given, nearest in (
        ("include_self=True", call.config.include_self, "include_self=False"),
        (f"a grid {call.grid}", call.grid is not None, "grid=None"),
    ):
        if given:
            raise Unsupported(
                f"bilevel_routing with {asked} in {call.pattern.value}", supported="noncausal-self", nearest=nearest
            )


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]
) -> Float[Tensor, "b h n v"]:
    """Attention to the keys of the chosen regions, gathered for each region of queries."""
    config, scale = call.config, _scale(call, q.shape[1])
    _check(call)
    (batch, heads, n, _), m = q.shape, k.shape[2]
    by_head = config.routing == "head"
    if batch * n * m:
        rows = heads if by_head else 1
        own = regions_of(call, n, call.lengths, rows, q.device)
        others = regions_of(call, m, call.memory_lengths, rows, q.device) if call.pattern.cross else own
        if others.count > config.top or config.padded_keys:
            if not by_head:
                return _attend(call, q, k, v, own, others, scale)
            k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
            q, k, v = (x.flatten(0, 1)[:, None] for x in (q, k, v))  # one row per head: each head chooses alone
            return _attend(call, q, k, v, own, others, scale).view(batch, heads, n, v.shape[3])
    where = ranks(call, n, m, q.device) if call.valid is None else _ranks_of(n, call.valid)
    return attention(q, k, v, where, visibility=Visibility(), scale=scale, backend=call.backend)[0]


def read_regions(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"]
) -> tuple[Int[Tensor, "b*heads regions k"], Tiles | Segments]:
    """Regions that each region of queries reads, and the regions of keys; one row per head if heads choose alone."""
    heads, config = q.shape[1], call.config
    rows = heads if config.routing == "head" else 1
    own = regions_of(call, q.shape[2], call.lengths, rows, q.device)
    others = regions_of(call, k.shape[2], call.memory_lengths, rows, q.device) if call.pattern.cross else own
    sizes = (k.shape[1], heads // k.shape[1], q.shape[3])
    if rows > 1:
        k, sizes = k.repeat_interleave(heads // k.shape[1], 1), (1, 1, q.shape[3])
        q, k = (x.flatten(0, 1)[:, None] for x in (q, k))
    queries, keys = (part.split(x.transpose(1, 2).flatten(2)) for x, part in ((q, own), (k, others)))
    return _chosen(config, queries, keys, own, others, sizes), others


@dataclass(frozen=True)
class Tiles:
    """Regions of equal size on a grid, or of a sequence.

    Attributes:
        sides, sizes: sides of the grid, and of a region.
        holds: whether each place of each region holds a token; None when all do.
    """

    sides: tuple[int, ...]
    sizes: tuple[int, ...]
    holds: Bool[Tensor, "#b regions room"] | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of regions along each side."""
        return tuple(-(-side // size) for side, size in zip(self.sides, self.sizes, strict=True))

    @property
    def count(self) -> int:
        """Number of regions."""
        return math.prod(self.counts)

    @property
    def room(self) -> int:
        """Places of a region."""
        return math.prod(self.sizes)

    def split(self, x: Shaped[Tensor, "b n c"]) -> Shaped[Tensor, "b regions room c"]:
        """Group tokens by region, with zeros at empty places."""
        axes = len(self.sides)
        missing = [count * size - side for side, size, count in zip(self.sides, self.sizes, self.counts, strict=True)]
        x = x.unflatten(1, self.sides)
        if any(missing):
            x = F.pad(x, (0, 0, *itertools.chain.from_iterable((0, extra) for extra in reversed(missing))))
        for axis in reversed(range(axes)):
            x = x.unflatten(axis + 1, (self.counts[axis], self.sizes[axis]))
        x = x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), -1)
        return x.reshape(x.shape[0], self.count, self.room, -1)

    def join(self, y: Shaped[Tensor, "b regions room c"]) -> Shaped[Tensor, "b n c"]:
        """The inverse of :meth:`split`."""
        axes = len(self.sides)
        y = y.view(y.shape[0], *self.counts, *self.sizes, -1)
        y = y.permute(0, *itertools.chain.from_iterable((axis, axis + axes) for axis in range(1, axes + 1)), -1)
        y = y.reshape(y.shape[0], *(count * size for count, size in zip(self.counts, self.sizes, strict=True)), -1)
        return y[:, *(slice(side) for side in self.sides)].flatten(1, axes)


@dataclass(frozen=True)
class Segments:
    """Segments of right-padded rows, whose number and size depend on each row's own length.

    Attributes:
        count, room: the largest number of segments per row, and of places per segment.
        holds: whether each place holds a token.
        token: index of the token at each place, in range even if the place is empty.
        place: index of the place of each token, in range even for padding.
    """

    count: int
    room: int
    holds: Bool[Tensor, "b regions room"]
    token: Int[Tensor, "b regions*room"]
    place: Int[Tensor, "b n"]

    @classmethod
    def of(cls, lengths: Int[Tensor, " b"], n: int, windows: int) -> Segments:
        """The segments of rows of `lengths` tokens, padded to `n`: up to `windows` per row."""
        count, room = min(windows, n), -(-n // windows)
        size = (lengths[:, None] + windows - 1) // windows
        size = size.clamp(min=1)
        region, within = torch.arange(count, device=size.device), torch.arange(room, device=size.device)
        token = region[:, None] * size[..., None] + within
        holds = (within < size[..., None]) & (token < lengths[:, None, None])
        tokens = torch.arange(n, device=size.device)
        place = tokens // size * room + tokens % size
        token, place = token.flatten(1).clamp(max=n - 1), place.clamp(max=count * room - 1)
        return cls(count, room, holds, token, place)

    def split(self, x: Shaped[Tensor, "b n c"]) -> Shaped[Tensor, "b regions room c"]:
        """Group tokens by segment, with zeros at empty places."""
        x = take_tokens(x[:, None], self.token[:, None]).view(x.shape[0], self.count, self.room, -1)
        return torch.where(self.holds[..., None], x, x.new_zeros(()))

    def join(self, y: Shaped[Tensor, "b regions room c"]) -> Shaped[Tensor, "b n c"]:
        """The inverse of :meth:`split`."""
        return take_tokens(y.flatten(1, 2)[:, None], self.place[:, None])[:, 0]


def regions_of(
    call: Call, n: int, lengths: Int[Tensor, " b"] | None, rows: int, device: torch.device
) -> Tiles | Segments:
    """The regions of `n` tokens on the call's grid, or of sequences of `lengths`; each sequence has `rows` rows."""
    config: Config = call.config
    if lengths is not None:
        lengths = lengths.repeat_interleave(rows)
        if config.region_size is None:
            return Segments.of(lengths, n, config.windows)
    sides = (n,) if call.grid is None else tuple(call.grid)
    sizes = config.sizes(sides)
    valid = None if lengths is None else valid_from_lengths(lengths, n)
    if call.valid is not None:
        valid = call.valid.repeat_interleave(rows, 0)
    if valid is None and any(side % size for side, size in zip(sides, sizes, strict=True)):
        valid = torch.ones(1, n, dtype=torch.bool, device=device)
    tiles = Tiles(sides, sizes)
    return tiles if valid is None else Tiles(sides, sizes, tiles.split(valid[..., None])[..., 0])


def _ranks_of(n: int, visible: Bool[Tensor, "b m"]) -> Ranks:
    """Ranks of `n` queries and of keys that are visible to all of them or to none."""
    keys = torch.arange(visible.shape[1], device=visible.device)
    return Ranks(torch.arange(n, device=visible.device)[None], torch.where(visible, keys, -1), None, None, plain=False)


def _attend(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    own: Tiles | Segments,
    others: Tiles | Segments,
    scale: float,
) -> Float[Tensor, "b h n v"]:
    """Attention of each region, as a separate row, to the regions chosen for all heads together."""
    batch, heads = q.shape[:2]
    queries, keys, values = (
        regions.split(x.transpose(1, 2).flatten(2)) for x, regions in ((q, own), (k, others), (v, others))
    )
    chosen = _chosen(call.config, queries, keys, own, others, (k.shape[1], heads // k.shape[1], q.shape[3]))
    blocks = None
    if _are_many(call, own, others, values):  # ordered by region, with a mask that hides regions that are not read
        rows = [x.flatten(1, 2) for x in (queries, keys, values)]
        where: Ranks = CountedRanks(own.count * own.room, others.count * others.room, 0, True, q.device)
        seen = torch.zeros(batch, own.count, others.count, dtype=torch.bool).scatter(2, chosen, True)
        blocks = BlockMask(seen[:, None], others.room)
    else:
        gathered, where = _gathered(call, (keys, values), chosen, own, others)
        rows = [queries.flatten(0, 1), *gathered]
    counts = (heads, k.shape[1], k.shape[1])
    q, k, v = (x.unflatten(2, (count, -1)).transpose(1, 2) for x, count in zip(rows, counts, strict=True))
    output = attention(q, k, v, where, visibility=Visibility(), scale=scale, blocks=blocks, backend=call.backend)[0]
    output = output.transpose(1, 2).reshape(batch, own.count, own.room, -1)
    return own.join(output).unflatten(2, (heads, -1)).transpose(1, 2)


def _gathered(
    call: Call,
    parts: Sequence[Float[Tensor, "b regions2 room2 c"]],
    chosen: Int[Tensor, "b regions k"],
    own: Tiles | Segments,
    others: Tiles | Segments,
) -> tuple[list[Float[Tensor, "b*regions k*room2 c"]], Ranks]:
    """Copies of the regions that each region of queries, as a row of its own, reads; and the ranks of such a row."""
    batch = chosen.shape[0]
    rows = (chosen + torch.arange(batch, device=chosen.device)[:, None, None] * others.count).flatten()

    def taken(x: Shaped[Tensor, "b regions2 room2 c"]) -> Shaped[Tensor, "b*regions k*room2 c"]:
        found = x.reshape(batch * others.count, -1).index_select(0, rows)
        return found.view(batch * own.count, -1, x.shape[3])

    copies = [taken(x) for x in parts]
    if others.holds is None:
        return copies, CountedRanks(own.room, chosen.shape[2] * others.room, 0, True, chosen.device)
    seen = others.holds
    if call.config.padded_keys:
        seen = seen.any(-1, keepdim=True).expand_as(seen)
    return copies, _ranks_of(own.room, taken(seen.expand(batch, -1, -1)[..., None])[..., 0])


def _are_many(call: Call, own: Tiles | Segments, others: Tiles | Segments, values: Tensor) -> bool:
    """Return whether so many regions are read that a kernel skips the others faster than it takes to copy these. The
    kernel multiplies hidden values by 0, so all values must be finite."""
    if not (own.holds is others.holds is None and own.room == others.room and 4 * call.config.top >= others.count):
        return False
    return skips_blocks(values, call.backend) and bool(values.sum().isfinite())


def _chosen(
    config: Config,
    queries: Float[Tensor, "b regions room h*d"],
    keys: Float[Tensor, "b regions2 room2 g*d"],
    own: Tiles | Segments,
    others: Tiles | Segments,
    heads: tuple[int, int, int],
) -> Int[Tensor, "b regions k"]:
    """The regions of keys that each region of queries reads; `heads` is (key heads, queries per key head, width)."""
    with torch.no_grad(), without_autocast(queries.device):
        query_means = _means(queries, own.holds)
        if heads[1] > 1:  # summed over the query heads of each key head
            query_means = query_means.unflatten(2, heads).sum(3).flatten(2)
        affinity = query_means @ _means(keys, others.holds).mT
        if config.include_self:
            affinity = affinity.masked_fill(torch.eye(own.count, dtype=torch.bool, device=queries.device), torch.inf)
        if others.holds is not None:
            affinity = affinity.masked_fill(~others.holds.any(-1)[:, None], -torch.inf)
        return affinity.topk(min(config.top, others.count)).indices


def _means(
    x: Float[Tensor, "b regions room c"], holds: Bool[Tensor, "#b regions room"] | None
) -> Float[Tensor, "b regions c"]:
    """The mean of each region's tokens, in at least float32; empty places hold zeros."""
    if holds is None:
        return wide(x).mean(2)
    return wide(x).sum(2) / holds.sum(-1, keepdim=True).clamp(min=1)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost for a sequence: scores of regions, and `top` regions of keys for each query. (On a grid of two axes there
    would be windows^2 regions.)"""
    size = config.region_size
    room = math.ceil(shape.m / config.windows) if size is None else math.prod(size) if isinstance(size, tuple) else size
    regions = [math.ceil(tokens / max(room, 1)) for tokens in (shape.n, shape.m)]
    heads, width = shape.batch * shape.heads, shape.dim_key + shape.dim_value
    routed = regions[1] > config.top
    seen = min(shape.m, config.top * room)
    return Cost(
        flops=2.0 * heads * (shape.n * seen * width + (math.prod(regions) * shape.dim_key if routed else 0)),
        memory=float(heads * shape.n + (heads * regions[0] * seen * width if routed else 0)),
        state=0.0,
        step_flops=0.0,
    )


class LocalEnhancement(GridConvolution):
    """LCE: a depthwise convolution of the values (or of the layer's input) on the grid, added to the head outputs.

    Args:
        spec: the layer's specification; in its config `lce` is the side and `lce_of` what is convolved.
    """

    def __init__(self, spec: LayerSpec) -> None:
        side, of = spec.config.lce, spec.config.lce_of
        if side is None:
            side = 5 if spec.pattern is Pattern.NONCAUSAL_SELF else 0
        super().__init__(spec, side, of, asked=f"lce={side} of the {of}", without="lce=0")


MEAN = "a region chooses by the mean of its queries, so the first would depend on the last"

MECHANISM = Mechanism(
    name="bilevel_routing",
    aliases=("bra", "biformer", "bilevel_routing_attention"),
    kind=Kind.ATTENTION,
    summary="Each region of an image reads the tokens of the few regions whose mean key scores highest.",
    paper=Paper("BiFormer: Vision Transformer with Bi-Level Routing Attention", "2303.08810", 2023, 23),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS),
    refused={Pattern.CAUSAL_SELF: MEAN, Pattern.CAUSAL_CROSS: MEAN},
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "segments": {"region_size": 3, "top": 2, "scale_by": "head_dim", "padded_keys": True},
        "by head": {
            "windows": 5,
            "top": 2,
            "routing": "head",
            "include_self": True,
            "lce": 3,
            "lce_of": "input",
        },
        "on a grid": {"region_size": (2, 3), "top": 2},
    },
    variant_patterns={
        "by head": (Pattern.NONCAUSAL_SELF,),
        "on a grid": (Pattern.NONCAUSAL_SELF,),
    },
    grid_variants=frozenset({"on a grid"}),
    engine="attention",
    cost=cost,
    honours=frozenset({"grid"}),
    weights="implicit",
    merge=LocalEnhancement,
    waivers=(Waiver("layer_lengths", "its number of regions is fixed when the program is compiled"),),
)
