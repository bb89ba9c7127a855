"""Image backbones at 224 pixels against timm's or the official code, and the image size from which linear cost pays.

    pip install 'regard[vision]'
    python benchmarks/vision.py                          # each backbone, and timm's version if there is one
    python benchmarks/vision.py --beside benchmarks/official.py --names van_b0 vim_t     # the official code: see that file
    python benchmarks/vision.py --large                  # image sides at which each is faster than DeiT with softmax
    python benchmarks/vision.py --names van_b0 deit_t --json

Inference without gradients; contestants alternate in one process; times are medians. ``torch`` is the same backbone without
the native kernels. The floor is the time of its matrix products and convolutions at the speed of one large matrix product.
"""

from __future__ import annotations

import argparse
import json
import runpy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from regard import backends
from regard.measurement.flops import flop_counter
from regard.measurement.timing import interleaved
from regard.models.vision import create_backbone
from regard.training import keep_freed_memory

NAMES = (
    "van_b0",
    "tnt_s",
    "biformer_t",
    "agent_deit_t",
    "deit_t",
    "vim_t",
    "vmamba_t",
    "pvt_t",
    "agent_pvt_t",
    "swin_t",
    "agent_swin_t",
    "agent_cswin_t",
    "moh_transnext_s_75",
    "mixer_s16",
)
TIMM = {
    "tnt_s": "tnt_s_patch16_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "deit_t": "deit_tiny_patch16_224",
    "mixer_s16": "mixer_s16_224",
}
LINEAR = ("van_b0", "biformer_t", "agent_deit_t", "vim_t", "vmamba_t", "agent_pvt_t")
"""Backbones whose cost is linear in the number of pixels rather than quadratic."""


def flops(model: nn.Module, images: torch.Tensor) -> float:
    """FLOPs of matrix products, convolutions and fused attention, counted without native kernels, which would hide them."""
    with torch.no_grad(), backends.only("torch"), flop_counter() as counter:
        model(images)
    return float(counter.get_total_flops())


def peak() -> float:
    """FLOP/s of one large matrix product, the best of several runs."""
    a = torch.randn(2048, 2048)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
    return best


def in_torch(model: nn.Module, images: torch.Tensor) -> None:
    with backends.only("torch"):
        model(images)


@torch.no_grad()
def measure(names: list[str], others: dict[str, Callable[[], nn.Module]], seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of each backbone and its counterpart, at batch sizes 1 and 16."""
    rows, speed = [], peak()
    for name in names:
        own = create_backbone(name).eval()
        other = others[name]().eval() if name in others else None
        row: dict[str, Any] = {"backbone": name, "gmac": flops(own, torch.randn(1, 3, 224, 224)) / 2e9}
        for batch in (1, 16):
            images = torch.randn(batch, 3, 224, 224)
            actions: dict[str, Callable[[], object]] = {
                "own": partial(own, images),
                "torch": partial(in_torch, own, images),
            }
            if other is not None:
                actions["other"] = partial(other, images)
            found = interleaved(actions, seconds=seconds)
            row[f"batch {batch}"] = {key: 1e3 * timing.median for key, timing in found.items()}
            row[f"batch {batch}"]["floor"] = 2e12 * row["gmac"] * batch / speed
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    parts = [f"{row['backbone']:14s} {row['gmac']:5.2f} GMAC"]
    for batch in (1, 16):
        times = row[f"batch {batch}"]
        beside = ", ".join(
            f"{times[key] / times['own']:.2f}x as fast as {key}" for key in ("torch", "other") if key in times
        )
        parts.append(f"batch {batch}: {times['own']:.1f} ms (floor {times['floor']:.1f}), {beside}")
    return "; ".join(parts)


@torch.no_grad()
def large(seconds: float, sides: tuple[int, ...] = (224, 384, 512, 768, 1024)) -> list[dict[str, Any]]:
    """Milliseconds for one image at growing sides, for the backbones of linear cost and DeiT with softmax."""
    rows = []
    for side in sides:
        images = torch.randn(1, 3, side, side)
        models = {name: create_backbone(name, image_size=side).eval() for name in (*LINEAR, "deit_t")}
        found = interleaved({name: partial(model, images) for name, model in models.items()}, seconds=seconds)
        rows.append({"side": side, **{name: 1e3 * timing.median for name, timing in found.items()}})
        print(f"{side}: " + ", ".join(f"{n} {ms:.0f} ms" for n, ms in rows[-1].items() if n != "side"), flush=True)
    for name in LINEAR:
        faster = [row["side"] for row in rows if row[name] < row["deit_t"]]
        print(
            f"{name}: faster than deit_t from {faster[0]} pixels on" if faster else f"{name}: never faster than deit_t"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=list(NAMES))
    parser.add_argument(
        "--beside", help="a Python file with MODELS, functions that make models, in the place of timm's"
    )
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each comparison")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    if options.large:
        rows = large(options.seconds)
    elif options.beside:
        rows = measure(options.names, runpy.run_path(options.beside)["MODELS"], options.seconds)
    else:
        import timm

        rows = measure(
            options.names, {name: partial(timm.create_model, other) for name, other in TIMM.items()}, options.seconds
        )
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
