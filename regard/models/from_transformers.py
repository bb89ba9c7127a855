"""Load pretrained Mamba, Mamba-2, Llama, Mistral and Qwen2 models of transformers as regard language models.

Reads a folder written by transformers' ``save_pretrained`` (``config.json`` and safetensors), without transformers::

    model = from_transformers("mamba-130m-hf")  # or a Llama, such as SmolLM2
    model.generate(ids, 100)

Every tensor of the checkpoint is used, and every parameter comes from it. If the checkpoint ties its output projection
to the embedding, so does the model; its last norm is then multiplied by dim^0.5, since regard divides tied logits by
that factor. Results may differ with padding, which regard skips, while transformers lets the state decay and the
convolution write its bias; and in narrow dtypes, since residuals here have the dtype of the weights.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.contract import Unsupported
from regard.models.elsewhere import call_that_loads
from regard.models.language_model import LanguageModel, LanguageModelConfig
from regard.models.weights import load_tensors, read_tensors

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

NAMES = {
    "backbone.embeddings.weight": "embedding.weight",
    "backbone.norm_f.weight": "norm.weight",
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
BLOCK_NAMES = {
    "norm.weight": "mixer_norm.weight",
    "mixer.conv1d.weight": "mixer.conv.weight",
    "mixer.conv1d.bias": "mixer.conv.bias",
    "mixer.dt_proj.bias": "mixer.dt_bias",
    "input_layernorm.weight": "mixer_norm.weight",
    "post_attention_layernorm.weight": "feed_forward_norm.weight",
    **{
        f"self_attn.{theirs}_proj.{part}": f"mixer.{own}.{part}"
        for theirs, own in {"q": "query", "k": "key", "v": "value", "o": "output"}.items()
        for part in ("weight", "bias")
    },
    **{
        f"mlp.{name}_proj.{part}": f"feed_forward.{name}.{part}"
        for name in ("gate", "up", "down")
        for part in ("weight", "bias")
    },
}
"""Names within a block that differ: transformers' name -> regard's."""
BLOCKS = ("backbone.layers.", "model.layers.")


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


def _of_states(config: Mapping[str, Any], layers: Sequence[Any] | None) -> LanguageModelConfig:
    kind = config["model_type"]
    if layers is not None:
        raise Unsupported(f"other layers in a {kind}", supported="those of a llama, mistral or qwen2")
    options = {"mamba": _mamba, "mamba2": _mamba2}[kind](config)
    return LanguageModelConfig(
        config["vocab_size"],
        dim=config["hidden_size"],
        plan=[(kind, options)] * config["num_hidden_layers"],
        feed_forward=0,
        positions="none",
        tie_embeddings=config.get("tie_word_embeddings", kind == "mamba"),
        norm=f"rms:{config['layer_norm_epsilon']}",
    )


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of rotary positions that turn as the checkpoint's."""
    told = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = told.get("rope_type", told.get("type", "default"))
    found: dict[str, Any] = {"base": float(told.get("rope_theta", config.get("rope_theta", 10_000.0)))}
    if kind == "default":
        return found
    if kind not in ("linear", "llama3"):
        raise Unsupported(
            f"a {config['model_type']} with rotary positions of type {kind!r}",
            supported='"default", "linear", "llama3"',
        )
    found["interpolation"] = float(told["factor"])
    if kind == "llama3":
        trained = told.get("original_max_position_embeddings", config["max_position_embeddings"])
        found["wavelengths"] = (trained / told["high_freq_factor"], trained / told["low_freq_factor"])
    return found


def _windows(config: Mapping[str, Any]) -> list[int | None]:
    """The window of each layer's attention, in keys with the query's own; None for no window."""
    kind, layers = config["model_type"], config["num_hidden_layers"]
    window = config.get("sliding_window", 4096)  # the default of transformers
    if kind == "mistral":
        return [window] * layers
    if kind != "qwen2" or not config.get("use_sliding_window", False):
        return [None] * layers
    first, kinds = config.get("max_window_layers", 28), config.get("layer_types")
    slides = [i >= first for i in range(layers)] if kinds is None else [each == "sliding_attention" for each in kinds]
    return [window if each else None for each in slides]


def _llama(config: Mapping[str, Any], layers: Sequence[Any] | None) -> LanguageModelConfig:
    heads = config["num_attention_heads"]
    shell: dict[str, Any] = {"bias": True} if config.get("attention_bias") else {}
    if config["model_type"] == "qwen2":
        shell = {"bias": True, "output_bias": False}
    if config.get("mlp_bias"):
        shell["feed_forward_options"] = {"bias": True}
    given = [("softmax", {})] * config["num_hidden_layers"] if layers is None else layers
    plan = []
    for (name, options), window in zip(given, _windows(config), strict=True):
        seen = {} if window is None or name != "softmax" else {"window": (window - 1, None)}
        plan.append((name, {**shell, **seen, **options}))
    return LanguageModelConfig(
        config["vocab_size"],
        dim=config["hidden_size"],
        plan=plan,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim"),
        feed_forward=config["intermediate_size"],
        positions="rotary",
        position_options=_rotary(config),
        max_length=config.get("max_position_embeddings", 2048),
        tie_embeddings=config.get("tie_word_embeddings", False),
        norm=f"rms:{config['rms_norm_eps']}",
    )


