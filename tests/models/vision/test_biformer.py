"""BiFormer: the released models stage by stage, and the options of the published sizes."""

from __future__ import annotations

import pytest
import torch
from support import close, load, recorded_state, refused

from regard.models.vision import create_backbone
from regard.models.vision.biformer import BiFormer, BiFormerConfig

TINY = {
    "widths": (16, 16, 24, 32),
    "depths": (1, 1, 2, 1),
    "top": (1, 2, 3, 0),
    "windows": 2,
    "head_dim": 8,
    "num_classes": 5,
    "image_size": (32, 64),
}
SWIN = {"layout": "swin", "expansion": 4}


@pytest.mark.parametrize(("name", "options"), [("biformer", {}), ("biformer_stl", SWIN)])
def test_the_authors_model_has_the_same_outputs_with_the_same_weights(name, options):
    """Maps of every stage, logits in evaluation mode, and logits with batch statistics."""
    recording = load(f"vision_{name}")
    model = BiFormer(BiFormerConfig(**TINY, **options)).double()
    model.load_released(recorded_state(f"vision_{name}"))
    images = recording["images"].double()
    output = model.eval()(images)
    close(output, recording["output"])
    for level, found in enumerate(model.forward_intermediates(images, intermediates_only=True)):
        close(found.mean(1), recording[f"map{level}"])
    own = model.state_dict()
    model.load_released({key: value.clone() for key, value in own.items()})
    assert torch.equal(model(images), output)
    close(model.train()(images), recording["training"])


def test_the_last_stage_reads_every_token_with_eight_heads_and_other_stages_route():
    """In the last stage scores are scaled by the head's width, and the local convolution reads the layer's input."""
    with torch.device("meta"):
        *routed, last = (stage.blocks[0].attention for stage in create_backbone("biformer_t").stages)
    assert [(x.config.windows, x.config.top, x.num_heads, x.config.scale_by) for x in routed] == [
        (7, top, heads, "dim") for top, heads in ((1, 2), (4, 4), (16, 8))
    ]
    assert all(x.query.bias is not None and x.config.lce_of == "value" for x in routed)
    assert (last.config.windows, last.num_heads, last.config.scale_by, last.config.lce_of) == (
        1,
        8,
        "head_dim",
        "input",
    )
    assert last.query.bias is last.key.bias is last.value.bias is None
    assert last.output.bias is not None


@pytest.mark.parametrize("size", [(1, 1), (45, 70), (33, 224)])
def test_any_size_of_image_is_taken(size):
    model = BiFormer(BiFormerConfig(**TINY)).eval()
    assert model(torch.randn(1, 3, *size)).shape == (1, 5)


def test_what_cannot_be_built_or_taken_is_refused():
    refused(
        "from 32 in steps of 1; try 32 x 64 pixels", BiFormer(BiFormerConfig(**TINY, **SWIN)), torch.randn(1, 3, 31, 64)
    )
    refused("multiples of 8", BiFormerConfig, widths=(12, 16, 24, 32), head_dim=8)
    refused("multiples of 8", BiFormerConfig, widths=(12, 16, 24, 36), head_dim=4)
    refused("a number for each stage", BiFormerConfig, top=(1, 2))
    refused("swin", BiFormerConfig, layout="swim")
