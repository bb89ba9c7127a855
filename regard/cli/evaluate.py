"""`regard evaluate`: a trained model, scored again or on other data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from regard.cli.arguments import plugged_tasks
from regard.cli.console import console, emit, load_plugins
from regard.cli.options import DEVICE, JSON, PLUGINS


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of regard train, or of regard compress.")],
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
    from regard.compression.folders import is_compressed, read_record
    from regard.workbench.trained import open_trained

    if is_compressed(folder) and read_record(folder)["library"] == "transformers":
        _of_transformers(folder, data, as_json)
        return
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
        "loss": found.loss,
        "items": len(found.items),
        "baseline": None if rule is None else {"name": rule.name, "score": rule.score},
    }
    if as_json:
        emit(result)
        return
    beside = "" if rule is None else f"; without training, {rule.name} has {rule.score:.4g}"
    console.print(Text(f"{found.score:.4g} {task.metric} on {len(found.items)} items{beside}."))


def _of_transformers(folder: Path, data: list[str] | None, as_json: bool) -> None:
    """The perplexity of a compressed causal language model on a text."""
    from regard.compression import text_windows
    from regard.contract import Unsupported
    from regard.tasks.documents import read_documents
    from regard.workbench.lighter.subjects import LENGTH, encode, open_compressed, perplexity

    if not data:
        raise Unsupported(
            f"{folder} without a text", supported="text files or folders behind it", nearest="my_corpus.txt"
        )
    model, tokenizer = open_compressed(folder)
    documents, _ = read_documents(data, "text")
    text = b"".join(document.text for document in documents).decode()
    ids = encode(tokenizer, text)
    length = min(LENGTH, len(ids))
    windows = text_windows(ids, length, 64)
    found = perplexity(model, windows)
    if as_json:
        emit({"folder": str(folder), "metric": "perplexity", "score": found, "items": len(windows)})
        return
    console.print(Text(f"{found:.4g} perplexity on {len(windows)} windows of {length} tokens."))
