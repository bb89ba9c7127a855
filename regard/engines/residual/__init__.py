"""Residual branches of pre-norm blocks, from the norm to the sum with the input, each in one native call.

In PyTorch such a branch is ten operators, whose intermediate results are written to memory and read again. There is no
form in PyTorch: otherwise the block itself computes its branches.
"""

from regard.engines.residual.native_form import Attention, Dense, Documents, FeedForward, RowNorm, is_small, plain

__all__ = ["Attention", "Dense", "Documents", "FeedForward", "RowNorm", "is_small", "plain"]
