"""The Comprehensive Attention Benchmark (Zhang et al., arXiv 2210.07661) for any mechanism.

Seven tasks of real data, each with a backbone in which the attention of one of four patterns is replaced at a time; scores
on one scale, the compositional index, with ranks beside it; from which length on a mechanism is cheaper than softmax
attention; whether patterns agree about mechanisms; what a backbone is without attention; and what text of other lengths
than those of training costs in perplexity.

The backbones, steps and data are small: signs and places may be asked of them, not the paper's figures.
"""

from __future__ import annotations

from regard.studies.cab.cells import PRESETS, make, refuses
from regard.studies.cab.showing import sections
from regard.studies.framework.protocol import Study

STUDY = Study(
    name="cab",
    question="In which pattern of attention does a mechanism do well, on which tasks, and from which length is it cheaper?",
    make=make,
    sections=sections,
    presets=tuple(PRESETS),
    mechanisms=("softmax", "local", "abc", "performer", "long_short", "s4d"),
    refuses=refuses,
    takes_data="scores of one model in CAB's own form (a line of numbers for each pattern), set beside its leaderboard",
)
