"""The fast form of mixture_of_heads, and the computation of its gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import (
    Call,
    Result,
)
from regard.core.precision import wide_dtype
from regard.mechanisms.mixture_of_heads.definition import Config, _straight_through, check_logits, prepare_logits

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def parallel(
    call: Call,
    o: Float[Tensor, "b h n v"],
    routed: Float[Tensor, "b n e"] | None = None,
    shared: Float[Tensor, "b n s"] | None = None,
    balance: Float[Tensor, "b n t"] | None = None,
) -> Result:
    """Every head's output times its gate, which is 0 for inactive heads; the result carries the losses."""
    result = Result(o)
    gates = gates_of(call, o.shape[1], {"routed": routed, "shared": shared, "balance": balance}, o[:, 0, :, :0], result)
    result.output = (o.to(gates.dtype) * gates.transpose(1, 2)[..., None]).to(o.dtype)
    return result


def gates_of(
    call: Call,
    heads: int,
    logits: Mapping[str, Tensor | None],
    tokens: Float[Tensor, "b n c"],
    result: Result,
    *,
    keeps_losses: bool = True,
) -> Float[Tensor, "b n h"]:
    """Gates of all heads in at least float32, 0 for inactive heads; losses and requested gates are added to `result`.

    Args:
        heads: H.
        logits: logits of each router, by name.
        tokens: determines the number of tokens, dtype and device.
        keeps_losses: whether losses are needed; without them, gates of 0 and 1 that need no gradient only take a
            comparison of the scores.
    """
    config: Config = call.config
    batch, n, _ = tokens.shape
    check_logits(config, heads, logits)
    routed, shared, balance = (logits.get(name) for name in ("routed", "shared", "balance"))
    h_s, _, k = config.groups(heads)
    dtype = wide_dtype(tokens)
    rescale = config.rescale_gates
    parts = []
    if h_s:
        always = tokens.new_ones(batch, n, h_s, dtype=dtype)
        parts.append(
            always if shared is None else (h_s if rescale else 1) * (call.scale * shared.to(dtype)).softmax(-1)
        )
    differentiated = _straight_through(config) and torch.is_grad_enabled()
    if routed is not None and not (
        keeps_losses or config.weighted or differentiated or (config.noise and call.training)
    ):
        parts.append(_top(routed, k).to(dtype))
    elif (scores := prepare_logits(call, routed)) is not None:
        p = scores.softmax(-1)
        active = _top(scores, k)
        parts.append(_routed_gates(config, p, active, k))
        valid = call.valid_queries(n)
        result.losses["load_balance"] = _load_balance(p, active, valid)
        if config.z_loss:
            squares = scores.logsumexp(-1).square()
            count = torch.tensor(batch * n, device=tokens.device) if valid is None else valid.sum()
            result.losses["router_z"] = (squares.sum() if valid is None else squares.where(valid, 0).sum(), count)
    if balance is not None:
        weights = (2 if rescale else 1) * (call.scale * balance.to(dtype)).softmax(-1)
        parts = [weights[..., i : i + 1] * part for i, part in enumerate(parts)]
    gates = torch.cat(parts, -1)  # (B, N, H), shared heads first
    order = config.order(heads)
    if order != sorted(order):
        gates = gates[..., torch.tensor(order, device=gates.device).argsort()]
    if "gates" in call.want:
        result.extras["gates"] = gates
    return gates


def _top(logits: Tensor, k: int) -> Bool[Tensor, "b n e"]:
    """True at the k largest entries of the last axis; ties go to the first."""
    order = logits.detach().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :k], True)


def _routed_gates(config: Config, p: Tensor, active: Tensor, k: int) -> Tensor:
    if not config.weighted:
        hard = active.to(p.dtype)
        return hard + (p - p.detach()) if _straight_through(config) else hard
    chosen = torch.where(active, p, 0)
    if not config.rescale_gates:
        return chosen
    return k * chosen / chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)


def _load_balance(p: Tensor, active: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """E sum_e mean(p_e) mean(active_e) over valid tokens, with count 1 for this layer (0 without tokens)."""
    routed = p.shape[-1]
    used = active.to(p.dtype)
    if valid is None:
        count = torch.tensor(p.shape[0] * p.shape[1], device=p.device)
    else:
        count = valid.sum()
        p, used = torch.where(valid[..., None], p, 0), torch.where(valid[..., None], used, 0)
    tokens = count.clamp(min=1)
    loss = routed * ((p.sum((0, 1)) / tokens) * (used.sum((0, 1)) / tokens)).sum()
    return loss, (count > 0).to(torch.int64)
