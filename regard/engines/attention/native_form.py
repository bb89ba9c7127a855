"""Blocked attention in C++ (see `native/src/attention.cpp` and `native/src/attention_backward.cpp`).

Scores are computed a tile at a time and never stored; tiles that hide all their pairs are not computed. Softmax weights
that are stretched and clipped take a pass more, for the normalisers. Everything is read where it lies: grouped heads, any
strides with contiguous features, broadcast biases.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.backends.native import library
from regard.backends.operators import Packed, operator, runs_plainly
from regard.contract import Unsupported
from regard.core.visibility import CountedRanks, DistanceBias, Ranks, Visibility
from regard.engines.attention.problem import RULES, Problem
from regard.engines.attention.torch_form import of_no_pairs

CLIPPED = len(RULES)
"""The number of softmax with stretched and clipped weights."""

WITH_LSE = (RULES.index("softmax"), CLIPPED)
"""Numbers of the rules that have a log-sum-exp."""

KEPT_RANKS = 1 << 14
"""Ranks that are counted once."""

FIRST_RANKS = (ctypes.c_int64 * KEPT_RANKS)(*range(KEPT_RANKS))
"""Not a tensor, which would be made where a default device or another mode of torch says."""

DECODED, DECODED_LONG, LONG = 8, 16, 4096
"""Queries of a head up to which softmax runs on the kernel for decoding, which reads keys once for all heads that share
them and divides them among threads: any number of keys, and from so many keys on."""

Strides = ctypes.c_int64 * 3


class VisibilityArguments(ctypes.Structure):
    """The struct `regard_visibility`."""

    _fields_ = (
        ("query_ranks", ctypes.c_void_p),
        ("key_ranks", ctypes.c_void_p),
        ("query_ranks_stride", ctypes.c_int64),
        ("key_ranks_stride", ctypes.c_int64),
        ("causal", ctypes.c_int64),
        ("left", ctypes.c_int64),
        ("right", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("lookback", ctypes.c_int64),
        ("lookahead", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
        ("blocks_strides", Strides),
        ("blocks_rows", ctypes.c_int64),
        ("blocks_columns", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    )


class BiasArguments(ctypes.Structure):
    """The struct `regard_score_biases`."""

    _fields_ = (
        ("bias", ctypes.c_void_p),
        ("bias_strides", ctypes.c_int64 * 4),
        ("distance", ctypes.c_void_p),
        ("distance_stride", ctypes.c_int64),
        ("distance_zero", ctypes.c_int64),
        ("distances", ctypes.c_int64),
    )


HEADS = (
    ("threads", ctypes.c_int64),
    ("dtype", ctypes.c_int64),
    ("q", ctypes.c_void_p),
    ("k", ctypes.c_void_p),
    ("v", ctypes.c_void_p),
    ("out", ctypes.c_void_p),
    ("lse", ctypes.c_void_p),
    ("batch", ctypes.c_int64),
    ("heads", ctypes.c_int64),
    ("kv_heads", ctypes.c_int64),
    ("n", ctypes.c_int64),
    ("m", ctypes.c_int64),
    ("width", ctypes.c_int64),
    ("value_width", ctypes.c_int64),
    ("q_strides", Strides),
    ("k_strides", Strides),
    ("v_strides", Strides),
    ("out_strides", Strides),
)
"""How the structs of all attention begin."""


def heads_arguments(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> dict[str, Any]:
    """The fields of :data:`HEADS`; features are contiguous, and the caller keeps the tensors."""
    return {
        "threads": torch.get_num_threads(),
        "dtype": library.DTYPES[q.dtype],
        "lse": library.pointer(lse) if lse.numel() else None,
        "batch": q.shape[0],
        "heads": q.shape[1],
        "kv_heads": k.shape[1],
        "n": q.shape[2],
        "m": k.shape[2],
        "width": q.shape[3],
        "value_width": v.shape[3],
        **library.strided(q=q, k=k, v=v, out=out),
    }


HEAD_GRADIENTS = (
    ("grad_out", ctypes.c_void_p),
    ("grad_out_strides", Strides),
    ("grad_q", ctypes.c_void_p),
    ("grad_k", ctypes.c_void_p),
    ("grad_v", ctypes.c_void_p),
    ("grad_q_strides", Strides),
    ("grad_k_strides", Strides),
    ("grad_v_strides", Strides),
)
"""What follows the forward struct where queries, keys and values alone have gradients."""


@dataclass(frozen=True)
class PackedHeads(Packed):
    """The base of problems of which queries, keys and values alone have gradients."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.q, self.k, self.v]

    def empty_gradients(self, needed: Sequence[bool]) -> list[Tensor]:
        """With the heads of a token side by side where they are in the input."""
        inputs = (self.q, self.k, self.v)
        return [empty_gradient(x) if need else x.new_empty(0) for x, need in zip(inputs, needed, strict=True)]

    def heads_misfit(self) -> str | None:
        """The mismatch among queries, keys and values of four axes, in words; None when they belong together."""
        batch, heads, n, width = self.q.shape
        kv_heads, m, value_width = self.v.shape[1:]
        same = self.k.shape == (batch, kv_heads, m, width) and self.v.shape[0] == batch
        if not same or min(kv_heads, width, value_width) < 1:
            return "q, k and v of shapes that do not belong together"
        if heads % kv_heads or max(n, m, width, value_width) > library.MOST:
            return f"{heads} heads on {kv_heads}, or more than {library.MOST} tokens or features"
        return None

    def run_backward(
        self, kernel: type[library.Arguments], forward: ctypes.Structure, grad_out: Tensor, needed: Sequence[bool]
    ) -> list[Tensor]:
        """Gradients of q, k and v by a kernel whose struct ends with :data:`HEAD_GRADIENTS`; empty where not needed."""
        grads = self.empty_gradients(needed)
        grad_q, grad_k, grad_v = (x if need else None for x, need in zip(grads, needed, strict=True))
        outer = library.strided(grad_out=grad_out, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v)
        library.call(kernel(forward=ctypes.pointer(forward), **outer))
        return grads


