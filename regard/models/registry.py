"""The models by the name under which they are saved."""

from __future__ import annotations

from typing import Any

from torch import nn

from regard.contract import Unsupported, closest
from regard.models.encoder import Encoder, EncoderConfig
from regard.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from regard.models.forecaster import Forecaster, ForecasterConfig
from regard.models.funnel import FunnelEncoder, FunnelEncoderConfig
from regard.models.language_model import LanguageModel, LanguageModelConfig

Config = LanguageModelConfig | EncoderConfig | EncoderDecoderConfig | ForecasterConfig | FunnelEncoderConfig

MODELS: dict[str, tuple[type[nn.Module], type]] = {
    "LanguageModel": (LanguageModel, LanguageModelConfig),
    "Encoder": (Encoder, EncoderConfig),
    "EncoderDecoder": (EncoderDecoder, EncoderDecoderConfig),
    "Forecaster": (Forecaster, ForecasterConfig),
    "FunnelEncoder": (FunnelEncoder, FunnelEncoderConfig),
}


def build_model(config: Any) -> nn.Module:
    """The model of a config; raises Unsupported for a config of no model."""
    for model, config_class in MODELS.values():
        if type(config) is config_class:
            return model(config)
    raise Unsupported(
        f"a config of type {type(config).__name__}", supported=", ".join(c.__name__ for _, c in MODELS.values())
    )


def model_classes(name: str) -> tuple[type[nn.Module], type]:
    """Model and config class by the model's name; raises Unsupported for an unknown one."""
    if name not in MODELS:
        raise Unsupported(f"model {name!r}", supported=", ".join(MODELS), nearest=closest(str(name), MODELS))
    return MODELS[name]
