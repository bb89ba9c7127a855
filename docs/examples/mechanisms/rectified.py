r"""Rectified attention: weights are squared rectified scores, so most pairs have weight exactly zero.

When to pick it: attention that should be sparse and easy to read.
When not: anywhere the sum of the weights must be one; an output norm has to keep the scale instead.

Definition (ReLA, Zhang et al., arXiv 2104.07012, equation 5, with the square of Primer, arXiv 2109.08668):

    P_ij = relu(tau q_i . k_j)^2 over visible keys j,   o_i = sum_j P_ij v_j

| paper | here |
|---|---|
| Q, K, V | `q`, `k`, `v` |
| power 2 | `square=True`; ReLA itself is `square=False` |
| RMSNorm of the output | the shell's `output_norm="rms"`, on by default |

Layout: (B, H, N, D); keys and values may have fewer heads (grouped queries).
Deviations: the norm is of each head, not of all heads together.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.contract import ALL_PATTERNS, Call, Cost, Kind, Mechanism, Paper, Result, Shape
from regard.engines.attention import Ranks, attention_reference, masked_scores_bias, ranks
from regard.engines.attention_forms import attend, by_pattern
from regard.engines.cache import KeyValueState, extend

CASCADE = """
inputs: q[p, e], k[m, e], v[m, f], scale[]
qs[p, e] = q[p, e] * scale[]
S[p, m] = qs[p, e] * k[m, e]
W[p, m] = relu(S[p, m]) * relu(S[p, m])
o[p, f] = W[p, m] * v[m, f]
"""  # for `regard study attention-passes`


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        square: whether rectified scores are squared.
    """

    square: bool = True


def reference(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, by_pattern(call), call.bias, call.position_bias, call.blocks, q.dtype)
    power = 2 if call.config.square else 1
    return attention_reference(q, k, v, visible, lambda scores: scores.relu() ** power, call.scale, bias)


def parallel(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Result:
    return _attend(call, q, k, v, ranks(call, q.shape[2], k.shape[2], q.device))


def chunked(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Result:
    state, where = extend(call, k, v, q.shape[2])
    return _attend(call, q, state.k, state.v, where, state)


def absorb(call: Call, k: Tensor, v: Tensor) -> KeyValueState:
    return extend(call, k, v, 0)[0]


def read(call: Call, q: Tensor) -> Result:
    state: KeyValueState = call.state
    return _attend(call, q, state.k, state.v, ranks(call, q.shape[2], 0, q.device, state.ranks), state)


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor, where: Ranks, state: KeyValueState | None = None) -> Result:
    return attend(call, q, k, v, where, state, rule="relu_squared" if call.config.square else "relu")


def cost(shape: Shape, config: Config) -> Cost:
    pairs = 2.0 * shape.batch * shape.heads * shape.m * (shape.dim_key + shape.dim_value)
    cache = float(shape.heads * shape.m * (shape.dim_key + shape.dim_value))
    return Cost(flops=pairs * shape.n, memory=float(shape.batch * shape.heads * shape.n), state=cache, step_flops=pairs)


MECHANISM = Mechanism(
    name="rectified",
    aliases=("rela",),
    kind=Kind.ATTENTION,
    summary="Weights are squared rectified scores, so most pairs have weight exactly zero.",
    paper=Paper("Sparse Attention with Linear Units", "2104.07012", 2021),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
    patterns=ALL_PATTERNS,
    forms={
        "reference": reference,
        "parallel": parallel,
        "chunked": chunked,
        "step": chunked,
        "absorb": absorb,
        "read": read,
    },
    config=Config,
    state=KeyValueState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "weights"}),
    weights="exact",
    layer_defaults={"output_norm": "rms"},
)
