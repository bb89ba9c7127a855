"""MASFormer (Zhang et al., arXiv 2310.12442): only a few layers need attention over the whole input.

The paper (abstract): at 1.3B parameters, full attention in a few layers and local attention in the others is
competitive with full attention everywhere, with up to 75 % less computation, and better at long dependencies than local
attention everywhere.

Here: key-value pairs in the first 16 of 128 tokens and questions among the last 32, 4 layers of width 64 with blocks of
8 that see one block before them, so that local layers alone reach 51 tokens (including the short convolution), less
than the 80 between pairs and questions. Full attention in all layers, in none, in the lower two, or in the upper two;
1400 steps. The paper puts full layers at the bottom; which position is better is reported, not judged. Forward time on
one core at N = 4096, with all layers full against two.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_ratio
from regard.reproductions.framework.training import language_model, trained_score
from regard.tasks.protocol import IGNORED
from regard.tasks.recall import FILLER, RecallTask

if TYPE_CHECKING:
    from jaxtyping import Int

TRAINING = {"steps": 1400, "batch_size": 16, "learning_rate": 3e-3, "items": 512}
FULL = ("softmax", {"short_convolution": 4})
LOCAL = ("local", {"short_convolution": 4, "form": "block", "block": 8, "lookback": 1})
PLANS = {
    "full": [FULL] * 4,
    "local": [LOCAL] * 4,
    "bottom": [FULL] * 2 + [LOCAL] * 2,
    "top": [LOCAL] * 2 + [FULL] * 2,
}


class DistantRecall(RecallTask):
    """Eight pairs in the first 16 tokens, filler, and sixteen questions in the last 32 of 128 tokens."""

    def __init__(self, evaluation_items: int) -> None:
        options: dict[str, Any] = {"pairs": 8, "queries": 16, "vocab_size": 64, "evaluation_items": evaluation_items}
        super().__init__(length=128, **options)
        self.near = RecallTask(length=48, **options)

    def draw(self, rng: np.random.Generator, count: int) -> "tuple[Int[np.ndarray, 'b n'], Int[np.ndarray, 'b n']]":
        inputs, targets = self.near.draw(rng, count)
        return _with_gap(inputs, FILLER), _with_gap(targets, IGNORED)


def _with_gap(x: "Int[np.ndarray, 'b 48']", value: int) -> "Int[np.ndarray, 'b 128']":
    return np.concatenate([x[:, :16], np.full((len(x), 80), value), x[:, 16:]], axis=1)


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure the accuracy of distant recall; with ``seconds``, the speedup with local upper layers."""
    recall = DistantRecall(setting.get("items", 8))
    if "seconds" in setting:
        return {"speedup": time_models(recall, setting)}
    model = language_model(recall, PLANS[setting["plan"]], dim=64, num_heads=4)
    return {**trained_score(model, recall, setting, seed)}


@torch.no_grad()
def time_models(recall: RecallTask, setting: Setting) -> dict[str, float]:
    """Measure how many times as long the plan with only full layers takes."""
    ids = torch.randint(recall.vocab_size, (1, setting["length"]))
    full, mixed = (language_model(recall, PLANS[plan], dim=64, num_heads=4) for plan in ("full", "bottom"))
    return timed_ratio(partial(full, ids), partial(mixed, ids), seconds=setting["seconds"])


REPRODUCTION = Reproduction(
    name="local",
    mechanisms=("local",),
    claim=(
        "Full attention in a few layers and local attention in the others is competitive with full attention at up to 75 % "
        "less computation, and beats local attention everywhere on long dependencies (abstract)."
    ),
    instead=(
        "Recall over at least 80 tokens, which local layers alone cannot reach: 4 layers of width 64, full in all, none, the "
        "lower or the upper two. Forward time at N = 4096 on one core."
    ),
    settings={plan: TRAINING | {"plan": plan} for plan in PLANS} | {"time": {"length": 4096, "seconds": 10.0}},
    run_cell=run_cell,
    checks=(
        Check("full layers at the bottom within 5 points of full", minus("bottom", "full"), above=-0.05),
        Check("full layers at the bottom above local by 0.3", minus("bottom", "local"), above=0.3),
        Check("full in all layers takes longer than in two", measured("time", "speedup"), above=1.0),
    ),
    needs=(
        Check("full attention solves the task (above 0.9)", measured("full", "score"), above=0.9),
        Check("local attention does not (below 0.1)", measured("local", "score"), below=0.1),
    ),
    left_out=(
        "language modelling and generation at 1.3B parameters: recall over a distance stands for long dependencies",
        "continued training of a pretrained model on longer inputs: models are trained from scratch",
        "75 % less computation: a time on one core is judged, and two of four layers are full",
    ),
    timings=frozenset({"time"}),
    smoke={"steps": 2, "batch_size": 2, "items": 8, "length": 64, "seconds": 0.01},
    seconds=55,
)
