"""Fewer tokens in TNT: equal to its blocks run by hand on the sentences that are left, with their own words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import close, refused
from torch import Tensor

from regard import Context, Mask
from regard.compression.tokens import METHODS, reduce_tokens
from regard.models.vision.tnt import TNT, TNTConfig

SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch": 8,
    "stride": 4,
    "width": 16,
    "heads": 2,
    "inner_width": 6,
    "inner_heads": 2,
    "depth": 3,
    "num_classes": 5,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a block without words": {"vanilla": (1,), "excitation": True},
    "linear": {"mixer": "linear"},
    "mean": {"pool": "mean"},
}


def small(kind: str = "plain", **changed: Any) -> TNT:
    model = TNT(TNTConfig(**{**SMALL, **KINDS[kind], **changed})).double().eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def by_hand(model: TNT, x: Tensor, mixing: Tensor, sizes: Tensor | None, shares: Tensor) -> Tensor:
    """Logits if the tokens after the first outer attention become `mixing` (B, M, N) times them, and their words too.

    Later attention counts each as often as `sizes` (B, M) say, an average of patches as `shares` (B, M) do.
    """
    words, sentences = model.embed(x)
    first, context = model.prefix, Context()
    for number, block in enumerate(model.blocks):
        words, sentences = block.read(words, sentences)
        outer = block.outer
        sentences = sentences + outer.attention(outer.norm1(sentences), context=context).output
        if number == 0:
            sentences = mixing @ sentences
            each = words.unflatten(0, (len(x), -1)).flatten(2)
            words = (mixing[:, first:, first:] @ each).flatten(0, 1).unflatten(1, words.shape[1:])
            context = Context() if sizes is None else Context(mask=Mask(bias=sizes.log()[:, None, None]))
        sentences = sentences + outer.excitation(outer.mlp(outer.norm2(sentences)))
    features = model.norm(sentences)
    return model.forward_head(features if first else features * (shares / shares.mean(1, keepdim=True))[..., None])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_blocks_run_on_the_sentences_that_are_left_with_their_words(kind: str) -> None:
    model, x = small(kind), images()
    whole = model(x)
    for method in METHODS:
        if method in ("evit", "attention") and kind in ("linear", "mean"):
            continue
        reduction = reduce_tokens(model, method, remove=0)
        assert torch.equal(model(x), whole)
        reduction.change(remove=[5, 0, 0])
        found, count = model(x), reduction.counts[0]
        assert count == 11 + model.prefix + (method == "evit") and not torch.allclose(found, whole)
        reduction.undo()
        assert torch.equal(model(x), whole) and type(model.blocks[0]).__name__ == "Block"
        if method == "evit":
            continue
        members = (reduction.tokens.places[:, None] == torch.arange(count)[:, None]).double()
        shares = members.sum(-1)
        sizes = shares if method.startswith("tome") and kind != "linear" else None
        close(found, by_hand(model, x, members / shares[..., None], sizes, shares))


def test_words_of_a_fused_token_are_the_sum_of_words_weighted_by_attention() -> None:
    model, x = small(), images()
    words, sentences = model.embed(x)
    words, sentences = model.blocks[0].read(words, sentences)
    outer, asked = model.blocks[0].outer, Context(want=frozenset({"weights"}))
    weights = outer.attention(outer.norm1(sentences), context=asked).extras["weights"].mean(1)[:, 0]
    seen: list[Tensor] = []
    reduction = reduce_tokens(model, "evit", remove=[5, 0, 0])
    hook = model.blocks[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(x)
    hook.remove()
    left = seen[0].unflatten(0, (2, -1))
    for row in range(2):
        gone = reduction.tokens.places[row] == 12
        assert int(gone.sum()) == 5
        each = words.unflatten(0, (2, -1))[row, gone[1:]]
        close(left[row, -1], (weights[row, gone][:, None, None] * each).sum(0))


@pytest.mark.parametrize("kind", ["plain", "mean"])
def test_an_empty_batch_has_no_logits(kind: str) -> None:
    model = small(kind)
    reduce_tokens(model, "tome", remove=2)
    assert model(images()[:0]).shape == (0, 5)


def test_copies_are_independent_and_what_layers_lack_is_refused() -> None:
    model, x = small(), images()
    whole = model(x)
    reduction = reduce_tokens(model, "tome", remove=2)
    fewer = model(x)
    copied, own = copy.deepcopy((model, reduction))
    own.undo()
    assert torch.equal(copied(x), whole) and torch.equal(model(x), fewer)
    refused("layer of linear", reduce_tokens, small("linear"), "evit", remove=1)
    refused("without a class token", reduce_tokens, small("mean"), "evit", remove=1)
