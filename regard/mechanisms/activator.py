r"""Activator: a gated feed-forward network with norms inside, in place of attention. As published it mixes no tokens.

When to pick it: as a control that shows how much of a model's score comes from mixing tokens at all: with it a vision
transformer is a bag of patches that meet only in the final mean. With ``mixing="convolution"`` or ``"shift"`` it is a
cheap mixer of neighbouring tokens.
When not: as published, whenever relations between tokens matter: the output cannot tell which token comes first.

Definition (Abdullah & Aydin, Activator, arXiv 2405.15953), for each token alone:

    u = LN(gelu(W_1 x + b_1)),   v = LN(W_2 x + b_2),   y = W_3 (u * v) + b_3

with one norm, over the hidden width, in both places. In u the activation comes before the norm.

| paper | here |
|---|---|
| W_1, W_2, W_3 | `gate` (F, C), `value` (F, C), `down` (C, F), each with its `..._bias` |
| LN | `norm`, `norm_bias` (F), and for v `value_norm`, `value_norm_bias` where they are given |
| hidden_dim | `hidden` (F) |
| (a repair, not the paper's) | `mixing`, before the rest; `filter` (C, taps), `filter_bias` |

Layout: tokens (B, N, C); as published, both self patterns are the same map and there is no state to keep between
tokens. `mixing` replaces x by a depthwise convolution with 3 taps per axis, or by a shift: the channels are divided in
order into equal parts, of which one stays and one comes from each neighbour (before and after; on a `grid` along each
axis; in causal-self only the previous token). Both see zeros beyond the ends and at masked places of a grid. In
causal-self the convolution only looks back, and the state is the last inputs that it needs.
Deviations: `mixing`, which is not in the paper; `glu`, `norm` and separate norms, as ablations. A layer's convolution
is initialised to the identity, which gives the published unit. The norm before the unit, which the official block
shares with its feed-forward network, belongs to the block (`regard.models.vision.mixer`). The function omits norms that
it is not given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
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
    State,
    Tensors,
    Unsupported,
    at_least,
    lengths_after,
    one_of,
    state_field,
)
from regard.core.grids import image_of, tokens_of
from regard.core.precision import wide
from regard.engines.layers import short_convolution
from regard.engines.linear import linear
from regard.layers.mixer import MixerLayer, Tokens
from regard.mechanisms.large_kernel import CONVOLUTIONS
from regard.mechanisms.mlp_mixer import scaled_normals
from regard.mechanisms.ninformer import initialise_as_torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int

EPS = 1e-5
"""Epsilon of the layer norms."""

GLUS: dict[str, Callable[[Tensor], Tensor]] = {"geglu": F.gelu, "swiglu": F.silu, "reglu": F.relu}
NORMS = ("shared", "separate", "none")
REACH = {"none": 0, "shift": 1, "convolution": 2}
"""Past tokens that the causal form of each mixing keeps in its state."""

SIDE = 3
"""Taps per axis of a layer's convolution."""


