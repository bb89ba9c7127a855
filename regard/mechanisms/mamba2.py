r"""Mamba-2: a gated recurrence whose decay and step are one learned number a head and token, inside its own block.

When to pick it: long sequences with a constant memory for each token decoded; the strongest plain recurrent mixer for
language at equal size. Each head keeps a d_state x head_dim matrix, so a larger d_state remembers more.
When not: exact recall of many single tokens (see `delta_rule`, or a few layers of `softmax` between); a decay for each
key feature (see `gated_linear`).

Definition (Dao & Gu, arXiv 2405.21060, state-space duality; survey arXiv 2408.01129). For each head

    a_t = dt_t A,   S_t = exp(a_t) S_{t-1} + dt_t B_t x_t^T,   y_t = S_t^T C_t + D * x_t,      A < 0, dt_t >= 0

or, as masked linear attention, y = (L * C B^T)(dt x) with L_ij = exp(sum of a over (j, i]) for j <= i. The block around:

    [z, x, B, C, dt] = W_in u,   (x, B, C) = silu(conv(x, B, C)),   dt = clip(softplus(dt + dt_bias)),   A = -exp(A_log)
    out = W_out RMSNorm(y * silu(z)),      the norm over each group of d_ssm / groups features

| paper | here |
|---|---|
| C, B, X | `q` (B, G, N, K), `k` (B, G, M, K), `v` (B, H, M, V) |
| Delta, A, D | `dt` (B, H, M), `a` (H,), `skip` (H, V) |
| S (P x N, transposed) | `MatrixState.memory` (B, H, K, V) |
| N, P, E, G, H, w, Q | `d_state`, `head_dim`, expand * dim, `groups`, heads, `conv_width`, `chunk_size` |

Layout: (B, H, N, D). q and k carry G groups, each for H / G consecutive heads of v (the reverse of grouped queries).
The scale is 1. A D for each head is ``d[:, None].expand(H, V)``.
Patterns: noncausal-self is a forward pass that reads after writing plus a backward pass that reads before, so that a
token counts itself once; the block's convolution is then centred, with one more tap before the token than after it when
`conv_width` is even. In cross patterns the memory is absorbed in order and the queries read the last state: there is no
D (a query is no token of the memory), z and C come from the queries, x, B and dt from the memory, and only the memory
is convolved, so queries stay independent of each other.
Deviations: the chunk defaults to 64 (256 in the paper), which changes rounding only. Padding is gathered away, so no
step is taken there, where ports that zero the input still decay by softplus(dt_bias) or write the convolution's bias.
`constant` (for controls without selection) is not in the paper.
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
from regard.core.ragged import take_queries
from regard.engines import recurrent_forms
from regard.engines.layers import gated_product
from regard.engines.recurrent_forms import MatrixState
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
    from jaxtyping import Float

SKIP_KINDS = ("head", "channel", "none")


@dataclass(frozen=True)
class Config:
    """Options, all of the layer; functions take q, k, v, dt, a and skip as they are and use `chunk_size` only.

    Attributes:
        d_state: key features of a head, >= 1.
        expand: width of the block's inside, E = expand * dim, > 0.
        head_dim: value features of a head, which then sets the number of heads whatever num_heads says; None for
            d_ssm / num_heads.
        groups: sets of B and C, a divisor of the number of heads.
        d_ssm: features of E that go through the recurrence, 1 to E; the rest is a gated MLP. None for all.
        conv_width: taps of the convolution over x, B and C, >= 1; 0 for none.
        gate: whether silu(z) multiplies the output.
        skip_kind: D for each ``head``, each ``channel``, or ``none``.
        norm: whether there is an RMSNorm before the output projection.
        norm_before_gate: the norm first, then the gate.
        norm_eps: added to the mean square, > 0.
        dt_limit: smallest and largest dt, 0 <= low <= high.
        dt_init: range of dt at the start, log-uniform, 0 < low <= high.
        a_init: range of -A at the start, uniform, 0 < low <= high.
        initial_states: whether the state before the first token is learned (not in noncausal-self).
        constant: of ``dt``, ``B``, ``C``: those that are learned vectors and do not depend on the token.
        chunk_size: tokens computed together, >= 1.
    """

    d_state: int = 128
    expand: float = 2.0
    head_dim: int | None = None
    groups: int = 1
    d_ssm: int | None = None
    conv_width: int = 4
    gate: bool = True
    skip_kind: str = "head"
    norm: bool = True
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, math.inf)
    dt_init: tuple[float, float] = (1e-3, 1e-1)
    a_init: tuple[float, float] = (1.0, 16.0)
    initial_states: bool = False
    constant: tuple[str, ...] = ()
    chunk_size: int = 64

    def __post_init__(self) -> None:
        for name in ("d_state", "groups", "chunk_size"):
            at_least(name, getattr(self, name), 1)
        for name in ("head_dim", "d_ssm"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        at_least("conv_width", self.conv_width, 0)
        one_of("skip_kind", self.skip_kind, SKIP_KINDS)
        for selection in self.constant:
            one_of("constant", selection, SELECTIONS)
        for name in ("expand", "norm_eps"):
            if not getattr(self, name) > 0:
                raise Unsupported(f"{name}={getattr(self, name)}", supported=f"{name} > 0")
        check_range(self, "dt_limit", zero=True)
        check_range(self, "dt_init")
        check_range(self, "a_init")
        if self.norm_before_gate and not (self.norm and self.gate):
            raise Unsupported("norm_before_gate without a norm or a gate", supported="norm=True, gate=True")


def reference(
    call: Call,
    q: Float[Tensor, "b g n k"],
    k: Float[Tensor, "b g m k"],
    v: Float[Tensor, "b h m v"],
    dt: Float[Tensor, "b h m"],
    a: Float[Tensor, " h"],
    skip: Float[Tensor, "h v"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The recurrence, token by token."""
    _check_skip(call, skip)
    n, m = q.shape[2], k.shape[2]
    q, k = call.scale * _repeat(q, v), _repeat(k, v)
    keep = (dt * a[:, None]).exp()[..., None, None]
    write = dt[..., None, None] * k[..., :, None] * v[..., None, :]  # (b, h, m, k, v)
    empty = write.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])

    def states(order: list[int]) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
        before, after, state = {}, {}, empty
        for t in order:
            before[t] = keep[:, :, t] * state
            after[t] = state = before[t] + write[:, :, t]
        return before, after, state

    _, forward, last = states(list(range(m)))
    backward = states(list(range(m))[::-1])[0]
    outputs = [v.new_zeros(v.shape[0], v.shape[1], 0, v.shape[-1])]
    for i in range(n):
        t = i + m - n
        if call.pattern.cross:
            state = last
        else:
            state = empty if t < 0 else forward[t] if call.pattern.causal else forward[t] + backward[t]
        y = torch.einsum("bhkv,bhk->bhv", state, q[:, :, i])
        outputs.append((y if skip is None or t < 0 else y + skip * v[:, :, t])[:, :, None])
    return torch.cat(outputs, 2)


