"""Swapped timm models in folders that timm can load; their ``config.json`` records the swap.

::

    regard.swap(vit, "linear")
    save(vit, "folder")

    import regard.integrations.timm
    vit = timm.create_model("local-dir:folder", pretrained=True)

The folder's architecture is :data:`NAME`, which timm knows only after that import; without it, timm refuses to load the
folder rather than load a different model.
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
from timm.models._hub import save_config_for_hf
from torch import nn

from regard.contract import Unsupported, an_instance
from regard.integrations.chosen import Chosen
from regard.integrations.swap import mechanism_in, swap

NAME = "swapped_by_regard"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a timm model, swapped or not, as timm does: ``config.json`` and ``model.safetensors``.

    Raises:
        Unsupported: for a model that timm could not rebuild from its name and arguments.
    """
    place = Path(folder)
    recipe(model)
    save_for_hf(model, str(place), safe_serialization=True)
    if _swapped(model):
        write_config(model, place, NAME)


def write_config(model: nn.Module, folder: Path, name: str | None = None) -> None:
    """Write only the ``config.json`` of a model.

    Args:
        name: an architecture name to write in place of the model's own, which then becomes one of the arguments.
    """
    path = folder / "config.json"
    save_config_for_hf(model, str(path))
    if name is not None:
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"architecture": name, "model_args": arguments(model)}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_config(model: Any, folder: Path) -> None:
    """Apply what a folder's ``config.json`` says about images and classes to a model; does nothing without the file."""
    path = folder / "config.json"
    if path.is_file():
        told = json.loads(path.read_text(encoding="utf-8"))
        labels = {name: told[name] for name in ("label_names", "label_descriptions") if name in told}
        _configure(model, {**told.get("pretrained_cfg", {}), **labels})


def arguments(model: Any) -> dict[str, Any]:
    """Arguments for :func:`built` to rebuild a model of the same sizes: ``architecture``, ``options``, ``swapped``.

    Raises:
        Unsupported: for a model not made by `timm.create_model`, and for arguments that JSON cannot express.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture = config.get("architecture")
    if not architecture:
        raise Unsupported(
            f"{an_instance(model)} that timm does not know by a name", supported="models of timm.create_model"
        )
    args = get_model_args(model)
    known = args.pop(
        "options", {}
    )  # for a model loaded from a folder of `save`, timm stores these as the model's arguments
    args = {name: value for name, value in args.items() if name not in ("architecture", "swapped")}
    try:
        options = json.loads(json.dumps({"num_classes": model.num_classes, **known, **args}))
    except TypeError as error:
        raise Unsupported(
            f"writing the arguments of a {architecture} ({error})", supported="numbers and words"
        ) from None
    return {"architecture": architecture, "options": options, "swapped": _swapped(model)}


def built(architecture: str, options: dict[str, Any], swapped: dict[str, Any]) -> Any:
    """Build a model from :func:`arguments`, with random weights."""
    model = timm.create_model(architecture, **options)
    _place(model, swapped)
    return model


def recipe(model: Any) -> tuple[str, dict[str, Any]]:
    """The name and arguments with which timm rebuilds a model, without what was swapped.

    Raises:
        Unsupported: where timm would build a different model, for example if it was changed or not made by
            `timm.create_model`.
    """
    found = arguments(model)
    architecture, options = found["architecture"], found["options"]
    with torch.device("meta"):
        made = built(**found)
    shapes, own = ({name: tuple(x.shape) for name, x in one.state_dict().items()} for one in (made, model))
    if shapes != own:
        differing = sorted(name for name in {**shapes, **own} if shapes.get(name) != own.get(name))
        raise Unsupported(
            f"a {architecture} that was changed after timm made it ({differing[0]} and {len(differing) - 1} more)",
            supported="models as timm.create_model makes them, or a folder that timm saved with all model_args",
        )
    return architecture, options


def _swapped(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The mechanisms in swapped attention modules, by path."""
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
    """The options of a mechanism that differ from their defaults."""
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
    """Entry point for timm: the model in a folder that :func:`save` wrote."""
    unknown = sorted(set(others) - {"pretrained_cfg_overlay", "cache_dir", "pretrained_model_args"})
    if not architecture or unknown or others.get("pretrained_cfg_overlay"):
        raise Unsupported(
            f"{NAME} with {', '.join(unknown) or 'no folder'}",
            supported="the model of a folder as it was saved",
            nearest='timm.create_model("local-dir:FOLDER", pretrained=True)',
        )
    model = built(architecture, options or {}, swapped or {})
    told = pretrained_cfg if isinstance(pretrained_cfg, dict) else dataclasses.asdict(pretrained_cfg)
    _configure(model, told)
    if pretrained:
        channels = model.pretrained_cfg["input_size"][0]
        load_pretrained(model, {**told, "first_conv": None}, num_classes=model.num_classes, in_chans=channels)
    return model


def _configure(model: Any, told: dict[str, Any]) -> None:
    kept = {name: value for name, value in told.items() if value is not None and name not in ("file", "source")}
    own = model.pretrained_cfg
    model.pretrained_cfg = model.default_cfg = {**own, **kept, "architecture": own["architecture"]}


register_model(swapped_by_regard)

__all__ = ["NAME", "arguments", "built", "read_config", "recipe", "save", "swapped_by_regard", "write_config"]
