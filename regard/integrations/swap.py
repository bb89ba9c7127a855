"""`regard.swap` puts another mechanism into the attention modules of an existing model; `regard.unswap` undoes it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import nn

from regard.catalogue import get_mechanism
from regard.contract import Mechanism, Pattern, Unsupported, an_instance
from regard.integrations.chosen import Chosen
from regard.integrations.heads import HeadAttention
from regard.integrations.torch_modules import MultiheadAttention, Swapped, VisionAttention
from regard.models.variants import read_variant

WINDOWS = "windows of tokens, with a learned bias for each offset"
BIASED = "a learned bias for each offset on the grid"
ROTARY = "rotary positions of two sides"
REASONS = {
    "layers.attention.AttentionRope": ROTARY,
    "models.beit.Attention": BIASED,
    "models.eva.EvaAttention": ROTARY,
    "models.swin_transformer.WindowAttention": WINDOWS,
    "models.swin_transformer_v2.WindowAttention": f"cosines of {WINDOWS}",
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention": f"cosines of {WINDOWS}",
    "models.vision_transformer_relpos.RelPosAttention": BIASED,
    "models.vision_transformer_sam.Attention": BIASED,
}
"""Features of timm's attention that another mechanism would leave out."""

CROSSING = re.compile("encoder_attn|cross|EncDec", re.IGNORECASE)
"""Names of modules in transformers models that attend to another sequence."""

PACKS = "regard_packs"
"""Attribute of a PyTorch encoder that packed padded batches before a swap."""
CALLED_CAUSALLY = frozenset(
    f"{name}_text_model" for name in ("clip", "clipseg", "groupvit", "metaclip_2", "owlv2", "owlvit", "xclip")
)
"""Kinds of transformers models that call their attention causally, while its modules say that they are not causal."""

NAMED = 3
"""Number of modules that an error message names for each reason."""
KNOWN = "nn.MultiheadAttention, transformers models with the attention interface, timm's ViT attention"


@dataclass(frozen=True)
class SwapReport:
    """The changes made by :func:`swap` or :func:`unswap`.

    Attributes:
        mechanism: name of the mechanism, or names.
        changed: path of each changed module, with its previous class and its present mechanism and pattern.
        kept: attention modules that were left as they are.
        learned: names of parameters that are new and untrained; empty when the mechanism learns nothing in addition to
            the projections.
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


@dataclass(frozen=True)
class Choice:
    """A mechanism for a module, with its options and pattern."""

    card: Mechanism
    options: dict[str, Any]
    pattern: Pattern | None

    @classmethod
    def of(cls, named: Any, pattern: str | Pattern | None = None) -> Choice:
        """Make a checked choice from a name, which may have options (``local:window=64``), or from a name and
        options."""
        written, further = (named, {}) if isinstance(named, str) else named
        if not isinstance(written, str):
            raise Unsupported(f"mechanism {written!r}", supported="a name, as text", nearest='"local:window=64"')
        variant = read_variant(written)
        if len(variant.layers) > 1:
            raise Unsupported(
                f"{written!r} for one module",
                supported="one mechanism; a hybrid is a mapping of paths",
                nearest='{"*.0.*": "softmax", "*": "local:window=64"}',
            )
        ((name, options),) = variant.layers
        card = get_mechanism(name)
        options = {**options, **further}
        chosen = Chosen.of(card, **options)
        return cls(card, options, None if pattern is None else chosen.require_pattern(pattern))

    @property
    def chosen(self) -> Chosen:
        """The mechanism in the form that modules take."""
        return Chosen.of(self.card, **self.options)

    def for_module(self, usual: Pattern) -> Choice:
        """The same choice with a pattern: its own, or else the module's usual one."""
        return Choice(self.card, self.options, self.pattern or self.chosen.require_pattern(usual))


Change = Callable[[], tuple[str, nn.Module]]
"""Carries out a planned change; returns the name of the part with new parameters in the changed module, and the
part."""


