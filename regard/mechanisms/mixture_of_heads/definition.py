"""The definition of mixture_of_heads: its options and its reference, written to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import (
    Call,
    Unsupported,
    at_least,
    one_of,
)
from regard.core.draws import normal
from regard.core.precision import wide

if TYPE_CHECKING:
    from jaxtyping import Float


ROUTERS = ("input", "query_norm")


GATES = ("weighted", "binary", "straight_through")

COMPUTE = ("auto", "dense", "gather")

SAVED = 256
"""Scores per query, averaged over heads, that gathering must save to be worthwhile on a CPU."""


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        shared_heads: h_s, the number of leading heads that are active for every token; from 0 to H, a quarter of H
            (rounded down) when None. Or the indices of the shared heads, such as the most important ones of a trained
            model (:func:`regard.training.mix_heads`).
        active_heads: k, the number of routed heads active for a token; from 1 to E, two thirds of E (rounded down, at
            least 1) when None, and 0 when all heads are shared.
        router: how routed heads are scored: by logits computed from the ``input`` token, or by the ``query_norm``.
        gates: ``weighted``; ``binary``, 0 or 1 (the router then learns from L_b alone); ``straight_through``, 0 or 1
            with the gradient of p. None: weighted with the input router, straight_through with query norms.
        two_stage: weight the two groups of heads by a_1 and a_2; otherwise by 1.
        rescale_gates: multiply softmaxes by the number of their entries; see Deviations.
        noise: standard deviation of normal noise on the routed logits in training, >= 0.
        z_loss: return the mean squared log-sum-exp of the routed logits as the loss ``router_z``.
        eps: lower bound of the standard deviation that divides query norms, > 0.
        compute: how the layer computes heads: ``dense``, all heads and then the gates; ``gather``, only chosen heads;
            ``auto``, whichever is faster (see :meth:`gathers`).
    """

    shared_heads: int | tuple[int, ...] | None = None
    active_heads: int | None = None
    router: str = "input"
    gates: str | None = None
    two_stage: bool = True
    rescale_gates: bool = True
    noise: float = 0.0
    z_loss: bool = False
    eps: float = 1e-6
    compute: str = "auto"

    def __post_init__(self) -> None:
        one_of("router", self.router, ROUTERS)
        one_of("gates", self.gates, (None, *GATES))
        one_of("compute", self.compute, COMPUTE)
        if isinstance(self.shared_heads, (tuple, list)):
            named = tuple(sorted(self.shared_heads))
            if len(set(named)) < len(named) or (named and named[0] < 0):
                raise Unsupported(f"shared_heads={self.shared_heads}", supported="different numbers of heads, from 0")
            object.__setattr__(self, "shared_heads", named)
        elif self.shared_heads is not None:
            at_least("shared_heads", self.shared_heads, 0)
        if self.active_heads is not None:
            at_least("active_heads", self.active_heads, 0)
        at_least("noise", self.noise, 0.0)
        if self.eps <= 0:
            raise Unsupported(f"eps={self.eps}", supported="eps > 0", nearest="eps=1e-6")
        if self.router == "query_norm" and self.gates == "weighted":
            raise Unsupported(
                'weighted gates with router="query_norm", which has no parameters',
                supported="binary, straight_through",
                nearest="straight_through",
            )

    @property
    def weighted(self) -> bool:
        """Whether gates are weights from the router, set by the option or as its router's default."""
        return self.gates == "weighted" or (self.gates is None and self.router == "input")

    def groups(self, heads: int) -> tuple[int, int, int]:
        """The numbers of shared, routed and active routed heads among `heads`.

        Raises:
            Unsupported: when the numbers do not fit, or some head could never be active.
        """
        if isinstance(self.shared_heads, tuple):
            if self.shared_heads and self.shared_heads[-1] >= heads:
                raise Unsupported(f"shared_heads={self.shared_heads}", supported=f"heads 0 to {heads - 1}")
            shared = len(self.shared_heads)
        else:
            shared = heads // 4 if self.shared_heads is None else self.shared_heads
        routed = heads - shared
        if routed < 0:
            raise Unsupported(f"shared_heads={shared} of {heads} heads", supported=f"0 to {heads}")
        active = min(routed, max(1, 2 * routed // 3)) if self.active_heads is None else self.active_heads
        if not min(routed, 1) <= active <= routed:
            raise Unsupported(
                f"active_heads={active} of {routed} routed heads",
                supported=f"{min(routed, 1)} to {routed}",
                nearest=f"shared_heads={heads}" if active == 0 else f"active_heads={routed}",
            )
        return shared, routed, active

    def gathers(self, heads: int, pairs: int, device: str = "cpu") -> bool:
        """Return whether a layer with `heads` heads computes only chosen heads, given the smaller of the numbers of
        queries and keys: as the option says or, with ``auto``, on a CPU from about 1,000 with 75 % of the heads and 500
        with 50 %."""
        _, routed, active = self.groups(heads)
        if self.compute != "auto" or active == routed:
            return self.compute == "gather" and routed > 0
        return device == "cpu" and pairs * (routed - active) >= SAVED * heads

    def order(self, heads: int) -> list[int]:
        """Indices of the shared heads, then of the routed ones."""
        shared = self.shared_heads if isinstance(self.shared_heads, tuple) else range(self.groups(heads)[0])
        return [*shared, *(head for head in range(heads) if head not in shared)]

    def routers(self, heads: int) -> dict[str, int]:
        """The width of each router's logits, by router name."""
        shared, routed, active = self.groups(heads)
        widths = {"routed": routed}
        if self.weighted:
            widths["shared"] = shared if shared > 1 else 0
            widths["balance"] = 2 if self.two_stage and shared and active else 0
        return {name: width for name, width in widths.items() if width}


def reference(
    call: Call,
    o: Float[Tensor, "b h n v"],
    routed: Float[Tensor, "b n e"] | None = None,
    shared: Float[Tensor, "b n s"] | None = None,
    balance: Float[Tensor, "b n t"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, token by token and head by head."""
    config: Config = call.config
    batch, heads, n, _ = o.shape
    check_logits(config, heads, {"routed": routed, "shared": shared, "balance": balance})
    h_s, e, k = config.groups(heads)
    rescale = config.rescale_gates
    routed = prepare_logits(call, routed)
    output = torch.zeros_like(o)
    for b in range(batch):
        for t in range(n):
            gates: list[Any] = [1.0] * h_s + [0.0] * e
            groups: Any = (1.0, 1.0)
            if balance is not None:
                groups = (2 if rescale else 1) * (call.scale * balance[b, t]).softmax(0)
            if shared is not None:
                gates[:h_s] = (h_s if rescale else 1) * (call.scale * shared[b, t]).softmax(0)
            if routed is not None:
                p = routed[b, t].softmax(0)
                chosen = sorted(range(e), key=routed[b, t].tolist().__getitem__, reverse=True)[:k]
                total = sum(p[i] for i in chosen)
                for i in range(e):
                    one = float(i in chosen)
                    weight = k * p[i] / total if rescale else p[i]
                    soft = one * weight if config.weighted else one
                    gates[h_s + i] = soft + p[i] - p[i].detach() if _straight_through(config) else soft
            for i, head in enumerate(config.order(heads)):
                output[b, head, t] = groups[0 if i < h_s else 1] * gates[i] * o[b, head, t]
    return output


def _straight_through(config: Config) -> bool:
    return config.gates == "straight_through" or (config.gates is None and config.router == "query_norm")


def check_logits(config: Config, heads: int, given: Mapping[str, Tensor | None]) -> None:
    """Refuse logits whose widths differ from `Config.routers`."""
    expected = config.routers(heads)
    widths = {name: logits.shape[-1] for name, logits in given.items() if logits is not None}
    if widths != expected:
        raise Unsupported(
            f"routers of widths {widths} for {heads} heads", supported=f"widths {expected} with these options"
        )


def prepare_logits(call: Call, routed: Tensor | None) -> Tensor | None:
    """Scores of the routed heads in at least float32: scaled, noisy in training, query norms standardised."""
    if routed is None:
        return None
    config: Config = call.config
    logits = wide(routed)
    if config.router == "query_norm":
        centred = logits - logits.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1)
        logits = logits * variance.clamp(min=config.eps**2).rsqrt()
    logits = call.scale * logits
    if config.noise and call.training:
        draw = normal(logits.shape, call.generator, device=logits.device, dtype=logits.dtype)
        logits = logits + config.noise * draw
    return logits
