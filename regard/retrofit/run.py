"""The retrofit of a model: all stages, and the output folder."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regard.contract import Unsupported
from regard.core.files import is_same_place, write_text_atomically
from regard.measurement import provenance
from regard.measurement.budget import Budget
from regard.measurement.units import counted
from regard.retrofit import card
from regard.retrofit.best import Best
from regard.retrofit.folder import RECORD, Folder
from regard.retrofit.hosts import Host, open_host
from regard.retrofit.hosts.base import EQUAL, SAME
from regard.retrofit.important import check_importance, head_importance, most_important, sharing
from regard.retrofit.inserting import inserts_tokens
from regard.retrofit.measures import KINDS, evaluate
from regard.retrofit.pace import PROBES, TRIED, Plan, plan
from regard.retrofit.sensitivity import Known, choose, measure_sensitivity
from regard.retrofit.settings import RetrofitSettings, advising, told_of_start
from regard.retrofit.stage import Progress, Stage, Watch
from regard.retrofit.transfer import held_out_losses, transfer
from regard.retrofit.tune import check_train, held_out_loss, tune
from regard.tasks.documents import Paths
from regard.version import VERSION

Say = Callable[[str], None]


@dataclass(frozen=True)
class Retrofit:
    """The result of a retrofit.

    Attributes:
        folder: output folder with the model, its tokenizer, a README and ``retrofit.json``.
        model: a model of transformers or timm, in evaluation mode.
        tokenizer: a tokenizer of transformers; None if there was none.
        record: the contents of ``retrofit.json``: the original model, the changes, the training data, and the results.
    """

    folder: Path
    model: Any
    tokenizer: Any
    record: dict[str, Any]

    @property
    def swapped(self) -> list[int]:
        """Numbers of the layers with new attention."""
        return self.record["swapped"]

    @property
    def results(self) -> dict[str, Any]:
        """Measurements of the original model and of the retrofit."""
        return self.record["results"]

    @property
    def recommendation(self) -> str:
        """The recommendation for or against the retrofit, in a sentence or two."""
        return self.record["recommendation"]["text"]


def retrofit(
    model: Any,
    mechanism: str,
    *,
    data: Paths | Tensor,
    output: str | os.PathLike[str],
    keep_layers: str | Sequence[int] | None = None,
    budget: str | Budget = "60m",
    validation: Paths | Tensor | None = None,
    tokenizer: Any = None,
    watch: Watch = lambda progress: None,
    say: Say = lambda sentence: None,
    **settings: Any,
) -> Retrofit:
    """Replace the attention in layers of a pretrained model, retrain it, and compare it with the original.

    Stages: layer sensitivity (each layer is swapped alone, after a few steps); attention transfer (each new layer
    learns the old one's output); training of the whole model on the teacher's answers; evaluation. The same call
    resumes after an interruption, and with a budget of tokens or steps the result is the same as without one.

    Args:
        model: a causal language model or an encoder of transformers, or a vision transformer of timm, which is not
            modified; a folder that holds one; a GGUF file; or ``timm:NAME`` for pretrained weights of timm.
        mechanism: the mechanism of the new layers, with options as in ``local:window=64``.
        data: the user's text (files and folders, or token ids (n,)), or for vision transformers a folder of images,
            with or without a sub-folder for each class, or images (n, c, h, w) normalised for the model. A tenth is
            held out.
        output: the output folder, new or from the same retrofit.
        keep_layers: layers that keep their attention: ``auto:0.5``, ``auto:22``, numbers, or ``none``; ``auto:0.5`` when
            None, and ``none`` for a mechanism that inserts tokens.
        budget: time for everything (``60m``), or tokens (``2M tokens``) or steps of training.
        validation: data from another source, evaluated separately.
        tokenizer: a tokenizer of transformers; the folder's when None.
        watch: called with the progress.
        say: called with sentences as stages end.
        settings: other fields of :class:`regard.retrofit.settings.RetrofitSettings`.

    Raises:
        Unsupported: before any training, for a model, mechanism, text, budget or folder that is not suitable.
    """
    started = time.monotonic()
    asked = read_settings(mechanism, keep_layers, budget, settings)
    place = Path(output)
    if isinstance(model, (str, os.PathLike)) and is_same_place(Path(model), place):
        raise Unsupported(f"{place} as both model and output", supported="an output folder of its own")
    host = open_host(model, tokenizer, say)
    spent = time.monotonic() - started
    (run,) = planned(host, [asked], [place], data=data, validation=validation, watch=watch, say=say, spent=spent)
    return run.finish()


def read_settings(
    mechanism: str, keep_layers: str | Sequence[int] | None, budget: str | Budget, others: Mapping[str, Any]
) -> RetrofitSettings:
    """The settings of a retrofit as :func:`retrofit` takes them; raises Unsupported for those that do not exist."""
    if keep_layers is None:
        keep_layers = "none" if inserts_tokens(mechanism) else RetrofitSettings.keep_layers
    keep = keep_layers if isinstance(keep_layers, str) else tuple(keep_layers)
    parsed = budget if isinstance(budget, Budget) else Budget.parse(budget)
    unknown = set(others) - set(RetrofitSettings.__dataclass_fields__)
    if unknown:
        raise Unsupported(
            f"setting {min(unknown)!r} of a retrofit", supported=", ".join(RetrofitSettings.__dataclass_fields__)
        )
    return RetrofitSettings(mechanism, keep, parsed, **others)


def planned(
    host: Host,
    asked: Sequence[RetrofitSettings],
    places: Sequence[Path],
    *,
    data: Paths | Tensor | None,
    validation: Paths | Tensor | None = None,
    watch: Watch,
    say: Say,
    spent: float = 0.0,
) -> list[Run]:
    """Check and plan retrofits of a model, which differ in their mechanism alone, without writing or training anything.

    Args:
        asked: the settings of each.
        places: the output folder of each.
        data: text or images; the sources of Python's standard library when None, for models of text.
        spent: seconds that each has taken so far.

    Raises:
        Unsupported: for a mechanism, setting, text, budget or folder that is not suitable, whichever it is of.
    """
    started = time.monotonic()
    host = host.extended(asked[0].positions)
    begun = [host.begun(each) for each in asked]
    read = host.read(data, validation, max(begun, key=lambda each: each.length or 0))
    given = {"model": host.fingerprint(), "data": read.digest()}
    folders = [Folder(place, {**given, **each.identity()}) for place, each in zip(places, begun, strict=True)]
    spent += (time.monotonic() - started) / len(asked)
    runs = []
    for before, settings, folder in zip(asked, begun, folders, strict=True):
        if settings.mechanism != before.mechanism:
            say(told_of_start(before.mechanism, settings.mechanism))
        watch(Progress("looking at the model", math.nan, 0, 0, 0.0))
        its_plan = _plan(host, read, settings, folder, say, spent)
        runs.append(Run(host, read, settings, folder, its_plan, watch, say))
    return runs


def _plan(host: Host, data: Any, settings: RetrofitSettings, folder: Folder, say: Say, spent: float) -> Plan:
    """The plan in a folder; for a new one, made after a look at the model with new layers."""
    every = settings.changeable(len(host.layers))
    if (known := folder.read("plan")) is not None:
        return Plan(**{"changeable": every, "probes": PROBES[0], **known})  # earlier versions do not name them
    started, stages = time.monotonic(), settings.stages
    difference, beyond, able = _look_at(host, data, settings)
    if difference <= EQUAL:
        say(_nothing_new(host, data, settings, beyond))
        stages = ("tune",)  # no step on the old outputs could be kept, since none is as near to them as the start
    found = plan(host, data, settings, spent + time.monotonic() - started, able, stages)
    if others := [number for number in every if number not in able]:
        say(f"kept, since {settings.mechanism} cannot replace their attention: {card.named(others)}")
    return found


def _nothing_new(host: Host, data: Any, settings: RetrofitSettings, beyond: float) -> str:
    """A message for new layers that initially compute the same as the old ones.

    Args:
        beyond: how far they are from the old ones in the longest text of the evaluation.
    """
    same = f"new layers of {settings.mechanism} compute the same as the old ones"
    so = "so there is nothing to learn from the original, and no attention transfer"
    if beyond > SAME:
        return f"in blocks of {settings.length} tokens {same}, {so}; use a longer --length, since they differ in longer texts"
    advice = "; use --distil 0 to learn from the data" if settings.distil == 1 and host.knows_answers(data) else ""
    return f"{same} in all that is read here, {so}{advice}"


def _look_at(host: Host, data: Any, settings: RetrofitSettings) -> tuple[float, float, list[int]]:
    """How far a model with new, untrained layers is from the original in training and in the longest text of the
    evaluation, and the layers that can be new. Where layers are chosen, those that cannot be new are left out.

    Raises:
        Unsupported: if a model with new layers cannot read what it has to read.
    """
    check_train(host, settings)
    check_importance(host, data, settings)
    first, numbers = host.batch(data, 0, settings.seed, settings, rows=1), settings.changeable(len(host.layers))

    def tried(numbers: list[int]) -> tuple[float, float, list[int]]:
        with advising(settings.mechanism, host.reads_at_most(settings)):
            difference = host.check(first, settings.mechanism, numbers)
        return difference, host.check_longest(data, settings, numbers), numbers

    def can(number: int) -> bool:
        try:
            tried([number])
        except Unsupported:
            return False
        return True

    try:
        return tried(numbers)
    except Unsupported as error:
        able = [] if settings.inserts else _those(can, numbers, host)
        if not able or able == numbers:
            raise
        if not settings.chosen:
            kept = tuple(layer.number for layer in host.layers if layer.number not in able)
            nearest = " or ".join(filter(None, (error.nearest, f"keep_layers={kept}")))
            raise Unsupported(error.asked, supported=error.supported, nearest=nearest) from error
        return tried(able)


def _those(can: Callable[[int], bool], numbers: Sequence[int], host: Host) -> list[int]:
    """The layers for which `can` holds, which one of those that are alike decides for all of them."""
    known: dict[Hashable, bool] = {}
    for number in numbers:
        kind = host.kind_of_layer(number)
        if kind not in known:
            known[kind] = can(number)
    return [number for number in numbers if known[host.kind_of_layer(number)]]


@dataclass(frozen=True)
class Run:
    """A retrofit that is planned; see :func:`planned`."""

    host: Host
    data: Any
    settings: RetrofitSettings
    folder: Folder
    plan: Plan
    watch: Watch
    say: Say

    def finish(self) -> Retrofit:
        """Do everything that is not done yet.

        Raises:
            Unsupported: if another process works in the folder, and where training fails.
        """
        with self.folder.alone():
            try:
                return self._finish()
            except Unsupported:
                self.folder.discard_empty()
                raise

    def _finish(self) -> Retrofit:
        done = Folder.finished(self.folder.path)
        if done is not None:
            return Retrofit(self.folder.path, self.host.load(self.folder.path), self.host.tokenizer, done)
        record = self.folder.read("record")
        self.folder.write("plan", self.plan.record())
        swapped = self._swapped()
        student, learned = self.host.copy_with(swapped, self._mechanism(), self.settings.seed)
        losses = self._trained(student, learned, swapped)
        if record is None:
            record = self._record(student, learned, swapped, losses)
            self.folder.write("record", record)
        self._save(student, record)
        return Retrofit(self.folder.path, student, self.host.tokenizer, record)

    def _stage(self, name: str, doing: str, steps: int, rate: float, seed: int) -> Stage:
        seconds = self.plan.seconds.get(name)
        before = {"warm": 0, "transfer": self.plan.warm, "tune": self.plan.warm + self.plan.transfer}[name]
        return Stage(name, doing, steps, rate, self.settings.seed + seed, seconds, self._after(name), before)

    def _after(self, stage: str) -> float:
        """Seconds planned for the stages after the given one."""
        return self.plan.after(stage) if self.plan.seconds else 0.0

    def _shared_heads(self) -> dict[int, list[int]] | None:
        """The most important heads of each layer, measured once; None where the first ones are shared."""
        if not self.settings.shares_important:
            return None
        known = self.folder.read("head_importance")
        if known is None:
            after = math.fsum(self.plan.seconds.values())
            known = head_importance(self.host, self.data, self.settings, self.watch, after)
            self.folder.write("head_importance", known)
        importance = {int(number): scores for number, scores in known.items()}
        return most_important(self.settings.mechanism, importance)

    def _mechanism(self) -> str | dict[int, str]:
        """The mechanism of the new layers; that of each by number where they share different heads."""
        heads = self._shared_heads()
        return self.settings.mechanism if heads is None else sharing(self.settings.mechanism, heads)

    def _swapped(self) -> list[int]:
        """The layers that get new attention, chosen once."""
        layers = range(len(self.host.layers))
        kept = self.settings.kept(len(layers))
        if isinstance(kept, int):
            known = self.folder.read("kept")
            if known is None:
                sensitivity = self._sensitivity()
                others = [number for number in layers if number not in sensitivity]
                known = sorted([*others, *choose(sensitivity, max(kept - len(others), 0))])
                self.folder.write("kept", known)
                worst = max(sensitivity, key=lambda n: sensitivity[n])
                unit = "nats a hidden token" if self.settings.by_recall else self.host.unit
                self.say(f"sensitivity: layer {worst} loses the most ({sensitivity[worst]:.3g} {unit})")
            kept = tuple(known)
        return [number for number in layers if number not in kept]

    def _warm(self, numbers: Sequence[int], name: str = "warm") -> dict[int, nn.Module]:
        """New modules of some layers after the first steps, in which each learns as if it were alone, and which it ends with
        its best weights; untrained if the plan has no such steps."""
        student, learned = self.host.copy_with(self.plan.changeable, self._mechanism(), self.settings.seed)
        modules = self._modules(student, numbers)
        if self.plan.warm:
            doing = "first steps of all layers" if name == "warm" else "first steps of the new layers"
            stage = replace(self._stage("warm", doing, self.plan.warm, self.settings.transfer_rate, 0), name=name)
            best = self._best(modules, name)
            transfer(self.host, modules, learned, self.data, self.settings, stage, self.folder, self.watch, best)
        return modules

    def _best(self, modules: dict[int, nn.Module], stage: str) -> Best:
        """What keeps the best weights of each of the new modules while they learn the old outputs."""
        held_out = [part.inputs for part in self.host.parts(self.host.held_out(self.data, TRIED, self.settings))]
        return Best(list(modules.values()), lambda: held_out_losses(self.host, modules, held_out), self.folder, stage)

    def _modules(self, student: Any, numbers: Sequence[int]) -> dict[int, nn.Module]:
        return {number: student.get_submodule(self.host.layers[number].path) for number in numbers}

    def _sensitivity(self) -> dict[int, float]:
        """The sensitivity of each layer, from an earlier retrofit if one measured it and this one has not begun to."""
        plan = self.plan
        kept = Known(self.folder.identity, plan.changeable)
        if not self.folder.checkpoint("warm").exists() and (found := kept.read(plan.warm, plan.tried)) is not None:
            self.say(
                "sensitivity: as an earlier retrofit of this model measured it with this data and mechanism; to measure it "
                f"again, delete {kept.path}"
            )
            self.folder.write("sensitivity", found)
            return found
        modules = self._warm(plan.changeable)
        after = self._after("sensitivity")
        found = measure_sensitivity(
            self.host, modules, self.data, plan.tried, self.settings, self.folder, self.watch, after
        )
        kept.write(found, plan.warm, plan.tried)
        return found

    def _trained(self, student: Any, learned: list[str], swapped: list[int]) -> dict[str, Any]:
        """Train the student, and return the losses of the stages."""
        moved, looks = self._moved(student, learned, swapped)
        stage = self._stage(
            "tune",
            f"training on the teacher's {'logits' if self.host.distributes else 'hidden states'}"
            if self.settings.distil
            else "training",
            self.plan.tune,
            self.settings.rate,
            2,
        )
        held_out, distil = self.host.held_out(self.data, TRIED, self.settings), self.settings.distil
        best = Best([student], lambda: [held_out_loss(self.host, student, held_out, distil)], self.folder, "tune")
        tuned = tune(
            self.host, student, swapped, learned, self.data, self.settings, stage, self.folder, self.watch, best
        )
        self.say(f"training: held-out loss {_best_of(best)}, {_counted(tuned, self.plan.tune)}")
        if best.steps() == [0]:
            self.say(
                f"no step of the training was better there, so its start is kept; --rate {stage.rate / 4:.1g} may learn"
            )
        return {
            "transfer": [dict(zip(map(str, swapped), row, strict=True)) for row in moved],
            "tune": [row[0] for row in tuned],
            "held_out": {"transfer": looks, "tune": best.record()},
        }

    def _moved(self, student: Any, learned: list[str], swapped: list[int]) -> tuple[list[list[float]], list[Any]]:
        """The losses of the attention transfer, on training and on held-out data; empty if the plan has none."""
        if not self.plan.transfer:
            return [], []
        modules = self._modules(student, swapped)
        if self.settings.chosen and not self.folder.checkpoint("transfer").exists():
            self._begin_warm(modules)
        best, rate = self._best(modules, "transfer"), self.settings.transfer_rate
        stage = self._stage("transfer", "attention transfer", self.plan.transfer, rate, 1)
        moved = transfer(self.host, modules, learned, self.data, self.settings, stage, self.folder, self.watch, best)
        self.say(
            f"attention transfer: held out, {_best_of(best)} of the outputs' square, {counted(len(swapped), 'layer')}, "
            f"{_counted(moved, self.plan.transfer)}"
        )
        return moved, best.record()

    def _begin_warm(self, modules: dict[int, nn.Module]) -> None:
        """Start from the modules that the first steps trained: of all layers, or of these alone if no sensitivity was measured
        here."""
        whole = self.folder.checkpoint("warm").exists()
        warm = self._warm(self.plan.changeable) if whole else self._warm(list(modules), "begin")
        for number, module in modules.items():
            module.load_state_dict(warm[number].state_dict())

    def _record(self, student: Any, learned: list[str], swapped: list[int], losses: dict[str, Any]) -> dict[str, Any]:
        results = evaluate(self.host, student, self.data, self.settings, self.plan, self.folder, self.watch)
        heads = self._shared_heads()
        work = self.host.work(self.settings)
        return {
            "regard": VERSION,
            "made": provenance.now(),
            "kind": self.host.kind,
            "counts": self.host.counts,
            "unit": self.host.unit,
            "from": {
                "name": self.host.name,
                "class": type(self.host.model).__name__,
                "fingerprint": self.host.fingerprint(),
            },
            "settings": self.settings.identity(),
            "layers": len(self.host.layers),
            "swapped": swapped,
            "kept": [n for n in range(len(self.host.layers)) if n not in swapped],
            "new_parameters": sum(student.get_parameter(name).numel() for name in learned),
            "sensitivity": self.folder.read("sensitivity"),
            "head_importance": self.folder.read("head_importance"),
            "shared_heads": None if heads is None else {str(number): heads[number] for number in swapped},
            "data": {
                "training": self.data.name,
                "validation": self.data.other_name,
                "digest": self.data.digest(),
                self.host.counts: self.data.size,
            },
            "trained_tokens": {
                "all layers": self.plan.warm * work,
                "transfer": len(losses["transfer"]) * work,
                "tune": len(losses["tune"]) * work,
            },
            "plan": self.plan.record(),
            "losses": losses,
            "results": results,
            "recommendation": KINDS[self.host.kind].recommend(results),
            "machine": provenance.fingerprint(),
        }

    def _save(self, student: Any, record: dict[str, Any]) -> None:
        """Save the model and its files, each moved into place whole; the record comes last."""
        place, made = self.folder.path, self.folder.work / "model"
        shutil.rmtree(made, ignore_errors=True)
        self.host.with_model(student).save(made)
        for file in sorted(made.iterdir()):
            os.replace(file, place / file.name)
        made.rmdir()
        write_text_atomically(place / "README.md", card.readme(record))
        write_text_atomically(place / RECORD, card.as_json(record))
        for checkpoint in self.folder.work.glob("*.safetensors"):
            checkpoint.unlink()


def _best_of(best: Best) -> str:
    """The losses at the start and at the best weights, in words."""
    return f"{best.mean(0):.3g} to {best.mean():.3g}"


def _counted(curve: Sequence[object], planned: int) -> str:
    done = f"{len(curve)} steps"
    return done if len(curve) == planned else f"{done} of {planned}, after which the time was up"


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the record of a finished retrofit.

    Raises:
        Unsupported: for a folder without one.
    """
    found = Folder.finished(Path(folder))
    if found is None:
        raise Unsupported(
            f"{folder} as a retrofit: no {RECORD} there", supported="the output folder of a finished regard retrofit"
        )
    return found


__all__ = ["Retrofit", "Run", "planned", "read_record", "read_settings", "retrofit"]
