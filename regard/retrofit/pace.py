"""Turning a budget into numbers of steps and blocks, before anything is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from regard.contract import Unsupported
from regard.measurement import units
from regard.retrofit.hosts import Host
from regard.retrofit.important import passes
from regard.retrofit.sensitivity import rounds
from regard.retrofit.settings import RetrofitSettings
from regard.retrofit.transfer import transfer_losses
from regard.retrofit.tune import prepare, tune_losses

LEAST = 8
"""The least number of steps of a training stage."""
BLOCKS = (2, 32)
"""The least and the most blocks of each text in the evaluation."""
TRIED = 4
"""The most held-out blocks for judging a stage and for measuring sensitivity."""
PROBES = (3, 8)
"""The least and the most texts of each probe of what a language model finds, at each length."""
PROBING = 0.05
"""The share of a budget for these texts, above the least."""
PASSES = 4
"""Passes over a block that a training step of the whole model takes: the teacher's, and three for the student's gradients."""
SHARES = {"warm": 0.1, "sensitivity": 0.1, "transfer": 0.2, "tune": 0.45, "evaluation": 0.15}
"""Shares of a time budget."""
LOOKING = 0.1
"""The share of a training stage's time that is spent on held-out data."""
WORK = {"warm": 0.15, "transfer": 0.25, "tune": 0.6}
"""Shares of a budget of tokens or steps."""


@dataclass(frozen=True)
class Plan:
    """How much of everything is done.

    Attributes:
        warm: steps of all layers before their sensitivity is measured; 0 if the kept layers are given.
        tried: held-out blocks for each layer's sensitivity.
        transfer, tune: steps of these stages; 0 if a stage is left out.
        windows: blocks of each text in the evaluation.
        probes: texts of each probe at each length in the evaluation, of a language model.
        seconds: planned time of each stage; empty for a budget of tokens or steps.
        changeable: the layers that can get new attention.
    """

    warm: int
    tried: int
    transfer: int
    tune: int
    windows: int
    probes: int
    seconds: dict[str, float]
    changeable: list[int]

    def record(self) -> dict[str, Any]:
        """The plan as plain data, for the folder."""
        return asdict(self)

    def after(self, stage: str) -> float:
        """Seconds planned for the stages after the given one."""
        names = list(SHARES)
        return sum(self.seconds.get(name, 0.0) for name in names[names.index(stage) + 1 :])


def plan(
    host: Host,
    data: Any,
    settings: RetrofitSettings,
    spent: float = 0.0,
    changeable: list[int] | None = None,
    stages: Sequence[str] | None = None,
) -> Plan:
    """Plan how to spend a budget.

    Args:
        spent: seconds that the command has taken so far.
        changeable: the layers that can get new attention; all but those given as kept when None.
        stages: the training stages; those of the settings when None.

    Raises:
        Unsupported: for a budget that is too small for a stage, suggesting one that is large enough.
    """
    budget = settings.budget
    if changeable is None:
        changeable = settings.changeable(len(host.layers))
    if stages is None:
        stages = settings.stages
    if budget.unit != "seconds":
        return _of_work(host, settings, changeable, stages)
    pace = measure_pace(host, data, settings, changeable, stages)
    left_out = {"warm", "transfer", "tune"} - set(stages) | (set() if settings.chosen else {"sensitivity"})
    shares = {k: v for k, v in SHARES.items() if k not in left_out}
    whole = sum(shares.values())
    probed = host.probed(settings) * pace["block"]
    spent += pace["probe"] + (host.timed(settings) + passes(host, settings)) * pace["block"] + PROBES[0] * probed
    left = budget.amount - spent
    seconds = {name: max(left, 0.0) * share / whole for name, share in shares.items()}
    steps = {name: math.floor((1 - LOOKING) * seconds[name] / pace[name]) for name in stages}
    measured, read = sum(rounds(len(changeable), settings)), host.evaluated * len(data.sources)
    tried = math.floor(seconds.get("sensitivity", 0.0) / (pace["block"] * (measured + 1)))
    windows = math.floor(0.5 * seconds["evaluation"] / (pace["block"] * read))
    needed: dict[str, float] = {name: LEAST * pace[name] / (1 - LOOKING) for name in stages}
    needed["evaluation"] = 2 * min(BLOCKS[0], settings.evaluation_blocks or BLOCKS[0]) * pace["block"] * read
    if settings.chosen:
        needed["sensitivity"] = pace["block"] * (measured + 1)
    short = {name: need for name, need in needed.items() if need > seconds[name]}
    if short:
        name = max(short, key=lambda n: short[n] / shares[n])
        least = spent + max(need / shares[n] for n, need in needed.items()) * whole
        raise Unsupported(
            f"a budget of {budget}, which leaves only {units.duration(seconds[name])} for {WORDS[name]}",
            supported=f"{units.duration(1.1 * least)} or more for this model, with {_step(host, settings)}",
            nearest=f"{math.ceil(1.2 * least / 60)}m",
        )
    return Plan(
        steps.get("warm", 0),
        min(tried, TRIED),
        steps.get("transfer", 0),
        steps["tune"],
        min(windows, settings.evaluation_blocks or BLOCKS[1]),
        _probes(settings, PROBING * budget.amount, probed),
        seconds,
        changeable,
    )


