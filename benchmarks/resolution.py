"""Positions in images larger than in training: Fashion-MNIST trained at 28 pixels, then tested at 42 and 56.

    python benchmarks/resolution.py                            # three seeds of each; the same command continues where it stopped
    python benchmarks/resolution.py --positions seqpe,rotary --seeds 1
    python benchmarks/resolution.py --steps 200 --items 500    # shorter; kept apart from other lengths

An encoder of 3 layers of softmax attention of width 64 reads patches of 2 x 2 pixels: 14 x 14 of them in training, 21 x 21 and
28 x 28 in tests, of the same images resized. Positions: sequential encodings (SeqPE, arXiv 2506.13277) of two axes that
multiply queries and keys, in larger images also interpolated (rows and columns are scaled into those of training, and the
vectors between two places are mixed); the same without their losses; learned vectors of places, untrained beyond 14 x 14, and
also stretched from 14 x 14 to the larger grid (bicubic, as vision transformers do); sinusoids; rotary positions, also of two
axes, as SeqPE's authors compare with. One-axis schemes number a patch by 28 row + column, so that neighbours are equally far
apart at every size. `none` is the control.

A cell is a kind of positions and a seed. Its training continues from a checkpoint in `--work`, and its scores are written to
docs/data/resolution.json, from which `python docs/generate.py` makes the page. A cell of an earlier version that lacks a score
is trained again; all others stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from regard.contract import Unsupported, closest
from regard.core.files import write_atomically
from regard.measurement import provenance
from regard.reproductions.framework.training import classifier, score
from regard.reproductions.seqpe import NumberedByPlace
from regard.tasks.images import ImagesTask
from regard.training import TrainConfig, train

TABLE = Path(__file__).parent.parent / "docs" / "data" / "resolution.json"
SIDES, PATCH = (28, 42, 56), 2
GRIDS = tuple(side // PATCH for side in SIDES)
PLACES = GRIDS[-1]
"""Step between the numbers of one row of patches and the next."""
ENCODER = {"encoder_dim": 32, "pivots": 16, "candidates": 16, "offsets": 16, "axes": 2, "projection": "layers"}
POSITIONS: dict[str, dict[str, Any]] = {
    "seqpe": {"positions": "seqpe_mul", "max_length": 10_000, "position_options": ENCODER},
    "seqpe without losses": {
        "positions": "seqpe_mul",
        "max_length": 10_000,
        "position_options": ENCODER | {"pivots": 0, "offsets": 0},
    },
    "learned": {"positions": "learned", "max_length": PLACES**2},
    "sinusoidal": {"positions": "sinusoidal"},
    "rotary": {"positions": "rotary"},
    "rotary of two axes": {"positions": "rotary", "position_options": {"axes": 2}},
    "none": {"positions": "none"},
}
BATCH, RATE = 32, 3e-3


def tasks_of(data: str, items: int) -> list[ImagesTask]:
    """The task at each image side, always normalised as in training."""
    made = [ImagesTask(data=data, size=side, patch=PATCH, evaluation_items=items) for side in SIDES]
    for task in made[1:]:
        task.reader = replace(task.reader, mean=made[0].reader.mean, deviation=made[0].reader.deviation)
    return made


def model_of(task: ImagesTask, positions: str) -> nn.Module:
    options = POSITIONS[positions]
    encoder = classifier(task, ["softmax"] * 3, dim=64, num_heads=4, **options)
    return encoder if "axes" in options.get("position_options", {}) else NumberedByPlace(encoder, PLACES)


@torch.no_grad()
def stretched(model: nn.Module, grid: int) -> nn.Module:
    """A copy whose learned vectors for a larger grid are interpolated from those of the trained grid."""
    model = copy.deepcopy(model)
    table = model.encoder.positions.table.view(PLACES, PLACES, -1)  # type: ignore[union-attr]
    trained = table[: GRIDS[0], : GRIDS[0]].permute(2, 0, 1)[None].clone()
    table[:grid, :grid] = F.interpolate(trained, (grid, grid), mode="bicubic")[0].permute(1, 2, 0)
    return model


def interpolated(model: nn.Module, grid: int) -> nn.Module:
    """A copy for which the rows and columns of a larger grid are places between the first and last of the trained grid."""
    model = copy.deepcopy(model)
    model.positions.interpolation = (grid - 1) / (GRIDS[0] - 1)
    return model


Change = Callable[[nn.Module, int], nn.Module]

LARGER: dict[str, tuple[str, Change]] = {"learned": ("stretched", stretched), "seqpe": ("interpolated", interpolated)}
"""What is also tried on larger images: its name, and what makes a trained model one for a grid of so many rows."""


def readings(positions: str) -> dict[str, tuple[int, Change | None]]:
    """Each score of a cell, by name: the number of its image side, and how the model is changed for it, if at all."""
    found: dict[str, tuple[int, Change | None]] = {f"{side}": (number, None) for number, side in enumerate(SIDES)}
    if positions in LARGER:
        how, change = LARGER[positions]
        found |= {f"{side} {how}": (number, change) for number, side in enumerate(SIDES) if number}
    return found


def run_cell(tasks: list[ImagesTask], positions: str, seed: int, steps: int, work: Path) -> dict[str, float]:
    """Accuracy at each image side, also of the model changed for it as :func:`readings` says; nan if training
    diverged."""
    torch.manual_seed(seed)
    model = model_of(tasks[0], positions)
    config = TrainConfig(steps, BATCH, RATE, seed=seed, checkpoint_every=50, measure_memory=False)
    told = time.monotonic()

    def tell(point: Any) -> None:
        nonlocal told
        if time.monotonic() - told > 10 or point.step + 1 == steps:
            told = time.monotonic()
            print(f"{positions}, seed {seed}: step {point.step + 1} of {steps}, loss {point.loss:.3f}", flush=True)

    path = work / f"{positions.replace(' ', '-')}-{seed}-{steps}.safetensors"
    sound = not train(model, tasks[0], config, checkpoint=path, on_step=tell).diverged
    found = {}
    for name, (number, change) in readings(positions).items():
        changed = model if change is None else change(model, GRIDS[number])
        found[name] = score(changed, tasks[number])["score"] if sound else math.nan
    path.unlink(missing_ok=True)
    return found


def read() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.is_file() else {"cells": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", default=",".join(POSITIONS), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--items", type=int, default=2000, help="test images that are scored")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--work", type=Path, default=Path("runs/resolution"), help="folder of checkpoints")
    arguments = parser.parse_args()
    names = [name for name in arguments.positions.split(",") if name]
    for name in names:
        if name not in POSITIONS:
            raise Unsupported(f"positions {name!r}", supported=", ".join(POSITIONS), nearest=closest(name, POSITIONS))
    tasks = tasks_of(arguments.data, arguments.items)
    for seed in range(arguments.seeds):
        for name in names:
            key = {"positions": name, "seed": seed, "steps": arguments.steps, "items": arguments.items}
            cell = next((cell for cell in read()["cells"] if key.items() <= cell.items()), None)
            if cell is None or not readings(name).keys() <= cell["accuracy"].keys():
                accuracy = run_cell(tasks, name, seed, arguments.steps, arguments.work)
                sound = {side: None if math.isnan(x) else x for side, x in accuracy.items()}
                cell = {**key, "accuracy": sound, "cpu": provenance.fingerprint()["cpu"], "date": provenance.now()[:10]}
                others = [one for one in read()["cells"] if not key.items() <= one.items()]
                text = json.dumps({"cells": [*others, cell]}, indent=1) + "\n"
                write_atomically(TABLE, lambda path, text=text: path.write_text(text))
            print(f"{name}, seed {seed}: {cell['accuracy']}", flush=True)


if __name__ == "__main__":
    main()
