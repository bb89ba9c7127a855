"""Properties of states: steps, resuming, memory in pieces, and saving, selecting and resetting."""

from __future__ import annotations

import torch
from safetensors.torch import load, save
from torch import Tensor

from regard.contract import Mask, State, Tensors, valid_from_lengths
from regard.workbench.verification.properties.base import (
    NotApplicable,
    batched,
    copies,
    exactly,
    left_as_they_were,
    relative_error,
    worst,
)
from regard.workbench.verification.subjects import Subject


def steps_equal_reference(subject: Subject, dtype: torch.dtype) -> float:
    """A few tokens at once, then single tokens, against the definition on the whole sequence."""
    if not subject.stateful:
        raise NotApplicable
    n = 19
    inputs = subject.inputs(n, dtype=dtype)
    first = subject.run(subject.cut(inputs, slice(0, 3)), return_state=True)
    outputs, state = [first.output], first.state
    for t in range(3, n):
        before = state.tensors()
        given = copies(before)
        result = subject.run(subject.cut(inputs, slice(t, t + 1)), state=state)
        left_as_they_were(before, given, "the state before it")
        outputs.append(result.output)
        state = result.state
    axis = subject.output_axis() or 0
    return relative_error(torch.cat(outputs, axis), subject.reference(inputs))


def split_and_resume(subject: Subject, dtype: torch.dtype) -> float:
    """A sequence split at several places and resumed equals the whole; also with rows that advance unequally."""
    if not subject.stateful:
        raise NotApplicable
    n = 23
    inputs = subject.inputs(n, dtype=dtype)
    expected = subject.reference(inputs)
    errors = []
    for borders in ((1,), (7,), (7, 7, 16), (22,), (0, 5)):
        state, outputs, start = None, [], 0
        for stop in (*borders, n):
            result = subject.run(subject.cut(inputs, slice(start, stop)), state=state, return_state=True)
            outputs.append(result.output)
            state, start = result.state, stop
        errors.append(relative_error(torch.cat(outputs, subject.output_axis() or 0), expected))
    errors.append(_ragged_resume(subject, inputs, expected))
    return worst(errors)


def _ragged_resume(subject: Subject, inputs: Tensors, expected: Tensor) -> float:
    """The error when rows advance by different numbers of tokens in each call, some by none."""
    n = expected.shape[subject.output_axis() or 0]
    batch = 2
    done = torch.zeros(batch, dtype=torch.long)
    state, errors = None, []
    for advance in ((4, 9), (0, 3), (6, 0), (0, 1), (n, n)):
        counts = torch.minimum(torch.tensor(advance), n - done)
        piece = _next_tokens(subject, inputs, done, counts)
        result = subject.run(piece, mask=Mask(lengths=counts), state=state, return_state=True)
        for row in range(batch):
            rows = result.output[row : row + 1]
            found = subject.take_output(rows, slice(0, int(counts[row])))
            wanted = subject.take_output(expected[row : row + 1], slice(int(done[row]), int(done[row] + counts[row])))
            if wanted.numel():
                errors.append(relative_error(found, wanted) * float(wanted.abs().max() / expected.abs().max()))
        state, done = result.state, done + counts
    assert state is not None
    exactly(torch.equal(state.length, done), f"a state of {done.tolist()} tokens counts {state.length.tolist()}")
    return worst(errors)


def _next_tokens(subject: Subject, inputs: Tensors, done: Tensor, counts: Tensor, of_memory: bool = False) -> Tensors:
    """The next `counts` tokens of each row after its first `done`, padded with NaN to the longest."""
    width, parts = int(counts.max()), []
    for row in range(len(counts)):
        part = slice(int(done[row]), int(done[row] + counts[row]))
        cut = (slice(None), part) if of_memory else (part, slice(None) if subject.pattern.cross else None)
        piece = subject.rows(subject.cut(inputs, *cut), slice(row, row + 1))
        valid = valid_from_lengths(counts[row : row + 1], width)
        parts.append(subject.place(piece, valid, width, "m" if of_memory else "n" if subject.pattern.cross else "nm"))
    return {n: torch.cat([p[n] for p in parts]) if batched(subject, n) else parts[0][n] for n in parts[0]}


