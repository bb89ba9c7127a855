"""Time of a mixture of heads that computes only the chosen heads, against one that computes all and masks.

python benchmarks/mixture_of_heads.py                 # 16 heads of 32, 2 shared and 4 of 14 routed; one thread
python benchmarks/mixture_of_heads.py --model         # in SmolLM2-135M: prompts and tokens, with 7 and 5 of 9 heads

CPU time of one thread, medians over alternating layers, for forward and forward with backward; with --model, for a prompt and
a token after it, compared with the original model. Outputs are compared before anything is timed. Routers have their initial
weights, so that tokens spread evenly; in the model, routing scores are query norms. --model needs what `smollm2.py` needs.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch
from techniques import thread_times

import regard
from regard import create_layer
from regard.training import keep_freed_memory


def in_layers(options: argparse.Namespace) -> None:
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
        for length in map(int, (options.lengths or "512,1024,2048,4096,8192").split(",")):
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


@torch.no_grad()
def in_model(options: argparse.Namespace) -> None:
    from smollm2 import load

    import regard.integrations.transformers as bridge

    original, _ = load()
    original.set_attn_implementation("regard:softmax")
    models = {"original": original.model}
    for active in (3, 1):  # 75 % and 50 % of the nine heads, rounded up
        for compute in ("dense", "gather"):
            own = copy.deepcopy(original)
            regard.swap(
                own, "mixture_of_heads", router="query_norm", shared_heads=4, active_heads=active, compute=compute
            )
            models[f"{4 + active} of 9, {compute}"] = own.model
    print(
        "| tokens | model | prompt (s) | of the original | token (ms) | of the original |\n|---:|---|---:|---:|---:|---:|"
    )
    for length in map(int, (options.lengths or "1024,2048,4096").split(",")):
        ids = torch.randint(3, 40000, (1, length), generator=torch.Generator().manual_seed(0))
        caches = {}
        for name, model in models.items():
            result = model(ids, use_cache=True, **{bridge.CACHE: bridge.GrowingCache(model.config)})
            caches[name] = getattr(result, bridge.CACHE), result.last_hidden_state
        for active in ("7", "5"):
            dense, gather = (caches[f"{active} of 9, {how}"][1] for how in ("dense", "gather"))
            apart = float((gather - dense).abs().max() / dense.abs().max())
            if apart > 1e-3:  # rounding decided between two nearly equal norms
                print(f"at {length} tokens {active} of 9 chosen heads are {apart:.1g} from all heads masked")

        def token(name, ids=ids, caches=caches):
            models[name](ids[:, :1], use_cache=True, **{bridge.CACHE: caches[name][0]})

        prompts = thread_times(
            {name: partial(model, ids, use_cache=False) for name, model in models.items()}, options.seconds
        )
        tokens = thread_times({name: partial(token, name) for name in models}, options.seconds)
        for name in models:
            prompt, step = prompts[name] / prompts["original"], tokens[name] / tokens["original"]
            print(f"| {length} | {name} | {prompts[name]:.2f} | {prompt:.2f} | {tokens[name] * 1e3:.1f} | {step:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--shared", type=int, default=2)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--model", action="store_true", help="in SmolLM2-135M instead of single layers")
    parser.add_argument("--lengths", help="512,1024,2048,4096,8192; with --model 1024,2048,4096")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    (in_model if options.model else in_layers)(options)


if __name__ == "__main__":
    main()
