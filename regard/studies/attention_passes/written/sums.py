"""Mechanisms that sum over keys what no query enters, recurrences, and mixers."""

from __future__ import annotations

from regard.contract import Tensors
from regard.studies.attention_passes.written.parts import CAUSAL, QKV, SCALED, Written

ELU = "where({x} > 0, {x} + 1, exp({x}))"
ELU_SUMS = (
    f"{QKV}\noutput: o\n{SCALED}"
    f"fq[p, e] = {ELU.format(x='qs[p, e]')}\n"
    f"fk[m, e] = {ELU.format(x='k[m, e]')}\n"
    "KV[e, f] = fk[m, e] * v[m, f]\n"
)


def _in_parts(inputs: Tensors) -> Tensors:
    """Real and imaginary parts of the rates and of the read-out."""
    return {**inputs, **{f"{name}{part}": inputs[name][..., at] for name in "ac" for at, part in enumerate("ri")}}


SUMS: dict[str, Written] = {
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
    "s4d": Written(
        "inputs: x[m, d], dt[d], ar[d, s], ai[d, s], cr[d, s], ci[d, s], skip[d], scale[]\noutput: o\n"
        "R[d, s, 0] = 0\nI[d, s, 0] = 0\n"
        "kr[d, s] = exp(dt[d] * ar[d, s]) * cos(dt[d] * ai[d, s])\n"
        "ki[d, s] = exp(dt[d] * ar[d, s]) * sin(dt[d] * ai[d, s])\n"
        "a2[d, s] = ar[d, s] * ar[d, s] + ai[d, s] * ai[d, s]\n"
        "br[d, s] = ((kr[d, s] - 1) * ar[d, s] + ki[d, s] * ai[d, s]) / a2[d, s]\n"
        "bi[d, s] = (ki[d, s] * ar[d, s] - (kr[d, s] - 1) * ai[d, s]) / a2[d, s]\n"
        "R[d, s, m+1] = kr[d, s] * R[d, s, m] - ki[d, s] * I[d, s, m] + br[d, s] * x[m, d]\n"
        "I[d, s, m+1] = kr[d, s] * I[d, s, m] + ki[d, s] * R[d, s, m] + bi[d, s] * x[m, d]\n"
        "y[m, d] = cr[d, s] * R[d, s, m+1] - ci[d, s] * I[d, s, m+1]\n"
        "o[m, d] = 2 * scale[] * y[m, d] + skip[d] * x[m, d]",
        CAUSAL,
        prepare=_in_parts,
        remark="as a recurrence, with real and imaginary parts; a Fourier transform needs no steps",
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
