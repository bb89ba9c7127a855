"""The study: its cells and its checks."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regard.catalogue import list_mechanisms
from regard.contract import Paper, Unsupported, closest
from regard.reproductions import Reproduction
from regard.reproductions.framework.judging import Check, Seed
from regard.reproductions.framework.protocol import Setting
from regard.studies.attention_passes.accelerator import (
    DESIGNS,
    WORKLOADS,
    shipped,
)
from regard.studies.attention_passes.cells import KERNELS, SHIPPED, THIS_PROCESSOR, TILES, run_cell
from regard.studies.attention_passes.language import parse
from regard.studies.attention_passes.machine import SHIPPED as MACHINES
from regard.studies.attention_passes.machine import read_machine
from regard.studies.attention_passes.mechanisms import cascade_of
from regard.studies.attention_passes.shown import sections
from regard.studies.framework.protocol import Chosen, Study

PAPER = Paper(
    "FuseMax: Leveraging Extended Einsums to Optimize Attention Accelerator Design", "2406.10491", 2024, number=30
)
COMPARED = ("fusemax", "flat")
"""The machines on which cascades are costed when none is given."""

LENGTHS_BY_PRESET = {"tiny": (64, 128, 256, 512, 1024), "small": (256, 512, 1024, 2048, 4096)}


def make(chosen: Chosen) -> Reproduction:
    """The reproduction for a choice."""
    lengths = list(LENGTHS_BY_PRESET[chosen.preset])
    settings: dict[str, Setting] = {}
    machines: dict[str, str | dict[str, Any]] = {}
    for given in chosen.data:
        name, machine = Path(given).name, _given_machine(given)
        if name in machines or f"file {name}" in settings:
            raise Unsupported(f"{name!r} twice", supported="files and machines of different names")
        if machine is None:
            settings[f"file {name}"] = {
                "part": "cascade",
                "text": _given_cascade(given),
                "name": Path(given).stem,
            }
        else:
            machines[name] = machine
    for name in chosen.mechanisms:
        found = cascade_of(name)
        if found.cascade is not None:
            settings[f"class {name}"] = {"part": "class", "mechanism": name, "text": found.cascade.text}
    for name in SHIPPED:
        settings[f"cascade {name}"] = {"part": "cascade", "text": shipped(name).text, "name": name}
    cascades = {name: setting["text"] for name, setting in settings.items()}
    for name, machine in (machines or {name: _fields(name) for name in COMPARED}).items():
        setting = {"part": "machine", "machine": machine, "cascades": cascades}
        settings[f"machine {name}"] = {**setting, **({"seconds": 1.0} if machine == THIS_PROCESSOR else {})}
    for name in WORKLOADS:
        settings[f"designs {name}"] = {"part": "designs", "model": name}
    for name in SHIPPED:
        settings[f"buffer {name}"] = {"part": "buffer", "text": shipped(name).text, "lengths": lengths}
    settings["schedule"] = {"part": "schedule", "tiles": list(TILES)}
    settings["this processor"] = {"part": "processor", "kernels": list(KERNELS), "lengths": lengths, "seconds": 1.0}
    return Reproduction(
        name="attention-passes",
        mechanisms=("softmax",),
        source=PAPER,
        claim=(
            "FlashAttention's form of softmax walks over its keys once, with a buffer that does not grow; interleaved on cells "
            "that also add, compare and exponentiate it is 6.7 times as fast as the fused three passes of FLAT."
        ),
        instead=(
            "The paper's machines as closed forms, which agree with the authors' tables for four models at six "
            "lengths; the bytes that the unfused and FLAT mappings move, and all energies, are the authors' recorded numbers. "
            "Traversals and buffers are counted in a run of each cascade."
        ),
        settings=settings,
        run_cell=run_cell,
        checks=_checks(lengths),
        needs=_needs(lengths),
        left_out=(
            "area, and energies of machines other than the recorded ones: they come from component tables, not from cycles",
            "the search for the unfused and FLAT mappings: what they move is loaded",
        ),
        timings=frozenset({"this processor", f"machine {THIS_PROCESSOR}"}),
        smoke={"lengths": [16, 32, 48, 64, 96], "tiles": [1, 2, 3], "seconds": 0.01},
        seeds=2,
        seconds=0.2,
        more_seconds={"this processor": 5.0, f"machine {THIS_PROCESSOR}": 2.0},
        protocol=2,
    )


def _given_machine(given: str) -> str | dict[str, Any] | None:
    """The fields of a machine given by its name or as a YAML file, or ``this-processor``; None for any other file."""
    if given == THIS_PROCESSOR:
        return given
    return _fields(given) if given in MACHINES or Path(given).suffix in (".yaml", ".yml") else None


def _fields(machine: str) -> dict[str, Any]:
    return dataclasses.asdict(read_machine(machine))


def _given_cascade(given: str) -> str:
    """The text of a user's cascade, after parsing it. Errors name the file as it was given."""
    try:
        text = Path(given).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        names = (*MACHINES, THIS_PROCESSOR)
        why = "cannot be read as text" if Path(given).exists() else "does not exist"
        raise Unsupported(
            f"file {given!r}, which {why}",
            supported=f"a cascade (.txt), a machine (.yaml), {', '.join(names)}",
            nearest=closest(Path(given).name, names),
        ) from None
    try:
        parse(text, Path(given).stem)
    except Unsupported as error:
        raise Unsupported(f"{given}: {error.asked}", supported=error.supported, nearest=error.nearest) from None
    return text