def swap(
    model: nn.Module,
    mechanism: str | Mapping[str, Any],
    *,
    pattern: str | Pattern | None = None,
    only: str | None = None,
    **options: Any,
) -> SwapReport:
    """Put `mechanism` into the attention modules of `model`, in place, keeping their projections.

    Supports `nn.MultiheadAttention` (alone and in PyTorch's encoder and decoder layers), transformers models that
    dispatch through its attention interface, and timm's ViT attention. Everything is checked before anything is
    changed. A model may be swapped again; what its previous mechanism had learned in addition to the projections is
    then lost.

    Args:
        mechanism: name of an attention mechanism of queries, keys and values, optionally with options
            (``local:window=64``). With ``softmax`` the outputs of tokens that are no padding stay equal, with every
            mask. With any other the model needs training; parameters in addition to the projections (gates) are new.
            For hybrids, a mapping from path patterns to a name, to a pair of name and options, or to None for modules
            to leave; the first pattern that matches decides, and modules that match none are left::

                swap(model, {"*.layers.0.*": None, "*": "local:window=64"})

        pattern: pattern of all modules. By default causal-self in decoder layers, causal-cross where such a layer reads
            an encoder, what transformers says of its modules, and otherwise noncausal-self or noncausal-cross. A call
            of a self pattern is causal if its mask is, where the mechanism has that pattern.
        only: a path pattern (``encoder.layers.*``) of the modules to change.
        options: options of the mechanism.

    Raises:
        Unsupported: with all reasons, when a module cannot be changed safely; no module is changed then.
    """
    if not isinstance(model, nn.Module):
        raise Unsupported(
            f"swapping attention in {an_instance(model)}",
            supported="a torch module",
            nearest="swap(model, 'linear')",
        )
    choices = _choices(mechanism, pattern, only, options)
    report = SwapReport(", ".join(dict.fromkeys(c.card.name for c in choices.values() if c is not None)))
    plan: dict[str, Change] = {}
    chosen: dict[str, Choice] = {}
    refused: dict[str, list[str]] = {}
    unused = set(choices)
    for path, module in model.named_modules():
        reader = reader_of(module)
        if reader is None:
            continue
        glob = next((glob for glob in choices if fnmatch(path, glob)), None)
        unused.discard(glob or "")
        choice = None if glob is None else choices[glob]
        if choice is None:
            report.kept.append(path)
            continue
        try:
            chosen[path] = choice.for_module(_usual_pattern(model, path, module))
            plan[path] = reader(model, path, module, chosen[path])
        except Unsupported as error:
            refused.setdefault(str(error).removeprefix("not supported: "), []).append(path)
            continue
        report.changed[path] = f"{type(module).__name__}, {choice.card.name}, {chosen[path].pattern}"
    if refused:
        raise Unsupported(
            f"swapping to {report.mechanism}: "
            + "; ".join(f"{_some(paths)}{reason}" for reason, paths in refused.items()),
            supported="modules whose work it can do",
            nearest="only=..., to change other modules, or softmax",
        )
    if not plan and not report.kept:
        raise Unsupported(f"{an_instance(model)} without attention modules that are known", supported=KNOWN)
    if unused or not plan:
        raise Unsupported(
            f"{', '.join(map(repr, unused)) or 'a mapping'}, which chooses no attention module of this "
            f"{type(model).__name__}",
            supported=f"patterns of their paths: {', '.join([*report.changed, *report.kept])}",
        )
    bridge = _bridge(model)
    if bridge is not None:
        bridge.check_interface(model)
    added = {path: change() for path, change in plan.items()}
    for path, (name, module) in added.items():
        report.learned.extend(f"{path}.{name}.{parameter}" for parameter, _ in module.named_parameters())
    if bridge is not None:
        report.notes.extend(bridge.record_swap(model, chosen))
    _choose_paths_of_encoders(model)
    return report


def _some(paths: list[str]) -> str:
    """The first modules to which a reason applies, and how many more there are."""
    named = ", ".join(filter(None, paths[:NAMED])) + (f" and {len(paths) - NAMED} more" if len(paths) > NAMED else "")
    return f"{named}: " if named else ""


def unswap(model: nn.Module, only: str | None = None) -> SwapReport:
    """Restore the original attention of modules that :func:`swap` changed, in place, with the weights as they are now.

    Whatever the mechanisms learned in addition to the projections is dropped.

    Args:
        model: a swapped model.
        only: a path pattern of the modules to restore.

    Raises:
        Unsupported: when no such module is swapped.
    """
    bridge = _bridge(model)
    report = SwapReport("their own attention")
    for path, module in list(model.named_modules()):
        if not isinstance(module, Swapped) and (bridge is None or not bridge.is_swapped(module)):
            continue
        if only is not None and not fnmatch(path, only):
            report.kept.append(path)
            continue
        if isinstance(module, Swapped):
            module = module.original()
            _put(model, path, module)
        else:
            bridge.take_out(module)
        report.changed[path] = type(module).__name__
    if not report.changed:
        raise Unsupported(
            f"unswap of {an_instance(model)} without swapped modules" + ("" if only is None else f" under {only!r}"),
            supported="models that regard.swap has changed",
        )
    if bridge is not None:
        bridge.record_unswap(model)
    _choose_paths_of_encoders(model)
    return report


