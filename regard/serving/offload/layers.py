"""Parts of softmax layers for offloaded attention: queries, keys and values, and the check for supported layers."""

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
    """The input of a layer: new tokens of some rows.

    Attributes:
        x: normalised hidden states.
        positions: positions of the tokens.
        lengths: number of valid tokens of each row; None if no row is padded.
        caches: caches of the layer's short convolutions. Computing queries, keys and values updates them in place.
    """

    x: Float[Tensor, "b n c"]
    positions: Int[Tensor, "b n"]
    lengths: Int[Tensor, " b"] | None
    caches: list[Tensor | None]

    def heads(self, layer: AttentionLayer, part: int, project: nn.Module, heads: int) -> Float[Tensor, "b h n d"]:
        """Return the heads of part 0 (queries), 1 (keys) or 2 (values)."""
        y = project(self.x)
        if self.caches:
            y, self.caches[part] = layer.convolutions[part](y, self.lengths, self.caches[part])
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)


def queries(layer: AttentionLayer, given: Inputs) -> Float[Tensor, "b h n d"]:
    """Return the queries, with their positions applied."""
    assert layer.query is not None
    q = given.heads(layer, 0, layer.query, layer.num_heads)
    q = q if layer.query_norm is None else layer.query_norm(q)
    rotate = layer.positions.rotate
    return q if rotate is None else rotate(q, given.positions)


def keys_values(layer: AttentionLayer, given: Inputs) -> tuple[Float[Tensor, "b g n d"], Float[Tensor, "b g n v"]]:
    """Return the keys, with their positions applied, and the values, as a cache stores them."""
    assert layer.key is not None and layer.value is not None
    k, v = (given.heads(layer, part, module, layer.kv_heads) for part, module in ((1, layer.key), (2, layer.value)))
    k = k if layer.key_norm is None else layer.key_norm(k)
    v = v if layer.value_norm is None else layer.value_norm(v)
    rotate = layer.positions.rotate if layer.positions.rotate_keys is None else layer.positions.rotate_keys
    return (k if rotate is None else rotate(k, given.positions)), v


def sizes_of(layer: AttentionLayer) -> dict[str, Any]:
    """Return the sizes and options of a layer that an attention worker needs."""
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
    """Return the layers whose attention can be offloaded, and whether states of constant size stay with the model:
    states of other layers, or the last tokens of short convolutions.

    Raises:
        Unsupported: if there is no such layer, and for any other layer whose state grows with the tokens.
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
    """Return whether a layer is plain softmax attention to all earlier tokens."""
    if type(layer) is not AttentionLayer or layer.card.name != "softmax":
        return False
    positions, config = layer.positions, layer.config
    placed = positions.bias is positions.embed is positions.prepare is None
    return placed and config.window in (None, (None, None)) and not config.learn_sink
