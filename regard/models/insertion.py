"""Tokens that a mechanism inserts into the sequence (landmarks): added before the layers, removed after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.catalogue import get_mechanism
from regard.contract import Context, Role, Unsupported
from regard.core.ragged import Gathering, inner_mask

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from regard.models.layer_plan import Plan


@dataclass(frozen=True)
class Inserted:
    """A sequence with its inserted tokens, right-padded, and the context that goes with it."""

    ids: Int[Tensor, "b n2"]
    context: Context
    places: Int[Tensor, "b n"] | None = None
    """Indices of the sequence's own tokens; None when nothing was inserted."""

    def drop(self, x: Float[Tensor, "b n2 c"]) -> Float[Tensor, "b n c"]:
        """Keep only the output at the sequence's own tokens."""
        if self.places is None:
            return x
        return x.gather(1, self.places[..., None].expand(-1, -1, x.shape[-1]))


@dataclass(frozen=True)
class Insertion:
    """The token insertion that a plan needs.

    A card's ``prepare(ids, config) -> (ids, roles)`` must be a function of the prefix: what it inserts before a token
    does not depend on that token or on later ones. Tokens inserted after a token are read together with it, so that a
    sequence can be split anywhere.

    Attributes:
        prepare: the card's function; None when no mechanism of the plan inserts tokens.
        config: the config of the mechanism that inserts tokens.
        vocab_size: an inserted token of role r has the embedding ``vocab_size + r - 1``.
    """

    prepare: Callable[..., tuple[Tensor, Tensor]] | None
    config: Any
    vocab_size: int

    @classmethod
    def of_plan(cls, plan: Plan, vocab_size: int) -> Insertion:
        """Return the insertion of a plan's mechanisms; raises Unsupported when two of them differ."""
        found: list[tuple[Any, Any]] = []
        for name, options in plan:
            card = get_mechanism(name)
            if card.prepare is not None:
                names = {f.name for f in fields(card.config)} & options.keys()
                needed = (card.prepare, card.options(**{n: options[n] for n in names}))
                if needed not in found:
                    found.append(needed)
        if len(found) > 1:
            raise Unsupported("a plan with layers that insert different tokens", supported="the same options in each")
        prepare, config = found[0] if found else (None, None)
        return cls(prepare, config, vocab_size)

    @property
    def extra_tokens(self) -> int:
        """Number of embeddings needed beyond the vocabulary."""
        return 0 if self.prepare is None else len(Role) - 1

    def insert(
        self, ids: Int[Tensor, "b n"], past: Int[Tensor, " b"], new: Int[Tensor, " b"], context: Context
    ) -> Inserted:
        """Insert the tokens into right-padded ids.

        Args:
            past: number of tokens of each row that were read before, not counting inserted ones.
            new: number of valid tokens in each row of `ids`.
            context: the layers' context, without inserted tokens.
        """
        if self.prepare is None:
            return Inserted(ids, context)
        mask = context.mask
        if (
            context.positions is not None
            or context.roles is not None
            or (mask is not None and (mask.bias is not None or mask.blocks is not None))
        ):
            raise Unsupported(
                "positions, roles, a bias or a block mask together with inserted tokens",
                supported="padding and packing",
            )
        rows, n = ids.shape
        total = int((past + new).max()) if rows else 0
        if total == 0:
            return Inserted(ids, context)
        rank = torch.arange(n, device=ids.device)
        valid = rank < new[:, None]
        whole_rank = torch.where(valid, past[:, None] + rank, total)  # column `total` takes the padding
        whole = ids.new_zeros((rows, total + 1)).scatter(1, whole_rank, ids)[:, :total]
        prepared, roles = self.prepare(whole, self.config)
        roles = roles.expand_as(prepared)
        prepared = torch.where(roles == int(Role.TOKEN), prepared, self.vocab_size - 1 + roles)
        places = (roles == int(Role.TOKEN)).nonzero()[:, 1].view(rows, total)
        # Reading r tokens of a row reads its prepared tokens before borders[r].
        borders = F.pad(places[:, 1:], (1, 0))
        borders = F.pad(borders, (0, 1), value=prepared.shape[1])
        start, end = (borders.gather(1, read[:, None]) for read in (past, past + new))
        lengths = (end - start).squeeze(1)
        longest = int(lengths.max())
        column = torch.arange(longest, device=ids.device)
        inside = column < lengths[:, None]
        index = torch.where(inside, start + column, 0)
        padded = int(lengths.min()) < longest
        kept_places = torch.where(valid, places.gather(1, whole_rank.clamp(max=total - 1)) - start, 0)
        return Inserted(
            ids=torch.where(inside, prepared.gather(1, index), 0),
            context=context.replace(
                mask=inner_mask(Gathering(rows, longest, rows, longest, ids.device, lengths, inside))
                if padded
                else None,
                roles=torch.where(inside, roles.gather(1, index), int(Role.TOKEN)),
            ),
            places=kept_places,
        )
