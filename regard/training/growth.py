"""Growing and shrinking trained models by changing their number of parameter tokens (TokenFormer, arXiv 2410.23168).

::

    grow(model, 128)                                       # same outputs as before; go on training with a new optimizer
    grow(model, {"*.mixer.*": 128, "*.feed_forward": 512}) # or factor=2
    train(model, task, config)
    shrink(model, factor=0.5, importance=token_usage(model, batches))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import Unsupported, an_instance, closest
from regard.mechanisms.token_parameter import MECHANISM, TokenParameter
from regard.models.blocks import Block
from regard.models.evaluating import evaluation_mode
from regard.models.registry import MODELS

if TYPE_CHECKING:
    from jaxtyping import Float

NAMES = (MECHANISM.name, *MECHANISM.aliases)

Tokens = Mapping[nn.Module, Mapping[str, int]]
"""The new ``num_tokens`` and ``frozen_tokens`` of modules."""


def grow(
    model: nn.Module,
    num_tokens: int | Mapping[str, int] | None = None,
    *,
    factor: float | None = None,
    preserve: bool = True,
    freeze: bool = False,
) -> tuple[str, ...]:
    """Append parameter tokens to the :class:`TokenParameter` modules of a model, in place.

    Args:
        model: any module. If it is, or contains, a model of :mod:`regard.models`, that model's config is updated, so
            that it can be saved; the config of an enclosing model, such as one of transformers, is not.
        num_tokens: new number of tokens: one number for all modules, or numbers by patterns of module names, such as
            ``"*.feed_forward"``, of which the first that matches counts. Modules that match none are left unchanged.
        factor: alternative to `num_tokens`: the ratio of the new to the old number of tokens; the result is rounded.
        preserve, freeze: as for :meth:`TokenParameter.grow`; `freeze` only freezes old tokens: other parameters
            (embeddings, norms) still learn.

    Returns:
        The names of the modules that grew. Their parameters are new: rebuild the optimizer.

    Raises:
        Unsupported: for a model without parameter tokens, if a module cannot grow to that size, or if a model's config
            has a single number for modules that would get different ones; the model is then left unchanged.
    """
    found = _find(model)
    sizes = _sizes(found, num_tokens, factor)
    for name, count in sizes.items():
        found[name].check_growth(count, preserve=preserve)
    after: Tokens = {
        found[name]: {"num_tokens": count, "frozen_tokens": len(found[name].keys) if freeze else 0}
        for name, count in sizes.items()
    }
    follow = _configs(model, after)
    for name, count in sizes.items():
        found[name].grow(count, preserve=preserve, freeze=freeze)
    follow()
    return tuple(sizes)


def shrink(
    model: nn.Module,
    num_tokens: int | Mapping[str, int] | None = None,
    *,
    factor: float | None = None,
    importance: Mapping[str, Float[Tensor, " t"]] | None = None,
) -> tuple[str, ...]:
    """Keep the most important parameter tokens of the :class:`TokenParameter` modules of a model, in place.

    Args:
        model, num_tokens, factor: as for :func:`grow`, but with fewer tokens than before.
        importance: importance of each token, by module name, as measured by :func:`token_usage`; the norm of its key
            when None.

    Returns:
        The names of the modules that shrank. Their parameters are new: rebuild the optimizer.

    Raises:
        Unsupported: as :func:`grow`, or if `importance` lacks a module.
    """
    found = _find(model)
    sizes = _sizes(found, num_tokens, factor)
    missing = [] if importance is None else [name for name in sizes if name not in importance]
    if missing:
        raise Unsupported(f"importance without {missing[0]}", supported="every module that shrinks")
    scores = {name: None if importance is None else importance[name] for name in sizes}
    for name, count in sizes.items():
        found[name].check_shrinking(count, importance=scores[name])
    follow = _configs(model, {found[name]: {"num_tokens": n, "frozen_tokens": 0} for name, n in sizes.items()})
    for name, count in sizes.items():
        found[name].shrink(count, importance=scores[name])
    follow()
    return tuple(sizes)


@torch.no_grad()
def token_usage(
    model: nn.Module, batches: Iterable[Any], call: Callable[[Any, Any], Any] | None = None
) -> dict[str, Float[Tensor, " t"]]:
    """Measure how much each parameter token is used: the mean of abs(Theta) over all input tokens of its module.

    The model runs in evaluation mode. Padding counts as tokens, so pass batches without padding.

    Args:
        model: any module with :class:`TokenParameter` modules.
        batches: the batches passed to `call`, one after the other.
        call: a function of (model, batch); ``model(batch)`` when None.

    Returns:
        The usage (t,), in at least float32, of each module that was called, by name.

    Raises:
        Unsupported: for a model without parameter tokens, or without a batch.
    """
    found = _find(model)
    totals: dict[str, Tensor] = {}
    counts = dict.fromkeys(found, 0)

    def add(name: str, module: TokenParameter, given: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        used = module.weights(*given, **options).abs().flatten(0, -2)
        total = totals.setdefault(name, used.new_zeros(len(module.keys)))
        rows = options.get("rows")
        total.index_add_(0, torch.arange(len(total), device=used.device) if rows is None else rows, used.sum(0))
        counts[name] += len(used)

    hooks = [m.register_forward_pre_hook(partial(add, n), with_kwargs=True) for n, m in found.items()]
    try:
        with evaluation_mode(model):
            for batch in batches:
                _ = model(batch) if call is None else call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not any(counts.values()):
        raise Unsupported("the usage of parameter tokens without a token", supported="a batch or more")
    return {name: total / counts[name] for name, total in totals.items()}


def _find(model: nn.Module) -> dict[str, TokenParameter]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, TokenParameter)}
    if not found:
        raise Unsupported("a model without parameter tokens", supported='layers with linear="token_parameter"')
    return found


def _sizes(
    found: Mapping[str, TokenParameter], num_tokens: int | Mapping[str, int] | None, factor: float | None
) -> dict[str, int]:
    """Return the new number of tokens of each selected module."""
    if (num_tokens is None) == (factor is None):
        raise Unsupported(f"num_tokens={num_tokens} with factor={factor}", supported="one of them")
    if factor is not None:
        return {name: round(factor * len(module.keys)) for name, module in found.items()}
    assert num_tokens is not None
    given = num_tokens if isinstance(num_tokens, Mapping) else {"*": num_tokens}
    for pattern, number in given.items():
        if not isinstance(number, int):
            raise Unsupported(f"num_tokens={number!r}", supported="integers", nearest=f"factor={number!r}")
        if not any(fnmatch(name, pattern) for name in found):
            raise Unsupported(
                f"pattern {pattern!r}, which fits no module with parameter tokens",
                supported=", ".join(found),
                nearest=closest(pattern, list(found)),
            )
    fitting = {name: [n for pattern, n in given.items() if fnmatch(name, pattern)] for name in found}
    return {name: numbers[0] for name, numbers in fitting.items() if numbers}


def _configs(model: nn.Module, after: Tokens) -> Callable[[], None]:
    """Return a function that updates the models' configs to `after`; raises Unsupported if a config cannot hold it."""
    changes: list[tuple[Any, Any]] = []
    known = [model_class for model_class, _ in MODELS.values()]
    for owner in model.modules():
        if type(owner) in known and any(module in after for module in owner.modules()):
            old: Any = owner.config
            plans = {
                plan: [_entry(entry, block, after) for entry, block in zip(getattr(old, plan), blocks, strict=True)]
                for plan, blocks in _plans(owner).items()
            }
            config = dataclasses.replace(old, **plans)
            _check(owner, config, after)
            changes.append((owner, config))

    def follow() -> None:
        for owner, config in changes:
            owner.config = config
            for plan, blocks in _plans(owner).items():
                for entry, block in zip(getattr(config, plan), blocks, strict=True):
                    block.entry = entry

    return follow


