"""The vocabulary that all of regard shares: patterns, masks, context, state, results and the mechanism card.

A *mechanism* is described once, by its card (:class:`Mechanism`); everything else in regard (functions, layers, tests,
documentation, the command line) reads the card. A *form* is one way to compute a mechanism: ``reference`` (the
definition), ``parallel``, ``chunked``, ``step``, and for cross patterns ``absorb`` and ``read``. Forms receive dense,
right-padded tensors and a :class:`Call`; :mod:`regard.functional` handles padding, packing and sanitising before it
calls them.
"""

from __future__ import annotations

from regard.contract.call import Call, lengths_after, valid_from_lengths
from regard.contract.card import (
    ACTS_LIKE,
    PUBLISHED_TOLERANCES,
    TURNED_BEFORE,
    Cost,
    LayerSpec,
    Mechanism,
    Paper,
    Shape,
    TrainedModel,
    Waiver,
)
from regard.contract.context import WANTS, BlockMask, Context, Mask, Role, check_mask
from regard.contract.errors import (
    Unsupported,
    an_instance,
    at_least,
    check_options,
    closest,
    one_of,
    out_of_memory,
    spelled,
)
from regard.contract.parts import LayerCall, Merge, Projection
from regard.contract.patterns import ALL_PATTERNS, Kind, Pattern
from regard.contract.recurrence import Recurrence
from regard.contract.spelling import read_options, split_list, written_options
from regard.contract.state import Loss, Result, State, Tensors, state_field
from regard.contract.trees import register_pytree
from regard.contract.types import NUMBERS, Types, check_types, types_of

__all__ = [
    "ACTS_LIKE",
    "ALL_PATTERNS",
    "NUMBERS",
    "PUBLISHED_TOLERANCES",
    "TURNED_BEFORE",
    "WANTS",
    "BlockMask",
    "Call",
    "Context",
    "Cost",
    "Kind",
    "LayerCall",
    "LayerSpec",
    "Loss",
    "Mask",
    "Mechanism",
    "Merge",
    "Paper",
    "Pattern",
    "Projection",
    "Recurrence",
    "Result",
    "Role",
    "Shape",
    "State",
    "Tensors",
    "TrainedModel",
    "Types",
    "Unsupported",
    "Waiver",
    "an_instance",
    "at_least",
    "check_mask",
    "check_options",
    "check_types",
    "closest",
    "lengths_after",
    "one_of",
    "out_of_memory",
    "read_options",
    "register_pytree",
    "spelled",
    "split_list",
    "state_field",
    "types_of",
    "valid_from_lengths",
    "written_options",
]
