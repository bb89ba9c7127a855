"""The recipe step ``export``: an exported program of the compressed model, checked against the model, for its folder.

A program takes the tensors of a batch, with any number of items and, for token ids, any length if the model allows it,
and returns the model's answers. It reads whole sequences: language models have no cache in it. Weights keep their
storage format: 8-bit codes stay 8-bit codes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.compression.layers import Run, answers_of
from regard.compression.steps import Export
from regard.contract import Unsupported, an_instance
from regard.core.files import write_atomically
from regard.integrations.export import check_packages, refuse_waived, without_warnings
from regard.integrations.onnx_forms import as_onnx
from regard.models.weights import weights_bytes
from regard.tasks.protocol import Batch

FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
LARGEST_ONNX = 2_000_000_000
"""The most bytes that one ONNX file can hold."""
CLOSE = {False: 1e-3, True: 3e-2}
"""The largest difference from the model, as a share of its largest output; more where inputs are rounded, since an
input that falls on the other side of a rounding threshold moves by a whole step."""


@dataclass(frozen=True)
class Program:
    """An exported program that is saved with a compressed model.

    Attributes:
        format: see :class:`regard.compression.steps.Export`.
        file: its file name, next to the weights.
        difference: the largest difference from the model's outputs, as a share of the largest output.
        inputs: names and shapes of the inputs; None for sizes that may vary.
        checked_with: the runtime that checked it.
    """

    format: str
    file: str
    difference: float
    inputs: dict[str, list[int | None]]
    checked_with: str
    _write: Callable[[Path], object] = dataclasses.field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dictionary for JSON."""
        return {key: value for key, value in asdict(dataclasses.replace(self, _write=print)).items() if key != "_write"}

    def save(self, folder: Path) -> None:
        """Write the program's file to a folder."""
        write_atomically(folder / self.file, self._write)

    def __str__(self) -> str:
        shapes = ", ".join(
            f"{name} ({', '.join('any' if size is None else str(size) for size in sizes)})"
            for name, sizes in self.inputs.items()
        )
        return f"program {self.file} of {shapes}: within {self.difference:.1e} of the model's largest output, by {self.checked_with}"


class _Answers(nn.Module):
    """A model wrapped to take a batch's tensors and return one tensor."""

    def __init__(self, model: nn.Module, batch: Any, run: Run) -> None:
        super().__init__()
        self.model, self.batch, self.run = model, batch, run

    def forward(self, *tensors: Tensor) -> Tensor:
        return _tensor(self.run(self.model, _filled(self.batch, tensors)))


def check_export(step: Export, model: nn.Module) -> None:
    """Raise Unsupported if no program can be made, before any work is done."""
    if step.format == "onnx":
        check_packages()
        refuse_waived(model, "layer_onnx", "an ONNX program", "export:format=torch")
        if weights_bytes(model) > 4 * LARGEST_ONNX:
            raise Unsupported(
                "an ONNX program of so large a model", supported="files of 2 GB", nearest="export:format=torch"
            )


@torch.no_grad()
def make_program(model: nn.Module, step: Export, batch: Any, run: Run, *, rounds: bool) -> Program:
    """Export a model in evaluation mode, and check the program against it.

    Args:
        batch: an example of what the model is called with.
        rounds: whether the model rounds inputs.

    Raises:
        Unsupported: for a model that the exporter refuses, with its message, and for a program whose outputs differ.
    """
    if step.format == "onnx":
        refuse_waived(model, "layer_onnx", "an ONNX program", "export:format=torch")
        if weights_bytes(model) > LARGEST_ONNX:
            raise Unsupported("an ONNX program of more than 2 GB", supported="less", nearest="export:format=torch")
    batch = _without_targets(batch)
    # the exporter would treat a batch size of one as a constant
    tensors = {name: torch.cat([x, x]) if x.shape[:1] == (1,) else x for name, x in _inputs(batch).items()}
    answers = _Answers(model, batch, run).eval()
    given = tuple(tensors.values())
    auto: Any = torch.export.Dim.AUTO
    shapes = tuple({axis: auto for axis in range(min(x.ndim, 1 if x.is_floating_point() else 2))} for x in given)
    try:
        with without_warnings(), _quiet():
            program = torch.export.export(answers, given, dynamic_shapes=(shapes,), strict=False)
            onnx = (
                as_onnx(program, input_names=list(tensors), output_names=["output"]) if step.format == "onnx" else None
            )
    except Exception as error:
        raise Unsupported(
            f"a program of this {type(model).__name__} ({_first_line(error)})",
            supported="models and steps that torch.export traces: weights in 8 or 4 bits, zeros, parts taken away, fewer patches",
            nearest="the recipe without export",
        ) from error
    free = [axis for axis in (0, 1) if _takes(program.module(), answers, given, shapes, axis)]
    called, by = (_of_onnx(onnx), _runner()) if onnx is not None else (program.module(), "torch.export")
    difference = max(_difference(called, answers, tried) for tried in (given, _longer(given, shapes, free)))
    if not difference <= CLOSE[rounds]:
        raise Unsupported(
            f"a program whose outputs differ from the model's by {difference:.2g} of the largest",
            supported=f"{CLOSE[rounds]:g} at the most",
            nearest="export:format=torch" if step.format == "onnx" else "the recipe without export",
        )
    sizes = {
        name: [None if axis in free and axis in axes else int(size) for axis, size in enumerate(x.shape)]
        for (name, x), axes in zip(tensors.items(), shapes, strict=True)
    }

    def write(path: Path) -> None:
        with without_warnings(), _quiet():
            if onnx is not None:
                onnx.save(str(path))
            else:
                buffer = io.BytesIO()
                torch.export.save(program, buffer)
                path.write_bytes(buffer.getvalue())

    return Program(step.format, FILES[step.format], difference, sizes, by, write)


