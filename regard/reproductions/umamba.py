"""U-Mamba (Ma, Li & Wang, arXiv 2401.04722; medical survey, arXiv 2406.03430): Mamba inside a U-Net sees far.

The paper: U-Mamba is better than convolutional networks, including the U-Net that it is based on, and than
transformers, on organs in CT and MR, instruments and cells (abstract).

Here: scenes of 64 x 64 pixels with one to three ellipses in noise, drawn anew for each batch. With the far cue all
ellipses look alike, and a small square in one of the corners gives their class; without it, their own brightness does.
Ellipses are at least 16 pixels away from the border. There are networks with two stages, whose convolutions see 15
pixels far, and with four, which see the whole scene; for each, a U-Net and a U-Mamba with equal parameters (within 3
%): the U-Net's last stage is wider to make up for Mamba. VM-UNet scans along one path or along four, with equal
parameters. All are trained alike, without deep supervision or augmentation. The score is the mean Dice coefficient over
200 scenes; segmenting the shapes without their classes gives about 0.5.

In every network here, norms over a whole map carry one number per channel from everywhere to everywhere: a path for a
single far cue that the paper does not mention. Therefore some scenes have a mark in each corner, which only concerns
the ellipse in its quarter.

In pilots with one seed and 300 steps and one far cue, the U-Net and Mamba in its bottleneck had 0.97 with four stages;
with two, the U-Net had 0.97 and Mamba 0.94: norms are enough there. With a mark for each quarter, neither network with
two stages knew the classes after 160 steps (0.47 and 0.49): the test is whether Mamba learns them in 800.
"""

from typing import Any

from regard.contract import Paper
from regard.models import build_model
from regard.models.segmentation_model import SegmentationModelConfig
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import cached_task, trained_score

TRAINING = {"steps": 800, "batch_size": 8, "learning_rate": 3e-3, "items": 200, "size": 64}
NETWORKS: dict[str, dict[str, Any]] = {
    "U-Net": {"network": "unet_nano", "options": {"widths": [12, 24, 48, 60]}},
    "bottleneck": {"network": "umamba_bot_nano", "options": {"widths": [12, 24, 48, 48]}},
    "encoder": {"network": "umamba_enc_nano", "options": {"widths": [12, 24, 48, 48]}},
    "four paths": {"network": "vm_unet_nano", "options": {"widths": [20, 40, 80]}},
    "one path": {
        "network": "vm_unet_nano",
        "options": {"widths": [20, 40, 80], "mixer": {"scan": "forward", "copies": 4}},
    },
    "short U-Net": {"network": "unet_nano", "options": {"widths": [16, 64]}},
    "short bottleneck": {"network": "umamba_bot_nano", "options": {"widths": [16, 48]}},
}
"""Networks by name. With one channel and three classes they have 266,385, 268,077, 274,413, 272,608 and 272,608
parameters; those of two stages have 75,283 and 76,003."""
PAIRED = ("short U-Net", "short bottleneck", "U-Net", "bottleneck")
PAPER = Paper("U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation", "2401.04722", 2024, 52)


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure the score of the setting's network on the setting's images."""
    task = cached_task("segmentation", data=setting["data"], size=setting["size"], evaluation_items=setting["items"])
    config = SegmentationModelConfig.for_task(task, setting["network"], setting["options"])
    return {**trained_score(build_model(config), task, setting, seed)}


REPRODUCTION = Reproduction(
    name="umamba",
    mechanisms=("mamba", "bidirectional_mamba"),
    source=PAPER,
    claim="Mamba in a U-Net segments better than the U-Net where what decides is far away, at equal parameters.",
    instead=(
        "Ellipses in scenes of 64 x 64 whose class is told by a mark in a corner, by one in each, and by themselves: U-Nets of two stages, "
        "whose convolutions do not reach the corner, and of four, which do, beside Mamba in their bottleneck; VM-UNet on one path "
        "and on four."
    ),
    settings={
        f"{name}, {cue} cue": TRAINING | NETWORKS[name] | {"data": f"{cue}-cue"}
        for cue, names in (("far", [*NETWORKS]), ("near", [name for name in NETWORKS if name != "encoder"]))
        for name in names
    }
    | {f"{name}, own corner": TRAINING | NETWORKS[name] | {"data": "own-corner"} for name in PAIRED},
    run_cell=run_cell,
    checks=(
        Check(
            "own corner, two stages: Mamba in the bottleneck above the U-Net by 0.02",
            minus("short bottleneck, own corner", "short U-Net, own corner"),
            above=0.02,
        ),
        Check(
            "own corner, four stages: Mamba in the bottleneck above the U-Net by 0.02",
            minus("bottleneck, own corner", "U-Net, own corner"),
            above=0.02,
        ),
        Check(
            "far cue, two stages: Mamba in the bottleneck above the U-Net by 0.02",
            minus("short bottleneck, far cue", "short U-Net, far cue"),
            above=0.02,
        ),
        Check(
            "far cue, four stages: Mamba in the bottleneck above the U-Net by 0.02",
            minus("bottleneck, far cue", "U-Net, far cue"),
            above=0.02,
        ),
        Check(
            "far cue, four stages: Mamba in the encoder above the U-Net by 0.02",
            minus("encoder, far cue", "U-Net, far cue"),
            above=0.02,
        ),
        Check("far cue: four paths above one", minus("four paths, far cue", "one path, far cue"), above=0.0),
        Check(
            "near cue, two stages: the bottleneck within 0.03 of the U-Net or better",
            minus("short bottleneck, near cue", "short U-Net, near cue"),
            above=-0.03,
        ),
        Check(
            "near cue, four stages: the bottleneck within 0.03 of the U-Net or better",
            minus("bottleneck, near cue", "U-Net, near cue"),
            above=-0.03,
        ),
    ),
    needs=(
        Check(
            "near cue: the U-Net of two stages learns the shapes, above 0.7",
            measured("short U-Net, near cue", "score"),
            above=0.7,
        ),
        Check("near cue: that of four stages too, above 0.8", measured("U-Net, near cue", "score"), above=0.8),
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
    smoke={"steps": 1, "batch_size": 2, "items": 2, "size": 32},
    seconds=200,
)
