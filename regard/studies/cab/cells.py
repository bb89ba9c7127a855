"""The cells of the study: the sizes of each preset, the mechanisms that enter, and the checks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from regard.catalogue import get_mechanism
from regard.contract import Mechanism, Paper, Pattern, Unsupported
from regard.measurement.memory import peak_memory
from regard.measurement.timing import rounds
from regard.models.variants import known_name
from regard.reproductions import Reproduction
from regard.reproductions.framework.judging import Check, Measurements, Seed, number
from regard.reproductions.framework.protocol import Setting
from regard.studies.cab.backbones import NOTHING
from regard.studies.cab.benches import BENCHES, NAMED, Bench, missing, run_bench
from regard.studies.cab.efficiency import efficiency_length
from regard.studies.cab.index import AVERAGE, ScoresOf, indices
from regard.studies.cab.own_data import own_data, score_files
from regard.studies.cab.published import read_scores
from regard.studies.framework.protocol import Chosen
from regard.tasks.documents import names_of
from regard.workbench.advice.layer_work import MIXING, LayerSettings, LayerWork

NS, CS, NC, CC = Pattern
SOFTMAX = "softmax"
MOST_ADDED = 0.1
"""Largest share of the backbone's parameters that a mechanism may add under the benchmark's rules."""
LEADERBOARD: dict[Pattern, tuple[str, ...]] = {
    NS: ("TTS", "Sum", "SR", "MLM"),
    CS: ("TTS", "Sum", "LM"),
    NC: ("PCC", "LSTF"),
    CC: ("TTS", "Sum"),
}
"""Tasks whose index counts in each pattern; other cells are reported but not averaged."""

_TINY = {"dim": 32, "heads": 2, "layers": 2, "batch_size": 8, "learning_rate": 1e-2, "steps": 50, "items": 16}
_SMALL = {"dim": 64, "heads": 4, "layers": 2, "batch_size": 8, "learning_rate": 2e-3, "steps": 800, "items": 64}
_PAPER = {"dim": 512, "heads": 8, "layers": 6, "batch_size": 16, "learning_rate": 5e-4, "steps": 100_000, "items": 256}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "LM": _TINY | {"length": 128},
        "MLM": _TINY | {"length": 128},
        "PCC": _TINY | {"length": 64, "history": 64, "layers": 1, "steps": 60, "learning_rate": 5e-3},
        "Sum": _TINY | {"length": 24, "history": 96, "tokenizer": "bpe:512", "layers": 1, "steps": 30},
    },
    "small": {
        "LM": _SMALL | {"length": 1024, "batch_size": 4, "steps": 400, "learning_rate": 5e-3},
        "MLM": _SMALL | {"length": 512, "steps": 400, "learning_rate": 5e-3},
        "LSTF": _SMALL
        | {"length": 336, "history": 336, "start": 168, "source": "electricity", "batch_size": 16, "steps": 400},
        "SR": _SMALL | {"size": 32, "factor": 4, "batch_size": 4, "steps": 600},
        "Sum": _SMALL | {"length": 24, "history": 256, "tokenizer": "bpe:2048", "batch_size": 16},
        "PCC": _SMALL | {"length": 512, "history": 256, "steps": 250, "learning_rate": 5e-3},
        "FastSpeech": _SMALL | {"length": 256, "digits": 4, "batch_size": 16, "items": 32, "steps": 500},
        "Transformer-TTS": _SMALL
        | {"length": 256, "digits": 4, "group": 4, "batch_size": 16, "items": 32, "steps": 1500},
    },
    "paper": {
        "FastSpeech": _PAPER | {"length": 559, "digits": 8},
        "Transformer-TTS": _PAPER | {"length": 559, "digits": 8, "group": 4},
        "PCC": _PAPER | {"length": 3584, "history": 1536},
        "LM": _PAPER | {"length": 8192},
        "MLM": _PAPER | {"length": 2048},
        "LSTF": _PAPER | {"length": 720, "history": 336, "start": 168, "source": "electricity", "layers": 2},
        "SR": _PAPER | {"size": 128, "factor": 8},
        "Sum": _PAPER | {"length": 400, "history": 4096, "tokenizer": "bpe:8192"},
    },
}
COSTS: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 64, "heads": 4, "batch": 1, "lengths": [128, 256, 512, 1024], "seconds": 0.25},
    "small": {"dim": 128, "heads": 4, "batch": 1, "lengths": [128, 256, 512, 1024, 2048, 4096], "seconds": 20.0},
    "paper": {"dim": 512, "heads": 8, "batch": 4, "lengths": [256, 512, 1024, 2048, 4096, 8192], "seconds": 600.0},
}
SECONDS: dict[str, dict[str, float]] = {
    "tiny": {"LM": 0.7, "MLM": 0.6, "PCC": 0.7, "Sum": 0.6, "cost": 0.5},
    "small": {
        "LM": 45.0, "MLM": 40.0, "LSTF": 80.0, "SR": 85.0, "Sum": 75.0, "PCC": 27.0, "FastSpeech": 50.0,
        "Transformer-TTS": 90.0, "cost": 25.0,
    },
    "paper": dict.fromkeys(PRESETS["paper"], 500_000.0) | {"cost": 600.0},
}  # fmt: skip
"""Seconds for a cell of each bench, and for a cell of costs."""


def card_of(mechanism: str) -> Mechanism:
    """The card of a mechanism, with the options in its name if any."""
    return get_mechanism(known_name(mechanism))


def patterns_of(mechanism: str) -> tuple[Pattern, ...]:
    """Patterns in which a mechanism replaces attention over sequences."""
    card = card_of(mechanism)
    return tuple(p for p in card.patterns if not (card.length == "grid" and p is NS))


def refuses(mechanism: str) -> str | None:
    """Why a mechanism cannot enter, or None where it can."""
    card = card_of(mechanism)
    if card.kind not in MIXING:
        return f"it is a {card.kind.value}, and gives no output for each token"
    if card.prepare is not None:
        return "it inserts its own tokens into the text"
    return None


def enters(bench: Bench, mechanism: str, pattern: Pattern) -> bool:
    """Return whether a mechanism can run in a bench in a pattern: a user's module may not keep padding out."""
    keeps_out = getattr(card_of(mechanism).module, "keeps_padding_out", None)
    return not bench.padded or keeps_out is None or keeps_out(pattern)


