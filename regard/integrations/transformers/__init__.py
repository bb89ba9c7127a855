"""regard in Hugging Face transformers.

Importing this module registers

- every attention mechanism of queries, keys and values as ``attn_implementation="regard:NAME"``, with its mask
  function::

      import regard.integrations.transformers
      model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="regard:softmax")

- ``regard:swapped``, through which models changed by :func:`regard.swap` attend. Their config records the mechanism of
  each module, so that ``save_pretrained`` and ``from_pretrained`` keep it: the import extends ``post_init`` of
  transformers' models to restore what the config records, and ``save_pretrained`` to refuse a config that does not.
  Without this import transformers refuses to load them;
- :class:`GrowingCache`, a cache for ``generate`` that does not copy all keys and values at each token;
- :func:`fuse_layers`, for decoding in fewer and faster calls;
- :func:`with_longer_positions`, for longer texts than the table of a GPT-2, OPT or BERT;
- :class:`RegardQuantizer`, which lets transformers' own ``from_pretrained`` read the codes that `regard compress` writes::

      import regard.integrations.transformers
      model = AutoModelForCausalLM.from_pretrained("small/")

- :class:`RegardConfig` and :class:`RegardForCausalLM` with the ``Auto`` classes: a language model of regard that
  works with ``generate``, keeping its state, and is saved and loaded like any other.

Needs the extra ``hf``. Importing regard itself never imports transformers.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from regard.contract import Unsupported

try:
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin as CacheLayerMixin
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
except ImportError as error:
    raise Unsupported(
        f"regard.integrations.transformers without a fitting transformers ({error})",
        supported="transformers 5 or newer",
        nearest="pip install 'regard[hf]'",
    ) from error

from regard.integrations.transformers.attending import (
    PLACE,
    PREFIX,
    SWAPPED,
    _without_weights,
    attention_forward,
    swapped_forward,
)
from regard.integrations.transformers.caches import CACHE, GrowingCache, GrowingLayer, StateLayer
from regard.integrations.transformers.fused import fuse_layers, unfuse_layers
from regard.integrations.transformers.longer import with_longer_positions
from regard.integrations.transformers.models import RegardCache, RegardConfig, RegardForCausalLM
from regard.integrations.transformers.placing import (
    RECORD,
    attention_names,
    check_interface,
    check_record,
    checking,
    is_swapped,
    needing_whole_sequences,
    plan,
    record_options,
    record_swap,
    record_unswap,
    restore,
    restoring,
    take_out,
)
from regard.integrations.transformers.quantized import RegardQuantizationConfig, RegardQuantizer


def causal_or_mask(*sizes: Any, allow_is_causal_skip: bool = True, **given: Any) -> torch.Tensor | None:
    """transformers' mask for PyTorch's attention, or None where plain causality is enough, also during compilation.

    During compilation, transformers (with PyTorch before 2.14) builds a mask even where none is needed, and mechanisms
    cannot inspect it to see that it is only causal. Its own mask is kept for more keys than queries, so nothing is
    lost.
    """
    whole = allow_is_causal_skip and given.get("attention_mask") is None and given.get("local_size") is None
    if whole and torch.compiler.is_compiling() and not sizes and given["q_length"] == given["kv_length"]:
        return None
    mask: torch.Tensor | None = sdpa_mask(*sizes, allow_is_causal_skip=allow_is_causal_skip, **given)
    return mask


def register() -> None:
    """Register everything. Importing the module does so once; call it again for plugins loaded later."""
    for name in attention_names():
        AttentionInterface.register(PREFIX + name, functools.partial(attention_forward, mechanism=name))
        AttentionMaskInterface.register(PREFIX + name, causal_or_mask)
        with contextlib.suppress(Unsupported):
            _without_weights(name, ())
    AttentionInterface.register(SWAPPED, swapped_forward)
    AttentionMaskInterface.register(SWAPPED, causal_or_mask)
    AutoConfig.register(RegardConfig.model_type, RegardConfig, exist_ok=True)
    AutoModelForCausalLM.register(RegardConfig, RegardForCausalLM, exist_ok=True)


register()
PreTrainedModel.post_init = restoring(PreTrainedModel.post_init)
PreTrainedModel.save_pretrained = checking(PreTrainedModel.save_pretrained)

__all__ = [
    "CACHE",
    "PLACE",
    "PREFIX",
    "RECORD",
    "SWAPPED",
    "GrowingCache",
    "GrowingLayer",
    "RegardCache",
    "RegardConfig",
    "RegardForCausalLM",
    "RegardQuantizationConfig",
    "RegardQuantizer",
    "StateLayer",
    "attention_forward",
    "attention_names",
    "check_interface",
    "check_record",
    "fuse_layers",
    "is_swapped",
    "needing_whole_sequences",
    "plan",
    "record_options",
    "record_swap",
    "record_unswap",
    "register",
    "restore",
    "swapped_forward",
    "take_out",
    "unfuse_layers",
    "with_longer_positions",
]
