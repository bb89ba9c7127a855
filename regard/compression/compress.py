"""`regard.compress`: make a trained model smaller and faster, in place, by the steps of a recipe.

::

    small = regard.compress(model, "gptq:bits=4,group=32", windows)     # windows: batches for calibration
    print(small.report)
    small.save("small/")                                                # or small.undo()
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.compression.calibration import Chain, Statistics, all_statistics
from regard.compression.distillation.recovery import same_weights, teaching_loss, win_back
from regard.compression.distillation.teachers import check_teacher, open_teacher
from regard.compression.layer_work import LayerReport, compress_layer, relative_error
from regard.compression.layers import Layers, Run, find_layers, run_batch
from regard.compression.programs import Program, check_export, make_program
from regard.compression.pruning.anatomy import find_host
from regard.compression.pruning.losses import Losses, item_losses
from regard.compression.pruning.steps import Structured
from regard.compression.pruning.structure import take_parts
from regard.compression.recipes import OF_WEIGHTS, Lsq, Recipe, Rounding, read_recipe
from regard.compression.resume import begin, digest, read_block, write_block
from regard.compression.steps import Distil, Export, FewerTokens, check_program
from regard.compression.tokens.applied import let_go, settle, tokens_record
from regard.compression.weights.grids import round_to_nearest
from regard.compression.weights.learned import learn_codes
from regard.contract import Unsupported
from regard.core.files import check_folder
from regard.integrations.conv1d import conv1d_as_linear
from regard.layers.quantized import Format, QuantizedEmbedding, QuantizedLinear, replace_module
from regard.measurement import units
from regard.models.evaluating import evaluation_mode
from regard.models.weights import weights_bytes, weights_digest

HEAD_FORMAT = Format(8)


@dataclass(frozen=True)
class CompressionReport:
    """What was done to a model.

    Attributes:
        recipe: the recipe as written.
        steps: the same with all options.
        layers: the layers whose weights were changed.
        notes: what else was done, in sentences.
        kept: the reason why each other layer with a weight matrix was left as it is.
        bytes_before, bytes_after: size of parameters and saved buffers; shared tensors count once.
        batches: number of calibration batches.
        seconds: time taken.
        tokens: method and options for dropping tokens; None if all tokens stay.
        program: file, format and inputs of the program saved next to the model, and its difference from the model.
    """

    recipe: str
    steps: list[dict[str, Any]]
    layers: list[LayerReport]
    notes: list[str]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int
    batches: int
    seconds: float
    tokens: dict[str, Any] | None = None
    program: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as a dictionary for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        ratio = self.bytes_before / max(self.bytes_after, 1)
        size = f"{units.size(self.bytes_before)} to {units.size(self.bytes_after)} ({ratio:.2f} times smaller)"
        lines = [f"{self.recipe}: {size}", *(f"  {note}" for note in self.notes)]
        if self.layers:
            lines[0] += f"; {units.counted(len(self.layers), 'layer')} changed, {len(self.kept)} kept"
            worst = max(self.layers, key=lambda layer: layer.output_error or layer.error)
            lines.append(f"  largest relative error: {worst.output_error or worst.error:.3g}, of {worst.name}")
        return "\n".join(lines + [f"  kept {name}: {reason}" for name, reason in self.kept.items()])


@dataclass
class Compressed:
    """A model that was compressed in place.

    Attributes:
        model: the given model, with its layers replaced.
        report: what was done.
        program: the program that :meth:`save` writes next to the model, if the recipe exports one.
    """

    model: nn.Module
    report: CompressionReport
    program: Program | None = None
    _undo: list[Callable[[], object]] = field(repr=False, default_factory=list)

    def undo(self) -> nn.Module:
        """Restore the original model; raises Unsupported after :meth:`save`, which releases the old layers."""
        if not self._undo:
            raise Unsupported("undoing what was saved or undone", supported="undo() once, before save()")
        for one in reversed(self._undo):
            one()
        self._undo, self.program = [], None
        return self.model

    def save(self, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
        """Write the model to a folder; see :func:`regard.compression.save_compressed`."""
        from regard.compression.folders import save_compressed

        save_compressed(self, folder, tokenizer=tokenizer)
        self._undo = []


@torch.no_grad()
def compress(
    model: nn.Module,
    recipe: str | Recipe | Sequence[Any],
    data: Iterable[Any] | None = None,
    *,
    training: Iterable[Any] | None = None,
    teacher: nn.Module | None = None,
    keep: Callable[[str, nn.Module], bool] = lambda name, module: False,
    run: Run = run_batch,
    losses: Losses = item_losses,
    work: str | os.PathLike[str] | None = None,
    on_layer: Callable[[str, int, int], None] = lambda name, done, count: None,
) -> Compressed:
    """Make a model smaller in place: remove parts, set weights to 0, round weights to fewer bits, or drop tokens.

    Args:
        model: a model of regard, transformers, timm or your own, in float32 on the CPU. Linear layers are recognised by
            their class, transformers' Conv1D among them; other modules with a weight matrix are kept, and named in the
            report. Parts are removed from the models that :func:`regard.compression.pruning.find_host` knows, tokens
            from those that :mod:`regard.compression.tokens.applied` names.
        recipe: see :mod:`regard.compression.recipes`: ``"int8"``, ``"gptq:bits=4,group=32"``, a file, or a list of
            steps.
        data: batches for calibration, for recipes that need them: each is passed to `run`. Read more than once.
            ``axformer`` searches by the loss on these batches: use items that the model was not trained on and will not
            be tested on.
        training: batches that ``gates``, ``distil`` and ``lsq`` train on, one a step, in turn; `data` when not given.
        teacher: another model that each ``distil`` without a ``teacher`` of its own learns from; the original model
            when None.
        keep: called with the name and the module; returns whether a module stays as it is, with everything in it.
        run: called with the model and a batch; :func:`regard.compression.layers.run_batch` when not given.
        losses: the loss of each item of a batch, for ``axformer``, ``gates`` and ``lsq``: called with the model, the batch and
            `run`; :func:`regard.compression.pruning.item_losses` when not given.
        work: folder for finished blocks of GPTQ and AWQ, trials of ``axformer`` and the state of ``gates``,
            ``lsq`` and ``distil``, so that the same call resumes after an interruption.
        on_layer: called with the name of each finished layer or block, how many are done, and how many there are.

    Returns:
        The model and a report; `undo()` restores the layers, `save(folder)` writes the model.

    Raises:
        Unsupported: for a recipe that contradicts itself, a model without layers that can be quantized, missing data,
            and a `work` folder of another run.
    """
    chosen = read_recipe(recipe)
    started = time.monotonic()
    batches, taught = ([given] if isinstance(given, Tensor) else list(given or ()) for given in (data, training))
    taught = (taught or batches) if "training" in chosen.needs else []
    batches = batches if chosen.needs - {"training"} else []
    if (chosen.needs - {"training"} and not batches) or ("training" in chosen.needs and not taught):
        raise Unsupported(
            f"{chosen.name} without data",
            supported="batches for calibration, as windows of text",
            nearest="int8, which needs none",
        )
    teachers = _teachers(model, chosen, teacher)
    before = weights_bytes(model)
    with conv1d_as_linear(model) as undo, evaluation_mode(model):
        _check(model, chosen, keep, teachers)
        for step, (name, other) in teachers.items():
            check_teacher(model, other, name, partial(teaching_loss, model, other, step, taught[0], run))
        for _, step in chosen.steps:
            if isinstance(step, Distil) and step not in teachers and step.kind != "response":
                teaching_loss(model, model, step, taught[0], run)  # refuses layers that cannot be read
        job = _Job(model, chosen, teachers, batches, taught, run, losses, keep, on_layer, undo)
        folder = None if work is None else Path(work)
        if folder is not None:
            job.identify()
        for number, act in enumerate(chosen.acts):
            job.do(act, folder if folder is None or not number else folder / f"step-{number}")
    report = CompressionReport(
        chosen.name,
        chosen.as_list(),
        list(job.reports.values()),
        job.notes,
        job.kept,
        before,
        weights_bytes(model),
        len(job.batches or job.taught),
        time.monotonic() - started,
        tokens_record(model),
        None if job.program is None else job.program.as_dict(),
    )
    return Compressed(model, report, job.program, job.undo)


Teachers = Mapping[Distil, tuple[str, nn.Module]]
"""Teachers of steps that learn from a model other than the original, each with its display name."""


def _teachers(model: nn.Module, recipe: Recipe, given: nn.Module | None) -> Teachers:
    """Open the teachers of all steps that have one."""
    steps = [step for _, step in recipe.steps if isinstance(step, Distil)]
    if given is model:
        raise Unsupported(
            "a model as its own teacher", supported="another one", nearest="teacher=None, which learns from it"
        )
    if given is not None and not any(step.teacher is None for step in steps):
        raise Unsupported(
            f"a teacher for {recipe.name}",
            supported="recipes with a step distil that names none itself",
            nearest="distil",
        )
    found = {}
    for step in steps:
        if step.teacher is not None:
            found[step] = f"the teacher {step.teacher}", open_teacher(step.teacher, model)
        elif given is not None:
            found[step] = "the teacher", given
    return found


def _check(model: nn.Module, recipe: Recipe, keep: Callable[[str, nn.Module], bool], teachers: Teachers) -> None:
    """Raise whatever errors can be raised before anything is changed."""
    if recipe.changes_weights:
        find_layers(model, keep)
    first, begins = recipe.steps[0]
    if begins.stage == "structure" or (begins.stage == "distil" and _shrinks(begins, teachers)):
        try:
            find_host(model)
        except Unsupported as error:
            if begins.stage == "structure":
                raise
            raise Unsupported(
                f"a student by {first}: {error.asked}",
                supported=error.supported,
                nearest="distil after a step that makes weights 0 or rounds them",
            ) from None
    for _, step in recipe.steps:
        if isinstance(step, Distil) and step.cache is not None:
            check_folder(Path(step.cache))
        if isinstance(step, Export):
            check_export(step, model)
        if isinstance(step, FewerTokens):
            method = settle(model, step)
            if recipe.steps[-1][1].stage == "export":
                check_program(method)


def _shrinks(step: Distil, teachers: Teachers) -> bool:
    """Return whether a step, coming first, makes a student of only some of the layers."""
    return step.layers is not None or step not in teachers


class _Job:
    """One call of :func:`compress`, and its progress."""

    layers: Layers

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        teachers: Teachers,
        batches: list[Any],
        taught: list[Any],
        run: Run,
        losses: Losses,
        keep: Callable[[str, nn.Module], bool],
        on_layer: Callable[[str, int, int], None],
        undo: list[Callable[[], object]],
    ) -> None:
        self.model, self.recipe, self.teachers, self.batches, self.taught = model, recipe, teachers, batches, taught
        self.run, self.losses, self.keep, self.on_layer, self.undo = run, losses, keep, on_layer, undo
        self.kept: dict[str, str] = {}
        self.reports: dict[str, LayerReport] = {}
        self.notes: list[str] = []
        self.identity: dict[str, Any] = {}
        self.program: Program | None = None
        distils = any(isinstance(step, Distil) and step not in teachers for _, step in recipe.steps)
        self.original = same_weights(model) if distils else None

    def do(self, act: Recipe, folder: Path | None) -> None:
        """Do steps that belong together."""
        step = act.steps[0][1]
        if step.stage in OF_WEIGHTS:
            self.work(act, find_layers(self.model, self.keep), folder)
        elif isinstance(step, Distil):
            self.distil(step, folder)
        elif isinstance(step, FewerTokens):
            self._done(*let_go(self.model, step, self.batches, self.run))
        elif isinstance(step, Export):
            rounding = self.recipe.rounding
            rounds = rounding is not None and rounding.format.dynamic
            self.program = make_program(self.model, step, self.batches[0], self.run, rounds=rounds)
            self._done(lambda: None, str(self.program))
        else:
            self.take_parts(step, folder)

    def _done(self, undo: Callable[[], object], *notes: str) -> None:
        self.undo.append(undo)
        self.notes += notes

    def distil(self, step: Distil, folder: Path | None) -> None:
        """Train the model on the answers of the original or of another teacher; as the first step, shrink it before."""
        name, teacher = self.teachers.get(step, ("the original", self.original))
        assert teacher is not None
        if self.recipe.steps[0][1] is step and _shrinks(step, self.teachers):
            layers = len(find_host(self.model).layers)
            stay = max(layers // 2, 1) if step.layers is None else step.layers
            if stay >= layers:
                raise Unsupported(
                    f"a student of {stay} layers, distilled from {layers}",
                    supported="fewer layers than the model has",
                    nearest="distil after a step that takes something away",
                )
            self.take_parts(Structured(layers=layers - stay, layers_by="even"), None)
        if folder is not None:
            begin(folder, self.identity)
        zeros = [name for name, report in self.reports.items() if report.zeros is not None]
        undo, note = win_back(
            self.model,
            teacher,
            step,
            self.taught,
            self.run,
            keep=self.keep,
            name=name,
            zeros=zeros,
            folder=folder,
            on_step=lambda done: self.on_layer("distil step", done, step.steps),
        )
        self._done(undo, note)

    def take_parts(self, step: Any, folder: Path | None) -> None:
        """Do a step that removes parts of the model."""
        if folder is not None and {"loss", "training"} & set(step.needs):
            find_host(self.model)  # refused before anything is written
            begin(folder, self.identity)
        batches = self.taught if "training" in step.needs else self.batches
        undo, notes = take_parts(self.model, step, batches, self.run, self.losses, self.keep, self.on_layer, folder)
        self._done(undo, *notes)

    def work(self, act: Recipe, layers: Layers, folder: Path | None) -> None:
        """Compress all layers, and the head."""
        self.layers = layers
        self.kept |= layers.kept
        if isinstance(act.rounding, Lsq):
            self._learned(act.rounding, folder)
        elif {"second", "squares"} & act.needs:
            self._by_group(act, folder)
        else:
            self._at_once(act)
        if act.masking is not None:
            zeros = [report.zeros for report in self.reports.values() if report.zeros is not None]
            share = sum(zeros) / max(len(zeros), 1)
            self.notes.append(
                f"{share:.1%} of each layer's weights are 0 on average, which does not make the model faster or smaller"
            )
        if act.rounding is not None:
            self._head(act.rounding)

    def _compressed(
        self, act: Recipe, name: str, linear: nn.Linear, statistics: Statistics | None
    ) -> tuple[nn.Linear | QuantizedLinear, LayerReport]:
        """Compress a layer, preserving the zeros that earlier steps made."""
        before = self.reports.get(name)
        stays = None if before is None or before.zeros is None else linear.weight.detach() != 0
        return compress_layer(name, linear, act, statistics, mask=stays)

    def _at_once(self, act: Recipe) -> None:
        body = self.layers.body
        found: Mapping[str, Statistics | None] = dict.fromkeys(body)
        if "range" in act.needs:
            found = all_statistics(self.model, body, self.batches, self.run, second=False)
        for i, (name, linear) in enumerate(body.items()):
            if name not in found:
                self.kept[name] = "no calibration data reach it"
                continue
            self._replace(linear, *self._compressed(act, name, linear, found[name]))
            self.on_layer(name, i + 1, len(body))

    def _by_group(self, act: Recipe, folder: Path | None) -> None:
        body = self.layers.body
        chain = Chain.of(self.model, body, self.batches, self.run)
        if folder is not None:
            begin(folder, self.identity)
        for i, (block, stages) in enumerate(chain.groups):
            file = None if folder is None else folder / f"block-{i:04}.safetensors"
            if file is not None and file.is_file():
                for linear, made, report in read_block(file, body):
                    self._replace(linear, made, report)
            else:
                block_layers = []
                for stage in range(len(stages)):
                    statistics = chain.statistics(i, stage, body, second="second" in act.needs)
                    made_layers = [self._compressed(act, name, body[name], one) for name, one in statistics.items()]
                    for new, report in made_layers:
                        self._replace(body[report.name], new, report)
                    block_layers += made_layers
                if file is not None:
                    write_block(file, block_layers)
                chain.finish(i)
            self.on_layer(block, i + 1, len(chain.groups))
        for name in body.keys() - chain.calls.keys():
            self.kept[name] = "no calibration data reach it"

    def _learned(self, step: Lsq, folder: Path | None) -> None:
        """Quantize layers whose grids are learned by training the whole model."""
        if folder is not None:
            begin(folder, self.identity)
        body, format = self.layers.body, step.format
        found, note = learn_codes(
            self.model,
            body,
            format,
            self.taught,
            self.run,
            self.losses,
            steps=step.steps,
            learning_rate=step.learning_rate,
            folder=folder,
            on_step=lambda done: self.on_layer("step", done, step.steps),
        )
        self.notes.append(note)
        for name, linear in body.items():
            made = QuantizedLinear.of(linear, found[name], format)
            self._replace(
                linear, made, LayerReport(name, str(format), relative_error(made.dequantized(), linear.weight))
            )

    def _head(self, rounding: Rounding) -> None:
        name = self.layers.head
        if name is None:
            return
        if rounding.head == "keep":
            self.kept[name] = "head=keep"
            return
        linear: Any = self.model.get_submodule(name)
        codes = round_to_nearest(linear.weight, HEAD_FORMAT, rounding.calibrate)
        made = QuantizedLinear.of(linear, codes, HEAD_FORMAT)
        report = LayerReport(name, str(HEAD_FORMAT), relative_error(made.dequantized(), linear.weight))
        tables = [(table, self.model.get_submodule(table), factor) for table, factor in self.layers.tied.items()]
        self._replace(linear, made, report)
        for table, old, factor in tables:
            words = f"{HEAD_FORMAT}, looked up in the codes of {name}"
            self._replace(old, QuantizedEmbedding(made, factor), LayerReport(table, words, report.error))

    def _replace(self, old: nn.Module, new: nn.Module, report: LayerReport) -> None:
        replace_module(self.model, old, new)
        self.undo.append(lambda: replace_module(self.model, new, old))
        self.reports[report.name] = report

    def identify(self) -> None:
        """Record what a resumed run must have in common with the one that was stopped."""
        self.identity = {
            "recipe": self.recipe.as_list(),
            "model": weights_digest(self.model),
            "data": digest(self.batches),
            "training": digest(self.taught),
            "teachers": [weights_digest(teacher) for _, teacher in self.teachers.values()],
        }
