"""The registry of models, by the name under which they are saved, and the choice of a model for a task.

A model's config class declares which tasks the model serves: ``serves`` is a tuple of (pattern, objective), and
``for_task`` makes the config. If no model is named, the first registered one that serves the task is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from regard.contract import Pattern, Unsupported, closest
from regard.models.algorithmic_network import AlgorithmicNetwork, AlgorithmicNetworkConfig
from regard.models.encoder import Encoder, EncoderConfig
from regard.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from regard.models.forecaster import Forecaster, ForecasterConfig
from regard.models.funnel import FunnelEncoder, FunnelEncoderConfig
from regard.models.image_model import ImageModel, ImageModelConfig
from regard.models.language_model import LanguageModel, LanguageModelConfig
from regard.models.replaced import ReplacedTokenConfig, ReplacedTokenModel
from regard.models.segmentation_model import SegmentationModel, SegmentationModelConfig
from regard.models.stages import PyramidEncoder, PyramidEncoderConfig
from regard.models.vision import list_networks

if TYPE_CHECKING:
    from regard.tasks.protocol import Task

Config = (
    LanguageModelConfig
    | EncoderConfig
    | EncoderDecoderConfig
    | ForecasterConfig
    | FunnelEncoderConfig
    | PyramidEncoderConfig
    | AlgorithmicNetworkConfig
)

MODELS: dict[str, tuple[type[nn.Module], type[Any]]] = {
    "LanguageModel": (LanguageModel, LanguageModelConfig),
    "Encoder": (Encoder, EncoderConfig),
    "EncoderDecoder": (EncoderDecoder, EncoderDecoderConfig),
    "Forecaster": (Forecaster, ForecasterConfig),
    "FunnelEncoder": (FunnelEncoder, FunnelEncoderConfig),
    "PyramidEncoder": (PyramidEncoder, PyramidEncoderConfig),
    "AlgorithmicNetwork": (AlgorithmicNetwork, AlgorithmicNetworkConfig),
    "ImageModel": (ImageModel, ImageModelConfig),
    "ReplacedTokenModel": (ReplacedTokenModel, ReplacedTokenConfig),
    "SegmentationModel": (SegmentationModel, SegmentationModelConfig),
}


def register_model(model: type[nn.Module], config: type[Any]) -> None:
    """Register a plugin's model in this process, under the name of its class.

    Args:
        model: a module whose only argument is a config, kept as ``model.config``.
        config: a dataclass, with ``serves`` and ``for_task`` if the model is to be found for tasks.

    Raises:
        Unsupported: if another model has the name.
    """
    name = model.__name__
    if name in MODELS and MODELS[name] != (model, config):
        raise Unsupported(f"another model named {name}", supported="a name that no model has: " + ", ".join(MODELS))
    MODELS[name] = (model, config)


def served() -> list[tuple[Pattern, str]]:
    """Return the patterns and objectives of tasks that some model serves."""
    return list(dict.fromkeys(kind for _, config in MODELS.values() for kind in getattr(config, "serves", ())))


def models_for(task: Task) -> list[str]:
    """Return the names of the models that serve a task, in order of registration."""
    kind = (task.pattern, task.objective)
    return [name for name, (_, config) in MODELS.items() if kind in getattr(config, "serves", ())]


def config_for(task: Task, plan: Any, model: str | None = None, **sizes: Any) -> Any:
    """Return the config of a model for a task.

    Args:
        task: the task, which determines the inputs and outputs.
        plan: the plan of the layers to compare, as in :class:`regard.models.LanguageModelConfig`; in a cross pattern,
            the layers between the two sequences, with softmax within each sequence.
        model: name of the model; the first that serves the task when None.
        sizes: ``dim``, ``num_layers``, ``num_heads``, ``max_length``, ``positions``, ``stack``, and fields that only
            some models have.

    Raises:
        Unsupported: if no model, or not the named one, serves the task.
    """
    names = models_for(task)
    if not names:
        raise Unsupported(
            f"task {task.name} of pattern {task.pattern} and objective {task.objective}",
            supported="; ".join(f"{pattern} with {objective}" for pattern, objective in served()),
        )
    if model is not None and model not in names:
        backbones = list_networks() if len(task.grid or ()) >= 2 else []
        raise Unsupported(
            f"model {model!r} for the task {task.name}",
            supported=", ".join(names) + (", or an image backbone of its own" if backbones else ""),
            nearest=closest(model, [*names, *backbones]),
        )
    return MODELS[model or names[0]][1].for_task(task, plan, **sizes)


def build_model(config: Any) -> nn.Module:
    """Build the model of a config; raises Unsupported if no model has such a config."""
    for model, config_class in MODELS.values():
        if type(config) is config_class:
            return model(config)
    raise Unsupported(
        f"a config of type {type(config).__name__}", supported=", ".join(c.__name__ for _, c in MODELS.values())
    )


def model_classes(name: str) -> tuple[type[nn.Module], type[Any]]:
    """Return the model class and config class for a model's name; raises Unsupported for an unknown name."""
    if name not in MODELS:
        raise Unsupported(f"model {name!r}", supported=", ".join(MODELS), nearest=closest(str(name), MODELS))
    return MODELS[name]
