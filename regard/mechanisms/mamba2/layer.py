"""Modules of mamba2's layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.apply import absorb as absorb_memory
from regard.apply import apply
from regard.contract import (
    Context,
    Mechanism,
    Pattern,
    Result,
    Tensors,
    Unsupported,
    at_least,
)
from regard.core.precision import wide, wide_dtype
from regard.engines.layers import gated_product
from regard.engines.recurrent_forms import MatrixState
from regard.layers.attention import LayerState
from regard.layers.convolution import ShortConvolution
from regard.layers.linear import make_linear
from regard.layers.mixer import Tokens
from regard.layers.state_space import (
    GatedRMSNorm,
    StateSpaceLayer,
    draw_dt_bias,
    split,
    without_weight_decay,
)
from regard.mechanisms.mamba2.definition import Config

if TYPE_CHECKING:
    from jaxtyping import Float


class Mamba2Layer(StateSpaceLayer):
    """The Mamba-2 block, (B, N, C) -> (B, N, C), without its outer norm and residual.

    A_log, D and dt_bias stay in float32 when the layer is cast to a narrower dtype, and have no weight decay.

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: number of heads, each with d_ssm / num_heads features; ignored if the config sets head_dim.
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
        self.query_widths = outer  # widths of a projection's parts by name, in feature order
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
        """Initialise A, D, dt, initial states and constants; submodules initialise themselves."""
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
        """Read absorbed memory with queries."""
        q = self._keys("C", F.silu(parts["C"]), tokens.x)
        result = apply(
            self.card, {"q": q}, pattern=self.pattern, mask=tokens.mask, state=state.mechanism, config=self.config
        )
        result.state = LayerState(state.mechanism, state.length + tokens.count(), state.convolutions)
        return result

    def _recur(self, parts: Tensors, tokens: Tokens, state: LayerState | None, stateful: bool) -> Result:
        """Run the recurrence of the self patterns."""
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
        """The inputs of the recurrence (in self patterns including q), and the updated convolution cache."""
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
        """B or C for each group: projected from tokens, or a learned constant."""
        if name in self.constants:
            return self.constants[name].to(x.dtype)[:, None].expand(x.shape[0], -1, x.shape[1], -1)
        return projected.unflatten(-1, (self.config.groups, self.config.d_state)).transpose(1, 2)

    def _start(self, state: LayerState | None, x: Tensor) -> MatrixState | None:
        """The mechanism's state to continue from; rows that have no tokens yet start from the learned state."""
        before = None if state is None else state.mechanism
        if self.initial_states is None:
            return before
        dtype = wide_dtype(x)
        first = self.initial_states.to(dtype).expand(x.shape[0], -1, -1, -1)
        if before is None:
            return MatrixState(first, torch.zeros(x.shape[0], dtype=torch.long, device=x.device))
        return MatrixState(torch.where((before.length == 0)[:, None, None, None], first, before.memory), before.length)


def _heads(config: Config, inner: int, d_ssm: int, num_heads: int) -> tuple[int, int]:
    """The number of heads and of value features per head."""
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
