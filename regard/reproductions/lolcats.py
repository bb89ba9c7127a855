"""LoLCATs (Zhang et al., arXiv 2410.10254): linear attention copies softmax better with a softmax window added.

The paper: feature maps are trained to reproduce the outputs of a model's softmax attention (attention transfer); with a
sliding softmax window in addition to the linear part, the error is several times smaller, and perplexity after training
is lower (section 4.2, table 2).

Here: four heads of width 16 whose queries, keys and values are linear maps of tokens that resemble their neighbours;
scores have a standard deviation of 2, so weights are far from uniform. Maps are trained for 150 steps on fresh
sequences of 96 tokens; the squared error on other sequences is measured relative to the square of softmax's output.
"""

from typing import Any

import torch
from torch import Tensor

from regard.contract import Paper
from regard.functional import lolcats_attention, softmax_attention
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting

HEADS, WIDTH, TOKENS = 4, 16, 96
SHARPNESS = 2.0
"""Standard deviation of scores."""
TRAINING = {"steps": 150, "batch_size": 8, "learning_rate": 0.02, "items": 32}


def heads_of(count: int, maps: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Draw queries, keys and values (count, H, N, D) for tokens of an autoregression with coefficient 0.5."""
    noise = torch.randn(count, TOKENS, HEADS * WIDTH, generator=generator)
    x = [noise[:, 0]]
    for t in range(1, TOKENS):
        x.append(0.5 * x[-1] + 0.75**0.5 * noise[:, t])
    tokens = torch.stack(x, 1)
    return [(tokens @ each).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for each in maps]


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure the share of softmax's output that the copy misses, with trained or untrained maps."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, HEADS * WIDTH, HEADS * WIDTH, generator=generator) * (HEADS * WIDTH) ** -0.5
    maps[:2] *= SHARPNESS**0.5
    q_map, k_map = (torch.eye(WIDTH).repeat(HEADS, 1, 1) for _ in range(2))

    def share(count: int) -> Tensor:
        q, k, v = heads_of(count, maps, generator)
        wanted = softmax_attention(q, k, v, pattern="causal-self")
        found = lolcats_attention(q, k, v, q_map=q_map, k_map=k_map, window=setting["window"])
        return (found - wanted).square().mean() / wanted.square().mean()

    if setting["learn"]:
        optimizer = torch.optim.Adam([q_map.requires_grad_(), k_map.requires_grad_()], setting["learning_rate"])
        for _ in range(setting["steps"]):
            optimizer.zero_grad()
            share(setting["batch_size"]).backward()
            optimizer.step()
    with torch.no_grad():
        return {"share": share(setting["items"]).item()}


REPRODUCTION = Reproduction(
    name="lolcats",
    mechanisms=("lolcats",),
    source=Paper("LoLCATs: On Low-Rank Linearizing of Large Language Models", "2410.10254", 2024),
    claim="Learned feature maps copy softmax attention, and do so better with a softmax window beside them.",
    instead=(
        "Heads of drawn projections: the error of linear attention with learned maps alone, with a window of 16, and of the "
        "window with maps that are not trained."
    ),
    settings={
        "maps and window": TRAINING | {"window": 16, "learn": True},
        "maps alone": TRAINING | {"window": 0, "learn": True},
        "window, maps not trained": TRAINING | {"window": 16, "learn": False},
        "maps alone, not trained": TRAINING | {"window": 0, "learn": False},
    },
    run_cell=run_cell,
    needs=(Check("learned maps alone leave less than half", measured("maps alone", "share"), below=0.5),),
    checks=(
        Check(
            "training lowers the error of maps alone",
            minus("maps alone, not trained", "maps alone", "share"),
            above=0.0,
        ),
        Check("a window lowers it further", minus("maps alone", "maps and window", "share"), above=0.0),
        Check(
            "beside a window training lowers it too",
            minus("window, maps not trained", "maps and window", "share"),
            above=0.0,
        ),
    ),
    left_out=("perplexity of language models after training: regard retrofit measures it on a model of the user's",),
    smoke={"steps": 2, "batch_size": 2, "items": 2},
    seeds=5,
    seconds=20,
)
