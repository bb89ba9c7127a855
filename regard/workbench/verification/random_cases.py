"""`regard verify --random`: random options, sizes, padding and split points; failures are shrunk to the smallest case.

A case is one call of a mechanism. Its padded rows must equal the definition on each row alone; a sequence or memory
read in pieces, and gradients, must equal the definition too. Hypothesis draws the cases.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from regard.backends import only
from regard.catalogue import get_mechanism
from regard.contract import Mask, Mechanism, Pattern, Tensors, Unsupported, closest
from regard.workbench.verification.properties.base import Broken, relative_error
from regard.workbench.verification.properties.visibility import padded_layouts
from regard.workbench.verification.subjects import Subject, in_float64

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

PADDINGS = ("none", "right", "left", "inside", "packed")
LONGEST = 24
MOST = {torch.float64: 1e-9, torch.float32: 2e-4}
"""The largest error allowed. Cases look for wrong results, not for rounding, which small denominators amplify."""


def option_names(card: Mechanism, option: str) -> list[str]:
    """Names that an option accepts, taken from its error for an unknown name; empty if it does not take names."""
    try:
        card.options(**{option: "no such value"})
    except Unsupported as refusal:
        names = [] if f"of {card.name}" in refusal.asked else refusal.supported.split(", ")
        return [name for name in names if name.isidentifier()]
    return []


def unreached_options(card: Mechanism) -> list[str]:
    """Options, and names that options accept, for which no variant differs from the default: the matrix misses them."""
    missing = []
    for option in dataclasses.fields(card.config):
        default = getattr(card.config(), option.name)
        values = [options[option.name] for options in card.variants.values() if option.name in options]
        if all(value == default for value in values):
            missing.append(option.name)
        words = {str(x) for value in (default, *values) for x in (value if isinstance(value, tuple) else (value,))}
        missing += [f"{option.name}={name}" for name in option_names(card, option.name) if name not in words]
    return missing


@dataclass(frozen=True)
class Case:
    """One call, as data.

    Attributes:
        variant: variant of the card from which most of `options` come; it also determines whether there is a grid.
        lengths: number of valid tokens in each row; on a grid, its height and width.
        memory: number of valid memory tokens for each row, in cross patterns.
        padding: position of the padding, one of `PADDINGS`; ``packed`` documents are in one row.
        room: places beyond the longest row.
        splits: points at which the sequence (or memory) is split to be read in pieces.
        heads, groups: number of query heads, and of key/value heads, which divides it.
        width, value_width: features per head of keys and values.
        chunk_size: chunk size of the chunked form.
        backend: ``torch`` (in float64) or ``native`` (in float32).
        seed: seed of the random numbers.
    """

    mechanism: str
    pattern: str
    options: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    lengths: tuple[int, ...] = (5, 5)
    memory: tuple[int, ...] = ()
    padding: str = "none"
    room: int = 0
    splits: tuple[int, ...] = ()
    heads: int = 2
    groups: int = 2
    width: int = 4
    value_width: int = 4
    chunk_size: int = 4
    backend: str = "torch"
    seed: int = 0

    @classmethod
    def read(cls, text: str) -> Case:
        """Parse a case that :meth:`__str__` wrote.

        Raises:
            Unsupported: if the text is not a case.
        """
        try:
            found = json.loads(text)
            case = cls(**{name: _tuples(value) for name, value in found.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise Unsupported(
                f"the case {text!r} ({error})", supported="a case as `regard verify --random` prints it"
            ) from None
        return case

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        given = {f.name: getattr(self, f.name) for f in fields}
        return json.dumps(
            {f.name: given[f.name] for f in fields if given[f.name] != f.default or f.name == "mechanism"}
        )

    @property
    def command(self) -> str:
        """The command that runs this case again."""
        return f"regard verify --case '{self}'"


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {name: _tuples(item) for name, item in value.items()} if isinstance(value, dict) else value


def _values(card: Mechanism, option: dataclasses.Field[Any]) -> list[Any]:
    """Values of an option worth trying: its default, those of the variants, all names, and small numbers."""
    default = getattr(card.config(), option.name)
    found = [default, *(o[option.name] for o in card.variants.values() if option.name in o)]
    found += option_names(card, option.name)
    if isinstance(default, bool):
        found += [False, True]
    elif any(isinstance(value, int) and not isinstance(value, bool) for value in found):
        found += range(1, 7)
    return list({repr(value): value for value in found}.values())


def drawn_from(
    card: Mechanism, patterns: Iterable[Pattern] | None = None, variants: Iterable[str] = ()
) -> dict[Pattern, list[str]]:
    """The variants from which a mechanism's random cases are drawn, by pattern; ``""`` is the default options.

    Args:
        patterns: only these patterns.
        variants: only these variants; all, and the default options, when empty or if ``"all"`` is among them.
    """
    chosen, asked = None if patterns is None else tuple(patterns), tuple(variants)
    found = {}
    for pattern in card.patterns:
        names = [v for v in ("", *card.variants) if v not in card.layer_variants and pattern in card.patterns_of(v)]
        if asked and "all" not in asked:
            names = [v for v in names if v in asked]
        if names and (chosen is None or pattern in chosen):
            found[pattern] = names
    return found


def cases(
    card: Mechanism,
    *,
    patterns: Iterable[Pattern] | None = None,
    variants: Iterable[str] = (),
    backend: str = "torch",
) -> SearchStrategy[Case]:
    """A strategy for valid cases of a mechanism; the simplest ones have default options and a short sequence.

    Raises:
        Unsupported: if :func:`drawn_from` returns nothing.
    """
    from hypothesis import assume
    from hypothesis import strategies as st

    chosen = drawn_from(card, patterns, variants)
    if not chosen:
        raise Unsupported(
            f"random cases of {card.name} in such patterns with such variants",
            supported="patterns and variants of its card, but for variants of layers alone",
        )
    values = {option.name: _values(card, option) for option in dataclasses.fields(card.config)}
    of_heads = any("h" in axes for axes in card.inputs.values())

    @st.composite
    def one(draw: Any) -> Case:
        pattern = draw(st.sampled_from(list(chosen)))
        variant = draw(st.sampled_from(chosen[pattern]))
        options = dict(card.variants[variant]) if variant else {}
        for name in sorted(draw(st.sets(st.sampled_from(sorted(values)), max_size=2))) if values else ():
            options[name] = draw(st.sampled_from(values[name]))
        subject = Subject(card, pattern, options, variant=variant)
        try:
            _ = subject.config
        except Unsupported:
            assume(False)
        grid, numbers = subject.on_grid, st.integers(0, LONGEST)
        rows = 2 if grid else draw(st.integers(1, 3))
        lengths = tuple(draw(st.integers(1, 6) if grid else numbers) for _ in range(rows))
        paddings = PADDINGS[:1] if grid else PADDINGS[:-1] if pattern.cross else PADDINGS
        groups = draw(st.sampled_from([2, 1, 4, 3] if of_heads else [2, 1]))
        return Case(
            mechanism=card.name,
            pattern=pattern.value,
            options=options,
            variant=variant,
            lengths=lengths,
            memory=tuple(draw(numbers) for _ in range(rows)) if pattern.cross else (),
            padding=draw(st.sampled_from(paddings)),
            room=draw(st.integers(0, 3)),
            splits=tuple(sorted(draw(st.lists(numbers, max_size=3)))),
            heads=options.get("num_heads", groups * draw(st.sampled_from([1, 2]))),
            groups=options.get("num_heads", groups),
            width=draw(st.sampled_from([4, 2, 6, 8])),
            value_width=draw(st.sampled_from([4, 1, 2, 5])),
            chunk_size=draw(st.integers(1, 9)),
            backend=backend,
            seed=draw(st.integers(0, 99)),
        )

    return one()


def run_case(case: Case) -> float:
    """The largest error of a case, as a fraction of the largest output.

    Raises:
        Broken: if an exact check fails or an error is too large.
        Unsupported: if the mechanism refuses the case.
    """
    card, pattern = get_mechanism(case.mechanism), Pattern.parse(case.pattern)
    if case.padding not in PADDINGS:
        raise Unsupported(
            f"padding {case.padding!r}", supported=", ".join(PADDINGS), nearest=closest(case.padding, PADDINGS)
        )
    subject = Subject(card, pattern, dict(case.options), case.seed, case.variant)
    dtype = torch.float64 if case.backend == "torch" else torch.float32
    errors = {}
    with only(case.backend, "torch"):
        for name, check in CHECKS.items():
            if not _waived(subject, WAIVERS[name], dtype, case.backend):
                errors[name] = check(case, subject, dtype)
    for name, error in errors.items():
        if not error <= MOST[dtype]:
            raise Broken(f"{name}: error {error:.2e} above {MOST[dtype]:.0e}")
    return max(errors.values(), default=0.0)


def _waived(subject: Subject, names: Iterable[str], dtype: torch.dtype, backend: str) -> bool:
    """Whether the card waives any of these properties for a dtype and backend with options like these: those that only
    waived variants have."""
    card = subject.card
    for waiver in card.waivers:
        anywhere = dataclasses.replace(waiver, variants=())
        if not any(anywhere.concerns(n, subject.pattern, dtype=dtype, backend=backend) for n in names):
            continue
        others = {name for v, options in card.variants.items() if v not in waiver.variants for name in options}
        only_there = {name for variant in waiver.variants for name in card.variants.get(variant, ())} - others
        if not waiver.variants or only_there & subject.options.keys() or subject.variant in waiver.variants:
            return True
    return False


def _sampled(case: Case, subject: Subject, n: int, m: int, rows: int, dtype: torch.dtype) -> Tensors:
    sizes = {"h": case.heads, "g": case.groups, "d": case.width, "k": case.width, "v": case.value_width}
    return subject.inputs(n, m, batch=rows, dtype=dtype, **sizes)


def _longest(case: Case) -> tuple[int, int]:
    n = max(case.lengths)
    return n, max(case.memory) if case.memory else n


def check_rows(case: Case, subject: Subject, dtype: torch.dtype) -> float:
    """Padded, packed or whole rows against the definition on each row alone."""
    if subject.on_grid:
        height, width = case.lengths[:2]
        inputs = _sampled(case, subject, height * width, height * width, 2, dtype)
        grid = (height, width)
        found = subject.run(inputs, grid=grid).output
        doubled = in_float64(inputs)
        return relative_error(found, subject.run(doubled, form="reference", grid=grid).output)
    rows, (n, m) = len(case.lengths), _longest(case)
    inputs = _sampled(case, subject, n, m, rows, dtype)
    if case.padding == "none":
        return relative_error(subject.run(inputs).output, subject.reference(inputs))
    kept = [
        subject.cut(subject.rows(inputs, slice(row, row + 1)), slice(0, count), _memory_of(case, row))
        for row, count in enumerate(case.lengths)
    ]
    if case.padding == "packed":
        borders = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()])
        joined = kept[0]
        for part in kept[1:]:
            joined = subject.join(joined, part)
        output = subject.run(joined, mask=Mask(cu_seqlens=borders, max_length=n)).output
        places = [slice(int(a), int(b)) for a, b in itertools.pairwise(borders)]
        outputs = [subject.take_output(output, place) for place in places]
        if subject.output_axis() is None:
            outputs = [output[row : row + 1] for row in range(rows)]
    else:
        counts, total = torch.tensor(case.lengths), n + case.room
        valid = padded_layouts(counts, total)[case.padding]
        masks: dict[str, Any] = {"mask": Mask(valid=valid)}
        padded = subject.place(inputs, valid, total, "n" if subject.reads_memory else "nm")
        if subject.reads_memory:
            keys = padded_layouts(torch.tensor(case.memory), m + case.room)[case.padding]
            padded = subject.place(padded, keys, m + case.room, "m")
            masks["memory_mask"] = Mask(valid=keys)
        output = subject.run(padded, **masks).output
        outputs = [output[row : row + 1] for row in range(rows)]
        if subject.output_axis() is not None:
            outputs = [subject.take_output(x, valid[row]) for row, x in enumerate(outputs)]
    errors = [relative_error(x, subject.reference(part)) for x, part in zip(outputs, kept, strict=True)]
    return max(errors)


def _memory_of(case: Case, row: int) -> slice | None:
    return slice(0, case.memory[row]) if case.memory else None


def check_pieces(case: Case, subject: Subject, dtype: torch.dtype) -> float:
    """A sequence continued from its state, or memory absorbed in pieces, against the definition on the whole."""
    if subject.on_grid or not (subject.stateful or subject.absorbs):
        return 0.0
    n, m = _longest(case)
    inputs = _sampled(case, subject, n, m, len(case.lengths), dtype)
    borders = [min(split, m if subject.absorbs else n) for split in case.splits]
    pieces = [slice(a, b) for a, b in zip([0, *borders], [*borders, m if subject.absorbs else n], strict=True)]
    state, outputs = None, []
    if subject.absorbs:
        shared = subject.card.shared_inputs
        memory = {k: v for k, v in inputs.items() if k in (*subject.card.memory_inputs, *shared, "roles")}
        queries = {k: v for k, v in inputs.items() if k not in memory or k in shared}
        for piece in pieces:
            state = subject.absorb(subject.cut(memory, slice(None), piece), state=state)
        return relative_error(subject.run(queries, state=state).output, subject.reference(inputs))
    for piece in pieces:
        part = subject.cut(inputs, piece)
        result = subject.run(part, state=state, return_state=True, chunk_size=case.chunk_size)
        outputs.append(result.output)
        state = result.state
    return relative_error(torch.cat(outputs, subject.output_axis() or 0), subject.reference(inputs))


def check_gradients(case: Case, subject: Subject, dtype: torch.dtype) -> float:
    """Gradients of the default form against the definition's, as fractions of the largest one.

    The scale is at least the ratio of the largest output to the largest input: where gradients cancel (a single number
    divided by its own norm), only rounding is left.
    """
    n, m = _longest(case)
    if subject.on_grid:
        n = m = case.lengths[0] * case.lengths[1]
    inputs = _sampled(case, subject, n, m, len(case.lengths), dtype)
    doubled = in_float64(inputs)
    _, found = _gradients(subject, inputs, None)
    output, expected = _gradients(subject, doubled, "reference")
    size = max(_largest(expected), _largest([output]) / (_largest(doubled.values()) or 1.0)) or 1.0
    errors = [float((a.double() - b).abs().max()) for a, b in zip(found, expected, strict=True) if b.numel()]
    return max(errors, default=0.0) / size


def _largest(tensors: Iterable[torch.Tensor]) -> float:
    return max((float(x.abs().max()) for x in tensors if x.is_floating_point() and x.numel()), default=0.0)


def _gradients(subject: Subject, inputs: Tensors, form: str | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and the gradients of its sum with random weights."""
    leaves = {k: t.clone().requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()}
    output = subject.run(leaves, form=form).output
    rng = torch.Generator().manual_seed(subject.seed)
    weight = torch.randn(output.shape, generator=rng, dtype=torch.float64).to(output)
    wanted = [t for t in leaves.values() if t.requires_grad]
    found = torch.autograd.grad((output * weight).sum(), wanted, allow_unused=True)
    return output.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


