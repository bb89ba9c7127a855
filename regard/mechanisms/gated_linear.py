r"""Gated linear attention: a matrix of key-value products in which each key feature is forgotten at its own rate.

When to pick it: long sequences and streams where the model must choose what to forget; linear time, a state of fixed
size, and training by matrix products.
When not: exact recall of many single tokens (softmax), or overwriting what is stored under a key (`delta_rule`).

Definition (Yang et al., arXiv 2312.06635, section 4; chunked form section 4.2, gates section 4.4):

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,     o_t = S_t^T (K^-1/2 q_t),     alpha_t = exp(g_t) in (0, 1]^K
    g_t = logsigmoid(W_2 W_1 x_t + b) / tau                                    (the layer's gate)
    y_t = W_o (RMSNorm(o_t) * swish(W_g x_t))                                  (per head, norm before gate)

A token is written after the decay and is seen by its own query. General form (section 4.1), with gates on values too:

    S_t = (alpha_t beta_t^T) * S_{t-1} + k_t v_t^T,                            beta_t = exp(c_t) in (0, 1]^V

| paper | here |
|---|---|
| log alpha_t | `log_decay` (B, H, M, K), natural logarithms <= 0, -inf forgets all; (B, H, M, 1) for one gate per head |
| log beta_t | `value_log_decay` (B, H, M, V); absent in the paper's layer |
| S | `MatrixState.memory`, (B, H, K, V) |
| tau | `gate_normalizer` |
| W_1, W_2, b | `GateProjection` |

Layout: (B, H, N, D), heads before time. Without `log_decay` nothing is forgotten: linear attention with no denominator.
One constant gate per head is retention (arXiv 2307.08621, without its rotation; `gate="fixed"`); one gate per head that
depends on the token is the decay of Mamba-2 (`gate="scalar"`). In Mamba-2 the decay comes from a step size, which also
scales what is written (`gate="step"`; arXiv 2405.21060, and 2408.15237 for queries, keys and values of a trained
model):

    Delta_t = softplus(W x_t + b),     S_t = exp(Delta_t A) S_{t-1} + k_t (Delta_t v_t)^T,     A < 0 per head

which is the recurrence of `mamba2` with q, k and v as its C, B and x; the block of `mamba2` also has a convolution, a
skip connection past the state and a gated norm.

Noncausal-self is a forward pass that reads after writing plus a backward pass that reads before. In cross patterns the
memory is absorbed in order, gates and all, and every query reads the last state: the order of the memory matters.

Deviations: exponents are sums over the segment between two tokens, never differences of cumulative sums, which lose a
factor of 100 in accuracy in float32 with strong gates. The parallel form of causal-self is the chunked one;
`chunk_size` = N makes it quadratic. Gates on values cost as much as V heads: each value feature runs as a separate
head. The layer's norms have eps 1e-6 (1e-5 in the official layer, 1e-6 in its model).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    Projection,
    Recurrence,
    Result,
    Shape,
    Tensors,
    Unsupported,
    Waiver,
    at_least,
    one_of,
)
from regard.core.precision import wide, wide_dtype
from regard.engines import recurrent_forms
from regard.engines.feature_maps import FEATURE_MAPS
from regard.engines.recurrent_forms import MatrixState
from regard.layers.linear import make_linear
from regard.layers.state_space import draw_dt_bias, without_weight_decay

if TYPE_CHECKING:
    from jaxtyping import Float

GATES = ("diagonal", "scalar", "step", "fixed", "none")
STEPS = (1e-3, 1e-1)
"""Range of the layer's initial steps, log-uniform, as in Mamba-2."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        feature_map: phi of queries and keys, before the scale: ``identity``, ``silu``, ``relu``, ``elu`` (elu + 1), or
            another of :data:`regard.mechanisms.linear.FEATURE_MAPS`.
        clamp_min: lower bound of the log decay of each entry of S (the sum of its key's and its value's), <= 0; None
            for no bound.
        gate: the layer's gates: ``diagonal`` (one for each key feature), ``scalar`` (one per head), ``step`` (one per
            head, from a step that also scales the values), ``fixed`` (head h decays by 1 - 2^-(5 + h)) or ``none``.
            Functions use the gates and values that they are given.
        gate_rank: width of the diagonal gate's bottleneck, >= 1.
        gate_normalizer: tau, which divides the log-sigmoid of learned gates, > 0; usually 1, 16 or 32: the larger, the
            slower it forgets.
        value_gate: whether the layer also has gates on values, computed like the diagonal ones.
    """

    feature_map: str = "identity"
    clamp_min: float | None = None
    gate: str = "diagonal"
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    value_gate: bool = False

    def __post_init__(self) -> None:
        one_of("feature_map", self.feature_map, FEATURE_MAPS)
        one_of("gate", self.gate, GATES)
        at_least("gate_rank", self.gate_rank, 1)
        if self.clamp_min is not None and not self.clamp_min <= 0:
            raise Unsupported(f"clamp_min={self.clamp_min}", supported="clamp_min <= 0", nearest="clamp_min=None")
        if not self.gate_normalizer > 0:
            raise Unsupported(
                f"gate_normalizer={self.gate_normalizer}", supported="positive numbers", nearest="gate_normalizer=16.0"
            )


def reference(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    log_decay: Float[Tensor, "b h m #k"] | None = None,
    value_log_decay: Float[Tensor, "b h m v"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The recurrence, token by token."""
    phi = FEATURE_MAPS[call.config.feature_map]
    q, k = call.scale * phi(q), phi(k)
    product = k[..., None] * v[..., None, :]  # (b, h, m, k, v)
    g = torch.zeros_like(product)
    if log_decay is not None:
        g = g + log_decay[..., None]
    if value_log_decay is not None:
        g = g + value_log_decay[..., None, :]
    decay = _bounded(call, g).exp()
    n, m = q.shape[2], k.shape[2]
    empty = torch.zeros_like(product).sum(2)

    def write(order: range) -> list[tuple[Tensor, Tensor]]:
        """S before and after the write of each token."""
        state, states = empty, []
        for t in order:
            before = decay[:, :, t] * state
            state = before + product[:, :, t]
            states.append((before, state))
        return states

    forward = write(range(m))
    if call.pattern.cross:
        return q @ (forward[-1][1] if forward else empty)
    if call.pattern.causal:
        seen = [forward[i + m - n][1] if i + m >= n else empty for i in range(n)]
    else:
        backward = write(range(m - 1, -1, -1))[::-1]
        seen = [after + before for (_, after), (before, _) in zip(forward, backward, strict=True)]
    return torch.stack([q[:, :, i, None] @ seen[i] for i in range(n)], 2)[:, :, :, 0] if n else q @ empty


