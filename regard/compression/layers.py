"""The layers of a model that can be quantized, in module order: linear layers, the head, and the layers left alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Unsupported, an_instance
from regard.layers.linear import Linear
from regard.layers.quantized import QuantizedLinear
from regard.mechanisms.gated_softmax import GatePredictor
from regard.models.registry import MODELS
from regard.positions.learned import Learned
from regard.tasks.protocol import Batch
from regard.training.step import batch_context, run_model

HEAD = re.compile(r"(^|\.)(lm_head|head|classifier|score)(\.|$)")
"""Names of the modules that produce a model's outputs."""

Run = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Layers:
    """The layers of a model by name.

    Attributes:
        body: linear layers to quantize.
        head: name of a language model's output projection, if it is a linear layer; not included in the body.
        tied: the embeddings whose table is the head's weight, each with the factor of the rows that it looks up.
        kept: the reason why each other layer with a weight matrix is left as it is; also for matrices that are no layer's,
            such as those of experts, by the names of the parameters.
    """

    body: dict[str, nn.Linear]
    head: str | None
    tied: dict[str, float]
    kept: dict[str, str]


def find_layers(model: nn.Module, keep: Callable[[str, nn.Module], bool] = lambda name, module: False) -> Layers:
    """Find the layers of a model, a transformers model within :func:`regard.integrations.conv1d.conv1d_as_linear`.

    Args:
        keep: called with name and module; returns whether a module stays as it is, with everything in it.

    Raises:
        Unsupported: for a model without layers that can be quantized, a model that is quantized already, weights that are
            not finite, in float32 and on the CPU, and layers that share a weight.
    """
    body: dict[str, nn.Linear] = {}
    kept: dict[str, str] = {}
    others: dict[str, str] = {}
    outputs = language_head(model)
    head, tied = None, dict[str, nn.Embedding]()
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            raise Unsupported(
                "a model that is quantized already", supported="a model in floating point", nearest="undo()"
            )
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        reason = _reason_to_keep(name, module, keep, head=module is outputs)
        if reason:
            kept[name] = reason
            inside.append(name)
        elif type(module) in (nn.Linear, Linear):
            if module is outputs:
                head = name
            else:
                body[name] = module
        elif isinstance(module, nn.Embedding):
            if outputs is not None and module.weight is outputs.weight:
                tied[name] = module
        elif not isinstance(module, Learned):
            others |= _matrices(name, module)
    factors = {name: factor for name, table in tied.items() if (factor := factor_of(table)) is not None}
    if head is not None and len(factors) < len(tied):
        odd = next(name for name in tied if name not in factors)
        kept[odd] = f"{an_instance(tied[odd])}, which may compute something else than rows of its table"
        kept[head], head = f"its weight is the table of {odd}, {kept[odd]}", None
    if not body:
        raise Unsupported(
            f"quantization of {an_instance(model)} without linear layers"
            + (f" but {next(iter(kept))} ({next(iter(kept.values()))})" if kept else ""),
            supported="models of torch.nn.Linear",
        )
    for name, module in body.items():
        _check(name, module)
    shared = _shared(body)
    if shared:
        raise Unsupported(f"layers that share a weight: {' and '.join(shared)}", supported="a weight for each layer")
    return Layers(body, head, factors, kept | others)


@torch.no_grad()
def factor_of(table: nn.Embedding) -> float | None:
    """The factor of the rows that an embedding looks up: 1, or ``embed_scale`` as in Gemma and BART; None for one that
    computes something else, or has hooks."""
    if "forward" in vars(table) or table._forward_hooks or table._forward_pre_hooks or table.max_norm is not None:
        return None
    if type(table) is nn.Embedding:
        return 1.0
    factor = getattr(table, "embed_scale", None)
    if factor is None:
        return None
    ids = torch.arange(min(len(table.weight), 64), device=table.weight.device)
    return float(factor) if torch.allclose(table(ids), table.weight[ids] * float(factor)) else None


