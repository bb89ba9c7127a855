r"""Flow attention: linear attention in which keys compete and queries accept, by conserving flow.

When to pick it: long encoder inputs and cross-attention at linear cost, where plain linear attention spreads its weights
too evenly; no recency or locality is built in.
When not: exact recall of single tokens, decoding with a cross memory (the competition of its keys needs all queries
first), or rows with N != M in causal-self.

Definition (Wu et al., arXiv 2202.06258, section 3), Q = phi(tau q), K = phi(k), noncausal with L queries and S keys:

    I_i = 1 / <Q_i + eps, sum_j K_j + eps>            O_j = 1 / <K_j + eps, sum_i Q_i + eps>
    I^_i = <Q_i + eps, sum_j K_j O_j + eps>           O^_j = clamp(<K_j + eps, sum_i Q_i I_i + eps>)
    A_i = sigmoid(I^_i L / S)                         C_j = S softmax_j(O^_j / temperature)
    R_i = A_i Q_i I_i sum_j K_j^T (C_j V_j)

Causal, with all sums over tokens up to t, n_t = t tokens seen, and every C_t fixed at its own step:

    I_t = n_t / <Q_t + eps, sum K + eps>,   O_t alike;    I^_t = <Q_t + eps, sum K O + eps> / n_t,   O^_t alike, clamped
    A_t = sigmoid(I^_t),   C_t = n_t e^{O^_t} / (sum_{j<=t} e^{O^_j}),   R_t = A_t (Q_t I_t / n_t) sum_{j<=t} K_j^T (C_j V_j)

| paper | here |
|---|---|
| Q, K = phi(q), phi(k); sigmoid | `sinks`, `sources`; `phi` (also `elu`: elu + 1, `relu`, `softplus`) |
| incoming flow 1 / I, outgoing flow 1 / O | `incoming`, `outgoing` |
| conserved I^, O^ | `conserved_sinks`, `conserved_sources` |
| allocation A, competition C | `allocation`, `competition` (off: A = 1, C = 1) |
| sums over the past | `FlowState`: keys, queries, conserved_keys, conserved_queries, (maximum, normalizer), memory, length |

Layout: (B, H, N, D); no 1 / sqrt(d), so the default scale is 1. eps is added to vectors, as in the released code.
Deviations: the causal normaliser sum e^{O^} is kept as its maximum and the sum relative to it (4 D + 2 numbers in
addition to the matrix, instead of 4 D + 1), so that any clamp is safe. The causal form continues from a state and never
stores a (D, V) matrix for each token. The released module drops 5 % of its output; the layer's dropout is 0 by default.
L and S count valid tokens of each row. The released clamp at 1 cuts about half of the O^ in self-attention; -10 to 10
is the released setting for reinforcement learning, None turns it off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    State,
    Unsupported,
    one_of,
    state_field,
)
from regard.core.precision import wide_dtype
from regard.engines.conserved_flows import Rule, Sums, conserved_flows, empty_sums
from regard.engines.gated_recurrence import gated_recurrence
from regard.engines.recurrent_forms import length_after

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softplus": F.softplus,
}


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        phi: feature map of queries and keys, one of `PHI`; never negative.
        competition: whether keys compete (C); without it C = 1.
        allocation: whether queries accept only in part (A); without it A = 1. Without both it is normalised linear
            attention.
        clamp: range (low, high) of the conserved sources, low < high; None for no clamp.
        temperature: divides the conserved sources in the competition's softmax, > 0.
        length_factor: whether the allocation's sigmoid has the factor L / S (noncausal patterns; L = S in causal-self).
        eps: added to the vectors of both factors of each flow, > 0.
    """

    phi: str = "sigmoid"
    competition: bool = True
    allocation: bool = True
    clamp: tuple[float, float] | None = (-1.0, 1.0)
    temperature: float = 1.0
    length_factor: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        one_of("phi", self.phi, PHI)
        for name in ("temperature", "eps"):
            if not getattr(self, name) > 0:
                default = self.__dataclass_fields__[name].default
                raise Unsupported(f"{name}={getattr(self, name)}", supported=f"{name} > 0", nearest=f"{name}={default}")
        if self.clamp is not None and (len(self.clamp) != 2 or not self.clamp[0] < self.clamp[1]):
            raise Unsupported(
                f"clamp={self.clamp}", supported="(low, high) with low < high, or None", nearest="(-1, 1)"
            )


