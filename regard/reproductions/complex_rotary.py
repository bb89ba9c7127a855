"""ComplexFormer (arXiv 2505.10222, marked as withdrawn): an angle from the content added to the rotation by position.

The paper (abstract): significantly lower perplexity than rotary attention in language modelling, better long-context
coherence, and better text, code and mathematics. The abstract gives no numbers, and the repository has no table.

Here: bytes of Python's standard library, windows of 128, 2 layers of width 96 with 4 heads, 500 steps. Rotary attention
and attention without positions are compared with the authors' initialisation (delta near 0, no D^-0.5) and with one
that equals rotary attention (delta = 1).
"""

from regard.reproductions.framework.judging import Check, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import cached_task, language_model, trained_score

TRAINING = {"steps": 500, "batch_size": 24, "learning_rate": 1e-3, "items": 64}


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    """Measure the loss on text."""
    task = cached_task("text", length=128, evaluation_items=setting["items"])
    model = language_model(task, [(setting["mixer"], setting["options"])] * 2, dim=96, num_heads=4)
    return trained_score(model, task, setting, seed)


REPRODUCTION = Reproduction(
    name="complex_rotary",
    mechanisms=("complex_rotary",),
    claim=(
        "An angle of content that each head rescales gives a significantly lower perplexity than rotary attention "
        "(abstract; no figure; the paper is marked as withdrawn)."
    ),
    instead="Loss in nats on code bytes, windows of 128, 2 layers of width 96, 500 steps, from two starts of delta.",
    settings={
        "delta from 1": TRAINING | {"mixer": "complex_rotary", "options": {"delta": "ones", "score_scale": "rsqrt"}},
        "authors' start": TRAINING | {"mixer": "complex_rotary", "options": {}},
        "rotary": TRAINING | {"mixer": "softmax", "options": {"positions": "rotary"}},
        "no positions": TRAINING | {"mixer": "softmax", "options": {"positions": "none"}},
    },
    run_cell=run_cell,
    checks=(
        Check("delta from 1 has a lower loss than rotary", minus("rotary", "delta from 1", "loss"), above=0.0),
        Check("the authors' start has a lower loss than rotary", minus("rotary", "authors' start", "loss"), above=0.0),
        Check("the authors' start beats no positions", minus("no positions", "authors' start", "loss"), above=0.0),
    ),
    smoke={"steps": 2, "batch_size": 2, "items": 4},
    seconds=50,
)
