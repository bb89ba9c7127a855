"""Sparse attention of trained models at inference, without training (The Sparse Frontier, arXiv 2504.17768).

A method has three hooks (:class:`regard.compression.sparse.method.Method`): which keys each query of a prompt sees, what of
the prompt stays in the cache, and what a new token reads of it. They are executed sparsely: lists of keys, pages and blocks
go to the engines, and what is not selected is not computed::

    with sparsely(model, "vertical_slash + quest:budget=512") as sparse:
        model.generate(ids, max_new_tokens=50)
    sparse.measured()                               # sparsity of both phases, as it was counted

:mod:`.prefilling`, :mod:`.evicting` and :mod:`.paging` have the methods, :mod:`.catalogue` their names and what they come to
at a compression, :mod:`.cost` what they cost.
"""

from __future__ import annotations

from regard.compression.sparse.catalogue import METHODS, at_compression, read_method, written
from regard.compression.sparse.hosts import Sparse, sparsely, sparsify
from regard.compression.sparse.method import Combined, Meter, Method, Place

__all__ = [
    "METHODS",
    "Combined",
    "Meter",
    "Method",
    "Place",
    "Sparse",
    "at_compression",
    "read_method",
    "sparsely",
    "sparsify",
    "written",
]