def task_setting(bench: Bench, mechanism: str, pattern: Pattern) -> str:
    """The name of a cell's setting. Softmax gets one setting for all patterns, since the model is the same in each."""
    return f"{bench.name}: {SOFTMAX}" if mechanism == SOFTMAX else f"{bench.name} {pattern.value}: {mechanism}"


def cost_setting(mechanism: str) -> str:
    """The name of the setting that measures what a mechanism costs."""
    return f"cost: {mechanism}"


def entered(chosen: Chosen) -> list[str]:
    """The mechanisms of the study, beginning with softmax attention, the baseline."""
    return list(dict.fromkeys([SOFTMAX, *chosen.mechanisms]))


def benches_of(chosen: Chosen) -> list[Bench]:
    """The benches of a preset whose data are available: the user's, or those of a package."""
    own = own_data(chosen.data)
    return [
        bench
        for bench in BENCHES
        if bench.name in PRESETS[chosen.preset] and (bench.task in own or not missing(bench.name))
    ]


def is_standard(chosen: Chosen, pattern: Pattern) -> bool:
    """Return whether all tasks that count in a pattern have the benchmark's data, as the paper's claims need."""
    return own_data(chosen.data).keys().isdisjoint(LEADERBOARD[pattern])


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """The scores of a backbone with one pattern's attention replaced, or the costs of a layer at all lengths."""
    return run_costs(setting) if "bench" not in setting else run_bench(setting, seed)