def parallel(
    call: Call,
    q: Float[Tensor, "b g n k"],
    k: Float[Tensor, "b g m k"],
    v: Float[Tensor, "b h m v"],
    dt: Float[Tensor, "b h m"],
    a: Float[Tensor, " h"],
    skip: Float[Tensor, "h v"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """Causal: the chunked form. Noncausal: both directions. Cross: the memory absorbed, then read."""
    if call.pattern is Pattern.CAUSAL_SELF:
        return chunked(call, q, k, v, dt, a, skip).output
    if call.pattern.cross:
        return read(call.replace(state=absorb(call.replace(state=None), k, v, dt, a, skip)), q).output.to(v.dtype)
    y = recurrent_forms.bidirectional(_chunk(call), _queries(call, q), *_writes(k, v, dt, a))
    return _skip(call, y, v, skip)


def chunked(
    call: Call,
    q: Float[Tensor, "b g n k"],
    k: Float[Tensor, "b g m k"],
    v: Float[Tensor, "b h m v"],
    dt: Float[Tensor, "b h m"],
    a: Float[Tensor, " h"],
    skip: Float[Tensor, "h v"] | None = None,
) -> Result:
    """Causal-self with state in and out; no cumulative sums are subtracted, and masked entries are -inf before exp."""
    y, state = recurrent_forms.chunked(_chunk(call), _queries(call, q), *_writes(k, v, dt, a))
    return Result(_skip(call, y, v, skip), state)


def step(
    call: Call,
    q: Float[Tensor, "b g 1 k"],
    k: Float[Tensor, "b g 1 k"],
    v: Float[Tensor, "b h 1 v"],
    dt: Float[Tensor, "b h 1"],
    a: Float[Tensor, " h"],
    skip: Float[Tensor, "h v"] | None = None,
) -> Result:
    y, state = recurrent_forms.step(call, _queries(call, q), *_writes(k, v, dt, a))
    return Result(_skip(call, y, v, skip), state)


def absorb(
    call: Call,
    k: Float[Tensor, "b g m k"],
    v: Float[Tensor, "b h m v"],
    dt: Float[Tensor, "b h m"],
    a: Float[Tensor, " h"],
    skip: Float[Tensor, "h v"] | None = None,
) -> MatrixState:
    """Memory into S, in order; more may follow."""
    _check_skip(call, skip)
    return recurrent_forms.absorb(_chunk(call), *_writes(k, v, dt, a))


def read(call: Call, q: Float[Tensor, "b g n k"], a: Tensor | None = None, skip: Tensor | None = None) -> Result:
    """Queries on absorbed memory; `a` has done its work in the state."""
    _check_skip(call, skip)
    y = recurrent_forms.read(call, _repeat(_queries(call, q), call.state.memory))
    return Result(y.to(q.dtype), call.state)


def _repeat(x: Float[Tensor, "b g n k"], heads_of: Float[Tensor, "b h ..."]) -> Float[Tensor, "b h n k"]:
    """Each group for its heads."""
    return x.repeat_interleave(heads_of.shape[1] // x.shape[1], 1)


def _queries(call: Call, q: Tensor) -> Tensor:
    return recurrent_forms.scaled(q, call.scale)


def _writes(k: Tensor, v: Tensor, dt: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values times dt, and log decays dt a of the recurrence. dt is 0 in the padding: no write and no decay."""
    dtype = wide_dtype(v)
    dt = dt.to(dtype)[..., None]
    return recurrent_forms.readable(k), dt * v, dt * a.to(dtype)[:, None, None]


def _skip(call: Call, y: Tensor, v: Tensor, skip: Tensor | None) -> Tensor:
    """y + D x, in the dtype of v; queries align with the last tokens of each row."""
    if skip is not None:
        direct = skip.to(y.dtype)[:, None] * v.to(y.dtype)
        n, m = y.shape[2], v.shape[2]
        aligned = n == m and call.lengths is call.memory_lengths
        y = y + (direct if aligned else take_queries(direct, n, call.lengths, call.memory_lengths))
    return y.to(v.dtype)


def _check_skip(call: Call, skip: Tensor | None) -> None:
    if skip is not None and call.pattern.cross:
        raise Unsupported(
            f"mamba2 with skip in {call.pattern.value}, where queries are no tokens of the memory",
            supported="skip in self patterns",
            nearest="skip=None",
        )


def _chunk(call: Call) -> Call:
    return call if call.chunk_size else call.replace(chunk_size=call.config.chunk_size)


def cost(shape: Shape, config: Config) -> Cost:
    matrix = shape.dim_key * shape.dim_value
    tokens = shape.batch * shape.heads * shape.m
    return Cost(
        flops=4.0 * tokens * (matrix + config.chunk_size / 2 * (shape.dim_key + shape.dim_value)),
        memory=float(tokens * (config.chunk_size + 2 * shape.dim_key + shape.dim_value)),
        state=float(shape.heads * matrix),
        step_flops=4.0 * shape.batch * shape.heads * matrix,
    )


class Mamba2Layer(StateSpaceLayer):
    """The Mamba-2 block, (B, N, C) -> (B, N, C), without its outer norm and residual.

    A_log, D and dt_bias stay in float32 when the layer is cast to a narrower dtype, and have no weight decay.

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: heads of d_ssm / num_heads features, unless the config gives a head_dim.
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
        inner = round(config.expand * dim)
        self.d_ssm = inner if config.d_ssm is None else config.d_ssm
        self.heads, self.head_dim = _heads(config, inner, self.d_ssm, num_heads)
        if config.initial_states and self.pattern is Pattern.NONCAUSAL_SELF:
            raise Unsupported("initial_states in noncausal-self", supported="the other patterns")
        rest, keys = inner - self.d_ssm, config.groups * config.d_state
        outer = {"mlp_gate": rest, "mlp": rest, "z": self.d_ssm if config.gate else 0}
        written = {"x": self.d_ssm, "B": keys, "C": keys, "dt": self.heads}
        written = {name: 0 if name in config.constant else width for name, width in written.items()}
        if cross:
            outer["C"] = written.pop("C")
        self.query_widths = outer  # parts of a projection by name, in the order of its features
        self.memory_widths = written
        self.in_proj = self.memory_proj = None
        if not cross:
            self.in_proj = make_linear(dim, sum(outer.values()) + sum(written.values()), kind=linear)
        else:
            source = dim if memory_dim is None else memory_dim
            self.in_proj = make_linear(dim, sum(outer.values()), kind=linear) if any(outer.values()) else None
            self.memory_proj = make_linear(source, sum(written.values()), kind=linear)
        width = sum(written.values()) - written["dt"]
        causal = self.pattern is not Pattern.NONCAUSAL_SELF
        self.conv = ShortConvolution(width, config.conv_width, bias=True, causal=causal) if config.conv_width else None
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        skip = (self.heads,) if config.skip_kind == "head" else (self.heads, self.head_dim)
        self.D = None if config.skip_kind == "none" or cross else nn.Parameter(torch.empty(skip))
        matrix = (self.heads, config.d_state, self.head_dim)
        self.initial_states = nn.Parameter(torch.empty(matrix)) if config.initial_states else None
        self.constants = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(config.groups, config.d_state)) for name in config.constant if name != "dt"}
        )
        self.norm = None
        if config.norm:
            self.norm = GatedRMSNorm(
                self.d_ssm, config.groups, eps=config.norm_eps, norm_before_gate=config.norm_before_gate
            )
        self.out_proj = make_linear(inner, dim, kind=linear)
        without_weight_decay(self.A_log, self.dt_bias, self.D, self.initial_states, *self.constants.values())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A, D, dt, initial states and constants; projections, convolution and norm have their own."""
        draw_dt_bias(self.dt_bias, *self.config.dt_init)
        with torch.no_grad():
            self.A_log.uniform_(*self.config.a_init).log_()
            if self.D is not None:
                self.D.fill_(1.0)
            if self.initial_states is not None:
                self.initial_states.zero_()
            for constant in self.constants.values():
                constant.normal_(std=self.config.d_state**-0.5)

    def mix(self, tokens: Tokens, memory: Tokens | None, context: Context, state: LayerState | None) -> Result:
        widths = self.query_widths if self.pattern.cross else self.query_widths | self.memory_widths
        parts = split(self.in_proj, widths, tokens.x)
        stateful = state is not None or "state" in context.want
        if self.pattern.cross:
            known = state if memory is None else self.absorb(memory, None)
            assert known is not None  # the shell has checked that there is memory or a state
            result = self._read(parts, tokens, known)
        else:
            result = self._recur(parts, tokens, state, stateful)
        if not stateful:
            result.state = None
        y = result.output.transpose(1, 2).flatten(2)  # (b, n, h * v)
        z = parts["z"] if self.config.gate else None
        if self.norm is not None:
            y = self.norm(y, z)
        elif z is not None:
            y = gated_product(y, z)
        y = y.to(tokens.x.dtype)
        if widths["mlp"]:
            y = torch.cat([gated_product(parts["mlp"], parts["mlp_gate"]), y], -1)
        result.output = self.out_proj(y)
        return result

    def absorb(self, memory: Tokens, state: LayerState | None) -> LayerState:
        parts = split(self.memory_proj, self.memory_widths, memory.x)
        inputs, caches = self._writes(parts, memory, state)
        absorbed = absorb_memory(
            self.card,
            inputs,
            pattern=self.pattern,
            memory_mask=memory.mask,
            state=self._start(state, memory.x),
            config=self.config,
        )
        length = torch.zeros_like(memory.count()) if state is None else state.length
        return LayerState(absorbed, length, caches)

    def _read(self, parts: Tensors, tokens: Tokens, state: LayerState) -> Result:
        """Queries on absorbed memory."""
        q = self._keys("C", F.silu(parts["C"]), tokens.x)
        result = apply(
            self.card, {"q": q}, pattern=self.pattern, mask=tokens.mask, state=state.mechanism, config=self.config
        )
        result.state = LayerState(state.mechanism, state.length + tokens.count(), state.convolutions)
        return result

    def _recur(self, parts: Tensors, tokens: Tokens, state: LayerState | None, stateful: bool) -> Result:
        """Self patterns."""
        inputs, caches = self._writes(parts, tokens, state)
        skip = None if self.D is None else self.D.view(self.heads, -1).expand(-1, self.head_dim)
        result = apply(
            self.card,
            {**inputs, "skip": skip},
            pattern=self.pattern,
            mask=tokens.mask,
            state=self._start(state, tokens.x),
            return_state=stateful,
            config=self.config,
        )
        if stateful:
            length = tokens.count() if state is None else state.length + tokens.count()
            result.state = LayerState(result.state, length, caches)
        return result

    def _writes(self, parts: Tensors, tokens: Tokens, state: LayerState | None) -> tuple[Tensors, tuple[Tensor, ...]]:
        """The inputs of the recurrence (q too, in self patterns), and the convolution's cache after them."""
        widths = {name: width for name, width in self.memory_widths.items() if name != "dt"}
        y, caches = self.convolve(torch.cat([parts[name] for name in widths], -1), tokens, state)
        convolved = dict(zip(widths, y.split(list(widths.values()), -1), strict=True))
        bias = wide(self.dt_bias)
        dt = bias.expand(*tokens.x.shape[:2], -1) if "dt" in self.config.constant else parts["dt"].to(bias.dtype) + bias
        inputs = {
            "v": convolved["x"].unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2),
            "k": self._keys("B", convolved["B"], tokens.x),
            "dt": F.softplus(dt).clamp(*self.config.dt_limit).mT,
            "a": -self.A_log.to(bias.dtype).exp(),
        }
        if "C" in convolved:
            inputs["q"] = self._keys("C", convolved["C"], tokens.x)
        return inputs, caches

    def _keys(self, name: str, projected: Tensor, x: Tensor) -> Float[Tensor, "b g n k"]:
        """B or C by group, from tokens or learned."""
        if name in self.constants:
            return self.constants[name].to(x.dtype)[:, None].expand(x.shape[0], -1, x.shape[1], -1)
        return projected.unflatten(-1, (self.config.groups, self.config.d_state)).transpose(1, 2)

    def _start(self, state: LayerState | None, x: Tensor) -> MatrixState | None:
        """The mechanism's state to continue from; rows without tokens yet start from the learned one."""
        before = None if state is None else state.mechanism
        if self.initial_states is None:
            return before
        dtype = wide_dtype(x)
        first = self.initial_states.to(dtype).expand(x.shape[0], -1, -1, -1)
        if before is None:
            return MatrixState(first, torch.zeros(x.shape[0], dtype=torch.long, device=x.device))
        return MatrixState(torch.where((before.length == 0)[:, None, None, None], first, before.memory), before.length)


