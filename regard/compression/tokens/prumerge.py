"""PruMerge (arXiv 2403.15388): the tokens of an image that a language model is given, fewer where an image has less to tell.

::

    for image in encode_fewer(vit, images, plus=True):       # a timm VisionTransformer
        image.tokens, image.places                          # (K, C) and which patch each stands on

From the features before the last block, and that block's queries and keys: with a_j the attention of the class token to patch j
over all channels as one head, those patches stay whose a_j is an outlier above the others (above Q3 + 1.5 IQR); each takes up its
nearest others, x_i + sum_j a_j x_j over the patches whose keys are most like its own; one more token is sum_j a_j x_j over those
that went. How many stay is each image's own. PruMerge+ keeps an even grid too, every floor(floor(N / kept) / 3)th patch.

Deviations from the official code, which takes the scores of a batch together, so that an image's tokens depend on the others in
it, and fails where no patch is an outlier: here the one with the most attention stays then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Unsupported, an_instance, at_least

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NEIGHBOURS = 32
FENCE = 1.5


@dataclass(frozen=True)
class ImageTokens:
    """What stays of an image.

    Attributes:
        tokens: (K + 1, C); the last stands for all patches that went.
        places: (K,) the patch that each of the others stands on, in their order.
    """

    tokens: Float[Tensor, "k c"]
    places: Int[Tensor, " kept"]


def prune_and_merge(
    features: Float[Tensor, "n c"],
    attention: Float[Tensor, " n"],
    keys: Float[Tensor, "n d"],
    *,
    plus: bool = False,
    neighbours: int = NEIGHBOURS,
) -> ImageTokens:
    """The tokens of one image.

    Args:
        features: of its patches.
        attention: of the class token to them.
        keys: by which patches are alike, compared by their cosine.
        plus: whether an even grid of patches stays as well (PruMerge+).
        neighbours: other patches that each kept one takes up, fewer where there are fewer.
    """
    at_least("neighbours", neighbours, 0)
    n = len(features)
    low, high = torch.quantile(attention.double(), torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    stays = attention > high + FENCE * (high - low)
    if not bool(stays.any()):
        stays = torch.zeros_like(stays).index_fill(0, attention.argmax()[None], True)
    if plus:
        stays[:: max(n // int(stays.sum()) // 3, 1)] = True
    places = stays.nonzero()[:, 0]
    unit = F.normalize(keys, dim=-1)
    alike = (unit[places] @ unit.T).index_put((torch.arange(len(places)), places), torch.tensor(-torch.inf).to(unit))
    nearest = alike.topk(min(neighbours, n - 1), -1).indices
    weights = attention[nearest].to(features)
    merged = features[places] + (weights[..., None] * features[nearest]).sum(1)
    rest = (attention.to(features)[:, None] * features)[~stays].sum(0)
    return ImageTokens(torch.cat([merged, rest[None]]), places)


@torch.no_grad()
def encode_fewer(
    model: Any, images: Float[Tensor, "b ch h w"], *, plus: bool = False, neighbours: int = NEIGHBOURS
) -> Iterator[ImageTokens]:
    """The tokens of each image by a vision transformer.

    Args:
        model: of timm, with a class token and plain blocks.
        images: as the model reads them.
        plus, neighbours: of :func:`prune_and_merge`.

    Raises:
        Unsupported: for another model.
    """
    blocks = getattr(model, "blocks", None)
    block: Any = blocks[-1] if blocks is not None and len(blocks) else None
    if block is None or not hasattr(getattr(block, "attn", None), "qkv") or getattr(model, "cls_token", None) is None:
        raise Unsupported(
            f"fewer tokens of {an_instance(model)}", supported="timm's VisionTransformer with a class token"
        )
    found: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    try:
        model.forward_features(images)
    finally:
        handle.remove()
    x = found[0]
    q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, -1)
    prefix = model.num_prefix_tokens
    scores = torch.einsum("bc,bnc->bn", q[:, 0], k) * q.shape[-1] ** -0.5
    attention = scores.softmax(-1)[:, prefix:]
    for features, weights, keys in zip(x[:, prefix:], attention, k[:, prefix:], strict=True):
        yield prune_and_merge(features, weights, keys, plus=plus, neighbours=neighbours)
