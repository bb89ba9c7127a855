"""Mechanisms that weigh each pair of a query and a key."""

from __future__ import annotations

from typing import Any

import torch

from regard.catalogue import get_mechanism
from regard.contract import Pattern, Tensors
from regard.mechanisms.kernelized_rpe.definition import index
from regard.mechanisms.positional_attention.definition import encoded
from regard.mechanisms.transformer_xl import relative_rows
from regard.studies.attention_passes.written.parts import (
    ALL_PAIRS,
    CAUSAL,
    NONCAUSAL,
    QKV,
    SCALED,
    SCORES,
    TILES,
    Written,
    masked,
    online,
    running,
)
from regard.workbench.verification.subjects import Subject


def _seen(condition: str) -> str:
    """Softmax over the keys for which a condition on coordinates holds."""
    return f"{TILES}{QKV}\n{masked(condition)}{online()}"


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


def _by_offset(inputs: Tensors) -> Tensors:
    """The weight of each pair by its offset, relative to the largest."""
    places = torch.arange(inputs["q"].shape[2])
    table = inputs["offset_bias"]
    weights = (table - table.amax(-1, keepdim=True)).exp()[:, index(places - places[:, None], table.shape[-1])]
    return {**inputs, "factor": weights.expand(inputs["q"].shape[0], *weights.shape)}


def _encoded(inputs: Tensors) -> Tensors:
    """The encoding of each token's position, once for queries and once for keys."""
    places = torch.arange(inputs["v"].shape[2])
    found = encoded(None, places[None], inputs["query_map"][0])[0]
    return {**inputs, "asking": found, "told": found}


def _hedgehog(name: str, rank: str) -> str:
    """The softmaxes of both signs, {name}up and {name}down, of mapped queries or keys."""
    x, r = name, rank
    return f"""{x}f[{r}, g] = {x}[{r}, e] * {x}_map[e, g]
{x}high[{r}] = {x}f[{r}, g] :: reduce(g: max)
{x}low[{r}] = {x}f[{r}, g] :: reduce(g: min)
{x}a[{r}, g] = exp({x}f[{r}, g] - {x}high[{r}])
{x}b[{r}, g] = exp({x}low[{r}] - {x}f[{r}, g])
{x}as[{r}] = {x}a[{r}, g]
{x}bs[{r}] = {x}b[{r}, g]
{x}up[{r}, g] = {x}a[{r}, g] / {x}as[{r}]
{x}down[{r}, g] = {x}b[{r}, g] / {x}bs[{r}]
"""


