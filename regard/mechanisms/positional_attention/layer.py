"""Modules of positional_attention's layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import (
    LayerCall,
    LayerSpec,
    Projection,
    Tensors,
    Unsupported,
)
from regard.mechanisms.positional_attention.definition import Config

if TYPE_CHECKING:
    from jaxtyping import Float


class Maps(Projection):
    """Supplies a layer's heads with position encodings and maps, and content heads with queries and keys."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config: Config = spec.config
        if spec.kv_heads != spec.heads:
            raise Unsupported(
                f"num_kv_heads={spec.kv_heads} of positional_attention with num_heads={spec.heads}",
                supported="values of every head",
                nearest="num_kv_heads=None",
            )
        content = config.content_heads
        if content >= spec.heads:
            raise Unsupported(
                f"content_heads={content} of {spec.heads} heads",
                supported=f"0 to {spec.heads - 1}",
                nearest="softmax" if content == spec.heads else f"content_heads={spec.heads - 1}",
            )
        self.config, self.cross = config, spec.pattern.cross
        self.heads, self.content_heads, self.width = spec.heads - content, content, config.features
        if config.key_width == "split":
            if config.features % self.heads:
                raise Unsupported(
                    f"key_width='split' of {config.features} features over {self.heads} positional heads",
                    supported="a multiple of the heads",
                    nearest="key_width='encoding'",
                )
            self.width = config.features // self.heads
        # each head's query and key maps side by side, as in the paper's code
        self.weight = nn.Parameter(torch.empty(2 * self.heads * self.width, config.features))
        self.bias = nn.Parameter(torch.empty(2 * self.heads * self.width))
        self.encoding = (
            nn.Parameter(torch.empty(config.max_length, config.features)) if config.encoding == "learned" else None
        )
        self.content_query = spec.linear(spec.dim, content * spec.head_dim) if content else None
        self.content_key = spec.linear(spec.memory_dim, content * spec.head_dim) if content else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)
        if self.encoding is not None:
            nn.init.normal_(self.encoding)

    def encodings(self) -> Float[Tensor, "s f"] | None:
        """P, one row per position; None for sinusoids, which exist at all positions."""
        config, device, dtype = self.config, self.weight.device, self.weight.dtype
        if config.encoding == "one_hot":
            return torch.eye(config.max_length, dtype=dtype, device=device)
        if config.encoding == "binary":
            positions = torch.arange(config.max_length, device=device)
            bits = positions[:, None] >> torch.arange(config.features, device=device) & 1
            return (2 * bits - 1).to(dtype)
        return self.encoding

    def inputs(self, heads: Tensors, call: LayerCall) -> Tensors:
        x, memory = call.x, call.memory
        maps = self.weight.mT.unflatten(-1, (self.heads, 2, self.width)).movedim(0, 2)  # (h, 2, f, d)
        made = {
            "query_map": maps[:, 0],
            "key_map": maps[:, 1],
            "query_bias": self.bias.unflatten(0, (self.heads, 2, self.width))[:, 0],
            "encodings": self.encodings(),
            "slots": x.detach()[..., 0] if self.cross and x is not None else None,
        }
        for name, module, source in (
            ("content_query", self.content_query, x),
            ("content_key", self.content_key, memory),
        ):
            if module is not None and source is not None:
                made[name] = module(source).unflatten(-1, (self.content_heads, -1)).transpose(1, 2)
        return heads | {name: tensor for name, tensor in made.items() if tensor is not None}
