"""SEA (Lee et al., arXiv 2310.01777): a few keys of an estimated map, distilled, do as well as the whole of attention.

The paper (abstract): OPT-1.3B on WikiText-2, distilled to SEA, has a better perplexity than the quadratic model at about half
its memory, where earlier linear and sparse methods have about twice the perplexity. The number of keys may change afterwards.

Here: a teacher of 2 layers of width 64 with 4 heads, trained for 400 steps on bytes of Python's standard library in windows of
256. Students begin as the teacher and are distilled for the same 150 steps with the same loss (hidden states, logits, task;
those that can, also the attention weights): SEA with 16 keys a query out of a map of 64 pixels, the new parameters at ten times
the rate; a Performer with 44 features of the softmax kernel, and of the relu kernel, which SEA's own estimate uses in causal
models; linear attention (elu features) and a window of 16. SEA is then read with 64 keys, without training. "Near" is judged
as at most 0.03 nats.
"""

import functools
import math

import torch

from regard.contract import Context
from regard.models import LanguageModel
from regard.reproductions.framework.judging import Check, Seed, measured, minus, number
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import cached_task, fit, language_model, score
from regard.tasks import Task
from regard.training import begin_as, distillation_groups, distillation_loss

SHAPE = {"dim": 64, "num_heads": 4, "positions": "rotary"}
SEA = {"top_k": 16, "estimate_length": 64}
TRAINING = {"teacher_steps": 400, "steps": 150, "batch_size": 8, "learning_rate": 3e-3, "items": 64}
DISTILLED_RATE = 3e-4


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    task = cached_task("text", length=256, evaluation_items=setting["items"])
    teacher = _teacher(
        setting["teacher_steps"], setting["batch_size"], setting["learning_rate"], setting["items"], seed
    )
    if setting["mixer"] == "softmax":
        return {"loss": score(teacher, task)["loss"]}
    student = language_model(task, [(setting["mixer"], setting["options"])] * 2, **SHAPE)
    new = begin_as(student, teacher).new
    optimizer = torch.optim.AdamW(distillation_groups(student, new, learning_rate=DISTILLED_RATE))
    student.train()
    generator = torch.Generator().manual_seed(seed)
    for step in range(setting["steps"]):
        batch = task.training_batch(setting["teacher_steps"] + step, seed, setting["batch_size"])
        optimizer.zero_grad()
        loss = distillation_loss(student, teacher, batch.inputs, batch.targets, context=Context(generator=generator))
        if not math.isfinite(float(loss.detach())):
            return {"loss": math.nan, "loss_64": math.nan, "keys": math.nan}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    student.eval()
    found = {"loss": score(student, task)["loss"]}
    if setting["mixer"] == "sea":
        wider = language_model(task, [("sea", {**SEA, "top_k": 64})] * 2, **SHAPE).eval()
        wider.load_state_dict(student.state_dict())
        found |= {"loss_64": score(wider, task)["loss"], "keys": _keys_read(student, task)}
    return found


@functools.cache
def _teacher(steps: int, batch_size: int, learning_rate: float, items: int, seed: int) -> LanguageModel:
    """The same for all students of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        task = cached_task("text", length=256, evaluation_items=items)
        model = language_model(task, ["softmax"] * 2, **SHAPE)
        fit(model, task, {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}, seed)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _keys_read(model: LanguageModel, task: Task) -> float:
    """Keys that the last query of a window reads, mean over heads, layers and windows."""
    batch = next(iter(task.evaluation_batches(16)))
    maps = model(batch.inputs, context=Context(want=frozenset({"weights"}))).extras["weights"]
    return sum(float((w[:, :, -1] > 0).double().sum(-1).mean()) for w in maps) / len(maps)


def _gain(seed: Seed) -> float:
    return number(seed, "SEA", "loss_64") - number(seed, "SEA", "loss")


REPRODUCTION = Reproduction(
    name="sea",
    mechanisms=("sea",),
    claim=(
        "A pretrained transformer distilled to SEA has its perplexity at linear cost (OPT-1.3B on WikiText-2: better than the "
        "teacher's), where other linear and sparse methods have about twice as much; more keys at test time need no training."
    ),
    instead=(
        "Loss in nats on code bytes of students of a 2-layer teacher of width 64, distilled alike for 150 steps: SEA with 16 of "
        "256 keys against two Performers, linear attention and a window of 16, and against its teacher; then with 64 keys. Memory "
        "is not measured."
    ),
    settings={
        "teacher": TRAINING | {"mixer": "softmax", "options": {}},
        "SEA": TRAINING | {"mixer": "sea", "options": SEA},
        "linear": TRAINING | {"mixer": "linear", "options": {}},
        "window": TRAINING | {"mixer": "local", "options": {"window": 16}},
        "performer": TRAINING | {"mixer": "performer", "options": {}},
        "performer, relu": TRAINING | {"mixer": "performer", "options": {"kernel": "relu"}},
    },
    run_cell=run_cell,
    checks=(
        Check("SEA better than a Performer", minus("SEA", "performer", "loss"), below=0.0),
        Check("SEA better than a Performer with the relu kernel", minus("SEA", "performer, relu", "loss"), below=0.0),
        Check("SEA better than linear attention", minus("SEA", "linear", "loss"), below=0.0),
        Check("SEA at most 0.03 nats worse than the window", minus("SEA", "window", "loss"), below=0.03),
        Check("SEA at most 0.03 nats worse than its teacher", minus("SEA", "teacher", "loss"), below=0.03),
        Check("better with 64 keys, untrained", _gain, below=0.0),
        Check("the last of 256 queries reads at most 24 keys a head", measured("SEA", "keys"), below=24.0),
    ),
    smoke={"teacher_steps": 1, "steps": 2, "batch_size": 2, "items": 4},
    seconds=60,
)
