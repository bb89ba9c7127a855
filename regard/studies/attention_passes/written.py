"""The mechanisms of the catalogue as cascades, each compared with its definition, or the reason why there is none.

Inputs are named as in the mechanism; batch and head axes are not written. Queries have the rank p, keys m, and
`scale[]` is the factor of the scores. If a mechanism ends in a softmax, its cascade is the one-pass form, the best
known. A plugin brings its cascade as a string ``CASCADE`` in its file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.catalogue import get_mechanism
from regard.contract import Pattern, Tensors
from regard.mechanisms.transformer_xl import relative_rows
from regard.workbench.verification.subjects import Subject

CAUSAL, NONCAUSAL = Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF


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


def online(
    query: str = "p", *, scores: str = "S", values: str = "v", width: str = "f", out: str = "o", factor: str = ""
) -> str:
    """Softmax over keys in one pass: statements from scores [query, m1, m0] and values [m1, m0, width] to an output.

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
{x}[{q}, {w}] = {x}all[{q}, {w}, M1] / {x}sum[{q}, M1]
"""


TILES = "keys: m = m1 * m0\n"
QKV = "inputs: q[p, e], k[m, e], v[m, f], scale[]"
SCALED = "qs[p, e] = q[p, e] * scale[]\n"
SCORES = f"{SCALED}S[p, m] = qs[p, e] * k[m, e]"
ELU = "where({x} > 0, {x} + 1, exp({x}))"
ELU_SUMS = (
    f"{QKV}\noutput: o\n{SCALED}"
    f"fq[p, e] = {ELU.format(x='qs[p, e]')}\n"
    f"fk[m, e] = {ELU.format(x='k[m, e]')}\n"
    "KV[e, f] = fk[m, e] * v[m, f]\n"
)


def over_slots(slot: str, *, keys: str = "keys", values: str = "values") -> str:
    """Softmax over a few slots, without tiles: statements from queries, keys [slot, e], values [slot, f] to out."""
    s = slot
    return f"""{SCALED}T[p, {s}] = qs[p, e] * {keys}[{s}, e]
high[p] = T[p, {s}] :: reduce({s}: max)
w[p, {s}] = exp(T[p, {s}] - high[p])
sum[p] = w[p, {s}]
part[p, f] = w[p, {s}] * {values}[{s}, f]
o[p, f] = part[p, f] / sum[p]
"""


def _masked(condition: str) -> str:
    """Softmax over the keys for which a condition on coordinates holds."""
    seen = f"{SCALED}D[p, m] = qs[p, e] * k[m, e]\nS[p, m] = where({condition}, D[p, m], -inf)"
    return f"{TILES}{QKV}\n{seen}{online()}"


def _laid_out(name: str, pattern: Pattern, without: tuple[str, ...] = (), **options: Any) -> Written:
    """Softmax over the keys visible in a layout, an input that is 1 where the mechanism's weights are not 0."""

    def seen(inputs: Tensors) -> Tensors:
        keys = inputs["k"].shape[2]
        one_hot = torch.eye(keys, dtype=torch.float64).expand(*inputs["k"].shape[:2], keys, keys)
        subject = Subject(get_mechanism(name), pattern, dict(options))
        weights = subject.reference({"q": 0 * inputs["q"], "k": inputs["k"], "v": one_hot})
        return {**inputs, "seen": (weights > 0).double()}

    text = (
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], seen[p, m], scale[]\n{SCALED}"
        f"D[p, m] = qs[p, e] * k[m, e]\nS[p, m] = where(seen[p, m] > 0, D[p, m], -inf){online()}"
    )
    remark = "its layout is read as a mask, which is most of its bytes; all pairs are counted, including hidden ones"
    return Written(text, pattern, options, without=without, prepare=seen, remark=remark)


def _polar(inputs: Tensors) -> Tensors:
    """Queries and keys as magnitudes and angles of complex features, whose imaginary parts are the second half."""
    found = dict(inputs)
    for name in "qk":
        real, imaginary = inputs[name].chunk(2, -1)
        found |= {
            f"{name}_size": (real.square() + imaginary.square() + 1e-9).sqrt(),
            f"{name}_angle": torch.atan2(imaginary, real),
        }
    return found


