"""Costs of dense and sparse inference: floating-point operations and bytes, from model sizes and measured sparsity.

P weights, L layers, H query heads and G kv heads of width d, N tokens, I = N (N + 1) / 2 pairs, s sparsity::

    prefill   2 P N + 4 L H d I (1 - s) + index
    decode    2 P + 4 L H d n (1 - s) + index               a token with n in the cache
    bytes     e P + 2 e L G d n (1 - s) + e pages           that a token reads, with e bytes a number

The index is the cost of choosing: 2 L H d A N for the weights of the last A queries (vertical-slash, FlexPrefill,
SnapKV once), 2 L H d (N / c)^2 / 2 for the means of blocks, 4 L H d n / page for Quest's bounds, which are two numbers
per feature, page and kv head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from regard.compression.sparse.evicting import H2O, TOVA, SnapKV
from regard.compression.sparse.method import Combined, Method
from regard.compression.sparse.paging import Quest
from regard.compression.sparse.prefilling import BlockSparse, FlexPrefill, VerticalSlash
from regard.contract import Unsupported, an_instance
from regard.models import LanguageModel


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder.

    Attributes:
        weights: number of matrix entries that each token is multiplied by, including the output projection.
        layers, heads, kv_heads, width: sizes of the attention.
        bytes: bytes per number.
    """

    weights: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    bytes: int = 4

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        """The sizes of a language model of regard or of transformers.

        Raises:
            Unsupported: for other models.
        """
        outputs: Any = getattr(model, "get_output_embeddings", None)
        head = None if outputs is None else outputs()
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        tied = isinstance(model, LanguageModel) and model.head is None
        if tied or (head is not None and id(head.weight) in looked_up):
            looked_up = set()
        matrices = {id(p): p for p in model.parameters() if p.ndim == 2 and id(p) not in looked_up}
        weights = sum(p.numel() for p in matrices.values())
        size = next(iter(matrices.values())).element_size() if matrices else 4
        if isinstance(model, LanguageModel):
            own = model.config
            heads = own.num_heads
            return cls(
                weights, own.num_layers or 1, heads, own.num_kv_heads or heads, own.head_dim or own.dim // heads, size
            )
        config: Any = getattr(model, "config", None)
        if getattr(config, "num_attention_heads", None) is None or getattr(config, "num_hidden_layers", None) is None:
            raise Unsupported(f"the cost of {an_instance(model)}", supported="language models")
        heads = config.num_attention_heads
        return cls(
            weights,
            config.num_hidden_layers,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            size,
        )


def prefill_flops(sizes: Sizes, n: int, sparsity: float = 0.0, index: float = 0.0) -> float:
    """FLOPs for a prompt of n tokens."""
    pairs = n * (n + 1) / 2 * (1 - sparsity)
    return 2.0 * sizes.weights * n + 4.0 * sizes.layers * sizes.heads * sizes.width * pairs + index


def decode_flops(sizes: Sizes, n: int, sparsity: float = 0.0, index: float = 0.0) -> float:
    """FLOPs for a token that sees n tokens, including itself."""
    return 2.0 * sizes.weights + 4.0 * sizes.layers * sizes.heads * sizes.width * n * (1 - sparsity) + index


def decode_bytes(sizes: Sizes, n: int, sparsity: float = 0.0, pages: float = 0.0) -> float:
    """Bytes that a token reads.

    Args:
        pages: number of page-bound entries that all layers read together.
    """
    cache = 2.0 * sizes.layers * sizes.kv_heads * sizes.width * n * (1 - sparsity)
    return sizes.bytes * (sizes.weights + cache + pages)


def prefill_index(method: Method, sizes: Sizes, n: int) -> float:
    """FLOPs for choosing keys in a prompt of n tokens."""
    if isinstance(method, Combined):
        return prefill_index(method.first, sizes, n) + prefill_index(method.second, sizes, n)
    each = 2.0 * sizes.layers * sizes.heads * sizes.width
    if isinstance(method, VerticalSlash | FlexPrefill):
        return each * min(method.window, n) * n
    if isinstance(method, SnapKV):
        return each * min(method.window, n) * n if n > method.capacity else 0.0
    if isinstance(method, TOVA):
        return each * n if n > method.capacity else 0.0
    if isinstance(method, H2O):
        return each * n * (n + 1) / 2
    if isinstance(method, BlockSparse):
        return each * math.ceil(n / method.size) ** 2 / 2
    return 0.0


def decode_index(method: Method, sizes: Sizes, n: int) -> float:
    """FLOPs for choosing keys for a token that sees n tokens."""
    if isinstance(method, Combined):
        return decode_index(method.second, sizes, n)
    if isinstance(method, Quest):
        past = (n - 1) // method.page
        return 4.0 * sizes.layers * sizes.heads * sizes.width * past if past > method.budget // method.page else 0.0
    return 0.0


def decode_pages(method: Method, sizes: Sizes, n: int) -> float:
    """Number of page-bound entries read by a token that sees n tokens."""
    if isinstance(method, Combined):
        return decode_pages(method.second, sizes, n)
    return decode_index(method, sizes, n) * 2 * sizes.kv_heads / (4 * sizes.heads)
