r"""Core context aware attention: the last tokens are read exactly, groups of earlier ones through one core each.

When to pick it: long contexts in a pretrained decoder, whose cache and attention should shrink by the group size with no
new parameter, after a short fine-tuning.
When not: exact recall of far tokens (a group has one key, weighed by its last token before the question is known).

Definition (Chen et al., arXiv 2412.12465, and the authors' code), ranks from 1, g = `group`, s = `window`, tau the scale:

    I_r   = { (r - 1) g + 1, ..., r g }
    w_r   = softmax over j in I_r of (tau q_rg . k_j)          the query is that of the group's last token
    k^G_r = sum_{j in I_r} w_rj k_j,     v^G_r = sum_{j in I_r} w_rj v_j
    j(i)  = max(0, floor((i - s) / g))
    o_i   = softmax over { k^G_1, ..., k^G_{j(i)} } and { k_t, j(i) g < t <= i } of tau q_i . k,  with v^G and v

Cores and tokens part the past exactly: s + ((i - s) mod g) tokens are read one by one, once i > s.

| paper | here |
|---|---|
| g, group size | `group` |
| s, local window | `window` |
| globality-aware pooling | `pool="cca"`; `mean` and `max` are its ablations |
| core token c_r W^K | pooled keys: the same by linearity, before rotation (`pool_keys="pre_rope"`) |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries), and then each query head has its cores unless
`share_gqa`. N = M in causal-self, since groups have queries.
State: the last max(s, 1) + g - 2 keys and values, and the cores of all groups that are complete.
Rotary positions: `post_rope` pools rotated keys, as the authors' code does; `pre_rope` pools keys before rotation, weighed
by queries before rotation, and rotates the core to its group's last place.
Deviations: cores are computed when their group is complete, not when it leaves the window, so that no query is kept.
The defaults of the code are groups of 16 and a window of 1024. `fusion="gated"`, two softmaxes under a learned gate, is a
reading of a sentence of the paper's first version. Not in the paper: noncausal-self, where groups less than s tokens away
(in whole groups) are read one by one and all others through cores, the unfinished one too; and cross patterns, which read
cores of the memory alone, weighed by the mean of the group's keys in place of a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
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
    State,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    lengths_after,
    one_of,
    state_field,
    valid_from_lengths,
)
from regard.core.precision import wide
from regard.core.ragged import values_known
from regard.core.sampling import attention_shapes, normals
from regard.core.visibility import block_numbers
from regard.engines.attention import Ranks, Visibility, attention
from regard.engines.cache import WindowState, append_rows, extend_window
from regard.engines.grouped_attention import normalized
from regard.engines.merging import merge
from regard.layers.parts import LayerCall, Projection

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        group: g >= 1, tokens that a core stands for.
        window: s >= 0, latest tokens that are always read one by one; 0 where a group's last token, too, reads its group
            through the core.
        pool: ``cca`` (weighed by a query), ``mean`` or ``max``.
        pool_query: of ``cca``: query of the group's ``last`` token, or the ``mean`` of its queries.
        pool_keys: ``post_rope`` or ``pre_rope``; the latter in causal-self only, where the mechanism rotates.
        fusion: ``joint`` for one softmax over cores and tokens, ``gated`` for two and a gate.
        share_gqa: whether query heads that share keys share cores, made by their mean query.
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
        """Tokens that the one after a sequence may read one by one, or that are in the unfinished group."""
        return max(self.window, 1) + self.group - 2


@dataclass(frozen=True)
class CoreState(State):
    """The last tokens, and the cores of complete groups: slot r of a row holds its group r; others are beyond its groups.

    `queries` is the sum of queries in the unfinished group, where the pool needs it.
    """

    window: WindowState
    keys: Float[Tensor, "b c cores d"] = state_field()
    values: Float[Tensor, "b c cores v"] = state_field()
    queries: Float[Tensor, "b h d"] | None = state_field()
    length: Int[Tensor, " b"] = state_field()


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


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    gate: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Two attentions joined by their log-sum-exps: a window on tokens, and cores; causal-self: the chunked form."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v, gate).output
    config: Config = call.config
    check(config, call.pattern, q.shape[2], k.shape[2], gate)
    g, m, device = config.group, k.shape[2], q.device
    lengths = lengths_after(None, call.memory_lengths, k.shape[0], m, device)
    count = -(-m // g)
    exists = valid_from_lengths(lengths, count * g).unflatten(-1, (count, g))
    groups = [F.pad(x, (0, 0, 0, count * g - m)).unflatten(2, (count, g)) for x in (k, v)]
    queries = None
    if config.pool == "cca" and not call.pattern.cross:
        asking = wide(q)
        if config.pool_query == "mean":
            padded = F.pad(asking, (0, 0, 0, count * g - m)).unflatten(2, (count, g))
            queries = padded.sum(3) / exists.sum(-1).clamp(min=1)[:, None, :, None]
        else:
            last = torch.minimum(torch.arange(1, count + 1, device=device) * g, lengths[:, None]) - 1
            queries = _take(asking, last.clamp(min=0))
    keys, values = _cores(call, queries, groups[0], groups[1], exists)
    core = torch.arange(count, device=device)
    number = torch.where(exists.any(-1), core, -1)
    slots = torch.arange(q.shape[2], device=device)[None]
    if call.pattern.cross:
        return _attend(call, q, keys, values, Ranks(slots, number, None, None, False), Visibility())[0].to(q.dtype)
    reach = -(-config.window // g)
    hidden = BlockMask(((core - core[:, None]).abs() > reach)[None, None], 1)
    near = _attend(
        call,
        q,
        k,
        v,
        Ranks(slots, torch.where(slots < lengths[:, None], slots, -1), 0, 0, False),
        Visibility(block=g, lookback=reach, lookahead=reach),
    )
    far = _attend(
        call, q, keys, values, Ranks(block_numbers(slots, g), number, None, None, False), Visibility(), hidden
    )
    return _fused(gate, near, far).to(q.dtype)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    gate: Float[Tensor, " h"] | None = None,
) -> Result:
    """Causal-self with state in and out, by any number of tokens; also the step."""
    config: Config = call.config
    check(config, call.pattern, q.shape[2], k.shape[2], gate)
    g, s, n, device = config.group, config.window, q.shape[2], q.device
    before = torch.zeros(k.shape[0], dtype=torch.long, device=device) if call.state is None else call.state.length
    places = before[:, None] + torch.arange(n, device=device)
    asking = q
    if call.rotate is not None:
        q = call.rotate(q, places)
        if config.pool_keys == "post_rope":
            asking, k = q, call.rotate(k, places)
    state, keys, values, where = _extend(call, asking, k, v)
    if call.rotate is not None and config.pool_keys == "pre_rope":
        keys = call.rotate(keys, where.keys.clamp(min=0).expand(k.shape[0], -1))
    # A key is read by itself while its group is not before that of the rank s - 1 places back, which is
    # what a rule on groups says of queries moved back by so much.
    back = max(s - 1, 0)
    asks = Ranks(
        where.queries - back,
        where.keys,
        None if where.offset is None else where.offset - back,
        None if where.first is None else where.first - back,
        plain=False,
    )
    if s == 0:  # as with a window of 1, but that the last query of a group reads no key by itself
        asks = Ranks(torch.where((where.queries + 1) % g == 0, -1, where.queries), where.keys, None, None, plain=False)
    near = _attend(call, q, keys, values, asks, Visibility(right=back, block=g, lookahead=back // g + 1))
    opened = (torch.arange(state.keys.shape[2], device=device)[None] + 1) * g + s - 1  # first rank that reads each core
    far = _attend(
        call, q, state.keys, state.values, Ranks(places, opened, None, None, plain=False), Visibility(causal=True)
    )
    return Result(_fused(gate, near, far).to(q.dtype), state)


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"]) -> CoreState:
    """Memory into cores; more may follow."""
    check(call.config, call.pattern, 0, k.shape[2], None)
    return _extend(call, None, k, v)[0]


def read(call: Call, q: Float[Tensor, "b h n d"]) -> Result:
    """Queries on the cores of absorbed memory, that of the unfinished group among them."""
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
    """Refuse what the options cannot do in a pattern."""
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
    """Refuse options that a pattern does not have."""
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
    output, _, lse = attention(
        wide(q),
        k,
        v,
        where,
        visibility=visibility,
        scale=call.scale,
        blocks=blocks,
        dropout=call.dropout,
        generator=call.generator,
        want_lse=True,
        backend=call.backend,
    )
    assert lse is not None
    return output, lse


def _fused(gate: Tensor | None, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> Float[Tensor, "b h n v"]:
    """The values read from tokens and from cores, in one softmax or under a gate."""
    if gate is None:
        return merge(*zip(near, far, strict=True))
    share = torch.sigmoid(wide(gate))[:, None, None].to(near[0].dtype)
    both = ((near[1] != -torch.inf) & (far[1] > -torch.inf))[..., None]
    return torch.where(both, share * near[0] + (1 - share) * far[0], near[0] + far[0])


def _cores(
    call: Call,
    queries: Float[Tensor, "b h groups d"] | None,
    k: Float[Tensor, "b g groups size d"],
    v: Float[Tensor, "b g groups size v"],
    exists: Bool[Tensor, "b groups size"],
) -> tuple[Float[Tensor, "b c groups d"], Float[Tensor, "b c groups v"]]:
    """Keys and values of groups of tokens, for each query head (c = h) or each key head (c = g).

    Without queries the mean key asks, where the pool asks.
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
        return (weights @ k)[..., 0, :], (weights @ v)[..., 0, :]
    if queries is None:
        queries = torch.where(exists[..., None], k, 0).sum(3) / exists.sum(-1).clamp(min=1)[..., None]
    queries = queries.unflatten(1, (k.shape[1], -1))  # (b, g, heads that share keys, groups, d)
    if config.share_gqa:
        queries = queries.mean(2, keepdim=True)
    k, v, exists = k[:, :, None], v[:, :, None], exists[:, :, None]
    scores = (call.scale * queries[..., None, :] @ k.mT)[..., 0, :]
    weights = normalized(torch.where(exists, scores, -torch.inf))[..., None, :]
    return (weights @ k)[..., 0, :].flatten(1, 2), (weights @ v)[..., 0, :].flatten(1, 2)


