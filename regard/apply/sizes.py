"""The sizes of a call, read from the shapes of its inputs and checked against the card and against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from regard.contract import Mechanism, Pattern, Unsupported, closest

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of a call's inputs."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call.

    Attributes:
        has_memory: whether the call has memory inputs (rather than only memory that a state has absorbed).
        batch: number of rows; None if only a state knows it.
        n, m: number of queries and of keys.
        heads: largest number of heads of any input; None if no input has heads.
        fewer_heads: whether some input has fewer heads than that.
        scale: the card's default scale.
    """

    has_memory: bool
    batch: int | None
    n: int
    m: int
    heads: int | None
    fewer_heads: bool
    scale: float


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Names and shapes of inputs, as a cache key."""
    return tuple([(name, tensor.shape) for name, tensor in tensors.items()])


def sizes_of(card: Mechanism, tensors: Mapping[str, Tensor], pattern: Pattern, continuing: bool) -> Sizes:
    """:func:`measure`, with a cache by shapes."""
    shapes = shapes_of(tensors)
    if torch.compiler.is_compiling():
        return measure(card, shapes, pattern, continuing)
    try:
        return _measured(card, shapes, pattern, continuing)
    except TypeError:  # symbolic sizes cannot be hashed
        return measure(card, shapes, pattern, continuing)


def measure(card: Mechanism, shapes: Shapes, pattern: Pattern, continuing: bool) -> Sizes:
    """The sizes of a call; raises Unsupported if inputs disagree with the card or with each other."""
    names = [name for name, _ in shapes]
    has_memory = _check_names(card, names, absorbed=pattern.cross and continuing)
    sizes = axis_sizes(card, shapes)
    m = sizes.get("m", sizes.get("n", 0))
    n = sizes.get("n", 1 if pattern.cross else m)  # without query inputs there is one output, or one per key
    if n != m and pattern is Pattern.NONCAUSAL_SELF:
        raise Unsupported(
            f"{card.name} in noncausal-self with N = {n} and M = {m}", supported="N = M", nearest="noncausal-cross"
        )
    if n != m and pattern is Pattern.CAUSAL_SELF and not continuing and not card.uneven:
        raise Unsupported(
            f"{card.name} in causal-self with N = {n} queries and M = {m} keys", supported="N = M", nearest="softmax"
        )
    heads = sizes.get("h")
    with_heads = [shape[card.axes[name].index("h")] for name, shape in shapes if "h" in card.axes[name]]
    return Sizes(
        has_memory=has_memory,
        batch=sizes.get("b"),
        n=n,
        m=m,
        heads=heads,
        fewer_heads=any(found != heads for found in with_heads),
        scale=default_scale(card, shapes),
    )


_measured = lru_cache(maxsize=1024)(measure)


def _check_names(card: Mechanism, names: list[str], *, absorbed: bool) -> bool:
    """Raise Unsupported for unknown or missing inputs; return whether the memory's inputs are present.

    Args:
        absorbed: whether a state may already hold the memory, so that its inputs may be missing.
    """
    for name in names:
        if name not in card.axes:
            raise Unsupported(
                f"{card.name}: input {name!r}", supported=", ".join(card.axes), nearest=closest(name, card.axes)
            )
    of_memory = card.memory_inputs
    has_memory = not of_memory or any(name in names for name in of_memory)
    missing = [n for n in card.inputs if not n.endswith("?") and n not in names]
    if not names:
        raise Unsupported(f"{card.name} without inputs", supported=", ".join(card.inputs))
    if missing and (has_memory or not absorbed):
        raise Unsupported(f"{card.name} without {', '.join(missing)}", supported=", ".join(card.inputs))
    return has_memory


def axis_sizes(card: Mechanism, shapes: Shapes) -> dict[str, int]:
    """The size of each axis by its letter; for heads, the largest size."""
    sizes: dict[str, int] = {}
    for name, shape in shapes:
        axes = card.axes[name]
        if len(shape) != len(axes):
            raise Unsupported(f"{card.name}: {name} of shape {tuple(shape)}", supported=f"axes ({', '.join(axes)})")
        for axis, size in zip(axes, shape, strict=True):
            known = sizes.setdefault(axis, size)
            if known == size:
                continue
            if axis != "h":
                raise Unsupported(
                    f"{card.name}: {name} of shape {tuple(shape)} has {axis} = {size}, another input {known}",
                    supported=", ".join(f"{n}: ({', '.join(card.axes[n])})" for n, _ in shapes),
                )
            big, small = max(size, known), min(size, known)
            if small == 0 or big % small:
                raise Unsupported(
                    f"{card.name}: {name} with {size} heads, but another input has {known}",
                    supported="a divisor of the other inputs' heads",
                )
            sizes["h"] = big
    if "g" in sizes and sizes.get("h", sizes["g"]) % max(sizes["g"], 1):
        raise Unsupported(
            f"{card.name}: {sizes['h']} heads over {sizes['g']} groups", supported="a multiple of the groups"
        )
    return sizes


def default_scale(card: Mechanism, shapes: Shapes) -> float:
    """The factor on the scores for calls that do not give one."""
    if not callable(card.default_scale) and card.default_scale != "rsqrt":
        return float(card.default_scale)
    widths = {name: shape[-1] for name, shape in shapes if shape}
    if callable(card.default_scale):
        return card.default_scale(widths)
    return max(widths.get("k", widths.get("q", 1)), 1) ** -0.5
