"""Models in folders that can be compressed: opened, given calibration data, scored and timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regard.compression import Recipe
from regard.compression.folders import is_compressed
from regard.contract import Unsupported
from regard.integrations.encoders import architecture_of, kind_of, read_config
from regard.integrations.timm_places import PREFIX, is_of_timm
from regard.tasks.documents import Paths, nearest_path
from regard.workbench.lighter.subjects.base import MODELS, Subject
from regard.workbench.lighter.subjects.language import CausalModel
from regard.workbench.lighter.subjects.opened import open_encoder, open_vision
from regard.workbench.lighter.subjects.trained import Trained
from regard.workbench.trained.folder import RECORD as TRAINING


def open_subject(model: Path, data: Paths | None, length: int | None, recipes: Sequence[Recipe] = ()) -> Subject:
    """Open a model from a folder of `regard train`, of transformers or of timm.

    Args:
        model: a folder, a GGUF file, or ``timm:NAME``.
        data: text, labelled texts or images for calibration and scoring; None for the data that a folder of `regard
            train` was trained with; empty for none, which only allows loading and saving a model of transformers or
            timm.
        length: tokens in a window; by default the model's, or :data:`regard.workbench.lighter.subjects.base.LENGTH`.
        recipes: the recipes to be applied; if one of them searches, items are set aside for it.

    Raises:
        Unsupported: for any other folder.
    """
    if not str(model).startswith(PREFIX) and not model.exists():
        raise Unsupported(f"{model}, which does not exist", supported=MODELS, nearest=nearest_path(model))
    if model.is_dir() and is_compressed(model):
        raise Unsupported(f"{model}, which is compressed already", supported="a model in floating point")
    if (model / TRAINING).is_file():
        return Trained(model, data, length, recipes)
    if is_of_timm(model):
        return open_vision(model, data, length)
    kind = known_kind(model, nearest="regard.compress, in Python")
    return CausalModel(model, data, length) if kind == "language" else open_encoder(model, kind, data, length)


def known_kind(model: Path, *, nearest: str = "") -> str:
    """The kind of a transformers model in a folder or file: ``language`` or one of
    :data:`regard.integrations.encoders.CLASSES`; raises Unsupported for encoders with other heads."""
    kind = kind_of(model) if (model / "config.json").is_file() else "language"
    if kind == "other":
        name = architecture_of(read_config(model))
        raise Unsupported(f"{model}, a {name}, whose head is of another kind", supported=MODELS, nearest=nearest)
    return kind


__all__ = ["MODELS", "Subject", "known_kind", "open_subject"]
