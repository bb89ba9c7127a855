"""Models in folders that can be compressed: read, given calibration data, scored and timed."""

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
    """The model of a folder of `regard train`, of transformers or of timm.

    Args:
        model: a folder, a GGUF file, or ``timm:NAME``.
        data: text, labelled texts or images to calibrate with and to score on; None for those of a folder of `regard train`;
            empty for none, with which a model of transformers or timm can be loaded and saved alone.
        length: tokens of a window; the model's or :data:`regard.workbench.lighter.subjects.base.LENGTH` when None.
        recipes: what is going to be done to it: for those that search, items are set aside.

    Raises:
        Unsupported: for another folder.
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
    """The kind of a model of transformers in a folder or file, ``language`` or one of
    :data:`regard.integrations.encoders.CLASSES`; raises Unsupported for encoders with other heads."""
    kind = kind_of(model) if (model / "config.json").is_file() else "language"
    if kind == "other":
        name = architecture_of(read_config(model))
        raise Unsupported(f"{model}, a {name}, whose head is of another kind", supported=MODELS, nearest=nearest)
    return kind


__all__ = ["MODELS", "Subject", "known_kind", "open_subject"]
