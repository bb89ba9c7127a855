"""Runs any mechanism on tensors.

`apply` does what needs no code of a mechanism's own: it checks shapes against the card, moves valid tokens to the
right-padded layout (so rank equals index inside a mechanism), replaces padding by zeros, chooses the form, and puts
outputs back in their places.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.backends import watch_backends, which_backend
from regard.contract import (
    WANTS,
    BlockMask,
    Call,
    Mask,
    Mechanism,
    Pattern,
    Result,
    State,
    Types,
    Unsupported,
    at_least,
    check_mask,
    closest,
    one_of,
)
from regard.core.by_rows import by_rows
from regard.core.ragged import Gathering, check_pairs, gather_pairs, gathering, gathering_in_place


def input_names(card: Mechanism) -> list[str]:
    """The inputs of the mechanism's functions in the order of their arguments, optional ones without their mark."""
    return list(card.axes)


def memory_inputs(card: Mechanism) -> list[str]:
    """Inputs that belong to the memory (they have the axis m and not n)."""
    return [name for name, axes in card.axes.items() if "m" in axes and "n" not in axes]


def shared_inputs(card: Mechanism) -> list[str]:
    """Inputs that belong to no sequence (they have neither n nor m), such as a learned query."""
    return [name for name, axes in card.axes.items() if "m" not in axes and "n" not in axes]


def absorbed_inputs(card: Mechanism) -> list[str]:
    """Inputs of the ``absorb`` form: the memory's, and those of no sequence that it names as parameters."""
    named = inspect.signature(card.forms["absorb"]).parameters
    return memory_inputs(card) + [n for n in shared_inputs(card) if n in named]


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a call, read from the shapes of its inputs once those agree with the card.

    Attributes:
        has_memory: whether there is memory beside what a state has absorbed.
        batch: rows; None where only a state knows.
        n, m: queries and keys.
        heads: of all inputs with heads, the most; None without heads.
        fewer_heads: whether some input has fewer.
        scale: the card's.
    """

    has_memory: bool
    batch: int | None
    n: int
    m: int
    heads: int | None
    fewer_heads: bool
    scale: float


Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of the inputs of a call."""


def _measure(card: Mechanism, shapes: Shapes, pattern: Pattern, continuing: bool) -> _Sizes:
    """The sizes of a call; raises Unsupported where inputs disagree with the card or with each other."""
    names = [name for name, _ in shapes]
    for name in names:
        if name not in card.axes:
            raise Unsupported(
                f"{card.name}: input {name!r}",
                supported=", ".join(input_names(card)),
                nearest=closest(name, input_names(card)),
            )
    of_memory = memory_inputs(card)
    has_memory = not of_memory or any(name in names for name in of_memory)
    missing = [n for n in card.inputs if not n.endswith("?") and n not in names]
    if not names:
        raise Unsupported(f"{card.name} without inputs", supported=", ".join(card.inputs))
    if missing and not (pattern.cross and continuing and not has_memory):
        raise Unsupported(f"{card.name} without {', '.join(missing)}", supported=", ".join(card.inputs))
    sizes = _axis_sizes(card, shapes)
    m = sizes.get("m", sizes.get("n", 0))
    n = sizes.get("n", 1 if pattern.cross else m)  # without queries of its own: one output, or one a key
    if n != m and pattern is Pattern.NONCAUSAL_SELF:
        raise Unsupported(
            f"{card.name} in noncausal-self with N = {n} and M = {m}", supported="N = M", nearest="noncausal-cross"
        )
    if n != m and pattern is Pattern.CAUSAL_SELF and not continuing and not card.uneven:
        raise Unsupported(
            f"{card.name} in causal-self with N = {n} queries and M = {m} keys", supported="N = M", nearest="softmax"
        )
    heads = sizes.get("h")
    with_heads = [shape[card.axes[name].index("h")] for name, shape in shapes if "h" in card.axes[name]]
    return _Sizes(
        has_memory=has_memory,
        batch=sizes.get("b"),
        n=n,
        m=m,
        heads=heads,
        fewer_heads=any(found != heads for found in with_heads),
        scale=_scale(card, shapes),
    )


_measured = lru_cache(maxsize=1024)(_measure)


@dataclass(frozen=True)
class _Plan:
    """What a call of tensors comes to, with a state or without, and without masks or anything else: shapes and options
    decide it.

    Attributes:
        form: the form that runs.
        call: what it gets beside the tensors, but for the state.
        batch: rows that a state must have; None where it alone knows them.
        heads: what inputs with fewer heads are repeated to; None where all have as many.
    """

    form: str
    call: Call
    batch: int | None
    heads: int | None


