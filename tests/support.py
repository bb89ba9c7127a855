"""What tests of all folders share: recordings of other code, random inputs, calls, and how close two tensors are."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regard.apply import apply
from regard.contract import Context, Mechanism, Result, Unsupported

FIXTURES = Path(__file__).parent / "parity" / "fixtures"
WANT_STATE = Context(want=frozenset({"state"}))
GRAPH = "aot_eager" if os.environ.get("REGARD_TEST_ALL") else "eager"
"""How what is made of mechanisms is compiled: into one graph, which runs as it is, twice as fast to make as one that AOTAutograd
takes apart. The mechanisms in it, and their operators, are taken apart in tests of their own."""


def load(name: str) -> dict[str, Tensor]:
    """Tensors that were recorded from another implementation; `tests/parity` says which, and by what call."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "shapes"}


def recorded_state(name: str) -> dict[str, Tensor]:
    """The weights of the model whose outputs were recorded, made of a seed by the names and shapes that it has there."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return seeded_state(json.loads(str(arrays["shapes"])))


def seeded_state(shapes: dict[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """Weights of a model by name, which need not be recorded beside its outputs: made of a seed, in the names' order."""
    generator, found = np.random.default_rng(seed), {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        value = generator.standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            found[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        if name.endswith("running_var"):
            value = np.exp(0.3 * value)
        elif len(shape) >= 2:
            value = value / math.sqrt(math.prod(shape[1:]))
        else:
            value = 1 + 0.1 * value if name.endswith("weight") else 0.1 * value
        found[name] = torch.from_numpy(np.asarray(value))
    return found


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Shape and dtype are equal, and no element differs by more than a fraction of the largest expected value."""
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    assert math.isfinite(size), "infinite or NaN where a number is expected"
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * (size or 1.0))


def refused(words: str, call: Callable[..., Any], /, *given: Any, **options: Any) -> None:
    """The call raises the one exception for what is not supported, and says these words (a regular expression)."""
    with pytest.raises(Unsupported, match=words):
        call(*given, **options)


def close_gradients(
    found: Tensor, expected: Tensor, leaves: Sequence[Tensor] | dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    """Outputs are close, and so is a random vector's product with their derivatives by each of the leaves."""
    close(found, expected, tolerance)
    leaves = list(leaves.values()) if isinstance(leaves, dict) else list(leaves)
    cotangent = torch.randn_like(expected)
    gradients = (
        torch.autograd.grad(x, leaves, cotangent, retain_graph=True, materialize_grads=True) for x in (found, expected)
    )
    for one, other in zip(*gradients, strict=True):
        close(one, other, tolerance)


def check_gradients(
    recording: dict[str, Tensor], output: Tensor, leaves: dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    """The gradients of the output by the leaves, which have the recording's names, are those that were recorded."""
    gradients = torch.autograd.grad(output, list(leaves.values()), recording["grad_out"], retain_graph=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        close(gradient, recording[f"grad_{name}"], tolerance)


def check_recorded(
    recording: dict[str, Tensor], output: Tensor, leaves: dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    """The output too is the one that was recorded."""
    close(output, recording["out"], tolerance)
    check_gradients(recording, output, leaves, tolerance)


def qkv(
    n: int,
    m: int | None = None,
    *,
    batch: int = 2,
    heads: int = 2,
    groups: int | None = None,
    dim: int = 4,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Random queries (batch, heads, n, dim), and keys and values of `groups` heads and `m` tokens."""
    m, groups = n if m is None else m, heads if groups is None else groups
    shapes = {"q": (heads, n, dim), "k": (groups, m, dim), "v": (groups, m, value_dim or dim)}
    return {name: torch.randn(batch, *shape, dtype=dtype) for name, shape in shapes.items()}


def cut(inputs: dict[str, Tensor], part: slice | Tensor, names: Sequence[str] = ("q", "k", "v")) -> dict[str, Tensor]:
    """The tokens `part` of the inputs called `names`, (B, H, tokens, ...); the others as they are."""
    return {name: x[:, :, part] if name in names else x for name, x in inputs.items()}


def calls(mechanism: Mechanism, pattern: str = "causal-self") -> Callable[..., Result]:
    """`run(inputs, options=None, **call)`: the mechanism with some options, in `pattern` unless the call says another."""
    default = pattern

    def run(inputs: dict[str, Tensor], options: dict[str, Any] | None = None, **call: Any) -> Result:
        call = {"pattern": default, "config": mechanism.config(**(options or {})), **call}
        return apply(mechanism, inputs, **call)

    return run


def in_pieces(
    read: Callable[[Any, Any], Result], pieces: Iterable[Any], state: Any = None, axis: int = 2
) -> tuple[Tensor, Any]:
    """Outputs of `read(piece, state)`, where each piece goes on from the state before it, in one, and the last state."""
    outputs = []
    for piece in pieces:
        result = read(piece, state)
        outputs.append(result.output)
        state = result.state
    return torch.cat(outputs, axis), state


def read_in_pieces(module: nn.Module, x: Tensor, sizes: int | list[int], state: Any = None) -> tuple[Tensor, Any]:
    """The same of a layer or a model that reads pieces of these sizes."""
    return in_pieces(lambda piece, s: module(piece, state=s, context=WANT_STATE), x.split(sizes, 1), state, 1)


def in_steps(layer: Any, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Outputs of a layer that takes x (B, N, D) token by token, and the last state."""
    outputs = []
    for token in x.unbind(1):
        output, state = layer.step(token, state)
        outputs.append(output)
    return torch.stack(outputs, 1), state


def saved_for_backward(run: Callable[[], Any]) -> list[int]:
    """Bytes of each storage that the backward pass of `run()` needs."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return list(storages.values())


def watched(patch: pytest.MonkeyPatch, module: Any, name: str, note: Callable[..., Any]) -> list[Any]:
    """What `note` says of the arguments of each call of a module's function, which does what it did."""
    seen, original = [], getattr(module, name)

    def run(*given: Any, **options: Any) -> Any:
        seen.append(note(*given, **options))
        return original(*given, **options)

    patch.setattr(module, name, run)
    return seen


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that an operation inside the block makes."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(found) if isinstance(x, Tensor))])
        return found


def shaken(module: nn.Module, size: float = 0.1) -> nn.Module:
    """In float64, with every parameter away from its initial value, so that none of them has no effect."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn_like(parameter)
    return module
