"""States of sequences that join and leave the batch: kept batched as they were last read, and regrouped when the batch
changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import State


def join(states: Sequence[Any], fill: float = 0.0, newest_last: bool = False) -> Any:
    """Concatenate states along the batch axis, in order.

    Tensors that grow with the sequence are padded to the longest; the padding has the values that it has in rows that
    were read together: see :func:`regard.contract.state_field`.
    """
    first = states[0]
    if len(states) == 1:
        return first
    if isinstance(first, Tensor):
        size = [max(lengths) for lengths in zip(*(x.shape[1:] for x in states), strict=True)]
        return torch.cat([_padded(x, size, fill, newest_last) for x in states])
    if isinstance(first, State):
        fields = {
            f.name: join(
                [getattr(state, f.name) for state in states],
                f.metadata.get("fill", 0.0),
                f.metadata.get("newest_last", False),
            )
            for f in dataclasses.fields(first)
        }
        return dataclasses.replace(first, **fields)
    if isinstance(first, tuple):
        return tuple(join(parts, fill, newest_last) for parts in zip(*states, strict=True))
    return first


def _padded(x: Tensor, size: Sequence[int], fill: float, newest_last: bool) -> Tensor:
    missing = [longest - n for longest, n in zip(size, x.shape[1:], strict=True)]
    if not any(missing):
        return x
    sides = [(n, 0) if newest_last else (0, n) for n in reversed(missing)]
    return F.pad(x, [side for pair in sides for side in pair], value=fill)


@dataclasses.dataclass(eq=False)
class _Group:
    keys: tuple[int, ...]
    state: State


class Held:
    """States of sequences by key."""

    def __init__(self) -> None:
        self._where: dict[int, tuple[_Group, int]] = {}

    def __contains__(self, key: int) -> bool:
        return key in self._where

    def get(self, keys: Sequence[int]) -> State:
        """Return a state with one row for each key."""
        group = self._where[keys[0]][0]
        if group.keys == tuple(keys):
            return group.state
        runs: list[tuple[_Group, list[int]]] = []
        for key in keys:
            group, row = self._where[key]
            if runs and runs[-1][0] is group:
                runs[-1][1].append(row)
            else:
                runs.append((group, [row]))
        return join([self._rows(group, rows) for group, rows in runs])

    def put(self, keys: Sequence[int], state: State) -> None:
        """Store the state of these sequences, instead of their earlier states."""
        group = _Group(tuple(keys), state)
        for row, key in enumerate(keys):
            self._where[key] = group, row

    def drop(self, key: int) -> None:
        """Forget the state of a sequence, if there is one."""
        self._where.pop(key, None)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(group.state.nbytes for group in {id(g): g for g, _ in list(self._where.values())}.values())

    @staticmethod
    def _rows(group: _Group, rows: list[int]) -> State:
        if rows == list(range(len(group.keys))):
            return group.state
        some = next(iter(group.state.tensors().values()))
        return group.state.select(torch.tensor(rows, device=some.device))
