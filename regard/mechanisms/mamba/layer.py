"""Modules of mamba's layer."""

from __future__ import annotations

import math
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
    Unsupported,
)
from regard.core.precision import wide, wide_dtype
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
from regard.mechanisms.mamba.definition import Config

if TYPE_CHECKING:
    from jaxtyping import Float


class MambaLayer(StateSpaceLayer):
    """The Mamba block, (B, N, C) -> (B, N, C), without its outer norm and residual.

    A_log, D and dt_bias stay in float32 when the layer is cast to a narrower dtype, and have no weight decay.

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: accepted for a uniform signature; every channel has its own state.
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
        """Initialise A = -1, -2, ..., -d_state (S4D-real), D, dt and constants; submodules initialise themselves."""
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
        """Read absorbed memory with queries."""
        projected = x if self.query_proj is None else self.query_proj(F.silu(x))
        inputs = {"c": self._keys("C", projected, tokens.x), "z": z}
        result = apply(
            self.card, inputs, pattern=self.pattern, mask=tokens.mask, state=state.mechanism, config=self.config
        )
        result.state = LayerState(state.mechanism, state.length + tokens.count(), state.convolutions)
        return result

    def _recur(self, x: Tensor, z: Tensor | None, tokens: Tokens, state: LayerState | None, stateful: bool) -> Result:
        """Run the recurrence of the self patterns."""
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
        """The inputs of the recurrence (in self patterns including c), and the updated convolution cache."""
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
        """B or C for each group: projected from tokens, or a learned constant."""
        if name in self.constants:
            return self.constants[name].to(x.dtype).expand(*x.shape[:2], -1, -1)
        return projected.unflatten(-1, (self.config.groups, self.config.d_state))
