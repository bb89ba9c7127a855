"""Sequential position encoding (Li et al., arXiv 2506.13277): positions read as digits reach beyond the training length.

The paper (abstract): in language modelling, question answering and image classification it surpasses strong baselines of
position encoding, "particularly under context length extrapolation".

Here: bytes of source code, 2 layers of softmax attention of width 64, trained on windows of 64 bytes, 1200 steps; the loss
of the same last 32 bytes is then read with 64, 128, 256 and 512 bytes of context. Positions: sequential ones in the scores
(P_max 1000, an encoder of width 32, 16 pivots of 16 candidates, 16 offsets), these without both losses, a learned table of
512 rows (those beyond 64 are never trained), sinusoids added to the input, and rotary. Beside it, what contrast alone does
with positions below 1000 in 1000 steps: the rank correlation of the products of vectors with nearness, in windows of 50.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Paper
from regard.positions import Seqpe
from regard.reproductions.framework.judging import Check, Seed, measured, minus, number
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import cached_task, fit, language_model

TRAINED, READ, PREDICTED = 64, (64, 128, 256, 512), 32
TRAINING = {"steps": 1200, "batch_size": 16, "learning_rate": 3e-3, "items": 128}
ENCODER = {"encoder_dim": 32, "pivots": 16, "candidates": 16, "offsets": 16}
POSITIONS: dict[str, dict[str, Any]] = {
    "seqpe": {"positions": "seqpe_scalar", "max_length": 1000, "position_options": ENCODER},
    "seqpe without losses": {
        "positions": "seqpe_scalar",
        "max_length": 1000,
        "position_options": ENCODER | {"pivots": 0, "offsets": 0},
    },
    "learned": {"positions": "learned", "max_length": max(READ)},
    "sinusoidal": {"positions": "sinusoidal"},
    "rotary": {"positions": "rotary"},
}


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    if setting["positions"] is None:
        return {"correlation": order_of_positions(setting, seed)}
    task = cached_task("text", length=TRAINED, evaluation_items=1)
    options = POSITIONS[setting["positions"]]
    model = language_model(task, ["softmax"] * 2, dim=64, num_heads=2, **options)
    sound = fit(model, task, setting, seed)
    found = {f"loss at {n}": read(model, n, setting["items"]) if sound else math.nan for n in READ}
    return {**found, "growth": found[f"loss at {READ[-1]}"] - found[f"loss at {TRAINED}"]}


@torch.no_grad()
def read(model: nn.Module, context: int, items: int) -> float:
    """Mean loss of the last bytes of held-out windows, with so many bytes of each."""
    task = cached_task("text", length=max(READ), evaluation_items=items)
    losses = []
    for batch in task.evaluation_batches(16):
        logits = model.eval()(batch.inputs[:, -context:]).output[:, -PREDICTED:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch.targets[:, -PREDICTED:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())


def order_of_positions(setting: Setting, seed: int) -> float:
    """Mean over windows of 50 positions: Spearman's correlation of E(i) . E(j) and -|i - j|, after contrast alone."""
    options: dict[str, Any] = {
        "encoder_dim": 32,
        "pivots": 32,
        "candidates": 16,
        "offsets": 0,
        "dropout": 0.0,
        "max_length": 1000,
    }
    scheme = Seqpe(dim=32, heads=1, **options)
    optimizer = torch.optim.Adam(scheme.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=setting["steps"])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(setting["steps"]):
        total, count = scheme.regularize((50,), generator)["position_contrast"]
        optimizer.zero_grad()
        (total / count).backward()
        nn.utils.clip_grad_norm_(scheme.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    i, j = torch.triu_indices(50, 50, 1)
    found = []
    with torch.no_grad():
        for first in range(0, 1000, 50):
            e = scheme.vectors(torch.arange(first, first + 50))
            pairs = torch.stack([ranks((e @ e.mT)[i, j]), ranks(i - j)])
            found.append(float(torch.corrcoef(pairs)[0, 1]))
    return sum(found) / len(found)


def ranks(x: Tensor) -> Tensor:
    """Ranks, equal numbers at their mean."""
    _, group, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0).double() - (count - 1) / 2)[group]


def less_growth(of: str, than: str) -> Any:
    """How much less the loss of one grows with the context than that of another."""
    return minus(than, of, "growth")


def cost_at_the_training_length(seed: Seed) -> float:
    """Loss over that of rotary positions."""
    name = f"loss at {TRAINED}"
    return number(seed, "seqpe", name) / number(seed, "rotary", name)


REPRODUCTION = Reproduction(
    name="seqpe",
    mechanisms=("softmax",),
    source=Paper("SeqPE: Transformer with Sequential Position Encoding", "2506.13277", 2025, 15),
    claim="Positions read as digits extrapolate to contexts longer than those of training better than strong baselines.",
    instead=(
        "Bytes of source code, 2 layers of width 64, trained at 64 bytes and read at up to 512: growth of the loss of the "
        "same bytes beside learned, sinusoidal and rotary positions, and without the two losses."
    ),
    settings={
        **{name: TRAINING | {"positions": name} for name in POSITIONS},
        "order": {"positions": None, "steps": 1000},
    },
    run_cell=run_cell,
    checks=(
        Check("at 64 within 3 % of rotary", cost_at_the_training_length, below=1.03),
        Check("grows less than learned", less_growth("seqpe", "learned"), above=0.0),
        Check("grows less than sinusoidal", less_growth("seqpe", "sinusoidal"), above=0.0),
        Check("grows less than rotary", less_growth("seqpe", "rotary"), above=0.0),
        Check("grows less than without its losses", less_growth("seqpe", "seqpe without losses"), above=0.0),
        Check("contrast alone puts positions in order", measured("order", "correlation"), above=0.9),
    ),
    smoke={"steps": 10, "batch_size": 2, "items": 4},
    seconds=60,
)
