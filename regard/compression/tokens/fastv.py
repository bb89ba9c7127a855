"""FastV (arXiv 2403.06764): tokens that the last token hardly looks at, left out of all layers but the first ones of a prompt.

::

    with fewer_tokens(model, keep=0.5, layer=2, place=slice(5, 581)) as fast:      # where the image's tokens stand
        model.generate(ids, max_new_tokens=20)
    fast.places                                                                    # what went on, after the last prompt

After `layer` layers the tokens of `place` are ranked by the attention that the last token of the prompt pays them, the mean over
heads in the layer before; so many of them go on, all others too, with the positions that they had. The caches of later layers
hold what went on. The paper leaves out tokens of images; in a text any span can be given, such as a document before a question.

Models: causal language models of transformers with layers as Llama's (also inside models for images and text, whose language
model is given). Rows of a batch keep their own tokens, as many each; padding in front is never chosen.
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

if TYPE_CHECKING:
    from jaxtyping import Float, Int

KNOWN = "causal language models of transformers with layers as Llama's"


@dataclass
class FewerTokens:
    """FastV at work.

    Attributes:
        keep: share of the tokens in `place` that go on.
        layer: layers that see all tokens, 1 or more.
        place: of the tokens that may go.
        places: (B, M) which tokens of the last prompt went on; None before one.
    """

    keep: float
    layer: int
    place: slice
    places: Int[Tensor, "b m"] | None = None
    _scores: Float[Tensor, "b n"] | None = field(default=None, repr=False)
    _length: int = field(default=0, repr=False)

    def choose(self, scores: Float[Tensor, "b n"]) -> Int[Tensor, "b m"]:
        """Which tokens go on, in their order; of those with equal scores the first.

        Args:
            scores: attention of the last token to each; the last is its own.
        """
        n = scores.shape[1]
        may_go = torch.zeros(n, dtype=torch.bool, device=scores.device)
        may_go[self.place] = True
        may_go[-1] = False
        count = n - int(may_go.sum()) + math.ceil(self.keep * int(may_go.sum()))
        order = scores.masked_fill(~may_go, torch.inf).sort(dim=1, descending=True, stable=True).indices
        return order[:, :count].sort(1).values

    def columns(self, mask: Tensor) -> Tensor:
        """A mask (B, 1, M, N) of the keys that later layers hold: what went on, and what came after the prompt."""
        assert self.places is not None
        later = torch.arange(self._length, mask.shape[3], device=mask.device).expand(len(self.places), -1)
        kept = torch.cat([self.places, later], 1)[:, None, None]
        mask = mask.expand(len(self.places), -1, -1, -1)
        return mask.gather(3, kept.expand(-1, mask.shape[1], mask.shape[2], -1))


@contextmanager
def fewer_tokens(model: nn.Module, *, keep: float, place: slice = slice(None), layer: int = 2) -> Iterator[FewerTokens]:
    """Let a model's later layers read fewer tokens of its prompts, for as long as a block of code runs.

    Args:
        model: see the module. What it returns has as many rows of logits as tokens went on, the last one's last.
        keep: share of the tokens of `place` that go on, above 0 and at most 1.
        place: tokens of a prompt that may go; all but the last when not given.
        layer: layers that see all, 1 or more and fewer than the model has.

    Raises:
        Unsupported: for other models, and numbers outside.
    """
    check_share(keep)
    at_least("layer", layer, 1)
    layers = _layers(model)
    if layer >= len(layers):
        raise Unsupported(f"layer={layer} of {len(layers)}", supported=f"1 to {len(layers) - 1}", nearest="layer=1")
    fast = FewerTokens(keep, layer, place)
    handles = [layers[layer - 1].self_attn.register_forward_pre_hook(_looking(fast), with_kwargs=True)]
    handles += [
        one.register_forward_pre_hook(_leaving(fast, first=i == 0), with_kwargs=True)
        for i, one in enumerate(layers[layer:])
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
    """What the last token of a prompt looks at, in the layer before."""

    @torch.no_grad()
    def look(attention: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = named["hidden_states"] if "hidden_states" in named else given[0]
        fast._scores = None
        if x.shape[1] < 2:
            return
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
            row = mask[:, :1, -1:, : k.shape[2]]
            seen = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
            scores = scores.masked_fill(~seen, -torch.inf)
        fast._scores = scores.float().softmax(-1).flatten(1, 2).mean(1)

    return look


def _leaving(fast: FewerTokens, *, first: bool) -> Any:
    """A layer that reads what went on."""

    def leave(
        layer: Any, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        mask = named.get("attention_mask")
        if fast._scores is None:  # a token after the prompt
            if mask is None or fast.places is None:
                return None
            return given, {**named, "attention_mask": fast.columns(mask)}
        if first:
            fast.places, fast._length = fast.choose(fast._scores), fast._scores.shape[1]
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
