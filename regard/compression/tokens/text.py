r"""Fewer tokens per layer in text encoders: PoWER-BERT (arXiv 2001.08950) and Learned Token Pruning (arXiv 2107.00910).

::

    pruning = PrunedTokens(model, counts=[64, 48, 32, 16])          # tokens left after the attention of each layer
    pruning = PrunedTokens(model, thresholds=[0.002, 0.004, ...])   # tokens with more attention than this stay
    pruning.undo()

The score of a token is the attention that it gets: the mean over heads, in PoWER-BERT of the sum over all other
tokens' queries, in LTP of the mean over all queries, so that a threshold means the same at every length. The first
token, which classifiers read, always stays; the others keep their order and positions. Padding is removed first. Tokens
are removed between the attention of a layer and its feed-forward network.

Both can be learned, with the model or alone; :meth:`PrunedTokens.soften` keeps all tokens, each multiplied by a factor
there (PoWER-BERT), or after the feed-forward network (LTP):

| | factor of a token in layer l | penalty |
|---|---|---|
| PoWER-BERT | r_l[rank of its score], r in [0, 1] learned | sum_l l sum_k r_l[k] |
| LTP | sigmoid((score - theta_l) / T), theta learned | mean of the factors |

:meth:`PrunedTokens.harden` removes tokens again: in PoWER-BERT ceil(sum_k r_l[k]) of them stay, never more than in
earlier layers.

Models: models of transformers with layers like BERT's whose outputs are read at the first token; per-token outputs
shrink. Deviations: all rows of a batch keep as many tokens as the row that keeps most; tokens that LTP drops in other
rows are masked. The authors' codes let a learned factor fall on the first token too; LTP's divides by the length of the
padded input, also when tokens have gone, so that its thresholds mean less and less.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.compression.pruning.masks import replace_forward
from regard.compression.tokens.reducers import Tokens
from regard.contract import Unsupported, an_instance, at_least
from regard.integrations.heads import HARD_KEYS

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

CLASS_TOKENS = 1


class PrunedTokens(nn.Module):
    """Token pruning in an encoder; see the module.

    Args:
        model: a model of transformers, with layers like BERT's. It must not be running in another thread.
        counts: tokens that stay after the attention of each layer, including the first token: PoWER-BERT.
        thresholds: mean attention above which a token stays, for each layer: LTP. Exactly one of the two is given.

    Raises:
        Unsupported: for other models, the wrong number of values, and counts that rise.
    """

    def __init__(
        self, model: nn.Module, *, counts: Sequence[int] | None = None, thresholds: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        layers = layers_of(model)
        if (counts is None) == (thresholds is None):
            raise Unsupported("counts and thresholds", supported="one of the two")
        given: Sequence[Any] = counts if counts is not None else thresholds or ()
        if len(given) != len(layers):
            raise Unsupported(f"numbers for {len(given)} layers", supported=f"{len(layers)}, one for each layer")
        if counts is not None:
            at_least("counts", min(counts), CLASS_TOKENS)
            if list(counts) != sorted(counts, reverse=True):
                raise Unsupported(f"counts={list(counts)}", supported="counts that fall, since tokens do not come back")
        self.counts = None if counts is None else list(counts)
        self.thresholds = None if thresholds is None else nn.Parameter(torch.tensor(thresholds))
        self.shares: nn.Parameter | None = None
        self.temperature: float | None = None
        self._run = threading.local()
        self._undo = [_enter(self, i, layer) for i, layer in enumerate(layers)]

    @property
    def tokens(self) -> Tokens:
        """Tokens after the last layer of this thread's last call, with the current place of each initial one."""
        return self._run.tokens

    @property
    def kept(self) -> list[float]:
        """Number of real tokens after each layer of this thread's last call, averaged over rows."""
        return [float(counts.double().mean()) for counts in self._run.kept]

    def penalty(self) -> Float[Tensor, ""]:
        """The penalty to add, with a weight, to the loss of a call with soft pruning."""
        if self.temperature is None and self.shares is None:
            raise Unsupported("the penalty of tokens that go", supported="soften() first")
        if self.shares is not None:
            order = torch.arange(1, len(self.shares) + 1, dtype=self.shares.dtype)
            return (order * self.shares.clamp(0, 1).sum(1)).sum()
        return torch.stack(self._run.factors).mean()

    def soften(self, *, length: int | None = None, temperature: float = 1e-3) -> None:
        """Keep all tokens, each multiplied by a learned factor.

        Args:
            length: for PoWER-BERT, the most tokens of an input.
            temperature: for LTP.
        """
        if self.counts is None:
            at_least("temperature", temperature, 1e-30)
            self.temperature = temperature
        elif length is None:
            raise Unsupported("soft counts without a length", supported="length=, the most tokens of an input")
        else:
            self.shares = nn.Parameter(torch.ones(len(self.counts), length))

    def harden(self) -> None:
        """Remove tokens again, as learned."""
        if self.shares is not None:
            masses = self.shares.detach().clamp(0, 1).sum(1).ceil().clamp(min=CLASS_TOKENS)
            self.counts = [int(n) for n in torch.cummin(masses, 0).values]
        self.shares = self.temperature = None

    def undo(self) -> None:
        """Restore the model's own layers."""
        while self._undo:
            for one in reversed(self._undo.pop()):
                one()

    def begin(self, x: Tensor, mask: Tensor | None) -> None:
        """Start a call with the tokens that enter the first layer, and the mask of real ones."""
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if mask is not None:
            row = mask[:, 0, 0]
            valid = valid & (row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2)
        self._run.tokens, self._run.valid = Tokens.begin(x, CLASS_TOKENS), valid
        self._run.kept, self._run.factors, self._run.late = [], [], None

    @property
    def valid(self) -> Bool[Tensor, "b n"]:
        """Mask of the real tokens."""
        return self._run.valid

    def after(self, layer: int, x: Float[Tensor, "b n c"], weights: Float[Tensor, "b h n n"]) -> Float[Tensor, "b m c"]:
        """The tokens after a layer's attention, possibly fewer, or multiplied by factors."""
        run, valid = self._run, self.valid
        queries = valid[:, None, :, None].to(weights)
        scores = (weights * queries).sum(2).mean(1)  # (B, N)
        if self.counts is None:
            scores = scores / valid.sum(1, keepdim=True)
        else:
            scores = scores - weights.diagonal(dim1=-2, dim2=-1).mean(1)
        tokens = replace(run.tokens, x=x)
        first = torch.arange(x.shape[1], device=x.device) < CLASS_TOKENS
        if self.shares is not None or self.temperature is not None:
            factor = torch.where(first, 1.0, self._factor(layer, scores.masked_fill(~valid, -torch.inf)))
            run.factors.append(factor[valid].mean())
            run.kept.append(valid.sum(1))
            if self.shares is None:
                run.late, run.tokens = factor, tokens
            else:
                run.tokens = replace(tokens, x=x * factor[..., None].to(x))
            return run.tokens.x
        order = scores.masked_fill(~valid, -torch.inf).masked_fill(first, torch.inf)
        if self.counts is not None:
            stays, count = valid, min(self.counts[layer], x.shape[1])
        else:
            assert self.thresholds is not None
            stays = valid & (first | (scores > self.thresholds[layer]))
            count = int(stays.sum(1).max())
        chosen = order.topk(count, dim=1).indices.sort(1).values
        run.valid = stays.gather(1, chosen)
        run.tokens = tokens.take(chosen)
        run.kept.append(run.valid.sum(1))
        return run.tokens.x

    def passed(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The tokens after a layer's feed-forward network, multiplied by LTP's factors while they are learned."""
        factor, self._run.late = self._run.late, None
        return x if factor is None else x * factor[..., None].to(x)

    def _factor(self, layer: int, scores: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        if self.shares is None:
            assert self.thresholds is not None and self.temperature is not None
            return ((scores - self.thresholds[layer]) / self.temperature).sigmoid()
        rank = scores.argsort(1, descending=True).argsort(1)
        if scores.shape[1] > self.shares.shape[1]:
            raise Unsupported(f"{scores.shape[1]} tokens", supported=f"{self.shares.shape[1]}, as soften() was told")
        return self.shares[layer].clamp(0, 1)[rank]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of an encoder, quantized or not; raises Unsupported for other models."""
    found = [
        list(row) for row in model.modules() if isinstance(row, nn.ModuleList) and len(row) and all(map(_fits, row))
    ]
    if len(found) != 1:
        raise Unsupported(
            f"fewer tokens in {an_instance(model)}",
            supported="encoders of transformers with layers as BERT's: softmax by its attention interface, norms after branches",
        )
    return found[0]


def _fits(layer: Any) -> bool:
    attention = getattr(layer, "attention", None)
    if not hasattr(layer, "feed_forward_chunk") or set(layer._modules) != {"attention", "intermediate", "output"}:
        return False
    if not isinstance(attention, nn.Module) or set(attention._modules) != {"self", "output"}:
        return False  # a norm in front, as in ESM, would be passed over
    heads: Any = attention.self
    plain = set(heads._modules) <= {"query", "key", "value", "dropout"} and not hasattr(heads, HARD_KEYS)
    return plain and hasattr(heads, "config") and hasattr(heads, "scaling")


def _enter(pruning: PrunedTokens, number: int, layer: Any) -> list[Any]:
    """Make a layer of BERT output only the tokens that `pruning` keeps."""
    attention = layer.attention
    config = attention.self.config
    own = copy.copy(config)
    own._attn_implementation = "eager"  # eager attention returns its weights
    attention.self.config = own

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **named: Any) -> Tensor:
        if number == 0:
            pruning.begin(hidden_states, attention_mask)
        hidden = torch.zeros_like(pruning.valid, dtype=hidden_states.dtype)
        hidden = hidden.masked_fill(~pruning.valid, torch.finfo(hidden.dtype).min)[:, None, None]
        context, weights = attention.self(hidden_states, attention_mask=hidden)
        x = pruning.after(number, attention.output(context, hidden_states), weights)
        return pruning.passed(layer.feed_forward_chunk(x))

    return [lambda: setattr(attention.self, "config", config), replace_forward(layer, forward)]
