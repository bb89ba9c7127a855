"""The operations around the matrix products of a layer, each in one pass over memory if there is a kernel for it.

With plain operators they are limited by memory: a norm with its gate reads and writes its tensors eight times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from regard.backends import Engine, add_engine, execute, prefers_native
from regard.contract import Unsupported, one_of
from regard.core.precision import wide_dtype, without_autocast
from regard.engines.layers import torch_form
from regard.engines.layers.native_form import convolution, gating, norm, rotation
from regard.engines.layers.native_form.common import small
from regard.engines.layers.problem import GATE_FUNCTIONS, GatedProduct, RMSNorm, ShortConvolution

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def short_convolution(
    x: Float[Tensor, "b n c"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, " c"] | None = None,
    *,
    cache: Float[Tensor, "b w-1 c"] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
    silu: bool = True,
    causal: bool = True,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b w-1 c"] | None]:
    """``y_t = act(bias + sum_j weight_j x_{t - left + j})``, each channel on its own, over the valid tokens of a row.

    Autocast is disabled inside.

    Args:
        x: inputs; values past a row's length are ignored.
        weight: w taps per channel; weight, `bias` and `cache` are cast to the dtype of x.
        cache: the inputs before the first; None for zeros. Only in causal form.
        lengths: number of valid tokens in each right-padded row; None when all are valid.
        silu: whether act is SiLU; otherwise it is the identity.
        causal: left = w - 1; otherwise the filter is centred, left = w - 1 - (w - 1) // 2.
        backend: see :func:`regard.which_backend`.

    Returns:
        Outputs in the dtype of x, zero past a row's length, and the last w - 1 inputs (None in noncausal form).

    Raises:
        Unsupported: for shapes that do not fit, or a cache in noncausal form.
    """
    batch, _, channels = x.shape
    if weight.shape[0] != channels:
        raise Unsupported(f"a convolution over {channels} channels", supported=f"{weight.shape[0]} channels")
    if cache is not None:
        if not causal:
            raise Unsupported("a cache for a noncausal convolution", supported="causal=True", nearest="cache=None")
        expected = (batch, weight.shape[1] - 1, channels)
        if cache.shape != expected:
            raise Unsupported(f"a convolution cache of shape {tuple(cache.shape)}", supported=f"{expected}")
        cache = cache.to(x.dtype)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    after = 0 if causal else (weight.shape[1] - 1) // 2
    problem = ShortConvolution(x, weight, bias, cache, lengths, after, silu)
    with without_autocast(x.device):
        y, last = execute("short_convolution", backend, x.device, x.dtype, problem)
    return y, last if causal else None


def rms_norm(
    x: Float[Tensor, "... c"],
    weight: Float[Tensor, " c"] | None = None,
    *,
    z: Float[Tensor, "... c"] | None = None,
    groups: int = 1,
    eps: float = 1e-6,
    norm_before_gate: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "... c"]:
    """``u / sqrt(mean(u^2) + eps) * weight`` for each group of the last axis, computed in at least float32.

    Zhang & Sennrich, arXiv 1910.07467, equation 4. With a gate z as in Mamba-2, arXiv 2405.21060: u = x silu(z) or,
    with `norm_before_gate`, u = x and the norm is multiplied by silu(z).

    Args:
        x: input with any leading axes.
        weight: factors on the result; ones when None.
        z: gate; None for no gate.
        groups: number of groups, a divisor of the last axis.
        eps: added to the mean square; positive.
        backend: see :func:`regard.which_backend`.

    Returns:
        The norm in the dtype of x.

    Raises:
        Unsupported: for groups that do not divide the last axis.
    """
    if groups < 1 or x.shape[-1] % groups:
        raise Unsupported(
            f"a norm over {groups} groups of {x.shape[-1]} features", supported="a divisor of the features"
        )
    if weight is not None:
        weight = weight.to(wide_dtype(x))
    problem = RMSNorm(x, weight, z, groups, eps, norm_before_gate)
    if backend is None and prefers_native() and small("rms_norm", x):
        return torch_form.rms_norm(problem)  # the backend that the dispatch below would choose
    return execute("rms_norm", backend, x.device, x.dtype, problem)


def rotary(
    x: Float[Tensor, "b h n d"],
    positions: Int[Tensor, "#b n"],
    *,
    rotated: int,
    base: float,
    stretch: float = 1.0,
    backend: str | None = None,
) -> Float[Tensor, "b h n d"]:
    """Rotate features i and i + rotated / 2 of each head by position / stretch * base^(-2 i / rotated).

    Su et al., arXiv 2104.09864, equation 34. Computed in at least float32, with angles modulo one turn in float64;
    returned in the dtype of x. Features from index `rotated` (even) on are unchanged.
    """
    if backend is None and prefers_native():
        found = rotation.plain(x, positions, rotated, base, stretch)
        if found is not None:
            return found
    return execute("rotary", backend, x.device, x.dtype, x, positions, rotated, base, stretch)


def gated_product(
    x: Float[Tensor, "... c"], gate: Float[Tensor, "... c"], function: str = "silu", *, backend: str | None = None
) -> Float[Tensor, "... c"]:
    """``x * f(gate)`` with f ``silu`` or ``sigmoid``.

    Raises:
        Unsupported: for another function.
    """
    one_of("function", function, GATE_FUNCTIONS)
    problem = GatedProduct(x, gate, GATE_FUNCTIONS.index(function))
    if backend is None and prefers_native() and small("gated_product", x):
        return torch_form.gated_product(problem)
    return execute("gated_product", backend, x.device, x.dtype, problem)


add_engine(
    "gated_product",
    torch=Engine(torch_form.gated_product),
    native=Engine(gating.gated_product, gating.refuses),
)
add_engine("rms_norm", torch=Engine(torch_form.rms_norm), native=Engine(norm.rms_norm, norm.refuses))
add_engine("rotary", torch=Engine(torch_form.rotary), native=Engine(rotation.rotary, rotation.refuses))
add_engine(
    "short_convolution",
    torch=Engine(torch_form.short_convolution),
    native=Engine(convolution.short_convolution, convolution.refuses),
)
