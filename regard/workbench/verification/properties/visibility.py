"""Properties of visibility between tokens: padding, packing, causality, alignment, hidden rows and pair masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard.contract import BlockMask, Mask, Pattern, Tensors, Unsupported
from regard.workbench.verification.properties.base import (
    Broken,
    NotApplicable,
    batched,
    exactly,
    fast_forms,
    left_as_they_were,
    relative_error,
    worst,
)
from regard.workbench.verification.subjects import Subject


def padded_layouts(counts: Tensor, total: int) -> dict[str, Tensor]:
    """Valid places out of `total` for rows with `counts` tokens, padded ``right``, ``left`` and ``inside``."""
    places = torch.arange(total)
    right = places < counts[:, None]
    left = places >= total - counts[:, None]
    generator = torch.Generator().manual_seed(5)
    inside = torch.stack([torch.rand(total, generator=generator).argsort().argsort() < c for c in counts])
    return {"right": right, "left": left, "inside": inside}


def padded_equals_unpadded(subject: Subject, dtype: torch.dtype) -> float:
    """Padded rows of unequal length, one of them empty, with NaN in the padding, against each row alone."""
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
    """On a grid, masked bottom rows act like the border of a smaller grid, whatever they contain."""
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
    """Packed documents in one row, one of them empty, against each alone; the state has one row per document."""
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
        more |= {name: inputs[name] for name in subject.card.shared_inputs if name in inputs}
        found = subject.run(more, state=result.state).output
        for d in range(len(lengths)):
            part = slice(int(borders[d]), int(borders[d + 1]))
            document, tail = subject.cut(inputs, part), subject.rows(more, slice(d, d + 1))
            whole = subject.join(document, tail)
            expected = subject.take_output(subject.reference(whole), slice(lengths[d], None))
            errors.append(relative_error(found[d : d + 1], expected))
    return worst(errors)


def row_equals_alone(subject: Subject, dtype: torch.dtype) -> float:
    """A batch of three rows against each row alone."""
    inputs = subject.inputs(12, batch=3, dtype=dtype)
    output = subject.run(inputs).output
    alone = [subject.run(subject.rows(inputs, slice(r, r + 1))).output for r in range(3)]
    return relative_error(output, torch.cat(alone))


def later_tokens_have_no_effect(subject: Subject, dtype: torch.dtype) -> float:
    """A large finite change from token t on leaves the outputs before t unchanged."""
    if not subject.pattern.causal or subject.output_axis() is None:
        raise NotApplicable
    n, errors = 24, []
    inputs = subject.inputs(n, dtype=dtype)
    other = subject.inputs(n, dtype=dtype, seed=9)
    for form in [None, *(f for f in fast_forms(subject) if f in subject.card.forms)]:
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
    if subject.pattern is not Pattern.CAUSAL_SELF or not subject.card.memory_inputs:
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
    """Put NaN at invalid places, keeping gradients to the valid ones."""
    poisoned = {}
    for name, x in inputs.items():
        for letter, axis in subject.positions(name).items():
            if letter in letters and batched(subject, name):
                shape = [1] * x.ndim
                shape[0], shape[axis] = valid.shape
                fill = float("nan") if x.is_floating_point() else 0
                x = torch.where(valid.view(shape), x, x.new_full((), fill))
        poisoned[name] = x
    return poisoned


def pair_masks(subject: Subject, dtype: torch.dtype) -> float:
    """Additive bias and block masks give the definition's result, or are refused if the card does not list them."""
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
        left_as_they_were({"bias": bias}, {"bias": added}, "its mask")
        if what == "bias" and not subject.on_grid:
            valid = torch.ones(2, n, dtype=torch.bool)
            valid[1, [1, 4, 6, 7, 10]] = False
            errors += [
                _biased_rows(subject, inputs, Mask(bias=bias, lengths=torch.tensor([n, 6])), torch.arange(6)),
                _biased_rows(subject, inputs, Mask(bias=bias, valid=valid), valid[1].nonzero()[:, 0]),
            ]
    return worst(errors)


def _biased_rows(subject: Subject, inputs: Tensors, mask: Mask, places: Tensor) -> float:
    """The error of the second row, valid at `places` only, against the definition on those places."""
    bias = mask.bias
    assert bias is not None
    found = subject.run(inputs, mask=mask).output[1:2]
    keys = torch.arange(bias.shape[-1]) if subject.pattern.cross else places
    own = subject.cut(subject.rows(inputs, slice(1, 2)), places, keys)
    expected = subject.reference(own, mask=Mask(bias=bias[1:2][:, :, places][..., keys]))
    return relative_error(subject.take_output(found, places), expected)
