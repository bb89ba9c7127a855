"""Scan and snap (Tian et al., arXiv 2305.16380): what a layer of attention looks at as it learns, and when it freezes.

The paper (abstract): one softmax layer and a linear decoder, trained on next tokens without positions, begin with uniform attention
and scan: attention leaves tokens that occur with many next tokens for those that occur with one, among which the more
frequent win over the rarer; before the winner takes all, attention freezes (snaps), the earlier the faster the decoder
learns.

Here: the generator of the paper's code (:mod:`facts`), the layer with exact gradients (:mod:`layer`), descent on finite
contexts and the differential equation of infinitely long ones (:mod:`runs`), and real text (:mod:`text`), read by
softmax and any mechanism that returns its weights, and monitored as `regard train --monitor attention` monitors any
run. All in float64 except the text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

from regard.contract import Paper
from regard.reproductions.framework.judging import Check, Seed, largest, measured, number, numbers, smallest, within
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.studies.framework.protocol import Chosen, Study
from regard.studies.training_dynamics.cells import FORMS, run_cell
from regard.studies.training_dynamics.shown import sections
from regard.studies.training_dynamics.text import CONTROL, on_text_of, refuses
from regard.tasks import create_task
from regard.tasks.documents import read_documents

LENGTH = 35
"""Tokens in a window of text, as in the paper's code for WikiText."""

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"lasts": (1, 3), "rates": (1.0,), "ratios": [1, 2, 5, 10], "batches": [8, 64, 512], "seeds": 3},
    "small": {
        "lasts": (1, 3, 5, 10),
        "rates": (0.5, 1.0, 2.0, 3.0),
        "ratios": [1, 2, 5, 10],
        "batches": [8, 32, 128, 512, 2048],
        "seeds": 10,
    },
}
TEXTS: dict[str, dict[str, Any]] = {
    "tiny": {"tokenizer": "bytes", "dim": 64, "steps": 300},
    "small": {"tokenizer": "bpe:1024", "dim": 200, "steps": 3000},
}

SECONDS = {"tiny": {"following": 1.0, "text": 3.0}, "small": {"following": 6.0, "text": 50.0}}
"""Seconds for the cells that take longer than those of the sweep."""


