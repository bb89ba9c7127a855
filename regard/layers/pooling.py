r"""Baseline pools for pooling mechanisms to beat: N tokens become one vector, or m of them.

For the valid tokens h_t of a sequence, the rows of H (N, D):

| pool | output | options |
|---|---|---|
| ``mean``, ``max`` | their mean, or the largest of each feature | none |
| ``first``, ``last`` | the first or the last of them | none |
| ``additive`` | sum_t a_t h_t with a = softmax over t of w^T tanh(W h_t + b) | `hidden` |
| ``structured`` | A H with A = softmax over t of W_2 tanh(W_1 H^T), m rows | `slots`, `hidden`, `diversity` |

``additive`` is one head of additive attention (Bahdanau et al., arXiv 1409.0473) with a learned query; ``structured``
is the structured self-attention of Lin et al. (arXiv 1703.03130, equations 6 and 8), without biases, as in the paper.

Pools have the same interface as the layers of pooling mechanisms: ``layer(x, context=Context(mask=...))`` returns a
``Result`` with (B, m, D), one row per document when packed, and 0 for a sequence without tokens. :func:`make_pooling`
builds them by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Set
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import WANTS, Context, Result, Unsupported, closest, one_of, valid_from_lengths
from regard.core.precision import wide
from regard.core.ragged import gathering
from regard.layers.checks import check_tokens, given_context
from regard.layers.linear import make_linear

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Pooling(nn.Module):
    """Base class of this module's pools: handles masks and rejects unsupported arguments.

    Args:
        name: name of the pool, for errors.
        dim: width D of the tokens.
        slots: number of output vectors m per sequence.
    """

    gives_weights = False

    def __init__(self, name: str, dim: int, slots: int = 1) -> None:
        super().__init__()
        self.name, self.dim, self.slots = name, check_size("dim", dim), check_size("slots", slots)

    def forward(
        self, x: Float[Tensor, "b n d"], memory: None = None, *, context: Context | None = None, state: None = None
    ) -> Result:
        """Pool each sequence.

        Args:
            x: tokens, padded anywhere or packed, as `context.mask` says.
            context: only its mask is used; with ``want={"weights"}``, pools that have weights return them.

        Returns:
            output (B, slots, D), one row per document when packed. Extras: ``weights`` (B, slots, N) of right-padded
            tokens, zero at padding. Losses: ``diversity``, if the pool was built with it.

        Raises:
            Unsupported: for inputs that are not floats (B, N, D), for memory, a state, roles or masks on pairs, and if
                weights are wanted from a pool that has none.
        """
        context = given_context(context)
        check_tokens(x, self.dim)
        self._check(memory, context, state)
        layout = gathering(context.mask, x.shape[0], x.shape[1], x.device)
        return self.pool(layout.gather(x, axis=1), layout.lengths, context.want)

    def pool(self, x: Float[Tensor, "b n d"], lengths: Int[Tensor, " b"] | None, want: Set[str]) -> Result:
        """Pool right-padded rows with zeros in the padding."""
        raise NotImplementedError

    def _check(self, memory: Any, context: Context, state: Any) -> None:
        mask, name = context.mask, f"pool {self.name!r}"
        if memory is not None or context.memory_mask is not None:
            raise Unsupported(f"memory with {name}", supported="layer(x)", nearest="softmax")
        if state is not None or "state" in context.want:
            raise Unsupported(
                f"a state of {name}", supported="whole sequences", nearest="low_rank_pooling with a learned context"
            )
        if context.roles is not None or (mask is not None and (mask.bias is not None or mask.blocks is not None)):
            raise Unsupported(
                f"{name} with roles, a bias or a block mask", supported="valid, lengths and cu_seqlens masks"
            )
        for word in context.want:
            one_of("want", word, WANTS)
            if word != "weights" or not self.gives_weights:
                raise Unsupported(
                    f"want={word!r} of {name}",
                    supported="weights" if self.gives_weights else "only the output",
                    nearest="additive" if word == "weights" else "",
                )


class SimplePooling(Pooling):
    """The ``mean``, ``max``, ``first`` or ``last`` of the valid tokens, (B, N, D) -> (B, 1, D); see the module.

    Args:
        how: ``mean``, ``max``, ``first`` or ``last``.
        dim: width D of the tokens.
        num_heads: ignored.
    """

    def __init__(self, how: str, dim: int, num_heads: int = 1) -> None:
        super().__init__(how, dim)
        one_of("how", how, SIMPLE)

    def pool(self, x: Float[Tensor, "b n d"], lengths: Int[Tensor, " b"] | None, want: Set[str]) -> Result:
        if x.shape[1] == 0:
            return Result(x.sum(1, keepdim=True))
        if lengths is None:
            lengths = torch.full((x.shape[0],), x.shape[1], device=x.device)
        if self.name == "mean":
            pooled = x.sum(1) / lengths.clamp(min=1)[:, None]
        elif self.name == "max":
            valid = valid_from_lengths(lengths, x.shape[1])[..., None]
            pooled = x.where(valid, torch.finfo(x.dtype).min).amax(1)
        elif self.name == "first":
            pooled = x[:, 0]
        else:
            pooled = x[torch.arange(x.shape[0], device=x.device), (lengths - 1).clamp(min=0)]
        return Result(pooled.where((lengths > 0)[:, None], 0)[:, None])


class AdditivePooling(Pooling):
    """One head of additive attention, (B, N, D) -> (B, 1, D); see the module.

    Args:
        dim: width D of the tokens.
        num_heads: ignored.
        hidden: number of rows of W; `dim` when None.
    """

    gives_weights = True

    def __init__(self, dim: int, num_heads: int = 1, *, hidden: int | None = None) -> None:
        super().__init__("additive", dim)
        hidden = dim if hidden is None else check_size("hidden", hidden)
        self.hidden = make_linear(dim, hidden, bias=True)
        self.score = make_linear(hidden, 1)

    def pool(self, x: Float[Tensor, "b n d"], lengths: Int[Tensor, " b"] | None, want: Set[str]) -> Result:
        valid = None if lengths is None else valid_from_lengths(lengths, x.shape[1])
        return pool_by_scores(x, self.score(self.hidden(x).tanh()).mT, valid, want=want)


class StructuredPooling(Pooling):
    """Structured self-attention, (B, N, D) -> (B, slots, D); see the module.

    Args:
        dim: width D of the tokens.
        num_heads: number of slots m, unless `slots` is given.
        slots: number of slots; `num_heads` when None.
        hidden: number of rows d_a of W_1; `dim` when None.
        diversity: whether to return the penalty ||A A^T - I||_F^2 of each sequence as the loss ``diversity``.
    """

    gives_weights = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        slots: int | None = None,
        hidden: int | None = None,
        diversity: bool = False,
    ) -> None:
        super().__init__("structured", dim, num_heads if slots is None else slots)
        hidden = dim if hidden is None else check_size("hidden", hidden)
        self.hidden = make_linear(dim, hidden)
        self.score = make_linear(hidden, self.slots)
        self.diversity = diversity

    def pool(self, x: Float[Tensor, "b n d"], lengths: Int[Tensor, " b"] | None, want: Set[str]) -> Result:
        valid = None if lengths is None else valid_from_lengths(lengths, x.shape[1])
        scores = self.score(self.hidden(x).tanh()).mT  # (B, slots, N)
        return pool_by_scores(x, scores, valid, diversity=self.diversity, want=want)


SIMPLE = ("mean", "max", "first", "last")

POOLINGS: dict[str, Callable[..., Pooling]] = {
    **{how: partial(SimplePooling, how) for how in SIMPLE},
    "additive": AdditivePooling,
    "structured": StructuredPooling,
}


def make_pooling(name: str, dim: int, num_heads: int = 1, **options: Any) -> Pooling:
    """A pool of `POOLINGS` by its name.

    Args:
        name: ``mean``, ``max``, ``first``, ``last``, ``additive`` or ``structured``.
        dim: width D of the tokens.
        num_heads: number of slots of ``structured`` if `slots` is not given.
        options: options of the pool.

    Raises:
        Unsupported: for an unknown name, options that the pool does not take, or sizes that are not positive integers.
    """
    if name not in POOLINGS:
        raise Unsupported(f"pool {name!r}", supported=", ".join(POOLINGS), nearest=closest(str(name), POOLINGS))
    own = [word for word in inspect.signature(POOLINGS[name]).parameters if word not in ("dim", "num_heads")]
    for option in options:
        if option not in own:
            raise Unsupported(
                f"option {option!r} of pool {name!r}",
                supported=", ".join(own) or "no options",
                nearest=closest(option, own),
            )
    return POOLINGS[name](dim, num_heads, **options)


def check_size(name: str, value: Any) -> int:
    """Return `value` if it is an integer of at least 1; raise Unsupported otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Unsupported(f"{name}={value!r}", supported=f"a whole number {name} >= 1", nearest=f"{name}=1")
    return value


