"""Distillation: a small model learns from a large one.

:mod:`losses` compares tensors of any models, :mod:`reading` what layers compute; :mod:`transkd` is TransKD for
multi-stage transformers; :class:`Taught` combines a student and its teacher in one module that every training loop here
can train. Layers that learn to attend as softmax does are taught by :mod:`regard.training.distillation`.
"""

from __future__ import annotations

from regard.compression.distillation.cached import AnswerCache
from regard.compression.distillation.losses import (
    attention_transfer_loss,
    channel_loss,
    context_loss,
    feature_loss,
    patient_layers,
    patient_loss,
    place_loss,
    relation_loss,
    response_loss,
)
from regard.compression.distillation.teaching import METHODS, Method, ResponseConfig, Taught, read_method
from regard.compression.distillation.transkd import (
    GLMixer,
    SelectiveFusion,
    Stages,
    TransKD,
    TransKDConfig,
    coarse_cross_entropy,
    encoder_of,
    recorded,
)

__all__ = [
    "METHODS",
    "AnswerCache",
    "GLMixer",
    "Method",
    "ResponseConfig",
    "SelectiveFusion",
    "Stages",
    "Taught",
    "TransKD",
    "TransKDConfig",
    "attention_transfer_loss",
    "channel_loss",
    "coarse_cross_entropy",
    "context_loss",
    "encoder_of",
    "feature_loss",
    "patient_layers",
    "patient_loss",
    "place_loss",
    "read_method",
    "recorded",
    "relation_loss",
    "response_loss",
]
