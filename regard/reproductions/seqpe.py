"""Sequential position encoding (Li et al., arXiv 2506.13277): positions read as digits exceed the training length.

The paper (abstract): in language modelling, question answering and image classification it surpasses strong
position-encoding baselines, "particularly under context length extrapolation".

Here: bytes of source code, 2 layers of softmax attention of width 64, trained on windows of 64 bytes, 1200 steps; the
loss of the same last 32 bytes is then measured with 64, 128, 256 and 512 bytes of context. The position schemes are
sequential positions in the scores (P_max 1000, an encoder of width 32, 16 pivots of 16 candidates, 16 offsets), the
same without both losses, a learned table of 512 rows (those beyond 64 are never trained), sinusoids added to the input,
and rotary. Also measured is the effect of the contrastive loss alone on positions below 1000 in 1000 steps: the rank
correlation of dot products with nearness, in windows of 50.

On grids: scikit-learn's digits, half of them held out, an encoder of 3 layers of width 64, trained on windows of 6 x 6
pixels at random places of the images for 600 steps; it then classifies the middle 6 x 6 pixels and the whole 8 x 8. The
same position encoder has two axes here, multiplies queries and keys (the paper's choice for images) and has a
projection for each layer. The other schemes have one axis and number the pixels of a window by 8 row + column, so that
neighbours are as far apart in the window as in the whole image; the learned table is one of places, whose last two rows
and columns are never trained. The authors also compare with two-axis rotary positions, which are not run here.
Softmax without positions is also run.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Context, Paper, Result
from regard.positions import Seqpe
from regard.reproductions.framework.judging import Check, Seed, measured, minus, number
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.training import (
    DIGIT_SIDE,
    Windows,
    cached_task,
    classifier,
    digit_pixels,
    fit,
    language_model,
    score,
)

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

GRID_TRAINING = {"steps": 600, "batch_size": 32, "learning_rate": 3e-3, "items": 1000, "window": 6}
GRID_ENCODER = ENCODER | {"axes": 2, "projection": "layers"}
GRID_POSITIONS: dict[str, dict[str, Any]] = {
    "grid seqpe": {"positions": "seqpe_mul", "max_length": 1000, "position_options": GRID_ENCODER},
    "grid seqpe without losses": {
        "positions": "seqpe_mul",
        "max_length": 1000,
        "position_options": GRID_ENCODER | {"pivots": 0, "offsets": 0},
    },
    "grid learned": {"positions": "learned", "max_length": DIGIT_SIDE**2},
    "grid sinusoidal": {"positions": "sinusoidal"},
    "grid rotary": {"positions": "rotary"},
    "grid none": {"positions": "none"},
}


def run_cell(setting: Setting, seed: int) -> dict[str, float]:
    """Measure the loss on text at each context length and its growth, scores on the grid, or how well positions are
    ordered."""
    torch.manual_seed(seed)
    if "window" in setting:
        return run_grid(setting, seed)
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
    """Return the mean loss of the last bytes of held-out windows, with `context` bytes of each."""
    task = cached_task("text", length=max(READ), evaluation_items=items)
    losses = []
    for batch in task.evaluation_batches(16):
        logits = model.eval()(batch.inputs[:, -context:]).output[:, -PREDICTED:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch.targets[:, -PREDICTED:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())


class NumberedByPlace(nn.Module):
    """An encoder for which the token in row i and column j of a grid of any size has the number side * i + j."""

    def __init__(self, encoder: nn.Module, side: int = DIGIT_SIDE) -> None:
        super().__init__()
        self.encoder, self.side = encoder, side

    def forward(self, inputs: Tensor, *, context: Context) -> Result:
        assert context.grid is not None
        rows, columns = context.grid
        places = (torch.arange(rows)[:, None] * self.side + torch.arange(columns)).flatten()
        return self.encoder(inputs, context=context.replace(positions=places.expand(inputs.shape[0], -1)))


def run_grid(setting: Setting, seed: int) -> dict[str, float]:
    """Measure scores on windows as in training and on whole digits."""
    images = digit_pixels(setting["items"])
    windows = Windows(images, setting["window"])
    options = GRID_POSITIONS[setting["positions"]]
    model: nn.Module = classifier(windows, ["softmax"] * 3, dim=64, num_heads=4, **options)
    if "axes" not in options.get("position_options", {}):
        model = NumberedByPlace(model)
    sound = fit(model, windows, setting, seed)
    found: dict[str, float] = {}
    for side, task in ((windows.side, windows), (DIGIT_SIDE, images)):
        scores = score(model, task) if sound else {"score": math.nan, "loss": math.nan}
        found |= {f"{name} at {side} x {side}": value for name, value in scores.items()}
    return found


def order_of_positions(setting: Setting, seed: int) -> float:
    """Return Spearman's correlation of E(i) . E(j) and -|i - j| in windows of 50, trained by contrast alone."""
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
    """Return ranks; equal numbers get the mean of theirs."""
    _, group, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0).double() - (count - 1) / 2)[group]


