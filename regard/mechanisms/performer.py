r"""Performer (FAVOR+): random positive features estimate the softmax kernel, so the past fits in one matrix per head.

When to pick it: softmax-like attention at linear cost over long inputs with small scores; the weights of a trained
softmax model can be transferred to it and fine-tuned.
When not: sharp attention. The variance of the estimate grows exponentially with |q + k|^2, so a few large scores drown
in noise; see `softmax`, or `linear` for a cheaper kernel without random estimates.

Definition (Choromanski et al., arXiv 2009.14794, lemma 1 and section 2.4; survey arXiv 2103.14636, C4). With random
features w_1 ... w_R and x' = sqrt(s) x for the scale s, so that exp(s q . k) = E[ phi(q) . phi(k) ]:

    phi_r(x) = R^-1/2 ( exp(w_r . x' - |x'|^2 / 2 - c(x)) + e )
    o_i = (sum_j (phi(q_i) . phi(k_j)) v_j) / (sum_j phi(q_i) . phi(k_j) + eps)

- c of a query is the largest exponent among its own features. c of a key is the largest exponent among all features of
  all keys that query i sees, hence a running maximum in causal-self: later keys do not enter it, nor does padding.
  It cancels except for e and eps.
- relu kernel: phi_r(x) = relu(w_r . x') + e, without a maximum.

In causal-self S_t = exp(c_{t-1} - c_t) S_{t-1} + exp(l_t - c_t) v_t^T for the exponents l_t of key t is a gated
recurrence; the contribution of e, the same for every feature, is a running sum of values.

| paper | here |
|---|---|
| omega_1 ... omega_m | `w` (R, D); drawn by :func:`draw_features` |
| m random features | R; `num_features` of a layer, floor(D ln D) when None |
| orthogonal features (R-ORF-PRF) | `orthogonal`: blocks of D orthogonal rows with the norms of Gaussian vectors |
| feature redrawing | `redraw`: training calls of a layer between two draws |
| epsilon added to the features | `feature_eps` (e) |
| S, and the sums of phi and v | `PerformerState.memory`, with the sum of features as the last column, and `.total` |

Layout: (B, H, N, D), one `w` for all heads. Masked keys have zero features. A query that sees no key gives 0.
Deviations: in causal attention too, public implementations share one maximum over all keys, which lets e carry a little
of the future into the past, or over padding as well; here the maximum is over the keys seen. The maximum keeps its
gradient, since with e it affects the output. `least_denominator` and `fresh` correspond to settings of the
Comprehensive Attention Benchmark (0.1, and features redrawn at each training call), but do not reproduce its outputs:
it subtracts only the largest w_r . x', without |x'|^2 / 2, which makes e weigh exp(|x'|^2 / 2) times as much. The
causal form here is the prefix sum that the benchmark omits.
Trigonometric features are not implemented.
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
    LayerCall,
    LayerSpec,
    Mechanism,
    Paper,
    Pattern,
    Projection,
    Result,
    Shape,
    State,
    Tensors,
    Unsupported,
    at_least,
    one_of,
    state_field,
)
from regard.core.precision import wide, wide_dtype, without_autocast
from regard.core.sampling import normals
from regard.engines import recurrent_forms
from regard.engines.gated_recurrence import gated_recurrence, gated_recurrence_step

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FEATURE_EPS = {"softmax": 1e-4, "relu": 1e-3}
"""The number added to the features of each kernel when `feature_eps` is None."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        kernel: ``softmax`` (positive features of exp) or ``relu``.
        num_features: R of a layer, >= 1; floor(D ln D) when None.
        feature_eps: e, >= 0 and finite; 1e-4 with softmax and 1e-3 with relu when None.
        eps: added to the denominator, >= 0 and finite.
        least_denominator: lower bound of the denominator, >= 0 and finite.
        orthogonal: whether a layer's features are orthogonal in blocks of D; else independent Gaussian vectors.
        redraw: number of training calls after which a layer redraws its features, >= 0; 0 for never.
        fresh: whether a layer draws new Gaussian features for each training call; `redraw` then has no effect.
    """

    kernel: str = "softmax"
    num_features: int | None = None
    feature_eps: float | None = None
    eps: float = 1e-6
    least_denominator: float = 0.0
    orthogonal: bool = True
    redraw: int = 1000
    fresh: bool = False

    def __post_init__(self) -> None:
        one_of("kernel", self.kernel, FEATURE_EPS)
        if self.num_features is not None:
            at_least("num_features", self.num_features, 1)
        for name in ("feature_eps", "eps", "least_denominator"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise Unsupported(f"{name}={value}", supported=f"0 <= {name} < inf", nearest=f"{name}=1e-6")
        at_least("redraw", self.redraw, 0)

    @property
    def offset(self) -> float:
        """e, the offset of the features."""
        return FEATURE_EPS[self.kernel] if self.feature_eps is None else self.feature_eps

    def features(self, width: int) -> int:
        """R for heads of the given width."""
        return max(1, int(width * math.log(width))) if self.num_features is None else self.num_features


@dataclass(frozen=True)
class PerformerState(State):
    """The recurrence's matrix and the sums needed for the feature offset, in at least float32."""

    memory: Float[Tensor, "b h r c"] = state_field()
    """Sum of features, exp(l - peak) or relu, times values with a column of ones."""
    total: Float[Tensor, "b h c"] = state_field()
    """Sum of the values, then their number."""
    peak: Float[Tensor, "b h"] = state_field(fill=-torch.inf)
    """Largest exponent of a key so far; -inf before the first one, and with the relu kernel."""
    length: Int[Tensor, " b"] = state_field()


