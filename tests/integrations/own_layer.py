"""regard's own layer with the weights of a module that was swapped in a model of others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regard.integrations.heads import HeadAttention
from regard.layers.attention import AttentionLayer
from regard.layers.options import HeadOptions, LinearOptions, PositionOptions


def own_layer(
    placed: HeadAttention, maps: Sequence[tuple[Tensor, Tensor | None]], positions: str = "none", **heads: int
) -> AttentionLayer:
    """`maps`: weights and biases of queries, keys, values and output; 32 features in 4 heads, in float64."""
    layer = AttentionLayer(
        placed.card,
        32,
        4,
        pattern=placed.pattern,
        heads=HeadOptions(**heads),
        positions=PositionOptions(positions),
        projections=LinearOptions(bias=True),
        config=placed.config,
    ).double()
    with torch.no_grad():
        for own, (weight, bias) in zip((layer.query, layer.key, layer.value, layer.output), maps, strict=True):
            own.weight.copy_(weight)
            own.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    for part in ("projection", "merge"):
        module = getattr(layer, part)
        if module is not None:
            learned = getattr(placed, part).state_dict()
            for name in module.load_state_dict(learned, strict=False).missing_keys:  # biases that follow the shell's
                nn.init.zeros_(module.get_parameter(name))
    return layer.eval()


def disturb(model: nn.Module) -> None:
    """Nothing is left at a start that hides it."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
