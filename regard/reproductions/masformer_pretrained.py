"""MASFormer (Zhang et al., arXiv 2310.12442) in a trained model, complementing ``local`` and ``masformer_plan``.

The paper: a pretrained 1.3B model with full attention in 4 of its 24 layers and blocks in the others, continually trained,
is competitive with full attention in all layers on long texts at a quarter of its cost, and better than blocks alone;
full attention is worth most in the bottom layers (abstract and section 4).

Here: SmolLM2-135M, blocks of 64 tokens that also read the block before, 4 of 30 layers full, tuned on 28 texts of 1,024
tokens; needles, hidden in texts of 1,024 tokens, are what only far attention can find. Beyond the paper, the 4 full layers
are also four that ``--keep-layers recall:4`` chose, with blocks in the others, and with windows of as many keys on average, 4
of which are the first tokens, on which trained models spend attention that they do not need.
"""

from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.pretrained import MIXED_RETROFIT, SMALL, retrofitted
from regard.reproductions.framework.protocol import Reproduction

TUNING = MIXED_RETROFIT | {"steps": 28, "length": 1024, "blocks": 8, "needles": {"1024": 2}}
BLOCKS = TUNING | {"mechanism": "local:form=block,block=64"}
FOUND = "found at 1024"
RECALL = "17,18,20,23"
WINDOWS = "longformer:window=92,global_tokens=4,separate_projections=false"

REPRODUCTION = Reproduction(
    name="masformer_pretrained",
    mechanisms=("local",),
    claim=(
        "With full attention in 4 of 24 layers, the bottom ones, and blocks in the others, a continually trained model is nearly "
        "as good on long texts as with full attention in all, and better than with blocks alone."
    ),
    instead=(
        "SmolLM2-135M, blocks of 64 tokens and the ones before in all layers but 4 of 30, tuned on 29,000 tokens of the King James "
        "Bible: needles in 1,024 tokens, and the loss on other books in Basic English; nearly as good means within 0.05 nats."
    ),
    settings={
        "full": TUNING | {"mechanism": "softmax"},
        "bottom": BLOCKS | {"keep": "0,1,2,3"},
        "top": BLOCKS | {"keep": "26,27,28,29"},
        "blocks": BLOCKS,
        "recall": BLOCKS | {"keep": RECALL},
        "recall, first tokens": TUNING | {"mechanism": WINDOWS, "keep": RECALL},
    },
    run_cell=retrofitted,
    checks=(
        Check(
            "full in the bottom layers: within 0.05 nats of full in all", minus("bottom", "full", "loss"), below=0.05
        ),
        Check("better than blocks alone", minus("bottom", "blocks", "loss"), below=0.0),
        Check("better than full in the top layers", minus("bottom", "top", "loss"), below=0.0),
        Check("needles: within 2 points of full in all", minus("bottom", "full", FOUND), above=-0.02),
        Check("needles: more than blocks alone, by 20 points", minus("bottom", "blocks", FOUND), above=0.2),
        Check(
            "full where recall hangs, not at the bottom: needles 20 points more",
            minus("recall", "bottom", FOUND),
            above=0.2,
        ),
        Check(
            "and with the first tokens: within 2 points of full in all",
            minus("recall, first tokens", "full", FOUND),
            above=-0.02,
        ),
        Check("and within 0.05 nats of it", minus("recall, first tokens", "full", "loss"), below=0.05),
    ),
    needs=(
        Check("full attention finds needles: above 0.5", measured("full", FOUND), above=0.5),
        Check("far tokens are worth something: blocks lose 0.01 nats", minus("blocks", "full", "loss"), above=0.01),
    ),
    left_out=(
        "summaries and question answering on texts of 8,192 tokens, and 1.3B parameters: out of reach of one core",
    ),
    smoke=SMALL | {"keep": "0", "needles": {"1024": 1}},
    seeds=2,
    seconds=700,
)
