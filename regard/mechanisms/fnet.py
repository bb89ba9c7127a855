r"""FNet: tokens are mixed by a discrete Fourier transform over positions and features, without parameters.

When to pick it: as the cheapest mixing in an encoder, O(N log N) with nothing to learn or cache; as a control that
shows how much of a score attention contributes.
When not: decoding (each output depends on all tokens), or finding single tokens: the mixing does not depend on content.

Definition (Lee-Thorp et al., arXiv 2105.03824, section 3; survey arXiv 2103.14636, C7), for a sequence of L tokens

    y = Re(F_seq(F_hidden(x))),   y[j, e] = sum_{t<L} sum_{f<D} cos(2 pi (j t / L + e f / D)) x[t, f]

| paper | here |
|---|---|
| N (or n), d_h | tokens of the row L, features D |
| x, y | `x` (B, N, D), the output |

Layout: (B, N, D), features last; features are not split into heads, so `num_heads` has no effect.
Padding: valid tokens are gathered, and each row or document is transformed at its own length, whatever it is batched with.
Other implementations transform the padding as well, so a row's output depends on how far it is padded.
Scale: y grows as sqrt(L D), which the paper's norm after each residual removes. `orthonormal=True` divides by that, for
pre-norm blocks. The call's scale, 1 by default, multiplies y.
Deviations: rows of unequal length are transformed by convolution with a chirp (Bluestein), at the cost of two
transforms of twice the length, on half the features since x is real.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.contract import Call, Context, Cost, Kind, Mechanism, Paper, Pattern, Result, Shape, Waiver
from regard.core.precision import wide
from regard.engines.fourier import transform_rows
from regard.layers.mixer import MixerLayer, Tokens

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Config:
    """Options.

    Attributes:
        orthonormal: whether to divide by sqrt(L D), so that outputs are as large as inputs.
    """

    orthonormal: bool = False


def reference(call: Call, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """The definition, with full matrices of cosines and sines."""
    n, width = x.shape[1:]
    if x.numel() == 0:
        return x
    places, features = (torch.arange(size, dtype=x.dtype, device=x.device) for size in (n, width))
    along = 2 * math.pi * torch.outer(places, places).remainder(n) / n
    across = 2 * math.pi * torch.outer(features, features).remainder(width) / width
    y = along.cos() @ x @ across.cos() - along.sin() @ x @ across.sin()
    return call.scale * (y / math.sqrt(n * width) if call.config.orthonormal else y)


def parallel(call: Call, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Fast transforms, over features and then over positions."""
    batch, n, width = x.shape
    if x.numel() == 0:
        return x
    tokens = wide(x)
    if call.lengths is None:
        y, count = torch.fft.fft2(tokens).real, torch.full((batch,), n, device=x.device)
    else:
        count = call.lengths.clamp(min=1)
        y = transform_rows(torch.fft.rfft(tokens).mT, call.lengths).real.mT
        # x is real: feature D - e at position -j is the conjugate of feature e at position j
        places = torch.arange(n, device=x.device)
        opposite = torch.where(places < count[:, None], (count[:, None] - places) % count[:, None], places)
        rest = y[..., 1 : (width + 1) // 2].flip(-1)
        y = torch.cat([y, rest.gather(1, opposite[..., None].expand(rest.shape))], -1)
    if call.config.orthonormal:
        y = y * (count * width).to(y.dtype).rsqrt()[:, None, None]
    return (call.scale * y).to(x.dtype)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of rows without padding, with D the features of all heads together."""
    width, n = shape.heads * shape.dim_value, max(shape.n, 1)
    across = 2.5 * n * width * math.log2(max(width, 2))
    along = 5.0 * (width // 2 + 1) * n * math.log2(max(n, 2))
    return Cost(
        flops=shape.batch * (across + along), memory=float(2 * shape.batch * n * width), state=0.0, step_flops=0.0
    )


class FNetLayer(MixerLayer):
    """The Fourier transform as a layer, (B, N, D) -> (B, N, D), without parameters, norm and residual.

    Args:
        card: the mechanism.
        dim: width D of the input and output.
        num_heads: unused; accepted for a uniform signature.
        pattern: noncausal-self.
        config: see :class:`Config`.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.NONCAUSAL_SELF,
        config: Config | None = None,
    ) -> None:
        super().__init__(card, dim, pattern=pattern, config=config)

    def mix(self, tokens: Tokens, memory: Tokens | None, context: Context, state: Any) -> Result:
        return self.call({"x": tokens.x}, tokens, context, state)


NO_QUERIES = "a transform has no queries that could read another sequence"

MECHANISM = Mechanism(
    name="fnet",
    aliases=("fourier", "fourier_transform"),
    kind=Kind.MIXER,
    summary="Tokens are mixed by a discrete Fourier transform over positions and features, without parameters.",
    paper=Paper("FNet: Mixing Tokens with Fourier Transforms", "2105.03824", 2021, 18),
    inputs={"x": "bnd"},
    output="bnd",
    patterns=(Pattern.NONCAUSAL_SELF,),
    refused={
        Pattern.CAUSAL_SELF: "each frequency sums over all tokens, including later ones",
        Pattern.NONCAUSAL_CROSS: NO_QUERIES,
        Pattern.CAUSAL_CROSS: NO_QUERIES,
    },
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "orthonormal": {"orthonormal": True},
    },
    cost=cost,
    default_scale=1.0,
    weights="implicit",
    accepts_positions=("none", "sinusoidal", "learned"),
    module=FNetLayer,
    waivers=(
        Waiver("layer_save", "the layer has no parameters: every copy of it gives the same output"),
        Waiver("layer_onnx", "ONNX Runtime's Fourier transform is off by twice the published tolerance"),
    ),
)
