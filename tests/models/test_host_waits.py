"""How often a forward pass needs values on the host, each of which makes it wait for a GPU."""

from __future__ import annotations

import pytest
import torch
from model_checks import made
from torch.utils._python_dispatch import TorchDispatchMode

from regard import Context, Mask

MIXED = ["softmax", "gated_linear", "delta_rule", "mamba", "mamba2", "linear"] * 2


class Waits(TorchDispatchMode):
    """Counts the values and shapes that operations hand to Python."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        plain = torch.Tensor.tolist

        def tolist(tensor):
            self.count += 1
            return plain(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function.overloadpacket.__name__ in self.READS
        return function(*arguments, **(options or {}))


MASKS = {
    "whole": lambda: None,
    "lengths": lambda: Mask(lengths=torch.tensor([9, 4])),
    "padding on the left": lambda: Mask(valid=torch.arange(12) >= torch.tensor([[3], [8]])),
}


@pytest.mark.parametrize("kind", ["language model", "encoder"])
@pytest.mark.parametrize("padding", MASKS)
def test_a_model_of_twelve_layers_waits_once_at_most(padding, kind, monkeypatch):
    words = {"vocab_size": 11} if kind == "language model" else {"vocab_size": 11, "features": None}
    model, ids = made(kind, plan=MIXED, **words).float(), torch.randint(11, (2, 12))
    with torch.no_grad(), Waits(monkeypatch) as waits:
        model(ids, context=Context(mask=MASKS[padding]()))
    assert waits.count <= 1


def test_reads_are_counted(monkeypatch):
    with Waits(monkeypatch) as waits:
        int(torch.ones(1))
        torch.ones(2).tolist()
        torch.ones(2).nonzero()
    assert waits.count == 3
