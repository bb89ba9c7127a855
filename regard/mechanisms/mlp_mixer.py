r"""MLP-Mixer: a small feed-forward network along the tokens, shared by all channels, in place of attention.

When to pick it: images of one size, cut into patches whose positions mean the same in every image; the baseline that
shows what a static mixture of positions achieves.
When not: inputs of many lengths, lookups by content, or causal models: its matrices depend on position alone.

Definition (Tolstikhin et al., MLP-Mixer, arXiv 2105.01601, equation 1), for the tokens x_c of each channel c:

    y_c = W_2 gelu(W_1 x_c + b_1) + b_2,     W_1 of shape (T, L), W_2 of shape (L, T)

| paper | here |
|---|---|
| W_1, W_2 | `up` (T, L), `down` (L, T); `weights.up`, `weights.down` of the layer, with `up_bias` and `down_bias` |
| S, the number of patches | `length` (L) |
| D_S | `hidden` (T) |

Layout: tokens (B, N, C), with N at most L. The token of rank j among the valid ones of its row uses column j of W_1 and
row j of W_2; the tokens that a shorter row lacks count as zeros and have no output, so a row's output does not depend
on the rest of its batch. On a `grid`, tokens are numbered by their places, row by row, and masked ones count as zeros.
Deviations: inputs of fewer than L tokens, which the paper does not have. GELU is exact, as in timm; the official code
uses JAX's tanh approximation. Layers apply dropout to single numbers after both matrices, as timm does; the paper drops
only whole blocks. The preceding norm, the residual and the channel-mixing network belong to a block, not to this
mechanism. Channels share the network, so `num_heads` has no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract import (
    Call,
    Context,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Result,
    Shape,
    Tensors,
    Unsupported,
    at_least,
    one_of,
)
from regard.core.precision import wide
from regard.core.sampling import normals
from regard.engines.linear import linear
from regard.layers.feed_forward import check_dropout, dropout
from regard.layers.mixer import MixerLayer, Tokens

if TYPE_CHECKING:
    from jaxtyping import Float

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "none": lambda x: x}


@dataclass(frozen=True)
class Config:
    """Options. A function reads `length` and `hidden` from the shapes of its matrices.

    Attributes:
        length: L, the maximum number of tokens in a sequence or grid, >= 1.
        hidden: T, the width between the two matrices, >= 1; half the channels when None, as in the published sizes.
        activation: function between the two matrices: ``gelu``, ``relu``, or ``none``, which makes the mechanism
            linear.
    """

    length: int = 1024
    hidden: int | None = None
    activation: str = "gelu"

    def __post_init__(self) -> None:
        at_least("length", self.length, 1)
        at_least("hidden", self.hidden_of(2), 1)
        one_of("activation", self.activation, ACTIVATIONS)

    def hidden_of(self, width: int) -> int:
        """T, the hidden width, for `width` channels."""
        return max(1, width // 2) if self.hidden is None else self.hidden


def reference(
    call: Call,
    x: Float[Tensor, "b n d"],
    up: Float[Tensor, "j l"],
    up_bias: Float[Tensor, " j"],
    down: Float[Tensor, "l j"],
    down_bias: Float[Tensor, " l"],
) -> Float[Tensor, "b n d"]:
    """The definition, using only the columns and rows of existing tokens."""
    check_length("mlp_mixer", call, x.shape[1], up.shape[1])
    n = x.shape[1]
    hidden = torch.einsum("jn,bnd->bjd", up[:, :n], x) + up_bias[:, None]
    hidden = dropped(call, ACTIVATIONS[call.config.activation](hidden))
    return dropped(call, torch.einsum("nj,bjd->bnd", down[:n], hidden) + down_bias[:n, None])


def parallel(
    call: Call,
    x: Float[Tensor, "b n d"],
    up: Float[Tensor, "j l"],
    up_bias: Float[Tensor, " j"],
    down: Float[Tensor, "l j"],
    down_bias: Float[Tensor, " l"],
) -> Float[Tensor, "b n d"]:
    """Two products over all channels at once, in at least float32."""
    check_length("mlp_mixer", call, x.shape[1], up.shape[1])
    return mix_tokens(call, wide(x), up, up_bias, down, down_bias).to(x.dtype)


def mix_tokens(
    call: Call,
    x: Float[Tensor, "b n d"],
    up: Float[Tensor, "j l"],
    up_bias: Float[Tensor, " j"],
    down: Float[Tensor, "l j"],
    down_bias: Float[Tensor, " l"],
) -> Float[Tensor, "b n d"]:
    """Apply the network along the tokens of `x`, whose padding holds zeros; outputs beyond L are zero."""
    n, longest = x.shape[1], up.shape[1]
    if n > longest:
        return F.pad(mix_tokens(call, x[:, :longest], up, up_bias, down, down_bias), (0, 0, 0, n - longest))
    if torch.compiler.is_compiling():  # a program for all lengths needs weights of one shape
        whole = F.pad(x, (0, 0, 0, longest - n))
        return feed_forward(call, whole.mT, up, up_bias, down, down_bias).mT[:, :n]
    return feed_forward(call, x.mT, up[:, :n], up_bias, down[:n], down_bias[:n]).mT


def feed_forward(
    call: Call,
    x: Float[Tensor, "... i"],
    up: Float[Tensor, "j i"],
    up_bias: Float[Tensor, " j"],
    down: Float[Tensor, "i j"],
    down_bias: Float[Tensor, " i"],
) -> Float[Tensor, "... i"]:
    """``W_2 act(W_1 x + b_1) + b_2`` over the last axis, in the dtype of `x`, with the call's dropout after both
    maps."""
    up, up_bias, down, down_bias = (weight.to(x.dtype) for weight in (up, up_bias, down, down_bias))
    hidden = dropped(call, ACTIVATIONS[call.config.activation](linear(x, up, up_bias)))
    return dropped(call, linear(hidden, down, down_bias))


def dropped(call: Call, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """`x` with the call's dropout."""
    return dropout(x, call.dropout, training=True, generator=call.generator)