def run_costs(setting: Setting) -> dict[str, Any]:
    """Seconds and bytes of a forward call of the mechanism's layer and of softmax's, timed in turn, at each length.

    Seconds are the interquartile mean. Softmax is timed in its fused form, but its bytes are those of the form that
    holds the weights; "fused bytes" are those of the fused form.
    """
    pattern = Pattern(setting["pattern"])
    layer = LayerSettings(pattern, setting["dim"], setting["heads"], batch=setting["batch"])
    works = {name: LayerWork(card_of(name), layer) for name in (SOFTMAX, setting["mechanism"])}
    found: dict[str, list[float]] = {}
    for n in setting["lengths"]:
        actions = {name: work.action("forward", n) for name, work in works.items()}
        spent = rounds(actions, seconds=setting["seconds"] / len(setting["lengths"]), least=3, clock=time.thread_time)
        for name, action in actions.items():
            repeats = sorted(spent[name])
            quarter = len(repeats) // 4
            middle = repeats[quarter : len(repeats) - quarter]
            kind = SOFTMAX if name == SOFTMAX else "own"
            found.setdefault(f"{kind} seconds", []).append(sum(middle) / len(middle))
            found.setdefault(f"{kind} bytes", []).append(float(peak_memory(action).bytes))
        weighed = partial(_with_weights, works[SOFTMAX], n)
        found.setdefault("weighed bytes", []).append(float(peak_memory(weighed).bytes))
    return {
        "lengths": [float(n) for n in setting["lengths"]],
        "times": found["own seconds"],
        f"{SOFTMAX} times": found[f"{SOFTMAX} seconds"],
        "bytes": found["own bytes"],
        f"{SOFTMAX} bytes": found["weighed bytes"],
        "fused bytes": found[f"{SOFTMAX} bytes"],
    }


@torch.no_grad()
def _with_weights(work: LayerWork, n: int) -> Any:
    x, memory, context = work.inputs(n)
    return work.layer(x, memory, context=context.replace(want=frozenset({"weights"})))


def settings(chosen: Chosen) -> dict[str, Setting]:
    """The settings of all cells for a choice, by name."""
    made: dict[str, Setting] = {}
    own = {task: {"data": data.setting()} for task, data in own_data(chosen.data).items()}
    for bench in benches_of(chosen):
        sizes = PRESETS[chosen.preset][bench.name] | {"bench": bench.name} | own.get(bench.task, {})
        for mechanism in entered(chosen):
            for pattern in bench.patterns:
                if pattern in patterns_of(mechanism) and enters(bench, mechanism, pattern):
                    made[task_setting(bench, mechanism, pattern)] = sizes | {
                        "mechanism": mechanism,
                        "pattern": (bench.patterns[0] if mechanism == SOFTMAX else pattern).value,
                    }
        if bench.without and NS in bench.patterns:
            made[task_setting(bench, NOTHING, NS)] = sizes | {"mechanism": NOTHING, "pattern": NS.value}
    for mechanism in entered(chosen):
        if mechanism != SOFTMAX:
            pattern = NS if NS in patterns_of(mechanism) else patterns_of(mechanism)[0]
            made[cost_setting(mechanism)] = COSTS[chosen.preset] | {"mechanism": mechanism, "pattern": pattern.value}
    return made


def scores(cells: Mapping[str, Mapping[str, Any]], chosen: Chosen, pattern: Pattern) -> dict[str, dict[str, float]]:
    """The metrics of each mechanism in a pattern, from one seed's cells by setting; none of a task in which it
    diverged."""
    found: dict[str, dict[str, float]] = {}
    for mechanism in entered(chosen):
        if pattern not in patterns_of(mechanism):
            continue
        failed = diverged(cells, chosen, pattern, mechanism)
        own = {
            f"{bench.name} {name}": float(cell[name])
            for bench, cell in _run(cells, chosen, pattern, mechanism)
            if bench.task not in failed
            for name in bench.metrics
        }
        if own:
            found[mechanism] = own
    return found


