"""`regard.compress`: a trained model made smaller and faster, in place, by the steps of a recipe.

::

    small = regard.compress(model, "gptq:bits=4,group=32", windows)     # windows: batches for calibration
    print(small.report)
    small.save("small/")                                                # or small.undo()
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from regard.compression.calibration import Chain, Statistics, all_statistics
from regard.compression.layers import Layers, Run, find_layers, run_batch
from regard.compression.recipes import Awq, Gptq, LlmInt8, Recipe, SmoothQuant, read_recipe
from regard.compression.weights.gptq import gptq
from regard.compression.weights.grids import round_to_nearest
from regard.compression.weights.scaling import activation_scale, smooth_scale
from regard.contract import Unsupported
from regard.layers.quantized import Codes, Format, QuantizedEmbedding, QuantizedLinear, replace_module
from regard.measurement import units
from regard.models.blocks import evaluation_mode
from regard.models.weights import distinct_tensors, load_tensors, read_tensors, write_atomically

HEAD_FORMAT = Format(8)
RUN = "run.json"
"""In the folder of a run that goes on: what it does to what."""


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer.

    Attributes:
        name: of its module.
        format: of its weight, in words.
        error: ``||Q - W|| / ||W||``.
        output_error: ``||X Q^T - X W^T|| / ||X W^T||`` on the calibration data, where second moments of X were taken.
        alpha: the exponent that AWQ chose.
        float_columns: input columns that stayed in floating point.
    """

    name: str
    format: str
    error: float
    output_error: float | None = None
    alpha: float | None = None
    float_columns: int = 0


@dataclass(frozen=True)
class CompressionReport:
    """What was done to a model.

    Attributes:
        recipe: as it is written.
        steps: the same with all options.
        layers: those that were quantized.
        kept: why each other layer with a weight matrix was left as it is.
        bytes_before, bytes_after: of parameters and saved buffers, what is shared counted once.
        batches: of calibration.
        seconds: that it took.
    """

    recipe: str
    steps: list[dict[str, Any]]
    layers: list[LayerReport]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int
    batches: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        ratio = self.bytes_before / max(self.bytes_after, 1)
        lines = [
            f"{self.recipe}: {len(self.layers)} layers quantized, {len(self.kept)} kept; "
            f"{units.size(self.bytes_before)} to {units.size(self.bytes_after)} ({ratio:.2f} times smaller)"
        ]
        worst = max(self.layers, key=lambda layer: layer.output_error or layer.error)
        lines.append(f"  largest relative error: {worst.output_error or worst.error:.3g}, of {worst.name}")
        return "\n".join(lines + [f"  kept {name}: {reason}" for name, reason in self.kept.items()])