CHECKS: Mapping[str, Callable[[Case, Subject, torch.dtype], float]] = {
    "rows": check_rows,
    "pieces": check_pieces,
    "gradients": check_gradients,
}
WAIVERS = {
    "rows": ("reference", "padding", "packing", "row_alone"),
    "pieces": ("step", "split_resume", "state", "memory"),
    "gradients": ("gradient",),
}
"""For each check, the properties of the matrix whose waivers apply to it too."""


@dataclass
class Found:
    """The result of a search.

    Attributes:
        ran: number of cases that were run.
        refused: number of cases that the mechanism refused.
        case: the smallest failing case; None if there is none.
        detail: how the case fails.
    """

    ran: int = 0
    refused: int = 0
    case: Case | None = None
    detail: str = ""


def search(
    card: Mechanism,
    count: int,
    *,
    patterns: Iterable[Pattern] | None = None,
    variants: Iterable[str] = (),
    backend: str = "torch",
    seed: int = 0,
    on_case: Callable[[Case], None] | None = None,
) -> Found:
    """Try random cases of a mechanism until one fails, then shrink it.

    Args:
        count: number of cases to draw.
        patterns, variants: see :func:`drawn_from`.
        backend: ``torch`` or ``native``.
        seed: seed of the draw; the same seed draws the same cases.
        on_case: called with each case before it runs.

    Raises:
        Unsupported: if Hypothesis is missing, and as for :func:`cases`.
    """
    try:
        from hypothesis import HealthCheck, Phase, given, settings
        from hypothesis import seed as seeded
    except ImportError:
        raise Unsupported(
            "random cases without Hypothesis", supported="them with it", nearest="pip install hypothesis"
        ) from None
    found = Found()

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(cases(card, patterns=patterns, variants=variants, backend=backend))
    def attempt(case: Case) -> None:
        if on_case is not None:
            on_case(case)
        found.ran += 1
        try:
            run_case(case)
        except Unsupported:
            found.refused += 1
        except Exception as failure:
            found.case = case  # the last failure is the smallest
            found.detail = str(failure) if isinstance(failure, Broken) else f"{type(failure).__name__}: {failure}"
            raise

    try:
        attempt()
    except Exception:
        if found.case is None:
            raise
    return found
