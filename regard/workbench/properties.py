"""The properties of the equality matrix, each a function that measures an error.

A property returns the largest error found, as a fraction of the largest output (or of the largest gradient), or raises:
:class:`NotApplicable` where the card claims nothing of the kind, any other exception as a failure. Exact properties
return 0 or 1 through `exactly`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from regard.apply import memory_inputs, shared_inputs
from regard.contract import BlockMask, Kind, Mask, Pattern, State, Tensors, Unsupported, valid_from_lengths
from regard.workbench.subjects import Subject, axes_of, in_float64

PRIME = 13
LENGTHS = (0, 1, 2, PRIME, 63, 64, 65)


class NotApplicable(Exception):
    """The card claims nothing that this property could test."""


class Broken(Exception):
    """A property that is not a matter of degree does not hold."""


@dataclass(frozen=True)
class Property:
    """One row of the equality matrix.

    Attributes:
        name: what reports, waivers and tests call it.
        meaning: one sentence.
        check: measures the error of a subject.
        dtypes: dtypes in which it is measured.
        level: ``function``, ``layer``.
        native: whether native kernels have a part in it.
    """

    name: str
    meaning: str
    check: Callable[..., float]
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    level: str = "function"
    native: bool = True

    def dtypes_on(self, backend: str) -> tuple[torch.dtype, ...]:
        """Dtypes in which it is measured on a backend. Native kernels compute in float32, so they are held to the
        tolerance of float32 (and of bfloat16) in every property."""
        if backend != "native":
            return self.dtypes
        return (torch.float32, *(d for d in self.dtypes if d is torch.bfloat16)) if self.native else ()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest expected value."""
    if found.shape != expected.shape:
        raise Broken(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    if not torch.isfinite(found).all():
        return math.inf
    largest = float(expected.abs().max())
    return float((found - expected).abs().max()) / (largest or 1.0)


def worst(errors: list[float]) -> float:
    """The largest error; 0 of none."""
    return max(errors, default=0.0)


def exactly(condition: Any, failure: str) -> float:
    """0 where a condition holds that knows no degrees.

    Raises:
        Broken: where it does not.
    """
    if not bool(condition):
        raise Broken(failure)
    return 0.0


def _copies(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _left_as_they_were(tensors: Tensors, copies: Tensors, what: str) -> None:
    """A caller may use what it gave to a call again."""
    for name, tensor in tensors.items():
        exactly(torch.equal(tensor, copies[name]), f"a call changes {name} of {what} in place")


def _fast_forms(subject: Subject) -> list[str]:
    if subject.pattern is Pattern.CAUSAL_SELF:
        forms = ("parallel",) if subject.waives("state") else ("parallel", "chunked")
        return [f for f in forms if f in subject.card.forms]
    found = ["parallel"] if "parallel" in subject.card.forms else []
    if subject.absorbs:
        found.append("absorb+read")
    if not found and "chunked" in subject.card.forms:
        found.append("chunked")
    return found


def _sizes(subject: Subject) -> list[tuple[int, int]]:
    """Problem sizes with lengths 0, 1, prime and around a chunk."""
    if subject.on_grid:
        return [(n, n) for n in (1, 6, 12, 35)]
    if subject.pattern.cross:
        return [(0, PRIME), (1, PRIME), (PRIME, 1), (PRIME, 17), (17, PRIME), (3, 65)]
    return [(n, n) for n in LENGTHS]


def forms_equal_reference(subject: Subject, dtype: torch.dtype) -> float:
    """Every fast form against the definition in float64; outputs keep the dtype and inputs stay as they were."""
    errors = []
    sizes = _sizes(subject) if dtype is torch.float64 else [(37, 37 if not subject.pattern.cross else 29)]
    if subject.on_grid and dtype is not torch.float64:
        sizes = [(35, 35)]
    for n, m in sizes:
        inputs = subject.inputs(n, m, dtype=dtype)
        given = _copies(inputs)
        expected = subject.reference(inputs)
        for form in _fast_forms(subject):
            found = subject.run(inputs, form=form).output
            _left_as_they_were(inputs, given, "its inputs")
            if found.dtype != dtype:
                raise Broken(f"{form} returns {found.dtype} for {dtype}")
            errors.append(relative_error(found, expected))
    return worst(errors)


def any_chunk_size(subject: Subject, dtype: torch.dtype) -> float:
    """The chunked form in chunks of 1 to more tokens than there are."""
    if "chunked" not in _fast_forms(subject) or subject.pattern is not Pattern.CAUSAL_SELF:
        raise NotApplicable
    inputs = subject.inputs(37, dtype=dtype)
    expected = subject.reference(inputs)
    return worst(
        [relative_error(subject.run(inputs, form="chunked", chunk_size=c).output, expected) for c in (1, 3, 16, 36, 64)]
    )


def steps_equal_reference(subject: Subject, dtype: torch.dtype) -> float:
    """A few tokens at once and then one by one, against the definition of the whole."""
    if not subject.stateful:
        raise NotApplicable
    n = 19
    inputs = subject.inputs(n, dtype=dtype)
    first = subject.run(subject.cut(inputs, slice(0, 3)), return_state=True)
    outputs, state = [first.output], first.state
    for t in range(3, n):
        before = state.tensors()
        given = _copies(before)
        result = subject.run(subject.cut(inputs, slice(t, t + 1)), state=state)
        _left_as_they_were(before, given, "the state before it")
        outputs.append(result.output)
        state = result.state
    axis = subject.output_axis() or 0
    return relative_error(torch.cat(outputs, axis), subject.reference(inputs))


def split_and_resume(subject: Subject, dtype: torch.dtype) -> float:
    """Two rows of unequal length, split at several places; an empty continuation changes nothing."""
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
    """Rows advance by different numbers of tokens in each call, some by none."""
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
    """As many tokens as `counts` says after the first `done` ones of each row, padded with NaN to the longest."""
    width, parts = int(counts.max()), []
    for row in range(len(counts)):
        part = slice(int(done[row]), int(done[row] + counts[row]))
        cut = (slice(None), part) if of_memory else (part, slice(None) if subject.pattern.cross else None)
        piece = subject.rows(subject.cut(inputs, *cut), slice(row, row + 1))
        valid = valid_from_lengths(counts[row : row + 1], width)
        parts.append(subject.place(piece, valid, width, "m" if of_memory else "n" if subject.pattern.cross else "nm"))
    return {n: torch.cat([p[n] for p in parts]) if _batched(subject, n) else parts[0][n] for n in parts[0]}


def _batched(subject: Subject, name: str) -> bool:
    return name == "roles" or axes_of(subject.card, name).startswith("b")


def padded_layouts(counts: Tensor, total: int) -> dict[str, Tensor]:
    """Which of `total` places are valid in rows with `counts` tokens, padded ``right``, ``left`` and ``inside``."""
    places = torch.arange(total)
    right = places < counts[:, None]
    left = places >= total - counts[:, None]
    generator = torch.Generator().manual_seed(5)
    inside = torch.stack([torch.rand(total, generator=generator).argsort().argsort() < c for c in counts])
    return {"right": right, "left": left, "inside": inside}


def padded_equals_unpadded(subject: Subject, dtype: torch.dtype) -> float:
    """Rows of unequal length, one of them empty, with NaN around them, against each row alone."""
    if subject.on_grid:
        return _masked_grid(subject, dtype)
    counts, total = torch.tensor([11, 6, 0]), 14
    n = int(counts.max())
    m = n + 3 if subject.pattern.cross else n
    inputs = subject.inputs(n, m, batch=3, dtype=dtype)
    errors = []
    for name, valid in padded_layouts(counts, total).items():
        padded = subject.place(inputs, valid, total, "n" if subject.reads_memory else "nm")
        masks: dict[str, Any] = {"mask": Mask(valid=valid)}
        if name == "right":
            masks["mask"] = Mask(lengths=counts)
        if subject.reads_memory:
            key_counts = torch.tensor([m, 5, 0])
            key_valid = padded_layouts(key_counts, total + 3)[name]
            padded = subject.place(padded, key_valid, total + 3, "m")
            masks["memory_mask"] = Mask(valid=key_valid)
        output = subject.run(padded, **masks).output
        for row in range(3):
            own = subject.rows(inputs, slice(row, row + 1))
            keys = slice(0, int(key_counts[row])) if subject.reads_memory else None
            expected = subject.reference(subject.cut(own, slice(0, int(counts[row])), keys))
            found = output[row : row + 1]
            if subject.output_axis() is not None:
                if found.isnan().any():
                    return math.inf
                exactly((subject.take_output(found, ~valid[row]) == 0).all(), f"{name}: output at padding is not 0")
                found = subject.take_output(found, valid[row])
            errors.append(relative_error(found, expected))
    return worst(errors)


def _masked_grid(subject: Subject, dtype: torch.dtype) -> float:
    """On a grid, masked bottom rows behave like the edge of a smaller grid, whatever they hold."""
    height, width, kept = 6, 5, 4
    inputs = subject.inputs(height * width, dtype=dtype)
    valid = (torch.arange(height * width) < kept * width).expand(2, -1)
    poisoned = subject.map_tokens(
        inputs, lambda x, axis, _: x.movedim(axis, -1).masked_fill(~valid[0], float("nan")).movedim(-1, axis)
    )
    found = subject.run(poisoned, mask=Mask(valid=valid), grid=(height, width)).output
    small = subject.cut(inputs, slice(0, kept * width))
    doubled = {n: t.double() for n, t in small.items()}
    expected = subject.run(doubled, form="reference", grid=(kept, width)).output
    exactly((subject.take_output(found, ~valid[0]) == 0).all(), "output at padding is not 0")
    return relative_error(subject.take_output(found, valid[0]), expected)


def packed_equals_separate(subject: Subject, dtype: torch.dtype) -> float:
    """Documents in one row, an empty one among them; one state a document."""
    if subject.on_grid or subject.pattern.cross:
        raise NotApplicable
    lengths = [5, 0, 9, 1]
    inputs = subject.inputs(sum(lengths), batch=1, dtype=dtype)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    result = subject.run(inputs, mask=Mask(cu_seqlens=borders, max_length=9), return_state=subject.stateful)
    errors = []
    for d in range(len(lengths)):
        part = slice(int(borders[d]), int(borders[d + 1]))
        expected = subject.reference(subject.cut(inputs, part))
        found = subject.take_output(result.output, part)
        if subject.output_axis() is None:
            found = result.output[d : d + 1]
        errors.append(relative_error(found, expected))
    if subject.stateful:
        more = subject.inputs(4, batch=len(lengths), dtype=dtype, seed=1)
        more |= {name: inputs[name] for name in shared_inputs(subject.card) if name in inputs}
        found = subject.run(more, state=result.state).output
        for d in range(len(lengths)):
            part = slice(int(borders[d]), int(borders[d + 1]))
            document, tail = subject.cut(inputs, part), subject.rows(more, slice(d, d + 1))
            whole = subject.join(document, tail)
            expected = subject.take_output(subject.reference(whole), slice(lengths[d], None))
            errors.append(relative_error(found[d : d + 1], expected))
    return worst(errors)


def row_equals_alone(subject: Subject, dtype: torch.dtype) -> float:
    """Three rows together against each one by itself."""
    inputs = subject.inputs(12, batch=3, dtype=dtype)
    output = subject.run(inputs).output
    alone = [subject.run(subject.rows(inputs, slice(r, r + 1))).output for r in range(3)]
    return relative_error(output, torch.cat(alone))


def later_tokens_have_no_effect(subject: Subject, dtype: torch.dtype) -> float:
    """A large finite change from token t on leaves the outputs before t as they were."""
    if not subject.pattern.causal or subject.output_axis() is None:
        raise NotApplicable
    n, errors = 24, []
    inputs = subject.inputs(n, dtype=dtype)
    other = subject.inputs(n, dtype=dtype, seed=9)
    for form in [None, *(f for f in _fast_forms(subject) if f in subject.card.forms)]:
        before = subject.run(inputs, form=form).output
        for t in (1, 7, n - 1):

            def change(x: Tensor, axis: int, letter: str, name: str, t: int = t) -> Tensor:
                if letter == "m" and subject.pattern.cross:
                    return x
                later = torch.arange(x.shape[axis]) >= t
                shape = [1] * x.ndim
                shape[axis] = -1
                changed = (
                    other[name] if not x.is_floating_point() or subject.card.domains.get(name) else other[name] * 3
                )
                return torch.where(later.view(shape), changed, x)

            altered = dict(inputs)
            for name in inputs:
                for letter, axis in subject.positions(name).items():
                    altered[name] = change(altered[name], axis, letter, name)
            after = subject.run(altered, form=form).output
            errors.append(
                relative_error(subject.take_output(after, slice(0, t)), subject.take_output(before, slice(0, t)))
            )
    return worst(errors)


def bottom_right_alignment(subject: Subject, dtype: torch.dtype) -> float:
    """Fewer or more queries than keys, also with unequal valid lengths, align at the end of each row."""
    if subject.pattern is not Pattern.CAUSAL_SELF or not memory_inputs(subject.card):
        raise NotApplicable
    if not subject.card.uneven:
        try:
            subject.run(subject.inputs(5, 9, dtype=dtype))
        except Unsupported:
            return 0.0
        raise Broken("the card says N must equal M, but N != M is accepted")
    errors = []
    for n, m in ((5, 17), (17, 5), (1, 9), (9, 1), (4, 0), (0, 4)):
        inputs = subject.inputs(n, m, dtype=dtype)
        errors.append(relative_error(subject.run(inputs).output, subject.reference(inputs)))
    n, m = 9, 13
    inputs = subject.inputs(n, m, dtype=dtype)
    counts, key_counts = torch.tensor([9, 4]), torch.tensor([6, 13])
    output = subject.run(inputs, mask=Mask(lengths=counts), memory_mask=Mask(lengths=key_counts)).output
    for row in range(2):
        own = subject.rows(inputs, slice(row, row + 1))
        kept = _cut_pair(subject, own, int(counts[row]), int(key_counts[row]))
        found = subject.take_output(output[row : row + 1], slice(0, int(counts[row])))
        errors.append(relative_error(found, subject.reference(kept)))
    return worst(errors)


def _cut_pair(subject: Subject, inputs: Tensors, n: int, m: int) -> Tensors:
    return subject.map_tokens(inputs, lambda x, axis, letter: x.narrow(axis, 0, n if letter == "n" else m))


def hidden_rows_give_zero(subject: Subject, dtype: torch.dtype) -> float:
    """A row with no valid token gives 0, and gradients stay finite with NaN in the padding."""
    inputs = subject.inputs(6 if subject.on_grid else 7, dtype=dtype)
    n = 6 if subject.on_grid else 7
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1] = False
    leaves = {k: t.clone().requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()}
    if subject.reads_memory:
        m = n + 4
        key_valid = torch.ones(2, m, dtype=torch.bool)
        key_valid[1] = False
        poisoned = _poison(subject, leaves, key_valid, "m")
        output = subject.run(poisoned, memory_mask=Mask(valid=key_valid)).output
    else:
        poisoned = _poison(subject, leaves, valid, "nm")
        output = subject.run(poisoned, mask=Mask(valid=valid)).output
    zero = output[1].detach().abs().max() if output[1].numel() else torch.zeros(())
    exactly(zero == 0, f"a row without visible tokens gives {float(zero):.3g}")
    exactly(torch.isfinite(output).all(), "NaN or infinity in the output")
    output.square().sum().backward()
    for name, leaf in leaves.items():
        if leaf.is_floating_point() and leaf.grad is not None:
            exactly(torch.isfinite(leaf.grad).all(), f"gradient of {name} is not finite")
    return 0.0


def _poison(subject: Subject, inputs: Tensors, valid: Tensor, letters: str) -> Tensors:
    """NaN at invalid places, keeping gradients to the valid ones."""
    poisoned = {}
    for name, x in inputs.items():
        for letter, axis in subject.positions(name).items():
            if letter in letters and _batched(subject, name):
                shape = [1] * x.ndim
                shape[0], shape[axis] = valid.shape
                fill = float("nan") if x.is_floating_point() else 0
                x = torch.where(valid.view(shape), x, x.new_full((), fill))
        poisoned[name] = x
    return poisoned


def gradients_equal_reference(subject: Subject, dtype: torch.dtype) -> float:
    """Gradients of the usual form along random directions against numerical ones, which the definition cannot share an
    error with, then each number of each fast form's gradients against the reference's."""
    n, m = (6, 6) if not subject.pattern.cross else (4, 6)
    errors = []
    inputs = subject.inputs(n, m, batch=1, dtype=dtype, d=3, k=3, v=2, e=2)
    names = [k for k, t in inputs.items() if t.is_floating_point()]

    def function(*tensors: Tensor) -> Tensor:
        return subject.run({**inputs, **dict(zip(names, tensors, strict=True))}).output

    if dtype is torch.float64:  # the steps of numerical derivatives need it
        leaves = [inputs[k].clone().requires_grad_() for k in names]
        torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
    inputs = subject.inputs(*((20, 20) if not subject.pattern.cross else (12, 20)), dtype=dtype)
    doubled = in_float64(inputs)
    expected = _gradients(subject, doubled, "reference")
    for form in _fast_forms(subject):
        for found, wanted in zip(_gradients(subject, inputs, form), expected, strict=True):
            errors.append(relative_error(found, wanted))
    return worst(errors)


def _gradients(subject: Subject, inputs: Tensors, form: str | None) -> list[Tensor]:
    leaves = {k: t.clone().requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()}
    output = subject.run(leaves, form=form).output
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(output)
    wanted = [t for t in leaves.values() if t.requires_grad]
    found = torch.autograd.grad((output * weight).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def padding_gets_no_gradient(subject: Subject, dtype: torch.dtype) -> float:
    """Gradients of padded tokens, which are exactly 0."""
    if subject.on_grid:
        raise NotApplicable
    n = 9
    inputs = subject.inputs(n, dtype=dtype)
    lengths = torch.tensor([n, 4])
    leaves = {k: t.clone().requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()}
    subject.run(leaves, mask=Mask(lengths=lengths)).output.square().sum().backward()
    for name, leaf in leaves.items():
        axes = subject.positions(name)
        axis = axes.get("n", axes.get("m") if not subject.pattern.cross else None)
        if axis is None or leaf.grad is None or not _batched(subject, name):
            continue
        tail = leaf.grad[1].narrow(axis - 1, 4, n - 4)
        exactly((tail == 0).all(), f"padding of {name} receives a gradient")
    return 0.0


def state_is_data(subject: Subject, dtype: torch.dtype) -> float:
    """A state saved and loaded without pickle continues alike; rows are selected, repeated and reset."""
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
    """Whatever the model's dtype, accumulators are at least float32 and the state's dtypes never change."""
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
    """Absorbing memory in pieces, then reading queries a few at a time, equals the whole call; also in unequal rows."""
    if not subject.absorbs:
        raise NotApplicable
    n, m = 7, 16
    inputs = subject.inputs(n, m, dtype=dtype)
    expected = subject.reference(inputs)
    shared = shared_inputs(subject.card)
    memory = {k: v for k, v in inputs.items() if k in (*memory_inputs(subject.card), *shared, "roles")}
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
    """Rows whose memory, and then whose queries, advance by different numbers of tokens in each call, some by none."""
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


def compiles_whole(subject: Subject, dtype: torch.dtype, backend: str = "aot_eager") -> float:
    """A compiled call with a mask against the eager one, without a graph break."""
    inputs = subject.inputs(12, dtype=dtype)
    mask = None if subject.on_grid else Mask(lengths=torch.tensor([12, 7]))

    def function(tensors: Tensors) -> Tensor:
        return subject.run(tensors, mask=mask).output

    torch.compiler.reset()
    return relative_error(torch.compile(function, fullgraph=True, backend=backend)(inputs), function(inputs))


def grouped_heads(subject: Subject, dtype: torch.dtype) -> float:
    """Fewer key/value heads than query heads equal the same with the groups repeated."""
    axes = subject.card.inputs.values()
    if not any("g" in a for a in axes):
        raise NotApplicable
    inputs = subject.inputs(11, dtype=dtype, h=4, g=2)
    repeated = {}
    for name, tensor in inputs.items():
        letters = "bm" if name == "roles" else axes_of(subject.card, name)
        repeated[name] = tensor.repeat_interleave(2, letters.index("g")) if "g" in letters else tensor
    return relative_error(subject.run(inputs).output, subject.reference(repeated))


def pair_masks(subject: Subject, dtype: torch.dtype) -> float:
    """Additive bias and block masks equal the definition, or are refused where the card does not list them."""
    n, m = 11, 11 if not subject.pattern.cross else 15
    inputs = subject.inputs(n, m, dtype=dtype)
    rng = torch.Generator().manual_seed(1)
    bias = torch.randn(2, 1, n, m, generator=rng, dtype=dtype)
    bias = bias.masked_fill(torch.rand(2, 1, n, m, generator=rng) < 0.2, -torch.inf)
    blocks = BlockMask(torch.rand(1, 2, 4, 5, generator=rng) < 0.6, 3)
    errors = []
    for what, mask in (("bias", Mask(bias=bias)), ("blocks", Mask(blocks=blocks))):
        if what not in subject.card.honours:
            try:
                subject.run(inputs, mask=mask)
            except Unsupported:
                continue
            raise Broken(f"{what} is neither honoured nor refused")
        added = bias.clone()
        errors.append(relative_error(subject.run(inputs, mask=mask).output, subject.reference(inputs, mask=mask)))
        _left_as_they_were({"bias": bias}, {"bias": added}, "its mask")
        if what == "bias" and not subject.on_grid:
            valid = torch.ones(2, n, dtype=torch.bool)
            valid[1, [1, 4, 6, 7, 10]] = False
            errors += [
                _biased_rows(subject, inputs, Mask(bias=bias, lengths=torch.tensor([n, 6])), torch.arange(6)),
                _biased_rows(subject, inputs, Mask(bias=bias, valid=valid), valid[1].nonzero()[:, 0]),
            ]
    return worst(errors)


def _biased_rows(subject: Subject, inputs: Tensors, mask: Mask, places: Tensor) -> float:
    """The error of the second row, whose valid places these are, beside the definition on them alone."""
    bias = mask.bias
    assert bias is not None
    found = subject.run(inputs, mask=mask).output[1:2]
    keys = torch.arange(bias.shape[-1]) if subject.pattern.cross else places
    own = subject.cut(subject.rows(inputs, slice(1, 2)), places, keys)
    expected = subject.reference(own, mask=Mask(bias=bias[1:2][:, :, places][..., keys]))
    return relative_error(subject.take_output(found, places), expected)


def defaults_change_nothing(subject: Subject, dtype: torch.dtype) -> float:
    """The same results where the user has another default device and another default dtype."""
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


def _leaves(inputs: Tensors) -> Tensors:
    return {k: t.clone().requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()}


def forward_derivatives(subject: Subject, dtype: torch.dtype) -> float:
    """A derivative in one direction, forward and as the product of reverse-mode gradients with the direction."""
    inputs = subject.inputs(9, dtype=dtype)
    names = [k for k, t in inputs.items() if t.is_floating_point()]
    rng = torch.Generator().manual_seed(4)
    directions = tuple(torch.randn(inputs[k].shape, generator=rng, dtype=torch.float64).to(dtype) for k in names)

    def function(*tensors: Tensor) -> Tensor:
        return subject.run({**inputs, **dict(zip(names, tensors, strict=True))}).output

    leaves = tuple(inputs[k].clone().requires_grad_() for k in names)
    output = function(*leaves)
    weight = torch.randn(output.shape, generator=rng, dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad((output * weight).sum(), leaves, allow_unused=True)
    products = [(g * d).double() for g, d in zip(gradients, directions, strict=True) if g is not None]
    try:
        tangent = torch.func.jvp(function, tuple(inputs[k] for k in names), directions)[1]
    except Unsupported:
        return 0.0
    expected, size = (torch.stack([f(p) for p in products]).sum() for f in (torch.sum, lambda p: p.abs().sum()))
    return float(abs((tangent.detach() * weight).double().sum() - expected) / size)


def second_derivatives(subject: Subject, dtype: torch.dtype) -> float:
    """Gradients of gradients, against the definition's; where those are rounding alone, as fractions of the gradient."""
    inputs = subject.inputs(9, dtype=dtype)

    def second(tensors: Tensors, form: str | None) -> tuple[list[Tensor], float]:
        leaves = _leaves(tensors)
        wanted = [t for t in leaves.values() if t.requires_grad]
        output = subject.run(leaves, form=form).output
        rng = torch.Generator().manual_seed(3)
        weight = torch.randn(output.shape, generator=rng, dtype=torch.float64).to(output)
        first = torch.autograd.grad((output * weight).sum(), wanted, create_graph=True, allow_unused=True)
        largest = max((float(g.detach().abs().max()) for g in first if g is not None), default=0.0)
        products = [
            (g * torch.randn(g.shape, generator=rng, dtype=torch.float64).to(g)).sum()
            for g in first
            if g is not None and g.requires_grad
        ]
        if not products:
            return [torch.zeros_like(t) for t in wanted], largest
        found = torch.autograd.grad(torch.stack(products).sum(), wanted, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)], largest

    expected, largest = second(in_float64(inputs), "reference")
    try:
        found, _ = second(inputs, None)
    except Unsupported:
        return 0.0
    size = max(1e-3 * largest, *(float(x.abs().max()) for x in expected)) or 1.0
    return worst([float((x.double() - y).abs().max()) / size for x, y in zip(found, expected, strict=True)])


def nothing_gives_nothing(subject: Subject, dtype: torch.dtype) -> float:
    """No rows, no queries, no keys: outputs of the right shape that gradients flow through, and gradients of 0."""
    sizes: list[tuple[int, int, int | None]] = [(0, 5, None)]
    if not subject.on_grid:
        sizes += [(2, 0, 4), (2, 3, 0)] if subject.pattern.cross else [(2, 0, None)]
    for batch, n, m in sizes:
        what = f"B = {batch}, N = {n}" + ("" if m is None else f", M = {m}")
        leaves = _leaves(subject.inputs(n, m, batch=batch, dtype=dtype))
        output = subject.run(leaves).output
        axis = subject.output_axis()
        if axis is not None:
            exactly(output.shape[0] == batch and output.shape[axis] == n, f"{what}: output {tuple(output.shape)}")
        exactly(output.requires_grad, f"{what}: gradients do not flow")
        exactly(torch.isfinite(output).all(), f"{what}: output is not finite")
        output.square().sum().backward()
        for name, leaf in leaves.items():
            finite = leaf.grad is None or torch.isfinite(leaf.grad).all()
            exactly(finite, f"{what}: the gradient of {name} is not finite")
    return 0.0


def nan_is_seen(subject: Subject, dtype: torch.dtype) -> float:
    """NaN at a token shows in the token's output where it does by the definition, and in no other row.

    A definition's weights of 0 times NaN do not count: the output has to depend on the token.
    """
    if subject.output_axis() is None:
        raise NotApplicable
    for n, token in ((12, 0), (12, 7), (12, 11), (6, 5), (20, 1)):
        inputs = subject.inputs(n, n, dtype=dtype, seed=token)
        for name, tensor in inputs.items():
            axes = subject.positions(name)
            axis = axes.get("n", None if subject.pattern.cross else axes.get("m"))
            if axis is None or not tensor.is_floating_point() or not _batched(subject, name):
                continue
            changed, poisoned = tensor.clone(), tensor.clone()
            poisoned[0].select(axis - 1, token).fill_(torch.nan)
            changed[0].select(axis - 1, token).mul_(0.5)
            found = subject.run({**inputs, name: poisoned}).output
            exactly(torch.isfinite(found[1]).all(), f"NaN in {name} reaches another row")
            if subject.take_output(found[:1], slice(token, token + 1)).isnan().any():
                continue
            before, after, lost = (
                subject.take_output(subject.reference({**inputs, name: x})[:1], slice(token, token + 1))
                for x in (tensor, changed, poisoned)
            )
            exactly(not lost.isnan().any() or torch.equal(before, after), f"NaN in {name} at token {token} is hidden")
    return 0.0


def extremes_stay_finite(subject: Subject, dtype: torch.dtype) -> float:
    """Tokens a thousand times as large as usual give finite outputs and gradients; what is no token is a parameter."""
    inputs = subject.inputs(20, dtype=dtype)
    free = [
        k for k in inputs if inputs[k].is_floating_point() and subject.positions(k) and not subject.card.domains.get(k)
    ]
    leaves = _leaves({k: 1e3 * t if k in free else t for k, t in inputs.items()})
    output = subject.run(leaves).output
    exactly(torch.isfinite(output).all(), "the output is not finite")
    output.sum().backward()
    for name, leaf in leaves.items():
        exactly(leaf.grad is None or torch.isfinite(leaf.grad).all(), f"the gradient of {name} is not finite")
    return 0.0


def threads_do_not_meet(subject: Subject, dtype: torch.dtype) -> float:
    """Calls from several threads at once give what they give one after another."""
    given = [subject.inputs(n, dtype=dtype, seed=n) for n in (12, 12, 1, 6)]

    def work(inputs: Tensors) -> list[Tensor]:
        result = subject.run(inputs, return_state=subject.stateful)
        if not subject.stateful:
            return [result.output]
        return [result.output, subject.run(subject.cut(inputs, slice(0, 1)), state=result.state).output]

    return in_threads(work, given)


def in_threads(work: Callable[[Any], list[Tensor]], given: Sequence[Any]) -> float:
    """The error of three times the same work on each of what is given, all in threads, beside doing it alone."""
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
    """Patterns that the card lacks, wrong shapes and unknown options raise Unsupported."""
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


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

FUNCTION_PROPERTIES = [
    Property(
        "reference",
        "each fast form equals the definition, at lengths 0, 1, prime and around a chunk, and leaves its inputs as they were",
        forms_equal_reference,
        FLOATS,
    ),
    Property("chunk_size", "the chunk size changes nothing", any_chunk_size, FLOATS[:2]),
    Property(
        "step", "token by token equals the definition, and each state stays as it was", steps_equal_reference, FLOATS
    ),
    Property(
        "split_resume",
        "split anywhere and resumed equals whole, also when rows advance unequally",
        split_and_resume,
        FLOATS[:2],
    ),
    Property(
        "padding",
        "padded left, right or inside, with NaN in the padding, equals unpadded",
        padded_equals_unpadded,
        FLOATS[:2],
    ),
    Property(
        "packing", "packed documents equal separate ones, and leave one state each", packed_equals_separate, FLOATS[:2]
    ),
    Property("row_alone", "a row of a batch equals the row alone", row_equals_alone),
    Property("causality", "later tokens have no effect", later_tokens_have_no_effect),
    Property("alignment", "unequal lengths align bottom-right, or are refused", bottom_right_alignment),
    Property("hidden_row", "rows that see nothing give 0 with finite gradients", hidden_rows_give_zero),
    Property("gradient", "gradients equal numerical ones and the definition's", gradients_equal_reference),
    Property("padding_gradient", "padding receives no gradient", padding_gets_no_gradient),
    Property("state", "a state is saved, loaded, selected and reset as data", state_is_data),
    Property(
        "state_dtype",
        "the state's dtypes and, if recurrent, sizes do not change",
        state_keeps_precision,
        (torch.float64, torch.bfloat16),
    ),
    Property("memory", "memory absorbed in pieces and read in steps equals the whole", memory_in_pieces, FLOATS[:2]),
    Property("compile", "compiled without a graph break equals eager", compiles_whole),
    Property("grouped_heads", "fewer key/value heads equal repeated ones", grouped_heads),
    Property("pair_masks", "bias and block masks are honoured, and left as they were, or refused", pair_masks),
    Property("defaults", "another default device and dtype change nothing", defaults_change_nothing),
    Property("forward_derivative", "forward-mode derivatives are right, or refused", forward_derivatives),
    Property("second_derivative", "gradients of gradients are right, or refused", second_derivatives),
    Property("nothing", "no rows, queries or keys: empty or 0, with gradients", nothing_gives_nothing),
    Property("nan", "NaN shows where it does by the definition", nan_is_seen),
    Property("extremes", "very large inputs give finite outputs and gradients", extremes_stay_finite, FLOATS[1:2]),
    Property("threads", "calls from several threads at once do not disturb each other", threads_do_not_meet),
    Property("refusals", "what is not supported is refused with a reason", refuses_what_it_lacks),
]

__all__ = ["FUNCTION_PROPERTIES", "Broken", "Kind", "NotApplicable", "Property", "relative_error"]
