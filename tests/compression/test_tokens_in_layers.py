"""Fewer tokens in layers of any kind: equal to blocks run by hand on the tokens that are left, at their own positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import close, refused
from torch import Tensor

from regard import Context, Mask
from regard.compression.tokens import METHODS, reduce_tokens
from regard.models.vision.patch_tokens import context_of
from regard.models.vision.vit import VisionTransformer, VisionTransformerConfig

SMALL: dict[str, Any] = {"image_size": 32, "patch": 8, "dim": 16, "num_layers": 3, "num_heads": 2, "num_classes": 5}
SCHEMES: dict[str, dict[str, Any]] = {
    "learned": {},
    "rotary": {"positions": "rotary", "position_options": {"axes": 2}},
    "rotary of ranks": {"positions": "rotary"},
    "seqpe": {"positions": "seqpe_mul"},
}
ATTENDED, DROPPING = ("evit", "attention"), ("attention", "random", "stride")
BASELINES = ("random", "stride", "mean")
ROUTED = [("mixture_of_heads", {"shared_heads": 1})] * 3
AGENTS = ("agent", {"num_agents": 4, "agent_bias": "block"})


def small(**changed: Any) -> VisionTransformer:
    model = VisionTransformer(VisionTransformerConfig(**{**SMALL, **changed})).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query" in name or "key" in name:
                parameter.normal_()  # attention that is far from uniform
    return model


def images(batch: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def contexts(model: VisionTransformer, x: Tensor) -> Callable[[Tensor], Context]:
    """Contexts of layers for tokens of given numbers (B, N) among all, made without the model's blocks."""
    rows, columns = model.embedding.grid(*x.shape[2:])
    first = model.config.class_tokens
    scheme = model.config.positions
    if scheme == "seqpe_mul":
        vectors = model.place(x)[1].position_vectors
        assert vectors is not None
        return lambda at: Context(position_vectors=vectors[0][at])
    if scheme == "rotary" and model.config.position_options:
        patches = [(row, column) for row in range(rows) for column in range(columns)]
        places = torch.tensor([(0, 0)] * first + patches)
        return lambda at: Context(positions=places[at])
    return lambda at: Context(positions=at if scheme == "rotary" else None)


def by_hand(
    model: VisionTransformer, x: Tensor, mixing: Tensor, at: Tensor, sizes: Tensor | None = None, pool: bool = True
) -> Tensor:
    """Logits if the tokens after the first attention become `mixing` (B, M, N) times them, at the positions of tokens
    `at` (B, M)."""
    told, found = contexts(model, x), model.embed(x)
    batch, n = found.shape[:2]
    context = told(torch.arange(n).expand(batch, -1))
    for number, block in enumerate(model.blocks):
        found = found + block.mixer(block.mixer_norm(found), context=context).output
        if number == 0:
            found, context = mixing @ found, told(at)
            if sizes is not None:
                context = context.replace(mask=Mask(bias=sizes.log()[:, None, None]))
        found = found + block.feed_forward(block.feed_forward_norm(found))
    return model.forward_head(model.norm(found))


