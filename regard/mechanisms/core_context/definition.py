"""The definition of core_context: its options and a reference implementation written for readability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import (
    BlockMask,
    Call,
    Pattern,
    Result,
    Unsupported,
    at_least,
    one_of,
)
from regard.core.precision import wide, without_autocast
from regard.engines.attention import Ranks, Visibility
from regard.engines.attention_forms import attend_to_part
from regard.engines.grouped_attention import normalized

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        group: g >= 1, tokens per core.
        window: s >= 0, latest tokens that are always read individually; with 0 even a group's last token reads its
            group through the core.
        pool: ``cca`` (weighted by a query), ``mean`` or ``max``.
        pool_query: the query of ``cca``: that of the group's ``last`` token, or the ``mean`` of its queries.
        pool_keys: ``post_rope`` or ``pre_rope``; the latter in causal-self only, where the mechanism rotates.
        fusion: ``joint`` for one softmax over cores and tokens, ``gated`` for two softmaxes and a gate.
        share_gqa: whether query heads that share keys share cores, weighted by their mean query.
    """

    group: int = 8
    window: int = 32
    pool: str = "cca"
    pool_query: str = "last"
    pool_keys: str = "post_rope"
    fusion: str = "joint"
    share_gqa: bool = False

    def __post_init__(self) -> None:
        at_least("group", self.group, 1)
        at_least("window", self.window, 0)
        one_of("pool", self.pool, ("cca", "mean", "max"))
        one_of("pool_query", self.pool_query, ("last", "mean"))
        one_of("pool_keys", self.pool_keys, ("post_rope", "pre_rope"))
        one_of("fusion", self.fusion, ("joint", "gated"))
        if self.pool != "cca" and (self.pool_query, self.share_gqa) != ("last", False):
            raise Unsupported(
                f"pool_query or share_gqa with pool={self.pool!r}, which has no query",
                supported="pool='cca'",
                nearest="pool_query='last', share_gqa=False",
            )

    @property
    def cached(self) -> int:
        """Number of past tokens that the next token may read individually or that are in the unfinished group."""
        return max(self.window, 1) + self.group - 2


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    gate: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, one group and one query at a time."""
    config: Config = call.config
    check(config, call.pattern, q.shape[2], k.shape[2], gate)
    heads, n, m, g, s = q.shape[1], q.shape[2], k.shape[2], config.group, config.window
    shared = heads // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    asking, told = q, k
    if call.rotate is not None:
        ranks = torch.arange(m, device=q.device)[None]
        q, k = call.rotate(q, ranks), call.rotate(k, ranks)
        if config.pool_keys == "post_rope":
            asking, told = q, k
    cores = []
    for start in range(0, m, g):
        members = slice(start, min(start + g, m))
        keys, values = told[:, :, members], v[:, :, members]
        if config.pool == "max":
            key, value = keys.amax(2), values.amax(2)
        else:
            query = keys.mean(2) if call.pattern.cross else asking[:, :, members.stop - 1]
            if config.pool_query == "mean" and not call.pattern.cross:
                query = asking[:, :, members].mean(2)
            if config.share_gqa:
                query = query.unflatten(1, (-1, shared)).mean(2).repeat_interleave(shared, 1)
            if config.pool == "mean":
                query = torch.zeros_like(query)
            weights = (call.scale * query[:, :, None] @ keys.mT).softmax(-1)
            key, value = (weights @ keys)[:, :, 0], (weights @ values)[:, :, 0]
        if call.rotate is not None and config.pool_keys == "pre_rope":
            key = call.rotate(key[:, :, None], ranks[:, members.stop - 1 : members.stop])[:, :, 0]
        cores.append((key, value))

    def attend(i: int, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        scores = torch.stack([call.scale * (q[:, :, i] * key).sum(-1) for key in keys], -1)
        return (scores.softmax(-1)[..., None] * torch.stack(values, 2)).sum(2)

    outputs = []
    for i in range(n):
        if call.pattern.cross:
            read, tokens = range(len(cores)), range(0)
        elif call.pattern.causal:
            left = max(0, (i + 1 - s) // g)
            read, tokens = range(left), range(left * g, i + 1)
        else:
            reach = -(-s // g)
            near = range(max(0, i // g - reach), min(len(cores), i // g + reach + 1))
            read = [r for r in range(len(cores)) if r not in near]  # type: ignore[assignment]
            tokens = range(near.start * g, min(near.stop * g, m))
        far = [cores[r] for r in read]
        local = [(k[:, :, t], v[:, :, t]) for t in tokens]
        if not far + local:
            outputs.append(v.new_zeros(*q.shape[:2], v.shape[-1]))
        elif gate is not None and far and local:
            share = torch.sigmoid(gate)[:, None]
            first, second = (attend(i, *map(list, zip(*x, strict=True))) for x in (local, far))
            outputs.append(share * first + (1 - share) * second)
        else:
            outputs.append(attend(i, *map(list, zip(*far, *local, strict=True))))
    return torch.stack(outputs, 2) if outputs else v.new_zeros(*q.shape[:3], v.shape[-1])


def read(call: Call, q: Float[Tensor, "b h n d"]) -> Result:
    """Attend to the cores of absorbed memory, including that of the unfinished group."""
    config, state, device = call.config, call.state, q.device
    keys, values = state.keys, state.values
    complete, width = state.length // config.group, config.cached
    number = torch.arange(keys.shape[2], device=device)
    exists = number < complete[:, None]
    if width:
        rank = state.length[:, None] + torch.arange(-width, 0, device=device)
        open_ = (rank >= (complete * config.group)[:, None])[:, None]
        key, value = _cores(call, None, state.window.k[:, :, None], state.window.v[:, :, None], open_)
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        exists = torch.cat([exists, open_.any(-1)], -1)
    slots = torch.arange(keys.shape[2], device=device)
    where = Ranks(torch.arange(q.shape[2], device=device)[None], torch.where(exists, slots, -1), None, None, False)
    return Result(_attend(call, q, keys, values, where, Visibility())[0].to(q.dtype), state)


def check(config: Config, pattern: Pattern, n: int, m: int, gate: Tensor | None) -> None:
    """Raise Unsupported if the options, lengths and gate do not fit the pattern."""
    check_pattern(config, pattern)
    if pattern is Pattern.CAUSAL_SELF and n != m:
        raise Unsupported(f"core_context with {n} queries and {m} keys", supported="a query for each key")
    if (gate is not None) != (config.fusion == "gated"):
        raise Unsupported(
            f"core_context with fusion={config.fusion!r} {'with' if gate is not None else 'without'} a gate",
            supported="a gate (H) with fusion='gated', none with 'joint'",
            nearest="fusion='joint'",
        )


def check_pattern(config: Config, pattern: Pattern) -> None:
    """Raise Unsupported for options that do not exist in `pattern`."""
    if config.pool_keys == "pre_rope" and pattern is not Pattern.CAUSAL_SELF:
        raise Unsupported(
            f"pool_keys='pre_rope' in {pattern.value}, whose keys come rotated",
            supported="causal-self",
            nearest="pool_keys='post_rope'",
        )
    if config.fusion == "gated" and pattern.cross:
        raise Unsupported(
            f"fusion='gated' in {pattern.value}, which reads cores alone",
            supported="self patterns",
            nearest="fusion='joint'",
        )


def _attend(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, visibility: Visibility, blocks: BlockMask | None = None
) -> tuple[Float[Tensor, "b h n v"], Float[Tensor, "b h n"]]:
    return attend_to_part(call, wide(q), k, v, where, visibility, blocks=blocks)


def _cores(
    call: Call,
    queries: Float[Tensor, "b h groups d"] | None,
    k: Float[Tensor, "b g groups size d"],
    v: Float[Tensor, "b g groups size v"],
    exists: Bool[Tensor, "b groups size"],
) -> tuple[Float[Tensor, "b c groups d"], Float[Tensor, "b c groups v"]]:
    """Keys and values of the cores of groups, for each query head (c = h) or each key head (c = g).

    Without `queries`, ``cca`` is weighted by the group's mean key.
    """
    config: Config = call.config
    k, v, exists = wide(k), wide(v), exists[:, None]
    if config.pool == "max":
        some = exists.any(-1)[..., None]
        largest = (torch.where(exists[..., None], x, -torch.inf).amax(3) for x in (k, v))
        key, value = (torch.where(some, x, 0) for x in largest)
        return key, value
    if config.pool == "mean":
        weights = (exists.to(k.dtype) / exists.sum(-1, keepdim=True).clamp(min=1))[..., None, :]
        with without_autocast(k.device):
            return (weights @ k)[..., 0, :], (weights @ v)[..., 0, :]
    if queries is None:
        queries = torch.where(exists[..., None], k, 0).sum(3) / exists.sum(-1).clamp(min=1)[..., None]
    queries = queries.unflatten(1, (k.shape[1], -1))  # (b, g, heads that share keys, groups, d)
    if config.share_gqa:
        queries = queries.mean(2, keepdim=True)
    k, v = k.contiguous(), v.contiguous()  # or each product would copy them
    with without_autocast(k.device):
        scores = call.scale * wide(queries).transpose(2, 3) @ k.mT  # (b, g, groups, heads that share keys, size)
        weights = normalized(torch.where(exists[..., None, :], scores, -torch.inf))
        key, value = ((weights @ x).transpose(2, 3).flatten(1, 2) for x in (k, v))
    return key, value
