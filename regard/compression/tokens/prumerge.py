"""PruMerge (arXiv 2403.15388): image tokens for a language model, fewer for images with less to say.

::

    for image in encode_fewer(vit, images, plus=True):       # a timm VisionTransformer
        image.tokens, image.places                          # (K, C) and the patch that each belongs to

It uses the features before the last block, and that block's queries and keys: with a_j the attention of the class token
to patch j over all channels as one head, the patches are kept whose a_j is an upper outlier (above Q3 + 1.5 IQR); each
absorbs its nearest neighbours, x_i + sum_j a_j x_j over the patches with the most similar keys; one more token is sum_j
a_j x_j over the dropped patches. The number of kept patches depends on the image. PruMerge+ also keeps an even grid,
every floor(floor(N / kept) / 3)th patch.

Deviations: the official code pools the scores of a batch, so that an image's tokens depend on the other images in
it, and fails if no patch is an outlier; here images are separate, and the patch with the most attention is kept then.
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
    """The tokens that are left of an image.

    Attributes:
        tokens: (K + 1, C); the last one stands for all dropped patches.
        places: (K,) the patch that each of the others belongs to, in order.
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
    """Compute the tokens of one image.

    Args:
        features: features of its patches.
        attention: attention of the class token to the patches.
        keys: keys for the similarity of patches, compared by cosine.
        plus: whether an even grid of patches is kept as well (PruMerge+).
        neighbours: number of other patches that each kept one absorbs, limited by the number of patches.
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
    """Compute the tokens of each image with a vision transformer.

    Args:
        model: a model of timm, with a class token and plain blocks.
        images: as the model reads them.
        plus, neighbours: as in :func:`prune_and_merge`.

    Raises:
        Unsupported: for other models.
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
