"""`regard.swap`: another mechanism in the attention modules of a model that exists."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import nn

from regard.catalogue import get_mechanism
from regard.contract import Mechanism, Pattern, Unsupported
from regard.integrations.heads import HeadAttention, check_swappable
from regard.integrations.torch_modules import MultiheadAttention, VisionAttention


@dataclass(frozen=True)
class SwapReport:
    """What :func:`swap` changed.

    Attributes:
        mechanism: name.
        changed: path of each module, with the class it had and the pattern it has now.
        kept: modules that `only` left out.
        learned: names of parameters that are new and untrained; empty when the mechanism learns nothing beside the
            projections.
        notes: what else a user should know.
    """

    mechanism: str
    changed: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    learned: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} attention modules now use {self.mechanism}:"]
        lines += [f"  {path}: {what}" for path, what in self.changed.items()]
        if self.kept:
            lines.append(f"left as they were: {', '.join(self.kept)}")
        if self.learned:
            lines.append(f"new, untrained parameters: {', '.join(self.learned)}")
        return "\n".join([*lines, *self.notes])


Change = Callable[[], tuple[str, nn.Module]]
"""Carries out a planned change; returns the module whose parameters are new, and its name in the changed one."""


def swap(
    model: nn.Module,
    mechanism: str,
    *,
    pattern: str | Pattern | None = None,
    only: str | None = None,
    **options: Any,
) -> SwapReport:
    """Put `mechanism` into the attention modules of `model`, in place, on the projections that it has.

    Knows `nn.MultiheadAttention` (alone and in PyTorch's encoder and decoder layers), transformers models that dispatch
    through its attention interface, and timm's ViT attention. Everything is checked before anything is changed.

    Args:
        mechanism: name of an attention mechanism of queries, keys and values. With ``softmax`` the outputs stay equal,
            with every mask. With another the model needs training; what it learns beside the projections (gates) is
            new.
        pattern: of all modules; when None: causal-self in decoder layers, noncausal-cross where a layer reads an
            encoder, what transformers says of its modules, otherwise noncausal-self. A causal mask given later to a
            noncausal-self module makes the call causal, where the mechanism has that pattern.
        only: a pattern of paths (``encoder.layers.*``) to change.
        options: of the mechanism.

    Raises:
        Unsupported: with all reasons, when a module cannot be changed safely; then none is.
    """
    card = get_mechanism(mechanism)
    check_swappable(card)
    card.options(**options)
    wanted = None if pattern is None else card.require_pattern(pattern)
    report = SwapReport(card.name)
    plan: dict[str, Change] = {}
    refused: dict[str, str] = {}
    for path, module in model.named_modules():
        reader = _reader(module)
        if reader is None:
            continue
        if only is not None and not fnmatch(path, only):
            report.kept.append(path)
            continue
        try:
            chosen = wanted or card.require_pattern(_usual_pattern(model, path, module))
            plan[path] = reader(model, path, module, card, chosen, options)
        except Unsupported as error:
            refused[path] = str(error)
            continue
        report.changed[path] = f"{type(module).__name__}, {chosen.value}"
    if refused:
        raise Unsupported(
            f"swapping to {card.name}: " + "; ".join(f"{path}: {reason}" for path, reason in refused.items()),
            supported="modules whose work it can do",
            nearest="only=..., to change other modules, or softmax",
        )
    if not plan:
        raise Unsupported(
            f"a {type(model).__name__} without attention modules that are known"
            + ("" if only is None else f" under {only!r}"),
            supported="nn.MultiheadAttention, transformers models with the attention interface, timm's ViT attention",
        )
    if _is_transformers(model):
        _use_interface(model, card, report)
    for path, change in plan.items():
        prefix, added = change()
        report.learned.extend(f"{path}.{prefix}.{name}" for name, _ in added.named_parameters())
    if _is_transformers(model):
        report.notes.append(_about_caches(model, bool(report.learned)))
    _leave_fused_paths(model)
    return report


def _reader(module: nn.Module) -> Callable[..., Change] | None:
    """What plans the change of a module; None for other modules."""
    if isinstance(module, nn.MultiheadAttention):
        return _plan_multihead
    timm = sys.modules.get("timm.layers.attention")
    if timm is not None and isinstance(module, (timm.Attention, timm.AttentionRope)):
        return _plan_vision
    if _dispatches(module):
        return _plan_transformers
    return None


def _dispatches(module: nn.Module) -> bool:
    """Whether it is an attention module that transformers lets attend by an interface."""
    home = sys.modules.get(type(module).__module__)
    return (
        type(module).__module__.startswith("transformers.")
        and hasattr(home, "ALL_ATTENTION_FUNCTIONS")
        and hasattr(module, "is_causal")
        and "Attention" in type(module).__name__
    )


def _is_transformers(model: nn.Module) -> bool:
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def _usual_pattern(model: nn.Module, path: str, module: nn.Module) -> Pattern:
    parent = model.get_submodule(path.rpartition(".")[0]) if "." in path else None
    if isinstance(parent, nn.TransformerDecoderLayer):
        return Pattern.NONCAUSAL_CROSS if path.endswith("multihead_attn") else Pattern.CAUSAL_SELF
    if "Cross" in type(module).__name__:
        return Pattern.NONCAUSAL_CROSS
    if getattr(module, "is_causal", False):
        return Pattern.CAUSAL_SELF
    return Pattern.NONCAUSAL_SELF


def _plan_multihead(
    model: nn.Module, path: str, module: nn.MultiheadAttention, card: Mechanism, pattern: Pattern, options: Any
) -> Change:
    told = f"{type(module).__name__}"
    if type(module) is not nn.MultiheadAttention:
        raise Unsupported(f"{told}, a subclass that may compute something else", supported="nn.MultiheadAttention")
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise Unsupported(f"{told} with learned or zero keys added to the sequence", supported="one without them")
    if module.kdim != module.vdim:
        raise Unsupported(f"{told} with keys and values of different inputs", supported="kdim = vdim")
    new = MultiheadAttention(module, card, pattern, **options)
    return lambda: _replace(model, path, new)


def _plan_vision(model: nn.Module, path: str, module: Any, card: Mechanism, pattern: Pattern, options: Any) -> Change:
    timm = sys.modules["timm.layers.attention"]
    if type(module) is not timm.Attention:
        raise Unsupported(
            f"timm's {type(module).__name__}, which computes more than attention", supported="timm.layers.Attention"
        )
    new = VisionAttention(module, card, pattern, **options)
    return lambda: _replace(model, path, new)


def _replace(model: nn.Module, path: str, new: Any) -> tuple[str, nn.Module]:
    parent, _, name = path.rpartition(".")
    if not name:
        raise Unsupported("a model that is itself the attention module", supported="a module that contains it")
    setattr(model.get_submodule(parent), name, new)
    return "attend", new.attend


def _plan_transformers(
    model: nn.Module, path: str, module: Any, card: Mechanism, pattern: Pattern, options: Any
) -> Change:
    from regard.integrations.transformers import SwappedHeads

    config = module.config
    if not _is_transformers(model):
        raise Unsupported("a part of a transformers model", supported="the whole model, a PreTrainedModel")
    heads = getattr(module, "num_heads", None) or config.num_attention_heads
    width = next((getattr(module, n) for n in ("head_dim", "attention_head_size") if hasattr(module, n)), None)
    width = width or config.hidden_size // heads
    groups = getattr(module, "num_key_value_groups", 1)
    attend = HeadAttention(
        card,
        dim=config.hidden_size,
        heads=heads,
        kv_heads=heads // groups,
        head_dim=width,
        pattern=pattern,
        **options,
    ).to(next(module.parameters()))
    new = SwappedHeads(attend)
    new.train(module.training)

    def change() -> tuple[str, nn.Module]:
        new.place(module)
        return "regard", new

    return change


def _use_interface(model: Any, card: Mechanism, report: SwapReport) -> None:
    """Switch a transformers model to the mechanism's attention function."""
    from regard.integrations.transformers import PREFIX

    if report.kept:
        raise Unsupported(
            "only=... in a transformers model, whose layers share one attention function",
            supported="only=None",
        )
    if not model._can_set_attn_implementation():
        raise Unsupported(
            f"{type(model).__name__}, which does not dispatch through transformers' attention interface",
            supported="models that do",
        )
    model.set_attn_implementation(PREFIX + card.name)


def _about_caches(model: Any, learns: bool) -> str:
    """What generation does now; turns the cache off where it would lack what the mechanism reads."""
    if not learns:
        return "Generation goes on with the model's cache of keys and values, read whole at each step."
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "use_cache", False):
            config.use_cache = False
    return "use_cache is off: what the mechanism learns from past tokens is not in a cache of keys and values."


def _leave_fused_paths(model: nn.Module) -> None:
    """PyTorch's encoder packs padded batches for a fused path that the new modules do not take."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor"):
            swapped = any(isinstance(m, MultiheadAttention) for m in module.modules())
            module.use_nested_tensor = module.use_nested_tensor and not swapped
