r"""Random feature attention (RFA): sines and cosines of random projections estimate softmax between unit vectors; a
gate may let the past fade.

When to pick it: with `gate`, in a language model, as a recurrence that forgets and whose weights approximate a bounded
softmax; or as a historical baseline of linear attention.
When not: as an estimate of softmax (use `performer`, whose features are positive: here a sum of weights may be near 0
or negative when no key is similar), sharp attention, long recall.

Definition (Peng et al., arXiv 2103.02143, equations 3 to 7; survey arXiv 2103.14636, C5). With x^ = x / |x|, R random
vectors w_r and the scale t:

    phi(x) = R^-1/2 [sin(t^1/2 w_r . x^), cos(t^1/2 w_r . x^)]_r,    E[phi(q) . phi(k)] = exp(t q^ . k^ - t) for normal w_r
    S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T,   z_t = g_t z_{t-1} + (1 - g_t) phi(k_t)     with a gate, else sums
    o_t = S_t^T phi(q_t) / max(phi(q_t) . z_t, eps)

| paper | here |
|---|---|
| w_1 ... w_D | `w` (H, R, D), R = `num_features` of a layer, D when None; gives 2 R features |
| sigma, learned | in a layer, `w` is a fixed normal draw times 1 / sigma, with one sigma per head and feature |
| g_t = sigmoid(w_g . x_t + b_g) | `log_gate` = log g, computed by a layer with `gate` |
| 1 / sigma^2 | `scale`, 1 by default, in addition to the learned sigma |

Layout: (B, H, N, D), with separate random vectors for each head. Masked keys have zero features. A query that sees no
key gives 0. The gate depends on the order of tokens, so it exists only in causal-self.
State: S and z of each head, 2 R by V + 1 numbers.
Deviations: the paper draws other vectors from a pool during training; a layer here keeps its first draw. The
denominator is clamped to at least `eps`. The paper's arc-cosine features are not implemented.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Cost,
    Kind,
    LayerCall,
    LayerSpec,
    Mechanism,
    Paper,
    Pattern,
    Projection,
    Result,
    Shape,
    Tensors,
    Unsupported,
    at_least,
)
from regard.core.precision import wide, wide_dtype, without_autocast
from regard.core.sampling import normals
from regard.engines import recurrent_forms
from regard.engines.recurrent_forms import MatrixState
from regard.layers.linear import make_linear

if TYPE_CHECKING:
    from jaxtyping import Float

SMALLEST_NORM = 1e-6
"""Lower bound of the norm that vectors are divided by, so that shorter ones are not scaled to unit length."""
GATE_BIAS = 3.0
"""Initial bias of a layer's gates: a token's weight halves after 14 further tokens."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        num_features: R of a layer, >= 1; D when None.
        gate: whether a layer lets the past fade with a learned gate; causal-self only.
        learn_sigma: whether a layer learns sigma, starting at 1.
        eps: lower bound of the denominator, > 0 and finite.
    """

    num_features: int | None = None
    gate: bool = False
    learn_sigma: bool = True
    eps: float = 1e-2

    def __post_init__(self) -> None:
        if self.num_features is not None:
            at_least("num_features", self.num_features, 1)
        if not 0 < self.eps < math.inf:
            raise Unsupported(f"eps={self.eps}", supported="a finite eps > 0", nearest="eps=1e-2")


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    w: Float[Tensor, "h r d"],
    log_gate: Float[Tensor, "b h m"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full weight matrix."""
    n, m = q.shape[2], k.shape[2]
    weights = features(call, q, w) @ features(call, k, w).mT
    if log_gate is not None:
        _check_gate(call)
        since = log_gate.cumsum(-1)  # over all gates up to a token
        kept = torch.arange(m, device=q.device) <= torch.arange(m, device=q.device)[:, None]
        fading = torch.where(kept, (since[..., :, None] - since[..., None, :]).exp(), 0)
        own = (1 - log_gate.exp())[:, :, None] * fading  # (B, H, M, M), between key tokens
        weights = weights * F.pad(own, (0, 0, max(n - m, 0), 0))[:, :, max(m - n, 0) :]
    if call.pattern is Pattern.CAUSAL_SELF:
        weights = weights.tril(m - n)
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=call.config.eps)


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    w: Float[Tensor, "h r d"],
    log_gate: Float[Tensor, "b h m"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Noncausal: sums over all keys first. Causal: the chunked form."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v, w, log_gate).output
    return read(call.replace(state=absorb(call.replace(state=None), k, v, w, log_gate)), q, w).output


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    w: Float[Tensor, "h r d"],
    log_gate: Float[Tensor, "b h m"] | None = None,
) -> Result:
    """Causal-self with state in and out, computed as a gated recurrence."""
    output, state = recurrent_forms.chunked(call, features(call, q, w), *_written(call, k, v, w, log_gate))
    return Result(_divide(call, output).to(v.dtype), state)


