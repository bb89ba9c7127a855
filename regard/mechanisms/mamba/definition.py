"""The definition of mamba: its options and its reference, written to be read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Unsupported,
    at_least,
    one_of,
)
from regard.layers.state_space import (
    SELECTIONS,
    check_range,
)

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Config:
    """Options, all for the layer; functions take their tensors as given and use only `chunk_size`.

    Attributes:
        d_state: states per channel, >= 1.
        expand: inner width of the block relative to its outer width, E = expand * dim, > 0.
        dt_rank: features from which the steps are projected, >= 1; None for dim / 16, rounded up.
        groups: number of sets of B and C, a divisor of E.
        conv_width: taps of the convolution over x, >= 1; 0 for none.
        gate: whether silu(z) multiplies the output.
        skip: whether D x is added.
        scalar_a: share one A among all states of a channel, as in Mamba-2.
        norm: whether there is an RMSNorm before the output projection.
        norm_before_gate: apply the norm first, then the gate.
        norm_eps: added to the mean square, > 0.
        dt_limit: smallest and largest dt, 0 <= low <= high.
        dt_init: range of the initial dt, log-uniform, 0 < low <= high.
        constant: those of ``dt``, ``B`` and ``C`` that are learned vectors and do not depend on the token.
        chunk_size: number of tokens computed together, >= 1.
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
    check_skip(call, skip)
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


def _gate(y: Tensor, z: Tensor | None) -> Tensor:
    return y if z is None else y * F.silu(z.to(y.dtype))


def check_skip(call: Call, skip: Tensor | None) -> None:
    """Refuse the skip in cross patterns."""
    if skip is not None and call.pattern.cross:
        raise Unsupported(
            f"mamba with skip in {call.pattern.value}, where queries are not tokens of the memory",
            supported="skip in self patterns",
            nearest="skip=None",
        )
