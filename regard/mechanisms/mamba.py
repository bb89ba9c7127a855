r"""Mamba: a selective state space (S6), a diagonal recurrence for each channel whose step, B and C depend on the token.

When to pick it: long sequences with a constant memory for each token decoded, in a block of its own with few
parameters; signals and features in which channels need different rates of forgetting.
When not: exact recall of many single tokens (see `delta_rule`, or a few layers of `softmax` between); when training
speed matters most, `mamba2`: one decay a head makes its recurrence a matrix product, and its state is larger.

Definition (Gu & Dao, arXiv 2312.00752, equation 2 and algorithm 2; survey arXiv 2408.01129). For channel e and state k

    h_t[e,k] = exp(dt_t[e] A[e,k]) h_{t-1}[e,k] + dt_t[e] x_t[e] B_t[k],     y_t[e] = sum_k h_t[e,k] C_t[k] + D[e] x_t[e]

with A < 0 and dt >= 0: exact in A, Euler in B. As hidden attention, a matrix of pairs for each channel,

    y_t[e] = sum_{s<=t} (sum_k C_t[k] exp(A[e,k] (dt_{s+1} + ... + dt_t)[e]) B_s[k]) dt_s[e] x_s[e] + D[e] x_t[e]

The block around:

    [x, z] = W_in u,   x = silu(conv(x)),   [delta, B, C] = W_x x,   dt = softplus(W_dt delta + dt_bias),   A = -exp(A_log)
    out = W_out (y * silu(z))

| paper | here |
|---|---|
| x, Delta, A | `x` (B, M, E), `dt` (B, M, E), `a` (E, K) |
| B, C | `b` (B, M, G, K), `c` (B, N, G, K) |
| D, z | `skip` (E,), `z` (B, N, E) |
| bias of Delta's projection | `dt_bias` (E,): when given, steps are softplus(dt + dt_bias) |
| h | `SelectiveState.memory` (B, E, K) |
| N (or n), E, R, w | `d_state`, expand * dim, `dt_rank`, `conv_width` |

Layout: (B, N, E), channels last, for functions too. b and c carry G groups, each for E / G consecutive channels. The
gate silu(z) comes after D x. The scale is 1.
Patterns: noncausal-self is a forward pass that reads after writing plus a backward pass that reads before, so that a
token counts itself once; the block's convolution is then centred, with one more tap before the token than after it when
`conv_width` is even. In cross patterns the memory is absorbed in order and the queries read the last state: there is no
D (a query is no token of the memory), z and C come from the queries, x, B and dt from the memory, and only the memory
is convolved, so queries stay independent of each other.
Deviations: padding is gathered away, so no step is taken there, where ports that zero the input still decay by
softplus(dt_bias) and write the convolution's bias. `groups`, `dt_limit`, `norm` and `scalar_a` come from Mamba-2, and
`constant` (S4D-real, for controls without selection) from S4D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.apply import absorb as absorb_memory
from regard.apply import apply
from regard.contract import (
    ALL_PATTERNS,
    Call,
    Context,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    Tensors,
    Unsupported,
    at_least,
    one_of,
)
from regard.core.precision import wide, wide_dtype
from regard.core.ragged import flip_rows, place_queries, take_queries
from regard.engines.selective_scan import SelectiveState, selective_read, selective_scan
from regard.layers.attention import LayerState
from regard.layers.convolution import ShortConvolution
from regard.layers.linear import make_linear
from regard.layers.mixer import Tokens
from regard.layers.state_space import (
    SELECTIONS,
    GatedRMSNorm,
    StateSpaceLayer,
    check_range,
    draw_dt_bias,
    split,
    without_weight_decay,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Config:
    """Options, all of the layer; functions take their tensors as they are and use `chunk_size` only.

    Attributes:
        d_state: states of a channel, >= 1.
        expand: width of the block's inside, E = expand * dim, > 0.
        dt_rank: features from which the steps are projected, >= 1; None for dim / 16, rounded up.
        groups: sets of B and C, a divisor of E.
        conv_width: taps of the convolution over x, >= 1; 0 for none.
        gate: whether silu(z) multiplies the output.
        skip: whether D x is added.
        scalar_a: one A for all states of a channel, as in Mamba-2.
        norm: whether there is an RMSNorm before the output projection.
        norm_before_gate: the norm first, then the gate.
        norm_eps: added to the mean square, > 0.
        dt_limit: smallest and largest dt, 0 <= low <= high.
        dt_init: range of dt at the start, log-uniform, 0 < low <= high.
        constant: of ``dt``, ``B``, ``C``: those that are learned vectors and do not depend on the token.
        chunk_size: tokens computed together, >= 1.
    """

    d_state: int = 16
    expand: float = 2.0
    dt_rank: int | None = None
    groups: int = 1
    conv_width: int = 4
    gate: bool = True
    skip: bool = True
    scalar_a: bool = False
    norm: bool = False
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, math.inf)
    dt_init: tuple[float, float] = (1e-3, 1e-1)
    constant: tuple[str, ...] = ()
    chunk_size: int = 64

    def __post_init__(self) -> None:
        for name in ("d_state", "groups", "chunk_size"):
            at_least(name, getattr(self, name), 1)
        if self.dt_rank is not None:
            at_least("dt_rank", self.dt_rank, 1)
        at_least("conv_width", self.conv_width, 0)
        for selection in self.constant:
            one_of("constant", selection, SELECTIONS)
        for name in ("expand", "norm_eps"):
            if not getattr(self, name) > 0:
                raise Unsupported(f"{name}={getattr(self, name)}", supported=f"{name} > 0")
        check_range(self, "dt_limit", zero=True)
        check_range(self, "dt_init")
        if self.norm_before_gate and not (self.norm and self.gate):
            raise Unsupported("norm_before_gate without a norm or a gate", supported="norm=True, gate=True")


def reference(
    call: Call,
    x: Float[Tensor, "b m e"],
    dt: Float[Tensor, "b m e"],
    a: Float[Tensor, "e k"],
    b: Float[Tensor, "b m g k"],
    c: Float[Tensor, "b n g k"],
    skip: Float[Tensor, " e"] | None = None,
    dt_bias: Float[Tensor, " e"] | None = None,
    z: Float[Tensor, "b n e"] | None = None,
) -> Float[Tensor, "b n e"]:
    """The recurrence, token by token."""
    _check_skip(call, skip)
    n, m = c.shape[1], x.shape[1]
    b, c = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (b, call.scale * c))  # (b, n, e, k)
    steps = dt if dt_bias is None else F.softplus(dt + dt_bias)
    keep, write = (steps[..., None] * a).exp(), (steps * x)[..., None] * b
    empty = x.new_zeros(x.shape[0], *a.shape)

    def states(order: list[int]) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
        before, after, h = {}, {}, empty
        for t in order:
            before[t] = keep[:, t] * h
            after[t] = h = before[t] + write[:, t]
        return before, after, h

    _, forward, last = states(list(range(m)))
    backward = states(list(range(m))[::-1])[0]
    outputs = [x[:, :0]]
    for i in range(n):
        t = i + m - n
        if call.pattern.cross:
            h = last
        else:
            h = empty if t < 0 else forward[t] if call.pattern.causal else forward[t] + backward[t]
        y = (h * c[:, i]).sum(-1)
        outputs.append((y if skip is None or t < 0 else y + skip * x[:, t])[:, None])
    return _gate(torch.cat(outputs, 1), z)


def parallel(
    call: Call,
    x: Float[Tensor, "b m e"],
    dt: Float[Tensor, "b m e"],
    a: Float[Tensor, "e k"],
    b: Float[Tensor, "b m g k"],
    c: Float[Tensor, "b n g k"],
    skip: Float[Tensor, " e"] | None = None,
    dt_bias: Float[Tensor, " e"] | None = None,
    z: Float[Tensor, "b n e"] | None = None,
) -> Float[Tensor, "b n e"]:
    """Causal: the chunked form. Noncausal: both directions. Cross: the memory absorbed, then read."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, x, dt, a, b, c, skip, dt_bias, z).output
    if call.pattern.cross:
        state = absorb(call.replace(state=None), x, dt, a, b, skip, dt_bias)
        return read(call.replace(state=state), c, z=z).output.to(x.dtype)
    tokens = wide(x)  # each direction would be rounded on its own
    c = call.scale * c
    forward, _ = _scan(call, tokens, dt, b, c, a, dt_bias, skip=skip)
    tokens, dt, b, c = (flip_rows(t, call.lengths, axis=1) for t in (tokens, dt, b, c))
    backward, _ = _scan(call, tokens, dt, b, c, a, dt_bias, inclusive=False)
    assert forward is not None and backward is not None  # there is a c
    return _gate(forward + flip_rows(backward, call.lengths, axis=1), z).to(x.dtype)


