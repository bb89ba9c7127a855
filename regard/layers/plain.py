"""A layer that takes and returns plain tensors, for `nn.Sequential` and other code that passes outputs on unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from regard.contract import Context, Unsupported

if TYPE_CHECKING:
    from jaxtyping import Float


class PlainLayer(nn.Module):
    """Wraps a layer to return its output tensor alone.

    Args:
        layer: a layer that returns a :class:`regard.Result`; available as the attribute ``layer``, with its ``step``.
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
            Unsupported: for results that do not fit in one tensor: extras that `context` wants, and auxiliary losses in
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
