"""Token embeddings: one table, or a narrow table and a projection (ALBERT, Lan et al., arXiv 1909.11942, section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from regard.contract import at_least
from regard.engines.linear import linear
from regard.layers.linear import make_linear

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class FactorisedEmbedding(nn.Module):
    """Embeddings of `width` features, projected to `dim`: V width + width dim parameters instead of V dim.

    Entries of the output have variance 1 at initialisation, like those of a plain table.

    Args:
        tokens: V, the number of rows in the table.
        width: width of the table.
        dim: width of the output.
    """

    def __init__(self, tokens: int, width: int, dim: int) -> None:
        super().__init__()
        at_least("embedding_dim", width, 1)
        self.table = nn.Embedding(tokens, width)
        self.up = make_linear(width, dim)
        nn.init.normal_(self.table.weight)
        nn.init.normal_(self.up.weight, std=width**-0.5)  # type: ignore[arg-type]

    @property
    def num_embeddings(self) -> int:
        """V, the number of rows in the table."""
        return self.table.num_embeddings

    @property
    def weight(self) -> Float[Tensor, "v e"]:
        """The table."""
        return self.table.weight

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... c"]:
        return self.up(self.table(ids))


def make_embedding(tokens: int, dim: int, width: int | None = None) -> nn.Embedding | FactorisedEmbedding:
    """A token embedding with normal entries of variance 1, factorised if `width` is given."""
    if width is not None:
        return FactorisedEmbedding(tokens, width, dim)
    table = nn.Embedding(tokens, dim)
    nn.init.normal_(table.weight)
    return table


def tied_logits(
    x: Float[Tensor, "*b c"], embedding: nn.Embedding | FactorisedEmbedding, tokens: int
) -> Float[Tensor, "*b v"]:
    """Logits of the first `tokens` tokens, with the embedding as output weights, divided by the root of the width."""
    scale = x.shape[-1] ** -0.5
    if isinstance(embedding, FactorisedEmbedding):
        up: Tensor = embedding.up.weight  # type: ignore[assignment]
        x = linear(x, up.mT)
    return linear(x, embedding.weight[:tokens]) * scale
