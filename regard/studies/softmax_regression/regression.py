r"""Softmax regression: its loss, gradient and Hessian, none of which forms an n x n matrix.

Definition (arXiv 2304.13276, section 3; the other links of arXiv 2303.15725), with scores s = A x / temperature:

    u = exp(s) | cosh(s) | sinh(s),   f = u / <u, 1>,   L(x) = |f - b|^2 / 2   or   -<b, log f>

Each of the links has u'' = u, so with h = u' / <u, 1> (h = f for exp), c = f - b, w = f + c, sigma = <f, c>

    df = (diag(h) - f h^T) ds
    squared:        g_s = h o c - h sigma
                    B   = diag(f o (c - sigma) + h^2) - (h o w) h^T - h (h o w)^T + (sigma + <f, w>) h h^T
    cross-entropy:  g_s = <b, 1> h - b o r,  r = u' / u
                    B   = diag(<b, 1> f - b o (1 - r^2)) - <b, 1> h h^T
    unnormalised:   f = u,  g_s = u' o c,  B = diag(u o c + u'^2)

and the gradient is A^T g_s / temperature, the Hessian A^T B A / temperature^2: a diagonal and a matrix of rank two. The Hessian
is indefinite in general; |diag(weight) A x|^2 / 2 makes it positive definite where the weight is large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract import Unsupported, one_of

if TYPE_CHECKING:
    from jaxtyping import Float

LINKS = ("exp", "cosh", "sinh")
LOSSES = ("squared", "cross_entropy")


@dataclass(frozen=True)
class Curvature:
    """B of the Hessian A^T B A, as diag(diagonal) - p q^T - q p^T + factor q q^T."""

    diagonal: Tensor
    p: Tensor
    q: Tensor
    factor: Tensor


@dataclass(frozen=True, eq=False)
class Regression:
    """One softmax regression, or a batch of them.

    Attributes:
        a: keys, (..., n, d).
        b: targets, (..., n): probabilities or any vectors.
        link: the function u: ``exp``, ``cosh``, or ``sinh``, whose sum may vanish.
        loss: ``squared``, or ``cross_entropy``, which needs a positive, normalised link.
        normalised: whether u is divided by its sum.
        temperature: divides the scores.
        weight: w of the regulariser |diag(w) A x|^2 / 2, a number or (..., n).
        queries: whether the axis before n counts queries, which share one x and whose losses are added.

    Raises:
        Unsupported: for options that do not go together.
    """

    a: Float[Tensor, "*b n d"]
    b: Float[Tensor, "*b n"]
    link: str = "exp"
    loss: str = "squared"
    normalised: bool = True
    temperature: float = 1.0
    weight: float | Tensor = 0.0
    queries: bool = False

    def __post_init__(self) -> None:
        one_of("link", self.link, LINKS)
        one_of("loss", self.loss, LOSSES)
        if self.a.ndim < 2 + self.queries or self.b.ndim < 1 or self.a.shape[-2] != self.b.shape[-1]:
            shapes = f"{tuple(self.a.shape)} and b of shape {tuple(self.b.shape)}"
            raise Unsupported(f"a of shape {shapes}", supported="a (..., n, d) and b (..., n)")
        if not self.temperature > 0:
            raise Unsupported(f"temperature={self.temperature}", supported="a positive number", nearest="temperature=1")
        if self.loss == "cross_entropy" and (self.link == "sinh" or not self.normalised):
            asked = "sinh" if self.link == "sinh" else "normalised=False"
            raise Unsupported(
                f"cross_entropy of {asked}", supported="exp or cosh, normalised", nearest="loss='squared'"
            )

    def scores(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """Scores A x / temperature."""
        return self._product(x) / self.temperature

    def predict(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """The prediction f."""
        return self._links(x)[0]

    def value(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
        """The loss with its regulariser."""
        f = self.predict(x)
        if self.loss == "squared":
            own = (f - self.b).square().sum(-1) / 2
        elif self.link == "exp":
            own = -(self.b * self.scores(x).log_softmax(-1)).sum(-1)
        else:
            own = -(self.b * f.log()).sum(-1)
        found = own + (self.weight * self._product(x)).square().sum(-1) / 2
        return found.sum(-1) if self.queries else found

    def gradient(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The gradient of :meth:`value`."""
        f, h, r = self._links(x)
        c = f - self.b
        if self.loss == "cross_entropy":
            of_scores = self.b.sum(-1, keepdim=True) * h - self.b * r
        else:
            of_scores = h * c
            if self.normalised:
                of_scores = of_scores - h * (f * c).sum(-1, keepdim=True)
        return self._back(of_scores / self.temperature + self.weight**2 * self._product(x))

    def hessian(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d d"]:
        """The Hessian of :meth:`value`, in O(n d^2)."""
        curve = self._curvature(x)
        scaled = curve.diagonal / self.temperature**2 + self.weight**2
        p, q = ((self.a.mT @ v[..., None]) / self.temperature for v in (curve.p, curve.q))  # (..., d, 1)
        found = self.a.mT @ (scaled[..., None] * self.a) - p @ q.mT - q @ p.mT + curve.factor[..., None] * q @ q.mT
        return found.sum(-3) if self.queries else found

    def hessian_product(self, x: Float[Tensor, "*b d"], v: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The Hessian times `v`, in O(n d)."""
        curve, along = self._curvature(x), self._product(v)
        p, q = (
            part * (other * along).sum(-1, keepdim=True) for part, other in ((curve.p, curve.q), (curve.q, curve.p))
        )
        third = curve.factor * curve.q * (curve.q * along).sum(-1, keepdim=True)
        of_scores = (curve.diagonal * along - p - q + third) / self.temperature**2
        return self._back(of_scores + self.weight**2 * along)

    def _product(self, x: Tensor) -> Tensor:
        x = x[..., None, :] if self.queries else x
        return (self.a @ x[..., None])[..., 0]

    def _back(self, of_scores: Tensor) -> Tensor:
        found = (self.a.mT @ of_scores[..., None])[..., 0]
        return found.sum(-2) if self.queries else found

    def _links(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f, h and r = u' / u. Normalised links are scaled by the largest score, so that no exponential overflows."""
        s = self.scores(x)
        one = torch.ones_like(s)
        if self.link == "exp":
            f = s.softmax(-1) if self.normalised else s.exp()
            return f, f, one
        if not self.normalised:
            u, du = (s.cosh(), s.sinh()) if self.link == "cosh" else (s.sinh(), s.cosh())
            return u, du, du / u
        top = s.detach().abs().amax(-1, keepdim=True)
        up, down = (s - top).exp(), (-s - top).exp()
        u, du = (up + down, up - down) if self.link == "cosh" else (up - down, up + down)
        total = u.sum(-1, keepdim=True)
        return u / total, du / total, s.tanh() if self.link == "cosh" else 1 / s.tanh()

    def _curvature(self, x: Tensor) -> Curvature:
        f, h, r = self._links(x)
        c, zero = f - self.b, torch.zeros_like(f)
        if self.loss == "cross_entropy":
            total = self.b.sum(-1, keepdim=True)
            return Curvature(total * f - self.b * (1 - r.square()), zero, h, -total)
        if not self.normalised:
            return Curvature(f * c + h.square(), zero, zero, zero[..., :1])
        w, sigma = f + c, (f * c).sum(-1, keepdim=True)
        factor = sigma + (f * w).sum(-1, keepdim=True)
        return Curvature(f * (c - sigma) + h.square(), h * w, h, factor)
