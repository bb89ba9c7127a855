"""Architecture search on efficient transformers (Liu et al., arXiv 2207.13955): is a network of mixed layers, found by a
search, as good as softmax at less computation?

The paper (abstract): the best network of cosFormer layers alone computes less than the best of softmax layers and is
less accurate; a search over both finds networks about as accurate as the Transformer at notably less computation
(WMT'14 En-De, CIFAR-10). It searches with RankNAS (arXiv 2109.07383): the order of networks can be learned from few of
them.

Here: decoders of two to four layers on a task that needs both precise mixing (associative recall) and cheap mixing (the
majority symbol of long noise), within a share of the FLOPs, or of the measured time, of the largest softmax network.
Each cell is a whole search: supernet, ranker, evolution, and the winners of the mixed space and of each single
mechanism trained from scratch with one seed.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from regard.catalogue import get_mechanism
from regard.contract import Context, Kind, Paper, Pattern
from regard.models.variants import read_variant
from regard.reproductions.framework.judging import Check, Measurements, Seed, measured
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.studies.architecture_search.task import RecallAndMajority
from regard.studies.framework.protocol import Cells, Chosen, Study, lacks
from regard.tasks import Task
from regard.training.step import run_model
from regard.workbench.comparison.task_models import build
from regard.workbench.reports.sections import Points, Section
from regard.workbench.search.costs import NetworkBudget, count_flops
from regard.workbench.search.record import REFERENCE
from regard.workbench.search.run import FOUND, Search
from regard.workbench.search.settings import SearchSettings
from regard.workbench.search.space import Choices

PAPER = Paper("Neural Architecture Search on Efficient Transformers and Beyond", "2207.13955", 2022, 24)
BUDGETS = {"FLOPs": "60% flops", "time": "60% time"}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "length": 64, "pairs": 4, "questions": 24, "items": 64, "dims": [16, 32], "depths": [1, 3], "heads": [2],
        "feed_forward": [32, 64], "steps": 40, "networks": 15, "evaluations": 200, "retrain": 40, "batch_tokens": 512,
    },
    "small": {
        "length": 256, "pairs": 4, "questions": 176, "items": 256, "dims": [32, 64], "depths": [2, 3, 4], "heads": [2, 4],
        "feed_forward": [64, 128], "steps": 3000, "networks": 60, "evaluations": 1000, "retrain": 3000,
        "batch_tokens": 2048,
    },
}  # fmt: skip
CELL_SECONDS = {"tiny": {"FLOPs": 7.0, "time": 8.0}, "small": {"FLOPs": 1350.0, "time": 750.0}}
"""Seconds for a cell; the second search reuses the supernet of the first."""
COSTS = {"FLOPs": "flops", "time": "ms"}
METHODS = ("evolution, ranker", "random, ranker", "evolution, regression", "best of those tried")


class Scratch:
    """A temporary folder, deleted with the object or at the end of the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="regard-search-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@functools.lru_cache(maxsize=1)