def less_growth(of: str, than: str) -> Any:
    """Return a check value: how much less one setting's loss grows with the context than another's."""
    return minus(than, of, "growth")


def more_right(than: str, at: int) -> Any:
    """Return a check value: accuracy of sequential positions minus another setting's, on `at` x `at` pixels."""
    return minus("grid seqpe", than, f"score at {at} x {at}")


def cost_at_the_training_length(seed: Seed) -> float:
    """Return the loss divided by that of rotary positions."""
    name = f"loss at {TRAINED}"
    return number(seed, "seqpe", name) / number(seed, "rotary", name)


REPRODUCTION = Reproduction(
    name="seqpe",
    mechanisms=("softmax",),
    source=Paper("SeqPE: Transformer with Sequential Position Encoding", "2506.13277", 2025, 15),
    claim=(
        "Positions read as digits extrapolate to contexts longer, and images larger, than those of training better than "
        "strong baselines."
    ),
    instead=(
        "Bytes of source code, 2 layers of width 64, trained at 64 bytes and read at up to 512: growth of the loss of the "
        "same bytes beside learned, sinusoidal and rotary positions, and without the two losses. Accuracy on digits of "
        "8 x 8 pixels after training on windows of 6 x 6, beside the same ones and no positions."
    ),
    settings={
        **{name: TRAINING | {"positions": name} for name in POSITIONS},
        "order": {"positions": None, "steps": 1000},
        **{name: GRID_TRAINING | {"positions": name} for name in GRID_POSITIONS},
    },
    run_cell=run_cell,
    checks=(
        Check("at 64 within 3 % of rotary", cost_at_the_training_length, below=1.03),
        Check("grows less than learned", less_growth("seqpe", "learned"), above=0.0),
        Check("grows less than sinusoidal", less_growth("seqpe", "sinusoidal"), above=0.0),
        Check("grows less than rotary", less_growth("seqpe", "rotary"), above=0.0),
        Check("grows less than without its losses", less_growth("seqpe", "seqpe without losses"), above=0.0),
        Check("contrast alone puts positions in order", measured("order", "correlation"), above=0.9),
        Check("on 6 x 6 pixels within 3 points of rotary", more_right("grid rotary", at=6), above=-0.03),
        Check("on 8 x 8 above learned", more_right("grid learned", at=8), above=0.0),
        Check("on 8 x 8 above sinusoidal", more_right("grid sinusoidal", at=8), above=0.0),
        Check("on 8 x 8 above rotary", more_right("grid rotary", at=8), above=0.0),
        Check("on 8 x 8 above without its losses", more_right("grid seqpe without losses", at=8), above=0.0),
    ),
    smoke={"steps": 4, "batch_size": 2, "items": 4},
    seconds=60,
)
