"""Cutting vision transformers of timm whose blocks are all plain, such as ViT and DeiT.

If whole blocks are removed, or the same number of neurons in each, timm's own arguments express it (``depth``,
``mlp_ratio``), and timm alone can load the saved model. Otherwise :mod:`regard.compression.pruning.records` records the
sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from regard.compression.pruning.anatomy import (
    KNOWN,
    Cut,
    Layer,
    NoBranch,
    Stream,
    Undo,
    assign,
    backwards,
    check_cuts,
    left,
    put,
    smaller,
    spans,
    staying,
)
from regard.compression.pruning.records import check_whole, entry_of, note
from regard.contract import Unsupported, an_instance


class TimmModel:
    """A `VisionTransformer` of timm."""

    def __init__(self, model: nn.Module) -> None:
        own: Any = model
        self.model = own
        check_whole(model)
        timm: Any = sys.modules.get("timm.models.vision_transformer")
        if timm is None or not isinstance(model, timm.VisionTransformer):
            raise Unsupported(f"taking heads, neurons or layers out of {an_instance(model)}", supported=KNOWN)
        for block in own.blocks:
            for module, plain in ((block, timm.Block), (block.attn, timm.Attention), (block.mlp, timm.Mlp)):
                if type(module) is not plain:
                    raise Unsupported(
                        f"taking heads, neurons or layers out of {an_instance(model)} with {an_instance(module)}",
                        supported="blocks of timm's plain attention and Mlp",
                    )
        self.layers = [_layer(f"blocks.{i}", block) for i, block in enumerate(own.blocks)]

    def harden(self, layer: int, keys: int) -> Undo:
        """Always raises Unsupported: timm has no such attention."""
        raise Unsupported(
            "hard attention in a model of timm",
            supported="models of regard and transformers",
            nearest="axformer:hard=0",
        )

    def stream(self) -> Stream:
        """Always raises Unsupported: timm's heads are as wide as the stream together."""
        raise Unsupported(
            "a narrower residual stream in a model of timm, whose heads share its width",
            supported="models of regard and transformers",
        )

    def compact(self, cuts: Sequence[Cut], hidden: Sequence[int] = ()) -> Undo:
        """See :class:`regard.compression.pruning.anatomy.Host`; nothing is changed if a cut is refused."""
        if hidden:
            self.stream()
        settled = check_cuts(self.layers, cuts)
        for number, cut in enumerate(settled):
            if cut.hard is not None:
                self.harden(number, cut.hard)
        kept = staying(settled)
        undo: list[Undo] = []
        for number in kept:
            undo += self._cut(number, settled[number])
        model, blocks = self.model, self.model.blocks
        undo.append(assign(model, "blocks", nn.Sequential(*(blocks[i] for i in kept)).train(blocks.training)))
        undo.append(assign(model, "feature_info", list(model.feature_info[: len(kept)])))
        undo += self._describe([settled[i] for i in kept], [self.layers[i] for i in kept])
        return backwards(undo)

    def _cut(self, number: int, cut: Cut) -> list[Undo]:
        layer = self.layers[number]
        block: Any = layer.module
        undo: list[Undo] = []
        if cut.attention:
            undo.append(put(block, "attn", NoBranch()))
        elif cut.heads:
            units, counts = left(layer.units, cut.heads)
            rows, attention = layer.columns(units), block.attn
            every = torch.cat([rows + i * attention.attn_dim for i in range(3)])
            undo.append(put(attention, "qkv", smaller(attention.qkv, rows=every)))
            undo.append(put(attention, "proj", smaller(attention.proj, columns=rows, silent=not counts)))
            undo.append(assign(attention, "num_heads", len(units)))
            undo.append(assign(attention, "attn_dim", len(rows)))
        if cut.feed_forward:
            undo.append(put(block, "mlp", NoBranch()))
        elif cut.neurons:
            neurons, counts = left(layer.neurons, cut.neurons)
            kept = spans(neurons, 1)
            undo.append(put(block, "mlp.fc1", smaller(block.mlp.fc1, rows=kept)))
            undo.append(put(block, "mlp.fc2", smaller(block.mlp.fc2, columns=kept, silent=not counts)))
        return undo

    def _describe(self, cuts: list[Cut], layers: list[Layer]) -> list[Undo]:
        """Record what is left in the model's arguments, or else in a separate record."""
        entries = [entry_of(cut, layer) for cut, layer in zip(cuts, layers, strict=True)]
        told: dict[str, Any] = {"depth": len(cuts)}
        plain = all(cut == Cut(neurons=cut.neurons) for cut in cuts) and len({e["neurons"] for e in entries}) == 1
        if plain and cuts[0].neurons:
            told["mlp_ratio"] = _ratio(entries[0]["neurons"], self.model.embed_dim)
        made = getattr(self.model, "_model_args", None)  # set by timm.create_model, not by the class
        undo = [] if made is None else [assign(self.model, "_model_args", {**made, **told})]
        return undo if plain and undo else [*undo, note(self.model, entries)]


def _layer(name: str, block: Any) -> Layer:
    attention, network = block.attn, block.mlp
    fixed: dict[str, str] = {}
    if type(attention.norm) is not nn.Identity:
        fixed["heads"] = "what all heads say together is normalised"
    if type(network.norm) is not nn.Identity:
        fixed["neurons"] = "all neurons together are normalised"
    for what, linears in (("heads", (attention.qkv, attention.proj)), ("neurons", (network.fc1, network.fc2))):
        if any(type(linear) is not nn.Linear for linear in linears):
            fixed[what] = "its projections are not plain"
    if attention.gate is not None or "forward" in vars(attention):
        fixed["heads"] = "its attention is not timm's plain one"
    last = {"attention": attention.proj, "feed_forward": network.fc2}
    return Layer(
        name,
        block,
        attention.num_heads,
        1,
        attention.head_dim,
        network.fc2.in_features,
        None if "heads" in fixed else attention.proj,
        None if "neurons" in fixed else network.fc2,
        {"attention": attention, "feed_forward": network},
        last,
        {branch: linear for branch, linear in last.items() if type(linear) is nn.Linear},
        fixed=fixed,
    )


def _ratio(neurons: int, width: int) -> float:
    """The ``mlp_ratio`` from which timm computes, by truncation, this number of neurons."""
    exact = neurons / width
    return exact if int(width * exact) == neurons else (neurons + 0.5) / width
