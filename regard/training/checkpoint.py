"""Checkpoints of a training run: one safetensors file, with a JSON record in its header; no pickle.

The file is written under a temporary name and then moved into place atomically, so that even if the writer is killed,
there is either the old checkpoint or the new one, never half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from regard.contract import Unsupported
from regard.core.files import write_atomically
from regard.models.weights import distinct_tensors, load_tensors, part_of, read_tensors, whole

FORMAT = "regard-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint: named tensors and a JSON record of the rest.

    The tensors are those of the model, the optimizer and the weight average (empty if there is none).
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]
    record: dict[str, Any]


def named_parameters_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters in the order by which its state is indexed."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    record: dict[str, Any],
    average: Mapping[str, Tensor] | None = None,
    *,
    write: bool = True,
) -> None:
    """Write model, optimizer, weight average and a JSON-serialisable `record` to `path`, replacing it atomically.

    Sharded weights are gathered to full tensors: all ranks must call this function, and one of them with `write`.
    """
    tensors = {f"model.{name}": tensor for name, tensor in distinct_tensors(model).items()}
    tensors |= {f"average.{name}": tensor for name, tensor in (average or {}).items()}
    names = named_parameters_of(model, optimizer)
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            tensors[f"optimizer.{names[index]}.{key}"] = whole(torch.as_tensor(value).detach()).contiguous()
    metadata = {"format": FORMAT, "record": json.dumps(record)}
    if write:
        write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint onto the CPU; raises Unsupported if the file is not a checkpoint."""
    tensors, metadata = read_tensors(Path(path))
    if metadata.get("format") != FORMAT:
        raise Unsupported(f"{path} of format {metadata.get('format')!r} as a checkpoint", supported=FORMAT)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    try:
        record = json.loads(metadata.get("record", ""))
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    return Checkpoint(part("model."), part("optimizer."), part("average."), record)


def damaged(path: str | os.PathLike[str], why: object) -> Unsupported:
    """Return the error for a damaged checkpoint."""
    return Unsupported(
        f"{path}, a checkpoint that is damaged ({why})",
        supported="a file as save_checkpoint left it",
        nearest="resume=False, which starts anew",
    )


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's tensors into `model` and `optimizer`; raises Unsupported unless they fit exactly."""
    load_tensors(model, checkpoint.model, source="a checkpoint")
    state: dict[int, dict[str, Tensor]] = {}
    places = {name: index for index, name in enumerate(named_parameters_of(model, optimizer))}
    parameters = dict(model.named_parameters())
    for name, tensor in checkpoint.optimizer.items():
        parameter, _, key = name.rpartition(".")
        if parameter not in places:
            raise Unsupported(f"a checkpoint with optimizer state of {parameter!r}", supported="the same parameters")
        like = parameters[parameter]
        if tensor.shape not in (torch.Size(), like.shape):
            raise Unsupported(
                f"a checkpoint whose {key} of {parameter} is {tuple(tensor.shape)}",
                supported=f"{tuple(like.shape)}, as the parameter",
            )
        state.setdefault(places[parameter], {})[key] = part_of(tensor, like) if tensor.shape == like.shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
