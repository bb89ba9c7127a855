r"""Aaren: softmax attention whose query is learned, not computed from the token, which makes it an RNN with a small state.

When to pick it: streams (sensors, events, control), where every token must be processed in constant time and memory,
and the question asked of the past is always the same. The state is a vector of 2 + V numbers per head.
When not: retrieval. The query cannot depend on the token, so associative recall fails; see `softmax`, `gated_linear`,
`delta_rule`.

Definition (Feng et al., arXiv 2405.13956, sections 3.1-3.3), for one head with query q, scores s_i = tau <q, k_i>:

    m_t = max(m_{t-1}, s_t),   c_t = c_{t-1} e^(m_{t-1} - m_t) + e^(s_t - m_t),   a_t = a_{t-1} e^(m_{t-1} - m_t) + v_t e^(s_t - m_t)
    o_t = a_t / c_t = (sum_{j<=t} e^{s_j} v_j) / (sum_{j<=t} e^{s_j})

All prefixes come from one associative scan over (m, u, w): :mod:`regard.engines.softmax_scan`.

| paper | here |
|---|---|
| q = W_q x_q | `q` (H, D), one for all positions and rows; `projection.query_token` and `projection.query` of the layer |
| k_i, v_i | `k`, `v` |
| tau = d^-0.5 | `scale` |
| (m, c, a), in the scan (m, u, w) | `ScanState.m`, `.u`, `.w`, with G groups of H / G queries |

Layout: q (H, D), k and v (B, G, M, D) with G a divisor of H. No input has a query axis, so the number of outputs is the
length of `slots`, a tensor (B, N) whose values are not read. Without it there is one output per key in self patterns,
and a single one in cross patterns. Outputs (B, H, N, V): causal-self returns the last N prefixes (bottom-right
aligned); the other patterns pool all keys, so all N outputs are the same.
Several query tokens that read the same keys and values are heads that share them: `query_tokens=R` in the layer makes H
= R G queries from R tokens and one W_q, and requires `num_kv_heads` = H / R.
Deviations: `forget` multiplies the weights of earlier tokens by lambda at each token (so order matters, in memory as
well); `noncausal="bidirectional"` gives each position the outputs of its prefix and its suffix, which the layer
projects back to V features. Rotary positions are refused: they are relative to a query that has no position.
Left out: queries that depend on the position but not on the token, for which each position would need its own scan over
all earlier tokens, and the state would hold every key (use `softmax` with queries computed from positions); and gated
recurrences like minGRU, which weight tokens by gates instead of a query's scores and are a different mechanism.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    LayerCall,
    LayerSpec,
    Mechanism,
    Merge,
    Paper,
    Pattern,
    Projection,
    Result,
    Shape,
    Tensors,
    Unsupported,
    at_least,
    one_of,
)
from regard.core.precision import wide_dtype
from regard.core.ragged import flip_rows, take_queries
from regard.core.sampling import normals
from regard.engines import softmax_scan as scan
from regard.engines.recurrent_forms import length_after
from regard.engines.softmax_scan import Carry, ScanState

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        forget: lambda in (0, 1], multiplies the weights of all earlier tokens at each token; 1 forgets nothing.
        query_tokens: learned query tokens per layer, >= 1; if more than one, each key/value head must serve as many
            heads.
        noncausal: the output of each position in noncausal-self: ``last`` (the softmax over all tokens, the same
            everywhere) or ``bidirectional`` (its prefix and its suffix, side by side: 2 V features).
        scan: ``exact``, or ``global_shift``: two cumulative sums relative to the largest score, which underflow in
            early prefixes where scores span more than 87 (float32) or 700 (float64); not with `forget`.
    """

    forget: float = 1.0
    query_tokens: int = 1
    noncausal: str = "last"
    scan: str = "exact"

    def __post_init__(self) -> None:
        one_of("noncausal", self.noncausal, ("last", "bidirectional"))
        one_of("scan", self.scan, ("exact", "global_shift"))
        at_least("query_tokens", self.query_tokens, 1)
        if not 0.0 < self.forget <= 1.0:
            raise Unsupported(f"forget={self.forget}", supported="0 < forget <= 1", nearest="forget=1.0")
        if self.forget < 1.0 and self.scan != "exact":
            raise Unsupported(
                f"forget={self.forget} with scan={self.scan!r}", supported="scan='exact'", nearest="scan='exact'"
            )