def chunked(
    call: Call,
    x: Float[Tensor, "b m e"],
    dt: Float[Tensor, "b m e"],
    a: Float[Tensor, "e k"],
    b: Float[Tensor, "b m g k"],
    c: Float[Tensor, "b n g k"],
    skip: Float[Tensor, " e"] | None = None,
    dt_bias: Float[Tensor, " e"] | None = None,
    z: Float[Tensor, "b n e"] | None = None,
) -> Result:
    """Causal-self with state in and out; queries align bottom-right when there are fewer or more than keys."""
    n, m = c.shape[1], x.shape[1]
    c = call.scale * c
    aligned = n == m and call.lengths is call.memory_lengths
    if not aligned:
        c = place_queries(c, m, call.lengths, call.memory_lengths, axis=1)
        z = None if z is None else place_queries(z, m, call.lengths, call.memory_lengths, axis=1)
    y, memory = _scan(call, x, dt, b, c, a, dt_bias, skip=skip, z=z)
    assert y is not None  # there is a c
    if not aligned:
        y = take_queries(y, n, call.lengths, call.memory_lengths, axis=1)
    return Result(y, SelectiveState(memory, _length_after(call, x)))


def step(
    call: Call,
    x: Float[Tensor, "b 1 e"],
    dt: Float[Tensor, "b 1 e"],
    a: Float[Tensor, "e k"],
    b: Float[Tensor, "b 1 g k"],
    c: Float[Tensor, "b 1 g k"],
    skip: Float[Tensor, " e"] | None = None,
    dt_bias: Float[Tensor, " e"] | None = None,
    z: Float[Tensor, "b 1 e"] | None = None,
) -> Result:
    """A chunk of one token: the engine has nothing to prepare for it."""
    return chunked(call, x, dt, a, b, c, skip, dt_bias, z)


