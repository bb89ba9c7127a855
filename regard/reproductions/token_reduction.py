"""Token reduction (Kong et al., arXiv 2505.18227): fewer tokens, for more than speed.

The paper is a position paper without results: dropping and merging tokens should serve more than efficiency, for
example robustness to irrelevant content. The numbers tested are those of the methods it builds on, from their
repositories: Token Merging takes ViT-B/16 from 309 to 511 images/s and from 84.57 to 82.60 % without training; EViT and
DynamicViT are trained.

Here: the canvases and the transformer of the reproduction `interpreters` (a digit of 8 x 8 on 32 x 32 pixels with noise
and three blobs, 6 blocks of width 64, 64 patches). Without training, patches are removed at blocks 1, 3 and 4 of 0 to
5, and a share of 0.9, 0.7 or 0.5 is kept each time: Token Merging with and without proportional attention, with strided
and random sources, EViT, attention pruning (EViT without its fused token), and random, strided and pooled patches.
Trained methods are DynamicViT with 1, 0.7 and 0.5 kept (the first keeps all patches and shows the effect of its
training steps alone), and IA-RED² with the middle penalty. Distractors: the same digits with six blobs instead of
three. Images/s are for batches of 16 on one core, all timed in turn.
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from regard.compression.tokens import DynamicTransformer, reduce_tokens
from regard.contract import Paper
from regard.measurement.timing import rounds
from regard.reproductions.framework.canvas import (
    SMOKE,
    accuracy,
    canvas,
    dynamic_transformer,
    interpreted_transformer,
    trained_transformer,
)
from regard.reproductions.framework.judging import Check, Measurements, measured, number, spread, within
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.interpreters import BATCH, POLICIES, TRAINING

PAPER = Paper(
    "Token Reduction Should Go Beyond Efficiency in Generative Models - From Vision, Language to Multimodality",
    "2505.18227",
    2025,
    55,
)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ToMe": ("tome", {}),
    "ToMe, not proportional": ("tome", {"proportional": False}),
    "ToMe, strided": ("tome_stride", {}),
    "ToMe, drawn": ("tome_random", {}),
    "EViT": ("evit", {}),
    "attention": ("attention", {}),
    "random": ("random", {}),
    "stride": ("stride", {}),
    "mean": ("mean", {}),
}
SHARES = (0.9, 0.7, 0.5)
KEPT = (1.0, 0.7, 0.5)
DYNAMIC = TRAINING | {"dynamic_steps": 600, "predictor_rate": 1e-3}
MANY_BLOBS = 6


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure accuracy with and without reduction, also with more distractors; with ``seconds``, times of a batch."""
    if "seconds" in setting:
        return times(setting, seed)
    items = setting["items"]
    model: torch.nn.Module = trained_transformer(setting, seed)
    if setting["trained"] == "policies":
        model = interpreted_transformer(setting, seed)
    elif setting["trained"] == "dynamic":
        model = dynamic_transformer(setting, seed)
    found = {"score": accuracy(model, items), "distracted": accuracy(model, items, MANY_BLOBS)}
    if setting["trained"] == "nothing":
        for name, share in ((name, share) for name in METHODS for share in setting["shares"]):
            method, options = METHODS[name]
            draws = torch.Generator().manual_seed(seed)
            reduction = reduce_tokens(model, method, keep=share, generator=draws, **options)
            found[f"{name} {share}"] = accuracy(model, items)
            reduction.undo()
    return found


def times(setting: Setting, seed: int) -> dict[str, Any]:
    """Measure images/s of every method and the speedup over all tokens, in the rounds of one comparison."""
    images = next(canvas(setting["items"]).evaluation_scenes(BATCH)).images
    models: dict[str, torch.nn.Module] = {"all": trained_transformer(setting, seed)}
    models["IA-RED²"] = interpreted_transformer(setting, seed)
    for share in KEPT:  # untrained: the time does not depend on the predictors' weights
        models[f"DynamicViT {share}"] = DynamicTransformer(trained_transformer(setting, seed), share).eval()
    for name, (method, options) in METHODS.items():
        for share in setting["shares"]:
            model = models[f"{name} {share}"] = trained_transformer(setting, seed)
            reduce_tokens(model, method, keep=share, **options)
    with torch.inference_mode():
        actions = {name: partial(model, images) for name, model in models.items()}
        found = rounds(actions, seconds=setting["seconds"], least=3, most=200, clock=time.thread_time)
    told: dict[str, Any] = {}
    for name, seconds in found.items():
        told[f"{name} images/s"] = spread([len(images) / each for each in seconds])
        told[f"{name} speedup"] = spread([whole / each for whole, each in zip(found["all"], seconds, strict=True)])
    return told


