"""Nystromformer (Xiong et al., arXiv 2102.03902): the softmax matrix rebuilt from a few landmarks, nearly as good.

The paper (abstract, section 5): with 64 landmarks comparable to BERT-base, in a few cases slightly better, on GLUE and IMDB;
favourable on the Long Range Arena at linear cost; 6 iterations are enough for the pseudoinverse.

Here: scikit-learn's digits as 64 pixel tokens, 2 layers of width 64, 600 steps: softmax; 16 landmarks with a convolution of width
5 and without; and softmax whose weights are taken over by 16 landmarks and trained for 100 steps more. Comparable means within
5 points. Growth of forward time on one core with 64 landmarks. No pretraining.
"""

from functools import partial
from typing import Any

import torch

from regard.functional import nystrom_attention, softmax_attention
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import growth_and_speedup
from regard.reproductions.framework.training import classifier, digit_pixels, fit, score, trained_score

TRAINING = {"steps": 600, "batch_size": 32, "learning_rate": 3e-3, "items": 1000}
LANDMARKS = {"landmarks": 16, "convolution": 0}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    if "lengths" in setting:
        with torch.no_grad():
            return time_forward(setting)
    task = digit_pixels(setting["items"])
    model = classifier(task, [(setting["mixer"], setting["options"])] * 2, dim=64, num_heads=4)
    found = trained_score(model, task, setting, seed)
    if "more_steps" not in setting:
        return {**found}
    nystrom = classifier(task, [("nystrom", LANDMARKS)] * 2, dim=64, num_heads=4)
    nystrom.load_state_dict(model.state_dict())
    before = score(nystrom, task)["score"]
    fit(nystrom, task, setting, seed + 1000, steps=setting["more_steps"])
    return {"score": score(nystrom, task)["score"], "unadapted": before, "softmax": found["score"]}


def time_forward(setting: Setting) -> dict[str, Any]:
    inputs = {n: torch.randn(3, 1, 4, n, 64) for n in setting["lengths"]}
    softmax = {n: partial(softmax_attention, *x, pattern="noncausal-self") for n, x in inputs.items()}
    nystrom = {n: partial(nystrom_attention, *x, pattern="noncausal-self", landmarks=64) for n, x in inputs.items()}
    return growth_and_speedup({"nystrom": nystrom, "softmax": softmax}, seconds=setting["seconds"])


REPRODUCTION = Reproduction(
    name="nystrom",
    mechanisms=("nystrom",),
    claim=(
        "Comparable to softmax, with 64 landmarks, on GLUE and IMDB, also starting from softmax weights; linear in the "
        "tokens (abstract, section 5)."
    ),
    instead=(
        "Accuracy on digits as 64 pixel tokens, 2 layers of width 64, 16 landmarks; comparable meaning within 5 points; 100 "
        "steps of fine-tuning; growth of forward time on one core with 64 landmarks. No pretraining."
    ),
    settings={
        "nystrom": TRAINING | {"mixer": "nystrom", "options": LANDMARKS},
        "with a convolution": TRAINING | {"mixer": "nystrom", "options": LANDMARKS | {"convolution": 5}},
        "softmax": TRAINING | {"mixer": "softmax", "options": {}},
        "moved": TRAINING | {"mixer": "softmax", "options": {}, "more_steps": 100},
        "time": {"lengths": [1024, 2048, 4096, 8192], "seconds": 8.0},
    },
    run_cell=run_cell,
    checks=(
        Check("accuracy within 5 points of softmax", minus("nystrom", "softmax"), above=-0.05),
        Check(
            "with a convolution, accuracy within 5 points of softmax or better",
            minus("with a convolution", "softmax"),
            above=-0.05,
        ),
        Check(
            "moved and fine-tuned, within 5 points of the softmax that it came from",
            lambda seed: float(seed["moved"]["score"]) - float(seed["moved"]["softmax"]),
            above=-0.05,
        ),
        Check("forward time grows with p < 1.3", measured("time", "nystrom"), below=1.3),
        Check("softmax takes longer at 8192 tokens", measured("time", "speedup"), above=1.0),
    ),
    timings=frozenset({"time"}),
    smoke={"steps": 2, "more_steps": 1, "batch_size": 2, "items": 8, "lengths": [64, 128], "seconds": 0.01},
    seconds=45,
)