@dataclass(frozen=True)
class FlowState(State):
    """Sums over the tokens so far, in at least float32."""

    keys: Float[Tensor, "b h d"] = state_field()
    queries: Float[Tensor, "b h d"] = state_field()
    conserved_keys: Float[Tensor, "b h d"] = state_field()
    conserved_queries: Float[Tensor, "b h d"] = state_field()
    maximum: Float[Tensor, "b h"] = state_field(fill=-torch.inf)
    normalizer: Float[Tensor, "b h"] = state_field()
    memory: Float[Tensor, "b h d v"] = state_field()
    length: Int[Tensor, " b"] = state_field()

    @property
    def sums(self) -> Sums:
        """Sums, maximum and normaliser, stacked in the recurrence's form."""
        totals = torch.stack([self.keys, self.queries, self.conserved_keys, self.conserved_queries])
        return Sums(totals, self.maximum, self.normalizer, self.length)


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with every sum over keys or queries as a product with a matrix of ones."""
    config: Config = call.config
    sinks, sources, n, m = PHI[config.phi](call.scale * q), PHI[config.phi](k), q.shape[2], k.shape[2]
    seen = q.new_ones(n, m)
    count = q.new_ones(n)
    if call.pattern is Pattern.CAUSAL_SELF:
        seen, count = seen.tril(), torch.arange(1, n + 1, device=q.device, dtype=q.dtype)

    def flow(x: Tensor, total: Tensor) -> Tensor:
        return ((x + config.eps) * (total + config.eps)).sum(-1)

    by_source = seen if call.pattern is Pattern.CAUSAL_SELF else seen.mT
    key_count = count if call.pattern is Pattern.CAUSAL_SELF else q.new_ones(m)
    i = count / flow(sinks, seen @ sources)
    o = key_count / flow(sources, by_source @ sinks)
    conserved_sinks = flow(sinks, seen @ (sources * o[..., None])) / count
    conserved_sources = flow(sources, by_source @ (sinks * i[..., None])) / key_count
    if config.clamp is not None:
        conserved_sources = conserved_sources.clamp(*config.clamp)
    a, c = torch.ones_like(conserved_sinks), torch.ones_like(conserved_sources)
    if config.allocation:
        ratio = n / max(m, 1) if config.length_factor else 1.0
        a = (conserved_sinks * ratio).sigmoid()
    logits = conserved_sources / config.temperature
    if config.competition and call.pattern is Pattern.CAUSAL_SELF:
        shares = torch.where(seen.bool(), logits[..., None, :], -torch.inf).softmax(-1)
        c = count * shares.diagonal(dim1=-2, dim2=-1)
    elif config.competition:
        c = m * logits.softmax(-1)
    weights = (sinks * (i / count)[..., None]) @ sources.mT * seen
    return a[..., None] * (weights @ (c[..., None] * v))


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Float[Tensor, "b h n v"]:
    """Noncausal patterns use sums over all tokens; causal-self uses the chunked form."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v).output
    config: Config = call.config
    n, m = q.shape[2], k.shape[2]
    sinks, sources, values = _mapped(call, q, k, v)
    valid = call.valid_keys(m)
    queries = n if call.lengths is None else call.lengths[:, None, None].to(sinks.dtype)
    keys = max(m, 1) if call.memory_lengths is None else call.memory_lengths[:, None, None].to(sinks.dtype).clamp(min=1)

    incoming = _flow(config, sinks, sources.sum(2, keepdim=True))
    outgoing = _flow(config, sources, sinks.sum(2, keepdim=True))
    # masked sinks and sources are zero, so their flows never enter a sum
    read = sinks / incoming[..., None]
    if config.competition:
        total = read.sum(2, keepdim=True)
        logits = _competition_logits(config, _flow(config, sources, total))
        values = values * (keys * _softmax(logits, valid))[..., None]
    output = read @ (sources.mT @ values)
    if config.allocation:
        total = (sources / outgoing[..., None]).sum(2, keepdim=True)
        ratio = queries / keys if config.length_factor else 1.0
        output = output * (_flow(config, sinks, total) * ratio).sigmoid()[..., None]
    return output.to(v.dtype)


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n v"]
) -> Result:
    """Causal-self from state to state: running sums, then causal linear attention. Also the step."""
    config: Config = call.config
    n = q.shape[2]
    if n != k.shape[2] or call.lengths is not call.memory_lengths:
        raise Unsupported(
            "flow_attention in causal-self with queries and keys of different tokens", supported="N = M and one mask"
        )
    sinks, sources, values = _mapped(call, q, k, v)
    competition, acceptance, sums = conserved_flows(
        sinks,
        sources,
        empty_sums(sinks) if call.state is None else call.state.sums,
        Rule(config.competition, config.allocation, config.clamp, config.temperature, config.eps),
        valid=call.memory_lengths,
        backend=call.backend,
    )
    output, memory = gated_recurrence(
        sinks,
        sources,
        values * competition[..., None] if config.competition else values,
        state=None if call.state is None else call.state.memory,
        chunk_size=call.chunk_size or 64,
        backend=call.backend,
    )
    assert output is not None
    keys, queries, conserved_keys, conserved_queries = sums.totals.unbind(0)
    state = FlowState(
        keys=keys,
        queries=queries,
        conserved_keys=conserved_keys,
        conserved_queries=conserved_queries,
        maximum=sums.maximum,
        normalizer=sums.normalizer,
        memory=memory,
        length=length_after(call, k),
    )
    # acceptance holds all that multiplies a query's output: 1 / incoming, and the allocation
    return Result((output * acceptance[..., None]).to(v.dtype), state)


