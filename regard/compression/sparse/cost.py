"""Costs of dense and sparse inference: floating-point operations and bytes, from model sizes and measured sparsity.

P weights in W bytes, L layers, H query heads and G kv heads of width d, N tokens, I = N (N + 1) / 2 pairs, s sparsity::

    prefill   2 P N + 4 L H d I (1 - s) + index
    decode    2 P + 4 L H d n (1 - s) + index               a token with n in the cache
    bytes     W + 2 e L G d n (1 - s) + e pages             that a token reads, with e bytes a number of the cache

The index is the cost of choosing: 2 L H d A N for the weights of the last A queries (vertical-slash, FlexPrefill,
SnapKV once), 2 L H d (N / c)^2 / 2 for the means of blocks, 4 L H d n / page for Quest's bounds, which are two numbers
per feature, page and kv head.

Of a cache in 8 bits a token reads L G (2 d m + e (m + d blocks)) bytes for the m tokens in blocks, codes and steps, and
2 e L G d for each of the others.
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
from regard.compression.sparse.rounding import RoundedKeys
from regard.contract import Unsupported, an_instance
from regard.layers.quantized import QuantizedLinear
from regard.models import LanguageModel


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder.

    Attributes:
        weights: number of matrix entries that each token is multiplied by, including the output projection.
        weight_bytes: bytes of them all; of quantized layers those of their codes, scales and offsets.
        layers, heads, kv_heads, width: sizes of the attention.
        bytes: bytes per number of keys and values.
    """

    weights: int
    weight_bytes: int
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
        weights, weight_bytes = _weights_of(model)
        size = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)
        if isinstance(model, LanguageModel):
            own = model.config
            heads = own.num_heads
            return cls(
                weights,
                weight_bytes,
                own.num_layers or 1,
                heads,
                own.num_kv_heads or heads,
                own.head_dim or own.dim // heads,
                size,
            )
        config: Any = getattr(model, "config", None)
        if getattr(config, "num_attention_heads", None) is None or getattr(config, "num_hidden_layers", None) is None:
            raise Unsupported(f"the cost of {an_instance(model)}", supported="language models")
        heads = config.num_attention_heads
        return cls(
            weights,
            weight_bytes,
            config.num_hidden_layers,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            size,
        )


def _weights_of(model: nn.Module) -> tuple[int, int]:
    """Number and bytes of the matrix entries of a model, without tables that are only looked up."""
    outputs: Any = getattr(model, "get_output_embeddings", None)
    head = None if outputs is None else outputs()
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if isinstance(model, LanguageModel) and model.head is None:
        looked_up = set()
    elif head is not None and head not in quantized:
        looked_up.discard(id(head.weight))
    matrices = {id(p): p for p in model.parameters() if p.ndim == 2 and id(p) not in looked_up}.values()
    weights = sum(p.numel() for p in matrices) + sum(m.in_features * m.out_features for m in quantized)
    return weights, sum(x.nbytes for x in (*matrices, *(x for m in quantized for x in m.buffers())))


def prefill_flops(sizes: Sizes, n: int, sparsity: float = 0.0, index: float = 0.0) -> float:
    """FLOPs for a prompt of n tokens."""
    pairs = n * (n + 1) / 2 * (1 - sparsity)
    return 2.0 * sizes.weights * n + 4.0 * sizes.layers * sizes.heads * sizes.width * pairs + index


def decode_flops(sizes: Sizes, n: int, sparsity: float = 0.0, index: float = 0.0) -> float:
    """FLOPs for a token that sees n tokens, including itself."""
    return 2.0 * sizes.weights + 4.0 * sizes.layers * sizes.heads * sizes.width * n * (1 - sparsity) + index


def decode_bytes(method: Method, sizes: Sizes, n: int, sparsity: float = 0.0) -> float:
    """Bytes that a token reads which sees n tokens, including itself: the first after a prompt."""
    if isinstance(method, Combined):
        return decode_bytes(method.second, sizes, n, sparsity)
    lines = sizes.layers * sizes.kv_heads
    if isinstance(method, RoundedKeys):
        coded = max(n - 1 - method.window, 0)
        steps = lines * (coded + math.ceil(coded / method.block) * sizes.width)
        cache = 2.0 * lines * sizes.width * (coded + sizes.bytes * (n - coded)) + sizes.bytes * steps
    else:
        cache = sizes.bytes * (2.0 * lines * sizes.width * n * (1 - sparsity) + decode_pages(method, sizes, n))
    return sizes.weight_bytes + cache


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
