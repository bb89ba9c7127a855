"""Fewer tokens in a vision transformer that exists: :func:`reduce_tokens`, undone by :meth:`Reduction.undo`.

::

    reduction = reduce_tokens(model, "tome", remove=8)          # eight tokens fewer after each block, nothing trained
    logits = model(images)
    reduction.tokens.places                                     # where each patch went, to draw or to spread outputs again
    reduction.undo()

Models: :class:`regard.models.vision.vit.VisionTransformer` with a class token, and timm's `VisionTransformer` of plain
blocks. Tokens are merged or dropped between the attention and the feed-forward network of a block
(:mod:`regard.compression.tokens.reducers` has the methods). Where a token stands for several, later attention counts it so
often: log(size) is added to the scores of its key (`proportional`).
"""

from __future__ import annotations

from regard.compression.tokens.hosts import Reduction, reduce_tokens
from regard.compression.tokens.reducers import METHODS, Evidence, Tokens

__all__ = ["METHODS", "Evidence", "Reduction", "Tokens", "reduce_tokens"]
