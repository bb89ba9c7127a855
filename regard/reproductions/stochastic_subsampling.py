"""SSA (Hussain et al., arXiv 2306.01705): training on random parts of the keys costs less and generalises better.

The paper (abstract): attention costs 4 to 8 times less in training, with better generalisation than dense training; after a
short dense fine-tuning all pathways agree; ensembles of sub-models can be better than their dense counterpart.

Here: bytes of Python's standard library in windows of 256, of which only 64 are trained on again and again, so that the dense
model over-fits. 4 layers of width 96 with 4 heads, 500 steps of 4 windows at a constant rate of 1e-3, without dropout or weight
decay. Dense; unbiased SSA with a quarter of the keys; locally biased SSA with windows of 64 and as much noise. Both SSA runs end
with 5 % dense steps, all runs have the same number of steps. On held-out text: the loss at the end; of the SSA runs also before
the dense steps, dense, with one subsampled pass and with the mean probabilities of 8.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from regard.contract import Context
from regard.mechanisms.stochastic_subsampling import ensemble_predict
from regard.models import LanguageModel
from regard.reproductions.framework.judging import Check, Seed, minus, number
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import cached_task, language_model, score
from regard.tasks import Task

FINETUNE = 0.05
TRAINING = {"steps": 500, "batch_size": 4, "windows": 64, "items": 32}
LOCAL = {"mode": "local", "window": 64, "sigma": 64.0}


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    task = cached_task("text", length=256, evaluation_items=setting["items"])
    steps = setting["steps"]
    options = {"steps": steps, "finetune": FINETUNE, **setting["options"]} if setting["options"] else {"ratio": 1.0}
    model = language_model(task, [("stochastic_subsampling", options)] * 4, dim=96, num_heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    known = task.training_batch(0, seed, setting["windows"])
    generator = torch.Generator().manual_seed(seed)
    first, found = math.ceil((1 - FINETUNE) * steps), {}
    for step in range(steps):
        if step == first and setting["options"]:
            found = {
                "before": score(model, task)["loss"],
                "one": _ensemble_loss(model, task, 1),
                "eight": _ensemble_loss(model, task, 8),
            }
        model.train()
        rows = torch.randint(setting["windows"], (setting["batch_size"],), generator=generator)
        context = Context(generator=generator, progress=float(step))
        optimizer.zero_grad()
        loss = model.loss(known.inputs[rows], known.targets[rows], context=context)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return found | {"loss": score(model, task)["loss"], "training_loss": float(loss.detach())}


@torch.no_grad()
def _ensemble_loss(model: LanguageModel, task: Task, passes: int) -> float:
    """Held-out loss in nats of the mean probabilities of some subsampled passes."""
    generator, losses = torch.Generator().manual_seed(passes), []
    for batch in task.evaluation_batches(8):
        mean = ensemble_predict(model, batch.inputs, passes=passes, context=Context(generator=generator))
        losses.append(float(F.nll_loss(mean.log().flatten(0, 1), batch.targets.flatten())))
    return sum(losses) / len(losses)


def _within(setting: str, first: str, second: str) -> Callable[[Seed], float]:
    return lambda seed: number(seed, setting, first) - number(seed, setting, second)


REPRODUCTION = Reproduction(
    name="stochastic_subsampling",
    mechanisms=("stochastic_subsampling",),
    claim=(
        "Attention of a quarter to an eighth of the cost in training generalises better than dense training; a short dense "
        "fine-tuning consolidates; an ensemble of sub-models can be better than the dense model."
    ),
    instead=(
        "Held-out loss in nats on code bytes of a small model that over-fits 64 windows: a quarter of the keys, unbiased and "
        "locally biased, with 5 % dense steps at the end, against dense training of as many steps; the dense steps; one pass "
        "against 8. Time is not measured."
    ),
    settings={
        "dense": TRAINING | {"options": {}},
        "unbiased": TRAINING | {"options": {"ratio": 0.25}},
        "local": TRAINING | {"options": {"ratio": 0.25, **LOCAL}},
    },
    run_cell=run_cell,
    checks=(
        Check("locally biased better than dense", minus("local", "dense", "loss"), below=0.0),
        Check("unbiased better than dense", minus("unbiased", "dense", "loss"), below=0.0),
        Check("dense steps help the locally biased model", _within("local", "loss", "before"), below=0.0),
        Check("dense steps help the unbiased model", _within("unbiased", "loss", "before"), below=0.0),
        Check("8 passes better than one (local)", _within("local", "eight", "one"), below=0.0),
        Check("8 passes better than one (unbiased)", _within("unbiased", "eight", "one"), below=0.0),
        Check(
            "8 passes at most 0.02 worse than the dense pass (local)", _within("local", "eight", "before"), below=0.02
        ),
    ),
    smoke={"steps": 20, "batch_size": 1, "windows": 4, "items": 4},
    seconds=60,
)
