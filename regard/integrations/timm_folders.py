"""Swapped models of timm in folders that timm loads, with what was swapped in their ``config.json``.

::

    regard.swap(vit, "linear")
    save(vit, "folder")

    import regard.integrations.timm
    vit = timm.create_model("local-dir:folder", pretrained=True)

The folder's architecture is :data:`NAME`, which timm knows after that import alone: without it, it refuses to load the folder
rather than load another model.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_model_args, load_pretrained, register_model, save_for_hf
from torch import nn

from regard.contract import Unsupported
from regard.integrations.heads import Chosen
from regard.integrations.swap import mechanism_in, swap

NAME = "swapped_by_regard"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a model of timm, swapped or not, as timm does: ``config.json`` and ``model.safetensors``.

    Raises:
        Unsupported: for a model that timm could not build again from its name and arguments.
    """
    place, (architecture, options) = Path(folder), recipe(model)
    save_for_hf(model, str(place), safe_serialization=True)
    swapped = _swapped(model)
    if not swapped:
        return
    path = place / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["architecture"] = NAME
    config["model_args"] = {"architecture": architecture, "options": options, "swapped": swapped}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def recipe(model: Any) -> tuple[str, dict[str, Any]]:
    """The name and arguments by which timm builds a model again, without what was swapped.

    Raises:
        Unsupported: where it would build another, as for a model that was changed or not made by `timm.create_model`.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture = config.get("architecture")
    if not architecture:
        raise Unsupported(
            f"a {type(model).__name__} that timm does not know by a name", supported="models of timm.create_model"
        )
    args = get_model_args(model)
    known = args.pop(
        "options", {}
    )  # of one that came from a folder of save, whose arguments timm takes for the model's
    args = {name: value for name, value in args.items() if name not in ("architecture", "swapped")}
    options = json.loads(json.dumps({"num_classes": model.num_classes, **known, **args}))
    with torch.device("meta"):
        made = timm.create_model(architecture, **options)
        _place(made, _swapped(model))
    shapes, found = ({name: tuple(x.shape) for name, x in one.state_dict().items()} for one in (made, model))
    if shapes != found:
        differing = sorted(name for name in {**shapes, **found} if shapes.get(name) != found.get(name))
        raise Unsupported(
            f"a {architecture} that was changed after timm made it ({differing[0]} and {len(differing) - 1} more)",
            supported="models as timm.create_model makes them, or a folder that timm saved with all model_args",
        )
    return architecture, options


def _swapped(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What is in the changed attention modules, by their paths."""
    found = {}
    for path, module in model.named_modules():
        attend = mechanism_in(module)
        if attend is not None:
            name, options = _named(attend.chosen)
            found[path] = {"mechanism": name, "options": options, "pattern": attend.pattern.value}
    return found


def _named(chosen: Chosen) -> tuple[str, dict[str, Any]]:
    inner = _given(chosen.config)
    if chosen.wrapper is None:
        return chosen.card.name, inner
    return chosen.name, {**_given(chosen.wrapper_config), "mechanism": chosen.card.name, "mechanism_options": inner}


def _given(config: Any) -> dict[str, Any]:
    """The options of a mechanism that are not its defaults."""
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in own.items() if value != getattr(type(config)(), name)}


def _place(model: nn.Module, swapped: dict[str, Any]) -> None:
    for path, entry in swapped.items():
        swap(model, {path: (entry["mechanism"], entry["options"])}, pattern=entry["pattern"])


def swapped_by_regard(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    *,
    architecture: str = "",
    options: dict[str, Any] | None = None,
    swapped: dict[str, Any] | None = None,
    **others: Any,
) -> nn.Module:
    """For timm: the model in a folder that :func:`save` has written."""
    unknown = sorted(set(others) - {"pretrained_cfg_overlay", "cache_dir", "pretrained_model_args"})
    if not architecture or unknown or others.get("pretrained_cfg_overlay"):
        raise Unsupported(
            f"{NAME} with {', '.join(unknown) or 'no folder'}",
            supported="the model of a folder as it was saved",
            nearest='timm.create_model("local-dir:FOLDER", pretrained=True)',
        )
    model: Any = timm.create_model(architecture, **(options or {}))
    _place(model, swapped or {})
    told = pretrained_cfg if isinstance(pretrained_cfg, dict) else dataclasses.asdict(pretrained_cfg)
    kept = {name: value for name, value in told.items() if value is not None and name not in ("file", "source")}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **kept, "architecture": architecture}
    if pretrained:
        channels = model.pretrained_cfg["input_size"][0]
        load_pretrained(model, {**told, "first_conv": None}, num_classes=model.num_classes, in_chans=channels)
    return model


register_model(swapped_by_regard)

__all__ = ["NAME", "recipe", "save", "swapped_by_regard"]
