"""Mixture of heads (Jin et al., arXiv 2410.11842): 50 to 90 % of the heads do better than all of them.

The paper (abstract): better than multi-head attention in ViT, DiT and language models with 50 to 90 % of the heads active;
LLaMA3-8B continue-tuned to 75 % of its heads gains 2.4 points on 14 benchmarks.

Here: from scratch on bytes of Python's standard library, windows of 128, 2 layers of width 64 with 8 heads of 8, 400 steps:
all heads, 75 % (2 shared, 4 of 6 routed) and 50 % (2 shared, 2 of 6), and 6 heads of the same width as the control of equal
active heads. "Better" is judged as not more than 0.02 nats worse (a tie is what to expect at this size).
Continued tuning of a pretrained model is not tried.
"""

import torch

from regard import Context
from regard.mechanisms.mixture_of_heads import head_usage, usage_entropy
from regard.models import LanguageModel
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import cached_task, language_model, trained_score
from regard.tasks import Task

TRAINING = {"steps": 400, "batch_size": 32, "learning_rate": 3e-3, "items": 64}


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    task = cached_task("text", length=128, evaluation_items=setting["items"])
    plan = [(setting["mixer"], setting["options"])] * 2
    model = language_model(task, plan, dim=64, num_heads=setting["heads"], head_dim=8)
    found = trained_score(model, task, setting, seed)
    if setting["mixer"] == "mixture_of_heads":
        found["entropy"] = routing_entropy(model, task, setting["options"]["shared_heads"])
    return found


@torch.no_grad()
def routing_entropy(model: LanguageModel, task: Task, shared: int) -> float:
    """How evenly tokens spread over the routed heads, mean of the layers: 1 is even."""
    batch = next(iter(task.evaluation_batches(32)))
    gates = model(batch.inputs, context=Context(want=frozenset({"gates"}))).extras["gates"]
    return sum(float(usage_entropy(head_usage(g)[shared:])) for g in gates) / len(gates)


REPRODUCTION = Reproduction(
    name="mixture_of_heads",
    mechanisms=("mixture_of_heads",),
    claim="With 50 to 90 % of the heads active, better than with all of them (abstract).",
    instead=(
        "Loss in nats on code bytes, 2 layers of width 64 with 8 heads, from scratch: 75 and 50 % of the heads against all, "
        "judged as not more than 0.02 worse; 6 heads as a control; evenness of the routing."
    ),
    settings={
        "all heads": TRAINING | {"mixer": "softmax", "heads": 8, "options": {}},
        "75 %": TRAINING | {"mixer": "mixture_of_heads", "heads": 8, "options": {"shared_heads": 2, "active_heads": 4}},
        "50 %": TRAINING | {"mixer": "mixture_of_heads", "heads": 8, "options": {"shared_heads": 2, "active_heads": 2}},
        "6 heads": TRAINING | {"mixer": "softmax", "heads": 6, "options": {}},
    },
    run_cell=run_cell,
    checks=(
        Check("75 % at most 0.02 nats worse than all heads", minus("75 %", "all heads", "loss"), below=0.02),
        Check("50 % at most 0.02 nats worse than all heads", minus("50 %", "all heads", "loss"), below=0.02),
        Check("75 % better than 6 heads", minus("75 %", "6 heads", "loss"), below=0.0),
        Check("tokens spread over the heads (entropy above 0.9)", measured("75 %", "entropy"), above=0.9),
    ),
    smoke={"steps": 2, "batch_size": 2, "items": 4},
    seconds=45,
)
