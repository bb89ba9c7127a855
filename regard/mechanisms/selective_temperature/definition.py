"""The definition of selective_temperature: its options and its reference, written to be read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Call, Unsupported, at_least, one_of
from regard.engines.attention import attention_reference, masked_scores_bias, ranks
from regard.engines.attention_forms import by_pattern

if TYPE_CHECKING:
    from jaxtyping import Float


TERMS = ("none", "position", "token", "both")


POSITION_FORMS = {"sigmoid": 0.0, "double_exp": 2.0, "linear": 1e-5}
"""Forms of s, with the initial alpha of each."""


@dataclass(frozen=True)
class Config:
    """Options, all for the layer except the last; functions take the terms as inputs.

    Attributes:
        q_temperature: terms of the queries' temperature: ``none``, ``position``, ``token`` or ``both``.
        k_temperature: likewise for the keys.
        v_temperature: likewise for the values.
        token_features: input of f: ``heads`` (the head's own query, key or value) or ``tokens`` (the layer's input).
        hidden: width of f's hidden layer with ``tokens``, >= 1; that of the input when None.
        share_heads: whether all heads share u, with ``heads``.
        position_form: s is ``sigmoid`` (of alpha), ``double_exp`` (exp(-exp(alpha))) or ``linear`` (alpha itself, at
            least 0).
        position_start: initial alpha, finite (>= 0 with ``linear``); when None 0, 2 and 0.00001 for the three forms.
        position_granularity: ``head`` for one alpha per head, ``layer`` for one in all.
        round_scaled: in half precision, round q', k' and v' to the inputs' dtype, so that its kernels can run. Errors
            in bfloat16 are then up to twice the published ones. Otherwise the attention is computed in float32.
    """

    q_temperature: str = "both"
    k_temperature: str = "none"
    v_temperature: str = "both"
    token_features: str = "heads"
    hidden: int | None = None
    share_heads: bool = False
    position_form: str = "sigmoid"
    position_start: float | None = None
    position_granularity: str = "head"
    round_scaled: bool = False

    def __post_init__(self) -> None:
        for name in ("q_temperature", "k_temperature", "v_temperature"):
            one_of(name, getattr(self, name), TERMS)
        one_of("token_features", self.token_features, ("heads", "tokens"))
        one_of("position_form", self.position_form, POSITION_FORMS)
        one_of("position_granularity", self.position_granularity, ("head", "layer"))
        if self.hidden is not None:
            at_least("hidden", self.hidden, 1)
            if self.token_features == "heads":
                raise Unsupported(
                    f"hidden={self.hidden} with token_features='heads'",
                    supported="token_features='tokens'",
                    nearest="hidden=None",
                )
        if self.share_heads and self.token_features == "tokens":
            raise Unsupported(
                "share_heads with token_features='tokens'",
                supported="token_features='heads'",
                nearest="share_heads=False",
            )
        lowest = 0.0 if self.position_form == "linear" else -math.inf
        if self.position_start is not None and not (
            math.isfinite(self.position_start) and self.position_start >= lowest
        ):
            raise Unsupported(
                f"position_start={self.position_start} with position_form={self.position_form!r}",
                supported="a finite number, >= 0 when linear",
                nearest="position_start=None",
            )

    @property
    def terms(self) -> dict[str, str]:
        """The terms of each temperature, by tensor: ``q``, ``k`` and ``v``."""
        return {"q": self.q_temperature, "k": self.k_temperature, "v": self.v_temperature}


def reference(
    call: Call,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    q_token: Float[Tensor, "b h n"] | None = None,
    k_token: Float[Tensor, "b g m"] | None = None,
    v_token: Float[Tensor, "b g m"] | None = None,
    q_slope: Float[Tensor, " h"] | None = None,
    k_slope: Float[Tensor, " g"] | None = None,
    v_slope: Float[Tensor, " g"] | None = None,
) -> Float[Tensor, "b h n v"]:
    """The definition, with the full score matrix and keys counted one by one."""
    where = ranks(call, q.shape[2], k.shape[2], q.device)
    rule = by_pattern(call)
    visible, bias = masked_scores_bias(where, rule, call.bias, call.position_bias, call.blocks, q.dtype)
    in_sight = rule.mask(where.queries, where.keys).expand(-1, q.shape[2], -1).sum(-1)
    before = rule.mask(where.keys, where.keys).expand(-1, k.shape[2], -1).sum(-1)

    def tau(n: Tensor, token: Tensor | None, slope: Tensor | None) -> Tensor:
        position = 0 if slope is None else slope[:, None] * n.clamp(min=1).to(q.dtype).log()[:, None]
        return (1 + (0 if token is None else token) + position) * torch.ones_like(n[:, None], dtype=q.dtype)

    sharpened = tau(in_sight, q_token, q_slope)[..., None] * q
    keys = tau(before, k_token, k_slope)[..., None] * k
    values = tau(before, v_token, v_slope)[..., None] * v
    return attention_reference(sharpened, keys, values, visible, lambda s: s.softmax(-1), call.scale, bias)
