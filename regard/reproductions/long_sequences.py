"""A unified view of long-sequence models (He and Kabic, arXiv 2302.06218): longer context helps some mechanisms; exact
attention scales when tiled and distributed.

The paper (abstract): longer context helps, depending on the application, and is poorly exploited; distributed
multi-head attention is almost 40 times as fast as the vanilla one on four GPUs. Parallelism alone could give 4 times at
most; the rest comes from computing in tiles. The two factors are separated here.

Here: next-byte prediction in windows of 64 and 256, with the same number of tokens in every run and two bare layers of
width 64: softmax, linear attention and S4D, which reach over the window, and local attention over 16 tokens, which
reaches 31 tokens in any window. Forward times of causal attention with 4 heads of width 32: all weights in memory
against tiles, on one core, at 2k and 8k; and, forward and backward at 16k, a ring of two processes with one core each
against a single process. A million keys in files, attended to by 64 queries: the error against float64 for some of the
queries, and the memory of the process.
"""

import math
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.contract import Paper
from regard.distributed import attend_million
from regard.distributed.measure import Attention, measure_ranks
from regard.functional import softmax_attention
from regard.reproductions.framework.judging import Check, measured, minus, number
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_ratio
from regard.reproductions.framework.training import BIGRAMS, cached_task, fit, language_model, loss_in_pieces

