"""The interface that all layers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regard.contract import Context, Result, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float

STEP = Context(want=frozenset({"state"}))


class Layer(nn.Module):
    """A mechanism as a module, called as ``layer(x, memory=None, *, context=None, state=None)``, (B, N, C) -> (B, N, C)
    in a :class:`regard.Result`."""

    if TYPE_CHECKING:
        __call__: Callable[..., Result]

    def step(self, x_t: Float[Tensor, "b c"], state: Any = None) -> tuple[Float[Tensor, "b c"], Any]:
        """Process one token: return its output and the new state. Without a state it is the first of its sequence.

        Raises:
            Unsupported: if the mechanism cannot continue from a state, or for more axes than (B, C).
        """
        if isinstance(x_t, Tensor) and x_t.ndim != 2:
            raise Unsupported(f"a step on x_t of shape {tuple(x_t.shape)}", supported="one token per row, (B, C)")
        result = self(x_t[:, None], context=STEP, state=state)
        return result.output[:, 0], result.state

    def encode_memory(
        self, memory: Float[Tensor, "b m c2"], *, context: Context | None = None, state: Any = None
    ) -> Any:
        """Absorb memory once, for decoding in a cross pattern; call again with `state` as more memory streams in.

        Raises:
            Unsupported: in self patterns, and for mechanisms that cannot absorb memory.
        """
        raise Unsupported(f"memory absorbed by {type(self).__name__}", supported="layer(x, memory)", nearest="softmax")
