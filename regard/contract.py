"""The few words everything shares: patterns, masks, context, state, results and the mechanism card.

A *mechanism* is described once, by its card (:class:`Mechanism`); everything else in regard (functions, layers, tests,
documentation, the command line) reads the card. A *form* is one way to compute a mechanism: ``reference`` (the
definition), ``parallel``, ``chunked``, ``step``, and for cross patterns ``absorb`` and ``read``. Forms receive dense,
right-padded tensors and a :class:`Call`; the gathering of padding, packing and sanitising happens before them, in
:mod:`regard.functional`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import json
import numbers
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import GetAttrKey, register_pytree_node

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from regard.layers.parts import Merge, Projection

Tensors = dict[str, Tensor]


class Unsupported(ValueError):
    """The one exception for a request that cannot be honoured: what is wrong, what is accepted, what to try.

    Args:
        asked: what was asked for.
        supported: what is accepted instead, in words.
        nearest: the nearest alternative, ready to use.
    """

    def __init__(self, asked: str, *, supported: str = "", nearest: str = "") -> None:
        self.asked, self.supported, self.nearest = asked, supported, nearest
        parts = [f"not supported: {asked.rstrip('.')}"]
        if supported:
            parts.append(f"supported: {supported}")
        if nearest:
            parts.append(f"try {nearest}")
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        """Its parts, of which it is made again in another process."""
        return _unsupported, (type(self), self.asked, self.supported, self.nearest)


def _unsupported(kind: type[Unsupported], asked: str, supported: str, nearest: str) -> Unsupported:
    return kind(asked, supported=supported, nearest=nearest)


def closest(word: str, choices: Iterable[str]) -> str:
    """The choice spelled most like `word`, or ``""`` when none is close.

    Close are spellings that share three fifths of their letters, in order, and names that begin with the same word or
    hold all words of `word`. Fewer letters in common are common by chance.
    """
    word, names = str(word), list(choices)
    words = _words(word)
    alike = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    kin = [name for name in names if words and (_words(name)[:1] == words[:1] or set(words) <= set(_words(name)))]
    found = alike or difflib.get_close_matches(word, kin, n=1, cutoff=0.0)
    return found[0] if found else ""


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())


def register_pytree(cls: type, constants: Mapping[str, Callable[[Any], Any]] | None = None) -> None:
    """Make a dataclass a node of `torch.utils._pytree`, so that `torch.export` takes and returns it, saves and loads it.

    Args:
        constants: fields that belong to the structure, not to the data, each with what makes its value of the list,
            number or None that a saved program has in its place.
    """
    fixed = constants or {}

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        held = [(GetAttrKey(f.name), getattr(value, f.name)) for f in dataclasses.fields(cls) if f.name not in fixed]
        return held, tuple(getattr(value, name) for name in fixed)

    def flatten(value: Any) -> tuple[list[Any], Any]:
        held, structure = flatten_with_keys(value)
        return [data for _, data in held], structure

    def unflatten(data: Iterable[Any], structure: Any) -> Any:
        value: Any = object.__new__(cls)  # what torch puts in the place of tensors would not pass the checks of a call
        names = [f.name for f in dataclasses.fields(cls) if f.name not in fixed]
        for name, held in (*zip(names, data, strict=True), *zip(fixed, structure, strict=True)):
            object.__setattr__(value, name, held)
        return value

    def dump(structure: Any) -> str:
        return json.dumps([sorted(x) if isinstance(x, frozenset) else x for x in structure])

    def load(text: Any) -> Any:
        return tuple(x if x is None else make(x) for make, x in zip(fixed.values(), json.loads(text), strict=True))

    register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        to_dumpable_context=dump,
        from_dumpable_context=load,
        flatten_with_keys_fn=flatten_with_keys,
    )
    torch.serialization.add_safe_globals([cls, *(made for made in fixed.values() if isinstance(made, type))])


class Pattern(enum.StrEnum):
    """The four ways attention is used (Comprehensive Attention Benchmark, arXiv 2210.07661).

    In ``causal-cross`` output i may depend on queries <= i and on all of the memory; a streaming alignment of memory is
    a separate mask. In ``causal-self`` with more keys than queries (or fewer) positions align bottom-right.
    """

    NONCAUSAL_SELF = "noncausal-self"
    CAUSAL_SELF = "causal-self"
    NONCAUSAL_CROSS = "noncausal-cross"
    CAUSAL_CROSS = "causal-cross"

    causal: bool
    cross: bool

    def __init__(self, value: str) -> None:
        direction, _, memory = value.partition("-")
        self.causal, self.cross = direction == "causal", memory == "cross"

    @classmethod
    def parse(cls, value: str | Pattern) -> Pattern:
        try:
            return cls(value)
        except ValueError:
            names = [p.value for p in cls]
            raise Unsupported(
                f"pattern {value!r}", supported=", ".join(names), nearest=closest(str(value), names)
            ) from None


ALL_PATTERNS = tuple(Pattern)


class Kind(enum.StrEnum):
    """Kinds of mechanism, by what they map."""

    ATTENTION = "attention"
    MIXER = "mixer"
    POOLING = "pooling"
    PROJECTION = "projection"
    WRAPPER = "wrapper"


@dataclass(frozen=True)
class BlockMask:
    """Block-sparse visibility on token *ranks* (True = may attend).

    Query rank i lies in block ``i // block_size``. In causal-self, queries count from the offset M - N of the row.

    Attributes:
        visible: blocks that may attend, broadcast over batch and heads.
        block_size: tokens a block, in queries and keys.
    """

    visible: Bool[Tensor, "#b #h q_blocks k_blocks"]
    block_size: int

    def __post_init__(self) -> None:
        _BLOCK_MASK_TYPES.check("BlockMask", self.__dict__)
        at_least("block_size", self.block_size, 1)
        if self.visible.dtype != torch.bool or self.visible.ndim != 4:
            raise Unsupported(
                f"visible blocks of dtype {self.visible.dtype} and {self.visible.ndim} axes",
                supported="a boolean (B or 1, H or 1, query blocks, key blocks) tensor, True where blocks may attend",
                nearest="visible.bool()" if self.visible.ndim == 4 else "",
            )


register_pytree(BlockMask, {"block_size": int})


@dataclass(frozen=True)
class Mask:
    """Which tokens of one sequence axis exist, and what pairs of them may see each other. True = may attend.

    Give at most one of `valid`, `lengths`, `cu_seqlens`. `bias` and `blocks` describe pairs and belong to the query
    side's mask; a mechanism that cannot honour them refuses.

    Attributes:
        valid: key padding of any shape (left, right, inside).
        lengths: valid tokens of each right-padded row.
        cu_seqlens: borders of documents packed into one row (batch size 1), starting with 0.
        max_length: length of the longest document, as a Python int; computed from `cu_seqlens` when not given.
        bias: added to the scores of exact mechanisms; -inf hides a pair.
        blocks: block-sparse visibility.
        layout: of a mask that a model or layer makes for what is inside it: how the tokens lie, which is then neither
            checked nor found again (:func:`regard.core.ragged.inner_mask`). None in masks of callers.
    """

    valid: Bool[Tensor, "b n"] | None = None
    lengths: Int[Tensor, " b"] | None = None
    cu_seqlens: Int[Tensor, " documents+1"] | None = None
    max_length: int | None = None
    bias: Float[Tensor, "#b #h n m"] | None = None
    blocks: BlockMask | None = None
    layout: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _MASK_TYPES.check("Mask", self.__dict__)
        if self.layout is not None and not hasattr(self.layout, "dense_index"):
            raise Unsupported("mask.layout", supported="None: models and layers set it", nearest="valid or lengths")
        given = [n for n in ("valid", "lengths", "cu_seqlens") if getattr(self, n) is not None]
        if len(given) > 1:
            raise Unsupported(
                f"a mask with both {given[0]} and {given[1]}", supported="one of valid, lengths, cu_seqlens"
            )
        if self.valid is not None and (self.valid.dtype != torch.bool or self.valid.ndim != 2):
            raise Unsupported(
                f"mask.valid of dtype {self.valid.dtype} and {self.valid.ndim} axes",
                supported="a boolean (B, N) tensor, True where a token is valid",
                nearest="Mask(bias=...) for a score for each pair" if self.valid.ndim > 2 else "valid.bool()",
            )
        if self.lengths is not None and (self.lengths.is_floating_point() or self.lengths.ndim != 1):
            raise Unsupported("mask.lengths that is not an integer (B,) tensor", supported="an integer (B,) tensor")
        if self.cu_seqlens is not None and (self.cu_seqlens.is_floating_point() or self.cu_seqlens.ndim != 1):
            raise Unsupported(
                "mask.cu_seqlens that is not an integer (documents + 1,) tensor", supported="0, end of document 1, ..."
            )
        if self.max_length is not None and self.cu_seqlens is None:
            raise Unsupported(f"max_length={self.max_length} without cu_seqlens", supported="max_length=None")
        if self.bias is not None and (not self.bias.is_floating_point() or self.bias.ndim != 4):
            raise Unsupported(
                f"mask.bias of dtype {self.bias.dtype} and {self.bias.ndim} axes",
                supported="scores to add, (B or 1, H or 1, N or 1, M or 1)",
                nearest="torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf), for booleans",
            )

    @property
    def ragged(self) -> bool:
        """Whether some tokens may be missing (as opposed to pairs being hidden)."""
        return self.valid is not None or self.lengths is not None or self.cu_seqlens is not None


register_pytree(Mask, {"max_length": int})


class Role(enum.IntEnum):
    """The purpose of an inserted token; ordinary tokens are 0."""

    TOKEN = 0
    LANDMARK = 1
    CLS = 2
    SINK = 3
    REFERENCE = 4


WANTS = ("state", "weights", "lse", "gates")
"""Extras that a call may be asked for beside its output."""


@dataclass(frozen=True)
class Context:
    """Everything that accompanies the tensors of one call.

    Attributes:
        mask: of the queries (and keys, in self patterns).
        memory_mask: of the memory, in cross patterns.
        positions: position of each token; the rank among valid tokens when None.
        memory_positions: likewise for the memory.
        position_vectors: of a model whose position scheme encodes positions once for all layers: what it made of them.
        grid: sizes of the image or volume whose tokens are laid out row by row.
        roles: :class:`Role` of each token; in cross patterns of each token of the memory.
        generator: source of every random draw of the call.
        progress: training step or diffusion time, for mechanisms that follow a schedule.
        teacher: tensors of a teacher for distillation losses.
        want: extras to compute, of `WANTS`: ``"state"`` (continue later), ``"weights"`` (attention weights), ``"lse"``
            (their log-sum-exp), ``"gates"`` (of a wrapper's routers).
    """

    mask: Mask | None = None
    memory_mask: Mask | None = None
    positions: Int[Tensor, "b n"] | None = None
    memory_positions: Int[Tensor, "b m"] | None = None
    position_vectors: Float[Tensor, "#b n c"] | None = None
    grid: tuple[int, ...] | None = None
    roles: Int[Tensor, "b n"] | None = None
    generator: torch.Generator | None = None
    progress: float | None = None
    teacher: Any = None
    want: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("mask", "memory_mask"):
            check_mask(name, getattr(self, name))
        _CONTEXT_TYPES.check("Context", self.__dict__)
        for name in ("positions", "memory_positions", "roles"):
            numbers = getattr(self, name)
            if numbers is not None and (numbers.ndim != 2 or numbers.is_floating_point()):
                raise Unsupported(
                    f"{name} of dtype {numbers.dtype} and shape {tuple(numbers.shape)}", supported="integers (B, N)"
                )

    def replace(self, **changes: Any) -> Context:
        return dataclasses.replace(self, **changes)


register_pytree(Context, {"grid": tuple, "generator": torch.Generator, "progress": float, "want": frozenset})


def state_field(fill: float = 0.0, *, newest_last: bool = False, **given: Any) -> Any:
    """A field of a :class:`State`.

    Args:
        fill: its value in an empty state, and in slots that a row does not have which another has.
        newest_last: whether those slots come before a row's own, so that the newest is the last of all.
        given: of `dataclasses.field`.
    """
    return field(metadata={"fill": fill, "newest_last": newest_last}, **given)


@dataclass(frozen=True)
class State:
    """The memory of a sequence for its continuation: a typed tuple of tensors, one row a sequence.

    Subclasses are frozen dataclasses whose fields are tensors (batch first), other states, tuples of states, or None.
    All are pytrees, so that `torch.export` takes and returns them.
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
        """The state of the chosen rows, in that order; repeats allowed (beam search)."""
        return self._map(lambda t, _: t.index_select(0, indices))

    def reset(self, rows: Bool[Tensor, " b"]) -> Self:
        """The state with the marked rows emptied, as at the start of a document."""
        return self._map(lambda t, fill: torch.where(rows.view(-1, *[1] * (t.ndim - 1)), torch.full_like(t, fill), t))

    def detach(self) -> Self:
        return self._map(lambda t, _: t.detach())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Move to another device. Dtypes are kept, since accumulators must not lose precision."""
        where = torch.device(device)
        return self._map(lambda t, _: t.to(where, non_blocking=non_blocking))

    def tensors(self, prefix: str = "") -> Tensors:
        """All tensors by dotted name: what `safetensors` saves."""
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
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


Loss = tuple[Tensor, Tensor]


@dataclass
class Result:
    """The result of a layer or of a stateful call.

    Attributes:
        output: the mixed sequence.
        state: to continue the sequence, when wanted.
        losses: auxiliary losses as (sum, count), added up by the model.
        extras: anything else that was wanted, such as ``weights``.
    """

    output: Tensor
    state: Any = None
    losses: dict[str, Loss] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


register_pytree(Result)


@dataclass(frozen=True)
class Call:
    """Everything that a form receives beside its tensors, which are dense and right-padded, with zeros in the padding.

    Attributes:
        pattern: one of the card's patterns.
        config: options of the mechanism.
        scale: multiplies the scores, already resolved from the card's default.
        lengths: valid queries of each row; None when all are.
        memory_lengths: valid keys of each row; None when all are.
        bias: additive scores of pairs, on ranks.
        blocks: block-sparse visibility of pairs, on ranks.
        state: to continue from; None at the start of a sequence.
        chunk_size: tokens a chunk in chunked forms; the form's own default when None.
        dropout: probability of dropping an attention weight.
        backend: requested by the user; None lets the device decide.
        position_bias: additive scores as a function of query ranks and key ranks, from a position scheme.
        rotate: rotary embedding as a function of (tensor, ranks), for mechanisms that place cached keys themselves.
        grid: sizes of the image or volume whose tokens are laid out row by row.
        valid: valid places of the grid; None when all are, or without a grid. On a grid tokens stay in their places,
            with zeros at invalid ones, and `lengths` is None.
    """

    pattern: Pattern
    config: Any = None
    scale: float = 1.0
    lengths: Int[Tensor, " b"] | None = None
    memory_lengths: Int[Tensor, " b"] | None = None
    bias: Float[Tensor, "#b #h n m"] | None = None
    blocks: BlockMask | None = None
    state: Any = None
    chunk_size: int | None = None
    dropout: float = 0.0
    generator: torch.Generator | None = None
    backend: str | None = None
    position_bias: Callable[[Tensor, Tensor], Tensor] | None = None
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    grid: tuple[int, ...] | None = None
    valid: Bool[Tensor, "b n"] | None = None
    roles: Int[Tensor, "b n"] | None = None
    training: bool = False
    progress: float | None = None
    teacher: Any = None
    want: frozenset[str] = frozenset()

    def replace(self, **changes: Any) -> Call:
        return dataclasses.replace(self, **changes)

    def after(self, state: Any, rotate: Callable[[Tensor, Tensor], Tensor] | None = None) -> Call:
        """The same call continuing from `state`, with this `rotate`, in a tenth of the time that :meth:`replace` takes to set
        every field: each layer asks for it at each token."""
        call = object.__new__(Call)
        vars(call).update(vars(self), state=state, rotate=rotate)
        return call

    def valid_queries(self, n: int) -> Bool[Tensor, "b n"] | None:
        """True at valid queries; None when all are valid."""
        return None if self.lengths is None else valid_from_lengths(self.lengths, n)

    def valid_keys(self, m: int) -> Bool[Tensor, "b m"] | None:
        """True at valid keys; None when all are valid."""
        return None if self.memory_lengths is None else valid_from_lengths(self.memory_lengths, m)


def lengths_after(
    before: Int[Tensor, " b"] | None, lengths: Int[Tensor, " b"] | None, batch: int, n: int, device: torch.device
) -> Int[Tensor, " b"]:
    """Tokens of each row after `lengths` new ones (all n when None) behind those `before` (none when None)."""
    if before is not None:
        return before + (n if lengths is None else lengths)
    return torch.full((batch,), n, device=device) if lengths is None else lengths


def valid_from_lengths(lengths: Int[Tensor, " b"], n: int) -> Bool[Tensor, "b n"]:
    return torch.arange(n, device=lengths.device) < lengths[:, None]


@dataclass(frozen=True)
class Paper:
    """Where a mechanism is defined."""

    title: str
    arxiv: str
    year: int
    number: int | None = None
    """Its number in the list of 55 papers, when it is one of them."""


@dataclass(frozen=True)
class Shape:
    """The size of a problem, for cost estimates. `n` queries, `m` keys, `dim_key` and `dim_value` widths of a head."""

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
        flops: multiply-adds counted twice, forward.
        memory: numbers of temporary storage that grow with the problem, forward.
        state: numbers kept for each sequence to decode its next token.
        step_flops: as `flops`, for decoding one token after `m`.
    """

    flops: float
    memory: float
    state: float
    step_flops: float


@dataclass(frozen=True)
class Waiver:
    """A property of the equality matrix that a mechanism does not have, and where it does hold.

    Attributes:
        property: name of the property in :mod:`regard.workbench.verify`.
        reason: why it cannot hold in general.
        holds_with: options under which it holds and is tested; None where it never can.
        patterns: patterns concerned; all when empty.
        variants: variants concerned (:attr:`Mechanism.variants`); the default options and all variants when empty.
        dtypes: dtypes concerned; all when empty.
    """

    property: str
    reason: str
    holds_with: Mapping[str, Any] | None = None
    patterns: tuple[Pattern, ...] = ()
    variants: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    def concerns(
        self, property_name: str, pattern: Pattern, variant: str = "", dtype: torch.dtype | None = None
    ) -> bool:
        """Whether it waives a property in a pattern, with the options of a variant (``""`` for the default ones), in a
        dtype (None: in every one)."""
        return (
            self.property == property_name
            and (not self.patterns or pattern in self.patterns)
            and (not self.variants or variant in self.variants)
            and (not self.dtypes or dtype in self.dtypes)
        )


PUBLISHED_TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
}
"""Largest error allowed, as a fraction of the largest output."""