def diverged(
    cells: Mapping[str, Mapping[str, Any]], chosen: Chosen, pattern: Pattern, mechanism: str
) -> frozenset[str]:
    """The tasks of a pattern in which one seed's run of a mechanism has a metric that is not finite."""
    return frozenset(
        bench.task
        for bench, cell in _run(cells, chosen, pattern, mechanism)
        if not all(cell.get(name) is not None and math.isfinite(cell[name]) for name in bench.metrics)
    )


def _run(
    cells: Mapping[str, Mapping[str, Any]], chosen: Chosen, pattern: Pattern, mechanism: str
) -> Iterator[tuple[Bench, Mapping[str, Any]]]:
    """The benches of a pattern's leaderboard that one seed has run with a mechanism, each with its cell."""
    for bench in benches_of(chosen):
        if pattern in bench.patterns and bench.task in LEADERBOARD[pattern]:
            cell = cells.get(task_setting(bench, mechanism, pattern))
            if cell is not None:
                yield bench, cell


def pattern_indices(cells: Mapping[str, Mapping[str, Any]], chosen: Chosen, pattern: Pattern) -> ScoresOf:
    """One seed's index of each mechanism in a pattern, standardised over the mechanisms that entered."""
    metrics = [metric for bench in benches_of(chosen) for metric in bench.listed]
    return indices(scores(cells, chosen, pattern), metrics)


def complete_seeds(
    seeds: Mapping[int, Mapping[str, Measurements]], chosen: Chosen, pattern: Pattern
) -> list[Mapping[str, Measurements]]:
    """The cells of each seed that has all of a pattern's, or of all seeds while there is none."""
    wanted = set(_read(chosen, pattern))
    return [cells for cells in seeds.values() if wanted <= cells.keys()] or list(seeds.values())


def checks(chosen: Chosen) -> tuple[Check, ...]:
    """The paper's claims about the mechanisms that entered."""
    return tuple(_checks(chosen))


IN_LANGUAGE = (("long_short", "local"), ("s4d", "local"), ("local", "abc"))
"""(better, worse) pairs in language modelling according to the paper."""


def unasked(chosen: Chosen) -> Iterator[str]:
    """The parts of the claim that are not judged: the mechanism did not enter, the task is in another preset, or its data
    are the user's."""
    names = entered(chosen)
    for task in own_data(chosen.data):
        yield f"what the paper claims of {task}, and of patterns in which it counts: your data are not the benchmark's"
    absent = dict.fromkeys(name for pair in IN_LANGUAGE for name in pair if name not in names)
    if absent:
        yield f"the order of long_short, s4d, local and abc in language modelling: without {', '.join(absent)}"
    if "LSTF" not in PRESETS[chosen.preset]:
        yield "forecasts: in the preset small"
    if len(names) == 1:
        yield "places beside softmax attention, and lengths from which others are cheaper: no other mechanism entered"


