"""Rotary positions: queries and keys are rotated by their position (Su et al., arXiv 2104.09864, equation 34).

The first R features of a head form R/2 planes; plane i holds features i and i + R/2 (half-split pairing, as in GPT-NeoX
and Llama; the paper pairs 2i with 2i + 1, which is the same up to the order of the features). At position p it is
rotated by ``p * base^(-2i/R)``, so the product of a rotated query and a rotated key depends only on the difference of
positions. The other features are left unchanged.

On a grid, `axes` = 2 turns the first half of the R features by the row of a token and the second half by its column, each
like a head of R/2 features (the axial frequencies of Heo et al., arXiv 2403.13298, section 3.2, who take the column
first, and a base of 100, since rows and columns are fewer than tokens of a text). The product then depends only on the
differences of rows and of columns. A class token is not turned: it is at row 0 and column 0. What follows applies to
each axis.

For contexts longer than in training:

- `interpolation` = s divides positions (Chen et al., arXiv 2306.15595, equation 4). With `wavelengths` = (a, b) it does
  so by parts (Peng et al., arXiv 2309.00071, section 3.2): planes that turn once in a tokens or fewer keep their speed,
  those that need b or more are slowed by s, and the factor of those between is linear in their turns per token. Llama
  3.1 has s = 8, a = 2048 and b = 8192.
- `ntk` = s multiplies the base by ``s^(R/(R-2))``, which slows the slowest plane by s and does not change the fastest
  (the "NTK-aware" rule, Peng et al., arXiv 2309.00071, section 3.1).
- `trained_length` = T additionally makes the rule dynamic (same paper, section 3.3): nothing changes before position T,
  and from there on the base grows with the length l = p + 1 that a decoder has reached, with ``s l / T - (s - 1)`` in
  place of s.

A single dynamic base for all tokens would depend on the final length of the sequence: earlier outputs would change with
later tokens, and cached keys would be wrong. So here each token is rotated with the base of its own length l, as in
decoders that rotate keys before caching them. Beyond T, products then depend on more than the difference of positions.
If the length is known, `ntk` without `trained_length` keeps that property.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import Unsupported, at_least
from regard.core.precision import wide_dtype
from regard.engines.layers import rotary
from regard.positions.protocol import Positions, check_positions, locate

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Rotary(Positions):
    """Rotates queries and keys, each token by its absolute position.

    Args:
        head_dim: width D of a head; with several axes, a multiple of 2 * axes.
        base: the slowest plane rotates by one radian in about `base` tokens; 10,000 when None, or 100 with several axes.
        fraction: share of the features that are rotated, in (0, 1]; R is rounded down to a multiple of 2 * axes.
        interpolation: divisor s of positions; 1 for none.
        wavelengths: tokens (a, b) in which planes turn once, 0 < a < b, between which the interpolation sets in; None
            for all planes alike.
        ntk: factor s of NTK-aware scaling, by which the context grows; 1 for none.
        trained_length: T >= 1 for dynamic NTK-aware scaling; None for the same base at all positions.
        axes: number of axes of a position; with more than one, positions are places on the `grid` of the call, or
            coordinates (B, N, axes).
    """

    name = "rotary"

    def __init__(
        self,
        *,
        head_dim: int,
        base: float | None = None,
        fraction: float = 1.0,
        interpolation: float = 1.0,
        wavelengths: tuple[float, float] | None = None,
        ntk: float = 1.0,
        trained_length: int | None = None,
        axes: int = 1,
    ) -> None:
        super().__init__()
        at_least("axes", axes, 1)
        if base is None:
            base = 10_000.0 if axes == 1 else 100.0
        if base <= 1:
            raise Unsupported(f"base={base} of rotary positions", supported="base > 1", nearest="base=10000.0")
        if not 0 < fraction <= 1:
            raise Unsupported(f"fraction={fraction} of a head", supported="0 < fraction <= 1", nearest="fraction=1.0")
        at_least("interpolation", interpolation, 1.0)
        at_least("ntk", ntk, 1.0)
        if wavelengths is not None:
            _check_wavelengths(wavelengths, ntk != 1 or trained_length is not None)
        if trained_length is not None:
            at_least("trained_length", trained_length, 1)
        if axes > 1 and head_dim % (2 * axes):
            raise Unsupported(
                f"rotary positions of {axes} axes on heads of {head_dim}",
                supported=f"a head_dim that {2 * axes} divides",
                nearest=f"head_dim={-(-head_dim // (2 * axes)) * 2 * axes}",
            )
        # A product such as 0.7 * 20 is just below the intended integer.
        self.rotated = int(fraction * head_dim + 1e-9) // (2 * axes) * 2 * axes
        scaled = ntk != 1 or trained_length is not None
        fewest = (4 if scaled else 2) * axes
        if self.rotated < fewest:
            raise Unsupported(
                f"{self.rotated} rotated features (fraction={fraction} of head_dim={head_dim}"
                + (", with NTK-aware scaling)" if scaled else ")"),
                supported=f"at least {fewest}",
                nearest=f"head_dim={fewest}, fraction=1.0",
            )
        self.axes, self.turning = axes, self.rotated // axes
        self.head_dim, self.interpolation, self.wavelengths = head_dim, interpolation, wavelengths
        self.ntk, self.trained_length = ntk, trained_length
        static = ntk != 1 and trained_length is None
        self.base = base * ntk ** (self.turning / (self.turning - 2)) if static else base
        self._turns: Tensor | None = None

    @property
    def prepare(self) -> Callable[..., tuple[Tensor, dict[str, Any]]] | None:  # type: ignore[override]
        return None if self.axes == 1 else self._prepare

    def _prepare(
        self,
        positions: Int[Tensor, "#b n"] | Int[Tensor, "#b n axes"],
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
        *,
        movable: bool = True,
    ) -> tuple[Int[Tensor, "#b n axes"], dict[str, Any]]:
        """Locate positions on a grid, unless they are coordinates; there are no losses, and nothing is drawn."""
        if positions.ndim == 3:
            return positions, {}
        located = locate(self.name, positions, grid, self.axes)
        if grid is not None and not torch.compiler.is_compiling() and positions.shape[1] > math.prod(grid):
            raise Unsupported(
                f"rotary positions of {positions.shape[1]} tokens on a grid {grid}",
                supported=f"at most {math.prod(grid)} tokens, or their coordinates",
                nearest=f"Context(positions=...) of shape (B, {positions.shape[1]}, {self.axes})",
            )
        return located, {}

    def rotate(
        self, x: Float[Tensor, "b h n d"], positions: Int[Tensor, "#b n"] | Int[Tensor, "#b n axes"]
    ) -> Float[Tensor, "b h n d"]:
        """Rotate queries or keys by their positions, in at least float32; returned in the dtype of `x`.

        With several axes, positions are coordinates (B or 1, N, axes).
        """
        if x.shape[-1] != self.head_dim:
            raise Unsupported(f"rotary positions on heads of {x.shape[-1]}", supported=f"head_dim={self.head_dim}")
        if self.axes == 1:
            check_positions(positions, x.shape[0], x.shape[2])
            return self._turn(x, positions)
        if positions.ndim != 3 or positions.shape[2] != self.axes:
            raise Unsupported(
                f"positions of shape {tuple(positions.shape)} for rotary positions of {self.axes} axes",
                supported=f"coordinates (B, N, {self.axes})",
                nearest="axes=1",
            )
        check_positions(positions[..., 0], x.shape[0], x.shape[2])
        *parts, still = x.split([*[self.turning] * self.axes, self.head_dim - self.rotated], -1)
        turned = [self._turn(part, positions[..., axis]) for axis, part in enumerate(parts)]
        return torch.cat([*turned, still], -1)

    def _turn(self, x: Float[Tensor, "b h n r"], positions: Int[Tensor, "#b n"]) -> Float[Tensor, "b h n r"]:
        """Rotate the first `turning` features by positions on one axis."""
        if self.trained_length is None and self.wavelengths is None:
            return rotary(x, positions, rotated=self.turning, base=self.base, stretch=self.interpolation)
        dtype = wide_dtype(x)
        turn = self._angles(positions).to(dtype)[:, None]
        turning, still = x.split([self.turning, x.shape[-1] - self.turning], -1)
        first, second = turning.to(dtype).chunk(2, -1)
        cos, sin = turn.cos(), turn.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos, still], -1).to(x.dtype)

    def turns(self, count: int) -> Float[Tensor, "count rotated"]:
        """Return the cosines, then the sines, of the planes at positions 0 to `count` - 1; cached for the next call."""
        if self._turns is None or len(self._turns) != count:
            ones = torch.zeros(1, 1, count, self.head_dim, dtype=torch.float32, device="cpu")
            ones[..., : self.rotated // 2] = 1
            turned = self.rotate(ones, torch.arange(count, device="cpu")[None])[0, 0, :, : self.rotated].contiguous()
            if type(turned) is not Tensor:  # such as a fake tensor, without data
                return turned
            self._turns = turned
        return self._turns

    def _angles(self, positions: Int[Tensor, "#b n"]) -> Float[Tensor, "#b n planes"]:
        """Return the angles, modulo one turn, of planes that are not all slowed alike."""
        wide = torch.float32 if positions.device.type == "mps" else torch.float64
        plane = torch.arange(0, self.turning, 2, dtype=wide, device=positions.device)
        speed = self.base ** (-plane / self.turning) / (2 * math.pi)  # turns per token
        if self.wavelengths is None:
            length = (positions.to(wide) + 1) / (self.trained_length or 1)
            growth = (self.ntk * length - (self.ntk - 1)).clamp(min=1)
            # the base is raised to -2 i / R; its growth, raised to R / (R - 2) before, thus to -2 i / (R - 2)
            speed = speed / self.interpolation * growth[..., None] ** (-plane / (self.turning - 2))
        else:
            short, long = self.wavelengths
            kept = ((speed - 1 / long) / (1 / short - 1 / long)).clamp(0, 1)
            speed = speed * (kept + (1 - kept) / self.interpolation)
        turns = positions.to(wide)[..., None] * speed
        return (turns - turns.round()) * (2 * math.pi)

    def extra_repr(self) -> str:
        scaling = f"base={self.base:g}, interpolation={self.interpolation:g}"
        if self.wavelengths is not None:
            scaling += f", wavelengths={self.wavelengths}"
        if self.trained_length is not None:
            scaling += f", ntk={self.ntk:g}, trained_length={self.trained_length}"
        if self.axes > 1:
            scaling += f", axes={self.axes}"
        return f"head_dim={self.head_dim}, rotated={self.rotated}, {scaling}"


def _check_wavelengths(wavelengths: tuple[float, float], scaled: bool) -> None:
    if len(wavelengths) != 2 or not 0 < wavelengths[0] < wavelengths[1]:
        raise Unsupported(f"wavelengths={wavelengths} of rotary positions", supported="(a, b) with 0 < a < b")
    if scaled:
        raise Unsupported(
            f"wavelengths={wavelengths} with NTK-aware scaling",
            supported="interpolation by parts, or ntk and trained_length",
            nearest="ntk=1.0, trained_length=None",
        )