def parallel(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    log_decay: Float[Tensor, "b h m #k"] | None = None,
    value_log_decay: Float[Tensor, "b h m v"] | None = None,
) -> Result:
    """Whole sequences, from an empty state."""
    call = call if call.state is None else call.replace(state=None)
    if call.pattern.cross:
        return Result(read(call.replace(state=absorb(call, k, v, log_decay, value_log_decay)), q).output)
    if call.pattern.causal:
        return chunked(call, q, k, v, log_decay, value_log_decay)
    if value_log_decay is not None:
        return _by_columns(parallel, call, (q, k), v, log_decay, value_log_decay)
    output = recurrent_forms.bidirectional(call, _queries(call, q), *_writes(call, k, v, log_decay))
    return Result(output.to(v.dtype))


def chunked(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    log_decay: Float[Tensor, "b h m #k"] | None = None,
    value_log_decay: Float[Tensor, "b h m v"] | None = None,
) -> Result:
    """Causal-self from state to state, in chunks of 64 unless the call sets another size; no cumulative sums of gates
    are subtracted."""
    if value_log_decay is not None:
        return _by_columns(chunked, call, (q, k), v, log_decay, value_log_decay)
    output, state = recurrent_forms.chunked(call, _queries(call, q), *_writes(call, k, v, log_decay))
    return Result(output.to(v.dtype), state)


def step(
    call: Call,
    q: Float[Tensor, "b h 1 k"],
    k: Float[Tensor, "b h 1 k"],
    v: Float[Tensor, "b h 1 v"],
    log_decay: Float[Tensor, "b h 1 #k"] | None = None,
    value_log_decay: Float[Tensor, "b h 1 v"] | None = None,
) -> Result:
    """One token of :func:`chunked` by the recurrence itself."""
    if value_log_decay is not None:
        return _by_columns(step, call, (q, k), v, log_decay, value_log_decay)
    output, state = recurrent_forms.step(call, _queries(call, q), *_writes(call, k, v, log_decay))
    return Result(output.to(v.dtype), state)


def absorb(
    call: Call,
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    log_decay: Float[Tensor, "b h m #k"] | None = None,
    value_log_decay: Float[Tensor, "b h m v"] | None = None,
) -> MatrixState:
    """Absorb memory into S, in order; may be called repeatedly."""
    if value_log_decay is not None:

        def form(call: Call, k: Tensor, v: Tensor, g: Tensor) -> Result:
            return Result(v, absorb(call, k, v, g))

        return _by_columns(form, call, (k,), v, log_decay, value_log_decay).state
    return recurrent_forms.absorb(call, *_writes(call, k, v, log_decay))


