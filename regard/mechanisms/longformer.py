r"""Longformer: softmax over a window around each token, plus a few global tokens that see and are seen by all.

When to pick it: long documents where a few tokens must gather the rest (a class token, a question), or a window that
should not forget the first tokens of a stream; time is linear in N, and the causal state has a fixed size.
When not: recall of single tokens beyond the combined reach of the layers, or cross attention (memory has no place near
a query).

Definition (Beltagy et al., arXiv 2004.05150, section 3; survey arXiv 2103.14636, B2). With the set G of global tokens,
the weights of a token i outside G are one softmax over

    keys near it:    |i - j| <= g w / 2 and g divides i - j, in causal-self 0 <= i - j <= (w - 1) g
    and all of G,    in causal-self those with j <= i,

where a global token that is also near counts once. A global token sees all tokens (in causal-self those with j <= i),
through its own queries, keys and values: softmax(tau q^g_i . k^g_j) v^g_j.

| paper | here |
|---|---|
| w, attention window, half of it on each side | `window`; in causal-self w keys, including the query's own |
| dilation of a head | g, `dilation` |
| global attention on chosen tokens | roles `Role.CLS` (noncausal-self), and the first `global_tokens` tokens |
| Q_g, K_g, V_g | `q_global`, `k_global`, `v_global`; computed by a layer unless `separate_projections=False` |
| 1 / sqrt(d) | `scale` |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries). Ranks count valid tokens, so windows and
first tokens do not move with padding. A query that sees no key gives 0. Without `q_global`, `k_global` and `v_global`,
global tokens use q, k and v.
State: the last (w - 1) g keys, and two keys of each global token; its size never changes.
Deviations: no sequence is padded to a multiple of the window. The projections of global tokens start with their own
random weights; the paper copies those of the other tokens from a trained model, as :func:`copy_projections` does.
Rotary positions rotate q and k, but not the global projections. In causal-self only first tokens can be global, since a
state cannot go back to what preceded any other global token. In a compiled graph with roles, the global part is
computed for all tokens, since a graph cannot know how many are global.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
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
    Role,
    Shape,
    Tensors,
    TrainedModel,
    Unsupported,
    at_least,
    state_field,
)
from regard.core.precision import wide_dtype
from regard.core.ragged import place_queries, take_queries, values_known
from regard.core.visibility import CountedRanks
from regard.engines.attention import Ranks, Visibility, attention_reference, ranks
from regard.engines.attention_forms import attend, attend_to_part
from regard.engines.cache import WindowState, extend_window, next_in_window
from regard.engines.merging import merge

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        window: w, even and >= 2: half of it on each side, or w keys in causal-self.
        dilation: g, >= 1, one number or one per head: the distance in ranks between neighbouring keys of a window.
        global_tokens: number of first tokens that are global, >= 0.
        separate_projections: whether a layer has separate projections for global tokens.
    """

    window: int = 32
    dilation: int | tuple[int, ...] = 1
    global_tokens: int = 1
    separate_projections: bool = True

    def __post_init__(self) -> None:
        if self.window < 2 or self.window % 2:
            raise Unsupported(
                f"window={self.window}",
                supported="an even number >= 2, half of it on each side",
                nearest=f"window={max(2, self.window + self.window % 2)}",
            )
        if not isinstance(self.dilation, int):
            object.__setattr__(self, "dilation", tuple(self.dilation))
        if not self.dilations:
            raise Unsupported("no dilation", supported="one number, or one a head", nearest="dilation=1")
        for dilation in self.dilations:
            at_least("dilation", dilation, 1)
        at_least("global_tokens", self.global_tokens, 0)

    @property
    def dilations(self) -> tuple[int, ...]:
        """g: one number, or one per head."""
        return (self.dilation,) if isinstance(self.dilation, int) else self.dilation

    @property
    def cached(self) -> int:
        """The number of past keys to keep: all that the next token's window may reach."""
        return (self.window - 1) * max(self.dilations)


