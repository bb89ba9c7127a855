"""A user's module as a mechanism in this process's catalogue, with the patterns that were detected in it.

It is called as :mod:`regard.workbench.detection.suspects` calls it, and has what models and studies need of a layer. It
has no forms, state or cost, so it cannot be verified or advised on; for that, it needs a card of its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from regard.catalogue import register
from regard.contract import Context, Cost, Kind, Mask, Mechanism, Paper, Pattern, Result, Shape, Unsupported
from regard.layers.base import Layer
from regard.layers.checks import given_context
from regard.workbench.detection.patterns import Finding, detect, first_line
from regard.workbench.detection.suspects import (
    KEY_PADDING,
    QUERY_PADDING,
    Arguments,
    Called,
    find_maker,
    module_suspect,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


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
        found: ClassVar = {one.pattern: one for one in findings if one.has}

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
    """The module in a pattern, with the masks that it was found to honour.

    Attributes:
        found: the finding for each pattern that it has.
    """

    found: ClassVar[Mapping[Pattern, Finding]]

    def __init__(self, arguments: Arguments, pattern: Pattern) -> None:
        super().__init__()
        self.name, self.pattern = arguments.name, pattern
        with self._failing("made"):
            self.module = arguments.maker(**arguments.of(pattern))
        self.called = Called(self.module, pattern)

    @classmethod
    def keeps_padding_out(cls, pattern: Pattern) -> bool:
        """Whether padding of any sequence in this pattern leaves the other outputs unchanged."""
        one = cls.found[pattern]
        return one.padding is True and one.query_padding in (None, True)

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
        one = self.found[self.pattern]
        if memory is None:
            hidden, queries = self._hidden(context.mask, x, "padding", one.padding), None
        else:
            hidden = self._hidden(context.memory_mask, memory, "padding in the memory", one.padding)
            queries = self._hidden(context.mask, x, "padded queries", one.query_padding)
        with self._failing(f"called with {x.shape[1]} tokens"):
            return Result(self.called.run(x, memory, hidden, queries))

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Raise errors of the module as Unsupported, which says whose they are."""
        try:
            yield
        except Unsupported:
            raise
        except Exception as error:  # the user's code may raise anything
            raise Unsupported(
                f"{self.name}, which raises {type(error).__name__} when it is {what}: {first_line(error)}",
                supported="modules that work with the sizes of models here",
            ) from error

    def _hidden(
        self, mask: Mask | None, tokens: torch.Tensor, what: str, kept_out: bool | None
    ) -> Bool[torch.Tensor, "b n"] | None:
        """True where a token is padding, as such modules take it; None without padding.

        Raises:
            Unsupported: for padding that the module does not keep out, and for masks of another kind.
        """
        if mask is None:
            return None
        if mask.bias is not None or mask.blocks is not None:
            raise Unsupported(f"{self.name} with a mask of pairs", supported="padding")
        if not mask.ragged:
            return None
        if kept_out is not True:
            raise Unsupported(
                f"{self.name} with {what}",
                supported=f"a forward that takes {KEY_PADDING} and {QUERY_PADDING} and keeps padding out",
            )
        if mask.cu_seqlens is not None:
            raise Unsupported(f"{self.name} with packed documents", supported="padding")
        if mask.lengths is not None:
            return torch.arange(tokens.shape[1], device=tokens.device) >= mask.lengths[:, None]
        assert mask.valid is not None
        return ~mask.valid