def language_head(model: nn.Module) -> Any:
    """The output projection of a language model; None for other models."""
    outputs: Any = getattr(model, "get_output_embeddings", None)
    if outputs is not None:
        return outputs()
    if type(model).__name__ in ("LanguageModel", "EncoderDecoder") and type(model).__name__ in MODELS:
        return getattr(model, "head", None)
    return None


def _reason_to_keep(name: str, module: nn.Module, keep: Callable[[str, nn.Module], bool], *, head: bool) -> str:
    if name and keep(name, module):
        return "as asked"
    if isinstance(module, nn.MultiheadAttention):
        return "its projections are inside torch's own function"
    if isinstance(module, GatePredictor):
        return "a predictor of gates, which is small"
    if isinstance(module, nn.Linear):
        if type(module) not in (nn.Linear, Linear):
            return f"{an_instance(module)} may compute something else"
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return "its forward was replaced, or has hooks"
        if HEAD.search(name) and not head:
            return "the head"
        if not {name for name, _ in module.named_parameters()} <= {"weight", "bias"}:
            return "it has more parameters than a weight and a bias"
        return ""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "a convolution"
    if type(module).__name__ == "Conv1D" and hasattr(module, "weight"):
        return "a Conv1D whose forward was replaced, or that has hooks"
    return ""


def _matrices(name: str, module: nn.Module) -> dict[str, str]:
    """The matrices among a module's own parameters, each with the reason why it stays as it is."""
    reason = f"a parameter of {an_instance(module)}, which is not a linear layer"
    return {
        f"{name}.{part}".removeprefix("."): reason
        for part, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and sum(size > 1 for size in parameter.shape) > 1
    }


def _check(name: str, module: nn.Linear) -> None:
    if module.weight.dtype != torch.float32:
        raise Unsupported(
            f"{name} in {str(module.weight.dtype)[6:]}", supported="weights in float32", nearest="model.float()"
        )
    if not module.weight.is_cpu:
        raise Unsupported(
            f"{name} on {module.weight.device}", supported="models on the processor", nearest="model.cpu()"
        )
    if not bool(torch.isfinite(module.weight).all()):
        raise Unsupported(
            f"{name} with weights that are not finite", supported="a model whose training did not diverge"
        )


def _shared(body: Mapping[str, nn.Linear]) -> list[str]:
    first: dict[int, str] = {}
    for name, module in body.items():
        other = first.setdefault(module.weight.data_ptr(), name)
        if other != name and module.weight.numel():
            return [other, name]
    return []


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a task's :class:`Batch`, a mapping or tuple of arguments, or the first argument alone."""
    if isinstance(batch, Batch):
        return run_model(model, batch, batch_context(batch))
    more: dict[str, Any] = {}
    if hasattr(model, "generate") and hasattr(model, "get_output_embeddings") and _is_decoder(model):
        more["use_cache"] = False
    if isinstance(batch, Mapping):
        return model(**{**more, **batch})
    if isinstance(batch, tuple | list):
        return model(*batch, **more)
    if isinstance(batch, Tensor):
        return model(batch, **more)
    raise Unsupported(
        f"a batch of type {type(batch).__name__}", supported="a tensor, a tuple or mapping of them, a Batch, or run="
    )


def _is_decoder(model: Any) -> bool:
    return hasattr(getattr(model, "config", None), "use_cache")


def comes_from_transformers(model: Any) -> bool:
    """Return whether a model comes from transformers, without importing transformers."""
    return any(kind.__module__ == "transformers.modeling_utils" for kind in type(model).__mro__)


def answers_of(found: Any) -> Tensor | None:
    """The tensor in a model's return value: its output, logits or last hidden states; None if there is none."""
    for name in ("output", "logits", "last_hidden_state"):
        if isinstance(getattr(found, name, None), Tensor):
            return getattr(found, name)
    return found if isinstance(found, Tensor) else None
