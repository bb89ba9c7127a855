"""In-place conversion of a trained model: other mechanisms with the same weights, and longer position tables.

MASFormer's recipe (arXiv 2310.12442) for adapting a model trained on short inputs to long ones::

    change_plan(model, masformer_plan(12, "bottom:3", block=512))
    extend_positions(model, 8192)                          # for learned positions; go on training with a new optimizer
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from regard.contract import Unsupported, an_instance
from regard.models.encoder import Encoder
from regard.models.language_model import LanguageModel
from regard.positions.learned import Learned


def change_plan(model: nn.Module, plan: str | Sequence[Any]) -> None:
    """Replace a model's layers by those of another plan, in place, keeping its parameters.

    The parameters remain the same objects, so an optimizer stays valid, even in the middle of training. Hooks on the
    layers are lost. The config is updated, so the model can be saved.

    Args:
        model: a language model or an encoder.
        plan: a plan with as many layers, whose parameters have the same names and shapes.

    Raises:
        Unsupported: for another kind of model, or a plan whose model has other parameters or inserts other tokens; the
            model is then left unchanged.
    """
    if not isinstance(model, LanguageModel | Encoder):
        raise Unsupported(f"another plan for {an_instance(model)}", supported="LanguageModel, Encoder")
    own = model.state_dict(keep_vars=True)
    some = next(model.parameters())
    with torch.random.fork_rng(devices=[some.device] if some.device.type == "cuda" else []):
        made: Any = type(model)(dataclasses.replace(model.config, plan=plan)).to(some)  # type: ignore[arg-type]
    wanted = made.state_dict(keep_vars=True)
    apart = [name for name in {**own, **wanted} if _shape(own.get(name)) != _shape(wanted.get(name))]
    if apart or getattr(made, "insertion", None) != getattr(model, "insertion", None):
        raise Unsupported(
            f"a plan whose model has another {apart[0]}" if apart else "a plan whose layers insert other tokens",
            supported="layers with parameters of the same names and shapes, as softmax and local have",
        )
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(own[name].requires_grad)  # load_state_dict(assign=True) copies requires_grad from here
    made.load_state_dict(own, assign=True)
    model.blocks, model.positions, model.config = made.blocks.train(model.training), made.positions, made.config


def _shape(tensor: torch.Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def extend_positions(model: nn.Module, length: int, how: str = "tile") -> tuple[str, ...]:
    """Lengthen every learned position table of a model, in place.

    Args:
        model: any module that contains :class:`regard.positions.Learned`. The ``max_length`` of its config is updated,
            so that a model of :mod:`regard.models` can be saved.
        length, how: as for :meth:`regard.positions.Learned.extend`.

    Returns:
        The names of the modules. Their parameters are new: rebuild the optimizer.

    Raises:
        Unsupported: for a model without learned positions, or a length that is not longer; the model is then left
            unchanged.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Learned)}
    if not found:
        raise Unsupported(
            "longer positions in a model without learned ones",
            supported='models with positions="learned"; sinusoidal and rotary positions have no end',
        )
    for module in found.values():
        module.check_extension(length, how)
    for module in found.values():
        module.extend(length, how)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "max_length"):
        model.config = dataclasses.replace(config, max_length=length)
    return tuple(found)
