"""Image backbones by name: ``create_backbone("van_b0", num_classes=10)``.

Each module in this package is one backbone with its published sizes and is discovered automatically.
``regard list --backbones`` lists them and the networks of :mod:`regard.models.vision.segmentation`;
:mod:`regard.integrations.timm` registers backbones with timm.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from regard.contract import Unsupported, check_options, closest
from regard.models.vision.backbone import Backbone, BackboneConfig, Level

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Level",
    "check_network",
    "create_backbone",
    "list_backbones",
    "list_networks",
    "read_backbone",
]


@functools.cache
def _published() -> dict[str, tuple[type[Backbone], dict[str, Any]]]:
    found: dict[str, tuple[type[Backbone], dict[str, Any]]] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for each in vars(module).values():
            if isinstance(each, type) and issubclass(each, Backbone) and "sizes" in vars(each):
                found |= {name: (each, dict(options)) for name, options in each.sizes.items()}
    return dict(sorted(found.items()))


def list_backbones() -> list[str]:
    """Return the names of all published sizes."""
    return list(_published())


def read_backbone(name: str, **options: Any) -> tuple[type[Backbone], Any]:
    """Return the class and config of a named size, with `options` replacing its own; lists are converted to tuples.

    Raises Unsupported for an unknown name or option, or an image size that the backbone cannot take.
    """
    published = _published()
    if name not in published:
        raise Unsupported(
            f"backbone {name!r}",
            supported="names that `regard list --backbones` tells",
            nearest=closest(str(name), published),
        )
    backbone, size = published[name]
    check_options(backbone.Config, options, name)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    config = backbone.Config(**{**size, **given})
    config.check_size(*config.size)
    return backbone, config


def create_backbone(name: str, **options: Any) -> Backbone:
    """Create an untrained backbone.

    Args:
        name: one of :func:`list_backbones`.
        options: config fields to override, such as ``num_classes``, ``channels`` or ``image_size``.

    Raises:
        Unsupported: for an unknown name or option, or a value that is not accepted.
    """
    backbone, config = read_backbone(name, **options)
    return backbone(config)


def list_networks() -> list[str]:
    """Return the names of whole networks for images: backbones, which classify, and segmentation networks."""
    return sorted([*list_backbones(), *_segmentation().list_segmenters()])


def check_network(name: str, options: Mapping[str, Any]) -> None:
    """Raise Unsupported for an option or value that a network of :func:`list_networks` does not accept."""
    segmentation = _segmentation()
    read = segmentation.read_segmenter if name in segmentation.SEGMENTERS else read_backbone
    read(name, **options)


def _segmentation() -> Any:
    """Import late, like the backbones: their modules use functions that import this package."""
    return importlib.import_module(f"{__name__}.segmentation")
