r"""Delta rule: a matrix memory that can be edited; writing under a key first removes what is stored there.

When to pick it: associative recall where keys are overwritten, or state tracking, with linear time and a state of fixed
size.
When not: forgetting that depends on age rather than on keys (`gated_linear`, or `gated=True` here); exact recall of more
items than a key has features (softmax).

Definition (Schlag et al., arXiv 2102.11174, section 4; trained in chunks by Yang et al., arXiv 2406.06484, section 3):

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,     o_t = S_t^T (K^-1/2 q_t)
        = S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - S_{t-1}^T k_t)

which is one step of gradient descent, of size beta_t, on 1/2 |S^T k_t - v_t|^2. With a gate (gated delta rule,
arXiv 2412.06464, section 3) exp(g_t) S_{t-1} takes the place of S_{t-1}. In a chunk the u solve a triangular system
(UT transform): U = (I + tril(diag(beta) K K^T, -1))^-1 diag(beta) (V - K S). Kimi delta attention (arXiv 2510.26692,
section 3) has a separate gate for each key feature, Diag(exp(g_t)) S_{t-1}: the same recurrence with a wider g.

| paper | here |
|---|---|
| beta_t | `beta` (B, H, M), 0 to 1, or to 2 for negative eigenvalues; 1 when not given |
| vector beta | `value_beta` (B, H, M, V), multiplies beta, one for each value feature |
| log alpha_t | `log_decay` (B, H, M, 1) or (B, H, M, K), natural logarithms <= 0; no decay when not given |
| S (V x K in papers) | `MatrixState.memory`, (B, H, K, V) |

Layout: (B, H, N, D), heads before time.

Queries and keys: **the function normalises both**, after the feature map, as the layer of the paper does: y / sqrt(sum
y^2 + eps). Give `normalize_queries=False` or `normalize_keys=False` to keep them as they are. Keys that are not unit
vectors let I - beta k k^T expand: 64 raw normal keys of width 64 overflow float32, and 37 of width 8 float16. The layer
convolves and activates q, k and v first (`short_convolution=4`); leaving that out costs recall. The layer of Kimi
Linear is `gated=True, gate="diagonal", output_gate="sigmoid"`, with `output_gate_rank` the width of a value head.

Noncausal-self is a forward pass that reads after writing plus a backward pass that reads before. In cross patterns the
memory is absorbed in order and every query reads the last state: the order of the memory matters.

Deviations: a causal-self call without state is computed in chunks; `chunk_size` = N gives the full parallel form. A
vector beta costs as much as V heads. With `short_convolution` and a feature map other than SiLU the official layer
still has SiLU on v; here `convolution_activation` is the same for q, k and v. The layer's norms have eps 1e-6
(official: 1e-5). The sum norm has eps too, so that a key of zeros stays zero. The layer writes one key per token; to
write several with the function (a product of as many Householder matrices), repeat each token and its query, and read
the output of the last copy.
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
    Pattern,
    Projection,
    Recurrence,
    Result,
    Shape,
    Tensors,
    Unsupported,
    Waiver,
    one_of,
)
from regard.core.precision import wide, wide_dtype
from regard.engines import recurrent_forms
from regard.engines.feature_maps import FEATURE_MAPS
from regard.engines.recurrent_forms import MatrixState

if TYPE_CHECKING:
    from jaxtyping import Float

NORMS = ("l2", "sum")
ACTIVATIONS = ("identity", "silu", "relu", "elu")
NONNEGATIVE = ("relu", "elu")
GATES = ("scalar", "diagonal")


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        feature_map: the map of queries and keys, before the norm: ``identity``, ``silu``, ``relu`` or ``elu`` (elu +
            1).
        norm: ``l2``, or ``sum`` (features sum to one; needs ``relu`` or ``elu``).
        normalize_queries, normalize_keys: whether `norm` applies to them.
        eps: inside the root of the l2 norm, or added to the sum, > 0.
        use_beta: whether the layer learns beta; otherwise beta is 1 and none may be given.
        allow_negative_eigenvalues: whether the layer's beta is in (0, 2) rather than (0, 1).
        vector_beta: whether the layer learns a beta for each value feature rather than one per head.
        gated: whether the layer learns decays (gated delta rule).
        gate: the decays of `gated`: ``scalar``, one per head, or ``diagonal``, one per key feature (Kimi delta
            attention), from two projections with a bottleneck as wide as a value head.
    """

    feature_map: str = "identity"
    norm: str = "l2"
    normalize_queries: bool = True
    normalize_keys: bool = True
    eps: float = 1e-6
    use_beta: bool = True
    allow_negative_eigenvalues: bool = False
    vector_beta: bool = False
    gated: bool = False
    gate: str = "scalar"

    def __post_init__(self) -> None:
        one_of("feature_map", self.feature_map, ACTIVATIONS)
        one_of("norm", self.norm, NORMS)
        if not self.eps > 0:
            raise Unsupported(f"eps={self.eps}", supported="eps > 0", nearest="eps=1e-6")
        if self.norm == "sum" and self.feature_map not in NONNEGATIVE:
            raise Unsupported(
                f"norm='sum' with feature_map={self.feature_map!r}, whose sum may vanish",
                supported=f"feature_map among {', '.join(NONNEGATIVE)}",
                nearest="feature_map='elu'",
            )
        for option in ("allow_negative_eigenvalues", "vector_beta"):
            if getattr(self, option) and not self.use_beta:
                raise Unsupported(f"{option} with use_beta=False", supported="use_beta=True", nearest=f"{option}=False")
        one_of("gate", self.gate, GATES)
        if self.gate != "scalar" and not self.gated:
            raise Unsupported(f"gate={self.gate!r} with gated=False", supported="gated=True", nearest="gate='scalar'")