def change_options(model: nn.Module, only: str | None = None, **options: Any) -> SwapReport:
    """Change options of the mechanisms that :func:`swap` put into a model, in place, keeping everything they have
    learned. Only options that change no parameters are allowed, such as the number of keys that `sea` reads for a
    query::

        change_options(model, top_k=16)

    Args:
        only: a path pattern of the modules to change.

    Raises:
        Unsupported: where nothing is swapped, or a mechanism lacks the option or would need other parameters with it;
            nothing is changed then.
    """
    fresh: dict[str, HeadAttention] = {}
    for path, module in model.named_modules():
        attend = mechanism_in(module)
        if attend is not None and (only is None or fnmatch(path, only)):
            fresh[path] = attend.with_options(**options)
    if not fresh:
        raise Unsupported(
            f"other options of {an_instance(model)} without swapped modules",
            supported="models that regard.swap has changed",
        )
    for path, attend in fresh.items():
        module = model.get_submodule(path)
        setattr(module, _place_in(module), attend)
    bridge = _bridge(model)
    if bridge is not None:
        bridge.record_options(model, fresh, options)
    changed = {path: f"{attend.card.name} with {attend.config}" for path, attend in fresh.items()}
    return SwapReport(", ".join(dict.fromkeys(attend.card.name for attend in fresh.values())), changed)


def mechanism_in(module: nn.Module) -> HeadAttention | None:
    """The mechanism of a swapped attention module; None for a module with its original attention."""
    found = getattr(module, _place_in(module), None)
    return found if isinstance(found, HeadAttention) else None


def _place_in(module: nn.Module) -> str:
    """Name of the attribute that holds a swapped module's mechanism."""
    return "attend" if isinstance(module, Swapped) else "regard"


def _choices(
    mechanism: str | Mapping[str, Any], pattern: str | Pattern | None, only: str | None, options: dict[str, Any]
) -> dict[str, Choice | None]:
    """Choices by path pattern, in order."""
    if not isinstance(mechanism, Mapping):
        return {"*" if only is None else only: Choice.of((mechanism, options), pattern)}
    if only is not None or options:
        raise Unsupported(
            f"{'only' if only is not None else ', '.join(options)} together with a mapping of paths to mechanisms",
            supported="all of it in the mapping",
            nearest='{"*.0.*": ("local", {"window": 64}), "*": None}',
        )
    for named in mechanism.values():
        pair = isinstance(named, (tuple, list)) and len(named) == 2 and isinstance(named[1], Mapping)
        if not (named is None or isinstance(named, str) or pair):
            raise Unsupported(f"{named!r} for a module", supported='a name, (name, {"option": value}), or None')
    return {glob: None if named is None else Choice.of(named, pattern) for glob, named in mechanism.items()}


def reader_of(module: nn.Module) -> Callable[..., Change] | None:
    """The function that plans the change of an attention module; None for other modules."""
    if isinstance(module, (nn.MultiheadAttention, MultiheadAttention)):
        return _plan_multihead
    timm = sys.modules.get("timm.layers.attention")
    if isinstance(module, VisionAttention) or (timm is not None and isinstance(module, timm.Attention)):
        return _plan_vision
    if _timm_name(module) in REASONS:
        return _refuse_vision
    if _dispatches(module):
        return _plan_transformers
    return None


def _dispatches(module: nn.Module) -> bool:
    """Return whether a module is an attention module that dispatches through transformers' attention interface."""
    home = sys.modules.get(type(module).__module__)
    return (
        type(module).__module__.startswith("transformers.")
        and hasattr(home, "ALL_ATTENTION_FUNCTIONS")
        and hasattr(module, "is_causal")
        and "Attention" in type(module).__name__
    )


def _timm_name(module: nn.Module) -> str:
    home = type(module).__module__
    return f"{home.removeprefix('timm.')}.{type(module).__name__}" if home.startswith("timm.") else ""


def _bridge(model: nn.Module) -> Any:
    """The integration for transformers models, if `model` is one; otherwise None."""
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    from regard.integrations import transformers as bridge

    return bridge


def _model_type(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "model_type", "")


def _usual_pattern(model: nn.Module, path: str, module: nn.Module) -> Pattern:
    parent = model.get_submodule(path.rpartition(".")[0]) if "." in path else None
    if isinstance(parent, nn.TransformerDecoderLayer):
        return Pattern.CAUSAL_CROSS if path.endswith("multihead_attn") else Pattern.CAUSAL_SELF
    if _crosses(path, module):
        return Pattern.CAUSAL_CROSS if _is_beside_causal(model, path) else Pattern.NONCAUSAL_CROSS
    if getattr(module, "is_causal", False) or _model_type(module) in CALLED_CAUSALLY:
        return Pattern.CAUSAL_SELF
    return Pattern.NONCAUSAL_SELF


