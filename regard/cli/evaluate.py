"""`regard evaluate`: a trained model, scored again or on other data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from regard.cli.arguments import plugged_tasks
from regard.cli.console import console, emit, load_plugins
from regard.cli.options import DEVICE, JSON, PLUGINS
from regard.measurement import units


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of regard train.")],
    data: Annotated[
        list[str] | None,
        typer.Argument(help="Other data to score it on, in the form of its own; its held-out items when not given."),
    ] = None,
    device: DEVICE = "cpu",
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Score a trained model on what was held out, or on your data.

    Examples:

    \b
        regard evaluate my_model
        regard evaluate my_model other_corpus.txt
        regard evaluate reviews new_reviews.csv --json
    """
    from regard.measurement.statistics import score_of_items
    from regard.workbench.trained import figures_of, open_trained

    own = plugged_tasks(load_plugins(plugin), (data,))
    trained = open_trained(folder)
    task = own[0] if own else trained.task(data[0] if data and len(data) == 1 else data)
    found = trained.score(task if own or data else None, device=device)
    rule = task.baseline
    result = {
        "folder": str(folder),
        "task": task.name,
        "metric": task.metric,
        "score": found.score,
        "standard_error": score_of_items(found.items)[1],
        "figures": figures_of(found),
        "loss": found.loss,
        "items": len(found.items),
        "baseline": None if rule is None else {"name": rule.name, "score": rule.score},
    }
    if as_json:
        emit(result)
        return
    beside = "" if rule is None else f"; without training, {rule.name} has {rule.score:.4g}"
    console.print(Text(f"{found.score:.4g} {task.metric} on {len(found.items)} items{beside}."))
    for name, (mean, error) in figures_of(found).items():
        console.print(Text(f"{name}: {' ± '.join(units.with_error(mean, error))} over the items"))
