"""What is written about a mechanism's cascade, and the statements that several cascades share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from regard.contract import Pattern, Tensors

CAUSAL, NONCAUSAL = Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF
ALL_PAIRS = "all pairs are counted, the hidden ones too"


@dataclass(frozen=True)
class Written:
    """A mechanism's cascade.

    Attributes:
        text: the cascade.
        pattern: the pattern that the cascade is written for.
        options: the mechanism's options that differ from the defaults.
        widths: widths of axes that differ from the default samples.
        without: inputs that the mechanism is not given.
        more: makes further inputs of the mechanism from the others.
        prepare: turns the mechanism's inputs into the cascade's.
        finish: turns the cascade's output into the mechanism's.
        remark: a caveat about the cascade's row in the table.
    """

    text: str
    pattern: Pattern = NONCAUSAL
    options: Mapping[str, Any] = field(default_factory=dict)
    widths: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    more: Callable[[Tensors], Tensors] = field(default=lambda inputs: {})
    prepare: Callable[[Tensors], Tensors] = field(default=lambda inputs: inputs)
    finish: Callable[[Tensor], Tensor] = field(default=lambda output: output)
    remark: str = ""


def running(
    query: str = "p", *, scores: str = "S", values: str = "v", width: str = "f", out: str = "o", factor: str = ""
) -> str:
    """Sums of a softmax over keys in one pass: statements from scores [query, m1, m0] and values [m1, m0, width] to the
    running maximum {out}max [query, m1], sum of weights {out}sum [query, m1], and weighted values {out}all [query, width, m1].

    Args:
        factor: name of a tensor with the ranks of scores that multiplies the weights after the softmax.
    """
    q, w, x = query, width, out
    times = f" * {factor}[{q}, m1, m0]" if factor else ""
    return f"""
{x}max[{q}, 0] = -1e30
{x}sum[{q}, 0] = 0
{x}all[{q}, {w}, 0] = 0
{x}lm[{q}, m1] = {scores}[{q}, m1, m0] :: reduce(m0: max)
{x}max[{q}, m1+1] = max({x}max[{q}, m1], {x}lm[{q}, m1])
{x}w[{q}, m1, m0] = exp({scores}[{q}, m1, m0] - {x}max[{q}, m1+1])
{x}ld[{q}, m1] = {x}w[{q}, m1, m0]
{x}lv[{q}, {w}, m1] = {x}w[{q}, m1, m0]{times} * {values}[m1, m0, {w}]
{x}fix[{q}, m1] = exp({x}max[{q}, m1] - {x}max[{q}, m1+1])
{x}sum[{q}, m1+1] = {x}ld[{q}, m1] + {x}sum[{q}, m1] * {x}fix[{q}, m1]
{x}all[{q}, {w}, m1+1] = {x}lv[{q}, {w}, m1] + {x}all[{q}, {w}, m1] * {x}fix[{q}, m1]
"""


def online(query: str = "p", *, width: str = "f", out: str = "o", **names: str) -> str:
    """Softmax over keys in one pass: the statements of :func:`running`, and the output {out} [query, width]."""
    return (
        f"{running(query, width=width, out=out, **names)}"
        f"{out}[{query}, {width}] = {out}all[{query}, {width}, M1] / {out}sum[{query}, M1]\n"
    )


TILES = "keys: m = m1 * m0\n"
QKV = "inputs: q[p, e], k[m, e], v[m, f], scale[]"
SCALED = "qs[p, e] = q[p, e] * scale[]\n"
SCORES = f"{SCALED}S[p, m] = qs[p, e] * k[m, e]"


def masked(condition: str) -> str:
    """Scores of the keys for which a condition on coordinates holds."""
    return f"{SCALED}D[p, m] = qs[p, e] * k[m, e]\nS[p, m] = where({condition}, D[p, m], -inf)"


def slot_scores(slot: str, keys: str = "keys") -> str:
    """Scores T [p, slot] of queries with a few slots' keys [slot, e]."""
    return f"{SCALED}T[p, {slot}] = qs[p, e] * {keys}[{slot}, e]\n"


def over_slots(slot: str, *, scores: str = "T", values: str = "values") -> str:
    """Softmax over a few slots, without tiles: statements from scores [p, slot] and values [slot, f] to o."""
    s = slot
    return f"""high[p] = {scores}[p, {s}] :: reduce({s}: max)
w[p, {s}] = exp({scores}[p, {s}] - high[p])
sum[p] = w[p, {s}]
part[p, f] = w[p, {s}] * {values}[{s}, f]
o[p, f] = part[p, f] / sum[p]
"""


def gathered(slot: str, scores: str = "G") -> str:
    """Slots that are means of keys and of values with the same weights: statements from scores [slot, m1, m0] to keys
    [slot, e] and values [slot, f]."""
    s = slot
    return f"""{online(s, scores=scores, values="k", width="e", out="keys")}
valuesall[{s}, f, 0] = 0
valueslv[{s}, f, m1] = keysw[{s}, m1, m0] * v[m1, m0, f]
valuesall[{s}, f, m1+1] = valueslv[{s}, f, m1] + valuesall[{s}, f, m1] * keysfix[{s}, m1]
values[{s}, f] = valuesall[{s}, f, M1] / keyssum[{s}, M1]
"""


def beside_slots(slot: str) -> str:
    """One softmax over keys and slots: statements from scores S [p, m1, m0] with v [m1, m0, f], and scores T [p, slot]
    with values [slot, f], to o."""
    s = slot
    return f"""{running(out="near")}
high[p] = T[p, {s}] :: reduce({s}: max)
top[p] = max(high[p], nearmax[p, M1])
keep[p] = exp(nearmax[p, M1] - top[p])
w[p, {s}] = exp(T[p, {s}] - top[p])
sum[p] = w[p, {s}]
part[p, f] = w[p, {s}] * values[{s}, f]
o[p, f] = (nearall[p, f, M1] * keep[p] + part[p, f]) / (nearsum[p, M1] * keep[p] + sum[p])
"""