def _crosses(path: str, module: nn.Module) -> bool:
    return "Cross" in type(module).__name__ or CROSSING.search(path.rpartition(".")[2]) is not None


def _is_beside_causal(model: nn.Module, path: str) -> bool:
    """Whether the self attention nearest to a module that reads another sequence is causal, as in a decoder's layers."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        around = ".".join(parts[:end])
        inside = [(f"{around}.{name}".strip("."), other) for name, other in model.get_submodule(around).named_modules()]
        own = [one for one in inside if reader_of(one[1]) is not None and not _crosses(*one)]
        if own:
            return any(_usual_pattern(model, *one) is Pattern.CAUSAL_SELF for one in own)
    return False


def _plan_multihead(
    model: nn.Module, path: str, module: nn.MultiheadAttention | MultiheadAttention, choice: Choice
) -> Change:
    told = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        if type(module) is not nn.MultiheadAttention:
            raise Unsupported(f"{told}, a subclass that may compute something else", supported="nn.MultiheadAttention")
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            raise Unsupported(f"{told} with learned or zero keys added to the sequence", supported="one without them")
    if module.kdim != module.vdim:
        raise Unsupported(f"{told} with keys and values of different inputs", supported="kdim = vdim")
    assert choice.pattern is not None
    return _replace(model, path, MultiheadAttention(module, choice.chosen, choice.pattern))


def _plan_vision(model: nn.Module, path: str, module: Any, choice: Choice) -> Change:
    timm = sys.modules["timm.layers.attention"]
    if type(module) not in (timm.Attention, VisionAttention):
        raise Unsupported(
            f"{type(module).__name__}, a subclass that may compute something else", supported="timm.layers.Attention"
        )
    assert choice.pattern is not None
    parent, grid = _grid_around(model, path)
    if grid is None and parent is not None and "roles" in choice.chosen.card.honours and not choice.pattern.causal:
        raise Unsupported(
            f"swapping to {choice.chosen.name}, which lays tokens out, in {an_instance(parent)}, which does not say how "
            "its tokens are",
            supported="models of one grid with the attribute num_prefix_tokens",
            nearest="ViT and DeiT",
        )
    return _replace(model, path, VisionAttention(module, choice.chosen, choice.pattern, grid=grid))


def _refuse_vision(model: nn.Module, path: str, module: nn.Module, choice: Choice) -> Change:
    raise Unsupported(
        f"timm's {type(module).__name__}, which computes more than attention: {REASONS[_timm_name(module)]}",
        supported="timm.layers.Attention, of ViT and DeiT",
    )


def _grid_around(model: nn.Module, path: str) -> tuple[nn.Module | None, tuple[int, ...] | None]:
    """The model around the module that divides images into a grid of patches; and the number of tokens before the grid
    and its sides, if that model tells the number, as those do that keep the grid (PiT pools it)."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        parent = model.get_submodule(".".join(parts[:end]))
        sides = getattr(getattr(parent, "patch_embed", None), "grid_size", None)
        if sides is not None:
            before = getattr(parent, "num_prefix_tokens", None)
            return parent, None if before is None else (before, *sides)
    return None, None


def _replace(model: nn.Module, path: str, new: Swapped) -> Change:
    if not path:
        raise Unsupported("a model that is itself the attention module", supported="a module that contains it")

    def change() -> tuple[str, nn.Module]:
        _put(model, path, new)
        return "attend", new.attend

    return change


def _put(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _plan_transformers(model: nn.Module, path: str, module: Any, choice: Choice, **told: Any) -> Change:
    bridge = _bridge(model)
    if bridge is None:
        raise Unsupported("a part of a transformers model", supported="the whole model, a PreTrainedModel")
    change: Change = bridge.plan(model, path, module, choice, **told)
    return change


def _choose_paths_of_encoders(model: nn.Module) -> None:
    """Turn PyTorch's packing of padded batches off in encoders with swapped modules, and on again after an unswap."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor"):
            swapped = any(isinstance(m, MultiheadAttention) for m in module.modules())
            if swapped and module.use_nested_tensor:
                module.use_nested_tensor = False
                setattr(module, PACKS, True)
            elif not swapped and module.__dict__.pop(PACKS, False):
                module.use_nested_tensor = True
