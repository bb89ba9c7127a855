"""Softmax layers in parts, for attention that is done elsewhere: what comes before it, and which layers have nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from regard.contract import Context, Unsupported
from regard.layers.attention import AttentionLayer
from regard.models import LanguageModel
from regard.models.blocks import Block

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SUPPORTED = "softmax layers without a window, a learned sink or a bias of positions, next to layers whose state has a constant size"


@dataclass(frozen=True)
class Inputs:
    """What comes into a layer: more tokens of some rows.

    Attributes:
        x: normed.
        positions: their places.
        lengths: how many of each row there are; None where all are.
        caches: of the layer's short convolutions, which are those after these tokens once all parts have been made.
    """

    x: Float[Tensor, "b n c"]
    positions: Int[Tensor, "b n"]
    lengths: Int[Tensor, " b"] | None
    caches: list[Tensor | None]

    def heads(self, layer: AttentionLayer, part: int, project: nn.Module, heads: int) -> Float[Tensor, "b h n d"]:
        """Heads of part 0 (queries), 1 (keys) or 2 (values)."""
        y = project(self.x)
        if self.caches:
            y, self.caches[part] = layer.convolutions[part](y, self.lengths, self.caches[part])
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)


def queries(layer: AttentionLayer, given: Inputs) -> Float[Tensor, "b h n d"]:
    """In their places."""
    assert layer.query is not None
    q = given.heads(layer, 0, layer.query, layer.num_heads)
    q = q if layer.query_norm is None else layer.query_norm(q)
    rotate = layer.positions.rotate
    return q if rotate is None else rotate(q, given.positions)


def keys_values(layer: AttentionLayer, given: Inputs) -> tuple[Float[Tensor, "b g n d"], Float[Tensor, "b g n v"]]:
    """Likewise, as a cache has them."""
    assert layer.key is not None and layer.value is not None
    k, v = (given.heads(layer, part, module, layer.kv_heads) for part, module in ((1, layer.key), (2, layer.value)))
    k = k if layer.key_norm is None else layer.key_norm(k)
    v = v if layer.value_norm is None else layer.value_norm(v)
    rotate = layer.positions.rotate if layer.positions.rotate_keys is None else layer.positions.rotate_keys
    return (k if rotate is None else rotate(k, given.positions)), v


def sizes_of(layer: AttentionLayer) -> dict[str, Any]:
    """What an attention worker has to know of a layer."""
    return {
        "heads": layer.num_heads,
        "kv_heads": layer.kv_heads,
        "key_width": layer.head_dim,
        "value_width": layer.value_dim,
        "scale": layer.head_dim**-0.5,
        "softcap": layer.config.softcap,
    }


@torch.no_grad()
def offloadable(model: LanguageModel) -> tuple[list[int], bool]:
    """Layers whose attention can be done elsewhere, and whether something of constant size stays: states of other layers, or
    the last tokens of short convolutions.

    Raises:
        Unsupported: where there is none, and for a layer that keeps something of every token in another way.
    """
    stack = model.config.stack
    if model.insertion.prepare is not None or stack.reversible or stack.exit_rule is not None:
        raise Unsupported(
            "offloaded attention of a model that inserts tokens, is reversible or leaves early", supported=SUPPORTED
        )
    blocks = cast(list[Block], list(model.blocks))
    for i, block in enumerate(blocks):
        if not block.continues:
            raise Unsupported(f"offloaded attention next to layer {i}, {block.entry[0]}, without a state")
    ids = torch.zeros((1, 3), dtype=torch.int64, device=model.embedding.weight.device)
    wanted = Context(want=frozenset({"state"}))
    short, longer = (model.features(ids[:, :n], context=wanted).state.layers for n in (1, 3))
    chosen = [i for i, block in enumerate(blocks) if _is_plain(block.mixer)]
    for i, block in enumerate(blocks):
        if i not in chosen and longer[i].nbytes > short[i].nbytes:
            raise Unsupported(f"offloaded attention next to layer {i}, {block.entry[0]}", supported=SUPPORTED)
    if not chosen:
        raise Unsupported("offloaded attention of a model without softmax layers", supported=SUPPORTED)
    return chosen, len(chosen) < len(blocks) or any(
        len(cast(AttentionLayer, blocks[i].mixer).convolutions) for i in chosen
    )


def _is_plain(layer: Any) -> bool:
    """Whether a layer is nothing but softmax attention to all tokens before."""
    if type(layer) is not AttentionLayer or layer.card.name != "softmax":
        return False
    positions, config = layer.positions, layer.config
    placed = positions.bias is positions.embed is positions.prepare is None
    return placed and config.window in (None, (None, None)) and not config.learn_sink
