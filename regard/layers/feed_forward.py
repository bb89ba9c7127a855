"""Feed-forward networks, which transform each token of a transformer on its own.

``gelu``: ``W2 gelu(W1 x)`` (Hendrycks & Gimpel, arXiv 1606.08415, exact erf form). ``swiglu``:
``W2 (silu(Wg x) * Wu x)`` (Shazeer, arXiv 2002.05202, equation 6). ``bilinear``: ``W2 (Wg x * Wu x)`` (the same
equation), as in TransNormer's code (arXiv 2210.10340). ``mixture_of_experts``: several of these networks, a few of
which process each token (Shazeer et al., arXiv 1701.06538; Switch, arXiv 2101.03961). Any kind of projection can serve
as well, with equal input and output widths: ``token_parameter`` is TokenFormer's (arXiv 2410.23168).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Loss, Unsupported, at_least, closest, one_of
from regard.core.draws import uniform
from regard.core.precision import wide, without_autocast
from regard.engines.layers import gated_product
from regard.layers.linear import is_linear, list_linears, make_linear

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def check_dropout(probability: float) -> None:
    """Raise Unsupported for a probability outside [0, 1)."""
    if not 0 <= probability < 1:
        raise Unsupported(f"dropout={probability}", supported="0 <= dropout < 1", nearest="dropout=0.0")


def dropout(
    x: Float[Tensor, ...], probability: float, *, training: bool, generator: torch.Generator | None = None
) -> Float[Tensor, ...]:
    """Zero each number with a probability and scale up the rest; `generator`, if given, is used for the draws."""
    if not training or probability == 0:
        return x
    if generator is None:
        return F.dropout(x, probability)
    draw = uniform(x.shape, generator, device=x.device)
    return torch.where(draw >= probability, x / (1 - probability), x.new_zeros(()))


class MLP(nn.Module):
    """Two linear projections with a GELU between them.

    Args:
        dim: width of input and output.
        hidden: width of the hidden layer; 4 dim when None.
        dropout: dropout probability of the hidden layer.
        bias: whether the projections have biases.
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
    """Two linear projections, multiplied after a SiLU on one of them, and a third back to `dim`.

    Args:
        dim: width of input and output.
        hidden: width of the hidden layer; when None, 8/3 dim rounded up to a multiple of 16, for the size of an MLP of
            4 dim.
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
        """silu(gate(x)) * up(x)."""
        return gated_product(self.up(x), self.gate(x))


class Bilinear(SwiGLU):
    """As :class:`SwiGLU`, without an activation: two linear projections, multiplied, and a third back to `dim`."""

    def gated(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... hidden"]:
        return self.up(x) * self.gate(x)


SIMPLE: dict[str, type[MLP] | type[SwiGLU]] = {"swiglu": SwiGLU, "gelu": MLP, "bilinear": Bilinear}
"""Networks that transform every token in the same way."""


class MixtureOfExperts(nn.Module):
    """Several feed-forward networks; each token is processed by the few with the largest router probabilities::

        p = softmax(W_r x)                                  in at least float32
        y = sum over the `active` largest e of g_e FFN_e(x)  g_e = p_e with one active expert, else p_e over their sum

    Tokens are gathered by expert, so that each expert computes its own tokens only.

    In training an expert may have a capacity: ceil(capacity * active * tokens / experts) tokens of a call. Tokens
    beyond it, ordered by position and then by row, get nothing from this expert, so that no token is dropped in favour
    of a later one. In evaluation none is dropped, since a token's output must not depend on the rest of the call.

    Args:
        dim, hidden, dropout, bias, linear: options of each expert, as in :class:`SwiGLU`.
        experts: number of experts.
        active: number of experts per token, from 1 to `experts`.
        capacity: capacity factor of the experts in training, above 0; None for no limit.
        network: ``swiglu``, ``gelu`` or ``bilinear``.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        experts: int = 4,
        active: int = 1,
        capacity: float | None = None,
        network: str = "swiglu",
        dropout: float = 0.0,
        bias: bool = False,
        linear: Callable[..., nn.Module] = make_linear,
    ) -> None:
        super().__init__()
        at_least("experts", experts, 1)
        one_of("network", network, SIMPLE)
        if not 1 <= active <= experts:
            raise Unsupported(f"active={active} of {experts} experts", supported=f"active from 1 to {experts}")
        if capacity is not None and not 0 < capacity < math.inf:
            raise Unsupported(f"capacity={capacity}", supported="a factor above 0, or None", nearest="capacity=1.25")
        self.active, self.capacity = active, capacity
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(
            SIMPLE[network](dim, hidden, dropout=dropout, bias=bias, linear=linear) for _ in range(experts)
        )

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        valid: Bool[Tensor, "b n"] | None = None,
        losses: dict[str, Loss] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """The sum of the active experts' outputs for each token.

        Args:
            valid: mask of the tokens to process; other tokens have no expert and get 0. None for all.
            losses: receives ``load_balance``: experts * sum_e (share of the tokens that expert e processes) * (mean of
                p_e), which is `active` for evenly spread tokens, with a count of one layer.
        """
        tokens = x.transpose(0, 1).flatten(0, 1)  # ordered by position, then by row
        counted = None if valid is None else valid.T.flatten()
        with without_autocast(x.device):
            p = F.linear(wide(tokens), wide(self.router.weight)).softmax(-1)  # (T, E)
        chosen = p.detach().argsort(dim=-1, descending=True, stable=True)[:, : self.active]
        has = torch.zeros_like(p, dtype=torch.bool).scatter(1, chosen, True)
        if counted is not None:
            has = has & counted[:, None]
        gates = p.where(has, 0)
        if self.active > 1:
            gates = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)
        count = torch.tensor(len(tokens), device=x.device) if counted is None else counted.sum()
        if losses is not None:
            losses["load_balance"] = self._balance(p, has, counted, count)
        if self.training and self.capacity is not None:
            most = math.ceil(round(self.capacity * self.active * int(count) / len(self.experts), 6))
            has = has & (has.cumsum(0) <= most)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            (own,) = has[:, number].nonzero(as_tuple=True)
            if len(own):
                given = gates[own, number, None] * expert(tokens[own])
                output = output.index_add(0, own, given.to(output.dtype))
        return output.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)

    def _balance(self, p: Tensor, has: Tensor, counted: Tensor | None, count: Tensor) -> Loss:
        p = p if counted is None else p.where(counted[:, None], 0)
        share = has.sum(0) / count.clamp(min=1)
        return len(self.experts) * (share * p.sum(0) / count.clamp(min=1)).sum(), (count > 0).long()


