"""Synthesizer (Tay et al., arXiv 2005.00743): scores need not come from pairs of tokens.

The paper (abstract): random alignment matrices perform surprisingly competitively, and dot products may not be that important;
synthesised scores beside dot products are better than either alone.

Here: scikit-learn's digits as 64 pixel tokens, so that places mean something, 2 layers of width 64 with learned positions, 600
steps: softmax, and scores that are dense, random and trained, random and fixed, or dense mixed with dot products. Competitive
means within 5 points. That fixed random scores come last is what a survey expects of them (arXiv 2103.14636).
"""

from typing import Any

from regard.reproductions.framework.judging import Check, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import classifier, digit_pixels, trained_score

TRAINING = {"steps": 600, "batch_size": 32, "learning_rate": 3e-3, "items": 1000}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    task = digit_pixels(setting["items"])
    options = {**setting["options"], **({"length": task.length} if setting["mixer"] == "synthesizer" else {})}
    plan = [(setting["mixer"], options)] * 2
    model = classifier(task, plan, dim=64, num_heads=4, positions="learned", max_length=task.length)
    return {**trained_score(model, task, setting, seed)}


def synthesizer(*kinds: str, **options: Any) -> dict[str, Any]:
    return TRAINING | {"mixer": "synthesizer", "options": {"kinds": kinds, **options}}


REPRODUCTION = Reproduction(
    name="synthesizer",
    mechanisms=("synthesizer",),
    claim=(
        "Random alignment matrices are surprisingly competitive with dot products, and synthesised scores beside dot products "
        "better than either (abstract)."
    ),
    instead=(
        "Accuracy on digits as 64 pixel tokens, 2 layers of width 64 with learned positions; competitive meaning within 5 "
        "points of softmax."
    ),
    settings={
        "dense": synthesizer("dense"),
        "random": synthesizer("random"),
        "fixed random": synthesizer("random", train_random=False),
        "dense and dot": synthesizer("dense", "dot"),
        "softmax": TRAINING | {"mixer": "softmax", "options": {}},
    },
    run_cell=run_cell,
    checks=(
        Check("random within 5 points of softmax or better", minus("random", "softmax"), above=-0.05),
        Check("dense within 5 points of softmax or better", minus("dense", "softmax"), above=-0.05),
        Check("dense and dot above softmax", minus("dense and dot", "softmax"), above=0.0),
        Check("dense and dot above dense", minus("dense and dot", "dense"), above=0.0),
        Check("fixed random below random", minus("fixed random", "random"), below=0.0),
        Check("fixed random below dense", minus("fixed random", "dense"), below=0.0),
    ),
    smoke={"steps": 2, "batch_size": 2, "items": 8},
    seconds=30,
)
