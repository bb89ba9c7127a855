"""What a stopped run of :func:`regard.compression.compress` needs to resume: its identity, and its finished blocks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from regard.compression.layer_work import LayerReport, with_weight
from regard.contract import Unsupported
from regard.core.files import write_atomically, write_text_atomically
from regard.layers.quantized import Format, QuantizedLinear
from regard.models.weights import distinct_tensors, load_tensors, read_tensors

RUN = "run.json"
"""File in the folder of a resumable run that identifies the run."""


def digest(batches: Any) -> str:
    """Hash all numbers in the batches."""
    found = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(str((value.shape, value.dtype)).encode())
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else b"")
        elif isinstance(value, Mapping):
            for key, one in value.items():
                found.update(str(key).encode())
                add(one)
        elif isinstance(value, tuple | list):
            for one in value:
                add(one)
        elif hasattr(value, "__dataclass_fields__"):
            add(vars(value))
        else:
            found.update(repr(value).encode())

    add(batches)
    return found.hexdigest()


def begin(folder: Path, identity: Mapping[str, Any]) -> None:
    """Create a folder for this run, or resume in it; raises Unsupported if it has the blocks of another run."""
    file = folder / RUN
    if file.is_file():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if before != json.loads(json.dumps(identity)):
            raise Unsupported(
                f"{folder}, which has the blocks of another run (other recipe, model or data)",
                supported="a new folder, or the same run again",
                nearest="another folder",
            )
        return
    write_text_atomically(file, json.dumps(identity, indent=2) + "\n")


def write_block(file: Path, made: Sequence[tuple[nn.Module, LayerReport]]) -> None:
    """Save the layers of a finished block."""
    tensors, record = dict[str, Tensor](), []
    for layer, report in made:
        entry = layer.record() if isinstance(layer, QuantizedLinear) else None
        record.append({"layer": entry, "report": asdict(report)})
        tensors |= {f"{report.name}/{key}": tensor for key, tensor in distinct_tensors(layer).items()}
    write_atomically(file, lambda path: save_file(tensors, path, metadata={"record": json.dumps(record)}))


def read_block(file: Path, body: Mapping[str, nn.Linear]) -> list[tuple[nn.Linear, nn.Module, LayerReport]]:
    """Read a saved block: for each layer the original, its replacement, and its report."""
    tensors, metadata = read_tensors(file)
    found: list[tuple[nn.Linear, nn.Module, LayerReport]] = []
    for entry in json.loads(metadata["record"]):
        report, layer = LayerReport(**entry["report"]), entry["layer"]
        old, prefix = body[report.name], f"{report.name}/"
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        made: nn.Module
        if layer is None:
            made = with_weight(old, own["weight"])
        else:
            format = Format(**{key: layer.pop(key) for key in ("bits", "group", "symmetric", "dynamic")})
            made = QuantizedLinear(**layer, format=format)
            load_tensors(made, own, source=str(file))
        found.append((old, made.train(old.training), report))
    return found
