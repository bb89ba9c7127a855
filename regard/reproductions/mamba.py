"""Mamba (Gu and Dao, arXiv 2312.00752): selection solves selective copying, which a time-invariant model cannot.

The paper: on selective copying S6 has about 98 %, whereas S4, which is linear time-invariant, has about 18 %.

Here: 8 data tokens from an alphabet of 8, scattered among 64 noise tokens, 2 layers of width 64, 4,000 steps (the
paper: 16 tokens among up to 4096). The time-invariant control is the same block with constant dt, B and C. Linear
attention, which the paper does not test, is the upper reference: it has no selection either but solves the task, so
selection is not the only way to do so. With 2,000 steps, selection had 0.93, 0.98 and 0.98 and was still learning, and
the control had 0.5. With 4,000 (three seeds), selection had 1.00, and the control also kept learning, up to 0.89; since
their difference is 0.11 and the check asks for 0.2, six seeds are run. We first also expected selection to copy better
than linear attention; three seeds left that undecided, and it is no longer part of the claim.
"""

from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import cached_task, language_model, trained_score

TRAINING = {"steps": 4000, "batch_size": 32, "learning_rate": 3e-3, "items": 512}


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    """Measure the accuracy on selective copying."""
    task = cached_task("copying", length=80, tokens=8, alphabet=8, evaluation_items=setting["items"])
    model = language_model(task, [(setting["mixer"], setting["options"])] * 2, dim=64, num_heads=4)
    return trained_score(model, task, setting, seed)


REPRODUCTION = Reproduction(
    name="mamba",
    mechanisms=("mamba",),
    claim="A selective state space solves selective copying (about 98 %), a time-invariant one does not (about 18 %).",
    instead=(
        "Accuracy of copying 8 tokens out of 64 noise tokens, 2 layers of width 64, 4,000 steps: the block, the block with "
        "constant dt, B and C, and linear attention as the upper end."
    ),
    settings={
        "selective": TRAINING | {"mixer": "mamba", "options": {}},
        "time-invariant": TRAINING | {"mixer": "mamba", "options": {"constant": ["dt", "B", "C"]}},
        "linear": TRAINING | {"mixer": "linear", "options": {}},
    },
    run_cell=run_cell,
    checks=(
        Check("selective above 0.95", measured("selective", "score"), above=0.95),
        Check("selective above time-invariant by 0.2", minus("selective", "time-invariant"), above=0.2),
    ),
    needs=(
        Check("linear attention learns the task, above 0.9", measured("linear", "score"), above=0.9),
        Check("the time-invariant control learns, above 0.25", measured("time-invariant", "score"), above=0.25),
    ),
    left_out=(
        "selective copying of 16 tokens among up to 4096, and induction heads that go on to a million tokens: too long here",
        "better than linear attention: the paper does not compare them on this task, and at this size linear attention solves it",
        "language models, genomics and audio as good as Transformers twice their size: out of reach",
    ),
    more_seeds={"selective": 6, "time-invariant": 6},
    smoke={"steps": 2, "batch_size": 2, "items": 8},
    seconds=90,
)
