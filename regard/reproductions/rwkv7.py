"""RWKV-7 (Peng et al., arXiv 2503.14456): a memory that replaces what it holds recalls more than one that fades and adds.

The paper (abstract): RWKV-7 generalises the delta rule with gates and in-context learning rates that are vectors, tracks
states and recognises all regular languages; language models of up to 2.9B parameters are as good as others of their size
with fewer tokens. Its predecessors, as gated linear attention, add to a memory that decays.

Here: the task of the delta rule's reproduction, multi-query associative recall in which every key is written twice and
the last value counts: 32 writes under 16 keys, then 32 queries in 128 tokens, 2 layers of width 64 with one head of 8
key features, so that the state is the bottleneck. Gated linear attention has the same state and a short convolution,
the delta rule too; softmax is the upper end and is not judged. State tracking, the other claim, is not tried: with
rates below 1, as the paper's layer has them, one transition cannot change a sign.
"""

from regard.reproductions.delta_rule import SHAPE, TRAINING, run_cell
from regard.reproductions.framework.judging import Check, minus
from regard.reproductions.framework.protocol import Reproduction

OWN = {name: width for name, width in SHAPE.items() if name != "short_convolution"}

REPRODUCTION = Reproduction(
    name="rwkv7",
    mechanisms=("rwkv7",),
    claim="A generalised delta rule replaces what is stored, where its predecessors add to a memory that decays (abstract).",
    instead=(
        "Recall of overwritten keys, accuracy: RWKV-7 against gated linear attention with the same state. Two layers of "
        "width 64, 8 key features, 700 steps; no language model at 3B parameters, no state tracking."
    ),
    settings={
        "rwkv7": TRAINING | {"mixer": "rwkv7", "options": OWN},
        "delta_rule": TRAINING | {"mixer": "delta_rule", "options": SHAPE},
        "gated_linear": TRAINING | {"mixer": "gated_linear", "options": SHAPE},
        "softmax": TRAINING | {"mixer": "softmax", "options": SHAPE},
    },
    run_cell=run_cell,
    checks=(Check("RWKV-7 above gated linear by 0.05", minus("rwkv7", "gated_linear"), above=0.05),),
    smoke={"steps": 2, "batch_size": 2, "items": 8},
    seconds=250,
)
