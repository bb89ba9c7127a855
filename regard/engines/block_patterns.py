"""Block masks for sparse attention, which say which blocks of keys a block of queries may see.

Patterns are square, over the ranks of the keys (queries of causal-self count from M - N); a causal mechanism also hides
later keys inside visible blocks. Every block sees itself, so that no query loses all its keys to the pattern.
"""

from __future__ import annotations

import math

import torch

from regard.contract import BlockMask, at_least


def butterfly_blocks(
    length: int,
    block_size: int,
    *,
    causal: bool = False,
    global_blocks: int = 1,
    device: torch.device | str | None = None,
) -> BlockMask:
    """The flat block butterfly with a global part (arXiv 2205.14135, section 3.3): about log2(n) of n blocks per row.

    Block i of n = ceil(length / block_size) sees itself and the blocks i XOR 2^t, so that ceil(log2 n) layers connect
    every pair. With causality, this would only connect i to blocks j whose bits are among those of i; the causal
    pattern uses the blocks i - 2^t instead, with which the same number of layers connects every pair j <= i. In both
    patterns, whether two blocks see each other does not depend on the length.

    Args:
        causal: whether the pattern is for causal-self.
        global_blocks: how many of the first blocks see every block and are seen by every block.

    Raises:
        Unsupported: for sizes that are too small.
    """
    i, j = _grid(length, block_size, device)
    at_least("global_blocks", global_blocks, 0)
    apart = i - j if causal else i ^ j
    visible = (apart >= 0) & ((apart & (apart - 1)) == 0)  # 0 and powers of two
    return BlockMask((visible | (i < global_blocks) | (j < global_blocks))[None, None], block_size)


def local_global_blocks(
    length: int,
    block_size: int,
    *,
    neighbours: int = 1,
    global_blocks: int = 1,
    device: torch.device | str | None = None,
) -> BlockMask:
    """Each block sees `neighbours` blocks on either side; the first `global_blocks` see and are seen by every block.

    Raises:
        Unsupported: for sizes that are too small.
    """
    i, j = _grid(length, block_size, device)
    at_least("neighbours", neighbours, 0)
    at_least("global_blocks", global_blocks, 0)
    visible = ((i - j).abs() <= neighbours) | (i < global_blocks) | (j < global_blocks)
    return BlockMask(visible[None, None], block_size)


def random_blocks(
    length: int,
    block_size: int,
    *,
    others: int = 2,
    heads: int = 1,
    causal: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> BlockMask:
    """Each block sees itself and `others` blocks drawn without replacement, or all if there are fewer.

    Args:
        heads: number of patterns to draw: 1 for all heads, or one per head.
        causal: whether to draw from earlier blocks only.
        generator: random generator, on the CPU.

    Raises:
        Unsupported: for sizes that are too small.
    """
    i, j = _grid(length, block_size, "cpu")
    at_least("others", others, 0)
    at_least("heads", heads, 1)
    draws = torch.rand(heads, i.shape[0], j.shape[1], generator=generator, dtype=torch.float32, device="cpu")
    excluded = (j > i) if causal else torch.zeros_like(i == j)
    draws = draws.masked_fill(excluded, -1.0).masked_fill(i == j, 2.0)  # ranks the block itself first
    place = draws.argsort(-1, descending=True).argsort(-1)
    return BlockMask(((place <= others) & ~excluded)[None].to(device or "cpu"), block_size)


def _grid(length: int, block_size: int, device: torch.device | str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of query blocks (n, 1) and key blocks (1, n)."""
    at_least("length", length, 0)
    at_least("block_size", block_size, 1)
    block = torch.arange(math.ceil(length / block_size), device=device)
    return block[:, None], block[None]
