"""Models with any mechanism in any layer."""

from __future__ import annotations

from regard.models.algorithmic_network import AlgorithmicNetwork, AlgorithmicNetworkConfig
from regard.models.aspect import aspects, with_aspect
from regard.models.conversion import change_plan, extend_positions
from regard.models.encoder import Encoder, EncoderConfig
from regard.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from regard.models.exits import exit_layers, set_exit_rule
from regard.models.forecaster import Forecaster, ForecasterConfig
from regard.models.from_transformers import from_transformers
from regard.models.funnel import FunnelEncoder, FunnelEncoderConfig
from regard.models.head_readout import HeadReadout, read_heads
from regard.models.language_model import LanguageModel, LanguageModelConfig, ModelState
from regard.models.parameters import count_parameters, match_parameters
from regard.models.plans import (
    attention_share,
    differential_plan,
    masformer_plan,
    masformer_schedule,
    tokenformer_plan,
    transnormer_plan,
)
from regard.models.pretrained import from_pretrained, save_pretrained
from regard.models.registry import build_model, config_for, models_for, register_model
from regard.models.replaced import ReplacedTokenConfig, ReplacedTokenModel
from regard.models.stack import Stack, StackConfig
from regard.models.stages import PyramidEncoder, PyramidEncoderConfig, StageConfig

__all__ = [
    "AlgorithmicNetwork",
    "AlgorithmicNetworkConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Forecaster",
    "ForecasterConfig",
    "FunnelEncoder",
    "FunnelEncoderConfig",
    "HeadReadout",
    "LanguageModel",
    "LanguageModelConfig",
    "ModelState",
    "PyramidEncoder",
    "PyramidEncoderConfig",
    "ReplacedTokenConfig",
    "ReplacedTokenModel",
    "Stack",
    "StackConfig",
    "StageConfig",
    "aspects",
    "attention_share",
    "build_model",
    "change_plan",
    "config_for",
    "count_parameters",
    "differential_plan",
    "exit_layers",
    "extend_positions",
    "from_pretrained",
    "from_transformers",
    "masformer_plan",
    "masformer_schedule",
    "match_parameters",
    "models_for",
    "read_heads",
    "register_model",
    "save_pretrained",
    "set_exit_rule",
    "tokenformer_plan",
    "transnormer_plan",
    "with_aspect",
]
