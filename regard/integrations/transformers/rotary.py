"""Rotary positions of transformers models, found by trial: how queries and keys rotate, and where angles come from."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.ragged import values_known
from regard.integrations.heads import Rotation
from regard.integrations.masks import Visible

ANGLES = "position_embeddings"
"""The argument of attention modules that holds the cosines and sines of their tokens."""
MOVING = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the length of the sequence."""


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of a model, for a module that leaves the rotation to its mechanism.

    Attributes:
        apply: the model's own function of (q, k, cos, sin).
        embedding: the model's module that computes cosines and sines from positions.
        counts: whether the same position has the same angles in every call.
    """

    apply: Callable[..., tuple[Tensor, Tensor]]
    embedding: nn.Module
    counts: bool

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the first features of `x` (B, H, N, D), as many as there are angles."""
        width = cos.shape[-1]
        part = x[..., :width]
        turned, _ = self.apply(part, part[:, :0], cos, sin)
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)

    def by_rank(self, x: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of ranks, by the model's own embedding, in the dtype of `x`."""
        cos, sin = self.embedding(x, ranks)
        return cos, sin

    def rotation(self, angles: tuple[Tensor, Tensor], refusal: str = "") -> Rotation:
        """The rotation of a call.

        Args:
            refusal: reason why its positions are not ranks; "" where they are.
        """
        cos, sin = angles
        return Rotation(self.turn, cos, sin, None if refusal else self.by_rank, refusal)


def find_rotary(
    model: nn.Module, path: str, module: Any, heads_of: Callable[..., Any], *, known: bool = False
) -> Rotary | None:
    """Find how a module rotates queries and keys; None where the rotation cannot be left out and done elsewhere.

    The module is called twice on three random tokens, with angles of 0 and with others: :meth:`Rotary.turn` must turn
    the first queries and keys into the second.

    Args:
        heads_of: calls the module with these arguments and returns the queries and keys with which it attends.
        known: whether a config says that the rotation was found before. It is not looked for again, since the weights
            of a model that is being loaded may not be there yet.
    """
    home = sys.modules[type(module).__module__]
    apply = getattr(home, "apply_rotary_pos_emb", None)
    embedding = _embedding_around(model, path)
    if apply is None or embedding is None or ANGLES not in inspect.signature(module.forward).parameters:
        return None
    kind = (getattr(module.config, "rope_parameters", None) or {}).get("rope_type", "default")
    rotary = Rotary(apply, embedding, kind not in MOVING)
    some = some_parameter(model, module)
    if known or some.is_meta:
        return rotary
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, module.config.hidden_size, generator=generator).to(some)
    try:
        with torch.no_grad():
            angles = embedding(x, torch.tensor([[1, 4, 6]], device=some.device))
            turned = heads_of(module, x, angles)
            plain = heads_of(module, x, without_turn(angles))
            found = [rotary.turn(y, *angles) for y in plain]
    except (TypeError, ValueError, RuntimeError, AttributeError):  # a module with another calling convention
        return None
    alike = all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(found, turned, strict=True))
    moved = not torch.equal(plain[0], turned[0])
    return rotary if alike and moved else None


def some_parameter(model: nn.Module, module: nn.Module) -> Tensor:
    """A parameter in floating point of a module; of the model around it if the module has none, because it is quantized."""
    parameters = itertools.chain(module.parameters(), model.parameters())
    return next(parameter for parameter in parameters if parameter.is_floating_point())


def without_turn(angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines that rotate nothing."""
    cos, sin = angles
    return torch.ones_like(cos), torch.zeros_like(sin)


def count_positions(
    positions: Tensor | None, visible: Visible, length: Tensor | None, shift: Tensor | None, n: int
) -> tuple[str, Tensor | None]:
    """Check that the positions of new tokens are their ranks plus an offset per row. Returns the reason why not, or "",
    and the offsets.

    Args:
        positions: positions (B or 1, N).
        length: number of earlier tokens in each row; None at the start.
        shift: offsets (B,) of the earlier tokens; None at the start.
    """
    if positions is None:
        return "a mechanism that places keys itself in a model that tells no positions", None
    if not values_known(positions):
        return "", shift
    device = positions.device
    valid = torch.ones(1, n, dtype=torch.bool, device=device) if visible.keys is None else visible.keys
    ranks = valid.cumsum(-1) - 1 + (0 if length is None else length[:, None])
    off = positions - ranks
    first = off.gather(1, valid.int().argmax(-1, keepdim=True).expand(off.shape[0], 1))
    told = valid.any(-1, keepdim=True)
    known = first if shift is None else torch.where(told, first, shift[:, None])
    same = ((off == known) | ~valid).all() and (shift is None or bool(((known[:, 0] == shift) | ~told[:, 0]).all()))
    if not bool(same):
        return "positions that do not count tokens, with a mechanism that places keys itself", None
    return "", known[:, 0]


def _embedding_around(model: nn.Module, path: str) -> nn.Module | None:
    """The rotary embedding of the model, or of the part of it, that contains a module."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        found = getattr(model.get_submodule(".".join(parts[:end])), "rotary_emb", None)
        if isinstance(found, nn.Module):
            return found
    return None


__all__ = ["ANGLES", "Rotary", "count_positions", "find_rotary", "without_turn"]
