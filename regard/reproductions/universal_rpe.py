"""URPE (Luo et al., arXiv 2205.13401): relative positions inside the softmax cannot identify a token's position.

The paper: transformers with relative positions as biases are not universal approximators at any depth or width; with a
learned Toeplitz factor after the softmax they are. On synthetic tasks the biases fail and the factors succeed
(abstract).

Here: position identification (the class of token i is i) with 16 random tokens of a vocabulary of 100, in an encoder of
3 layers of width 64 with a norm after each residual, as in the paper's experiments (there 128 tokens, width 768 and
40,000 steps). The models have B alone, B and C (a table for each layer), neither, or neither but a learned position
added to each token, which shows that such an encoder can learn the task. Chance is 1/16.

With 32 tokens and 700 steps, two of three seeds of the model with factors were still learning (0.63 and 0.66). In the
pilot with 16 tokens, both seeds had 1.00 with factors and with added positions, so three seeds are enough.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.create import create_layer
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting

TRAINING = {"steps": 500, "batch_size": 32, "learning_rate": 2e-3, "length": 16, "vocabulary": 100, "items": 512}


class PostNormEncoder(nn.Module):
    """Encoder of blocks x = norm(x + attention(x)), x = norm(x + feed_forward(x)), with a class for each token."""

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        options: dict,
        absolute: bool,
        dim: int = 64,
        heads: int = 4,
        layers: int = 3,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight)
        self.positions = nn.Parameter(torch.randn(classes, dim)) if absolute else 0.0
        self.mixers = nn.ModuleList(
            create_layer("universal_rpe", dim, heads, pattern="noncausal-self", **options) for _ in range(layers)
        )
        self.forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * layers))
        self.head = nn.Linear(dim, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x, norms = self.embedding(ids) + self.positions, iter(self.norms)
        for mixer, feed_forward in zip(self.mixers, self.forwards, strict=True):
            x = next(norms)(x + mixer(x).output)
            x = next(norms)(x + feed_forward(x))
        return self.head(x)


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    """Measure the share of tokens whose position is identified, and the last loss."""
    torch.manual_seed(seed)
    length, vocabulary = setting["length"], setting["vocabulary"]
    model = PostNormEncoder(vocabulary, length, setting["options"], setting["absolute"])
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
        "Telling each of 16 random tokens its position: accuracy of an encoder of 3 layers of width 64 after 500 steps, "
        "with biases, with biases and factors, with neither, and with positions added to the tokens. Chance is 0.0625."
    ),
    settings={
        "urpe": TRAINING | {"options": {}, "absolute": False},
        "rpe": TRAINING | {"options": {"factors": "none"}, "absolute": False},
        "none": TRAINING | {"options": {"factors": "none", "positions": "none"}, "absolute": False},
        "absolute": TRAINING | {"options": {"factors": "none", "positions": "none"}, "absolute": True},
    },
    run_cell=run_cell,
    needs=(Check("added positions are told (accuracy above 0.95)", measured("absolute", "score"), above=0.95),),
    checks=(
        Check("with factors accuracy above 0.9", measured("urpe", "score"), above=0.9),
        Check("with biases alone accuracy below 0.1", measured("rpe", "score"), below=0.1),
        Check("without positions accuracy below 0.1", measured("none", "score"), below=0.1),
        Check("factors gain 0.5 over biases", minus("urpe", "rpe"), above=0.5),
    ),
    left_out=(
        "universality itself: a theorem, of which one function that biases cannot represent is tried",
        "even tokens predicted, the paper's second task: it takes thousands of steps",
        "language modelling and graphs: gains of a few percent at sizes that are out of reach",
    ),
    smoke={"steps": 2, "batch_size": 2, "length": 8, "items": 4},
    seeds=3,
    seconds=10,
    protocol=2,
)