def reference(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    beta: Float[Tensor, "b h m"] | None = None,
    log_decay: Float[Tensor, "b h m #k"] | None = None,
    value_beta: Float[Tensor, "b h m v"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The recurrence, token by token: decay, predict, correct."""
    q, k = (
        call.scale * _features(call, q, call.config.normalize_queries),
        _features(call, k, call.config.normalize_keys),
    )
    rate = torch.ones_like(v) if value_beta is None else value_beta
    if beta is not None:
        rate = rate * beta[..., None]
    decay = torch.ones_like(k) if log_decay is None else log_decay.exp().expand_as(k)
    n, m = q.shape[2], k.shape[2]
    empty = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])

    def write(order: range) -> list[tuple[Tensor, Tensor]]:
        """S before and after the write of each token."""
        state, states = empty, []
        for t in order:
            before = decay[:, :, t, :, None] * state
            predicted = (k[:, :, t, None, :] @ before)[:, :, 0]
            state = before + k[:, :, t, :, None] * (rate[:, :, t] * (v[:, :, t] - predicted))[:, :, None]
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
    beta: Float[Tensor, "b h m"] | None = None,
    log_decay: Float[Tensor, "b h m #k"] | None = None,
    value_beta: Float[Tensor, "b h m v"] | None = None,
) -> Result:
    """Whole sequences, from an empty state."""
    call = call if call.state is None else call.replace(state=None)
    if call.pattern.cross:
        return Result(read(call.replace(state=absorb(call, k, v, beta, log_decay, value_beta)), q).output)
    if call.pattern.causal:
        return chunked(call, q, k, v, beta, log_decay, value_beta)
    if value_beta is not None:
        return _by_columns(parallel, call, (q, k), v, beta, log_decay, value_beta)
    output = recurrent_forms.bidirectional(call, _queries(call, q), *_writes(call, k, v, beta, log_decay))
    return Result(output.to(v.dtype))


def chunked(
    call: Call,
    q: Float[Tensor, "b h n k"],
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    beta: Float[Tensor, "b h m"] | None = None,
    log_decay: Float[Tensor, "b h m #k"] | None = None,
    value_beta: Float[Tensor, "b h m v"] | None = None,
) -> Result:
    """Causal-self from state to state, in chunks of 64 unless the call sets another size, by the UT transform."""
    if value_beta is not None:
        return _by_columns(chunked, call, (q, k), v, beta, log_decay, value_beta)
    output, state = recurrent_forms.chunked(call, _queries(call, q), *_writes(call, k, v, beta, log_decay))
    return Result(output.to(v.dtype), state)


def step(
    call: Call,
    q: Float[Tensor, "b h 1 k"],
    k: Float[Tensor, "b h 1 k"],
    v: Float[Tensor, "b h 1 v"],
    beta: Float[Tensor, "b h 1"] | None = None,
    log_decay: Float[Tensor, "b h 1 #k"] | None = None,
    value_beta: Float[Tensor, "b h 1 v"] | None = None,
) -> Result:
    """One token of :func:`chunked` by the recurrence itself."""
    if value_beta is not None:
        return _by_columns(step, call, (q, k), v, beta, log_decay, value_beta)
    output, state = recurrent_forms.step(call, _queries(call, q), *_writes(call, k, v, beta, log_decay))
    return Result(output.to(v.dtype), state)


def absorb(
    call: Call,
    k: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h m v"],
    beta: Float[Tensor, "b h m"] | None = None,
    log_decay: Float[Tensor, "b h m #k"] | None = None,
    value_beta: Float[Tensor, "b h m v"] | None = None,
) -> MatrixState:
    """Absorb memory into S, in order; may be called repeatedly."""
    if value_beta is not None:

        def form(call: Call, k: Tensor, v: Tensor, rate: Tensor, g: Tensor | None) -> Result:
            return Result(v, absorb(call, k, v, rate, g))

        return _by_columns(form, call, (k,), v, beta, log_decay, value_beta).state
    return recurrent_forms.absorb(call, *_writes(call, k, v, beta, log_decay))


def read(call: Call, q: Float[Tensor, "b h n k"]) -> Result:
    """Attend to absorbed memory."""
    return Result(recurrent_forms.read(call, _queries(call, q)).to(q.dtype), call.state)


def _features(call: Call, x: Tensor, normalize: bool, scale: float = 1.0) -> Tensor:
    """Feature map, norm and scale, in at least float32 if there is a map or a norm."""
    config: Config = call.config
    if not normalize and config.feature_map == "identity":
        return recurrent_forms.scaled(x, scale)
    y = FEATURE_MAPS[config.feature_map](wide(x))
    if not normalize:
        return recurrent_forms.scaled(y, scale)
    if config.norm == "sum":
        return y * (scale / (y.sum(-1, keepdim=True) + config.eps))
    return y * (scale * torch.rsqrt(y.square().sum(-1, keepdim=True) + config.eps))


def _queries(call: Call, q: Tensor) -> Tensor:
    return _features(call, q, call.config.normalize_queries, call.scale)


def _writes(
    call: Call, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Keys, values, gates and rates; keys and rates of padding are zero, so padding changes nothing."""
    if beta is not None and not call.config.use_beta:
        raise Unsupported("beta with use_beta=False", supported="no beta, which is 1 then", nearest="use_beta=True")
    if log_decay is not None and log_decay.shape[-1] not in (1, k.shape[-1]):
        raise Unsupported(
            f"log_decay with {log_decay.shape[-1]} features for keys with {k.shape[-1]}",
            supported=f"(B, H, M, 1), or (B, H, M, {k.shape[-1]}) for a gate on each key feature",
        )
    dtype = wide_dtype(v)
    k = _features(call, k, call.config.normalize_keys)
    beta = torch.ones_like(k[..., 0]) if beta is None else beta.to(dtype)
    valid = call.valid_keys(k.shape[2])
    if valid is not None:
        k, beta = torch.where(valid[:, None, :, None], k, 0), torch.where(valid[:, None], beta, 0)
    return k, recurrent_forms.readable(v), None if log_decay is None else log_decay.to(dtype), beta


def _by_columns(
    form: Callable[..., Result],
    call: Call,
    keys: tuple[Tensor, ...],
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    value_beta: Tensor,
) -> Result:
    """Run a form with a rate for each value feature: every column of S is a head with its own beta."""

    def run(call: Call, *tensors: Tensor) -> Result:
        *keys, g, v, rate = tensors
        return form(call, *keys, v, rate[..., 0], g)

    rate = value_beta if beta is None else beta[..., None] * value_beta
    return recurrent_forms.by_columns(run, call, (*keys, log_decay), (v, rate))


class RateProjection(Projection):
    """Computes the layer's beta and decay from the sequence that is written: adds `beta` (or `value_beta`) and
    `log_decay`.

    beta = sigmoid(W x), twice that with negative eigenvalues. The decay of ``gated=True`` is that of the gated delta
    rule and of Mamba-2: g = -exp(A) softplus(W x + b), with exp(A) from 1 to 16 and softplus(b) from 0.001 to 0.1
    initially; with ``gate="diagonal"``, W = W_2 W_1 and b are per key feature, A still per head. Each key/value head
    has its own; the query heads of a group share them.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        self.config, self.heads = config, spec.kv_heads
        rates = spec.kv_heads * (spec.value_dim if config.vector_beta else 1)
        self.rate = spec.linear(spec.memory_dim, rates) if config.use_beta else None
        self.gate: nn.Module | None = None
        if config.gated:
            decays = spec.kv_heads
            if config.gate == "diagonal":
                decays *= spec.head_dim
                down = spec.linear(spec.memory_dim, spec.value_dim)
                self.gate = nn.Sequential(down, spec.linear(spec.value_dim, decays))
            else:
                self.gate = spec.linear(spec.memory_dim, decays)
            start = torch.empty(decays).uniform_(math.log(1e-3), math.log(0.1)).exp()
            self.log_strength = nn.Parameter(torch.empty(spec.kv_heads).uniform_(1, 16).log())
            self.gate_bias = nn.Parameter(start + torch.log(-torch.expm1(-start)))

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        source = call.memory
        if source is None:
            return heads
        dtype = wide_dtype(source)
        if self.rate is not None:
            rate = torch.sigmoid(self.rate(source).to(dtype))
            if self.config.allow_negative_eigenvalues:
                rate = 2 * rate
            rate = rate.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, h, m, 1 | v)
            heads |= {"value_beta": rate} if self.config.vector_beta else {"beta": rate[..., 0]}
        if self.gate is not None:
            step_size = F.softplus(self.gate(source).to(dtype) + self.gate_bias.to(dtype))
            step_size = step_size.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, h, m, 1 | k)
            heads["log_decay"] = -self.log_strength.to(dtype).exp()[:, None, None] * step_size
        return heads


def recurrence(config: Config, rates: RateProjection) -> Recurrence[nn.Module] | None:
    """The layer as a recurrence of its state; None if beta is 1 or per value feature, or the norm is a sum."""
    if rates.rate is None or config.vector_beta or config.norm != "l2":
        return None
    eps = config.eps if config.normalize_queries else None, config.eps if config.normalize_keys else None
    most = 2.0 if config.allow_negative_eigenvalues else 1.0
    plain: Recurrence[nn.Module] = Recurrence(beta=rates.rate, most_beta=most, eps=eps, feature_map=config.feature_map)
    if rates.gate is None:
        return plain
    gates = tuple(rates.gate) if isinstance(rates.gate, nn.Sequential) else (rates.gate,)
    return plain._replace(gates=gates, log_rates=rates.log_strength, gate_bias=rates.gate_bias)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the causal pattern in chunks of 64; with a vector beta each of the V columns is a separate head."""
    key, value, columns = shape.dim_key, shape.dim_value, 1
    if config.vector_beta:
        value, columns = 1, shape.dim_value
    tokens = shape.batch * shape.heads * shape.m * columns
    return Cost(
        flops=2.0 * tokens * (3 * key * value + 64 * (2 * key + 2 * value)),
        memory=float(tokens * (3 * 64 + 3 * key + 2 * value)),
        state=float(shape.heads * key * value * columns),
        step_flops=7.0 * shape.batch * shape.heads * key * value * columns,
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
    """Inputs for tests: rates where the configuration has them, and gates when `gated`."""
    size = {"h": 2, "k": 8, "v": 6} | (sizes or {})

    def normal(tokens: int, features: int) -> Tensor:
        return torch.randn(batch, size["h"], tokens, features, generator=generator, dtype=torch.float64)

    tensors = {"q": normal(n, size["k"]), "k": normal(m, size["k"]), "v": normal(m, size["v"])}
    if config.use_beta:
        rate = torch.sigmoid(normal(m, size["v"])) * (2 if config.allow_negative_eigenvalues else 1)
        tensors |= {"value_beta": rate} if config.vector_beta else {"beta": rate[..., 0]}
    if config.gated:
        width = size["k"] if config.gate == "diagonal" else 1
        tensors["log_decay"] = -F.softplus(2 * normal(m, size.get("l", width)))
    return {name: x.to(dtype) for name, x in tensors.items()}


KIMI_DELTA = {"gated": True, "gate": "diagonal", "output_gate": "sigmoid"}
"""Kimi Delta Attention (arXiv 2510.26692); its output gate also has the rank of a value head (`output_gate_rank`)."""


def combines(config: Config) -> str:
    """How states combine: by matrix products, except with `vector_beta`, where they differ between value features."""
    return "" if config.vector_beta else "matrix"


MECHANISM = Mechanism(
    name="delta_rule",
    aliases=("deltanet", "delta_net", "delta", "gated_delta_rule", "kda", "kimi_delta", "kimi_delta_attention"),
    alias_options={
        "gated_delta_rule": {"gated": True},
        **dict.fromkeys(("kda", "kimi_delta", "kimi_delta_attention"), KIMI_DELTA),
    },
    kind=Kind.ATTENTION,
    summary="A matrix memory that is edited: writing under a key first removes what is stored there.",
    paper=Paper("Parallelizing Linear Transformers with the Delta Rule over Sequence Length", "2406.06484", 2024, 48),
    inputs={
        "q": "bhnk",
        "k": "bhmk",
        "v": "bhmv",
        "beta?": "bhm",
        "log_decay?": "bhml",
        "value_beta?": "bhmv",
    },
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
        "no beta": {"use_beta": False, "feature_map": "elu", "normalize_queries": False, "eps": 1e-3},
        "sums": {"feature_map": "elu", "norm": "sum"},
        "negative eigenvalues": {"feature_map": "silu", "allow_negative_eigenvalues": True, "normalize_queries": False},
        "gated": {"gated": True},
        "diagonal gate": {"gated": True, "gate": "diagonal", "allow_negative_eigenvalues": True},
        "a beta for each feature": {"vector_beta": True, "gated": True},
        "no norm of keys": {"normalize_keys": False, "use_beta": False, "feature_map": "relu"},
    },
    engine="gated_recurrence",
    state=MatrixState,
    combines=combines,
    cost=cost,
    weights="implicit",
    domains={"beta": "unit", "log_decay": "log_decay", "value_beta": "unit"},
    sample_inputs=sample_inputs,
    projection=RateProjection,
    recurrence=recurrence,
    layer_defaults={"short_convolution": 4, "output_norm": "rms"},
    waivers=(
        Waiver(
            "extremes",
            "keys with a norm above sqrt(2) make the state grow without bound",
            variants=("no norm of keys",),
        ),
        Waiver(
            "reference",
            "37 keys of 8 features that are not normalised take the state, and outputs, beyond float16",
            holds_with={"normalize_keys": True},
            patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
            variants=("no norm of keys",),
            dtypes=(torch.float16,),
        ),
        Waiver(
            "split_resume",
            "such keys magnify the rounding of earlier tokens too: the definition itself loses as much in float32",
            holds_with={"normalize_keys": True},
            patterns=(Pattern.CAUSAL_SELF,),
            variants=("no norm of keys",),
            dtypes=(torch.float32,),
            backends=("torch",),
        ),
    ),
)
