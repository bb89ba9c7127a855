"""Differential Transformer (Ye et al., arXiv 2410.05258): a second map cancels the attention that goes to everything.

The paper (abstract, figure 3): it reaches the loss of a softmax model with about 65 % of the parameters or tokens, with
larger gains in key information retrieval and long contexts, since less attention goes to irrelevant tokens. Ablations:
a constant lambda_init, 0.8 or 0.5, is nearly as good as one that grows with depth.

Here: the same number of heads, and so the same number of parameters up to a few dozen; bytes of Python's standard
library, 3 layers of width 64, windows of 128, 500 steps, lambda_init by depth and a constant 0.8. With three layers
lambda_init by depth is 0.2 to 0.47, far from the constant, whereas most layers of the paper's models have nearly 0.8.
If losses fall with size as in language models (with a power of about -0.07), 65 % of the parameters are worth 0.06
nats. In the pilot of two seeds, softmax had 1.93 nats, and the difference from it a spread of 0.018, so six seeds can
tell 0.03 from zero. The difference between the two lambda_init had a spread of 0.064, three times its margin, which ten
seeds would not settle if the two were alike.

Retrieval is not judged, since it is too easy at lengths that can be trained here. When looking up 4 facts among filler
(the task of `landmark`, without positions), both were always right at 64 tokens; at 2048 tokens, 32 times the training
length, one pilot run of each had 0.99 with softmax and 0.89 with differential attention. The claim is not about lengths
beyond those of training.
"""

from typing import Any

from regard.models import differential_plan
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import cached_task, language_model, trained_score

TRAINING = {"steps": 500, "batch_size": 8, "learning_rate": 2e-3, "items": 128}
LAYERS = 3


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    """Measure the loss on text."""
    task = cached_task("text", length=128, evaluation_items=setting["items"])
    plan: Any = ["softmax"] * LAYERS
    if setting["mixer"] == "differential":
        plan = differential_plan(LAYERS, **setting["options"])
    return trained_score(language_model(task, plan, dim=64, num_heads=4), task, setting, seed)


REPRODUCTION = Reproduction(
    name="differential",
    mechanisms=("differential",),
    claim=(
        "Subtracting a second softmax map gives a lower loss at the same size; a constant lambda_init is nearly as good as one "
        "by depth (abstract, ablations)."
    ),
    instead=(
        "Loss in nats on code bytes, windows of 128, 3 layers of width 64, 500 steps; nearly is within 0.02 nats."
    ),
    settings={
        "softmax": TRAINING | {"mixer": "softmax", "options": {}},
        "differential": TRAINING | {"mixer": "differential", "options": {}},
        "constant": TRAINING | {"mixer": "differential", "options": {"lambda_init": 0.8}},
    },
    run_cell=run_cell,
    needs=(Check("softmax learns to read (below 2.2 nats)", measured("softmax", "loss"), below=2.2),),
    checks=(
        Check("a loss below softmax's", minus("differential", "softmax", "loss"), below=0.0),
        Check(
            "a constant within 0.02 nats of lambda_init by depth", minus("constant", "differential", "loss"), below=0.02
        ),
    ),
    left_out=(
        "retrieval among much that is irrelevant: softmax is already right in all cases at the lengths that can be trained here",
        "the loss of a softmax model with 65 % of the parameters or tokens: a fit over sizes, which needs many of them",
        "fewer outliers of activations, and learning from examples in context: both take a large model",
    ),
    smoke={"steps": 2, "batch_size": 2, "items": 4},
    seeds=6,
    seconds=10,
)