def step(
    call: Call,
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b h 1 d"],
    v: Float[Tensor, "b h 1 v"],
    w: Float[Tensor, "h r d"],
    log_gate: Float[Tensor, "b h 1"] | None = None,
) -> Result:
    """One token of :func:`chunked` computed by the recurrence itself."""
    output, state = recurrent_forms.step(call, features(call, q, w), *_written(call, k, v, w, log_gate))
    return Result(_divide(call, output).to(v.dtype), state)


def absorb(
    call: Call,
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    w: Float[Tensor, "h r d"],
    log_gate: Float[Tensor, "b h m"] | None = None,
) -> MatrixState:
    """Add memory to S and z; more may follow."""
    keys, values, _ = _written(call, k, v, w, log_gate)
    with without_autocast(k.device):
        memory = keys.mT @ values
    if call.state is not None:
        memory = memory + call.state.memory
    return MatrixState(memory, recurrent_forms.length_after(call, k))


def read(call: Call, q: Float[Tensor, "b h n d"], w: Float[Tensor, "h r d"]) -> Result:
    """Read absorbed memory with queries."""
    return Result(_divide(call, recurrent_forms.read(call, features(call, q, w))).to(q.dtype), call.state)


def features(call: Call, x: Float[Tensor, "b h n d"], w: Float[Tensor, "h r d"]) -> Float[Tensor, "b h n 2r"]:
    """phi(x), in at least float32."""
    if call.scale < 0:
        raise Unsupported(
            f"random_feature with scale={call.scale}", supported="scale >= 0", nearest="-q and scale >= 0"
        )
    dtype = wide_dtype(x)
    with without_autocast(x.device):
        unit = x.to(dtype) / x.to(dtype).norm(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)
        angles = unit @ (math.sqrt(call.scale) * w.to(dtype)).mT
    return torch.cat([angles.sin(), angles.cos()], -1) * w.shape[1] ** -0.5


def _written(
    call: Call, k: Tensor, v: Tensor, w: Tensor, log_gate: Tensor | None
) -> tuple[Float[Tensor, "b h m f"], Float[Tensor, "b h m c"], Float[Tensor, "b h m 1"] | None]:
    """Features of the keys, values with a column of ones, and log decays; padding writes nothing."""
    keys, values = features(call, k, w), F.pad(wide(v), (0, 1), value=1.0)
    decay = None
    if log_gate is not None:
        _check_gate(call)
        decay = wide(log_gate)[..., None]
        keys = keys * -torch.expm1(decay)
    valid = call.valid_keys(k.shape[2])
    return keys if valid is None else keys.masked_fill(~valid[:, None, :, None], 0.0), values, decay


def _check_gate(call: Call) -> None:
    if call.pattern is not Pattern.CAUSAL_SELF:
        raise Unsupported(
            f"random_feature with a gate in {call.pattern.value}, where tokens have no order",
            supported="causal-self",
            nearest="gate=False",
        )


