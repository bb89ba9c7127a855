"""The blocks of a backbone, with optional gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Blocks(nn.ModuleList):
    """Blocks in order, each called through :meth:`run`.

    Attributes:
        recomputed: whether only a block's inputs are kept for the backward pass, which computes the block again (Chen
            et al., arXiv 1604.06174).
    """

    recomputed = False

    def run(self, block: nn.Module, *inputs: Any, **more: Any) -> Any:
        """Run one of the blocks on its inputs."""
        if not self.recomputed or not torch.is_grad_enabled():
            return block(*inputs, **more)

        def once_and_again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _without_statistics(block)

        return checkpoint(block, *inputs, use_reentrant=False, context_fn=once_and_again, **more)


@contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """Keep batch norms from updating their running statistics again; they still normalise by the batch."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
