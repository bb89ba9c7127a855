"""The cost of a model against the length of its input: inference time, decoding speed, memory and state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.backends import watch_backends
from regard.backends.native import library
from regard.contract import Context, out_of_memory
from regard.measurement.memory import peak_memory
from regard.measurement.timing import Timing, calm_clock, efficiency_length, interleaved
from regard.models import EncoderDecoder, LanguageModel

REFERENCE = "softmax"
DECODE_STEPS = 8
LISTS = ("latency", "decode", "memory", "state_bytes", "backends", "too_long")


def model_costs(
    models_for: Callable[[int], Mapping[str, nn.Module]],
    lengths: Sequence[int],
    make_input: Callable[[int], tuple[tuple[Tensor, ...], Context]],
    *,
    seconds: float = 1.0,
) -> dict[str, dict[str, Any]]:
    """Costs of several models of one backbone, interleaved at each length. Batch 1, no gradients.

    Args:
        models_for: the models for inputs of a length, by mechanism; with `softmax` among them efficiency lengths are
            found.
        lengths: of the input, or of the memory.
        make_input: an input of a given length (or an input, and a memory of that length) and its context.
        seconds: of timing at each length.

    Returns:
        For each model the payload of a ``cost`` row: latency (length, ms, low, high), decode (length, tokens/s), memory
        and state_bytes (length, bytes), the efficiency lengths, the backends that ran its engines, and the lengths that are
        too long for the memory, at which the model has no costs.
    """
    found: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for length in lengths:
            models = {name: model.eval() for name, model in models_for(length).items()}
            measured = _at(models, functools.partial(make_input, length), seconds)
            for name in models:
                own = found.setdefault(name, {key: [] for key in LISTS})
                if name not in measured:
                    own["too_long"].append(length)
                for key, row in measured.get(name, {}).items():
                    own[key].append([length, *row])
    for name, costs in found.items():
        costs["backends"] = sorted({backend for _, *backends in costs["backends"] for backend in backends})
        for source, target in (("latency", "efficiency_length_time"), ("memory", "efficiency_length_memory")):
            costs[target] = None
            if REFERENCE in found and name != REFERENCE:
                each, reference = ({row[0]: row[1] for row in found[n][source]} for n in (name, REFERENCE))
                costs[target] = efficiency_length(each, reference)
    return found


def _at(
    models: Mapping[str, nn.Module], make_input: Callable[[], tuple[tuple[Tensor, ...], Context]], seconds: float
) -> dict[str, dict[str, Any]]:
    """The costs with one input of those models whose forward pass the memory suffices for."""
    try:
        inputs, context = make_input()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return {}
    device = inputs[0].device
    forward = {name: functools.partial(model, *inputs, context=context) for name, model in models.items()}
    found = {name: costs for name, action in forward.items() if (costs := _memory(action, device)) is not None}
    timed = functools.partial(interleaved, device=device, clock=calm_clock(device))
    if found:
        for name, timing in timed({name: forward[name] for name in found}, seconds=seconds).items():
            found[name]["latency"] = _milliseconds(timing)
    decoding = {}
    for name, costs in found.items():
        if (state := _state(models[name], inputs, context)) is not None:
            costs["state_bytes"] = [state.nbytes]
            decoding[name] = functools.partial(_decode, models[name], inputs[0][:, :1], state)
    if decoding:
        for name, timing in timed(decoding, seconds=seconds / 2).items():
            found[name]["decode"] = [DECODE_STEPS / timing.median]
    return found


def _memory(forward: Callable[[], Any], device: torch.device) -> dict[str, Any] | None:
    """The peak of a forward pass, and the backends that run it; None where the memory does not suffice."""
    try:
        forward()  # what is kept from the first call on is no part of the peak
        library.workspace_peak(reset=True)
        with watch_backends() as ran:
            peak = peak_memory(forward, device=device)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    return {"memory": [peak.bytes + library.workspace_peak()], "backends": sorted(ran.backends)}


def _state(model: nn.Module, inputs: tuple[Tensor, ...], context: Context) -> Any:
    """The state of one sequence after `inputs`, which has absorbed any memory; None of models that nothing is decoded with."""
    if not isinstance(model, LanguageModel | EncoderDecoder) or not all(block.continues for block in model.blocks):
        return None
    return model(*inputs, context=context.replace(want=frozenset({"state"}))).state


def _decode(model: nn.Module, token: Tensor, state: Any) -> None:
    for _ in range(DECODE_STEPS):
        state = model(token, state=state).state


def _milliseconds(timing: Timing) -> tuple[float, float, float]:
    return timing.median * 1e3, timing.low * 1e3, timing.high * 1e3