def reference(
    call: Call,
    q: Float[Tensor, "h d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    slots: Shaped[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition: softmax over each prefix, with one query shared by all positions."""
    config: Config = call.config
    groups = q.shape[0] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = call.scale * torch.einsum("hd,bhmd->bhm", q, k)
    n, m = _outputs(call, slots, k), k.shape[2]

    def attend(scores: Tensor, values: Tensor) -> Tensor:
        age = torch.arange(scores.shape[-1] - 1, -1, -1, device=q.device, dtype=q.dtype)
        weights = (scores + age * math.log(config.forget)).softmax(-1)
        return torch.einsum("bhm,bhmv->bhv", weights, values)

    outputs = []
    for t in range(n):
        prefix = t + m - n + 1 if call.pattern is Pattern.CAUSAL_SELF or _bidirectional(call) else m
        o = attend(scores[:, :, : max(prefix, 0)], v[:, :, : max(prefix, 0)])
        if _bidirectional(call):
            o = torch.cat([o, attend(scores[:, :, t:].flip(-1), v[:, :, t:].flip(2))], -1)
        outputs.append(o)
    width = v.shape[-1] * (2 if _bidirectional(call) else 1)
    return torch.stack(outputs, 2) if outputs else v.new_zeros(*k.shape[:2], 0, width)


def parallel(
    call: Call,
    q: Float[Tensor, "h d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    slots: Shaped[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Whole sequences: softmax over each prefix (each prefix and suffix if bidirectional), or over all keys."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v, slots).output
    if _bidirectional(call):
        forward = _prefixes(call, q, k, v)[0]
        backward = _prefixes(call, q, *(flip_rows(x, call.memory_lengths, axis=2) for x in (k, v)))[0]
        return torch.cat([forward, flip_rows(backward, call.memory_lengths, axis=2)], -1)
    state = absorb(call.replace(state=None), k, v, q)
    return _repeat(state, _outputs(call, slots, k)).to(v.dtype)


def chunked(
    call: Call,
    q: Float[Tensor, "h d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    slots: Shaped[Tensor, "b n"] | None = None,
) -> Result:
    """Causal-self from state to state: chunks are scanned with a carry. Also the step."""
    output, carry = _prefixes(call, q, k, v)
    n, m = _outputs(call, slots, k), k.shape[2]
    if n != m or call.lengths is not call.memory_lengths:
        output = take_queries(output, n, call.lengths, call.memory_lengths)
    return Result(output, ScanState(*carry, length_after(call, k)))


def absorb(call: Call, k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m v"], q: Float[Tensor, "h d"]) -> ScanState:
    """Absorb memory into (m, u, w); may be called repeatedly."""
    carry = scan.absorb(_scores(call, q, k), v, state=_carry(call), log_decay=_log_decay(call, k))
    return ScanState(*carry, length_after(call, k))


def read(call: Call, q: Float[Tensor, "h d"], slots: Shaped[Tensor, "b n"] | None = None) -> Result:
    """Return the softmax over the absorbed memory, repeated for each query position."""
    return Result(_repeat(call.state, 1 if slots is None else slots.shape[1]).to(q.dtype), call.state)


def _bidirectional(call: Call) -> bool:
    return call.pattern is Pattern.NONCAUSAL_SELF and call.config.noncausal == "bidirectional"


def _outputs(call: Call, slots: Tensor | None, k: Tensor) -> int:
    if slots is not None:
        return slots.shape[1]
    return 1 if call.pattern.cross else k.shape[2]


def _carry(call: Call) -> Carry | None:
    return None if call.state is None else call.state.carry


def _prefixes(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Carry]:
    scores, state = _scores(call, q, k), _carry(call)
    if call.config.scan == "global_shift":
        output, carry = scan.softmax_scan_shifted(scores, v, state=state)
    else:
        output, carry = scan.softmax_scan(
            scores,
            v,
            state=state,
            log_decay=_log_decay(call, k),
            chunk_size=call.chunk_size,
            backend=call.backend,
        )
    return output.transpose(2, 3).flatten(1, 2), carry  # (b, g, m, r, v) -> (b, h, m, v)


def _scores(call: Call, q: Tensor, k: Tensor) -> Float[Tensor, "b g m r"]:
    dtype = wide_dtype(k)
    grouped = q.to(dtype).unflatten(0, (k.shape[1], -1))
    scores = call.scale * torch.einsum("grd,bgmd->bgmr", grouped, k.to(dtype))
    valid = call.valid_keys(k.shape[2])
    return scores if valid is None else scores.masked_fill(~valid[:, None, :, None], -torch.inf)


def _log_decay(call: Call, k: Tensor) -> Float[Tensor, "#b 1 m"] | None:
    if call.config.forget == 1.0:
        return None
    gate = k.new_full((1, 1, k.shape[2]), math.log(call.config.forget), dtype=wide_dtype(k))
    valid = call.valid_keys(k.shape[2])
    return gate if valid is None else torch.where(valid[:, None], gate, 0)


def _repeat(state: ScanState, n: int) -> Float[Tensor, "b h n v"]:
    return scan.normalized(state.u, state.w).flatten(1, 2)[:, :, None].expand(-1, -1, n, -1)


class LearnedQuery(Projection):
    """Learned query tokens and their projection W_q, the same at all positions.

    Args:
        spec: the layer's specification; the R = `query_tokens` tokens share one W_q (dim -> H / R heads).
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        tokens = spec.config.query_tokens
        if tokens > 1 and spec.kv_heads * tokens != spec.heads:
            raise Unsupported(
                f"query_tokens={tokens} with {spec.heads} heads over {spec.kv_heads} key/value heads",
                supported="num_heads = query_tokens * num_kv_heads",
                nearest=f"num_kv_heads={max(1, spec.heads // tokens)}",
            )
        self.cross, self.head_dim = spec.pattern.cross, spec.head_dim
        self.query_token = nn.Parameter(torch.empty(tokens, spec.dim))
        self.query = spec.linear(spec.dim, spec.heads // tokens * spec.head_dim)
        nn.init.normal_(self.query_token, std=0.02)

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x = call.x
        queries = self.query(self.query_token).unflatten(-1, (-1, self.head_dim))  # (r, h / r, d)
        heads = {**heads, "q": queries.transpose(0, 1).flatten(0, 1)}
        if self.cross and x is not None:
            heads["slots"] = x.detach()[..., 0]
        return heads


class JoinDirections(Merge):
    """Projects the prefix and suffix of each position, (B, H, N, 2 V), back to (B, H, N, V); else does nothing."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        both = spec.pattern is Pattern.NONCAUSAL_SELF and spec.config.noncausal == "bidirectional"
        width = spec.heads * spec.value_dim
        self.heads = spec.heads
        self.join = spec.linear(2 * width, width) if both else None

    def forward(self, output: Tensor, heads: Tensors, call: LayerCall, result: Result) -> Tensor:
        if self.join is None:
            return output
        joined = self.join(output.transpose(1, 2).flatten(2))
        return joined.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    pattern: Pattern,
    config: Config,
    sizes: dict[str, int] | None = None,
) -> Tensors:
    """Normal inputs for tests, and `slots` for n outputs."""
    widths = {"h": 2, "g": 2, "d": 8, "v": 6, **(sizes or {})}
    shapes = {
        "q": (widths["h"], widths["d"]),
        "k": (batch, widths["g"], m, widths["d"]),
        "v": (batch, widths["g"], m, widths["v"]),
    }
    found = normals(generator, shapes, dtype)
    found["slots"] = torch.zeros(batch, n, dtype=torch.long)
    return found


def cost(shape: Shape, config: Any) -> Cost:
    """Cost of causal-self in chunks of 64 keys, whose prefixes have on average 32 keys of their own chunk."""
    heads = shape.batch * shape.heads
    width = shape.dim_key + 64 + 2 * shape.dim_value
    return Cost(
        flops=2.0 * heads * shape.m * (width + 32 * shape.dim_value),
        memory=float(heads * shape.m * (64 + shape.dim_value)),
        state=float(shape.heads * (2 + shape.dim_value)),
        step_flops=2.0 * heads * (shape.dim_key + shape.dim_value),
    )


def combines(config: Config) -> str:
    """How states combine: as running softmaxes, but not with `forget`, whose decay states do not record."""
    return "" if config.forget < 1 else "softmax"


MECHANISM = Mechanism(
    name="aaren",
    aliases=("attention_as_rnn", "attention_rnn"),
    kind=Kind.ATTENTION,
    summary=(
        "Softmax attention whose query is learned, not computed from the token, which makes it an RNN with a small state."
    ),
    paper=Paper("Attention as an RNN", "2405.13956", 2024, 20),
    inputs={"q": "hd", "k": "bgmd", "v": "bgmv", "slots?": "bn"},
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
    variants={
        "forgetting": {"forget": 0.7},
        "two query tokens": {"query_tokens": 2, "num_kv_heads": 1},
        "both directions": {"noncausal": "bidirectional"},
        "both directions, forgetting": {"noncausal": "bidirectional", "forget": 0.9},
        "global shift": {"scan": "global_shift"},
    },
    variant_patterns={
        "both directions": (Pattern.NONCAUSAL_SELF,),
        "both directions, forgetting": (Pattern.NONCAUSAL_SELF,),
    },
    engine="softmax_scan",
    state=ScanState,
    combines=combines,
    cost=cost,
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned"),
    refused_positions="its query is the same at all positions",
    sample_inputs=sample_inputs,
    projection=LearnedQuery,
    merge=JoinDirections,
)
