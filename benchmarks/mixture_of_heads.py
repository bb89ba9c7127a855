"""Time of a mixture of heads that computes chosen heads alone, beside one that computes all and masks.

python benchmarks/mixture_of_heads.py                 # 16 heads of 32, 2 shared and 4 of 14 routed; one thread

Time of one thread on its processor, medians of layers that took turns, forward and forward with backward. Outputs are
compared before anything is timed. Routers have their first weights, so that tokens spread evenly.
"""

from __future__ import annotations

import argparse

import torch
from techniques import thread_times

from regard import create_layer
from regard.training import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--shared", type=int, default=2)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print("| pattern | tokens | what | all heads (ms) | chosen heads (ms) | ratio |\n|---|---:|---|---:|---:|---:|")
    for pattern in ("noncausal-self", "causal-self"):
        torch.manual_seed(0)
        layers = {
            compute: create_layer(
                "mixture_of_heads",
                options.dim,
                options.heads,
                pattern=pattern,
                shared_heads=options.shared,
                active_heads=options.active,
                compute=compute,
            )
            for compute in ("dense", "gather")
        }
        layers["gather"].load_state_dict(layers["dense"].state_dict())
        for length in map(int, options.lengths.split(",")):
            x = torch.randn(1, length, options.dim)
            with torch.no_grad():
                torch.testing.assert_close(layers["gather"](x).output, layers["dense"](x).output, rtol=1e-4, atol=1e-5)

            def forward(layer, x=x):
                with torch.no_grad():
                    layer(x)

            def training(layer, x=x):
                layer(x).output.sum().backward()

            for what, work in (("forward", forward), ("training", training)):
                actions = {name: (lambda layer=layer, work=work: work(layer)) for name, layer in layers.items()}
                found = thread_times(actions, options.seconds)
                dense, gather = found["dense"] * 1e3, found["gather"] * 1e3
                print(f"| {pattern} | {length} | {what} | {dense:.3g} | {gather:.3g} | {gather / dense:.2f} |")


if __name__ == "__main__":
    main()