def read(call: Call, q: Float[Tensor, "b h n k"]) -> Result:
    """Attend to absorbed memory."""
    return Result(recurrent_forms.read(call, _queries(call, q)).to(q.dtype), call.state)


def _queries(call: Call, q: Tensor) -> Tensor:
    return recurrent_forms.scaled(_mapped(call, q), call.scale)


def _writes(call: Call, k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mapped keys (zero at padding, where phi(0) may not be), values and gates."""
    k = recurrent_forms.readable(_mapped(call, k))
    valid = call.valid_keys(k.shape[2])
    if valid is not None:
        k = torch.where(valid[:, None, :, None], k, 0)
    g = None if log_decay is None else _bounded(call, recurrent_forms.readable(log_decay))
    return k, recurrent_forms.readable(v), g


def _mapped(call: Call, x: Tensor) -> Tensor:
    """phi(x), in at least float32 unless phi is the identity."""
    name = call.config.feature_map
    return x if name == "identity" else FEATURE_MAPS[name](wide(x))


def _bounded(call: Call, g: Tensor) -> Tensor:
    return g if call.config.clamp_min is None else g.clamp(min=call.config.clamp_min)


def _by_columns(
    form: Callable[..., Result], call: Call, keys: tuple[Tensor, ...], v: Tensor, log_decay: Tensor | None, c: Tensor
) -> Result:
    """Run a form with gates `c` on values: every column of S is a head whose gates add its own to those of its keys."""

    def run(call: Call, *tensors: Tensor) -> Result:
        *keys, g, v, c = tensors
        return form(call, *keys, v, c if g is None else c + g)

    return recurrent_forms.by_columns(run, call, (*keys, log_decay), (v, c))


class GateProjection(Projection):
    """Computes the layer's gates from the sequence that is written: adds `log_decay` (and `value_log_decay`) to the
    heads.

    Learned gates are ``logsigmoid(z) / gate_normalizer``, with z = W_2 W_1 x + b for one gate per feature (W_1 maps to
    `gate_rank` features) and z = W x + b for one gate per head. b starts at 0, so that the decay starts near 2^(-1 /
    gate_normalizer). Steps start between 0.001 and 0.1 and A at -1, so that their decay starts near 1. Each key/value
    head has its own gates; the query heads of a group share them.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        self.config, self.heads = config, spec.kv_heads
        self.key_gate: nn.Module | None = None
        if config.gate == "diagonal":
            self.key_gate = _low_rank(spec, spec.head_dim)
        elif config.gate == "scalar":
            self.key_gate = _with_zero_bias(make_linear(spec.memory_dim, spec.kv_heads, bias=True))
        self.step: nn.Module | None = None
        self.A_log: nn.Parameter | None = None
        if config.gate == "step":
            self.step = make_linear(spec.memory_dim, spec.kv_heads, bias=True)
            self.A_log = nn.Parameter(torch.zeros(spec.kv_heads))
            draw_dt_bias(self.step.bias, *STEPS)  # type: ignore[arg-type]
            without_weight_decay(self.A_log, self.step.bias)  # type: ignore[arg-type]
        self.value_gate = _low_rank(spec, spec.value_dim) if config.value_gate else None

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        source = call.memory
        if source is None:
            return heads
        if self.key_gate is not None:
            heads["log_decay"] = self._gate(self.key_gate, source)
        elif self.step is not None and self.A_log is not None:
            step = F.softplus(wide(self.step(source))).mT[..., None]  # (b, h, m, 1)
            heads["log_decay"] = -step * wide(self.A_log).exp()[:, None, None]
            heads["v"] = (step * wide(heads["v"])).to(heads["v"].dtype)
        elif self.config.gate == "fixed":
            g = fixed_decays(self.heads, source.device, wide_dtype(source))
            heads["log_decay"] = g[None, :, None, None].expand(*heads["k"].shape[:3], 1)
        if self.value_gate is not None:
            heads["value_log_decay"] = self._gate(self.value_gate, source)
        return heads

    def _gate(self, module: nn.Module, source: Tensor) -> Tensor:
        z = module(source)
        z = wide(z)
        g = F.logsigmoid(z) / self.config.gate_normalizer
        return g.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, h, m, features)


def fixed_decays(heads: int, device: torch.device | str, dtype: torch.dtype) -> Float[Tensor, " h"]:
    """Log decays of ``gate="fixed"``."""
    halvings = 5 + torch.arange(heads, device=device, dtype=dtype)
    return torch.log1p(-torch.exp2(-halvings))


