"""Models that grow: more parameter tokens in every projection of a trained model (TokenFormer, arXiv 2410.23168).

::

    grow(model, 128)                                       # says what it says; trains on with a new optimizer
    train(model, task, config)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from regard.contract import Unsupported
from regard.mechanisms.token_parameter import TokenParameter


def grow(model: nn.Module, num_tokens: int, *, preserve: bool = True, freeze: bool = False) -> tuple[str, ...]:
    """Append parameter tokens to every :class:`TokenParameter` of a model, until each has `num_tokens`, in place.

    Args:
        model: any module. The config of a model of :mod:`regard.models` follows, so that it is saved as it is.
        num_tokens, preserve, freeze: as of :meth:`TokenParameter.grow`; `freeze` leaves parameters that are no tokens
            (embeddings, norms) as they are.

    Returns:
        Names of the modules that grew. Their parameters are new: build the optimizer again.

    Raises:
        Unsupported: for a model without parameter tokens, or where a module cannot grow so; nothing is changed then.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, TokenParameter)}
    if not found:
        raise Unsupported("growing a model without parameter tokens", supported='layers with linear="token_parameter"')
    for module in found.values():
        module.check_growth(num_tokens, preserve=preserve)
    counts = {module.keys.shape[0] for module in found.values()}
    if freeze and len(counts) > 1:
        raise Unsupported(
            f"freezing projections of {sorted(counts)} parameter tokens",
            supported="one number in all",
            nearest="freeze=False",
        )
    for module in found.values():
        module.grow(num_tokens, preserve=preserve, freeze=freeze)
    config: Any = getattr(model, "config", None)
    plans = [f.name for f in dataclasses.fields(config) if f.name.endswith("plan")] if config is not None else []
    if plans:
        some = next(iter(found.values())).config
        after = {"num_tokens": some.num_tokens, "frozen_tokens": some.frozen_tokens}
        model.config = dataclasses.replace(config, **{name: _grown(getattr(config, name), after) for name in plans})
    return tuple(found)


def _grown(plan: Any, after: dict[str, int | None]) -> list[tuple[str, dict[str, Any]]]:
    layers = []
    for name, options in plan:
        options = dict(options)
        if options.get("linear") == "token_parameter":
            options["linear_options"] = {**options.get("linear_options", {}), **after}
        if "mechanism_options" in options:  # of a wrapped layer
            options["mechanism_options"] = _grown([("", options["mechanism_options"])], after)[0][1]
        layers.append((name, options))
    return layers
