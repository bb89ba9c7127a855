"""Helpers for all tests: recordings of other code, random inputs, calls, and comparisons of tensors."""

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
ALL = bool(os.environ.get("REGARD_TEST_ALL"))
"""Whether this is `make test-all`."""
GRAPH = "aot_eager" if ALL else "eager"
"""Backend that compiles models built from mechanisms. "eager" runs the captured graph as it is, which is twice as fast to
compile as with AOTAutograd; mechanisms and their operators go through AOTAutograd in tests of their own."""


def load(name: str) -> dict[str, Tensor]:
    """Load tensors recorded from another implementation; `tests/parity` says which one, and by what call."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "shapes"}


def recorded_state(name: str) -> dict[str, Tensor]:
    """Weights of a model whose outputs were recorded, made from a seed and the recorded names and shapes."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return seeded_state(json.loads(str(arrays["shapes"])))


def seeded_state(shapes: dict[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """Weights of a model by name, drawn from a seed in the order of names, so that they need not be recorded."""
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
    """Assert equal shape and dtype, and differences of at most `tolerance` times the largest expected value."""
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    assert math.isfinite(size), "infinite or NaN where a number is expected"
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * (size or 1.0))


def refused(words: str, call: Callable[..., Any], /, *given: Any, **options: Any) -> None:
    """Assert that a call raises Unsupported with a message that matches `words`, a regular expression."""
    with pytest.raises(Unsupported, match=words):
        call(*given, **options)


def close_gradients(
    found: Tensor, expected: Tensor, leaves: Sequence[Tensor] | dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    """Assert that outputs are close, and their gradients with respect to all leaves for a random output gradient."""
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
    """Assert that the gradients of the output with respect to the leaves (named as recorded) are the recorded ones."""
    gradients = torch.autograd.grad(output, list(leaves.values()), recording["grad_out"], retain_graph=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        close(gradient, recording[f"grad_{name}"], tolerance)


def check_recorded(
    recording: dict[str, Tensor], output: Tensor, leaves: dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    """Assert that the output and its gradients are the recorded ones."""
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
    """Cut the inputs called `names`, (B, H, tokens, ...), to the tokens `part`; keep the others as they are."""
    return {name: x[:, :, part] if name in names else x for name, x in inputs.items()}


def calls(mechanism: Mechanism, pattern: str = "causal-self") -> Callable[..., Result]:
    """`run(inputs, options=None, **call)`: runs the mechanism with these options, in `pattern` unless `call` has another."""
    default = pattern

    def run(inputs: dict[str, Tensor], options: dict[str, Any] | None = None, **call: Any) -> Result:
        call = {"pattern": default, "config": mechanism.config(**(options or {})), **call}
        return apply(mechanism, inputs, **call)

    return run


def in_pieces(
    read: Callable[[Any, Any], Result], pieces: Iterable[Any], state: Any = None, axis: int = 2
) -> tuple[Tensor, Any]:
    """Concatenated outputs of `read(piece, state)`, each piece continuing from the previous state, and the last state."""
    outputs = []
    for piece in pieces:
        result = read(piece, state)
        outputs.append(result.output)
        state = result.state
    return torch.cat(outputs, axis), state


def read_in_pieces(module: nn.Module, x: Tensor, sizes: int | list[int], state: Any = None) -> tuple[Tensor, Any]:
    """Outputs of a layer or model that reads x in pieces of these sizes, and the last state."""
    return in_pieces(lambda piece, s: module(piece, state=s, context=WANT_STATE), x.split(sizes, 1), state, 1)


def in_steps(layer: Any, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Outputs of a layer that reads x (B, N, D) token by token, and the last state."""
    outputs = []
    for token in x.unbind(1):
        output, state = layer.step(token, state)
        outputs.append(output)
    return torch.stack(outputs, 1), state


def saved_for_backward(run: Callable[[], Any]) -> list[int]:
    """Bytes of each storage that `run()` saves for its backward pass."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return list(storages.values())


def watched(patch: pytest.MonkeyPatch, module: Any, name: str, note: Callable[..., Any]) -> list[Any]:
    """Record `note(*arguments)` for each call of a module's function, which still does what it did."""
    seen, original = [], getattr(module, name)

    def run(*given: Any, **options: Any) -> Any:
        seen.append(note(*given, **options))
        return original(*given, **options)

    patch.setattr(module, name, run)
    return seen


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation inside the block returns."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(found) if isinstance(x, Tensor))])
        return found


def shaken(module: nn.Module, size: float = 0.1) -> nn.Module:
    """Convert to float64 and perturb every parameter, so that each one has an effect."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn_like(parameter)
    return module