def check_length(name: str, call: Call, n: int, longest: int) -> None:
    """Refuse more tokens than there are columns; lengths in tensors are not checked in a graph."""
    if call.lengths is not None and not torch.compiler.is_compiling():
        n = int(call.lengths.max()) if call.lengths.numel() else 0
    if n > longest:
        raise Unsupported(
            f"{name} on {n} tokens", supported=f"at most {longest}, its columns", nearest=f"length={n} in the layer"
        )


class TokenMixingLayer(MixerLayer):
    """The token-mixing network as a layer, (B, N, C) -> (B, N, C), without norm or residual.

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: accepted for a uniform signature; all channels share the network.
        pattern: noncausal-self.
        dropout: dropout probability after each of the two matrices, in training.
        config: see :class:`Config`.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.NONCAUSAL_SELF,
        dropout: float = 0.0,
        config: Config | None = None,
    ) -> None:
        super().__init__(card, dim, pattern=pattern, config=config)
        check_dropout(dropout)
        self.dropout = dropout
        shapes = feed_forward_shapes(self.config.length, self.config.hidden_of(dim))
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official code does: weights with the LeCun normal distribution, biases with 0."""
        for parameter in self.weights.values():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                lecun_normal_(parameter)

    def mix(self, tokens: Tokens, memory: Tokens | None, context: Context, state: Any) -> Result:
        inputs = {"x": tokens.x, **self.weights}
        return self.call(inputs, tokens, context, state, dropout=self.dropout if self.training else 0.0)


def feed_forward_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of :func:`feed_forward`, by their names."""
    return {"up": (hidden, width), "up_bias": (hidden,), "down": (width, hidden), "down_bias": (width,)}


def lecun_normal_(weight: Tensor) -> None:
    """Fill with a normal distribution of variance 1 / fan-in after truncation at two of its standard deviations."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of two products along the tokens for each channel."""
    width = shape.heads * shape.dim_value
    tokens, hidden = shape.batch * width, config.hidden_of(width)
    return Cost(
        flops=4.0 * tokens * shape.n * hidden,
        memory=float(tokens * (hidden + shape.n)),
        state=0.0,
        step_flops=0.0,
    )


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Axis sizes: hidden features, places, and features of the tokens."""
    width = shape.heads * shape.dim_value
    return {"j": config.hidden_of(width), "l": shape.n, "d": width}


def sample_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    pattern: Pattern,
    config: Config,
    sizes: dict[str, int] | None = None,
    grid: tuple[int, ...] | None = None,
) -> Tensors:
    """Random inputs for tests, with matrices that have columns for a few extra tokens."""
    size = {"d": 8, "j": 5, "l": n + 3, **(sizes or {})}
    shapes = {"x": (batch, n, size["d"]), **feed_forward_shapes(max(size["l"], n), size["j"])}
    return scaled_normals(generator, shapes, dtype)


def scaled_normals(generator: torch.Generator, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Tensors:
    """Normal tensors; matrices are scaled to preserve the variance of their inputs."""
    found = normals(generator, shapes, torch.float64)
    return {name: (x * x.shape[1] ** -0.5 if x.ndim == 2 else x).to(dtype) for name, x in found.items()}


STATIC = "its matrices belong to the positions of one sequence"

MECHANISM = Mechanism(
    name="mlp_mixer",
    aliases=("mixer", "token_mixing"),
    kind=Kind.MIXER,
    summary="A small feed-forward network along the tokens, the same for every channel; its length is limited.",
    paper=Paper("MLP-Mixer: An all-MLP Architecture for Vision", "2105.01601", 2021),
    inputs={"x": "bnd", "up": "jl", "up_bias": "j", "down": "lj", "down_bias": "l"},
    output="bnd",
    patterns=(Pattern.NONCAUSAL_SELF,),
    refused={
        Pattern.CAUSAL_SELF: "each number between the two matrices depends on all tokens, including later ones",
        Pattern.NONCAUSAL_CROSS: STATIC,
        Pattern.CAUSAL_CROSS: STATIC,
    },
    forms={"reference": reference, "parallel": parallel},
    config=Config,
    variants={
        "narrow": {"length": 150, "hidden": 6, "activation": "relu"},
        "linear, on a grid": {"length": 200, "hidden": 24, "activation": "none"},
    },
    grid_variants=frozenset({"linear, on a grid"}),
    honours=frozenset({"dropout", "grid"}),
    cost=cost,
    default_scale=1.0,
    accepts_positions=("none", "sinusoidal", "learned"),
    length="max",
    axis_sizes=axis_sizes,
    sample_inputs=sample_inputs,
    module=TokenMixingLayer,
)