def table(cells: Mapping[tuple[str, int], Measurements]) -> list[dict[str, Any]]:
    """Return a row for each method and share with accuracy, accuracy with more distractors (of all tokens and of trained
    methods), images/s and speedup over all tokens: means over seeds of `cells`, given by (setting, seed). None for missing
    measurements."""

    def mean(setting: str, name: str) -> float | None:
        values = [found.get(name) for (own, _), found in cells.items() if own == setting]
        known = [v["median"] if isinstance(v, Mapping) else v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    def row(method: str, share: float | None, setting: str, score: str, timed: str) -> dict[str, Any]:
        distracted = mean(setting, "distracted") if score == "score" else None
        rates = {kind: mean("time", f"{timed} {kind}") for kind in ("images/s", "speedup")}
        scores = {"accuracy": mean(setting, score), "with six blobs": distracted}
        return {"method": method, "share at a stage": share, **scores, **rates}

    rows = [row("all tokens", 1.0, "nothing", "score", "all")]
    rows += [row(name, share, "nothing", f"{name} {share}", f"{name} {share}") for name in METHODS for share in SHARES]
    rows += [row("DynamicViT", share, f"dynamic {share}", "score", f"DynamicViT {share}") for share in KEPT]
    return [*rows, row("IA-RED²", None, "policies", "score", "IA-RED²")]


def _above(first: str, second: str) -> Any:
    return within("nothing", f"{first} 0.5", f"{second} 0.5")


REPRODUCTION = Reproduction(
    name="token_reduction",
    mechanisms=("softmax",),
    source=PAPER,
    claim=(
        "Fewer tokens are for more than speed, such as for robustness to what is irrelevant; of the methods it stands on, Token "
        "Merging makes ViT-B/16 1.65 times as fast at 2 points less without training (its repository)."
    ),
    instead=(
        "Accuracy against images/s in batches of 16 on one core, on canvases with a digit, noise and blobs, 6 blocks of width 64: "
        "Token Merging, EViT, attention pruning and patches drawn, strided and pooled without training; DynamicViT and IA-RED² "
        "trained. Accuracy under six blobs instead of three."
    ),
    settings={
        "nothing": TRAINING | {"trained": "nothing", "shares": list(SHARES)},
        "policies": POLICIES | {"trained": "policies"},
        **{f"dynamic {share}": DYNAMIC | {"trained": "dynamic", "keep": share} for share in KEPT},
        "time": POLICIES | {"shares": list(SHARES), "seconds": 40.0},
    },
    run_cell=run_cell,
    needs=(Check("the transformer with all tokens gets above 0.9", measured("nothing", "score"), above=0.9),),
    checks=(
        Check("half at a stage: Token Merging above attention pruning", _above("ToMe", "attention"), above=0.0),
        Check("half at a stage: attention pruning above patches drawn", _above("attention", "random"), above=0.0),
        Check(
            "half at a stage: Token Merging loses without proportional attention",
            _above("ToMe", "ToMe, not proportional"),
            above=0.0,
        ),
        Check("Token Merging 1.3 times as fast with half at a stage", measured("time", "ToMe 0.5 speedup"), above=1.3),
        Check(
            "DynamicViT with half at a stage within 1 point of its training with all, under distractors",
            lambda seed: number(seed, "dynamic 0.5", "distracted") - number(seed, "dynamic 1.0", "distracted"),
            above=-0.01,
        ),
    ),
    left_out=(
        "language models: the reproduction `cache_eviction`, and `regard sparse --effects` for hallucination and repetition",
        "multimodal models and overthinking: canvases are images, and nothing here reasons in words",
        "stability of training: nothing here is unstable",
    ),
    timings=frozenset({"time"}),
    smoke={**SMOKE, "dynamic_steps": 2, "shares": [0.5]},
    seconds=160,
    seeds=3,
    table=table,
    question="What do dropping and merging tokens cost in accuracy, and what do they gain in speed and under distractors?",
    picture=("method", "images/s", "accuracy"),
)
