"""Gated linear attention (Yang et al., arXiv 2312.06635): gates that depend on the data beat fixed decay and none.

The paper (abstract): competitive with a LLaMA-architecture Transformer and with Mamba at 340M and 1.3B parameters, data-dependent gates
better than a global decay or none, and trained on 2K tokens it is usable beyond 20K without large loss of perplexity.

Here: one layer, three gates (one for each key feature; a fixed one a head, as in retention; none), on bytes of Python's
standard library in windows of 128, and on selective copying, where most tokens are noise to be forgotten. The length
that the model generalises to is 1024, eight times that of training. Two layers of width 64, 400 and 700 steps.
"""

import functools

from regard.reproductions.framework.judging import Check, Seed, minus, number
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import language_model, score, trained_score
from regard.tasks import Task, create_task

TEXT = {"task": "text", "steps": 400, "batch_size": 32, "learning_rate": 3e-3, "items": 64}
COPYING = {"task": "copying", "steps": 700, "batch_size": 32, "learning_rate": 3e-3, "items": 512}


@functools.cache
def text(length: int, items: int) -> Task:
    return create_task("text", length=length, evaluation_items=items)


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    reads = setting["task"] == "text"
    task = (
        text(128, setting["items"])
        if reads
        else create_task("copying", length=80, tokens=8, alphabet=8, evaluation_items=setting["items"])
    )
    model = language_model(task, [("gated_linear", {"gate": setting["gate"]})] * 2, dim=64, num_heads=4)
    measured = trained_score(model, task, setting, seed)
    if reads:
        measured["loss_at_1024"] = score(model, text(1024, max(setting["items"] // 4, 1)))["loss"]
    return measured


def longer(seed: Seed) -> float:
    return number(seed, "text diagonal", "loss_at_1024") - number(seed, "text diagonal", "loss")


REPRODUCTION = Reproduction(
    name="gated_linear",
    mechanisms=("gated_linear",),
    claim=(
        "Data-dependent gates are better than a global decay or none; a model trained on 2K tokens is usable beyond 20K "
        "without large loss of perplexity (abstract)."
    ),
    instead=(
        "The same layer with gates for each feature, a fixed decay, and none: loss in nats on code bytes in windows of 128, "
        "accuracy of selective copying, and the loss at 8 times the length. Two layers of width 64, 400 and 700 steps."
    ),
    settings={
        f"{base['task']} {gate}": base | {"gate": gate}
        for base in (TEXT, COPYING)
        for gate in ("diagonal", "fixed", "none")
    },
    run_cell=run_cell,
    checks=(
        Check("text: fixed decay loses 0.05 nats", minus("text fixed", "text diagonal", "loss"), above=0.05),
        Check("text: no decay loses more than fixed", minus("text none", "text fixed", "loss"), above=0.0),
        Check("copying: gates above fixed decay", minus("copying diagonal", "copying fixed"), above=0.0),
        Check("text: loss at 1024 at most 0.02 nats above that at 128", longer, below=0.02),
    ),
    smoke={"steps": 2, "batch_size": 2, "items": 4},
    seconds=40,
)
