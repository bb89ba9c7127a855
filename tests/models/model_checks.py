"""Helpers for tests of models: small models of every kind, their inputs, and reading these in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support import read_in_pieces
from torch import Tensor, nn

from regard.models import (
    AlgorithmicNetworkConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    ForecasterConfig,
    FunnelEncoderConfig,
    LanguageModelConfig,
    PyramidEncoderConfig,
    build_model,
    from_pretrained,
    save_pretrained,
)

KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "language model": (LanguageModelConfig, {"vocab_size": 11}),
    "encoder": (EncoderConfig, {"num_classes": 3, "features": 2}),
    "encoder-decoder": (EncoderDecoderConfig, {"vocab_size": 11, "memory_vocab_size": 9}),
    "forecaster": (ForecasterConfig, {"features": 2, "memory_features": 3, "target_features": (2, 0)}),
    "funnel encoder": (FunnelEncoderConfig, {"num_classes": 3, "features": 2, "num_layers": 1}),
    "pyramid encoder": (PyramidEncoderConfig, {"num_classes": 3, "features": 2}),
    "algorithmic network": (AlgorithmicNetworkConfig, {"num_classes": 3, "features": 2, "num_layers": 2}),
}
FUNNELS = [
    {},
    {"blocks": 3, "truncate": True},
    {"separate_first": False},
    {"separate_first": False, "pool": "max", "blocks": 1, "layers": 2},
    {"query_only": False, "positions": False, "blocks": 4},
]


def small(kind: str, **options: Any) -> Any:
    """The configuration of a small model."""
    config, own = KINDS[kind]
    return config(**{"dim": 16, "num_heads": 2, **own, **options})


def made(kind: str, **options: Any) -> nn.Module:
    """A small model in float64, in evaluation mode."""
    return build_model(small(kind, **options)).double().eval()


def read_by(config: Any, rows: int = 3, n: int = 6, m: int = 8) -> list[Tensor]:
    """Random inputs of `n` tokens for a config's model, and a memory of `m` tokens if it reads one."""
    inputs = []
    for side, length in (("", n), ("memory_", m)):
        vocabulary, features = (getattr(config, side + name, None) for name in ("vocab_size", "features"))
        if vocabulary is not None:
            inputs.append(torch.randint(vocabulary, (rows, length)))
        elif features is not None:
            inputs.append(torch.randn(rows, length, features, dtype=torch.float64))
    return inputs


def ragged(shape: Sequence[int]) -> Tensor:
    """A mask with padding left, inside and right, in which every row keeps a token."""
    valid = torch.rand(tuple(shape)) < 0.6
    valid[:, shape[1] // 2] = True
    return valid


def randomize_ends(model: nn.Module) -> nn.Module:
    """Randomise the norms and factors at the ends of all branches that have them."""
    for name, parameter in model.named_parameters():
        if "_end." in name:
            nn.init.normal_(parameter)
    return model


def without_gradient(model: nn.Module) -> list[str]:
    """Names of the parameters that have received no gradient."""
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def check_comes_back_from_disk(model: nn.Module, inputs: Sequence[Tensor], folder: Path) -> nn.Module:
    """Check that a model is the same to the last bit after saving and loading."""
    save_pretrained(model, folder)
    loaded = from_pretrained(folder)
    assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in model.parameters()]
    assert torch.equal(loaded(*inputs).output, model(*inputs).output)
    return loaded


def check_decodes_as_it_reads_and_comes_back_from_disk(
    model: nn.Module, ids: Tensor, prompt: int, folder: Path
) -> None:
    """Check that a prompt followed by single tokens equals the whole, and that saving and loading change nothing."""
    pieces = [prompt] + [1] * (ids.shape[1] - prompt)
    torch.testing.assert_close(read_in_pieces(model, ids, pieces)[0], model(ids).output)
    check_comes_back_from_disk(model, (ids,), folder)
