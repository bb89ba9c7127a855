"""DynamicViT and IA-RED² around models of timm and in folders: as around the same model here, and what they kept."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import answer
from support import close, refused
from torch import Tensor

import regard
from regard.compression import load_compressed
from regard.compression.tokens import (
    DynamicTransformer,
    InterpretedTransformer,
    reduce_tokens,
    train_dynamic,
    train_interpreters,
)
from regard.compression.tokens.hosts import host_of
from regard.compression.tokens.reducers import DROPPED
from regard.compression.tokens.trained import ChoosingTransformer
from regard.models import save_pretrained
from regard.models.vision.tnt import TNT, TNTConfig
from regard.models.vision.vit import VisionTransformer, VisionTransformerConfig

timm = pytest.importorskip("timm")
SMALL: dict[str, Any] = {"image_size": 32, "patch": 8, "dim": 12, "num_layers": 3, "num_heads": 2, "num_classes": 5}
PATCHES = 16
TINY_TNT: dict[str, Any] = {
    "image_size": 32,
    "patch": 8,
    "stride": 4,
    "width": 12,
    "heads": 2,
    "inner_width": 6,
    "inner_heads": 2,
    "depth": 3,
    "num_classes": 5,
}
KINDS = {"dynamicvit": DynamicTransformer, "ia_red2": InterpretedTransformer}
VIT, DISTILLED = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
AVERAGED = {"global_pool": "avg", "fc_norm": False}
HEADS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "class": (VIT, {}, {}),
    "distilled": (DISTILLED, {}, {"distillation_token": True}),
    "mean": (VIT, AVERAGED | {"class_token": False}, {"pool": "mean"}),
    "mean beside a class token": (VIT, AVERAGED, {}),
}
"""For each head its name and options in timm, and options here."""


def of_timm(name: str = VIT, **changed: Any) -> Any:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.create_model(name, **sizes, **changed).double().eval()


def choosing(method: str, host: Any) -> Any:
    """A model that keeps other patches in each image."""
    asked = {"query": "policy"} if method == "ia_red2" and not host_of(host).class_token else {}
    model = KINDS[method](host, **asked).double().eval()
    for name, parameter in model.named_parameters():
        if not name.startswith("model."):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", KINDS)
def test_a_model_of_timm_keeps_the_same_patches_as_the_same_model_here(method: str, head: str) -> None:
    name, options, config = HEADS[head]
    other = of_timm(name, **options)
    own = VisionTransformer(VisionTransformerConfig(**SMALL, **config)).double().eval()
    if head == "mean beside a class token":
        own.reset_classifier(5, "avg")
    own.load_released(other.state_dict())
    models = choosing(method, own), choosing(method, other)
    choosers = getattr(models[0], models[0].choosers).state_dict()
    getattr(models[1], models[1].choosers).load_state_dict(choosers)
    x = images()
    close(models[1](x), models[0](x))
    places = [model.tokens.places for model in models]
    first = models[0].host.protected
    assert torch.equal(*places) and (places[0][:, :first] == torch.arange(first)).all()
    for masked in (
        ({"sampled": False}, {"generator": torch.Generator().manual_seed(0)}) if method == "dynamicvit" else ({},)
    ):
        found = []
        for model in models:
            given = {name: value.manual_seed(0) if name == "generator" else value for name, value in masked.items()}
            result: Any = model.forward_masked(x, **given)
            found.append(result[0] if isinstance(result, tuple) else result.logits)
        close(found[1], found[0])


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("method", KINDS)
def test_registers_stay_and_are_no_part_of_an_average(method: str, class_token: bool) -> None:
    host, x = of_timm(reg_tokens=2, class_token=class_token, global_pool="avg"), images()
    model = choosing(method, host)
    model.threshold = 0.4
    logits, first = model(x), 2 + class_token
    masked: Any = model.forward_masked(x, **({"sampled": False} if method == "dynamicvit" else {}))
    close(logits, masked.logits if method == "dynamicvit" else masked[0], 1e-4)
    tokens = model.tokens
    assert (tokens.places[:, :first] == torch.arange(first)).all() and tokens.protected == first
    kept, features = tokens.sizes.clone(), host.norm(tokens.x)
    kept[:, :first] = 0
    pooled = (features * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
    close(logits, host.head(host.fc_norm(pooled)))
    if not class_token:
        refused("try query='policy'", InterpretedTransformer, host)


def test_norms_and_gates_of_timms_attention_are_in_a_pass_under_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.compression.tokens.dynamic.EPS", 0.0)
    other = of_timm(qk_norm=True, scale_attn_norm=True, init_values=0.5)
    for block in other.blocks:
        block.attn.gate = torch.nn.Linear(12, 12).double()
    model, x = choosing("dynamicvit", other), images()
    close(model(x), model.forward_masked(x, sampled=False).logits)


@pytest.mark.parametrize("method", KINDS)
def test_places_of_patches_are_those_that_were_kept(method: str) -> None:
    model, x = choosing(method, VisionTransformer(VisionTransformerConfig(**SMALL))), images(8)
    model(x)
    tokens = model.tokens
    if method == "dynamicvit":
        kept = torch.zeros(8, PATCHES, dtype=torch.bool).scatter(1, model.forward_dropping(x)[1][-1], True)
    else:
        kept = model.forward_masked(x)[1][-1].stays[:, 1:]
        assert len(set(kept.sum(1).tolist())) > 1
    assert torch.equal(tokens.places[:, 1:] != DROPPED, kept)
    for row in range(8):
        left = tokens.places[row][tokens.places[row] != DROPPED]
        assert left.tolist() == list(range(1 + int(kept[row].sum()))) and int(tokens.sizes[row].sum()) == len(left)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again(x[:1])
        assert len(again.tokens.places) == 1 and len(model.tokens.places) == 8


@pytest.mark.parametrize("method", KINDS)
def test_around_a_model_of_timm_they_are_trained_saved_and_scored(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = pytest.importorskip("PIL.Image")
    model, x = choosing(method, of_timm()).float(), images().float()
    before = copy.deepcopy(model.state_dict())
    batch = x[:2], torch.tensor([0, 1])
    if method == "dynamicvit":
        train_dynamic(model, lambda step: batch, steps=1)
    else:
        train_interpreters(model, lambda step: batch, policy_steps=1, block_steps=1)
        assert model.heat_map(x).shape == (4, 4, 4)
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"model", model.choosers}
    expected = model.eval()(x)
    model.save(tmp_path / "saved")
    found: Any = load_compressed(tmp_path / "saved")
    assert type(found) is type(model) and found.options == model.options and torch.equal(found(x), expected)
    with pytest.raises(RuntimeError, match="compressed_by_regard"):
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    for label in map(str, range(5)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        picture.new("RGB", (32, 32), (50 * int(label), 0, 90)).save(tmp_path / "photos" / label / "0.png")
    scored = answer(capsys, "evaluate", tmp_path / "saved", tmp_path / "photos")
    assert scored["metric"] == "accuracy" and scored["items"] == 5
    regard.compress(model, "int8").save(tmp_path / "small")
    close(load_compressed(tmp_path / "small")(x), model(x), 1e-6)


@pytest.mark.parametrize("method", KINDS)
def test_around_a_model_here_they_are_saved_alone_or_in_an_image_model(method: str, tmp_path: Path) -> None:
    routed = [("mixture_of_heads", {"shared_heads": 1})] * 3
    config = VisionTransformerConfig(**SMALL | {"num_heads": 4}, plan=routed, distillation_token=True)
    model, x = choosing(method, VisionTransformer(config)), images()
    expected = model(x)
    model.save(tmp_path)
    found: Any = load_compressed(tmp_path)
    assert found.backbone.options == model.options and torch.equal(found.backbone(x), expected)
    cut = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    assert torch.equal(found(cut).output, expected)
    save_pretrained(found, tmp_path / "again")
    again: Any = load_compressed(tmp_path / "again")
    assert torch.equal(again(cut).output, expected)
    refused(r"its save\(folder\)", save_pretrained, model, tmp_path)
    record = json.loads((tmp_path / "again" / "config.json").read_text())
    assert record["tokens"] == model.tokens_record


@pytest.mark.parametrize("pool", ["class", "mean"])
@pytest.mark.parametrize("method", KINDS)
def test_around_a_tnt_they_are_trained_and_saved(method: str, pool: str, tmp_path: Path) -> None:
    model, x = choosing(method, TNT(TNTConfig(**TINY_TNT, pool=pool, vanilla=(1,)))), images()
    before, batch = copy.deepcopy(model.state_dict()), (x[:2], torch.tensor([0, 1]))
    if method == "dynamicvit":
        train_dynamic(model, lambda step: batch, steps=1)
    else:
        train_interpreters(model, lambda step: batch, policy_steps=1, block_steps=1)
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"model", model.choosers}
    model.save(tmp_path)
    found: Any = load_compressed(tmp_path)
    assert found.backbone.options == model.options and torch.equal(found.backbone(x), model(x))


def test_a_head_that_the_config_does_not_tell_is_not_saved(tmp_path: Path) -> None:
    averaging = VisionTransformer(VisionTransformerConfig(**SMALL))
    averaging.reset_classifier(5, "avg")
    for method in KINDS:
        refused("global_pool='avg'", choosing(method, averaging).save, tmp_path)


def test_hosts_that_do_not_fit_are_refused() -> None:
    unpooled = VisionTransformer(VisionTransformerConfig(**SMALL))
    unpooled.reset_classifier(0, "")
    neither = "whose head reads neither a class token nor the average of the patches"
    for words, host in (
        (neither, of_timm(global_pool="max")),
        (neither, of_timm(global_pool="avg", pool_include_prefix=True)),
        ("that drops patches at random", of_timm(patch_drop_rate=0.5)),
        ("with a ResPostBlock", of_timm(block_fn=timm.models.vision_transformer.ResPostBlock)),
        ("fewer tokens in a Linear", torch.nn.Linear(2, 2)),
        ("without a pool", unpooled),
    ):
        for kind in KINDS.values():
            refused(words, kind, host)
    swapped = of_timm()
    regard.swap(swapped, "linear")
    for host in (of_timm(), VisionTransformer(VisionTransformerConfig(**SMALL))):
        reduce_tokens(host, "tome", remove=1)
        refused("second reduction", DynamicTransformer, host)
    refused("Block of VisionAttention", InterpretedTransformer, swapped)
    model: ChoosingTransformer = DynamicTransformer(of_timm())
    refused("fewer tokens in a DynamicTransformer", reduce_tokens, model, "tome", remove=1)