def remove_programs(folder: Path) -> None:
    """Remove the programs of an earlier save."""
    for name in FILES.values():
        (folder / name).unlink(missing_ok=True)


def _without_targets(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != "labels"}
    return batch


def _inputs(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch that a program takes, by name."""
    if isinstance(batch, Tensor):
        return {"input": batch}
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if isinstance(batch, Batch):
        names = ("inputs", "valid", "memory", "memory_valid")
        return {name: value for name in names if isinstance(value := getattr(batch, name), Tensor)}
    return {f"input_{i}": value for i, value in enumerate(batch) if isinstance(value, Tensor)}


def _filled(batch: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the batch with other tensors."""
    if isinstance(batch, Tensor):
        return tensors[0]
    new: dict[str, Any] = dict(zip(_inputs(batch), tensors, strict=True))
    if isinstance(batch, Mapping):
        return {**batch, **new}
    if isinstance(batch, Batch):
        return dataclasses.replace(batch, **new)
    return tuple(new.get(f"input_{i}", value) for i, value in enumerate(batch))


def _tensor(found: Any) -> Tensor:
    answers = answers_of(found)
    if answers is not None:
        return answers
    raise Unsupported(f"a program of a model that returns {an_instance(found)}", supported="logits or hidden states")


def _longer(given: Sequence[Tensor], shapes: Sequence[Mapping[int, Any]], axes: Sequence[int]) -> tuple[Tensor, ...]:
    """The same tensors with one more item (axis 0) or token (axis 1), on those of `axes` where their sizes may vary."""
    found = list(given)
    for axis in axes:
        found = [
            torch.cat([x, x.narrow(axis, 0, 1)], axis) if axis in own else x
            for x, own in zip(found, shapes, strict=True)
        ]
    return tuple(found)


def _takes(
    program: Callable[..., Tensor],
    answers: nn.Module,
    given: Sequence[Tensor],
    shapes: Sequence[Mapping[int, Any]],
    axis: int,
) -> bool:
    """Return whether a program takes inputs that are longer on an axis: the exporter makes some sizes constants."""
    tried = _longer(given, shapes, [axis])
    try:
        return any(axis in own for own in shapes) and program(*tried).shape == answers(*tried).shape
    except (AssertionError, RuntimeError):  # raised by the program's guards
        return False


def _difference(program: Callable[..., Tensor], answers: nn.Module, given: Sequence[Tensor]) -> float:
    """The largest difference of a program's outputs from the model's, as a share of the model's largest output."""
    expected, found = answers(*given), program(*given)
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def _runner() -> str:
    return "ONNX Runtime" if importlib.util.find_spec("onnxruntime") else "the reference of ONNX"


def _of_onnx(program: Any) -> Callable[..., Tensor]:
    proto = program.model_proto
    if _runner() == "ONNX Runtime":
        import onnxruntime

        session = onnxruntime.InferenceSession(proto.SerializeToString())
        names = [one.name for one in session.get_inputs()]
        run = session.run
    else:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(proto)
        names, run = evaluator.input_names, evaluator.run

    def called(*tensors: Tensor) -> Tensor:
        given = {name: x.detach().numpy() for name, x in zip(names, tensors, strict=True)}
        return torch.from_numpy(np.asarray(run(None, given)[0]))

    return called


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' messages about their guards, graphs and passes."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
