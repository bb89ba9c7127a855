r"""cosFormer: linear attention with rectified features, whose weights fall with distance like a cosine.

When to pick it: long sequences where near tokens matter more; it is linear, keeps weights positive without exponentials,
and has a constant-size state.
When not: recall of distant tokens, or sequences whose maximum length is not known: the reach of the cosine must be
fixed before decoding. See `linear` and `gated_linear`.

Definition (Qin et al., arXiv 2202.08791, equations 8-12; search arXiv 2207.13955, section 3), positions i, j = 1, 2, ...:

    s_ij = relu(q_i) . relu(k_j) cos(pi (i - j) / 2M),     o_i = sum_j s_ij v_j / max(sum_j s_ij, eps)

over the keys j seen. Since cos(a - b) = sin a sin b + cos a cos b, with theta_i = pi i / 2M this is a product of features

    phi(q_i) = [relu(q_i) sin theta_i, relu(q_i) cos theta_i],  psi(k_j) likewise:  S = sum_j psi(k_j) v_j^T,  z = sum_j psi(k_j)

and in causal-self a gated recurrence without decay: :mod:`regard.engines.gated_recurrence`.

| paper | here |
|---|---|
| M | `length`; by default the number of tokens of each row in noncausal-self, and 65536 elsewhere |
| S, with z as last column | `CosformerState.memory`, in at least float32 |
| eps, 1e-6 | `eps`: denominators below it are raised to it |

Set `length=` to the longest sequence wherever it is not taken from the row: with a reach far beyond the sequence all
cosines are near 1, and distance has no effect. Positions beyond M, where weights would be negative, are refused.

Layout: (B, H, N, D). The scale multiplies q before relu and is 1 by default; being positive it cancels, except for eps.
Positions are the ranks of valid tokens; in cross patterns queries and memory both count from 1. A query whose features
are all zero gives 0, as does one that sees no key.
Deviations: the official code has M = max(N, M) of the call everywhere, so in causal attention outputs depend on the
number of tokens still to come, and decoding disagrees with training; here M is a constant wherever there is a state or
causality, and in noncausal-cross, whose memory may be absorbed before the queries are known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    ALL_PATTERNS,
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
    Waiver,
    at_least,
    lengths_after,
    state_field,
)
from regard.core.precision import wide, without_autocast
from regard.core.ragged import values_known
from regard.engines import recurrent_forms
from regard.engines.recurrent_forms import MatrixState

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FAR = 1 << 16
"""M where it is neither given nor the number of tokens."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        length: M, the reach of the cosine and the largest position, >= 1; None for the number of tokens of each row in
            noncausal-self and 65536 elsewhere.
        eps: smallest denominator, > 0 and finite.
    """

    length: int | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.length is not None:
            at_least("length", self.length, 1)
        if not 0 < self.eps < math.inf:
            raise Unsupported(f"eps={self.eps}", supported="a finite eps > 0", nearest="eps=1e-6")


@dataclass(frozen=True)
class CosformerState(State):
    """S with z as its last column, in at least float32; in cross patterns also the number of queries so far."""

    memory: Float[Tensor, "b h k c"] = state_field()
    queries: Int[Tensor, " b"] = state_field()
    length: Int[Tensor, " b"] = state_field()


def reference(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    n, m = q.shape[2], k.shape[2]
    reach = _reach(call, n)
    _check(call, max(n, m))
    first = m - n if call.pattern is Pattern.CAUSAL_SELF else 0
    i = torch.arange(n, device=q.device, dtype=q.dtype)[:, None] + first
    j = torch.arange(m, device=q.device, dtype=q.dtype)
    weights = ((call.scale * q).relu() @ k.relu().mT) * torch.cos(math.pi / 2 * (i - j) / reach)
    if call.pattern is Pattern.CAUSAL_SELF:
        weights = weights.tril(first)
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=call.config.eps)


def parallel(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Float[Tensor, "b h n v"]:
    """Noncausal patterns sum over all keys, then read the sums; causal-self uses the chunked form."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v).output
    return read(call.replace(state=absorb(call.replace(state=None), k, v)), q).output


def chunked(
    call: Call, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]
) -> Result:
    """Causal-self from state to state, by the gated recurrence."""
    o, state = recurrent_forms.chunked(call, *_mapped(call, q, k, v))
    return Result(_divide(call, o).to(v.dtype), _state(call, state))


def step(call: Call, q: Float[Tensor, "b h 1 d"], k: Float[Tensor, "b h 1 d"], v: Float[Tensor, "b h 1 v"]) -> Result:
    """One token of :func:`chunked` by the recurrence itself."""
    o, state = recurrent_forms.step(call, *_mapped(call, q, k, v))
    return Result(_divide(call, o).to(v.dtype), _state(call, state))