def _divide(call: Call, o: Float[Tensor, "b h n c"]) -> Float[Tensor, "b h n v"]:
    return o[..., :-1] / o[..., -1:].clamp(min=call.config.eps)


class RandomVectors(Projection):
    """Supplies a layer's heads with random vectors divided by sigma, and with gates.

    Args:
        spec: the layer's specification.
    """

    drawn: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        if config.gate and spec.pattern is not Pattern.CAUSAL_SELF:
            raise Unsupported(
                f"random_feature with gate=True in {spec.pattern.value}", supported="causal-self", nearest="gate=False"
            )
        count = spec.head_dim if config.num_features is None else config.num_features
        self.register_buffer("drawn", torch.randn(spec.heads, count, spec.head_dim))
        self.log_sigma = nn.Parameter(torch.zeros(spec.heads, 1, spec.head_dim)) if config.learn_sigma else None
        self.gate: nn.Module | None = None
        if config.gate:
            self.gate = make_linear(spec.memory_dim, spec.heads, bias=True)
            nn.init.constant_(self.gate.bias, GATE_BIAS)  # type: ignore[arg-type]

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        made = {"w": self.drawn if self.log_sigma is None else self.drawn * (-self.log_sigma).exp()}
        if self.gate is not None and call.memory is not None:
            made["log_gate"] = F.logsigmoid(wide(self.gate(call.memory))).transpose(1, 2)
        return {**heads, **made}


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    config: Config,
    sizes: dict[str, int] | None = None,
    **_: object,
) -> Tensors:
    """Inputs for tests and timings; random vectors are short enough to keep denominators away from 0."""
    size = {"h": 2, "d": 8, "v": 6} | (sizes or {})
    count = size["d"] if config.num_features is None else config.num_features
    shapes: dict[str, tuple[int, ...]] = {
        "q": (batch, size["h"], n, size["d"]),
        "k": (batch, size["h"], m, size["d"]),
        "v": (batch, size["h"], m, size["v"]),
        "w": (size["h"], count, size["d"]),
    }
    if config.gate:
        shapes["log_gate"] = (batch, size["h"], m)
    found = normals(generator, shapes, torch.float64)
    found["w"] = found["w"] / 2
    if config.gate:
        found["log_gate"] = F.logsigmoid(found["log_gate"])
    return {name: x.to(dtype) for name, x in found.items()}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the sines and cosines of all queries and keys, and of causal linear attention in chunks of 64."""
    features, width = 2 * (config.num_features or shape.dim_key), shape.dim_value + 1
    heads = shape.batch * shape.heads
    mapping = features * shape.dim_key
    return Cost(
        flops=heads * ((shape.n + shape.m) * mapping + shape.m * 4.0 * (features * width + 32 * (features + width))),
        memory=float(heads * ((shape.n + shape.m) * features + shape.m * (64 + width))),
        state=float(shape.heads * features * width),
        step_flops=heads * (2.0 * mapping + 4.0 * features * width),
    )


MECHANISM = Mechanism(
    name="random_feature",
    aliases=("rfa", "random_feature_attention"),
    kind=Kind.ATTENTION,
    summary="Sines and cosines of random projections estimate softmax between unit vectors; a gate may let the past fade.",
    paper=Paper("Random Feature Attention", "2103.02143", 2021, 18),
    inputs={"q": "bhnd", "k": "bhmd", "v": "bhmv", "w": "hrd", "log_gate?": "bhm"},
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
        "gated": {"gate": True, "num_features": 5},
        "fixed": {"learn_sigma": False, "eps": 0.1},
    },
    variant_patterns={"gated": (Pattern.CAUSAL_SELF,)},
    engine="gated_recurrence",
    state=MatrixState,
    cost=cost,
    default_scale=1.0,
    weights="implicit",
    sample_inputs=sample_inputs,
    projection=RandomVectors,
)
