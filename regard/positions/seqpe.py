r"""Sequential position encoding: a small transformer reads the digits of a position (Li et al., arXiv 2506.13277).

A position p below P_max is written in base b with k digits, zeros on the left, k being the number of digits of P_max - 1; a
position of n axes is written axis after axis, L = n k digits. The encoder E is

    h = Tok[digit] + Pos[place] (+ Axis[axis]),   then a vector CLS without a place, last
    h = h + attention(norm(h)),   h = h + W_2 gelu(W_1 norm(h))        (twice; causal: the last token sees all digits)
    E(p) = W_out norm(h_CLS) / temperature

so that any position below P_max has a vector, and close ones are written alike at the front. What becomes of it, with
``(e^q, e^k) = split(W E(p))``, has a name for each place:

================ ======================================= ==========================================================
scheme           paper's name                            effect
================ ======================================= ==========================================================
``seqpe``        input_add                               x + E(p), at the model's input
``seqpe_mul``    attn_mul (its choice for images)        q * e^q, k * e^k
``seqpe_add``    attn_add                                q + e^q, k + e^k
``seqpe_scalar`` attn_scalar (its choice for text)       scores (q k^T + s e^q (e^k)^T) / sqrt(D)
================ ======================================= ==========================================================

Scores are added by widening: ``sqrt(2) [q, sqrt(s) e^q]`` and ``[k, sqrt(s) e^k]``, on which a mechanism whose scale is
the inverse root of the width computes exactly these, and which a cache of keys can keep.

While training, two losses keep order among positions that the task has not seen (weights 0.1 in the models):

- ``position_contrast``: cross entropy over E(p) . E(c_j), the label being the candidate closest to p. Candidates are
  uniform, or in part edits of p's digits (where these are farther than the closest), or all from one window.
- ``position_transfer``: the similarities softmax(A A^T) of offsets O within the block of the call, A = E(O), are what
  those of the same offsets elsewhere, A' = E(s + O), learn from: KL both ways, mean over all elements, for each head.

In a share of the training calls (`shift`) the block is moved to a random start, and then nothing is transferred.

Deviations: one start for each call where the authors use several for parts of a batch; draws are in the process, from
the call's generator; a pivot for each of as many equal parts of the range instead of a shuffled pass; candidates that
are the pivot or a repetition get no weight instead of being drawn again; a class token is the host's affair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Loss, Unsupported, at_least, one_of
from regard.positions.protocol import Positions, check_positions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

DIRECTIONS = ("causal", "both")
PROJECTIONS = ("single", "layers", "none")
PARTS = ("whole", "encoder", "layer")
MIXES = {1: (0.4, 0.0, 0.25), 2: (0.3, 0.5, 0.2)}
"""Candidates of pivots with one axis, and with more: the share of pivots with hard negatives, of those that are
uniform throughout, and the part of hard negatives; the rest is drawn from windows. (The paper's runs of text and images.)"""


def to_digits(
    positions: Int[Tensor, "..."], count: int, base: int = 10, pad: int = 0
) -> tuple[Int[Tensor, "... count"], Bool[Tensor, "... count"]]:
    """Digits of positions, the most significant first, and which of them are written: the others are left padding.

    Zero is written with one digit.
    """
    powers = base ** torch.arange(count - 1, -1, -1, device=positions.device)
    digits = positions[..., None] // powers % base
    written = (positions[..., None] >= powers) | (powers == 1)
    return torch.where(written, digits, pad), written


def digit_count(bound: int, base: int = 10) -> int:
    """Digits of the largest position below `bound`."""
    count = 1
    while base**count < bound:
        count += 1
    return count


class DigitEncoder(nn.Module):
    """E: positions of n axes to vectors.

    Args:
        bound: positions below it, on every axis.
        width: of the vectors.
        axes: n.
        dim: width inside, D_e.
        layers: blocks.
        heads: of the attention over digits; dim / 64, at least 1, when None.
        base: of the digits.
        direction: ``causal`` attention over the digits, or ``both``.
        mask_padding: whether zeros on the left are hidden.
        pad: digit that stands for them.
        final_norm: whether there is a norm before the output projection.
        temperature: divides the vectors.
        dropout: after the attention's projection and the feed-forward, while training.
    """

    def __init__(
        self,
        *,
        bound: int,
        width: int,
        axes: int,
        dim: int,
        layers: int,
        heads: int | None,
        base: int,
        direction: str,
        mask_padding: bool,
        pad: int,
        final_norm: bool,
        temperature: float,
        dropout: float,
    ) -> None:
        super().__init__()
        heads = max(1, dim // 64) if heads is None else heads
        if dim < 1 or heads < 1 or dim % heads:
            raise Unsupported(
                f"seqpe with encoder_dim={dim} and encoder_heads={heads}", supported="a multiple of the heads"
            )
        self.bound, self.axes, self.base, self.pad, self.heads = bound, axes, base, pad, heads
        self.causal, self.mask_padding = direction == "causal", mask_padding
        self.temperature, self.dropout = temperature, dropout
        self.count = digit_count(bound, base)
        self.token = nn.Parameter(torch.empty(base, dim))
        self.place = nn.Parameter(torch.empty(axes * self.count, dim))
        self.last = nn.Parameter(torch.empty(dim))
        self.axis = nn.Parameter(torch.empty(axes, dim)) if axes > 1 else None
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention_norm": nn.LayerNorm(dim),
                    "qkv": nn.Linear(dim, 3 * dim),
                    "attention": nn.Linear(dim, dim),
                    "feed_forward_norm": nn.LayerNorm(dim),
                    "wide": nn.Linear(dim, 4 * dim),
                    "narrow": nn.Linear(4 * dim, dim),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim) if final_norm else None
        self.output = nn.Linear(dim, width)
        without = [self.token, self.place, self.last, self.axis, *([] if self.norm is None else self.norm.parameters())]
        for parameter in without:
            if parameter is not None:
                parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02); biases 0, norms 1."""
        for parameter in (self.token, self.place, self.last, self.axis):
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, positions: Int[Tensor, "p axes"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "p width"]:
        digits, written = to_digits(positions, self.count, self.base, self.pad)
        x = F.embedding(digits.flatten(1), self.token) + self.place  # (p, axes * count, dim)
        if self.axis is not None:
            x = x + self.axis.repeat_interleave(self.count, 0)
        x = torch.cat([x, self.last.expand(x.shape[0], 1, -1)], 1)
        visible = self._visible(written.flatten(1))
        for i, block in enumerate(self.blocks):
            assert isinstance(block, nn.ModuleDict)
            y = block["qkv"](block["attention_norm"](x)).unflatten(-1, (3, self.heads, -1))
            q, k, v = y.permute(2, 0, 3, 1, 4)
            if i + 1 == len(self.blocks):  # of the last block, the last token alone is read
                q, x, visible = q[..., -1:, :], x[:, -1:], visible[..., -1:, :]
            scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -math.inf)
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + self._dropped(block["attention"](mixed), generator)
            hidden = F.gelu(block["wide"](block["feed_forward_norm"](x)), approximate="tanh")
            x = x + self._dropped(block["narrow"](hidden), generator)
        y = x[:, -1]
        return self.output(y if self.norm is None else self.norm(y)) / self.temperature

    def _visible(self, written: Bool[Tensor, "p digits"]) -> Bool[Tensor, "#p 1 tokens tokens"]:
        """Which tokens see which. Hidden ones see themselves alone, so that their softmax is defined; nobody reads it."""
        tokens = written.shape[1] + 1
        visible = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=written.device)
        visible = visible.tril() if self.causal else visible
        if not self.mask_padding:
            return visible
        itself = torch.eye(tokens, dtype=torch.bool, device=written.device)
        return visible & F.pad(written, (0, 1), value=True)[:, None, None, :] | itself

    def _dropped(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        draw = torch.rand(x.shape, generator=generator, device=x.device)
        return torch.where(draw >= self.dropout, x / (1 - self.dropout), 0)


class SequentialEncoding(Positions):
    """The base of these schemes: the encoder and its losses.

    Args:
        width: of the vectors.
        heads: parts of them whose similarities are transferred on their own.
        max_length: P_max; 10,000 when None. On n axes each has the n-th root of it, rounded down.
        axes: n; with more than one, positions are places on the `grid` of the call.
        encoder_dim, encoder_layers, encoder_heads: of the encoder; see :class:`DigitEncoder`.
        base, direction, mask_padding, pad, final_norm, temperature, dropout: likewise.
        interpolation: positions are divided by it, and vectors of the places between are interpolated; 1 for none.
        pivots, candidates: of ``position_contrast`` in a training call; no pivots for none of it.
        offsets: of ``position_transfer``, m; 0 for none of it.
        window: least length of a window of candidates (its root on each of two axes).
        beta: share of the teacher's gradient that is stopped, 0 to 1: with 1 the block of the call learns nothing.
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
        """Positions on a sequence as they are, and the coordinates of places on a grid that is numbered row by row.

        Raises:
            Unsupported: for a grid of another number of axes.
        """
        if self.axes == 1:
            return positions
        if grid is None or len(grid) != self.axes:
            raise Unsupported(
                f"{self.name} positions of {self.axes} axes on " + ("a sequence" if grid is None else f"a grid {grid}"),
                supported=f"a grid of {self.axes} axes",
                nearest=f"axes={1 if grid is None else len(grid)}",
            )
        found = []
        for side in reversed(grid[1:]):
            found.append(positions % side)
            positions = positions // side
        return torch.stack([positions, *reversed(found)], -1)

    def vectors(
        self, positions: Int[Tensor, "*b"] | Int[Tensor, "*b axes"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*b width"]:
        """E(p), of positions (...) with one axis, or (..., axes).

        Raises:
            Unsupported: for positions outside 0 ... P_max - 1 on an axis (not looked for while compiling).
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
        """Vectors of places between positions: those of the corners around, weighted by nearness."""
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
        """The tensor that `embed` takes in the place of positions: :meth:`vectors`."""
        return self.vectors(positions, generator)

    def prepare(
        self,
        positions: Int[Tensor, "#b n"],
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
        *,
        movable: bool = True,
    ) -> tuple[Float[Tensor, "#b n width"], dict[str, Loss]]:
        """:meth:`encode` of the positions of a call, and while training both losses.

        Args:
            movable: whether the block may be moved in training, as positions that are told or go on from a state may not.
        """
        self._check_encoder()
        located = self.locate(positions, grid)
        if not self.training:
            return self.encode(located, generator), {}
        sides = (positions.shape[1],) if self.axes == 1 else tuple(grid or ())
        moved = None
        if movable and self.shift:
            start, moved = self.moved(sides, generator)
            located = located + (start[0] if self.axes == 1 else start)
        return self.encode(located, generator), self.regularize(sides, generator, moved)

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
        """How far the block of a training call is moved, and whether it is."""
        device = self.encoder.token.device
        draw = torch.rand(1 + self.axes, generator=generator, device=device, dtype=torch.float64)
        room = torch.tensor([max(self.bound - side, 0) for side in sides], device=device)
        moves = draw[0] < self.shift
        return torch.where(moves, (draw[1:] * (room + 1)).long().clamp(max=room), 0), moves

    def regularize(
        self, sides: Sequence[int], generator: torch.Generator | None = None, moved: Bool[Tensor, ""] | None = None
    ) -> dict[str, Loss]:
        """Both losses, each (sum, count).

        Args:
            sides: of the block of the call: (N,), or those of its grid.
            moved: whether the call's block was moved; nothing is transferred then.
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
        """Cross entropy of the closest candidate, summed over pivots, and their number."""
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
        """Pivots, one in each of as many equal parts of the range, and candidates of the three kinds."""
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
        """One to three edits of each position's digits: a digit added, deleted, substituted, or two exchanged.

        The digits of all axes are one string, which is cut at random afterwards. Results may leave the range.
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
            added = torch.where(digits < count * self.axes, added, substituted)  # a string as long as it may be
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
        """The divergence of similarities among positions elsewhere from those among the same offsets in the block."""
        e = self.encoder(torch.cat([block, elsewhere]), generator)
        return transfer_loss(*e.chunk(2), heads=self.heads, beta=self.beta)

    def extra_repr(self) -> str:
        return f"axes={self.axes}, positions below {self.bound}"


class Seqpe(SequentialEncoding):
    """Adds the vectors of positions to the model's input.

    Args:
        dim: width C of the embedding, here the width of the vectors.
        heads: of the model.
        options: those of :class:`SequentialEncoding`.
    """

    name = "seqpe"

    def __init__(self, *, dim: int, heads: int, **options: Any) -> None:
        super().__init__(dim, heads if dim % heads == 0 else 1, **options)

    def embed(self, x: Float[Tensor, "b n c"], positions: Tensor) -> Float[Tensor, "b n c"]:
        """`x` with the vectors of its positions added, or those that :meth:`encode` made of them."""
        e = self._encoded(positions, x.shape[0], x.shape[1])
        if x.shape[-1] != e.shape[-1]:
            raise Unsupported(f"{self.name} positions on a width of {x.shape[-1]}", supported=f"dim={e.shape[-1]}")
        return x + e.to(x.dtype)


class SeqpeInside(SequentialEncoding):
    """Base of the schemes that act on queries and keys; see the module's table.

    Args:
        heads, head_dim, kv_heads: of the layers. The vectors have heads * head_dim features, or head_dim.
        per_head: whether each head has a part of the vectors of its own, or all share them.
        projection: the matrix W: ``single`` for all layers, one for each of the ``layers``, or ``none`` (e^q = e^k).
        part: ``whole``, for a layer alone; in a model the ``encoder`` is there once, and each ``layer`` has the rest.
        options: those of :class:`SequentialEncoding`.
    """

    def __init__(
        self,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        per_head: bool = True,
        projection: str = "single",
        part: str = "whole",
        **options: Any,
    ) -> None:
        one_of("projection", projection, PROJECTIONS)
        one_of("part", part, PARTS)
        kv_heads = heads if kv_heads is None else kv_heads
        if projection == "none" and per_head and kv_heads != heads:
            raise Unsupported(
                f"projection='none' for {heads} heads of queries and {kv_heads} of keys",
                supported="as many, or per_head=False",
                nearest="projection='single'",
            )
        width = heads * head_dim if per_head else head_dim
        if part == "layer":
            Positions.__init__(self)
            self.axes = options.get("axes", 1)
        else:
            super().__init__(width, heads if per_head else 1, **options)
        self.part, self.per_head, self.head_dim = part, per_head, head_dim
        self.shared = part == "layer"
        here = projection != "none" and (part == "whole" or (part == "encoder") == (projection == "single"))
        self.joined = projection == "single" or (projection == "layers" and part == "whole")
        key_width = kv_heads * head_dim if per_head else head_dim
        self.query_width = width
        self.query_projection = nn.Linear(width, width) if here else None
        self.key_projection = nn.Linear(width, key_width) if here else None
        for module in (self.query_projection, self.key_projection):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def encode(self, positions: Tensor, generator: torch.Generator | None = None) -> Float[Tensor, "*b width"]:
        """The tensor that `rotate` and `rotate_keys` take in the place of positions: e^q and e^k side by side, or E(p)."""
        self._check_encoder()
        e = self.vectors(positions, generator)
        if self.query_projection is None or self.key_projection is None:
            return e
        return torch.cat([self.query_projection(e), self.key_projection(e)], -1)

    def rotate(self, x: Float[Tensor, "b h n d"], positions: Tensor) -> Float[Tensor, "b h n d"]:
        """Queries with their positions (or what `encode` made of them) in them, in the dtype of `x`."""
        e = self._encoded(positions, x.shape[0], x.shape[2])
        if self.joined:
            e = e[..., : self.query_width]
        elif self.part == "layer" and self.query_projection is not None:
            e = self.query_projection(e)
        return self.place_queries(x, self._by_head(e, x))

    def rotate_keys(self, x: Float[Tensor, "b g m d"], positions: Tensor) -> Float[Tensor, "b g m d"]:
        """As :meth:`rotate`, for keys."""
        e = self._encoded(positions, x.shape[0], x.shape[2])
        if self.joined:
            e = e[..., self.query_width :]
        elif self.part == "layer" and self.key_projection is not None:
            e = self.key_projection(e)
        return self.place_keys(x, self._by_head(e, x))

    def place_queries(self, q: Tensor, e: Tensor) -> Tensor:
        """q with e^q, both (B, H, N, D), or one row, or one head, for all."""
        raise NotImplementedError

    def place_keys(self, k: Tensor, e: Tensor) -> Tensor:
        """k with e^k, placed as queries are unless a scheme says otherwise."""
        return self.place_queries(k, e)

    def _by_head(self, e: Float[Tensor, "#b n width"], x: Float[Tensor, "b h n d"]) -> Float[Tensor, "#b #h n d"]:
        heads = x.shape[1] if self.per_head else 1
        if x.shape[-1] != self.head_dim or e.shape[-1] != heads * self.head_dim or e.shape[-2] != x.shape[2]:
            raise Unsupported(
                f"{self.name} positions {tuple(e.shape)} on heads {tuple(x.shape)}",
                supported=f"head_dim={self.head_dim}, and equal heads in all layers that share positions",
            )
        return e.unflatten(-1, (heads, -1)).transpose(1, 2).to(x.dtype)


class SeqpeMul(SeqpeInside):
    """Multiplies queries and keys by vectors of their positions."""

    name = "seqpe_mul"

    def place_queries(self, q: Tensor, e: Tensor) -> Tensor:
        return q * e


class SeqpeAdd(SeqpeInside):
    """Adds vectors of their positions to queries and keys."""

    name = "seqpe_add"

    def place_queries(self, q: Tensor, e: Tensor) -> Tensor:
        return q + e


class SeqpeScalar(SeqpeInside):
    """Adds products of vectors of positions to the scores, by queries and keys of twice the width.

    Args:
        scale: s > 0, the weight of these products.
        options: those of :class:`SeqpeInside`.
    """

    name = "seqpe_scalar"

    def __init__(self, *, scale: float = 1.0, **options: Any) -> None:
        if not scale > 0:
            raise Unsupported(f"scale={scale} of seqpe_scalar", supported="scale > 0", nearest="scale=1.0")
        super().__init__(**options)
        self.scale = scale

    def place_queries(self, q: Tensor, e: Tensor) -> Tensor:
        return math.sqrt(2) * self.place_keys(q, e)  # the width, and with it the usual scale, changes

    def place_keys(self, k: Tensor, e: Tensor) -> Tensor:
        return torch.cat([k, (math.sqrt(self.scale) * e).expand(*k.shape[:3], -1)], -1)


def _root(number: int, axes: int) -> int:
    """The largest integer whose power does not exceed the number."""
    found = round(number ** (1 / axes))
    return found if found**axes <= number else found - 1


def closest_loss(
    pivots: Float[Tensor, "p width"],
    candidates: Float[Tensor, "p c width"],
    distances: Int[Tensor, "p c"],
    hidden: Bool[Tensor, "p c"],
) -> Loss:
    """Cross entropy of the closest candidate over products of vectors: its sum over pivots, and their number.

    Args:
        distances: of the candidates' positions.
        hidden: candidates that do not count; a pivot without others does not count either.
    """
    logits = (candidates @ pivots[..., None])[..., 0]
    label = distances.masked_fill(hidden, torch.iinfo(distances.dtype).max).argmin(1)
    nats = F.cross_entropy(logits.masked_fill(hidden, torch.finfo(logits.dtype).min), label, reduction="none")
    some = ~hidden.all(1)
    return torch.where(some, nats, 0).sum(), some.sum()


def transfer_loss(
    teacher: Float[Tensor, "m width"], student: Float[Tensor, "m width"], *, heads: int, beta: float
) -> Float[Tensor, ""]:
    """Divergence of the similarities among the student's vectors from those among the teacher's, for each head's part.

    Args:
        beta: weight of what the student learns; the teacher learns with the weight 1 - beta.
    """
    known, found = (_similarities(e, heads) for e in (teacher, student))
    loss = beta * _divergence(known.detach(), found)
    return loss if beta == 1 else loss + (1 - beta) * _divergence(known, found.detach())


def _similarities(e: Float[Tensor, "m width"], heads: int) -> Float[Tensor, "h m m"]:
    """log softmax of the products of vectors, for each head's part."""
    parts = e.unflatten(-1, (heads, -1)).transpose(0, 1)
    return (parts @ parts.mT).log_softmax(-1)


def _divergence(teacher: Tensor, student: Tensor) -> Float[Tensor, ""]:
    """KL both ways, over all elements: P (log P - log P') + P' (log P' - log P)."""
    return ((teacher.exp() - student.exp()) * (teacher - student)).mean()
