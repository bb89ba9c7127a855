"""A uniform view of native kernels for tests: named tensors in, named results and gradients out, in both forms of an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.backends.native import library
from regard.contract import BlockMask
from regard.core.visibility import DistanceBias, Ranks, Visibility
from regard.engines import (
    aggregated_attention,
    attention,
    conserved_flows,
    gated_recurrence,
    grouped_attention,
    layers,
    linear_attention,
    map_distance,
    pixel_attention,
    quest_attention,
    retrieved_attention,
    selective_scan,
    softmax_scan,
)
from regard.engines.attention import paged
from regard.engines.cache import take
from regard.engines.layers.native_form import convolution, gating, norm, rotation
from regard.engines.softmax_scan import Carry
from regard.positions import create_positions

Tensors = dict[str, Tensor | None]
SETS = library.instruction_sets() if library.why_missing() is None else []


def differentiated(
    call: Callable[..., Tensors], inputs: Tensors, weights: Tensors, dtype: Any = None, by: tuple[str, ...] = ()
) -> Tensors:
    """Results of a call and the gradients of their sum weighted by `weights`, computed in `dtype` if it is given.

    Gradients are taken with respect to the inputs `by`, or to all floating-point inputs.

    Missing weights are drawn, and stored in `weights` for the next call.
    """
    leaves = dict(inputs)
    for name, x in inputs.items():
        if x is not None and x.is_floating_point():
            leaves[name] = x.detach().to(dtype or x.dtype).requires_grad_(not by or name in by)
    results = {name: y for name, y in call(**leaves).items() if y is not None}
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    grads = [torch.zeros_like(x) for x in wanted.values()]
    used = [name for name, y in results.items() if y.requires_grad]
    for name in used:
        weights.setdefault(name, torch.randn(results[name].shape).to(results[name].dtype))
    if used:
        outputs = [results[name] for name in used]
        given = [weights[name].to(y.dtype) for name, y in zip(used, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, list(wanted.values()), given, allow_unused=True, materialize_grads=True)
    found = {name: y.detach() for name, y in results.items()}
    return found | {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}


@dataclass(frozen=True)
class Kernel:
    """A kernel, its expected results, and the required accuracy.

    Attributes:
        call: returns named results, given a form of the engine, named tensors and options.
        native: the form that runs the kernel.
        plain: the torch form, which is the reference in float64.
        float32: largest error, relative to the largest value.
        bfloat16: the same for results that are rounded to bfloat16.
        least: values, by name or for all results (``*``), below which errors are absolute.
        wide: results that are float32 whatever the inputs' dtype.
        sequences: inputs with a token axis.
        axis: the index of the token axis.
        tile: number of tokens multiplied together, so that NaN may reach earlier tokens of the tile.
        alone: options with which the plain form never multiplies tokens together.
    """

    call: Callable[..., Tensors]
    native: Any
    plain: Any
    float32: float = 2e-6
    bfloat16: float = 4e-3
    least: Mapping[str, float] = field(default_factory=dict)
    wide: tuple[str, ...] = ()
    sequences: tuple[str, ...] = ()
    axis: int = 2
    tile: int = 1
    alone: Mapping[str, Any] = field(default_factory=dict)

    def run(self, inputs: Tensors, **options: Any) -> Tensors:
        return self.call(self.native, **inputs, **options)

    def gradients(self, inputs: Tensors, weights: Tensors | None = None, **options: Any) -> Tensors:
        """The kernel's results and gradients."""
        return differentiated(partial(self.call, self.native, **options), inputs, {} if weights is None else weights)

    def check(self, inputs: Tensors, only: tuple[str, ...] = (), **options: Any) -> None:
        """Assert that results and gradients, all or `only` some, are those of float64, in the right dtypes."""
        weights: Tensors = {}
        found = self.gradients(inputs, weights, **options)
        expected = differentiated(partial(self.call, self.plain, **options), inputs, weights, torch.float64)
        self.compare(inputs, found, expected, only)

    def check_every_set(self, inputs: Tensors, **options: Any) -> None:
        """:meth:`check` with every instruction set of this machine, against float64 results that are computed once."""
        weights: Tensors = {}
        expected = None
        assert SETS
        for name in SETS:
            with library.using_instruction_set(name):
                found = self.gradients(inputs, weights, **options)
            if expected is None:
                expected = differentiated(partial(self.call, self.plain, **options), inputs, weights, torch.float64)
            self.compare(inputs, found, expected)

    def compare(self, inputs: Tensors, found: Tensors, expected: Tensors, only: tuple[str, ...] = ()) -> None:
        narrow = next(inputs[name].dtype for name in ("v", "x", "sinks", "k") if name in inputs)
        assert found.keys() == expected.keys()
        for name in only or found:
            if not name.startswith("grad"):
                assert found[name].dtype == (torch.float32 if name in self.wide else narrow), name
            self.close(found[name], expected[name], name)

    def close(self, found: Tensor, expected: Tensor, name: str = "") -> None:
        assert found.shape == expected.shape, name
        if expected.numel():
            error, size = float((found.double() - expected).abs().max()), float(expected.abs().max())
            size = max(size, self.least.get(name, self.least.get("*", 1e-30)))
            most = self.bfloat16 if found.dtype == torch.bfloat16 else self.float32
            assert error <= most * size, f"{name}: {error:.1e} of {size:.1e}"

    def check_nan(self, inputs: Tensors, **options: Any) -> None:
        """Assert that a token's NaN reaches everything that it does by the definition, and no other head or earlier tile."""
        token, clean = 70, self.run(inputs, **options)
        for name in self.sequences:
            if inputs.get(name) is None:
                continue
            spoiled = inputs | {name: inputs[name].clone()}
            place = (0, token) if self.axis == 1 else (0, min(1, inputs[name].shape[1] - 1), token)
            spoiled[name][place].view(-1)[-1:] = math.nan
            found = self.run(spoiled, **options)
            exact = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in spoiled.items()}
            expected = self.call(self.plain, **exact, **options, **self.alone)
            for result, y in found.items():
                if y is None:
                    continue
                reached, must = y.isnan(), expected[result].isnan()
                assert reached[must].all(), f"NaN in {name} does not reach {result}"
                near = torch.zeros_like(reached)
                if y.ndim > self.axis and y.shape[self.axis] == inputs[name].shape[self.axis]:
                    near[(*place[:-1], slice(token // self.tile * self.tile, token))] = self.tile > 1
                assert not (reached & ~must & ~near).any(), f"NaN in {name} reaches too much of {result}"
                assert torch.equal(y[~reached & ~near], clean[result][~reached & ~near]), f"{name}, {result}"


# The gated recurrence, with and without the delta rule.


def _gated_recurrence(form, q, k, v, log_decay, state, beta=None, inclusive=True, chunk=64) -> Tensors:
    problem = gated_recurrence.Problem(q, k, v, log_decay, beta, state, inclusive)
    o, last = form.run(problem, chunk, min(chunk, 16))
    return {"o": o, "last": last}


def _step(form, q, k, v, log_decay, state, beta=None) -> Tensors:
    o, last = form.run_step(q, k, v, log_decay, beta, state)
    return {"o": o, "last": last}


GATED = Kernel(
    _gated_recurrence, gated_recurrence.native_form, gated_recurrence.torch_form, wide=("last",),
    sequences=("q", "k", "v", "log_decay"), tile=16, alone={"chunk": 1},
)  # fmt: skip
# observed 1e-6, and 4e-6 for the gradient of a nearly forgotten state: it is what remains of gradients of size 1, which
# the rule may shrink to almost nothing; in bfloat16 3.6e-3
DELTA = replace(
    GATED, float32=5e-6, bfloat16=8e-3, least={"grad state": 1.0}, sequences=(*GATED.sequences, "beta"), tile=32
)  # fmt: skip
STEP = replace(GATED, call=_step, native=gated_recurrence.step, sequences=())


def recurrent(
    n: int, batch: int = 2, heads: int = 4, width: int = 8, values: int = 6, decay: str = "vector",
    groups: int | None = None, delta: bool = False, dtype: torch.dtype = torch.float32,
) -> Tensors:  # fmt: skip
    """Inputs of the recurrence; for the delta rule keys have unit length, so that its steps cannot grow."""
    q, k = torch.randn(2, batch, groups or heads, n, width) / width**0.25
    g = None
    if decay != "none":
        g = -F.softplus(2 * torch.randn(batch, heads, n, 1 if decay == "scalar" else width) - 1)
    found = {"q": q.to(dtype), "k": (F.normalize(k, dim=-1) if delta else k).to(dtype)}
    found |= {"v": torch.randn(batch, heads, n, values).to(dtype), "log_decay": g}
    found["state"] = torch.randn(batch, heads, width, values)
    return found | ({"beta": torch.rand(batch, heads, n)} if delta else {})


def one_token(inputs: Tensors) -> Tensors:
    """The first token of the recurrence's inputs, in the form that its step takes."""
    return {name: x if x is None or name == "state" else x[:, :, 0] for name, x in inputs.items()}


# Linear attention.

ELU = linear_attention.Rule("elu", 1.0, 1e-6)


def _linear_attention(form, q, k, v, state, valid=None, rule=ELU, chunk=64) -> Tensors:
    o, last = form.run(linear_attention.Problem(q, k, v, state, valid), rule, chunk)
    return {"o": o, "last": last}


LINEAR = Kernel(
    _linear_attention, linear_attention.native_form, linear_attention.torch_form, wide=("last",),
    sequences=("q", "k", "v"), tile=16, alone={"chunk": 1},
)  # fmt: skip


def linear(
    n: int, batch: int = 2, heads: int = 4, width: int = 8, values: int = 6, rule: linear_attention.Rule = ELU,
    groups: int | None = None, valid: list[int] | None = None,
) -> Tensors:  # fmt: skip
    """Inputs of linear attention; the state is never negative, so that denominators do not vanish with `relu` features."""
    q, k = torch.randn(2, batch, groups or heads, n, width)
    state = torch.rand(batch, heads, width, values + (rule.eps is not None))
    found = {"q": q, "k": k, "v": torch.randn(batch, heads, n, values), "state": state}
    return found | ({} if valid is None else {"valid": torch.tensor(valid)})


# The selective scan.


def _selective_scan(
    form, x, dt, a, b, c, skip, dt_bias, z, state, lengths=None, order=None, inclusive=True, chunk=64
) -> Tensors:
    problem = selective_scan.Problem(x, dt, a, b, c, skip, dt_bias, z, state, lengths, order, inclusive)
    o, last = form.run(problem, chunk)
    return {"o": o, "last": last}


# observed 1e-6, and 6e-6 where a gradient of a or of the state nearly cancels; in bfloat16 3.9e-3
SELECTIVE = Kernel(
    _selective_scan, selective_scan.native_form, selective_scan.torch_form, float32=1e-5, bfloat16=8e-3,
    wide=("last",), sequences=("x", "dt", "b", "c", "z"), axis=1,
)  # fmt: skip


def selective(
    n: int, batch: int = 2, channels: int = 6, groups: int = 2, states: int = 5, dtype: torch.dtype = torch.float32,
    read: bool = True, surrounded: bool = True, lengths: list[int] | None = None,
) -> Tensors:  # fmt: skip
    """Inputs of the selective scan; `surrounded` adds skip, dt_bias, z and a state."""
    x, dt, z = (torch.randn(batch, n, channels).to(dtype) for _ in range(3))
    b, c = (torch.randn(batch, n, groups, states).to(dtype) for _ in range(2))
    found: Tensors = {"x": x, "dt": dt, "a": -8 * torch.rand(channels, states), "b": b, "c": c if read else None}
    found |= {"skip": torch.randn(channels), "dt_bias": torch.randn(channels) - 1, "z": z}
    found["state"] = torch.randn(batch, channels, states)
    if not surrounded:
        found |= {"dt": dt.abs(), **dict.fromkeys(("skip", "dt_bias", "z", "state"))}
    return found | ({} if lengths is None else {"lengths": torch.tensor(lengths)})


# The softmax scan.


def _softmax_scan(form, s, v, m, u, w, log_decay=None, mix=None, chunk=16) -> Tensors:
    o, carry = form.run(softmax_scan.Problem(s, v, log_decay, mix, m, u, w), chunk)
    return {"o": o, "m": carry.m.detach(), "u": carry.u, "w": carry.w}


SCAN = Kernel(
    _softmax_scan, softmax_scan.native_form, softmax_scan.torch_form, float32=5e-6, bfloat16=1e-2, least={"*": 0.1},
    wide=("m", "u", "w"), sequences=("s", "v", "log_decay", "mix"), alone={"chunk": 1},
)  # fmt: skip


def scanned(
    n: int, batch: int = 2, heads: int = 4, queries: int = 3, values: int = 6, decay: bool = False, mix: bool = False,
    dtype: torch.dtype = torch.float32, seen: bool = True,
) -> Tensors:  # fmt: skip
    """Inputs of the softmax scan; `seen` adds a carry of earlier tokens."""
    s, v = 3 * torch.randn(batch, heads, n, queries), torch.randn(batch, heads, n, values).to(dtype)
    carry = softmax_scan.empty_carry(s, v)
    if seen:
        carry = Carry(torch.randn_like(carry.m), torch.rand_like(carry.u) + 0.5, torch.randn_like(carry.w))
    found = {"s": s, "v": v, **carry._asdict()}
    found |= {"log_decay": -torch.rand(batch, 1, n)} if decay else {}
    return found | ({"mix": torch.rand(batch, heads, n, queries)} if mix else {})


# Conserved flows.


def _conserved_flows(form, sinks, sources, totals, maximum, normalizer, length, valid=None, *, rule) -> Tensors:
    problem = conserved_flows.Problem(sinks, sources, totals, maximum.detach(), normalizer, length, valid)
    competition, acceptance, after = form.run(problem, rule)
    found = {"competition": competition, "acceptance": acceptance, "totals": after.totals}
    return found | {"maximum": after.maximum.detach(), "normalizer": after.normalizer}


FLOWS = Kernel(
    _conserved_flows, conserved_flows.native_form, conserved_flows.torch_form, float32=1e-5, least={"*": 0.1},
    sequences=("sinks", "sources"),
)  # fmt: skip


def flows(n: int, batch: int = 2, heads: int = 4, width: int = 8, valid: list[int] | None = None) -> Tensors:
    sinks, sources = torch.rand(2, batch, heads, n, width)
    if valid is not None:
        hidden = torch.arange(n) >= torch.tensor(valid)[:, None]
        sinks, sources = (x.masked_fill(hidden[:, None, :, None], 0) for x in (sinks, sources))
    found = {"sinks": sinks, "sources": sources, "totals": torch.rand(4, batch, heads, width)}
    found |= {"maximum": torch.randn(batch, heads), "normalizer": torch.rand(batch, heads) + 0.5}
    found["length"] = torch.randint(0, 9, (batch,))
    return found | ({} if valid is None else {"valid": torch.tensor(valid)})


# The parts of a layer around its matrix products.


def _convolution(form, x, weight, bias=None, cache=None, lengths=None, silu=True, causal=True) -> Tensors:
    after = 0 if causal else (weight.shape[1] - 1) // 2
    y, last = form.short_convolution(layers.ShortConvolution(x, weight, bias, cache, lengths, after, silu))
    return {"y": y, "last": last if causal else None}


def _norm(form, x, weight=None, z=None, groups=1, after=False) -> Tensors:
    return {"y": form.rms_norm(layers.RMSNorm(x, weight, z, groups, 1e-5, after))}


def _rotary(form, x, positions, rotated, base=1e4, stretch=1.5) -> Tensors:
    return {"y": form.rotary(x, positions, rotated, base, stretch)}


def _product(form, x, gate, function="silu") -> Tensors:
    return {"y": form.gated_product(layers.GatedProduct(x, gate, layers.GATE_FUNCTIONS.index(function)))}


CONVOLUTION = Kernel(
    _convolution, convolution, layers.torch_form, bfloat16=1e-2, least={"*": 0.1}, sequences=("x",), axis=1
)
NORM = replace(CONVOLUTION, call=_norm, native=norm, sequences=("x", "z"))
ROTARY = replace(CONVOLUTION, call=_rotary, native=rotation, axis=2)
PRODUCT = replace(CONVOLUTION, call=_product, native=gating, sequences=("x", "gate"))


def convolved(n: int, batch: int = 2, channels: int = 6, width: int = 4) -> Tensors:
    found = {"x": torch.randn(batch, n, channels), "weight": torch.randn(channels, width)}
    found |= {"bias": torch.randn(channels), "cache": torch.randn(batch, width - 1, channels)}
    return found | {"lengths": torch.tensor([n, 7, *range(3, batch + 1)][:batch])}


# Attention, and softmax in two levels.


def _attention(
    form, q, k, v, sink=None, bias=None, table=None, *, ranks, rule="softmax", blocks=None, **limits
) -> Tensors:
    more = {"stretch": (-0.05, 1.5)} if rule == "clipped" else {"rule": rule, "want_lse": rule == "softmax"}
    position_bias = None
    if table is not None:
        position_bias = DistanceBias(lambda d: table[:, (d + table.shape[1] // 2).clamp(0, table.shape[1] - 1)])
    problem = attention.Problem(
        ranks, Visibility(causal=True, **limits), 0.3, softcap=2.0, sink=sink, bias=bias, position_bias=position_bias,
        blocks=blocks, **more,
    )  # fmt: skip
    o, _, lse = form.run(q, k, v, problem)
    return {"o": o, "lse": lse}


def _paged(form, q, k, v, pages, lengths, query_ranks) -> Tensors:
    o, lse = form.attention_decode(q, k, v, pages, lengths, query_ranks, [1, 20, -1, 0, 0, 0], 0.3, 0.0, None)
    return {"o": o, "lse": lse}


def _quest(form, q, k, v, low, high, counts, *, page=8, chosen=3, shared=True) -> Tensors:
    return {"o": form.run(quest_attention.Problem(q, k, v, low, high, counts, page, chosen, shared, 0.3))}


def _grouped_attention(form, q, k, v, ranks, landmark, own, causal=True, scale=0.5) -> Tensors:
    problem = grouped_attention.Problem(ranks, landmark, own, causal, scale, grouped_attention.Dropout())
    return {"o": form.run(q, k, v, problem)[0]}


# gradients come from a difference of numbers rounded to bfloat16; see test_attention for the definition
ATTENTION = Kernel(
    _attention,
    attention.native_form,
    attention.torch_form,
    float32=3e-6,
    bfloat16=2e-2,
    least={"*": 1.0},
    wide=("lse",),
)
PAGED = Kernel(_paged, paged, None)
QUEST = Kernel(_quest, quest_attention.native_form, quest_attention.torch_form, least={"*": 1.0})
# bfloat16 gradients come from a difference of rounded numbers: 8.6e-3 in one of 31 draws, with every instruction set
GROUPED = Kernel(
    _grouped_attention, grouped_attention.native_form, grouped_attention.torch_form, bfloat16=1.2e-2, least={"*": 1.0}
)


def _pixel_attention(
    form, q, k, v, estimate, totals, row_logit=None, mix_logit=None, first=None, before=None, jitter=None, *, ranks,
    top_k=4, grouping="row", oversample=1.0,
) -> Tensors:  # fmt: skip
    problem = pixel_attention.Problem(estimate, totals, ranks, top_k, oversample, grouping, 0.5, jitter=jitter)
    mean = None if first is None else pixel_attention.Mean(first, before, 0 if before is None else k.shape[2] - 5)
    return {"o": form.run(q, k, v, problem, pixel_attention.Mix(row_logit, mix_logit, mean))[0]}


def _retrieved_attention(
    form, q, k, v, marks, closed, landmark, cached, length, chosen=None, *, block=9, top_k=3, rotate=None
) -> Tensors:
    problem = retrieved_attention.Problem(
        marks, closed, landmark, cached, length, block, top_k, 0.3, rotate=rotate, chosen=chosen
    )
    o, lse = form.run(q, k, v, problem)
    return {"o": o, "lse": lse}


RETRIEVED = Kernel(
    _retrieved_attention,
    retrieved_attention.native_form,
    retrieved_attention.torch_form,
    float32=4e-6,
    least={"*": 1.0},
    wide=("o", "lse"),
)

PIXELS = Kernel(
    _pixel_attention,
    pixel_attention.native_form,
    pixel_attention.torch_form,
    float32=4e-6,
    bfloat16=8e-3,
    least={"*": 1.0},
)


def pixels_of(
    n: int,
    m: int | None = None,
    *,
    pixels: int = 12,
    running: bool = True,
    jitter: bool = False,
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Tensors:
    """Inputs; `running` means average the values seen by a query after five earlier ones, otherwise each head has one mean."""
    m = n if m is None else m
    found = heads_of(n, m, dtype=dtype, **sizes)
    batch, heads = found["q"].shape[:2]
    found |= {"estimate": 2 * torch.randn(batch, heads, n, pixels), "totals": _seen(n, m)}
    found |= {name: torch.randn(batch, heads, n) for name in ("row_logit", "mix_logit")}
    groups = found["v"].shape[1] if running else heads
    found["first"] = torch.randn(batch, groups, found["v"].shape[3])
    found |= {"jitter": _shifts(batch, m)} if jitter else {}
    return found | ({"before": torch.full((batch,), 5)} if running else {})


def _seen(n: int, m: int) -> Tensor:
    """Number of keys seen by each of n queries, which are the last of m tokens."""
    return (torch.arange(m - n, m)[None] + 1).clamp(min=0)


def _shifts(batch: int, m: int) -> Tensor:
    """Jitter for all rows but the first."""
    shifts = 1.5 * torch.rand(batch, m, dtype=torch.float64) - 0.75
    return torch.where(torch.arange(batch)[:, None] > 0, shifts, 0)


def _aggregated_attention(form, q, k, v, far_k, far_v, *, grid, factor=2, window=3, **learned) -> Tensors:
    return {"o": form.run(q, k, v, far_k, far_v, aggregated_attention.Problem(grid, factor, window, **learned))}


AGGREGATED = Kernel(
    _aggregated_attention,
    aggregated_attention.native_form,
    aggregated_attention.torch_form,
    float32=4e-6,
    bfloat16=8e-3,
    # sums over all places, with terms of about 10 that cancel
    least={"*": 1.0, "grad slope": 100.0, "grad moved": 50.0},
)


def aggregated_of(
    grid: tuple[int, int], factor: int = 2, window: int = 3, *, batch: int = 2, heads: int = 3, width: int = 6,
    dtype: torch.dtype = torch.float32,
) -> Tensors:  # fmt: skip
    """Queries, keys and values of a map, keys and values of pooled places, and learned parameters."""
    (rows, columns), places = grid, window**2
    near, far = (batch, heads, rows * columns, width), (batch, heads, rows // factor * (columns // factor), width)
    shapes = {"q": near, "k": near, "v": near, "far_k": far, "far_v": far}
    found = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    shapes = {"moved": (heads, width), "slope": (heads,), "near_bias": (heads, places)}
    shapes |= {"near_tokens": (heads, width, places), "near_weights": (heads, places)}
    shapes |= {"table": (heads, max(0, 2 * rows - factor), max(0, 2 * columns - factor))}
    return found | {name: torch.randn(shape) for name, shape in shapes.items()}


def _map_distance(form, estimate, q, k, totals, target=None, jitter=None, *, ranks) -> Tensors:
    target = None if target is None else target.detach()
    kl, squares = form.run(q, k, estimate, map_distance.Problem(totals, ranks, 0.5, jitter, target))
    return {"kl": kl, "squares": squares}


MAPS = Kernel(
    _map_distance,
    map_distance.native_form,
    map_distance.torch_form,
    float32=4e-6,
    bfloat16=8e-3,
    least={"*": 1.0},
    wide=("kl", "squares"),
)


def maps_of(
    n: int, m: int | None = None, *, pixels: int = 12, target: bool = False, jitter: bool = False,
    dtype: torch.dtype = torch.float32, **sizes: Any,
) -> Tensors:  # fmt: skip
    m = n if m is None else m
    found = heads_of(n, m, dtype=dtype, **sizes)
    batch, heads = found["q"].shape[:2]
    found = {
        "estimate": 2 * torch.randn(batch, heads, n, pixels),
        "q": found["q"],
        "k": found["k"],
        "totals": _seen(n, m),
    }
    found |= {"target": torch.randn(batch, heads, n, m).softmax(-1)} if target else {}
    return found | ({"jitter": _shifts(batch, m)} if jitter else {})


def heads_of(
    n: int, m: int | None = None, *, batch: int = 2, heads: int = 4, groups: int = 2, width: int = 8, values: int = 6,
    dtype: torch.dtype = torch.float32,
) -> Tensors:  # fmt: skip
    m = n if m is None else m
    shapes = {"q": (batch, heads, n, width), "k": (batch, groups, m, width), "v": (batch, groups, m, values)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def last_of(n: int, m: int, counted: bool = False) -> Ranks:
    """Ranks of n queries that are the last of m tokens."""
    return Ranks(
        torch.arange(m - n, m)[None], torch.arange(m)[None], *((m - n, m - n) if counted else (None, None)), counted
    )


def rotary(width: int) -> Any:
    return create_positions("rotary", dim=width, heads=1, head_dim=width).rotate


def retrieved_of(
    n: int,
    m: int = 104,
    *,
    block: int = 9,
    top_k: int = 3,
    choose: bool = False,
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Tensors:
    """Queries and a cache of two rows, the second with fewer tokens; `choose` fixes the blocks to read, else the best are."""
    found, size = heads_of(n, m, dtype=dtype, **sizes), block + 1
    found["q"] = found["q"].float()
    length = torch.tensor([m, max(0, m - 33)])
    rank, count = torch.arange(m) + (length - m)[:, None], length // size
    number = torch.arange(m // size) - m // size + count[:, None]
    closed = torch.where(number < 0, -1, number * size + block)
    slot = (closed + (m - length)[:, None]).clamp(min=0)
    found["marks"] = take(found["k"], slot)
    found |= {"closed": closed, "landmark": (rank >= 0) & (rank % size == block), "cached": length, "length": length}
    if choose:
        picks = min(top_k, closed.shape[1])
        scores = torch.rand(2, found["q"].shape[1], n, closed.shape[1]).masked_fill(
            number[:, None, None] < 0, -torch.inf
        )
        found["chosen"] = retrieved_attention.best(scores, torch.zeros(()), picks)
    return found


def pages_of(n: int) -> Tensors:
    found = {"q": torch.randn(2, 4, 2, 8), "k": torch.randn(6, 2, 16, 8), "v": torch.randn(6, 2, 16, 6)}
    found |= {"pages": torch.randperm(6).view(2, 3), "lengths": torch.tensor([40, 7])}
    return found | {"query_ranks": torch.tensor([[38, 39], [5, 6]])}


def quest_of(counts: list[list[int]], *, slots: int = 64, page: int = 8, **sizes: Any) -> Tensors:
    """A query token, and keys in pages with their bounds."""
    made = heads_of(1, slots, batch=len(counts), groups=len(counts[0]), **sizes)
    pages = made["k"].unflatten(2, (slots // page, page))
    return made | {"low": pages.amin(3), "high": pages.amax(3), "counts": torch.tensor(counts)}


class Case(NamedTuple):
    """A kernel call: makes inputs for a number of tokens, and options that may depend on it."""

    kernel: Kernel
    sample: Callable[[int], Tensors]
    options: Callable[[int], dict[str, Any]] = lambda n: {}

    def call(self, n: int, form: Any = None) -> Callable[..., Tensors]:
        return partial(self.kernel.call, form or self.kernel.native, **self.options(n))


CASES = {
    "attention": Case(
        ATTENTION,
        lambda n: heads_of(n) | {"sink": torch.randn(4), "bias": torch.randn(2, 4, n, n)},
        lambda n: {"ranks": last_of(n, n)},
    ),
    "attention in bfloat16": Case(
        ATTENTION, partial(heads_of, dtype=torch.bfloat16), lambda n: {"ranks": last_of(n, n, True)}
    ),
    "attention by distance": Case(
        ATTENTION,
        lambda n: heads_of(n) | {"table": torch.randn(4, 2 * n + 1)},
        lambda n: {
            "ranks": last_of(n, n),
            "rule": "sigmoid",
            "blocks": BlockMask(torch.ones(1, 1, 3, 3, dtype=torch.bool).tril(), -(-n // 3)),
        },
    ),
    "clipped attention": Case(
        ATTENTION,
        lambda n: heads_of(n) | {"bias": torch.randn(1, 4, 1, n)},
        lambda n: {"ranks": last_of(n, n, True), "rule": "clipped"},
    ),
    "attention of few queries": Case(
        ATTENTION,
        lambda n: heads_of(2, n) | {"sink": torch.randn(4), "bias": torch.randn(2, 4, 2, n), "table": torch.randn(4, 2 * n + 1)},
        lambda n: {"ranks": last_of(2, n), "left": 40},
    ),
    "attention to pages": Case(PAGED, pages_of),
    "attention to chosen pages": Case(QUEST, lambda n: quest_of([[64, 37], [23, 5]])),
    "grouped attention": Case(
        GROUPED,
        heads_of,
        lambda n: {
            "ranks": last_of(n, n, True), "landmark": torch.arange(n)[None] % 9 == 8, "own": torch.arange(n)[None] // 9
        },
    ),
    "retrieved blocks": Case(RETRIEVED, retrieved_of),
    "retrieved blocks that are given, turned": Case(
        RETRIEVED, partial(retrieved_of, choose=True), lambda n: {"rotate": rotary(8)}
    ),
    "pixel attention": Case(PIXELS, pixels_of, lambda n: {"ranks": last_of(n, n, True)}),
    "pixel attention of maps": Case(
        PIXELS, partial(pixels_of, running=False), lambda n: {"ranks": last_of(n, n, True), "grouping": "batch"}
    ),
    "jittered pixel attention": Case(
        PIXELS, partial(pixels_of, running=False, jitter=True), lambda n: {"ranks": last_of(n, n, True)}
    ),
    "aggregated attention": Case(
        AGGREGATED, lambda n: aggregated_of((n // 10 * 2, 4)), lambda n: {"grid": (n // 10 * 2, 4)}
    ),
    "map distance": Case(MAPS, partial(maps_of, jitter=True), lambda n: {"ranks": last_of(n, n, True)}),
    "map distance from a teacher": Case(MAPS, partial(maps_of, target=True), lambda n: {"ranks": last_of(n, n, True)}),
    "gated recurrence": Case(GATED, recurrent),
    "gated recurrence without decay": Case(GATED, partial(recurrent, decay="none")),
    "delta rule": Case(DELTA, partial(recurrent, delta=True)),
    "delta rule by head": Case(DELTA, partial(recurrent, delta=True, decay="scalar")),
    "step": Case(STEP, lambda n: one_token(recurrent(n, delta=True))),
    "linear attention": Case(LINEAR, lambda n: linear(n, valid=[n, 7])),
    "unnormalized linear attention": Case(
        LINEAR,
        partial(linear, rule=linear_attention.Rule("silu", 0.5, None)),
        lambda n: {"rule": linear_attention.Rule("silu", 0.5, None)},
    ),
    "selective scan": Case(SELECTIVE, lambda n: selective(n, lengths=[n, 7])),
    "bare selective scan": Case(SELECTIVE, partial(selective, read=False, surrounded=False)),
    "softmax scan": Case(SCAN, partial(scanned, decay=True)),
    "mixed softmax scan": Case(SCAN, partial(scanned, mix=True, decay=True)),
    "conserved flows": Case(
        FLOWS,
        lambda n: flows(n, valid=[n, 7]),
        lambda n: {"rule": conserved_flows.Rule(True, True, None, 1.0, 1e-6)},
    ),
    "short convolution": Case(CONVOLUTION, convolved),
    "norm": Case(
        NORM,
        lambda n: {"x": torch.randn(2, n, 8), "weight": torch.randn(8), "z": torch.randn(2, n, 8)},
        lambda n: {"groups": 2, "after": True},
    ),
    "rotary": Case(
        ROTARY, lambda n: {"x": torch.randn(2, 4, n, 8), "positions": torch.arange(n)[None]}, lambda n: {"rotated": 6}
    ),
    "gated product": Case(PRODUCT, lambda n: {"x": torch.randn(2, n, 8), "gate": torch.randn(2, n, 8)}),
}  # fmt: skip
