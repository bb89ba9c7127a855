"""Core context aware attention (Chen et al., arXiv 2412.12465): a trained model keeps its quality with a shorter context.

The paper: LLaMA2-7B-32K, fine-tuned for 1000 steps with groups in place of far tokens, scores 21.86 on LongBench-E against
22.11 with full attention and 14.95 with a window and sinks, at up to 93 % less cache (table of the project page).

Here: bytes of Python's standard library in windows of 512, 2 layers of width 64. One softmax model is trained for 250 steps;
then its weights go on for 50 steps with softmax, with cores of 8 tokens and a window of 64, with mean cores, and with a
window of 72 alone. Recall from the first 16 of 128 tokens (the task of `local`) is trained from the start with groups of 4
and a window of 16, and with a window of 20.
"""

import math
from typing import Any

from regard.reproductions.framework.judging import Check, Seed, minus, number
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import cached_task, fit, language_model, score, trained_score
from regard.reproductions.local import DistantRecall

Entry = tuple[str, dict[str, Any]]

TEXT = {"steps": 250, "tuning": 50, "batch_size": 8, "learning_rate": 3e-3, "items": 32, "length": 512}
RECALL = {"steps": 1000, "batch_size": 16, "learning_rate": 3e-3, "items": 512}
ROTARY = {"positions": "rotary"}
TUNED: dict[str, Entry] = {
    "full": ("softmax", ROTARY),
    "cca": ("core_context", {**ROTARY, "group": 8, "window": 64}),
    "mean": ("core_context", {**ROTARY, "group": 8, "window": 64, "pool": "mean"}),
    "window": ("local", {**ROTARY, "window": 72}),
}
RECALLING: dict[str, Entry] = {
    "recall cca": ("core_context", {"short_convolution": 4, "group": 4, "window": 16}),
    "recall window": ("local", {"short_convolution": 4, "window": 20}),
}


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    if "mixer" in setting:
        recall = DistantRecall(setting["items"])
        model = language_model(recall, [RECALLING[setting["mixer"]]] * 2, dim=64, num_heads=4)
        return {**trained_score(model, recall, setting, seed)}
    task = cached_task("text", length=setting["length"], evaluation_items=setting["items"])
    trained = language_model(task, [TUNED["full"]] * 2, dim=64, num_heads=4)
    sound = fit(trained, task, setting, seed)
    found = {}
    for name, entry in TUNED.items():
        model = language_model(task, [entry] * 2, dim=64, num_heads=4)
        model.load_state_dict(trained.state_dict())
        # other batches than those of the training
        sound = sound and fit(model, task, {**setting, "learning_rate": 1e-3}, seed + 1000, steps=setting["tuning"])
        found[name] = score(model, task)["loss"] if sound else math.nan
    return found


def tuned(first: str, second: str) -> Any:
    def value(seed: Seed) -> float:
        return number(seed, "tuned", first) - number(seed, "tuned", second)

    return value


REPRODUCTION = Reproduction(
    name="core_context",
    mechanisms=("core_context",),
    claim=(
        "A trained model with cores in place of far tokens, fine-tuned briefly, is nearly as good as with full attention and "
        "better than with a window (LongBench-E 21.86, 22.11 and 14.95; project page)."
    ),
    instead=(
        "Loss in nats on code bytes, windows of 512: softmax for 250 steps, then 50 with full attention, cores of 8 and the "
        "last 64, mean cores, a window of 72. Accuracy of recall over 80 tokens, cores of 4 and 16 tokens against 20."
    ),
    settings={"tuned": TEXT} | {mixer: RECALL | {"mixer": mixer} for mixer in RECALLING},
    run_cell=run_cell,
    checks=(
        Check("cores within 0.05 nats of full attention", tuned("cca", "full"), below=0.05),
        Check("cores better than the window alone", tuned("cca", "window"), below=0.0),
        Check("cores no worse than mean cores by 0.01 nats", tuned("cca", "mean"), below=0.01),
        Check("recall above a window's by 0.3", minus("recall cca", "recall window"), above=0.3),
    ),
    needs=(Check("what is far helps: full attention below the window alone", tuned("full", "window"), below=0.0),),
    left_out=(
        "LongBench-E: a 7B model's benchmark; loss and recall stand for it",
        "7.9 times as fast and 93 % less cache at 128K tokens: neither time nor memory is measured",
    ),
    smoke={"steps": 2, "tuning": 2, "batch_size": 2, "items": 4, "length": 96},
    seconds=80,
)
