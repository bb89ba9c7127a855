"""The subject of `verify` and `profile`: a mechanism in one pattern, with inputs that its card samples and cuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.apply import absorb, apply
from regard.contract import Call, Kind, Mask, Mechanism, Pattern, Result, Tensors, Unsupported

SIZES = {"h": 2, "g": 2, "d": 8, "k": 8, "v": 6, "e": 6, "c": 8}
"""Size of each axis letter in sampled inputs; letters not listed get 4."""

DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "log_decay": lambda x: -torch.nn.functional.softplus(2 * x),
    "unit": torch.sigmoid,
    "positive": torch.nn.functional.softplus,
    "negative": lambda x: -torch.nn.functional.softplus(x),
    "tanh": torch.tanh,
}


def axes_of(card: Mechanism, name: str) -> str:
    """The letters of an input's axes on the card."""
    return card.axes[name]


def sample_inputs(
    card: Mechanism,
    generator: torch.Generator,
    *,
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype = torch.float64,
    sizes: dict[str, int] | None = None,
) -> Tensors:
    """Random inputs with the card's axes and domains. `sizes` overrides the size of an axis letter."""
    widths = {**SIZES, **(sizes or {}), "b": batch, "n": n, "m": m}
    found = {}
    for declared, axes in card.inputs.items():
        name = declared.rstrip("?")
        shape = [widths.get(axis, 4) for axis in axes]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        found[name] = DOMAINS[card.domains.get(name, "normal")](x).to(dtype)
    return found


def in_float64(inputs: Tensors) -> Tensors:
    """The same numbers in float64, the dtype of definitions; non-float inputs are unchanged."""
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


