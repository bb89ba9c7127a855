"""Removing parts of trained models: weights by masks; heads, neurons, branches and layers for good.

:mod:`regard.compression.pruning.steps` defines the recipe steps. By hand::

    host = find_host(model)
    with masked(host, [Cut(heads=(0, 3)), Cut(attention=True), ...]):    # one cut per layer
        ...                                                              # the model computes as if it were smaller
    undo = host.compact(cuts)                                            # really smaller, with the same outputs

Both also take the numbers of dimensions of the residual stream, which go from all layers.
"""

from __future__ import annotations

from regard.compression.pruning.anatomy import Cut, Host, Layer, find_host
from regard.compression.pruning.losses import item_losses
from regard.compression.pruning.masks import Gates, gated, masked

__all__ = ["Cut", "Gates", "Host", "Layer", "find_host", "gated", "item_losses", "masked"]