def _apart(inputs: Tensors) -> Tensors:
    """The relative-position vector of each (query, key) pair."""
    places = torch.arange(inputs["q"].shape[2])
    rows = relative_rows(places[:, None] - places, inputs["relative"], None)
    return {**inputs, "apart": rows.expand(inputs["q"].shape[0], *rows.shape)}


def _paired(inputs: Tensors) -> Tensors:
    """Both heads of a differential pair stacked in one rank: q and k [a, n, e], and their values concatenated."""
    q, k = (torch.stack(inputs[name].chunk(2, 1), 2) for name in "qk")
    return {
        "q": q,
        "k": k,
        "v": torch.cat(inputs["v"].chunk(2, 1), -1),
        "lam": inputs["lam"][:, None].expand((*q.shape[:2], 1)),
    }


WRITTEN: dict[str, Written] = {
    "softmax": Written(f"{TILES}{QKV}\n{SCORES}{online()}"),
    "stochastic_subsampling": Written(
        f"{TILES}{QKV}\n{SCORES}{online()}", remark="as at test time, when it sees all keys"
    ),
    "local": Written(
        _masked("abs(p - m) <= 3"), options={"window": 3}, remark="all pairs are counted, the hidden ones too"
    ),
    "adaptive_span": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], span[], scale[]\n{SCALED}"
        "D[p, m] = qs[p, e] * k[m, e]\nG[p, m] = (3 + span[] - abs(p - m)) / 3\n"
        f"S[p, m] = where(G[p, m] > 0, D[p, m] + log(min(max(G[p, m], 1e-30), 1)), -inf){online()}",
        options={"longest": 4, "ramp": 3},
        remark="all pairs are counted, the hidden ones too",
    ),
    "diagonal": Written(
        _masked("floor(p / 4) == floor(m / 4)"),
        options={"block": 4},
        remark="all pairs are counted, the hidden ones too",
    ),
    "bigbird": _laid_out("bigbird", NONCAUSAL, block=1, random_blocks=1),
    "block_sparse": _laid_out("block_sparse", NONCAUSAL, ("sink",), block_size=2),
    "sparse_strided": _laid_out("sparse_strided", CAUSAL, stride=3, columns=1),
    "longformer": _laid_out(
        "longformer", CAUSAL, ("q_global", "k_global", "v_global"), window=4, separate_projections=False
    ),
    "gated_softmax": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], log_gate[p], scale[]\noutput: gated\n{SCORES}{online()}"
        "gated[p, f] = exp(log_gate[p]) * o[p, f]"
    ),
    "selective_temperature": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], q_token[p], q_slope[], v_token[m], v_slope[], scale[]\n"
        "tq[p] = (1 + q_token[p] + q_slope[] * log(M)) * scale[]\n"
        "tv[m] = 1 + v_token[m] + v_slope[] * log(M)\n"
        "qs[p, e] = q[p, e] * tq[p]\n"
        "vs[m, f] = v[m, f] * tv[m]\n"
        f"S[p, m] = qs[p, e] * k[m, e]{online(values='vs')}"
    ),
    "latent": Written(
        f"{TILES}inputs: q[p, r], k[m, r], q_content[p, e], latent[m, c], up_k[e, c], up_v[f, c], scale[]\n"
        "key[m, e] = up_k[e, c] * latent[m, c]\n"
        "value[m, f] = up_v[f, c] * latent[m, c]\n"
        "content[p, m] = q_content[p, e] * key[m, e]\n"
        "place[p, m] = q[p, r] * k[m, r]\n"
        f"S[p, m] = (content[p, m] + place[p, m]) * scale[]{online(values='value')}"
    ),
    "synthesizer": Written(
        f"{TILES}inputs: v[m, f], dense[p, m]\nS[p, m] = dense[p, m] + 0{online()}",
        without=("slots",),
        prepare=lambda inputs: {**inputs, "dense": inputs["dense"][..., : inputs["v"].shape[2]]},
        remark="with dense scores, made of the query's token alone, which are most of its bytes",
    ),
    "differential": Written(
        f"{TILES}inputs: q[a, p, e], k[a, m, e], v[m, f], lam[b], scale[]\nsizes: a = 2, b = 1\noutput: both\n"
        "qs[a, p, e] = q[a, p, e] * scale[]\n"
        f"S[a, p, m] = qs[a, p, e] * k[a, m, e]{online('a, p')}"
        "sign[a] = where(a == 0, 1, -lam[b])\n"
        "both[p, f] = sign[a] * o[a, p, f]",
        prepare=_paired,
        finish=lambda output: torch.cat(output.chunk(2, -1), 1),
        remark="two softmax maps at a time",
    ),
    "universal_rpe": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], pair_factors[p, m], scale[]\n{SCORES}{online(factor='pair_factors')}",
        without=("factors",),
        more=lambda inputs: {"pair_factors": inputs["q"] @ inputs["k"].mT.cos()},
        remark="with a factor for each pair, most of its bytes; by offset it is looked up instead",
    ),
    "complex_rotary": Written(
        f"{TILES}inputs: q_size[p, e], q_angle[p, e], k_size[m, e], k_angle[m, e], v[m, f], angle_scale[e], phase[e], scale[]\n"
        "qs[p, e] = q_size[p, e] * scale[]\n"
        "S[p, m] = qs[p, e] * k_size[m, e] * cos(angle_scale[e] * (q_angle[p, e] - k_angle[m, e]) + phase[e] "
        f"+ (p - m) * exp(-log(10000) * e / E)){online()}",
        without=("frequencies",),
        prepare=_polar,
        remark="a cosine for each pair and feature; rotations before a product of matrices do the same",
    ),
    "transformer_xl": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], u[e], w[e], apart[p, m, e], scale[]\n"
        "qu[p, e] = (q[p, e] + u[e]) * scale[]\n"
        "qw[p, e] = (q[p, e] + w[e]) * scale[]\n"
        "content[p, m] = qu[p, e] * k[m, e]\n"
        "place[p, m] = qw[p, e] * apart[p, m, e]\n"
        f"S[p, m] = content[p, m] + place[p, m]{online()}",
        prepare=_apart,
        remark="one segment, with the vector of each distance looked up before, most of its bytes",
    ),
    "aaren": Written(
        "inputs: q[e], k[m, e], v[m, f], scale[]\noutput: o\n"
        "high[0] = -1e30\nsum[0] = 0\nall[f, 0] = 0\n"
        "qs[e] = q[e] * scale[]\n"
        "S[m] = qs[e] * k[m, e]\n"
        "high[m+1] = max(high[m], S[m])\n"
        "w[m] = exp(S[m] - high[m+1])\n"
        "fix[m] = exp(high[m] - high[m+1])\n"
        "sum[m+1] = sum[m] * fix[m] + w[m]\n"
        "all[f, m+1] = all[f, m] * fix[m] + w[m] * v[m, f]\n"
        "o[m, f] = all[f, m+1] / sum[m+1]",
        CAUSAL,
        without=("slots",),
    ),
    "clipped_softmax": Written(
        f"{TILES}{QKV}\noutput: o\n{SCORES}\n"
        "high[p, 0] = -1e30\nsum[p, 0] = 0\n"
        "lm[p, m1] = S[p, m1, m0] :: reduce(m0: max)\n"
        "high[p, m1+1] = max(high[p, m1], lm[p, m1])\n"
        "w[p, m1, m0] = exp(S[p, m1, m0] - high[p, m1+1])\n"
        "ld[p, m1] = w[p, m1, m0]\n"
        "sum[p, m1+1] = ld[p, m1] + sum[p, m1] * exp(high[p, m1] - high[p, m1+1])\n"
        "share[p] = 1.24 / sum[p, M1]\n"
        "A[p, m1, m0] = min(max(exp(S[p, m1, m0] - high[p, M1]) * share[p] - 0.04, 0), 1)\n"
        "o[p, f] = A[p, m1, m0] * v[m1, m0, f]",
        options={"gamma": -0.04, "zeta": 1.2},
        remark="what clips a weight has to know its sum: the second traversal",
    ),
    "sigmoid": Written(
        "inputs: q[p, e], k[m, e], v[m, f], head_bias[], scale[]\n"
        f"{SCORES}\nW[p, m] = sigmoid(S[p, m] + head_bias[])\no[p, f] = W[p, m] * v[m, f]",
        remark="on FuseMax the division of its sigmoid falls to the lanes, of which there are few",
    ),
    "token_parameter": Written(
        "inputs: x[p, e], keys[m, e], values[m, f], tau[], scale[]\noutput: o\n"
        "xs[p, e] = x[p, e] * scale[]\n"
        "S[p, m] = xs[p, e] * keys[m, e]\n"
        "square[p] = S[p, m] * S[p, m]\n"
        "share[p] = tau[] / max(sqrt(square[p]), 1e-6)\n"
        "Z[p, m] = S[p, m] * share[p]\n"
        "W[p, m] = Z[p, m] * (1 + erf(Z[p, m] * (1 / sqrt(2)))) * 0.5\n"
        "o[p, f] = W[p, m] * values[m, f]",
        without=("token_mask",),
        remark="its keys are parameters; their scores are divided by their norm first",
    ),
    "low_rank_pooling": Written(
        f"{TILES}inputs: x[m, d], p[e, s, r], q[d, s, r], c[e], temperature[s], scale[]\n"
        "cp[s, r] = c[e] * p[e, s, r]\n"
        "w[s, d] = cp[s, r] * q[d, s, r]\n"
        "raw[s, m] = w[s, d] * x[m, d]\n"
        "F[s, m] = tanh(raw[s, m])\n"
        "square[m] = F[s, m] * F[s, m]\n"
        f"S[s, m] = F[s, m] / max(sqrt(square[m]), 1e-6) * scale[] / temperature[s]{online('s', values='x', width='d')}",
        remark="its heads are the queries",
    ),
    "abc": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], slots_k[e, c], slots_v[f, c], scale[]\noutput: o\n"
        "Sk[c, m] = k[m, e] * slots_k[e, c]\n"
        "Sv[c, m] = v[m, f] * slots_v[f, c]"
        f"{online('c', scores='Sk', values='k', width='e', out='keys')}"
        f"{online('c', scores='Sv', out='values')}"
        f"{over_slots('c')}",
    ),
    "agent": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], agents[a, e], scale[]\noutput: o\n"
        "asked[a, e] = agents[a, e] * scale[]\n"
        f"S[a, m] = asked[a, e] * k[m, e]{online('a', out='gathered')}"
        f"{over_slots('a', keys='agents', values='gathered')}",
        options={"agent_source": "learned", "num_agents": 3, "dwc": "none"},
        without=("gather_bias", "share_bias"),
        remark="with learned agents; pooled ones are means of queries",
    ),
    "linformer": Written(
        "inputs: q[p, e], k[m, e], v[m, f], e[m, c], f[m, c], scale[]\noutput: o\n"
        "keys[c, e] = e[m, c] * k[m, e]\n"
        "values[c, f] = f[m, c] * v[m, f]\n"
        f"{over_slots('c')}",
        prepare=lambda inputs: {**inputs, **{name: inputs[name][0, : inputs["k"].shape[2]] for name in "ef"}},
    ),
    "linear": Written(
        f"{ELU_SUMS}"
        "Z[e] = fk[m, e]\n"
        "N[p, f] = fq[p, e] * KV[e, f]\n"
        "D[p] = fq[p, e] * Z[e]\n"
        "o[p, f] = N[p, f] / (D[p] + 1e-6)"
    ),
    "norm_linear": Written(
        f"{ELU_SUMS}o[p, f] = fq[p, e] * KV[e, f]",
        options={"output_norm": "none"},
        remark="before its norm, which is over heads and features of one token",
    ),
    "cosformer": Written(
        f"{QKV}\noutput: o\n"
        "qs[p, e] = relu(q[p, e] * scale[])\n"
        "qc[p, e] = qs[p, e] * cos(pi / 2 * p / M)\n"
        "qn[p, e] = qs[p, e] * sin(pi / 2 * p / M)\n"
        "kc[m, e] = relu(k[m, e]) * cos(pi / 2 * m / M)\n"
        "kn[m, e] = relu(k[m, e]) * sin(pi / 2 * m / M)\n"
        "KC[e, f] = kc[m, e] * v[m, f]\n"
        "KN[e, f] = kn[m, e] * v[m, f]\n"
        "ZC[e] = kc[m, e]\n"
        "ZN[e] = kn[m, e]\n"
        "NC[p, f] = qc[p, e] * KC[e, f]\n"
        "NN[p, f] = qn[p, e] * KN[e, f]\n"
        "DC[p] = qc[p, e] * ZC[e]\n"
        "DN[p] = qn[p, e] * ZN[e]\n"
        "o[p, f] = (NC[p, f] + NN[p, f]) / max(DC[p] + DN[p], 1e-6)"
    ),
    "performer": Written(
        "inputs: q[p, e], k[m, e], v[m, f], w[r, e], scale[]\noutput: o\n"
        "ws[r, e] = w[r, e] * sqrt(scale[])\n"
        "rq[p, r] = q[p, e] * ws[r, e]\n"
        "rk[m, r] = k[m, e] * ws[r, e]\n"
        "fq[p, r] = relu(rq[p, r]) + 1e-3\n"
        "fk[m, r] = relu(rk[m, r]) + 1e-3\n"
        "KV[r, f] = fk[m, r] * v[m, f]\n"
        "Z[r] = fk[m, r]\n"
        "N[p, f] = fq[p, r] * KV[r, f]\n"
        "D[p] = fq[p, r] * Z[r]\n"
        "o[p, f] = N[p, f] / (D[p] + 1e-6)",
        options={"kernel": "relu", "feature_eps": 1e-3},
        remark="with the relu kernel; the softmax kernel's stabiliser is the largest exponent of all keys, known a pass later",
    ),
    "random_feature": Written(
        "inputs: q[p, e], k[m, e], v[m, f], w[r, e], scale[]\noutput: o\n"
        "ws[r, e] = w[r, e] * sqrt(scale[])\n"
        "q2[p] = q[p, e] * q[p, e]\n"
        "k2[m] = k[m, e] * k[m, e]\n"
        "qn[p, e] = q[p, e] / max(sqrt(q2[p]), 1e-6)\n"
        "kn[m, e] = k[m, e] / max(sqrt(k2[m]), 1e-6)\n"
        "aq[p, r] = qn[p, e] * ws[r, e]\n"
        "ak[m, r] = kn[m, e] * ws[r, e]\n"
        "sq[p, r] = sin(aq[p, r])\n"
        "cq[p, r] = cos(aq[p, r])\n"
        "sk[m, r] = sin(ak[m, r])\n"
        "ck[m, r] = cos(ak[m, r])\n"
        "SV[r, f] = sk[m, r] * v[m, f]\n"
        "CV[r, f] = ck[m, r] * v[m, f]\n"
        "SZ[r] = sk[m, r]\n"
        "CZ[r] = ck[m, r]\n"
        "SN[p, f] = sq[p, r] * SV[r, f]\n"
        "CN[p, f] = cq[p, r] * CV[r, f]\n"
        "SD[p] = sq[p, r] * SZ[r]\n"
        "CD[p] = cq[p, r] * CZ[r]\n"
        "o[p, f] = (SN[p, f] + CN[p, f]) / R / max((SD[p] + CD[p]) / R, 1e-2)"
    ),
    "flow_attention": Written(
        f"{QKV}\noutput: o\n"
        "fq[p, e] = sigmoid(q[p, e] * scale[])\n"
        "fk[m, e] = sigmoid(k[m, e])\n"
        "sk[e] = fk[m, e]\n"
        "sq[e] = fq[p, e]\n"
        "in[p] = (fq[p, e] + 1e-6) * (sk[e] + 1e-6)\n"
        "out[m] = (fk[m, e] + 1e-6) * (sq[e] + 1e-6)\n"
        "so[e] = fk[m, e] / out[m]\n"
        "si[e] = fq[p, e] / in[p]\n"
        "cs[p] = (fq[p, e] + 1e-6) * (so[e] + 1e-6)\n"
        "cr[m] = (fk[m, e] + 1e-6) * (si[e] + 1e-6)\n"
        "w[m] = exp(min(max(cr[m], -1), 1))\n"
        "sum[] = w[m]\n"
        "KV[e, f] = fk[m, e] * w[m] * v[m, f]\n"
        "N[p, f] = fq[p, e] * KV[e, f]\n"
        "o[p, f] = sigmoid(cs[p] * P / M) / in[p] * N[p, f] * M / sum[]",
        options={"eps": 1e-6},
        remark="keys compete by what queries take, which is known when both were walked over once",
    ),
    "gated_linear": Written(
        "inputs: q[m, e], k[m, e], v[m, f], log_decay[m, e], scale[]\noutput: o\n"
        "S[e, f, 0] = 0\n"
        "S[e, f, m+1] = S[e, f, m] * exp(log_decay[m, e]) + k[m, e] * v[m, f]\n"
        "r[m, f] = q[m, e] * S[e, f, m+1]\n"
        "o[m, f] = r[m, f] * scale[]",
        CAUSAL,
    ),
    "delta_rule": Written(
        "inputs: q[m, e], k[m, e], v[m, f], beta[m], scale[]\noutput: o\n"
        "S[e, f, 0] = 0\n"
        "q2[m] = q[m, e] * q[m, e]\n"
        "k2[m] = k[m, e] * k[m, e]\n"
        "qn[m, e] = q[m, e] * scale[] / sqrt(q2[m] + 1e-6)\n"
        "kn[m, e] = k[m, e] / sqrt(k2[m] + 1e-6)\n"
        "known[m, f] = kn[m, e] * S[e, f, m]\n"
        "new[m, f] = beta[m] * (v[m, f] - known[m, f])\n"
        "S[e, f, m+1] = S[e, f, m] + kn[m, e] * new[m, f]\n"
        "o[m, f] = qn[m, e] * S[e, f, m+1]",
        CAUSAL,
    ),
    "rwkv7": Written(
        "inputs: q[m, e], k[m, e], v[m, f], removal_key[m, e], rate[m, e], log_decay[m, e], scale[]\noutput: o\n"
        "S[e, f, 0] = 0\n"
        "r2[m] = removal_key[m, e] * removal_key[m, e]\n"
        "kappa[m, e] = removal_key[m, e] / sqrt(r2[m] + 1e-12)\n"
        "stored[m, f] = kappa[m, e] * S[e, f, m]\n"
        "erase[m, e] = rate[m, e] * kappa[m, e]\n"
        "S[e, f, m+1] = S[e, f, m] * exp(log_decay[m, e]) - erase[m, e] * stored[m, f] + k[m, e] * v[m, f]\n"
        "r[m, f] = q[m, e] * S[e, f, m+1]\n"
        "o[m, f] = r[m, f] * scale[]",
        CAUSAL,
    ),
    "mlstm": Written(
        "inputs: q[m, e], k[m, e], v[m, f], log_input[m], log_forget[m], scale[]\noutput: o\n"
        "C[e, f, 0] = 0\nN[e, 0] = 0\n"
        "C[e, f, m+1] = exp(log_forget[m]) * C[e, f, m] + exp(log_input[m]) * k[m, e] * v[m, f]\n"
        "N[e, m+1] = exp(log_forget[m]) * N[e, m] + exp(log_input[m]) * k[m, e]\n"
        "qs[m, e] = q[m, e] * scale[]\n"
        "r[m, f] = qs[m, e] * C[e, f, m+1]\n"
        "d[m] = qs[m, e] * N[e, m+1]\n"
        "o[m, f] = r[m, f] / max(abs(d[m]), 1)",
        CAUSAL,
    ),
    "mamba": Written(
        "inputs: x[m, e], dt[m, e], a[e, s], b[m, g, s], c[m, g, s], skip[e], dt_bias[e], z[m, e], scale[]\nsizes: g = 1\noutput: o\n"
        "H[e, s, 0] = 0\n"
        "b1[m, s] = b[m, g, s]\n"
        "step[m, e] = log(1 + exp(dt[m, e] + dt_bias[e]))\n"
        "H[e, s, m+1] = exp(step[m, e] * a[e, s]) * H[e, s, m] + step[m, e] * x[m, e] * b1[m, s]\n"
        "y[m, e] = c[m, g, s] * H[e, s, m+1]\n"
        "o[m, e] = (scale[] * y[m, e] + skip[e] * x[m, e]) * z[m, e] * sigmoid(z[m, e])",
        CAUSAL,
        widths={"g": 1},
    ),
    "mamba2": Written(
        "inputs: q[m, e], k[m, e], v[m, f], dt[m], a[], skip[f], scale[]\noutput: o\n"
        "S[e, f, 0] = 0\n"
        "S[e, f, m+1] = S[e, f, m] * exp(dt[m] * a[]) + dt[m] * k[m, e] * v[m, f]\n"
        "r[m, f] = q[m, e] * S[e, f, m+1]\n"
        "o[m, f] = scale[] * r[m, f] + skip[f] * v[m, f]",
        CAUSAL,
    ),
    "fnet": Written(
        "inputs: x[m, d], scale[]\nsizes: p = m, c = d\noutput: o\n"
        "co[p, d] = cos(2 * pi * p * m / M) * x[m, d]\n"
        "si[p, d] = sin(2 * pi * p * m / M) * x[m, d]\n"
        "y[p, c] = co[p, d] * cos(2 * pi * d * c / D) - si[p, d] * sin(2 * pi * d * c / D)\n"
        "o[p, c] = y[p, c] * scale[]",
        remark="as products with matrices; a fast Fourier transform walks over its tokens log2 m times and multiplies less",
    ),
    "mlp_mixer": Written(
        "inputs: x[m, d], up[j, m], up_bias[j], down[p, j], down_bias[p]\noutput: o\n"
        "h[j, d] = up[j, m] * x[m, d]\n"
        "hb[j, d] = h[j, d] + up_bias[j]\n"
        "g[j, d] = hb[j, d] * (1 + erf(hb[j, d] * (1 / sqrt(2)))) * 0.5\n"
        "y[p, d] = down[p, j] * g[j, d]\n"
        "o[p, d] = y[p, d] + down_bias[p]",
        prepare=lambda inputs: {
            **inputs,
            "up": inputs["up"][:, : inputs["x"].shape[1]],
            "down": inputs["down"][: inputs["x"].shape[1]],
            "down_bias": inputs["down_bias"][: inputs["x"].shape[1]],
        },
    ),
}

