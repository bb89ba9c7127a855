"""Landmark attention (Mohtashami & Jaggi, arXiv 2305.16300) in a trained language model, complementing ``landmark``.

The paper: LLaMA 7B, fine-tuned with landmarks on texts of 512 tokens, finds a pass key hidden among 32,000 tokens, where
the original fails beyond its 2,048 (abstract and figure 3).

Here: SmolLM2-135M, rebuilt with landmarks after each 31 tokens and tuned on 64 blocks of 512 tokens, reads texts of 1,024
and 4,096 tokens and finds needles in them by reading 4 blocks of each head's choice. The original is trained for 8,192
tokens, so that it may find them too, by reading everything.
"""

from regard.reproductions.framework.judging import Check, measured, within
from regard.reproductions.framework.pretrained import RETROFIT_OF, SMALL, retrofitted
from regard.reproductions.framework.protocol import Reproduction

SHORT, LONG = "1024", "4096"

REPRODUCTION = Reproduction(
    name="landmark_pretrained",
    mechanisms=("landmark",),
    claim=(
        "A pretrained model, fine-tuned with landmarks on texts of 512 tokens, finds a pass key in far longer ones by reading a "
        "few blocks."
    ),
    instead=(
        "SmolLM2-135M with a landmark after each 31 tokens, tuned on 33,000 tokens of the King James Bible in blocks of 512: "
        "needles (random tokens, to be said again) in texts of 1,024 and 4,096 tokens of other books in Basic English; their loss."
    ),
    settings={
        "landmarks": RETROFIT_OF
        | {
            "mechanism": "landmark:block=31,top_k=4,chunk=320",
            "steps": 64,
            "distil": 1.0,
            "needles": {SHORT: 4, LONG: 2},
        },
    },
    run_cell=retrofitted,
    checks=(
        Check("finds 95 % at twice the length of training", measured("landmarks", f"found at {SHORT}"), above=0.95),
        Check("and at eight times", measured("landmarks", f"found at {LONG}"), above=0.95),
        Check("within 0.1 nats of the original", within("landmarks", "loss", "original"), below=0.1),
    ),
    needs=(
        Check(
            "needles can be found: the original finds half of them among 1,024 tokens",
            measured("landmarks", f"original found at {SHORT}"),
            above=0.5,
        ),
    ),
    left_out=("32,000 tokens and LLaMA 7B: out of reach of one core",),
    smoke=SMALL | {"needles": {SHORT: 1, LONG: 1}, "mechanism": "landmark:block=3,top_k=1,chunk=8"},
    seeds=2,
    seconds=900,
)