def _mapped(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """phi of queries and keys, zero at padding (where phi(0) is not), and values, in at least float32."""
    dtype = wide_dtype(q)
    phi = PHI[call.config.phi]
    q, k = q.to(dtype), k.to(dtype)
    sinks, sources = phi(q if call.scale == 1 else call.scale * q), phi(k)
    return _zero(sinks, call.valid_queries(q.shape[2])), _zero(sources, call.valid_keys(k.shape[2])), v.to(dtype)


def _zero(x: Tensor, valid: Bool[Tensor, "b n"] | None) -> Tensor:
    return x if valid is None else torch.where(valid[:, None, :, None], x, 0)


def _flow(config: Config, x: Float[Tensor, "b h n d"], total: Float[Tensor, "b h #n d"]) -> Float[Tensor, "b h n"]:
    return ((x + config.eps) * (total + config.eps)).sum(-1)


def _competition_logits(config: Config, conserved_sources: Tensor) -> Tensor:
    if config.clamp is not None:
        conserved_sources = conserved_sources.clamp(*config.clamp)
    return conserved_sources / config.temperature


def _softmax(logits: Float[Tensor, "b h m"], valid: Bool[Tensor, "b m"] | None) -> Float[Tensor, "b h m"]:
    """Softmax over valid keys; 0 in a row without any."""
    if valid is None:
        return logits.softmax(-1)
    weights = logits.masked_fill(~valid[:, None], torch.finfo(logits.dtype).min).softmax(-1)
    return torch.where(valid[:, None], weights, 0)


def cost(shape: Shape, config: Any) -> Cost:
    """Cost of sums over tokens for the flows, and of causal linear attention."""
    heads = shape.batch * shape.heads
    matrix = shape.dim_key * shape.dim_value
    flows = 8 * shape.dim_key
    return Cost(
        flops=2.0 * heads * (shape.n + shape.m) * (matrix + flows),
        memory=float(heads * (shape.n + shape.m) * (3 * shape.dim_key + 64)),
        state=float(shape.heads * (matrix + 4 * shape.dim_key + 2)),
        step_flops=4.0 * heads * (matrix + flows),
    )


MECHANISM = Mechanism(
    name="flow_attention",
    aliases=("flow", "flowformer"),
    kind=Kind.ATTENTION,
    summary="Linear attention in which keys compete and queries accept, by conserving flow.",
    paper=Paper("Flowformer: Linearizing Transformers with Conservation Flows", "2202.06258", 2022, 26),
    inputs={"q": "bhnd", "k": "bhmd", "v": "bhmv"},
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS),
    refused={
        Pattern.CAUSAL_CROSS: (
            "the competition of the keys sums over all queries; the causal form counts queries and keys together, which "
            "needs one sequence"
        )
    },
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": chunked},
    config=Config,
    variants={
        "elu": {"phi": "elu", "competition": False, "eps": 1e-3},
        "relu": {"phi": "relu", "allocation": False, "temperature": 2.0, "eps": 1e-2},
        "softplus": {"phi": "softplus", "clamp": None, "length_factor": False},
    },
    engine="gated_recurrence",
    state=FlowState,
    cost=cost,
    default_scale=1.0,
    weights="implicit",
    uneven=False,
    layer_defaults={"bias": True},
)
