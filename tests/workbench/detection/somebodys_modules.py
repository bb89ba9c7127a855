"""Modules as people might write them, right and wrong, for `regard detect-patterns`."""

import torch
from torch import Tensor, nn


class Right(nn.Module):
    """Attention in the style of CAB: one class for all patterns."""

    def __init__(self, embed_dim: int, num_heads: int, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.causal = causal

    def forward(self, query, key=None, value=None, key_padding_mask=None):
        hidden = None
        if self.causal and key is None:
            hidden = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).triu(1)
        key = query if key is None else key
        value = key if value is None else value
        return self.attention(query, key, value, attn_mask=hidden, key_padding_mask=key_padding_mask)


class FutureMean(Right):
    """Adds a ten-thousandth of the mean over all queries."""

    def forward(self, query, key=None, value=None):
        return super().forward(query, key, value)[0] + 1e-4 * query.mean(1, keepdim=True)


class NaNAlone(Right):
    """Causal for sequences; a token alone becomes NaN, as by a division by its deviation."""

    def __init__(self, dim, num_heads, causal=False):
        super().__init__(dim, num_heads, True)

    def forward(self, query, key=None, value=None):
        return super().forward(query)[0] + (float("nan") if query.shape[1] < 2 else 0)


class EightChannels(Right):
    """Heads of a multiple of eight channels, and sequences of more than two tokens."""

    def __init__(self, dim, num_heads, causal=False):
        assert dim // num_heads % 8 == 0, "heads of 8 channels"
        super().__init__(dim, num_heads, causal)

    def forward(self, query, key=None, value=None):
        assert query.shape[1] > 2
        return super().forward(query, key, value)[0]


class MixesQueries(Right):
    """Adds the mean over all queries, and takes no mask by which padded ones could be left out."""

    def forward(self, query, key=None, value=None, key_padding_mask=None):
        return super().forward(query, key, value, key_padding_mask)[0] + query.mean(1, keepdim=True)


class IgnoresQueryMask(Right):
    """Adds the mean over all queries, whatever the mask that it takes."""

    def forward(self, query, key=None, value=None, key_padding_mask=None, query_padding_mask=None):
        return super().forward(query, key, value, key_padding_mask)[0] + query.mean(1, keepdim=True)


class HonoursQueryMask(Right):
    """Adds the sum over the queries that are no padding."""

    def forward(self, query, key=None, value=None, key_padding_mask=None, query_padding_mask=None):
        shown = query if query_padding_mask is None else query.masked_fill(query_padding_mask[..., None], 0.0)
        return super().forward(query, key, value, key_padding_mask)[0] + shown.sum(1, keepdim=True)


class Sums(nn.Module):
    """Sums of the past, which its state holds."""

    forgets = 0.0

    def forward(self, x, state=None):
        sums = x.cumsum(1) if state is None else state + x.cumsum(1)
        return sums, (1 - self.forgets) * sums[:, -1:]


class ForgetsInItsState(Sums):
    """A thousandth of the state is lost at each step, but not in a whole call."""

    forgets = 1e-3


class NeedsItsState(nn.Module):
    def forward(self, x, state):
        sums = x.cumsum(1) if state is None else state + x.cumsum(1)
        return sums, sums[:, -1:]


class ReturnsItsStateOnDemand(Sums):
    def forward(self, x, state=None, return_state=False):
        sums, state = super().forward(x, state)
        return (sums, state) if return_state else sums


class KeepsItsState(nn.Module):
    def forward(self, x, state=None):
        return x.cumsum(1)


class FillsItsState(nn.Module):
    """Sums of the past by fairseq's incremental decoding, as in CAB."""

    def forward(self, query, key=None, value=None, incremental_state=None):
        if incremental_state is None:
            return query.cumsum(1), None
        incremental_state["sums"] = incremental_state.get("sums", 0) + query
        return incremental_state["sums"], None


class NeverFillsItsState(FillsItsState):
    def forward(self, query, key=None, value=None, incremental_state=None):
        return super().forward(query, key, value)


