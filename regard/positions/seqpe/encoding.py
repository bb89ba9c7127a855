"""The base of the schemes: locating tokens, encoding their positions, and the regularizers in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Loss, Unsupported, at_least, one_of
from regard.positions.protocol import Positions, check_positions, locate
from regard.positions.seqpe.definition import DIRECTIONS, DigitEncoder, closest_loss, transfer_loss

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


PROJECTIONS = ("single", "layers", "none")


PARTS = ("whole", "encoder", "layer")


MIXES = {1: (0.4, 0.0, 0.25), 2: (0.3, 0.5, 0.2)}
"""How candidates are drawn, for one axis and for more (the paper's runs on text and images): the share of pivots with
hard negatives, the share of pivots with only uniform candidates, and the share of hard negatives among the former's
candidates. The remaining pivots have candidates from a window."""


class SequentialEncoding(Positions):
    """The base class of sequential position encodings: the encoder and its losses.

    Args:
        width: width of the vectors.
        heads: number of parts of the vectors whose similarities are transferred separately.
        max_length: P_max; 10,000 when None. On n axes, each axis has the n-th root of it, rounded down.
        axes: n; with more than one axis, positions are places on the `grid` of the call.
        encoder_dim, encoder_layers, encoder_heads: sizes of the encoder; see :class:`DigitEncoder`.
        base, direction, mask_padding, pad, final_norm, temperature, dropout: as for :class:`DigitEncoder`.
        interpolation: divisor of positions, where the vectors of fractional positions are interpolated; 1 for none.
        pivots, candidates: numbers of pivots and of candidates in ``position_contrast``; no pivots disable this loss.
        offsets: number m of offsets in ``position_transfer``; 0 disables this loss.
        window: minimum length of a window of candidates (its root on each of two axes).
        beta: weight of the student's gradient in ``position_transfer``, 0 to 1: with 1 the block of the call learns
            nothing.
        shift: share of the training calls whose block is moved to a random start.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        max_length: int | None = None,
        axes: int = 1,
        encoder_dim: int = 64,
        encoder_layers: int = 2,
        encoder_heads: int | None = None,
        base: int = 10,
        direction: str = "causal",
        mask_padding: bool = False,
        pad: int = 0,
        final_norm: bool = True,
        temperature: float = 1.0,
        dropout: float = 0.1,
        interpolation: float = 1.0,
        pivots: int = 32,
        candidates: int = 32,
        offsets: int = 32,
        window: int = 256,
        beta: float = 1.0,
        shift: float = 0.1,
    ) -> None:
        super().__init__()
        max_length = 10_000 if max_length is None else max_length
        for name, value, low in (
            ("max_length", max_length, 1),
            ("axes", axes, 1),
            ("encoder_layers", encoder_layers, 1),
            ("base", base, 2),
            ("interpolation", interpolation, 1.0),
            ("pivots", pivots, 0),
            ("candidates", candidates, 1),
            ("offsets", offsets, 0),
            ("window", window, 1),
        ):
            at_least(name, value, low)
        one_of("direction", direction, DIRECTIONS)
        for name, share in (("beta", beta), ("shift", shift)):
            if not 0 <= share <= 1:
                raise Unsupported(f"{name}={share}", supported="0 to 1", nearest=f"{name}={float(share > 1)}")
        if not 0 <= dropout < 1:
            raise Unsupported(f"dropout={dropout}", supported="0 <= dropout < 1", nearest="dropout=0.0")
        if not temperature > 0:
            raise Unsupported(f"temperature={temperature}", supported="temperature > 0", nearest="temperature=1.0")
        if not 0 <= pad < base:
            raise Unsupported(f"pad={pad} in base {base}", supported=f"a digit, 0 to {base - 1}", nearest="pad=0")
        self.axes, self.heads, self.interpolation, self.window = axes, heads, interpolation, window
        self.pivots, self.candidates, self.offsets = pivots, candidates, offsets
        self.beta, self.shift = beta, shift
        self.bound = _root(max_length, axes)
        self.encoder = DigitEncoder(
            bound=self.bound,
            width=width,
            axes=axes,
            dim=encoder_dim,
            layers=encoder_layers,
            heads=encoder_heads,
            base=base,
            direction=direction,
            mask_padding=mask_padding,
            pad=pad,
            final_norm=final_norm,
            temperature=temperature,
            dropout=dropout,
        )

    def locate(
        self, positions: Int[Tensor, "#b n"], grid: tuple[int, ...] | None
    ) -> Int[Tensor, "#b n"] | Int[Tensor, "#b n axes"]:
        """Return positions on a sequence as they are, or the coordinates of positions on a grid numbered row by row.

        Raises:
            Unsupported: for a grid with another number of axes.
        """
        return positions if self.axes == 1 else locate(self.name, positions, grid, self.axes)

    def vectors(
        self, positions: Int[Tensor, "*b"] | Int[Tensor, "*b axes"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*b width"]:
        """Return E(p) for positions (...) with one axis, or (..., axes) with several.

        Raises:
            Unsupported: for positions outside 0 ... P_max - 1 on an axis (not checked while compiling).
        """
        located = positions[..., None] if self.axes == 1 else positions
        if not torch.compiler.is_compiling() and located.numel():
            first, last = (int(p) for p in located.aminmax())
            reach = int((self.bound - 1) * self.interpolation)
            if first < 0 or last > reach:
                each = "" if self.axes == 1 else f" on each of {self.axes} axes"
                raise Unsupported(
                    f"position {last if first >= 0 else first} of {self.name}",
                    supported=f"0 to {reach}{each} (max_length={self.bound**self.axes})",
                    nearest=f"max_length={(last + 1) ** self.axes}" if first >= 0 else "position 0",
                )
        flat = located.reshape(-1, self.axes)
        if self.interpolation == 1:
            found = self.encoder(flat, generator)
        else:
            found = self._between(flat / self.interpolation, generator)
        return found.view(*located.shape[:-1], found.shape[-1])

    def _between(self, places: Float[Tensor, "p axes"], generator: torch.Generator | None) -> Float[Tensor, "p width"]:
        """Interpolate the vectors of fractional positions from those of the surrounding integer positions."""
        low = places.floor()
        total: Tensor | float = 0.0
        for corner in torch.cartesian_prod(*[torch.arange(2)] * self.axes).view(-1, self.axes).to(places.device):
            weight = torch.where(corner == 1, places - low, 1 - places + low).prod(-1, keepdim=True)
            at = (low.long() + corner).clamp(max=self.bound - 1)
            total = total + weight.to(self.encoder.token.dtype) * self.encoder(at, generator)
        assert isinstance(total, Tensor)
        return total

    def encode(
        self, positions: Int[Tensor, "*b"] | Int[Tensor, "*b axes"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*b width"]:
        """Return the tensor that `embed` takes instead of positions: :meth:`project` of :meth:`vectors`."""
        return self.project(self.vectors(positions, generator))

    def project(self, e: Float[Tensor, "*b width"]) -> Float[Tensor, "*b width2"]:
        """Return what layers read of vectors E(p); by default the vectors themselves."""
        return e

    def prepare(
        self,
        positions: Int[Tensor, "#b n"],
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
        *,
        movable: bool = True,
        before: Float[Tensor, "t width"] | None = None,
    ) -> tuple[Float[Tensor, "#b t+n width"], dict[str, Loss]]:
        """:meth:`encode` the positions of a call, and in training compute both losses.

        Args:
            movable: whether the block may be moved in training; False for explicit positions or a continued state.
            before: vectors that stand in for E(p) of tokens without a position, which come before the others.
        """
        self._check_encoder()
        check_positions(positions, positions.shape[0], positions.shape[1])
        located = self.locate(positions, grid)

        def encoded() -> Tensor:
            e = self.vectors(located, generator)
            return self.project(e if before is None else torch.cat([before.expand(e.shape[0], -1, -1), e], 1))

        if not self.training:
            return encoded(), {}
        sides = (positions.shape[1],) if self.axes == 1 else tuple(grid or ())
        moved = None
        if movable and self.shift:
            start, moved = self.moved(sides, generator)
            located = located + (start[0] if self.axes == 1 else start)
        return encoded(), self.regularize(sides, generator, moved)

    def _check_encoder(self) -> None:
        if self.shared:
            raise Unsupported(
                f"a layer of a model with {self.name} positions alone",
                supported="a call of the model, which encodes positions once for all layers",
                nearest=f"create_layer(..., positions={self.name!r})",
            )

    def _encoded(self, positions: Tensor, batch: int, n: int) -> Float[Tensor, "#b n width"]:
        if positions.is_floating_point():
            return positions
        check_positions(positions if positions.ndim == 2 else positions[..., 0], batch, n)
        return self.encode(positions)

    def moved(
        self, sides: Sequence[int], generator: torch.Generator | None
    ) -> tuple[Int[Tensor, " axes"], Bool[Tensor, ""]]:
        """Draw how far the block of a training call is moved, and whether it is moved at all."""
        device = self.encoder.token.device
        draw = torch.rand(1 + self.axes, generator=generator, device=device, dtype=torch.float64)
        room = torch.tensor([max(self.bound - side, 0) for side in sides], device=device)
        moves = draw[0] < self.shift
        return torch.where(moves, (draw[1:] * (room + 1)).long().clamp(max=room), 0), moves

    def regularize(
        self, sides: Sequence[int], generator: torch.Generator | None = None, moved: Bool[Tensor, ""] | None = None
    ) -> dict[str, Loss]:
        """Compute both losses, each (sum, count).

        Args:
            sides: sides of the call's block: (N,), or those of its grid.
            moved: whether the call's block was moved; the transfer loss is then 0.
        """
        losses: dict[str, Loss] = {}
        if self.pivots:
            losses["position_contrast"] = self.contrast(*self.draw_candidates(generator), generator)
        starts = [-(-side // 4) for side in sides[:1]] + [0 for _ in sides[1:]]
        room = [self.bound - side - start for side, start in zip(sides, starts, strict=True)]
        if self.offsets and min(room) >= 0 and math.prod(sides):
            device = self.encoder.token.device
            draw = torch.rand(self.axes, generator=generator, device=device, dtype=torch.float64)
            span = torch.tensor(room, device=device)
            start = torch.tensor(starts, device=device) + (draw * (span + 1)).long().clamp(max=span)
            total = math.prod(sides)
            chosen = torch.randperm(total, generator=generator, device=device)[: self.offsets]
            block = torch.stack(torch.unravel_index(chosen, tuple(sides)), -1)
            loss = self.transfer(block, block + start, generator)
            kept = torch.ones_like(loss) if moved is None else (~moved).to(loss.dtype)
            losses["position_transfer"] = (loss * kept, kept)
        return losses

    def contrast(
        self,
        pivots: Int[Tensor, "p axes"],
        candidates: Int[Tensor, "p c axes"],
        generator: torch.Generator | None = None,
    ) -> Loss:
        """Return the cross entropy of the closest candidate, summed over pivots, and the number of pivots."""
        distances = (candidates - pivots[:, None]).square().sum(-1)
        same = (candidates[:, :, None] == candidates[:, None]).all(-1)
        repeated = same.tril(-1).any(-1)
        hidden = repeated | (distances == 0)
        together = torch.cat([pivots[:, None], candidates], 1).flatten(0, 1)
        once, places = together.unique(dim=0, return_inverse=True)
        e = self.encoder(once, generator)[places].unflatten(0, (pivots.shape[0], -1))
        return closest_loss(e[:, 0], e[:, 1:], distances, hidden)

    def draw_candidates(
        self, generator: torch.Generator | None
    ) -> tuple[Int[Tensor, "p axes"], Int[Tensor, "p c axes"]]:
        """Draw pivots, one in each of as many equal parts of the range, and candidates of the three kinds."""
        device, bound, axes, count = self.encoder.token.device, self.bound, self.axes, self.candidates

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device, dtype=torch.float64)

        part = (torch.arange(self.pivots, device=device) + draw(self.pivots)) / self.pivots * bound**axes
        pivots = torch.stack(torch.unravel_index(part.long().clamp(max=bound**axes - 1), (bound,) * axes), -1)
        uniform = (draw(self.pivots, count, axes) * bound).long()
        closest = (uniform - pivots[:, None]).square().sum(-1).amin(1, keepdim=True)
        edited = self.edit_digits(pivots[:, None].expand_as(uniform), generator)
        with_edits, uniform_alone, hard = MIXES[min(axes, 2)]
        usable = ((edited >= 0) & (edited < bound)).all(-1)
        usable &= (edited - pivots[:, None]).square().sum(-1) > closest
        usable &= torch.arange(count, device=device) < round(hard * count)
        side = min(max(_root(self.window, axes), math.ceil((5 * count) ** (1 / axes))), bound)
        start = (draw(self.pivots, 1, axes) * (bound - side + 1)).long()
        window = start + (draw(self.pivots, count, axes) * side).long()
        kind = draw(self.pivots, 1, 1)
        found = torch.where(usable[..., None] & (kind < with_edits), edited, uniform)
        return pivots, torch.where(kind < with_edits + uniform_alone, found, window)

    def edit_digits(
        self, positions: Int[Tensor, "... axes"], generator: torch.Generator | None
    ) -> Int[Tensor, "... axes"]:
        """Make one to three edits of each position's digits: a digit added, deleted or substituted, or two exchanged.

        The digits of all axes form one string, which is split at random afterwards. Results may be out of range.
        """
        base, count, shape = self.encoder.base, self.encoder.count, positions.shape[:-1]
        device = positions.device

        def draw(high: Tensor | int) -> Tensor:
            drawn = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
            return (drawn * high).long()

        def power(exponent: Tensor) -> Tensor:
            return torch.pow(torch.full_like(exponent, base), exponent)

        powers = base ** torch.arange(1, count * self.axes + 1, device=device)

        def length(number: Tensor) -> Tensor:
            return 1 + (number[..., None] >= powers).sum(-1)

        number = positions[..., 0]
        for axis in range(1, self.axes):
            number = number * power(length(positions[..., axis])) + positions[..., axis]
        times = draw(3)
        for i in range(3):
            digits = length(number)
            place, other, digit, kind = draw(digits), draw(digits), draw(base), draw(4)
            here, there = power(place), power(other)
            at, beside = number // here % base, number // there % base
            high, low = number // here, number % here
            added = (high * base + digit) * here + low
            deleted = number // (here * base) * here + low
            substituted = number + (digit - at) * here
            exchanged = number + (beside - at) * (here - there)
            added = torch.where(digits < count * self.axes, added, substituted)  # the string has its maximum length
            choices = torch.stack([added, deleted, substituted, exchanged], -1)
            edited = choices.gather(-1, kind[..., None])[..., 0]
            number = torch.where(i <= times, edited, number)
        found = []
        for _ in range(self.axes - 1):
            cut = power(1 + draw(count))
            found.append(number % cut)
            number = number // cut
        return torch.stack([number, *reversed(found)], -1)

    def transfer(
        self, block: Int[Tensor, "m axes"], elsewhere: Int[Tensor, "m axes"], generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """Return the divergence of similarities of offsets elsewhere from those of the same offsets in the block."""
        e = self.encoder(torch.cat([block, elsewhere]), generator)
        return transfer_loss(*e.chunk(2), heads=self.heads, beta=self.beta)

    def extra_repr(self) -> str:
        return f"axes={self.axes}, positions below {self.bound}"


def _root(number: int, axes: int) -> int:
    """Return the largest integer whose `axes`-th power does not exceed the number."""
    found = round(number ** (1 / axes))
    return found if found**axes <= number else found - 1
