"""Branches of a pre-norm block, from the norm to the sum with their input, each in one native call.

In PyTorch such a branch is ten operators, and what lies between its products is written to memory and read again. There is no
form in PyTorch: what else computes a branch is the block that it is of.
"""

from regard.engines.residual.native_form import Attention, Dense, FeedForward, RowNorm, is_small, plain

__all__ = ["Attention", "Dense", "FeedForward", "RowNorm", "is_small", "plain"]
