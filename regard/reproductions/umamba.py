"""U-Mamba (Ma, Li & Wang, arXiv 2401.04722; medical survey, arXiv 2406.03430): Mamba inside of a U-Net sees far.

The paper: U-Mamba is better than networks of convolutions, the U-Net that it is made from among them, and than transformers, on
organs in CT and MR, instruments and cells (abstract).

Here: scenes of 64 x 64 pixels with one to three ellipses in noise, drawn anew for each batch. With the far cue all ellipses look
alike, and their class is told by a small square in one of the corners, at least 16 pixels away; without it, by their own
brightness. Networks of four stages and about 270,000 parameters, equal to 3 %: the U-Net is wider in its last stage by what
Mamba has. VM-UNet scans along one path or along four, at equal parameters. Trained alike, without deep supervision and
augmentation. The score is the mean Dice coefficient over 200 scenes; shapes without classes would have about 0.5.

What might hide a difference: the norms over a whole map carry a number for each channel from everywhere to everywhere, and
at 8 x 8 places of the last stage a few convolutions reach a corner.
"""

from typing import Any

from regard.contract import Paper
from regard.models import build_model
from regard.models.segmentation_model import SegmentationModelConfig
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import cached_task, trained_score

TRAINING = {"steps": 800, "batch_size": 8, "learning_rate": 3e-3, "items": 200, "size": 64}
WIDTHS = {"unet_nano": [12, 24, 48, 60], "umamba_bot_nano": [12, 24, 48, 48], "umamba_enc_nano": [12, 24, 48, 48]}
"""Of each stage, for 266,385, 268,077 and 274,413 parameters with one channel and three classes."""
NETWORKS: dict[str, dict[str, Any]] = {
    "U-Net": {"network": "unet_nano", "options": {"widths": WIDTHS["unet_nano"]}},
    "bottleneck": {"network": "umamba_bot_nano", "options": {"widths": WIDTHS["umamba_bot_nano"]}},
    "encoder": {"network": "umamba_enc_nano", "options": {"widths": WIDTHS["umamba_enc_nano"]}},
    "four paths": {"network": "vm_unet_nano", "options": {"widths": [20, 40, 80]}},
    "one path": {
        "network": "vm_unet_nano",
        "options": {"widths": [20, 40, 80], "mixer": {"scan": "forward", "copies": 4}},
    },
}
PAPER = Paper("U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation", "2401.04722", 2024, 52)


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    task = cached_task("segmentation", data=setting["data"], size=setting["size"], evaluation_items=setting["items"])
    config = SegmentationModelConfig.for_task(task, setting["network"], setting["options"])
    return {**trained_score(build_model(config), task, setting, seed)}


REPRODUCTION = Reproduction(
    name="umamba",
    mechanisms=("mamba", "bidirectional_mamba"),
    source=PAPER,
    claim="Mamba in a U-Net segments better than the U-Net where what decides is far away, at equal parameters.",
    instead=(
        "Ellipses in scenes of 64 x 64 whose class is told by a mark in a corner, and without that mark: U-Net, Mamba in its "
        "bottleneck and in its encoder, and VM-UNet on one path and on four, all of about 270,000 parameters."
    ),
    settings={
        f"{name}, {cue} cue": TRAINING | NETWORKS[name] | {"data": f"{cue}-cue"}
        for cue, names in (("far", tuple(NETWORKS)), ("near", ("U-Net", "bottleneck", "four paths", "one path")))
        for name in names
    },
    run_cell=run_cell,
    checks=(
        Check(
            "far cue: Mamba in the bottleneck above the U-Net by 0.02",
            minus("bottleneck, far cue", "U-Net, far cue"),
            above=0.02,
        ),
        Check(
            "far cue: Mamba in the encoder above the U-Net by 0.02",
            minus("encoder, far cue", "U-Net, far cue"),
            above=0.02,
        ),
        Check("far cue: four paths above one", minus("four paths, far cue", "one path, far cue"), above=0.0),
        Check(
            "near cue: the bottleneck within 0.03 of the U-Net or better",
            minus("bottleneck, near cue", "U-Net, near cue"),
            above=-0.03,
        ),
    ),
    needs=(
        Check("near cue: the U-Net learns the shapes, above 0.8", measured("U-Net, near cue", "score"), above=0.8),
        Check("near cue: one path learns the shapes, above 0.6", measured("one path, near cue", "score"), above=0.6),
        Check(
            "far cue: Mamba in the bottleneck learns the classes, above 0.6",
            measured("bottleneck, far cue", "score"),
            above=0.6,
        ),
    ),
    left_out=(
        "organs, instruments and cells: no such images in any package; a head with its tissues is the reproduction umamba_heads",
        "volumes, deep supervision and the thousand epochs of nnU-Net: out of reach",
    ),
    smoke={"steps": 2, "batch_size": 2, "items": 4, "size": 32},
    seconds=200,
)
