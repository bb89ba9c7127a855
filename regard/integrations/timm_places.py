"""Sources of timm models: timm's names, and folders that timm has saved."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from regard.contract import Unsupported
from regard.layers.linear import accelerate

PREFIX = "timm:"
SUPPORTED = "a folder of timm (config.json and model.safetensors), or timm:NAME for pretrained weights"


def is_of_timm(model: Any) -> bool:
    """Return whether `model` is a timm model, the name of one, or a folder that timm has saved."""
    if isinstance(model, (str, os.PathLike)):
        if str(model).startswith(PREFIX):
            return True
        try:
            config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return "architecture" in config and "model_type" not in config
    return "timm" in sys.modules and type(model).__module__.startswith("timm.")


def timm_folders() -> Any:
    """Import :mod:`regard.integrations.timm_folders`; raises Unsupported without a suitable timm."""
    try:
        from regard.integrations import timm_folders
    except ImportError as error:
        raise Unsupported(
            f"a model of timm without a fitting timm ({error})",
            supported="timm 1.0.31 or newer",
            nearest="pip install 'regard[vision]'",
        ) from error
    return timm_folders


def load_timm(place: str | os.PathLike[str], *, supported: str = SUPPORTED) -> Any:
    """Load the model at a place for which :func:`is_of_timm` holds, in evaluation mode, with the linear layers of
    :func:`regard.accelerate`.

    Args:
        supported: what an error message should list as supported when timm cannot load the model.

    Raises:
        Unsupported: where timm cannot load the model, and without a suitable timm.
    """
    folders = timm_folders()
    text = str(place)
    source = text.removeprefix(PREFIX) if text.startswith(PREFIX) else f"local-dir:{text}"
    try:
        model = folders.timm.create_model(source, pretrained=True).eval()
    except Unsupported:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        said = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise Unsupported(f"{text}, which timm cannot load ({said})", supported=supported) from error
    accelerate(model)
    return model


def name_of(place: str | os.PathLike[str]) -> str:
    """The name of a place for reports."""
    text = str(place)
    return text.removeprefix(PREFIX) if text.startswith(PREFIX) else Path(text).name or text
