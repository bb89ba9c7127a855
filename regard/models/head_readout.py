"""Direct logit attribution: decompose an encoder's logits exactly into the contribution of each head.

The last hidden state is a sum of the embedding, the output of each head of each layer through its part of the output
projection, and the outputs of the feed-forward networks. With its statistics fixed to those of the whole sum, the last
norm is linear, and so are the pool and the head. So the logits are the sum of the contributions of these parts::

    found = read_heads(model, tokens)
    found.heads[0]                                           # the first layer's contributions (B, H, classes)
    found.total                                              # the model's logits

In a model of one layer (Wide Attention, Brown et al., arXiv 2210.00640) this is a head's whole effect, except through
the feed-forward network. In a deeper model a head also acts through later layers, and that effect is attributed to
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import Context, Unsupported, an_instance
from regard.layers.attention import AttentionLayer
from regard.layers.checks import given_context
from regard.layers.norms import LayerNorm, RMSNorm
from regard.models.blocks import Block
from regard.models.encoder import Encoder, pool_tokens
from regard.models.evaluating import evaluation_mode
from regard.models.stack import StackConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LINEAR_POOLS = ("mean", "first", "last")


@dataclass(frozen=True)
class HeadReadout:
    """The contributions of an encoder's parts to its logits.

    Attributes:
        heads: for each layer, the contributions of its heads (B, H, classes).
        others: the contributions (B, classes) of the ``embedding``, the feed-forward networks (``feed_forward 0``, ...)
            and all ``biases``.
        weights: for each layer, the attention weights (B, H, N, N) of right-padded tokens; None if the mechanism has
            none.
    """

    heads: list[Float[Tensor, "b h k"]]
    others: dict[str, Float[Tensor, "b k"]]
    weights: list[Float[Tensor, "b h n n"] | None]

    @property
    def total(self) -> Float[Tensor, "b k"]:
        """The model's logits: the sum of all contributions."""
        return sum((x.sum(1) for x in self.heads), start=sum(self.others.values(), start=torch.zeros(())))


@torch.no_grad()
def read_heads(
    model: Encoder, inputs: Int[Tensor, "b n"] | Float[Tensor, "b n f"], *, context: Context | None = None
) -> HeadReadout:
    """Compute the contribution of each head to an encoder's logits, in evaluation mode.

    Args:
        model: an encoder with a mean, first or last pool, attention layers, and the default stack.
        inputs, context: as for :meth:`regard.models.Encoder.forward`.

    Raises:
        Unsupported: for other models.
    """
    blocks = _blocks(model)
    given = given_context(context)
    with evaluation_mode(model):
        x, inner, _, _ = model.embed(inputs, given)
        parts: dict[str, Tensor] = {"embedding": x}
        heads: list[Tensor] = []
        weights: list[Tensor | None] = []
        biases = x.new_zeros(x.shape[-1])
        for number, block in enumerate(blocks):
            layer: AttentionLayer = block.mixer
            output = layer.output
            assert isinstance(output, nn.Linear)
            wanted = inner.want | ({"weights"} if "weights" in layer.card.honours else set())
            before: list[Tensor] = []
            hook = output.register_forward_pre_hook(lambda module, args, kept=before: kept.append(args[0]))
            try:
                mixed = block.mix(x, context=inner.replace(want=wanted))
            finally:
                hook.remove()
            x = x + mixed.output
            weights.append(mixed.extras.get("weights"))
            by_head = output.weight.unflatten(1, (layer.num_heads, -1))  # (C, H, V)
            heads.append(torch.einsum("bnhv,chv->bhnc", before[0].unflatten(-1, (layer.num_heads, -1)), by_head))
            if output.bias is not None:
                biases = biases + output.bias
            if block.feed_forward is not None:
                parts[f"feed_forward {number}"] = block.feed(x, context=inner)
                x = x + parts[f"feed_forward {number}"]
        scaled, constant = _at_scale(model.norm, x)

        def read(part: Tensor) -> Tensor:
            return model.head(pool_tokens(model.pooling, part, inner, {}))

        nothing = read(torch.zeros_like(x))  # the bias of the head
        others = {name: read(scaled(part)) - nothing for name, part in parts.items()}
        others["biases"] = read(scaled(biases.expand_as(x)) + constant)
        found = [torch.stack([read(scaled(one)) - nothing for one in layer.unbind(1)], 1) for layer in heads]
    return HeadReadout(found, others, weights)


def _blocks(model: Encoder) -> list[Block]:
    """Return a model's blocks; raises Unsupported if its heads cannot be read."""
    if not isinstance(model, Encoder) or model.config.pool not in LINEAR_POOLS:
        pool = f" with pool={model.config.pool!r}" if isinstance(model, Encoder) else ""
        raise Unsupported(
            f"the heads of {an_instance(model)}{pool}", supported=f"an Encoder with pool={', '.join(LINEAR_POOLS)}"
        )
    if model.config.stack != StackConfig():
        raise Unsupported(f"the heads of a model with stack={model.config.stack}", supported="the default stack")
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    for block in blocks:
        if not isinstance(block.mixer, AttentionLayer) or not isinstance(block.mixer.output, nn.Linear):
            raise Unsupported(
                f"the heads of {block.entry[0]}",
                supported="attention with a linear output projection",
                nearest="softmax",
            )
    return blocks


def _at_scale(norm: nn.Module, x: Float[Tensor, "b n c"]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The norm as a linear function, with its statistics fixed to those of `x`, and the constant that it adds."""
    none = x.new_zeros(())
    if isinstance(norm, nn.Identity):
        return lambda part: part, none
    assert isinstance(norm, RMSNorm | LayerNorm)
    gain = none + 1 if norm.weight is None else norm.weight
    if isinstance(norm, RMSNorm):
        scale = gain * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        return lambda part: part * scale, none
    scale = gain * (x.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
    return lambda part: (part - part.mean(-1, keepdim=True)) * scale, none if norm.bias is None else norm.bias
