"""URPE (Luo et al., arXiv 2205.13401): relative positions inside the softmax cannot tell a token its position.

The paper: transformers with relative positions as biases are no universal approximators, at any depth or width, and with
a learned Toeplitz factor after the softmax they are; on synthetic tasks the biases fail and the factors succeed (abstract).

Here: position identification, the class of token i is i, with 32 random tokens of 100, in an encoder of 3 layers of width
64 with a norm after each residual, as in the paper's experiments (there 128 tokens, width 768 and 40,000 steps). Models
with B alone, with B and C (a table for each layer), and with neither. Chance is 1/32. The paper's second task, predicting
even tokens, needs thousands of steps and is not tried.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.create import create_layer
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting

TRAINING = {"steps": 700, "batch_size": 64, "learning_rate": 1e-3, "length": 32, "vocabulary": 100, "items": 256}


class PostNormEncoder(nn.Module):
    """Blocks x = norm(x + attention(x)), x = norm(x + feed_forward(x)) over token embeddings, and a class for each token."""

    def __init__(self, vocabulary: int, classes: int, options: dict, dim: int = 64, heads: int = 4, layers: int = 3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight)
        self.mixers = nn.ModuleList(
            create_layer("universal_rpe", dim, heads, pattern="noncausal-self", **options) for _ in range(layers)
        )
        self.forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * layers))
        self.head = nn.Linear(dim, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x, norms = self.embedding(ids), iter(self.norms)
        for mixer, feed_forward in zip(self.mixers, self.forwards, strict=True):
            x = next(norms)(x + mixer(x).output)
            x = next(norms)(x + feed_forward(x))
        return self.head(x)


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    length, vocabulary = setting["length"], setting["vocabulary"]
    model = PostNormEncoder(vocabulary, length, setting["options"])
    optimizer = torch.optim.Adam(model.parameters(), lr=setting["learning_rate"])
    rng = torch.Generator().manual_seed(1000 + seed)
    for _ in range(setting["steps"]):
        ids = torch.randint(vocabulary, (setting["batch_size"], length), generator=rng)
        logits = model(ids)
        targets = torch.arange(length).expand(len(ids), -1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        held_out = torch.randint(vocabulary, (setting["items"], length), generator=rng)
        right = model(held_out).argmax(-1) == torch.arange(length)
    return {"score": float(right.double().mean()), "loss": float(loss.detach())}


REPRODUCTION = Reproduction(
    name="universal_rpe",
    mechanisms=("universal_rpe",),
    claim=(
        "No transformer whose relative positions are biases of the softmax can represent every function of a sequence; a "
        "learned Toeplitz factor after the softmax makes it universal (abstract and theorems)."
    ),
    instead=(
        "Telling each of 32 random tokens its position: accuracy of an encoder of 3 layers of width 64 after 700 steps, "
        "with biases, with biases and factors, and with neither. Chance is 0.031."
    ),
    settings={
        "urpe": TRAINING | {"options": {}},
        "rpe": TRAINING | {"options": {"factors": "none"}},
        "none": TRAINING | {"options": {"factors": "none", "positions": "none"}},
    },
    run_cell=run_cell,
    checks=(
        Check("with factors accuracy above 0.9", measured("urpe", "score"), above=0.9),
        Check("with biases alone accuracy below 0.1", measured("rpe", "score"), below=0.1),
        Check("without positions accuracy below 0.1", measured("none", "score"), below=0.1),
        Check("factors gain 0.5 over biases", minus("urpe", "rpe"), above=0.5),
    ),
    smoke={"steps": 2, "batch_size": 2, "length": 8, "items": 4},
    seconds=80,
)
