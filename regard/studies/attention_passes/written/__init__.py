"""The mechanisms of the catalogue as cascades, each compared with its definition, or the reason why there is none.

Inputs are named as in the mechanism; batch and head axes are not written. Queries have the rank p, keys m, and
`scale[]` is the factor of the scores. If a mechanism ends in a softmax, its cascade is the one-pass form, the best
known. A plugin brings its cascade as a string ``CASCADE`` in its file.
"""

from __future__ import annotations

from regard.studies.attention_passes.written.pairs import PAIRS
from regard.studies.attention_passes.written.parts import Written
from regard.studies.attention_passes.written.summaries import SUMMARIES
from regard.studies.attention_passes.written.sums import SUMS

__all__ = ["REASONS", "WRITTEN", "Written"]

WRITTEN: dict[str, Written] = {**PAIRS, **SUMMARIES, **SUMS}

CHOOSES = "it chooses keys or queries by their data (the largest few, sorting, hashing), for which the language has no operation"

REASONS: dict[str, str] = {
    **dict.fromkeys(("bilevel_routing", "hard_softmax", "moba", "probsparse", "reformer", "routing", "sea"), CHOOSES),
    "landmark": (
        "none is written: its inner softmaxes are over blocks of keys, while the language has tiles of any size; with masks for "
        "blocks, each block would be computed from all keys"
    ),
    "sinkhorn": (
        "none is written: it mixes blocks place by place; with masks for blocks and places, each place would be computed from all keys"
    ),
    "nystrom": (
        "none is written: its pseudoinverse multiplies a matrix by itself, for which the language needs a copy with other ranks each time"
    ),
    "bidirectional_mamba": "it scans along several paths; each of them is mamba's cascade",
    "large_kernel": (
        "none is written: its convolutions read few neighbours, by offset; as matrices over all pairs they would be another algorithm"
    ),
    "activator": "as published it mixes no tokens",
    "ninformer": "a network around mlp_mixer, whose cascade its mixing is",
    "funnel": "an encoder of several layers, each of them softmax",
    "mixture_of_heads": "a wrapper: its class is that of the mechanism it wraps",
}
