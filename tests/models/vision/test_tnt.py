"""Transformer in Transformer: parity with the official code and timm, and the information flow of words and sentences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, load, recorded_state, refused, shaken
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from regard.contract import Context
from regard.core.grids import tokens_of
from regard.models.vision import create_backbone
from regard.models.vision.tnt import TNT, TNTConfig, TransformerBlock, cut, on_grid

SMALL: dict[str, Any] = {
    "patch": 8,
    "stride": 4,
    "width": 12,
    "heads": 3,
    "inner_width": 6,
    "inner_heads": 2,
    "depth": 2,
    "num_classes": 5,
    "image_size": (16, 24),
}


def small(**options: Any) -> TNT:
    return shaken(TNT(TNTConfig(**{**SMALL, **options}))).eval()


def random_images(**options: Any) -> Tensor:
    return torch.randn(2, 3, 16, 24, dtype=torch.float64)


def inner_words(model: TNT, images: Tensor) -> list[Tensor]:
    """The words (B, n, m, c) before the first block and after each block."""
    seen = [model.embed(images)[0]]
    hooks = [block.register_forward_hook(lambda module, given, found: seen.append(found[0])) for block in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    return [words.unflatten(0, (len(images), -1)) for words in seen]


@pytest.mark.parametrize(
    ("name", "options"),
    [("vision_tnt", {"excitation": True}), ("vision_tnt_timm", {}), ("vision_tnt_legacy", {"legacy": True})],
)
def test_outputs_of_the_official_code_and_of_timm(name: str, options: dict[str, Any]) -> None:
    recording, model = load(name), small(**options)
    model.load_released(recorded_state(name))
    with torch.no_grad():
        features, maps = model.forward_intermediates(recording["images"].double())
        close(model.forward_head(features), recording["output"])
    for level, found in enumerate(maps):
        close(tokens_of(found), recording[f"map{level}"][:, 1:])


def test_names_of_the_official_code_and_of_timm_mean_the_same_weights() -> None:
    state, model = recorded_state("vision_tnt_timm"), small()
    names = {
        "pixel_embed": "patch_embed", "norm1_proj": "proj_norm1", "norm2_proj": "proj_norm2", "pixel_pos": "inner_pos",
        "patch_pos": "outer_pos", "norm_in": "inner_norm1", "attn_in": "inner_attn", "norm_mlp_in": "inner_norm2",
        "mlp_in": "inner_mlp", "norm_out": "outer_norm1", "attn_out": "outer_attn", "norm_mlp": "outer_norm2",
        "mlp": "outer_mlp",
    }  # fmt: skip
    official = {".".join(names.get(part, part) for part in name.split(".")): x for name, x in state.items()}
    official["inner_pos"] = official["inner_pos"].flatten(2).mT
    official["outer_tokens"] = torch.zeros(1, 6, 12)
    found, expected = (TNT.translate(each, model.config) for each in (official, state))
    assert found.keys() == expected.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_operations_are_those_of_the_paper_s_formula() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = create_backbone("tnt_s", depth=1)
        model(torch.empty(1, 3, 224, 224))
    n, m, c, d = 196, 16, 24, 384
    block = n * (12 * m * c**2 + 2 * m**2 * c) + n * m * c * d + 12 * (n + 1) * d**2 + 2 * (n + 1) ** 2 * d
    before_and_after = n * m * c * (3 * 49) + n * m * c * d + d * 1000
    assert counter.get_total_flops() == 2 * (block + before_and_after)
    assert 12 * block + before_and_after == pytest.approx(5.2e9, rel=0.01)


def test_without_the_fusion_s_norm_sentences_are_those_of_a_vision_transformer() -> None:
    model, images = small(), random_images()
    with torch.no_grad():
        for block in model.blocks:
            block.fusion.norm2.weight.zero_()
            block.fusion.norm2.bias.zero_()
    z = model.embed(images)[1]
    for block in model.blocks:
        outer = block.outer
        heads = [
            projection(outer.norm1(z)).unflatten(2, (3, 4)).transpose(1, 2)
            for projection in (outer.attention.query, outer.attention.key, outer.attention.value)
        ]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        z = z + outer.attention.output(mixed)
        z = z + outer.mlp.down(F.gelu(outer.mlp.up(outer.norm2(z))))
    close(model.forward_features(images), model.norm(z))


def test_vanilla_blocks_have_no_words() -> None:
    model, images = small(vanilla=(1,)), random_images()
    assert model.blocks[1].inner is None and model.blocks[1].fusion is None
    words = inner_words(model, images)
    assert torch.equal(words[1], words[2])
    assert not torch.equal(words[0], words[1])


def test_words_depend_on_the_pixels_of_their_patch_alone() -> None:
    model, images = small(), random_images()
    changed = images.clone()
    changed[:, :, 8:, 8:16] += torch.randn(2, 3, 8, 8)  # patch 4 of the 2 x 3 patches
    for before, after in zip(inner_words(model, images), inner_words(model, changed), strict=True):
        moved = (before != after).any(-1).any(-1).any(0)
        assert moved.tolist() == [False] * 4 + [True, False]


def test_patches_permuted_with_their_positions_give_sentences_permuted() -> None:
    model, images = small(), random_images()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    features, logits = model.forward_features(images), model(images)
    patches = cut(images, 8).unflatten(0, (2, 6))[:, order].unflatten(1, (2, 3))
    shuffled = patches.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    with torch.no_grad():
        model.outer_positions[:, 1:] = model.outer_positions[:, 1:][:, order].clone()
    close(model.forward_features(shuffled)[:, 1:], features[:, 1:][:, order])
    close(model(shuffled), logits)
    assert (model(images) - logits).abs().max() > 1e-3  # positions do matter


def test_words_reach_every_sentence_but_not_the_class_token_and_change_nothing_in_place() -> None:
    model = small()
    words, sentences = model.embed(random_images())
    kept, seen = sentences.clone(), []
    block = model.blocks[0]
    block.outer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    block(words, sentences, None)[1].sum().backward()  # goes through the slice
    assert torch.equal(sentences, kept)
    assert torch.equal(seen[0][:, 0], kept[:, 0])
    added = block.fusion(block.inner(words), (2, 6))
    assert torch.equal(seen[0][:, 1:], kept[:, 1:] + added)


def test_one_word_a_patch_attends_to_itself() -> None:
    model = small(stride=8)
    words = model.embed(random_images())[0]
    assert words.shape == (12, 1, 6)
    inner = model.blocks[0].inner
    attention, normed = inner.attention, inner.norm1(words)
    close(attention(normed).output, attention.output(attention.value(normed)))


def test_words_of_one_colour_differ_at_the_border_of_their_patch_alone() -> None:
    model = small(patch=16, image_size=16, positions="outer", inner_width=4)
    colour = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    words = model.embed(colour.expand(1, 3, 16, 16))[0].view(4, 4, 4)
    inside, above, beside, corner = words[1:, 1:], words[0, 1:], words[1:, 0], words[0, 0]
    for alike in (inside.flatten(0, 1), above, beside):
        close(alike, alike[:1].expand(alike.shape))
    kinds = torch.stack([inside[0, 0], above[0], beside[0], corner])
    assert torch.cdist(kinds, kinds)[~torch.eye(4, dtype=torch.bool)].min() > 1e-3


@pytest.mark.parametrize(
    ("options", "tables"),
    [
        ({"positions": "none"}, {"class_token"}),
        ({"positions": "inner"}, {"class_token", "inner_positions"}),
        ({"pool": "mean"}, {"inner_positions", "outer_positions"}),
        ({"pool": "mean", "mixer": "large_kernel", "positions": "outer"}, {"outer_positions"}),
        (
            {"mixer": "linear", "mixer_options": {"feature_map": "elu"}},
            {"class_token", "inner_positions", "outer_positions"},
        ),
    ],
)
def test_other_positions_pools_and_mixers(options: dict[str, Any], tables: set[str]) -> None:
    model, images = small(**options), random_images()
    assert model.no_weight_decay() == tables
    logits = model(images)
    logits.square().sum().backward()
    assert all(x.grad is not None and bool(x.grad.abs().sum() > 0) for x in model.parameters())
    again = small(**options)
    again.load_released(model.state_dict())
    assert torch.equal(again(images), logits)
    if options.get("pool") == "mean":
        close(
            model.forward_head(model.forward_features(images), pre_logits=True), model.forward_features(images).mean(1)
        )


def test_tables_of_another_size_are_interpolated_and_the_class_token_s_row_is_kept() -> None:
    old, new = small(image_size=32), small(image_size=(64, 24))
    state = old.state_dict()
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    state["outer_positions"][0, 1:, 0] = (rows + 10 * columns).flatten().double()
    new.load_released(state)
    table = new.outer_positions.detach()
    assert torch.equal(table[:, 0], state["outer_positions"][:, 0])
    plane = table[0, 1:, 0].view(8, 3)
    # in the interior a plane stays a plane; shrinking columns are averaged first
    close(plane[3:5, 1], torch.tensor([16.25, 16.75], dtype=torch.float64), 1e-6)
    for name in ("inner_positions", "words.weight"):
        assert torch.equal(new.state_dict()[name], state[name])
    refused("square tables", on_grid, torch.zeros(1, 6, 2), (4, 4))


def test_linear_maps_begin_small_and_a_mechanism_s_own_as_it_wants() -> None:
    model = TNT(TNTConfig(**{**SMALL, "width": 96, "inner_width": 12, "mixer": "delta_rule"}))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in linears.items():
        own = ".outer.attention." in name
        assert (abs(float(module.weight.detach().std()) / 0.02 - 1) < 0.2) != own, name
        assert own or module.bias is None or not module.bias.any(), name
    assert linears["blocks.0.inner.attention.output"].bias is not None
    for name in model.no_weight_decay():
        assert abs(float(getattr(model, name).detach().std()) / 0.02 - 1) < 0.3
    assert float(model.words.weight.detach().std()) > 0.03


@pytest.mark.parametrize("option", ["branch_dropout", "attention_dropout", "drop_path"])
@pytest.mark.parametrize("family", ["tnt", "pyramid_tnt"])
def test_what_is_dropped_is_dropped_in_training_alone(family: str, option: str) -> None:
    stages = {"widths": 16, "heads": 2, "inner_widths": 4, "inner_heads": 2, "depths": 1}
    sizes = SMALL if family == "tnt" else {"image_size": 32} | {name: (value,) * 4 for name, value in stages.items()}
    model = shaken(create_backbone(f"{family}_s", **sizes, **{"drop_path": 0.0, option: 0.5}))
    blocks = [part for part in model.modules() if isinstance(part, TransformerBlock)]
    blocks = blocks[-1:] if option == "drop_path" else blocks
    for block in blocks:
        torch.nn.init.zeros_(block.mlp.down.weight)
        torch.nn.init.zeros_(block.mlp.down.bias)  # leaves only the attention branch
        tokens = torch.randn(40, 16, block.mlp.up.in_features, dtype=torch.float64)
        context = Context(grid=(4, 4))
        assert torch.equal(block.eval()(tokens, context), block(tokens, context))
        assert not torch.allclose(block.train()(tokens, context), block(tokens, context))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("multiples of 8", {"image_size": 20}),
        ("a divisor of the patch", {"stride": 3}),
        ("both, inner, outer, none", {"positions": "outside"}),
        ("class, mean", {"pool": "token"}),
        ("0 to 1", {"vanilla": (2,)}),
        ("heads of equal whole widths", {"heads": 5}),
        ("pool='mean'", {"mixer": "large_kernel"}),
        ("kinds attention, mixer and wrapper", {"mixer": "low_rank_pooling"}),
        ("which inserts tokens, in an image backbone", {"mixer": "landmark"}),
    ],
)
def test_what_cannot_be_is_refused(words: str, options: dict[str, Any]) -> None:
    refused(words, small, **options)


def test_images_of_another_size_are_refused() -> None:
    refused("16 x 24, the size of the table", small(), torch.zeros(1, 3, 24, 16, dtype=torch.float64))
