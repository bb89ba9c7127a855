"""The cost of a model as a function of the input length: inference time, decoding speed, memory and state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Context
from regard.measurement.timing import Timing, calm_clock, efficiency_length, interleaved
from regard.models import EncoderDecoder, LanguageModel
from regard.workbench.memory import if_it_fits, peak_and_backends

REFERENCE = "softmax"
DECODE_STEPS = 8
LISTS = ("latency", "decode", "memory", "state_bytes", "backends", "too_long")


def model_costs(
    names: Sequence[str],
    model_for: Callable[[str, int], nn.Module],
    lengths: Sequence[int],
    make_input: Callable[[int], tuple[tuple[Tensor, ...], Context]],
    *,
    seconds: float = 1.0,
) -> dict[str, dict[str, Any]]:
    """Costs of several models with one kind of backbone, interleaved at each length; batch 1, no gradients.

    Args:
        names: names of the models, which are those of their mechanisms; efficiency lengths are found if `softmax` is
            one.
        model_for: returns the model with a name for inputs of a length.
        lengths: lengths of the input, or of the memory in cross patterns.
        make_input: returns an input of a given length (or an input, and a memory of that length) and its context.
        seconds: timing budget at each length.

    Returns:
        For each model the payload of a ``cost`` row: latency (length, ms, low, high), decode (length, tokens/s), memory
        and state_bytes (length, bytes), the efficiency lengths, the backends that ran its engines, and the lengths at
        which it ran out of memory and has no costs.
    """
    found: dict[str, dict[str, Any]] = {name: {key: [] for key in LISTS} for name in names}
    with torch.no_grad():
        for length in lengths:
            models = {name: functools.partial(model_for, name, length) for name in names}
            measured = _at(models, functools.partial(make_input, length), seconds)
            for name, own in found.items():
                if name not in measured:
                    own["too_long"].append(length)
                costs = measured.get(name, {})
                own["backends"] = sorted({*own["backends"], *costs.pop("backends", ())})
                for key, row in costs.items():
                    own[key].append([length, *row])
    for name, costs in found.items():
        for source, target in (("latency", "efficiency_length_time"), ("memory", "efficiency_length_memory")):
            costs[target] = None
            if REFERENCE in found and name != REFERENCE:
                each, reference = ({row[0]: row[1] for row in found[n][source]} for n in (name, REFERENCE))
                costs[target] = efficiency_length(each, reference)
    return found


def _at(
    makers: Mapping[str, Callable[[], nn.Module]],
    make_input: Callable[[], tuple[tuple[Tensor, ...], Context]],
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """The costs at one input, for those models whose forward pass fits in memory."""
    given = if_it_fits(make_input)
    if given is None:
        return {}
    inputs, context = given
    device = inputs[0].device
    timed = functools.partial(interleaved, device=device, clock=calm_clock(device))
    models, forward, found = {}, {}, dict[str, dict[str, Any]]()
    for name, make in makers.items():
        if (model := if_it_fits(make)) is None:
            continue
        action = functools.partial(model.eval(), *inputs, context=context)
        if (peak := if_it_fits(functools.partial(peak_and_backends, action, device))) is not None:
            models[name], forward[name], found[name] = model, action, {"memory": [peak[0]], "backends": peak[1]}
    for name, timing in (timed(forward, seconds=seconds) if forward else {}).items():
        found[name]["latency"] = _milliseconds(timing)
    decoding = {}
    for name, model in models.items():
        if (state := if_it_fits(functools.partial(_state, model, inputs, context))) is not None:
            found[name]["state_bytes"] = [state.nbytes]
            decoding[name] = functools.partial(_decode, model, inputs[0][:, :1], state)
    decoded = if_it_fits(functools.partial(timed, decoding, seconds=seconds / 2)) if decoding else None
    for name, timing in (decoded or {}).items():
        found[name]["decode"] = [DECODE_STEPS / timing.median]
    return found


def _state(model: nn.Module, inputs: tuple[Tensor, ...], context: Context) -> Any:
    """The state after one sequence, including any memory; None for models that do not decode."""
    if not isinstance(model, LanguageModel | EncoderDecoder) or not all(block.continues for block in model.blocks):
        return None
    return model(*inputs, context=context.replace(want=frozenset({"state"}))).state


def _decode(model: nn.Module, token: Tensor, state: Any) -> None:
    for _ in range(DECODE_STEPS):
        state = model(token, state=state).state


def _milliseconds(timing: Timing) -> tuple[float, float, float]:
    return timing.median * 1e3, timing.low * 1e3, timing.high * 1e3
