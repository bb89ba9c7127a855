"""Measures how good the advice of `regard advise` is on this machine, which should be idle.

    python benchmarks/advise.py                # both parts; the same command continues where it stopped
    python benchmarks/advise.py errors         # predictions against `regard profile --layer` at five other lengths
    python benchmarks/advise.py questions      # the 60 questions of benchmarks/advise_questions.json
    python benchmarks/advise.py --busy         # while another process keeps one core busy
    python benchmarks/advise.py --fresh        # ignores all earlier measurements
    python benchmarks/advise.py generate       # writes the questions again from their seed

`regard profile --layer` at the lengths asked for determines the best mechanism, among all that qualify and take at most
three times as long as the fastest in a single call. A question counts as answered well when the recommended mechanism
qualifies and, by the same measurement, costs at most a tenth more than the best that qualifies; or when nothing qualifies
and the advice says so. The goals: time within 15 % (median) and 40 % (worst), memory within 10 %, 90 % of the questions, in
each of three runs and also while another process is running.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from neighbour import neighbour

from regard.catalogue import get_mechanism
from regard.contract import Pattern
from regard.measurement.memory import keep_freed_memory
from regard.measurement.timing import calm_clock
from regard.workbench.advice.advise import advise
from regard.workbench.advice.candidates import able_mechanisms
from regard.workbench.advice.check import check, profiled
from regard.workbench.advice.needs import find
from regard.workbench.advice.samples import LayerMeasure, room
from regard.workbench.advice.settings import USES, AdviseSettings

QUESTIONS = Path(__file__).parent / "advise_questions.json"
SEED, COUNT = 20260101, 60
PROBE_SECONDS = 15.0
NEAR = 1.10
SCREENED = 3.0
"""Only mechanisms whose single call takes at most this many times as long as the fastest are profiled."""


def generate() -> list[dict[str, Any]]:
    """Draw the questions; the same seed gives the same ones."""
    rng = np.random.default_rng(SEED)

    def one_of(choices: list[Any], weights: list[float] | None = None) -> Any:
        chances = None if weights is None else np.array(weights) / sum(weights)
        return choices[int(rng.choice(len(choices), p=chances))]

    found = []
    while len(found) < COUNT:
        pattern = one_of([p.value for p in Pattern], [2, 4, 1, 1])
        use = one_of(list(USES))
        if use == "serve" and pattern == "noncausal-self":
            continue
        dim, heads = one_of([(256, 4), (256, 8), (512, 8)])
        count = one_of([1, 2], [3, 1])
        lengths = sorted(round(2**x) for x in rng.uniform(5.5, 14, count))
        needs = one_of(
            [[], ["recall"], ["keep-all"], ["order"], ["constant-state"], ["exact"], ["weights"], ["bias"]],
            [6, 2, 1, 2, 2, 1, 1, 1],
        )
        # a few numbers for each token and feature in training or inference, part of a full cache in serving
        unit = 4 * lengths[-1] * dim * (1 if use == "serve" else 8)
        memory = one_of([None, int(unit * 2 ** rng.uniform(-2, 2))], [2, 1])
        question = {"pattern": pattern, "lengths": lengths, "use": use, "needs": needs, "memory": memory}
        found.append({**question, "dim": dim, "heads": heads})
    return found


@dataclass
class Answered:
    """One question: the recommended mechanism, the best one, and the ratio of their times."""

    question: dict[str, Any]
    pick: str | None
    best: str | None
    ratio: float | None

    @property
    def good(self) -> bool:
        if self.pick is None or self.best is None:
            return self.pick == self.best
        return self.ratio is not None and self.ratio <= NEAR


def screened(layers: LayerMeasure, what: str, length: int, names: Sequence[str]) -> list[str]:
    """The mechanisms that fit in memory and whose single call is fast enough that they may be the best."""
    seconds, clock = {}, calm_clock()
    for name in names:
        cost = get_mechanism(name).cost(layers.settings.shape(length), get_mechanism(name).options())
        if 4 * cost.memory > room():
            continue
        action = layers.work(name).action(what, length)
        action()
        started = clock()
        action()
        seconds[name] = clock() - started
    return [name for name in seconds if seconds[name] <= SCREENED * min(seconds.values())]


def answer(question: dict[str, Any], *, fresh: bool = False) -> Answered:
    """Ask for advice, then measure every mechanism that meets the needs and may be the best."""
    asked = dict(question)
    settings = AdviseSettings(
        lengths=tuple(asked.pop("lengths")),
        needs=tuple(asked.pop("needs")),
        pattern=Pattern(asked.pop("pattern")),
        what=(),
        seconds=PROBE_SECONDS,
        **asked,
    )
    pick = advise(settings, fresh=fresh).pick
    what, lengths = settings.deciding, settings.lengths
    able, _, layers = able_mechanisms(settings)
    names = [
        name
        for name in able[what]
        if all(find(need, name, settings.pattern, lengths[-1]).holds for need in settings.needs)
    ]
    for n in lengths:
        close = screened(layers, what, n, names)
        names = [name for name in names if name == pick or name in close]
    times: dict[str, float] = {}
    samples = {
        n: profiled(settings.layer, what, n, names, fresh=fresh and n == lengths[0], seconds=0.5)
        for n in lengths
        if names
    }
    for name in names:
        own = [samples[n][name] for n in lengths]
        if settings.memory is None or max(s.memory + s.state for s in own) <= settings.memory:
            times[name] = float(np.exp(np.mean([np.log(s.seconds) for s in own])))
    best = min(times, key=times.__getitem__, default=None)
    ratio = times[pick] / times[best] if pick in times and best is not None else None
    return Answered(question, pick, best, ratio)


def ask_all(deadline: float, *, fresh: bool) -> bool:
    """Answer the questions, print each and the share answered well; return False if time ran out."""
    questions = json.loads(QUESTIONS.read_text())
    answered = []
    for i, question in enumerate(questions):
        if time.monotonic() > deadline:
            print(f"The time is over after {i} of {len(questions)} questions; give the same command again to resume.")
            break
        found = answer(question, fresh=fresh)
        answered.append(found)
        ratio = "" if found.ratio is None else f", {found.ratio:.2f} times the best"
        mark = "good" if found.good else "BAD "
        print(f"{mark} {i + 1:2d} {json.dumps(question)}: {found.pick}; best {found.best}{ratio}", flush=True)
    good = sum(a.good for a in answered)
    share = f" ({good / len(answered):.0%})" if answered else ""
    print(f"{good} of {len(answered)} questions answered well{share}")
    return len(answered) == len(questions)


def show_errors(deadline: float, *, fresh: bool) -> None:
    """Print the errors of the predictions made in the default setting of `regard advise`."""
    settings = AdviseSettings(use="train", seconds=min(150.0, max(1.0, deadline - time.monotonic())))
    for e in check(settings, fresh=fresh, say=print):
        of = "time" if e.of == "seconds" else "memory"
        print(
            f"{e.what:9} {of:7} median {e.median:6.1%}  worst {e.worst:6.1%}  ({e.where}; {e.count} predictions"
            + ("" if e.inside is None else f", {e.inside:.0%} in their intervals")
            + ")",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=("all", "errors", "questions", "generate"))
    parser.add_argument("--minutes", type=float, default=30.0, help="start nothing new after this time")
    parser.add_argument("--busy", action="store_true", help="keep one core busy meanwhile")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    arguments = parser.parse_args()
    if arguments.part == "generate":
        QUESTIONS.write_text("[\n" + ",\n".join(f"  {json.dumps(q)}" for q in generate()) + "\n]\n")
        return
    keep_freed_memory()
    deadline = time.monotonic() + 60 * arguments.minutes
    with neighbour() if arguments.busy else nullcontext():
        if arguments.part in ("all", "errors"):
            show_errors(deadline, fresh=arguments.fresh)
        if arguments.part in ("all", "questions") and not ask_all(deadline, fresh=arguments.fresh):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
