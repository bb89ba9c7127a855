r"""S4D: a diagonal state space with fixed complex rates per channel; a convolution as long as the sequence.

When to pick it: signals and long sequences where what matters is how long ago something happened (audio, series,
pixels), trained in O(N log N) and decoded with a constant state; as a baseline without selection for `mamba`.
When not: recall of contents (a kernel depends only on distance), and cross attention.

Definition (Gu et al., arXiv 2206.11893, section 3; the S4D of CAB, arXiv 2210.07661). For channel e and state k

    h_t[e,k] = exp(dt_e A_ek) h_{t-1}[e,k] + A_ek^-1 (exp(dt_e A_ek) - 1) x_t[e],   y_t[e] = 2 Re sum_k C_ek h_t[e,k] + D_e x_t[e]

with complex C and A, Re A < 0; B is 1, since only its product with C matters, and the factor 2 Re accounts for the
conjugates of the K states. This is the zero-order hold; `discretization="bilinear"` uses

    h_t = (1 - dt A / 2)^-1 ((1 + dt A / 2) h_{t-1} + dt x_t)

As a convolution, y_t = sum_{s<=t} K_{t-s} x_s + D x_t with K_t = 2 Re sum_k C_k Bbar_k Abar_k^t. The layer around it
(with `glu`, a gated linear unit of twice as many features replaces W):

    out = W gelu(y) + b

| paper | here |
|---|---|
| u, Delta, A, C | `x` (B, N, C), `dt` (C,), `a` (C, K, 2), `c` (C, K, 2): real and imaginary parts |
| C of the second direction | `c_back` (C, K, 2) |
| D | `skip` (C,) |
| N, states with their conjugates | 2 K, `d_state` |
| S4D-Inv, S4D-Lin, S4D-LegS | `init`: ``inverse``, ``linear``, ``legs`` |
| tied A (n_ssm = 1 in the code) | `tied` |

Layout: (B, N, C), channels last, in functions too. Noncausal-self is bidirectional: a second kernel, with the same A
and dt and its own C, adds sum_{s>t} K'_{s-t-1} x_s; its first entry belongs to the next token, so a token counts itself
once. Without `c_back` both directions use c. The scale multiplies C and is 1.
Padding is gathered away and documents begin with an empty state. The state is h, K complex numbers per channel.
Deviations: kernels are computed from powers in float64, as two factors of about sqrt(N) powers each, so that nothing of
size C x K x N is materialised; they are shared by the whole batch. CAB's code reads every state `num_heads` times and
widens the output projection accordingly; here channels are not split into heads and `num_heads` has no effect. CAB's A
is shared by all channels, as with `tied`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    Call,
    Context,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    State,
    Tensors,
    Unsupported,
    Waiver,
    lengths_after,
    one_of,
    state_field,
)
from regard.core.precision import wide, wide_dtype
from regard.core.ragged import place_queries
from regard.core.sampling import normals
from regard.engines.fourier import fast_size, long_convolution
from regard.layers.linear import make_linear
from regard.layers.mixer import Tokens
from regard.layers.state_space import StateSpaceLayer, check_range, without_weight_decay

if TYPE_CHECKING:
    from jaxtyping import Complex, Float, Int

INITS = ("inverse", "linear", "legs")
DISCRETIZATIONS = ("zoh", "bilinear")


@dataclass(frozen=True)
class Config:
    """Options, all for the layer except `discretization`.

    Attributes:
        d_state: states per channel including their conjugates, even and >= 2.
        init: the initial A: ``inverse``, ``linear`` or ``legs``.
        discretization: ``zoh`` or ``bilinear``.
        dt_init: range of the initial dt, log-uniform, 0 < low <= high.
        tied: share one A among all channels.
        glu: whether the output projection is a gated linear unit.
    """

    d_state: int = 16
    init: str = "inverse"
    discretization: str = "zoh"
    dt_init: tuple[float, float] = (1e-3, 1e-1)
    tied: bool = False
    glu: bool = False

    def __post_init__(self) -> None:
        if self.d_state < 2 or self.d_state % 2:
            raise Unsupported(
                f"d_state={self.d_state}",
                supported="an even number >= 2, states and their conjugates",
                nearest=f"d_state={max(2, self.d_state + self.d_state % 2)}",
            )
        one_of("init", self.init, INITS)
        one_of("discretization", self.discretization, DISCRETIZATIONS)
        check_range(self, "dt_init")


@dataclass(frozen=True)
class DiagonalState(State):
    """h, real and imaginary parts, in at least float32."""

    memory: Float[Tensor, "b c k 2"] = state_field()
    length: Int[Tensor, " b"] = state_field()


def reference(
    call: Call,
    x: Float[Tensor, "b n c"],
    dt: Float[Tensor, " c"],
    a: Float[Tensor, "c k 2"],
    c: Float[Tensor, "c k 2"],
    c_back: Float[Tensor, "c k 2"] | None = None,
    skip: Float[Tensor, " c"] | None = None,
) -> Float[Tensor, "b n c"]:
    """The recurrence, token by token; noncausal adds a second one from the end, read before each write."""
    _check(call, a, c_back)
    rate = torch.complex(a[..., 0], a[..., 1])
    forward = torch.complex(c[..., 0], c[..., 1])
    backward = forward if c_back is None else torch.complex(c_back[..., 0], c_back[..., 1])
    step = dt[:, None]
    if call.config.discretization == "zoh":
        keep = torch.exp(step * rate)
        write = (keep - 1) / rate
    else:
        keep = (1 + step * rate / 2) / (1 - step * rate / 2)
        write = step / (1 - step * rate / 2)
    n = x.shape[1]
    outputs = [torch.zeros_like(x[:, t]) if skip is None else skip * x[:, t] for t in range(n)]
    h = torch.zeros(x.shape[0], *rate.shape, dtype=rate.dtype, device=x.device)
    for t in range(n):
        h = keep * h + write * x[:, t, :, None]
        outputs[t] = outputs[t] + 2 * call.scale * (forward * h).sum(-1).real
    if not call.pattern.causal:
        h = torch.zeros_like(h)
        for t in reversed(range(n)):
            outputs[t] = outputs[t] + 2 * call.scale * (backward * h).sum(-1).real
            h = keep * h + write * x[:, t, :, None]
    return torch.stack(outputs, 1) if outputs else x


def parallel(
    call: Call,
    x: Float[Tensor, "b n c"],
    dt: Float[Tensor, " c"],
    a: Float[Tensor, "c k 2"],
    c: Float[Tensor, "c k 2"],
    c_back: Float[Tensor, "c k 2"] | None = None,
    skip: Float[Tensor, " c"] | None = None,
) -> Float[Tensor, "b n c"]:
    """A convolution by FFT. Padding holds zeros on the right, where it has no effect."""
    _check(call, a, c_back)
    if x.numel() == 0:
        return x
    power, write = _discretized(call.config, dt, a)
    return _convolved(call, x, power, write, c, None if call.pattern.causal else c if c_back is None else c_back, skip)


def chunked(
    call: Call,
    x: Float[Tensor, "b n c"],
    dt: Float[Tensor, " c"],
    a: Float[Tensor, "c k 2"],
    c: Float[Tensor, "c k 2"],
    c_back: Float[Tensor, "c k 2"] | None = None,
    skip: Float[Tensor, " c"] | None = None,
) -> Result:
    """Causal-self with state in and out. Memory is already linear in N, so a chunk of any size is computed at once."""
    _check(call, a, c_back)
    batch, n, precise = x.shape[0], x.shape[1], wide_dtype(x)
    power, write = _discretized(call.config, dt, a)
    before: DiagonalState | None = call.state
    length = lengths_after(None if before is None else before.length, call.lengths, batch, n, x.device)
    if x.numel() == 0:
        memory = x.new_zeros(batch, *a.shape, dtype=precise) if before is None else before.memory
        return Result(x, DiagonalState(memory, length))
    y = _convolved(call, x, power, write, c, None, skip)
    # rows aligned at their ends share the same powers as weights
    tokens = x if call.lengths is None else place_queries(x, n, call.lengths, None, axis=1)
    h = _to(precise, write)[:, None] * _weighed(tokens.to(precise).permute(2, 0, 1), power)
    if before is not None:
        passed = torch.full((batch,), n, device=x.device) if call.lengths is None else call.lengths
        h = h + _to(precise, torch.exp(power[:, None] * passed[:, None])) * _complex(before.memory).transpose(0, 1)
    return Result(y, DiagonalState(_real(h.transpose(0, 1)), length))


def step(
    call: Call,
    x: Float[Tensor, "b 1 c"],
    dt: Float[Tensor, " c"],
    a: Float[Tensor, "c k 2"],
    c: Float[Tensor, "c k 2"],
    c_back: Float[Tensor, "c k 2"] | None = None,
    skip: Float[Tensor, " c"] | None = None,
) -> Result:
    """One token of the recurrence; a row without a token keeps its state."""
    _check(call, a, c_back)
    before: DiagonalState = call.state
    precise = wide_dtype(x)
    power, write = (_to(precise, t) for t in _discretized(call.config, dt, a))
    u = x[:, 0].to(precise)
    h = power.exp() * _complex(before.memory) + write * u[..., None]
    y = 2 * call.scale * (_to(precise, _complex(c)) * h).sum(-1).real
    y = y if skip is None else y + skip.to(precise) * u
    memory = _real(h)
    if call.lengths is not None:
        memory = torch.where((call.lengths > 0)[:, None, None, None], memory, before.memory)
    length = lengths_after(before.length, call.lengths, x.shape[0], 1, x.device)
    return Result(y[:, None].to(x.dtype), DiagonalState(memory, length))


def _check(call: Call, a: Tensor, c_back: Tensor | None) -> None:
    if a.shape[-1] != 2:
        raise Unsupported(f"s4d with a of shape {tuple(a.shape)}", supported="(C, K, 2): real and imaginary parts")
    if c_back is not None and call.pattern.causal:
        raise Unsupported("s4d with c_back in causal-self", supported="noncausal-self", nearest="c_back=None")


def _complex(x: Float[Tensor, "... 2"]) -> Complex[Tensor, "..."]:
    x = wide(x)
    return torch.complex(x[..., 0], x[..., 1])


def _real(x: Complex[Tensor, "..."]) -> Float[Tensor, "... 2"]:
    return torch.view_as_real(x).contiguous()


def _to(dtype: torch.dtype, x: Complex[Tensor, "..."]) -> Complex[Tensor, "..."]:
    return x.to(torch.complex128 if dtype is torch.float64 else torch.complex64)


def _discretized(
    config: Config, dt: Float[Tensor, " c"], a: Float[Tensor, "c k 2"]
) -> tuple[Complex[Tensor, "c k"], Complex[Tensor, "c k"]]:
    """log Abar and Bbar, in float64 where available, since phases are multiplied by up to N steps."""
    dtype = torch.float32 if a.device.type == "mps" else torch.float64
    rate, step = _complex(a.to(dtype)), dt.to(dtype)[:, None]
    half = step * rate / 2
    if config.discretization == "bilinear":
        return torch.log((1 + half) / (1 - half)), step / (1 - half)
    # e^z - 1 = 2 e^(z/2) sinh(z/2) keeps precision for small z
    return 2 * half, 2 * half.exp() * half.sinh() / rate


def _factors(power: Complex[Tensor, "c k"], n: int) -> tuple[Complex[Tensor, "c t k"], Complex[Tensor, "c s k"]]:
    """Powers 0, s, ..., (t - 1) s and 0, ..., s - 1 of Abar, about sqrt(n) each, with t s >= n. s is a power of two, so
    that one graph serves many n."""
    size = 1
    while size * size < n:
        size *= 2
    fine, coarse = (torch.arange(count, device=power.device)[:, None] for count in (size, -(-n // size)))
    return torch.exp(power[:, None] * (size * coarse)), torch.exp(power[:, None] * fine)


def _geometric(
    power: Complex[Tensor, "c k"], weight: Complex[Tensor, "c r k"], n: int, dtype: torch.dtype
) -> Float[Tensor, "c r n"]:
    """2 Re sum_k weight_rk Abar_k^t for t < n."""
    coarse, fine = _factors(power, n)
    rows = _to(dtype, 2 * weight[:, :, None] * coarse[:, None])  # (c, r, t, k)
    rows = torch.view_as_real(rows.conj().resolve_conj()).flatten(-2).flatten(1, 2)  # Re x y = (x^*) . y as vectors
    product = rows @ torch.view_as_real(_to(dtype, fine)).flatten(-2).mT
    return product.unflatten(1, (weight.shape[1], -1)).flatten(2)[..., :n]


def _weighed(x: Float[Tensor, "c b n"], power: Complex[Tensor, "c k"]) -> Complex[Tensor, "c b k"]:
    """sum_j Abar^(n-1-j) x_j."""
    n = x.shape[-1]
    coarse, fine = _factors(power, n)
    blocks = F.pad(x, (coarse.shape[1] * fine.shape[1] - n, 0)).unflatten(-1, (coarse.shape[1], -1))
    powers = torch.view_as_real(_to(x.dtype, fine.flip(1)))  # (c, s, k, 2)
    inside = (blocks.flatten(1, 2) @ powers.flatten(-2)).unflatten(1, blocks.shape[1:3]).unflatten(-1, (-1, 2))
    return (_complex(inside) * _to(x.dtype, coarse.flip(1))[:, None]).sum(2)


def _convolved(
    call: Call, x: Tensor, power: Tensor, write: Tensor, c: Tensor, c_back: Tensor | None, skip: Tensor | None
) -> Float[Tensor, "b n c"]:
    """The outputs y, including the contribution of the call's state."""
    n, precise = x.shape[1], wide_dtype(x)
    reads = [call.scale * _complex(t.to(power.real.dtype)) for t in (c, c_back) if t is not None]
    kernels = _geometric(power, torch.stack([read * write for read in reads], 1), n, precise)
    u = x.to(precise).mT
    y = long_convolution(u, kernels[:, 0], None if c_back is None else kernels[:, 1])
    if call.state is not None:
        weight = _complex(call.state.memory).transpose(0, 1) * (reads[0] * power.exp())[:, None]  # (c, b, k)
        y = y + _geometric(power, weight, n, precise).transpose(0, 1)
    y = y if skip is None else y + skip.to(precise)[:, None] * u
    return y.mT.to(x.dtype)


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Axis sizes: states per channel, one of each conjugate pair."""
    return {"k": config.d_state // 2}


def cost(shape: Shape, config: Config) -> Cost:
    """Cost with H heads of dim_value features as channels, each with one kernel, as in causal-self."""
    channels, pairs = shape.heads * shape.dim_value, config.d_state // 2
    size = fast_size(max(2 * shape.n - 1, 1))
    transforms = 2.5 * size * math.log2(max(size, 2))  # of real inputs
    return Cost(
        flops=channels * (shape.batch * (2 * transforms + 3.0 * size) + transforms + 4.0 * shape.n * pairs),
        memory=float(channels * (shape.batch + 1) * (size + shape.n)),
        state=float(2 * channels * pairs),
        step_flops=13.0 * shape.batch * channels * pairs,
    )


class S4DLayer(StateSpaceLayer):
    """S4D with its nonlinearity and output projection, (B, N, C) -> (B, N, C), without norm or residual.

    A, dt and D stay in float32 when the layer is cast to a narrower dtype; A and dt have no weight decay.

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: accepted for a uniform signature; every channel has its own states.
        pattern: causal-self, or noncausal-self with a kernel for each direction.
        linear: kind of the output projection (``dense`` or a projection mechanism).
        config: see :class:`Config`.
    """

    FLOAT32 = ("log_dt", "log_decay", "frequency", "D")
    state_type = DiagonalState
    conv = None

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.CAUSAL_SELF,
        linear: str = "dense",
        config: Config | None = None,
    ) -> None:
        super().__init__(card, dim, pattern=pattern, config=config)
        pairs = self.config.d_state // 2
        self.log_dt = nn.Parameter(torch.empty(dim))
        self.log_decay = nn.Parameter(torch.empty(1 if self.config.tied else dim, pairs))
        self.frequency = nn.Parameter(torch.empty_like(self.log_decay))
        self.c = nn.Parameter(torch.empty(dim, pairs, 2))
        self.c_back = None if self.pattern.causal else nn.Parameter(torch.empty(dim, pairs, 2))
        self.D = nn.Parameter(torch.empty(dim))
        self.out_proj = make_linear(dim, 2 * dim if self.config.glu else dim, bias=True, kind=linear)
        without_weight_decay(self.log_dt, self.log_decay, self.frequency)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise A by `init`, dt log-uniformly, C (a kernel's sum over time has variance 1) and D normally."""
        config: Config = self.config
        a = initial_rates(config)
        with torch.no_grad():
            self.log_decay.copy_((-a.real).log())
            self.frequency.copy_(a.imag)
            self.log_dt.uniform_(*(math.log(dt) for dt in config.dt_init))
            # the integral of a kernel is 2 Re sum_k -C_k / A_k
            for c in (self.c, self.c_back):
                if c is not None:
                    c.normal_().mul_(0.5 / (a.abs() ** -2).sum().sqrt())
            self.D.normal_()

    def mix(self, tokens: Tokens, memory: Tokens | None, context: Context, state: Any) -> Result:
        a = torch.stack([-self.log_decay.exp(), self.frequency], -1)
        inputs = {
            "x": tokens.x,
            "dt": self.log_dt.exp(),
            "a": a.expand(self.dim, -1, -1),
            "c": self.c,
            "c_back": self.c_back,
            "skip": self.D,
        }
        result = self.call(inputs, tokens, context, state)
        y = self.out_proj(F.gelu(result.output))
        result.output = F.glu(y, -1) if self.config.glu else y
        return result


