"""xLSTM (Beck et al., arXiv 2405.04517): a matrix memory with exponential gating recalls more pairs than one without.

The paper (section 4): when recalling up to 256 pairs in 2048 tokens, xLSTM is the best of the models that are not
Transformers; both the matrix memory and the exponential gates improve language models.

Here: recall of overwritten keys, the task of the delta rule's reproduction (16 writes under 8 keys, the last value
counts, then 24 queries in 56 tokens), and its layers: 2 of width 64 with one head of 8 key features, so that the state
is the bottleneck, a short convolution and a norm on the output of the head. The control is gated linear attention with
one gate per head: the same memory and forget gate, without input gate and normaliser.

In an earlier protocol, with 15 pairs that are each written once, the control had 0.96, so the state was not a
bottleneck, and mLSTM 0.80 (three seeds of 500 steps); with more pairs, mLSTM did not learn with any seed of the pilots.
"""

from regard.reproductions.delta_rule import OVERWRITTEN, SHAPE, UPPER_END, run_cell
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction

REPRODUCTION = Reproduction(
    name="mlstm",
    mechanisms=("mlstm",),
    claim="A matrix memory with exponential gating recalls more than other recurrent memories (section 4).",
    instead=(
        "Recall of overwritten keys, accuracy: mLSTM against the same memory and forget gate without input gate and "
        "normaliser. Two layers of width 64, 8 key features, 700 steps; no 256 pairs, no language model."
    ),
    settings={
        "mlstm": OVERWRITTEN | {"mixer": "mlstm", "options": SHAPE},
        "gated_linear": OVERWRITTEN | {"mixer": "gated_linear", "options": SHAPE | {"gate": "scalar"}},
        "softmax": OVERWRITTEN | UPPER_END,
    },
    run_cell=run_cell,
    checks=(Check("mLSTM above gated linear", minus("mlstm", "gated_linear"), above=0.0),),
    needs=(
        Check("softmax learns the task, above 0.95", measured("softmax", "score"), above=0.95),
        Check("the control learns, above 0.3", measured("gated_linear", "score"), above=0.3),
        Check("the state is the bottleneck: the control below 0.95", measured("gated_linear", "score"), below=0.95),
    ),
    left_out=(
        "language models of 125M to 1.3B parameters, and the gain of each of the gates there: out of reach",
        "sLSTM, formal languages and mixtures of both memories: sLSTM is no map of queries and keys and not here",
        "the Long Range Arena: sequences too long for this size",
    ),
    smoke={"steps": 2, "batch_size": 2, "items": 8},
    seeds=8,
    more_seeds={"softmax": 3},
    seconds=12,
    protocol=2,
)
