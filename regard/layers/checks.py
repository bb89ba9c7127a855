"""What the shells refuse before anything runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regard.contract import Context, Pattern, Unsupported


def check_tokens(x: Tensor, width: int, name: str = "x") -> None:
    """Raise Unsupported unless `x` holds tokens of `width` floats."""
    if x.ndim != 3 or x.shape[-1] != width or not x.is_floating_point():
        raise Unsupported(f"{name} of dtype {x.dtype} and shape {tuple(x.shape)}", supported=f"floats (B, N, {width})")


def check_memory(pattern: Pattern, memory: Tensor | None, context: Context, state: Any) -> None:
    """Raise Unsupported where memory, its mask and positions, and a state do not go together."""
    if memory is None and pattern.cross and state is None:
        raise Unsupported(f"{pattern.value} without memory", supported="memory, or a state from encode_memory")
    if memory is not None and not pattern.cross:
        raise Unsupported(f"memory in {pattern.value}", supported="cross patterns")
    if memory is not None and state is not None:
        raise Unsupported("memory beside a state that has absorbed one", supported="encode_memory(memory, state=state)")
    for what, given in (("mask", context.memory_mask), ("positions", context.memory_positions)):
        if memory is None and given is not None:
            raise Unsupported(f"memory_{what} without memory", supported=f"memory_{what}=None", nearest=what)
    check_memory_mask(context)


def check_memory_mask(context: Context) -> None:
    """Raise Unsupported for numbers of pairs on the memory's side."""
    mask = context.memory_mask
    if mask is not None and (mask.bias is not None or mask.blocks is not None):
        raise Unsupported("a memory mask with bias or blocks", supported="bias and blocks on mask, which has the pairs")
