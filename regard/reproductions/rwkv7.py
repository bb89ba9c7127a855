"""RWKV-7 (Peng et al., arXiv 2503.14456): a memory that replaces recalls more than one that decays and adds.

The paper (abstract): RWKV-7 generalises the delta rule with vector-valued gates and in-context learning rates, tracks
states and recognises all regular languages; language models of up to 2.9B parameters are as good as others of their
size with fewer training tokens. Its predecessors, like gated linear attention, add to a memory that decays.

Here: the task of the delta rule's reproduction, recall in which every key is written twice and the last value counts:
16 writes under 8 keys, then 24 queries in 56 tokens, 2 layers of width 64 with one head of 8 key features, so that the
state is the bottleneck. Gated linear attention, one decay for each key feature, has the same state and a short
convolution of four tokens; RWKV-7 has its paper's layer, which mixes two tokens. With the first 400 steps of the delta
rule's reproduction, gated linear attention did not learn the task with one of four seeds; here there are 700. There was
no pilot. Three seeds left the claim open, with a mean at the bound; sixteen are run.
"""

from regard.reproductions.delta_rule import OVERWRITTEN, SHAPE, UPPER_END, run_cell
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction

TRAINING = OVERWRITTEN | {"steps": 700}

REPRODUCTION = Reproduction(
    name="rwkv7",
    mechanisms=("rwkv7",),
    claim="A generalised delta rule replaces what is stored, where its predecessors add to a memory that decays (abstract).",
    instead=(
        "Recall of overwritten keys, accuracy: RWKV-7 against gated linear attention with the same state. Two layers of "
        "width 64, 8 key features, 700 steps; no language model at 3B parameters, no state tracking."
    ),
    settings={
        "rwkv7": TRAINING | {"mixer": "rwkv7", "options": {"head_dim": 8, "value_dim": 64}},
        "gated_linear": TRAINING | {"mixer": "gated_linear", "options": SHAPE},
        "softmax": TRAINING | UPPER_END,
    },
    run_cell=run_cell,
    checks=(Check("RWKV-7 above gated linear by 0.05", minus("rwkv7", "gated_linear"), above=0.05),),
    needs=(
        Check("softmax learns the task, above 0.95", measured("softmax", "score"), above=0.95),
        Check("the control learns, above 0.3", measured("gated_linear", "score"), above=0.3),
        Check("the state is the bottleneck: the control below 0.95", measured("gated_linear", "score"), below=0.95),
    ),
    left_out=(
        "state tracking and all regular languages: with rates below 1, as the paper's layer has them, one transition cannot "
        "change a sign",
        "language models of up to 2.9B parameters as good as others with fewer tokens: out of reach",
    ),
    smoke={"steps": 2, "batch_size": 2, "items": 8},
    more_seeds={"rwkv7": 16, "gated_linear": 16},
    seconds=40,
)