def _heads(config: Config, inner: int, d_ssm: int, num_heads: int) -> tuple[int, int]:
    """Number of heads and the value features of each."""
    if config.head_dim is None:
        at_least("num_heads", num_heads, 1)
    if d_ssm > inner:
        raise Unsupported(f"d_ssm={d_ssm} with expand * dim = {inner}", supported=f"1 to {inner}", nearest="d_ssm=None")
    heads = num_heads if config.head_dim is None else d_ssm // config.head_dim
    if heads < 1 or d_ssm % heads or (config.head_dim is not None and heads * config.head_dim != d_ssm):
        asked = f"num_heads={num_heads}" if config.head_dim is None else f"head_dim={config.head_dim}"
        raise Unsupported(f"{asked} for {d_ssm} features", supported=f"a divisor of {d_ssm}")
    if heads % config.groups:
        raise Unsupported(f"groups={config.groups} for {heads} heads", supported=f"a divisor of {heads}")
    return heads, d_ssm // heads


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
    widths = {"h": 4, "g": 2, "k": 8, "v": 6, **(sizes or {}), "b": batch, "n": n, "m": m}
    found = {}
    for name, axes in MECHANISM.inputs.items():
        shape = [widths[axis] for axis in axes]
        found[name.rstrip("?")] = torch.randn(shape, generator=generator, dtype=torch.float64)
    found["dt"] = F.softplus(found["dt"] - 1)
    found["a"] = -F.softplus(found["a"])
    if pattern.cross:
        del found["skip"]
    return {name: tensor.to(dtype) for name, tensor in found.items()}