def _extend(call: Call, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[CoreState, Tensor, Tensor, Ranks]:
    """The state with new tokens; and keys, values and ranks with which their queries are answered.

    Keys and queries are those that are pooled; in cross patterns there are no queries.
    """
    config, past, device = call.config, call.state, k.device
    g, m, width = config.group, k.shape[2], 0 if past is None else config.cached
    window_call = call.replace(state=None if past is None else past.window)
    window, keys, values, where = extend_window(window_call, k, v, 0 if q is None else m, config.cached)
    new = lengths_after(None, call.memory_lengths, k.shape[0], m, device)
    before = torch.zeros_like(new) if past is None else past.length
    complete = before // g
    closed = (before + new) // g - complete
    summed = None if past is None else past.queries
    asks = q is not None and config.pool == "cca"
    count = (m + g - 1) // g
    cores: tuple[Tensor, Tensor] | None = None
    if not values_known(closed) or bool((closed > 0).any()):
        rank = (complete * g)[:, None] + torch.arange(count * g, device=device)
        slot = (rank - before[:, None] + width).clamp(0, max(keys.shape[2] - 1, 0))
        groups = [_take(x, slot).unflatten(2, (count, g)) for x in (keys, values)]
        queries = None
        if asks and q is not None:
            queries = _queries(config, wide(q), rank - before[:, None], summed, g)
        exists = torch.ones(1, count, g, dtype=torch.bool, device=device)
        key, value = _cores(call, queries, groups[0], groups[1], exists)
        if call.rotate is not None and config.pool_keys == "pre_rope":
            key = call.rotate(key, rank.unflatten(1, (count, g))[..., -1])
        cores = key, value
    if asks and q is not None and config.pool_query == "mean":
        # tokens of the group that is unfinished now
        open_ = ((before + new) // g * g - before)[:, None]
        place = torch.arange(m, device=device)
        inside = ((place >= open_) & (place < new[:, None]))[:, None, :, None]
        added = torch.where(inside, wide(q), 0).sum(2)
        summed = added if summed is None else added + torch.where((closed > 0)[:, None, None], 0, summed)
    heads = k.shape[1] if not asks or config.share_gqa or q is None else q.shape[1]
    old = [wide(x)[:, :1, :0].expand(-1, heads, -1, -1) for x in (k, v)] if past is None else [past.keys, past.values]
    if cores is not None:
        old = [append_rows(x, complete, core, closed) for x, core in zip(old, cores, strict=True)]
    state = CoreState(window, old[0], old[1], summed, before + new)
    return state, keys, values, where


def _queries(
    config: Config, q: Tensor, place: Int[Tensor, "b tokens"], summed: Tensor | None, g: int
) -> Float[Tensor, "b h groups d"]:
    """Query of each group, whose tokens are at `place` among the new queries; those before them are in `summed`."""
    last = place.unflatten(1, (-1, g))[..., -1]
    if config.pool_query == "last":
        return _take(q, last.clamp(0, q.shape[2] - 1))
    inside = (place >= 0) & (place < q.shape[2])
    tokens = torch.where(inside[:, None, :, None], _take(q, place.clamp(0, q.shape[2] - 1)), 0)
    totals = tokens.unflatten(2, (-1, g)).sum(3)
    if summed is not None:
        totals = torch.cat([totals[:, :, :1] + summed[:, :, None], totals[:, :, 1:]], 2)
    return totals / g


def _take(x: Float[Tensor, "b h m d"], slots: Int[Tensor, "b j"]) -> Float[Tensor, "b h j d"]:
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class Gate(Projection):
    """A layer's gate between tokens and cores, one number a head, when `fusion` asks for it.

    Args:
        spec: of the layer.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        check_pattern(spec.config, spec.pattern)
        if spec.config.pool_keys == "pre_rope":
            self.reads_unrotated = ("keys", 'pool_keys="post_rope"')
        self.gate = nn.Parameter(torch.zeros(spec.heads)) if spec.config.fusion == "gated" else None

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        return heads if self.gate is None else heads | {"gate": self.gate}


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
    widths = {"h": 2, "g": 2, "d": 8, "v": 6, **(sizes or {})}
    shapes = attention_shapes(batch, n, m, widths)
    if config.fusion == "gated":
        shapes["gate"] = (widths["h"],)
    return normals(generator, shapes, dtype)


def cost(shape: Shape, config: Any) -> Cost:
    """Cost of the causal pattern with N = M and as many key heads as query heads."""
    width, heads, m = shape.dim_key + shape.dim_value, shape.batch * shape.heads, shape.m
    near = min((m + 1) / 2, config.window + (config.group - 1) / 2)
    cores = max(0, m - config.window) / config.group
    return Cost(
        flops=2.0 * heads * width * (shape.n * (near + cores / 2) + m),
        memory=float(heads * (shape.n + m / config.group * width)),
        state=float(shape.heads * width * (config.cached + m // config.group)),
        step_flops=2.0 * heads * width * (min(m + 1, config.window + (config.group - 1) / 2) + cores + 1),
    )


MECHANISM = Mechanism(
    name="core_context",
    aliases=("cca", "cca_attention", "core_context_aware"),
    kind=Kind.ATTENTION,
    summary="The last tokens are read exactly, groups of earlier ones through one core each.",
    paper=Paper("Core Context Aware Attention for Long Context Language Modeling", "2412.12465", 2024, 47),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv", "gate?": "h"},
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
        "mean query": {"group": 4, "window": 2, "pool_query": "mean", "share_gqa": True},
        "means": {"group": 3, "window": 4, "pool": "mean"},
        "maxima": {"group": 4, "window": 8, "pool": "max"},
        "gated": {"group": 5, "window": 1, "fusion": "gated"},
        "gated, no window": {"group": 3, "window": 0, "fusion": "gated"},
        "no window": {"group": 4, "window": 0},
        "groups of one": {"group": 1, "window": 1},
        "cores before rotation": {"group": 3, "window": 5, "pool_keys": "pre_rope"},
    },
    variant_patterns={
        "cores before rotation": (Pattern.CAUSAL_SELF,),
        "gated": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "gated, no window": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    },
    engine="attention",
    state=CoreState,
    cost=cost,
    uneven=False,
    honours=frozenset({"dropout", "rotate"}),
    weights="implicit",
    sample_inputs=sample_inputs,
    projection=Gate,
    waivers=(
        Waiver("layer_lengths", "its number of groups is a constant of the program", patterns=(Pattern.CAUSAL_SELF,)),
        Waiver(
            "grouped_heads", "heads of a group share cores, those of repeated keys do not", variants=("mean query",)
        ),
    ),
)
