"""The digits of a position, the encoder E(p) that reads them, and the two losses that keep order among positions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import Loss, Unsupported
from regard.core.draws import uniform

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


DIRECTIONS = ("causal", "both")


def to_digits(
    positions: Int[Tensor, "..."], count: int, base: int = 10, pad: int = 0
) -> tuple[Int[Tensor, "... count"], Bool[Tensor, "... count"]]:
    """Return the digits of positions, most significant first, and which of them are written, not left padding.

    Zero is written with one digit.
    """
    powers = base ** torch.arange(count - 1, -1, -1, device=positions.device)
    digits = positions[..., None] // powers % base
    written = (positions[..., None] >= powers) | (powers == 1)
    return torch.where(written, digits, pad), written


def digit_count(bound: int, base: int = 10) -> int:
    """Return the number of digits of the largest position below `bound`."""
    count = 1
    while base**count < bound:
        count += 1
    return count


class DigitEncoder(nn.Module):
    """The encoder E, from positions on n axes to vectors.

    Args:
        bound: exclusive upper bound of positions on every axis.
        width: width of the vectors.
        axes: n.
        dim: hidden width D_e.
        layers: number of blocks.
        heads: number of heads of the attention over digits; dim / 64, at least 1, when None.
        base: base of the digits.
        direction: ``causal`` attention over the digits, or ``both``.
        mask_padding: whether zeros on the left are masked.
        pad: digit used for padding on the left.
        final_norm: whether there is a norm before the output projection.
        temperature: divisor of the vectors.
        dropout: dropout probability after the attention's projection and the feed-forward network.
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
        """Initialise weights from N(0, 0.02) and biases to 0."""
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
            if i + 1 == len(self.blocks):  # of the last block, only the last token is read
                q, x, visible = q[..., -1:, :], x[:, -1:], visible[..., -1:, :]
            scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -math.inf)
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + self._dropped(block["attention"](mixed), generator)
            hidden = F.gelu(block["wide"](block["feed_forward_norm"](x)), approximate="tanh")
            x = x + self._dropped(block["narrow"](hidden), generator)
        y = x[:, -1]
        return self.output(y if self.norm is None else self.norm(y)) / self.temperature

    def _visible(self, written: Bool[Tensor, "p digits"]) -> Bool[Tensor, "#p 1 tokens tokens"]:
        """Return the attention mask. Hidden tokens see only themselves, so that their (unused) softmax is defined."""
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
        draw = uniform(x.shape, generator, device=x.device)
        return torch.where(draw >= self.dropout, x / (1 - self.dropout), 0)


def closest_loss(
    pivots: Float[Tensor, "p width"],
    candidates: Float[Tensor, "p c width"],
    distances: Int[Tensor, "p c"],
    hidden: Bool[Tensor, "p c"],
) -> Loss:
    """Cross entropy of the closest candidate, with products of vectors as logits: sum over pivots, and their number.

    Args:
        distances: distances of the candidates' positions from the pivot.
        hidden: candidates that are masked; a pivot whose candidates are all masked does not count.
    """
    logits = (candidates @ pivots[..., None])[..., 0]
    label = distances.masked_fill(hidden, torch.iinfo(distances.dtype).max).argmin(1)
    nats = F.cross_entropy(logits.masked_fill(hidden, torch.finfo(logits.dtype).min), label, reduction="none")
    some = ~hidden.all(1)
    return torch.where(some, nats, 0).sum(), some.sum()


def transfer_loss(
    teacher: Float[Tensor, "m width"], student: Float[Tensor, "m width"], *, heads: int, beta: float
) -> Float[Tensor, ""]:
    """Divergence of the similarities among the student's vectors from those among the teacher's, head by head.

    Args:
        beta: weight of the student's gradient; the teacher's has the weight 1 - beta.
    """
    known, found = (_similarities(e, heads) for e in (teacher, student))
    loss = beta * _divergence(known.detach(), found)
    return loss if beta == 1 else loss + (1 - beta) * _divergence(known, found.detach())


def _similarities(e: Float[Tensor, "m width"], heads: int) -> Float[Tensor, "h m m"]:
    """Return the log softmax of the products of vectors, head by head."""
    parts = e.unflatten(-1, (heads, -1)).transpose(0, 1)
    return (parts @ parts.mT).log_softmax(-1)


def _divergence(teacher: Tensor, student: Tensor) -> Float[Tensor, ""]:
    """The symmetric KL divergence, averaged over all elements: P (log P - log P') + P' (log P' - log P)."""
    return ((teacher.exp() - student.exp()) * (teacher - student)).mean()
