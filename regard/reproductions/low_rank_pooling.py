"""LAMA (Mehta et al., arXiv 1912.00835): many pooling heads with almost no parameters.

The paper (abstract): matches or beats strong baselines on sentiment, ratings and topics, with fewer parameters than
multi-head self-attention, and is more effective than a single head.

Here: keyword aspects, a synthetic task: 16 tokens, of 32 kinds of noise, contain one keyword from each of two groups of
four; the class is the sum of the keywords' numbers modulo 4, so both must be found. The model is a bidirectional GRU
with 32 units per direction, a pool and a linear classifier. Pools: mean, one head of additive attention, structured
self-attention (SAN, 8 heads, arXiv 1703.03130), LAMA with 8 heads and a learned context, and a Transformer layer
followed by a mean. LAMA's weights are bounded: none is more than e^2 times another.

A first protocol with 64 tokens left every pool except the maximum at chance. In a pilot of two seeds with 1000 steps,
SAN had 1.0 with both seeds, the mean 0.3, and LAMA 0.99 and 0.71; a single head and a Transformer layer, with one seed,
had 1.0. So the pools differ in how soon they find the keywords, and LAMA is only expected to match a single head. Four
seeds left open whether LAMA is within 2 points of the others (it was 4 below), so ten are run; with 2,000 steps even
the mean solves the task.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from regard import Context, Pattern, create_layer
from regard.contract import Result
from regard.layers.pooling import make_pooling
from regard.reproductions.framework.judging import Check, measured, minus, over
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import trained_score
from regard.tasks import Task
from regard.tasks.generated import GeneratedTask

if TYPE_CHECKING:
    from jaxtyping import Int

TRAINING = {"steps": 1000, "batch_size": 32, "learning_rate": 3e-3, "items": 512}
CLASSES, NOISE, LENGTH, WIDTH, SLOTS = 4, 32, 16, 64, 8


class Keywords(GeneratedTask):
    """The task of keyword aspects. Tokens 0 to 3 and 4 to 7 are the two groups of keywords; the others are noise."""

    name, pattern, objective = "keywords", Pattern.NONCAUSAL_SELF, "classification"
    length, vocab_size, num_classes = LENGTH, 2 * CLASSES + NOISE, CLASSES
    chance = 1 / CLASSES

    def draw(self, rng: np.random.Generator, count: int) -> "tuple[Int[np.ndarray, 'b n'], Int[np.ndarray, ' b']]":
        inputs = rng.integers(2 * CLASSES, self.vocab_size, (count, LENGTH))
        keywords = rng.integers(0, CLASSES, (count, 2))
        places = rng.permuted(np.tile(np.arange(LENGTH), (count, 1)), axis=1)[:, :2]
        np.put_along_axis(inputs, places, keywords + np.array([0, CLASSES]), axis=1)
        return inputs, keywords.sum(1) % CLASSES

    def describe(self) -> str:
        return f"keywords: one of each of two groups of {CLASSES}, in {LENGTH} tokens"


class TransformerMean(nn.Module):
    """A residual layer of self-attention, then the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = create_layer("softmax", WIDTH, SLOTS, pattern="noncausal-self")

    def forward(self, x: Tensor) -> Result:
        return Result((x + self.layer(x).output).mean(1, keepdim=True))


def make_pool(name: str) -> nn.Module:
    """Create a pool from (B, N, WIDTH) to a result of (B, slots, WIDTH)."""
    if name == "Transformer layer":
        return TransformerMean()
    if name == "LAMA":
        return create_layer("low_rank_pooling", WIDTH, SLOTS, pattern="noncausal-self")
    return make_pooling(OTHERS[name], WIDTH, SLOTS)


OTHERS = {"mean": "mean", "single head": "additive", "SAN": "structured"}
POOLS = (*OTHERS, "LAMA", "Transformer layer")


class Classifier(nn.Module):
    """Embedding, bidirectional GRU, pool, linear classifier."""

    def __init__(self, task: Task, pool: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.vocab_size or 0, WIDTH)
        self.encoder = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.pool = make_pool(pool)
        with torch.no_grad():
            slots = self.pool(torch.zeros(1, LENGTH, WIDTH)).output.shape[1]
        self.head = nn.Linear(slots * WIDTH, task.num_classes or 0)

    def forward(self, ids: Tensor, *, context: Context) -> Result:
        states, _ = self.encoder(self.embedding(ids))
        return Result(self.head(self.pool(states).output.flatten(1)))


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    """Measure the accuracy of a classifier of keywords with the setting's pool, and the pool's parameters."""
    task = Keywords(seed=0, evaluation_items=setting["items"])
    model = Classifier(task, setting["pool"])
    found = trained_score(model, task, setting, seed)
    return {**found, "pool parameters": float(sum(p.numel() for p in model.pool.parameters()))}


REPRODUCTION = Reproduction(
    name="low_rank_pooling",
    mechanisms=("low_rank_pooling",),
    claim=(
        "Matches or beats strong baselines with fewer parameters than multi-head self-attention, and a single head (abstract; "
        "no figure)."
    ),
    instead=(
        "Accuracy of finding two keywords in 16 tokens behind a small bidirectional GRU: LAMA with 8 heads against a mean, a "
        "single head, SAN and a Transformer layer, matching meaning within 2 points; parameters of the pools."
    ),
    settings={pool: TRAINING | {"pool": pool} for pool in POOLS},
    run_cell=run_cell,
    needs=(
        Check("SAN gets above 0.9", measured("SAN", "score"), above=0.9),
        Check("the mean stays below 0.9", measured("mean", "score"), below=0.9),
    ),
    checks=(
        Check("LAMA above the mean", minus("LAMA", "mean"), above=0.0),
        Check("LAMA within 2 points of a single head or better", minus("LAMA", "single head"), above=-0.02),
        Check("LAMA within 2 points of SAN or better", minus("LAMA", "SAN"), above=-0.02),
        Check("LAMA within 2 points of a Transformer layer", minus("LAMA", "Transformer layer"), above=-0.02),
        Check("parameters below half of SAN's", over("LAMA", "SAN", "pool parameters"), below=0.5),
        Check(
            "parameters below a tenth of a Transformer layer's",
            over("LAMA", "Transformer layer", "pool parameters"),
            below=0.1,
        ),
    ),
    left_out=(
        "better than a single head: in the pilot one head solved this task, so that there is nothing above it",
        "accuracy on sentiment, ratings and topics: a planted task of which the answer is known stands for them",
        "faster than existing multi-head approaches: 16 tokens are too few for the time of a pool to tell",
    ),
    smoke={"steps": 2, "batch_size": 2, "items": 8},
    seeds=4,
    more_seeds=dict.fromkeys(("LAMA", "single head", "SAN", "Transformer layer"), 24),
    seconds=10,
    protocol=2,
)
