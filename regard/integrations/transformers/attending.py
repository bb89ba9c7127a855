"""The attention functions that transformers calls, and what they learn about the call of their module."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regard.catalogue import get_mechanism
from regard.contract import Pattern, Unsupported, an_instance
from regard.engines.attention import decode
from regard.integrations.chosen import Chosen
from regard.integrations.collecting import context_of, hand_back, is_collecting
from regard.integrations.heads import HeadAttention, Rotation
from regard.integrations.masks import Visible, find_causal, read_mask
from regard.integrations.transformers.caches import CACHE, StateLayer, state_layer
from regard.integrations.transformers.rotary import ANGLES, Rotary, count_positions, without_turn

PREFIX = "regard:"
SWAPPED = PREFIX + "swapped"
PLACE = "regard"
"""Attribute of an attention module: its mechanism, or None for softmax."""
UNPLACED: Any = object()
CACHES = tuple(dict.fromkeys((CACHE, "past_key_values", "past_key_value", "layer_past")))
MEMORY = ("encoder_hidden_states", "key_value_states")
"""Arguments of attention modules that hold the tokens of another sequence."""
_CALL = threading.local()
Made = TypeVar("Made")
_DEFAULTS: dict[tuple[str, tuple[tuple[str, Any], ...]], HeadAttention] = {}


@dataclass(frozen=True)
class Placement:
    """The connection of a mechanism to its module.

    Attributes:
        arguments: names of the positional arguments of the module's call.
        layer: index of the layer whose slot in a cache holds the mechanism's state; None where the module keeps using
            its own cache of keys and values.
        rotary: the model's rotary positions, which the module leaves to the mechanism; None where it has none or
            applies them itself.
        saved: whether a saved model has the mechanism: its config names it then.
    """

    arguments: tuple[str, ...]
    layer: int | None = None
    rotary: Rotary | None = None
    saved: bool = True

    @classmethod
    def of(
        cls, module: nn.Module, layer: int | None = None, rotary: Rotary | None = None, *, saved: bool = True
    ) -> Placement:
        """The placement in a module, with argument names from the signature of its `forward`."""
        return cls(tuple(inspect.signature(module.forward).parameters), layer, rotary, saved)


@dataclass(frozen=True)
class Told:
    """The call of a module in progress; attention functions themselves are passed nothing but heads.

    Attributes:
        module: the module called.
        x, source: the tokens of queries and of keys.
        cache: where the mechanism's state is kept; None without one.
        angles: cosines and sines not yet applied to queries and keys; None where there are none or they were applied.
        positions: positions of the tokens, where the model passes them.
    """

    module: nn.Module | None = None
    x: Tensor | None = None
    source: Tensor | None = None
    cache: StateLayer | None = None
    angles: tuple[Tensor, Tensor] | None = None
    positions: Tensor | None = None


NOTHING = Told()


def tell(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of a module: keep what the mechanism needs from the call for this thread, and withhold the cache and the
    rotation where the mechanism takes them over."""
    placed: HeadAttention = getattr(module, PLACE)
    placement: Placement = placed.placement
    used = module.config._attn_implementation
    if used != SWAPPED:
        raise Unsupported(
            f'attn_implementation="{used}" in {an_instance(module)} with {placed.chosen.name}',
            supported=f'"{SWAPPED}", which regard.swap has set',
            nearest="regard.unswap(model), for the model's own attention",
        )
    given = {**dict(zip(placement.arguments, args, strict=False)), **kwargs}
    x = given.get("hidden_states")
    source = next((given[name] for name in MEMORY if given.get(name) is not None), x)
    cache = angles = None
    if placed.counts_queries:
        _check_first(module, placed.chosen.name, x, given)
    if placement.layer is not None:
        for name in CACHES:
            if given.get(name) is not None:
                cache = state_layer(given[name], placement.layer, placed.chosen.name)
                given[name] = None
    if placement.rotary is not None:
        angles = given[ANGLES]
        given[ANGLES] = without_turn(angles)
    _CALL.told = Told(module, x, source, cache, angles, given.get("position_ids"))
    return (), given


