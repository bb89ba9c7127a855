"""Selective self-attention (Zhang et al., arXiv 2411.12892) in a trained model, complementing ``selective_temperature``.

The paper: language models that are fine-tuned with temperatures of queries and values have a lower perplexity than the
same models fine-tuned without (Pythia, Llama 3 and others; tables of section 5).

Here: SmolLM2-135M, tuned on 64 blocks of 512 tokens with temperatures in all thirty layers, which begin near 1, and
without.
"""

from regard.reproductions.framework.judging import Check, minus, within
from regard.reproductions.framework.pretrained import MIXED_RETROFIT, SMALL, retrofitted
from regard.reproductions.framework.protocol import Reproduction

TUNING = MIXED_RETROFIT | {"steps": 64}

REPRODUCTION = Reproduction(
    name="selective_temperature_pretrained",
    mechanisms=("selective_temperature",),
    claim="A pretrained model that is fine-tuned with temperatures that depend on token and place has a lower perplexity.",
    instead=(
        "SmolLM2-135M tuned on 33,000 tokens of the King James Bible with temperatures and without: the loss on other books in "
        "Basic English."
    ),
    settings={
        "plain": TUNING | {"mechanism": "softmax"},
        "selective": TUNING | {"mechanism": "selective_temperature"},
    },
    run_cell=retrofitted,
    checks=(Check("lower loss than without temperatures", minus("selective", "plain", "loss"), below=0.0),),
    needs=(
        Check("tuning helps at all: 0.01 nats", within("plain", "original", "loss"), above=0.01),
        Check("temperatures begin at most 0.05 nats off", within("selective", "start", "original"), below=0.05),
    ),
    left_out=(
        "WikiText and the other corpora of the paper, and models of 70M to 1.4B parameters: one model on one text",
    ),
    smoke=SMALL,
    seeds=3,
    seconds=500,
)