def absorb(
    call: Call,
    x: Float[Tensor, "b m e"],
    dt: Float[Tensor, "b m e"],
    a: Float[Tensor, "e k"],
    b: Float[Tensor, "b m g k"],
    skip: Float[Tensor, " e"] | None = None,
    dt_bias: Float[Tensor, " e"] | None = None,
) -> SelectiveState:
    """Memory into h, in order; more may follow."""
    _check_skip(call, skip)
    _, memory = _scan(call, x, dt, b, None, a, dt_bias)
    return SelectiveState(memory, _length_after(call, x))


def read(
    call: Call,
    c: Float[Tensor, "b n g k"],
    a: Float[Tensor, "e k"] | None = None,
    skip: Float[Tensor, " e"] | None = None,
    dt_bias: Float[Tensor, " e"] | None = None,
    z: Float[Tensor, "b n e"] | None = None,
) -> Result:
    """Queries on absorbed memory; `a` and `dt_bias` have done their work in the state."""
    _check_skip(call, skip)
    y = _gate(selective_read(call.state.memory, call.scale * c), z)
    return Result(y.to(c.dtype), call.state)


def _scan(
    call: Call,
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor | None,
    a: Tensor,
    dt_bias: Tensor | None,
    *,
    skip: Tensor | None = None,
    z: Tensor | None = None,
    inclusive: bool = True,
) -> tuple[Tensor | None, Tensor]:
    return selective_scan(
        x,
        dt,
        a,
        b,
        c,
        skip=skip,
        dt_bias=dt_bias,
        z=z,
        state=None if call.state is None else call.state.memory,
        lengths=call.memory_lengths,
        chunk_size=call.chunk_size or call.config.chunk_size,
        inclusive=inclusive,
        backend=call.backend,
    )


