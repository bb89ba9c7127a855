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
    on_length: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Costs of several models of one backbone, interleaved at each length. Batch 1, no gradients.

    Args:
        models_for: the models for inputs of a length, by mechanism; with `softmax` among them efficiency lengths are
            found.
        lengths: of the input, or of the memory.
        make_input: an input of a given length (or an input, and a memory of that length) and its context.
        seconds: of timing at each length.
        on_length: called after each length.

    Returns:
        For each model the payload of a ``cost`` row: latency (length, ms, low, high), decode (length, tokens/s), memory
        and state_bytes (length, bytes), the efficiency lengths, the backends that ran its engines, and the lengths that are
        too long for the memory, at which the model has no costs.
    """
    found: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for length in lengths:
            models = {name: model.eval() for name, model in models_for(length).items()}
            for name in models:
                found.setdefault(name, {key: [] for key in LISTS})
            try:
                inputs, context = make_input(length)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                fitting = {}
            else:
                fitting = _memory(models, length, inputs, context, found)
            for name in models.keys() - fitting.keys():
                found[name]["too_long"].append(length)
            if fitting:
                _latency(fitting, length, inputs, context, found, seconds)
                _decoding(fitting, length, inputs, context, found, seconds)
            if on_length is not None:
                on_length(length)
    for name, costs in found.items():
        for source, target in (("latency", "efficiency_length_time"), ("memory", "efficiency_length_memory")):
            costs[target] = None
            if REFERENCE in found and name != REFERENCE:
                own, reference = ({row[0]: row[1] for row in found[n][source]} for n in (name, REFERENCE))
                costs[target] = efficiency_length(own, reference)
    return found


def _memory(
    models: Mapping[str, nn.Module],
    length: int,
    inputs: tuple[Tensor, ...],
    context: Context,
    found: dict[str, dict[str, Any]],
) -> dict[str, nn.Module]:
    """The models for whose forward pass the memory suffices; their peaks, and the backends that ran them, go into `found`."""
    fitting = {}
    for name, model in models.items():
        forward = functools.partial(model, *inputs, context=context)
        try:
            forward()  # what is kept from the first call on is no part of the peak
            library.workspace_peak(reset=True)
            with watch_backends() as ran:
                peak = peak_memory(forward, device=inputs[0].device)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            continue
        found[name]["memory"].append([length, peak.bytes + library.workspace_peak()])
        found[name]["backends"] = sorted(ran.backends.union(found[name]["backends"]))
        fitting[name] = model
    return fitting


def _latency(
    models: Mapping[str, nn.Module],
    length: int,
    inputs: tuple[Tensor, ...],
    context: Context,
    found: dict[str, dict[str, Any]],
    seconds: float,
) -> None:
    forward = {name: functools.partial(model, *inputs, context=context) for name, model in models.items()}
    device = inputs[0].device
    for name, timing in interleaved(forward, seconds=seconds, device=device, clock=calm_clock(device)).items():
        found[name]["latency"].append([length, *_milliseconds(timing)])


def _decoding(
    models: Mapping[str, nn.Module],
    length: int,
    inputs: tuple[Tensor, ...],
    context: Context,
    found: dict[str, dict[str, Any]],
    seconds: float,
) -> None:
    """Tokens per second of one sequence after `inputs`, and the bytes of its state, which has absorbed any memory."""
    actions = {}
    for name, model in models.items():
        if not isinstance(model, LanguageModel | EncoderDecoder):
            return
        if not all(block.continues for block in model.blocks):
            continue  # nothing to decode from
        state = model(*inputs, context=context.replace(want=frozenset({"state"}))).state
        found[name]["state_bytes"].append([length, state.nbytes])

        def steps(model: nn.Module = model, state: Any = state) -> None:
            for _ in range(DECODE_STEPS):
                state = model(inputs[0][:, :1], state=state).state

        actions[name] = steps
    device = inputs[0].device
    timings = interleaved(actions, seconds=seconds / 2, device=device, clock=calm_clock(device)) if actions else {}
    for name, timing in timings.items():
        found[name]["decode"].append([length, DECODE_STEPS / timing.median])


def _milliseconds(timing: Timing) -> tuple[float, float, float]:
    return timing.median * 1e3, timing.low * 1e3, timing.high * 1e3