@lru_cache(maxsize=1024)
def _planned(
    card: Mechanism, shapes: Shapes, pattern: Pattern, config: Any, continuing: bool, return_state: bool
) -> _Plan:
    sizes = _measure(card, shapes, pattern, continuing)
    if continuing:
        _check_alignment(card, pattern, sizes.n > sizes.m)
    form = choose_form(
        card,
        pattern,
        sizes.n,
        sizes.m,
        has_memory=sizes.has_memory,
        stateful=continuing or return_state,
        continuing=continuing,
    )
    call = Call(pattern=pattern, config=config, scale=sizes.scale)
    return _Plan(form, call, sizes.batch, sizes.heads if sizes.fewer_heads else None)


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return tuple([(name, tensor.shape) for name, tensor in tensors.items()])


def _sizes(card: Mechanism, tensors: Mapping[str, Tensor], pattern: Pattern, continuing: bool) -> _Sizes:
    """:func:`_measure`, remembered for the shapes of calls before."""
    shapes = _shapes(tensors)
    if torch.compiler.is_compiling():
        return _measure(card, shapes, pattern, continuing)
    try:
        return _measured(card, shapes, pattern, continuing)
    except TypeError:  # sizes may be symbols, which have no hash
        return _measure(card, shapes, pattern, continuing)


def _axis_sizes(card: Mechanism, shapes: Shapes) -> dict[str, int]:
    """The size of each axis letter; of heads the most."""
    sizes: dict[str, int] = {}
    for name, shape in shapes:
        axes = card.axes[name]
        if len(shape) != len(axes):
            raise Unsupported(f"{card.name}: {name} of shape {tuple(shape)}", supported=f"axes ({', '.join(axes)})")
        for axis, size in zip(axes, shape, strict=True):
            known = sizes.setdefault(axis, size)
            if known == size:
                continue
            if axis != "h":
                raise Unsupported(
                    f"{card.name}: {name} of shape {tuple(shape)} has {axis} = {size}, another input {known}",
                    supported=", ".join(f"{n}: ({', '.join(card.axes[n])})" for n, _ in shapes),
                )
            big, small = max(size, known), min(size, known)
            if small == 0 or big % small:
                raise Unsupported(
                    f"{card.name}: {name} with {size} heads beside {known}", supported="a divisor of the others"
                )
            sizes["h"] = big
    if "g" in sizes and sizes.get("h", sizes["g"]) % max(sizes["g"], 1):
        raise Unsupported(
            f"{card.name}: {sizes['h']} heads over {sizes['g']} groups", supported="a multiple of the groups"
        )
    return sizes


