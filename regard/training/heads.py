"""Conversion of a trained model to a mixture of heads (MoH, Jin et al., arXiv 2410.11842, section 3.3).

The converted model is trained further with fewer active heads.

::

    importance = head_importance(model, batches)           # for every head, from the gradients of a few batches
    sparse = mix_heads(model, shared_heads=4, active_heads=2, importance=importance)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.catalogue import get_mechanism
from regard.contract import Kind, Unsupported, an_instance
from regard.layers.attention import AttentionLayer
from regard.models.blocks import FEED_FORWARD_OPTIONS
from regard.models.evaluating import evaluation_mode

if TYPE_CHECKING:
    from jaxtyping import Float

OF_THE_BLOCK = ("positions", "feed_forward", *FEED_FORWARD_OPTIONS, "num_heads", "head_dim", "num_kv_heads")
"""Options of a plan's entry that belong to the block, not to the wrapped layer."""


def head_importance(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None = None
) -> list[Float[Tensor, " h"] | None]:
    """Estimate how much the loss would change, to first order, if a head were scaled: E |d loss / d gate|.

    As in Michel et al. (arXiv 1905.10650, equation 2), this is the mean over sequences of the absolute value of the sum
    over tokens of <head output, its gradient>. The model runs in evaluation mode; the parameters' gradients are not
    touched.

    Args:
        model: a model of :mod:`regard.models` with `blocks`.
        batches: the batches passed to `loss`, one after the other.
        loss: a function of (model, batch); ``model.loss(batch)`` when None.

    Returns:
        For each block, the importance of its heads; None if its mixer has no heads.

    Raises:
        Unsupported: without a batch.
    """
    layers = [block.mixer if isinstance(block.mixer, AttentionLayer) else None for block in _blocks(model)]
    totals: list[Tensor | None] = [None] * len(layers)
    sequences = 0
    for batch in batches:
        outputs: dict[int, Tensor] = {}
        hooks = [
            layer.output.register_forward_pre_hook(partial(_keep, outputs, i))
            for i, layer in enumerate(layers)
            if layer is not None
        ]
        try:
            with evaluation_mode(model), torch.enable_grad():
                value = model.loss(batch) if loss is None else loss(model, batch)  # type: ignore[operator]
        finally:
            for hook in hooks:
                hook.remove()
        gradients = torch.autograd.grad(value, list(outputs.values()))
        for (i, output), gradient in zip(outputs.items(), gradients, strict=True):
            layer = layers[i]
            assert layer is not None
            found = (output.detach() * gradient).unflatten(-1, (layer.num_heads, -1)).sum((1, 3)).abs()  # (B, H)
            sequences += found.shape[0] if i == next(iter(outputs)) else 0
            before = totals[i]
            totals[i] = found.sum(0) if before is None else before + found.sum(0)
    if not sequences:
        raise Unsupported("the importance of heads without a sequence", supported="a batch or more")
    return [None if total is None else total / sequences for total in totals]


def mix_heads(
    model: nn.Module,
    *,
    shared_heads: int,
    active_heads: int,
    importance: Sequence[Float[Tensor, " h"] | None] | None = None,
    **options: Any,
) -> nn.Module:
    """Return a copy of `model` whose attention layers are `mixture_of_heads`, routed by query norms.

    The copy has no new parameters; with all heads active it computes the same function. Layers other than attention are
    kept.

    Args:
        model: a language model or an encoder.
        shared_heads, active_heads: numbers of heads in each layer; see
            :class:`regard.mechanisms.mixture_of_heads.Config`.
        importance: the result of :func:`head_importance`; the most important heads of each layer are shared. When None,
            the first heads are.
        options: other options of `mixture_of_heads`.

    Raises:
        Unsupported: for another kind of model, or numbers of heads that do not fit.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "plan"):
        raise Unsupported(f"mixing the heads of {an_instance(model)}", supported="LanguageModel, Encoder")
    plan, wrapped = [], set()
    for i, (name, given) in enumerate(config.plan):
        if get_mechanism(name).kind is not Kind.ATTENTION:
            plan.append((name, given))
            continue
        scores = None if importance is None else importance[i]
        shared: Any = shared_heads
        if scores is not None:
            if not 0 <= shared_heads <= len(scores):
                raise Unsupported(f"shared_heads={shared_heads}", supported=f"0 to {len(scores)}")
            shared = tuple(sorted(scores.topk(shared_heads).indices.tolist()))
        own = {option: value for option, value in given.items() if option in OF_THE_BLOCK}
        inner = {option: value for option, value in given.items() if option not in OF_THE_BLOCK}
        mixed = {"router": "query_norm", **options, "shared_heads": shared, "active_heads": active_heads}
        plan.append(("mixture_of_heads", {**own, **mixed, "mechanism": name, "mechanism_options": inner}))
        wrapped.add(i)
    made = type(model)(dataclasses.replace(config, plan=plan))
    made.to(next(model.parameters()))
    mixers = [block.mixer for i, block in enumerate(_blocks(model)) if i in wrapped]
    inside = {name: f"{name}.attention" for name, module in model.named_modules() if module in mixers}
    weights = {}
    for name, tensor in model.state_dict().items():
        mixer = next((mixer for mixer in inside if name.startswith(f"{mixer}.")), None)
        weights[name if mixer is None else inside[mixer] + name.removeprefix(mixer)] = tensor
    made.load_state_dict(weights, strict=options.get("router", "query_norm") == "query_norm")
    return made.train(model.training)


@torch.no_grad()
def skip_attention(model: nn.Module) -> tuple[str, ...]:
    """Permanently zero the output of every attention layer, in place: the baseline that any attention must surpass.

    Like the option ``skip_attn`` in the code of arXiv 2306.12929. The output projections are set to 0 and the layers'
    parameters are frozen; the layers are still computed.

    Returns:
        The names of the layers.

    Raises:
        Unsupported: for a model without attention layers.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AttentionLayer)}
    if not layers:
        raise Unsupported(f"skipping the attention of {an_instance(model)}", supported="layers of kind attention")
    for layer in layers.values():
        layer.requires_grad_(False)
        for parameter in layer.output.parameters():
            parameter.zero_()
    return tuple(layers)


def _keep(outputs: dict[int, Tensor], layer: int, _: nn.Module, given: tuple[Tensor, ...]) -> None:
    outputs[layer] = given[0]


def _blocks(model: nn.Module) -> Sequence[Any]:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | list):
        raise Unsupported(f"heads of {an_instance(model)}", supported="models with blocks")
    return list(blocks)
