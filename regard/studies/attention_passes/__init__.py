"""How many times an attention algorithm has to walk over its keys, and what that costs (FuseMax, arXiv 2406.10491).

An algorithm is written as a text, a cascade of Einsums (:func:`parse`). :func:`passes` counts the fewest traversals of
the keys that any mapping needs, :func:`run_cascade` runs the cascade in tiles and counts the numbers read, written and
held, and :func:`cost` estimates its cost on a machine with two arrays. The study does all three for the mechanisms of
the catalogue, compares the paper's five designs, and compares a prediction for this processor with the times of the
native kernels.

    >>> from regard.studies.attention_passes import parse, passes
    >>> passes(parse(\"\"\"
    ... inputs: Q[e, p], K[e, m], V[f, m]
    ... S[m, p] = Q[e, p] * K[e, m]
    ... W[m, p] = sigmoid(S[m, p])
    ... O[f, p] = W[m, p] * V[f, m]
    ... \"\"\")).count
    1
"""

from __future__ import annotations

from regard.studies.attention_passes.accelerator import estimate, shipped
from regard.studies.attention_passes.analysis import Passes, min_traffic, passes
from regard.studies.attention_passes.executor import Run, run_cascade
from regard.studies.attention_passes.language import Cascade, parse
from regard.studies.attention_passes.machine import Machine, cost, read_machine, this_processor
from regard.studies.attention_passes.mechanisms import cascade_of
from regard.studies.attention_passes.scheduling import schedule
from regard.studies.attention_passes.study import STUDY

__all__ = [
    "STUDY", "Cascade", "Machine", "Passes", "Run", "cascade_of", "cost", "estimate", "min_traffic", "parse", "passes",
    "read_machine", "run_cascade", "schedule", "shipped", "this_processor",
]  # fmt: skip
