"""The card of a mechanism and the records it is made of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract.errors import Unsupported, closest, one_of, spelled
from regard.contract.patterns import Kind, Pattern
from regard.contract.state import State, Tensors
from regard.contract.types import Types, types_of

if TYPE_CHECKING:
    from regard.contract.parts import Merge, Projection
    from regard.contract.recurrence import Recurrence


@dataclass(frozen=True)
class Paper:
    """A paper that defines a mechanism."""

    title: str
    arxiv: str
    year: int
    number: int | None = None
    """Its number in the list of 55 papers; None for a paper that is not on it."""


@dataclass(frozen=True)
class Shape:
    """The size of a problem, for cost estimates: `n` queries, `m` keys, head widths `dim_key` and `dim_value`."""

    batch: int
    heads: int
    n: int
    m: int
    dim_key: int
    dim_value: int


@dataclass(frozen=True)
class Cost:
    """Analytic cost of one call of the mechanism (projections excluded).

    Attributes:
        flops: floating-point operations of the forward pass; a multiply-add counts as two.
        memory: temporary numbers stored in the forward pass, as far as they grow with the problem.
        state: numbers kept per sequence in order to decode its next token.
        step_flops: as `flops`, for decoding one token after `m` others.
    """

    flops: float
    memory: float
    state: float
    step_flops: float


@dataclass(frozen=True)
class Waiver:
    """A property of the equality matrix that a mechanism lacks, with the options under which it does hold.

    Attributes:
        property: name of the property in :mod:`regard.workbench.verification.verify`.
        reason: why the property cannot hold in general.
        holds_with: options under which the property holds and is tested; None if it never can.
        patterns: patterns that the waiver covers; all when empty.
        variants: variants that the waiver covers (:attr:`Mechanism.variants`); the default options and all variants
            when empty.
        dtypes: dtypes that the waiver covers; all when empty.
        backends: backends that the waiver covers; all when empty.
    """

    property: str
    reason: str
    holds_with: Mapping[str, Any] | None = None
    patterns: tuple[Pattern, ...] = ()
    variants: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    backends: tuple[str, ...] = ()

    def concerns(
        self,
        property_name: str,
        pattern: Pattern,
        variant: str = "",
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> bool:
        """Return whether this waives a property for a pattern, a variant (``""`` for the default options), a dtype and
        a backend (None for any)."""
        return (
            self.property == property_name
            and (not self.patterns or pattern in self.patterns)
            and (not self.variants or variant in self.variants)
            and (not self.dtypes or dtype in self.dtypes)
            and (not self.backends or backend is None or backend in self.backends)
        )


PUBLISHED_TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
}
"""Largest error allowed for each dtype, as a fraction of the largest output."""


@dataclass(frozen=True)
class LayerSpec:
    """The specification that a mechanism's own layer modules are built from. Widths are numbers of features.

    `kv_heads` is the number of key/value heads after projection; the shell expands groups unless the card's axis is
    ``g``.
    """

    dim: int
    memory_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    pattern: Pattern
    config: Any
    linear: Callable[..., nn.Module] = nn.Linear


@dataclass(frozen=True)
class TrainedModel:
    """What a mechanism's options depend on where it replaces softmax in a model that is already trained.

    Attributes:
        length: number of tokens of a training text.
        heads: number of heads of a layer.
        pattern: pattern of its attention.
        given: options that are given, which stay as they are.
    """

    length: int
    heads: int
    pattern: Pattern = Pattern.CAUSAL_SELF
    given: Mapping[str, Any] = field(default_factory=dict)


FORMS = ("reference", "parallel", "chunked", "step", "absorb", "read")
"""Names of the forms."""


ACTS_LIKE: Mapping[str, tuple[str, ...]] = {
    "lrpe": ("rotary",),
    "seqpe": ("learned",),
    "seqpe_mul": ("rotary",),
    "seqpe_add": ("rotary",),
    "seqpe_scalar": ("rotary", "alibi"),
    "toeplitz": ("alibi",),
}
"""Position schemes, each with others that act in the same way: mechanisms that accept all of these accept it too."""


TURNED_BEFORE = ("seqpe_mul", "seqpe_add", "seqpe_scalar")
"""Schemes of `ACTS_LIKE` that change q and k before the call: not added for mechanisms that rotate them themselves."""


@dataclass(frozen=True, eq=False)
class Mechanism:
    """The card of a mechanism, the only place where regard makes claims about it. Equal only to itself.

    Attributes:
        name: name in the catalogue.
        aliases: other names.
        alias_options: options of the mechanism or its layer that an alias implies, such as a variant with a name of its
            own.
        kind: what the mechanism maps.
        summary: one sentence about the mechanism.
        paper: where the mechanism is defined.
        inputs: axes of each tensor. ``b`` batch, ``h`` heads, ``g`` key/value heads (a divisor of h), ``n`` queries,
            ``m`` keys; other letters are widths that must agree. A name ending in ``?`` is optional.
        output: axes of the output.
        patterns: patterns that the mechanism supports.
        refused: the reason for each pattern that it does not support.
        forms: functions by form name: reference, parallel, chunked, step, absorb, read. The definition alone is enough:
            it then computes all calls, padded rows one by one.
        config: frozen dataclass of the mechanism's options.
        variants: named sets of options that together reach every computation the options allow. The equality matrix
            runs each, in sizes small enough for its tests. They may include options of the layer.
        variant_patterns: patterns of the variants that do not support all of the card's, or that have no effect in
            some.
        grid_variants: variants that are measured on grids; `sample_inputs` is then called with a ``grid``.
        layer_variants: variants that exist for layers but not for functions.
        state: its state class; None when it cannot continue a sequence.
        combines: how to merge the states of two pieces of a sequence when the later piece started from an empty state:
            ``sum``, ``diagonal``, ``matrix`` or ``softmax`` (see :mod:`regard.distributed.states`), or a function from
            the config to one of these; ``""`` if the first piece's state must be passed to the second.
        cost: analytic cost of a problem.
        default_scale: ``"rsqrt"`` for dim_key ** -0.5, a number, or a function of the sizes of the inputs' last axes by
            name, with the formula as its docstring.
        honours: what the mechanism takes besides tensors: any of ``bias``, ``blocks``, ``dropout``, ``weights``,
            ``lse``, ``roles``, ``rotate`` (it rotates queries and keys itself in causal-self), ``teacher`` (weights and
            outputs to learn from) and ``grid`` (where there is a grid, tokens stay in their places on it).
        weights: whether attention weights are ``exact``, ``implicit`` or ``none``.
        accepts_positions: position schemes that may be applied to its queries and keys, or to its scores; `ACTS_LIKE`
            adds to them.
        refused_positions: why it accepts no other scheme, if a reader might expect it to. (Schemes that add to scores
            need ``bias`` in `honours`.)
        knows_positions: whether it encodes positions itself, so that a model with rotary positions leaves them out for
            it.
        maps_before_rotation: with ``rotate`` in `honours`: whether it also rotates queries and keys itself, after its
            feature map, in noncausal-self. In cross patterns nothing rotates them.
        length: sequence lengths it takes: ``any``, ``multiple``, ``max`` (at most its option ``length``) or ``grid``.
        uneven: whether the causal-self form is defined for N != M.
        domains: how to sample inputs that are not plain normal tensors: ``log_decay``, ``unit``, ``positive``...
        axis_sizes: widths of the axes of `inputs` that depend on the options or the shape, for a problem as `cost`
            counts it; tests use smaller ones.
        sample_inputs: makes inputs for tests, if `domains` is not enough.
        sample_context: makes the other tensors that a call needs in tests (roles), by name.
        projection: makes the mechanism's inputs from the shell's q, k, v and tokens (:mod:`regard.contract.parts`).
        merge: changes the head outputs before the output projection.
        recurrence: from the options and the layer's projection (None without one), the causal-self mechanism as a
            recurrence of its state, which holds S in `memory` (and a window's tokens in `k` and `v`); None if these
            options are not such a recurrence. A mechanism with one can be decoded inside the native call for a
            decoder's layers.
        module: the whole layer, for mixers, poolings, projections and wrappers; for attention, a subclass of the shell
            where the mechanism must see layer inputs again.
        prepare: inserts the tokens that the mechanism needs: ids -> (ids, roles).
        layer_defaults: shell options that are part of the mechanism.
        in_trained_models: the options with which the mechanism replaces softmax in an already trained model; None for
            the defaults. Raises Unsupported for given options that cannot work there.
        most_positions: from the options, how many positions its causal-self form with a state uses for a sequence of
            any length; None, or a function that gives None, if they are as many as the tokens.
        engine: the engine that computes its fast forms, as in :func:`regard.which_backend`; ``""`` for plain PyTorch.
        waivers: properties that do not hold, with reasons.
        tolerances: largest error for each dtype, relative to the largest output.
    """

    name: str
    kind: Kind
    summary: str
    paper: Paper
    inputs: Mapping[str, str]
    patterns: tuple[Pattern, ...]
    forms: Mapping[str, Callable[..., Any]]
    config: type
    cost: Callable[[Shape, Any], Cost]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    variant_patterns: Mapping[str, tuple[Pattern, ...]] = field(default_factory=dict)
    grid_variants: frozenset[str] = frozenset()
    layer_variants: frozenset[str] = frozenset()
    aliases: tuple[str, ...] = ()
    alias_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    output: str = "bhnv"
    refused: Mapping[Pattern, str] = field(default_factory=dict)
    state: type[State] | None = None
    combines: str | Callable[[Any], str] = ""
    default_scale: float | str | Callable[[Mapping[str, int]], float] = "rsqrt"
    honours: frozenset[str] = frozenset()
    weights: str = "none"
    accepts_positions: tuple[str, ...] = ("none", "sinusoidal", "learned", "rotary")
    refused_positions: str = ""
    knows_positions: bool = False
    maps_before_rotation: bool = False
    length: str = "any"
    uneven: bool = True
    domains: Mapping[str, str] = field(default_factory=dict)
    axis_sizes: Callable[[Shape, Any], Mapping[str, int]] | None = None
    sample_inputs: Callable[..., Tensors] | None = None
    sample_context: Callable[..., Tensors] | None = None
    projection: type[Projection] | None = None
    merge: type[Merge] | None = None
    recurrence: Callable[[Any, Any], Recurrence[nn.Module] | None] | None = None
    module: type[nn.Module] | None = None
    prepare: Callable[..., tuple[Tensor, Tensor]] | None = None
    layer_defaults: Mapping[str, Any] = field(default_factory=dict)
    in_trained_models: Callable[[TrainedModel], Mapping[str, Any]] | None = None
    most_positions: Callable[[Any], int | None] | None = None
    engine: str = ""
    waivers: tuple[Waiver, ...] = ()
    tolerances: Mapping[torch.dtype, float] = field(default_factory=lambda: PUBLISHED_TOLERANCES)
    axes: Mapping[str, str] = field(init=False, repr=False)
    """Axes of each input by name, including optional inputs. Derived from `inputs`."""
    option_types: Types = field(init=False, repr=False)
    """Types of the options in `config`."""

    def __post_init__(self) -> None:
        if not self.alias_options.keys() <= set(self.aliases):
            raise Unsupported(f"alias_options of {self.name} for no alias", supported=", ".join(self.aliases))
        for form in self.forms:
            one_of("form", form, FORMS)
        whole = {"reference", "parallel", "chunked", "absorb"}
        if self.module is None and not whole & self.forms.keys():
            raise Unsupported(
                f"{self.name} without a form for whole sequences", supported=", ".join(FORMS), nearest="reference"
            )
        special = {*self.variant_patterns, *self.grid_variants, *self.layer_variants}
        if not special <= self.variants.keys():
            raise Unsupported(
                f"{special - self.variants.keys()}, which are not variants of {self.name}",
                supported=", ".join(self.variants),
            )
        object.__setattr__(self, "option_types", types_of(self.config))
        object.__setattr__(self, "axes", {name.rstrip("?"): axes for name, axes in self.inputs.items()})
        accepted = self.accepts_positions
        alike = [
            scheme
            for scheme, others in ACTS_LIKE.items()
            if scheme not in accepted
            and set(others) <= set(accepted)
            and not (scheme in TURNED_BEFORE and "rotate" in self.honours)
        ]
        object.__setattr__(self, "accepts_positions", (*accepted, *alike))

    def spelled_aliases(self) -> list[str]:
        """Its aliases, each followed by the options it implies in parentheses."""
        return [
            f"{alias} ({spelled(self.alias_options[alias])})" if alias in self.alias_options else alias
            for alias in self.aliases
        ]

    def require_pattern(self, pattern: str | Pattern) -> Pattern:
        """Parse a pattern; raise Unsupported with the card's reason if the mechanism lacks it."""
        wanted = pattern if isinstance(pattern, Pattern) else Pattern.parse(pattern)
        if wanted not in self.patterns:
            reason = self.refused.get(wanted, "")
            raise Unsupported(
                f"{self.name} in the pattern {wanted.value}" + (f" ({reason})" if reason else ""),
                supported=", ".join(self.patterns),
                nearest=next((p.value for p in self.patterns if p.cross == wanted.cross), "softmax"),
            )
        return wanted

    def options(self, **options: Any) -> Any:
        """Build the mechanism's `Config` from options; lists become tuples, since JSON only has lists.

        Raises:
            Unsupported: for unknown names, numbers that are not finite, and other bad values.
        """
        names = list(self.config.__dataclass_fields__)  # type: ignore[attr-defined]
        for name in options:
            if name not in names:
                raise Unsupported(
                    f"option {name!r} of {self.name}",
                    supported=", ".join(names) or "no options",
                    nearest=closest(name, names),
                )
        self.option_types.check(self.name, options)
        options = {name: tuple(value) if type(value) is list else value for name, value in options.items()}
        config = self.config(**options)
        for name, value in options.items():
            if type(value) is float and not -math.inf < value < math.inf:  # math.isfinite causes graph breaks
                raise Unsupported(
                    f"{name}={value} of {self.name}",
                    supported="a finite number",
                    nearest=f"{name}={self.config.__dataclass_fields__[name].default!r}",  # type: ignore[attr-defined]
                )
        return config

    def places_keys(self, pattern: Pattern) -> bool:
        """Return whether the mechanism, not its layer, rotates queries and keys: in causal-self, because cached keys
        change their positions, and in noncausal-self if it applies its feature map first."""
        early = pattern is Pattern.CAUSAL_SELF or (self.maps_before_rotation and not pattern.cross)
        return "rotate" in self.honours and early

    @property
    def memory_inputs(self) -> list[str]:
        """Inputs that belong to the memory (with an axis m but no n)."""
        return [name for name, axes in self.axes.items() if "m" in axes and "n" not in axes]

    @property
    def shared_inputs(self) -> list[str]:
        """Inputs that belong to no sequence (with neither n nor m), such as a learned query."""
        return [name for name, axes in self.axes.items() if "m" not in axes and "n" not in axes]

    @property
    def absorbed_inputs(self) -> list[str]:
        """Inputs of the ``absorb`` form: the memory's, and those of its parameters that belong to no sequence."""
        named = inspect.signature(self.forms["absorb"]).parameters
        return self.memory_inputs + [name for name in self.shared_inputs if name in named]

    @property
    def keeps_places(self) -> bool:
        """True if tokens on a grid stay in their places, with padding among them, instead of being gathered."""
        return self.length == "grid" or "grid" in self.honours

    def patterns_of(self, variant: str) -> tuple[Pattern, ...]:
        """Patterns of a variant; ``""`` means the default options, which have the card's patterns."""
        return self.variant_patterns.get(variant, self.patterns)

    def combines_with(self, config: Any) -> str:
        """The value of `combines` for these options."""
        return self.combines if isinstance(self.combines, str) else self.combines(config)

    @property
    def recurrent(self) -> bool:
        """True if its state does not grow with the sequence, with the default options."""
        return self.is_recurrent(self.config())

    def is_recurrent(self, config: Any) -> bool:
        """Return whether its state does not grow with the sequence, with these options."""
        if self.state is None:
            return False
        small, large = (self.cost(Shape(1, 1, n, n, 64, 64), config).state for n in (1 << 12, 1 << 16))
        return small == large
