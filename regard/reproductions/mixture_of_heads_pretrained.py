"""Mixture of heads (Jin et al., arXiv 2410.11842) in a trained language model, complementing ``mixture_of_heads``.

The paper: LLaMA3-8B, continue-tuned to 75 % of its heads, is better than before on 14 benchmarks (abstract), and gets back
over 95 % of its quality within 10B tokens (authors' README).

Here: SmolLM2-135M with the parameter-free routers of the paper's LLaMA in all thirty layers, tuned on 32 blocks of 512
tokens, and the same model with all heads tuned in the same way. "Within 2 % of perplexity" is the bound that the project
set for retrofits, and nine tenths of the jump is the spec's.
"""

from regard.reproductions.framework.judging import Check, Seed, minus, within
from regard.reproductions.framework.pretrained import RETROFIT_OF, SMALL, retrofitted
from regard.reproductions.framework.protocol import Reproduction


def won_back(seed: Seed) -> float:
    """Return the share of the loss that leaving out heads costs at once, and that tuning wins back."""
    return 1 - minus("75 %", "all heads", "loss")(seed) / within("75 %", "start", "original")(seed)


REPRODUCTION = Reproduction(
    name="mixture_of_heads_pretrained",
    mechanisms=("mixture_of_heads",),
    claim=(
        "A trained language model, continue-tuned to 75 % of its heads, is better than with all of them (LLaMA3-8B, 14 "
        "benchmarks; abstract), and is soon nearly as good as before (authors' README)."
    ),
    instead=(
        "SmolLM2-135M: three quarters of the heads in all layers, chosen by the norms of queries, tuned on 16,000 tokens of the "
        "King James Bible; the loss on other books in Basic English, beside that of the model with all heads tuned alike. As "
        "good means within 0.02 nats (2 % of perplexity)."
    ),
    settings={
        "all heads": RETROFIT_OF | {"mechanism": "softmax"},
        "75 %": RETROFIT_OF | {"mechanism": "mixture_of_heads"},
    },
    run_cell=retrofitted,
    checks=(
        Check("nine tenths of the jump won back", won_back, above=0.9),
        Check("at most 0.02 nats worse than all heads", minus("75 %", "all heads", "loss"), below=0.02),
    ),
    needs=(Check("leaving out heads costs 0.02 nats at once", within("75 %", "start", "original"), above=0.02),),
    left_out=(
        "better than with all heads: takes 400B tokens of continued training",
        "14 benchmarks: a model of this size is near chance on them",
    ),
    smoke=SMALL,
    seeds=3,
    seconds=300,
)