def absorb(call: Call, k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"]) -> CosformerState:
    """Absorb memory into S and z, in order; may be called repeatedly."""
    state: CosformerState | None = call.state
    after = recurrent_forms.length_after(call, k)
    _check(call, k.shape[2] if call.memory_lengths is None and state is None else after)
    keys = _features(k, _positions(k, None if state is None else state.length), _reach(call, k.shape[2]))
    with without_autocast(k.device):
        memory = keys.mT @ _with_ones(v)
    if state is None:
        return CosformerState(memory, torch.zeros_like(after), after)
    return CosformerState(state.memory + memory, state.queries, after)


def read(call: Call, q: Float[Tensor, "b h n d"]) -> Result:
    """Attend to absorbed memory; positions of queries are counted on from earlier ones."""
    state: CosformerState = call.state
    queries = lengths_after(state.queries, call.lengths, q.shape[0], q.shape[2], q.device)
    _check(call, queries)
    phi = _features(call.scale * q, _positions(q, state.queries), _reach(call, q.shape[2]))
    output = _divide(call, recurrent_forms.read(call, phi)).to(q.dtype)
    return Result(output, CosformerState(state.memory, queries, state.length))


def _reach(call: Call, n: int) -> float | Float[Tensor, "b 1 1 1"]:
    """M, per row if it is the row's number of tokens."""
    config: Config = call.config
    if config.length is not None:
        return float(config.length)
    if call.pattern is not Pattern.NONCAUSAL_SELF:
        return float(FAR)
    return float(max(n, 1)) if call.lengths is None else call.lengths.clamp(min=1)[:, None, None, None]


def _check(call: Call, last: int | Int[Tensor, " b"]) -> None:
    """Raise Unsupported for positions beyond M; positions held in tensors are not checked in a graph."""
    config: Config = call.config
    if config.length is None and call.pattern is Pattern.NONCAUSAL_SELF:
        return
    most = FAR if config.length is None else config.length
    if isinstance(last, Tensor):
        if not values_known(last):
            return
        last = int(last.max()) if last.numel() else 0
    if last > most:
        raise Unsupported(
            f"cosformer at position {last}", supported=f"positions up to length={most}", nearest=f"length={last}"
        )


def _mapped(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features of queries and keys in causal-self, aligned bottom-right, and values with a column of ones."""
    before = None if call.state is None else call.state.length
    n, m = q.shape[2], k.shape[2]
    _check(call, m if before is None and call.memory_lengths is None else recurrent_forms.length_after(call, k))
    reach = _reach(call, m)
    keys = _positions(k, before)
    if n == m and call.lengths is call.memory_lengths:
        queries = keys
    else:
        longer: int | Tensor = m - n
        if call.lengths is not None or call.memory_lengths is not None:
            counts = [x.new_full((x.shape[0],), c, dtype=torch.long) for x, c in ((q, n), (k, m))]
            given = call.lengths, call.memory_lengths
            n_valid, m_valid = (c if g is None else g for c, g in zip(counts, given, strict=True))
            longer = (m_valid - n_valid)[:, None, None, None]
        queries = _positions(q, before) + longer
    return _features(call.scale * q, queries, reach), _features(k, keys, reach), _with_ones(v)


def _positions(x: Float[Tensor, "b h n d"], before: Int[Tensor, " b"] | None) -> Int[Tensor, "#b 1 n 1"]:
    """The position of each token, counted on from `before`: 1, 2, ..."""
    position = torch.arange(1, x.shape[2] + 1, device=x.device)[None, None, :, None]
    return position if before is None else position + before[:, None, None, None]


def _features(
    x: Float[Tensor, "b h n d"], positions: Int[Tensor, "#b 1 n 1"], reach: float | Tensor
) -> Float[Tensor, "b h n k"]:
    """relu(x) sin theta and relu(x) cos theta, side by side, in at least float32; zero at padding, which holds zeros."""
    x = wide(x).relu()
    theta = math.pi / 2 * positions.to(x.dtype) / reach
    return torch.cat([x * theta.sin(), x * theta.cos()], -1)


def _with_ones(v: Float[Tensor, "b h m v"]) -> Float[Tensor, "b h m c"]:
    return F.pad(wide(v), (0, 1), value=1.0)


def _divide(call: Call, o: Float[Tensor, "b h n c"]) -> Float[Tensor, "b h n v"]:
    return o[..., :-1] / o[..., -1:].clamp(min=call.config.eps)


def _state(call: Call, state: MatrixState) -> CosformerState:
    queries = torch.zeros_like(state.length) if call.state is None else call.state.queries
    return CosformerState(state.memory, queries, state.length)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of linear attention in chunks of 64 with 2 D features, cosines and sines, and one more value column for the
    normaliser."""
    features, width = 2 * shape.dim_key, shape.dim_value + 1
    tokens, matrix = shape.batch * shape.heads * shape.m, features * width
    return Cost(
        flops=4.0 * tokens * (matrix + 32 * (features + width)),
        memory=float(tokens * (64 + 2 * features + 2 * width)),
        state=float(shape.heads * matrix),
        step_flops=4.0 * shape.batch * shape.heads * matrix,
    )


MECHANISM = Mechanism(
    name="cosformer",
    aliases=("cos_former", "cosine_reweighting"),
    kind=Kind.ATTENTION,
    summary="Linear attention of rectified features whose weights fall with distance like a cosine.",
    paper=Paper("cosFormer: Rethinking Softmax in Attention", "2202.08791", 2022, 24),
    inputs={"q": "bhnd", "k": "bhmd", "v": "bhmv"},
    patterns=ALL_PATTERNS,
    forms={
        "reference": reference,
        "parallel": parallel,
        "chunked": chunked,
        "step": step,
        "absorb": absorb,
        "read": read,
    },
    config=Config,
    variants={
        "fixed length": {"length": 200, "eps": 1e-3},
    },
    engine="gated_recurrence",
    state=CosformerState,
    combines="sum",
    cost=cost,
    default_scale=1.0,
    weights="implicit",
    length="max",
    waivers=(
        Waiver(
            "layer_lengths", "its horizon is fixed when the program is compiled", patterns=(Pattern.NONCAUSAL_SELF,)
        ),
    ),
)