def _plans(model: Any) -> dict[str, list[Block]]:
    """Return the plans in a model's config, each with the blocks that it describes."""
    found = {}
    for plan in [field.name for field in dataclasses.fields(model.config) if field.name.endswith("plan")]:
        own = getattr(model, plan.removesuffix("plan") + "blocks", None)
        found[plan] = [b for b in model.blocks if b.cross == (plan == "cross_plan")] if own is None else list(own)
    return found


def _entry(entry: tuple[str, Mapping[str, Any]], block: Block, after: Tokens) -> tuple[str, dict[str, Any]]:
    """Return the plan entry that describes the changed block, as far as an entry can."""
    name, options = entry[0], dict(entry[1])
    if block.feed_forward is not None and block.feed_forward in after:
        options["feed_forward_options"] = {**options.get("feed_forward_options", {}), **after[block.feed_forward]}
    changed = [module for module in block.mixer.modules() if module in after]
    return name, _with(options, after[changed[0]]) if changed else options


def _with(options: Mapping[str, Any], wanted: Mapping[str, int]) -> dict[str, Any]:
    changed = dict(options)
    if options.get("linear") in NAMES:
        changed["linear_options"] = {**options.get("linear_options", {}), **wanted}
    if "mechanism_options" in options:  # a wrapped layer
        changed["mechanism_options"] = _with(options["mechanism_options"], wanted)
    return changed


def _check(model: nn.Module, config: Any, after: Tokens) -> None:
    """Raise Unsupported unless a model built from the config has the parameter tokens that `model` will have."""
    reason = ""
    try:
        with torch.device("meta"):
            made = _find(type(model)(config))
    except Unsupported as error:
        made, reason = {}, f" ({error})"
    for name, module in _find(model).items():
        wanted = after.get(module, {"num_tokens": len(module.keys), "frozen_tokens": module.config.frozen_tokens})
        same = name in made and len(made[name].keys) == wanted["num_tokens"]
        if not same or made[name].config.frozen_tokens != wanted["frozen_tokens"]:
            raise Unsupported(
                f"{wanted['num_tokens']} parameter tokens ({wanted['frozen_tokens']} of them frozen) in {name}, which the "
                f"config of {an_instance(model)} cannot express{reason}",
                supported="one number for all projections of a layer's mixer, and one for its feed-forward network",
            )