FEED_FORWARDS: dict[str, type[nn.Module]] = {**SIMPLE, "mixture_of_experts": MixtureOfExperts}


def feed_forward_options(name: str) -> list[str]:
    """Option names of a network in `FEED_FORWARDS`."""
    return [p.name for p in inspect.signature(FEED_FORWARDS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]


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
    """A feed-forward network by name: one of `FEED_FORWARDS`, or a kind of :func:`regard.layers.linear.make_linear`.

    Args:
        name: name of the network. A kind of projection maps `dim` to itself, without hidden width or dropout.
        dim, hidden, dropout, bias, linear: as in :class:`SwiGLU`.
        options: options of the mixture of experts, or of the kind of projection.

    Raises:
        Unsupported: for another name, or for options that the network does not take.
    """
    if name in FEED_FORWARDS:
        own = feed_forward_options(name)
        for option in options:
            if option not in own:
                raise Unsupported(
                    f"option {option!r} of feed-forward {name!r}",
                    supported=", ".join(own),
                    nearest=closest(option, own),
                )
        return FEED_FORWARDS[name](dim, hidden, dropout=dropout, bias=bias, linear=linear, **options)
    names = (*FEED_FORWARDS, *list_linears())
    if not is_linear(name):
        raise Unsupported(
            f"feed-forward {name!r}", supported=", ".join(names), nearest=closest(str(name), names) or "swiglu"
        )
    for what, given in (("a hidden width", hidden is not None), ("dropout", dropout != 0)):
        if given:
            raise Unsupported(f"{what} of feed-forward {name!r}", supported=", ".join(FEED_FORWARDS))
    return linear(dim, dim, kind=name, bias=bias, **options)
