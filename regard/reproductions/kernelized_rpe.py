"""Kernelized attention with relative positions (Luo et al., arXiv 2106.12566): a bias for each offset in n log n.

The paper (abstract): relative positions in kernelized attention cost n log n by FFT instead of n^2, models with
normalised queries and keys train from scratch without the instability of plain ones, and they beat other efficient
attention on pre-training, language modelling, translation and image classification.

Here: bytes of Python's standard library, windows of 128, 2 layers of width 64 with 4 heads of 32 random features, no
other positions, 400 steps: with and without norms (N) and relative positions (RPE), and softmax with T5's relative
positions. "Close" means within 0.05 nats. Plain kernelized attention is not expected to diverge at this size, so its
largest gradient norm over the first 50 steps is recorded but not judged. Growth of time over lengths from 1024 to 8192
with a bias for each offset, by FFT and by pairs, for one head of 16 features.
"""

from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from regard.functional import kernelized_rpe_attention
from regard.mechanisms.kernelized_rpe import draw_features
from regard.models import LanguageModel
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_slopes
from regard.reproductions.framework.training import BIGRAMS, cached_task, language_model, trained_score
from regard.tasks import Task

TRAINING = {"steps": 400, "batch_size": 24, "learning_rate": 3e-3, "items": 64, "probe": 50}
LENGTH = 128


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure the loss on text, and the largest gradient norm in the first steps; with ``lengths``, how times of both
    methods grow."""
    if "lengths" in setting:
        return time_methods(setting)
    task = cached_task("text", length=LENGTH, evaluation_items=setting["items"])
    options = {"positions": "none"} | setting["options"]

    def made() -> LanguageModel:
        torch.manual_seed(seed)
        return language_model(task, [(setting["mixer"], options)] * 2, dim=64, num_heads=4)

    gradient = largest_gradient(made(), task, setting, seed)
    return {**trained_score(made(), task, setting, seed), "gradient": gradient}


def largest_gradient(model: LanguageModel, task: Task, setting: Setting, seed: int) -> float:
    """Return the largest gradient norm in the first steps, with the same learning rate and no warm-up."""
    optimizer, largest = torch.optim.AdamW(model.parameters(), lr=setting["learning_rate"]), 0.0
    for step in range(setting["probe"]):
        batch = task.training_batch(step, seed, setting["batch_size"])
        loss = F.cross_entropy(model(batch.inputs).output.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        largest = max(
            largest, float(torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None))
        )
        optimizer.step()
    return largest


@torch.no_grad()
def time_methods(setting: Setting) -> dict[str, Any]:
    """Measure how times by FFT and by blocks grow with the length, with a bias for every offset."""
    features = draw_features(16, 16)
    actions: dict[str, dict[float, Any]] = {"fft": {}, "blocks": {}}
    for n in setting["lengths"]:
        q, k, v = torch.randn(3, 1, 1, n, 16)
        table = torch.randn(1, 2 * n + 1)
        for method, by_length in actions.items():
            by_length[n] = partial(
                kernelized_rpe_attention, q, k, v, offset_bias=table, random_features=features, method=method
            )
    return {**timed_slopes(actions, seconds=setting["seconds"])}


KERNEL = {"mixer": "kernelized_rpe"}
PLAIN = {"features": 32, "offsets": "none", "normalize": False}

REPRODUCTION = Reproduction(
    name="kernelized_rpe",
    mechanisms=("kernelized_rpe",),
    claim=(
        "Kernelized attention with relative positions costs n log n, trains from scratch when queries and keys are "
        "normalised, and is better than efficient attention without them (abstract; no figure)."
    ),
    instead=(
        "Loss in nats on code bytes, windows of 128, 2 layers of width 64, 400 steps; close means within 0.05. Growth of "
        "time with length on one core, as the exponent p of time ~ length^p."
    ),
    settings={
        "N + RPE": TRAINING | KERNEL | {"options": {"features": 32}},
        "RPE": TRAINING | KERNEL | {"options": {"features": 32, "normalize": False}},
        "N": TRAINING | KERNEL | {"options": PLAIN | {"normalize": True}},
        "plain": TRAINING | KERNEL | {"options": PLAIN},
        "softmax + RPE": TRAINING | {"mixer": "softmax", "options": {"positions": "relative"}},
        "forward": {"lengths": [1024, 2048, 4096, 8192], "seconds": 15.0},
    },
    run_cell=run_cell,
    checks=(
        Check("relative positions lower the loss of N", minus("N", "N + RPE", "loss"), above=0.0),
        Check("N + RPE has a lower loss than plain features", minus("plain", "N + RPE", "loss"), above=0.0),
        Check("norms lower the loss beside RPE", minus("RPE", "N + RPE", "loss"), above=0.0),
        Check("N + RPE within 0.05 nats of softmax + RPE", minus("N + RPE", "softmax + RPE", "loss"), below=0.05),
        Check("time by FFT grows with p < 1.3", measured("forward", "fft"), below=1.3),
        Check("time by pairs grows with p > 1.6", measured("forward", "blocks"), above=1.6),
    ),
    needs=(Check("softmax learns more than bigrams (2.49 nats)", measured("softmax + RPE", "loss"), below=BIGRAMS),),
    left_out=(
        "divergence without norms: plain kernelized attention does not diverge at this size, and its largest gradient is only recorded",
        "translation, image classification and pretraining: each is a training of its own",
        "faster than the standard Transformer on long sequences: FFT and pairs of the same attention are compared",
    ),
    timings=frozenset({"forward"}),
    more_seeds={"N + RPE": 6, "RPE": 6},
    smoke={"steps": 2, "batch_size": 2, "items": 4, "probe": 1, "lengths": [16, 32], "seconds": 0.01},
    seconds=60,
)
