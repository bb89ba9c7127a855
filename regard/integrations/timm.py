"""The project's image backbones among timm's models, ``regard_van_b0`` and so on, and models of timm that were swapped and saved.

Importing this module registers them::

    import timm
    import regard.integrations.timm

    model = timm.create_model("regard_van_b0", num_classes=10, in_chans=1, img_size=64)
    maps = timm.create_model("regard_van_b0", features_only=True, out_indices=(1, 3))

They take timm's words ``num_classes``, ``in_chans``, ``img_size``, ``drop_rate``, ``drop_path_rate`` and ``features_only``, and
the options of :func:`regard.models.vision.create_backbone` under their own names. There are no weights to download:
:meth:`regard.models.vision.Backbone.load_released` loads those of the official repositories.

With it, timm also loads folders of :mod:`regard.integrations.timm_folders`: ``timm.create_model("local-dir:FOLDER",
pretrained=True)``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from regard.contract import Unsupported
from regard.integrations.timm_folders import swapped_by_regard as swapped_by_regard
from regard.models.vision import create_backbone, list_backbones, read_backbone

PREFIX = "regard_"
WORDS = {"in_chans": "channels", "img_size": "image_size", "drop_rate": "dropout", "drop_path_rate": "drop_path"}
"""timm's names of options, and those here."""
FEATURES = 4
"""Maps that ``features_only`` gives where no ``out_indices`` are named: the last so many, or all of fewer."""
TIMMS_OWN = ("features_only", "feature_cls", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Options of `timm.create_model` that are not the model's."""


def _configuration(name: str) -> dict[str, Any]:
    """What timm's transforms read, and the sizes that the backbone has by itself."""
    _, config = read_backbone(name)
    return {
        "input_size": (config.channels, *config.size),
        "num_classes": config.num_classes,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({PREFIX + name: _configuration(name) for name in list_backbones()})


def _levels(build: Callable[..., nn.Module], options: dict[str, Any]) -> int:
    """How many maps a backbone of such options has."""
    with torch.device("meta"):
        levels: Any = build(**{option: value for option, value in options.items() if option not in TIMMS_OWN}).levels
    return len(levels)


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def build(**options: Any) -> nn.Module:
        return create_backbone(name, **{WORDS.get(option, option): value for option, value in options.items()})

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise Unsupported(
                f"pretrained weights of {PREFIX}{name}, of which there are none to download",
                supported="pretrained=False, and load_released with the official repository's state dict",
            )
        features: dict[str, Any] = {"feature_cls": "getter"}
        if options.get("features_only") and "out_indices" not in options:
            features["out_indices"] = min(FEATURES, _levels(build, options))
        return build_model_with_cfg(build, PREFIX + name, False, feature_cfg=features, **options)

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__module__ = __name__
    create.__doc__ = f"The backbone {name} of regard."
    return create


def register() -> list[str]:
    """Register every backbone with timm that is not registered yet; returns all their names there."""
    module = sys.modules[__name__]
    for name in list_backbones():
        if not hasattr(module, PREFIX + name):
            setattr(module, PREFIX + name, register_model(_entry_point(name)))
    return [PREFIX + name for name in list_backbones()]


register()
