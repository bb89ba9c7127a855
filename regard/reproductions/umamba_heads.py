"""U-Mamba on a real head (Ma, Li & Wang, arXiv 2401.04722), complementing ``umamba`` on synthetic scenes.

The paper: U-Mamba is better than convolutional networks, including the U-Net that it is based on, on medical images
(abstract).

Here: grey and white matter in axial slices of the MNI152 head, reduced to 64 x 64 pixels: 108 slices for training and
24 for scoring, from slabs that no training slice touches. It is a single head, the average of many: the result shows
whether a network learns its shapes from some slices for others, and says nothing about patients. The networks are those
of ``umamba``, within 3 % of 270,000 parameters; five seeds, since there are few slices.
"""

from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction
from regard.reproductions.umamba import NETWORKS, PAPER, TRAINING, run_cell

NAMES = ("U-Net", "bottleneck", "encoder", "four paths")

REPRODUCTION = Reproduction(
    name="umamba_heads",
    mechanisms=("mamba", "bidirectional_mamba"),
    source=PAPER,
    claim="U-Mamba segments medical images better than the U-Net that it is made from.",
    instead=(
        "Grey and white matter in slices of the MNI152 head at 64 x 64 pixels, other slabs held out: U-Net, Mamba in its bottleneck "
        "and in its encoder, and VM-UNet, all of about 270,000 parameters."
    ),
    settings={name: TRAINING | NETWORKS[name] | {"data": "mni152", "steps": 600} for name in NAMES},
    run_cell=run_cell,
    checks=(
        Check("Mamba in the bottleneck above the U-Net", minus("bottleneck", "U-Net"), above=0.0),
        Check("Mamba in the encoder above the U-Net", minus("encoder", "U-Net"), above=0.0),
        Check("VM-UNet within 0.05 of the U-Net or better", minus("four paths", "U-Net"), above=-0.05),
    ),
    needs=(
        Check(
            "the U-Net is above the commonest class of each place, at 0.25, by far: above 0.6",
            measured("U-Net", "score"),
            above=0.6,
        ),
    ),
    left_out=("patients, organs and volumes: no such images in any package",),
    smoke={"steps": 1, "batch_size": 2, "items": 2, "size": 32},
    seeds=5,
    seconds=150,
)
