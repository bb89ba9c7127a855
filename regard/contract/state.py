"""Results of calls, and states to continue from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from regard.contract.errors import Unsupported
from regard.contract.trees import register_pytree

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


Tensors = dict[str, Tensor]


def state_field(fill: float = 0.0, *, newest_last: bool = False, **given: Any) -> Any:
    """Define a field of a :class:`State`.

    Args:
        fill: value in an empty state, and in slots that one row lacks and another has.
        newest_last: whether these padding slots come before the row's own, so that the newest token is always the last
            one.
        given: arguments of `dataclasses.field`.
    """
    return field(metadata={"fill": fill, "newest_last": newest_last}, **given)


@dataclass(frozen=True)
class State:
    """What a sequence must remember in order to be continued: a typed tuple of tensors, one row per sequence.

    Subclasses are frozen dataclasses whose fields are tensors (batch first), other states, tuples of states, or None.
    All are pytrees, so that `torch.export` accepts and returns them.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        register_pytree(cls)

    def _map(self, function: Callable[[Tensor, float], Tensor]) -> Self:
        def visit(value: Any, fill: float) -> Any:
            if isinstance(value, Tensor):
                return function(value, fill)
            if isinstance(value, State):
                return value._map(function)
            if isinstance(value, tuple):
                return tuple(visit(item, fill) for item in value)
            return value

        changes = {f.name: visit(getattr(self, f.name), f.metadata.get("fill", 0.0)) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **changes)

    def select(self, indices: Int[Tensor, " rows"]) -> Self:
        """The state of the chosen rows, in the given order; rows may repeat (beam search)."""
        return self._map(lambda t, _: t.index_select(0, indices))

    def reset(self, rows: Bool[Tensor, " b"]) -> Self:
        """The state with the marked rows emptied, as at the start of a document."""
        return self._map(lambda t, fill: torch.where(rows.view(-1, *[1] * (t.ndim - 1)), torch.full_like(t, fill), t))

    def detach(self) -> Self:
        """The state detached from the autograd graph, as for truncated backpropagation."""
        return self._map(lambda t, _: t.detach())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Move to another device. Dtypes are kept, since accumulators must not lose precision."""
        where = torch.device(device)
        return self._map(lambda t, _: t.to(where, non_blocking=non_blocking))

    def tensors(self, prefix: str = "") -> Tensors:
        """All tensors by dotted name, as `safetensors` saves them."""
        found: Tensors = {}

        def visit(value: Any, name: str) -> None:
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, State):
                found.update(value.tensors(name + "."))
            elif isinstance(value, tuple):
                for i, item in enumerate(value):
                    visit(item, f"{name}.{i}")

        for f in dataclasses.fields(self):
            visit(getattr(self, f.name), prefix + f.name)
        return found

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """This state's structure filled with saved `tensors` (the inverse of :meth:`tensors`)."""

        def visit(value: Any, name: str) -> Any:
            if isinstance(value, Tensor):
                if name not in tensors:
                    raise Unsupported(f"a saved state without {name!r}", supported=", ".join(self.tensors()))
                return tensors[name]
            if isinstance(value, State):
                inner = {k[len(name) + 1 :]: t for k, t in tensors.items() if k.startswith(name + ".")}
                return value.with_tensors(inner)
            if isinstance(value, tuple):
                return tuple(visit(item, f"{name}.{i}") for i, item in enumerate(value))
            return value

        return dataclasses.replace(
            self, **{f.name: visit(getattr(self, f.name), f.name) for f in dataclasses.fields(self)}
        )

    @property
    def nbytes(self) -> int:
        """Total size of the tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


Loss = tuple[Tensor, Tensor]


@dataclass
class Result:
    """The result of a layer or of a stateful call.

    Attributes:
        output: the mixed sequence.
        state: the state to continue from, if requested.
        losses: auxiliary losses as (sum, count), which the model adds up.
        extras: other requested values, such as ``weights``.
    """

    output: Tensor
    state: Any = None
    losses: dict[str, Loss] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


register_pytree(Result)
