"""The definition of combiner: its options and a reference implementation written for readability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Pattern,
    Unsupported,
    at_least,
    one_of,
)
from regard.core.precision import wide
from regard.engines.grouped_attention import Dropout

if TYPE_CHECKING:
    from jaxtyping import Float


AXIAL = ("axial_vertical", "axial_horizontal", "axial_mixture")


FACTORIZATIONS = ("fixed", "logn", *AXIAL, "axial_rowmajor")


EPSILON = 1e-6
"""Added to the variance by the layer norm in the row keys."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        factorization: ``fixed``, ``logn``, ``axial_vertical``, ``axial_horizontal``, ``axial_mixture`` or
            ``axial_rowmajor``.
        segment: s >= 1, tokens in a row; not used by ``logn``.
        pool: the map before pooling: ``identity``, ``relu``, or ``deepset``, relu of a learned map; ``identity`` in
            ``axial_rowmajor``, which pools nothing.
        reduce: the pooling: ``max``, ``mean`` or ``sum``.
        share_pool: whether queries and keys share one learned map, in a layer with ``deepset``.
        exclude_self_segment: in noncausal ``fixed`` and ``axial_rowmajor``, whether a token's own row is left out of
            its groups.
        row_keys: keys of the summaries in ``axial_rowmajor``: ``none``, ``wsum``, ``proj`` or ``wsum_proj``.
    """

    factorization: str = "fixed"
    segment: int = 32
    pool: str = "identity"
    reduce: str = "max"
    share_pool: bool = False
    exclude_self_segment: bool = False
    row_keys: str = "proj"

    def __post_init__(self) -> None:
        one_of("factorization", self.factorization, FACTORIZATIONS)
        at_least("segment", self.segment, 1)
        one_of("pool", self.pool, ("identity", "relu", "deepset"))
        one_of("reduce", self.reduce, ("max", "mean", "sum"))
        one_of("row_keys", self.row_keys, ("none", "wsum", "proj", "wsum_proj"))
        if self.factorization == "axial_rowmajor" and (self.pool, self.reduce) != ("identity", "max"):
            raise Unsupported(
                f"pool={self.pool!r}, reduce={self.reduce!r} in axial_rowmajor, which pools nothing",
                supported="pool='identity', reduce='max'",
                nearest="factorization='axial_mixture'",
            )
        if self.share_pool and self.pool != "deepset":
            raise Unsupported(
                f"share_pool with pool={self.pool!r}", supported="pool='deepset'", nearest="share_pool=False"
            )
        if self.exclude_self_segment and self.factorization not in ("fixed", "axial_rowmajor"):
            raise Unsupported(
                f"exclude_self_segment in {self.factorization}",
                supported="fixed, axial_rowmajor",
                nearest="exclude_self_segment=False",
            )

    @property
    def vertical(self) -> bool:
        """Whether there are summaries of columns."""
        return self.factorization in ("axial_vertical", "axial_mixture")

    @property
    def horizontal(self) -> bool:
        """Whether there are summaries of the left and right parts of rows."""
        return self.factorization in ("axial_horizontal", "axial_mixture")

    @property
    def projected(self) -> bool:
        """Whether learned maps compute the keys of rows."""
        return self.factorization == "axial_rowmajor" and self.row_keys in ("proj", "wsum_proj")


@dataclass(frozen=True)
class Learned:
    """The learned maps of a call; None for those that its options do not have."""

    pool_q: Float[Tensor, "d d"] | None = None
    pool_k: Float[Tensor, "d d"] | None = None
    row_in: Float[Tensor, "h r c"] | None = None
    norm_weight: Float[Tensor, " c"] | None = None
    norm_bias: Float[Tensor, " c"] | None = None
    row_out: Float[Tensor, "h c d"] | None = None


@dataclass(frozen=True)
class Group:
    """Ranks of a summary's tokens, and of the token whose query summarises them (None: the pooled query)."""

    members: range
    asker: int | None = None


