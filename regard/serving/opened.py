"""Opens a folder or file as a model that can be served, with its tokenizer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from regard.contract import Unsupported, an_instance
from regard.serving.engine import Reader
from regard.serving.text import PlainText, Text, TransformersText
from regard.workbench.trained.folder import RECORD, beyond, open_trained, trained_length

if TYPE_CHECKING:
    from regard.models import LanguageModel

SUPPORTED = "a folder of regard train, a folder of transformers with its tokenizer, or a .gguf file"


@dataclass(frozen=True)
class Opened:
    """A model to serve.

    Attributes:
        name: name of the folder or file.
        described: one-line description of the model.
        reader: the model, for the scheduler.
        text: its tokenizer.
        close: function that ends the processes started for the model.
    """

    name: str
    described: str
    reader: Reader
    text: Text
    close: Callable[[], None] = lambda: None


def open_model(
    place: Path,
    *,
    device: str = "cpu",
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
    offload: int = 0,
    **sizes: Any,
) -> Opened:
    """Open the model in a folder or file.

    Args:
        place: the folder or file.
        device: device of the model.
        template: chat template, instead of the model's own.
        dtype: dtype of the weights.
        offload: number of processes that hold the keys and values of one of regard's language models and compute its
            attention (see :mod:`regard.serving.offload`); 0 for none.
        sizes: `rows`, `context`, `cache_tokens` and `page_size` of a reader.

    Raises:
        Unsupported: for a folder of another kind; the error says what can be served.
    """
    sizes["offload"] = offload
    if (place / RECORD).is_file():
        return _open_trained(place, device, template, dtype, sizes)
    if _model_type(place) in ("mamba", "mamba2"):
        from regard.integrations.transformers.folders import load_tokenizer
        from regard.models import from_transformers

        model = from_transformers(place, dtype=dtype).to(device)
        text = TransformersText(load_tokenizer(place, supported=SUPPORTED), template=template)
        return _of_language_model(place.resolve().name, f"{_model_type(place)} of transformers", model, text, sizes)
    return _open_transformers(place, device, template, dtype, sizes)


def _open_trained(place: Path, device: str, template: str | None, dtype: torch.dtype, sizes: dict[str, Any]) -> Opened:
    from regard.compression.folders import check_place, is_compressed
    from regard.models import LanguageModel, count_parameters

    trained = open_trained(place)
    if is_compressed(place):
        check_place(device, dtype)
    model = trained.model(device)
    if not isinstance(model, LanguageModel):
        raise Unsupported(
            f"answers from {an_instance(model)}, as {place} holds",
            supported="language models: folders of regard train on the task text (regard evaluate scores other models)",
        )
    text = PlainText(trained.tokenizer, template)
    told = _recipe(place) or f"{count_parameters(model):,} parameters"
    described, length = f"{trained.record['mechanism']}, {told}", trained_length(place, model)
    opened = _of_language_model(place.resolve().name, described, model.to(dtype), text, sizes)
    if not beyond(length, opened.reader.context):
        return opened
    return dataclasses.replace(opened, described=f"{opened.described}, trained on {length} tokens at a time")


def _open_transformers(
    place: Path, device: str, template: str | None, dtype: torch.dtype, sizes: dict[str, Any]
) -> Opened:
    from regard.compression.folders import load_causal_model
    from regard.integrations.transformers import RegardForCausalLM
    from regard.integrations.transformers.folders import find_files, load_tokenizer, stop_tokens
    from regard.serving.transformers import TransformersReader

    model = load_causal_model(place, device=device, dtype=dtype, supported=SUPPORTED)
    text = TransformersText(load_tokenizer(place, supported=SUPPORTED), stop_tokens(model), template)
    inner = model.model if isinstance(model, RegardForCausalLM) else None
    gguf = find_files(place)[1].get("gguf_file")
    name = Path(gguf).stem if gguf else place.resolve().name
    described = ", ".join(filter(None, (f"{type(model).__name__} of transformers", _recipe(place))))
    if inner is not None:
        return _of_language_model(name, described, inner, text, sizes)
    if sizes.pop("offload"):
        raise Unsupported(f"offloaded attention of {described}", supported="language models of regard")
    return Opened(name, described, TransformersReader(model, **sizes), text)


def _of_language_model(name: str, described: str, model: LanguageModel, text: Text, sizes: dict[str, Any]) -> Opened:
    from regard.serving.language import LanguageReader

    workers = sizes.pop("offload")
    if not workers:
        return Opened(name, described, LanguageReader(model, **sizes), text)
    from regard.serving.offload import OffloadedReader, ProcessBackend

    reader = OffloadedReader(model, workers, backend=ProcessBackend(), **sizes)
    return Opened(name, f"{described}, attention in {workers} processes", reader, text, reader.close)


def _recipe(place: Path) -> str:
    """Describe how a model was compressed; empty if it was not."""
    from regard.compression.folders import is_compressed, read_record

    return f"compressed by {read_record(place)['report']['recipe']}" if is_compressed(place) else ""


def _model_type(place: Path) -> str | None:
    """Return the model type in the ``config.json`` of transformers; None if there is none."""
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
