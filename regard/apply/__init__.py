"""Applies any mechanism to tensors.

:func:`apply` does everything that is the same for all mechanisms: it checks a call against the card, moves valid tokens
to the right-padded layout (so that rank equals index inside a mechanism), replaces padding by zeros, chooses the form,
and returns outputs in the caller's layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regard.apply.checks import (
    check_alignment,
    check_blocks,
    check_form,
    check_options,
    check_rows,
    check_state,
    given_tensors,
    state_rows,
)
from regard.apply.forms import choose_form, run_on_backend
from regard.apply.layout import Layout, expand_heads, layout_of, tied
from regard.apply.plans import plan_of, rotates_alone, run_plan
from regard.apply.sizes import axis_sizes, default_scale, shapes_of, sizes_of
from regard.backends import which_backend
from regard.contract import Call, Mask, Mechanism, Pattern, Result, State, Unsupported, at_least
from regard.core.ragged import gathering


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
    """Apply a mechanism to tensors, named as on its card.

    Args:
        tensors: inputs by name; those of the memory may be None if `state` has absorbed it (cross patterns).
        mask: mask of the queries, and of the keys in self patterns with N = M.
        memory_mask: mask of the keys in cross patterns, and in causal-self with N != M.
        state: state to continue from; the result then has the new state.
        scale: factor on the scores; the card's default when None. Continue a state with the scale that it was begun
            with.
        form: ``reference``, ``parallel``, ``chunked``, ``step`` or ``read``; None for the usual choice.
        rest: other fields of :class:`regard.contract.Call` (roles, grid, dropout, generator, want, ...).

    Returns:
        The output, in the layout of the queries. Extras are in the right-padded layout, one row per sequence or
            document.

    Raises:
        Unsupported: for anything that the card does not claim.
    """
    wanted = card.require_pattern(pattern)
    given = given_tensors(card, tensors)
    config = card.options() if config is None else config
    check_state(card, state)
    continuing = state is not None
    if (
        mask is memory_mask is scale is chunk_size is backend is form is None
        and isinstance(return_state, bool)
        and (not rest or rotates_alone(card, rest))
    ):
        plan = plan_of(card, given, wanted, config, continuing, return_state)
        if plan is not None:
            return run_plan(card, plan, given, state, return_state, rest.get("rotate"))

    options = {"return_state": return_state, "chunk_size": chunk_size, "backend": backend, "form": form, **rest}
    check_options(card, mask, memory_mask, {"scale": scale, **options})
    sizes = sizes_of(card, given, wanted, continuing)
    if chunk_size is not None:
        at_least("chunk_size", chunk_size, 1)
    device = next(iter(given.values())).device
    if backend is not None:
        which_backend(card.engine, device=device, backend=backend)  # checked here since a form may use no engine
    if not sizes.has_memory and memory_mask is not None:
        raise Unsupported(f"{card.name} with a memory mask but no memory", supported="memory_mask=None")

    batch = sizes.batch
    if batch is None:
        batch = 1 if state is None else state_rows(state)
    grid = rest.get("grid")
    layout = layout_of(card, wanted, sizes, batch, mask=mask, memory_mask=memory_mask, grid=grid, device=device)
    queries, keys = layout.queries, layout.keys
    if sizes.fewer_heads and sizes.heads is not None:
        given = expand_heads(card, given, sizes.heads)
    given = layout.inputs(card, given)
    if state is not None:
        check_rows(card, state, queries.batch)
        check_alignment(card, wanted, layout.more_queries)
    blocks = None if mask is None else mask.blocks
    if blocks is not None:
        check_blocks(blocks, queries.batch, 1 if sizes.heads is None else sizes.heads)
    roles = rest.pop("roles", None)
    want = frozenset(rest.pop("want", ()))
    call = Call(
        pattern=wanted,
        config=config,
        scale=sizes.scale if scale is None else scale,
        lengths=queries.lengths,
        memory_lengths=keys.lengths,
        bias=layout.bias(None if mask is None else mask.bias, sizes, continuing=continuing),
        blocks=blocks,
        state=state,
        chunk_size=chunk_size,
        backend=backend,
        valid=queries.valid if layout.in_place else None,
        roles=None if roles is None else keys.gather(roles, axis=-1),
        want=want,
        **rest,
    )

    stateful = return_state or continuing or "state" in want
    if form is None:
        form = choose_form(
            card,
            wanted,
            sizes.n,
            sizes.m,
            has_memory=sizes.has_memory,
            stateful=stateful,
            continuing=continuing,
        )
    else:
        check_form(card, form, call, sizes.n, sizes.m, stateful)
    result = run_on_backend(card, form, call, given)
    result.output = layout.output(card, tied(result.output, given))
    if not stateful:
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
    """The state after absorbing memory (cross patterns); call again with `state` as more memory streams in.

    Args:
        tensors: the memory's inputs by name; inputs that the mechanism's ``absorb`` form does not take are ignored.
        memory_mask: mask of the memory.
        scale: scale of the calls that will read the state: some mechanisms apply it to the memory.
        heads: number of query heads, if the memory has fewer; the memory's number must divide it.

    Raises:
        Unsupported: if the mechanism cannot absorb memory.
    """
    wanted = card.require_pattern(pattern)
    if "absorb" not in card.forms:
        raise Unsupported(f"absorbing memory with {card.name}", supported="whole calls", nearest="softmax")
    accepted = card.absorbed_inputs
    given = {n: t for n, t in given_tensors(card, tensors).items() if n in accepted}
    check_options(card, None, memory_mask, {"scale": scale, **rest})
    missing = [n for n in card.memory_inputs if n in card.inputs and n not in given]
    if missing:
        raise Unsupported(
            f"absorbing memory with {card.name} without {', '.join(missing)}", supported=", ".join(accepted)
        )
    shapes = shapes_of(given)
    sizes = axis_sizes(card, shapes)
    keys = gathering(memory_mask, sizes["b"], sizes["m"], next(iter(given.values())).device)
    if state is not None:
        check_rows(card, state, keys.batch)
    if heads is not None:
        given = expand_heads(card, given, heads)
    roles = rest.pop("roles", None)
    call = Call(
        pattern=wanted,
        config=card.options() if config is None else config,
        scale=default_scale(card, shapes) if scale is None else scale,
        memory_lengths=keys.lengths,
        state=state,
        roles=None if roles is None else keys.gather(roles, axis=-1),
        **rest,
    )
    return card.forms["absorb"](call, **Layout(keys, keys).inputs(card, given))
