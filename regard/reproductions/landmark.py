"""Landmark attention (Mohtashami and Jaggi, arXiv 2305.16300): a context far beyond that of training, block by block.

The paper (abstract): LLaMA-7B, fine-tuned, uses contexts of up to 32k tokens, far beyond those it was trained on; on long
documents the perplexity is that of Transformer-XL with far fewer retrieved tokens a step.

Here: facts (a key, then its value) among random filler, and questions (a key) in the last 8 tokens; 4 facts and 4
questions. Trained at 128 tokens with blocks of 15, 2 layers of width 64, 1400 steps; then read in chunks of 64 tokens at up
to 1024 tokens, each token retrieving 2 blocks. Beside it softmax, trained alike and given the last 128 tokens: since facts
lie anywhere, 12 % of them are there at 1024 tokens, and it can reach 0.23 by knowing these and guessing the others.

A first protocol wrote a fact as one token. The first layer could then look facts up, and there all landmarks have the same
key but for its position, so blocks cannot be told apart: they had equal shares. At 128 tokens without retrieval the model
answered 0.97, no less with landmark keys averaged over items, and the block of a fact was among the two best in 22 to 30 %
of the cases (by chance 25 %); with retrieval 0.75 at 128 and 0.28 at 512, chance being 0.125. With two tokens the value has
to learn its key first, so the lookup is the second layer's, where landmarks have read their blocks (averaged, their keys
give 0.79 instead of 1.00). This was chosen on one run each at 128 tokens without retrieval, landmark 1.00 and softmax 0.41,
before anything longer was read. Softmax does not learn it in these steps (at most 0.42 at
128 tokens, three seeds); above the 0.23 that it could reach at 1024, landmark is by 0.58 to 0.77.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from regard import Context, Pattern
from regard.models import LanguageModel
from regard.reproductions.framework.judging import Check, Seed, number
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import fit, language_model
from regard.tasks.generated import GeneratedTask
from regard.tasks.protocol import IGNORED

if TYPE_CHECKING:
    from jaxtyping import Int

KEYS, VALUES, FILLER, FACTS, ENDING = 8, 8, 16, 4, 8
WINDOW, BLOCK, RETRIEVED, CHUNK = 128, 15, 2, 64
LENGTHS = (128, 256, 512, 1024)
TRAINING = {"steps": 1400, "batch_size": 16, "learning_rate": 3e-3, "items": 64, "lengths": LENGTHS}


class Lookup(GeneratedTask):
    """Tokens: values, then keys, then filler. The tokens of a fact have an even place and the one after it."""

    name, pattern, objective = "lookup", Pattern.CAUSAL_SELF, "next-token"
    vocab_size = VALUES + KEYS + FILLER

    def __init__(self, length: int, evaluation_items: int) -> None:
        super().__init__(seed=0, evaluation_items=evaluation_items)
        self.length = length

    def draw(self, rng: np.random.Generator, count: int) -> "tuple[Int[np.ndarray, 'b n'], Int[np.ndarray, 'b n']]":
        rows = np.arange(count)[:, None]
        keys = rng.permuted(np.tile(np.arange(KEYS), (count, 1)), axis=1)[:, :FACTS]
        values = rng.integers(0, VALUES, (count, FACTS))
        inputs = rng.integers(self.vocab_size - FILLER, self.vocab_size, (count, self.length))
        targets = np.full((count, self.length), IGNORED)
        body, ending = np.arange(0, self.length - ENDING, 2), np.arange(self.length - ENDING, self.length)
        facts, questions = (rng.permuted(np.tile(x, (count, 1)), axis=1)[:, :FACTS] for x in (body, ending))
        inputs[rows, facts], inputs[rows, facts + 1] = VALUES + keys, values
        inputs[rows, questions] = VALUES + keys
        targets[rows, questions] = values
        return inputs, targets

    def describe(self) -> str:
        return f"lookup: {FACTS} facts among filler, then {FACTS} questions, in {self.length} tokens"


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    landmark = setting["mixer"] == "landmark"
    task = Lookup(WINDOW, setting["items"])
    model = build(task, landmark, None)
    sound = fit(model, task, setting, seed)
    found = {"accuracy as trained": accuracy(model, task, chunked=False) if sound else math.nan}
    if landmark:
        trained, model = model, build(task, landmark, RETRIEVED)
        model.load_state_dict(trained.state_dict())
    for length in setting["lengths"]:
        longer = Lookup(length, setting["items"])
        found[f"accuracy at {length}"] = accuracy(model, longer, chunked=landmark) if sound else math.nan
    return found


def build(task: Lookup, landmark: bool, top_k: int | None) -> LanguageModel:
    entry = ("landmark", {"block": BLOCK, "top_k": top_k}) if landmark else ("softmax", {})
    return language_model(task, [entry] * 2, dim=64, num_heads=4)


@torch.no_grad()
def accuracy(model: LanguageModel, task: Lookup, *, chunked: bool) -> float:
    """Share of right answers, reading in chunks with retrieval, or the last window only."""
    right, asked = 0.0, 0.0
    for batch in task.evaluation_batches(32):
        if chunked:
            state, outputs = None, list[torch.Tensor]()
            for ids in batch.inputs.split(CHUNK, 1):
                result = model(ids, context=Context(want=frozenset({"state"})), state=state)
                state, outputs = result.state, [*outputs, result.output]
            logits = torch.cat(outputs, 1)[:, -ENDING:]
        else:
            logits = model(batch.inputs[:, -WINDOW:]).output[:, -ENDING:]
        targets = batch.targets[:, -ENDING:]
        right += float((logits.argmax(-1) == targets).sum())
        asked += float((targets != IGNORED).sum())
    return right / asked


def drop(seed: Seed) -> float:
    return number(seed, "landmark", "accuracy at 1024") - number(seed, "landmark", "accuracy at 128")


def gain(seed: Seed) -> float:
    return number(seed, "landmark", "accuracy at 1024") - number(seed, "softmax", "accuracy at 1024")


REPRODUCTION = Reproduction(
    name="landmark",
    mechanisms=("landmark",),
    claim="A model uses contexts far beyond those of its training (LLaMA-7B: 32k tokens) by retrieving blocks (abstract).",
    instead=(
        "Accuracy of looking up facts (a key, a value), trained at 128 tokens, read at 1024 with 2 retrieved blocks of 15 a "
        "token; softmax with the last 128 tokens. 2 layers of width 64, 1400 steps."
    ),
    settings={mixer: TRAINING | {"mixer": mixer} for mixer in ("landmark", "softmax")},
    run_cell=run_cell,
    checks=(
        Check("accuracy at 128 above 0.9", lambda seed: number(seed, "landmark", "accuracy at 128"), above=0.9),
        Check("accuracy at 1024 at most 10 points below that at 128", drop, above=-0.1),
        Check("at 1024 above softmax with a window by 0.3", gain, above=0.3),
    ),
    smoke={"steps": 2, "batch_size": 2, "items": 4, "lengths": (128, 1024)},
    seconds=60,
    protocol=2,
)
