r"""Complex rotary attention (ComplexFormer's CMHA): rotary attention whose heads rescale the angle of the content.

When to pick it: as a generalisation of rotary attention, with two extra parameters per head and plane, when a head
should be able to balance content against position. With `delta="ones"` it starts as rotary attention.
When not: if you need a proven improvement. The paper is marked as withdrawn, has no tables, and has not been
replicated.

Definition (arXiv 2505.10222), for a head of width d whose features j and j + d/2 are the real and imaginary part of a number
u_j with the magnitude rho(u) = sqrt(|u|^2 + 1e-9) and the phase phi(u) = atan2(Im u, Re u):

    S_mn = sum_j rho(q_mj) rho(k_nj) cos(delta_j (phi(q_mj) - phi(k_nj)) + b_j + (m - n) g_j),   g_j = 10000^(-2 j / d)
    A = softmax(tau S + bias),   O = A V

It is computed in its factorised form, in which S is an ordinary dot product and a key depends only on its own position:

    q~ = rho(q) (cos t, sin t),  t = delta phi(q) + b + m g
    k~ = rho(k) (cos s, sin s),  s = delta phi(k) + n g,      S = q~ k~^T

| paper | here |
|---|---|
| delta, b | `angle_scale` (G, D / 2), `phase` (H, D / 2); ones and zeros when absent |
| g | from `base`, or `frequencies` (G, D / 2) where they are learned; 0 with ``position="none"`` |
| rho, phi | half-split, as `rotary` positions pair features |
| tau | `scale`, times D^-0.5 with ``score_scale="rsqrt"``; the authors' code has tau = 1 |

Layout: (B, H, N, D), D even; keys and values may have fewer heads (grouped queries), in which case delta and g belong
to key/value heads. Ranks count valid tokens; in cross patterns both sides count from 0. The state is a cache of k~ and
v, k~ in at least float32: scores without D^-0.5 are large, and rounding the keys to bfloat16 would distort them.

With delta = 1 and b = 0 it is attention with rotary positions, and plain attention if g = 0 too. With delta = 0 content
counts only by magnitude. A phase jumps by a full turn where u crosses the negative real axis, and S with it by at most
2 rho(q_j) rho(k_j) |sin(pi delta)|, which is 0 only for integer delta. The gradient of phi uses the same 1e-9 as rho,
so that gradients stay finite for vanishing u.

Deviations: the authors' cache holds raw keys and rotates all of them at every step; their attention has no causal mask
of its own; here the pattern decides. Their block (branches scaled by 0.2, one norm for both) is not part of the
mechanism. EulerFormer's variant, one delta and b for all heads, is `per_head=False` with ``delta="zeros"`` and
``score_scale="rsqrt"``, without its factors of 100 and 1000 on the parameters and its shifted phase.
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
    Paper,
    Projection,
    Result,
    Shape,
    Tensors,
    Unsupported,
    one_of,
)
from regard.core.precision import wide
from regard.core.sampling import normals
from regard.engines.attention import Ranks, masked_scores_bias, ranks
from regard.engines.attention_forms import attend, by_pattern
from regard.engines.cache import CountedState, extend_counted, read_on
from regard.engines.layers import rotary

if TYPE_CHECKING:
    from jaxtyping import Float, Int

EPS = 1e-9


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        position: ``rotary`` (g from `base`), ``learned`` (a layer learns g, starting from `base`) or ``none`` (g = 0).
        base: > 1; the slowest plane turns by one radian in about `base` tokens.
        score_scale: ``one``, as in the authors' code, or ``rsqrt``: D^-0.5, as in rotary attention.
        delta: initial delta of a layer: ``normal`` (the authors' N(0, 2 / D), of variance 2 / D), ``ones`` (rotary) or
            ``zeros``.
        learn_phase: whether a layer learns b, initialised to 0.
        per_head: whether each head of a layer has its own delta, b and g; otherwise all heads share them.
    """

    position: str = "rotary"
    base: float = 10_000.0
    score_scale: str = "one"
    delta: str = "normal"
    learn_phase: bool = True
    per_head: bool = True

    def __post_init__(self) -> None:
        one_of("position", self.position, ("rotary", "learned", "none"))
        one_of("score_scale", self.score_scale, ("one", "rsqrt"))
        one_of("delta", self.delta, ("normal", "ones", "zeros"))
        if not 1 < self.base < math.inf:
            raise Unsupported(f"base={self.base}", supported="a finite base > 1", nearest="base=10000.0")


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    angle_scale: Float[Tensor, "g f"] | None = None,
    phase: Float[Tensor, "h f"] | None = None,
    frequencies: Float[Tensor, "g f"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with a cosine for each pair and plane."""
    config, heads, half = call.config, q.shape[1], q.shape[-1] // 2
    _check(q, angle_scale, phase, frequencies)
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    visible, bias = masked_scores_bias(where, by_pattern(call), call.bias, call.position_bias, call.blocks, q.dtype)
    j = torch.arange(half, dtype=q.dtype, device=q.device)
    g = config.base ** (-j / half) if frequencies is None else _by_head(frequencies, heads)[:, None, None]
    g = g if config.position != "none" else torch.zeros_like(j)
    delta = 1 if angle_scale is None else _by_head(angle_scale, heads)[:, None, None]
    b = 0 if phase is None else phase[:, None, None]
    k, v = (_by_head(x, heads, 1) for x in (k, v))
    phases = [phase_of(imaginary, real) for real, imaginary in (x.chunk(2, -1) for x in (q, k))]
    apart = (where.queries[:, :, None] - where.keys[:, None, :])[:, None, :, :, None]
    angle = delta * (phases[0][:, :, :, None] - phases[1][:, :, None]) + b + apart * g  # (b, h, n, m, f)
    magnitudes = ((_square(q) + EPS).sqrt(), (_square(k) + EPS).sqrt())
    scores = _scale(call, q) * torch.einsum("bhnf,bhmf,bhnmf->bhnm", *magnitudes, angle.cos())
    scores = scores if bias is None else scores + bias
    opened = visible | ~visible.any(-1, keepdim=True)
    return torch.where(visible, scores.masked_fill(~opened, -torch.inf).softmax(-1), 0) @ v


def parallel(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    angle_scale: Float[Tensor, "g f"] | None = None,
    phase: Float[Tensor, "h f"] | None = None,
    frequencies: Float[Tensor, "g f"] | None = None,
) -> Result:
    """The factorised form: softmax attention on q~ and k~, block by block."""
    _check(q, angle_scale, phase, frequencies)
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    keys = _turned(call, k, torch.arange(k.shape[2], device=k.device)[None], angle_scale, None, frequencies)
    return _attend(call, q, keys, v, angle_scale, phase, frequencies, where)


def chunked(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    angle_scale: Float[Tensor, "g f"] | None = None,
    phase: Float[Tensor, "h f"] | None = None,
    frequencies: Float[Tensor, "g f"] | None = None,
) -> Result:
    """Continue a cached sequence by any number of tokens; also the step."""
    _check(q, angle_scale, phase, frequencies)
    state, where = extend_counted(call, _placed(call, k, angle_scale, frequencies), v, q.shape[2])
    return _attend(call, q, state.k, state.v, angle_scale, phase, frequencies, where, state)


def absorb(
    call: Call,
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    angle_scale: Float[Tensor, "g f"] | None = None,
    frequencies: Float[Tensor, "g f"] | None = None,
) -> CountedState:
    """Absorb memory into a cache, rotated by its positions; may be called repeatedly."""
    _check(k, angle_scale, frequencies)
    return extend_counted(call, _placed(call, k, angle_scale, frequencies), v, 0)[0]


def read(
    call: Call,
    q: Float[Tensor, "b h n d"],
    angle_scale: Float[Tensor, "g f"] | None = None,
    phase: Float[Tensor, "h f"] | None = None,
    frequencies: Float[Tensor, "g f"] | None = None,
) -> Result:
    """Attend to absorbed memory; queries are counted on from those that have read it before."""
    _check(q, angle_scale, phase, frequencies)
    call, state, where = read_on(call, q.shape[2], q.device)
    return _attend(call, q, state.k, state.v, angle_scale, phase, frequencies, where, state)


def _scale(call: Call, q: Tensor) -> float:
    return call.scale * (q.shape[-1] ** -0.5 if call.config.score_scale == "rsqrt" else 1.0)


def _by_head(x: Tensor, heads: int, axis: int = 0) -> Tensor:
    """Repeat a tensor of key/value heads for each query head."""
    return x if x.shape[axis] == heads else x.repeat_interleave(heads // x.shape[axis], axis)


def _square(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d/2"]:
    real, imaginary = x.chunk(2, -1)
    return real.square() + imaginary.square()


def _check(x: Tensor, *angles: Tensor | None) -> None:
    width = x.shape[-1]
    if width % 2:
        raise Unsupported(f"complex_rotary with heads of {width} features", supported="an even number")
    for given in angles:
        if given is not None and given.shape[-1] != width // 2:
            raise Unsupported(
                f"complex_rotary with {given.shape[-1]} angles for heads of {width} features",
                supported=f"{width // 2}: one for each pair of features",
            )


def phase_of(imaginary: Tensor, real: Tensor) -> Tensor:
    """atan2 whose gradient at u is that of a number of magnitude sqrt(|u|^2 + EPS)."""
    y, x = imaginary.detach(), real.detach()  # forward-mode derivatives ignore no_grad
    square = x.square() + y.square()
    gone = square < torch.finfo(square.dtype).tiny  # its inverse overflows; the gradient there is below 1e-9
    value = torch.atan2(y, x)
    share = torch.where(square > 1, 1.0, square / (square + EPS))  # squares may overflow
    angle = torch.atan2(imaginary.masked_fill(gone, 0), real.masked_fill(gone, 1))
    return value + share * (angle - angle.detach())


def _turned(
    call: Call,
    x: Float[Tensor, "b h n d"],
    positions: Int[Tensor, "#b n"],
    angle_scale: Float[Tensor, "g f"] | None,
    phase: Float[Tensor, "h f"] | None,
    frequencies: Float[Tensor, "g f"] | None,
) -> Float[Tensor, "b h n d"]:
    """q~ or k~, in at least float32."""
    config: Config = call.config
    x = wide(x)
    if angle_scale is not None or phase is not None:
        real, imaginary = x.chunk(2, -1)
        angle = phase_of(imaginary, real)
        if angle_scale is not None:
            angle = _by_head(angle_scale, x.shape[1])[:, None].to(x.dtype) * angle
        angle = angle if phase is None else angle + phase[:, None].to(x.dtype)
        magnitude = (_square(x) + EPS).sqrt()
        x = torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], -1)
    if config.position == "none":
        return x
    if frequencies is None:
        return rotary(x, positions, rotated=x.shape[-1], base=config.base)
    # whole turns are removed in float64, as for fixed frequencies
    finest = torch.float32 if x.device.type == "mps" else torch.float64
    turns = positions.to(finest)[:, None, :, None] * (
        _by_head(frequencies, x.shape[1])[:, None].to(finest) / (2 * math.pi)
    )
    turn = ((turns - turns.round().detach()) * (2 * math.pi)).to(x.dtype)
    real, imaginary = x.chunk(2, -1)
    return torch.cat([real * turn.cos() - imaginary * turn.sin(), real * turn.sin() + imaginary * turn.cos()], -1)


def _placed(call: Call, k: Tensor, angle_scale: Tensor | None, frequencies: Tensor | None) -> Tensor:
    """k~ of new keys, at positions after those of the state."""
    positions = torch.arange(k.shape[2], device=k.device)[None]
    if call.state is not None:
        positions = positions + call.state.length[:, None]
    return _turned(call, k, positions, angle_scale, None, frequencies)


def _attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angle_scale: Tensor | None,
    phase: Tensor | None,
    frequencies: Tensor | None,
    where: Ranks,
    state: CountedState | None = None,
) -> Result:
    result = attend(
        call,
        _turned(call, q, where.queries, angle_scale, phase, frequencies),
        k,
        v,
        where,
        state,
        scale=_scale(call, q),
    )
    result.output = result.output.to(v.dtype)
    return result


class Angles(Projection):
    """Gives a layer's heads their delta, b and learned frequencies, which are exempt from weight decay."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        if spec.head_dim % 2:
            raise Unsupported(
                f"complex_rotary with head_dim={spec.head_dim}",
                supported="an even number",
                nearest=f"head_dim={spec.head_dim + 1}",
            )
        half = spec.head_dim // 2
        self.config, self.heads, self.kv_heads = config, spec.heads, spec.kv_heads
        self.delta = nn.Parameter(torch.empty(spec.kv_heads if config.per_head else 1, half))
        self.phase = (
            nn.Parameter(torch.empty(spec.heads if config.per_head else 1, half)) if config.learn_phase else None
        )
        self.frequencies = nn.Parameter(torch.empty_like(self.delta)) if config.position == "learned" else None
        self.reset_parameters()
        for parameter in self.parameters():
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        half = self.delta.shape[-1]
        with torch.no_grad():
            if self.config.delta == "normal":
                self.delta.normal_(std=half**-0.5)
            else:
                self.delta.fill_(float(self.config.delta == "ones"))
            if self.phase is not None:
                self.phase.zero_()
            if self.frequencies is not None:
                self.frequencies.copy_(self.config.base ** (-torch.arange(half) / half))

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        made = {"angle_scale": self.delta.expand(self.kv_heads, -1)}
        if self.phase is not None:
            made["phase"] = self.phase.expand(self.heads, -1)
        if self.frequencies is not None:
            made["frequencies"] = self.frequencies.expand(self.kv_heads, -1)
        return heads | made


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
    """Inputs for tests and timings; heads have an even width, and no number is near the negative real axis."""
    size = {"h": 2, "g": 2, "d": 8, "v": 6} | (sizes or {})
    heads, groups, width = size["h"], size["g"], size["d"] + size["d"] % 2
    shapes: dict[str, tuple[int, ...]] = {
        "q": (batch, heads, n, width),
        "k": (batch, groups, m, width),
        "v": (batch, groups, m, size["v"]),
        "angle_scale": (groups, width // 2),
        "phase": (heads, width // 2),
    }
    if config.position == "learned":
        shapes["frequencies"] = (groups, width // 2)
    return normals(generator, shapes, dtype)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of softmax attention, plus about forty operations to convert and rotate each pair of features."""
    width = shape.dim_key + shape.dim_value
    heads = shape.batch * shape.heads
    return Cost(
        flops=heads * (2.0 * shape.n * shape.m * width + 20.0 * (shape.n + shape.m) * shape.dim_key),
        memory=float(heads * (shape.n + 3 * (shape.n + shape.m) * shape.dim_key)),
        state=float(shape.heads * shape.m * width),
        step_flops=heads * (2.0 * shape.m * width + 40.0 * shape.dim_key),
    )


MECHANISM = Mechanism(
    name="complex_rotary",
    aliases=("complexformer", "cmha", "complex_multi_head_attention", "eulerformer"),
    alias_options={"eulerformer": {"score_scale": "rsqrt", "delta": "zeros", "per_head": False}},
    kind=Kind.ATTENTION,
    summary="Rotary attention in which each head rescales the angle of content before the rotation is added.",
    paper=Paper(
        "ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector Attention",
        "2505.10222",
        2025,
        35,
    ),
    inputs={
        "q": "bhnd",
        "k": "bgmd",
        "v": "bgmv",
        "angle_scale?": "gf",
        "phase?": "hf",
        "frequencies?": "gf",
    },
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
        "learned angles": {"position": "learned", "base": 100.0, "delta": "ones", "learn_phase": False},
        "no positions": {"position": "none", "score_scale": "rsqrt", "delta": "zeros"},
        "shared": {"per_head": False},
    },
    engine="attention",
    state=CountedState,
    cost=cost,
    default_scale=1.0,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "lse"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "alibi", "relative", "toeplitz"),
    knows_positions=True,
    refused_positions="it rotates queries and keys itself",
    projection=Angles,
    sample_inputs=sample_inputs,
)