def _expand_heads(card: Mechanism, tensors: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    expanded = {}
    for name, tensor in tensors.items():
        at = card.axes[name].find("h")
        if at >= 0 and tensor.shape[at] != heads:
            tensor = tensor.repeat_interleave(heads // tensor.shape[at], at)
        expanded[name] = tensor
    return expanded


def choose_form(
    card: Mechanism, pattern: Pattern, n: int, m: int, *, has_memory: bool, stateful: bool, continuing: bool
) -> str:
    """The form that `apply` runs when none is asked for."""
    forms = card.forms
    if pattern.cross:
        if continuing and not has_memory:
            return "read"
        if stateful and "absorb" not in forms:
            raise Unsupported(
                f"a state of {card.name} in {pattern.value}",
                supported="whole calls, without a state",
                nearest="softmax",
            )
        if stateful or ("absorb" in forms and "parallel" not in forms):
            return "absorb+read"
        return "parallel" if "parallel" in forms else "reference"
    if stateful:
        if "chunked" not in forms or pattern.causal is False:
            raise Unsupported(
                f"a state of {card.name} in {pattern.value}",
                supported="causal-self, and cross patterns where the memory can be absorbed",
                nearest="softmax" if pattern.causal else "causal-self",
            )
        return "step" if continuing and n == m == 1 and "step" in forms else "chunked"
    return next(form for form in ("parallel", "chunked", "reference") if form in forms)


def apply(
    card: Mechanism,
    tensors: Mapping[str, Tensor | None],
    *,
    pattern: str | Pattern = Pattern.CAUSAL_SELF,
    mask: Mask | None = None,
    memory_mask: Mask | None = None,
    state: State | None = None,
    return_state: bool = False,
    scale: float | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
    form: str | None = None,
    config: Any = None,
    **rest: Any,
) -> Result:
    """Run a mechanism on tensors named as on its card.

    Args:
        tensors: inputs by name; the memory's may be None when `state` has absorbed it (cross patterns).
        mask: of the queries, and of the keys in self patterns with N = M.
        memory_mask: of the keys in cross patterns, and in causal-self with N != M.
        state: continue from it; the result then has the new state.
        scale: multiplies the scores; the card's when None. A state is continued with the scale that it was begun with.
        form: ``reference``, ``parallel``, ``chunked``, ``step`` or ``read`` instead of the usual choice.
        rest: other fields of :class:`regard.contract.Call` (roles, grid, dropout, generator, want, ...).

    Returns:
        The output where the queries are; extras in the right-padded layout, one row a sequence or document.

    Raises:
        Unsupported: for anything the card does not claim.
    """
    wanted = card.require_pattern(pattern)
    given = _given(card, tensors)
    config = card.options() if config is None else config
    _check_state(card, state)
    if (
        mask is memory_mask is scale is chunk_size is backend is form is None
        and isinstance(return_state, bool)
        and (not rest or _rotates_alone(card, rest))
    ):
        plan = _plan(card, given, wanted, config, state is not None, return_state)
        if plan is not None:
            return _run_plan(card, plan, given, state, return_state, rest.get("rotate"))
    options = {"return_state": return_state, "chunk_size": chunk_size, "backend": backend, "form": form, **rest}
    _check_options(card, mask, memory_mask, {"scale": scale, **options})
    sizes = _sizes(card, given, wanted, state is not None)
    has_memory, n, m = sizes.has_memory, sizes.n, sizes.m
    if chunk_size is not None:
        at_least("chunk_size", chunk_size, 1)
    first = next(iter(given.values()))
    if backend is not None:
        which_backend(card.engine, device=first.device, backend=backend)  # also where a form would not ask
    batch = sizes.batch
    if batch is None:
        batch = 1 if state is None else _rows(state)
    if not has_memory and memory_mask is not None:
        raise Unsupported(f"{card.name} with a memory mask but no memory", supported="memory_mask=None")
    if not wanted.cross and memory_mask is None and n == m:
        memory_mask = None if mask is None else Mask(mask.valid, mask.lengths, mask.cu_seqlens, mask.max_length)
    in_place = card.keeps_places and wanted is Pattern.NONCAUSAL_SELF and rest.get("grid") is not None
    queries = (
        gathering_in_place(mask, batch, n, rest["grid"], first.device)
        if in_place
        else gathering(mask, batch, n, first.device)
    )
    keys = (
        queries
        if in_place or (not wanted.cross and n == m and _same(mask, memory_mask))
        else gathering(memory_mask, batch, m, first.device)
    )
    if sizes.fewer_heads and sizes.heads is not None:
        given = _expand_heads(card, given, sizes.heads)
    if not (queries.whole and keys.whole):
        given = {name: _lay_out(card, name, tensor, queries, keys) for name, tensor in given.items()}
    if state is not None:
        _check_rows(card, state, queries.batch)
        _check_alignment(card, wanted, _more_queries(queries, keys))
    if mask is not None and mask.blocks is not None:
        _check_blocks(mask.blocks, queries.batch, 1 if sizes.heads is None else sizes.heads)
    bias = None if mask is None else mask.bias
    if bias is not None:
        known = m if has_memory and state is None else None
        check_pairs(bias, queries.source_batch, 1 if sizes.heads is None else sizes.heads, n, known)
        columns = keys if has_memory else gathering(None, queries.batch, bias.shape[-1], first.device)
        bias = gather_pairs(bias, queries, columns)
    roles = rest.pop("roles", None)
    if roles is not None:
        roles = keys.gather(roles, axis=-1)
    want = frozenset(rest.pop("want", ()))
    call = Call(
        pattern=wanted,
        config=config,
        scale=sizes.scale if scale is None else scale,
        lengths=queries.lengths,
        memory_lengths=keys.lengths,
        bias=bias,
        blocks=None if mask is None else mask.blocks,
        state=state,
        chunk_size=chunk_size,
        backend=backend,
        valid=queries.valid if in_place else None,
        roles=roles,
        want=want,
        **rest,
    )
    stateful = return_state or state is not None or "state" in want
    if form is None:
        continuing = state is not None
        form = choose_form(card, wanted, n, m, has_memory=has_memory, stateful=stateful, continuing=continuing)
    else:
        _check_form(card, form, call, n, m, stateful)
    result = _run_on(backend, card, form, call, given)
    result.output = _put_back(card, _tied(result.output, given), queries)
    if not stateful:
        result.state = None
    return result


def _plan(
    card: Mechanism,
    tensors: dict[str, Tensor],
    pattern: Pattern,
    config: Any,
    continuing: bool,
    return_state: bool,
) -> _Plan | None:
    """What is remembered of calls of such tensors; None in a graph, and where sizes or options have no hash."""
    if torch.compiler.is_compiling():
        return None
    try:
        return _planned(card, _shapes(tensors), pattern, config, continuing, return_state)
    except TypeError:  # sizes may be symbols
        return None


def _rotates_alone(card: Mechanism, rest: dict[str, Any]) -> bool:
    """Whether a rotation that the card honours is all that accompanies the tensors and the state."""
    return rest.keys() == {"rotate"} and callable(rest["rotate"]) and "rotate" in card.honours


def _run_plan(
    card: Mechanism,
    plan: _Plan,
    tensors: dict[str, Tensor],
    state: State | None,
    return_state: bool,
    rotate: Callable[[Tensor, Tensor], Tensor] | None,
) -> Result:
    call = plan.call
    if state is not None and plan.batch is not None and plan.batch != _rows(state):
        raise _other_rows(card, state, plan.batch)
    if state is not None or rotate is not None:
        call = call.after(state, rotate)
    if plan.heads is not None:
        tensors = _expand_heads(card, tensors, plan.heads)
    result = run_form(card, plan.form, call, tensors)
    result.output = _tied(result.output, tensors)
    if state is None and not return_state:
        result.state = None
    return result


def absorb(
    card: Mechanism,
    tensors: Mapping[str, Tensor | None],
    *,
    pattern: str | Pattern,
    memory_mask: Mask | None = None,
    state: State | None = None,
    scale: float | None = None,
    config: Any = None,
    heads: int | None = None,
    **rest: Any,
) -> State:
    """The state after absorbing memory (cross patterns); call again with `state` as more of it streams in.

    Args:
        tensors: the memory's inputs by name; others are ignored by the mechanism's ``absorb`` form.
        memory_mask: of the memory.
        scale: that of the calls which will read the state: some mechanisms apply it to the memory.
        heads: query heads, when the memory has fewer: a divisor of them.

    Raises:
        Unsupported: when the mechanism cannot absorb memory.
    """
    wanted = card.require_pattern(pattern)
    if "absorb" not in card.forms:
        raise Unsupported(f"absorbing memory with {card.name}", supported="whole calls", nearest="softmax")
    accepted = absorbed_inputs(card)
    given = {n: t for n, t in _given(card, tensors).items() if n in accepted}
    _check_options(card, None, memory_mask, {"scale": scale, **rest})
    missing = [n for n in memory_inputs(card) if n in card.inputs and n not in given]
    if missing:
        raise Unsupported(
            f"absorbing memory with {card.name} without {', '.join(missing)}", supported=", ".join(accepted)
        )
    shapes = tuple((name, tensor.shape) for name, tensor in given.items())
    sizes = _axis_sizes(card, shapes)
    first = next(iter(given.values()))
    keys = gathering(memory_mask, sizes["b"], sizes["m"], first.device)
    if state is not None:
        _check_rows(card, state, keys.batch)
    if heads is not None:
        given = _expand_heads(card, given, heads)
    laid_out = {name: _lay_out(card, name, tensor, keys, keys) for name, tensor in given.items()}
    roles = rest.pop("roles", None)
    call = Call(
        pattern=wanted,
        config=card.options() if config is None else config,
        scale=_scale(card, shapes) if scale is None else scale,
        memory_lengths=keys.lengths,
        state=state,
        roles=None if roles is None else keys.gather(roles, axis=-1),
        **rest,
    )
    return card.forms["absorb"](call, **laid_out)


def _scale(card: Mechanism, shapes: Shapes) -> float:
    if not callable(card.default_scale) and card.default_scale != "rsqrt":
        return float(card.default_scale)
    widths = {name: shape[-1] for name, shape in shapes if shape}
    if callable(card.default_scale):
        return card.default_scale(widths)
    return max(widths.get("k", widths.get("q", 1)), 1) ** -0.5


def _run_on(backend: str | None, card: Mechanism, form: str, call: Call, tensors: dict[str, Tensor]) -> Result:
    """:func:`run_form`; a backend that was asked for but had nothing to run is refused: torch computed the form."""
    if backend is None or torch.compiler.is_compiling():
        return run_form(card, form, call, tensors)
    with watch_backends() as ran:
        result = run_form(card, form, call, tensors)
    if backend not in ran.backends and backend != "torch":
        raise Unsupported(
            f"backend {backend!r} for the {form} form of {card.name} in {call.pattern.value}",
            supported="torch: no engine computes it",
            nearest="torch",
        )
    return result


def run_form(card: Mechanism, form: str, call: Call, tensors: dict[str, Tensor]) -> Result:
    """Run one form on right-padded tensors."""
    if form == "absorb+read":
        queries = {n: t for n, t in tensors.items() if n not in memory_inputs(card)}
        state = call.state
        if len(queries) < len(tensors):
            state = card.forms["absorb"](call, **{n: tensors[n] for n in absorbed_inputs(card) if n in tensors})
        return _as_result(card.forms["read"](call.replace(state=state), **queries), state)
    if form not in card.forms:
        raise Unsupported(
            f"form {form!r} of {card.name}", supported=", ".join(card.forms), nearest=closest(form, card.forms)
        )
    if form == "reference" and not (call.lengths is None and call.memory_lengths is None):
        return Result(by_rows(card, call, tensors))
    return _as_result(card.forms[form](call, **tensors), call.state if form == "read" else None)


def _as_result(found: Tensor | Result, state: Any) -> Result:
    result = found if isinstance(found, Result) else Result(found)
    if result.state is None:
        result.state = state
    return result


def _same(a: Mask | None, b: Mask | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.valid is b.valid and a.lengths is b.lengths and a.cu_seqlens is b.cu_seqlens


def _lay_out(card: Mechanism, name: str, tensor: Tensor, queries: Gathering, keys: Gathering) -> Tensor:
    axes = card.axes[name]
    for letter, layout in (("n", queries), ("m", keys)):
        if letter in axes:
            tensor = layout.gather(tensor, axis=axes.index(letter), batch_axis=axes.index("b"))
    return tensor


def _tied(output: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """An output that no token reached depends on the inputs all the same, as that of torch's functions does."""
    if output.requires_grad or not torch.is_grad_enabled():
        return output
    for x in tensors.values():
        if x.requires_grad:
            output = output + x.flatten()[:0].sum().to(output.dtype)
    return output


def _put_back(card: Mechanism, output: Tensor, queries: Gathering) -> Tensor:
    if "n" not in card.output:
        return output
    return queries.scatter(output, axis=card.output.index("n"), batch_axis=card.output.index("b"))


def _check_form(card: Mechanism, form: str, call: Call, n: int, m: int, stateful: bool) -> None:
    """Refuse a form that was asked for by name where it would compute something else."""
    name = f"form {form!r} of {card.name}"
    if form in ("reference", "parallel") and stateful:
        raise Unsupported(f"{name} with a state", supported="whole sequences", nearest="form='chunked'")
    if form == "reference" and not (call.lengths is None and call.memory_lengths is None):
        raise Unsupported(f"{name} on padded or packed tokens", supported="rows of equal length", nearest="form=None")
    if form in ("chunked", "step") and call.pattern is not Pattern.CAUSAL_SELF:
        raise Unsupported(f"{name} in {call.pattern.value}", supported="causal-self", nearest="form='parallel'")
    if form == "step" and not (call.state is not None and n == m == 1):
        raise Unsupported(f"{name} on {n} queries and {m} keys", supported="one token and a state to continue from")


def _check_state(card: Mechanism, state: State | None) -> None:
    if state is None or (card.state is not None and isinstance(state, card.state)):
        return
    if card.state is None:
        raise Unsupported(f"{card.name} with a state", supported="whole sequences only")
    raise Unsupported(f"{card.name} with a state of {type(state).__name__}", supported=card.state.__name__)


def _check_rows(card: Mechanism, state: State, batch: int) -> None:
    if not torch.compiler.is_compiling() and _rows(state) != batch:
        raise _other_rows(card, state, batch)


def _other_rows(card: Mechanism, state: State, batch: int) -> Unsupported:
    return Unsupported(
        f"{card.name} with a state of {_rows(state)} rows for {batch} sequences",
        supported="a row of the state for each",
        nearest="state.select(rows)",
    )


def _rows(state: State) -> int:
    return state.length.shape[0]  # type: ignore[attr-defined]


def _check_alignment(card: Mechanism, pattern: Pattern, more_queries: bool) -> None:
    """Refuse what a state of constant size cannot answer: queries before its last token."""
    if pattern is Pattern.CAUSAL_SELF and more_queries and card.recurrent:
        raise Unsupported(
            f"{card.name} continuing with more queries than keys, of which the first precede the state's end",
            supported="at most as many queries as new keys",
            nearest="softmax, whose state has every key",
        )


def _more_queries(queries: Gathering, keys: Gathering) -> bool:
    """Whether some row has more valid queries than valid keys (of unequal lengths only known outside a graph)."""
    if queries.lengths is keys.lengths or torch.compiler.is_compiling():
        return queries.length > keys.length
    valid_queries = queries.length if queries.lengths is None else queries.lengths
    valid_keys = keys.length if keys.lengths is None else keys.lengths
    more = valid_queries > valid_keys
    return bool(more.any()) if isinstance(more, Tensor) else more


def _check_blocks(blocks: BlockMask, batch: int, heads: int) -> None:
    rows, columns = blocks.visible.shape[:2]
    if rows not in (1, batch) or columns not in (1, heads):
        raise Unsupported(
            f"visible blocks of shape {tuple(blocks.visible.shape)} for {batch} rows and {heads} heads",
            supported=f"({batch} or 1, {heads} or 1, query blocks, key blocks)",
        )


CALL_TYPES = Types(
    {
        "scale": float | None,
        "backend": str | None,
        "form": str | None,
        "return_state": bool,
        "chunk_size": int | None,
        "dropout": float,
        "generator": torch.Generator | None,
        "grid": tuple[int, ...] | None,
        "roles": Tensor | None,
        "want": Collection,
        "progress": float | None,
        "training": bool,
        "rotate": Callable | None,
        "position_bias": Callable | None,
    }
)
"""Types of what accompanies the tensors of a call."""

KNOWN = CALL_TYPES.hints.keys() | {field.name for field in dataclasses.fields(Call)}


def _given(card: Mechanism, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Inputs that are there, all of them tensors."""
    given = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or (name in FLOATS and not tensor.is_floating_point()):
            found = f"dtype {tensor.dtype}" if isinstance(tensor, Tensor) else f"type {type(tensor).__name__}"
            axes = ", ".join(card.axes.get(name, ""))
            raise Unsupported(f"{card.name}: {name} of {found}", supported=f"a tensor of floats ({axes})")
        given[name] = tensor
    return given


FLOATS = frozenset("qkvx")
"""Names of inputs that are numbers and never indices, whatever the mechanism."""


def _check_options(card: Mechanism, mask: Mask | None, memory_mask: Mask | None, options: dict[str, Any]) -> None:
    """Refuse what the card does not honour, and options of other types than theirs."""
    check_mask("mask", mask)
    check_mask("memory_mask", memory_mask)
    for name in options.keys() - KNOWN:
        raise Unsupported(
            f"option {name!r} of {card.name}", supported=", ".join(sorted(KNOWN)), nearest=closest(name, KNOWN)
        )
    CALL_TYPES.check(card.name, options)
    dropout, want = options.get("dropout", 0.0), options.get("want", ())
    if not 0.0 <= dropout < 1.0:
        raise Unsupported(f"dropout={dropout}", supported="0 <= dropout < 1", nearest="dropout=0.0")
    for word in want:
        one_of("want", word, WANTS)
    asked = [word for word in ("weights", "lse") if word in want]
    asked += [word for word in ("roles", "rotate") if options.get(word) is not None]
    if dropout > 0:
        asked.append("dropout")
    if options.get("position_bias") is not None:
        asked.append("bias")
    if mask is not None:
        asked += [word for word in ("bias", "blocks") if getattr(mask, word) is not None]
    if memory_mask is not None and (memory_mask.bias is not None or memory_mask.blocks is not None):
        raise Unsupported("a memory mask with bias or blocks", supported="bias and blocks on mask, which has the pairs")
    for what in asked:
        if what not in card.honours:
            words = {
                "bias": "additive scores",
                "blocks": "a block mask",
                "dropout": "dropout of attention weights",
                "lse": "the log-sum-exp of scores",
                "rotate": "a rotation of its queries and keys",
            }
            raise Unsupported(
                f"{card.name} with {words.get(what, what)}",
                supported=", ".join(sorted(card.honours)) or "valid, lengths and cu_seqlens masks",
                nearest="softmax",
            )