@dataclass(frozen=True)
class LayerSpec:
    """The specification that a mechanism's own layer modules are built from. Widths are numbers of features.

    `kv_heads` is the number of key/value heads after projection; groups are expanded by the shell unless the card's
    axis is ``g``.
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


ACTS_LIKE: Mapping[str, tuple[str, ...]] = {
    "lrpe": ("rotary",),
    "seqpe": ("learned",),
    "seqpe_mul": ("rotary",),
    "seqpe_add": ("rotary",),
    "seqpe_scalar": ("rotary", "alibi"),
    "toeplitz": ("alibi",),
}
"""Position schemes that act where others do: a mechanism that accepts these accepts them too."""

TURNED_BEFORE = ("seqpe_mul", "seqpe_add", "seqpe_scalar")
"""Those of them that change queries and keys before the call, so not of a mechanism that rotates them itself."""


@dataclass(frozen=True, eq=False)
class Mechanism:
    """The card of a mechanism: all that is claimed of it, and nothing else is claimed anywhere. Equal only to itself.

    Attributes:
        name: catalogue name.
        aliases: other names.
        alias_options: options of the mechanism or its layer for which some of the aliases stand, such as a variant with a
            name of its own.
        kind: what it maps.
        summary: one sentence.
        paper: where it is defined.
        inputs: axes of each tensor. ``b`` batch, ``h`` heads, ``g`` key/value heads (a divisor of h), ``n`` queries,
            ``m`` keys; other letters are widths that must agree. A name ending in ``?`` is optional.
        output: axes of the output.
        patterns: patterns it has.
        refused: reason for each pattern that it lacks.
        forms: functions by form name: reference, parallel, chunked, step, absorb, read.
        config: frozen dataclass of options.
        variants: sets of options, by name, which together reach every computation that the options allow: the equality
            matrix runs each, in sizes small enough for its tests.
            Options of the layer may be among them.
        variant_patterns: patterns of the variants that have not all of the card's, or do nothing in some.
        grid_variants: variants that are measured on grids; `sample_inputs` is then called with a ``grid``.
        layer_variants: variants that layers have and functions do not.
        state: its state class; None when it cannot continue a sequence.
        combines: how the states of two pieces of a sequence, of which the later began with none, become that of both:
            ``sum``, ``diagonal``, ``matrix`` or ``softmax`` (see :mod:`regard.distributed.states`), or a function of the
            config that says it; ``""`` where one has to be handed to the other.
        cost: analytic cost of a problem.
        default_scale: ``"rsqrt"`` for dim_key ** -0.5, a number, or a function of the last axes of the inputs, by name,
            whose docstring is the formula.
        default_form: form that computes whole sequences when no state is wanted.
        honours: of ``bias``, ``blocks``, ``dropout``, ``weights``, ``lse``, ``roles``, ``rotate`` (it rotates queries and
            keys itself in causal-self), ``teacher`` (weights and outputs to learn from), ``grid`` (tokens stay in their
            places on a grid, where there is one): what it takes beside tensors.
        weights: whether attention weights are ``exact``, ``implicit`` or ``none``.
        accepts_positions: position schemes that may be applied to its queries and keys, or to its scores; those of
            `ACTS_LIKE` are added.
        refused_positions: why it accepts no other scheme, where it could be thought to. (Schemes that add to scores need
            ``bias`` in `honours`.)
        knows_positions: whether it has positions of its own, so that those of a model that rotates are left out for it.
        maps_before_rotation: with ``rotate`` in `honours`, whether it rotates queries and keys itself in noncausal-self
            too, after its feature map; in cross patterns nothing rotates them.
        length: ``any``, ``multiple``, ``max`` (its option ``length`` is the greatest) or ``grid``.
        uneven: whether the causal-self form is defined for N != M.
        domains: how to sample an input that is not a plain tensor of normals: ``log_decay``, ``unit``, ``positive``...
        axis_sizes: widths of axes of `inputs` that options or the shape decide, in a problem as `cost` counts it; tests
            have smaller ones.
        sample_inputs: makes inputs for tests, when `domains` is not enough.
        sample_context: makes what else a call needs in tests (roles), as tensors by name.
        projection: makes the mechanism's inputs of the shell's q, k, v and tokens (:mod:`regard.layers.parts`).
        merge: changes the head outputs before the output projection.
        module: the whole layer, for mixers, poolings, projections and wrappers; of attention a class derived from the
            shell, where it must see layer inputs again.
        prepare: inserts the tokens it needs: ids -> (ids, roles).
        layer_defaults: options of the shell that belong to the mechanism.
        in_trained_models: options, of a training length and a number of heads, with which it takes the place of softmax in a
            model that is trained already, where these are not the defaults.
        engine: what computes its fast forms, as in :func:`regard.which_backend`; ``""`` for plain PyTorch.
        waivers: properties that do not hold, with reasons.
        tolerances: largest error by dtype, relative to the largest output.
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
    default_form: str = "parallel"
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
    module: type[nn.Module] | None = None
    prepare: Callable[..., tuple[Tensor, Tensor]] | None = None
    layer_defaults: Mapping[str, Any] = field(default_factory=dict)
    in_trained_models: Callable[[int, int], Mapping[str, Any]] | None = None
    engine: str = ""
    waivers: tuple[Waiver, ...] = ()
    tolerances: Mapping[torch.dtype, float] = field(default_factory=lambda: PUBLISHED_TOLERANCES)
    axes: Mapping[str, str] = field(init=False, repr=False)
    """Axes of each input by name, optional ones too. Made from `inputs`."""
    option_types: Types = field(init=False, repr=False)
    """Types of the options of `config`."""

    def __post_init__(self) -> None:
        if not self.alias_options.keys() <= set(self.aliases):
            raise Unsupported(f"alias_options of {self.name} for no alias", supported=", ".join(self.aliases))
        special = {*self.variant_patterns, *self.grid_variants, *self.layer_variants}
        if not special <= self.variants.keys():
            raise Unsupported(
                f"{special - self.variants.keys()}, no variants of {self.name}", supported=", ".join(self.variants)
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
        """Its aliases, with the options for which they stand in parentheses."""
        return [
            f"{alias} ({spelled(self.alias_options[alias])})" if alias in self.alias_options else alias
            for alias in self.aliases
        ]

    def require_pattern(self, pattern: str | Pattern) -> Pattern:
        """The parsed pattern; raises Unsupported with the card's reason when the mechanism lacks it."""
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
        """The mechanism's `Config` from options; unknown names and bad values raise Unsupported."""
        names = list(self.config.__dataclass_fields__)  # type: ignore[attr-defined]
        for name in options:
            if name not in names:
                raise Unsupported(
                    f"option {name!r} of {self.name}",
                    supported=", ".join(names) or "no options",
                    nearest=closest(name, names),
                )
        self.option_types.check(self.name, options)
        return self.config(**options)

    @property
    def keeps_places(self) -> bool:
        """Whether tokens on a grid stay in their places, with padding among them, instead of being gathered."""
        return self.length == "grid" or "grid" in self.honours

    def patterns_of(self, variant: str) -> tuple[Pattern, ...]:
        """Patterns of a variant; the card's for ``""``, the default options."""
        return self.variant_patterns.get(variant, self.patterns)

    def combines_with(self, config: Any) -> str:
        """`combines`, with these options."""
        return self.combines if isinstance(self.combines, str) else self.combines(config)

    @property
    def recurrent(self) -> bool:
        """Whether its state has a size that does not grow with the sequence."""
        return self.is_recurrent(self.config())

    def is_recurrent(self, config: Any) -> bool:
        """Whether its state has a size that does not grow with the sequence, with these options."""
        if self.state is None:
            return False
        small, large = (self.cost(Shape(1, 1, n, n, 64, 64), config).state for n in (1 << 12, 1 << 16))
        return small == large


def check_options(config: type[Any], given: Iterable[str], of: str) -> None:
    """Raise Unsupported for a name that is no option of a config class; `of` says in words whose it would be."""
    names = [f.name for f in dataclasses.fields(config)]
    for name in given:
        if name not in names:
            raise Unsupported(f"option {name!r} of {of}", supported=", ".join(names), nearest=closest(name, names))


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Check an option in a Config's ``__post_init__``."""
    accepted = list(choices)
    if value not in accepted:
        raise Unsupported(
            f"{name}={value!r}",
            supported=", ".join(map(str, accepted)),
            nearest=closest(str(value), map(str, accepted)),
        )


def at_least(name: str, value: float, low: float) -> None:
    """Check an option in a Config's ``__post_init__``."""
    try:
        enough = value >= low  # NaN is neither
    except TypeError:
        enough = False
    if not enough:
        raise Unsupported(f"{name}={value}", supported=f"{name} >= {low}", nearest=f"{name}={low}")


def spelled(options: Mapping[str, Any]) -> str:
    """Options as a call has them."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def check_mask(name: str, mask: Any) -> None:
    """Raise Unsupported for anything but a :class:`Mask` or None, with the mask that was meant."""
    if mask is None or isinstance(mask, Mask):
        return
    meant = "Mask(valid=...)"
    if isinstance(mask, Tensor):
        field_of = {1: "lengths", 2: "valid"}.get(mask.ndim, "bias")
        boolean = mask.dtype == torch.bool
        meant = f"Mask({field_of}={name}{'' if boolean or field_of != 'valid' else '.bool()'})"
        if field_of == "bias" and boolean:
            meant = f"Mask(bias=torch.zeros({name}.shape).masked_fill(~{name}, -torch.inf))"
    raise Unsupported(
        f"{name} of type {type(mask).__name__}",
        supported="a regard.Mask of valid (B, N), lengths (B,), cu_seqlens, bias (B, H, N, M) or blocks",
        nearest=meant,
    )


class Types:
    """Types of options by name, as annotations have them."""

    def __init__(self, hints: Mapping[str, Any]) -> None:
        self.hints = hints
        self.exact = {name: frozenset(_exact(hint)) for name, hint in hints.items()}

    def check(self, owner: str, options: Mapping[str, Any]) -> None:
        """Raise Unsupported for an option of another type; those without a type are not looked at. Not checked in a graph."""
        if torch.compiler.is_compiling():
            return
        for name, value in options.items():
            exact = self.exact.get(name)
            if exact is None or type(value) in exact or _fits(value, self.hints[name]):
                continue
            what = f"{name}={value!r}" if isinstance(value, str | int | float) else f"{name} of {type(value).__name__}"
            raise Unsupported(f"{what} of {owner}", supported=_type_name(self.hints[name]))


@functools.cache
def types_of(annotated: Any) -> Types:
    """The types that a class or function is annotated with."""
    try:
        return Types(typing.get_type_hints(annotated))
    except (NameError, AttributeError):  # names that only a type checker imports
        return Types({})


def _exact(hint: Any) -> set[type]:
    """Built-in types whose every value fits: for these no closer look is needed."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*map(_exact, typing.get_args(hint)))
    if hint in (Set, Collection):
        return {set, frozenset}
    return {float, int} if hint is float else {hint} & {int, bool, str, type(None), Tensor}


NUMBERS: Mapping[Any, tuple[type, ...]] = {
    int: (numbers.Integral, torch.SymInt),
    float: (numbers.Real, torch.SymInt, torch.SymFloat),
}
"""Types whose values are taken for numbers of a type."""


def _fits(value: Any, hint: Any) -> bool:
    arms, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arm) for arm in arms)
    if origin is tuple and isinstance(value, tuple | list):
        if arms[1:] == (...,):
            return all(_fits(item, arms[0]) for item in value)
        return len(value) == len(arms) and all(map(_fits, value, arms))
    if hint is Any:
        return True
    if hint in NUMBERS:
        return isinstance(value, NUMBERS[hint]) and not isinstance(value, bool)
    expected = origin or hint
    return not isinstance(expected, type) or isinstance(value, expected)


def _type_name(hint: Any) -> str:
    arms, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, arms))
    if origin is tuple:
        return f"({', '.join('...' if arm is ... else _type_name(arm) for arm in arms)})"
    return "None" if hint is type(None) else getattr(origin or hint, "__name__", str(hint))


_BLOCK_MASK_TYPES = Types({"visible": Tensor, "block_size": int})
_MASK_TYPES = Types(
    dict.fromkeys(("valid", "lengths", "cu_seqlens", "bias"), Tensor | None) | {"blocks": BlockMask | None}
)
_CONTEXT_TYPES = Types(
    dict.fromkeys(("positions", "memory_positions", "position_vectors", "roles"), Tensor | None)
    | {"want": Set, "grid": tuple[int, ...] | None}
)