@dataclass(frozen=True)
class Config:
    """Options. Functions use `glu` and `mixing`, and the weights that they are given.

    Attributes:
        hidden: F, the hidden width, >= 1; twice the channels when None, as published.
        glu: activation of the gate: ``geglu``, ``swiglu`` or ``reglu``.
        norm: the layer's norms: ``shared`` by both factors, ``separate``, or ``none``.
        mixing: how neighbouring tokens mix, before everything else: ``none`` as published, ``convolution`` or
            ``shift``.
    """

    hidden: int | None = None
    glu: str = "geglu"
    norm: str = "shared"
    mixing: str = "none"

    def __post_init__(self) -> None:
        at_least("hidden", self.hidden_of(1), 1)
        one_of("glu", self.glu, GLUS)
        one_of("norm", self.norm, NORMS)
        one_of("mixing", self.mixing, REACH)

    def hidden_of(self, width: int) -> int:
        """F for `width` channels."""
        return 2 * width if self.hidden is None else self.hidden

    def shapes(self, width: int, axes: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights by name, for `width` channels; a filter is for grids of `axes` axes."""
        hidden = self.hidden_of(width)
        found: dict[str, tuple[int, ...]] = {"gate": (hidden, width), "gate_bias": (hidden,)}
        found |= {"value": (hidden, width), "value_bias": (hidden,), "down": (width, hidden), "down_bias": (width,)}
        for name in {"shared": ("norm",), "separate": ("norm", "value_norm"), "none": ()}[self.norm]:
            found |= {name: (hidden,), f"{name}_bias": (hidden,)}
        if self.mixing == "convolution":
            found |= {"filter": (width, SIDE**axes), "filter_bias": (width,)}
        return found


@dataclass(frozen=True)
class RecentTokens(State):
    """The last inputs, needed to mix the next token, with zeros before the first; empty without `mixing`."""

    inputs: Float[Tensor, "b reach d"] = state_field()
    length: Int[Tensor, " b"] = state_field()


def reference(
    call: Call,
    x: Float[Tensor, "b n d"],
    gate: Float[Tensor, "f d"],
    gate_bias: Float[Tensor, " f"],
    value: Float[Tensor, "f d"],
    value_bias: Float[Tensor, " f"],
    down: Float[Tensor, "d f"],
    down_bias: Float[Tensor, " d"],
    norm: Float[Tensor, " f"] | None = None,
    norm_bias: Float[Tensor, " f"] | None = None,
    value_norm: Float[Tensor, " f"] | None = None,
    value_norm_bias: Float[Tensor, " f"] | None = None,
    filter: Float[Tensor, "d w"] | None = None,
    filter_bias: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "b n d"]:
    """The definition, with mixing as a sum over taps of shifted copies of the sequence or grid."""
    taps = _taps(call, x, filter, filter_bias)
    if taps is not None:
        sides = (x.shape[1],) if call.grid is None else tuple(call.grid)
        side = _side(call, taps)
        before = side - 1 if call.pattern.causal else side // 2
        padded = F.pad(x.unflatten(1, sides), (0, 0, *(before, side - 1 - before) * len(sides)))
        mixed = torch.zeros_like(x) if filter_bias is None else filter_bias.expand_as(x)
        for tap, at in enumerate(itertools.product(range(side), repeat=len(sides))):
            window = [slice(i, i + size) for i, size in zip(at, sides, strict=True)]
            mixed = mixed + taps[:, tap] * padded[:, *window].reshape(x.shape)
        x = mixed
    u = _norm(GLUS[call.config.glu](x @ gate.mT + gate_bias), norm, norm_bias)
    second = (norm, norm_bias) if value_norm is None and value_norm_bias is None else (value_norm, value_norm_bias)
    v = _norm(x @ value.mT + value_bias, *second)
    return (u * v) @ down.mT + down_bias


def parallel(call: Call, x: Float[Tensor, "b n d"], **weights: Tensor) -> Float[Tensor, "b n d"]:
    """Whole sequences and grids."""
    if call.pattern.causal:
        return chunked(call, x, **weights).output
    filter, bias = weights.pop("filter", None), weights.pop("filter_bias", None)
    taps, mixed = _taps(call, x, filter, bias), wide(x)
    if taps is not None and call.grid is None:
        mixed, _ = short_convolution(mixed, taps, bias, lengths=call.lengths, silu=False, causal=False)
    elif taps is not None:
        mixed = _convolve(call, mixed, taps, bias)
    return _unit(call, mixed, **weights).to(x.dtype)


def chunked(call: Call, x: Float[Tensor, "b n d"], **weights: Tensor) -> Result:
    """Causal-self from a state; all new tokens are computed at once."""
    filter, bias = weights.pop("filter", None), weights.pop("filter_bias", None)
    taps, mixed = _taps(call, x, filter, bias), wide(x)
    state: RecentTokens | None = call.state
    last = x[:, :0] if state is None else state.inputs
    if taps is not None:
        cache = None if state is None else last
        mixed, recent = short_convolution(mixed, taps, bias, cache=cache, lengths=call.lengths, silu=False)
        last = last.new_empty(0) if recent is None else recent.to(last.dtype)
    before = None if state is None else state.length
    length = lengths_after(before, call.lengths, x.shape[0], x.shape[1], x.device)
    return Result(_unit(call, mixed, **weights).to(x.dtype), RecentTokens(last, length))


def _unit(
    call: Call,
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    value: Tensor,
    value_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    norm: Tensor | None = None,
    norm_bias: Tensor | None = None,
    value_norm: Tensor | None = None,
    value_norm_bias: Tensor | None = None,
) -> Float[Tensor, "b n d"]:
    """The published unit, in the dtype of `x`."""

    def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(x, weight.to(x.dtype), bias.to(x.dtype)).to(x.dtype)

    second = (norm, norm_bias) if value_norm is None and value_norm_bias is None else (value_norm, value_norm_bias)
    u = _norm(GLUS[call.config.glu](project(x, gate, gate_bias)), norm, norm_bias)
    return project(u * _norm(project(x, value, value_bias), *second), down, down_bias)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None and bias is None:
        return x
    weight, bias = (None if given is None else given.to(x.dtype) for given in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _taps(call: Call, x: Tensor, filter: Tensor | None, bias: Tensor | None) -> Float[Tensor, "d w"] | None:
    """The filter that mixes tokens, if there is one; raises Unsupported if the weights do not fit `mixing`."""
    mixing = call.config.mixing
    if (mixing == "convolution") != (filter is not None) or (bias is not None and filter is None):
        given = " and ".join(name for name, w in (("filter", filter), ("filter_bias", bias)) if w is not None)
        raise Unsupported(
            f"mixing={mixing!r} with {given or 'no filter'}",
            supported="a filter with mixing='convolution', and no other",
        )
    axes = 1 if call.grid is None else len(call.grid)
    if mixing != "none" and axes not in CONVOLUTIONS:
        raise Unsupported(f"activator on a grid of {axes} axes", supported="1, 2 or 3 axes")
    taps = shift(x, axes, call.pattern.causal) if mixing == "shift" else filter
    if taps is not None:
        _side(call, taps)
    return taps


def shift(x: Float[Tensor, "b n d"], axes: int, causal: bool) -> Float[Tensor, "d w"]:
    """The shift as a one-hot filter per channel: equal parts of the channels stay or come from each neighbour."""
    side = 2 if causal else 3
    strides = [0, -1] if causal else [0, *(sign * 3**axis for axis in range(axes) for sign in (-1, 1))]
    taps = torch.tensor([side**axes // 2 + stride for stride in strides], device=x.device)
    channels = x.shape[-1]
    own = taps[torch.arange(channels, device=x.device) * len(strides) // max(channels, 1)]
    return (own[:, None] == torch.arange(side**axes, device=x.device)).to(x.dtype)


def _side(call: Call, taps: Float[Tensor, "d w"]) -> int:
    """Taps per axis; raises Unsupported for a filter without a centre, or with unequal numbers of taps per axis."""
    axes = 1 if call.grid is None else len(call.grid)
    side = round(taps.shape[1] ** (1 / axes))
    if side < 1 or side**axes != taps.shape[1] or (side % 2 == 0 and not call.pattern.causal):
        raise Unsupported(f"a filter of {taps.shape[1]} taps on {axes} axes", supported="an odd number for each axis")
    return side


def _convolve(call: Call, x: Float[Tensor, "b n d"], taps: Tensor, bias: Tensor | None) -> Float[Tensor, "b n d"]:
    """Centred depthwise convolution on the call's grid."""
    if x.numel() == 0:
        return x
    grid, side = tuple(call.grid or ()), _side(call, taps)
    filters = taps.to(x.dtype).unflatten(1, (side,) * len(grid))[:, None]
    bias = None if bias is None else bias.to(x.dtype)
    image = image_of(x, grid)
    return tokens_of(CONVOLUTIONS[len(grid)](image, filters, bias, padding=side // 2, groups=x.shape[-1]))


class ActivatorLayer(MixerLayer):
    """The gating unit as a layer, (B, N, C) -> (B, N, C), without the block's norm and residual.

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: unused; accepted for a uniform signature.
        pattern: noncausal-self or causal-self, which are the same map unless tokens mix.
        axes: number of grid axes of the convolution, 1 for sequences; the other mixings take any grid.
        config: see :class:`Config`.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.NONCAUSAL_SELF,
        axes: int = 1,
        config: Config | None = None,
    ) -> None:
        super().__init__(card, dim, pattern=pattern, config=config)
        one_of("axes", axes, (1,) if self.pattern.causal else CONVOLUTIONS)
        self.axes = axes
        if self.config.mixing == "convolution":
            self.grid_axes, self.for_sequences = axes, {"axes": 1}
        shapes = self.config.shapes(dim, axes)
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise weights as torch does for linear layers and norms, and the convolution as the identity."""
        initialise_as_torch(self.weights)
        if "filter" in self.weights:
            centre = SIDE - 1 if self.pattern.causal else SIDE**self.axes // 2
            with torch.no_grad():
                self.weights["filter"].zero_()[:, centre] = 1
                self.weights["filter_bias"].zero_()

    def mix(self, tokens: Tokens, memory: Tokens | None, context: Context, state: Any) -> Result:
        grid = context.grid
        if self.grid_axes is not None and (1 if grid is None else len(grid)) != self.axes:
            raise Unsupported(
                f"grid={grid} for a layer with a filter of {self.axes} axes",
                supported=f"a grid of {self.axes} axes" + (", or a sequence (grid=None)" if self.axes == 1 else ""),
                nearest=f"axes={1 if grid is None else len(grid)}",
            )
        return self.call({"x": tokens.x, **self.weights}, tokens, context, state)


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of the gating unit; the filter's taps are not counted."""
    width = shape.heads * shape.dim_value
    hidden = config.hidden_of(width)
    each = 6.0 * hidden * width
    return Cost(
        flops=each * shape.batch * shape.n,
        memory=3.0 * shape.batch * shape.n * hidden,
        state=float(REACH[config.mixing] * width),
        step_flops=each * shape.batch,
    )


def axis_sizes(shape: Shape, config: Config) -> dict[str, int]:
    """Width of the tokens and hidden width."""
    width = shape.heads * shape.dim_value
    return {"f": config.hidden_of(width), "d": width}


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
    """Random inputs for tests."""
    size = {"d": 8, "f": 7, **(sizes or {})}
    small = Config(size["f"], norm=config.norm, mixing=config.mixing)
    shapes = {"x": (batch, n, size["d"]), **small.shapes(size["d"], 1 if grid is None else len(grid))}
    return scaled_normals(generator, shapes, dtype)


NO_QUERIES = "each output is computed from its own token, and at most from neighbours"

MECHANISM = Mechanism(
    name="activator",
    aliases=("activator_gating_unit",),
    kind=Kind.MIXER,
    summary="A gated feed-forward network with norms inside; as published it mixes no tokens, an option mixes neighbours.",
    paper=Paper("Activator: GLU Activations as The Core Functions of a Vision Transformer", "2405.15953", 2024, 25),
    inputs={
        "x": "bnd",
        "gate": "fd",
        "gate_bias": "f",
        "value": "fd",
        "value_bias": "f",
        "down": "df",
        "down_bias": "d",
        "norm?": "f",
        "norm_bias?": "f",
        "value_norm?": "f",
        "value_norm_bias?": "f",
        "filter?": "dw",
        "filter_bias?": "d",
    },
    output="bnd",
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={Pattern.NONCAUSAL_CROSS: NO_QUERIES, Pattern.CAUSAL_CROSS: NO_QUERIES},
    forms={"reference": reference, "parallel": parallel, "chunked": chunked},
    config=Config,
    variants={
        "convolution": {"mixing": "convolution", "norm": "separate", "hidden": 24},
        "shift": {"mixing": "shift", "glu": "reglu", "norm": "none"},
        "convolution on a grid": {"mixing": "convolution", "glu": "swiglu"},
    },
    variant_patterns={"convolution on a grid": (Pattern.NONCAUSAL_SELF,)},
    grid_variants=frozenset({"convolution on a grid"}),
    honours=frozenset({"grid"}),
    state=RecentTokens,
    cost=cost,
    default_scale=1.0,
    accepts_positions=("none", "sinusoidal", "learned"),
    axis_sizes=axis_sizes,
    sample_inputs=sample_inputs,
    module=ActivatorLayer,
)
