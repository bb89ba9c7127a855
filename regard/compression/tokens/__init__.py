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

What is trained: :mod:`regard.compression.tokens.dynamic` (DynamicViT) and :mod:`regard.compression.tokens.interpreters`
(IA-RED²) around this project's VisionTransformer. Text encoders of transformers: :mod:`regard.compression.tokens.text`
(PoWER-BERT, Learned Token Pruning). Tokens of an image that a language model is given: :mod:`regard.compression.tokens.prumerge`
(PruMerge), and inside of it :mod:`regard.compression.tokens.fastv` (FastV). Merging for diffusion, where every token comes back:
:mod:`regard.compression.tokens.grids`.
"""

from __future__ import annotations

from regard.compression.tokens.dynamic import DynamicTransformer, train_dynamic
from regard.compression.tokens.grids import GridMerge, match_on_grid, merge_on_grid
from regard.compression.tokens.hosts import Reduction, reduce_tokens
from regard.compression.tokens.interpreters import InterpretedTransformer, train_interpreters
from regard.compression.tokens.reducers import METHODS, Evidence, Tokens
from regard.compression.tokens.schedules import annealed_keep

__all__ = [
    "METHODS",
    "DynamicTransformer",
    "Evidence",
    "GridMerge",
    "InterpretedTransformer",
    "Reduction",
    "Tokens",
    "annealed_keep",
    "match_on_grid",
    "merge_on_grid",
    "reduce_tokens",
    "train_dynamic",
    "train_interpreters",
]
