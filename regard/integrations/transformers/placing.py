"""Mechanisms in the attention modules of transformers models: placing, removing, saving and loading them."""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Kind, Pattern, Unsupported, an_instance
from regard.integrations.chosen import Chosen, check_swappable
from regard.integrations.heads import HARD_KEYS, HeadAttention
from regard.integrations.swap import Choice, reader_of
from regard.integrations.torch_modules import Swapped
from regard.integrations.transformers.attending import PLACE, SWAPPED, UNPLACED, Placement, heads_of, tell
from regard.integrations.transformers.caches import keeps_every_key
from regard.integrations.transformers.rotary import find_rotary, some_parameter

RECORD = "regard"
"""Attribute of a config that records a swap: the previous attention implementation, and the mechanism of each module
(None for softmax) by its path in the base model."""
RELATIVE = re.compile("relative.*bias|position_bias")
"""Attributes of modules that add relative position biases to scores."""
ROTATES = re.compile("rotary|rotate_")


def attention_names() -> list[str]:
    """Mechanisms that can replace a model's attention."""
    found = []
    for name in list_mechanisms(kind=Kind.ATTENTION):
        try:
            check_swappable(get_mechanism(name))
        except Unsupported:
            continue
        found.append(name)
    return found


def plan(
    model: nn.Module, path: str, module: Any, choice: Choice, *, unrotated: bool | None = None
) -> Callable[[], Any]:
    """Plan the change that places a mechanism in a module.

    Args:
        unrotated: whether the mechanism gets queries and keys before rotary positions, according to a config; None to
            find out.
    """
    assert choice.pattern is not None
    attend = _head_attention(model, module, choice.chosen, choice.pattern)
    _check_scores(module, attend)
    biased = _adds_bias(model, path, module)
    if biased and "bias" not in attend.card.honours:
        raise Unsupported(
            f"{attend.chosen.name}, whose scores take no bias, in {an_instance(module)}, which adds one for relative "
            "positions",
            supported="mechanisms that take a bias (honours of regard show --json)",
            nearest="softmax",
        )
    attend.placement = _placement(model, path, module, attend, unrotated, biased=biased)

    def change() -> tuple[str, nn.Module]:
        place(module, attend)
        return PLACE, attend

    return change