def _ratio(over: str, under: str, what: str = "seconds", whole: bool = False) -> Any:
    """The mean ratio of two designs, over models and lengths; with `whole`, for a layer with its projections."""

    def value(seed: Seed) -> float:
        ratios = []
        for model in WORKLOADS:
            cells = seed[f"designs {model}"]
            top, bottom = cells[f"{over} {what}"], cells[f"{under} {what}"]
            if whole:
                top = _sum(top, cells[f"projections {_machine_name(over)} {what}"])
                bottom = _sum(bottom, cells[f"projections {_machine_name(under)} {what}"])
            ratios += [a / b for a, b in zip(top, bottom, strict=True)]
        return statistics.mean(ratios)

    return value


def _machine_name(design: str) -> str:
    return "flat" if design == "flat" else "fusemax"


def _sum(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(first, second, strict=True)]


def _all_designs(what: str, design: str) -> Any:
    return lambda seed: min(value for model in WORKLOADS for value in seed[f"designs {model}"][f"{design} {what}"])


def _checks(lengths: Sequence[int]) -> tuple[Check, ...]:
    keys = lengths[-1] / lengths[0]

    def grows(name: str) -> Any:
        return lambda seed: seed[f"buffer {name}"]["high_water"][-1] / seed[f"buffer {name}"]["high_water"][0]

    return (
        Check("attention with interleaved tiles is at least 6.7 times as fast as FLAT (mean)", _ratio("flat", "binding"), above=6.7),
        Check("... a whole layer at least 5.3 times", _ratio("flat", "binding", whole=True), above=5.3),
        Check("... with at most 79 % of the energy for attention", _ratio("binding", "flat", "energy"), below=0.79),
        Check("... and 83.5 % for a whole layer", _ratio("binding", "flat", "energy", True), below=0.835),
        Check("the one-pass cascade alone, on FLAT's machine, is no faster", _ratio("flat", "cascade"), below=1.0),
        Check("the lanes are busy more than 99 % of the time", _all_designs("util_1d", "binding"), above=0.99),
        Check("the cells are busy more than 85 % of the time", _all_designs("util_2d", "binding"), above=0.85),
        Check("the buffer of one pass does not grow with the keys", grows("one_pass"), below=1.001),
        Check("the buffer of three passes grows by half of what they do or more", grows("three_pass"), above=keys / 2),
        Check(
            "interleaving ends within a tile of the formula",
            lambda seed: (seed["schedule"]["interleaved"][-1] - seed["schedule"]["formula"][-1])
            * seed["schedule"]["tiles"][-1]
            / seed["schedule"]["in turn"][0],
            below=1.0,
        ),
    )  # fmt: skip


def _needs(lengths: Sequence[int]) -> tuple[Check, ...]:
    return (
        Check(
            "all cascades of softmax are scaled dot-product attention in float64",
            lambda seed: max(seed[f"buffer {name}"]["off"] for name in SHIPPED),
            below=1e-12,
        ),
        Check(
            "times, bytes and utilisation are those of the authors' tables",
            lambda seed: max(seed[f"designs {model}"][f"{design} off"] for model in WORKLOADS for design in DESIGNS),
            below=1e-12,
        ),
    )


def _refuses(name: str) -> str | None:
    return "a cascade is written for one set of options: give the name alone" if ":" in name else None


STUDY = Study(
    name="attention-passes",
    question="How many times does an attention algorithm have to walk over its keys, and what does that cost on a machine?",
    make=make,
    sections=sections,
    presets=("tiny", "small"),
    mechanisms=tuple(list_mechanisms()),
    refuses=_refuses,
    takes_data=f"cascades (.txt), and machines (.yaml, or {', '.join(MACHINES)}, {THIS_PROCESSOR})",
)
