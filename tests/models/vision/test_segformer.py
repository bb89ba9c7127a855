"""SegFormer and its mix transformer: the paper's sizes, and the outputs of transformers' model with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import close, refused, shaken

from regard.models.vision import create_backbone
from regard.models.vision.segmentation import create_segmenter

transformers = pytest.importorskip("transformers")

WIDTHS, DEPTHS = (8, 12, 16, 20), (1, 2, 1, 1)


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    """A small transformers SegFormer whose norms have the official code's epsilon."""
    config = transformers.SegformerConfig(
        hidden_sizes=list(WIDTHS),
        depths=list(DEPTHS),
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=12,
        num_labels=5,
        attn_implementation="sdpa",
    )
    model = shaken(transformers.SegformerForSemanticSegmentation(config)).double().eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm) and not {"patch_embeddings", "attention"} & set(name.split(".")):
            module.eps = 1e-6
    return model


@pytest.fixture(scope="module")
def released(theirs: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Its weights as saved in a file."""
    folder = tmp_path_factory.mktemp("segformer")
    theirs.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def options(**more: Any) -> dict[str, Any]:
    return {"widths": WIDTHS, "depths": DEPTHS, "heads": (1, 2, 2, 4), "image_size": 64, **more}


def test_outputs_of_transformers_on_shared_weights(theirs: torch.nn.Module, released: dict[str, torch.Tensor]) -> None:
    model = create_segmenter("segformer_b0", num_classes=5, decoder_width=12, **options()).double().eval()
    model.load_released(released)
    again = create_segmenter("segformer_b0", num_classes=5, decoder_width=12, **options()).double()
    again.load_released(theirs.state_dict())  # names in a model differ from those in its file
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(images).logits
        close(model.forward_coarse(images), expected)
        assert model(images).shape == (2, 5, 64, 96)


def test_maps_of_the_encoder_are_those_of_transformers_and_load_by_the_official_names(
    theirs: torch.nn.Module, released: dict[str, torch.Tensor]
) -> None:
    model = create_backbone("mit_b0", num_classes=0, **options()).double().eval()
    model.load_released({name: value for name, value in released.items() if name.startswith("segformer.")})
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.segformer(images, output_hidden_states=True).hidden_states
        maps = model.forward_intermediates(images, intermediates_only=True)
    for found, wanted in zip(maps, expected, strict=True):
        close(found, wanted)
    official = create_backbone("mit_b0", num_classes=0, **options()).double()
    official.load_released(_official(model.state_dict()))
    for name, value in official.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    head = {"weight": torch.zeros(7, 20), "bias": torch.zeros(7)}
    classifying = {name: value for name, value in released.items() if name.startswith("segformer.")}
    classifying |= {f"classifier.{name}": value for name, value in head.items()}
    with_head = _official(model.state_dict()) | {f"head.{name}": value for name, value in head.items()}
    segmenter = create_segmenter("segformer_b0", **options()).double()
    for encoder in (with_head, classifying, released):
        segmenter.encoder = create_backbone("mit_b0", num_classes=0, **options()).double()
        segmenter.load_encoder(encoder)
        for name, value in segmenter.encoder.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name


def _official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the official code's names; it has keys and values in one projection."""
    found: dict[str, torch.Tensor] = {}
    parts = {"attention.query": "attn.q", "attention.output": "attn.proj", "reduction_norm": "attn.norm"}
    parts |= {"reduction": "attn.sr", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2", "mlp.depthwise": "mlp.dwconv.dwconv"}
    for name, value in state.items():
        _, stage, rest = name.split(".", 2)
        number = int(stage) + 1
        if rest.startswith("embedding"):
            which, end = rest.rsplit(".", 1)
            found[f"patch_embed{number}.{'norm' if which == 'embedding_norm' else 'proj'}.{end}"] = value
        elif rest.startswith("norm."):
            found[f"norm{number}.{rest[5:]}"] = value
        else:
            _, block, part = rest.split(".", 2)
            which, end = part.rsplit(".", 1)
            begin = f"block{number}.{block}"
            if which == "attention.key":
                found[f"{begin}.attn.kv.{end}"] = torch.cat([value, state[name.replace(".key.", ".value.")]])
            elif which != "attention.value":
                found[f"{begin}.{parts.get(which, which)}.{end}"] = value
    return found


def test_other_mechanisms_and_sizes() -> None:
    model = create_segmenter("segformer_nano", channels=1, num_classes=3, plan=["linear", "linear", "softmax"])
    assert model(torch.randn(2, 1, 32, 64)).shape == (2, 3, 32, 64)
    refused("multiples of 16|multiples of 8", model, torch.randn(1, 1, 36, 64))
    refused("decoder_width", create_segmenter, "segformer_nano", decoder_width=0)
    refused("a number for each stage", create_segmenter, "segformer_nano", depths=(1, 1))
    refused("class_token=True in a mix transformer", create_backbone, "mit_nano", class_token=True)
