"""The cost of a model against the length of its input: inference time, decoding speed, memory and state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regard.backends import watch_backends
from regard.backends.native import library
from regard.contract import Context, out_of_memory
from regard.measurement.memory import peak_memory
from regard.measurement.timing import Timing, calm_clock, efficiency_length, interleaved
from regard.models import EncoderDecoder, LanguageModel

T = TypeVar("T")

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
    """Costs of several models of one backbone, interleaved at each length. Batch 1, no gradients.

    Args:
        names: of the models, as of their mechanisms; with `softmax` among them efficiency lengths are found.
        model_for: the model of a name for inputs of a length.
        lengths: of the input, or of the memory.
        make_input: an input of a given length (or an input, and a memory of that length) and its context.
        seconds: of timing at each length.

    Returns:
        For each model the payload of a ``cost`` row: latency (length, ms, low, high), decode (length, tokens/s), memory
        and state_bytes (length, bytes), the efficiency lengths, the backends that ran its engines, and the lengths that are
        too long for the memory, at which the model has no costs.
    """
    found: dict[str, dict[str, Any]] = {name: {key: [] for key in LISTS} for name in names}
    with torch.no_grad():
        for length in lengths:
            models = {name: functools.partial(model_for, name, length) for name in names}
            measured = _at(models, functools.partial(make_input, length), seconds)
            for name, own in found.items():
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
    makers: Mapping[str, Callable[[], nn.Module]],
    make_input: Callable[[], tuple[tuple[Tensor, ...], Context]],
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """The costs with one input of those models whose forward pass the memory suffices for."""
    given = _fitting(make_input)
    if given is None:
        return {}
    inputs, context = given
    device = inputs[0].device
    timed = functools.partial(interleaved, device=device, clock=calm_clock(device))
    models, found = {}, {}
    for name, make in makers.items():
        if (model := _fitting(make)) is None:
            continue
        if (costs := _fitting(functools.partial(_memory, model.eval(), inputs, context))) is not None:
            models[name], found[name] = model, costs
    forward = {name: functools.partial(model, *inputs, context=context) for name, model in models.items()}
    for name, timing in (timed(forward, seconds=seconds) if forward else {}).items():
        found[name]["latency"] = _milliseconds(timing)
    decoding = {}
    for name, model in models.items():
        if (state := _fitting(functools.partial(_state, model, inputs, context))) is not None:
            found[name]["state_bytes"] = [state.nbytes]
            decoding[name] = functools.partial(_decode, model, inputs[0][:, :1], state)
    decoded = _fitting(functools.partial(timed, decoding, seconds=seconds / 2)) if decoding else None
    for name, timing in (decoded or {}).items():
        found[name]["decode"] = [DECODE_STEPS / timing.median]
    return found


def _fitting(action: Callable[[], T]) -> T | None:
    """What an action gives; None where the memory does not suffice."""
    try:
        return action()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None


def _memory(model: nn.Module, inputs: tuple[Tensor, ...], context: Context) -> dict[str, Any]:
    """The peak of a forward pass, and the backends that run it."""
    forward = functools.partial(model, *inputs, context=context)
    forward()  # what is kept from the first call on is no part of the peak
    library.workspace_peak(reset=True)
    with watch_backends() as ran:
        peak = peak_memory(forward, device=inputs[0].device)
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