def recurrence(config: Config, gates: GateProjection) -> Recurrence[nn.Module] | None:
    """The layer as a recurrence of its state; None if it has gates on values."""
    if gates.value_gate is not None:
        return None
    plain: Recurrence[nn.Module] = Recurrence(feature_map=config.feature_map)
    bound = -math.inf if config.clamp_min is None else config.clamp_min
    if gates.step is not None:
        return plain._replace(gates=(gates.step,), log_rates=gates.A_log, least=bound, steps=True)
    if config.gate == "none":
        return plain
    if gates.key_gate is None:
        fixed = fixed_decays(gates.heads, "cpu", torch.float32)
        return plain._replace(log_rates=(-fixed).log(), least=bound)
    linears = tuple(gates.key_gate) if isinstance(gates.key_gate, nn.Sequential) else (gates.key_gate,)
    rates = torch.full((gates.heads,), -math.log(config.gate_normalizer), device="cpu", dtype=torch.float32)
    return plain._replace(gates=linears, log_rates=rates, sign=-1.0, least=bound)


def _low_rank(spec: LayerSpec, head_features: int) -> nn.Module:
    rank = spec.config.gate_rank
    up = _with_zero_bias(make_linear(rank, spec.kv_heads * head_features, bias=True))
    return nn.Sequential(spec.linear(spec.memory_dim, rank), up)


def _with_zero_bias(linear: nn.Module) -> nn.Module:
    nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
    return linear


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern in chunks of 64; with a value gate each of the V columns has its own pairs inside a
    chunk."""
    matrix = shape.dim_key * shape.dim_value
    tokens = shape.batch * shape.heads * shape.m
    near = 32 * (shape.dim_key * (shape.dim_value if config.value_gate else 1) + shape.dim_value)
    return Cost(
        flops=4.0 * tokens * (matrix + near),
        memory=float(
            tokens * (64 + 3 * shape.dim_key + shape.dim_value) * (shape.dim_value if config.value_gate else 1)
        ),
        state=float(shape.heads * matrix),
        step_flops=5.0 * shape.batch * shape.heads * matrix,
    )


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    config: Config,
    sizes: dict[str, int] | None = None,
    **_: Any,
) -> Tensors:
    """Inputs for tests, with the gates that the options have, from nearly 1 to nearly 0."""
    size = {"h": 2, "k": 8, "v": 6} | (sizes or {})
    heads, width = size["h"], size["k"]

    def normal(tokens: int, features: int) -> Tensor:
        return torch.randn(batch, heads, tokens, features, generator=generator, dtype=torch.float64)

    tensors = {"q": normal(n, width), "k": normal(m, width), "v": normal(m, size["v"])}
    if config.gate != "none":
        tensors["log_decay"] = -F.softplus(2 * normal(m, size.get("l", width if config.gate == "diagonal" else 1)))
    if config.value_gate:
        tensors["value_log_decay"] = -F.softplus(2 * normal(m, size["v"]))
    return {name: x.to(dtype) for name, x in tensors.items()}


MECHANISM = Mechanism(
    name="gated_linear",
    aliases=("gla", "gated_linear_attention", "simple_gla", "retention"),
    alias_options={"simple_gla": {"gate": "scalar"}, "retention": {"gate": "fixed", "positions": "rotary"}},
    kind=Kind.ATTENTION,
    summary="A matrix of key-value products that forgets, each key feature at its own rate.",
    paper=Paper("Gated Linear Attention Transformers with Hardware-Efficient Training", "2312.06635", 2023, 5),
    inputs={"q": "bhnk", "k": "bhmk", "v": "bhmv", "log_decay?": "bhml", "value_log_decay?": "bhmv"},
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
        "scalar gates": {"gate": "scalar", "feature_map": "elu", "gate_normalizer": 1.0},
        "fixed gates": {"gate": "fixed", "feature_map": "relu"},
        "no gates": {"gate": "none", "feature_map": "silu"},
        "gates of values": {"value_gate": True, "gate_rank": 3, "clamp_min": -0.5, "feature_map": "relu_squared"},
        "gates of values alone": {"gate": "none", "value_gate": True},
        "steps": {"feature_map": "sigmoid", "gate": "step"},
        "exp": {"feature_map": "exp"},
    },
    engine="gated_recurrence",
    state=MatrixState,
    combines="diagonal",
    cost=cost,
    weights="implicit",
    domains={"log_decay": "log_decay", "value_log_decay": "log_decay"},
    sample_inputs=sample_inputs,
    projection=GateProjection,
    recurrence=recurrence,
    layer_defaults={"key_expand": 0.5, "value_expand": 1.0, "output_norm": "rms", "output_gate": "swish"},
    waivers=(Waiver("extremes", "exp of features above 88 is not finite in float32", variants=("exp",)),),
)
