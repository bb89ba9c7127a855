"""Compressive Transformer (Rae et al., arXiv 1911.05507): a compressed memory beats a plain one of Transformer-XL.

The paper (abstract): 17.1 perplexity on WikiText-103 and 0.97 bits per character on Enwik8, the best of their time; section
5.1: a learned convolution with the attention-reconstruction loss is the best of the compressions tried.

Here: bytes of Python's standard library in windows of 512, 2 layers of width 64 with segments of 32, 450 steps. All models
see 96 slots at most: Transformer-XL a memory of 64, the compressive ones a memory of 32 and 32 slots of 4 tokens each, which
reach 160 tokens back. The compression of the convolution learns by reconstruction; mean and maximum learn nothing.
"""

from typing import Any

from regard.models import LanguageModel, LanguageModelConfig
from regard.reproductions.framework.judging import Check, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import cached_task, trained_score

TRAINING = {"steps": 450, "batch_size": 8, "learning_rate": 3e-3, "items": 64, "length": 512}


def compressive(compression: str) -> tuple[str, dict[str, Any]]:
    options = {"segment": 32, "memory": 32, "compressed": 32, "ratio": 4}
    return "compressive", {**options, "compression": compression}


PLANS = {
    "transformer_xl": ("transformer_xl", {"segment": 32, "memory": 64}),
    "conv": compressive("conv"),
    "mean": compressive("mean"),
    "max": compressive("max"),
}


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    task = cached_task("text", length=setting["length"], evaluation_items=setting["items"])
    config = LanguageModelConfig(
        vocab_size=task.vocab_size or 0,
        plan=[PLANS[setting["mixer"]]] * 2,
        dim=64,
        num_heads=4,
        loss_weights={"reconstruction": 1.0},
    )
    return {**trained_score(LanguageModel(config), task, setting, seed)}


REPRODUCTION = Reproduction(
    name="compressive",
    mechanisms=("compressive",),
    claim=(
        "A compressed memory models language better than Transformer-XL's, and a convolution that learns to reconstruct "
        "attention compresses best (17.1 perplexity on WikiText-103; abstract and section 5.1)."
    ),
    instead=(
        "Loss in nats on code bytes, windows of 512, as many slots for all: Transformer-XL against memories compressed by "
        "a convolution, a mean and a maximum. Two layers of width 64, 450 steps."
    ),
    settings={name: TRAINING | {"mixer": name} for name in PLANS},
    run_cell=run_cell,
    checks=(
        Check("convolution below Transformer-XL", minus("conv", "transformer_xl", "loss"), below=0.0),
        Check("convolution below mean", minus("conv", "mean", "loss"), below=0.0),
        Check("convolution below maximum", minus("conv", "max", "loss"), below=0.0),
    ),
    smoke={"steps": 2, "batch_size": 2, "items": 2, "length": 80},
    seconds=60,
)
