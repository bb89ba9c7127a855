"""A layer as a function of tensors, for `nn.Sequential` and whatever else passes on what a module returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from regard.contract import Context, Unsupported

if TYPE_CHECKING:
    from jaxtyping import Float


class PlainLayer(nn.Module):
    """A layer that returns its output alone.

    Args:
        layer: what returns a :class:`regard.Result`; stays at hand as ``layer``, with its ``step``.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c2"] | None = None,
        *,
        context: Context | None = None,
    ) -> Float[Tensor, "b n c"]:
        """The layer's output.

        Raises:
            Unsupported: for what a plain tensor has no room for: anything that `context` wants, and auxiliary losses in
                training.
        """
        if context is not None and context.want:
            raise Unsupported(
                f"{', '.join(sorted(context.want))} of a plain layer", supported="its output", nearest="plain=False"
            )
        result = self.layer(x, memory, context=context)
        if self.training and result.losses:
            raise Unsupported(
                f"training a plain layer that has the losses {', '.join(result.losses)}",
                supported="layers without losses, and evaluation",
                nearest="plain=False, whose result has them",
            )
        return result.output