CONFIGS: dict[str, Callable[[Mapping[str, Any], Sequence[Any] | None], LanguageModelConfig]] = {
    "mamba": _of_states,
    "mamba2": _of_states,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
}
"""For each ``model_type``, a function that makes the config from the checkpoint's settings and optional layers."""
TAKES_LAYERS = tuple(kind for kind, make in CONFIGS.items() if make is _llama)
"""Each ``model_type`` whose layers may be replaced by given ones."""

REASONS = {
    "falcon_mamba": "it normalises B, C and the steps, which mamba does not",
    "jamba": "its layers are not all the same, and some are mixtures of experts",
    "zamba": "its layers share attention blocks",
    "zamba2": "its layers share attention blocks",
    "bamba": "its attention layers have rotary positions on a part of each head",
}
FIXED = {"hidden_act": "silu", "use_bias": False}
"""Settings for which the layers here support a single value."""


def from_transformers(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Load a checkpoint as a language model, on the CPU and in evaluation mode.

    Args:
        folder: contains the ``config.json`` of a ``mamba``, ``mamba2``, ``llama``, ``mistral`` or ``qwen2`` and its
            safetensors, in one or more files.
        dtype: dtype of the parameters; those that mamba keeps in float32 stay in float32.

    Raises:
        Unsupported: for another architecture, with the reason; for a model that :func:`regard.swap` changed, as those of
            retrofits, with the call that loads it; for settings that the layers here do not support; and for missing or
            unexpected tensors.
    """
    place = Path(folder)
    config = _read_json(place / CONFIG)
    of_timm = "pretrained_cfg" in config
    if of_timm or "regard" in (*config, config.get("model_type")):
        raise Unsupported(
            f"{place}, whose {'model is of timm' if of_timm else 'attention is of regard'}",
            supported=f"{', '.join(CONFIGS)} of transformers, as they were",
            nearest=call_that_loads(config, place),
        )
    check_convertible(config)
    return converted(config, _read_weights(place), dtype=dtype, source=str(place))[0].eval()


def check_convertible(config: Mapping[str, Any]) -> None:
    """Raise Unsupported, with the reason, for settings of a model that the layers here do not support."""
    kind = config.get("model_type")
    if kind not in CONFIGS:
        reason = REASONS.get(str(kind))
        raise Unsupported(
            f"a checkpoint of {kind}" + (f" ({reason})" if reason else ""),
            supported=", ".join(CONFIGS),
            nearest="" if reason else 'regard.swap(model, "softmax"), for models of attention',
        )
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise Unsupported(f"{name}={config[name]!r} of a {kind}", supported=f"{name}={value!r}")


def converted(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    layers: Sequence[Any] | None = None,
    source: str = "the checkpoint",
) -> tuple[LanguageModel, list[str]]:
    """Build a language model from a checkpoint's settings and tensors; also return the names of its new parameters.

    Args:
        layers: for a llama, mistral or qwen2, (name, options) of each layer, to use instead of its own; the windows of
            the checkpoint stay in those of softmax. Parameters other than the projections are new; the embeddings of
            tokens that the layers insert start as the mean of all embeddings, as in Mohtashami and Jaggi (arXiv
            2305.16300).
        source: the name of the checkpoint in error messages.

    Raises:
        Unsupported: as :func:`from_transformers`.
    """
    check_convertible(config)
    try:
        made = CONFIGS[config["model_type"]](config, layers)
    except KeyError as error:
        raise Unsupported(f"{source} without {error}", supported=f"the settings of a {config['model_type']}") from None
    with torch.random.fork_rng(devices=[]):
        model = LanguageModel(made).to(dtype)
    found = {_renamed(name): tensor.to(dtype) for name, tensor in tensors.items()}
    if made.tie_embeddings:
        found.pop("head.weight", None)
        if "norm.weight" in found:
            found["norm.weight"] = found["norm.weight"] * made.dim**0.5
    if model.insertion.extra_tokens and "embedding.weight" in found:
        mean = found["embedding.weight"].mean(0, keepdim=True)
        found["embedding.weight"] = torch.cat(
            [found["embedding.weight"], mean.expand(model.insertion.extra_tokens, -1)]
        )
    new = []
    for name, parameter in model.state_dict().items():
        if name.endswith("conv.weight") and name in found:
            found[name] = found[name].squeeze(1)
        elif name.endswith("conv.bias") and not config.get("use_conv_bias", True):
            found.setdefault(name, torch.zeros_like(parameter))
        if name in found:
            found[name] = found[name].to(parameter.dtype)
        elif layers is not None and ".mixer." in name:
            found[name] = parameter
            new.append(name)
    load_tensors(model, found, source=source)
    return model, new


def _renamed(name: str) -> str:
    for prefix in BLOCKS:
        if name.startswith(prefix):
            number, _, inside = name.removeprefix(prefix).partition(".")
            return f"blocks.{number}.{BLOCK_NAMES.get(inside, inside)}"
    return NAMES.get(name, name)


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
