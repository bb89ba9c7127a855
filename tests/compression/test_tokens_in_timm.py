"""Fewer tokens in timm's Eva and Beit: equal to their blocks run by hand on the tokens that are left."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support import close, refused
from torch import Tensor

from regard.compression.tokens import METHODS, reduce_tokens

timm = pytest.importorskip("timm")
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 3, "num_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "eva02": ("Eva", {"use_rot_pos_emb": True, "qkv_fused": False, "swiglu_mlp": True, "global_pool": "token"}),
    "dinov3": (
        "Eva",
        {
            "use_rot_pos_emb": True,
            "rope_type": "dinov3",
            "rope_rotate_half": True,
            "num_reg_tokens": 2,
            "use_abs_pos_emb": False,
            "init_values": 0.5,
            "global_pool": "token",
        },
    ),
    "mixed": ("Eva", {"use_rot_pos_emb": True, "rope_type": "mixed", "attn_type": "rope", "global_pool": "token"}),
    "beit": ("Beit", {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.5, "global_pool": "token"}),
    "beit of shared biases": ("Beit", {"use_shared_rel_pos_bias": True, "global_pool": "token"}),
    "beit of both biases": (
        "Beit",
        {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "global_pool": "token"},
    ),
    "beit without biases": ("Beit", {"global_pool": "token"}),
}


def small(name: str, **changed: Any) -> Any:
    kind, options = MODELS[name]
    module = timm.models.eva if kind == "Eva" else timm.models.beit
    model = getattr(module, kind)(**{**SIZES, **options, **changed}).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("head") and parameter.ndim > 0 and "norm" not in name:
                parameter.normal_(std=3.0 if "bias_table" in name else 0.3)
        model.head.weight.normal_()
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def by_hand(model: Any, x: Tensor, kept: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Weights of the first block's attention, and logits if after it only the `kept` tokens (B, M) are left."""
    x, beit = model.patch_embed(x), hasattr(model, "rel_pos_bias")
    if beit:
        x, rope = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1), None
        x = x if model.pos_embed is None else x + model.pos_embed
    else:
        x, rope = model._pos_embed(x)
        x = model.norm_pre(x)
    rows, found = torch.arange(len(x))[:, None], []
    for number, block in enumerate(model.blocks):
        attention, normed = block.attn, block.norm1(x)
        heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in projected(attention, normed)]
        at = kept if number else torch.arange(x.shape[1]).expand(len(x), -1)
        bias = torch.zeros(())
        if beit:
            tables = [model.rel_pos_bias] if model.rel_pos_bias is not None else []
            whole = sum(table() for table in tables)
            if attention.relative_position_bias_table is not None:
                whole = whole + attention._get_rel_pos_bias()[0]
            if isinstance(whole, Tensor):
                bias = torch.stack([whole[:, one][:, :, one] for one in at])
        elif rope is not None:
            turns = rope[number] if model.rope_mixed else rope[None]
            turns = torch.stack([turns[:, one[first:] - first] for one in at])
            half = attention.rotate_half
            for i in range(2):
                turned = timm.layers.apply_rot_embed_cat(heads[i][:, :, first:], turns, half=half)
                heads[i] = torch.cat([heads[i][:, :, :first], turned], 2)
        query, key, value = heads
        weights = (query @ key.mT * query.shape[-1] ** -0.5 + bias).softmax(-1)
        found.append(weights)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        mixed = attention.proj(mixed if beit else attention.norm(mixed))
        x = x + (mixed if block.gamma_1 is None else block.gamma_1 * mixed)
        x = x[rows, kept] if number == 0 else x
        fed = block.mlp(block.norm2(x))
        x = x + (fed if block.gamma_2 is None else block.gamma_2 * fed)
    return found[0], model.forward_head(model.norm(x))


