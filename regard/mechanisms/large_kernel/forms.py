"""The fast forms of large_kernel: parallel, chunked and step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract import (
    Call,
    Result,
    State,
    state_field,
)
from regard.core.grids import image_of, tokens_of
from regard.core.precision import wide, wide_dtype, without_autocast
from regard.engines.linear import linear
from regard.mechanisms.large_kernel.definition import CONVOLUTIONS, GATINGS, Config, _sides

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class ConvolutionState(State):
    """The past inputs that the causal form needs; zeros before the first token, of width 0 for an absent convolution.

    `inputs` holds the last inputs of DW in the model's dtype, `mixed` the last outputs of DW in at least float32.
    """

    inputs: Float[Tensor, "b k1-1 c"] = state_field()
    mixed: Float[Tensor, "b d*(k2-1) c"] = state_field()
    length: Int[Tensor, " b"] = state_field()


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
    """Causal-self with state in and out. Memory is already linear in N, so a call is computed at once whatever the
    chunk size; padding is on the right, where no valid token looks."""
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
    """Centred depthwise convolution on a grid."""
    if a.numel() == 0:
        return a
    filters = weight.to(a.dtype).unflatten(1, (side,) * len(sides))[:, None]
    bias = None if bias is None else bias.to(a.dtype)
    with without_autocast(a.device):  # torch computes wrong gradients of 3-D convolutions in bfloat16
        return tokens_of(_convolved(image_of(a, sides), filters, bias, side, dilation))


def _convolved(
    image: Float[Tensor, "b c *sides"],
    filters: Float[Tensor, "c 1 *kernel"],
    bias: Tensor | None,
    side: int,
    dilation: int,
) -> Float[Tensor, "b c *sides"]:
    if dilation > 1 and side % 2 and image.is_cpu and not torch.compiler.is_compiling():
        return _by_phases(image, filters, bias, dilation)
    convolution, padding = CONVOLUTIONS[image.ndim - 2], dilation * (side - 1) // 2
    return convolution(image, filters, bias, padding=padding, dilation=dilation, groups=image.shape[1])


def _by_phases(
    image: Float[Tensor, "b c *sides"], filters: Float[Tensor, "c 1 *kernel"], bias: Tensor | None, dilation: int
) -> Float[Tensor, "b c *sides"]:
    """Compute a dilated convolution of odd side as a convolution without gaps.

    A place only sees places with the same remainders modulo the dilation along each axis, so the image splits into
    independent images, one for each combination of remainders. CPU libraries are five to eight times slower with gaps.
    """
    batch, channels, *sides = image.shape
    axes = range(len(sides))
    spare = [-side % dilation for side in sides]
    parts = F.pad(image, [number for extra in reversed(spare) for number in (0, extra)])
    for axis in reversed(axes):
        parts = parts.unflatten(2 + axis, (-1, dilation))
    parts = parts.permute(0, *(3 + 2 * i for i in axes), *(2 + 2 * i for i in axes), 1).flatten(0, len(sides))
    y = CONVOLUTIONS[len(sides)](parts.movedim(-1, 1), filters, bias, padding=filters.shape[-1] // 2, groups=channels)
    y = y.movedim(1, -1).unflatten(0, (batch, *[dilation] * len(sides)))
    y = y.permute(0, *(1 + i + part for i in axes for part in (len(sides), 0)), -1)
    for axis in axes:
        y = y.flatten(1 + axis, 2 + axis).narrow(1 + axis, 0, sides[axis])
    return y.movedim(-1, 1)


def _correlate(
    window: Float[Tensor, "b before+n c"], weight: Tensor, bias: Tensor | None, dilation: int
) -> Float[Tensor, "b n c"]:
    """Depthwise convolution over a sequence to which its past is already prepended."""
    bias = None if bias is None else bias.to(window.dtype)
    filters = weight.to(window.dtype)[:, None]
    return F.conv1d(window.mT, filters, bias, dilation=dilation, groups=window.shape[-1]).mT


def _gated(
    call: Call, a: Tensor, x: Tensor, pointwise: Tensor | None, pointwise_bias: Tensor | None
) -> Float[Tensor, "b n c"]:
    """PW, then the gate, in at least float32: the product of two unbounded numbers overflows first."""
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
    """The last `width` tokens of each row after `new` tokens were appended."""
    index = new[:, None] + torch.arange(width, device=x.device)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
