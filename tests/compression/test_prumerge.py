"""PruMerge: which patches of an image stay, what is merged into them, and independence of other images in the batch."""

import numpy as np
import pytest
import torch
from support import close, load, refused

from regard.compression.tokens.prumerge import encode_fewer, prune_and_merge


def outliers(attention):
    low, high = np.percentile(attention.numpy(), [25, 75])
    return [j for j, a in enumerate(attention.tolist()) if a > high + 1.5 * (high - low)]


@pytest.mark.parametrize("plus", [False, True])
def test_outliers_stay_and_take_up_their_nearest(plus):
    features, keys = torch.randn(60, 12, dtype=torch.float64), torch.randn(60, 8, dtype=torch.float64)
    attention = torch.randn(60, dtype=torch.float64).mul(2).softmax(0)
    found = prune_and_merge(features, attention, keys, plus=plus, neighbours=5)
    places = outliers(attention)
    assert places, "draw again: no outlier"
    if plus:
        places = sorted({*places, *range(0, 60, max(60 // len(places) // 3, 1))})
    assert found.places.tolist() == places
    for token, i in zip(found.tokens, places, strict=False):
        others = [j for j in range(60) if j != i]
        others.sort(key=lambda j: -float(torch.cosine_similarity(keys[i], keys[j], dim=0)))
        expected = features[i] + sum(attention[j] * features[j] for j in others[:5])
        assert torch.allclose(token, expected, atol=1e-12)
    gone = [j for j in range(60) if j not in places]
    assert torch.allclose(
        found.tokens[-1], sum((attention[j] * features[j] for j in gone), torch.zeros(12)), atol=1e-12
    )


def test_an_image_without_outliers_keeps_the_patch_with_the_most_attention():
    attention = torch.linspace(1, 2, 20) / 30
    found = prune_and_merge(torch.randn(20, 4), attention, torch.randn(20, 4))
    assert found.places.tolist() == [19] and found.tokens.shape == (2, 4)


@pytest.mark.parametrize("plus", [False, True])
def test_tokens_are_those_of_the_authors_code(plus):
    """Theirs come in the order of attention, those that only the grid adds after them, the rest's token last."""
    found = load("compression_prumerge")
    name = "plus_" if plus else ""
    features, q, k = (found[f"{name}{x}"].double() for x in ("features", "queries", "keys"))
    attention = (q[0] @ k.T * q.shape[1] ** -0.5).softmax(-1)[1:]
    own = prune_and_merge(features[1:], attention, k[1:], plus=plus)
    places = own.places.tolist()
    known = outliers(attention)
    order = sorted(known, key=lambda j: -float(attention[j])) + [j for j in places if j not in known]
    close(own.tokens[[*map(places.index, order), -1]], found[f"{name}tokens"])


def test_a_vision_transformer_of_timm_is_read_before_its_last_block_image_by_image():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = timm.models.vision_transformer.VisionTransformer(**sizes).double().eval()
    images = torch.randn(3, 3, 48, 48, dtype=torch.float64)
    found = list(encode_fewer(model, images))
    for image, one in zip(images, found, strict=True):
        (alone,) = encode_fewer(model, image[None])
        assert alone.places.equal(one.places) and torch.allclose(alone.tokens, one.tokens, atol=1e-10)
        x = model._pos_embed(model.patch_embed(image[None]))
        for block in model.blocks[:2]:
            x = block(x)
        q, k, _ = model.blocks[2].attn.qkv(model.blocks[2].norm1(x))[0].chunk(3, -1)
        attention = (q @ k.T * 24**-0.5).softmax(-1)[0, 1:]
        expected = prune_and_merge(x[0, 1:], attention, k[1:])
        assert torch.allclose(expected.tokens, one.tokens, atol=1e-10)
    refused("class token", lambda: list(encode_fewer(torch.nn.Linear(2, 2), images)))