def partition(config: Config, causal: bool, i: int, n: int) -> tuple[list[int], list[Group]]:
    """Return the ranks that token i of n attends to directly, and the groups that it attends to through summaries."""
    s = config.segment
    r, c = divmod(i, s)
    rows = [range(start, min(start + s, n)) for start in range(0, n, s)]
    others = [t for t in range(r if causal else len(rows)) if t != r]
    if config.factorization == "logn":
        bits = [bit for bit in range(i.bit_length()) if i >> bit & 1]
        return [i], [Group(range(((i >> bit) - 1) << bit, i >> bit << bit)) for bit in bits]
    own = list(rows[r][: c + 1] if causal else rows[r])
    if config.factorization in ("fixed", "axial_rowmajor"):
        seen = others if causal or config.exclude_self_segment else range(len(rows))
        if config.factorization == "fixed":
            return own, [Group(rows[t]) for t in seen]
        return own, [Group(rows[t], rows[t][min(c, len(rows[t]) - 1)]) for t in seen]
    direct = own + [rows[t][c] for t in others if c < len(rows[t])]
    groups = []
    if config.vertical:
        for column in (e for e in range(s) if e != c):
            groups.append(range(column, r * s, s))
            groups.append(range((r + 1) * s + column, 0 if causal else n, s))
    if config.horizontal:
        for t in others:
            groups += [rows[t][:c], rows[t][c + 1 :]]
    return direct, [Group(members) for members in groups if len(members)]


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    residual: Float[Tensor, "b m c"] | None = None,
    **learned: Tensor,
) -> Float[Tensor, "b h n v"]:
    """The definition, one token and one group at a time."""
    config: Config = call.config
    maps = check(call, q, k, residual, learned)
    n, m, cross = q.shape[2], k.shape[2], call.pattern.cross
    q, asking = call.scale * q, call.scale * (k if cross else q)
    direct: list[int]
    groups: list[Group]
    summaries: dict[Group, tuple[Tensor, Tensor]] = {}

    def summary(group: Group) -> tuple[Tensor, Tensor]:
        some = list(group.members)
        keys, values = k[:, :, some], v[:, :, some]
        if group.asker is None:
            asker = _pooled(config, asking[:, :, some], maps.pool_q)
            key = _pooled(config, keys, maps.pool_k)
            return key, (asker[:, :, None] @ keys.mT).softmax(-1)[:, :, 0, :, None].mul(values).sum(2)
        weights = (q[:, :, group.asker, None] @ keys.mT).softmax(-1)
        value, key = (weights @ values)[:, :, 0], k[:, :, group.asker]
        if config.row_keys in ("wsum", "wsum_proj"):
            key = (weights @ keys)[:, :, 0]
        if config.projected and residual is not None:
            told = key if config.row_keys == "wsum_proj" else value
            key = projected_keys(maps, told[:, :, None], residual[:, group.asker, None])[:, :, 0]
        return key, value

    outputs = []
    for i in range(n):
        if cross:
            direct, groups = [], [Group(range(a, min(a + config.segment, m))) for a in range(0, m, config.segment)]
        else:
            direct, groups = partition(config, call.pattern.causal, i, n)
        for group in groups:
            if group not in summaries:
                summaries[group] = summary(group)
        keys = torch.stack([*(k[:, :, j] for j in direct), *(summaries[g][0] for g in groups)] or [k[:, :, :0].sum(2)])
        values = torch.stack(
            [*(v[:, :, j] for j in direct), *(summaries[g][1] for g in groups)] or [v[:, :, :0].sum(2)]
        )
        weights = torch.einsum("bhd,jbhd->bhj", q[:, :, i], keys).softmax(-1)
        outputs.append(torch.einsum("bhj,jbhv->bhv", weights, values))
    return torch.stack(outputs, 2) if outputs else v.new_zeros(*q.shape[:3], v.shape[-1])


def check(call: Call, q: Tensor, k: Tensor, residual: Tensor | None, given: dict[str, Any]) -> Learned:
    """Return the call's learned maps; raises Unsupported if its inputs do not fit the options."""
    config, given = call.config, {name: x for name, x in given.items() if x is not None}
    check_pattern(config, call.pattern)
    if call.pattern is Pattern.CAUSAL_SELF and q.shape[2] != k.shape[2]:
        raise Unsupported(f"combiner with {q.shape[2]} queries and {k.shape[2]} keys", supported="a query for each key")
    pools, rows = {"pool_q", "pool_k"}, {"row_in", "norm_weight", "norm_bias", "row_out"}
    wanted = pools if config.pool == "deepset" else rows if config.projected else set()
    if set(given) != wanted or (residual is not None) != config.projected:
        found = sorted(given) + ([] if residual is None else ["residual"])
        nearest = "pool='relu'" if wanted is pools else "row_keys='none'" if wanted else ""
        raise Unsupported(
            f"combiner's {config.factorization} with {', '.join(found) or 'no learned maps'}",
            supported=", ".join(sorted(wanted) + (["residual"] if config.projected else [])) or "q, k and v only",
            nearest=nearest,
        )
    return Learned(**{name: wide(x) for name, x in given.items()})


def check_pattern(config: Config, pattern: Pattern) -> None:
    """Raise Unsupported if the factorization does not exist in `pattern`."""
    if pattern.cross and config.factorization != "fixed":
        raise Unsupported(
            f"combiner's {config.factorization} in {pattern.value}, where queries have no place in the memory",
            supported="self patterns",
            nearest="factorization='fixed'",
        )
    if pattern is Pattern.NONCAUSAL_SELF and config.factorization == "logn":
        raise Unsupported(
            "combiner's logn in noncausal-self, where it has no blocks", supported="causal-self", nearest="fixed"
        )


def activated(config: Config, x: Tensor, weight: Tensor | None) -> Tensor:
    """Map tokens before pooling: relu(W x), relu(x) without a map, or x itself with ``pool="identity"``."""
    if config.pool == "identity":
        return x
    return F.relu(x if weight is None else x @ weight.to(x.dtype))


def _pooled(config: Config, x: Float[Tensor, "... t d"], weight: Tensor | None) -> Float[Tensor, "... d"]:
    """Pool tokens, all of which exist, into one vector."""
    x = activated(config, x, weight)
    if config.reduce == "max":
        return x.amax(-2)
    return x.mean(-2) if config.reduce == "mean" else x.sum(-2)


def drop(call: Call, weights: Tensor) -> Tensor:
    """Attention weights, or other numbers, after the call's dropout."""
    return Dropout(call.dropout, 0.0, call.generator).of_weights(weights)


def projected_keys(
    maps: Learned, told: Float[Tensor, "b h ... r"], residual: Float[Tensor, "b ... c"], call: Call | None = None
) -> Float[Tensor, "b h ... d"]:
    """W' LN(x + W told)."""
    assert maps.row_in is not None and maps.row_out is not None
    mapped = torch.einsum("bh...r,hrc->b...c", told, maps.row_in.to(told.dtype))
    mapped = residual + (mapped if call is None else drop(call, mapped))
    normed = F.layer_norm(mapped, mapped.shape[-1:], maps.norm_weight, maps.norm_bias, EPSILON)
    return torch.einsum("b...c,hcd->bh...d", normed, maps.row_out.to(normed.dtype))