PAIRS: dict[str, Written] = {
    "softmax": Written(f"{TILES}{QKV}\n{SCORES}{online()}"),
    "stochastic_subsampling": Written(
        f"{TILES}{QKV}\n{SCORES}{online()}", remark="as at test time, when it sees all keys"
    ),
    "local": Written(_seen("abs(p - m) <= 3"), options={"window": 3}, remark=ALL_PAIRS),
    "adaptive_span": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], span[], scale[]\n{SCALED}"
        "D[p, m] = qs[p, e] * k[m, e]\nG[p, m] = (3 + span[] - abs(p - m)) / 3\n"
        f"S[p, m] = where(G[p, m] > 0, D[p, m] + log(min(max(G[p, m], 1e-30), 1)), -inf){online()}",
        options={"longest": 4, "ramp": 3},
        remark=ALL_PAIRS,
    ),
    "diagonal": Written(
        _seen("floor(p / 4) == floor(m / 4)"),
        options={"block": 4},
        remark=ALL_PAIRS,
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
    "positional_attention": Written(
        f"{TILES}inputs: v[m, f], query_map[g, e], key_map[g, e], query_bias[e], asking[p, g], told[m, g], scale[]\n"
        "q[p, e] = asking[p, g] * query_map[g, e]\n"
        "k[m, e] = told[m, g] * key_map[g, e]\n"
        "qs[p, e] = (q[p, e] + query_bias[e]) * scale[] / sqrt(E)\n"
        f"S[p, m] = qs[p, e] * k[m, e]{online()}",
        prepare=_encoded,
        remark="its weights are counted for every sequence, though all share them",
    ),
    "kernelized_rpe": Written(
        "inputs: q[p, e], k[m, e], v[m, f], random_features[r, e], factor[p, m], scale[]\n"
        "q2[p] = q[p, e] * q[p, e]\n"
        "k2[m] = k[m, e] * k[m, e]\n"
        "qn[p, e] = q[p, e] / max(sqrt(q2[p]), 1e-6) * sqrt(scale[])\n"
        "kn[m, e] = k[m, e] / max(sqrt(k2[m]), 1e-6) * sqrt(scale[])\n"
        "half[m] = kn[m, e] * kn[m, e] / 2\n"
        "rq[p, r] = qn[p, e] * random_features[r, e]\n"
        "rk[m, r] = kn[m, e] * random_features[r, e]\n"
        "high[p] = rq[p, r] :: reduce(r: max)\n"
        "fq[p, r] = exp(rq[p, r] - high[p])\n"
        "fk[m, r] = exp(rk[m, r] - half[m]) / R\n"
        "A[p, m] = fq[p, r] * fk[m, r]\n"
        "W[p, m] = A[p, m] * factor[p, m]\n"
        "N[p, f] = W[p, m] * v[m, f]\n"
        "D[p] = W[p, m]\n"
        "o[p, f] = N[p, f] / max(D[p], 1e-6)",
        prepare=_by_offset,
        remark="with a factor for each pair, most of its bytes; a Fourier transform needs neither factors nor pairs",
    ),
    "compressive": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], k_compressed[m, e], v_compressed[m, f], scale[]\noutput: o\n"
        f"{masked('(m >= floor(p / 4) * 4 - 4) * (m < floor(p / 4) * 4 + 4)')}\n"
        "C[p, m] = qs[p, e] * k_compressed[m, e]\n"
        "Z[p, m] = where((m == floor(m / 2) * 2 + 1) * (m < floor(p / 4) * 4 - 4) * (m >= floor(p / 4) * 4 - 8), C[p, m], -inf)"
        f"{running(out='near')}{running(scores='Z', values='v_compressed', out='far')}"
        "top[p] = max(nearmax[p, M1], farmax[p, M1])\n"
        "a[p] = exp(nearmax[p, M1] - top[p])\n"
        "z[p] = exp(farmax[p, M1] - top[p])\n"
        "o[p, f] = (nearall[p, f, M1] * a[p] + farall[p, f, M1] * z[p]) / (nearsum[p, M1] * a[p] + farsum[p, M1] * z[p])",
        options={"segment": 4, "memory": 4, "compressed": 2, "ratio": 2},
        without=("u", "w", "relative"),
        remark=f"without relative positions; {ALL_PAIRS}, with a compressed key at each token",
    ),
    "lolcats": Written(
        f"{TILES}inputs: q[p, e], k[m, e], v[m, f], q_map[e, g], k_map[e, g], window_weight[], scale[]\noutput: o\n"
        f"{masked('(m <= p) * (m > p - 3)')}{running(out='near')}"
        f"{_hedgehog('q', 'p')}{_hedgehog('k', 'm')}"
        "up[p, m] = qup[p, g] * kup[m, g]\n"
        "down[p, m] = qdown[p, g] * kdown[m, g]\n"
        "far[p, m] = where(m <= p - 3, up[p, m] + down[p, m], 0)\n"
        "N[p, f] = far[p, m] * v[m, f]\n"
        "Z[p] = far[p, m]\n"
        "o[p, f] = (window_weight[] * nearall[p, f, M1] + N[p, f]) / (window_weight[] * nearsum[p, M1] + Z[p])",
        CAUSAL,
        options={"window": 3},
        remark=f"{ALL_PAIRS}; a state reads the far ones in linear time",
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
}
