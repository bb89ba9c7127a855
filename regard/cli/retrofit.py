"""`regard retrofit`: put new attention into a pretrained model, train it back and measure it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from regard.cli.arguments import read_lengths
from regard.cli.console import console, emit, plain
from regard.cli.options import (
    BATCH_SIZE,
    DISTIL,
    EVALUATION_BLOCKS,
    JSON,
    KEEP_LAYERS,
    LARGEST_SEED,
    PLUGINS,
    POSITIONS,
    RATE,
    RETROFIT_PRECISION,
    SHARED_HEADS,
    TRAIN,
    TRANSFER_RATE,
)
from regard.cli.progress import progress
from regard.measurement import units
from regard.workbench.plugins import enter_plugins


def retrofit(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a language model or encoder from transformers or a ViT from timm, timm:NAME, or a GGUF file."
        ),
    ],
    mechanism: Annotated[str, typer.Option(help="Attention of the new layers, with options as in local:window=64.")],
    data: Annotated[
        list[str],
        typer.Option(help="Your text, a file or folder (repeatable), or a folder of images; a tenth is held out."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the result; the same command resumes from it. runs/MODEL-MECHANISM when not given."
        ),
    ] = None,
    keep_layers: KEEP_LAYERS = None,
    budget: Annotated[
        str, typer.Option(help="Time for everything (60m, 8h), or amount of training: '2M tokens', '500 steps'.")
    ] = "60m",
    validation: Annotated[
        list[str] | None, typer.Option(help="Data from another source, on which the result is judged. Repeatable.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a training block; 512, or as many as positions reach, when not given.")
    ] = None,
    batch_size: BATCH_SIZE = None,
    train: TRAIN = "all",
    distil: DISTIL = 1.0,
    transfer_rate: TRANSFER_RATE = 0.02,
    rate: RATE = 0.0002,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Lengths at which time, state and recall are measured, such as 512,8k; when not given, 512,2048, or 128,512 for encoders."
        ),
    ] = None,
    evaluation_blocks: EVALUATION_BLOCKS = None,
    positions: POSITIONS = None,
    shared_heads: SHARED_HEADS = "first",
    precision: RETROFIT_PRECISION = "float32",
    seed: Annotated[
        int,
        typer.Option(min=0, max=LARGEST_SEED, help="Seed of the order of blocks and of randomly initialised weights."),
    ] = 0,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Put new attention into layers of a pretrained model, train it back, and measure it against the original.

    The model is a causal language model (Llama) or an encoder (BERT) of transformers, or a vision transformer of timm.
    The command measures which layers matter, trains the new layers on the old ones' outputs and then the model on the
    original's predictions, and writes a report on both models. A command that was killed resumes when it is repeated.

    Examples:

    \b
        regard retrofit smollm2/ --mechanism gated_linear --data my_corpus.txt
        regard retrofit smollm2/ --mechanism lolcats --keep-layers auto:22 --data a.txt --validation b.txt --output hybrid/
        regard retrofit smollm2/ --mechanism delta_rule --data texts/ --train lora:16 --budget "2M tokens" --output hybrid/
        regard retrofit smollm2/ --mechanism landmark --data texts/ --precision bfloat16 --output landmarks/
        regard retrofit smollm2/ --mechanism local:window=256 --keep-layers recall:4 --length 1024 --data texts/ --output windows/
        regard retrofit llama/ --mechanism mamba2 --keep-layers auto:0.5 --data texts/ --output hybrid/
        regard retrofit bert/ --mechanism linear --data my_corpus.txt --lengths 128,512 --output encoder/
        regard retrofit my_vit/ --mechanism agent --data photos/ --budget 30m --output vit/
        regard retrofit smollm2/ --mechanism selective_temperature --distil 0 --data my_corpus.txt --output sharper/
        regard retrofit smollm2/ --mechanism mixture_of_heads --shared-heads important --data my_corpus.txt --output fewer_heads/
        regard retrofit model.gguf --mechanism local:window=256 --data my_corpus.txt --output short/ --json
    """
    from regard.retrofit import retrofit as run
    from regard.workbench.reports.retrofit_report import write_retrofit_report
    from regard.workbench.retrofits import folder_of

    enter_plugins(plugin)
    with showing(as_json) as (watch, say):
        if output is None:
            output = Path("runs") / folder_of(f"{Path(model).absolute().name.removesuffix('.gguf')}-{mechanism}")
            say(f"the result goes to {output}")
        made = run(
            model,
            mechanism,
            data=data,
            output=output,
            keep_layers=keep_layers,
            budget=budget,
            validation=validation or None,
            length=length,
            batch_size=batch_size,
            train=train,
            distil=distil,
            transfer_rate=transfer_rate,
            rate=rate,
            lengths=None if lengths is None else read_lengths(lengths),
            evaluation_blocks=evaluation_blocks,
            positions=positions,
            shared_heads=shared_heads,
            precision=precision,
            seed=seed,
            watch=watch,
            say=say,
        )
        report = write_retrofit_report(output)
    if as_json:
        emit({**made.record, "folder": str(output), "report": str(report)})
        return
    tell(made.record)
    console.print(Text(f"Model: {output}   Report: {report}"))


@contextmanager
def showing(quiet: bool) -> Iterator[tuple[Callable[[Any], None], Callable[[str], None]]]:
    """Yield two functions: one that shows the progress of a retrofit, one that shows its messages."""
    with progress(quiet=quiet) as (bar, line):
        shown = bar.add_task("opening the model", total=None)

        def watch(at: Any) -> None:
            loss = "" if math.isnan(at.loss) else f"  loss {at.loss:.3g}"
            left = f"  about {units.clock(at.remaining)} left" if at.total else ""
            bar.update(shown, description=f"{at.doing}{loss}{left}", completed=at.done, total=at.total or None)
            line(f"{at.doing} {at.done} of {at.total}{loss}{left}")

        def say(sentence: str) -> None:
            if not quiet:
                bar.console.print(Text(sentence, style="dim"))

        yield watch, say


def tell(record: dict[str, Any]) -> None:
    """Print the figures and the recommendation."""
    from regard.retrofit.measures import measures_of

    console.print()
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for heading, side in (("", "left"), ("original", "right"), ("retrofit", "right")):
        shown.add_column(heading, justify=side)  # type: ignore[arg-type]
    for what, before, after in measures_of(record).rows(record["results"]):
        shown.add_row(plain(what), before, after)
    console.print(shown)
    console.print()
    console.print(plain(record["recommendation"]["text"]), style="bold")
    for note in record["recommendation"]["notes"]:
        console.print(plain(f"- {note}"), style="dim")
    console.print()