def _gate(y: Tensor, z: Tensor | None) -> Tensor:
    return y if z is None else y * F.silu(z.to(y.dtype))


def _length_after(call: Call, x: Float[Tensor, "b m e"]) -> Int[Tensor, " b"]:
    """Tokens of each row once those of this call are written."""
    new = call.memory_lengths
    if new is None:
        new = torch.full(x.shape[:1], x.shape[1], device=x.device)
    return new if call.state is None else call.state.length + new


def _check_skip(call: Call, skip: Tensor | None) -> None:
    if skip is not None and call.pattern.cross:
        raise Unsupported(
            f"mamba with skip in {call.pattern.value}, where queries are no tokens of the memory",
            supported="skip in self patterns",
            nearest="skip=None",
        )


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    return {"e": shape.heads * shape.dim_value, "g": config.groups, "k": config.d_state}


def cost(shape: Shape, config: Config) -> Cost:
    """The channels are H heads of dim_value features; the states of a channel are the config's. Without a kernel three
    numbers for each state and token of a chunk come on top of the memory."""
    channels = shape.heads * shape.dim_value
    state, tokens = channels * config.d_state, shape.batch * shape.m
    return Cost(
        flops=7.0 * tokens * state,
        memory=float(shape.batch * shape.m * channels),
        state=float(state),
        step_flops=7.0 * shape.batch * state,
    )


