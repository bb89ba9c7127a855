"""The layers of a decoder in few native calls: one for each run of layers with softmax attention or a gated recurrence,
one for each run of layers with windowed attention, caches and states included, and two for each layer with another
attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from regard.backends.linear.product import FEW_ROWS
from regard.backends.operators import runs_plainly
from regard.contract import Recurrence
from regard.engines.decoder_layer import DecoderLayer, DecoderLayers, Places, SlotRotation, Weight, few_tokens
from regard.integrations.collecting import is_collecting
from regard.integrations.transformers.attending import PLACE, PREFIX, SWAPPED, UNPLACED
from regard.integrations.transformers.caches import CACHE, places
from regard.integrations.transformers.fused.layers import FusedLayer, unwatched
from regard.integrations.transformers.fused.recurrences import Recurrences
from regard.integrations.transformers.fused.snapshot import Snapshot, family_of, is_known, window_of
from regard.integrations.transformers.fused.windows import Reach, Windows, reach_of
from regard.integrations.transformers.placing import is_swapped
from regard.integrations.transformers.rotary import ANGLES

SOFTMAX = {"eager", "sdpa", f"{PREFIX}softmax"}
"""Attention implementations of a model that the kernel also computes."""
WHOLE = Reach(0)
TAKEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", CACHE}


class Member(NamedTuple):
    """A layer in the form of the kernels.

    Attributes:
        recurrence: its recurrence; None for softmax attention, and for mechanisms that the kernels lack.
    """

    layer: Any
    native: DecoderLayer
    recurrence: Recurrence[Weight] | None


class Run(NamedTuple):
    """Consecutive layers with softmax attention or a recurrence.

    Attributes:
        layers: the layers, run in one native call.
        caches: which of the decoder's key-value caches belong to the run.
        states: which of the decoder's recurrent states belong to the run.
    """

    layers: DecoderLayers
    caches: slice
    states: slice


class Alone(NamedTuple):
    """A layer with another attention: its form for the kernels, and the fused layer that calls them."""

    native: DecoderLayer
    layer: FusedLayer


class Local(NamedTuple):
    """Consecutive layers with windows of the same size, in one native call when the windows are full."""

    windows: Windows
    layers: list[Alone]


Part = Run | Local | Alone


class Stack(NamedTuple):
    """All layers of a decoder whose attention implementation is `attention`, as of the snapshot `seen`.

    Attributes:
        parts: the parts in order; empty where the kernels cannot take a layer.
        indices: cache indices of all layers with softmax attention in runs.
        recurrences: all layers with a recurrence; None where there are none.
        apart: the parts when each layer with a recurrence runs alone.
        counted: mechanisms of the layers with softmax if these have a sparse method.
    """

    seen: Snapshot
    attention: str
    parts: Sequence[Part]
    indices: list[int]
    recurrences: Recurrences | None = None
    apart: Sequence[Part] = ()
    counted: Sequence[Any] = ()


class FusedDecoder:
    """The `forward` of a model's decoder, whose layers have a :class:`FusedLayer` as theirs."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder: Any = decoder
        self._last: Stack | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        found = None if arguments else self._decoded(options)
        return type(self.decoder).forward(self.decoder, *arguments, **options) if found is None else found

    def __getstate__(self) -> dict[str, Any]:
        return vars(FusedDecoder(self.decoder))  # addresses are valid only in this process, for this copy

    def _decoded(self, options: dict[str, Any]) -> BaseModelOutputWithPast | None:
        """Output of the decoder; None, with nothing changed, where the layers have to run as usual."""
        decoder, cache = self.decoder, options.get(CACHE)
        ids, x = options.get("input_ids"), options.get("inputs_embeds")
        given = ids if x is None else x
        if cache is None or given is None or (ids is not None and x is not None):
            return None
        if not unwatched(decoder) or not self._asks_plainly(options):
            return None
        rows, tokens = given.shape[:2]
        padding = _padding(options.get("attention_mask"), rows, tokens, cache.get_seq_length())
        if padding is None:
            return None
        if not 0 < rows * tokens <= FEW_ROWS or not runs_plainly(given):
            return None
        stack = self._native(f"{PREFIX}softmax" if hasattr(cache, "places") else decoder.config._attn_implementation)
        if stack is None:
            return None
        x = decoder.embed_tokens(ids) if x is None else x
        positions = options.get("position_ids")
        if positions is None:
            positions = torch.arange(tokens, device=x.device)[None] + cache.get_seq_length()
        cosine, sine = decoder.rotary_emb(x, position_ids=positions)
        if not few_tokens(x, cosine, sine) or not stack.seen.natives[0].fits(x, cosine):
            return None
        if stack.counted and not _counts_on(stack.counted[0], cache, positions):
            return None
        states = None
        if stack.recurrences is not None and not (is_collecting() or stack.seen.is_overheard()):
            states = stack.recurrences.states(cache, rows, tokens)
        parts = stack.apart if stack.recurrences is not None and states is None else stack.parts
        paddable = not hasattr(cache, "places") and not stack.counted and all(isinstance(part, Run) for part in parts)
        if any(padding) and not paddable:
            return None
        where = places(cache, stack.indices, rows, tokens) if stack.indices else Places([], [0] * rows)
        if where is None:
            return None
        if any(padding):
            where = where._replace(padding=padding)
        if stack.counted:
            where = _with_methods(where, stack.counted, cache, x)
        told = {ANGLES: (cosine, sine), "position_ids": positions, CACHE: cache, "use_cache": True}
        for part in parts:
            found = part.windows(x, cosine, sine, cache) if isinstance(part, Local) else None
            if found is not None:
                x = found
            elif isinstance(part, Run):
                own = where._replace(states=states or []).of(part.caches, part.states)
                x = part.layers(x, cosine, sine, own)
            else:
                for alone in part.layers if isinstance(part, Local) else [part]:
                    x = alone.layer.decode(alone.native, x, told)
        if stack.recurrences is not None and states is not None:
            stack.recurrences.take(cache, states, tokens)
        for placed in stack.counted:
            placed.config.method.decoded(_held(cache, placed), placed.config.place, placed.spec.heads, tokens)
        x = x if isinstance(parts[-1], Run) else decoder.norm(x)
        return BaseModelOutputWithPast(last_hidden_state=x, **{CACHE: cache})

    def _asks_plainly(self, options: dict[str, Any]) -> bool:
        """Return whether only the output of the last layer is asked for."""
        config, kept = self.decoder.config, options.get("use_cache")
        if any(x is not None and x is not False for name, x in options.items() if name not in TAKEN):
            return False
        if config.output_hidden_states or config.output_attentions or not (config.use_cache if kept is None else kept):
            return False
        return getattr(config, "is_causal", True)

    def _native(self, attention: str) -> Stack | None:
        """All layers in the form of the kernels, for a model with this attention implementation; None where the kernels
        cannot take one of them."""
        layers: list[Any] = [*self.decoder.layers._modules.values()][: self.decoder.config.num_hidden_layers]
        if not all(map(_is_fused, layers)):
            return None
        last = self._last
        if last is None or last.attention != attention or not last.seen.is_current():
            last = self._last = self._read(layers, attention)
        return None if last is None or not last.parts or last.seen.is_seen() else last

    def _read(self, layers: list[Any], attention: str) -> Stack | None:
        norm = self.decoder.norm
        if not (all(map(is_known, layers)) and family_of(norm, "RMSNorm")):
            return None
        seen = Snapshot(layers, around=[self.decoder.layers, norm])
        weight, natives, found = norm.weight, seen.natives, Stack(seen, attention, [], [])
        if not natives or weight.dtype != torch.float32 or not (weight.is_cpu and weight.is_contiguous()):
            return found
        if len({(len(weight), natives[0].head_width), *((x.width, x.head_width) for x in natives)}) > 1:
            return found
        if any(x.self_attn.config._attn_implementation != self.decoder.config._attn_implementation for x in layers):
            return found  # a layer has one of its own, as hard attention
        members = [*map(Member, layers, natives, seen.recurrences)]
        if attention != SWAPPED:
            members = [x._replace(recurrence=None) for x in members]
        ends = weight, norm.variance_epsilon
        parts = _parts(members, attention, ends)
        if parts is None:
            return found
        recurring = [(x.layer.self_attn, x.recurrence) for x in members if x.recurrence is not None]
        softmax = [x.self_attn for x in layers if _by_softmax(x, attention)]
        indices = [x.layer_idx for x in softmax]
        if not recurring:
            counted = [x.regard for x in softmax if is_swapped(x) and not x.regard.chosen.plain]
            return Stack(seen, attention, parts, indices, counted=counted)
        apart = _parts([x._replace(recurrence=None) for x in members], attention, ends) or []
        return Stack(seen, attention, parts, indices, Recurrences(*zip(*recurring, strict=True)), apart)


