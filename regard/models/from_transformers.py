"""Pretrained Mamba and Mamba-2 models of Hugging Face transformers as language models of regard.

Reads a folder that ``save_pretrained`` of transformers wrote (``config.json`` and safetensors), without transformers::

    model = from_transformers("mamba-130m-hf")
    model.generate(ids, 100)

Every tensor of the checkpoint has its place, and every parameter comes from it. Where a checkpoint ties its output
projection to the embedding, so does the model; its last norm then has a factor of dim^0.5, since regard divides tied logits
by it. What may differ: padding, which takes no step here, where transformers lets the state decay and the convolution write
its bias; and narrow dtypes, since residuals here have the dtype of the weights.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.contract import Unsupported
from regard.models.language_model import LanguageModel, LanguageModelConfig
from regard.models.weights import load_tensors, read_tensors

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

NAMES = {
    "backbone.embeddings.weight": "embedding.weight",
    "backbone.norm_f.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
BLOCK_NAMES = {
    "norm.weight": "mixer_norm.weight",
    "mixer.conv1d.weight": "mixer.conv.weight",
    "mixer.conv1d.bias": "mixer.conv.bias",
    "mixer.dt_proj.bias": "mixer.dt_bias",
}
"""Names in a block that differ, from transformers to regard."""


def _mamba(config: Mapping[str, Any]) -> dict[str, Any]:
    rank = config.get("time_step_rank", "auto")
    return {
        "d_state": config["state_size"],
        "expand": float(config["expand"]),
        "conv_width": config["conv_kernel"],
        "dt_rank": None if rank == "auto" else rank,
    }


def _mamba2(config: Mapping[str, Any]) -> dict[str, Any]:
    limits = config.get("time_step_limit", (0.0, math.inf))
    low, high = (
        limit["__float__"] if isinstance(limit, Mapping) else limit for limit in limits
    )  # JSON has no infinity
    return {
        "d_state": config["state_size"],
        "expand": float(config["expand"]),
        "conv_width": config["conv_kernel"],
        "head_dim": config["head_dim"],
        "groups": config["n_groups"],
        "norm_eps": config["layer_norm_epsilon"],
        "dt_limit": (float(low), float(high)),
    }


OPTIONS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"mamba": _mamba, "mamba2": _mamba2}
"""By ``model_type``, which is the mechanism's name: its options, from the checkpoint's settings."""

REASONS = {
    "falcon_mamba": "it normalises B, C and the steps, which mamba does not",
    "jamba": "its layers are not all the same, and some are mixtures of experts",
    "zamba": "its layers share attention blocks",
    "zamba2": "its layers share attention blocks",
    "bamba": "its attention layers have rotary positions on a part of each head",
}
FIXED = {"hidden_act": "silu", "use_bias": False}
"""Settings that a layer here has in one way."""


def from_transformers(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The language model of a checkpoint, on the CPU and in evaluation mode.

    Args:
        folder: with ``config.json`` of a ``mamba`` or ``mamba2`` and its safetensors, in one file or several.
        dtype: of the parameters; those that mamba keeps in float32 stay so.

    Raises:
        Unsupported: for another architecture, with the reason; for settings that the layers here do not have; and for
            tensors that are missing or have no place.
    """
    place = Path(folder)
    config = _read_json(place / CONFIG)
    kind = config.get("model_type")
    if kind not in OPTIONS:
        reason = REASONS.get(str(kind))
        raise Unsupported(
            f"a checkpoint of {kind}" + (f" ({reason})" if reason else ""),
            supported=", ".join(OPTIONS),
            nearest="" if reason else 'regard.swap(model, "softmax"), for models of attention',
        )
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise Unsupported(f"{name}={config[name]!r} of a {kind}", supported=f"{name}={value!r}")
    tensors = {name: tensor.to(dtype) for name, tensor in _read_weights(place).items()}
    try:
        options = OPTIONS[kind](config)
        dim, tied = config["hidden_size"], config.get("tie_word_embeddings", kind == "mamba")
        made = LanguageModelConfig(
            config["vocab_size"],
            dim=dim,
            plan=[(kind, options)] * config["num_hidden_layers"],
            feed_forward=0,
            positions="none",
            tie_embeddings=tied,
            norm=f"rms:{config['layer_norm_epsilon']}",
        )
    except KeyError as error:
        raise Unsupported(f"{place / CONFIG} without {error}", supported=f"the settings of a {kind}") from None
    with torch.random.fork_rng(devices=[]):
        model = LanguageModel(made).to(dtype)
    found = {_renamed(name): tensor for name, tensor in tensors.items()}
    if tied:
        found.pop("head.weight", None)
        if "norm.weight" in found:
            found["norm.weight"] = found["norm.weight"] * dim**0.5
    wanted = model.state_dict()
    for name, parameter in wanted.items():
        if name.endswith("conv.weight") and name in found:
            found[name] = found[name].squeeze(1)
        elif name.endswith("conv.bias") and not config.get("use_conv_bias", True):
            found.setdefault(name, torch.zeros_like(parameter))
        if name in found:
            found[name] = found[name].to(parameter.dtype)
    load_tensors(model, found, source=str(place))
    return model.eval()


def _renamed(name: str) -> str:
    block = name.removeprefix("backbone.layers.")
    if block == name:
        return NAMES.get(name, name)
    number, _, inside = block.partition(".")
    return f"blocks.{number}.{BLOCK_NAMES.get(inside, inside)}"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise Unsupported(f"{path.parent} without {path.name}", supported="a folder that transformers has saved")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise Unsupported(f"{path} that is not JSON ({error})", supported="what transformers has saved") from error
    if not isinstance(found, dict):
        raise Unsupported(f"{path} with other contents", supported="settings by name")
    return found


def _read_weights(place: Path) -> dict[str, Tensor]:
    if (place / WEIGHTS).is_file():
        return read_tensors(place / WEIGHTS)[0]
    if not (place / INDEX).is_file():
        raise Unsupported(
            f"{place} without {WEIGHTS} or {INDEX}",
            supported="safetensors",
            nearest="model.save_pretrained of transformers, which writes them",
        )
    files = sorted(set(_read_json(place / INDEX).get("weight_map", {}).values()))
    return {name: tensor for file in files for name, tensor in read_tensors(place / file)[0].items()}
