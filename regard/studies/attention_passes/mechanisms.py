"""Cascades of mechanisms: look-up by name, and comparison with the definitions."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.catalogue import get_mechanism
from regard.contract import Kind, Tensors, Unsupported
from regard.studies.attention_passes.executor import run_cascade
from regard.studies.attention_passes.language import Cascade, parse
from regard.studies.attention_passes.written import REASONS, WRITTEN, Written
from regard.workbench.verification.properties.base import relative_error
from regard.workbench.verification.subjects import Subject

SCALE = 0.3
"""Scale of the scores when a cascade is compared with a definition."""
UNWRITTEN = "none is written: put it in the mechanism's file as CASCADE, or give it as a file"
UNDEFINED = "a module without a card has no definition to compare it with: give it as a file"


@dataclass(frozen=True)
class Found:
    """A mechanism's cascade and what it was written for, or the reason why it has none."""

    name: str
    written: Written | None
    cascade: Cascade | None
    reason: str


def cascade_of(name: str) -> Found:
    """Find the cascade of a mechanism of the catalogue or of a plugin."""
    card = get_mechanism(name)
    written = WRITTEN.get(card.name)
    if written is None:
        definition = card.forms.get("reference")
        if definition is None or card.name in REASONS:
            return Found(card.name, None, None, REASONS.get(card.name, UNDEFINED))
        own = vars(sys.modules[definition.__module__])
        if "CASCADE" not in own:
            return Found(card.name, None, None, UNWRITTEN)
        written = Written(str(own["CASCADE"]), card.patterns[0])
    return Found(card.name, written, parse(written.text, card.name), "")


def difference(found: Found, tokens: int = 11, tile: int = 4, seed: int = 0) -> float:
    """The largest difference between a cascade, run in tiles, and the mechanism's definition, on random inputs in
    float64, relative to the largest output.

    Raises:
        Unsupported: for a mechanism without a cascade.
    """
    if found.cascade is None or found.written is None:
        raise Unsupported(f"a cascade of {found.name}", supported=found.reason)
    card, written = get_mechanism(found.name), found.written
    subject = Subject(card, written.pattern, dict(written.options), seed)
    inputs = {
        name: value for name, value in subject.inputs(tokens, **written.widths).items() if name not in written.without
    }
    inputs |= written.more(inputs)
    scaled = {} if card.kind is Kind.PROJECTION else {"scale": SCALE}
    expected = subject.reference(inputs, **scaled)
    given = tensors_of(found, inputs, SCALE if scaled else 1.0)
    return relative_error(written.finish(run_cascade(found.cascade, given, tile=tile).output), expected)


def tensors_of(found: Found, inputs: Tensors, scale: float = SCALE) -> dict[str, Tensor]:
    """The inputs of a mechanism's cascade, from those of the mechanism."""
    assert found.cascade is not None and found.written is not None
    card = get_mechanism(found.name)
    sizes = {axis: size for name, x in inputs.items() for axis, size in zip(card.axes[name], x.shape, strict=True)}
    lead = [sizes[axis] for axis in "bh" if axis in sizes]
    known = {"scale": torch.tensor(scale, dtype=torch.float64), **found.written.prepare(inputs)}
    return {
        name: _with_lead(known[name], card.axes[name], lead, len(ranks))
        if known[name] is inputs.get(name)
        else known[name]
        for name, ranks in found.cascade.inputs.items()
        if name in known
    }


def _with_lead(x: Tensor, axes: str, lead: list[int], own: int) -> Tensor:
    """Expand a tensor to all leading axes, unless it has no axes but its own."""
    if x.dim() == own:
        return x
    if x.dim() == len(axes) and axes[:2] in ("bg", "bo"):
        return x.repeat_interleave(lead[1] // x.shape[1], 1)
    if x.dim() == own + len(lead):
        return x
    if axes.startswith("b"):
        return x[:, None].expand(x.shape[0], lead[1], *x.shape[1:])
    return x.expand(lead[0], *x.shape)
