"""How many tokens are removed at each block, and how that changes in training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from regard.contract import Unsupported, at_least

Removal = Callable[[int], int]
"""Returns how many of a given number of patches to remove."""


def quarters(depth: int) -> list[int]:
    """Blocks, from 0, at a quarter, half and three quarters of the depth: 3, 6 and 9 of 12."""
    return sorted({depth // 4, depth // 2, 3 * depth // 4})


def removals(
    depth: int,
    remove: int | Sequence[int] | tuple[int, float] = 0,
    keep: float | None = None,
    blocks: Sequence[int] | None = None,
) -> list[Removal]:
    """A :data:`Removal` for each of `depth` blocks; arguments as in :func:`regard.compression.tokens.reduce_tokens`.

    Raises:
        Unsupported: for both `remove` and `keep`, and for values out of range.
    """
    if keep is not None:
        if remove:
            raise Unsupported(f"remove={remove} with keep={keep}", supported="one of the two")
        _check_share(keep)
        if blocks is not None and not (_are_numbers(blocks) and all(isinstance(block, int) for block in blocks)):
            raise Unsupported(f"blocks={blocks!r}", supported="a list of whole numbers", nearest="blocks=[3,6,9]")
        chosen = quarters(depth) if blocks is None else list(blocks)
        if not all(0 <= block < depth for block in chosen):
            raise Unsupported(f"blocks={chosen} of a model with {depth}", supported=f"0 to {depth - 1}")
        return [functools.partial(_all_but, keep) if block in chosen else _none for block in range(depth)]
    if blocks is not None:
        raise Unsupported(f"blocks={blocks} without keep", supported="keep=..., or remove as a list")
    if not (_is_number(remove) and isinstance(remove, int)) and not _are_numbers(remove):
        raise Unsupported(
            f"remove={remove!r}", supported="a whole number, or a list with one for each block", nearest="remove=4"
        )
    if isinstance(remove, int):
        numbers = [remove] * depth
    elif len(remove) == 2 and isinstance(remove[1], float):
        most, inflection = remove
        if not -1 <= inflection <= 1:
            raise Unsupported(f"an inflection of {inflection}", supported="-1 to 1")
        first = int(most * (1 - inflection))
        numbers = [int(first + 2 * (most - first) * block / max(depth - 1, 1)) for block in range(depth)]
    else:
        numbers = [int(number) for number in remove]
    if len(numbers) != depth:
        raise Unsupported(f"remove with {len(numbers)} numbers for {depth} blocks", supported="one a block")
    for number in numbers:
        at_least("remove", number, 0)
    return [functools.partial(_at_most, number) for number in numbers]


def annealed_keep(step: int, *, begin: int, end: int, keep: float) -> float:
    """EViT's share in training (arXiv 2202.07800, section 4): 1 until `begin`, `keep` from `end` on, half a cosine between.

    ::

        reduction.change(keep=annealed_keep(step, begin=1000, end=5000, keep=0.7))
    """
    _check_share(keep)
    if not 0 <= begin <= end:
        raise Unsupported(f"begin={begin} and end={end}", supported="0 <= begin <= end")
    if step < begin:
        return 1.0
    if step >= end:
        return keep
    return keep + (1 - keep) * (1 + math.cos(math.pi * (step - begin) / (end - begin))) / 2


def _check_share(keep: float) -> None:
    if not _is_number(keep) or not 0 < keep <= 1:
        raise Unsupported(f"keep={keep!r}", supported="0 < keep <= 1", nearest="keep=0.7")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(values: object) -> bool:
    return isinstance(values, list | tuple) and all(map(_is_number, values))


def _none(patches: int) -> int:
    return 0


def _all_but(keep: float, patches: int) -> int:
    return patches - math.ceil(keep * patches)


def _at_most(number: int, patches: int) -> int:
    """Remove at most `number` patches, always keeping one."""
    return min(number, max(patches - 1, 0))
