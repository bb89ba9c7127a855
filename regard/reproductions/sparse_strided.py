"""Sparse Transformer (Child et al., arXiv 1904.10509): two sparse patterns model as well as dense attention, faster.

The paper: 0.99 bits a byte on Enwik8 with the fixed pattern and 2.80 a dimension on CIFAR-10 with the strided one, as good
as or better than dense attention at a fraction of its time. On text, which has no period, the strided pattern falls behind
(its experiments). Time O(N sqrt N) (abstract).

Here: bytes of Python's standard library in windows of 256 with s = 16, c = 4, 2 layers of width 64, 400 steps: fixed and
strided patterns, what is near alone (`first`), and dense attention. As good means within 0.05 nats. Forward time on one core
at N = 4096 with s = 64, and growth from 1024 to 16384 with s = sqrt(N). No images are generated.
"""

import math
from functools import partial
from typing import Any

import torch

from regard import get_mechanism
from regard.apply import apply
from regard.reproductions.framework.judging import Check, measured, minus
from regard.reproductions.framework.protocol import Reproduction, Setting
from regard.reproductions.framework.timing import timed_ratio, timed_slopes
from regard.reproductions.framework.training import cached_task, language_model, trained_score

TRAINING = {"steps": 400, "batch_size": 16, "learning_rate": 3e-3, "items": 64}


def run_cell(setting: Setting, seed: int) -> dict[str, Any]:
    if "lengths" in setting:
        with torch.no_grad():
            return time_forward(setting)
    task = cached_task("text", length=256, evaluation_items=setting["items"])
    model = language_model(task, [(setting["mixer"], setting["options"])] * 2, dim=64, num_heads=4)
    return {**trained_score(model, task, setting, seed)}


def time_forward(setting: Setting) -> dict[str, Any]:
    sparse, dense = get_mechanism("sparse_strided"), get_mechanism("softmax")
    actions: dict[float, Any] = {}
    other = None
    for n in setting["lengths"]:
        inputs = dict(zip("qkv", torch.randn(3, 1, 4, n, 64), strict=True))
        actions[n] = partial(apply, sparse, inputs, config=sparse.options(stride=math.isqrt(n)))
        if n == setting["lengths"][1]:
            other = timed_ratio(partial(apply, dense, inputs), actions[n], seconds=setting["seconds"])
    return {**timed_slopes({"growth": actions}, seconds=setting["seconds"]), "speedup": other}


REPRODUCTION = Reproduction(
    name="sparse_strided",
    mechanisms=("sparse_strided",),
    claim=(
        "Sparse patterns model sequences as well as dense attention in time O(N sqrt N); for text the fixed pattern "
        "(0.99 bits a byte on Enwik8), which beats the strided one there (abstract, experiments)."
    ),
    instead=(
        "Loss in nats on code bytes, windows of 256, s = 16, 2 layers of width 64, 400 steps; as good means within 0.05. "
        "Forward on one core with s = sqrt(N): p of time ~ N^p, and the dense time over it at N = 4096."
    ),
    settings={
        "dense": TRAINING | {"mixer": "softmax", "options": {}},
        "fixed": TRAINING
        | {"mixer": "sparse_strided", "options": {"layout": "fixed", "stride": 16, "columns": 4, "head_columns": True}},
        "strided": TRAINING | {"mixer": "sparse_strided", "options": {"stride": 16}},
        "near": TRAINING | {"mixer": "sparse_strided", "options": {"stride": 16, "combine": "first"}},
        "time": {"lengths": [1024, 4096, 16384], "seconds": 8.0},
    },
    run_cell=run_cell,
    checks=(
        Check("fixed within 0.05 nats of dense", minus("fixed", "dense", "loss"), below=0.05),
        Check("fixed below strided", minus("fixed", "strided", "loss"), below=0.0),
        Check("strided below what is near alone", minus("strided", "near", "loss"), below=0.0),
        Check("time grows with p < 1.6", measured("time", "growth"), below=1.6),
        Check("dense takes over twice as long at 4096", measured("time", "speedup"), above=2.0),
    ),
    needs=(Check("what is far helps: dense below what is near alone", minus("dense", "near", "loss"), below=0.0),),
    left_out=(
        "2.80 bits on CIFAR-10, 3.44 on ImageNet-64 and audio: nothing is generated but text",
        "sequences of a million tokens: time is measured up to 16384",
    ),
    timings=frozenset({"time"}),
    smoke={"steps": 2, "batch_size": 2, "items": 4, "lengths": [16, 64], "seconds": 0.01},
    seconds=40,
)