def _checks(chosen: Chosen) -> Iterator[Check]:
    names, given = entered(chosen), own_data(chosen.data)
    present = {bench.name for bench in benches_of(chosen) if bench.task not in given}

    def lead(pattern: Pattern) -> Callable[[Seed], float]:
        """Index of softmax attention minus that of the best other; nan where a run diverged, which has no index."""
        those = [name for name in names if pattern in patterns_of(name)]

        def value(seed: Seed) -> float:
            for setting in _read(chosen, pattern):
                seed[setting]
            if any(diverged(seed, chosen, pattern, name) for name in those):
                return math.nan
            found = {name: own.get(AVERAGE, math.nan) for name, own in pattern_indices(seed, chosen, pattern).items()}
            others = [value for name, value in found.items() if name != SOFTMAX and math.isfinite(value)]
            return found[SOFTMAX] - max(others) if others else math.nan

        return value

    tried = {p for bench in benches_of(chosen) for p in bench.patterns if bench.task in LEADERBOARD[p]}
    tried = {p for p in tried if is_standard(chosen, p)}
    others = {p: any(p in patterns_of(name) for name in names if name != SOFTMAX) for p in Pattern}
    if NS in tried and others[NS]:
        yield Check("noncausal-self: the index of softmax is below that of the best other", lead(NS), below=0)
    for pattern in (NC, CC):
        if pattern in tried and others[pattern]:
            yield Check(f"{pattern.value}: the index of softmax is above that of all others", lead(pattern), above=0)
    if "LM" in present:
        perplexity = {name: task_setting(NAMED["LM"], name, CS) for name in names if CS in patterns_of(name)}
        for better, worse in IN_LANGUAGE:
            if {better, worse} <= perplexity.keys():
                yield Check(
                    f"language modelling: perplexity of {better} minus that of {worse}",
                    _difference(perplexity[better], perplexity[worse]),
                    below=0,
                )
        yield Check(
            "softmax: perplexity in pieces of the length of training minus that in the shortest",
            lambda seed: _at(seed, perplexity[SOFTMAX], 0, -2),
            below=0,
        )
        yield Check(
            "softmax: perplexity in pieces twice as long as in training minus that at the length of training",
            lambda seed: _at(seed, perplexity[SOFTMAX], -2, -1),
            above=0,
        )
    for name, what, metric in (("LSTF", "forecasts", "MSE"), ("PCC", "completed point clouds", "CD-l1")):
        if name in present:
            yield Check(
                f"{what} without attention in the encoder: {metric} over that with softmax attention",
                _without_attention(name, metric),
                below=1.05,
            )
    for name in names:
        if name != SOFTMAX:
            yield Check(f"{name}: efficiency length of memory minus that of time", _memory_first(name), below=0)


def _read(chosen: Chosen, pattern: Pattern) -> Iterator[str]:
    """The settings from which the indices of a pattern are computed."""
    for bench in benches_of(chosen):
        if pattern in bench.patterns and bench.task in LEADERBOARD[pattern]:
            for mechanism in entered(chosen):
                if pattern in patterns_of(mechanism) and enters(bench, mechanism, pattern):
                    yield task_setting(bench, mechanism, pattern)


def _difference(first: str, second: str) -> Callable[[Seed], float]:
    return lambda seed: number(seed, first, "PPL") - number(seed, second, "PPL")


def _without_attention(bench: str, metric: str) -> Callable[[Seed], float]:
    nothing, full = (task_setting(NAMED[bench], name, NS) for name in (NOTHING, SOFTMAX))
    return lambda seed: number(seed, nothing, metric) / number(seed, full, metric)


def _at(seed: Seed, setting: str, before: int, after: int) -> float:
    values = [
        math.nan if value is None else float(value) for value in seed[setting].get("perplexities") or [math.nan] * 2
    ]
    return values[after] - values[before]


def _memory_first(name: str) -> Callable[[Seed], float]:
    def value(seed: Seed) -> float:
        cell = seed[cost_setting(name)]
        found = efficiency(cell)
        memory, time = found["bytes"].length, found["times"].length
        # cheaper in both from below the shortest length measured: which comes first is not known
        return memory - time if math.isfinite(memory - time) and max(memory, time) >= min(cell["lengths"]) else math.nan

    return value


