"""Compares the native kernels with what a user would run instead, and with what the machine can do.

python benchmarks/kernels.py                       # every row, into benchmarks/RESULTS.md
python benchmarks/kernels.py --only gated_linear   # only print rows whose name matches this
python benchmarks/kernels.py --list

Contestants alternate in one process; figures are medians. Outputs are compared before anything is timed. A row is the
work of one function of `regard.functional` (or one layer, or one model) on 8 heads of 64, batch 1, float32, unless its
name says otherwise. The share of the peak divides the operations of the mechanism's definition (half of them where
causality hides half of the pairs) by the rate of fused multiply-adds that stay in registers, measured in the same run.
For both contestants, freed memory stays with the process (regard.training.keep_freed_memory): otherwise page faults on
the outputs would dominate the times.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from neighbour import neighbour
from torch import Tensor

import regard
from regard import backends
from regard.backends.native import library, machine
from regard.engines.aggregated_attention import Problem, aggregated_attention
from regard.engines.gated_recurrence import gated_recurrence, gated_recurrence_step
from regard.functional import (
    aaren_attention,
    block_sparse_attention,
    delta_rule_attention,
    flow_attention,
    gated_linear_attention,
    linear_attention,
    local_attention,
    sigmoid_attention,
    softmax_attention,
)
from regard.measurement.provenance import fingerprint
from regard.measurement.timing import efficiency_length, interleaved
from regard.training import keep_freed_memory

HERE = Path(__file__).parent
PEERS = HERE.parent / "build" / "peers"
HEADS, WIDTH = 8, 64
Action = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """A comparison to be measured.

    Attributes:
        name: the work that is timed.
        own, other: the contestants.
        against: what `other` is.
        floor: the speedup over `other` that is required.
        operations: operations of the definition of `own`, 0 when it is not compute-bound.
        moved: bytes that `own` has to move, 0 when it is compute-bound.
        close: largest allowed difference of outputs, relative to the largest value; None when they differ by design.
    """

    name: str
    own: Action
    other: Action
    against: str
    floor: float
    operations: float = 0.0
    moved: float = 0.0
    working_set: int = 0
    writes: bool = False
    close: float | None = 1e-4


@dataclass(frozen=True)
class Found:
    """A measured row; times in milliseconds."""

    name: str
    against: str
    own: float
    other: float
    ratio: float
    floor: float
    met: bool
    share: float | None
    of: str


def heads(n: int, *, width: int = WIDTH, dtype: torch.dtype = torch.float32, batch: int = 1) -> Tensor:
    return torch.randn(batch, HEADS, n, width).to(dtype)


def gate(n: int) -> Tensor:
    return F.logsigmoid(heads(n)) / 16


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def training(function: Callable[..., Tensor], *inputs: Tensor) -> Action:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves).detach()
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, direction)

    return run


def forward(function: Callable[..., Tensor], *inputs: Tensor) -> Action:
    @torch.no_grad()
    def run() -> Tensor:
        return function(*inputs)

    return run


def in_plain_torch(action: Action) -> Action:
    def run() -> Any:
        with backends.only("torch"):
            return action()

    return run


def attention_operations(n: int, *, causal: bool = True, passes: float = 2) -> float:
    """Operations of `passes` products over all visible pairs and features, for all heads."""
    pairs = n * n / (2 if causal else 1)
    return passes * 2 * pairs * WIDTH * HEADS


def recurrence_operations(n: int) -> float:
    """Operations of writing and reading a (64, 64) state for each token and head."""
    return 2 * 2 * n * WIDTH * WIDTH * HEADS


def softmax_rows() -> Iterator[Row]:
    for n in (1024, 4096, 16384):
        q, k, v = heads(n), heads(n), heads(n)
        yield Row(
            f"softmax causal forward, N = {n}",
            forward(softmax_attention, q, k, v),
            forward(sdpa, q, k, v),
            "SDPA",
            1.7,
            attention_operations(n),
        )
        yield Row(
            f"softmax noncausal forward, N = {n}",
            forward(lambda *x: softmax_attention(*x, pattern="noncausal-self"), q, k, v),
            forward(lambda *x: sdpa(*x, causal=False), q, k, v),
            "SDPA",
            1.7,
            attention_operations(n, causal=False),
        )
    for n in (1024, 4096, 16384):
        q, k, v = heads(n), heads(n), heads(n)
        yield Row(
            f"softmax causal forward+backward, N = {n}",
            training(softmax_attention, q, k, v),
            training(sdpa, q, k, v),
            "SDPA",
            2.0,
            attention_operations(n, passes=7),
        )
    for n in (1024, 4096):
        q, k, v = (heads(n, dtype=torch.bfloat16) for _ in range(3))
        yield Row(
            f"softmax causal bfloat16 forward, N = {n}",
            forward(softmax_attention, q, k, v),
            forward(sdpa, q, k, v),
            "SDPA in bfloat16",
            3.0,
            attention_operations(n),
            close=2e-2,
        )
    for n in (1024, 4096):
        q, k, v = heads(n), heads(n), heads(n)
        yield Row(
            f"sigmoid causal forward, N = {n}",
            forward(sigmoid_attention, q, k, v),
            forward(softmax_attention, q, k, v),
            "own softmax",
            1.08,
            attention_operations(n),
            close=None,
        )


def sparse_rows() -> Iterator[Row]:
    n, block = 16384, 128
    q, k, v = heads(n), heads(n), heads(n)
    sparse = {"layout": "random", "density": 1 / 8, "block_size": block, "global_blocks": 0}
    yield Row(
        f"block-sparse at 1/8 density, noncausal, N = {n}",
        forward(lambda *x: block_sparse_attention(*x, pattern="noncausal-self", **sparse), q, k, v),
        forward(lambda *x: softmax_attention(*x, pattern="noncausal-self"), q, k, v),
        "own dense",
        7.0,
        attention_operations(n, causal=False) / 8,
        close=None,
    )
    yield Row(
        f"window 512, causal, N = {n}",
        forward(lambda *x: local_attention(*x, window=512), q, k, v),
        forward(softmax_attention, q, k, v),
        "own dense",
        12.0,
        2 * 2 * n * 512 * WIDTH * HEADS,
        close=None,
    )


def recurrence_rows() -> Iterator[Row]:
    for n, floor in ((256, 4.0), (1024, 9.0), (4096, 25.0), (16384, 65.0)):
        q, k, v, g = heads(n), heads(n), heads(n), gate(n)
        yield Row(
            f"gated_linear forward, N = {n}",
            forward(gated_linear_attention, q, k, v, g),
            forward(sdpa, q, k, v),
            "SDPA",
            floor,
            recurrence_operations(n),
            close=None,
        )
    for n, floor in ((1024, 8.0), (4096, 25.0)):
        q, k, v, g = heads(n), heads(n), heads(n), gate(n)
        yield Row(
            f"gated_linear forward+backward, N = {n}",
            training(gated_linear_attention, q, k, v, g),
            training(sdpa, q, k, v),
            "SDPA",
            floor,
            3 * recurrence_operations(n),
            close=None,
        )
    for n, floor in ((1024, 10.0), (4096, 30.0)):
        q, k, v = heads(n), heads(n), heads(n)
        scalar = -torch.rand(1, HEADS, n, 1) / 16
        for name, own in (
            ("linear", forward(linear_attention, q, k, v)),
            ("mamba2's recurrence", forward(lambda *x: gated_recurrence(*x)[0], q, k, v, scalar)),
        ):
            yield Row(
                f"{name} forward, N = {n}",
                own,
                forward(sdpa, q, k, v),
                "SDPA",
                floor,
                recurrence_operations(n),
                close=None,
            )
    peer = fla_delta_rule()
    for n in (1024, 4096) if peer is not None else ():
        q, k, v = heads(n), F.normalize(heads(n), dim=-1), heads(n)
        beta = torch.rand(1, HEADS, n)
        yield Row(
            f"delta_rule forward, N = {n}",
            forward(unnormalized_delta_rule, q, k, v, beta),
            forward(lambda *x: peer(*(t.clone() for t in x))[0], q, k, v, beta),
            "fla delta_rule_chunkwise",
            6.0,
            1.5 * recurrence_operations(n),
        )
    n = 4096
    q, k, v = heads(n), heads(n), heads(n)
    yield Row(
        f"aaren forward, N = {n}",
        forward(aaren_call(), k, v),
        forward(sdpa, q, k, v),
        "SDPA",
        40.0,
        moved=4.0 * (2 * v.numel() + k.numel()),
        working_set=4 * 3 * v.numel(),
        close=None,
    )


def unnormalized_delta_rule(*inputs: Tensor) -> Tensor:
    """The delta rule as the peer defines it: keys arrive normalised, queries are only scaled."""
    return delta_rule_attention(*inputs, scale=WIDTH**-0.5, normalize_queries=False, normalize_keys=False)


def aaren_call() -> Callable[[Tensor, Tensor], Tensor]:
    query = torch.randn(HEADS, WIDTH)
    return lambda k, v: aaren_attention(query, k, v)


def fla_delta_rule() -> Callable[..., Any] | None:
    """flash-linear-attention's chunkwise form in plain torch, loaded from its file alone: importing the package would make
    its GPU kernels visible to transformers."""
    path = PEERS / "fla" / "ops" / "delta_rule" / "naive.py"
    if not path.exists():
        print(f"# no {path.relative_to(HERE.parent)}: the rows against it are left out (make bench fetches it)")
        return None
    sys.path.insert(0, str(PEERS))
    try:
        spec = importlib.util.spec_from_file_location("fla_naive_delta_rule", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(PEERS))
    return module.delta_rule_chunkwise


def layer_rows() -> Iterator[Row]:
    if importlib.util.find_spec("transformers") is None:
        print("# transformers is missing: the rows against its Mamba layers are left out")
    else:
        from transformers import Mamba2Config, MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        x = torch.randn(1, 1024, 512)
        for name, floor, peer in (
            ("mamba", 10.0, MambaMixer(MambaConfig(hidden_size=512, num_hidden_layers=1), layer_idx=0)),
            (
                "mamba2",
                8.0,
                Mamba2Mixer(
                    Mamba2Config(
                        hidden_size=512, num_hidden_layers=1, num_heads=16, head_dim=64, state_size=64, n_groups=1
                    ),
                    layer_idx=0,
                ),
            ),
        ):
            layer = regard.create_layer(name, 512, 8)
            yield Row(
                f"{name} layer, d = 512, N = 1024",
                forward(lambda x, layer=layer: layer(x).output, x),
                forward(peer, x),
                f"transformers {type(peer).__name__}",
                floor,
                close=None,
            )
    from regard.layers.linear import make_linear

    x = torch.randn(1024, 512)
    own, other = make_linear(512, 2048, bias=True), torch.nn.Linear(512, 2048)
    other.load_state_dict(own.state_dict())
    operations = 2 * 1024 * 512 * 2048
    yield Row(
        "linear layer 512 -> 2048, 1024 rows, forward", forward(own, x), forward(other, x), "nn.Linear", 2.0, operations
    )

    def step(module: torch.nn.Module) -> Action:
        leaf = x.clone().requires_grad_()
        direction = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(1))
        return lambda: torch.autograd.grad(module(leaf), [leaf, *module.parameters()], direction)

    yield Row(
        "linear layer 512 -> 2048, 1024 rows, forward+backward",
        step(own),
        step(other),
        "nn.Linear",
        1.7,
        3 * operations,
    )


def decode_rows() -> Iterator[Row]:
    for count, length, floor in ((8, 32768, 0.85), (1, 131072, 0.85)):
        q = torch.randn(1, count, 1, WIDTH)
        k, v = torch.randn(1, count, length, WIDTH), torch.randn(1, count, length, WIDTH)
        moved = 4.0 * 2 * k.numel()
        own = forward(lambda *x: softmax_attention(*x, pattern="noncausal-cross"), q, k, v)
        yield Row(
            f"decode, 1 query, {count} heads, cache {length}",
            own,
            forward(lambda *x: sdpa(*x, causal=False), q, k, v),
            "SDPA",
            floor,
            moved=moved,
            working_set=int(moved),
        )
    for batch in (32, 512):
        q, k, v, g = (torch.randn(batch, HEADS, WIDTH) for _ in range(4))
        g = -g.abs()
        state = torch.randn(batch, HEADS, WIDTH, WIDTH)
        size = 4 * state.numel()

        def plain(q=q, k=k, v=v, g=g, state=state) -> Tensor:
            with backends.only("torch"):
                return gated_recurrence_step(q, k, v, g, None, state)[0]

        yield Row(
            f"one recurrent step, gated_linear, batch {batch}",
            forward(lambda *x: gated_recurrence_step(*x)[0], q, k, v, g, None, state),
            forward(plain),
            "plain torch",
            0.7,
            moved=2.0 * size,
            working_set=2 * size,
            writes=True,
        )


def model_rows() -> Iterator[Row]:
    from regard.models import LanguageModel, LanguageModelConfig

    tokens = torch.randint(256, (1, 2048))

    def step(name: str) -> Action:
        torch.manual_seed(0)
        model = LanguageModel(LanguageModelConfig(vocab_size=256, dim=512, num_heads=8, plan=[name] * 8))
        parameters = list(model.parameters())
        return lambda: torch.autograd.grad(model.loss(tokens), parameters)

    softmax = step("softmax")
    for name, floor in (("softmax", 1.7), ("gated_linear", 2.0)):
        own = step(name)
        yield Row(
            f"training step, {name} LanguageModel of 8 x 512, N = 2048",
            own,
            in_plain_torch(softmax),
            "the softmax model in plain torch",
            floor,
            close=1e-3 if name == "softmax" else None,
        )
        if name != "softmax":
            yield Row(
                f"training step, {name} LanguageModel of 8 x 512, N = 2048, its own plain torch",
                own,
                in_plain_torch(own),
                "the same model in plain torch",
                floor,
                close=1e-3,
            )


def vision_rows() -> Iterator[Row]:
    """Stages of TransNeXt-T at 224 pixels, which attend to a 3 x 3 window and 7 x 7 pooled places; 24 features per head."""
    window, width = 3, 24
    for batch, count, side, factor in ((1, 3, 56, 8), (16, 3, 56, 8), (1, 12, 14, 2), (16, 12, 14, 2)):
        n, m, places = side**2, (side // factor) ** 2, window**2
        inputs = [torch.randn(batch, tokens, count, width).transpose(1, 2) for tokens in (n, n, n, m, m)]
        far = 2 * side - factor
        shapes = ((count, width), (count,), (count, places), (count, width, places), (count, places), (count, far, far))
        inputs += [torch.randn(shape) for shape in shapes]

        def own(*x: Tensor, grid=(side, side), factor=factor) -> Tensor:
            return aggregated_attention(*x[:5], Problem(grid, factor, window, *x[5:]))

        operations = 2 * batch * count * n * width * (2 * m + 3 * places)
        for name, action, passes in (("forward", forward, 1), ("forward+backward", training, 3)):
            yield Row(
                f"aggregated attention, {side} x {side} places, {count} heads, batch {batch}, {name}",
                action(own, *inputs),
                in_plain_torch(action(own, *inputs)),
                "the same in plain torch",
                1.0,
                passes * operations,
                close=1e-4,
            )


GROUPS = (softmax_rows, sparse_rows, recurrence_rows, layer_rows, decode_rows, model_rows, vision_rows)


def largest(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [t for part in x if part is not None for t in largest(part)]


def difference(own: Any, other: Any) -> float:
    """Largest difference over all tensors, relative to the largest value."""
    worst = 0.0
    for a, b in zip(largest(own), largest(other), strict=True):
        worst = max(worst, float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30)))
    return worst


def measure(row: Row, peak: float, seconds: float) -> Found:
    if row.close is not None:
        apart = difference(row.own(), row.other())
        if apart > row.close:
            raise SystemExit(f"{row.name}: outputs differ by {apart:.2e}, more than {row.close:.0e}")
    timings = interleaved({"own": row.own, "other": row.other}, seconds=seconds, least=5, most=200)
    own, other = timings["own"].median, timings["other"].median
    share, of, met = None, "", other / own >= row.floor
    if row.operations:
        share, of = row.operations / own / 1e9 / peak, "FMA peak"
    elif row.moved:
        speed = machine.bandwidth(row.working_set, write=row.writes)
        share, of = row.moved / own / speed, f"bandwidth of {speed / 1e9:.0f} GB/s at that working set"
        met = share >= row.floor if row.floor <= 1 else met
    return Found(row.name, row.against, own * 1e3, other * 1e3, other / own, row.floor, met, share, of)


def efficiency() -> list[str]:
    """The length from which each mechanism beats regard's softmax, in forward and in forward+backward."""
    lengths = (64, 128, 256, 512, 1024, 2048)
    limits = {name: (256, 512) for name in ("linear", "gated_linear", "mamba2's recurrence", "aaren", "flow_attention")}
    limits |= {"delta_rule": (1024, 1024), "mamba's selective scan": (1024, 1024)}
    found: dict[str, dict[str, dict[int, float]]] = {}
    for n in lengths:
        q, k, v, g, beta = heads(n), heads(n), heads(n), gate(n), torch.rand(1, HEADS, n)
        scalar = -torch.rand(1, HEADS, n, 1) / 16
        x, dt = torch.randn(1, n, HEADS * WIDTH), torch.rand(1, n, HEADS * WIDTH)
        a, b = -torch.rand(HEADS * WIDTH, 16), torch.randn(1, n, 1, 16)
        from regard.engines.selective_scan import selective_scan

        calls: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
            "softmax": (softmax_attention, (q, k, v)),
            "linear": (linear_attention, (q, k, v)),
            "gated_linear": (gated_linear_attention, (q, k, v, g)),
            "mamba2's recurrence": (lambda *t: gated_recurrence(*t)[0], (q, k, v, scalar)),
            "aaren": (aaren_call(), (k, v)),
            "flow_attention": (flow_attention, (q, k, v)),
            "delta_rule": (delta_rule_attention, (q, F.normalize(k, dim=-1), v, beta)),
            "mamba's selective scan": (lambda *t: selective_scan(*t)[0], (x, dt, a, b, b.clone())),
        }
        for what, wrap in (("forward", forward), ("forward+backward", training)):
            timings = interleaved({name: wrap(f, *t) for name, (f, t) in calls.items()}, seconds=1.5, least=5, most=300)
            for name, timing in timings.items():
                found.setdefault(name, {}).setdefault(what, {})[n] = timing.median
    lines = ["| mechanism | forward | wanted | forward+backward | wanted |", "|---|---:|---:|---:|---:|"]
    for name, (most_forward, most_training) in limits.items():
        cells = []
        for what, most in (("forward", most_forward), ("forward+backward", most_training)):
            length = efficiency_length(found[name][what], found["softmax"][what])
            cells += [f"beyond {lengths[-1]}" if length is None else f"{'<= ' if length == lengths[0] else ''}{length}"]
            cells += [str(most)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


MEMORY = """
import re, sys, torch
from pathlib import Path
from regard.functional import gated_linear_attention

def peak():  # of this process alone; ru_maxrss begins with that of its parent
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

n = int(sys.argv[1])
leaves = [torch.randn(1, 8, n, 64) for _ in range(4)]
leaves[3].abs_().neg_()
leaves = [t.requires_grad_() for t in leaves]
direction = torch.ones(1, 8, n, 64)
small = [t[:, :, :64].detach().requires_grad_() for t in leaves]
torch.autograd.grad(gated_linear_attention(*small), small, direction[:, :, :64])
before = peak()
torch.autograd.grad(gated_linear_attention(*leaves), leaves, direction)
print(peak() - before)
"""


def memory() -> str:
    """Peak memory of a process running gated_linear forward+backward, beyond inputs, output and gradients."""
    n = 65536
    tensor = 4 * HEADS * n * WIDTH
    done = subprocess.run([sys.executable, "-c", MEMORY, str(n)], capture_output=True, text=True, check=True)
    grown = int(done.stdout)
    extra = grown - 5 * tensor  # without the output and the four gradients
    return (
        f"Peak extra memory of gated_linear forward+backward at N = {n}, beyond inputs, output and gradients: "
        f"{extra / 2**20:.0f} MiB, {extra / (8 * tensor):.2f}x the size of q, k, v, gate and their gradients (wanted: at most 0.5x)."
    )


def beside_another(calls: int = 200) -> list[str]:
    """Times of single calls at 1,024 tokens, alone and next to a process that keeps one core busy: the median, the mean
    and the 90th percentile, in milliseconds."""
    q, k, v, g = heads(1024), heads(1024), heads(1024), gate(1024)
    functions = {
        "softmax": lambda: softmax_attention(q, k, v),
        "linear": lambda: linear_attention(q, k, v),
        "gated_linear": lambda: gated_linear_attention(q, k, v, g),
        "SDPA": lambda: sdpa(q, k, v),
    }

    def timed() -> dict[str, np.ndarray]:
        found = {}
        for name, function in functions.items():
            times = []
            for _ in range(calls + 20):
                start = time.perf_counter()
                function()
                times.append(1e3 * (time.perf_counter() - start))
            found[name] = np.array(times[20:])
        return found

    with torch.no_grad():
        alone = timed()
        with neighbour():
            beside = timed()

    def row(name: str) -> str:
        cells = [f"{f(t):.2f}" for t in (alone[name], beside[name]) for f in (np.median, np.mean, _ninetieth)]
        return f"| {name} | {' | '.join(cells)} | {beside[name].mean() / alone[name].mean():.2f}x |"

    return [
        "| call | median alone, ms | mean | p90 | median beside, ms | mean | p90 | mean / mean |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *map(row, functions),
    ]


def calls_of_python(action: Action) -> int:
    """Number of Python functions that one call of `action` runs."""
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count - 1  # without the action itself


def decoding(name: str, layers: int = 30) -> Action:
    """An action that decodes one more token after a prompt of 64, in a model of width 64 with 2 heads."""
    from regard.models import LanguageModel, LanguageModelConfig

    model = LanguageModel(LanguageModelConfig(vocab_size=256, dim=64, num_heads=2, plan=[name] * layers)).eval()
    token, want = torch.zeros(1, 1, dtype=torch.long), regard.Context(want=frozenset({"state"}))
    state = model(torch.randint(256, (1, 64)), context=want).state

    def step() -> Tensor:
        nonlocal state
        result = model(token, state=state)
        state = result.state
        return result.output.argmax(-1)

    return step


@torch.no_grad()
def overhead(seconds: float) -> list[str]:
    """Work so small that overhead is most of its time: median time and number of Python function calls."""
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    g, rate = -torch.rand(1, 2, 4, 8), torch.rand(1, 2, 4)
    calls: dict[str, Action] = {
        "SDPA": lambda: sdpa(q, k, v),
        "softmax": lambda: softmax_attention(q, k, v),
        "linear": lambda: linear_attention(q, k, v),
        "gated_linear": lambda: gated_linear_attention(q, k, v, g),
        "delta_rule": lambda: delta_rule_attention(q, k, v, rate),
    }
    steps = {name: decoding(name) for name in ("softmax", "linear", "gated_linear")}
    lines = ["| work | median | functions of Python |", "|---|---:|---:|"]
    for what, actions in (("{} of 4 tokens, 2 heads of 8", calls), ("one token by 30 layers of {}", steps)):
        timings = interleaved(actions, seconds=seconds, least=30, most=2000)
        for name, action in actions.items():
            lines.append(f"| {what.format(name)} | {1e6 * timings[name].median:.1f} us | {calls_of_python(action)} |")
    return lines


def _ninetieth(times: np.ndarray) -> float:
    return float(np.percentile(times, 90))


def table(rows: list[Found]) -> list[str]:
    lines = [
        "| what | ms | against | ms | faster | floor | | share |",
        "|---|---:|---|---:|---:|---:|---|---|",
    ]
    for r in rows:
        share = "" if r.share is None else f"{r.share:.0%} of {r.of}"
        floor = f"{r.floor:g}x" if r.floor > 1 else f"{r.floor:.0%} of bandwidth"
        met = "met" if r.met else "**missed**"
        lines.append(
            f"| {r.name} | {r.own:.3g} | {r.against} | {r.other:.3g} | {r.ratio:.2f}x | {floor} | {met} | {share} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="rows whose name matches this regular expression")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each row")
    parser.add_argument("--busy", action="store_true", help="calls beside a busy process, and nothing else")
    parser.add_argument("--overhead", action="store_true", help="the smallest calls, and nothing else")
    parser.add_argument("--list", action="store_true", help="names of the rows")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.manual_seed(0)
    keep_freed_memory()
    if options.busy:
        print("\n".join(beside_another()))
        return
    if options.overhead:
        print("\n".join(overhead(options.seconds)))
        return
    peak = machine.fma_peak(0.5)
    found: list[Found] = []
    for group in GROUPS:
        for row in group():
            if options.only and not re.search(options.only, row.name):
                continue
            if options.list:
                print(row.name)
                continue
            found.append(measure(row, peak, options.seconds))
            print(table(found)[-1], flush=True)
            gc.collect()
    if options.list:
        return
    if options.only:
        print("\n".join(table(found)))
        return
    facts = fingerprint()
    now = machine.fma_peak(0.5)
    lines = [
        f"- machine: {facts['cpu']}, {facts['physical_cores']} cores, {facts['memory_bytes'] / 2**30:.1f} GiB; "
        f"{facts['threads']} threads",
        f"- versions: regard {facts['regard']}, torch {facts['torch']}, numpy {facts['numpy']}, Python {facts['python']}",
        f"- instruction set: {library.instruction_set()}; FMA peak, register only: {peak:.0f} GFLOP/s before, {now:.0f} "
        "after the run",
        f"- {date.today()}; command: `make bench`",
        "",
        *table(found),
        "",
        "Length from which a mechanism stays faster than own softmax (interpolated between measured lengths):",
        "",
        *efficiency(),
        "",
        "Calls at 1,024 tokens, alone and beside a PyTorch process that keeps one core busy:",
        "",
        *beside_another(),
        "",
        "Work so small that the way to it is most of its time:",
        "",
        *overhead(options.seconds),
        "",
        memory(),
    ]
    write(lines)
    if options.json:
        options.json.write_text(json.dumps([asdict(f) for f in found], indent=1))
    print("\n".join(lines))


def write(lines: list[str]) -> None:
    """Replace the text between the markers in RESULTS.md."""
    path = HERE / "RESULTS.md"
    begin, end = "<!-- kernels: written by make bench -->", "<!-- end of kernels -->"
    text = path.read_text()
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(head + begin + "\n\n" + "\n".join(lines) + "\n\n" + end + tail)


if __name__ == "__main__":
    main()
