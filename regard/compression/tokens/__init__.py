"""Fewer tokens in an existing vision transformer: :func:`reduce_tokens`, undone by :meth:`Reduction.undo`.

::

    reduction = reduce_tokens(model, "tome", remove=8)          # eight tokens fewer after each block, nothing trained
    logits = model(images)
    reduction.tokens.places                                     # where each patch went, to draw or spread outputs back
    reduction.undo()

Models: :class:`regard.models.vision.vit.VisionTransformer` with layers of any mechanism, :class:`regard.models.vision.tnt.TNT`,
and timm's `VisionTransformer` of plain blocks, `Eva` (also eva02 and dinov3) and `Beit`; `evit` and `attention` need a class
token and softmax attention, also in a mixture of heads. Tokens are merged or dropped between the attention and the
feed-forward network of a block (methods in :mod:`regard.compression.tokens.reducers`). Rotary positions and SeqPE's stay
with the tokens (`Tokens.origins`); layers that count tokens (windows, recurrences) count those that are left, and layers
that read the grid of patches (agent attention) must come before the first removal. A token that stands for several counts
that many times in later softmax attention, by adding log(size) to the scores of its key (`proportional`), and in a model
that averages its patches: the last block outputs it in the place of each.

Trained methods: :mod:`regard.compression.tokens.dynamic` (DynamicViT) and :mod:`regard.compression.tokens.interpreters`
(IA-RED²), around vision transformers of this project and of timm whose head reads a class token;
:mod:`regard.compression.tokens.trained` says how they are saved. Text encoders of transformers: :mod:`regard.compression.tokens.text`
(PoWER-BERT, Learned Token Pruning). Image tokens passed to a language model: :mod:`regard.compression.tokens.prumerge`
(PruMerge), and inside the language model :mod:`regard.compression.tokens.fastv` (FastV). Merging for diffusion, where
every token comes back: :mod:`regard.compression.tokens.grids`.
"""

from __future__ import annotations

from regard.compression.tokens.dynamic import DynamicTransformer, train_dynamic
from regard.compression.tokens.grids import GridMerge, match_on_grid, merge_on_grid
from regard.compression.tokens.interpreters import InterpretedTransformer, train_interpreters
from regard.compression.tokens.reducers import METHODS, Evidence, Tokens
from regard.compression.tokens.reduction import Reduction, reduce_tokens
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
