"""LAMA (Mehta et al., arXiv 1912.00835): many heads of pooling for almost no parameters.

The paper (abstract): matches or beats strong baselines on sentiment, ratings and topics, with fewer parameters than
multi-head self-attention, and is more effective than a single head.

Here: keyword aspects, a synthetic task: among 64 tokens of noise stand one keyword of each of two
groups of four, and the class is the sum of their numbers modulo 4, so that both must be found. A bidirectional GRU with 32
units a direction, then a pool and a linear classifier; 1000 steps. Pools: mean, max, one head of additive attention,
structured self-attention (SAN, 8 heads, arXiv 1703.03130), LAMA with 8 heads and a learned or mean context, and a
Transformer layer with a mean. No text with labels comes with the machine, so none is classified.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from regard import Context, Pattern, create_layer
from regard.contract import Result
from regard.reproductions.framework.judging import Check, minus, over
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import trained_score
from regard.tasks import Task
from regard.tasks.generated import GeneratedTask

if TYPE_CHECKING:
    from jaxtyping import Int

TRAINING = {"steps": 1000, "batch_size": 32, "learning_rate": 3e-3, "items": 512}
CLASSES, NOISE, LENGTH, WIDTH, SLOTS = 4, 64, 64, 64, 8


class Keywords(GeneratedTask):
    """Tokens 0 to 3 and 4 to 7 are the two groups of keywords; the others are noise."""

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


class Additive(nn.Module):
    """softmax(W_2 tanh(W_1 H)) H: a head of additive attention, or several (SAN)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scores = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, heads, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).softmax(1).mT @ x


class Lama(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = create_layer("low_rank_pooling", WIDTH, SLOTS, pattern="noncausal-self", **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).output


class TransformerMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = create_layer("softmax", WIDTH, SLOTS, pattern="noncausal-self")

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.layer(x).output).mean(1, keepdim=True)


class Simple(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True) if self.how == "mean" else x.amax(1, keepdim=True)


POOLS = {
    "mean": lambda: Simple("mean"),
    "max": lambda: Simple("max"),
    "single head": lambda: Additive(1),
    "SAN": lambda: Additive(SLOTS),
    "LAMA": Lama,
    "LAMA, mean context": lambda: Lama(context="mean"),
    "Transformer layer": TransformerMean,
}


class Classifier(nn.Module):
    """Embedding, bidirectional GRU, pool, linear classifier."""

    def __init__(self, task: Task, pool: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.vocab_size or 0, WIDTH)
        self.encoder = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.pool = POOLS[pool]()
        with torch.no_grad():
            slots = self.pool(torch.zeros(1, LENGTH, WIDTH)).shape[1]
        self.head = nn.Linear(slots * WIDTH, task.num_classes or 0)

    def forward(self, ids: Tensor, *, context: Context) -> Result:
        states, _ = self.encoder(self.embedding(ids))
        return Result(self.head(self.pool(states).flatten(1)))


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
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
        "Accuracy of finding two keywords in 64 tokens behind a small bidirectional GRU, 1000 steps: LAMA with 8 heads against "
        "mean, max, a single head, SAN and a Transformer layer; parameters of the pools."
    ),
    settings={pool: TRAINING | {"pool": pool} for pool in POOLS},
    run_cell=run_cell,
    checks=(
        Check("LAMA above a single head", minus("LAMA", "single head"), above=0.0),
        Check("LAMA above the mean", minus("LAMA", "mean"), above=0.0),
        Check("LAMA within 1 point of SAN or better", minus("LAMA", "SAN"), above=-0.01),
        Check("LAMA within 1 point of a Transformer layer", minus("LAMA", "Transformer layer"), above=-0.01),
        Check("parameters below half of SAN's", over("LAMA", "SAN", "pool parameters"), below=0.5),
    ),
    smoke={"steps": 2, "batch_size": 2, "items": 8},
    seconds=20,
)