@dataclass
class Subject:
    """A mechanism in one pattern with given options, ready to be run on sampled inputs.

    Attributes:
        options: options of the mechanism and of its layer; functions ignore the latter.
        variant: name of the options on the card; ``""`` for the default options, or for options without a name.
    """

    card: Mechanism
    pattern: Pattern
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    variant: str = ""

    @classmethod
    def of(cls, card: Mechanism, pattern: Pattern, variant: str = "", *, seed: int = 0) -> Subject:
        """The subject with the options of one of the card's variants; ``""`` for the default options."""
        options = dict(card.variants[variant]) if variant else {}
        return cls(card, pattern, options, seed, variant)

    @property
    def config(self) -> Any:
        """The mechanism's options, without those of the layer."""
        names = self.card.config.__dataclass_fields__  # type: ignore[attr-defined]
        return self.card.options(**{name: value for name, value in self.options.items() if name in names})

    def rng(self) -> torch.Generator:
        """A new generator with the subject's seed."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def grids(self) -> bool:
        """Whether it is measured on grids although a sequence would be possible too."""
        return self.variant in self.card.grid_variants

    def waives(self, property_name: str) -> bool:
        """Whether the card waives a property without settings under which it holds."""
        waived = (w for w in self.card.waivers if w.concerns(property_name, self.pattern, self.variant))
        return any(w.holds_with is None for w in waived)

    @property
    def on_grid(self) -> bool:
        """Whether tokens have positions on a grid, which is only the case in noncausal-self."""
        return (self.card.length == "grid" or self.grids) and self.pattern is Pattern.NONCAUSAL_SELF

    def grid(self, n: int) -> tuple[int, ...] | None:
        """The grid for `n` tokens, as square as n allows; None if the mechanism needs no grid."""
        if not self.on_grid:
            return None
        height = next(h for h in range(int(n**0.5) or 1, 0, -1) if n % h == 0)
        return (height, n // height)

    def inputs(
        self,
        n: int,
        m: int | None = None,
        *,
        batch: int = 2,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        **sizes: int,
    ) -> Tensors:
        """Sampled inputs, including `roles` if the mechanism reads roles. In self patterns m = n unless given."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        m = (n if not self.pattern.cross else n + 4) if m is None else m
        if "num_heads" in self.options:
            sizes = {"h": self.options["num_heads"], **sizes}
        if self.card.sample_inputs is not None:
            more = {"grid": self.grid(n)} if self.grids else {}
            call = {"pattern": self.pattern, "config": self.config, "sizes": sizes, **more}
            found = self.card.sample_inputs(generator, batch=batch, n=n, m=m, dtype=dtype, **call)
        else:
            found = sample_inputs(self.card, generator, batch=batch, n=n, m=m, dtype=dtype, sizes=sizes)
        if self.card.sample_context is not None:
            found |= self.card.sample_context(generator, batch=batch, n=n, m=m, pattern=self.pattern)
        return found

    def run(self, inputs: Tensors, **call: Any) -> Result:
        """Call the mechanism as a user does, with the same random draws in each call."""
        inputs = dict(inputs)
        if not torch.compiler.is_compiling():
            call.setdefault("generator", self.rng())
        if "roles" in inputs:
            call["roles"] = inputs.pop("roles")
        name = self.token_input(inputs)
        if self.on_grid and "grid" not in call and name is not None:
            call["grid"] = self.grid(inputs[name].shape[axes_of(self.card, name).index("n")])
        return apply(self.card, inputs, pattern=self.pattern, config=self.config, **call)

    def reference(self, inputs: Tensors, **call: Any) -> Tensor:
        """The definition, in float64, on unpadded inputs."""
        doubled = in_float64(inputs)
        return self.run(doubled, form="reference", **call).output

    def absorb(self, inputs: Tensors, **call: Any) -> Any:
        """The state after absorbing a memory, which queries then read."""
        inputs = dict(inputs)
        if "roles" in inputs:
            call["roles"] = inputs.pop("roles")
        return absorb(self.card, inputs, pattern=self.pattern, config=self.config, **call)

    def token_input(self, inputs: Tensors) -> str | None:
        """An input with the axis n, if there is one."""
        return next((n for n in inputs if n != "roles" and "n" in axes_of(self.card, n)), None)

    def positions(self, name: str) -> dict[str, int]:
        """The indices of the token axes n and m in an input."""
        axes = "bm" if name == "roles" else axes_of(self.card, name)
        return {letter: axes.index(letter) for letter in "nm" if letter in axes}

    def map_tokens(self, inputs: Tensors, change: Callable[[Tensor, int, str], Tensor]) -> Tensors:
        """Apply `change(tensor, axis, letter)` to every token axis of every input."""
        found = {}
        for name, tensor in inputs.items():
            for letter, axis in self.positions(name).items():
                tensor = change(tensor, axis, letter)
            found[name] = tensor
        return found

    def cut(self, inputs: Tensors, n: slice | Tensor, m: slice | Tensor | None = None) -> Tensors:
        """The tokens `n` of queries and `m` of keys; in self patterns, `m` defaults to `n`."""
        keys = n if m is None and not self.pattern.cross else m
        slices = {"n": n, "m": slice(None) if keys is None else keys}

        def change(x: Tensor, axis: int, letter: str) -> Tensor:
            return x[(slice(None),) * axis + (slices[letter],)]

        return self.map_tokens(inputs, change)

    def rows(self, inputs: Tensors, index: Tensor | slice) -> Tensors:
        """The inputs of the chosen batch rows."""
        found = {}
        for name, tensor in inputs.items():
            axes = "bm" if name == "roles" else axes_of(self.card, name)
            found[name] = tensor[index] if axes.startswith("b") else tensor
        return found

    def place(self, inputs: Tensors, valid: Tensor, total: int, letters: str = "nm") -> Tensors:
        """Spread each row's tokens over the `valid` places of `total`; padding is NaN (0 in integer inputs)."""
        batch = valid.shape[0]

        def change(x: Tensor, axis: int, letter: str) -> Tensor:
            if letter not in letters:
                return x
            moved = x.movedim(axis, 1)
            fill = float("nan") if x.is_floating_point() else 0
            spread = torch.full((batch, total, *moved.shape[2:]), fill, dtype=x.dtype)
            for row in range(batch):
                count = int(valid[row].sum())
                spread[row, valid[row]] = moved[row, :count]
            return spread.movedim(1, axis)

        return self.map_tokens(inputs, change)

    def join(self, first: Tensors, second: Tensors) -> Tensors:
        """Append the tokens of `second` to those of `first`; inputs without tokens are those of `first`."""
        joined = {}
        for name, tensor in first.items():
            where = self.positions(name)
            joined[name] = torch.cat([tensor, second[name]], next(iter(where.values()))) if where else tensor
        return joined

    def output_axis(self) -> int | None:
        """The index of the token axis n in the output, if it has one."""
        return self.card.output.index("n") if "n" in self.card.output else None

    def take_output(self, output: Tensor, index: Any) -> Tensor:
        """Tokens of the output; the whole output if it has no token axis."""
        axis = self.output_axis()
        if axis is None:
            return output
        return output[(slice(None),) * axis + (index,)]

    @property
    def stateful(self) -> bool:
        """Whether functions can continue a causal sequence from a state."""
        has = self.card.state is not None and "chunked" in self.card.forms
        return has and self.pattern is Pattern.CAUSAL_SELF and not self.waives("state")

    @property
    def reads_memory(self) -> bool:
        """Whether its functions take memory; those of a wrapper get only what the wrapped mechanism made of it."""
        return self.pattern.cross and bool(self.card.memory_inputs)

    @property
    def absorbs(self) -> bool:
        """Whether functions can absorb a memory and read it later."""
        return self.pattern.cross and "absorb" in self.card.forms and not self.waives("memory")

    @property
    def layer_decodes(self) -> bool:
        """Whether its layer can continue from a state; a wrapper's state is that of the layer it wraps."""
        wraps = self.card.kind is Kind.WRAPPER and self.card.state is not None
        return self.stateful or self.absorbs or (wraps and self.pattern is not Pattern.NONCAUSAL_SELF)

    def with_options(self, options: dict[str, Any]) -> Subject:
        """The subject with some options added or changed."""
        return dataclasses.replace(self, options={**self.options, **options})


__all__ = ["Call", "Kind", "Mask", "Result", "Subject", "Unsupported", "axes_of", "sample_inputs"]