def pool_by_scores(
    x: Float[Tensor, "b n d"],
    scores: Float[Tensor, "b s n"],
    valid: Bool[Tensor, "b n"] | None,
    *,
    diversity: bool = False,
    want: Set[str] = frozenset(),
) -> Result:
    """A X, where A is the softmax of the scores over the tokens, in at least float32.

    Args:
        x: tokens, with zeros where they are not valid.
        scores: score of each token for each slot.
        valid: mask of the valid tokens; None when all are valid.
        diversity: whether to return as a loss the sum of ||A A^T - I||_F^2 over sequences that have tokens, with their
            number.
        want: extras to return; with ``"weights"``, they contain A.

    Returns:
        output (B, S, D) in the dtype of `x`, 0 for a row without tokens.
    """
    scores = wide(scores)
    if valid is None:
        weights = scores.softmax(-1)
    else:
        opened = valid | ~valid.any(-1, keepdim=True)  # a row of -inf only would have NaN gradients
        weights = scores.masked_fill(~opened[:, None], -torch.inf).softmax(-1)
        weights = torch.where(valid[:, None], weights, 0)
    result = Result((weights @ x.to(weights.dtype)).to(x.dtype))
    if diversity:
        count = torch.tensor(x.shape[0] if x.shape[1] else 0, device=x.device)
        some = None
        if valid is not None:
            some = valid.any(-1)
            count = some.sum()
        result.losses["diversity"] = (_overlap(weights, some), count)
    if "weights" in want:
        result.extras["weights"] = weights.to(x.dtype)
    return result


def _overlap(weights: Float[Tensor, "b s n"], some: Bool[Tensor, " b"] | None) -> Float[Tensor, ""]:
    """The sum of ||A A^T - I||_F^2 over rows that have tokens."""
    if weights.shape[-1] == 0:
        return weights.sum()
    identity = torch.eye(weights.shape[1], dtype=weights.dtype, device=weights.device)
    penalty = (weights @ weights.mT - identity).square().sum((1, 2))
    return penalty.sum() if some is None else torch.where(some, penalty, 0).sum()
