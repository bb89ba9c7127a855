"""Position schemes in a model: choosing those of its input and its layers, and applying the input's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.catalogue import get_mechanism
from regard.contract import Context, Kind, Loss, Mechanism, Unsupported, closest
from regard.models.layer_plan import Plan, layer_accepts, mixing_card
from regard.positions import Positions, create_positions, list_positions, why_refused

if TYPE_CHECKING:
    from jaxtyping import Float, Int

EMBEDDED_POSITIONS = ("sinusoidal", "learned", "seqpe")
"""Schemes that act on the model's input instead of inside its layers."""

SHARED_POSITIONS = ("seqpe_mul", "seqpe_add", "seqpe_scalar")
"""Schemes that act inside the layers, through position vectors that the model computes once for all layers."""

GATES = {"log_decay", "beta"}
"""Mechanism inputs that make a recurrence aware of the order of its tokens."""


def layer_positions(card: Mechanism, asked: str) -> str:
    """Return the position scheme inside a layer, given the scheme requested for the model.

    ``auto`` is rotary where the mechanism accepts it, and none for recurrences with gates (which are aware of the order
    of their tokens) and for layers with a structure of their own; a card may name another default. With a scheme for
    the model's input, layers have none.
    """
    if asked in EMBEDDED_POSITIONS:
        return "none"
    if asked != "auto":
        return asked
    if "positions" in card.layer_defaults:
        return card.layer_defaults["positions"] or "none"
    rotates = layer_accepts(card, "positions") and "rotary" in card.accepts_positions and not _knows_order(card)
    return "rotary" if rotates else "none"


def input_positions(plan: Plan, asked: str) -> str:
    """Return the position scheme of a model's input, given the scheme requested for the model.

    ``auto`` adds sinusoidal positions if otherwise no layer of the plan would be aware of the order of its tokens.
    """
    if asked not in ("auto", *list_positions()):
        supported = ("auto", *list_positions())
        raise Unsupported(f"positions {asked!r}", supported=", ".join(supported), nearest=closest(asked, supported))
    cards = [(mixing_card(name, options), options.get("positions", asked)) for name, options in plan]
    for card, own in cards:
        if own in EMBEDDED_POSITIONS and own != asked:
            raise Unsupported(
                f"{own} positions for one layer ({card.name})",
                supported=f"{', '.join(EMBEDDED_POSITIONS)} for the whole model, since they act on its input",
                nearest=f"positions={own!r} in the model's config",
            )
        if own in EMBEDDED_POSITIONS and own not in card.accepts_positions:
            raise Unsupported(
                f"{own} positions with {card.name}{why_refused(card, own)}",
                supported=", ".join(card.accepts_positions),
                nearest="auto",
            )
    if asked in EMBEDDED_POSITIONS:
        return asked
    if asked in SHARED_POSITIONS:
        used = [layer_accepts(get_mechanism(name), "positions") and "positions" not in own for name, own in plan]
        return asked if any(used) else "none"
    if asked != "auto":
        return "none"
    blind = all(not _knows_order(card) and layer_positions(card, own) == "none" for card, own in cards)
    explicit = any(own == "none" for _, own in cards)
    accepted = all("sinusoidal" in card.accepts_positions for card, _ in cards)
    return "sinusoidal" if blind and accepted and not explicit else "none"


def _knows_order(card: Mechanism) -> bool:
    return card.kind is Kind.MIXER or bool(GATES & {name.rstrip("?") for name in card.inputs})


def make_input_positions(name: str, config: Any) -> Positions | None:
    """Create the module that adds positions to a model's input, or encodes them for all layers; None if not needed."""
    if name not in (*EMBEDDED_POSITIONS, *SHARED_POSITIONS):
        return None
    options = dict(config.position_options) if name == config.positions else {}
    positions = create_positions(
        name,
        dim=config.dim,
        heads=config.num_heads,
        head_dim=config.head_dim or config.dim // config.num_heads,
        kv_heads=config.num_kv_heads,
        max_length=config.max_length,
        **options,
        **({"part": "encoder"} if name in SHARED_POSITIONS else {}),
    )
    if name == "learned":
        for table in positions.parameters():
            table._no_weight_decay = True  # type: ignore[attr-defined]
    return positions


def place_input(
    scheme: Positions | None,
    x: Float[Tensor, "b n c"],
    where: Int[Tensor, "#b n"],
    context: Context,
    *,
    movable: bool,
    before: Float[Tensor, "t width"] | None = None,
) -> tuple[Float[Tensor, "b n c"], Context, dict[str, Loss]]:
    """Add positions to a model's right-padded input; returns it with the layers' context and the scheme's losses.

    Args:
        movable: whether `where` holds the ranks of whole sequences, which a scheme may shift in training.
        before: for a scheme of `SHARED_POSITIONS`, the position vectors of tokens without a position, which the model
            will put before `x`.
    """
    losses: dict[str, Loss] = {}
    if scheme is None:
        return x, context, losses
    if scheme.prepare is not None:
        where = torch.arange(x.shape[1], device=x.device)[None] if movable else where  # one row for all
        where, losses = scheme.prepare(where, context.grid, context.generator, movable=movable, before=before)
    if scheme.embed is None:
        return x, context.replace(position_vectors=where), losses
    return scheme.embed(x, where), context, losses
