r"""Segmentation networks for images and volumes: a residual U-Net and U-Mamba, VM-UNet, SegFormer and SegMamba.

Images (B, C, \*spatial) become logits (B, classes, \*spatial) of the same size; there is no pooled head. Each module in
this package is one network with its sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.contract import Unsupported, check_options, closest
from regard.models.vision.segmentation.base import Segmenter, SegmenterConfig
from regard.models.vision.segmentation.losses import dice_loss, segmentation_loss
from regard.models.vision.segmentation.segformer import SegFormer, SegFormerConfig
from regard.models.vision.segmentation.segmamba import SegMamba, SegMambaConfig
from regard.models.vision.segmentation.umamba import UMamba, UMambaConfig
from regard.models.vision.segmentation.vm_unet import VMUNet, VMUNetConfig

__all__ = [
    "SEGMENTERS",
    "SegFormer",
    "SegFormerConfig",
    "SegMamba",
    "SegMambaConfig",
    "Segmenter",
    "SegmenterConfig",
    "UMamba",
    "UMambaConfig",
    "VMUNet",
    "VMUNetConfig",
    "create_segmenter",
    "dice_loss",
    "list_segmenters",
    "read_segmenter",
    "segmentation_loss",
]

SEGMENTERS: dict[str, type[Segmenter]] = {
    name: each for each in (UMamba, VMUNet, SegFormer, SegMamba) for name in each.sizes
}
"""The class of each named size."""


def list_segmenters() -> list[str]:
    """Return the names of all sizes."""
    return sorted(SEGMENTERS)


def read_segmenter(name: str, *, fit: Sequence[int] | None = None, **options: Any) -> tuple[type[Segmenter], Any]:
    """Return the class and config of a named size, with `options` replacing its own; lists are converted to tuples.

    Args:
        name: one of :func:`list_segmenters`.
        fit: sides of images to which options that depend on the size are fitted, unless given
            (:meth:`Segmenter.fitted`).
        options: config fields to override.

    Raises:
        Unsupported: for an unknown name or option.
    """
    if name not in SEGMENTERS:
        known = list_segmenters()
        raise Unsupported(f"segmenter {name!r}", supported=", ".join(known), nearest=closest(str(name), known))
    segmenter = SEGMENTERS[name]
    check_options(segmenter.Config, options, name)
    size = segmenter.sizes[name] if fit is None else segmenter.fitted(segmenter.sizes[name], fit, options)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return segmenter, segmenter.Config(**{**size, **given})


def create_segmenter(name: str, **options: Any) -> Segmenter:
    """Create an untrained network; arguments as for :func:`read_segmenter`."""
    segmenter, config = read_segmenter(name, **options)
    return segmenter(config)
