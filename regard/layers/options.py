"""The options of a layer's shell, in groups.

:func:`regard.create_layer` takes all options as flat keyword arguments; a shell's constructor takes the groups, each of
which checks its own options.
"""

from __future__ import annotations

import functools
import inspect
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from torch import nn

from regard.contract import Types, Unsupported, at_least, one_of
from regard.layers.linear import make_linear

GATES = {"swish": "silu", "sigmoid": "sigmoid"}
"""Output gates and the names of their functions in :func:`regard.engines.layers.gated_product`."""


class Group:
    """A frozen dataclass of related options, whose fields :func:`regard.create_layer` takes by name."""


@dataclass(frozen=True)
class HeadOptions(Group):
    """The number of key/value heads and the widths of heads.

    Attributes:
        head_dim: width of a query/key head; key_expand * dim / num_heads when None.
        value_dim: width of a value head; value_expand * dim / num_heads when None, or `head_dim` without value_expand.
        key_expand: width of all query heads together, as a fraction of `dim`. Used when `head_dim` is None.
        value_expand: width of all value heads together, as a fraction of `dim`. Used when `value_dim` is None.
        num_kv_heads: number of key/value heads, a divisor of `num_heads`; `num_heads` when None.
    """

    head_dim: int | None = None
    value_dim: int | None = None
    key_expand: float = 1.0
    value_expand: float | None = None
    num_kv_heads: int | None = None

    def sizes(self, dim: int, num_heads: int) -> tuple[int, int, int]:
        """Number of key/value heads, width of a query/key head, and width of a value head."""
        at_least("num_heads", num_heads, 1)
        head_dim, value_dim = self.head_dim, self.value_dim
        if head_dim is None:
            head_dim = _head_width(dim, num_heads, self.key_expand, "head_dim")
        if value_dim is None:
            expand = self.value_expand
            value_dim = head_dim if expand is None else _head_width(dim, num_heads, expand, "value_dim")
        kv_heads = num_heads if self.num_kv_heads is None else self.num_kv_heads
        if kv_heads < 1 or num_heads % kv_heads:
            raise Unsupported(f"num_kv_heads={kv_heads} for num_heads={num_heads}", supported="a divisor of num_heads")
        return kv_heads, head_dim, value_dim


@dataclass(frozen=True)
class PositionOptions(Group):
    """The position scheme.

    Attributes:
        positions: name of a scheme that the mechanism accepts; None for no positions.
        position_options: options of the scheme.
        max_length: longest sequence, for learned positions.
    """

    positions: str | None = None
    position_options: dict[str, Any] | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class NormOptions(Group):
    """Norms of the heads: ``rms``, ``layer`` or None.

    Attributes:
        query_key_norm: norm of each query and key head.
        value_norm: norm of each value head.
        output_norm: norm of each output head.
    """

    query_key_norm: str | None = None
    value_norm: str | None = None
    output_norm: str | None = None


@dataclass(frozen=True)
class GateOptions(Group):
    """The gate on the output.

    Attributes:
        output_gate: ``swish`` or ``sigmoid`` of a projection of x multiplies the output; None for none.
        output_gate_rank: rank of a low-rank output gate, made of two projections; None for one full projection.
    """

    output_gate: str | None = None
    output_gate_rank: int | None = None

    def __post_init__(self) -> None:
        if self.output_gate is not None:
            one_of("output_gate", self.output_gate, GATES)
        if self.output_gate_rank is not None:
            at_least("output_gate_rank", self.output_gate_rank, 1)
            if self.output_gate is None:
                raise Unsupported(
                    f"output_gate_rank={self.output_gate_rank} without an output gate",
                    supported=f"output_gate among {', '.join(GATES)}",
                    nearest="output_gate_rank=None",
                )


@dataclass(frozen=True)
class ConvolutionOptions(Group):
    """Short convolutions on queries, keys and values.

    Attributes:
        short_convolution: filter width of causal depthwise convolutions on q, k and v; 0 for none.
        convolution_activation: activation after each of them, ``silu`` or None.
    """

    short_convolution: int = 0
    convolution_activation: str | None = "silu"


@dataclass(frozen=True)
class LinearOptions(Group):
    """The layer's projections.

    Attributes:
        linear: kind of the projections (``dense`` or a projection mechanism).
        linear_options: options of that kind.
        bias: whether the projections have biases.
        output_bias: whether the output projection has one; as `bias` when None.
    """

    linear: str = "dense"
    linear_options: dict[str, Any] | None = None
    bias: bool = False
    output_bias: bool | None = None

    def make(self, in_features: int, out_features: int, **others: Any) -> nn.Module:
        """Make one projection; `others` override these options."""
        options = {"bias": self.bias, "kind": self.linear, **(self.linear_options or {}), **others}
        return make_linear(in_features, out_features, **options)

    def make_output(self, in_features: int, out_features: int) -> nn.Module:
        """Make the output projection."""
        own = {} if self.output_bias is None else {"bias": self.output_bias}
        return self.make(in_features, out_features, **own)


def shell_options(shell: type[nn.Module]) -> Mapping[str, type[Group] | None]:
    """All options of a layer class by name, each with its group (None for those without one)."""
    return _options(cast(Any, shell))


@functools.cache
def _options(shell: Any) -> Mapping[str, type[Group] | None]:
    found: dict[str, type[Group] | None] = {}
    for name, parameter in inspect.signature(shell).parameters.items():
        if isinstance(parameter.default, Group):
            group = type(parameter.default)
            found |= {option.name: group for option in fields(group)}  # type: ignore[arg-type]
        else:
            found[name] = None
    return found


def shell_types(shell: type[nn.Module]) -> Types:
    """Types of a layer class's options."""
    return _types(cast(Any, shell))


@functools.cache
def _types(shell: Any) -> Types:
    annotated = [shell, *{group for group in shell_options(shell).values() if group is not None}]
    hints: dict[str, Any] = {}
    for one in annotated:
        try:
            hints |= typing.get_type_hints(one.__init__)
        except (NameError, AttributeError):  # names imported for type checkers only
            continue
    return Types(hints)


def in_groups(shell: type[nn.Module], options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert flat options to the constructor arguments of a layer class."""
    groups, found = shell_options(shell), dict(options)
    for name, parameter in inspect.signature(shell).parameters.items():
        if isinstance(parameter.default, Group):
            kind = type(parameter.default)
            found[name] = kind(**{option: found.pop(option) for option in options if groups.get(option) is kind})
    return found


def _head_width(dim: int, heads: int, expand: float, option: str) -> int:
    width = expand * dim / heads
    if not (width >= 1 and width % 1 == 0):  # False for NaN and infinity too
        raise Unsupported(
            f"dim={dim} over num_heads={heads}" + (f" with an expansion of {expand}" if expand != 1 else ""),
            supported="heads of equal whole widths",
            nearest=f"{option}={max(1, int(width))}" if math.isfinite(width) else "",
        )
    return int(width)
