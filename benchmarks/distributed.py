"""Compares two ranks, each a process on its own core, with one process on one core; the machine should be idle.

    python benchmarks/distributed.py                      # a ring of attention, and training of two language models
    python benchmarks/distributed.py --seconds 60

Attention is forward and backward of causal softmax with 4 heads of 64 at 16,384 tokens; training computes gradients of 4 layers
of width 256 at 4,096 tokens, by context parallelism. Times are medians of alternating rounds; memory is the largest peak of a
rank relative to that of one process; error is the largest difference between their results.
"""

from __future__ import annotations

import argparse

from regard.distributed.measure import Attention, Training, measure_ranks

WORK = {
    "attention, ring": Attention(),
    "attention, head": Attention(scheme="head"),
    "training, gated_linear": Training(),
    "training, softmax": Training("softmax"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    options = parser.parse_args()
    print("| work | tokens | one process (s) | ranks (s) | speed-up | memory of a rank | error |\n|---|" + "---:|" * 6)
    for name, work in WORK.items():
        found = measure_ranks(work, ranks=options.ranks, seconds=options.seconds)
        alone, together = found["alone"]["median"], found["together"]["median"]
        print(
            f"| {name} | {work.length:,} | {alone:.3f} | {together:.3f} | {found['speedup']:.2f} | {found['memory']:.2f} "
            f"| {found['error']:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
