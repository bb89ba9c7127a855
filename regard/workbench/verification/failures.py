"""Failures of a verification in words: similar failures are grouped, with their most likely cause."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from regard.workbench.verification.verify import Cell

CAUSES = {
    "reference": "a fast form computes something else than `reference`: compare them on three tokens",
    "chunk_size": "something is carried wrongly from one chunk to the next, or a chunk's end is taken for the sequence's",
    "step": "the state after a token is not that of the whole sequence: compare the state after two tokens",
    "split_resume": "the state lacks something that the next part needs (a convolution's last inputs, a normaliser, a count)",
    "padding": "padding reaches a sum, a mean, a decay gate, a convolution or a normaliser: mask it out with `torch.where`",
    "packing": "something crosses the border of two documents: a state, a convolution or a position",
    "row_alone": "rows of a batch see each other, by a mean or a maximum over the batch",
    "causality": "an output depends on later tokens: a mean over all tokens, a wrong mask, a convolution without a shift",
    "alignment": "with more keys than queries the last query must see the last key (bottom-right), not the first the first",
    "hidden_row": "a query that sees nothing must give 0 with finite gradients: 0 / 0, or a softmax of -inf alone",
    "gradient": "something is detached, rounded, or differentiated by a formula of its own that is wrong",
    "padding_gradient": "padding gets a gradient, or NaN in it reaches others: multiply less, select more",
    "state": "the state is not data alone: it must be selected, saved and moved like tensors",
    "state_dtype": "accumulators of a state belong in float32 or wider, caches in the inputs' dtype",
    "memory": "memory read in pieces is not memory read at once",
    "compile": "data decide the control flow: `.item()`, a Python branch on a tensor, a shape computed from values",
    "layer_recompile": "sizes decide the control flow: a number computed from the length, a test of one length",
    "layer_compile": "data decide the control flow: `.item()`, a Python branch on a tensor, a shape computed from values",
    "layer_save": "a tensor that the layer needs is neither a parameter nor a buffer",
    "layer_ragged": "a convolution, a shift or a state keeps the last place of a padded row instead of its last token",
    "layer_decoding": "the projection mixes tokens but keeps no state (``mixes_tokens``, and `forward` with the state)",
}
"""The most frequent cause of a property's failure."""


@dataclass
class Group:
    """Failures with the same cause."""

    cells: list[Cell] = field(default_factory=list)

    def __str__(self) -> str:
        first = self.cells[0]
        names = list(dict.fromkeys(cell.property for cell in self.cells))
        patterns = list(dict.fromkeys(cell.pattern for cell in self.cells))
        variants = list(dict.fromkeys(cell.variant or "default options" for cell in self.cells))
        with_ = "" if variants == ["default options"] else f"; {', '.join(variants)}"
        said = f"{first.mechanism}: {len(self.cells)} cells ({', '.join(names)}; {', '.join(patterns)}{with_}): {first.detail}"
        cause = CAUSES.get(names[0]) if len(names) == 1 else None
        return said + (f". Likely: {cause}." if cause else "")


def kind(cell: Cell) -> tuple[str, str, str]:
    """A key that similar failures share: they differ only in numbers, or are the same exception in one mechanism."""
    plain = re.sub(r"[-+]?\d[\d.e+-]*", "#", cell.detail)
    raised = re.match(r"\w+(Error|Exception|Unsupported)\b", plain) is not None
    return cell.mechanism, "" if raised else cell.property, plain


def grouped(cells: Sequence[Cell]) -> list[Group]:
    """The failures among the cells, similar ones grouped, the largest group first."""
    groups: dict[tuple[str, str, str], Group] = {}
    for cell in cells:
        if cell.status == "fail":
            groups.setdefault(kind(cell), Group()).cells.append(cell)
    return sorted(groups.values(), key=lambda group: -len(group.cells))
