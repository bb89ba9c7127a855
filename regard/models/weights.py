"""A module's weights as named tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from regard.contract import Unsupported


def distinct_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with each tensor once (under the first name of tied weights), contiguous and detached.

    Sharded weights are gathered to full tensors on the CPU; all ranks must then call this function.
    """
    return {name: whole(tensor.detach()).contiguous() for name, tensor in _distinct(module).items()}


def _distinct(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def weights_digest(module: nn.Module) -> str:
    """Return a digest (32 hex digits) of a module's names and values, by which a resumed run recognises its model."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in distinct_tensors(module).items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.cpu().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.hexdigest()


def weights_bytes(module: nn.Module) -> int:
    """Return the bytes of parameters and persistent buffers; shared tensors are counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct_tensors(module).values())


def sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a `DTensor`, of which this rank holds a shard."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all ranks, on the CPU; other tensors are returned as they are."""
    shared: Any = tensor
    return shared.full_tensor().cpu() if sharded(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor that every rank has, sharded like `like`."""
    if not sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like
    return distribute_tensor(tensor.to(placed.device), placed.device_mesh, placed.placements, src_data_rank=None)


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy `tensors` (as made by :func:`distinct_tensors`) into `module`; raises Unsupported unless they fit exactly."""
    wanted = _distinct(module)
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unknown:
        parts = [f"without {_some(missing)}"] * bool(missing) + [f"with unknown {_some(unknown)}"] * bool(unknown)
        raise Unsupported(f"{source} {' and '.join(parts)}", supported="the tensors of the same architecture")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise Unsupported(
                f"{source} whose {name} is {tensor.dtype} {tuple(tensor.shape)}",
                supported=f"{wanted[name].dtype} {tuple(wanted[name].shape)}",
            )
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name in tensors:
                tensor.copy_(part_of(tensors[name], tensor))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors (on the CPU) and metadata of a safetensors file; raises Unsupported if it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Unsupported(f"{path} ({error})", supported="a safetensors file") from error
