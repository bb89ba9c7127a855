"""Scaling of published networks to other widths, for comparisons of models of equal size or cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regard.contract import Unsupported

if TYPE_CHECKING:
    from regard.models.vision.backbone import Backbone
    from regard.models.vision.segmentation import Segmenter

STEP = 1.01
"""Ratio of successive scale factors."""
REACH = 140
"""Number of steps up and down: factors from a quarter to four."""


def scaled_widths(backbone: type[Backbone | Segmenter], config: Any) -> list[dict[str, Any]]:
    """Return options of a backbone or segmenter with widths scaled from 1/4 to 4, ascending; factor 1 keeps its own.

    Depths and numbers of heads stay the same; a width stays a multiple of the number given in `Backbone.scales`.

    Raises:
        Unsupported: for a backbone whose widths are fixed.
    """
    if not backbone.scales:
        raise Unsupported(
            f"another width of a {backbone.__name__}", supported="backbones that say what their widths are"
        )
    own = {name: getattr(config, name) for name in backbone.scales}
    found: list[dict[str, Any]] = []
    for power in range(-REACH, REACH + 1):
        options = (
            own
            if not power
            else {
                name: _scaled(value, STEP**power, _multiples(backbone.scales[name], config))
                for name, value in own.items()
            }
        )
        if options not in found:
            found.append(options)
    return found


def _multiples(said: str | int, config: Any) -> int | tuple[int, ...]:
    """Return what a width is a multiple of: a number, or twice the number of heads, so that a head's width is even."""
    if isinstance(said, int):
        return said
    heads = getattr(config, said)
    return tuple(2 * each for each in heads) if isinstance(heads, tuple) else 2 * heads


def _scaled(value: Any, factor: float, multiples: int | tuple[int, ...]) -> Any:
    if isinstance(value, tuple):
        each = multiples if isinstance(multiples, tuple) else (multiples,) * len(value)
        return tuple(_scaled(one, factor, multiple) for one, multiple in zip(value, each, strict=True))
    assert isinstance(multiples, int)
    return max(1, round(value * factor / multiples)) * multiples