def scratch(shared: str) -> Scratch:
    """The folder in which the searches of one setting and seed share what does not depend on the budget: the supernet,
    the losses of networks with its weights, networks trained from scratch."""
    return Scratch()


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Run a whole search. Measures the network found, the best of each mechanism alone and the reference: ``NAME
    loss``, ``NAME score``, ``NAME flops``, ``NAME attention`` (FLOPs outside linear layers), ``NAME ms``, ``NAME
    parameters``, ``NAME layers``, and ``NAME first``, the number of layers with the first mechanism. Adds tau and pair
    accuracy of ranker and regression, and for each search method the loss of its best network with the supernet's
    weights."""
    task = RecallAndMajority(
        length=setting["length"],
        pairs=setting["pairs"],
        questions=setting["questions"],
        evaluation_items=setting["items"],
    )
    choices = Choices(
        tuple(read_variant(name) for name in setting["mechanisms"]),
        **{name: tuple(setting[name]) for name in ("dims", "depths", "heads", "feed_forward")},
    )
    settings = SearchSettings(
        NetworkBudget.parse(setting["budget"]),
        steps=setting["steps"],
        batch_tokens=setting["batch_tokens"],
        networks=setting["networks"],
        evaluations=setting["evaluations"],
        retrain_steps=setting["retrain"],
        seeds=1,
        seed=seed,
        frame=setting["frame"],
    )
    shared = {name: value for name, value in setting.items() if name != "budget"}
    folder = scratch(json.dumps([shared, seed], sort_keys=True))
    search = Search(task, choices, settings, folder.path)
    record = search.run()
    found: dict[str, Any] = {}
    for kind, one in record["judged"].items():
        found |= {f"{kind} tau": one["tau"], f"{kind} accuracy": one["accuracy"]}
    found |= {f"{one['method']}: loss": one["inherited"] for one in record["methods"]}
    first = choices.names[0]
    for row in record["entrants"]:
        name, layers = row["name"], row["network"]["layer"]
        found |= {f"{name} {what}": row["runs"][0][what] for what in ("loss", "score")}
        found |= {f"{name} {what}": row[what] for what in ("flops", "ms", "parameters")}
        found[f"{name} attention"] = other_flops(build(search.space.config(tuple(row["genes"])), 0), task)
        found[f"{name} layers"] = len(layers)
        found[f"{name} first"] = sum(layer["mechanism"] == first for layer in layers)
    return {name: float("nan") if value is None else value for name, value in found.items()}


def other_flops(model: nn.Module, task: Task) -> float:
    """FLOPs of the forward pass of one item outside the linear layers: those of the attention, and of the frame's short
    convolutions, which are 2 % of them in softmax and 4 % in cosFormer at the size `small`."""
    linear = []
    hooks = [
        module.register_forward_hook(lambda m, x, _: linear.append(2 * x[0].numel() * m.out_features))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    batch = next(iter(task.evaluation_batches(1)))
    run_model(model.eval(), batch, Context())
    for hook in hooks:
        hook.remove()
    return count_flops(model, task) - sum(linear)


def share(name: str, other: str, what: str, setting: str) -> Callable[[Seed], float]:
    """The ratio of a measurement between two networks of a cell."""

    def value(seed: Seed) -> float:
        cell = seed[setting]
        a, b = (cell.get(f"{one} {what}") for one in (name, other))
        return float("nan") if a is None or not b else float(a) / float(b)

    return value


def make(chosen: Chosen) -> Reproduction:
    """The reproduction for a choice: one search within a FLOP budget, one within a time budget, and their checks."""
    mechanisms = list(chosen.mechanisms)
    common = {**SIZES[chosen.preset], "mechanisms": mechanisms, "frame": "convolution"}
    checks = [
        Check("the ranker's tau on held-out networks is above 0.5", measured("FLOPs", "ranker tau"), above=0.5),
        *(
            Check(
                f"at {text}, what is found has a loss within 2 % of the reference's",
                share(FOUND, REFERENCE, "loss", name),
                below=1.02,
            )
            for name, text in BUDGETS.items()
        ),
    ]
    absent = [name for name in ("softmax", "cosformer") if name not in mechanisms]
    if not absent:
        soft, cos = "softmax alone", "cosformer alone"
        checks += [
            Check("cosFormer alone has a higher loss than softmax alone", share(cos, soft, "loss", "FLOPs"), above=1.0),
            Check("and computes less outside its linear layers", share(cos, soft, "attention", "FLOPs"), below=1.0),
            Check(
                "what is found has a loss within 2 % of softmax alone", share(FOUND, soft, "loss", "FLOPs"), below=1.02
            ),
            Check(
                "and at least 25 % fewer FLOPs outside linear layers than the reference",
                share(FOUND, REFERENCE, "attention", "FLOPs"),
                below=0.75,
            ),
        ]
    return Reproduction(
        name=STUDY.name,
        mechanisms=tuple(mechanisms),
        claim=(
            "A search over softmax and cosFormer layers finds networks about as accurate as the Transformer at notably less "
            "computation, where cosFormer layers alone are less accurate (abstract)."
        ),
        instead=(
            "Decoders on associative recall and the majority of a long noise, within 60 % of the FLOPs, or of the measured time, "
            "of the largest network of the first mechanism; a whole search a cell, its winners trained from scratch. A frame "
            "with short convolutions, without which recall is not learned in so few steps."
        ),
        settings={name: {**common, "budget": text} for name, text in BUDGETS.items()},
        run_cell=run_cell,
        checks=tuple(checks),
        needs=(
            Check(
                "the reference answers more than the majority (0.53)",
                measured("FLOPs", f"{REFERENCE} score"),
                above=0.75,
            ),
        ),
        left_out=(
            "WMT'14 En-De and CIFAR-10, which are not available here",
            "cross attention to the last one, two or three encoder layers: the networks here are decoders without an encoder",
            "that the ranker is orders of magnitude faster than earlier searches: none of those is here",
            *([f"softmax and cosFormer layers compared: without {', '.join(absent)}"] if absent else ()),
        ),
        timings=frozenset({"time"}),
        seeds=2 if chosen.preset == "tiny" else 3,
        smoke={
            "length": 32,
            "pairs": 2,
            "questions": 4,
            "items": 8,
            "steps": 2,
            "networks": 10,
            "evaluations": 20,
            "retrain": 2,
            "batch_tokens": 64,
            "dims": [8, 16],
            "depths": [1, 2],
            "heads": [1],
            "feed_forward": [8, 16],
        },
        more_seconds=CELL_SECONDS[chosen.preset],
        source=PAPER,
    )


def sections(chosen: Chosen, cells: Cells) -> list[Section]:
    """For each budget the network found compared with single mechanisms, then rankers and search methods."""
    found = []
    for setting, unit in COSTS.items():
        runs = {seed: cell for (name, seed), cell in cells.items() if name == setting}
        if not runs:
            continue
        names = [FOUND, *(f"{one} alone" for one in chosen.mechanisms), REFERENCE]
        rows = [
            _row(name, seed, cell) for seed, cell in sorted(runs.items()) for name in names if f"{name} loss" in cell
        ]
        points = {}
        for name in names:
            both = [(c.get(f"{name} {unit}"), c.get(f"{name} loss")) for c in runs.values()]
            known = [(x, y) for x, y in both if x is not None and y is not None]
            if known:
                points[name] = (sum(x for x, _ in known) / len(known), sum(y for _, y in known) / len(known))
        picture = Points(
            f"Loss against {setting}, mean over seeds",
            "FLOPs of an item" if unit == "flops" else "milliseconds of an item",
            "loss",
            points,
            rising=False,
        )
        found.append(
            Section(
                f"Within {BUDGETS[setting]}", "Trained from scratch; lower losses are drawn higher.", [picture], rows
            )
        )
    learned = [
        {
            "budget": name,
            "seed": seed,
            **{f"{kind}: tau": cell[f"{kind} tau"] for kind in ("ranker", "regression")},
            **{method: cell.get(f"{method}: loss") for method in METHODS},
        }
        for (name, seed), cell in sorted(cells.items())
    ]
    if learned:
        says = (
            "Kendall's tau on held-out networks, and the loss, with the supernet's weights, of what each method found."
        )
        found.append(Section("Ranker and searchers", says, rows=learned))
    return found


def _row(name: str, seed: int, cell: Measurements) -> Mapping[str, Any]:
    count, first = cell[f"{name} layers"], cell[f"{name} first"]
    return {
        "network": name,
        "seed": seed,
        **{what: cell[f"{name} {what}"] for what in ("loss", "score", "flops", "ms")},
        "FLOPs outside linear layers": cell[f"{name} attention"],
        "layers": count,
        "of the first mechanism": first,
    }


def refuses(name: str) -> str | None:
    """Why a mechanism cannot enter, or None where it can."""
    card = get_mechanism(name)
    if card.kind not in (Kind.ATTENTION, Kind.MIXER, Kind.WRAPPER):
        return f"it is a {card.kind.value}, and gives no output for each token"
    return lacks(card, Pattern.CAUSAL_SELF) or ("it inserts tokens" if card.prepare is not None else None)


STUDY = Study(
    name="architecture-search",
    question="Is a network of mixed layers, found by a search, as good as softmax at less computation?",
    make=make,
    sections=sections,
    mechanisms=("softmax", "cosformer"),
    refuses=refuses,
)
