"""FNet (Lee-Thorp et al., arXiv 2105.03824): a Fourier transform in place of attention, a little worse and much faster.

The paper (abstract): 92 to 97 % of the accuracy of BERT on GLUE, trained 80 % faster on GPUs at 512 tokens; on the Long Range
Arena as accurate as the most accurate efficient Transformers.

Here: scikit-learn's digits as 64 pixel tokens, 2 layers of width 64, 600 steps: softmax, and FNet with orthonormal
transforms, since the blocks are pre-norm; the paper's transform in the same blocks is recorded but not judged. A
training step (forward and backward) of an encoder of 4 layers of width 256 on 4 sequences of 512 tokens is timed on one
core. No pretraining.
"""

from collections.abc import Callable
from typing import Any

import torch

from regard.models import Encoder, EncoderConfig
from regard.reproductions.framework.judging import Check, Seed, measured, number
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_ratio
from regard.reproductions.framework.training import classifier, digit_pixels, trained_score

TRAINING = {"steps": 600, "batch_size": 32, "learning_rate": 3e-3, "items": 1000}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure the accuracy on digits; with ``length``, the speedup of a training step over softmax."""
    if "length" in setting:
        softmax, fnet = (training_step(mixer, setting["length"]) for mixer in ("softmax", "fnet"))
        return {"speedup": timed_ratio(softmax, fnet, seconds=setting["seconds"])}
    task = digit_pixels(setting["items"])
    model = classifier(task, [(setting["mixer"], setting["options"])] * 2, dim=64, num_heads=4)
    return {**trained_score(model, task, setting, seed)}


def training_step(mixer: str, length: int) -> Callable[[], None]:
    """Return an action: forward and backward of an encoder on random tokens."""
    model = Encoder(EncoderConfig(num_classes=2, vocab_size=256, plan=[mixer] * 4, dim=256, num_heads=4))
    tokens = torch.randint(0, 256, (4, length))

    def step() -> None:
        model.zero_grad()
        model(tokens).output.square().sum().backward()

    return step


def share(seed: Seed) -> float:
    """Return FNet's accuracy divided by softmax's."""
    return number(seed, "fnet", "score") / number(seed, "softmax", "score")


REPRODUCTION = Reproduction(
    name="fnet",
    mechanisms=("fnet",),
    claim="92 to 97 % of BERT's accuracy on GLUE, trained 80 % faster at 512 tokens (abstract).",
    instead=(
        "Accuracy on digits as 64 pixel tokens, 2 layers of width 64, as a part of softmax's; time of a training step of 4 "
        "layers of width 256 at 512 tokens on one core. No pretraining."
    ),
    settings={
        "softmax": TRAINING | {"mixer": "softmax", "options": {}},
        "fnet": TRAINING | {"mixer": "fnet", "options": {"orthonormal": True}},
        "not normalised": TRAINING | {"mixer": "fnet", "options": {}},
        "time": {"length": 512, "seconds": 15.0},
    },
    run_cell=run_cell,
    checks=(
        Check("at least 92 % of softmax's accuracy", share, above=0.92),
        Check("a training step takes softmax longer", measured("time", "speedup"), above=1.0),
    ),
    needs=(Check("softmax classifies digits (above 0.8)", measured("softmax", "score"), above=0.8),),
    left_out=(
        "GLUE after pretraining: the pretraining is out of reach",
        "the Long Range Arena: sequences of 1K to 4K tokens, each task a training of its own",
        "80 % faster on GPUs and 70 % on TPUs: one core is timed",
    ),
    timings=frozenset({"time"}),
    smoke={"steps": 2, "batch_size": 2, "items": 8, "length": 16, "seconds": 0.01},
    seconds=45,
)