def projected(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    if attention.qkv is None:
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    parts, own = attention.qkv(x).chunk(3, -1), getattr(attention, "q_bias", None)
    return parts if own is None else (parts[0] + own, parts[1], parts[2] + attention.v_bias)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_blocks_run_on_the_tokens_that_are_left(name: str) -> None:
    model, x = small(name), images()
    whole, first = model(x), model.num_prefix_tokens
    weights, expected = by_hand(model, x, torch.arange(16 + first).expand(2, -1), first)
    close(whole, expected, 1e-10)
    attended = weights.mean(1)[:, 0, first:].topk(10, dim=1).indices.sort(1).values + first
    for method in METHODS:
        reduction = reduce_tokens(model, method, remove=0)
        assert torch.equal(model(x), whole)
        reduction.change(remove=[6, 0, 0])
        found = model(x)
        assert reduction.counts == [first + 10 + (method == "evit")] * 3 and not torch.allclose(found, whole)
        reduction.undo()
        assert torch.equal(model(x), whole)
        if method in ("attention", "random", "stride"):
            kept = reduction.tokens.origins
            close(found, by_hand(model, x, kept, first)[1], 1e-10)
            assert method != "attention" or torch.equal(kept[:, first:], attended)


@pytest.mark.parametrize("name", MODELS)
def test_merged_tokens_count_as_often_as_they_stand_for_a_patch(name: str) -> None:
    model, x = small(name), images()
    found = []
    for proportional in (True, False):
        reduction = reduce_tokens(model, "tome", remove=[6, 0, 0], proportional=proportional)
        found.append(model(x))
        reduction.undo()
    assert not torch.allclose(*found)


def test_twins_at_one_position_are_merged_without_a_trace() -> None:
    for name in ("dinov3", "beit"):
        model, x = small(name), images()[:1]
        x[..., 8:16], x[..., 24:] = x[..., :8], x[..., 16:24]  # each patch is there twice
        with torch.no_grad():
            if name == "beit":
                for block in model.blocks:
                    block.attn.relative_position_bias_table[:] = 0.5
            else:
                model.rope = None
        whole = model(x)
        reduction = reduce_tokens(model, "tome", remove=[8, 0, 0])
        close(model(x), whole, 1e-10)
        assert sorted(reduction.tokens.sizes[0, model.num_prefix_tokens :].tolist()) == [2.0] * 8


@torch.no_grad()
def test_torch_compile_follows_blocks_with_biases_of_tokens_that_are_left() -> None:
    model = small("beit")
    reduce_tokens(model, "stride", remove=[4, 0, 0])
    x = model.blocks[0](torch.randn(2, 17, model.embed_dim, dtype=torch.float64))
    assert x.shape[1] == 13
    close(torch.compile(model.blocks[1], backend="eager")(x), model.blocks[1](x), 1e-10)


def test_a_merged_token_counts_in_the_average_of_patches() -> None:
    for name in ("eva02", "beit"):
        model, x = small(name, global_pool="avg"), images()
        reduction = reduce_tokens(model, "tome", remove=2)
        assert model.forward_features(x).shape[1] == 17 and reduction.counts == [15, 13, 11]


def test_copies_are_independent_and_other_blocks_are_refused() -> None:
    for name in ("eva02", "beit"):
        model, x = small(name), images()
        whole = model(x)
        reduction = reduce_tokens(model, "tome", remove=1)
        fewer = model(x)
        for copied, own in (copy.deepcopy((model, reduction)), pickle.loads(pickle.dumps((model, reduction)))):
            assert torch.equal(copied(x), fewer)
            own.undo()
            assert torch.equal(copied(x), whole)
    refused("a EvaBlockPostNorm", reduce_tokens, small("eva02", use_post_norm=True), "tome", remove=1)
    refused("a mask", model_of_eva(), images(), attn_mask=torch.ones(17, 17, dtype=torch.bool))


def model_of_eva() -> Any:
    model = small("eva02")
    reduce_tokens(model, "tome", remove=1)
    return model.forward_features
