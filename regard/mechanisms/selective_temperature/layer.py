"""Modules of selective_temperature's layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    LayerCall,
    LayerSpec,
    Projection,
    Tensors,
)
from regard.core.precision import wide, wide_dtype
from regard.layers.linear import make_linear
from regard.mechanisms.selective_temperature.definition import POSITION_FORMS, Config

if TYPE_CHECKING:
    from jaxtyping import Float


class Temperatures(Projection):
    """A layer's terms: adds ``q_token``, ``q_slope`` and so on to the heads, as its options require.

    The last weights of every f are initialised to 0, so the token terms start at 0.
    """

    learning_rates: ClassVar[Mapping[str, float]] = {"alpha": 0.01}

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        self.config, self.kv_heads = config, spec.kv_heads
        sizes = {
            "q": (spec.heads, spec.head_dim, spec.dim),
            "k": (spec.kv_heads, spec.head_dim, spec.memory_dim),
            "v": (spec.kv_heads, spec.value_dim, spec.memory_dim),
        }
        self.weights = nn.ParameterDict()
        self.functions = nn.ModuleDict()
        for name, terms in config.terms.items():
            if terms not in ("token", "both"):
                continue
            heads, width, dim = sizes[name]
            if config.token_features == "heads":
                self.weights[name] = nn.Parameter(torch.zeros(1 if config.share_heads else heads, width))
            else:
                hidden = dim if config.hidden is None else config.hidden
                last = make_linear(hidden, heads, bias=False)
                nn.init.zeros_(last.weight)  # type: ignore[arg-type]
                self.functions[name] = nn.Sequential(make_linear(dim, hidden, bias=True), nn.GELU(), last)
        self.alpha: nn.Parameter | None = None
        if any(terms in ("position", "both") for terms in config.terms.values()):
            start = POSITION_FORMS[config.position_form] if config.position_start is None else config.position_start
            number = spec.heads if config.position_granularity == "head" else 1
            self.alpha = nn.Parameter(torch.full((number,), start))
        self.heads = spec.heads
        if "q" in self.weights or "k" in self.weights:
            self.reads_unrotated = ("queries and keys", 'token_features="tokens"')

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x, source = call.x, call.memory
        found = dict(heads)
        tokens = {"q": x, "k": source, "v": source}
        for name, terms in self.config.terms.items():
            if terms in ("position", "both"):
                found[f"{name}_slope"] = self._slopes(self.heads if name == "q" else self.kv_heads)
            if terms in ("token", "both") and tokens[name] is not None:
                found[f"{name}_token"] = self._token_terms(name, heads, tokens[name])
        return found

    def _token_terms(self, name: str, heads: Tensors, tokens: Tensor | None) -> Float[Tensor, "b h n"]:
        if name in self.functions:
            f = self.functions[name](tokens).mT
            return wide(f).tanh()
        x, u = heads[name], self.weights[name]
        dtype = wide_dtype(x)
        return (F.gelu(x.to(dtype)) * u.to(dtype)[:, None]).sum(-1).tanh()

    def _slopes(self, heads: int) -> Float[Tensor, " h"]:
        """s for each head; a key/value head shared by several query heads uses the mean of their alphas."""
        assert self.alpha is not None
        alpha = wide(self.alpha)
        alpha = alpha.expand(heads) if alpha.shape[0] == 1 else alpha.unflatten(0, (heads, -1)).mean(-1)
        if self.config.position_form == "sigmoid":
            return alpha.sigmoid()
        return (-alpha.exp()).exp() if self.config.position_form == "double_exp" else alpha