def _check_first(module: Any, mechanism: str, x: Any, given: dict[str, Any]) -> None:
    """Raise Unsupported unless the tokens of a module that reads another sequence are the first of theirs."""
    for cache in (given.get(name) for name in CACHES):
        own = getattr(cache, "self_attention_cache", None)  # the self attention of the layer has added these tokens
        if own is not None and own.get_seq_length(module.layer_idx) > x.shape[1]:
            raise Unsupported(
                f"{mechanism}, which counts the queries of {an_instance(module)}, with a cache of the tokens before",
                supported="whole sequences",
                nearest="use_cache=False",
            )


def _told_of(module: nn.Module) -> Told:
    told: Told = getattr(_CALL, "told", NOTHING)
    _CALL.told = NOTHING
    return told if told.module is module else NOTHING


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    mechanism: str,
    **given: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls for ``regard:NAME``: (B, H, N, D), (B, G, M, D), (B, G, M, V) -> (B, N, H, V).

    Raises:
        Unsupported: for a mask, bias, softcap or sink that the mechanism cannot honour.
    """
    return _forward(module, query, key, value, attention_mask, None, mechanism, **given)


def swapped_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Called by transformers for ``regard:swapped``; modules that :func:`regard.swap` left have softmax attention."""
    watched = getattr(_CALL, "heads", None)
    if watched is not None:
        watched.append((query, key))
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    placed = getattr(module, PLACE, UNPLACED)
    if placed is UNPLACED:
        raise Unsupported(
            f"{an_instance(module)} for which the config of the swapped model names no mechanism",
            supported="the class of model that was swapped and saved",
            nearest="load the model that was swapped, and regard.unswap(model)",
        )
    if placed is not None and placed.chosen.plain:
        placed = None
    return _forward(module, query, key, value, attention_mask, placed, "softmax", **given)