def draw_features(
    count: int,
    width: int,
    *,
    orthogonal: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "r d"]:
    """Random features: `count` vectors of `width` numbers, each distributed as a standard Gaussian vector.

    Args:
        orthogonal: whether each block of `width` vectors is orthogonal; else all are independent.
        generator: random generator, on `device`.
    """
    w = torch.randn(count, width, generator=generator, device=device, dtype=dtype)
    if not orthogonal:
        return w
    blocks = torch.randn(-(-count // width), width, width, generator=generator, device=device, dtype=torch.float64)
    q, r = torch.linalg.qr(blocks)
    directions = (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT.flatten(0, 1)[
        :count
    ]  # uniform, whatever QR's signs
    return directions.to(w.dtype) * w.norm(dim=-1, keepdim=True)


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    w: Float[Tensor, "r d"],
) -> Float[Tensor, "b h n v"]:
    """The definition, one query at a time."""
    config: Config = call.config
    n, m = q.shape[2], k.shape[2]
    queries, keys = exponents(call, q, w), exponents(call, k, w)
    outputs = []
    for i in range(n):
        seen = max(i + m - n + 1, 0) if call.pattern is Pattern.CAUSAL_SELF else m
        if seen == 0:
            outputs.append(v.new_zeros(*v.shape[:2], v.shape[3]))
            continue
        query, known = queries[:, :, i, None], keys[:, :, :seen]
        if config.kernel == "softmax":
            query = (query - query.amax(-1, keepdim=True)).exp() / w.shape[0]
            known = (known - known.amax((2, 3), keepdim=True)).exp()
            phi = query + config.offset / w.shape[0]
        else:
            phi, known = query.relu() + config.offset, known.relu()
        weights = (phi @ (known + config.offset).mT)[:, :, 0]
        denominator = (weights.sum(-1, keepdim=True) + config.eps).clamp(min=config.least_denominator)
        outputs.append((weights[..., None] * v[:, :, :seen]).sum(2) / denominator)
    return torch.stack(outputs, 2) if outputs else v.new_zeros(*v.shape[:2], 0, v.shape[3])


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    w: Float[Tensor, "r d"],
) -> Float[Tensor, "b h n v"]:
    """Noncausal: sums over all keys first. Causal: the chunked form."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v, w).output
    return read(call.replace(state=absorb(call.replace(state=None), k, v, w)), q, w).output


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m v"],
    w: Float[Tensor, "r d"],
) -> Result:
    """Causal-self with state in and out, computed as a gated recurrence."""
    keys, log_decay, peak = _relative_to_running_peak(call, k, w)
    values = _values(call, v)
    total = values.cumsum(2)
    if call.state is not None:
        total = total + call.state.total[:, :, None]

    phi = _map_queries(call, recurrent_forms.beside_keys(call, q, k.shape[2]), w)
    o, memory = gated_recurrence(
        phi,
        keys,
        values,
        log_decay,
        state=recurrent_forms.memory_of(call),
        chunk_size=call.chunk_size or 64,
        backend=call.backend,
    )
    assert o is not None
    output = recurrent_forms.of_queries(call, _divide(call, o, phi, total).to(v.dtype), q.shape[2])
    last = total[:, :, -1] if k.shape[2] else _empty_or(call, values).total
    return Result(output, PerformerState(memory, last, peak, recurrent_forms.length_after(call, k)))


def step(
    call: Call,
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b h 1 d"],
    v: Float[Tensor, "b h 1 v"],
    w: Float[Tensor, "r d"],
) -> Result:
    """One token of :func:`chunked` computed by the recurrence itself."""
    state: PerformerState = call.state
    keys, log_decay, peak = _relative_to_running_peak(call, k, w)
    values = _values(call, v)
    phi, total = _map_queries(call, q, w), state.total + values[:, :, 0]
    token = phi[:, :, 0], keys[:, :, 0], values[:, :, 0]
    decay = None if log_decay is None else log_decay[:, :, 0]
    o, memory = gated_recurrence_step(*token, decay, None, state.memory, backend=call.backend)
    output = _divide(call, o[:, :, None], phi, total[:, :, None]).to(v.dtype)
    return Result(output, PerformerState(memory, total, peak, recurrent_forms.length_after(call, k)))


def absorb(
    call: Call, k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m v"], w: Float[Tensor, "r d"]
) -> PerformerState:
    """Add memory to the sums; more may follow, in any order."""
    x, values = _projected(call, k, w), _values(call, v)
    before = _empty_or(call, values, features=w.shape[0])
    peak = before.peak
    if call.config.kernel == "relu":
        keys, kept = _where_valid(call, x.relu(), 0.0), torch.ones_like(peak)
    else:
        below, own = _peaks(call, k, x)
        if k.shape[2]:
            peak = torch.maximum(peak, own.amax(-1))
        origin = peak.masked_fill(peak == -torch.inf, 0.0)
        keys, kept = (x - (below + origin[..., None, None])).exp_(), (before.peak - origin).exp()
    with without_autocast(k.device):
        memory = kept[..., None, None] * before.memory + keys.mT @ values
    return PerformerState(memory, before.total + values.sum(2), peak, recurrent_forms.length_after(call, k))


def read(call: Call, q: Float[Tensor, "b h n d"], w: Float[Tensor, "r d"]) -> Result:
    """Read absorbed memory with queries."""
    state: PerformerState = call.state
    phi = _map_queries(call, q, w)
    output = _divide(call, recurrent_forms.read(call, phi), phi, state.total[:, :, None])
    return Result(output.to(q.dtype), state)


def exponents(call: Call, x: Float[Tensor, "b h n d"], w: Float[Tensor, "r d"]) -> Float[Tensor, "b h n r"]:
    """w . x' - |x'|^2 / 2, the logarithms of the softmax kernel's features; w . x' with the relu kernel."""
    projected = _projected(call, x, w)
    return projected if call.config.kernel == "relu" else projected - _half_square(call, x)


def _projected(call: Call, x: Tensor, w: Tensor) -> Float[Tensor, "b h n r"]:
    if call.scale < 0:
        raise Unsupported(f"performer with scale={call.scale}", supported="scale >= 0", nearest="-q and scale >= 0")
    dtype = wide_dtype(x)
    with without_autocast(x.device):
        return x.to(dtype) @ (math.sqrt(call.scale) * w.to(dtype)).mT


def _half_square(call: Call, x: Tensor) -> Float[Tensor, "b h n 1"]:
    x = wide(x)
    return call.scale / 2 * x.square().sum(-1, keepdim=True)


def _map_queries(call: Call, q: Tensor, w: Tensor) -> Float[Tensor, "b h n r"]:
    """phi(q); with the softmax kernel it includes the R^-1/2 of the keys."""
    x, features = _projected(call, q, w), w.shape[0]
    if call.config.kernel == "relu":
        return x.relu() + call.config.offset
    # |q'|^2 / 2 is the same for all features of a query, so it cancels in differences to the largest
    mapped = (x - (x.amax(-1, keepdim=True) + math.log(features))).exp_()
    return mapped + call.config.offset / features if call.config.offset else mapped


def _relative_to_running_peak(
    call: Call, k: Tensor, w: Tensor
) -> tuple[Float[Tensor, "b h m r"], Float[Tensor, "b h m 1"] | None, Float[Tensor, "b h"]]:
    """Key features without offset, log decays that rescale earlier features to the running peak, and the last peak."""
    x = _projected(call, k, w)
    before = _empty_or(call, x).peak
    if call.config.kernel == "relu":
        return _where_valid(call, x.relu(), 0.0), None, before
    below, own = _peaks(call, k, x)
    peaks = torch.cat([before[..., None], own], -1).cummax(-1).values
    after = peaks[..., 1:]
    origin = after.masked_fill(after == -torch.inf, 0.0)  # no key yet
    return (x - (below + origin[..., None])).exp_(), (peaks[..., :-1] - origin)[..., None], peaks[..., -1]


def _peaks(
    call: Call, k: Tensor, projected: Float[Tensor, "b h m r"]
) -> tuple[Float[Tensor, "b h m 1"], Float[Tensor, "b h m"]]:
    """|k'|^2 / 2 of each key, infinite at padding, and the largest exponent of each key."""
    below = _where_valid(call, _half_square(call, k), torch.inf)
    return below, projected.amax(-1) - below[..., 0]


def _empty_or(call: Call, like: Tensor, features: int = 0) -> PerformerState:
    """The call's state, or the state of an empty sequence with the columns of `like`."""
    if call.state is not None:
        return call.state
    lead, columns = like.shape[:2], like.shape[-1]
    return PerformerState(
        like.new_zeros(*lead, features, columns),
        like.new_zeros(*lead, columns),
        like.new_full(lead, -torch.inf),
        torch.zeros(lead[0], dtype=torch.long, device=like.device),
    )


def _values(call: Call, v: Float[Tensor, "b h m v"]) -> Float[Tensor, "b h m c"]:
    """Values with a column of ones, both zero at padding."""
    values = F.pad(wide(v), (0, 1), value=1.0)
    return _where_valid(call, values, 0.0)


def _where_valid(call: Call, x: Float[Tensor, "b h m c"], otherwise: float) -> Float[Tensor, "b h m c"]:
    valid = call.valid_keys(x.shape[2])
    return x if valid is None else x.masked_fill(~valid[:, None, :, None], otherwise)


def _divide(call: Call, o: Tensor, phi: Tensor, total: Tensor) -> Float[Tensor, "b h n v"]:
    """Outputs from the memory that queries read and, through the key features' offset, from the totals."""
    config: Config = call.config
    if config.offset:
        o = o + config.offset * phi.sum(-1, keepdim=True) * total
    denominator = (o[..., -1:] + config.eps).clamp(min=config.least_denominator)
    return o[..., :-1] / torch.where(denominator == 0, 1.0, denominator)


class RandomFeatures(Projection):
    """Supplies a layer's heads with random features, and redraws them periodically in training.

    Calls are not counted while compiling a graph. A compiled layer, or one whose activations are recomputed in the
    backward pass, should have ``redraw=0``; call :meth:`draw` between steps instead.

    Args:
        spec: the layer's specification.
    """

    features: Tensor
    calls: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.config: Config = spec.config
        count = self.config.features(spec.head_dim)
        self.register_buffer("features", torch.empty(count, spec.head_dim))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.draw()

    def draw(self, generator: torch.Generator | None = None) -> None:
        """Draw new features into a new tensor, so that a graph awaiting its backward pass keeps the old ones."""
        self.features = self._drawn(self.config.orthogonal, generator)

    def _drawn(self, orthogonal: bool, generator: torch.Generator | None) -> Tensor:
        old = self.features
        w = draw_features(*old.shape, orthogonal=orthogonal, generator=generator, device=old.device)
        return w.to(old.dtype)

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        context = call.context
        if self.training and self.config.fresh:
            return {**heads, "w": self._drawn(False, context.generator)}
        if self.training and self.config.redraw and not torch.compiler.is_compiling():
            self.calls = self.calls + 1
            if int(self.calls) % self.config.redraw == 0:
                self.draw(context.generator)
        return {**heads, "w": self.features}


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
    """Normal inputs for tests, with the random matrix `w`, one row per feature."""
    widths = {"h": 2, "d": 8, "v": 6, **(sizes or {})}
    shapes: dict[str, tuple[int, ...]] = {
        "q": (batch, widths["h"], n, widths["d"]),
        "k": (batch, widths["h"], m, widths["d"]),
        "v": (batch, widths["h"], m, widths["v"]),
        "w": (config.features(widths["d"]), widths["d"]),
    }
    return normals(generator, shapes, dtype)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the features of all queries and keys, and of causal linear attention in chunks of 64."""
    features, width = config.features(shape.dim_key), shape.dim_value + 1
    heads = shape.batch * shape.heads
    mapping = 2.0 * features * shape.dim_key
    return Cost(
        flops=heads * ((shape.n + shape.m) * mapping + shape.m * 4.0 * (features * width + 32 * (features + width))),
        memory=float(heads * ((shape.n + shape.m) * 2 * features + shape.m * (64 + 5 * width))),
        state=float(shape.heads * ((features + 1) * width + 1)),
        step_flops=heads * (2 * mapping + 4.0 * features * width),
    )


MECHANISM = Mechanism(
    name="performer",
    aliases=("favor", "favor_plus", "performers"),
    kind=Kind.ATTENTION,
    summary="Random positive features estimate the softmax kernel, so the past fits in one matrix per head.",
    paper=Paper("Rethinking Attention with Performers", "2009.14794", 2020, 18),
    inputs={"q": "bhnd", "k": "bhmd", "v": "bhmv", "w": "rd"},
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
        "relu": {"kernel": "relu", "orthogonal": False, "redraw": 0, "fresh": True},
        "few features": {"num_features": 5, "feature_eps": 0.1, "eps": 0.3},
        "least denominator": {"feature_eps": 0.0, "least_denominator": 0.1, "redraw": 3},
    },
    engine="gated_recurrence",
    state=PerformerState,
    cost=cost,
    weights="implicit",
    sample_inputs=sample_inputs,
    projection=RandomFeatures,
)
