"""Fashion-MNIST from scratch: every image backbone in a small size, each trained for the same time, for the docs' table.

    pip install 'regard[vision]'
    export OMP_NUM_THREADS=1                                       # the threads of the times and the runs
    python benchmarks/fashion_mnist.py --timings                   # first, idle: speed and memory, all models in one process
    python benchmarks/fashion_mnist.py                             # 20 minutes each; the same command continues where it stopped
    python benchmarks/fashion_mnist.py --models van_nano,vit_nano --minutes 5
    python benchmarks/fashion_mnist.py --best 5 --seeds 3          # more seeds for the five that are best so far

A run takes as many steps as fit into its minutes at the measured speed, so that other work beside it changes nothing.
With `--recorded-speeds` another machine trains these steps, so that a table keeps one measure.

The images are those of Debian's dataset-fashion-mnist (`--data FOLDER` elsewhere), resized to 32 pixels (to 64 for models
whose names end so: BiFormer and VMamba begin with a quarter of the sides). Half of the training images are mirrored
(`--augment none` leaves them as they are, `light` shifts them too), with one learning rate for all; the last weights are
scored on the 10,000 test images (`--items` for fewer). A cell is a model and a seed: it is trained as by `regard train`
into a folder of `--work`, where a killed run continues, and its score is written to docs/data/fashion_mnist.json, from
which `python docs/generate.py` makes the page.
Measure speeds on an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regard.contract import Context, Unsupported, closest
from regard.core.files import write_text_atomically
from regard.measurement import provenance, units
from regard.measurement.budget import Budget
from regard.measurement.timing import interleaved
from regard.models import build_model
from regard.models.image_model import ImageModelConfig
from regard.models.variants import Variant
from regard.models.vision import list_backbones
from regard.tasks import Task, create_task
from regard.training import PRECISIONS, TrainConfig, peak_memory, train
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.trained.folder import DIVERGED
from regard.workbench.trained.run import train_model

TABLE = Path(__file__).parent.parent / "docs" / "data" / "fashion_mnist.json"
RATE, BATCH = 2e-3, 64
AGENTS = ["agent", {"num_agents": 16, "agent_bias": "all"}]
HEADS = ["mixture_of_heads", {"shared_heads": 1, "active_heads": 2, "mechanism_options": {"bias": True}}]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in list_backbones() if name.endswith("_nano")},
    "biformer_nano_64": ("biformer_nano", {}),
    "vmamba_nano_64": ("vmamba_nano", {}),
    "agent_vit_nano": ("vit_nano", {"plan": [AGENTS] * 6}),
    "moh_vit_nano": ("vit_nano", {"plan": [HEADS] * 6, "num_heads": 6}),
    "ninformer_nano": ("ninformer_net", {"width": 128, "hidden": 256, "branch_dropout": 0.1}),
    "activator_nano": ("activator_net", {"width": 128, "hidden": 256, "branch_dropout": 0.1}),
    "activator_geglu_nano": ("activator_geglu", {"width": 128, "hidden": 256}),
}
"""Each model's name here, its backbone and the backbone's options."""
SIDES = {"biformer_nano_64": 64, "vmamba_nano_64": 64}
"""Sides of the images in pixels; 32 for other models."""
AUGMENT: dict[str, dict[str, Any]] = {"none": {}, "flip": {"flip": True}, "light": {"augment": "light"}}
"""Options of the task for each way of varying training images."""


@functools.cache
def task_of(side: int, data: str, items: int, augment: str) -> Task:
    return create_task("images", data=data, size=side, evaluation_items=items, **AUGMENT[augment])


def settings_of(name: str, task: Task, seed: int, steps: int, precision: str) -> CompareSettings:
    return CompareSettings(
        (Variant(name, (), MODELS[name]),),
        Budget("steps", steps),
        seeds=1,
        first_seed=seed,
        rates=(RATE,),
        batch_tokens=BATCH * task.length,
        lengths=(task.length,),
        precision=precision,
    )


def read() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.is_file() else {"cells": [], "speeds": {}}


def write(table: dict[str, Any]) -> None:
    text = json.dumps(table, indent=1) + "\n"
    write_text_atomically(TABLE, text)


def done(table: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any] | None:
    return next((cell for cell in table["cells"] if wanted.items() <= cell.items()), None)


def steps_of(name: str, speeds: dict[str, Any], minutes: float, precision: str, recorded: bool) -> int:
    """The training steps that fit into the minutes at the speed of the model: on this machine, or `recorded` on any."""
    speed = speeds.get(name)
    here = {"cpu": provenance.fingerprint()["cpu"], "threads": torch.get_num_threads(), "precision": precision}
    if recorded and speed is not None:
        here["cpu"] = speed["cpu"]
    if speed is None or not here.items() <= speed.items():
        raise Unsupported(
            f"speed of {name} in {precision} on {here['cpu']} with {units.counted(here['threads'], 'thread')}, not measured",
            supported="models with measured speeds; --timings measures those of all on an idle machine, and "
            "--recorded-speeds takes those on record, of another processor",
        )
    return max(1, round(60 * minutes * speed["training"] / BATCH))


def train_cell(task: Task, wanted: dict[str, Any], work: Path) -> dict[str, Any]:
    """Train one cell, continuing from where it stopped."""
    name, seed = wanted["model"], wanted["seed"]
    last = 0.0

    def tell(point: Any, steps: int, left: float) -> None:
        nonlocal last
        if time.monotonic() - last > 10 or point.step + 1 == steps:
            last = time.monotonic()
            print(
                f"{name}, seed {seed}: step {point.step + 1} of {steps}, loss {point.loss:.3f}, "
                f"about {units.clock(left)} left",
                flush=True,
            )

    folder = work / "-".join(f"{x:g}" if isinstance(x, float) else str(x) for x in wanted.values())
    settings = settings_of(name, task, seed, wanted["steps"], wanted["precision"])
    record = train_model(task, settings, folder, best_of=0, on_step=tell, say=partial(print, flush=True)).record
    return {
        **wanted,
        "accuracy": None if record["state"] == DIVERGED else record["score"],
        "parameters": record["parameters"],
        "threads": record["settings"]["threads"],
        "cpu": record["machine"],
        "regard": record["regard"],
        "date": provenance.now()[:10],
    }


def measure_speeds(tasks: dict[str, Task], seconds: float, precision: str) -> dict[str, Any]:
    """Images/s and peak bytes of training and float32 inference at the training batch size, all models in turn; `tasks`
    has each model's."""
    models = {name: build_model(ImageModelConfig.for_task(task, *MODELS[name])) for name, task in tasks.items()}
    steps = TrainConfig(steps=1, batch_size=BATCH, learning_rate=RATE, precision=precision, measure_memory=False)
    training = interleaved({n: partial(train, model, tasks[n], steps) for n, model in models.items()}, seconds=seconds)
    found = {}
    for name, model in models.items():
        history = train(model, tasks[name], dataclasses.replace(steps, steps=2, measure_memory=True))
        found[name] = {"training_bytes": history.peak_memory, "training": BATCH / training[name].median}
    with torch.inference_mode():
        batches = {name: task.training_batch(0, 0, BATCH).inputs for name, task in tasks.items()}
        calls = {n: partial(m.eval(), batches[n], context=Context(grid=tasks[n].grid)) for n, m in models.items()}
        inference = interleaved(calls, seconds=seconds)
        for name, call in calls.items():
            found[name] |= {"inference": BATCH / inference[name].median, "inference_bytes": peak_memory(call).bytes}
    facts = provenance.fingerprint()
    told = {
        "cpu": facts["cpu"],
        "precision": precision,
        "threads": torch.get_num_threads(),
        "date": provenance.now()[:10],
    }
    return {name: {**one, **told} for name, one in found.items()}


