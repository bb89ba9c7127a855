"""The definition of mamba2: its options and its reference, written to be read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
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


SKIP_KINDS = ("head", "channel", "none")


@dataclass(frozen=True)
class Config:
    """Options, all for the layer; functions take q, k, v, dt, a and skip as given and use only `chunk_size`.

    Attributes:
        d_state: key features per head, >= 1.
        expand: inner width of the block relative to its outer width, E = expand * dim, > 0.
        head_dim: value features per head; if given, it sets the number of heads and overrides num_heads. None for
            d_ssm / num_heads.
        groups: number of sets of B and C, a divisor of the number of heads.
        d_ssm: how many of the E features go through the recurrence, 1 to E; the rest is a gated MLP. None for all.
        conv_width: taps of the convolution over x, B and C, >= 1; 0 for none.
        gate: whether silu(z) multiplies the output.
        skip_kind: one D per ``head``, one per ``channel``, or ``none``.
        norm: whether there is an RMSNorm before the output projection.
        norm_before_gate: apply the norm first, then the gate.
        norm_eps: added to the mean square, > 0.
        dt_limit: smallest and largest dt, 0 <= low <= high.
        dt_init: range of the initial dt, log-uniform, 0 < low <= high.
        a_init: range of the initial -A, uniform, 0 < low <= high.
        initial_states: whether the state before the first token is learned (not in noncausal-self).
        constant: those of ``dt``, ``B`` and ``C`` that are learned vectors and do not depend on the token.
        chunk_size: number of tokens computed together, >= 1.
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
    check_skip(call, skip)
    n, m = q.shape[2], k.shape[2]
    q, k = call.scale * repeat(q, v), repeat(k, v)
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


def repeat(x: Float[Tensor, "b g n k"], heads_of: Float[Tensor, "b h ..."]) -> Float[Tensor, "b h n k"]:
    """Repeat each group for the heads that share it."""
    return x.repeat_interleave(heads_of.shape[1] // x.shape[1], 1)


def check_skip(call: Call, skip: Tensor | None) -> None:
    """Refuse the skip in cross patterns."""
    if skip is not None and call.pattern.cross:
        raise Unsupported(
            f"mamba2 with skip in {call.pattern.value}, where queries are not tokens of the memory",
            supported="skip in self patterns",
            nearest="skip=None",
        )