@dataclass
class Compressed:
    """A model that was compressed in place.

    Attributes:
        model: the model that was given, with other layers.
        report: what was done.
    """

    model: nn.Module
    report: CompressionReport
    _replaced: list[tuple[nn.Module, nn.Module]] = field(repr=False, default_factory=list)

    def undo(self) -> nn.Module:
        """The model as it was; raises Unsupported once it has been saved, since the old layers are let go then."""
        if not self._replaced:
            raise Unsupported("undoing what was saved or undone", supported="undo() once, before save()")
        for old, new in reversed(self._replaced):
            replace_module(self.model, new, old)
        self._replaced = []
        return self.model

    def save(self, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
        """Write the model to a folder; see :func:`regard.compression.save_compressed`."""
        from regard.compression.folders import save_compressed

        save_compressed(self, folder, tokenizer=tokenizer)
        self._replaced = []


@torch.no_grad()
def compress(
    model: nn.Module,
    recipe: str | Recipe | Sequence[Any],
    data: Iterable[Any] | None = None,
    *,
    keep: Callable[[str, nn.Module], bool] = lambda name, module: False,
    run: Run = run_batch,
    work: str | os.PathLike[str] | None = None,
    on_layer: Callable[[str, int, int], None] = lambda name, done, count: None,
) -> Compressed:
    """Quantize a model's linear layers in place.

    Args:
        model: of regard, transformers, timm or your own, in float32 on the processor. Linear layers are recognised by their
            class; what else has a weight matrix is kept, and named in the report.
        recipe: see :mod:`regard.compression.recipes`: ``"int8"``, ``"gptq:bits=4,group=32"``, a file, or a list of steps.
        data: batches for calibration, for recipes that want some: what `run` is called with. Read more than once.
        keep: called with the name and the module, which modules stay as they are, with all that is in them.
        run: called with the model and a batch; :func:`regard.compression.layers.run_batch` when not given.
        work: folder where finished blocks of GPTQ and AWQ are kept, so that the same call goes on after it was killed.
        on_layer: told the name of each finished layer or block, how many are done, and of how many.

    Returns:
        The model and a report; `undo()` brings the layers back, `save(folder)` writes them.

    Raises:
        Unsupported: for a recipe that contradicts itself, a model without layers that can be quantized, no data where some are
            needed, and a `work` folder of another run.
    """
    chosen = read_recipe(recipe)
    started = time.monotonic()
    layers = find_layers(model, keep)
    batches = [data] if isinstance(data, Tensor) else list(data or ())
    if chosen.needs and not batches:
        raise Unsupported(
            f"{chosen.name} without data",
            supported="batches for calibration, as windows of text",
            nearest="int8, which needs none",
        )
    before = _bytes(model)
    job = _Job(model, layers, chosen, batches if chosen.needs else [], run, on_layer)
    with evaluation_mode(model):
        try:
            job.work(None if work is None else Path(work))
        except BaseException:
            for old, new in reversed(job.replaced):
                replace_module(model, new, old)
            raise
    report = CompressionReport(
        chosen.name,
        chosen.as_list(),
        job.reports,
        job.kept,
        before,
        _bytes(model),
        len(job.batches),
        time.monotonic() - started,
    )
    return Compressed(model, report, job.replaced)


class _Job:
    """One call of :func:`compress`: which layers are done."""

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        recipe: Recipe,
        batches: list[Any],
        run: Run,
        on_layer: Callable[[str, int, int], None],
    ) -> None:
        self.model, self.layers, self.recipe, self.batches = model, layers, recipe, batches
        self.run, self.on_layer = run, on_layer
        self.kept = dict(layers.kept)
        self.replaced: list[tuple[nn.Module, nn.Module]] = []
        self.reports: list[LayerReport] = []

    def work(self, folder: Path | None) -> None:
        """All layers, and the head."""
        if "second" in self.recipe.needs:
            self._by_group(folder)
        else:
            self._at_once()
        self._head()

    def _at_once(self) -> None:
        body = self.layers.body
        found: Mapping[str, Statistics | None] = dict.fromkeys(body)
        if self.recipe.needs:
            found = all_statistics(self.model, body, self.batches, self.run, second=False)
        for i, (name, linear) in enumerate(body.items()):
            if name not in found:
                self.kept[name] = "no calibration data reach it"
                continue
            self._replace(linear, *quantize_layer(name, linear, self.recipe, found[name]))
            self.on_layer(name, i + 1, len(body))

    def _by_group(self, folder: Path | None) -> None:
        body = self.layers.body
        chain = Chain.of(self.model, body, self.batches, self.run)
        if folder is not None:
            _begin(folder, self._identity())
        for i, (block, names) in enumerate(chain.groups):
            file = None if folder is None else folder / f"block-{i:04}.safetensors"
            if file is not None and file.is_file():
                for linear, made, report in _read_block(file, body):
                    self._replace(linear, made, report)
            else:
                statistics = chain.statistics(i, body, second=True)
                block_layers = [quantize_layer(n, body[n], self.recipe, statistics[n]) for n in names]
                if file is not None:
                    _write_block(file, block_layers)
                for new, report in block_layers:
                    self._replace(body[report.name], new, report)
                chain.finish(i)
            self.on_layer(block, i + 1, len(chain.groups))
        for name in body.keys() - {name for _, names in chain.groups for name in names}:
            self.kept[name] = "no calibration data reach it"

    def _head(self) -> None:
        name = self.layers.head
        if name is None:
            return
        if self.recipe.rounding.head == "keep":
            self.kept[name] = "head=keep"
            return
        linear: Any = self.model.get_submodule(name)
        codes = round_to_nearest(linear.weight, HEAD_FORMAT, self.recipe.rounding.calibrate)
        made = QuantizedLinear.of(linear, codes, HEAD_FORMAT)
        report = LayerReport(name, str(HEAD_FORMAT), _relative(made.dequantized(), linear.weight))
        tables = [(table, self.model.get_submodule(table)) for table in self.layers.tied]
        self._replace(linear, made, report)
        for table, old in tables:
            words = f"{HEAD_FORMAT}, looked up in the codes of {name}"
            self._replace(old, QuantizedEmbedding(made), LayerReport(table, words, report.error))

    def _replace(self, old: nn.Module, new: nn.Module, report: LayerReport) -> None:
        replace_module(self.model, old, new)
        self.replaced.append((old, new))
        self.reports.append(report)

    def _identity(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one that was stopped."""
        found = hashlib.blake2b(digest_size=16)
        for name, tensor in distinct_tensors(self.model).items():
            found.update(name.encode())
            found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b"0")
        return {"recipe": self.recipe.as_list(), "model": found.hexdigest(), "data": _digest(self.batches)}


def quantize_layer(
    name: str, linear: nn.Linear, recipe: Recipe, statistics: Statistics | None
) -> tuple[QuantizedLinear, LayerReport]:
    """A linear layer on the grids of a recipe, and what it lost.

    Args:
        statistics: of its inputs, where the recipe needs them.
    """
    rounding, scaling = recipe.rounding, recipe.scaling
    format, weight = rounding.format, linear.weight.detach()
    work, second = weight, None if statistics is None else statistics.second
    scale: Tensor | None = None
    alpha: float | None = None
    columns: Tensor | None = None
    if isinstance(scaling, SmoothQuant):
        assert statistics is not None
        scale = smooth_scale(statistics.largest, weight, scaling.alpha)
    elif isinstance(scaling, Awq):
        assert statistics is not None and second is not None
        scale, alpha = activation_scale(
            statistics.mean, second, weight, lambda scaled: round_to_nearest(scaled, format, rounding.calibrate)
        )
    if scale is not None:
        work = weight * scale
    if isinstance(rounding, LlmInt8):
        assert statistics is not None
        columns = (statistics.largest >= rounding.threshold).nonzero()[:, 0]
        work = work.index_fill(1, columns, 0.0)
    codes: Codes
    if isinstance(rounding, Gptq):
        assert second is not None
        seen = second if scale is None else second / (scale[:, None] * scale)
        codes = gptq(work, seen, format, calibrate=rounding.calibrate, damping=rounding.damping, order=rounding.order)
    else:
        codes = round_to_nearest(work, format, rounding.calibrate)
    made = QuantizedLinear.of(
        linear, codes, format, input_scale=None if scale is None else 1 / scale, float_columns=columns
    )
    found = made.dequantized()
    return made, LayerReport(
        name,
        str(format),
        _relative(found, weight),
        None if second is None else _relative(found, weight, second),
        alpha,
        made.float_columns,
    )


def _relative(found: Tensor, weight: Tensor, second: Tensor | None = None) -> float:
    difference, weight = (found - weight).double(), weight.double()
    if second is None:
        lost, whole = difference.square().sum(), weight.square().sum()
    else:
        lost, whole = (((x @ second.double()) * x).sum() for x in (difference, weight))
    return float((lost.clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct_tensors(model).values())


def _digest(batches: Any) -> str:
    """Of all numbers in some batches."""
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


def _begin(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make a folder for this run, or go on in it; raises Unsupported where it has another's blocks."""
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
    write_atomically(file, lambda path: path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8"))


def _write_block(file: Path, made: Sequence[tuple[QuantizedLinear, LayerReport]]) -> None:
    tensors, record = dict[str, Tensor](), []
    for layer, report in made:
        record.append({"layer": layer.record(), "report": asdict(report)})
        tensors |= {f"{report.name}/{key}": tensor for key, tensor in distinct_tensors(layer).items()}
    write_atomically(file, lambda path: save_file(tensors, path, metadata={"record": json.dumps(record)}))


def _read_block(file: Path, body: Mapping[str, nn.Linear]) -> list[tuple[nn.Linear, QuantizedLinear, LayerReport]]:
    tensors, metadata = read_tensors(file)
    found = []
    for entry in json.loads(metadata["record"]):
        report, layer = LayerReport(**entry["report"]), dict(entry["layer"])
        format = Format(**{key: layer.pop(key) for key in ("bits", "group", "symmetric", "dynamic")})
        made = QuantizedLinear(**layer, format=format)
        prefix = f"{report.name}/"
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        load_tensors(made, own, source=str(file))
        found.append((body[report.name], made.train(body[report.name].training), report))
    return found
