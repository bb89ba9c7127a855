"""FastV (arXiv 2403.06764): drop tokens with little attention from a prompt's last token after the first layers.

::

    with fewer_tokens(model, keep=0.5, layer=2, place=slice(5, 581)) as fast:      # positions of the image's tokens
        model.generate(ids, max_new_tokens=20)
    fast.places                                                                    # tokens kept from the last prompt

After `layer` layers the tokens in `place` are ranked by their attention from the last token of the prompt, averaged
over the heads of the previous layer; a share of them is kept, and all other tokens too, with their original positions.
The caches of later layers hold the kept tokens. With ``layer=0`` random tokens are kept, the paper's baseline. With
``mask_only=True`` later layers hide tokens instead of dropping them, which saves nothing: a kept token's numbers are the
same, and the model returns a row for every token, for studies of accuracy. The paper drops tokens of images; in a text any span can be given, such
as a document before a question.

Models: causal language models of transformers with layers like Llama's (also the language model inside a
vision-language model, if it is passed itself). Each row of a batch keeps its own tokens, the same number in each; left
padding is never chosen.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.compression.prompts import check_share
from regard.contract import Unsupported, an_instance, at_least
from regard.core.draws import uniform

if TYPE_CHECKING:
    from jaxtyping import Float, Int

KNOWN = "causal language models of transformers with layers as Llama's"


@dataclass
class FewerTokens:
    """FastV's settings and state while it is active.

    Attributes:
        keep: share of the tokens in `place` to keep.
        layer: number of layers that see all tokens; 0 for a random choice.
        place: range of the tokens that may be dropped.
        places: (B, M) tokens of the last prompt that were kept; None before the first prompt.
    """

    keep: float
    layer: int
    place: slice
    places: Int[Tensor, "b m"] | None = None
    _reads_prompt: bool = field(default=False, repr=False)
    _length: int = field(default=0, repr=False)

    def begin(self, scores: Float[Tensor, "b n"] | None) -> None:
        """Choose the tokens of a prompt; None for tokens after the prompt."""
        self._reads_prompt = scores is not None
        if scores is not None:
            self.places, self._length = self.choose(scores), scores.shape[1]

    def choose(self, scores: Float[Tensor, "b n"]) -> Int[Tensor, "b m"]:
        """The tokens to keep, in order; of tokens with equal scores the first.

        Args:
            scores: attention from the last token to each token, including itself at the end, or random numbers.
        """
        n = scores.shape[1]
        may_go = torch.zeros(n, dtype=torch.bool, device=scores.device)
        may_go[self.place] = True
        may_go[-1] = False
        count = n - int(may_go.sum()) + math.ceil(self.keep * int(may_go.sum()))
        order = scores.masked_fill(~may_go, torch.inf).sort(dim=1, descending=True, stable=True).indices
        return order[:, :count].sort(1).values

    def columns(self, mask: Tensor) -> Tensor:
        """Restrict a mask (B, 1, M, N) to the keys in later layers: kept tokens, and tokens after the prompt."""
        assert self.places is not None
        later = torch.arange(self._length, mask.shape[3], device=mask.device).expand(len(self.places), -1)
        kept = torch.cat([self.places, later], 1)[:, None, None]
        mask = mask.expand(len(self.places), -1, -1, -1)
        return mask.gather(3, kept.expand(-1, mask.shape[1], mask.shape[2], -1))

    def hide(self, mask: Tensor) -> Tensor:
        """Hide dropped tokens in a mask (B, 1, M, N), from the kept tokens of the prompt or from tokens after it.

        Rows of dropped tokens stay as they are: a row that sees nothing would be NaN, also as a hidden value.
        """
        assert self.places is not None
        kept = torch.ones(len(self.places), mask.shape[3], dtype=torch.bool, device=mask.device)
        kept[:, : self._length] = False
        kept.scatter_(1, self.places, True)
        hidden = ~kept[:, None, None]
        if self._reads_prompt:
            hidden = hidden & kept[:, None, : self._length, None]
        return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


@contextmanager
def fewer_tokens(
    model: nn.Module,
    *,
    keep: float,
    place: slice = slice(None),
    layer: int = 2,
    mask_only: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[FewerTokens]:
    """Let a model's later layers read fewer tokens of its prompts, within the context.

    Args:
        model: see the module. It returns one row of logits per kept token, the last token's at the end.
        keep: share of the tokens in `place` to keep, above 0 and at most 1.
        place: tokens of a prompt that may be dropped; by default all but the last.
        layer: number of layers that see all tokens, fewer than the model has. With 0 the kept tokens are random; the
            first layer then hides the others rather than dropping them, since transformers count a cache's tokens there.
        mask_only: whether later layers hide tokens and keep their rows; for ``eager`` and ``sdpa`` attention.
        generator: generator of the random choice, with ``layer=0`` only.

    Raises:
        Unsupported: for other models, and values out of range.
    """
    check_share(keep)
    at_least("layer", layer, 0)
    layers = _layers(model)
    if len(layers) < 2:
        raise Unsupported("fewer tokens in a model of one layer", supported="two layers or more")
    if layer >= len(layers):
        raise Unsupported(f"layer={layer} of {len(layers)}", supported=f"0 to {len(layers) - 1}", nearest="layer=1")
    if generator is not None and layer:
        raise Unsupported(f"generator with layer={layer}", supported="layer=0, a random choice", nearest="layer=0")
    fast = FewerTokens(keep, layer, place)
    if layer == 0:
        handles = [layers[0].register_forward_pre_hook(_drawing(fast, generator), with_kwargs=True)]
    else:
        handles = [layers[layer - 1].self_attn.register_forward_pre_hook(_looking(fast), with_kwargs=True)]
    dropping = len(layers) if mask_only else max(layer, 1)
    handles += [one.register_forward_pre_hook(_hiding(fast), with_kwargs=True) for one in layers[layer:dropping]]
    handles += [
        one.register_forward_pre_hook(_leaving(fast, first=i == 0), with_kwargs=True)
        for i, one in enumerate(layers[dropping:])
    ]
    try:
        yield fast
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: Any) -> list[Any]:
    inner = getattr(model, "model", model)
    layers = list(getattr(inner, "layers", ()))
    for one in layers:
        attention = getattr(one, "self_attn", None)
        rotary = hasattr(sys.modules.get(type(attention).__module__), "apply_rotary_pos_emb")
        if attention is None or not rotary or not hasattr(attention, "q_proj") or not hasattr(attention, "k_proj"):
            raise Unsupported(f"fewer tokens in {an_instance(one)}", supported=KNOWN)
    if not layers:
        raise Unsupported(f"fewer tokens in {an_instance(model)}", supported=KNOWN)
    return layers


def _looking(fast: FewerTokens) -> Any:
    """Record the attention from the last token of a prompt, in the previous layer."""

    @torch.no_grad()
    def look(attention: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = named["hidden_states"] if "hidden_states" in named else given[0]
        if x.shape[1] < 2:
            return fast.begin(None)
        cos, sin = named["position_embeddings"]
        q = attention.q_proj(x[:, -1:]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        k = attention.k_proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        q, _ = rotate(q, q, cos[:, -1:], sin[:, -1:])
        _, k = rotate(k, k, cos, sin)
        scores = attention.scaling * q.unflatten(1, (k.shape[1], -1))[:, :, :, 0] @ k.mT  # (B, G, H / G, N)
        mask = named.get("attention_mask")
        if mask is not None:
            scores = scores.masked_fill(~_seen(mask, k.shape[2]), -torch.inf)
        fast.begin(scores.float().softmax(-1).flatten(1, 2).mean(1))

    return look


def _drawing(fast: FewerTokens, generator: torch.Generator | None) -> Any:
    """Draw random scores for a prompt, before the first layer."""

    def draw(layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, mask = named["hidden_states"] if "hidden_states" in named else given[0], named.get("attention_mask")
        if x.shape[1] < 2:
            return fast.begin(None)
        scores = 1 + uniform(x.shape[:2], generator, device=x.device)
        fast.begin(scores if mask is None else scores.masked_fill(~_seen(mask, x.shape[1])[:, 0, 0], 0))

    return draw


def _seen(mask: Tensor, n: int) -> Tensor:
    """Which of `n` tokens of a prompt its last token sees, (B, 1, 1, N)."""
    row = mask[:, :1, -1:, :n]
    return row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2


def _hiding(fast: FewerTokens) -> Any:
    """Hide dropped tokens in a layer."""

    def hide(
        layer: Any, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if fast.places is None:
            return None
        mask, attention = named.get("attention_mask"), layer.self_attn.config._attn_implementation
        if attention not in ("eager", "sdpa"):
            raise Unsupported(f"hidden tokens with attention {attention!r}", supported="eager, sdpa", nearest="sdpa")
        if mask is None:  # then no token is padding, and positions count from 0
            x = named["hidden_states"] if "hidden_states" in named else given[0]
            n, keys = x.shape[1], int(named["position_ids"].max()) + 1
            mask = torch.ones(1, 1, n, keys, dtype=torch.bool, device=x.device).tril(keys - n)
        return given, {**named, "attention_mask": fast.hide(mask)}

    return hide


def _leaving(fast: FewerTokens, *, first: bool) -> Any:
    """Make a layer read only the kept tokens."""

    def leave(
        layer: Any, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        mask = named.get("attention_mask")
        if not fast._reads_prompt:  # a token after the prompt
            if mask is None or fast.places is None:
                return None
            return given, {**named, "attention_mask": fast.columns(mask)}
        chosen = fast.places
        assert chosen is not None
        named = dict(named)
        if first:
            x = named.pop("hidden_states") if "hidden_states" in named else given[0]
            given = (_rows(x, chosen), *given[1:])
        named["position_embeddings"] = tuple(_rows(x, chosen) for x in named["position_embeddings"])
        if named.get("position_ids") is not None:
            named["position_ids"] = named["position_ids"].expand(len(chosen), -1).gather(1, chosen)
        if mask is not None:
            kept = fast.columns(mask[..., : fast._length])
            index = chosen[:, None, :, None].expand(-1, kept.shape[1], -1, kept.shape[3])
            named["attention_mask"] = kept.gather(2, index)
        return given, named

    return leave


def _rows(x: Float[Tensor, "#b n c"], chosen: Int[Tensor, "b m"]) -> Float[Tensor, "b m c"]:
    return x.expand(len(chosen), -1, -1).gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
