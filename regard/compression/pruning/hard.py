"""Hard attention for transformers modules: :mod:`regard.mechanisms.hard_softmax` behind their attention interface."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from regard.compression.pruning.anatomy import Undo
from regard.contract import Unsupported, an_instance
from regard.core.precision import wide
from regard.engines.attention import only_largest
from regard.integrations.heads import HARD_KEYS

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

NAME = "regard:hard"


def attends_by_interface(module: nn.Module) -> bool:
    """Return whether a module calls the attention function that its config names."""
    return hasattr(module, "config") and hasattr(module, "scaling")


def harden_module(module: Any, keys: int) -> Undo:
    """Restrict the queries of a transformers attention module to their `keys` largest weights.

    Raises:
        Unsupported: for a module without the attention interface, or with special score computations.
    """
    from transformers import AttentionInterface

    config: Any = getattr(module, "config", None)
    for option in ("attn_logit_softcapping", "sliding_window"):
        if getattr(module, option, None) or getattr(config, option, None):
            raise Unsupported(f"hard attention in {an_instance(module)} with {option}", supported="plain attention")
    if not attends_by_interface(module):
        raise Unsupported(
            f"hard attention in {an_instance(module)}",
            supported="modules of transformers' interface",
            nearest="axformer:hard=0",
        )
    AttentionInterface.register(NAME, hard_forward)
    own = copy.copy(config)
    own._attn_implementation = NAME
    module.config = own
    setattr(module, HARD_KEYS, keys)

    def undo() -> None:
        module.config = config
        delattr(module, HARD_KEYS)

    return undo


def hard_forward(
    module: nn.Module,
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m v"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "b n h v"], None]:
    """The attention function for transformers; masks are boolean, or added to the scores."""
    n, m, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = wide(query) @ wide(key).mT * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if attention_mask is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        if causal and n > 1:
            hidden = torch.ones(n, m, dtype=torch.bool, device=query.device).triu(1 + m - n)
            scores = scores.masked_fill(hidden, -torch.inf)
    elif attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask[..., :m], torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask[..., :m]
    weights = F.dropout(scores.softmax(-1), dropout, module.training)
    output = only_largest(weights, getattr(module, HARD_KEYS)) @ wide(value)
    return output.to(value.dtype).transpose(1, 2), None
