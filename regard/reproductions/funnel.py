"""Funnel-Transformer (Dai et al., arXiv 2006.03236): layers on shorter and shorter sequences are as good, and cheaper.

The paper (abstract): with comparable or fewer operations it outperforms the standard Transformer on many sequence-level
prediction tasks. In its ablations, pooling only the queries is better than pooling keys and values too.

Here: scikit-learn's digits as 64 pixel tokens, width 48, 600 steps: one softmax layer, then three layers of a funnel on
33, 17 and 9 tokens, against four softmax layers followed by the mean; and the funnel with pooled keys. "As good" means
within 2 points. The forward time of both on 1024 tokens is compared on one core. No pretraining.
"""

from typing import Any

import torch

from regard.models import Encoder, EncoderConfig
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_ratio
from regard.reproductions.framework.training import cached_task, classifier, trained_score

TRAINING = {"steps": 600, "batch_size": 32, "learning_rate": 1e-3, "items": 1000}
FUNNEL: dict[str, Any] = {"num_layers": 1, "pool": "funnel", "pool_options": {"blocks": 3}}
STANDARD: dict[str, Any] = {"num_layers": 4, "pool": "mean"}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure the accuracy on digits of pixels; with ``length``, the speedup of a forward pass."""
    if "length" in setting:
        with torch.no_grad():
            return {"speedup": time_forward(setting)}
    task = cached_task("images", data="digits", patch=1, held_out=0.5, evaluation_items=setting["items"])
    options = {"dim": 48, "num_heads": 4, "positions": "sinusoidal"} | setting["encoder"]
    return {**trained_score(classifier(task, "softmax", **options), task, setting, seed)}


def time_forward(setting: Setting) -> dict[str, float]:
    """Measure how many times as long the standard encoder takes as the funnel."""
    shared: dict[str, Any] = {"num_classes": 2, "vocab_size": 256, "dim": 48, "num_heads": 4}
    standard, funnel = (Encoder(EncoderConfig(**shared, **options)).eval() for options in (STANDARD, FUNNEL))
    tokens = torch.randint(0, 256, (1, setting["length"]))
    return timed_ratio(lambda: standard(tokens), lambda: funnel(tokens), seconds=setting["seconds"])


REPRODUCTION = Reproduction(
    name="funnel",
    mechanisms=("funnel",),
    claim=(
        "Halving the sequence block by block is as good as the standard Transformer at fewer operations (abstract); pooling the "
        "queries alone is better than pooling all (ablations)."
    ),
    instead=(
        "Accuracy on digits as 64 pixel tokens, width 48, four layers of which three are a funnel's; as good meaning within 2 "
        "points; forward time at 1024 tokens on one core. No pretraining."
    ),
    settings={
        "funnel": TRAINING | {"encoder": FUNNEL},
        "pooled keys": TRAINING | {"encoder": FUNNEL | {"pool_options": {"blocks": 3, "query_only": False}}},
        "standard": TRAINING | {"encoder": STANDARD},
        "time": {"length": 1024, "seconds": 10.0},
    },
    run_cell=run_cell,
    checks=(
        Check("within 2 points of the standard encoder", minus("funnel", "standard"), above=-0.02),
        Check("pooling queries alone is above pooling all", minus("funnel", "pooled keys"), above=0.0),
        Check("the standard encoder takes longer", measured("time", "speedup"), above=1.0),
    ),
    needs=(Check("the standard encoder classifies digits (above 0.8)", measured("standard", "score"), above=0.8),),
    left_out=(
        "better after pretraining with as many operations: the pretraining is out of reach",
        "a decoder that gives every token back: what is predicted here is of the whole sequence",
        "a deeper model for the operations saved: the funnel has as many layers as what it is compared with",
    ),
    timings=frozenset({"time"}),
    more_seeds={"funnel": 16, "pooled keys": 16},
    smoke={"steps": 2, "batch_size": 2, "items": 8, "length": 16, "seconds": 0.01},
    seconds=60,
)
