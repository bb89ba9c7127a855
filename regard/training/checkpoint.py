"""Checkpoints of a training run: one safetensors file, with the rest as JSON in its header; no pickle.

The file is written beside its place and moved there in one step, so that a reader or a killed writer leaves either the
old checkpoint or the new one, never half of one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from regard.contract import Unsupported

FORMAT = "regard-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: named tensors of the model and the optimizer, and a JSON record of the rest."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    record: dict[str, Any]


def named_parameters_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in its own order, by which its state is keyed."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def distinct_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with each storage once (the first name of tied weights), contiguous and detached."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach().contiguous()
    return found


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], *, source: str) -> None:
    """Copy `tensors` (as made by :func:`distinct_tensors`) into `module`; raises Unsupported unless they fit exactly."""
    wanted = distinct_tensors(module)
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
                tensor.copy_(tensors[name])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary_path)`` and move the result to `path` in one step, through to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, record: dict[str, Any]
) -> None:
    """Write model, optimizer and a JSON-serialisable `record` to `path`, replacing it atomically."""
    tensors = {f"model.{name}": tensor for name, tensor in distinct_tensors(model).items()}
    names = named_parameters_of(model, optimizer)
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            tensors[f"optimizer.{names[index]}.{key}"] = torch.as_tensor(value).detach().contiguous()
    metadata = {"format": FORMAT, "record": json.dumps(record)}
    write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint onto the CPU; raises Unsupported when the file is not one."""
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise Unsupported(f"{path} of format {metadata.get('format')!r} as a checkpoint", supported=FORMAT)
            for name in file.keys():  # noqa: SIM118: a safetensors file is not a mapping
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise Unsupported(f"{path} as a checkpoint ({error})", supported="a file written by save_checkpoint") from error

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    return Checkpoint(part("model."), part("optimizer."), json.loads(metadata["record"]))


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors into `model` and `optimizer`; raises Unsupported unless they fit exactly."""
    load_tensors(model, checkpoint.model, source="a checkpoint")
    state: dict[int, dict[str, Tensor]] = {}
    places = {name: index for index, name in enumerate(named_parameters_of(model, optimizer))}
    for name, tensor in checkpoint.optimizer.items():
        parameter, _, key = name.rpartition(".")
        if parameter not in places:
            raise Unsupported(f"a checkpoint with optimizer state of {parameter!r}", supported="the same parameters")
        state.setdefault(places[parameter], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