class MambaLayer(StateSpaceLayer):
    """The Mamba block, (B, N, C) -> (B, N, C), without its outer norm and residual.

    A_log, D and dt_bias stay in float32 when the layer is cast to a narrower dtype, and have no weight decay.

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: accepted for the catalogue's sake; every channel has a state of its own.
        pattern: any of the four.
        memory_dim: width of the memory in cross patterns; `dim` when None.
        linear: kind of the projections (``dense`` or a projection mechanism).
        config: see :class:`Config`.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.CAUSAL_SELF,
        memory_dim: int | None = None,
        linear: str = "dense",
        config: Config | None = None,
    ) -> None:
        super().__init__(card, dim, pattern=pattern, config=config)
        config, cross = self.config, self.pattern.cross
        if memory_dim is not None and not cross:
            raise Unsupported(
                f"memory_dim in {self.pattern.value}", supported="cross patterns", nearest="memory_dim=None"
            )
        self.inner = inner = round(config.expand * dim)
        if inner < 1 or inner % config.groups:
            raise Unsupported(f"groups={config.groups} for {inner} channels", supported=f"a divisor of {inner}")
        rank = math.ceil(dim / 16) if config.dt_rank is None else config.dt_rank
        keys = config.groups * config.d_state
        selected = {"dt": rank, "B": keys, "C": keys}
        selected = {name: 0 if name in config.constant else width for name, width in selected.items()}
        read = selected.pop("C") if cross else 0
        self.widths = {"x": inner if read or not cross else 0, "z": inner if config.gate else 0}  # of in_proj
        self.selected = selected  # parts of x_proj by name, in the order of its features
        self.in_proj = make_linear(dim, sum(self.widths.values()), kind=linear) if any(self.widths.values()) else None
        self.memory_proj = self.query_proj = None
        if cross:
            self.memory_proj = make_linear(dim if memory_dim is None else memory_dim, inner, kind=linear)
            self.query_proj = make_linear(inner, read, kind=linear) if read else None
        causal = self.pattern is not Pattern.NONCAUSAL_SELF
        self.conv = ShortConvolution(inner, config.conv_width, bias=True, causal=causal) if config.conv_width else None
        self.x_proj = make_linear(inner, sum(selected.values()), kind=linear) if any(selected.values()) else None
        self.dt_proj = make_linear(rank, inner, kind=linear) if selected["dt"] else None
        self.dt_bias = nn.Parameter(torch.empty(inner))  # not a bias of dt_proj, which generic initialisation zeroes
        self.A_log = nn.Parameter(torch.empty(inner, 1 if config.scalar_a else config.d_state))
        self.D = nn.Parameter(torch.empty(inner)) if config.skip and not cross else None
        self.constants = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(config.groups, config.d_state)) for name in config.constant if name != "dt"}
        )
        self.norm = None
        if config.norm:
            self.norm = GatedRMSNorm(
                inner, config.groups, eps=config.norm_eps, norm_before_gate=config.norm_before_gate
            )
        self.out_proj = make_linear(inner, dim, kind=linear)
        without_weight_decay(self.A_log, self.dt_bias, self.D, *self.constants.values())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -1, -2, ..., -d_state (S4D-real), D, dt and constants; projections, convolution and norm have their own."""
        draw_dt_bias(self.dt_bias, *self.config.dt_init)
        rank = self.selected["dt"]
        with torch.no_grad():
            if self.config.scalar_a:
                self.A_log.uniform_(1.0, self.config.d_state).log_()
            else:
                self.A_log.copy_(torch.arange(1, self.config.d_state + 1).log().expand_as(self.A_log))
            if isinstance(self.dt_proj, nn.Linear):
                self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            if self.D is not None:
                self.D.fill_(1.0)
            for constant in self.constants.values():
                constant.normal_(std=self.config.d_state**-0.5)

    def mix(self, tokens: Tokens, memory: Tokens | None, context: Context, state: LayerState | None) -> Result:
        parts = split(self.in_proj, self.widths, tokens.x)
        stateful = state is not None or "state" in context.want
        z = parts["z"] if self.config.gate else None
        if self.config.norm_before_gate:
            inside, outside = None, z
        else:
            inside, outside = z, None
        if self.pattern.cross:
            known = state if memory is None else self.absorb(memory, None)
            assert known is not None  # the shell has checked that there is memory or a state
            result = self._read(parts["x"], inside, tokens, known)
        else:
            result = self._recur(parts["x"], inside, tokens, state, stateful)
        if not stateful:
            result.state = None
        y = result.output if self.norm is None else self.norm(result.output, outside)
        result.output = self.out_proj(y.to(tokens.x.dtype))
        return result

    def absorb(self, memory: Tokens, state: LayerState | None) -> LayerState:
        assert self.memory_proj is not None  # only cross patterns absorb
        inputs, caches = self._writes(self.memory_proj(memory.x), memory, state)
        absorbed = absorb_memory(
            self.card,
            inputs,
            pattern=self.pattern,
            memory_mask=memory.mask,
            state=None if state is None else state.mechanism,
            config=self.config,
        )
        length = torch.zeros_like(memory.count()) if state is None else state.length
        return LayerState(absorbed, length, caches)

    def _read(self, x: Tensor, z: Tensor | None, tokens: Tokens, state: LayerState) -> Result:
        """Queries on absorbed memory."""
        projected = x if self.query_proj is None else self.query_proj(F.silu(x))
        inputs = {"c": self._keys("C", projected, tokens.x), "z": z}
        result = apply(
            self.card, inputs, pattern=self.pattern, mask=tokens.mask, state=state.mechanism, config=self.config
        )
        result.state = LayerState(state.mechanism, state.length + tokens.count(), state.convolutions)
        return result

    def _recur(self, x: Tensor, z: Tensor | None, tokens: Tokens, state: LayerState | None, stateful: bool) -> Result:
        """Self patterns."""
        inputs, caches = self._writes(x, tokens, state)
        result = apply(
            self.card,
            {**inputs, "skip": self.D, "z": z},
            pattern=self.pattern,
            mask=tokens.mask,
            state=None if state is None else state.mechanism,
            return_state=stateful,
            config=self.config,
        )
        if stateful:
            length = tokens.count() if state is None else state.length + tokens.count()
            result.state = LayerState(result.state, length, caches)
        return result

    def _writes(
        self, x: Tensor, tokens: Tokens, state: LayerState | None
    ) -> tuple[dict[str, Tensor | None], tuple[Tensor, ...]]:
        """The inputs of the recurrence (c too, in self patterns), and the convolution's cache after them."""
        x, caches = self.convolve(x, tokens, state)
        parts = split(self.x_proj, self.selected, x)
        dt = x.new_zeros(()).expand_as(x) if self.dt_proj is None else self.dt_proj(parts["dt"])
        dt_bias: Tensor | None = self.dt_bias
        if self.config.dt_limit != (0.0, math.inf):
            dt = F.softplus(wide(dt) + self.dt_bias.to(wide_dtype(dt))).clamp(*self.config.dt_limit)
            dt_bias = None
        a = -wide(self.A_log).exp()
        inputs = {
            "x": x,
            "dt": dt,
            "a": a.expand(-1, self.config.d_state),
            "b": self._keys("B", parts["B"], x),
            "dt_bias": dt_bias,
        }
        if "C" in parts:
            inputs["c"] = self._keys("C", parts["C"], x)
        return inputs, caches

    def _keys(self, name: str, projected: Tensor, x: Tensor) -> Float[Tensor, "b n g k"]:
        """B or C by group, from tokens or learned."""
        if name in self.constants:
            return self.constants[name].to(x.dtype).expand(*x.shape[:2], -1, -1)
        return projected.unflatten(-1, (self.config.groups, self.config.d_state))


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
    """Random inputs for tests: steps like those of trained layers, and no skip in cross patterns."""
    widths = {"e": 8, "g": 2, "k": 4, **(sizes or {}), "b": batch, "n": n, "m": m}
    widths["e"] = max(widths["e"], 2 * widths["g"])  # groups may be doubled and still divide the channels
    found = {}
    for name, axes in MECHANISM.inputs.items():
        shape = [widths[axis] for axis in axes]
        found[name.rstrip("?")] = torch.randn(shape, generator=generator, dtype=torch.float64)
    found["dt_bias"] -= 1
    found["a"] = -F.softplus(2 * found["a"])
    if pattern.cross:
        del found["skip"]
    return {name: tensor.to(dtype) for name, tensor in found.items()}


