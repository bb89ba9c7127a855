"""Segmentation of volumes by a trained model: the class of each voxel in a NIfTI file, as a file and as shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from regard.contract import Context
from regard.core.files import write_atomically
from regard.core.patches import joined
from regard.tasks.segmentation.nifti import Scan, packed, written
from regard.tasks.segmentation_3d import VolumeReader
from regard.tasks.segmentation_3d.windows import in_windows
from regard.workbench.trained.segment import likeliest, shares_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Segmented:
    """The class index of each voxel in a scan."""

    classes: Int[np.ndarray, "x y z"]
    scan: Scan


@torch.inference_mode()
def segment(
    model: nn.Module, reader: VolumeReader, path: Path, device: torch.device | str = "cpu"
) -> tuple[Segmented, dict[str, float]]:
    """The class of each voxel in a file, and the share of each class, largest first.

    The volume is resampled to the model's spacing and read in windows; logits are interpolated (linearly) to the file's
    voxels.

    Raises:
        Unsupported: for a file that cannot be read, and a volume smaller than a window or with other channels.
    """
    inputs, grid, sides, scan = reader.read(path)

    def run(tokens: Float[Tensor, "w n f"]) -> Float[Tensor, "w n pk"]:
        return model(tokens.to(device), context=Context(grid=reader.grid)).output.cpu()

    output = in_windows(run, inputs, grid, reader.grid, reader.patch, reader.overlap)
    x, y, z = sides
    logits = joined(output, grid, reader.patch)[0, :, :x, :y, :z]
    classes = likeliest(logits, scan.sides).numpy()
    return Segmented(classes, scan), shares_of(classes, reader.classes)


def write(place: Path, found: Segmented, reader: VolumeReader) -> None:
    """Write the mask as a NIfTI file with the scan's shape and affine, and the mask values of the training data."""
    values = np.array(reader.values, dtype=np.uint8)[found.classes]
    data = packed(place, written(values, found.scan), found.scan.stored.affine)
    write_atomically(place, lambda path: path.write_bytes(data))
