r"""Large kernel attention: a gate from a large neighbourhood, built of two small depthwise convolutions and a pointwise.

When to pick it: images and other grids at high resolution, where the cost must stay linear in the number of pixels and
neighbourhood matters; the gate differs by place and by channel.
When not: dependencies beyond its receptive field (23 x 23 by default); sequences that attend to another one.

Definition (Guo et al., Visual Attention Network, arXiv 2202.09741, equations 1-2), for X (B, C, H, W):

    A = PW(DWD(DW(X))),   LKA(X) = A * X
    Attn(X) = X + W_2 LKA(gelu(W_1 X))       (the layer; the gate multiplies the input of LKA)

Without softmax or sigmoid A is unbounded and signed. DW is depthwise with side k1 = 2d - 1, DWD depthwise with side k2
= ceil(K / d) and dilation d, PW mixes channels. They are composed, not summed, each with a bias and with zeros around
its own input. The field of A has side k1 + d (k2 - 1).

| paper | here |
|---|---|
| K, d | `kernel`, `dilation`: (7, 2), (14, 3), (21, 3) and (28, 4) have fields of 9, 17, 23 and 31 |
| DW, DWD | `depthwise` (C, k1^axes), `dilated` (C, k2^axes): taps row by row, as tokens are |
| PW | `pointwise` (C, C): output channel first |

Layout: tokens (B, N, C), row by row on the `grid` of the call, which may have one, two or three axes. Without a grid the
tokens are a sequence, as with a grid of one axis, except that padding is then gathered away.
On a grid invalid places stay where they are and are zeroed before each convolution, so masked rows at the border act
like a smaller grid; the original has no masks.
Deviations: the causal 1-D form is not in the paper: both convolutions look back only, by k1 - 1 and d (k2 - 1), and the
state is the last k1 - 1 inputs of DW and the last d (k2 - 1) outputs of DW, 22 C numbers by default. `gating`, `sigmoid`
and leaving out a convolution are the paper's ablations and their like. The layer keeps the original's inner residual
(`residual=True`), so that in a residual host block the normed input is added once more; switch it off for the host's
alone. Channels are not split into heads: `num_heads` has no effect on the layer. LSKA, another paper, has filters that
are outer products of a row and a column: functions take them as `depthwise` and `dilated`, without its lower cost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.apply import apply
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
    one_of,
    state_field,
)
from regard.core.precision import wide, wide_dtype
from regard.engines.linear import linear
from regard.layers.linear import make_linear
from regard.layers.mixer import MixerLayer, Tokens

if TYPE_CHECKING:
    from jaxtyping import Float, Int

GATINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiply": lambda a, x: a * x,
    "add": lambda a, x: a + x,
    "none": lambda a, x: a,
}
NAMES = ("depthwise", "dilated", "pointwise")
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Config:
    """Options. Functions use `kernel`, `dilation`, `gating` and `sigmoid`, and the convolutions that they are given.

    Attributes:
        kernel: K, the side that is decomposed, >= 1.
        dilation: d, >= 1; d (ceil(K / d) - 1) must be even, so that the dilated filter can be centred.
        gating: what A does to the input: ``multiply``, ``add``, or ``none`` (A is the output).
        sigmoid: whether A goes through a sigmoid first.
        without: of ``depthwise``, ``dilated``, ``pointwise``: those that the layer does not have; not both of the first.
        residual: whether the layer adds its input to its output.
    """

    kernel: int = 21
    dilation: int = 3
    gating: str = "multiply"
    sigmoid: bool = False
    without: tuple[str, ...] = ()
    residual: bool = True

    def __post_init__(self) -> None:
        at_least("kernel", self.kernel, 1)
        at_least("dilation", self.dilation, 1)
        one_of("gating", self.gating, GATINGS)
        if self.dilated_span % 2 == 0:
            raise Unsupported(
                f"kernel={self.kernel} with dilation={self.dilation}, whose dilated filter has no centre",
                supported="dilation * (ceil(kernel / dilation) - 1) even",
                nearest=f"kernel={self.kernel + self.dilation}",
            )
        for name in self.without:
            one_of("without", name, NAMES)
        if {"depthwise", "dilated"} <= set(self.without):
            raise Unsupported(f"without={self.without}, where no tokens mix", supported="depthwise or dilated kept")

    @property
    def depthwise_side(self) -> int:
        """k1."""
        return 2 * self.dilation - 1

    @property
    def dilated_side(self) -> int:
        """k2."""
        return -(-self.kernel // self.dilation)

    @property
    def dilated_span(self) -> int:
        """Side of the neighbourhood of the dilated filter, d (k2 - 1) + 1; even spans cannot be centred."""
        return self.dilation * (self.dilated_side - 1) + 1

    @property
    def receptive_field(self) -> int:
        """Side of the neighbourhood that A sees with both convolutions."""
        return self.depthwise_side + self.dilated_span - 1


@dataclass(frozen=True)
class ConvolutionState(State):
    """The past that the causal form needs; zeros before the first token, and no width without the convolution.

    `inputs` are the last inputs of DW in the model's dtype, `mixed` the last outputs of DW in at least float32.
    """

    inputs: Float[Tensor, "b k1-1 c"] = state_field()
    mixed: Float[Tensor, "b d*(k2-1) c"] = state_field()
    length: Int[Tensor, " b"] = state_field()


def reference(
    call: Call,
    x: Float[Tensor, "b n c"],
    depthwise: Float[Tensor, "c j"] | None = None,
    depthwise_bias: Float[Tensor, " c"] | None = None,
    dilated: Float[Tensor, "c i"] | None = None,
    dilated_bias: Float[Tensor, " c"] | None = None,
    pointwise: Float[Tensor, "o c"] | None = None,
    pointwise_bias: Float[Tensor, " o"] | None = None,
) -> Float[Tensor, "b n c"]:
    """The definition: each convolution as a sum over its taps of the shifted grid."""
    config: Config = call.config
    sides = _sides(call, x, depthwise, depthwise_bias, dilated, dilated_bias, pointwise, pointwise_bias)

    def convolve(a: Tensor, weight: Tensor, bias: Tensor | None, side: int, dilation: int) -> Tensor:
        reach = dilation * (side - 1)
        before = reach if call.pattern.causal else reach // 2
        padded = F.pad(a, (0, 0, *(before, reach - before) * len(sides)))
        total = torch.zeros_like(a) if bias is None else bias.expand_as(a)
        for tap, at in enumerate(itertools.product(range(side), repeat=len(sides))):
            window = [slice(dilation * i, dilation * i + size) for i, size in zip(at, sides, strict=True)]
            total = total + weight[:, tap] * padded[:, *window]
        return total if call.valid is None else torch.where(call.valid.view(-1, *sides, 1), total, 0)

    a = x.reshape(x.shape[0], *sides, x.shape[-1])
    if depthwise is not None:
        a = convolve(a, depthwise, depthwise_bias, config.depthwise_side, 1)
    if dilated is not None:
        a = convolve(a, dilated, dilated_bias, config.dilated_side, config.dilation)
    a = a.reshape(x.shape)
    if pointwise is not None:
        a = torch.einsum("oc,bnc->bno", pointwise, a) + (0 if pointwise_bias is None else pointwise_bias)
    return GATINGS[config.gating](a.sigmoid() if config.sigmoid else a, x)


def parallel(
    call: Call,
    x: Float[Tensor, "b n c"],
    depthwise: Float[Tensor, "c j"] | None = None,
    depthwise_bias: Float[Tensor, " c"] | None = None,
    dilated: Float[Tensor, "c i"] | None = None,
    dilated_bias: Float[Tensor, " c"] | None = None,
    pointwise: Float[Tensor, "o c"] | None = None,
    pointwise_bias: Float[Tensor, " o"] | None = None,
) -> Float[Tensor, "b n c"]:
    """Whole grids and sequences."""
    weights = (depthwise, depthwise_bias, dilated, dilated_bias, pointwise, pointwise_bias)
    if call.pattern.causal:
        return chunked(call, x, *weights).output
    config: Config = call.config
    sides = _sides(call, x, *weights)
    valid = call.valid_queries(x.shape[1]) if call.valid is None else call.valid
    a = wide(x)
    if depthwise is not None:
        a = _convolve(a, depthwise, depthwise_bias, sides, config.depthwise_side, 1)
        a = a if valid is None else torch.where(valid[..., None], a, 0)
    if dilated is not None:
        a = _convolve(a, dilated, dilated_bias, sides, config.dilated_side, config.dilation)
    return _gated(call, a, x, pointwise, pointwise_bias)


def chunked(
    call: Call,
    x: Float[Tensor, "b n c"],
    depthwise: Float[Tensor, "c j"] | None = None,
    depthwise_bias: Float[Tensor, " c"] | None = None,
    dilated: Float[Tensor, "c i"] | None = None,
    dilated_bias: Float[Tensor, " c"] | None = None,
    pointwise: Float[Tensor, "o c"] | None = None,
    pointwise_bias: Float[Tensor, " o"] | None = None,
) -> Result:
    """Causal-self with state in and out. Memory is linear in N as it is, so chunks of any size are computed at once;
    padding is on the right, where no valid token looks."""
    config: Config = call.config
    _sides(call, x, depthwise, depthwise_bias, dilated, dilated_bias, pointwise, pointwise_bias)
    dtype, n = wide_dtype(x), x.shape[1]
    state = _state(call, x, depthwise, dilated)
    inputs = torch.cat([state.inputs, x.to(state.inputs.dtype)], 1)
    a = x.to(dtype)
    if depthwise is not None and n:
        a = _correlate(inputs.to(dtype), depthwise, depthwise_bias, 1)
    mixed = torch.cat([state.mixed, a.to(state.mixed.dtype)], 1)
    if dilated is not None and n:
        a = _correlate(mixed.to(dtype), dilated, dilated_bias, config.dilation)
    new = torch.full((x.shape[0],), n, device=x.device) if call.lengths is None else call.lengths
    after = ConvolutionState(
        _window(inputs, new, state.inputs.shape[1]), _window(mixed, new, state.mixed.shape[1]), state.length + new
    )
    return Result(_gated(call, a, x, pointwise, pointwise_bias), after)


def step(
    call: Call,
    x: Float[Tensor, "b 1 c"],
    depthwise: Float[Tensor, "c j"] | None = None,
    depthwise_bias: Float[Tensor, " c"] | None = None,
    dilated: Float[Tensor, "c i"] | None = None,
    dilated_bias: Float[Tensor, " c"] | None = None,
    pointwise: Float[Tensor, "o c"] | None = None,
    pointwise_bias: Float[Tensor, " o"] | None = None,
) -> Result:
    """One token: a dot product with each window, O(C (k1 + k2) + C^2)."""
    _sides(call, x, depthwise, depthwise_bias, dilated, dilated_bias, pointwise, pointwise_bias)
    dtype = wide_dtype(x)
    state: ConvolutionState = call.state

    def dot(window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.einsum("bjc,cj->bc", window.to(dtype), weight.to(dtype))[:, None]
        return y if bias is None else y + bias.to(dtype)

    inputs = torch.cat([state.inputs, x.to(state.inputs.dtype)], 1)
    a = x.to(dtype) if depthwise is None else dot(inputs, depthwise, depthwise_bias)
    mixed = torch.cat([state.mixed, a.to(state.mixed.dtype)], 1)
    if dilated is not None:
        a = dot(mixed[:, :: call.config.dilation], dilated, dilated_bias)
    new = torch.ones_like(state.length) if call.lengths is None else call.lengths
    written = (new > 0)[:, None, None]
    after = ConvolutionState(
        torch.where(written, inputs[:, 1:], state.inputs),
        torch.where(written, mixed[:, 1:], state.mixed),
        state.length + new,
    )
    return Result(_gated(call, a, x, pointwise, pointwise_bias), after)


def _convolve(
    a: Float[Tensor, "b n c"], weight: Tensor, bias: Tensor | None, sides: tuple[int, ...], side: int, dilation: int
) -> Float[Tensor, "b n c"]:
    """Depthwise and centred, on a grid."""
    if a.numel() == 0:
        return a
    filters = weight.to(a.dtype).unflatten(1, (side,) * len(sides))[:, None]
    bias = None if bias is None else bias.to(a.dtype)
    image, padding = a.mT.unflatten(2, sides), dilation * (side - 1) // 2
    convolution = CONVOLUTIONS[len(sides)]
    y = convolution(image, filters, bias, padding=padding, dilation=dilation, groups=a.shape[-1])
    return y.flatten(2).mT


def _correlate(
    window: Float[Tensor, "b before+n c"], weight: Tensor, bias: Tensor | None, dilation: int
) -> Float[Tensor, "b n c"]:
    """Depthwise over a sequence that already has what comes before it."""
    bias = None if bias is None else bias.to(window.dtype)
    filters = weight.to(window.dtype)[:, None]
    return F.conv1d(window.mT, filters, bias, dilation=dilation, groups=window.shape[-1]).mT


def _gated(
    call: Call, a: Tensor, x: Tensor, pointwise: Tensor | None, pointwise_bias: Tensor | None
) -> Float[Tensor, "b n c"]:
    """PW, then the gate, in at least float32: the product of two unbounded numbers is what overflows first."""
    if pointwise is not None:
        a = linear(a, pointwise.to(a.dtype), None if pointwise_bias is None else pointwise_bias.to(a.dtype))
    a = a.sigmoid() if call.config.sigmoid else a
    return GATINGS[call.config.gating](a, x.to(a.dtype)).to(x.dtype)


def _state(call: Call, x: Tensor, depthwise: Tensor | None, dilated: Tensor | None) -> ConvolutionState:
    """The state to continue from, empty at the start of a sequence."""
    if call.state is not None:
        return call.state
    config: Config = call.config
    batch, channels = x.shape[0], x.shape[2]
    kept = 0 if depthwise is None else config.depthwise_side - 1
    reach = 0 if dilated is None else config.dilated_span - 1
    return ConvolutionState(
        x.new_zeros(batch, kept, channels),
        x.new_zeros(batch, reach, channels, dtype=wide_dtype(x)),
        torch.zeros(batch, dtype=torch.long, device=x.device),
    )


def _window(x: Float[Tensor, "b width+n c"], new: Int[Tensor, " b"], width: int) -> Float[Tensor, "b width c"]:
    """The last `width` tokens of each row, of which `new` were added."""
    index = new[:, None] + torch.arange(width, device=x.device)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _sides(call: Call, x: Tensor, *weights: Tensor | None) -> tuple[int, ...]:
    """Sides of the grid, (N,) for a sequence; raises Unsupported where the grid or the weights do not fit."""
    config: Config = call.config
    sides = (x.shape[1],) if call.grid is None else tuple(call.grid)
    if call.grid is not None and call.pattern.causal:
        raise Unsupported(
            f"large_kernel on a grid in {call.pattern.value}",
            supported="a sequence (grid=None)",
            nearest=Pattern.NONCAUSAL_SELF.value,
        )
    if len(sides) not in CONVOLUTIONS:
        raise Unsupported(f"large_kernel on a grid of {len(sides)} axes", supported="1, 2 or 3 axes")
    depthwise, depthwise_bias, dilated, dilated_bias, pointwise, pointwise_bias = weights
    if depthwise is None and dilated is None:
        raise Unsupported("large_kernel without depthwise and dilated", supported="one of them at least")
    for name, weight, bias in (
        ("depthwise", depthwise, depthwise_bias),
        ("dilated", dilated, dilated_bias),
        ("pointwise", pointwise, pointwise_bias),
    ):
        if weight is None and bias is not None:
            raise Unsupported(f"large_kernel with {name}_bias and without {name}", supported=f"{name}, or neither")
    for name, weight, width in (
        ("depthwise", depthwise, config.depthwise_side ** len(sides)),
        ("dilated", dilated, config.dilated_side ** len(sides)),
        ("pointwise", None if pointwise is None else pointwise.mT, x.shape[2]),
    ):
        if weight is not None and weight.shape[1] != width:
            raise Unsupported(
                f"large_kernel: {name} with {weight.shape[1]} numbers a channel",
                supported=f"{width} (kernel={config.kernel}, dilation={config.dilation}, {len(sides)} axes)",
            )
    return sides


def cost(shape: Shape, config: Config) -> Cost:
    """For a grid of two axes; a step is one of a sequence."""
    channels = shape.heads * shape.dim_value
    spatial = {
        "depthwise": (config.depthwise_side, config.depthwise_side - 1),
        "dilated": (config.dilated_side, config.dilated_span - 1),
    }
    spatial = {name: both for name, both in spatial.items() if name not in config.without}
    mixed = 0 if "pointwise" in config.without else channels
    tokens = shape.batch * shape.n * channels
    return Cost(
        flops=2.0 * tokens * (sum(side**2 for side, _ in spatial.values()) + mixed),
        memory=2.0 * tokens,
        state=float(channels * sum(kept for _, kept in spatial.values())),
        step_flops=2.0 * shape.batch * channels * (sum(side for side, _ in spatial.values()) + mixed),
    )


class LargeKernelLayer(MixerLayer):
    """The attention module of the Visual Attention Network: x + W_2 LKA(gelu(W_1 x)), without norm and LayerScale.

    Args:
        card: the mechanism.
        dim: width C of the input and output.
        num_heads: accepted for the catalogue's sake; every channel has filters of its own.
        pattern: noncausal-self, for a sequence or the `grid` of the call; causal-self, for a sequence.
        axes: axes of the grids it will be given; 2 in noncausal-self and 1 in causal-self when None.
        linear: kind of the two projections (``dense`` or a projection mechanism).
        config: see :class:`Config`.
    """

    def __init__(
        self,
        card: Mechanism,
        dim: int,
        num_heads: int,
        *,
        pattern: str | Pattern = Pattern.NONCAUSAL_SELF,
        axes: int | None = None,
        linear: str = "dense",
        config: Config | None = None,
    ) -> None:
        super().__init__(card, dim, pattern=pattern, config=config)
        self.axes = (1 if self.pattern.causal else 2) if axes is None else axes
        one_of("axes", self.axes, (1,) if self.pattern.causal else CONVOLUTIONS)
        self.grid_axes, self.for_sequences = self.axes, {"axes": 1}
        config = self.config
        self.input_proj = make_linear(dim, dim, bias=True, kind=linear)
        self.output_proj = make_linear(dim, dim, bias=True, kind=linear)
        shapes = {
            "depthwise": (dim, config.depthwise_side**self.axes),
            "dilated": (dim, config.dilated_side**self.axes),
            "pointwise": (dim, dim),
        }
        self.weights = nn.ParameterDict()  # by the name of the mechanism's input
        for name, shape in shapes.items():
            if name not in config.without:
                self.weights[name] = nn.Parameter(torch.empty(shape))
                self.weights[f"{name}_bias"] = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 2 / fan-out) as for convolutions, biases 0; projections of another kind than dense keep their own."""
        dense = [p for p in (self.input_proj, self.output_proj) if isinstance(p, nn.Linear)]
        for parameter in (*self.weights.values(), *(q for p in dense for q in p.parameters())):
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=math.sqrt(2 / parameter.shape[1]))

    def mix(self, tokens: Tokens, memory: Tokens | None, context: Context, state: Any) -> Result:
        grid = context.grid
        if (1 if grid is None else len(grid)) != self.axes:
            raise Unsupported(
                f"grid={grid} for a layer with filters of {self.axes} axes",
                supported=f"a grid of {self.axes} axes" + (", or a sequence (grid=None)" if self.axes == 1 else ""),
                nearest=f"axes={1 if grid is None else len(grid)}",
            )
        inputs: Tensors = {"x": F.gelu(self.input_proj(tokens.x))}
        inputs |= dict(self.weights.items())
        result = apply(
            self.card,
            inputs,
            pattern=self.pattern,
            mask=tokens.mask,
            grid=grid,
            state=state,
            return_state="state" in context.want,
            config=self.config,
        )
        y = self.output_proj(result.output)
        result.output = tokens.x + y if self.config.residual else y
        return result


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
    axes: int | None = None,
) -> Tensors:
    """Random inputs for tests, with filters for two axes in noncausal-self unless `axes` says otherwise."""
    axes = (1 if pattern.causal else 2) if axes is None else axes
    channels = (sizes or {}).get("c", 4)
    taps = (config.depthwise_side**axes, config.dilated_side**axes)
    shapes = {
        "x": (batch, n, channels),
        "depthwise": (channels, taps[0]),
        "depthwise_bias": (channels,),
        "dilated": (channels, taps[1]),
        "dilated_bias": (channels,),
        "pointwise": (channels, channels),
        "pointwise_bias": (channels,),
    }
    found = {}
    for name, shape in shapes.items():
        scale = shape[1] ** -0.5 if name in ("depthwise", "dilated", "pointwise") else 1.0
        found[name] = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    return found