def _parts(members: list[Member], attention: str, ends: tuple[Tensor, float]) -> list[Part] | None:
    """The parts of a decoder whose last norm is `ends`; None where a layer fits none of the kinds of part."""
    parts, caches, states = list[Part](), 0, 0
    for reach, group in groupby(members, lambda member: _reach(member, attention)):
        some = [*group]
        attentions, natives = [x.layer.self_attn for x in some], [x.native for x in some]
        windows = [window_of(x) for x in attentions]
        if reach == WHOLE:
            recurrences = [x.recurrence for x in some]
            attending = recurrences.count(None)
            run = DecoderLayers(
                natives,
                [x.scaling for x in attentions],
                [None if w is None else w - 1 for w in windows],
                ends if some[-1] is members[-1] else None,
                recurrences,
            )
            first, caches = caches, caches + attending
            begin, states = states, states + len(some) - attending
            parts.append(Run(run, slice(first, caches), slice(begin, states)))
        elif attention == SWAPPED and windows.count(None) == len(windows):
            alone = [Alone(x.native, x.layer.forward) for x in some]
            if reach is None:
                parts += alone
            else:
                parts.append(Local(Windows(natives, attentions, reach), alone))
        else:
            return None
    return parts


def _padding(mask: Any, rows: int, tokens: int, past: int) -> list[int] | None:
    """Number of padding tokens at the start of each row; None where padding is elsewhere or among the new tokens."""
    if mask is None:
        return [0] * rows
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != rows or not runs_plainly(mask):
        return None
    valid = mask != 0
    if bool(valid.all()):
        return [0] * rows
    first = (~valid).sum(1)
    behind = torch.arange(mask.shape[1], device=mask.device) >= first[:, None]
    if mask.shape[1] != past + tokens or not torch.equal(behind, valid) or int(first.max()) > past:
        return None
    return first.tolist()


