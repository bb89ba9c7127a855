"""Properties of the output: forms, chunk sizes, compilation and threads all give the definition's result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from regard.contract import Mask, Pattern, Tensors, Unsupported
from regard.workbench.verification.properties.base import (
    PRIME,
    Broken,
    NotApplicable,
    copies,
    exactly,
    fast_forms,
    left_as_they_were,
    relative_error,
    worst,
)
from regard.workbench.verification.subjects import Subject, axes_of

LENGTHS = (0, 1, 2, PRIME, 63, 64, 65)


def _sizes(subject: Subject) -> list[tuple[int, int]]:
    """Problem sizes with lengths 0, 1, prime and around a chunk."""
    if subject.on_grid:
        return [(n, n) for n in (1, 6, 12, 35)]
    if subject.pattern.cross:
        return [(0, PRIME), (1, PRIME), (PRIME, 1), (PRIME, 17), (17, PRIME), (3, 65)]
    return [(n, n) for n in LENGTHS]


def forms_equal_reference(subject: Subject, dtype: torch.dtype) -> float:
    """Every fast form against the definition in float64; outputs keep the dtype and inputs are not changed."""
    errors = []
    sizes = _sizes(subject) if dtype is torch.float64 else [(37, 37 if not subject.pattern.cross else 29)]
    if subject.on_grid and dtype is not torch.float64:
        sizes = [(35, 35)]
    for n, m in sizes:
        inputs = subject.inputs(n, m, dtype=dtype)
        given = copies(inputs)
        expected = subject.reference(inputs)
        for form in fast_forms(subject):
            found = subject.run(inputs, form=form).output
            left_as_they_were(inputs, given, "its inputs")
            if found.dtype != dtype:
                raise Broken(f"{form} returns {found.dtype} for {dtype}")
            errors.append(relative_error(found, expected))
    return worst(errors)


def any_chunk_size(subject: Subject, dtype: torch.dtype) -> float:
    """The chunked form with chunk sizes from 1 to beyond the sequence length."""
    if "chunked" not in fast_forms(subject) or subject.pattern is not Pattern.CAUSAL_SELF:
        raise NotApplicable
    inputs = subject.inputs(37, dtype=dtype)
    expected = subject.reference(inputs)
    return worst(
        [relative_error(subject.run(inputs, form="chunked", chunk_size=c).output, expected) for c in (1, 3, 16, 36, 64)]
    )


def compiles_whole(subject: Subject, dtype: torch.dtype, backend: str = "aot_eager") -> float:
    """A call with a mask, compiled without a graph break, against the eager one."""
    inputs = subject.inputs(12, dtype=dtype)
    mask = None if subject.on_grid else Mask(lengths=torch.tensor([12, 7]))

    def function(tensors: Tensors) -> Tensor:
        return subject.run(tensors, mask=mask).output

    torch.compiler.reset()
    return relative_error(torch.compile(function, fullgraph=True, backend=backend)(inputs), function(inputs))


def grouped_heads(subject: Subject, dtype: torch.dtype) -> float:
    """Fewer key/value heads than query heads equal the call with repeated key/value heads."""
    axes = subject.card.inputs.values()
    if not any("g" in a for a in axes):
        raise NotApplicable
    inputs = subject.inputs(11, dtype=dtype, h=4, g=2)
    repeated = {}
    for name, tensor in inputs.items():
        letters = "bm" if name == "roles" else axes_of(subject.card, name)
        repeated[name] = tensor.repeat_interleave(2, letters.index("g")) if "g" in letters else tensor
    return relative_error(subject.run(inputs).output, subject.reference(repeated))


def defaults_change_nothing(subject: Subject, dtype: torch.dtype) -> float:
    """The user's default device and default dtype do not change results."""
    inputs = subject.inputs(12, dtype=dtype)
    mask = None if subject.on_grid else Mask(lengths=torch.tensor([12, 7]))

    def results() -> list[Tensor]:
        found = [subject.run(inputs, mask=mask).output, subject.reference(inputs)]
        if subject.stateful:
            state = subject.run(subject.cut(inputs, slice(0, 9)), return_state=True).state
            found.append(subject.run(subject.cut(inputs, slice(9, 10)), state=state).output)
        if subject.absorbs:
            found.append(subject.run(inputs, form="absorb+read").output)
        return found

    expected, before = results(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = results()
    finally:
        torch.set_default_dtype(before)
    return worst([relative_error(x, y) for x, y in zip(found, expected, strict=True)])


def threads_do_not_meet(subject: Subject, dtype: torch.dtype) -> float:
    """Concurrent calls from several threads give the results of sequential calls."""
    given = [subject.inputs(n, dtype=dtype, seed=n) for n in (12, 12, 1, 6)]

    def work(inputs: Tensors) -> list[Tensor]:
        result = subject.run(inputs, return_state=subject.stateful)
        if not subject.stateful:
            return [result.output]
        return [result.output, subject.run(subject.cut(inputs, slice(0, 1)), state=result.state).output]

    return in_threads(work, given)


def in_threads(work: Callable[[Any], list[Tensor]], given: Sequence[Any]) -> float:
    """The error of repeated concurrent work on all given values, compared with doing each alone."""
    expected = [work(x) for x in given]
    with ThreadPoolExecutor(len(given)) as pool:
        found = list(pool.map(lambda x: [work(x) for _ in range(3)], given))
    return worst(
        [
            relative_error(x, y)
            for times, alone in zip(found, expected, strict=True)
            for outputs in times
            for x, y in zip(outputs, alone, strict=True)
        ]
    )


def refuses_what_it_lacks(subject: Subject, dtype: torch.dtype) -> float:
    """Patterns missing on the card, wrong shapes and unknown options raise Unsupported."""
    card = subject.card
    for pattern in Pattern:
        if pattern not in card.patterns:
            exactly(card.refused.get(pattern), f"no reason is given for refusing {pattern}")
            _expect_refusal(functools.partial(card.require_pattern, pattern), f"pattern {pattern}")
    inputs = subject.inputs(6, dtype=dtype)
    name = next(iter(inputs))
    _expect_refusal(lambda: subject.run({**inputs, name: inputs[name][0]}), f"{name} without its first axis")
    _expect_refusal(lambda: card.options(no_such_option=1), "an unknown option")
    if subject.token_input(inputs):
        bad = Mask(lengths=torch.tensor([99, 1]))
        _expect_refusal(lambda: subject.run(inputs, mask=bad), "lengths beyond the sequence")
    return 0.0


def _expect_refusal(action: Callable[[], Any], what: str) -> None:
    try:
        action()
    except Unsupported:
        return
    raise Broken(f"{what} is accepted")
