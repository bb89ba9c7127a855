"""Position schemes, usable with every mechanism that accepts them: see :mod:`regard.positions.protocol`."""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

from regard.contract import ACTS_LIKE, TURNED_BEFORE, Mechanism, Unsupported, closest
from regard.positions.alibi import Alibi
from regard.positions.learned import Learned
from regard.positions.lrpe import Lrpe
from regard.positions.none import NoPositions
from regard.positions.protocol import Positions
from regard.positions.relative import Relative
from regard.positions.rotary import Rotary
from regard.positions.seqpe import Seqpe, SeqpeAdd, SeqpeMul, SeqpeScalar
from regard.positions.sinusoidal import Sinusoidal
from regard.positions.toeplitz import Toeplitz

__all__ = [
    "Alibi",
    "Learned",
    "Lrpe",
    "NoPositions",
    "Positions",
    "Relative",
    "Rotary",
    "Seqpe",
    "SeqpeAdd",
    "SeqpeMul",
    "SeqpeScalar",
    "Sinusoidal",
    "Toeplitz",
    "create_positions",
    "list_positions",
]

ALL = (
    NoPositions,
    Sinusoidal,
    Learned,
    Rotary,
    Lrpe,
    Alibi,
    Relative,
    Toeplitz,
    Seqpe,
    SeqpeMul,
    SeqpeAdd,
    SeqpeScalar,
)
SCHEMES: dict[str, type[Positions]] = {scheme.name: scheme for scheme in ALL}


def list_positions() -> list[str]:
    """Return the names of the position schemes."""
    return list(SCHEMES)


def create_positions(
    name: str,
    *,
    dim: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    max_length: int | None = None,
    **options: Any,
) -> Positions:
    """Create a position scheme by name.

    Args:
        name: one of :func:`list_positions`.
        dim: width of the model, for schemes that act on the input.
        heads: number of query heads, for schemes that act on scores.
        head_dim: width of a head, for schemes that rotate.
        kv_heads: number of key heads, if they are fewer.
        max_length: length of the longest sequence; required only by ``learned``. For ``seqpe``, one more than the last
            position.
        options: the scheme's own options.

    Raises:
        Unsupported: for an unknown name, an unknown option or a bad value.
    """
    if name not in SCHEMES:
        raise Unsupported(
            f"positions {name!r}", supported=", ".join(SCHEMES), nearest=closest(str(name), SCHEMES) or "rotary"
        )
    scheme = SCHEMES[name]
    sizes = {"dim": dim, "heads": heads, "head_dim": head_dim, "kv_heads": kv_heads, "max_length": max_length}
    accepted = _accepted(cast(Any, scheme))
    own = [option for option in accepted if option not in sizes]
    for option in options:
        if option not in own:
            raise Unsupported(
                f"option {option!r} of {name} positions",
                supported=", ".join(own) or "no options",
                nearest=closest(option, own),
            )
    return scheme(**{size: value for size, value in sizes.items() if size in accepted}, **options)


def why_refused(card: Mechanism, scheme: str) -> str:
    """Return, in parentheses, why a mechanism does not accept a position scheme; empty for an unknown scheme."""
    if scheme not in SCHEMES:
        return ""
    if scheme in TURNED_BEFORE and "rotate" in card.honours:
        return " (it rotates queries and keys itself)"
    adds = SCHEMES[scheme].bias is not None or "alibi" in ACTS_LIKE.get(scheme, ())
    if adds and "bias" not in card.honours:
        return " (it has no scores of pairs to add to)"
    return f" ({card.refused_positions})" if card.refused_positions else ""


@functools.cache
def _accepted(scheme: Any) -> tuple[str, ...]:
    """Return the names of a scheme's arguments, including those that it passes on to its base class."""
    found: dict[str, None] = {}
    for base in scheme.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base).parameters.values()
        found |= {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return tuple(found)