MECHANISM = Mechanism(
    name="mamba",
    aliases=("mamba1", "mamba_1", "s6", "selective_ssm"),
    kind=Kind.MIXER,
    summary="A selective state space (S6), a diagonal recurrence for each channel whose step, B and C depend on the token.",
    paper=Paper("Mamba: Linear-Time Sequence Modeling with Selective State Spaces", "2312.00752", 2023, 51),
    inputs={
        "x": "bme",
        "dt": "bme",
        "a": "ek",
        "b": "bmgk",
        "c": "bngk",
        "skip?": "e",
        "dt_bias?": "e",
        "z?": "bne",
    },
    output="bne",
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
        "no convolution": {"conv_width": 0, "gate": False, "skip": False},
        "grouped": {"groups": 2, "dt_rank": 5, "d_state": 3, "chunk_size": 3},
        "scalar": {"scalar_a": True, "conv_width": 1, "dt_limit": (0.05, 0.1)},
        "normed": {"norm": True, "norm_eps": 1e-3, "expand": 1.0},
        "normed before the gate": {"norm": True, "norm_before_gate": True, "dt_init": (0.01, 0.02)},
        "constant steps": {"constant": ("dt",)},
        "constant": {"constant": ("dt", "B", "C")},
    },
    engine="selective_scan",
    state=SelectiveState,
    cost=cost,
    axis_sizes=axis_sizes,
    default_scale=1.0,
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned"),
    domains={"a": "negative"},
    sample_inputs=sample_inputs,
    module=MambaLayer,
)
