"""Normalisation and scaling over the last axis, with statistics in at least float32.

RMSNorm: ``x / sqrt(mean(x^2) + eps) * weight`` (Zhang & Sennrich, arXiv 1910.07467, equation 4). LayerNorm:
``(x - mean) / sqrt(var + eps) * weight + bias`` (Ba et al., arXiv 1607.06450), also available without weight and bias,
for models that grow by parameter tokens (TokenFormer, arXiv 2410.23168). LayerScale: ``x * factors`` (Touvron et al.,
arXiv 2103.17239, equation 4).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Unsupported, at_least, closest
from regard.core.precision import wide_dtype
from regard.engines.layers import rms_norm

if TYPE_CHECKING:
    from jaxtyping import Float


def _in_float32(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis.

    Args:
        dim: width of the last axis.
        eps: added to the mean square; positive, so that a row of zeros stays zero with finite gradients.
        parametric: whether to multiply by a learned weight (dim,), initially ones.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, parametric: bool = True) -> None:
        super().__init__()
        at_least("dim", dim, 1)
        at_least("eps", eps, 1e-30)
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if parametric else None

    def forward(self, x: Float[Tensor, "... c"], z: Float[Tensor, "... c"] | None = None) -> Float[Tensor, "... c"]:
        """The norm, times silu(z) if a gate z is given."""
        if x.shape[-1] != self.dim:
            raise Unsupported(f"a norm over {x.shape[-1]} features", supported=f"{self.dim} features")
        return rms_norm(x, self.weight, z=z, eps=self.eps, norm_before_gate=True)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, parametric={self.weight is not None}"


class LayerNorm(nn.Module):
    """Centres the last axis and divides by its standard deviation.

    Args:
        dim: width of the last axis.
        eps: added to the variance.
        parametric: whether to have a learned weight (dim,), initially ones, and bias (dim,), initially zeros.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, parametric: bool = True) -> None:
        super().__init__()
        at_least("dim", dim, 1)
        at_least("eps", eps, 1e-30)
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if parametric else None
        self.bias = nn.Parameter(torch.zeros(dim)) if parametric else None

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        weight, bias, dtype = self.weight, self.bias, wide_dtype(x)
        if x.dtype == dtype and (weight is None or weight.dtype == dtype):
            return F.layer_norm(x, (self.dim,), weight, bias, self.eps)
        wide = (_in_float32(weight, dtype), _in_float32(bias, dtype))
        return F.layer_norm(x.to(dtype), (self.dim,), *wide, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, parametric={self.weight is not None}"


class LayerScale(nn.Module):
    """Multiplies each feature of the last axis by a learned factor.

    Args:
        dim: width of the last axis.
        initial: initial value of all factors, >= 0.
    """

    def __init__(self, dim: int, initial: float = 1e-4) -> None:
        super().__init__()
        at_least("dim", dim, 1)
        at_least("initial", initial, 0)
        self.dim, self.initial = dim, initial
        self.factors = nn.Parameter(torch.full((dim,), float(initial)))

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        """Scale `x`, keeping its dtype."""
        return x * self.factors.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, initial={self.initial:g}"


NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms": RMSNorm,
    "rms_nonparametric": partial(RMSNorm, parametric=False),
    "layer": LayerNorm,
    "layer_nonparametric": partial(LayerNorm, parametric=False),
    "none": nn.Identity,
}


def make_norm(name: str, dim: int) -> nn.Module:
    """A norm over a last axis of `dim`: ``rms``, ``layer``, each also ``_nonparametric``, or ``none``.

    An eps may follow the name, as in ``rms:1e-5``.

    Raises:
        Unsupported: for another name, or a number that is not positive.
    """
    kind, colon, number = str(name).partition(":")
    if kind not in NORMS or (colon and kind == "none"):
        nearest = closest(kind, NORMS) or "rms"
        raise Unsupported(f"norm {name!r}", supported=", ".join([*NORMS, "rms:1e-5"]), nearest=nearest)
    if not colon:
        return NORMS[kind](dim)
    try:
        eps = float(number)
    except ValueError:
        raise Unsupported(f"norm {name!r}", supported="a number after the colon", nearest=f"{kind}:1e-5") from None
    return NORMS[kind](dim, eps=eps)