@dataclass(frozen=True)
class LongformerState(WindowState):
    """The last keys and values of each row, and two sets for its first tokens: for other tokens' queries, and for their
    own.

    Slot r of the first tokens belongs to rank r; slots of future tokens are zero.
    """

    first_k: Float[Tensor, "b g first d"] = state_field()
    first_v: Float[Tensor, "b g first v"] = state_field()
    first_k_global: Float[Tensor, "b g first d"] = state_field()
    first_v_global: Float[Tensor, "b g first v"] = state_field()


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    q_global: Float[Tensor, "b h n d"] | None = None,
    k_global: Float[Tensor, "b g m d"] | None = None,
    v_global: Float[Tensor, "b g m v"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrices."""
    config, n, m = _checked(call, q), q.shape[2], k.shape[2]
    where = ranks(call, n, m, q.device)
    i, j = where.queries[0, :, None], where.keys[0, None]
    chosen = _global_keys(call, k)  # (b, m)
    dilation = torch.tensor(config.dilations, device=q.device)[:, None, None]
    apart = i - j
    if call.pattern.causal:
        past = (apart >= 0)[None]
        near = past & (apart <= (config.window - 1) * dilation)
    else:
        past = torch.ones_like(apart, dtype=torch.bool)[None]
        near = apart.abs() <= config.window // 2 * dilation
    near = near & (apart % dilation == 0)
    visible = near[None] | (past[None] & chosen[:, None, None])
    local = attention_reference(q, k, v, visible, lambda scores: scores.softmax(-1), call.scale)
    own = _own(q, k, v, q_global, k_global, v_global)
    far = attention_reference(*own, past[None], lambda scores: scores.softmax(-1), call.scale)
    return torch.where(_global_queries(call, chosen, i[None, :, 0])[:, None, :, None], far, local)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    q_global: Float[Tensor, "b h n d"] | None = None,
    k_global: Float[Tensor, "b g m d"] | None = None,
    v_global: Float[Tensor, "b g m v"] | None = None,
) -> Result:
    """Windows, global keys and the queries of global tokens are separate calls of softmax attention, the first two
    merged by their log-sum-exps. Time grows as N times the window plus the number of global tokens."""
    config, n, m = _checked(call, q), q.shape[2], k.shape[2]
    if n != m or call.lengths is not call.memory_lengths:
        return _beside_keys(parallel, call, q, k, v, q_global, k_global, v_global)
    own = _own(q, k, v, q_global, k_global, v_global)
    where = ranks(call, n, m, q.device)
    if call.roles is None:
        count = min(config.global_tokens, m)
        first = slice(0, count)
        chosen = None
        places = where.keys[:, first]
        picked = [x[:, :, first] for x in (k, v, *own)]
    else:
        chosen = _global_keys(call, k)
        slots, exists = _gather_slots(chosen)
        places = torch.where(exists, slots, -1)
        picked = [x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v, *own)]
    near = where if chosen is None and config.global_tokens == 0 else _without(where, chosen, config.global_tokens)
    local = _local(call, q, k, v, near, picked[:2], places)
    if places.shape[1] == 0:
        return Result(local)
    # a missing global token has rank -1: it sees nothing and is written nowhere
    there = Ranks(places, where.keys, None, None, plain=False)
    seen_by, far_k, far_v = picked[2], own[1], own[2]
    far = attend_to_part(call, seen_by, far_k, far_v, there, Visibility(causal=call.pattern.causal))[0]
    if call.roles is None:
        valid = (places >= 0)[:, None, :, None]
        local[:, :, :count] = torch.where(valid, far.to(local.dtype), local[:, :, :count])
        return Result(local)
    index = torch.where(places >= 0, places, m)[:, None, :, None].expand(-1, q.shape[1], -1, v.shape[3])
    room = torch.cat([local, local[:, :, :1]], 2)  # the extra slot takes missing tokens
    return Result(room.scatter(2, index, far.to(local.dtype))[:, :, :m])


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    q_global: Float[Tensor, "b h n d"] | None = None,
    k_global: Float[Tensor, "b g m d"] | None = None,
    v_global: Float[Tensor, "b g m v"] | None = None,
) -> Result:
    """Continue from the last and first keys by any number of tokens; also used as the step."""
    config, n, m = _checked(call, q), q.shape[2], k.shape[2]
    if n != m or call.lengths is not call.memory_lengths:
        return _beside_keys(chunked, call, q, k, v, q_global, k_global, v_global)
    found = _step(call, q, k, v)
    if found is not None:
        return found
    own = _own(q, k, v, q_global, k_global, v_global)
    past: LongformerState | None = call.state
    window, keys, values, where = extend_window(call, k, v, n, config.cached)
    before = torch.zeros_like(window.length) if past is None else past.length
    known = (None,) * 4 if past is None else (past.first_k, past.first_v, past.first_k_global, past.first_v_global)
    kept = [_first(config, before, call.memory_lengths, *x) for x in zip((k, v, *own[1:]), known, strict=True)]
    state = LongformerState(window.k, window.v, window.length, *kept)
    count = config.global_tokens
    if count == 0:
        return Result(_local(call, q, keys, values, where, [], where.keys[:, :0]), state)
    places = torch.arange(count, device=q.device)[None]
    local = _local(call, q, keys, values, _without(where, None, count), kept[:2], places)
    # rows past their first tokens have no global queries; checking for that would need the values
    among = Ranks(where.queries, places, None, None, plain=False)
    far = attend_to_part(call, own[0], kept[2], kept[3], among, Visibility(causal=True))[0]
    is_global = (where.queries >= 0) & (where.queries < count)
    return Result(torch.where(is_global[:, None, :, None], far.to(local.dtype), local), state)


def _step(
    call: Call, q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b g 1 d"], v: Float[Tensor, "b g 1 v"]
) -> Result | None:
    """One more token of rows of one length, whose window has left the first tokens behind: softmax over these and the
    window in one call. None for other tokens."""
    config, past = call.config, call.state
    if config.dilations != (1,):
        return None
    found = next_in_window(call, past, k, v, config.cached, least=config.cached + config.global_tokens)
    if found is None:
        return None
    window, keys, values, _ = found
    if config.global_tokens:
        keys, values = torch.cat([past.first_k, keys], 2), torch.cat([past.first_v, values], 2)
    all_of_them = CountedRanks(1, keys.shape[2], 0, True, k.device)
    state = replace(past, k=window.k, v=window.v, length=window.length)
    return attend(call, q, keys, values, all_of_them, state, visibility=Visibility())


def _checked(call: Call, q: Tensor) -> Config:
    config: Config = call.config
    if len(config.dilations) not in (1, q.shape[1]):
        raise _other_heads(config, q.shape[1])
    if call.roles is not None and call.pattern.causal:
        raise Unsupported(
            "longformer with roles in causal-self", supported="global_tokens, the first tokens", nearest="roles=None"
        )
    return config


def _other_heads(config: Config, heads: int) -> Unsupported:
    return Unsupported(
        f"longformer with {len(config.dilations)} dilations for {heads} heads", supported="one number, or one a head"
    )


def _own(
    q: Tensor, k: Tensor, v: Tensor, q_global: Tensor | None, k_global: Tensor | None, v_global: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of global tokens."""
    return (
        q if q_global is None else q_global,
        k if k_global is None else k_global,
        v if v_global is None else v_global,
    )


def _beside_keys(form: object, call: Call, q: Tensor, *rest: Tensor | None) -> Result:
    """Run a form with one query per key when the call's queries differ from its keys."""
    k, v, q_global, k_global, v_global = rest
    assert k is not None and v is not None and callable(form)
    n, m = q.shape[2], k.shape[2]

    def place(x: Tensor | None) -> Tensor | None:
        return None if x is None else place_queries(x, m, call.lengths, call.memory_lengths)

    inner = call.replace(lengths=call.memory_lengths)
    result = form(inner, place(q), k, v, place(q_global), k_global, v_global)
    return Result(take_queries(result.output, n, call.lengths, call.memory_lengths), result.state)


def _global_keys(call: Call, k: Tensor) -> Bool[Tensor, "b m"]:
    """True for keys that are global tokens."""
    m = k.shape[2]
    chosen = (torch.arange(m, device=k.device) < call.config.global_tokens).expand(k.shape[0], -1)
    if call.roles is not None:
        chosen = chosen | (call.roles == int(Role.CLS))
    valid = call.valid_keys(m)
    return chosen if valid is None else chosen & valid


def _global_queries(call: Call, chosen: Bool[Tensor, "b m"], i: Int[Tensor, "1 n"]) -> Bool[Tensor, "b n"]:
    """True for queries that are global tokens; queries before the first key are not."""
    if call.pattern.causal:
        return ((i >= 0) & (i < call.config.global_tokens)).expand(chosen.shape[0], -1)
    return chosen


def _gather_slots(chosen: Bool[Tensor, "b m"]) -> tuple[Int[Tensor, "b count"], Bool[Tensor, "b count"]]:
    """Slots of each row's global tokens, in order, and a mask of the slots that exist."""
    most = chosen.shape[1]
    if values_known(chosen):
        most = int(chosen.sum(-1).max()) if chosen.numel() else 0
    slots = (~chosen).long().argsort(dim=-1, stable=True)[:, :most]
    return slots, chosen.gather(1, slots)


def _without(where: Ranks, chosen: Tensor | None, first: int) -> Ranks:
    """The ranks, with global keys marked as empty slots."""
    keys = where.keys
    keys = torch.where(keys < first if chosen is None else chosen, -1, keys)
    return Ranks(where.queries, keys, where.offset, where.first, plain=False)


def _local(
    call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, first: list[Tensor], places: Int[Tensor, "#b count"]
) -> Tensor:
    """Outputs of queries that are not global: over their window and the global keys `first` at ranks `places`."""
    config, heads, dtype = call.config, q.shape[1], v.dtype
    if places.shape[1]:  # avoids rounding the parts before they are merged
        wide = wide_dtype(q)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        first = [x.to(wide) for x in first]
    groups: dict[int, list[int]] = {}
    for head, dilation in enumerate(config.dilations * (heads if len(config.dilations) == 1 else 1)):
        groups.setdefault(dilation, []).append(head)
    if len(groups) == 1:
        output, lse = _windows(call, q, k, v, where, next(iter(groups)))
    else:
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        found = [_windows(call, q[:, g], k[:, g], v[:, g], where, dilation) for dilation, g in groups.items()]
        order = torch.tensor([head for group in groups.values() for head in group], device=q.device).argsort()
        output, lse = (torch.cat(parts, 1)[:, order] for parts in zip(*found, strict=True))
    if places.shape[1] == 0:
        return output
    there = Ranks(where.queries, places, None, None, plain=False)
    seen = attend_to_part(call, q, first[0], first[1], there, Visibility(causal=call.pattern.causal))
    return merge([output, seen[0]], [lse, seen[1]]).to(dtype)


def _windows(call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, dilation: int) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps over the window; query slot t is key slot m - n + t."""
    config: Config = call.config
    side = config.window // 2
    rule = Visibility(causal=True, left=config.window - 1) if call.pattern.causal else Visibility(left=side, right=side)
    if dilation == 1:
        return attend_to_part(call, q, k, v, where, rule)
    n, m = q.shape[2], k.shape[2]
    output = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide_dtype(q))
    any_length = isinstance(n, torch.SymInt)  # for an exported program
    for residue in range(dilation if any_length else min(dilation, n)):
        # among the slots of one residue, a dilated window is an ordinary window
        start = (m - n + residue) % dilation
        part, keys = slice(residue, None, dilation), slice(start, None, dilation)
        offset = (m - n + residue - start) // dilation
        exists = where.keys[:, keys] >= 0
        exists = torch.where(exists, torch.arange(exists.shape[1], device=q.device), -1)
        queries = torch.arange(q[:, :, part].shape[2], device=q.device)[None] + offset
        there = Ranks(queries, exists, offset, None, plain=False)
        own, near, values = q[:, :, part], k[:, :, keys], v[:, :, keys]
        if any_length:  # a slice's strides would tie the program to one length
            own, near, values = own.contiguous(), near.contiguous(), values.contiguous()
        found = attend_to_part(call, own, near, values, there, rule)
        output[:, :, part], lse[:, :, part] = found
    return output, lse


def _first(
    config: Config, before: Int[Tensor, " b"], lengths: Int[Tensor, " b"] | None, new: Tensor, known: Tensor | None
) -> Tensor:
    """The first tokens' keys, or values, after `new` ones follow the first `before` tokens."""
    m = new.shape[2]
    if known is None:
        known = new.new_zeros(*new.shape[:2], config.global_tokens, new.shape[3])
    if m == 0:
        return known
    slots = torch.arange(config.global_tokens, device=before.device) - before[:, None]
    inside = (slots >= 0) & (slots < (m if lengths is None else lengths[:, None]))
    index = slots.clamp(0, m - 1)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return torch.where(inside[:, None, :, None], new.gather(2, index).to(known.dtype), known)


class GlobalProjections(Projection):
    """Queries, keys and values of the global tokens, from the layer's input."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        if len(config.dilations) not in (1, spec.heads):
            raise _other_heads(config, spec.heads)
        self.heads = (spec.heads, spec.kv_heads, spec.kv_heads)
        some = config.global_tokens > 0 or spec.pattern is Pattern.NONCAUSAL_SELF
        self.used = config.separate_projections and some
        if self.used:
            self.query = spec.linear(spec.dim, spec.heads * spec.head_dim)
            self.key = spec.linear(spec.dim, spec.kv_heads * spec.head_dim)
            self.value = spec.linear(spec.dim, spec.kv_heads * spec.value_dim)

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x = call.x
        if not self.used or x is None:
            return heads
        modules = {"q_global": self.query, "k_global": self.key, "v_global": self.value}
        found = {
            name: module(x).unflatten(-1, (count, -1)).transpose(1, 2)
            for (name, module), count in zip(modules.items(), self.heads, strict=True)
        }
        return heads | found


def copy_projections(model: nn.Module) -> nn.Module:
    """Copy each layer's projections to its projections of global tokens, as the paper does with a trained model.

    Returns:
        The model, changed in place.

    Raises:
        Unsupported: for modules of other libraries, whose projections have no common names.
    """
    for layer in model.modules():
        projection = getattr(layer, "projection", None)
        if not isinstance(projection, GlobalProjections) or not projection.used:
            continue
        if not hasattr(layer, "query"):
            raise Unsupported(
                "copying projections of a swapped module",
                supported="layers of regard",
                nearest="swap(..., separate_projections=False)",
            )
        for name in ("query", "key", "value"):
            getattr(projection, name).load_state_dict(getattr(layer, name).state_dict())
    return model


def visible_pairs(config: Config, n: int) -> float:
    """The exact number of query-key pairs for a causal sequence of `n` tokens, averaged over heads."""
    first, window = min(config.global_tokens, n), config.window
    local, near = n - first, 0
    for dilation in config.dilations:
        # by its window, token t after the first ones sees t // g + 1 tokens, but no more than w
        rounds, rest = divmod(local, dilation)
        growing = min(rounds, window)
        near += dilation * (growing * (growing + 1) // 2 + (rounds - growing) * window)
        near += rest * min(window, rounds + 1)
    return near / len(config.dilations) + local * first + first * (first + 1) // 2


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern with N = M (scaled in proportion for n < M queries)."""
    width = shape.dim_key + shape.dim_value
    heads = shape.batch * shape.heads
    first = min(config.global_tokens, shape.m)
    pairs = visible_pairs(config, shape.m) * shape.n / max(shape.m, 1)
    near = [min(config.window, max(shape.m - first, 0) // g + 1) for g in config.dilations]
    return Cost(
        flops=2.0 * heads * pairs * width,
        memory=float(heads * shape.n * (shape.dim_value + 2)),
        state=float(shape.heads * (config.cached + 2 * config.global_tokens) * width),
        step_flops=2.0 * heads * (sum(near) / len(near) + first) * width,
    )


FIRST = 4
"""First tokens that layers of pretrained language models attend to most, whatever they say (attention sinks)."""


def in_trained_models(model: TrainedModel) -> dict[str, Any]:
    """Layers that read about half of a training text, at most 1024 tokens, the first ones of a language model among them,
    through the projections that the model has."""
    half, first = min(1024, model.length // 2), {"global_tokens": FIRST} if model.pattern.causal else {}
    window = max(2, (half - sum(first.values())) // 2 * 2)
    begun = {"window": window, **first, "separate_projections": False}
    return {name: value for name, value in begun.items() if name not in model.given}


def sample_context(generator: torch.Generator, *, batch: int, n: int, m: int, pattern: Pattern) -> Tensors:
    """Roles (batch, m) with global tokens at random places, if the pattern allows them."""
    if pattern is not Pattern.NONCAUSAL_SELF:
        return {}
    return {"roles": (torch.rand(batch, m, generator=generator) < 0.15).long() * int(Role.CLS)}


NO_PLACE = "memory tokens have no position relative to a query"

MECHANISM = Mechanism(
    name="longformer",
    aliases=("global_window",),
    kind=Kind.ATTENTION,
    summary="Softmax over a window around each token, plus a few global tokens that see all tokens and are seen by all.",
    paper=Paper("Longformer: The Long-Document Transformer", "2004.05150", 2020),
    inputs={
        "q": "bhnd",
        "k": "bgmd",
        "v": "bgmv",
        "q_global?": "bhnd",
        "k_global?": "bgmd",
        "v_global?": "bgmv",
    },
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: NO_PLACE, Pattern.CAUSAL_CROSS: NO_PLACE},
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": chunked},
    config=Config,
    variants={
        "no global tokens": {"window": 2, "global_tokens": 0},
        "several global tokens": {"window": 6, "global_tokens": 3, "separate_projections": False},
        "dilated": {"window": 4, "dilation": 3, "global_tokens": 2},
        "dilated by heads": {"window": 2, "dilation": (1, 4)},
    },
    engine="attention",
    state=LongformerState,
    cost=cost,
    honours=frozenset({"dropout", "roles"}),
    weights="exact",
    projection=GlobalProjections,
    in_trained_models=in_trained_models,
    sample_context=sample_context,
)
