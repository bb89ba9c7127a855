"""Building blocks that selective state-space models share (Mamba, arXiv 2312.00752; Mamba-2, arXiv 2405.21060)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import State, Tensors, Unsupported
from regard.engines.layers import rms_norm
from regard.layers.attention import LayerState
from regard.layers.convolution import ShortConvolution
from regard.layers.mixer import MixerLayer, Tokens

if TYPE_CHECKING:
    from jaxtyping import Float

SELECTIONS = ("dt", "B", "C")
"""Parameters that depend on the token, and can be held constant in ablations."""


def check_range(config: Any, name: str, *, zero: bool = False) -> None:
    """Check in a Config's ``__post_init__`` that an option (low, high) has 0 < low <= high (0 <= low with `zero`)."""
    low, high = getattr(config, name)
    if not 0 <= low <= high or (low == 0 and not zero):
        default = getattr(type(config), name)
        raise Unsupported(
            f"{name}={(low, high)}",
            supported=f"0 {'<=' if zero else '<'} low <= high",
            nearest=f"{name}={default}",
        )


def draw_dt_bias(bias: nn.Parameter, low: float, high: float) -> None:
    """Fill `bias` with the inverse softplus of log-uniform steps from `low` to `high`, at least 1e-4."""
    with torch.no_grad():
        dt = torch.empty_like(bias).uniform_(math.log(low), math.log(high)).exp().clamp(min=1e-4)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def without_weight_decay(*parameters: Tensor | None) -> None:
    """Exempt parameters from the optimizer's weight decay (None is skipped)."""
    for parameter in parameters:
        if parameter is not None:
            parameter._no_weight_decay = True  # type: ignore[attr-defined]


def split(projection: nn.Module | None, widths: dict[str, int], x: Float[Tensor, "b n c"]) -> Tensors:
    """Split a projection of `x` into named parts, in the order of its features; all are 0 wide without a projection."""
    y = x[..., :0] if projection is None else projection(x)
    return dict(zip(widths, y.split(list(widths.values()), -1), strict=True))


class GatedRMSNorm(nn.Module):
    """RMSNorm of each group of features, with a gate silu(z) before or after it.

    Args:
        dim: width of the last axis, a multiple of `groups`.
        groups: number of groups, each with its own root mean square.
        eps: added to the mean square.
        norm_before_gate: compute norm(y) silu(z) instead of norm(y silu(z)).
    """

    def __init__(self, dim: int, groups: int = 1, *, eps: float = 1e-5, norm_before_gate: bool = False) -> None:
        super().__init__()
        if dim % groups:
            raise Unsupported(f"a norm over {groups} groups of {dim} features", supported="a divisor of the features")
        self.groups, self.eps, self.norm_before_gate = groups, eps, norm_before_gate
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Float[Tensor, "... c"], z: Float[Tensor, "... c"] | None) -> Float[Tensor, "... c"]:
        """Normalise and gate, in at least float32; the result has the dtype of y."""
        return rms_norm(y, self.weight, z=z, groups=self.groups, eps=self.eps, norm_before_gate=self.norm_before_gate)


class StateSpaceLayer(MixerLayer):
    """A block around a state-space recurrence: keeps time constants in float32, and has a convolution with a cache.

    Subclasses set `A_log`, `dt_bias`, `D` (None without a skip) and `conv` (None without a convolution).
    """

    FLOAT32: tuple[str, ...] = ("A_log", "D", "dt_bias")
    state_type: type[State] = LayerState
    conv: ShortConvolution | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Cast and move as usual, but never narrow the parameters in `FLOAT32`."""
        before = {name: getattr(self, name).data for name in self.FLOAT32 if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            parameter = getattr(self, name)
            if torch.finfo(parameter.dtype).bits < 32:
                parameter.data = value.to(parameter.device)
        return self

    def convolve(
        self, x: Float[Tensor, "b n c"], tokens: Tokens, state: LayerState | None
    ) -> tuple[Float[Tensor, "b n c"], tuple[Tensor, ...]]:
        """silu of the convolved tokens, and the convolution's cache after them (None in noncausal form)."""
        if self.conv is None:
            return F.silu(x), ()
        y, cache = self.conv(x, tokens.lengths, state.convolutions[0] if state is not None else None)
        return y, () if cache is None else (cache,)
