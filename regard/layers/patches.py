"""Embeddings that turn measurements and images into tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Unsupported, at_least
from regard.layers.linear import make_linear

if TYPE_CHECKING:
    from jaxtyping import Float


class FeatureEmbedding(nn.Module):
    """One token per time step, by a linear projection: (B, N, features) -> (B, N, dim).

    Args:
        features: number of measurements at each step.
        dim: width of a token.
        bias: whether the projection has a bias.
        linear: builds the projection.
    """

    def __init__(
        self, features: int, dim: int, *, bias: bool = True, linear: Callable[..., nn.Module] = make_linear
    ) -> None:
        super().__init__()
        self.features = features
        self.projection = linear(features, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n f"]) -> Float[Tensor, "b n c"]:
        if x.shape[-1] != self.features:
            raise Unsupported(f"an input of {x.shape[-1]} features", supported=f"{self.features} features")
        return self.projection(x)


class PatchEmbedding(nn.Module):
    """One token per square patch of an image: (B, channels, H, W) -> (B, rows * columns, dim), row by row.

    Args:
        channels: number of image channels.
        dim: width of a token.
        patch: side of a patch in pixels.
        stride: distance between patches in pixels; `patch` when None. A smaller stride makes patches overlap.
        padding: number of zero pixels added on each side.
        bias: whether the projection has a bias.
        linear: builds the projection from the channels * patch^2 numbers of a patch (channel first, then row, column).
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        patch: int,
        *,
        stride: int | None = None,
        padding: int = 0,
        bias: bool = True,
        linear: Callable[..., nn.Module] = make_linear,
    ) -> None:
        super().__init__()
        stride = patch if stride is None else stride
        at_least("patch", patch, 1)
        at_least("stride", stride, 1)
        at_least("padding", padding, 0)
        if stride > patch:
            raise Unsupported(
                f"stride={stride} with patch={patch}, which skips pixels",
                supported="stride <= patch",
                nearest=f"stride={patch}",
            )
        self.channels, self.patch, self.stride, self.padding = channels, patch, stride, padding
        self.projection = linear(channels * patch * patch, dim, bias=bias)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for an image: the `grid` of its :class:`regard.contract.Context`.

        Raises:
            Unsupported: if pixels of the image would be left over.
        """
        sides = []
        for name, side in (("height", height), ("width", width)):
            room = side + 2 * self.padding - self.patch
            steps, left_over = room // self.stride, room % self.stride  # divmod breaks graphs of any size
            if steps < 0 or left_over > self.padding:
                fitting = self.patch - 2 * self.padding + max(0, round(steps + left_over / self.stride)) * self.stride
                patches = f"patches of {self.patch} with stride {self.stride} and padding {self.padding}"
                raise Unsupported(
                    f"{patches} in an image of {name} {side}",
                    supported="sides that patches cover exactly",
                    nearest=f"{name} {fitting if fitting > 0 else self.patch}",
                )
            sides.append(steps + 1)
        return sides[0], sides[1]

    def forward(self, image: Float[Tensor, "b channels height width"]) -> Float[Tensor, "b n c"]:
        if image.ndim != 4 or image.shape[1] != self.channels:
            raise Unsupported(f"an image of shape {tuple(image.shape)}", supported=f"(B, {self.channels}, H, W)")
        rows, columns = self.grid(image.shape[2], image.shape[3])
        if self.padding or self.stride != self.patch:
            patches = F.unfold(image, self.patch, padding=self.padding, stride=self.stride).mT
        else:  # equal to the above, but avoids im2col, which takes several times as long
            pixels = image.unflatten(3, (columns, self.patch)).unflatten(2, (rows, self.patch))
            patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.projection(patches)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, patch={self.patch}, stride={self.stride}, padding={self.padding}"
