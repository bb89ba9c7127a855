"""Transformer-XL (Dai et al., arXiv 1901.02860): a memory of the last segment extends context beyond a segment.

The paper (abstract): dependencies 450 % longer than those of a vanilla Transformer, better results on short and on long
sequences, and up to 1,800 times faster evaluation; section 3.3: relative scores generalise to memories longer than in
training.

Here: recall of 8 pairs within 96 tokens, 4 layers of width 64 with segments of 24, 1400 steps. With a memory of 24 they
reach 96 tokens (plus the short convolution), without a memory no more than their segment. Softmax over all tokens is
the upper reference and is not judged. The model with a memory of 24 is scored again with a memory of 72, without
further training. Evaluation on one core: the vanilla way reads 128 tokens again for each prediction, the memory's way
takes one step from a state of 128 tokens or more.
"""

from functools import partial
from typing import Any

import torch

from regard.contract import Context
from regard.models import LanguageModel
from regard.reproductions.framework.judging import Check, measured, minus, within
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_ratio
from regard.reproductions.framework.training import cached_task, language_model, score, trained_score
from regard.tasks import Task

TRAINING = {"steps": 1400, "batch_size": 16, "learning_rate": 3e-3, "items": 512}
SEGMENT = 24


def plan(memory: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the plan of four layers with a memory of this length."""
    return [("transformer_xl", {"segment": SEGMENT, "memory": memory, "short_convolution": 4})] * 4


def make(task: Task, setting: Setting) -> LanguageModel:
    """Return a model of these layers, or of softmax if the setting has no memory."""
    layers = [("softmax", {"short_convolution": 4})] * 4 if "memory" not in setting else plan(setting["memory"])
    return language_model(task, layers, dim=64, num_heads=4)


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure recall accuracy, also with a memory three times as long; with ``seconds``, the speedup in evaluation."""
    if "seconds" in setting:
        return {"speedup": time_evaluation(setting)}
    task = cached_task("recall", length=96, pairs=8, queries=16, vocab_size=64, evaluation_items=setting["items"])
    model = make(task, setting)
    found: dict[str, Any] = trained_score(model, task, setting, seed)
    if setting.get("memory"):
        longer = language_model(task, plan(3 * SEGMENT), dim=64, num_heads=4)
        longer.load_state_dict(model.state_dict())
        found["longer"] = score(longer, task)["score"]
    return found


@torch.no_grad()
def time_evaluation(setting: Setting) -> dict[str, float]:
    """Measure how many times as long reading a whole window takes as one step from a state."""
    task, window = cached_task("recall", evaluation_items=1), setting["window"]
    options = {"segment": window, "memory": window}
    model = language_model(task, [("transformer_xl", options)] * 4, dim=64, num_heads=4).eval()
    ids = torch.randint(task.vocab_size or 1, (1, 2 * window))
    state = model(ids, context=Context(want=frozenset({"state"}))).state
    step = partial(model, ids[:, :1], state=state)
    return timed_ratio(partial(model, ids[:, :window]), step, seconds=setting["seconds"])


REPRODUCTION = Reproduction(
    name="transformer_xl",
    mechanisms=("transformer_xl",),
    claim=(
        "A memory of earlier segments lets a model learn dependencies far longer than a segment, also with a longer memory "
        "than it was trained with, and evaluates over a thousand times faster (abstract; section 3.3)."
    ),
    instead=(
        "Recall across segments of 24 in 96 tokens, 4 layers of width 64: a memory of 24 against none, and against a memory "
        "of 72 at evaluation. Time of a step from the state against reading a window of 128 again, on one core."
    ),
    settings={
        "memory": TRAINING | {"memory": SEGMENT},
        "none": TRAINING | {"memory": 0},
        "full": TRAINING,
        "time": {"window": 128, "seconds": 10.0},
    },
    run_cell=run_cell,
    checks=(
        Check("a memory above none by 0.3", minus("memory", "none"), above=0.3),
        Check(
            "an untrained longer memory within 5 points",
            within("memory", "longer", "score"),
            above=-0.05,
        ),
        Check("a step from the state over ten times as fast", measured("time", "speedup"), above=10.0),
    ),
    needs=(Check("attention to all tokens solves the task (above 0.9)", measured("full", "score"), above=0.9),),
    left_out=(
        "perplexity on five corpora: recall stands for dependencies beyond a segment",
        "dependencies 80 % longer than recurrent networks' and 450 % longer than Transformers': a measure of trained models of equal loss",
        "1,800 times as fast: at an attention of 3,800 tokens; here 128",
    ),
    timings=frozenset({"time"}),
    smoke={"steps": 2, "batch_size": 2, "items": 8, "window": 8, "seconds": 0.01},
    seconds=70,
)
