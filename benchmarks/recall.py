"""Measures which mechanisms learn recall, with and without a short convolution, for `regard advise --needs recall`.

    python benchmarks/recall.py                        # whatever the table lacks; repeat the command to continue
    python benchmarks/recall.py --mechanisms linear    # only these; --again measures them anew
    python benchmarks/recall.py --ranking              # takes better values from docs/data/ranking.json

The task, the backbone, the budget and the learning rates are those of `regard compare --task recall --budget "500k tokens"`.
The question is whether a mechanism can learn the task, so the best run counts, and runs stop after the first that solves it.
(The comparison recommends a mechanism only if all of its runs solve it.)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from regard import Mechanism, Pattern, Unsupported, get_mechanism, list_mechanisms
from regard.measurement.budget import Budget
from regard.models import LanguageModelConfig, count_parameters, match_parameters
from regard.models.layer_plan import layer_accepts
from regard.tasks.recall import RecallTask
from regard.training import TrainConfig, evaluate, train
from regard.workbench.advice.layer_work import MIXING
from regard.workbench.advice.needs import RECALL, RECALL_TABLE, convolved
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.task_models import build

RANKING = Path(__file__).parent.parent / "docs" / "data" / "ranking.json"
SETTINGS = CompareSettings(("softmax",), Budget("tokens", 500_000.0))
TASK = RecallTask()
WIDTH = 4


def config(name: str, options: dict[str, Any]) -> LanguageModelConfig:
    plan = [(name, options)] * SETTINGS.layers
    sizes = {"dim": SETTINGS.dim, "num_layers": SETTINGS.layers, "num_heads": SETTINGS.heads}
    return LanguageModelConfig(TASK.vocab_size, plan=plan, max_length=TASK.length, **sizes)


def accuracy(name: str, options: dict[str, Any]) -> float:
    """Accuracy of the best run, with as many parameters as the model with softmax attention."""
    matched = match_parameters(config(name, options), count_parameters(config("softmax", {})))
    batch = SETTINGS.batch_tokens // TASK.length
    steps = round(SETTINGS.budget.amount / (batch * TASK.length))
    best = 0.0
    for rate in SETTINGS.rates:
        model = build(matched, 0)
        train(model, TASK, TrainConfig(steps=steps, batch_size=batch, learning_rate=rate, measure_memory=False))
        best = max(best, evaluate(model, TASK, batch).score)
        if best >= TASK.solved:
            break
    return round(best, 3)


def options_of(card: Mechanism, width: int) -> dict[str, Any]:
    options: dict[str, Any] = {"length": TASK.length} if card.length == "max" else {}
    return options | ({"short_convolution": width} if layer_accepts(card, "short_convolution") else {})


def write(table: dict[str, dict[str, float]]) -> None:
    lines = [f"  {json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table)]
    RECALL_TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def from_ranking(table: dict[str, dict[str, float]]) -> None:
    """Enter the better of the ranking's two runs of each mechanism (their mean plus the standard error) if it beats the
    table's value. Layers of the ranking have short convolutions wherever they accept them."""
    ranking = json.loads(RANKING.read_text())
    assert ranking["frame"] == "convolution"
    for entry in ranking["entries"]:
        if entry["task"] == "recall" and entry["mean"] is not None:
            assert entry["seeds"] == 2
            column = "with" if convolved(get_mechanism(entry["mechanism"]), WIDTH) else "without"
            known = table.setdefault(entry["mechanism"], {})
            known[column] = max(known.get(column, 0.0), round(entry["mean"] + entry["standard_error"], 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanisms", default="", help="comma-separated; all when empty")
    parser.add_argument("--again", action="store_true", help="also what the table has")
    parser.add_argument("--ranking", action="store_true")
    arguments = parser.parse_args()
    table = {name: dict(found) for name, found in RECALL.items()}
    if arguments.ranking:
        from_ranking(table)
        write(table)
        return
    named = [name for name in arguments.mechanisms.split(",") if name]
    torch.set_num_threads(1)
    for name in named or list_mechanisms(pattern=Pattern.CAUSAL_SELF, where=lambda card: card.kind in MIXING):
        card = get_mechanism(name)
        for key, width in (("with", WIDTH), ("without", 0)):
            if key in table.get(card.name, {}) and not arguments.again:
                continue
            if key == "with" and not layer_accepts(card, "short_convolution"):
                continue
            try:
                found = accuracy(card.name, options_of(card, width))
            except Unsupported as error:
                print(f"{card.name} {key}: {error}", flush=True)
                continue
            table.setdefault(card.name, {})[key] = found
            write(table)
            print(f"{card.name} {key}: {found}", flush=True)


if __name__ == "__main__":
    main()