MECHANISM = Mechanism(
    name="large_kernel",
    aliases=("lka", "van", "large_kernel_attention", "visual_attention_network"),
    kind=Kind.MIXER,
    summary="A gate from a large neighbourhood, built of two small depthwise convolutions and a pointwise one.",
    paper=Paper("Visual Attention Network", "2202.09741", 2022, 13),
    inputs={
        "x": "bnc",
        "depthwise?": "cj",
        "depthwise_bias?": "c",
        "dilated?": "ci",
        "dilated_bias?": "c",
        "pointwise?": "oc",
        "pointwise_bias?": "o",
    },
    output="bnc",
    patterns=(Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    refused={
        Pattern.NONCAUSAL_CROSS: "the gate of a place comes from its neighbourhood on the same grid",
        Pattern.CAUSAL_CROSS: "the gate of a token comes from its neighbourhood in the same sequence",
    },
    forms={"reference": reference, "parallel": parallel, "chunked": chunked, "step": step},
    config=Config,
    variants={
        "small": {"kernel": 7, "dilation": 2},
        "plain": {"kernel": 3, "dilation": 1, "sigmoid": True, "without": ("pointwise",)},
        "added": {"gating": "add", "without": ("depthwise",)},
        "ungated": {"gating": "none", "without": ("dilated",), "residual": False},
    },
    state=ConvolutionState,
    cost=cost,
    default_scale=1.0,
    accepts_positions=("none", "sinusoidal", "learned"),
    length="grid",
    sample_inputs=sample_inputs,
    module=LargeKernelLayer,
)