TOKENS = 4096
"""Tokens per training step."""
TRAINING = {"steps": 800, "learning_rate": 3e-3, "items": 128}
LAYERS: dict[str, dict[str, Any]] = {"softmax": {}, "linear": {}, "s4d": {}, "local": {"window": 16}}
CONTEXTS = (64, 256)


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure one of: the score at a context length, exact attention over a million keys, speedup on several ranks,
    speedup of tiles."""
    torch.manual_seed(seed)
    if "mixer" in setting:
        return context_score(setting, seed)
    if "keys" in setting:
        return million(setting["keys"], setting["queries"])
    if "ranks" in setting:
        work = Attention(length=setting["length"], heads=4, head_dim=32)
        found = measure_ranks(work, ranks=setting["ranks"], seconds=setting["seconds"])
        alone, together = found["alone"], found["together"]
        ends = {"low": alone["low"] / together["high"], "high": alone["high"] / together["low"]}
        return {"speedup": {"median": found["speedup"], **ends}, "memory": found["memory"], "error": found["error"]}
    q, k, v = torch.randn(3, 1, 4, setting["length"], 32)
    tiled = partial(softmax_attention, q, k, v, pattern="causal-self")
    return {"tiles": timed_ratio(partial(vanilla, q, k, v), tiled, seconds=setting["seconds"])}


def context_score(setting: Setting, seed: int) -> dict[str, Any]:
    """Return the bits per byte of a model trained and tested at one window length, on the same test bytes for all."""
    length = setting["length"]
    task = cached_task("text", length=length)
    layers = [(setting["mixer"], LAYERS[setting["mixer"]])] * 2
    model = language_model(task, layers, dim=64, num_heads=4)
    if not fit(model, task, {**setting, "batch_size": TOKENS // length}, seed):
        return {"bits": math.nan}
    held_out = cached_task("text", length=max(CONTEXTS), evaluation_items=setting["items"])
    return {"bits": loss_in_pieces(model, held_out, max(CONTEXTS) // length) / math.log(2)}


@torch.no_grad()
def vanilla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with all scores and weights in memory."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1) @ v


@torch.no_grad()
def million(keys: int, queries: int) -> dict[str, float]:
    """Return the error for some of the queries, and the call's peak memory relative to the size of keys and values."""
    q = torch.randn(1, 1, queries, 64)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name in ("keys", "values"):
            path = Path(folder) / f"{name}.npy"
            made = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(1, 1, keys, 64))
            for start in range(0, keys, 65_536):
                stop = min(start + 65_536, keys)
                made[0, 0, start:stop] = torch.randn(stop - start, 64).numpy()
            made.flush()
            del made
            files.append(np.load(path, mmap_mode="r"))
        with watched_memory() as memory:
            output = attend_million(q, *files)
        some = q[..., :4, :].double()
        k, v = (torch.from_numpy(np.array(x)).double() for x in files)
        expected = (some @ k.mT / 8).softmax(-1) @ v
    error = float((output[..., :4, :] - expected).abs().max() / expected.abs().max())
    return {"error": error, "memory": max(memory) / (2 * keys * 64 * 4)}


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Record the process's growth in anonymous memory, in bytes, every few milliseconds inside the ``with`` block."""
    found, over = [0], threading.Event()
    before = own_bytes()

    def watch() -> None:
        while not over.wait(0.005):
            found.append(own_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def own_bytes() -> int:
    """Return the anonymous memory of this process in RAM; 0 if the system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def _gained(mixer: str) -> Any:
    return minus(f"{mixer} 64", f"{mixer} 256", "bits")


REPRODUCTION = Reproduction(
    name="long_sequences",
    mechanisms=("softmax", "linear", "s4d", "local"),
    source=Paper(
        "A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies", "2302.06218", 2023, 14
    ),
    claim=(
        "Longer context helps, depending on the application; distributed attention is almost 40 times as fast as the vanilla "
        "one on four GPUs (abstract)."
    ),
    instead=(
        "Bits per byte of text in windows of 64 and 256, two layers of width 64; time of attention in tiles against all weights "
        "in memory, and of a ring of two cores against one; a million keys in files."
    ),
    settings={
        f"{mixer} {length}": TRAINING | {"mixer": mixer, "length": length} for length in CONTEXTS for mixer in LAYERS
    }
    | {"million": {"keys": 1_000_000, "queries": 64}}
    | {f"tiles {length}": {"length": length, "seconds": 10.0} for length in (2048, 8192)}
    | {"ring": {"ranks": 2, "length": 16_384, "seconds": 20.0}},
    run_cell=run_cell,
    checks=(
        *(
            Check(f"256 tokens help {mixer} by 0.02 bits", _gained(mixer), above=0.02)
            for mixer in ("softmax", "linear", "s4d")
        ),
        Check(
            "they help softmax more than attention to 16 tokens",
            lambda seed: _gained("softmax")(seed) - _gained("local")(seed),
            above=0.0,
        ),
        Check("tiles are faster at 8k", measured("tiles 8192", "tiles"), above=1.0),
        Check(
            "they gain more at 8k than at 2k",
            lambda seed: seed["tiles 8192"]["tiles"]["median"] / seed["tiles 2048"]["tiles"]["median"],
            above=1.0,
        ),
        Check("two cores are 1.5 times as fast as one", measured("ring", "speedup"), above=1.5),
        Check("a rank needs at most 0.6 of the memory", measured("ring", "memory"), below=0.6),
        Check("a million keys: the error is below 1e-5", measured("million", "error"), below=1e-5),
        Check("a million keys: a tenth of their memory", measured("million", "memory"), below=0.1),
    ),
    needs=(
        Check(
            "softmax learns more than which byte follows which",
            lambda seed: number(seed, "softmax 256", "bits"),
            below=BIGRAMS / math.log(2),
        ),
    ),
    left_out=(
        "almost 40 times with four GPUs: tiles and devices together, whose factors are told apart on two cores",
        "images as sequences, in which the paper finds less use for context",
        "mechanisms that mix in both directions alone (Fourier, MLP over tokens): next bytes are predicted",
        "sparsely activated blocks on several devices, of which the paper has a sketch",
    ),
    timings=frozenset({"tiles 2048", "tiles 8192", "ring"}),
    smoke={"steps": 1, "items": 2, "keys": 2048, "queries": 4, "length": 32, "seconds": 0.0, "ranks": 1},
    seconds=60,
)
