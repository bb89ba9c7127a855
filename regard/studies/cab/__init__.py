"""The Comprehensive Attention Benchmark (Zhang et al., arXiv 2210.07661) for any mechanism.

Seven tasks on real data, each with a backbone whose attention is replaced in one of four patterns at a time. The study
reports scores on one scale (the compositional index) and ranks; the length from which a mechanism is cheaper than
softmax attention; whether patterns agree about mechanisms; how good a backbone is without attention; and the perplexity
at other text lengths than that of training.

Backbones, training and data are small: compare signs and ranks with the paper, not figures.
"""

from __future__ import annotations

from regard.studies.cab.cells import PRESETS, make, refuses
from regard.studies.cab.own_data import READERS
from regard.studies.cab.showing import sections
from regard.studies.framework.protocol import Study

STUDY = Study(
    name="cab",
    question="In which pattern of attention does a mechanism do well, on which tasks, and from which length is it cheaper?",
    make=make,
    sections=sections,
    presets=tuple(PRESETS),
    mechanisms=(
        "softmax",
        "local",
        "abc",
        "nystrom",
        "performer",
        "lara",
        "cosformer",
        "probsparse",
        "s4d",
        "long_short",
    ),
    refuses=refuses,
    takes_data=(
        "data for its tasks, as LM=novel.txt or LSTF=load.csv,target=load ("
        + "; ".join(f"{task}: {reader.holds}" for task, reader in READERS.items())
        + "); and scores of one model in CAB's own form (a line of numbers for each pattern), set beside its leaderboard"
    ),
)