class Attention(library.Arguments):
    kernel = "attention"
    _fields_ = (
        *HEADS,
        ("scale", ctypes.c_float),
        ("shift", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("rule", ctypes.c_int32),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("sink", ctypes.c_void_p),
        ("visibility", VisibilityArguments),
        ("biases", BiasArguments),
    )


class AttentionBackward(library.Arguments):
    kernel = "attention_backward"
    _fields_ = (
        ("forward", ctypes.POINTER(Attention)),
        ("grad_out", ctypes.c_void_p),
        ("grad_out_strides", Strides),
        ("grad_lse", ctypes.c_void_p),
        ("grad_q", ctypes.c_void_p),
        ("grad_k", ctypes.c_void_p),
        ("grad_v", ctypes.c_void_p),
        ("grad_q_strides", Strides),
        ("grad_k_strides", Strides),
        ("grad_v_strides", Strides),
        ("grad_sink", ctypes.c_void_p),
        ("grad_bias", ctypes.c_void_p),
        ("grad_distance", ctypes.c_void_p),
        ("grad_bias_queries", ctypes.c_int64),
        ("grad_bias_keys", ctypes.c_int64),
    )


class AttentionDecode(library.Arguments):
    kernel = "attention_decode"
    _fields_ = (
        ("forward", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("pages_stride", ctypes.c_int64),
        ("page_size", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
    )


def refuses(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> str | None:
    """Why the kernel does not take such a call; None when it does."""
    if problem.dropout > 0:
        return "it has no dropout"
    if problem.want_weights:
        return "it does not store the weights"
    if problem.largest is not None:
        return "it does not choose the largest weights"
    if problem.stretch is not None and problem.sink is not None:
        return "it does not clip weights beside a sink"
    if problem.stretch is not None and q.shape[2] < DECODED and k.shape[2] >= LONG:
        return f"its kernel for few queries on {LONG} keys or more does not clip weights"
    if problem.position_bias is not None and not isinstance(problem.position_bias, DistanceBias):
        return "it takes position biases by distance alone (regard.core.visibility.DistanceBias)"
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads < 1 or heads % kv_heads or v.shape[1] != kv_heads:
        return f"{heads} query heads do not share {kv_heads} key heads"
    if q.shape[3] < 1 or v.shape[3] < 1 or k.shape[3] != q.shape[3]:
        return "heads without features, or queries and keys of different widths"
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0] or v.shape[2] != k.shape[2]:
        return "q, k and v do not have the same rows and tokens"
    if max(q.shape[2:] + v.shape[2:]) > library.MOST:
        return f"it takes at most {library.MOST} tokens and features"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return "q, k and v have different dtypes"
    masks = None if problem.blocks is None else problem.blocks.visible
    places = None if isinstance(problem.ranks, CountedRanks) else problem.ranks.keys
    others = {"sink": problem.sink, "bias": problem.bias, "blocks": masks, "ranks": places}
    for name, x in {"k": k, "v": v, **others}.items():
        if x is not None and not x.is_cpu:
            return f"it runs on cpu, and {name} is on {x.device.type}"
    if masks is not None and masks.numel() == 0:
        return "the block mask has no blocks"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`regard.engines.attention.attention`."""
    if q.shape[0] * q.shape[1] * q.shape[2] == 0 or k.shape[2] == 0:
        return of_no_pairs(q, k, v, problem.want_weights, problem.want_lse)
    out, lse = _attention(_packed(q, k, v, problem))
    return out, None, lse if problem.want_lse else None


def part_gradients(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, grad: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`regard.engines.attention.part_gradients`."""
    needed = [True, True, True, False, False, False]
    dq, dk, dv, *_ = _attention_backward(grad, None, _packed(q, k, v, problem), out, lse, needed)
    return dq, dk, dv


@dataclass(frozen=True)
class PackedProblem(Packed):
    """A :class:`regard.engines.attention.problem.Problem` as the operator has it, with its queries, keys and values.

    Attributes:
        query_ranks, key_ranks: None where queries count up from `first_rank` and keys from 0.
        limits: of the visibility, see :func:`_limits`.
        blocks: where a block mask lets blocks of `block_size` see each other.
        rule: its number: in `RULES`, or `CLIPPED`.
        softcap: 0 for none.
        distance: biases (H or 1, distances) by key rank minus query rank, of which `distance_zero` is the place of 0.
        stretch: of clipped weights alone, low and high.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    bias: Tensor | None
    distance: Tensor | None
    query_ranks: Tensor | None
    key_ranks: Tensor | None
    first_rank: int
    limits: Sequence[int]
    blocks: Tensor | None
    block_size: int
    scale: float
    rule: int
    shift: float
    softcap: float
    distance_zero: int
    stretch: Sequence[float]

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.q, self.k, self.v, self.sink, self.bias, self.distance]


def _packed(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> PackedProblem:
    n, m = q.shape[2], k.shape[2]
    ranks, visibility, stretch = problem.ranks, problem.visibility, problem.stretch
    # then ranks need not be kept for the backward pass: what padding sees in causal attention does not matter
    counting = ranks.plain and ranks.first is not None and (visibility.causal or visibility.everything)
    if ranks.first is not None:
        visibility = visibility.within(ranks.first, n, m)
    distance, zero = None, 0
    if problem.position_bias is not None:
        assert isinstance(problem.position_bias, DistanceBias)
        low, high = _distances(ranks, visibility, n, m)
        distance, zero = problem.position_bias.table(low, high, q.device).float(), -low
    blocks = problem.blocks
    return PackedProblem(
        q=q,
        k=k,
        v=v,
        sink=None if problem.sink is None else problem.sink.float(),
        bias=None if problem.bias is None else problem.bias.float(),
        distance=distance,
        query_ranks=None if counting else ranks.queries,
        key_ranks=None if counting else ranks.keys,
        first_rank=ranks.first if counting and ranks.first is not None else 0,
        limits=_limits(visibility),
        blocks=None if blocks is None else blocks.visible,
        block_size=0 if blocks is None else min(blocks.block_size, library.MOST),
        scale=float(problem.scale),
        rule=RULES.index(problem.rule) if stretch is None else CLIPPED,
        shift=float(problem.shift),
        softcap=0.0 if problem.softcap is None else float(problem.softcap),
        distance_zero=zero,
        stretch=[] if stretch is None else [float(x) for x in stretch],
    )


def _limits(visibility: Visibility) -> list[int]:
    """Visibility as numbers, in the order of the C struct; -1 for no limit."""
    left, right, block = visibility.left, visibility.right, visibility.block
    limits = [
        -1 if left is None else left,
        -1 if right is None else right,
        0 if block is None else block,
        visibility.lookback,
        visibility.lookahead,
    ]
    return [int(visibility.causal), *(min(limit, library.MOST) for limit in limits)]  # no two ranks are further apart


def _distances(ranks: Ranks, visibility: Visibility, n: int, m: int) -> tuple[int, int]:
    """The least and the largest key rank minus query rank of visible pairs, without looking at the ranks' values."""
    if ranks.offset is not None:
        low, high = -(ranks.offset + n - 1), m - 1 - ranks.offset
    else:
        low, high = -(m + n), m + n  # rows count their tokens, of which there are no more than slots
    back, ahead = visibility.reach()
    low = low if back is None else max(low, -back)
    high = high if ahead is None else min(high, ahead)
    return min(low, 0), max(high, 0)


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, V) with the heads of a token side by side, as the output projection wants them."""
    batch, heads, n, _ = q.shape
    width = v.shape[3]
    return v.new_empty_strided((batch, heads, n, width), (heads * n * width, width, heads * width, 1))


def by_row(x: Tensor) -> int:
    """Elements from row to row of the batch; 0 where all rows share them."""
    return x.stride(0) if x.shape[0] > 1 else 0


def _broadcast_strides(x: Tensor) -> list[int]:
    return [stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True)]


def _check(p: PackedProblem) -> None:
    """Raise Unsupported for tensors that the kernel must not be given."""
    q, k, v = p.q, p.k, p.v
    if len(p.limits) != 6 or not 0 <= p.rule <= CLIPPED:
        raise Unsupported(f"native attention with limits {list(p.limits)} and rule {p.rule}", supported="six limits")
    clipped = p.rule == CLIPPED
    if (not clipped and len(p.stretch)) or (clipped and (p.sink is not None or not _is_stretch(p.stretch))):
        raise Unsupported(
            f"native attention by rule {p.rule} with stretch {list(p.stretch)}", supported="low <= 0, high >= 1"
        )
    if not library.within_range(*p.limits, least=-1) or not library.within_range(p.block_size, p.first_rank):
        raise Unsupported(
            f"native attention with limits {list(p.limits)}, blocks of {p.block_size} and {p.first_rank} as the first rank",
            supported=f"numbers up to {library.MOST}",
        )
    if (p.query_ranks is None) != (p.key_ranks is None):
        raise Unsupported("native attention with ranks of one side")
    if not q.ndim == k.ndim == v.ndim == 4:
        raise _misfit("q, k and v", q, k, v)
    batch, heads, n, width = q.shape
    _, kv_heads, m, value_width = v.shape
    if k.shape != (batch, kv_heads, m, width) or v.shape[0] != batch or min(kv_heads, width, value_width) < 1:
        raise _misfit("q, k and v", q, k, v)
    if heads % kv_heads or max(n, m, width, value_width) > library.MOST:
        raise _misfit("q, k and v", q, k, v)
    if q.dtype not in library.DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise _misfit("q, k and v", q, k, v)
    for ranks, slots in ((p.query_ranks, n), (p.key_ranks, m)):
        if ranks is not None and (not _fits(ranks, (batch, slots), torch.int64) or ranks.shape[1] != slots):
            raise _misfit("ranks", ranks)
        if not library.within_range(ranks):
            raise Unsupported("native attention with ranks of any size", supported=f"numbers up to {library.MOST}")
    if p.sink is not None and (p.sink.shape != (heads,) or p.sink.dtype != torch.float32):
        raise _misfit("sink", p.sink)
    if p.bias is not None and not _fits(p.bias, (batch, heads, n, m), torch.float32):
        raise _misfit("bias", p.bias)
    if p.distance is None and p.distance_zero:
        raise Unsupported(f"native attention with distance 0 at {p.distance_zero} of no table")
    if p.distance is not None:
        table = p.distance.shape[-1] if p.distance.ndim else 0
        if not _fits(p.distance, (heads, table), torch.float32) or not 0 <= p.distance_zero < table:
            raise _misfit("table of distances", p.distance)
        if not _reaches(p, table, n, m):
            raise Unsupported("native attention with a table of distances that some pair is beyond")
    if p.blocks is not None:
        fits = p.blocks.ndim == 4 and _fits(p.blocks, (batch, heads, *p.blocks.shape[2:]), torch.bool)
        if not fits or p.block_size < 1 or p.blocks.numel() == 0:
            raise _misfit("block mask", p.blocks)


def _is_stretch(stretch: Sequence[float]) -> bool:
    return len(stretch) == 2 and stretch[0] <= 0 < 1 <= stretch[1]


def _reaches(p: PackedProblem, table: int, n: int, m: int) -> bool:
    """Whether the table has the distance of every pair that is seen."""
    if n == 0 or m == 0:
        return True
    first, last, highest = p.first_rank, p.first_rank + n - 1, m - 1
    if p.query_ranks is not None and p.key_ranks is not None:
        first, last, highest = int(p.query_ranks.min()), int(p.query_ranks.max()), int(p.key_ranks.max())
    causal, left, right, block, lookback, lookahead = p.limits
    sides = [None if side < 0 else side for side in (left, right)]
    rule = Visibility(bool(causal), sides[0], sides[1], block or None, lookback, lookahead)
    back, ahead = rule.reach()
    low, high = -last if back is None else max(-last, -back), highest - first
    high = high if ahead is None else min(high, ahead)
    return p.distance_zero + low >= 0 and p.distance_zero + high < table


def _check_results(p: PackedProblem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Raise Unsupported for results and gradients that are not those of a call that :func:`_check` accepts."""
    by_query = tuple(p.q.shape[:3])
    by_feature = (*by_query, p.v.shape[3])
    kept = by_query if p.rule in WITH_LSE else (0,)
    for name, x, shape, dtype in (
        ("grad_out", grad_out, by_feature, p.q.dtype),
        ("out", out, by_feature, p.q.dtype),
        ("lse", lse, kept, torch.float32),
        ("grad_lse", grad_lse, kept, torch.float32),
    ):
        if x is not None and (x.shape != shape or x.dtype != dtype or not x.is_cpu):
            raise _misfit(name, x)


def _fits(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether x has this shape, axes of size 1 broadcast, and this dtype."""
    if x.dtype != dtype or not x.is_cpu or x.ndim != len(shape):
        return False
    return all(a in (1, b) for a, b in zip(x.shape, shape, strict=True))


def _misfit(what: str, *tensors: Tensor) -> Unsupported:
    described = ", ".join(f"{tuple(x.shape)} {str(x.dtype)[6:]}" for x in tensors)
    return Unsupported(f"native attention with {what} {described}", supported="what regard.engines.attention makes")


def _counted(first: int, count: int) -> tuple[Tensor | None, int | None]:
    """A tensor of the ranks first, first + 1, ..., unless they are kept anyway, and where they begin."""
    if first >= 0 and first + count <= KEPT_RANKS:
        return None, ctypes.addressof(FIRST_RANKS) + ctypes.sizeof(ctypes.c_int64) * first
    ranks = torch.arange(first, first + count, device="cpu")
    return ranks, library.pointer(ranks)


def _arguments(p: PackedProblem, out: Tensor, lse: Tensor) -> tuple[Attention, tuple[Any, ...]]:
    """The forward struct, and the tensors whose memory it points at. All are checked before."""
    q, k, v = map(library.rows_contiguous, (p.q, p.k, p.v))
    sink = None if p.sink is None else p.sink.contiguous()
    distance = None if p.distance is None else library.rows_contiguous(p.distance)
    query_ranks, key_ranks, blocks, bias = p.query_ranks, p.key_ranks, p.blocks, p.bias
    if query_ranks is None or key_ranks is None:
        query_ranks, first_query = _counted(p.first_rank, q.shape[2])
        key_ranks, first_key = _counted(0, k.shape[2])
        visibility = VisibilityArguments(first_query, first_key, 0, 0, *p.limits)
    else:
        query_ranks, key_ranks = library.rows_contiguous(query_ranks), library.rows_contiguous(key_ranks)
        places = library.pointer(query_ranks), library.pointer(key_ranks)
        visibility = VisibilityArguments(*places, by_row(query_ranks), by_row(key_ranks), *p.limits)
    if blocks is not None:
        blocks = library.rows_contiguous(blocks)
        visibility.blocks = library.pointer(blocks)
        strides = _broadcast_strides(blocks)
        visibility.blocks_strides = Strides(strides[0], strides[1], blocks.stride(2))
        visibility.blocks_rows, visibility.blocks_columns = blocks.shape[2], blocks.shape[3]
        visibility.block_size = p.block_size
    biases = BiasArguments()
    if bias is not None:
        biases.bias = library.pointer(bias)
        biases.bias_strides = (ctypes.c_int64 * 4)(*_broadcast_strides(bias))
    if distance is not None:
        biases.distance = library.pointer(distance)
        biases.distance_stride = by_row(distance)
        biases.distance_zero, biases.distances = p.distance_zero, distance.shape[-1]
    arguments = Attention(
        **heads_arguments(q, k, v, out, lse),
        scale=p.scale,
        shift=p.shift,
        softcap=p.softcap,
        rule=p.rule,
        low=p.stretch[0] if p.stretch else 0.0,
        high=p.stretch[1] if p.stretch else 1.0,
        sink=library.pointer(sink),
        visibility=visibility,
        biases=biases,
    )
    return arguments, (q, k, v, query_ranks, key_ranks, sink, bias, distance, blocks, out, lse)


def _empty_results(p: PackedProblem) -> tuple[Tensor, Tensor]:
    lse = p.q.new_empty(p.q.shape[:3] if p.rule in WITH_LSE else (0,), dtype=torch.float32)
    return empty_output(p.q, p.v), lse


@operator("attention")
def _attention(problem: PackedProblem) -> tuple[Tensor, Tensor]:
    """Output, and of softmax, clipped or not, the log-sum-exp (of other rules an empty tensor)."""
    _check(problem)
    out, lse = _empty_results(problem)
    arguments, kept = _arguments(problem, out, lse)
    if problem.rule == 0 and problem.blocks is None:
        _run_forward(arguments, problem.q.shape[2], problem.k.shape[2])
    else:
        library.call(arguments)
    del kept
    return out, lse


@lru_cache(maxsize=256)
def _template(
    query_shape: torch.Size,
    kv_heads: int,
    value_width: int,
    dtype: torch.dtype,
    causal: bool,
    left: int | None,
    right: int | None,
    threads: int,
) -> bytes:
    """The forward struct of a plain call, but for what changes from call to call."""
    batch, heads, n, width = query_shape
    where = ctypes.addressof(FIRST_RANKS)
    limits = _limits(Visibility(causal, left, right))
    return bytes(
        Attention(
            threads=threads,
            dtype=library.DTYPES[dtype],
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            n=n,
            width=width,
            value_width=value_width,
            out_strides=Strides(heads * n * value_width, value_width, heads * value_width),
            low=0.0,
            high=1.0,
            visibility=VisibilityArguments(where, where, 0, 0, *limits),
        )
    )


def plain(
    q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, visibility: Visibility, scale: float, lse: Tensor | None = None
) -> Tensor | None:
    """Softmax attention of tensors and a rule on ranks that count up, by the shortest way to the kernel; None for other
    calls, and where a gradient is recorded or somebody watches.

    Of few tokens, the general way through Python takes longer than the kernel.

    Args:
        lse: where to write the log-sum-exp, (B, H, N) in float32, contiguous.
    """
    if not isinstance(ranks, CountedRanks) or not runs_plainly(q, k, v):
        return None
    batch, heads, n, width = q.shape
    _, kv_heads, m, value_width = v.shape
    dtype, first = q.dtype, ranks.first
    if (
        not 0 < n <= KEPT_RANKS - first <= KEPT_RANKS
        or not 0 < m <= KEPT_RANKS
        or k.shape != (batch, kv_heads, m, width)
        or v.shape[0] != batch
        or min(batch, heads, kv_heads, width, value_width) < 1
        or heads % kv_heads
        or dtype not in library.DTYPES
        or not k.dtype == v.dtype == dtype
        or not q.stride(3) == k.stride(3) == v.stride(3) == 1
        or visibility.block is not None
    ):
        return None
    near = visibility.within(first, n, m)
    template = _template(
        q.shape, kv_heads, value_width, dtype, near.causal, near.left, near.right, torch.get_num_threads()
    )
    arguments = Attention.from_buffer_copy(template)
    out = empty_output(q, v)
    arguments.q, arguments.k, arguments.v = library.pointer(q), library.pointer(k), library.pointer(v)
    arguments.out, arguments.lse = library.pointer(out), library.pointer(lse)
    arguments.m, arguments.scale = m, scale
    arguments.q_strides, arguments.k_strides, arguments.v_strides = (x.stride()[:3] for x in (q, k, v))
    if first:
        arguments.visibility.query_ranks = ctypes.addressof(FIRST_RANKS) + ctypes.sizeof(ctypes.c_int64) * first
    _run_forward(arguments, n, m)
    return out


def _run_forward(arguments: Attention, n: int, m: int) -> None:
    """The kernel for few queries where there are few, of softmax without a block mask; otherwise the general one."""
    if n <= (DECODED if m < LONG else DECODED_LONG):
        library.call(AttentionDecode(forward=ctypes.addressof(arguments)))
    else:
        library.call(arguments)


@_attention.register_fake
def _(problem: PackedProblem) -> tuple[Tensor, Tensor]:
    return _empty_results(problem)


@operator("attention_backward")
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    problem: PackedProblem,
    out: Tensor,
    lse: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of q, k, v, whether needed or not, sink, bias (B, H, N|1, M|1) and distances (H, distances); empty tensors
    for those not needed."""
    _check(problem)
    _check_results(problem, grad_out, grad_lse, out, lse)
    out, lse = library.rows_contiguous(out), lse.contiguous()
    grads = _empty_gradients(problem, needed)
    grad_q, grad_k, grad_v, *learned = grads
    grad_sink, grad_bias, grad_distance = (x if x.numel() else None for x in learned)
    forward, kept = _arguments(problem, out, lse)
    grad_out = library.rows_contiguous(grad_out)
    grad_lse = None if grad_lse is None or problem.rule not in WITH_LSE else grad_lse.contiguous()
    library.call(
        AttentionBackward(
            forward=ctypes.pointer(forward),
            **library.strided(grad_out=grad_out, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v),
            grad_lse=library.pointer(grad_lse),
            grad_sink=library.pointer(grad_sink),
            grad_bias=library.pointer(grad_bias),
            grad_distance=library.pointer(grad_distance),
            grad_bias_queries=0 if grad_bias is None else grad_bias.shape[2],
            grad_bias_keys=0 if grad_bias is None else grad_bias.shape[3],
        )
    )
    del kept
    return grads


def _empty_gradients(p: PackedProblem, needed: list[bool]) -> list[Tensor]:
    batch, heads = p.q.shape[:2]
    shapes = [
        (heads,) if p.sink is not None and needed[3] else (0,),
        (batch, heads, *p.bias.shape[2:]) if p.bias is not None and needed[4] else (0,),
        (heads, p.distance.shape[-1]) if p.distance is not None and needed[5] else (0,),
    ]
    learned = [p.q.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return [*map(empty_gradient, (p.q, p.k, p.v)), *learned]


def empty_gradient(x: Tensor) -> Tensor:
    """Like x, with the heads of a token side by side where they are in x, and contiguous features."""
    if x.stride(1) < x.stride(2):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
    return x.new_empty(x.shape)


@_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    problem: PackedProblem,
    out: Tensor,
    lse: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    return _empty_gradients(problem, needed)


def _keep(ctx: Any, inputs: tuple[PackedProblem], output: tuple[Tensor, Tensor]) -> None:
    inputs[0].keep(ctx, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * len(ctx.needs_input_grad)
    problem, (out, lse) = PackedProblem.kept(ctx)
    needed = problem.needed(ctx)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = _attention_backward(grad_out, grad_lse, problem, out, lse, needed)
    # of what rows, heads or tokens share
    summed = [
        grad.sum_to_size(x.shape) if x is not None and need else grad
        for grad, x, need in zip(grads, problem.learned, needed, strict=True)
    ]
    return problem.gradients(summed, needed)


_attention.register_autograd(_backward, setup_context=_keep)
_attention_backward.refuse_gradient("gradients of gradients of native attention", supported="first gradients")