def initial_rates(config: Config) -> Complex[Tensor, " k"]:
    """Initial A of one channel (section 4 of the paper), the half with imaginary parts >= 0, in complex128."""
    size = config.d_state
    k = torch.arange(size // 2, dtype=torch.float64)
    if config.init == "linear":
        return torch.complex(torch.full_like(k, -0.5), math.pi * k)
    if config.init == "inverse":
        return torch.complex(torch.full_like(k, -0.5), size / math.pi * (size / (2 * k + 1) - 1))
    root = (2 * torch.arange(size, dtype=torch.float64) + 1).sqrt()
    skew = torch.outer(root, root) / 2
    skew = skew.triu(1) - skew.tril(-1)  # the normal part of HiPPO-LegS, without its -1/2
    frequency = torch.linalg.eigvalsh(torch.complex(torch.zeros_like(skew), -skew))
    return torch.complex(torch.full_like(k, -0.5), frequency[size // 2 :])


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
    """Random inputs for tests: steps and rates as in trained layers, and c_back where it is allowed."""
    widths = {"c": 6, "k": 4, **(sizes or {})}
    rates = (widths["c"], widths["k"], 2)
    shapes = {"x": (batch, n, widths["c"]), "dt": rates[:1], "a": rates, "c": rates, "skip": rates[:1]}
    if not pattern.causal:
        shapes["c_back"] = rates
    found = normals(generator, shapes, torch.float64)
    found["dt"] = (found["dt"] - 2).exp()
    found["a"] = torch.stack([-F.softplus(found["a"][..., 0]), 3 * found["a"][..., 1]], -1)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


SAME_READING = "the kernel does not depend on the query, so all queries would read the same from a memory"

MECHANISM = Mechanism(
    name="s4d",
    aliases=("diagonal_state_space",),
    kind=Kind.MIXER,
    summary="A diagonal state space with fixed complex rates for each channel: a convolution as long as the sequence.",
    paper=Paper("On the Parameterization and Initialization of Diagonal State Space Models", "2206.11893", 2022, 34),
    inputs={"x": "bnc", "dt": "c", "a": "ckz", "c": "ckz", "c_back?": "ckz", "skip?": "c"},
    output="bnc",
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: SAME_READING, Pattern.CAUSAL_CROSS: SAME_READING},
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": step},
    config=Config,
    variants={
        "bilinear": {"discretization": "bilinear"},
        "linear": {"init": "linear", "tied": True},
        "legs": {"init": "legs", "d_state": 2, "glu": True, "dt_init": (0.5, 0.5)},
    },
    state=DiagonalState,
    cost=cost,
    axis_sizes=axis_sizes,
    default_scale=1.0,
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned"),
    domains={"dt": "positive"},
    sample_inputs=sample_inputs,
    module=S4DLayer,
    waivers=(
        Waiver("layer_lengths", "the size of its Fourier transform is fixed when the program is compiled"),
        Waiver("layer_onnx", "ONNX has no complex exponential"),
    ),
)
