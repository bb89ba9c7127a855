"""SEA and softmax between the projections of a pretrained model: time and memory of a prompt, and where the time goes.

python benchmarks/estimated_maps.py                   # 9 query heads over 3 of width 64, as in SmolLM2-135M; k = 64; one thread

Times are CPU times of one thread, medians over alternating mechanisms; memory is the peak above that before the call. A
mechanism is measured as `regard swap` puts it between a model's projections, with its state for decoding. The operators of
each are those that PyTorch's profiler counts.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from techniques import thread_times

from regard.catalogue import get_mechanism
from regard.contract import Pattern
from regard.integrations.chosen import Chosen
from regard.integrations.heads import HeadAttention
from regard.integrations.masks import Visible
from regard.training import keep_freed_memory, peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each length")
    parser.add_argument("--operators", type=int, default=8, help="to show of each, by their share of the time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    lengths = [*map(int, options.lengths.split(","))]
    sizes = {"heads": options.heads, "kv_heads": options.kv_heads, "head_dim": options.width}
    dim = options.heads * options.width

    def made(name: str, **own: object) -> HeadAttention:
        return HeadAttention(
            Chosen.of(get_mechanism(name), **own), dim=dim, pattern=Pattern.CAUSAL_SELF, **sizes
        ).eval()

    sea = partial(made, "sea", top_k=options.top_k, length=max(lengths))
    known = {
        "softmax": made("softmax"),
        "sea": sea(),
        "sea, an eighth of the features": sea(feature_divisor=8.0),
    }

    def heads(n: int, count: int) -> torch.Tensor:
        return torch.randn(1, n, count, options.width).transpose(1, 2)

    @torch.no_grad()
    def attend(mechanism: HeadAttention, x: torch.Tensor, *qkv: torch.Tensor) -> None:
        mechanism(*qkv, x, x, pattern=Pattern.CAUSAL_SELF, visible=Visible(True), return_state=True)

    print("| tokens | mechanism | time (ms) | of softmax | memory (MB) |\n|---:|---|---:|---:|---:|")
    for n in lengths:
        given = torch.randn(1, n, dim), heads(n, options.heads), heads(n, options.kv_heads), heads(n, options.kv_heads)
        actions = {name: partial(attend, mechanism, *given) for name, mechanism in known.items()}
        times = thread_times(actions, options.seconds)
        for name, action in actions.items():
            share, memory = times[name] / times["softmax"], peak_memory(action).bytes / 1e6
            print(f"| {n} | {name} | {times[name] * 1e3:.1f} | {share:.2f} | {memory:.1f} |")
    for name, action in actions.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            action()
        found = sorted(profile.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
        whole = sum(entry.self_cpu_time_total for entry in found)
        shares = (f"{entry.key} {entry.self_cpu_time_total / whole:.0%}" for entry in found[: options.operators])
        print(f"{name}, {lengths[-1]} tokens: {', '.join(shares)}")


if __name__ == "__main__":
    main()
