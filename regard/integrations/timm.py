"""regard's image backbones as timm models, ``regard_van_b0`` and so on, and timm models that were swapped and saved.

Importing this module registers them::

    import timm
    import regard.integrations.timm

    model = timm.create_model("regard_van_b0", num_classes=10, in_chans=1, img_size=64)
    maps = timm.create_model("regard_van_b0", features_only=True, out_indices=(1, 3))

They take timm's options ``num_classes``, ``in_chans``, ``img_size``, ``drop_rate``, ``drop_path_rate``, ``global_pool``,
``features_only`` and ``out_indices``, and the options of :func:`regard.models.vision.create_backbone` under their own
names. ``global_pool`` is one of the model's :attr:`~regard.models.vision.Backbone.pools`, ``token`` or ``avg``, or ``""``,
with ``num_classes=0``, for features that are not pooled. There are no weights to download; those of the official
repositories, and of these models, come from a file::

    timm.create_model("regard_van_b0", pretrained=True, pretrained_cfg_overlay={"file": "van_tiny_754.pth.tar"}, num_classes=10)

After the import, timm also loads folders of :mod:`regard.integrations.timm_folders`:
``timm.create_model("local-dir:FOLDER", pretrained=True)``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from regard.contract import Unsupported
from regard.integrations.timm_folders import swapped_by_regard as swapped_by_regard
from regard.models.vision import Backbone, BackboneConfig, create_backbone, list_backbones, read_backbone
from regard.models.vision.released import check_fit, weights_of

PREFIX = "regard_"
WORDS = {"in_chans": "channels", "img_size": "image_size", "drop_rate": "dropout", "drop_path_rate": "drop_path"}
"""timm's names of options, with the names here."""
FEATURES = 4
"""Number of feature maps that ``features_only`` returns without ``out_indices``: the last four, or all of fewer."""
SOURCES = ("url", "file", "state_dict", "hf_hub_id")
"""Keys by which a timm configuration says where weights are."""
HALVES = ("vit_", "mixer_", "tnt_", "pyramid_tnt_")
"""Backbones whose released weights expect pixels from -1 to 1; the others expect ImageNet's mean and deviation."""
HEADS = ("head.", "distillation_head.")
TIMMS_OWN = (
    "features_only",
    "feature_cls",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "cache_dir",
)
"""Options of `timm.create_model` that are not the model's."""


def _configuration(name: str) -> dict[str, Any]:
    """The configuration that timm's transforms read, with the backbone's default sizes."""
    kind, config = read_backbone(name)
    half = (0.5, 0.5, 0.5)
    return {
        "input_size": (config.channels, *config.size),
        "fixed_input_size": kind.Config.sides is not BackboneConfig.sides,
        "num_classes": config.num_classes,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": half if name.startswith(HALVES) else IMAGENET_DEFAULT_MEAN,
        "std": half if name.startswith(HALVES) else IMAGENET_DEFAULT_STD,
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({PREFIX + name: _configuration(name) for name in list_backbones()})


def _levels(build: Callable[..., nn.Module], options: dict[str, Any]) -> int:
    """Number of feature maps of a backbone with such options."""
    with torch.device("meta"):
        levels: Any = build(**{option: value for option, value in options.items() if option not in TIMMS_OWN}).levels
    return len(levels)


def _names_weights(options: dict[str, Any]) -> bool:
    """Return whether the options of `timm.create_model` say where weights are."""
    given = options.get("pretrained_cfg")
    told = given if isinstance(given, dict) else vars(given) if isinstance(given, PretrainedCfg) else {}
    told = {**told, **(options.get("pretrained_cfg_overlay") or {})}
    return any(told.get(source) for source in SOURCES)


def _translated(checkpoint: Any, model: Backbone) -> dict[str, Tensor]:
    """Weights under the model's names. Those of heads may be for other classes; timm leaves them out, as it is told here
    which they are and for how many classes.

    Raises Unsupported where other weights do not fit.
    """
    weights = model.translate(weights_of(checkpoint), model.config)
    heads = {name: value for name, value in model.state_dict().items() if name.startswith(HEADS)}
    check_fit(model, {name: value for name, value in weights.items() if not name.startswith(HEADS)} | heads)
    if "head.weight" in weights:
        told: Any = model.pretrained_cfg
        told |= {"num_classes": len(weights["head.weight"]), "classifier": [name.removesuffix(".") for name in HEADS]}
    return weights


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def build(global_pool: str | None = None, **options: Any) -> nn.Module:
        given = {WORDS.get(option, option): value for option, value in options.items()}
        model = create_backbone(name, **given)
        if global_pool is not None and global_pool != model.global_pool:
            model.reset_classifier(model.num_classes, global_pool)
        model.in_chans = model.config.channels  # which timm reads
        return model

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained and not _names_weights(options):
            raise Unsupported(
                f"pretrained weights of {PREFIX}{name}, for which none can be downloaded",
                supported="weights of the official repository in a file",
                nearest='pretrained_cfg_overlay={"file": PATH}',
            )
        wrapper = options.get("feature_cls", "getter")
        if wrapper != "getter":
            raise Unsupported(f"feature_cls={wrapper!r} of {PREFIX}{name}", supported="'getter'")
        features: dict[str, Any] = {"feature_cls": "getter"}
        if options.get("features_only") and "out_indices" not in options:
            features["out_indices"] = min(FEATURES, _levels(build, options))
        return build_model_with_cfg(
            build, PREFIX + name, pretrained, feature_cfg=features, pretrained_filter_fn=_translated, **options
        )

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__module__ = __name__
    create.__doc__ = f"The backbone {name} of regard."
    return create


def register() -> list[str]:
    """Register every backbone that timm does not know yet; returns the timm names of all backbones."""
    module = sys.modules[__name__]
    for name in list_backbones():
        if not hasattr(module, PREFIX + name):
            setattr(module, PREFIX + name, register_model(_entry_point(name)))
    return [PREFIX + name for name in list_backbones()]


register()
