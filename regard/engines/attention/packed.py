"""The arguments of attention as its kernel's operator takes them, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.backends.native import library
from regard.contract import Unsupported
from regard.core.visibility import DistanceBias, Ranks, Visibility
from regard.engines.attention.problem import RULES, Problem
from regard.engines.heads import PackedHeads, empty_gradient

SOFTMAX, CLIPPED = RULES.index("softmax"), len(RULES)
"""Rule numbers of softmax, and of softmax with stretched and clipped weights."""

WITH_LSE = (SOFTMAX, CLIPPED)
"""Numbers of the rules that have a log-sum-exp."""


@dataclass(frozen=True)
class PackedProblem(PackedHeads):
    """A :class:`regard.engines.attention.problem.Problem` with its queries, keys and values, as the operator takes it.

    Attributes:
        query_ranks, key_ranks: ranks; None if queries count up from `first_rank` and keys from 0.
        limits: the visibility's limits, see :func:`limits_of`.
        blocks: block mask that says which blocks of `block_size` may see each other.
        rule: its number: an index of `RULES`, or `CLIPPED`.
        softcap: 0 for none.
        distance: biases (H or 1, distances) by key rank minus query rank; `distance_zero` is the index of distance 0.
        stretch: low and high, for clipped weights only.
    """

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

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> PackedProblem:
        """Convert a problem to the operator's form."""
        n, m = q.shape[2], k.shape[2]
        ranks, visibility, stretch = problem.ranks, problem.visibility, problem.stretch
        # backward then need not keep ranks; what padding sees in causal attention does not matter
        counting = ranks.plain and ranks.first is not None and (visibility.causal or visibility.everything)
        if ranks.first is not None:
            visibility = visibility.within(ranks.first, n, m)
        distance, zero = None, 0
        if problem.position_bias is not None:
            assert isinstance(problem.position_bias, DistanceBias)
            low, high = _distances(ranks, visibility, n, m)
            distance, zero = problem.position_bias.table(low, high, q.device).float(), -low
        blocks = problem.blocks
        return cls(
            q=q,
            k=k,
            v=v,
            sink=None if problem.sink is None else problem.sink.float(),
            bias=None if problem.bias is None else problem.bias.float(),
            distance=distance,
            query_ranks=None if counting else ranks.queries,
            key_ranks=None if counting else ranks.keys,
            first_rank=ranks.first if counting and ranks.first is not None else 0,
            limits=limits_of(visibility),
            blocks=None if blocks is None else blocks.visible,
            block_size=0 if blocks is None else min(blocks.block_size, library.MOST),
            scale=float(problem.scale),
            rule=RULES.index(problem.rule) if stretch is None else CLIPPED,
            shift=float(problem.shift),
            softcap=0.0 if problem.softcap is None else float(problem.softcap),
            distance_zero=zero,
            stretch=[] if stretch is None else [float(x) for x in stretch],
        )

    @property
    def learned(self) -> list[Tensor | None]:
        return [self.q, self.k, self.v, self.sink, self.bias, self.distance]

    def empty_gradients(self, needed: Sequence[bool]) -> list[Tensor]:
        """Gradients of q, k and v, needed or not, with a token's heads side by side if the inputs have them so; of the
        sink, the bias (B, H, N|1, M|1) and the distances (H, distances) in float32, empty where not needed."""
        batch, heads = self.q.shape[:2]
        shapes = [
            (heads,) if self.sink is not None and needed[3] else (0,),
            (batch, heads, *self.bias.shape[2:]) if self.bias is not None and needed[4] else (0,),
            (heads, self.distance.shape[-1]) if self.distance is not None and needed[5] else (0,),
        ]
        learned = [self.q.new_empty(shape, dtype=torch.float32) for shape in shapes]
        return [*map(empty_gradient, (self.q, self.k, self.v)), *learned]


def limits_of(visibility: Visibility) -> list[int]:
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
    """The smallest and the largest key rank minus query rank of visible pairs, without reading the ranks' values."""
    if ranks.offset is not None:
        low, high = -(ranks.offset + n - 1), m - 1 - ranks.offset
    else:
        low, high = -(m + n), m + n  # ranks count a row's tokens, of which there are at most as many as slots
    back, ahead = visibility.reach()
    low = low if back is None else max(low, -back)
    high = high if ahead is None else min(high, ahead)
    return min(low, 0), max(high, 0)


def check(p: PackedProblem) -> None:
    """Raise Unsupported for tensors that are unsafe to pass to the kernel."""
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
    one_dtype = q.dtype in library.DTYPES and q.dtype == k.dtype == v.dtype
    if not (q.ndim == k.ndim == v.ndim == 4 and one_dtype) or p.heads_misfit() is not None:
        raise _misfit("q, k and v", q, k, v)
    batch, heads, n, _ = q.shape
    m = k.shape[2]
    for ranks, slots in ((p.query_ranks, n), (p.key_ranks, m)):
        if ranks is not None and (not _fits(ranks, (batch, slots), torch.int64) or ranks.shape[1] != slots):
            raise _misfit("ranks", ranks)
    if not library.within_range(p.query_ranks, p.key_ranks):
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
    """Return whether the table contains the distance of every visible pair."""
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


def check_results(p: PackedProblem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Raise Unsupported for results and gradients that do not belong to a call that :func:`check` accepts."""
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
    """Return whether x has this dtype and broadcasts to this shape."""
    if x.dtype != dtype or not x.is_cpu or x.ndim != len(shape):
        return False
    return all(a in (1, b) for a, b in zip(x.shape, shape, strict=True))


def _misfit(what: str, *tensors: Tensor) -> Unsupported:
    described = ", ".join(f"{tuple(x.shape)} {str(x.dtype)[6:]}" for x in tensors)
    return Unsupported(f"native attention with {what} {described}", supported="what regard.engines.attention makes")
