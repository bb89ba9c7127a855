"""`regard evaluate`: score a trained model again, or on other data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from regard.cli.arguments import plugged_tasks
from regard.cli.console import console, emit
from regard.cli.options import DEVICE, JSON, PLUGINS, REDUCE, SKIP_UNREADABLE
from regard.cli.progress import progress
from regard.contract import Unsupported
from regard.measurement import units
from regard.workbench.plugins import enter_plugins

if TYPE_CHECKING:
    from regard.tasks import Task
    from regard.workbench.trained.folder import TrainedModel


def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of regard train, retrofit or compress; of a causal language model, encoder or text classifier from "
            "transformers (or a .gguf file); or of a model from timm (or timm:NAME)."
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help="Other data to score the model on, in the form of its training data; its held-out items when not given."
        ),
    ] = None,
    exit_rules: Annotated[
        list[str] | None,
        typer.Option(
            "--exit",
            metavar="RULE",
            help="Exit early: entropy:0.3, confidence:0.9, patience:2, layer:1 or halting:0.01. Repeatable.",
        ),
    ] = None,
    reduce: REDUCE = None,
    skip_unreadable: SKIP_UNREADABLE = False,
    device: DEVICE = "cpu",
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Score a trained model on its held-out items, or on your data.

    With --reduce the model is also scored with fewer tokens, and with --exit with early exits, as trained by regard
    train --exits; both are timed in turn with the full model. For models of transformers or timm, compressed or not,
    the score is the perplexity of your text, or the accuracy on your labelled texts (columns text and label) or images
    (a sub-folder for each class); it comes with the size of the weights and the time.

    Examples:

    \b
        regard evaluate my_model
        regard evaluate my_model other_corpus.txt
        regard evaluate hybrid/ other.txt
        regard evaluate reviews new_reviews.csv --json
        regard evaluate small/ other_corpus.txt
        regard evaluate small_classifier/ new_reviews.csv
        regard evaluate small_vit/ photos/ --json
        regard evaluate photos --reduce tome:remove=4
        regard evaluate reviews --exit entropy:0.1 --exit entropy:0.5 --exit layer:2
    """
    from regard.compression.folders import library_of_place
    from regard.measurement.statistics import score_of_items
    from regard.workbench.trained.early_exits import exited, leaving
    from regard.workbench.trained.folder import open_trained
    from regard.workbench.trained.records import figures_of
    from regard.workbench.trained.reduced import AT_ONCE, reduced, told

    rules = exit_rules or []
    entered = enter_plugins(plugin)
    library = library_of_place(folder)
    if library in ("transformers", "timm"):
        own_options = {
            "--exit": rules,
            "--reduce": reduce,
            "the task of a plugin": entered.tasks,
            "--skip-unreadable": skip_unreadable,
        }
        for option, given in own_options.items():
            if given:
                raise Unsupported(f"{option} of {folder}, a model of {library}", supported="models of regard train")
        _of_other_libraries(folder, data, device, as_json)
        return
    own = plugged_tasks(entered.tasks, (data,))
    if own and skip_unreadable:
        raise Unsupported("--skip-unreadable with the task of a plugin", supported="tasks that read images")
    trained = open_trained(folder)
    model = trained.model(device)
    fewer = None if reduce is None else reduced(model, reduce)
    for rule in rules:
        leaving(model, rule)  # refuses rules that do not fit before anything is scored
    other = data[0] if data and len(data) == 1 else data
    task = own[0] if own else trained.task(other, skip_unreadable=skip_unreadable)
    chosen = task if own or data else None
    found = trained.score(task, own=chosen is None, device=device, model=model)
    baseline, figures = task.baseline, figures_of(found)
    items = sum(weight > 0 for _, weight in found.items)
    if baseline is not None and chosen is None:
        baseline = baseline.after(trained.chosen_by)
    result: dict[str, Any] = {
        "folder": str(folder),
        "task": task.name,
        "metric": task.metric,
        "score": found.score,
        "standard_error": score_of_items(found.items)[1],
        "figures": figures,
        "loss": found.loss,
        "items": items,
        "baseline": None if baseline is None else {"name": baseline.name, "score": baseline.score},
    }
    shared = 0 if chosen is None else getattr(task, "shared", 0)
    if shared:
        result["shared"] = shared
    notes = [] if own or not data else _of_training(trained, task)
    if skip_unreadable:
        told_of_task = task.describe().splitlines()
        notes += [line.removeprefix("note: ") for line in told_of_task if line.startswith("note: ")]
    if notes:
        result["notes"] = notes
    if fewer is not None:
        again = trained.score(task, own=chosen is None, device=device, model=fewer.model)
        batch = next(iter(task.evaluation_batches(AT_ONCE)))
        speeds = fewer.speeds(batch.inputs.to(device), batch.grid)
        result["reduced"] = {"by": reduce, "score": again.score, "loss": again.loss, **speeds}
    early = [exited(trained, model, rule, task, own=chosen is None, device=device) for rule in rules]
    if early:
        result["exits"] = [one.as_dict() for one in early]
    if as_json:
        emit(result)
        return
    beside = "" if baseline is None else f"; without training, {baseline.name} has {baseline.score:.4g}"
    console.print(Text(f"{found.score:.4g} {task.metric} on {units.counted(items, 'item')}{beside}."))
    if shared:
        are = "is" if shared == 1 else "are"
        console.print(
            Text(
                f"{shared} of the items {are} among the data of its training: what was learnt by heart counts as known."
            )
        )
    for name, (mean, error) in figures.items():
        console.print(Text(f"{name}: {units.told(mean, error)} over the items"))
    if fewer is not None:
        console.print(Text(f"{again.score:.4g} {task.metric} with {reduce}: {told(speeds)}."))
    for one in early:
        console.print(Text(one.told(task.metric)))
    for note in notes:
        console.print(Text(f"note: {note}", style="dim"))


def _of_training(trained: TrainedModel, task: Task) -> list[str]:
    """Notes on what is known about other data and the data of the training."""
    missing = trained.missing_data()
    if missing is not None:
        return [f"the data of its training, {missing}, are not there any more: which items it knows is not known"]
    overlap = getattr(task, "overlap", None)
    return [str(overlap)] if overlap is not None and overlap.much and not task.shared else []


def _of_other_libraries(folder: Path, data: list[str] | None, device: str, as_json: bool) -> None:
    """Evaluate a model of transformers or timm, compressed or not."""
    from regard.workbench.lighter.evaluated import evaluate as evaluate_model

    with progress(quiet=as_json) as (bar, line):
        shown = bar.add_task("scoring", total=None)

        def watch(done: int, count: int) -> None:
            bar.update(shown, completed=done, total=count)
            line(f"{done} of {count} items scored")

        found = evaluate_model(folder, data, device=device, on_items=watch)
    if as_json:
        emit({"folder": str(folder), **found.as_dict()})
        return
    said = units.told(found.score, found.standard_error)
    console.print(
        Text(f"{said} {found.metric} on {units.counted(found.items, 'item')}; loss {units.number(found.loss)} nats.")
    )
    times = ", ".join(f"{name} {units.milliseconds(value)}" for name, value in found.milliseconds.items())
    console.print(Text(f"{units.size(found.bytes)} of weights; {times}."))
    console.print(Text(found.described, style="dim"))