def state_is_data(subject: Subject, dtype: torch.dtype) -> float:
    """A state saved and loaded without pickle continues the same way; rows can be selected, repeated and reset."""
    if not subject.stateful:
        raise NotApplicable
    head, tail = subject.inputs(9, dtype=dtype), subject.inputs(5, dtype=dtype, seed=1)
    state: State = subject.run(head, return_state=True).state
    expected = subject.run(tail, state=state).output
    loaded = state.with_tensors(load(save({k: t.contiguous() for k, t in state.tensors().items()})))
    errors = [relative_error(subject.run(tail, state=loaded).output, expected)]
    index = torch.tensor([1, 0, 1])
    chosen = subject.run(subject.rows(tail, index), state=state.select(index)).output
    errors.append(relative_error(chosen, expected[index]))
    emptied = subject.run(tail, state=state.reset(torch.tensor([False, True]))).output
    fresh = subject.reference(tail)
    errors.append(relative_error(emptied, torch.stack([expected[0], fresh[1].to(expected.dtype)])))
    return worst(errors)


def state_keeps_precision(subject: Subject, dtype: torch.dtype) -> float:
    """The state's dtypes never change, nor, if recurrent, its sizes."""
    if not subject.stateful:
        raise NotApplicable
    inputs = subject.inputs(8, dtype=dtype)
    state = subject.run(subject.cut(inputs, slice(0, 4)), return_state=True).state
    before = {k: t.dtype for k, t in state.tensors().items()}
    state = subject.run(subject.cut(inputs, slice(4, 8)), state=state).state
    state = subject.run(subject.inputs(1, dtype=dtype, seed=1), state=state).state
    after = {k: t.dtype for k, t in state.tensors().items()}
    exactly(before == after, f"state dtypes change from {before} to {after}")
    if subject.card.is_recurrent(subject.config):
        size = {k: t.shape for k, t in state.tensors().items()}
        state = subject.run(subject.inputs(40, dtype=dtype, seed=2), state=state).state
        exactly(size == {k: t.shape for k, t in state.tensors().items()}, "the state grows though its cost says not")
    return 0.0


def memory_in_pieces(subject: Subject, dtype: torch.dtype) -> float:
    """Memory absorbed in pieces, then read a few queries at a time, equals the whole call; also in unequal rows."""
    if not subject.absorbs:
        raise NotApplicable
    n, m = 7, 16
    inputs = subject.inputs(n, m, dtype=dtype)
    expected = subject.reference(inputs)
    shared = subject.card.shared_inputs
    memory = {k: v for k, v in inputs.items() if k in (*subject.card.memory_inputs, *shared, "roles")}
    queries = {k: v for k, v in inputs.items() if k not in memory or k in shared}
    state = None
    for part in (slice(0, 1), slice(1, 9), slice(9, m)):
        state = subject.absorb(subject.cut(memory, slice(None), part), state=state)
    outputs = []
    steps = [slice(t, t + 1) for t in range(n)] if subject.pattern.causal else [slice(0, 3), slice(3, n)]
    for part in steps:
        result = subject.run(subject.cut(queries, part, slice(None)), state=state)
        outputs.append(result.output)
        state = result.state
    error = relative_error(torch.cat(outputs, subject.output_axis() or 0), expected)
    return worst([error, *_ragged_memory(subject, inputs, memory, queries)])


def _ragged_memory(subject: Subject, inputs: Tensors, memory: Tensors, queries: Tensors) -> list[float]:
    """Errors when the memory, and then the queries, of rows advance by different numbers of tokens, some by none."""
    state, errors = None, []
    done, read = torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    for advance in ((2, 5), (9, 0), (0, 3), (5, 1)):
        counts = torch.tensor(advance)
        piece = _next_tokens(subject, memory, done, counts, of_memory=True)
        state = subject.absorb(piece, memory_mask=Mask(lengths=counts), state=state)
        done = done + counts
    own = [subject.rows(inputs, slice(row, row + 1)) for row in range(2)]
    expected = [
        subject.reference(subject.cut(x, slice(None), slice(0, int(m)))) for x, m in zip(own, done, strict=True)
    ]
    for advance in ((4, 1), (0, 1), (1, 1), (2, 4)):
        counts = torch.tensor(advance)
        result = subject.run(_next_tokens(subject, queries, read, counts), mask=Mask(lengths=counts), state=state)
        for row, count in enumerate(advance):
            found = subject.take_output(result.output[row : row + 1], slice(0, count))
            wanted = subject.take_output(expected[row], slice(int(read[row]), int(read[row]) + count))
            if wanted.numel():
                errors.append(float((found.double() - wanted).abs().max() / expected[row].abs().max()))
        state, read = result.state, read + counts
    return errors
