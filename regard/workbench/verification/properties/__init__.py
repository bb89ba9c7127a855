"""The properties of the equality matrix, each a function that measures an error.

A property returns the largest error found, as a fraction of the largest output (or of the largest gradient), or raises:
:class:`NotApplicable` if the card makes no such claim; any other exception is a failure. Exact properties return 0 or
raise, through `exactly`.
"""

from __future__ import annotations

import torch

from regard.workbench.verification.properties.base import FLOATS, Broken, NotApplicable, Property
from regard.workbench.verification.properties.derivatives import (
    forward_derivatives,
    gradients_equal_reference,
    padding_gets_no_gradient,
    second_derivatives,
)
from regard.workbench.verification.properties.extremes import extremes_stay_finite, nan_is_seen, nothing_gives_nothing
from regard.workbench.verification.properties.forms import (
    any_chunk_size,
    compiles_whole,
    defaults_change_nothing,
    forms_equal_reference,
    grouped_heads,
    refuses_what_it_lacks,
    threads_do_not_meet,
)
from regard.workbench.verification.properties.states import (
    memory_in_pieces,
    split_and_resume,
    state_is_data,
    state_keeps_precision,
    steps_equal_reference,
)
from regard.workbench.verification.properties.visibility import (
    bottom_right_alignment,
    hidden_rows_give_zero,
    later_tokens_have_no_effect,
    packed_equals_separate,
    padded_equals_unpadded,
    pair_masks,
    row_equals_alone,
)

FUNCTION_PROPERTIES = [
    Property(
        "reference",
        "each fast form equals the definition, at lengths 0, 1, prime and around a chunk, and leaves its inputs as they were",
        forms_equal_reference,
        FLOATS,
    ),
    Property("chunk_size", "the chunk size changes nothing", any_chunk_size, FLOATS[:2]),
    Property(
        "step", "token by token equals the definition, and each state stays as it was", steps_equal_reference, FLOATS
    ),
    Property(
        "split_resume",
        "split anywhere and resumed equals whole, also when rows advance unequally",
        split_and_resume,
        FLOATS[:2],
    ),
    Property(
        "padding",
        "padded left, right or inside, with NaN in the padding, equals unpadded",
        padded_equals_unpadded,
        FLOATS[:2],
    ),
    Property(
        "packing", "packed documents equal separate ones, and leave one state each", packed_equals_separate, FLOATS[:2]
    ),
    Property("row_alone", "a row of a batch equals the row alone", row_equals_alone),
    Property("causality", "later tokens have no effect", later_tokens_have_no_effect),
    Property("alignment", "unequal lengths align bottom-right, or are refused", bottom_right_alignment),
    Property("hidden_row", "rows that see nothing give 0 with finite gradients", hidden_rows_give_zero),
    Property("gradient", "gradients equal numerical ones and the definition's", gradients_equal_reference),
    Property("padding_gradient", "padding receives no gradient", padding_gets_no_gradient),
    Property("state", "a state is saved, loaded, selected and reset as data", state_is_data),
    Property(
        "state_dtype",
        "the state's dtypes and, if recurrent, sizes do not change",
        state_keeps_precision,
        (torch.float64, torch.bfloat16),
    ),
    Property("memory", "memory absorbed in pieces and read in steps equals the whole", memory_in_pieces, FLOATS[:2]),
    Property("compile", "compiled without a graph break equals eager", compiles_whole),
    Property("grouped_heads", "fewer key/value heads equal repeated ones", grouped_heads),
    Property("pair_masks", "bias and block masks are honoured, and left as they were, or refused", pair_masks),
    Property("defaults", "another default device and dtype change nothing", defaults_change_nothing),
    Property("forward_derivative", "forward-mode derivatives are right, or refused", forward_derivatives),
    Property("second_derivative", "gradients of gradients are right, or refused", second_derivatives),
    Property("nothing", "no rows, queries or keys: empty or 0, with gradients", nothing_gives_nothing),
    Property("nan", "NaN shows where it does by the definition", nan_is_seen),
    Property("extremes", "very large inputs give finite outputs and gradients", extremes_stay_finite, FLOATS[1:2]),
    Property("threads", "calls from several threads at once do not disturb each other", threads_do_not_meet),
    Property("refusals", "what is not supported is refused with a reason", refuses_what_it_lacks),
]


__all__ = ["FUNCTION_PROPERTIES", "Broken", "NotApplicable", "Property"]