def _by_softmax(layer: Any, attention: str) -> bool:
    """Return whether a layer attends, as the kernel does, by softmax to everything in a cache of keys and values."""
    if attention != SWAPPED:
        return attention in SOFTMAX and not is_swapped(layer.self_attn)
    placed = getattr(layer.self_attn, PLACE, UNPLACED)
    if placed is None or placed is UNPLACED:
        return placed is None
    return placed.chosen.plain or _method_of(placed) is not None


def _method_of(placed: Any) -> Any:
    """The sparse method of a layer if the kernel can decode with it; None otherwise."""
    method = getattr(placed.config, "method", None)
    return method if getattr(method, "in_kernel", False) else None


def _counts_on(placed: Any, cache: Any, positions: Tensor) -> bool:
    """Return whether positions count on from those of a cache, where a sparse method places keys itself."""
    layers, index = getattr(cache, "layers", []), placed.placement.layer
    layer: Any = layers[index] if index < len(layers) else None
    if getattr(layer, "state", None) is None or layer.shift is None:
        return True
    ranks = layer.state.length[:, None] + torch.arange(positions.shape[1], device=positions.device)
    return len(positions) in (1, len(ranks)) and bool((positions == ranks + layer.shift[:, None]).all())


def _with_methods(where: Places, counted: Sequence[Any], cache: Any, x: Tensor) -> Places:
    """Places with what the sparse methods of the layers read and drop, and how they rotate keys."""
    held = [(placed.config.method, _held(cache, placed)) for placed in counted]
    return where._replace(
        readings=_some([method.reading(own) for method, own in held]),
        evictions=_some([method.evicting(own) for method, own in held]),
        rounded=_some([method.rounded(own) for method, own in held]),
        rotations=_rotations(counted[0], _held(cache, counted[0]), x, len(counted)),
    )


def _rotations(placed: Any, held: Any, x: Tensor, layers: int) -> list[SlotRotation] | None:
    """The angles of the slots of caches whose keys are not rotated; all layers hold the same tokens in the same slots."""
    if not placed.config.method.places_keys:
        return None
    cosine, sine = placed.placement.rotary.by_rank(x, held.places()[:1])
    return [SlotRotation(cosine[0], sine[0])] * layers


def _some(found: list[Any]) -> list[Any] | None:
    return found if any(found) else None


def _held(cache: Any, placed: Any) -> Any:
    """What a sparse method keeps of a layer's tokens."""
    return cache.layers[placed.placement.layer].state.mechanism


def _reach(member: Member, attention: str) -> Reach | None:
    """What a layer's queries see: all tokens where it has a recurrence or attention to the whole cache, or a window;
    None for others."""
    layer = member.layer
    if member.recurrence is not None or _by_softmax(layer, attention):
        return WHOLE
    return reach_of(layer.self_attn) if attention == SWAPPED and is_swapped(layer.self_attn) else None


def _is_fused(layer: Any) -> bool:
    """Return whether a layer's `forward` is ours and the layer has no hooks."""
    own = vars(layer).get("forward")
    return isinstance(own, FusedLayer) and own.layer is layer and not (layer._forward_hooks or layer._forward_pre_hooks)
