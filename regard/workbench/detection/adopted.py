"""A user's module as a mechanism in this process's catalogue, with the patterns that were detected in it.

It is called as :mod:`regard.workbench.detection.suspects` calls it, and has what models and studies need of a layer. It
has no forms, state or cost, so it cannot be verified or advised on; for that, it needs a card of its own.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regard.catalogue import register
from regard.contract import Context, Cost, Kind, Mechanism, Paper, Pattern, Result, Shape, Unsupported
from regard.layers.base import Layer
from regard.layers.checks import given_context
from regard.workbench.detection.patterns import detect
from regard.workbench.detection.suspects import Arguments, Called, find_maker, module_suspect

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Config:
    """No options: the module's own arguments keep their defaults."""


def adopt(path: str, name: str | None = None) -> Mechanism:
    """Add a class from a file to the catalogue of this process, under its own name.

    Args:
        path: path of the Python file.
        name: name of the class, or of a function that makes a module.

    Raises:
        Unsupported: as for :func:`regard.workbench.detection.suspects.module_suspect`, for a module that has no
            pattern, and for a name that another mechanism has.
    """
    suspect = module_suspect(path, name, {})
    findings = detect(suspect)
    patterns = tuple(one.pattern for one in findings if one.has)
    if not patterns:
        raise Unsupported(
            f"{suspect.name}, which has none of the patterns ({findings[0].why})",
            supported="a module for one of " + ", ".join(Pattern),
            nearest=f"regard detect-patterns {path}:{suspect.name}",
        )
    own_name, maker = find_maker(path, name)
    if isinstance(maker, nn.Module):
        raise Unsupported(
            f"{own_name}, a module that is made already", supported="a class, or a function that makes one"
        )

    class Adopted(_Adopted):
        takes_padding = all(one.padding is True for one in findings if one.has)

        def __init__(
            self,
            card: Mechanism,
            dim: int,
            num_heads: int = 1,
            *,
            pattern: Any = Pattern.CAUSAL_SELF,
            config: Any = None,
        ) -> None:
            super().__init__(Arguments(own_name, maker, {}, dim, num_heads), Pattern.parse(pattern))

    card = Mechanism(
        name=own_name,
        kind=Kind.MIXER,
        summary=f"{own_name} of {path}.",
        paper=Paper(f"{path}, no paper", "", 0),
        inputs={"x": "bnc"},
        output="bnc",
        patterns=patterns,
        refused={one.pattern: one.why for one in findings if not one.has},
        forms={},
        config=Config,
        cost=_unknown,
        accepts_positions=("none", "sinusoidal", "learned"),
        module=Adopted,
    )
    return register(card, sys.modules[maker.__module__])


def _unknown(shape: Shape, config: Any) -> Cost:
    return Cost(math.nan, math.nan, math.nan, math.nan)


class _Adopted(Layer):
    """The module in a pattern, with the masks that it accepts."""

    takes_padding = False

    def __init__(self, arguments: Arguments, pattern: Pattern) -> None:
        super().__init__()
        self.name = arguments.name
        self.module = arguments.maker(**arguments.of(pattern))
        self.called = Called(self.module, pattern)

    def forward(
        self,
        x: Float[torch.Tensor, "b n c"],
        memory: Float[torch.Tensor, "b m c"] | None = None,
        *,
        context: Context | None = None,
        state: Any = None,
    ) -> Result:
        context = given_context(context)
        if state is not None or "state" in context.want:
            raise Unsupported(f"a state of {self.name}", supported="whole sequences", nearest="a card with a state")
        mask = context.mask if memory is None else context.memory_mask
        keys = x if memory is None else memory
        hidden = None
        if mask is not None and mask.ragged:
            if not self.takes_padding:
                raise Unsupported(
                    f"{self.name} with padding", supported="a forward that takes key_padding_mask and keeps padding out"
                )
            if mask.cu_seqlens is not None:
                raise Unsupported(f"{self.name} with packed documents", supported="padding")
            if mask.lengths is not None:
                hidden = torch.arange(keys.shape[1], device=x.device) >= mask.lengths[:, None]
            else:
                assert mask.valid is not None
                hidden = ~mask.valid
        return Result(self.called.run(x, memory, hidden))
