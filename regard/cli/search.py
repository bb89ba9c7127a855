"""`regard search`: find the mechanism, heads and widths of each layer within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from regard.cli.arguments import read_integers, read_mechanisms, read_tasks
from regard.cli.console import console, emit, plain
from regard.cli.options import (
    DATA,
    DEVICE,
    FRAME,
    JSON,
    LARGEST_SEED,
    LENGTH,
    PLUGINS,
    PRECISION,
    SKIP_UNREADABLE,
    TOKENIZER,
    VALIDATION,
)
from regard.cli.progress import progress
from regard.contract import Unsupported
from regard.workbench.plugins import enter_plugins


def search(
    data: DATA = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task, as name or name:option=value; when not given, what the data are for, or else text."),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="Maximum cost of the network: a share of the largest network of the first mechanism (60% time, 50% flops, 70% "
            "parameters), or 4.5ms, 20M flops, 300k parameters. Time and FLOPs are for reading one item."
        ),
    ] = "60% time",
    mechanisms: Annotated[
        str,
        typer.Option(
            help="Comma-separated, or all; the first is the reference; for all, softmax. Each layer may have any."
        ),
    ] = "softmax,cosformer",
    dims: Annotated[str, typer.Option(help="Widths to choose from, in an encoder-decoder on each side.")] = "32,64",
    layers: Annotated[str, typer.Option(help="Numbers of layers to choose from.")] = "2,3,4",
    encoder_layers: Annotated[
        str | None,
        typer.Option(
            help="Numbers of layers of an encoder-decoder's encoder to choose from; like --layers when not given."
        ),
    ] = None,
    memory_layers: Annotated[
        str | None,
        typer.Option(
            help="Numbers of the encoder's last layers that each cross attention reads, to choose from; 1,2 when not given."
        ),
    ] = None,
    heads: Annotated[str, typer.Option(help="Numbers of heads to choose from, in each layer.")] = "2,4",
    feed_forward: Annotated[str, typer.Option(help="Feed-forward widths to choose from, in each layer.")] = "64,128",
    steps: Annotated[int, typer.Option(help="Training steps of the supernet, each with four networks.")] = 2000,
    networks: Annotated[
        int, typer.Option(help="Networks scored with the supernet's weights, from which the ranker learns.")
    ] = 60,
    rounds: Annotated[
        int, typer.Option(help="Rounds in which these networks are drawn; after each, some choices are fixed.")
    ] = 2,
    keep: Annotated[float, typer.Option(help="Share of the choices that stay open after a round; 1 for all.")] = 0.6,
    searchers: Annotated[
        str, typer.Option(help="Comma-separated: evolution, random, optuna (pip install 'regard\\[search]').")
    ] = "evolution,random",
    evaluations: Annotated[int, typer.Option(help="Networks that each searcher scores with the ranker.")] = 1000,
    finalists: Annotated[int, typer.Option(help="Networks of each searcher to try with the supernet's weights.")] = 8,
    retrain: Annotated[
        int, typer.Option(help="Steps of training from scratch for the chosen networks; 0 for none.")
    ] = 1500,
    seeds: Annotated[int, typer.Option(help="Runs from scratch of each; two or more to judge differences.")] = 3,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the supernet, the draws and the first run.")
    ] = 0,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of all training runs.")] = 3e-3,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a training step.")] = 4096,
    frame: FRAME = "bare",
    separate: Annotated[
        bool, typer.Option("--separate", help="Give each mechanism projections of its own in the supernet.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the results; the same command resumes from it.")] = Path(
        "runs/search"
    ),
    validation: VALIDATION = None,
    length: LENGTH = None,
    tokenizer: TOKENIZER = "bytes",
    skip_unreadable: SKIP_UNREADABLE = False,
    precision: PRECISION = "float32",
    device: DEVICE = "cpu",
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Find the best network within a budget: each layer's mechanism, heads and feed-forward width, and width and depth.

    In an encoder-decoder both sides have their own, and each cross attention chooses how many of the encoder's last
    layers it reads.

    One supernet that contains all networks is trained, and some networks are tried with its weights. From these, a
    ranker learns which of two networks is better, and guides the searchers. The best network, and the best with each
    mechanism alone, are trained from scratch, next to the largest network of the first mechanism. The output folder has
    a report, and a plan for --mechanism of regard train and compare.

    Examples:

    \b
        regard search my_corpus.txt --budget "60% time"
        regard search --task recall:length=128 --budget "50% flops" --mechanisms softmax,gated_linear,local:window=32
        regard search reviews.csv --budget "300k parameters" --dims 64,96 --layers 2,4,6 --feed-forward 128,256
        regard search --task images photos/ --budget 8ms --searchers evolution,random,optuna
        regard search articles.jsonl --task summarize:source=text,target=summary --encoder-layers 6 --memory-layers 1,2,3
    """
    from regard.workbench.search.costs import NetworkBudget
    from regard.workbench.search.report import write_page
    from regard.workbench.search.run import REPORT, Search, Watch
    from regard.workbench.search.settings import SearchSettings
    from regard.workbench.search.space import Choices, fitting

    def recognised(described: str) -> None:
        if not as_json:
            console.print(plain(f"By its contents: --task {described}"))

    entered = enter_plugins(plugin)
    settings = SearchSettings(
        NetworkBudget.parse(budget),
        steps=steps,
        learning_rate=learning_rate,
        batch_tokens=batch_tokens,
        networks=networks,
        rounds=rounds,
        keep=keep,
        searchers=tuple(part.strip() for part in searchers.split(",") if part.strip()),
        evaluations=evaluations,
        finalists=finalists,
        retrain_steps=retrain,
        seeds=seeds,
        seed=seed,
        share=not separate,
        frame=frame,
        precision=precision,
        device=device,
        plugins=tuple(entered.files),
    )
    own = data or entered.tasks
    chosen = [task] if task is not None else [] if own else ["text"]
    tasks = read_tasks(chosen, data, validation, length, tokenizer, entered.tasks, recognised, skip_unreadable)
    if len(tasks) != 1:
        raise Unsupported(f"a search for {len(tasks)} tasks", supported="one task")
    choices = Choices(
        tuple(_variants(mechanisms, tasks)),
        dims=read_integers("--dims", dims),
        depths=read_integers("--layers", layers),
        heads=read_integers("--heads", heads),
        feed_forward=read_integers("--feed-forward", feed_forward),
        encoder_depths=None if encoder_layers is None else read_integers("--encoder-layers", encoder_layers),
        memory_layers=None if memory_layers is None else read_integers("--memory-layers", memory_layers),
    )
    left_out: dict[str, str] = {}
    if mechanisms.strip() == "all":
        choices, left_out = fitting(tasks[0], choices, settings)
    if not as_json:
        console.print(plain(tasks[0].describe()))
        console.print()
        for name, reason in left_out.items():
            console.print(Text(f"Left out: {name} with {reason}", style="dim"))
    with progress(quiet=as_json) as (bar, line):
        shown = bar.add_task("starting", total=1.0)

        def doing(what: str, share: float) -> None:
            bar.update(shown, description=what, completed=share)
            line(f"{share:4.0%}  {what}")

        def say(sentence: str) -> None:
            if not as_json:
                bar.console.print(Text(sentence, style="dim"))

        record = Search(tasks[0], choices, settings, output, Watch(say, doing)).run()
    dropped = record["left_out"]
    record["left_out"] = [*(f"{name}: {reason}" for name, reason in left_out.items()), *dropped]
    page = write_page(record, output / REPORT)
    if as_json:
        emit({**record, "report": str(page)})
        return
    console.print(_table(record))
    for row in record["entrants"]:
        console.print(Text(f"{row['name']}: {row['plan']}, {row['width']}"))
    for sentence in dropped:
        console.print(Text(f"left out: {sentence}", style="dim"))
    console.print()
    console.print(Text(record["verdict"], style="bold"))
    for command in record["commands"]:
        console.print(Text(command), soft_wrap=True)  # on one line, so that it can be copied
    console.print(Text(f"Report: {page}"))


def _variants(text: str, tasks: list[Any]) -> list[Any]:
    from regard.models.variants import read_variant

    found = [read_variant(one) if isinstance(one, str) else one for one in read_mechanisms(text, tasks)]
    # softmax is the reference for `all`
    return sorted(found, key=lambda variant: variant.name != "softmax") if text.strip() == "all" else found


def _table(record: dict[str, Any]) -> Table:
    from regard.workbench.search.report import cells, labels

    table = Table(box=None, pad_edge=False, header_style="dim")
    *headings, _ = labels(record)  # plans are too long for a column
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for i, row in enumerate(record["entrants"]):
        table.add_row(*(Text(cell, style="" if i else "bold") for cell in cells(record, row)[:-1]))
    return table