MECHANISM = Mechanism(
    name="mamba2",
    aliases=("ssd", "mamba_2", "state_space_duality"),
    kind=Kind.MIXER,
    summary="A gated recurrence whose decay and step are one learned number a head and token, inside its own block.",
    paper=Paper(
        "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
        "2405.21060",
        2024,
        51,
    ),
    inputs={"q": "bgnk", "k": "bgmk", "v": "bhmv", "dt": "bhm", "a": "h", "skip?": "hv"},
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
        "no convolution": {"conv_width": 0, "gate": False, "skip_kind": "none", "d_state": 5},
        "a skip for each channel": {
            "skip_kind": "channel",
            "norm": False,
            "dt_limit": (0.05, 0.1),
            "a_init": (2.0, 4.0),
        },
        "normed before the gate": {"norm_before_gate": True, "norm_eps": 1e-3, "dt_init": (0.01, 0.02)},
        "grouped": {"groups": 2, "head_dim": 8, "chunk_size": 3, "expand": 1.0},
        "with a gated MLP": {"d_ssm": 16, "conv_width": 1},
        "initial states": {"initial_states": True},
        "constant": {"constant": ("dt", "B", "C")},
    },
    variant_patterns={
        "initial states": (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS),
    },
    engine="gated_recurrence",
    state=MatrixState,
    cost=cost,
    default_scale=1.0,
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned"),
    domains={"dt": "positive", "a": "negative"},
    sample_inputs=sample_inputs,
    module=Mamba2Layer,
)
