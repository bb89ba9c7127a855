"""U-Mamba (Ma, Li & Wang, arXiv 2401.04722; medical survey, arXiv 2406.03430): Mamba inside of a U-Net sees far.

The paper: U-Mamba is better than networks of convolutions, the U-Net that it is made from among them, and than transformers, on
organs in CT and MR, instruments and cells (abstract).

Here: scenes of 64 x 64 pixels with one to three ellipses in noise, drawn anew for each batch. With the far cue all ellipses look
alike, and their class is told by a small square in one of the corners; without it, by their own brightness. Ellipses keep 16
pixels away from the border. Networks of two stages, whose convolutions see 15 pixels far, and of four, which see the whole
scene; of each a U-Net and U-Mamba at equal parameters (to 3 %), the U-Net wider in its last stage by what Mamba has. VM-UNet
scans along one path or along four, at equal parameters. Trained alike, without deep supervision and augmentation. The score is
the mean Dice coefficient over 200 scenes; shapes without classes would have about 0.5.

Norms over a whole map carry a number for each channel from everywhere to everywhere, in every network here: a way for one far cue
that the paper does not speak of. So there are scenes with a mark in each corner for the ellipse of its quarter alone.

Pilots of one seed and 300 steps had, with one far cue, 0.97 by the U-Net and by Mamba in its bottleneck with four stages, and
0.97 by the U-Net and 0.94 by Mamba with two: norms are enough there. With a mark for each quarter neither network of two stages
knew the classes after 160 steps (0.47 and 0.49): whether Mamba learns them in 800 is what is tried.
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
"""With one channel and three classes 266,385, 268,077, 274,413, 272,608 and 272,608 parameters; of two stages 75,283 and 76,003."""
PAIRED = ("short U-Net", "short bottleneck", "U-Net", "bottleneck")
PAPER = Paper("U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation", "2401.04722", 2024, 52)


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Score of the setting's network on its images."""
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
