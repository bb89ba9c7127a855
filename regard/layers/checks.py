"""Argument checks that the shells make before computing anything."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regard.contract import Context, Mask, Pattern, State, Unsupported


def given_context(context: Context | None) -> Context:
    """The context of a call, or an empty one for None; anything else raises Unsupported."""
    if context is None:
        return Context()
    if not isinstance(context, Context):
        nearest = "Context(mask=...)" if isinstance(context, Mask | Tensor) else ""
        raise Unsupported(
            f"a context of type {type(context).__name__}", supported="regard.Context or None", nearest=nearest
        )
    return context


def check_state(state: Any, expected: type[State] | None, name: str) -> None:
    """Raise Unsupported for a state of the wrong class; None, at the start of a sequence, is fine."""
    if state is not None and (expected is None or not isinstance(state, expected)):
        raise Unsupported(
            f"{name} with a state of type {type(state).__name__}",
            supported="None" if expected is None else f"None or the state of a result, a {expected.__name__}",
        )


def check_tokens(x: Tensor, width: int, name: str = "x") -> None:
    """Raise Unsupported unless `x` holds floating-point tokens of `width` features."""
    if not isinstance(x, Tensor):
        raise Unsupported(f"{name} of type {type(x).__name__}", supported=f"a tensor of floats (B, N, {width})")
    if x.ndim != 3 or x.shape[-1] != width or not x.is_floating_point():
        raise Unsupported(f"{name} of dtype {x.dtype} and shape {tuple(x.shape)}", supported=f"floats (B, N, {width})")


def check_memory(pattern: Pattern, memory: Tensor | None, context: Context, state: Any) -> None:
    """Raise Unsupported if memory, its mask and positions, and the state do not fit together."""
    if memory is None and pattern.cross and state is None:
        raise Unsupported(f"{pattern.value} without memory", supported="memory, or a state from encode_memory")
    if memory is not None and not pattern.cross:
        raise Unsupported(f"memory in {pattern.value}", supported="cross patterns")
    if memory is not None and state is not None:
        raise Unsupported(
            "memory together with a state that has absorbed one", supported="encode_memory(memory, state=state)"
        )
    for what, given in (("mask", context.memory_mask), ("positions", context.memory_positions)):
        if memory is None and given is not None:
            raise Unsupported(f"memory_{what} without memory", supported=f"memory_{what}=None", nearest=what)
    check_memory_mask(context)


def check_memory_mask(context: Context) -> None:
    """Raise Unsupported if the memory's mask has `bias` or `blocks`, which belong to the query side."""
    mask = context.memory_mask
    if mask is not None and (mask.bias is not None or mask.blocks is not None):
        raise Unsupported("a memory mask with bias or blocks", supported="bias and blocks on mask, which has the pairs")


def check_repeatable(layers: nn.Module) -> None:
    """Raise Unsupported for layers that change themselves in forward, so that backward cannot recompute them."""
    for module in layers.modules():
        options = getattr(module, "config", None)
        for name in ("redraw", "redraw_every"):
            if getattr(options, name, 0):
                raise Unsupported(
                    f"{name}={getattr(options, name)} in layers that the backward pass computes again",
                    supported="layers that do not change themselves from call to call",
                    nearest=f"{name}=0",
                )
