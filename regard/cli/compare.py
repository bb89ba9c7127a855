"""`regard compare`: mechanisms trained and measured on the same tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from regard.cli.arguments import (
    only_beside,
    read_backbones,
    read_lengths,
    read_mechanisms,
    read_numbers,
    read_stack,
    read_tasks,
)
from regard.cli.console import console, emit, plain
from regard.cli.options import (
    ADDRESS,
    BATCH_SIZE,
    DATA,
    DEVICE,
    DISTIL,
    ENGINE,
    EVALUATION_BLOCKS,
    FRAMES,
    JSON,
    KEEP_LAYERS,
    LARGEST_SEED,
    LENGTH,
    MODEL,
    PLUGINS,
    POSITIONS,
    PRECISION,
    RATE,
    SHARED_HEADS,
    SKIP_UNREADABLE,
    STACK,
    TOKENIZER,
    TRAIN,
    TRANSFER_RATE,
    VALIDATION,
)
from regard.cli.progress import progress
from regard.cli.retrofits import OF_RETROFITS, compare_from
from regard.cli.sweeps import sweep_of
from regard.contract import Unsupported
from regard.measurement import units
from regard.workbench.plugins import enter_plugins


def compare(
    context: typer.Context,
    data: DATA = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="A pretrained model, as for regard retrofit (a folder of a language model or encoder from transformers or a "
            "ViT from timm, timm:NAME, or a GGUF file): retrofits of it with the mechanisms are compared, instead of models "
            "from scratch. Together with it alone: --keep-layers, --batch-size, --train, --distil, --transfer-rate, --rate, "
            "--evaluation-blocks, --positions and --shared-heads.",
        ),
    ] = None,
    keep_layers: KEEP_LAYERS = None,
    batch_size: BATCH_SIZE = None,
    train: TRAIN = "all",
    distil: DISTIL = 1.0,
    transfer_rate: TRANSFER_RATE = 0.02,
    rate: RATE = 0.0002,
    evaluation_blocks: EVALUATION_BLOCKS = None,
    positions: POSITIONS = None,
    shared_heads: SHARED_HEADS = "first",
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task, as name or name:option=value,option=value: text, masked, replaced, recall, copying, listops, pathfinder, "
            "long_range, algorithmic, in_context_functions, events, images, pixels, segmentation, segmentation_3d, upscale, "
            "documents, matching, paraphrase, summarize, time_series, forecast, completion, speech. Repeatable. Default: text and "
            "recall; for your data text, or what the columns of a table or the files of a folder are for."
        ),
    ] = None,
    mechanisms: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: a name, NAME:option=value, a hybrid such as gated_linear*3+softmax, a .toml, .json or "
            ".yaml file; or all. Default: softmax,local,gated_linear,delta_rule; in cross patterns linear for local."
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated image backbones of regard list --backbones, as published or with options "
            "(NAME:option=value), for tasks of images; together with --mechanisms only if both are given."
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            help="Quantity to equalise across image backbones or segmentation networks, by scaling their widths to match the first: "
            "parameters, flops or time (of a training step). As published when not given."
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="Time for the whole comparison (8m, 2h), or work of each run (2M tokens, 500steps, 5e13 flops)."
        ),
    ] = "8m",
    seeds: Annotated[int, typer.Option(help="Runs of each mechanism; two or more to judge differences.")] = 3,
    seed_offset: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST_SEED, help="The lowest seed; another one repeats the comparison with other random draws."
        ),
    ] = 0,
    frame: Annotated[
        str | None,
        typer.Option(
            help=f"What surrounds each mechanism in its layer: {FRAMES}. With several frames, all mechanisms are compared in "
            "the first, and the leaders in the others too. Default: convolution,bare,unnormed; bare where tokens have no "
            "order."
        ),
    ] = None,
    leaders: Annotated[int, typer.Option(help="Number of leaders compared in the other frames.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder of the results; the same command resumes from it.")] = Path(
        "runs/compare"
    ),
    validation: VALIDATION = None,
    length: LENGTH = None,
    tokenizer: TOKENIZER = "bytes",
    skip_unreadable: SKIP_UNREADABLE = False,
    dim: Annotated[int, typer.Option(help="Width of the backbone.")] = 64,
    layers: Annotated[int, typer.Option(help="Layers of the backbone.")] = 2,
    heads: Annotated[int, typer.Option(help="Heads of a layer.")] = 2,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a training step. 2048 when not given, or at least 16 images of a backbone (4 with masks)."
        ),
    ] = None,
    rates: Annotated[
        str,
        typer.Option(
            help="Learning rates tried, each in a full run with the first seed; if several are given, the range is extended "
            "while the best is at an end."
        ),
    ] = "0.003,0.01,0.03",
    lengths: Annotated[
        str, typer.Option(help="Lengths at which costs are measured, in addition to the tasks' own.")
    ] = "256,512,1024,2048,4096",
    at_length: Annotated[
        int | None, typer.Option(help="Length whose cost decides; each task's own when not given.")
    ] = None,
    prefer: Annotated[
        str,
        typer.Option(
            help="What decides if quality is equal: inference, training, decode, inference-memory, training-memory or state."
        ),
    ] = "inference",
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the weights of the winner.")] = False,
    stack: STACK = "",
    precision: PRECISION = "float32",
    device: DEVICE = "cpu",
    model: MODEL = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--shard",
            help="i/n: only the training runs of share i of n of the mechanisms, alongside other processes with the same "
            "output folder; the same command without it then measures costs and writes the report.",
        ),
    ] = None,
    engine: ENGINE = "local",
    address: ADDRESS = None,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Train mechanisms on the same tasks, measure quality and cost on this machine, and recommend one.

    Examples:

    \b
        regard compare
        regard compare my_corpus.txt --budget 20m --seeds 4
        regard compare reviews.csv
        regard compare --task images photos/ --mechanisms softmax,agent,flow_attention
        regard compare --task images:size=64 photos/ --models van_b0,deit_t
        regard compare --task images photos/ --models van_nano,vit_nano,vim_nano --match flops
        regard compare --task forecast:target=load,covariates=holiday demand.csv --mechanisms softmax,linear
        regard compare --task algorithmic:function=sum --model AlgorithmicNetwork --frame own
        regard compare --task events --mechanisms softmax,aaren,gated_linear
        regard compare --task time_series:data=BasicMotions --mechanisms softmax,aaren
        regard compare --task recall:pairs=16 --mechanisms all --budget "2M tokens" --output runs/recall
        regard compare --task long_range:which=listops --task long_range:which=pathfinder --mechanisms softmax,linear,s4d
        regard compare --mechanisms all --budget "2M tokens" --output runs/all --shard 1/2
        regard compare --mechanisms all --budget "2M tokens" --output runs/all --engine ray --address auto
        regard compare my_corpus.txt --mechanisms "softmax,local:window=32,gated_linear+softmax" --frame own
        regard compare my_corpus.txt --from smollm2/ --mechanisms lolcats,gated_linear,local:window=256 --budget 4h
        regard compare --from smollm2/ --mechanisms gated_linear,delta_rule,local,core_context --budget 4h
        regard compare my_corpus.txt --from smollm2/ --mechanisms masformer,local --keep-layers bottom:4 --distil 0 --length 2048
    """
    if source is not None:
        compare_from(context, source)
        return
    only_beside(context, "--from", OF_RETROFITS)
    from regard.measurement.budget import Budget
    from regard.workbench.comparison.compare import compare as run
    from regard.workbench.comparison.compare import train_share
    from regard.workbench.comparison.settings import CompareSettings
    from regard.workbench.comparison.summary_table import figures_table, terminal_table
    from regard.workbench.comparison.task_models import default_frames, default_mechanisms, fitting
    from regard.workbench.reports.view import SCHEMA

    def recognised(described: str) -> None:
        if not as_json:
            console.print(plain(f"By its contents: --task {described}"))

    if only is not None and engine != "local":
        raise Unsupported(
            f"--shard {only} together with --engine {engine}", supported="one of them: both divide the runs"
        )
    entered = enter_plugins(plugin)
    sweeps = sweep_of(engine, address, plugin)
    tasks = read_tasks(task, data, validation, length, tokenizer, entered.tasks, recognised, skip_unreadable)
    compared = [] if models is None else read_backbones(models)
    compared += [] if mechanisms is None else read_mechanisms(mechanisms, tasks)
    settings = CompareSettings(
        tuple(compared) if compared else default_mechanisms(*tasks),
        Budget.parse(budget),
        seeds=seeds,
        first_seed=seed_offset,
        frames=default_frames(*tasks) if frame is None else tuple(filter(None, map(str.strip, frame.split(",")))),
        leaders=leaders,
        dim=dim,
        layers=layers,
        heads=heads,
        batch_tokens=CompareSettings.batch_tokens if batch_tokens is None else batch_tokens,
        whole_batches=batch_tokens is None,
        rates=read_numbers("rates", rates),
        lengths=read_lengths(lengths),
        at_length=at_length,
        prefer=prefer,
        keep_models=keep_models,
        stack=read_stack(stack),
        precision=precision,
        device=device,
        match=match,
        model=model,
        plugins=tuple(entered.files),
    )
    left_out: dict[str, str] = {}
    if mechanisms is not None and mechanisms.strip() == "all":
        names, left_out = fitting(tasks, settings)
        settings = settings.only(names)
    if not as_json:
        for one in tasks:
            described = plain(one.describe())
            described.highlight_regex(r"(?m)^warning: .*", "yellow")
            console.print(described)
            console.print()
        for name, reason in left_out.items():
            console.print(Text(f"Left out: {name} with {reason}", style="dim"))
    with sweeps as sweep, progress(quiet=as_json) as (bar, line):
        shown = bar.add_task("starting", total=None)

        def watch(progress: Any) -> None:
            loss = f"  loss {progress.loss:.3f}" if progress.loss == progress.loss else ""
            bar.update(shown, description=progress.doing + loss, completed=progress.done, total=progress.total or None)
            share = progress.done / progress.total if progress.total else 0.0
            left = f"  about {units.clock(progress.remaining)} left" if progress.total else ""
            line(f"{share:4.0%}  {progress.doing}{loss}{left}")

        def say(sentence: str) -> None:
            if not as_json:
                bar.console.print(Text(sentence, style="dim"))

        if only is not None:
            trained = train_share(tasks, settings, output, only, watch=watch, say=say)
        else:
            outcome = run(tasks, settings, output, watch=watch, say=say, sweep=sweep)
    if only is not None:
        if as_json:
            emit({"shard": only, "trained": trained, "store": str(output / "results.db")})
        else:
            console.print(Text(f"Trained here: {', '.join(trained) or 'nothing'}."))
            console.print(Text("When all shares are done, give the same command without --shard."))
        return
    if as_json:
        emit(
            {
                "schema": SCHEMA,
                "tasks": {one.name: one.describe() for one in tasks},
                "summary": outcome.summary,
                "baselines": outcome.baselines,
                "beside": outcome.beside,
                "recommendation": outcome.recommendation.as_dict(),
                "left_out": left_out,
                "report": str(outcome.report),
                "store": str(outcome.store),
                "models": {k: str(v) for k, v in outcome.models.items()},
            }
        )
        return
    console.print()
    console.print(terminal_table(outcome.summary, outcome.baselines, width=console.width))
    console.print()
    if (figures := figures_table(outcome.summary)) is not None:
        console.print(figures)
        console.print()
    console.print(
        Text("★ no other is better and faster; equal ranks: not distinguishable by this comparison", style="dim")
    )
    console.print()
    console.print(Text(outcome.recommendation.text, style="bold"))
    console.print(Text(outcome.recommendation.reason))
    for note in outcome.recommendation.notes:
        console.print(Text(f"- {note}", style="dim"))
    console.print()
    console.print(Text(f"Report: {outcome.report}"))
