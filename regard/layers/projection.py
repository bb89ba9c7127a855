"""The shell of projection mechanisms: gives a replacement for linear layers the interface of any other layer.

A projection mechanism's module is built as ``module(in_features, out_features, *, bias, config)`` and maps the last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regard.contract import Context, Mechanism, Pattern, Result, Unsupported
from regard.core.ragged import gathering
from regard.layers.base import Layer
from regard.layers.checks import check_tokens, given_context

if TYPE_CHECKING:
    from jaxtyping import Float


class ProjectionLayer(Layer):
    """Applies a projection mechanism to each token on its own, (B, N, C) -> (B, N, out_features).

    Args:
        card: the mechanism.
        dim: width C of the input.
        pattern: any pattern that the mechanism supports; tokens do not mix, so all patterns compute the same.
        out_features: width of the output; `dim` when None.
        bias: whether to add a learned vector, if the mechanism supports it.
        config: the mechanism's options.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        *,
        pattern: str | Pattern = Pattern.CAUSAL_SELF,
        out_features: int | None = None,
        bias: bool = False,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.card, self.pattern = card, card.require_pattern(pattern)
        assert card.module is not None  # a card of this kind always has one; checked by regard verify
        self.dim = dim
        width = dim if out_features is None else out_features
        self.projection = card.module(dim, width, bias=bias, config=card.options() if config is None else config)

    def forward(
        self, x: Float[Tensor, "b n c"], memory: None = None, *, context: Context | None = None, state: None = None
    ) -> Result:
        """Project each valid token; padding becomes 0."""
        if memory is not None or state is not None:
            raise Unsupported(f"{self.card.name} with memory or state", supported="layer(x): tokens do not mix")
        check_tokens(x, self.dim)
        mask = given_context(context).mask
        if mask is not None and (mask.bias is not None or mask.blocks is not None):
            raise Unsupported(f"{self.card.name} with bias or blocks on pairs", supported="valid, lengths, cu_seqlens")
        layout = gathering(mask, x.shape[0], x.shape[1], x.device)
        return Result(layout.scatter(self.projection(layout.gather(x, axis=1)), axis=1))


def projection_factory(card: Mechanism) -> Callable[..., nn.Module]:
    """A projection mechanism's ``factory(in_features, out_features, *, bias, **options)``, for `make_linear`."""
    assert card.module is not None  # a card of this kind always has one; checked by regard verify
    module = card.module

    def factory(in_features: int, out_features: int, *, bias: bool = False, **options: Any) -> nn.Module:
        return module(in_features, out_features, bias=bias, config=card.options(**options))

    return factory
