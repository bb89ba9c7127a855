"""Saving and loading models: a folder with ``model.safetensors`` and ``config.json``; no pickle.

Each file is replaced atomically, the weights first. The weights file carries a copy of the config, so that loading
detects a save that was interrupted between the two files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from regard.contract import Unsupported, closest
from regard.core.files import write_atomically, write_text_atomically
from regard.layers.quantized import quantized_record, restore_layers
from regard.models.elsewhere import call_that_loads
from regard.models.registry import MODELS, model_classes
from regard.models.weights import distinct_tensors, load_tensors, read_tensors
from regard.version import VERSION

WEIGHTS, CONFIG = "model.safetensors", "config.json"
QUANTIZED = "quantized"
"""Record entry: the quantized layers (:func:`regard.layers.quantized.restore_layers`); omitted if there are none."""
TOKENS = "tokens"
"""Record entry: how :mod:`regard.compression` runs the model with fewer tokens; omitted if it runs with all."""


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], *, tokens: Mapping[str, Any] | None = None
) -> None:
    """Save a model of :mod:`regard.models`, quantized or not; tied weights are stored once.

    Args:
        tokens: how the model runs with fewer tokens, by default the model's own record; read by
            :func:`regard.compression.load_compressed`.

    Raises:
        Unsupported: for another model, one that was changed so that its config does not describe it, or a config with
            options that JSON cannot hold.
    """
    name = type(model).__name__
    if name not in MODELS or type(model) is not MODELS[name][0]:
        alone = hasattr(model, "tokens_record")
        raise Unsupported(f"saving a {name}", supported=", ".join(MODELS), nearest="its save(folder)" if alone else "")
    unsaved, remedy = getattr(model, "unsaved", ("", ""))
    if unsaved:
        raise Unsupported(
            f"saving a {name} with {unsaved}", supported="models that their configs describe", nearest=remedy
        )
    tokens = getattr(model, "tokens_record", None) if tokens is None else tokens
    try:
        config = json.dumps(asdict(model.config), indent=2)  # type: ignore[call-overload]
    except TypeError as error:
        raise Unsupported(
            f"saving options that JSON cannot hold ({error})", supported="numbers, strings, lists"
        ) from error
    record = {"model": name, "regard": VERSION, "config": json.loads(config)}
    quantized = quantized_record(model)
    if quantized:
        record[QUANTIZED] = quantized
    if tokens is not None:
        record[TOKENS] = dict(tokens)
    text = json.dumps(record, indent=2) + "\n"
    place = Path(folder)
    tensors = distinct_tensors(model)
    write_atomically(place / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt", "record": text}))
    write_text_atomically(place / CONFIG, text)


def from_pretrained(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> nn.Module:
    """Load the model saved in `folder`, with its saved dtype and in evaluation mode.

    Raises:
        Unsupported: if files are missing, do not belong together, or hold an unknown model or options; for a folder of
            transformers or timm, with the call that loads it; and for a model that runs with fewer tokens.
    """

    def check(_: nn.Module, tokens: Mapping[str, Any] | None) -> None:
        if tokens is not None:
            raise Unsupported(
                f"{folder}, whose model runs with fewer tokens ({tokens.get('method')})",
                supported="models with all tokens",
                nearest="regard.compression.load_compressed(folder)",
            )

    return read_pretrained(folder, check, device=device)[0]


def read_pretrained(
    folder: str | os.PathLike[str],
    prepare: Callable[[nn.Module, Mapping[str, Any] | None], None],
    *,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Like :func:`from_pretrained`, but also return how the model is to run with fewer tokens; None for all tokens.

    `prepare` is called with the model and that record before the weights are read, to add modules that belong to it.
    """
    place = Path(folder)
    for file in (CONFIG, WEIGHTS):
        if not (place / file).is_file():
            raise Unsupported(f"{folder} without {file}", supported="a folder written by save_pretrained")
    record = _read_record((place / CONFIG).read_bytes(), place / CONFIG)
    tensors, metadata = read_tensors(place / WEIGHTS)
    copy = metadata.get("record")
    if copy is None or _read_record(copy, place / WEIGHTS) != record:
        raise Unsupported(
            f"{CONFIG} and {WEIGHTS} of different saves in {folder}",
            supported="files written together by save_pretrained",
            nearest="save the model again",
        )
    model_class, config_class = model_classes(record["model"])
    known = [f.name for f in fields(config_class)]
    for option in record["config"]:
        if option not in known:
            raise Unsupported(
                f"option {option!r} in {place / CONFIG} (written by regard {record['regard']})",
                supported=", ".join(known),
                nearest=closest(option, known),
            )
    wanted = torch.device(device)
    try:
        # Built on its device; the initial values are overwritten.
        with wanted, torch.random.fork_rng(devices=[]):
            model = model_class(config_class(**record["config"]))
            prepare(model, record.get(TOKENS))
    except Unsupported:
        raise
    except Exception as error:  # JSON can give an option any value, so a model may raise any error
        raise Unsupported(
            f"{place / CONFIG}, whose values do not make a valid {record['model']} ({type(error).__name__}: {error})",
            supported="a file written by save_pretrained",
        ) from error
    restore_layers(model, record.get(QUANTIZED, {}), source=str(place / CONFIG))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tensors:
            tensor.data = tensor.data.to(tensors[name].dtype)
    load_tensors(model, tensors, source=str(place / WEIGHTS))
    return model.eval(), record.get(TOKENS)


def _read_record(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unsupported(
            f"{path} that is not JSON ({error})", supported="a file written by save_pretrained"
        ) from error
    parts = {"model": str, "regard": str, "config": dict}
    if not isinstance(record, dict) or {n: type(v) for n, v in {QUANTIZED: {}, TOKENS: {}, **record}.items()} != {
        **parts,
        QUANTIZED: dict,
        TOKENS: dict,
    }:
        call = call_that_loads(record, path.parent) if isinstance(record, dict) else ""
        raise Unsupported(
            f"{path} with {'the contents of another library' if call else 'other contents'}",
            supported="model, regard and config",
            nearest=call,
        )
    return record