def _head_attention(model: nn.Module, module: Any, chosen: Chosen, pattern: Pattern) -> HeadAttention:
    config = module.config
    heads = getattr(module, "num_heads", None) or config.num_attention_heads
    widths = (getattr(module, name, None) for name in ("qk_head_dim", "head_dim", "attention_head_size"))
    width = next(filter(None, widths), config.hidden_size // heads)
    groups = getattr(module, "num_key_value_groups", 1)
    attend = HeadAttention(
        chosen,
        dim=config.hidden_size,
        heads=heads,
        kv_heads=heads // groups,
        head_dim=width,
        value_dim=getattr(module, "v_head_dim", None),
        pattern=pattern,
    )
    if "roles" in chosen.card.honours and not pattern.causal and hasattr(config, "patch_size"):
        raise Unsupported(
            f"swapping to {chosen.name}, which lays tokens out, where transformers does not say how images are",
            supported="models of text",
            nearest="the same model of timm",
        )
    return attend.to(some_parameter(model, module)).train(module.training)


def _check_scores(module: Any, attend: HeadAttention) -> None:
    """Refuse a mechanism that cannot honour the softcap of a module's scores, or its attention sinks."""
    softcap, name = getattr(module, "attn_logit_softcapping", None), attend.chosen.name
    if softcap is not None and not attend.chosen.plain and getattr(attend.config, "softcap", None) != softcap:
        raise Unsupported(
            f"{name} in {an_instance(module)}, which caps scores at {softcap}",
            supported=f"softmax, which takes over the softcap, and mechanisms with the option softcap={softcap}",
            nearest="softmax",
        )
    if getattr(module, "sinks", None) is not None and "sink" not in attend.card.axes:
        raise Unsupported(
            f"{name} in {an_instance(module)}, which has attention sinks",
            supported="mechanisms with the input sink",
            nearest="softmax",
        )


def _adds_bias(model: nn.Module, path: str, module: Any) -> bool:
    """Whether this module, one around it or another of its class adds a relative position bias to scores (in T5, only
    the first layer has the table)."""
    return any(
        given is not None and given is not False
        for place, other in model.named_modules()
        if type(other) is type(module) or not place or path.startswith(f"{place}.")
        for name, given in {**vars(other), **other._modules, **other._parameters}.items()
        if RELATIVE.search(name)
    )


def _placement(
    model: nn.Module, path: str, module: Any, attend: HeadAttention, unrotated: bool | None, *, biased: bool
) -> Placement:
    """Decide who keeps the cache and who rotates; raises Unsupported where the mechanism would misread its inputs."""
    layer = getattr(module, "layer_idx", None) if attend.keeps_state and not attend.chosen.plain else None
    if layer is not None and (biased or not keeps_every_key(module.config, layer)):
        # the module counts the tokens of its own cache for its bias, or has a window, and its cache drops older tokens
        layer = None
    rotates = any(ROTATES.search(name) for name in vars(sys.modules[type(module).__module__]))
    if attend.pattern.cross or not rotates or attend.misreads_rotated is None:
        return Placement.of(module, layer)
    rotary = None
    alone = attend.pattern is Pattern.CAUSAL_SELF and layer is None  # reads the model's cache, whose keys are rotated
    if not alone and unrotated is not False:
        before = getattr(module, PLACE, None)  # it gets unrotated queries and keys, so trying would find no rotation
        rotary = None if before is None else before.placement.rotary
        if rotary is None:
            rotary = find_rotary(model, path, module, heads_of, known=unrotated is True)
    if rotary is None:
        attend.check_rotated()
    else:
        attend.check_unrotated()
    return Placement.of(module, layer, rotary)


def place(module: nn.Module, attend: HeadAttention) -> None:
    """Put a mechanism into an attention module, in place of any that is already there."""
    if not is_swapped(module):
        module.register_forward_pre_hook(tell, with_kwargs=True)
    setattr(module, PLACE, attend)


def is_swapped(module: nn.Module) -> bool:
    """Return whether a mechanism is placed in a module."""
    return module._modules.get(PLACE) is not None and _dispatches(module)


def take_out(module: nn.Module) -> None:
    """Undo :func:`place`: the module has softmax attention again."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is tell:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    setattr(module, PLACE, None)


def _dispatches(module: nn.Module) -> bool:
    home = sys.modules.get(type(module).__module__)
    return hasattr(home, "ALL_ATTENTION_FUNCTIONS") and "Attention" in type(module).__name__


def check_interface(model: PreTrainedModel) -> None:
    """Raise Unsupported for a model that does not attend through transformers' attention interface, or has layers whose
    attention was made hard, which no other implementation reaches."""
    if not model._can_set_attn_implementation():
        raise Unsupported(
            f"{type(model).__name__}, which does not dispatch through transformers' attention interface",
            supported="models that do",
        )
    hard = next((name for name, module in model.named_modules() if hasattr(module, HARD_KEYS)), None)
    if hard is not None:
        raise Unsupported(
            f"other attention in {type(model).__name__} with hard attention in {hard}",
            supported="models whose queries read all keys",
            nearest="axformer:hard=0",
        )


def record_swap(model: Any, chosen: Mapping[str, Choice]) -> list[str]:
    """Let a model attend by the mechanisms placed in it, and record them in its config. Returns notes for the user.

    Args:
        chosen: mechanism, options and pattern of each changed module by its path.
    """
    _own_config(model)
    config = model.config
    known = getattr(config, RECORD, None) or {"attention": config._attn_implementation, "modules": {}}
    modules = dict(known["modules"])
    for path, module in model.named_modules():
        if path in chosen:
            choice = chosen[path]
            assert choice.pattern is not None
            entry: dict[str, Any] = {
                "mechanism": choice.card.name,
                "pattern": choice.pattern.value,
                "options": choice.options,
            }
            if is_swapped(module):
                entry["unrotated"] = module.regard.placement.rotary is not None
            modules[_inside_base(model, path)] = entry
        elif _dispatches(module) and not is_swapped(module):
            modules[_inside_base(model, path)] = None
            setattr(module, PLACE, None)
    setattr(config, RECORD, {**known, "modules": modules})
    model.set_attn_implementation(SWAPPED)
    config.attn_implementation = SWAPPED  # the name under which a config is saved and loaded
    _turn_cache(model, off=bool(needing_whole_sequences(model)))
    return _notes(model)


def _own_config(model: nn.Module) -> None:
    """Give a model its own copy of its config, so that other models with the same config stay as they are."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PretrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])


def record_options(model: Any, changed: Iterable[str], options: Mapping[str, Any]) -> None:
    """Record the new options of the changed modules, by their paths, in a model's config."""
    _own_config(model)
    modules = dict(getattr(model.config, RECORD)["modules"])
    for path in changed:
        entry = modules[_inside_base(model, path)]
        modules[_inside_base(model, path)] = {**entry, "options": {**entry["options"], **options}}
    setattr(model.config, RECORD, {**getattr(model.config, RECORD), "modules": modules})


def _notes(model: Any) -> list[str]:
    """Notes for the user about positions and generation in a swapped model."""
    placed, continued = _placed(model), _continued(model)
    own = [attend for attend in placed if attend.placement.rotary is not None and attend.chosen.card.knows_positions]
    notes = [
        f"The model's rotary positions are left out where {name} is, which has positions of its own."
        for name in sorted({attend.chosen.name for attend in own})
    ]
    if whole := needing_whole_sequences(model):
        notes.append(f"use_cache is off: {', '.join(whole)} cannot go on from a cache of keys and values.")
        return notes
    states = sorted({attend.chosen.name for attend in continued if attend.placement.layer is not None})
    if states:
        notes.append(f"Generation goes on from the state of {', '.join(states)}, which the cache holds.")
    if any(attend.placement.layer is None for attend in continued):
        notes.append("Generation goes on with the model's cache of keys and values, read whole at each step.")
    return notes


def _turn_cache(model: Any, *, off: bool) -> None:
    """Turn the cache of a swapped model off; or on again, if the swap had turned it off."""
    record = getattr(model.config, RECORD)
    for each in filter(None, (model.config, getattr(model, "generation_config", None))):
        if off and getattr(each, "use_cache", False):
            each.use_cache, record["use_cache"] = False, True
        elif not off and record.get("use_cache"):
            each.use_cache = True
    if not off:
        record.pop("use_cache", None)


def record_unswap(model: Any) -> None:
    """Undo :func:`record_swap` for the modules from which the mechanism was removed."""
    _own_config(model)
    config, swapped = model.config, False
    record = getattr(config, RECORD)
    modules = dict(record["modules"])
    for path, module in model.named_modules():
        if is_swapped(module) or isinstance(module, Swapped):
            swapped = True
        elif _inside_base(model, path) in modules:
            modules[_inside_base(model, path)] = None
    setattr(config, RECORD, {**record, "modules": modules})
    _turn_cache(model, off=bool(needing_whole_sequences(model)))
    if swapped:
        return
    for module in model.modules():
        if getattr(module, PLACE, UNPLACED) is None:
            delattr(module, PLACE)
    delattr(config, RECORD)
    config.__dict__.pop("attn_implementation", None)
    model.set_attn_implementation(record["attention"])


def _placed(model: nn.Module) -> list[Any]:
    return [module.regard for module in model.modules() if is_swapped(module)]


def _continued(model: nn.Module) -> list[Any]:
    """The mechanisms in causal modules that have a place in a cache; those of CLIP's text model have none."""
    cached: list[Any] = [module for module in model.modules() if is_swapped(module) and hasattr(module, "layer_idx")]
    return [module.regard for module in cached if module.regard.pattern is Pattern.CAUSAL_SELF]


def needing_whole_sequences(model: nn.Module) -> list[str]:
    """Mechanisms placed in a model that can continue neither from a state nor from a cache of keys and values."""
    found = {a.chosen.name for a in _continued(model) if a.placement.layer is None and a.needs_whole_sequences}
    return sorted(found | {a.chosen.name for a in _placed(model) if a.counts_queries})


def _inside_base(model: Any, path: str) -> str:
    """A path without the name of the base model, so that it is the same in models with different heads."""
    return path.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else path


def restore(model: Any) -> None:
    """Put the mechanisms that a model's config names into it; those that a submodel has already restored are left.

    Raises:
        Unsupported: where a mechanism is unknown here, or another attention implementation is asked for.
    """
    config = model.config
    record = config.regard
    if config._attn_implementation != SWAPPED:
        raise Unsupported(
            f'attn_implementation="{config._attn_implementation}" of a model that was saved with other mechanisms',
            supported=f'"{SWAPPED}", which is what it was saved with',
            nearest="regard.unswap(model) once it is loaded",
        )
    config.attn_implementation = SWAPPED
    for path, module in list(model.named_modules()):
        entry = record["modules"].get(_inside_base(model, path), UNPLACED)
        if entry is UNPLACED or hasattr(module, PLACE) or isinstance(module, Swapped):
            continue
        reader = reader_of(module)
        if entry is None:
            setattr(module, PLACE, None)
        elif reader is not None:
            choice = Choice.of((entry["mechanism"], entry["options"]), entry["pattern"])
            told = {"unrotated": entry["unrotated"]} if "unrotated" in entry else {}
            reader(model, path, module, choice, **told)()


def check_record(model: Any) -> None:
    """Raise Unsupported where a model's config does not record the mechanisms that are in its modules, as when a part
    of the model was swapped alone: its own config has the record then."""
    if _agrees(model, model.config):
        return
    base = model.base_model_prefix
    part = getattr(model, base, None) if base else None
    raise Unsupported(
        f"saving {an_instance(model)} of which a part was swapped or unswapped alone, so that its config does not name "
        "its mechanisms",
        supported="models that were swapped as a whole, with only=... for some of their modules",
        nearest=f"model.config = model.{base}.config, then save again" if part and _agrees(model, part.config) else "",
    )


def _agrees(model: Any, config: Any) -> bool:
    modules = (getattr(config, RECORD, None) or {"modules": {}})["modules"]
    return all(
        (modules.get(_inside_base(model, path)) is not None) == _is_saved(module)
        for path, module in model.named_modules()
    )


def _is_saved(module: Any) -> bool:
    """Whether a saved model has the mechanism of a module; a sparse method, which is put on for a while, is not."""
    return isinstance(module, Swapped) or (is_swapped(module) and module.regard.placement.saved)


def checking(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a `save_pretrained` so that it refuses a model whose config would load with other attention."""

    @functools.wraps(save_pretrained)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_record(self)
        return save_pretrained(self, *args, **kwargs)

    return checked


def restoring(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap a `post_init` so that the mechanisms recorded in the config are in place before weights are loaded."""

    @functools.wraps(post_init)
    def restored(self: Any) -> None:
        post_init(self)
        if getattr(self.config, RECORD, None) is not None:
            restore(self)

    return restored
