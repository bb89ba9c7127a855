"""Properties of derivatives: gradients, forward mode, and gradients of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.contract import Mask, Tensors, Unsupported
from regard.workbench.verification.properties.base import (
    NotApplicable,
    as_leaves,
    batched,
    exactly,
    fast_forms,
    relative_error,
    worst,
)
from regard.workbench.verification.subjects import Subject, in_float64


def gradients_equal_reference(subject: Subject, dtype: torch.dtype) -> float:
    """Gradients of the default form against numerical ones in random directions, which would reveal an error in the
    definition too; then every gradient entry of each fast form against the reference."""
    n, m = (6, 6) if not subject.pattern.cross else (4, 6)
    errors = []
    inputs = subject.inputs(n, m, batch=1, dtype=dtype, d=3, k=3, v=2, e=2)
    names = [k for k, t in inputs.items() if t.is_floating_point()]

    def function(*tensors: Tensor) -> Tensor:
        return subject.run({**inputs, **dict(zip(names, tensors, strict=True))}).output

    if dtype is torch.float64:  # numerical derivatives need its precision
        leaves = [inputs[k].clone().requires_grad_() for k in names]
        torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
    inputs = subject.inputs(*((20, 20) if not subject.pattern.cross else (12, 20)), dtype=dtype)
    doubled = in_float64(inputs)
    expected = _gradients(subject, doubled, "reference")
    for form in fast_forms(subject):
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
    """Padded tokens receive a gradient of exactly 0."""
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
        if axis is None or leaf.grad is None or not batched(subject, name):
            continue
        tail = leaf.grad[1].narrow(axis - 1, 4, n - 4)
        exactly((tail == 0).all(), f"padding of {name} receives a gradient")
    return 0.0


def forward_derivatives(subject: Subject, dtype: torch.dtype) -> float:
    """A directional derivative in forward mode against the product of reverse-mode gradients and the direction."""
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
    """Gradients of gradients against the definition's; relative to the gradient if they are mere rounding."""
    inputs = subject.inputs(9, dtype=dtype)

    def second(tensors: Tensors, form: str | None) -> tuple[list[Tensor], float]:
        leaves = as_leaves(tensors)
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
