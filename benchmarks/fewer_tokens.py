"""Images/s of vision transformers with fewer tokens, beside the same with all of them.

    pip install 'regard[vision]'
    python benchmarks/fewer_tokens.py
    python benchmarks/fewer_tokens.py --models deit_t --keep 0.5 --json

Inference at 224 pixels without gradients; contestants alternate in one process; times are medians. `--keep` is the share of
patches that is kept at a quarter, half and three quarters of the depth. ``timm:NAME`` is a model of timm.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch
from torch import nn

from regard.compression.tokens import METHODS, reduce_tokens
from regard.measurement.timing import interleaved
from regard.models.vision import create_backbone
from regard.training import keep_freed_memory


def make(name: str) -> nn.Module:
    if not name.startswith("timm:"):
        return create_backbone(name).eval()
    import timm

    return timm.create_model(name.removeprefix("timm:")).eval()


@torch.inference_mode()
def measure(name: str, batch: int, keep: float, seconds: float) -> dict[str, Any]:
    """Milliseconds with all tokens, and how many times as fast each method is."""
    images = torch.randn(batch, 3, 224, 224)
    models = {"all": make(name)}
    for method in METHODS:
        models[method] = make(name)
        reduce_tokens(models[method], method, keep=keep)
    found = interleaved({method: partial(model, images) for method, model in models.items()}, seconds=seconds)
    whole = found.pop("all").median
    row = {"model": name, "batch": batch, "keep": keep, "ms": 1e3 * whole}
    row |= {method: whole / timing.median for method, timing in found.items()}
    told = ", ".join(f"{method} {row[method]:.2f}x" for method in METHODS)
    print(f"{name}, {batch} images: {row['ms']:.1f} ms; with {keep} kept three times: {told}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_t", "timm:deit_tiny_patch16_224", "deit_s", "tnt_s"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each comparison")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    rows = [measure(name, batch, options.keep, options.seconds) for name in options.models for batch in options.batches]
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
