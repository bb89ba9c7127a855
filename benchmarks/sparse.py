"""Times of sparse and dense attention for one layer: a prompt, and a token after it.

    python benchmarks/sparse.py                                  # 8192 tokens, 9 query heads over 3 of width 64 (SmolLM2-135M)
    python benchmarks/sparse.py --length 4k --ratios 4,8 --methods block_sparse,quest
    OMP_NUM_THREADS=1 python benchmarks/sparse.py --length 8k,32k --methods quest

Dense is the native attention that regard's models run, not sparse code with everything selected. Queries and keys follow a
random walk, with a few keys that many queries attend to, since methods that select by importance would keep almost all of
white noise; the selected share is printed next to the time. The time of a token is that of its attention: neither side writes
to its cache. With one thread, times are CPU times, which other programs affect only through shared caches and memory; with
more threads, do not measure on a busy machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from regard.cli.arguments import read_lengths
from regard.compression.sparse import METHODS, Place, at_compression
from regard.core.visibility import CountedRanks, Visibility
from regard.engines.attention import attention, decode
from regard.measurement.timing import calm_clock, interleaved

HEADS, GROUPS, WIDTH = 9, 3, 64
SCALE = WIDTH**-0.5


def tensors(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values whose scores decrease with distance, with some vertical lines."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    walk = draw(1, 1, n, WIDTH).cumsum(2) / torch.arange(1, n + 1).sqrt()[:, None].clamp(min=8)
    q, k = draw(1, HEADS, n, WIDTH) + walk, draw(1, GROUPS, n, WIDTH) + walk
    k[:, :, torch.randint(n, (n // 128,), generator=generator)] += 2 * q.mean((1, 2))[:, None, None]
    return q, k, draw(1, GROUPS, n, WIDTH)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=read_lengths, default=(8192,), help="tokens, with commas; k is 1024")
    parser.add_argument("--ratios", default="8")
    parser.add_argument("--methods", default=",".join(name for name in METHODS if name != "dense"))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each comparison")
    asked = parser.parse_args()
    clock = "processor" if torch.get_num_threads() == 1 else "wall"
    print(f"{HEADS} heads over {GROUPS} of {WIDTH}, {torch.get_num_threads()} threads, {clock} time")
    headings = ["tokens", "method", "compression", "phase", "computed", "dense", "sparse", "dense / sparse"]
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for n in asked.length:
        measure(n, asked)


def measure(n: int, asked: argparse.Namespace) -> None:
    """Print the rows for one length."""
    q, k, v = tensors(n)
    query, key, value = q[:, :, -1:], k[:, :, -1:], v[:, :, -1:]
    where, causal = CountedRanks(n, n, 0, True, q.device), Visibility(causal=True)

    def dense_prompt() -> Any:
        return attention(q, k, v, where, visibility=causal, scale=SCALE)

    def dense_token() -> Any:
        found = decode(query, k, v, SCALE)
        if found is None:
            last = CountedRanks(1, n, n - 1, True, q.device)
            found = attention(query, k, v, last, visibility=causal, scale=SCALE)
        return found

    for name in asked.methods.split(","):
        for ratio in map(float, asked.ratios.split(",")):
            method, place = at_compression(name, ratio, n), Place(scale=SCALE)
            pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
            if method.phases == ("prefill",):
                pairs["prefill"] = (dense_prompt, lambda method=method, place=place: method.prefill(q, k, v, place))
            else:
                cache = method.compress(q, k, v, place).appended(key, value)
                pairs["decode"] = (dense_token, lambda m=method, c=cache, p=place: m.decode(query, c, p)[0])
            for phase, (dense, sparse) in pairs.items():
                sparse()
                found = interleaved({"dense": dense, "sparse": sparse}, seconds=asked.seconds, clock=calm_clock())
                before, after = 1e3 * found["dense"].median, 1e3 * found["sparse"].median
                share = 1 - place.meter.sparsity(phase)
                print(
                    f"| {n} | {name} | {ratio:g}x | {phase} | {share:.1%} | {before:.3f} ms | {after:.3f} ms | {before / after:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
