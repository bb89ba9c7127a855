"""Another model as the teacher of the step ``distil``: opening it, and checking whether the model can learn from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regard.compression.folders import is_compressed, library_of, library_of_place, load_compressed, load_own
from regard.contract import Unsupported, an_instance
from regard.integrations.encoders import auto_class, kind_of
from regard.integrations.timm_places import PREFIX, load_timm
from regard.tasks.documents import nearest_path

SAME = "a teacher of the same tokens, classes and inputs"


def open_teacher(place: str, model: nn.Module) -> nn.Module:
    """Open the model in a folder, compressed or not, for evaluation.

    Args:
        place: a model of the same library as `model`: a folder, a GGUF file, or ``timm:NAME``.

    Raises:
        Unsupported: for other places, and for a model of transformers with another tokenizer.
    """
    library, path = library_of(model), Path(place)
    if library == "other":
        raise Unsupported(
            f"{an_instance(model)} with a teacher in a folder",
            supported="models of regard, transformers and timm",
            nearest="teacher=MODEL of regard.compress",
        )
    named = place.startswith(PREFIX)
    if not named and not path.exists():
        raise Unsupported(
            f"the teacher {place}, which does not exist",
            supported=f"a folder with a model of {library}",
            nearest=nearest_path(path),
        )
    told = library_of_place(path)
    if told != library:
        raise Unsupported(f"the teacher {place} of {told} for a model of {library}", supported=f"a model of {library}")
    if not named and is_compressed(path):
        return load_compressed(path)
    if library == "regard":
        return load_own(path)
    if library == "timm":
        return load_timm(place)
    return _of_transformers(path, model)


def check_teacher(model: nn.Module, teacher: nn.Module, name: str, loss: Callable[[], Tensor]) -> None:
    """Raise Unsupported if a model cannot learn from a teacher.

    Args:
        name: description of the teacher.
        loss: computes the training loss of a batch.
    """
    own, told = _facts(model), _facts(teacher)
    for what in own.keys() & told.keys():
        if own[what] != told[what]:
            raise Unsupported(
                f"{name} with {what} {_said(told[what])}, where the model has {_said(own[what])}", supported=SAME
            )
    try:
        loss()
    except Unsupported as error:
        raise Unsupported(f"{name}: {error.asked}", supported=error.supported or SAME, nearest=error.nearest) from None
    except (RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
        said = str(error).strip().split("\n")[0][:160] or type(error).__name__
        raise Unsupported(f"{name}, which cannot read the model's data ({said})", supported=SAME) from error


def _of_transformers(path: Path, model: Any) -> nn.Module:
    from regard.integrations.transformers.folders import has_tokenizer, load_model, load_tokenizer

    own = Path(model.name_or_path or "")
    if model.name_or_path and own.exists() and has_tokenizer(own) and has_tokenizer(path):
        tokens = [load_tokenizer(each).get_vocab() for each in (own, path)]
        if tokens[0] != tokens[1]:
            raise Unsupported(f"the teacher {path} with other tokens than {own}", supported=SAME)
    kind = kind_of(path) if (path / "config.json").is_file() else "language"
    found: Any = load_model(path, of=auto_class(kind))
    padding = getattr(model.config, "pad_token_id", None)
    if getattr(found.config, "pad_token_id", padding) is None:
        found.config.pad_token_id = padding
    return found


def _facts(model: Any) -> dict[str, Any]:
    """A model's declared inputs and answers, by name."""
    config, image = getattr(model, "config", None), getattr(model, "pretrained_cfg", None)
    found: dict[str, Any] = {"a vocabulary of": getattr(config, "vocab_size", None)}
    if type(model).__name__.endswith("ForSequenceClassification"):
        names = [str(config.id2label[i]) for i in sorted(config.id2label)]  # type: ignore[union-attr]
        found["a number of classes of"] = len(names)
        if not all(name.startswith("LABEL_") for name in names):
            found["the classes"] = names
    elif isinstance(image, dict):
        from timm.data import resolve_input_data_config

        read = resolve_input_data_config(model)
        found |= {name: list(read[key]) for name, key in _IMAGES.items()}
        found |= {
            "a number of classes of": model.num_classes,
            "the classes": list(image.get("label_names") or ()) or None,
        }
    else:
        found |= {"a number of classes of": getattr(config, "num_classes", None)}
        found |= {"images of": getattr(config, "image_size", None)}
    return {what: value for what, value in found.items() if value is not None}


_IMAGES = {"images of": "input_size", "pixels around": "mean", "pixels divided by": "std"}


def _said(value: Any) -> str:
    return ", ".join(map(str, value[:8])) if isinstance(value, list | tuple) else str(value)