CHOOSES = "which keys a query reads is chosen by its data (largest few, sorting, hashing)"
PARTS = "each of its parts is over other tokens (near ones, summaries of far ones), as long as no rank is"

REASONS: dict[str, str] = {
    **dict.fromkeys(("bilevel_routing", "hard_softmax", "moba", "probsparse", "reformer", "routing", "sea"), CHOOSES),
    "kernelized_rpe": "its weights are looked up by the offset of key and query, which a plain index cannot express",
    **dict.fromkeys(("combiner", "compressive", "core_context", "landmark", "lolcats", "long_short"), PARTS),
    "sinkhorn": "its permutation of blocks is found by normalising rows and columns in turn",
    "nystrom": "the inverse of its matrix of landmarks is found by iteration",
    "lara": "its features are drawn at random around means of unequal segments",
    "positional_attention": "its scores are computed from positions, by maps of encodings; from the scores on it is softmax",
    "s4d": "its state is of complex numbers",
    "bidirectional_mamba": "it scans along several paths; each of them is mamba's cascade",
    "large_kernel": "a convolution: each token reads its neighbours by offset",
    "activator": "as published it mixes no tokens",
    "ninformer": "a network around mlp_mixer, whose cascade its mixing is",
    "funnel": "an encoder of several layers, each of them softmax",
    "mixture_of_heads": "a wrapper: its class is that of the mechanism it wraps",
}