def best(table: dict[str, Any], count: int, protocol: dict[str, Any]) -> list[str]:
    scores: dict[str, list[float]] = {}
    for cell in table["cells"]:
        if protocol.items() <= cell.items() and cell["accuracy"] is not None:
            scores.setdefault(cell["model"], []).append(cell["accuracy"])
    return sorted(scores, key=lambda name: -statistics.fmean(scores[name]))[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--best", type=int, help="of the models, those that are best so far")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=20.0, help="of each training run")
    parser.add_argument(
        "--items", type=int, default=10_000, help="test images that are scored, balanced over the classes"
    )
    parser.add_argument("--augment", default="flip", choices=AUGMENT, help="of training images")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS, help="of training")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--work", type=Path, default=Path("runs/fashion_mnist"), help="folder of the runs")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two kinds of timings")
    parser.add_argument(
        "--recorded-speeds", action="store_true", help="take the steps from the speeds on record, of another processor"
    )
    parser.add_argument("--timings", action="store_true", help="nothing but speeds and memory")
    arguments = parser.parse_args()
    names = [name for name in arguments.models.split(",") if name]
    for name in names:
        if name not in MODELS:
            raise Unsupported(f"model {name!r}", supported=", ".join(MODELS), nearest=closest(name, MODELS))
    if not math.isfinite(arguments.minutes) or arguments.minutes <= 0:
        raise Unsupported(f"{arguments.minutes} minutes", supported="more than none")
    table, protocol = read(), {x: getattr(arguments, x) for x in ("minutes", "augment", "items", "precision")}
    if arguments.best is not None:
        names = [name for name in best(table, arguments.best, protocol) if name in names]
    tasks = {name: task_of(SIDES.get(name, 32), arguments.data, arguments.items, arguments.augment) for name in names}
    if arguments.timings:
        table["speeds"] |= measure_speeds(tasks, arguments.seconds, arguments.precision)
        write(table)
        return
    for seed in range(arguments.seeds):
        for name in names:
            steps = steps_of(name, table["speeds"], arguments.minutes, arguments.precision, arguments.recorded_speeds)
            same = {"model": name, "seed": seed, **protocol}
            wanted = {**same, "steps": steps}
            if done(table, wanted) is None:
                cell = train_cell(tasks[name], wanted, arguments.work)
                table = read()  # another process may have added cells
                table["cells"] = [other for other in table["cells"] if not same.items() <= other.items()] + [cell]
                write(table)
            cell = done(table, wanted) or {}
            print(f"{name}, seed {seed}: {cell['accuracy']}", flush=True)


if __name__ == "__main__":
    main()