def efficiency(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The efficiency lengths of a cost cell: for times, for bytes, and for bytes against fused softmax."""
    return {
        kind: efficiency_length(cell["lengths"], cell[f"{SOFTMAX} {kind}"], cell[kind], skip=int(kind == "times"))
        for kind in ("times", "bytes")
    } | {"fused": efficiency_length(cell["lengths"], cell["fused bytes"], cell["bytes"])}


def needs(chosen: Chosen) -> tuple[Check, ...]:
    """Checks that the language model learns: with softmax attention it beats the frequencies of single bytes."""
    found = []
    for bench in benches_of(chosen):
        setting = task_setting(bench, SOFTMAX, bench.patterns[0])
        if bench.name == "LM" and bench.task not in own_data(chosen.data):
            found.append(
                Check(
                    "language modelling: perplexity with softmax attention (the frequencies of single bytes have 24)",
                    lambda seed, at=setting: number(seed, at, "PPL"),  # type: ignore[misc]
                    below=24.0,
                )
            )
    return tuple(found)


def _try_own_data(chosen: Chosen, made: Mapping[str, Setting]) -> None:
    """Create the tasks on the user's data; raises Unsupported if one cannot be made of them."""
    own, present = own_data(chosen.data), benches_of(chosen)
    for task, data in own.items():
        benches = [bench for bench in present if bench.task == task]
        if not benches:
            raise Unsupported(
                f"data for {task} in the preset {chosen.preset}",
                supported=", ".join(dict.fromkeys(bench.task for bench in present)),
                nearest="--preset small",
            )
        try:
            for bench in benches:
                bench.data(made[task_setting(bench, SOFTMAX, bench.patterns[0])])
        except Unsupported as error:
            raise data.refused(error, chosen.preset) from None


def make(chosen: Chosen) -> Reproduction:
    """The reproduction for a choice: the preset's benches with each mechanism, and the mechanisms' costs. The user's
    data and score files are read once, so that a bad one fails early."""
    for path in score_files(chosen.data):
        read_scores(path)
    own, benches = own_data(chosen.data), benches_of(chosen)
    absent = [missing(name) for name in PRESETS[chosen.preset] if name not in {bench.name for bench in benches}]
    made = settings(chosen)
    _try_own_data(chosen, made)
    return Reproduction(
        name="cab",
        mechanisms=tuple(dict.fromkeys(card_of(name).name for name in entered(chosen))),
        source=Paper("CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling", "2210.07661", 2022, 34),
        claim=(
            "Where all see all of one sequence some mechanism is better than softmax attention, which leads in both cross "
            "patterns; in language modelling long_short and s4d lead, before local and abc; memory is saved from much "
            "shorter lengths on than time; forecasts and completed point clouds are no worse without attention; perplexity "
            "falls up to the length of training and rises beyond it."
        ),
        instead=(
            "Small backbones on data that packages hold, in the place of eight large ones on seven corpora: "
            + ", ".join(bench.name for bench in benches)
            + "".join(f". {task}: on your data, {names_of(data.path)}" for task, data in own.items())
            + ". The attention of one pattern is replaced at a time, the others stay softmax. Indices are standardised over "
            "what entered, so that they compare within this table alone. Costs are of a forward call of one layer on one core."
        ),
        settings=made,
        run_cell=run_cell,
        checks=checks(chosen),
        needs=needs(chosen),
        left_out=(*LEFT_OUT, *absent, *unasked(chosen)),
        timings=frozenset(name for name in made if name.startswith("cost: ")),
        protocol=2,  # since what is seen of a cloud is not among what is to be predicted, and upscale has its own unit
        smoke={"steps": 2, "items": 2, "dim": 16, "heads": 2, "lengths": [16, 32, 64], "seconds": 0.01},
        seeds=2,
        more_seconds={name: SECONDS[chosen.preset][one.get("bench", "cost")] for name, one in made.items()},
    )


LEFT_OUT = (
    "The paper's figures: its corpora (LJSpeech, Multi-News, PCN, PG-19, FFHQ, ECL) are in no package, and its backbones are a "
    "hundred times as large.",
    "Super-resolution by diffusion: pictures are made in one step.",
    "Forecasts of many variables.",
    "Durations and pitch of speech: characters last equally long.",
)
