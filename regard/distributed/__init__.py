"""One sequence over several ranks: exact softmax attention, and states passed on (arXiv 2302.06218, and own design).

- :mod:`regard.distributed.attention`: softmax attention by four schedules, defined in
  :mod:`regard.distributed.schemes`;
- :mod:`regard.distributed.recurrence`: recurrent mechanisms, whose states combine as :mod:`regard.distributed.states`
  says;
- :mod:`regard.distributed.context_parallel`: language models on sequences split over ranks;
- :mod:`regard.distributed.together`: processes that train one model, by copies, shards or pieces of its sequences;
- :mod:`regard.distributed.streaming`: keys and values in files;
- :mod:`regard.distributed.plans`: closed-form costs of the schedules;
- :mod:`regard.distributed.layouts`: which rank has which tokens;
- :mod:`regard.distributed.communicators`: ranks of `torch.distributed`, and virtual ones in one process.

Deviations: the paper says that exact attention was distributed, but not how; the schedules here are the usual exact
ones.
"""

from __future__ import annotations

from regard.distributed.attention import DistributedAttention
from regard.distributed.communicators import Traffic
from regard.distributed.context_parallel import ContextParallel
from regard.distributed.layouts import Layout
from regard.distributed.plans import Plan, plan
from regard.distributed.recurrence import DistributedRecurrence
from regard.distributed.streaming import attend_million
from regard.distributed.together import train_together

__all__ = [
    "ContextParallel",
    "DistributedAttention",
    "DistributedRecurrence",
    "Layout",
    "Plan",
    "Traffic",
    "attend_million",
    "plan",
    "train_together",
]
