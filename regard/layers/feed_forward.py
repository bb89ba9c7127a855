"""Feed-forward networks: what a transformer does to each token alone.

``gelu``: ``W2 gelu(W1 x)`` (Hendrycks & Gimpel, arXiv 1606.08415, exact erf form).
``swiglu``: ``W2 (silu(Wg x) * Wu x)`` (Shazeer, arXiv 2002.05202, equation 6).
``bilinear``: ``W2 (Wg x * Wu x)`` (the same equation), which TransNormer's code computes (arXiv 2210.10340).
A kind of projection is one too, from the width to itself: ``token_parameter`` is that of TokenFormer (arXiv 2410.23168).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Unsupported, at_least, closest
from regard.engines.layers import gated_product
from regard.layers.linear import is_linear, list_linears, make_linear

if TYPE_CHECKING:
    from jaxtyping import Float


def check_dropout(probability: float) -> None:
    """Raise Unsupported unless it is in [0, 1)."""
    if not 0 <= probability < 1:
        raise Unsupported(f"dropout={probability}", supported="0 <= dropout < 1", nearest="dropout=0.0")


def dropout(
    x: Float[Tensor, ...], probability: float, *, training: bool, generator: torch.Generator | None = None
) -> Float[Tensor, ...]:
    """Zero each number with a probability and scale up the others; draws come from `generator` when there is one."""
    if not training or probability == 0:
        return x
    if generator is None:
        return F.dropout(x, probability)
    draw = torch.rand(x.shape, generator=generator, device=x.device)
    return torch.where(draw >= probability, x / (1 - probability), x.new_zeros(()))


class MLP(nn.Module):
    """Two projections with a GELU between them.

    Args:
        dim: width of input and output.
        hidden: width between; 4 dim when None.
        dropout: probability of dropping a hidden number while training.
        bias: whether the projections add learned vectors.
        linear: builds the projections: ``linear(in_features, out_features, bias=...)``.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        linear: Callable[..., nn.Module] = make_linear,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        hidden = 4 * dim if hidden is None else hidden
        at_least("hidden", hidden, 1)
        self.dropout = dropout
        self.up = linear(dim, hidden, bias=bias)
        self.down = linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "... c"], *, generator: torch.Generator | None = None) -> Float[Tensor, "... c"]:
        hidden = F.gelu(self.up(x))
        return self.down(dropout(hidden, self.dropout, training=self.training, generator=generator))


class SwiGLU(nn.Module):
    """Two projections multiplied, one of them through a SiLU, and a third one back.

    Args:
        dim: width of input and output.
        hidden: width between; 8/3 dim rounded up to a multiple of 16 when None, which has the size of an MLP of 4 dim.
        dropout, bias, linear: as in :class:`MLP`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        linear: Callable[..., nn.Module] = make_linear,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        hidden = -(-8 * dim // 48) * 16 if hidden is None else hidden
        at_least("hidden", hidden, 1)
        self.dropout = dropout
        self.gate = linear(dim, hidden, bias=bias)
        self.up = linear(dim, hidden, bias=bias)
        self.down = linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "... c"], *, generator: torch.Generator | None = None) -> Float[Tensor, "... c"]:
        hidden = self.gated(x)
        return self.down(dropout(hidden, self.dropout, training=self.training, generator=generator))

    def gated(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... hidden"]:
        return gated_product(self.up(x), self.gate(x))


class Bilinear(SwiGLU):
    """Two projections multiplied, without an activation, and a third one back; arguments as of :class:`SwiGLU`."""

    def gated(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... hidden"]:
        return self.up(x) * self.gate(x)


FEED_FORWARDS: dict[str, type[MLP] | type[SwiGLU]] = {"swiglu": SwiGLU, "gelu": MLP, "bilinear": Bilinear}


def make_feed_forward(
    name: str,
    dim: int,
    hidden: int | None = None,
    *,
    dropout: float = 0.0,
    bias: bool = False,
    linear: Callable[..., nn.Module] = make_linear,
    **options: Any,
) -> nn.Module:
    """A feed-forward network by name: ``swiglu``, ``gelu``, ``bilinear``, or a kind of :func:`regard.layers.linear.make_linear`.

    Args:
        name: a kind of projection maps `dim` to itself, once; it has no hidden width and no dropout.
        dim, hidden, dropout, bias, linear: as of :class:`SwiGLU`.
        options: of the kind of projection.

    Raises:
        Unsupported: for another name, or what it does not take.
    """
    if name in FEED_FORWARDS:
        for option in options:
            own = ("dropout", "bias", "linear")
            raise Unsupported(
                f"option {option!r} of feed-forward {name!r}", supported=", ".join(own), nearest=closest(option, own)
            )
        return FEED_FORWARDS[name](dim, hidden, dropout=dropout, bias=bias, linear=linear)
    names = (*FEED_FORWARDS, *list_linears())
    if not is_linear(name):
        raise Unsupported(
            f"feed-forward {name!r}", supported=", ".join(names), nearest=closest(str(name), names) or "swiglu"
        )
    for what, given in (("a hidden width", hidden is not None), ("dropout", dropout != 0)):
        if given:
            raise Unsupported(f"{what} of feed-forward {name!r}", supported=", ".join(FEED_FORWARDS))
    return linear(dim, dim, kind=name, bias=bias, **options)
