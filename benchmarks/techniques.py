"""The cost and the saving of each way of stacking layers, compared with the plain model: parameters, memory and time.

python benchmarks/techniques.py                       # a language model of 16 layers, softmax; --json for programs
python benchmarks/techniques.py --mechanism mamba --layers 8

Memory is the peak of a training step above that before it (activations, gradients, temporaries). Times are CPU times of
one thread, so that other programs do not count, medians over models taking turns (A B C C B A). `decode` is a step of one
sequence; with early exits all tokens leave at the first exit, which is the most that can be saved.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Context
from regard.models import LanguageModel, LanguageModelConfig, count_parameters
from regard.training import keep_freed_memory, peak_memory

VOCABULARY = 256
START = frozenset({"state"})


def techniques(layers: int) -> dict[str, dict[str, Any]]:
    """The stack's options for each technique."""
    segment = max(1, round(math.sqrt(layers)))
    return {
        "plain": {},
        "share all": {"share": "all"},
        f"checkpoint {segment}": {"checkpoint_layers": segment},
        "reversible": {"reversible": True},
        "reversible, share all": {"reversible": True, "share": "all"},
        "stochastic depth 0.5": {"stochastic_depth": 0.5},
        "exits": {"exits": (layers // 4, layers // 2), "exit_rule": "confidence:0"},
        "bfloat16": {},
    }


def thread_times(actions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median CPU seconds of the thread for each action, in turn, after one run of each."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    order = list(actions)
    for name in order:
        actions[name]()
    started = time.thread_time()
    while time.thread_time() - started < seconds or len(found[order[0]]) < 3:
        for name in order:
            before = time.thread_time()
            actions[name]()
            found[name].append(time.thread_time() - before)
        order.reverse()
    return {name: statistics.median(values) for name, values in found.items()}


def training_step(model: nn.Module, ids: Tensor, precision: torch.dtype | None) -> Callable[[], None]:
    generator = torch.Generator()

    def step() -> None:
        model.train().zero_grad()
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = model.loss(ids, context=Context(generator=generator))
        loss.backward()

    return step


def decoding_step(model: nn.Module, ids: Tensor) -> Callable[[], Any]:
    with torch.no_grad():
        state = model.eval()(ids[:1], context=Context(want=START)).state

    @torch.no_grad()
    def step() -> Any:
        return model.eval()(ids[:1, :1], state=state)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mechanism", default="softmax")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=40.0, help="for training steps; a quarter of it for decoding")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (options.batch, options.length))
    models, steps, decoding, rows = {}, {}, {}, {}
    for name, stack in techniques(options.layers).items():
        models[name] = LanguageModel(
            LanguageModelConfig(
                VOCABULARY, options.dim, options.mechanism, options.layers, dropout=0.1, stack=stack, positions="auto"
            )
        )
        steps[name] = training_step(models[name], ids, torch.bfloat16 if name == "bfloat16" else None)
        steps[name]()
        rows[name] = {
            "parameters": count_parameters(models[name]),
            "memory": peak_memory(steps[name]).bytes,
        }
    for name, seconds in thread_times(steps, options.seconds).items():
        rows[name]["training_seconds"] = seconds
    for name, model in models.items():
        if name != "bfloat16":
            decoding[name] = decoding_step(model, ids)
    for name, seconds in thread_times(decoding, options.seconds / 4).items():
        rows[name]["decode_seconds"] = seconds
    if options.json:
        print(json.dumps({"settings": vars(options), "torch": torch.__version__, "rows": rows}, indent=2))
        return
    plain = rows["plain"]
    print(
        "| technique | parameters | memory of a step (MiB) | training step (ms) | decode (ms) |\n|---|---:|---:|---:|---:|"
    )
    for name, row in rows.items():
        cells = [f"{row['parameters'] / 1e6:.2f} M"]
        for key, scale in (("memory", 2**-20), ("training_seconds", 1e3), ("decode_seconds", 1e3)):
            known = key in row
            cells.append(f"{row[key] * scale:.3g} ({row[key] / plain[key]:.2f}x)" if known else "")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
