"""Models of transformers with learned positions, for longer texts than they were made for."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from regard.contract import Unsupported, an_instance
from regard.integrations.encoders import positions_of
from regard.integrations.transformers.folders import quietly
from regard.positions.learned import stretched

TABLE = re.compile("position_emb|embed_position|wpe$")
"""Names of embeddings of positions."""


def learns_positions(model: nn.Module) -> bool:
    """Return whether a model has a table of learned positions."""
    return any(isinstance(module, nn.Embedding) and TABLE.search(name) for name, module in model.named_modules())


def with_longer_positions(model: Any, positions: int) -> Any:
    """A copy of a model whose table of learned positions is stretched to more rows, linearly from the first to the last.

    All positions have new vectors, so the copy has to be trained further. Its config names the new number, so that it is
    saved and loaded like any other model.

    Args:
        model: a transformers model with such a table, such as GPT-2, OPT, BERT or RoBERTa; not modified.
        positions: the number of tokens that the copy reads.

    Raises:
        Unsupported: for a model without such a table, and for no more positions than it has.
    """
    before = positions_of(model)
    if before is None or not learns_positions(model):
        raise Unsupported(
            f"positions={positions} of {an_instance(model)}, which has no table of learned positions",
            supported="models with one, such as GPT-2, OPT, BERT and RoBERTa",
        )
    if positions <= before:
        raise Unsupported(f"positions={positions} of {an_instance(model)}", supported=f"more than its own {before}")
    config = copy.deepcopy(model.config)
    config.max_position_embeddings += positions - before
    with torch.random.fork_rng(devices=[]), quietly():
        made = type(model)(config).to(model.device, model.dtype)
    tensors = model.state_dict()
    for name, x in made.state_dict().items():
        old = tensors[name]
        if x.shape == old.shape:
            continue
        if x.shape[0] - old.shape[0] != positions - before or x.shape[1:] != old.shape[1:]:
            raise Unsupported(
                f"positions={positions} of {an_instance(model)}, whose {name} depends on them",
                supported="models in which only the table does",
            )
        reserved = len(old) - before  # rows that are no positions, as that of padding
        tensors[name] = torch.cat([old[:reserved], stretched(old[reserved:], positions)])
    made.load_state_dict(tensors)
    made.tie_weights()
    made.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return made.train(model.training)
