"""Sparse attention for trained models at inference, without training (The Sparse Frontier, arXiv 2504.17768).

A method has three hooks (:class:`regard.compression.sparse.method.Method`): which keys each query of a prompt sees,
which tokens of the prompt stay in the cache, and which of them a new token reads. They run sparsely: lists of keys,
pages and blocks go to the engines, and nothing else is computed::

    with sparsely(model, "vertical_slash + quest:budget=512") as sparse:
        model.generate(ids, max_new_tokens=50)
    sparse.measured()                               # measured sparsity of both phases

:mod:`.prefilling`, :mod:`.evicting` and :mod:`.paging` define the methods, :mod:`.catalogue` their names and their
options for a given compression, :mod:`.cost` their costs.
"""

from __future__ import annotations

from regard.compression.sparse.catalogue import METHODS, at_compression, compresses, read_method, written
from regard.compression.sparse.hosts import Sparse, is_sparse, sparsely, sparsify
from regard.compression.sparse.method import Combined, Meter, Method, Place

__all__ = [
    "METHODS",
    "Combined",
    "Meter",
    "Method",
    "Place",
    "Sparse",
    "at_compression",
    "compresses",
    "is_sparse",
    "read_method",
    "sparsely",
    "sparsify",
    "written",
]
