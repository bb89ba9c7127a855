"""Heads as volumes: a head is cut into blocks, and whole blocks are held out."""

from __future__ import annotations

import numpy as np

from regard.contract import Unsupported
from regard.tasks.protocol import SPLIT, counter_generator
from regard.tasks.segmentation.heads import GAP, LEAST, read_head
from regard.tasks.segmentation_3d.reader import Volumes, resampled


def read_blocks(data: str, size: tuple[int, ...], spacing: float | None, share: float, seed: int) -> Volumes:
    """Blocks of a head: as high and as deep as a crop, and as wide as the head.

    The halves of a head are alike (in MNI152 mirror images), so a cut between them would hold out what is trained on.

    Args:
        data: as for :func:`regard.tasks.segmentation.heads.read_head`.
        size: sides of a crop.
        spacing: distance in millimetres to which the head's 1 mm voxels are resampled; None for no resampling.
        share: share of the blocks to hold out.
        seed: seed of their choice.

    Raises:
        Unsupported: for crops so large that the head does not have two.
    """
    head, labels, names, source = read_head(data)
    voxels = resampled(head.astype(np.float32)[..., None], (1.0,) * 3, spacing)
    classes = resampled(labels.astype(np.int16), (1.0,) * 3, spacing, smooth=False)
    told = f"{source}, {' x '.join(map(str, classes.shape))} voxels"
    where = [
        (slice(None), slice(y, y + size[1]), slice(z, z + size[2]))
        for y in _starts(voxels.shape[1], size[1])
        for z in _starts(voxels.shape[2], size[2])
    ]
    taken = [block for block in where if (classes[block] > 0).mean() >= LEAST]
    if len(taken) < 2 or voxels.shape[0] < size[0]:
        raise Unsupported(
            f"{told}, in crops of {' x '.join(map(str, size))}",
            supported="crops of which two lie behind or above each other",
            nearest="a smaller size, or a smaller spacing",
        )
    order = counter_generator(seed, 0, SPLIT).permutation(len(taken))
    count = max(1, round(share * len(taken)))
    return Volumes(
        told,
        [voxels[block].copy() for block in taken],
        [classes[block].copy() for block in taken],
        names,
        tuple(range(len(names))),
        0,
        (
            np.sort(order[count:]),
            np.sort(order[:count]),
            f"by blocks of {size[1]} x {size[2]} voxels and the whole width, {GAP} voxels apart or more (seed {seed})",
        ),
        ["one head: other heads are not held out"],
    )


def _starts(side: int, own: int) -> list[int]:
    """Evenly spread starts of as many blocks as fit on an axis with gaps between them."""
    count = (side + GAP) // (own + GAP)
    return [round(i * (side - own) / max(1, count - 1)) for i in range(count)]
