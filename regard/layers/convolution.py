"""Short depthwise convolution along the sequence, as gated recurrences use it before their queries, keys and values.

``y_t = activation(bias + sum_j weight_j * x_{t - left + j})`` for each channel alone, over the *valid* tokens of a row.
In causal form left = width - 1 and what must be kept to go on is the last width - 1 valid inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Unsupported, at_least, one_of, valid_from_lengths
from regard.ragged import check_lengths

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class ShortConvolution(nn.Module):
    """Depthwise 1-D convolution over (B, N, C), right-padded.

    Args:
        channels: C.
        width: taps of the filter.
        bias: whether it adds a learned vector (C,).
        activation: ``"silu"`` or None.
        causal: see `width` - 1 tokens back; otherwise the filter is centred (one more tap before the token than after
            it when `width` is even), and there is nothing to continue from.
    """

    def __init__(
        self, channels: int, width: int = 4, *, bias: bool = False, activation: str | None = "silu", causal: bool = True
    ) -> None:
        super().__init__()
        at_least("channels", channels, 1)
        at_least("width", width, 1)
        one_of("activation", activation, ("silu", None))
        self.channels, self.width, self.activation, self.causal = channels, width, activation, causal
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        lengths: Int[Tensor, " b"] | None = None,
        cache: Float[Tensor, "b width-1 c"] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b width-1 c"] | None]:
        """Convolve a sequence, or continue one from `cache`; a single token is a sequence of one.

        Args:
            x: inputs; those past a row's length may hold anything.
            lengths: valid tokens of each row; None when all are.
            cache: what the call on the tokens before returned; None at the start of a sequence.

        Returns:
            Outputs, zero past a row's length, and the cache for the tokens that follow (None in noncausal form).

        Raises:
            Unsupported: for shapes that do not fit, or a cache in noncausal form.
        """
        batch, n, channels = x.shape
        if channels != self.channels:
            raise Unsupported(f"a convolution over {channels} channels", supported=f"{self.channels} channels")
        if lengths is not None:
            check_lengths(lengths, batch, n)
            valid = valid_from_lengths(lengths, n)[..., None]
            x = torch.where(valid, x, x.new_zeros(()))
        extended = torch.cat([self._before(x, cache), x, x.new_zeros(batch, self._after, channels)], dim=1)
        # conv1d refuses inputs shorter than its filter, which is how a sequence without tokens looks to it.
        y = F.conv1d(extended.mT, self.weight[:, None], self.bias, groups=channels).mT if n else x
        if self.activation == "silu":
            y = F.silu(y)
        if lengths is not None:
            y = torch.where(valid, y, y.new_zeros(()))
        return y, self._last_inputs(extended, lengths) if self.causal else None

    @property
    def _after(self) -> int:
        return 0 if self.causal else (self.width - 1) // 2

    def _before(self, x: Tensor, cache: Tensor | None) -> Tensor:
        """Inputs that precede the sequence: those kept, or zeros."""
        if cache is None:
            return x.new_zeros(x.shape[0], self.width - 1 - self._after, self.channels)
        if not self.causal:
            raise Unsupported("a cache for a noncausal convolution", supported="causal=True", nearest="cache=None")
        if cache.shape != (x.shape[0], self.width - 1, self.channels):
            raise Unsupported(
                f"a convolution cache of shape {tuple(cache.shape)}",
                supported=f"({x.shape[0]}, {self.width - 1}, {self.channels})",
            )
        return cache.to(x.dtype)

    def _last_inputs(self, extended: Tensor, lengths: Tensor | None) -> Tensor:
        """The last width - 1 valid inputs of each row; they reach into the tokens before when the row is short."""
        kept = self.width - 1
        if lengths is None:
            return extended[:, extended.shape[1] - kept :]
        index = lengths[:, None] + torch.arange(kept, device=lengths.device)
        return extended.gather(1, index[..., None].expand(-1, -1, self.channels))

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}, activation={self.activation}, causal={self.causal}"