def heads_of(module: Any, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The queries and keys with which a module attends when it is called on `x` with these angles."""
    before, config = module.config._attn_implementation, module.config
    _CALL.heads = []
    try:
        config._attn_implementation = SWAPPED
        module(hidden_states=x, attention_mask=None, **{ANGLES: angles})
        (found,) = _CALL.heads
    finally:
        config._attn_implementation = before
        _CALL.heads = None
    return found


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    placed: HeadAttention | None,
    mechanism: str,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attend by the mechanism placed in a module, or by `mechanism` with its defaults."""
    batch, n, m = query.shape[0], query.shape[2], key.shape[2]
    plain = not dropout and all(x is None for x in (attention_mask, position_bias, softcap, s_aux))
    if plain and n == 1 and mechanism == "softmax" and placed is None and not is_collecting():
        output = decode(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling)
        if output is not None:
            return output.transpose(1, 2), None
    told = NOTHING
    if placed is None:
        attend = _without_weights(mechanism, () if softcap is None else (("softcap", softcap),))
        if Pattern.CAUSAL_CROSS not in attend.card.patterns and _reads_encoder(module):
            raise Unsupported(
                f'attn_implementation="{PREFIX}{mechanism}" in {an_instance(module)}, where queries would see later ones',
                supported="mechanisms with the pattern causal-cross",
                nearest='attn_implementation="regard:softmax"',
            )
    else:
        attend, told = placed, _told_of(module)
        if told is NOTHING and placed.placement.layer is not None:
            raise Unsupported(
                f"{placed.chosen.name} with a cache in {an_instance(module)}, which attends more than once in a call",
                supported="modules that attend once",
            )
        if softcap is not None and getattr(placed.config, "softcap", None) != softcap:
            raise Unsupported(f"softcap={softcap} with {placed.chosen.name}", supported="a softcap set by regard.swap")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    crossing = told.source is not told.x
    cache, state = told.cache, None
    if cache is not None:
        state = cache.before(attend.chosen.name)
        m += cache.tokens
    mask = attention_mask
    if mask is not None:
        mask = mask[..., :m].expand(-1, -1, n, m)
    if causal and not crossing and cache is None and m > n:
        m = _slots(attention_mask, n, m)
        key, value, mask = key[:, :, :m], value[:, :, :m], None if mask is None else mask[..., :m]
    sees: dict[str, Any] = {"batch": batch, "n": n, "dtype": query.dtype, "prefer_causal": causal}
    sees["as_bias"] = "bias" in attend.card.honours
    causal_beside = causal and attention_mask is None  # a mask, if there is one, already includes causality
    if cache is not None and cache.tokens and mask is not None:
        visible = _read_after(mask, causal_beside, cache, **sees)
    else:
        sees |= {"causal": causal_beside, "m": m, "own_queries": n == m and not crossing}
        visible = read_mask(None, **sees) if mask is None else _read_once(attention_mask, mask, sees)
    if position_bias is not None:
        visible = _biased(visible, position_bias[..., :m])
    if visible.bias is not None and (cache is not None or (causal and not crossing)):
        visible = _order(visible, attend, cached=cache is not None)
    if crossing and attend.pattern.cross:
        pattern = attend.pattern
    elif visible.causal and not crossing:
        pattern = Pattern.CAUSAL_SELF
    else:
        pattern = Pattern.NONCAUSAL_SELF if n == m and not crossing else Pattern.NONCAUSAL_CROSS
    keeps = cache is not None and (cache.tokens > 0 or not (module.training and torch.is_grad_enabled()))
    rotation, shift = _rotation(attend, told, visible, n)
    result = attend(
        query,
        key,
        value,
        told.x,
        told.source,
        pattern=pattern,
        visible=visible,
        scale=scaling,
        dropout=dropout,
        context=context_of(module),
        rotation=rotation,
        state=state,
        return_state=keeps,
        training=module.training,
        **({} if s_aux is None else {"sink": s_aux}),
    )
    if cache is not None:
        cache.take(result.state, n, None if shift is None else shift.expand(batch))
    hand_back(module, result)
    return result.output.transpose(1, 2), None


def _reads_encoder(module: nn.Module) -> bool:
    """Whether this is the attention of a decoder's layer that reads the tokens of an encoder."""
    if getattr(module, "is_causal", True):
        return False
    decodes = (getattr(given, "is_decoder", False) for given in (module, getattr(module, "config", None)))
    return any(decodes) or bool(getattr(module, "is_cross_attention", False))


def _slots(given: Tensor | None, n: int, m: int) -> int:
    """The number of slots up to the newest token's (those after it, in a static cache, are empty), found once for all
    consecutive layers that get the same mask.

    Without a mask transformers means new tokens in the first slots, except for a single one, which sees all.
    """
    if given is None:
        return m if n == 1 else n
    if torch.compiler.is_compiling():
        return m
    return _once("slots", given, (n, m), lambda: _filled(given, n, m))


def _filled(given: Tensor, n: int, m: int) -> int:
    mask = given[..., :m].expand(-1, -1, n, m)
    seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min).flatten(0, 1).any(0)
    if bool(seen[:, -1].any()):
        return m
    slots = torch.arange(m, device=mask.device)
    first = (seen * slots).amax(-1) - slots[:n]  # the slot of the first new token, as each one tells it
    return min(m, n + max(0, int(first.max())))


def _read_once(given: Tensor | None, mask: Tensor, sees: dict[str, Any]) -> Visible:
    """:func:`read_mask`, which inspects every pair, once for all consecutive layers that get the same mask."""
    if given is None or torch.compiler.is_compiling():
        return read_mask(mask, **sees)
    # a bias would be kept as long as the thread lives
    return _once("read", given, sees, lambda: read_mask(mask, **sees), keeps=lambda visible: visible.bias is None)


def _once(
    name: str, given: Tensor, asked: Any, make: Callable[[], Made], keeps: Callable[[Made], bool] = lambda made: True
) -> Made:
    """What is made of a mask, once for all consecutive calls that get the same one and ask the same."""
    if given.is_inference():
        return make()
    asked = given._version, asked
    known = getattr(_CALL, name, None)
    if known is not None and known[0]() is given and known[1] == asked:
        return known[2]
    made = make()
    if keeps(made):
        setattr(_CALL, name, (weakref.ref(given), asked, made))
    return made