def make(chosen: Chosen) -> Reproduction:
    """The reproduction: the paper's layer and its limit, the sweep of learning rates, and text from the user's files or
    Python's standard library."""
    sizes = PRESETS[chosen.preset]
    entered = dict.fromkeys((CONTROL, *chosen.mechanisms))
    text = {
        "cell": "text",
        "data": list(chosen.data),
        "digest": _digest(chosen.data),
        "length": LENGTH,
        "rate": 5.0,
        "ratio": 2.0,
        "epochs": 10,
        "batch_size": 20,
        **TEXTS[chosen.preset],
    }
    seconds = SECONDS[chosen.preset]
    texts = {on_text_of(name): text | ({} if name == CONTROL else {"mechanism": name}) for name in entered}
    sweeps = {
        _sweep(last, rate): {
            "cell": "sweep",
            "num_last": last,
            "num_next": 2,
            "rate": rate,
            "ratios": sizes["ratios"],
            "steps": 100,
        }
        for last in sizes["lasts"]
        for rate in sizes["rates"]
    }
    run: dict[str, Any] = {"num_last": 2, "num_next": 1}
    settings: dict[str, Setting] = {
        "exactness": {"cell": "exactness", "steps": 100},
        "run": {"cell": "figure", **run, "steps": 100, "rate": 1.0, "ratio": 1.0},
        "biases": {"cell": "biases", **run, "steps": 100, "parts": 2, "rate": 0.5, "ratio": 10.0},
        "following": {
            "cell": "following",
            "num_last": 2,
            "num_next": 2,
            "steps": 240,
            "parts": 4,
            "rate": 0.05,
            "ratio": 5.0,
            "length": 4096,
            "batches": sizes["batches"],
        },
        **sweeps,
        **texts,
    }
    return Reproduction(
        name="training-dynamics",
        mechanisms=("softmax",),
        source=Paper(
            "Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer",
            "2305.16380",
            2023,
            53,
        ),
        claim=(
            "Attention leaves common tokens for distinct ones, in the order of how often they occur, and freezes before the winner "
            "takes all, the earlier the faster the decoder learns (abstract)."
        ),
        instead=(
            "The paper's model and generator from its code's settings: 2 last tokens, contexts of 127 tokens, batches of 128, 100 "
            "steps of SGD with momentum 0.9. The limit's equation by Euler beside SGD without momentum on contexts of 4096. The "
            f"sweep: last tokens {', '.join(map(str, sizes['lasts']))}, rates of z "
            f"{', '.join(f'{rate:g}' for rate in sizes['rates'])}. Text: "
            f"{'yours' if chosen.data else 'sources of the standard library of Python, in place of WikiText'}, read by one layer of "
            f"{', '.join(entered)}; expectations are about softmax."
        ),
        settings=settings,
        run_cell=run_cell,
        checks=(
            Check("common tokens lose attention: what they keep of it", _kept, below=0.9),
            Check("pairs of distinct tokens in the order of their chances", measured("run", "in order"), above=0.95),
            Check("no winner takes all: entropy at the end, in nats", measured("run", "last entropy"), above=1.0),
            Check("attention freezes: change at the end over the fastest", measured("run", "still"), below=0.1),
            Check(
                "common tokens fall in the limit: share of signs", measured("biases", "common tokens fall"), above=0.99
            ),
            Check(
                "distinct tokens rise in the limit: share of signs",
                measured("biases", "distinct tokens rise"),
                above=0.99,
            ),
            Check(
                "growth of distinct tokens goes with f²: correlation", measured("biases", "growth as f²"), above=0.95
            ),
            Check("SGD nears the limit with its batch: error of the largest over the smallest", _nearer, below=0.5),
            *(
                Check(f"{name}: entropy rises with the ratio of the rates", measured(name, "rise"), above=0.0)
                for name in sweeps
            ),
            Check("a larger ratio freezes earlier, in steps, over the sweep", _earlier(tuple(sweeps)), above=0.0),
            Check("text: attention slows: change at the end over the fastest", _still_on_text, below=0.2),
            Check("text: no winner takes all: entropy at the end, of 1", measured("text", "last entropy"), above=0.1),
        ),
        needs=(
            Check("gradients are those of automatic differentiation", _largest("gradient: "), below=1e-12),
            Check("SGD conserves the sums of z", _largest("conserved: "), below=1e-10),
            Check("Adam and weight decay do not", _least_broken, above=1e-3),
            Check("the run is learned: its last loss", measured("run", "last loss"), below=0.01),
            Check("text: the loss falls", within("text", "last loss", "first loss"), below=-1.0),
        ),
        left_out=(
            "the constant of the moment of freezing, of which the order alone is given: the moments are in the table",
            "that attention leaves frequent tokens on WikiText: no token of a text occurs with one next token alone, so the text's "
            "section tells how the most frequent ones fare, and nothing is judged by it",
        ),
        smoke={
            "steps": 4,
            "parts": 1,
            "batches": [2, 4],
            "length": 16,
            "ratios": [1, 2],
            "dim": 8,
            "batch_size": 2,
            "tokenizer": "bytes",
        },
        seeds=sizes["seeds"],
        more_seeds=dict.fromkeys(texts, 3),
        seconds=0.2 if chosen.preset == "tiny" else 0.6,
        more_seconds={"exactness": 2.5, **dict.fromkeys(texts, seconds["text"]), "following": seconds["following"]},
    )


def _sweep(last: int, rate: float) -> str:
    return f"{last} last, rate {rate:g}"


def _digest(files: tuple[str, ...]) -> str:
    """A digest of the user's documents. Creates the text task once, so that it refuses bad documents early."""
    if not files:
        return ""
    create_task("text", data=list(files), length=LENGTH)
    found = hashlib.blake2b(digest_size=16)
    for document in read_documents(list(files), "text")[0]:
        found.update(document.digest)
    return found.hexdigest()


def _kept(seed: Seed) -> float:
    return number(seed, "run", "last common") / number(seed, "run", "first common")


def _nearer(seed: Seed) -> float:
    return number(seed, "following", "largest") / number(seed, "following", "smallest")


def _largest(prefix: str) -> Callable[[Seed], float]:
    return lambda seed: largest(number(seed, "exactness", f"{prefix}{name}") for name in FORMS)


def _least_broken(seed: Seed) -> float:
    return smallest(number(seed, "exactness", f"changed by: {name}") for name in ("Adam", "SGD, weight decay"))


def _earlier(names: tuple[str, ...]) -> Callable[[Seed], float]:
    return lambda seed: sum(number(seed, name, "earlier") for name in names) / len(names)


def _still_on_text(seed: Seed) -> float:
    changes = numbers(seed, "text", "change")
    fastest = largest(changes)
    return changes[-1] / fastest if fastest else math.nan


STUDY = Study(
    name="training-dynamics",
    question="What does a layer of attention look at while it learns, and when does it stop moving?",
    make=make,
    sections=sections,
    presets=tuple(PRESETS),
    mechanisms=(CONTROL,),
    refuses=refuses,
    takes_data="a text file or a folder of them, in place of the standard library's sources",
)
