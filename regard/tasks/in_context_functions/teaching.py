"""Teaching sequences: examples that leave a single function of its class.

For a monotone conjunction of k literals: the input in which only its literals are +1, then k inputs in each of which
one of them is -1 instead. For a general conjunction: its literals hold while all other bits are -1, then while they are
+1; then each literal fails in turn while the others are -1. For a monotone formula of several conjunctions: the
sequences of its clauses, one after another; it leaves a single function where no clause lies inside another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int


def teaching_sequences(
    weights: Int[np.ndarray, "b clauses n"], *, signed: bool
) -> tuple[Int[np.ndarray, "b t n"], Int[np.ndarray, " b"]]:
    """Inputs of each function's teaching sequence, padded with 0, and the lengths of the sequences.

    Args:
        weights: literals of conjunctions: 0, +1 and -1; no -1 unless `signed`.
        signed: whether a literal may be negated.
    """
    count, clauses, n = weights.shape
    positives = 2 if signed else 1
    lengths = (weights != 0).sum(2) + positives  # (b, clauses)
    starts = np.cumsum(lengths, axis=1) - lengths
    found = np.zeros((count, clauses * (n + positives), n), dtype=np.int64)
    rows = np.arange(count)
    for clause in range(clauses):
        literals = weights[:, clause]
        # order of the failing literals: those that are not negated come first
        order = np.where(literals > 0, np.cumsum(literals > 0, 1), 0)
        order += np.where(literals < 0, (literals > 0).sum(1, keepdims=True) + np.cumsum(literals < 0, 1), 0)
        for row in range(n + positives):
            chosen = rows[row < lengths[:, clause]]
            x = np.where(literals == 0, 1 if signed and row == 1 else -1, literals)
            if row >= positives:
                x = np.where(order == row - positives + 1, -x, x)
            found[chosen, starts[chosen, clause] + row] = x[chosen]
    return found, lengths.sum(1)