def _read_after(mask: Tensor, causal: bool, cache: StateLayer, *, dtype: torch.dtype, **sees: Any) -> Visible:
    """Like :func:`read_mask`, for new tokens that follow those of a state.

    The state has absorbed its tokens, so every new token must see exactly those; otherwise the mask becomes a bias over
    all tokens.
    """
    state, n = cache.state, sees["n"]
    visible = read_mask(mask[..., cache.tokens :], causal, m=n, own_queries=True, dtype=dtype, **sees)
    old = mask[..., : cache.tokens]
    if torch.compiler.is_compiling() or state is None:
        return visible
    seen = old if old.dtype == torch.bool else old > torch.finfo(old.dtype).min
    uniform = old.dtype == torch.bool or bool(((old == 0) | ~seen).all())
    count = seen[:, 0].sum(-1).expand(state.length.shape[0], -1)  # (B, N)
    there = torch.ones_like(count, dtype=torch.bool) if visible.keys is None else visible.keys
    if visible.bias is None and uniform and bool(((count == state.length[:, None]) | ~there).all()):
        return visible
    if not bool((state.length == cache.tokens).all()):
        raise Unsupported(
            "a mask that hides tokens which a state has read, or shows some that it has not",
            supported="masks of tokens that agree from call to call",
            nearest="use_cache=False",
        )
    bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else mask
    return Visible(causal, None, bias.to(dtype))


def _order(visible: Visible, attend: HeadAttention, *, cached: bool) -> Visible:
    """:func:`find_causal` for a call of a causal module. Softmax without a cache needs no order beside a bias that hides
    pairs; a compiler breaks the graph to look, but for a state, which has an order in any case."""
    if attend.chosen.plain and not cached:
        return visible
    if torch.compiler.is_dynamo_compiling() and not cached:
        reason = "a mechanism that is another one where it is causal has to know whether a mask is"
        return torch.compiler.disable(find_causal, reason=reason)(visible, otherwise=True)
    return find_causal(visible, otherwise=True)


def _rotation(attend: HeadAttention, told: Told, visible: Visible, n: int) -> tuple[Rotation | None, Tensor | None]:
    """The rotation that the mechanism is to apply, and the offset of positions from ranks in each row."""
    if told.angles is None:
        return None, None
    rotary: Rotary = attend.placement.rotary
    if not attend.places_keys:
        return rotary.rotation(told.angles), None
    if not rotary.counts:
        return rotary.rotation(told.angles, "frequencies that follow the length, with keys placed later"), None
    length, shift = (None, None) if told.cache is None else (told.cache.state, told.cache.shift)
    refusal, shift = count_positions(told.positions, visible, None if length is None else length.length, shift, n)
    return rotary.rotation(told.angles, refusal), shift


def _biased(visible: Visible, bias: Tensor) -> Visible:
    """What is visible, with scores to add."""
    return replace(visible, bias=bias if visible.bias is None else visible.bias + bias)


def _without_weights(mechanism: str, options: tuple[tuple[str, Any], ...]) -> HeadAttention:
    """The mechanism for any model, built once; those without options are built before a compiler traces a call."""
    known = _DEFAULTS.get((mechanism, options))
    if known is not None:
        return known
    card = get_mechanism(mechanism)
    selves = [p for p in (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF) if p in card.patterns]
    if not selves:
        raise Unsupported(f"{mechanism} in self attention", supported="a mechanism with a self pattern")
    # sizes that every mechanism accepts; those that depend on them add to the model
    attend = HeadAttention(Chosen.of(card, **dict(options)), dim=4, heads=2, head_dim=2, pattern=selves[0])
    if attend.adds:
        raise Unsupported(
            f'attn_implementation="{PREFIX}{mechanism}" alone, since {mechanism} learns more than the model has',
            supported="mechanisms of queries, keys and values alone",
            nearest=f'regard.swap(model, "{mechanism}"), which adds what it learns',
        )
    return _DEFAULTS.setdefault((mechanism, options), attend)
