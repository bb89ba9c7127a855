"""Short depthwise convolution along the sequence, as gated recurrences apply it to their queries, keys and values.

``y_t = activation(bias + sum_j weight_j * x_{t - left + j})``, each channel on its own, over the *valid* tokens of a
row. In the causal form left = width - 1, and continuing a sequence needs its last width - 1 valid inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import Unsupported, at_least, one_of
from regard.engines.layers import short_convolution

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class ShortConvolution(nn.Module):
    """Depthwise 1-D convolution over right-padded tokens (B, N, C).

    Args:
        channels: number of channels C.
        width: number of filter taps.
        bias: whether to add a learned vector (C,).
        activation: ``"silu"`` or None.
        causal: look back `width` - 1 tokens; otherwise the filter is centred (with one more tap before the token than
            after it when `width` is even), and sequences cannot be continued.
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
            x: inputs; values past a row's length are ignored.
            lengths: number of valid tokens in each row; None when all are valid.
            cache: the cache returned by the call on the preceding tokens; None at the start of a sequence.

        Returns:
            Outputs, zero past a row's length, and the cache for the next tokens (None in noncausal form).

        Raises:
            Unsupported: for shapes that do not fit, or a cache in noncausal form.
        """
        if x.shape[-1] != self.channels:
            raise Unsupported(f"a convolution over {x.shape[-1]} channels", supported=f"{self.channels} channels")
        return short_convolution(
            x,
            self.weight,
            self.bias,
            cache=cache,
            lengths=lengths,
            silu=self.activation == "silu",
            causal=self.causal,
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}, activation={self.activation}, causal={self.causal}"
