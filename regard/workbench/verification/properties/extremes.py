"""Properties of edge cases: empty inputs, NaN, and very large inputs."""

from __future__ import annotations

import torch

from regard.workbench.verification.properties.base import NotApplicable, as_leaves, batched, exactly
from regard.workbench.verification.subjects import Subject


def nothing_gives_nothing(subject: Subject, dtype: torch.dtype) -> float:
    """No rows, no queries or no keys: outputs have the right shape and pass gradients on, and gradients are finite."""
    sizes: list[tuple[int, int, int | None]] = [(0, 5, None)]
    if not subject.on_grid:
        sizes += [(2, 0, 4), (2, 3, 0)] if subject.pattern.cross else [(2, 0, None)]
    for batch, n, m in sizes:
        what = f"B = {batch}, N = {n}" + ("" if m is None else f", M = {m}")
        leaves = as_leaves(subject.inputs(n, m, batch=batch, dtype=dtype))
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
    """NaN in a token shows in the token's output if it does by the definition, and in no other row.

    NaN that reaches the definition's output only through a weight of 0 does not count: the output has to depend on the
    token.
    """
    if subject.output_axis() is None:
        raise NotApplicable
    for n, token in ((12, 0), (12, 7), (12, 11), (6, 5), (20, 1)):
        inputs = subject.inputs(n, n, dtype=dtype, seed=token)
        for name, tensor in inputs.items():
            axes = subject.positions(name)
            axis = axes.get("n", None if subject.pattern.cross else axes.get("m"))
            if axis is None or not tensor.is_floating_point() or not batched(subject, name):
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
    """Tokens a thousand times larger than usual give finite outputs and gradients; inputs without tokens stay small."""
    inputs = subject.inputs(20, dtype=dtype)
    free = [
        k for k in inputs if inputs[k].is_floating_point() and subject.positions(k) and not subject.card.domains.get(k)
    ]
    leaves = as_leaves({k: 1e3 * t if k in free else t for k, t in inputs.items()})
    output = subject.run(leaves).output
    exactly(torch.isfinite(output).all(), "the output is not finite")
    output.sum().backward()
    for name, leaf in leaves.items():
        exactly(leaf.grad is None or torch.isfinite(leaf.grad).all(), f"the gradient of {name} is not finite")
    return 0.0