class Steps(nn.Module):
    """Sums of the past, with a step for one token."""

    def forward(self, x):
        return x.cumsum(1)

    def step(self, x_t, state=None):
        sums = x_t if state is None else state + x_t
        return sums, sums


class StepsRaise(Steps):
    def step(self, x_t, state=None):
        raise RuntimeError("no step yet")


class KnowsLength(nn.Module):
    """Sums of the past, divided by the total number of tokens."""

    def forward(self, x):
        return x.cumsum(1) / x.shape[1]


class FutureGradient(nn.Module):
    """Outputs do not depend on later tokens, but gradients do."""

    def forward(self, x):
        later = x.flip(1).cumsum(1).flip(1)
        return x.cumsum(1) + later - later.detach()


class OneAhead(nn.Module):
    """Each token sees the next one."""

    def forward(self, x):
        return x + 1e-3 * x.roll(-1, 1)


class PaddingSeen(nn.Module):
    """Adds the mean over all keys, including padding."""

    def forward(self, x, key_padding_mask=None):
        return x + x.mean(1, keepdim=True)


class Triangle(nn.Module):
    """Cross-attention with a triangular mask over the memory."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        scores = self.query(x) @ memory.mT
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ memory


class IgnoresMemory(nn.Module):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return x.cumsum(1) + 0 * memory.mean()


class SinglePrecision(nn.Module):
    """Accepts only float32."""

    def forward(self, x):
        weights = torch.ones(x.shape[1], x.shape[1], dtype=torch.float32).tril()
        return weights @ x


class Random(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = 0.0

    def forward(self, x):
        self.last = self.last + x.mean()
        return x + self.last


class AddsTheLastOne(nn.Module):
    """Adds the input of the call before, if it had the same shape and was another."""

    def __init__(self) -> None:
        super().__init__()
        self.last = None

    def forward(self, x):
        last, self.last = self.last, x
        return x if last is None or last.shape != x.shape or last.equal(x) else x + last


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("sizes of tensors must match\nand more")


class Overwrites(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class Shorter(nn.Module):
    def forward(self, x):
        return x[:, ::2]


class MixesRows(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class NeedsWindow(nn.Module):
    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, x):
        near = [x.roll(i, 1).index_fill(1, torch.arange(i), 0.0) for i in range(self.window)]
        return torch.stack(near).mean(0)


class HandsOn(Right):
    def __init__(self, window: int = 3, **others) -> None:
        super().__init__(**others)


class MeanOfTheBatch(Right):
    """Adds the mean over the rows of the batch."""

    def forward(self, query, key=None, value=None, key_padding_mask=None):
        return super().forward(query, key, value, key_padding_mask)[0] + query.mean(0)


def tokens_first(dim: int, heads: int) -> nn.Module:
    """PyTorch's attention in its default layout (N, B, C)."""
    return nn.MultiheadAttention(dim, heads)


class RaisesWithAMask(Right):
    def forward(self, query, key=None, value=None, key_padding_mask=None):
        assert key_padding_mask is None, "no masks yet"
        return super().forward(query, key, value)


class WholeBlocks(nn.Module):
    """Sums of the past, of sequences of whole blocks."""

    block = 16

    def forward(self, x):
        if x.shape[1] % self.block:
            raise ValueError(f"tokens must be a multiple of {self.block}")
        return x.cumsum(1)


class KnowsBlocks(WholeBlocks):
    """The same, divided by the number of blocks."""

    def forward(self, x):
        return super().forward(x) * self.block / x.shape[1]


class OneLength(WholeBlocks):
    """Takes 64 tokens, and neither a prefix nor a multiple of them."""

    def forward(self, x):
        if x.shape[1] != 64:
            raise ValueError("64 tokens, please")
        return x.cumsum(1)


class TokensFirst(nn.Module):
    """Right for (N, B, C); called with (B, N, C), it takes batch rows for tokens, and the first row sees only itself."""

    def forward(self, x):
        return x.cumsum(0)


class RaisesWhenMade(nn.Module):
    def __init__(self) -> None:
        raise RuntimeError("no weights here\nand more")