def what_was_done(model: VisionTransformer, x: Tensor, method: str, reduction: Any) -> tuple[Tensor, Tensor]:
    """The matrix that makes the tokens that are left of all, and the numbers of those whose positions they have."""
    places, count = reduction.tokens.places, reduction.counts[-1]
    members = (places[:, None] == torch.arange(count)[:, None]).double()  # (B, M, N)
    mixing = members / members.sum(-1, keepdim=True)
    at = torch.zeros(len(places), count, dtype=torch.long)
    weights = None
    if method in ATTENDED:
        told = contexts(model, x)(torch.arange(places.shape[1]).expand(len(places), -1))
        block, found = model.blocks[0], model.embed(x)
        asked = told.replace(want=frozenset({"weights"}))
        weights = block.mixer(block.mixer_norm(found), context=asked).extras["weights"].mean(1)[:, 0]
    for row in range(len(places)):
        for token in range(count):
            own = members[row, token].nonzero()[:, 0]
            if method == "tome" and len(own) > 1:
                (target,) = own[own % 2 == 1]
            elif method == "tome_stride":
                stay = [0, *(1 + place * 16 // (count - 1) for place in range(count - 1))]
                (target,) = (one for one in own.tolist() if one in stay)
            elif method == "evit" and token == count - 1:
                assert weights is not None
                mixing[row, token] = weights[row] * members[row, token]
                target = own[weights[row, own].argmax()]
            else:
                target = own[(len(own) - 1) // 2]
            at[row, token] = target
    return mixing, at


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("plan", ["softmax", "sigmoid", "linear", ROUTED])
def test_it_is_the_blocks_run_on_the_tokens_that_are_left_at_their_positions(plan: Any, scheme: str) -> None:
    model, x = small(plan=plan, **SCHEMES[scheme]), images()
    whole = model(x)
    weighted = plan in ("softmax", ROUTED)
    for method in METHODS:
        if method == "tome_random" or (method in ATTENDED and plan != "softmax"):
            continue
        reduction = reduce_tokens(model, method, remove=0)
        assert torch.equal(model(x), whole)
        reduction.change(remove=[6, 0, 0])
        found, counts = model(x), reduction.counts
        assert counts == [11 + (method == "evit")] * 3 and not torch.allclose(found, whole)
        reduction.undo()
        assert torch.equal(model(x), whole)
        sizes = reduction.tokens.sizes if weighted and method.startswith("tome") else None
        close(found, by_hand(model, x, *what_was_done(model, x, method, reduction), sizes))


def test_a_fused_token_in_place_of_a_single_patch_has_that_patchs_position() -> None:
    model, x = small(**SCHEMES["rotary"]), images()
    reduction = reduce_tokens(model, "evit", remove=[1, 0, 0])
    found = model(x)
    assert reduction.counts == [17] * 3
    reduction.undo()
    close(found, by_hand(model, x, *what_was_done(model, x, "evit", reduction)))


def test_positions_are_those_on_the_grid_of_the_images() -> None:
    for scheme in ("rotary", "seqpe"):
        model, x = small(**SCHEMES[scheme], pool="mean"), images(height=24, width=48)
        for method in ("stride", "random"):
            reduction = reduce_tokens(model, method, remove=[7, 0, 0])
            found = model(x)
            reduction.undo()
            close(found, by_hand(model, x, *what_was_done(model, x, method, reduction)))


def test_positions_of_tokens_reduced_again_and_again_are_their_own() -> None:
    model, x = small(**SCHEMES["rotary"]), images()
    reduction = reduce_tokens(model, "random", remove=[3, 4, 0])
    model(x)
    reduction.undo()
    kept = reduction.tokens.origins
    assert torch.equal(kept, torch.stack([(row >= 0).nonzero()[:, 0] for row in reduction.tokens.places]))
    reduction = reduce_tokens(model, "stride", remove=[8, 4, 0])
    found = model(x)
    reduction.undo()
    told, x = contexts(model, x), model.embed(x)
    at = torch.arange(17).expand(2, -1)
    for number, block in enumerate(model.blocks):
        x = x + block.mixer(block.mixer_norm(x), context=told(at)).output
        kept = {0: [0, *range(1, 17, 2)], 1: [0, *range(1, 9, 2)]}.get(number, list(range(x.shape[1])))
        x, at = x[:, kept], at[:, kept]
        x = x + block.feed_forward(block.feed_forward_norm(x))
    close(found, model.forward_head(model.norm(x)))


@pytest.mark.parametrize("mechanism", ["fnet", "gated_linear", "local", "bidirectional_mamba"])
def test_baselines_need_no_attention(mechanism: str) -> None:
    model, x = small(plan=mechanism), images()
    whole = model(x)
    for method in (*BASELINES, "tome"):
        reduction = reduce_tokens(model, method, remove=0, metric="tokens")
        close(model(x), whole)
        reduction.change(remove=[6, 0, 0])
        found = model(x)
        reduction.undo()
        close(found, by_hand(model, x, *what_was_done(model, x, method, reduction)))


def test_agents_on_the_grid_see_all_patches_and_later_layers_fewer() -> None:
    model, x = small(plan=[AGENTS, AGENTS, "softmax"]), images()
    whole = model(x)
    for method in (*BASELINES, "tome"):
        refused("block 1 of agent, which reads the grid", reduce_tokens, model, method, remove=3)
        assert type(model.blocks[0]).__name__ == "VisionBlock"
        reduction = reduce_tokens(model, method, remove=0)
        assert torch.equal(model(x), whole)
        refused("after block 1 or later", reduction.change, keep=0.5, blocks=[0])
        reduction.change(remove=[0, 5, 0])
        found = model(x)
        assert reduction.counts == [17, 12, 12]
        reduction.undo()
        mixing, _ = what_was_done(model, x, method, reduction)
        tokens = model.embed(x)
        for number, block in enumerate(model.blocks):
            context = context_of((4, 4), 1, tokens) if number < 2 else Context()
            tokens = tokens + block.mixer(block.mixer_norm(tokens), context=context).output
            tokens = mixing @ tokens if number == 1 else tokens
            tokens = tokens + block.feed_forward(block.feed_forward_norm(tokens))
        close(found, model.forward_head(model.norm(tokens)))


def test_what_layers_do_not_have_is_refused_by_name() -> None:
    refused("alibi positions", reduce_tokens, small(positions="alibi"), "stride", remove=1)
    refused("norm_linear", reduce_tokens, small(plan="norm_linear", positions="rotary"), "stride", remove=1)
    refused("complex_rotary, whose own positions", reduce_tokens, small(plan="complex_rotary"), "stride", remove=1)
    refused("linformer", reduce_tokens, small(plan=[("linformer", {"length": 17})] * 3), "stride", remove=1)
    for mechanism in ("linear", "sigmoid"):
        model = small(plan=mechanism)
        for method in ATTENDED:
            refused("reads the attention of the class token", reduce_tokens, model, method, remove=1)
        refused("proportional=False", reduce_tokens, model, "tome", remove=1, proportional=True)
    refused("metric='tokens'", reduce_tokens, small(plan="fnet"), "tome", remove=1)