WORDS = {
    "warm": "the first steps of all layers",
    "sensitivity": "the sensitivity of each layer",
    "transfer": "the attention transfer",
    "tune": "the training of the whole model",
    "evaluation": "the evaluation",
}


def _step(host: Host, settings: RetrofitSettings) -> str:
    """Describe a step in words."""
    if host.counts != "tokens":
        return f"{settings.rows} {host.counts} a step"
    return f"blocks of {settings.block} tokens and {settings.rows} a step"


def _of_work(host: Host, settings: RetrofitSettings, changeable: list[int], stages: Sequence[str]) -> Plan:
    budget, tokens = settings.budget, host.work(settings)
    steps = math.floor(budget.amount / tokens) if budget.unit == "tokens" else round(budget.amount)
    shares = {name: WORK[name] for name in stages}
    whole = sum(shares.values())
    counts = {name: math.floor(steps * share / whole) for name, share in shares.items()}
    name = min(counts, key=lambda n: counts[n])
    if counts[name] < LEAST:
        least = math.ceil(LEAST / min(shares.values()) * whole)
        needed = f"{least} steps" if budget.unit == "steps" else f"{units.count(least * tokens)} tokens"
        raise Unsupported(
            f"a budget of {budget}, which is {units.counted(counts[name], 'step')} of {WORDS[name]}",
            supported=f"{needed} or more with {_step(host, settings)}",
            nearest=f"{least} steps",
        )
    windows = settings.evaluation_blocks or BLOCKS[1]
    tried = min(TRIED, windows) if settings.chosen else 0
    probes = _probes(settings, PROBING * PASSES * steps * settings.rows, host.probed(settings))
    return Plan(
        counts.get("warm", 0), tried, counts.get("transfer", 0), counts["tune"], windows, probes, {}, changeable
    )


def _probes(settings: RetrofitSettings, amount: float, each: float) -> int:
    """How many texts of each probe are read, if one of each takes `each` of an amount to spend on them."""
    afforded = math.floor(amount / each) if each else 0
    return min(max(afforded, PROBES[0]), settings.evaluation_blocks or PROBES[1], PROBES[1])


def measure_pace(
    host: Host, data: Any, settings: RetrofitSettings, changeable: list[int], stages: Sequence[str]
) -> dict[str, float]:
    """Measure, on throwaway copies, the seconds of a step of each stage and of one forward pass over the original (on a
    block, or a batch of images)."""
    started, precision = time.monotonic(), settings.precision
    row = host.batch(data, 0, settings.seed, settings, host.rows)
    times = 1 if host.rows is None else math.ceil(settings.rows / host.rows)
    kept = settings.kept(len(host.layers))
    others = len(host.layers) - len(changeable)
    numbers = changeable[max(kept - others, 0) :] if isinstance(kept, int) else changeable
    found: dict[str, float] = {}
    with torch.no_grad():
        found["block"] = _seconds(lambda: host.answers(host.model, row))
    student, _ = host.copy_with(changeable, settings.mechanism, settings.seed)
    modules = {} if settings.inserts else {n: student.get_submodule(host.layers[n].path) for n in changeable}
    if "warm" in stages:
        found["warm"] = _seconds(lambda: transfer_losses(host, modules, row.inputs, precision=precision)) * times
    if "transfer" in stages:
        some = {n: modules[n] for n in numbers}
        found["transfer"] = _seconds(lambda: transfer_losses(host, some, row.inputs, precision=precision)) * times
    unload = prepare(host, student, changeable, settings)
    found["tune"] = _seconds(lambda: tune_losses(host, student, row, settings.distil, precision=precision)) * times
    found["tune"] += _seconds(lambda: _update(student))
    del unload
    found["probe"] = time.monotonic() - started
    return found


def _update(student: Any) -> None:
    """Stand-in for an optimizer step: a few passes over the weights and their gradients."""
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                torch.addcmul(parameter, parameter.grad, parameter.grad).sqrt_()


def _seconds(run: Callable[[], object]) -> float:
    """The time of the second run, which has no one-time costs."""
    run()
    started = time.monotonic()
    run()
    return time.monotonic() - started
