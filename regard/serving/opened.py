"""From a folder or a file to a model that can be served, and its text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regard.contract import Unsupported
from regard.serving.engine import Reader
from regard.serving.text import PlainText, Text, TransformersText
from regard.workbench.trained import RECORD, open_trained

SUPPORTED = "a folder of regard train, a folder of transformers with its tokenizer, or a .gguf file"


@dataclass(frozen=True)
class Opened:
    """A model to serve.

    Attributes:
        name: of the folder or file.
        described: the model in words.
    """

    name: str
    described: str
    reader: Reader
    text: Text


def open_model(
    place: Path, *, device: str = "cpu", template: str | None = None, dtype: torch.dtype = torch.float32, **sizes: Any
) -> Opened:
    """The model in a folder or file.

    Args:
        template: layout of chats, instead of the model's.
        dtype: of the weights.
        sizes: `rows`, `context`, `cache_tokens` and `page_size` of a reader.

    Raises:
        Unsupported: for a folder of another kind, with what would do.
    """
    if (place / RECORD).is_file():
        return _open_trained(place, device, template, dtype, sizes)
    if _model_type(place) in ("mamba", "mamba2"):
        from regard.integrations.transformers.folders import load_tokenizer
        from regard.models import from_transformers
        from regard.serving.language import LanguageReader

        model = from_transformers(place, dtype=dtype).to(device)
        text = TransformersText(load_tokenizer(place, supported=SUPPORTED), template=template)
        described = f"{_model_type(place)} of transformers"
        return Opened(place.resolve().name, described, LanguageReader(model, **sizes), text)
    return _open_transformers(place, device, template, dtype, sizes)


def _open_trained(place: Path, device: str, template: str | None, dtype: torch.dtype, sizes: dict[str, Any]) -> Opened:
    from regard.models import LanguageModel, count_parameters
    from regard.serving.language import LanguageReader

    trained = open_trained(place)
    model = trained.model(device)
    if not isinstance(model, LanguageModel):
        raise Unsupported(
            f"answers from a {type(model).__name__}, as {place} holds",
            supported="language models: folders of regard train on the task text",
        )
    text = PlainText(trained.tokenizer, template)
    described = f"{trained.record['mechanism']}, {count_parameters(model):,} parameters"
    return Opened(place.resolve().name, described, LanguageReader(model.to(dtype), **sizes), text)


def _open_transformers(
    place: Path, device: str, template: str | None, dtype: torch.dtype, sizes: dict[str, Any]
) -> Opened:
    from regard.integrations.transformers import RegardForCausalLM
    from regard.integrations.transformers.folders import find_files, load_model, load_tokenizer
    from regard.serving.language import LanguageReader
    from regard.serving.transformers import TransformersReader

    model = load_model(place, dtype=dtype, supported=SUPPORTED)
    ends = getattr(model.generation_config, "eos_token_id", None)
    stops = ends if isinstance(ends, list) else [] if ends is None else [ends]
    text = TransformersText(load_tokenizer(place, supported=SUPPORTED), stops, template)
    model = model.to(device)
    inner = model.model if isinstance(model, RegardForCausalLM) else None
    reader = TransformersReader(model, **sizes) if inner is None else LanguageReader(inner, **sizes)
    gguf = find_files(place)[1].get("gguf_file")
    name = Path(gguf).stem if gguf else place.resolve().name
    return Opened(name, f"{type(model).__name__} of transformers", reader, text)


def _model_type(place: Path) -> str | None:
    """What ``config.json`` of transformers says; None where there is none."""
    try:
        found = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if isinstance(found, dict) and "model" in found and "regard" in found:
        raise Unsupported(
            f"{place}, a model without its tokenizer", supported=SUPPORTED, nearest="the folder that regard train wrote"
        )
    kind = found.get("model_type") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) else None
