"""`regard train`: train one mechanism on one task, and write a folder from which the model can be used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from regard.cli.arguments import (
    describe_tasks,
    given_options,
    named_backbones,
    plugged_tasks,
    read_exits,
    read_mechanisms,
    read_stack,
    spelled_option,
)
from regard.cli.console import console, emit, plain
from regard.cli.options import (
    DATA,
    DEVICE,
    FRAME,
    JSON,
    LARGEST_SEED,
    LENGTH,
    MODEL,
    PLUGINS,
    PRECISION,
    SKIP_UNREADABLE,
    STACK,
    TOKENIZER,
    VALIDATION,
)
from regard.cli.progress import progress
from regard.contract import Unsupported, one_of
from regard.measurement import units
from regard.workbench.plugins import enter_plugins

MONITORS = ("attention", "conservation")
"""What a run can be monitored for, and the base names of the files written."""
OF_THE_RUN = (
    "data",
    "task",
    "mechanism",
    "validation",
    "length",
    "tokenizer",
    "model",
    "dim",
    "layers",
    "heads",
    "frame",
    "stack",
    "ema",
    "best_of",
    "teacher",
    "distil",
    "teacher_cache",
    "monitor",
    "plugin",
)
"""Options that the folder of --frozen determines, or that play no part in training only the exits."""


def train(
    context: typer.Context,
    data: DATA = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task, as name or name:option=value,option=value; when not given, what the columns of a table or the files of a "
            "folder are for, or else text."
        ),
    ] = None,
    mechanism: Annotated[
        str | None,
        typer.Option(
            help="Mechanism: a name, NAME:option=value, a hybrid such as gated_linear*3+softmax, or a file; softmax when not given."
        ),
    ] = None,
    budget: Annotated[str, typer.Option(help="8m, 2h, 500 steps, 2M tokens or 5e13 flops.")] = "8m",
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate; regard compare finds a good one.")] = 3e-3,
    output: Annotated[Path, typer.Option(help="Folder of the model; the same command resumes from it.")] = Path(
        "runs/train"
    ),
    validation: VALIDATION = None,
    length: LENGTH = None,
    tokenizer: TOKENIZER = "bytes",
    skip_unreadable: SKIP_UNREADABLE = False,
    model: MODEL = None,
    dim: Annotated[int, typer.Option(help="Width of the backbone.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers of the backbone.")] = 4,
    heads: Annotated[int, typer.Option(help="Heads of a layer.")] = 4,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a training step. 4096 when not given, or at least 16 images of a backbone (4 with masks)."
        ),
    ] = None,
    frame: FRAME = "convolution",
    exits: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            help="Layers after which the model may exit: 1+2, or all; with :own each exit has a head of its own (for models that "
            "classify whole sequences), with :halting each token learns when to stop.",
        ),
    ] = None,
    frozen: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an earlier regard train: its layers are reused and frozen, and only the exits learn, on the same "
            "data."
        ),
    ] = None,
    stack: STACK = "",
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the weights, the batches and the draws.")
    ] = 0,
    precision: PRECISION = "float32",
    ema: Annotated[
        float | None,
        typer.Option(
            help="Decay of a running mean of the weights, such as 0.999; the mean is kept if it scores better."
        ),
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(
            help="Number of evaluations, on a quarter of the held-out items, that choose the best weights; 0 keeps the last. 8 "
            "when not given, 0 for tasks that generate."
        ),
    ] = None,
    monitor: Annotated[
        str | None,
        typer.Option(
            help="attention: record during training which tokens the heads attend to, when that settles, and how far the layers drift "
            "from what gradient flow conserves; conservation: that drift alone, for any model with attention layers."
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an earlier regard train on the same images, or on text with the same tokenizer: the model also learns "
            "from that one."
        ),
    ] = None,
    distil: Annotated[
        str | None,
        typer.Option(
            help="How the model learns from the teacher: response (its outputs); features, patient, attention or relation (what its "
            "layers compute too); token (its classes, through a token of its own), or transkd (stages of SegFormer and MiT), optionally "
            "with options, such as transkd:variant=gl or response:temperature=2; response when not given."
        ),
    ] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps the teacher's answers, so that it reads each image once, in this run and those of other "
            "students; for images without augmentation."
        ),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="Train in all processes that torchrun has started: ddp (copies, each with some items of a batch), fsdp (the "
            "same with sharded weights and optimizer) or context (each with a piece of the sequences, in language models)."
        ),
    ] = None,
    device: DEVICE = "cpu",
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Train one model on your data, and keep it.

    The output folder has the weights (safetensors), the config, the tokenizer, a record of what was trained on what
    with which result, and a README that says how to use it. The weights are the best of the run; if the last ones
    differ, they are in last/. The learning rate rises for 5 % of the steps and then falls along a cosine. If
    interrupted, the same command resumes: after Ctrl-C from the last step, after a crash from half a minute earlier (a
    minute on a machine that has become slow).

    With --teacher, the folder has only the student, which is like any other model. This is for tasks that classify or
    segment images, and for text.

    With --exits, the model also learns to answer after fewer layers; regard evaluate FOLDER --exit entropy:0.3 then
    measures what early exits cost and save, and regard generate --exit generates with them.

    With --parallel, the losses are those of one process, and a run can resume with a different number of processes; the
    first process writes and prints. All processes must see the folder.

    With --monitor attention, the folder also has attention.html, with pictures, and the figures in attention.json.

    Examples:

    \b
        regard train my_corpus.txt --mechanism delta_rule --budget 20m --output my_model
        regard train my_corpus.txt --tokenizer bpe:4096 --dim 256 --layers 6 --budget 2h
        regard train reviews.csv --mechanism linear --output reviews
        regard train --task images:size=64,augment=light photos/ --model van_b0 --ema 0.999 --output photos
        regard train --task segmentation:augment=standard scans/ --model unet_nano --output scans
        regard train --task segmentation scans/ --model segformer_b0 --teacher big_b2 --distil transkd --output small
        regard train my_corpus.txt --layers 2 --dim 64 --heads 2 --teacher my_model --output small
        regard train --task recall --mechanism "gated_linear*3+softmax" --budget "2M tokens"
        regard train my_corpus.txt --tokenizer bpe:1024 --monitor attention --budget 5m
        regard train reviews.csv --exits all:own --output reviews
        regard train --exits all:own --frozen reviews --budget 2m --output reviews_exits
        torchrun --nproc-per-node 2 -m regard train my_corpus.txt --budget "2M tokens" --parallel ddp
    """
    from regard.distributed.together import TORCHRUN, WAYS, joined, started_ranks
    from regard.measurement.budget import Budget
    from regard.tasks import create_task
    from regard.workbench.comparison.settings import CompareSettings
    from regard.workbench.trained.card import chosen_weights, learned_from
    from regard.workbench.trained.folder import DIVERGED
    from regard.workbench.trained.run import train_model

    if monitor is not None:
        one_of("--monitor", monitor, MONITORS)
    if parallel is None and started_ranks() > 1:
        raise Unsupported(
            f"{started_ranks()} processes that would each train the same model",
            supported="--parallel ddp, fsdp or context",
            nearest=f"{TORCHRUN} --parallel ddp",
        )
    if parallel is not None:
        one_of("parallel", parallel, WAYS)
    first = parallel is None or context.with_resource(joined(device))
    quiet = as_json or not first

    def recognised(described: str) -> None:
        if not quiet:
            console.print(plain(f"By its contents: --task {described}"))

    kept = None if frozen is None else _frozen(context, frozen, exits, device)
    entered = enter_plugins(plugin)
    own = plugged_tasks(entered.tasks, () if task else (data, validation))
    if kept is not None:
        asked = kept.trained.task()
    elif own and task is None:
        asked = own[0]
    else:
        chosen = None if task is None else [task]
        ((name, options),) = describe_tasks(chosen, data, validation, length, tokenizer, recognised, skip_unreadable)
        asked = create_task(name, **options)
    variants = [] if model is None else named_backbones(model)
    if variants and mechanism is not None:
        raise Unsupported(
            f"--mechanism {mechanism} in {model}, which has its own layers",
            supported="no --mechanism with this --model",
        )
    if variants:
        model = None
    elif kept is None:
        variants = read_mechanisms(mechanism or "softmax", [asked])
    sizes: dict[str, Any] = {
        "mechanisms": tuple(variants),
        "frames": (frame,),
        "dim": dim,
        "layers": layers,
        "heads": heads,
    }
    if kept is not None:
        sizes = kept.sizes
    if len(sizes["mechanisms"]) != 1:
        raise Unsupported(f"mechanism {mechanism!r}", supported="one mechanism", nearest="regard compare")
    stacked = read_stack(stack)
    if exits is not None and variants and variants[0].backbone is not None:
        raise Unsupported(f"--exits with the backbone {variants[0].name}", supported="--exits with --mechanism")
    if exits is not None:
        stacked = read_exits(exits, sizes["layers"], asked.objective, stacked)
    settings = CompareSettings(
        budget=Budget.parse(budget),
        seeds=1,
        first_seed=seed,
        batch_tokens=4096 if batch_tokens is None else batch_tokens,
        whole_batches=batch_tokens is None,
        rates=(learning_rate,),
        lengths=(asked.length,),
        stack=stacked,
        precision=precision,
        device=device,
        model=model,
        plugins=tuple(entered.files),
        **sizes,
    )
    master = None
    if teacher is not None:
        from regard.workbench.trained.teacher import Teacher

        master = Teacher.read(teacher, distil or "response", asked, device, teacher_cache)
    elif distil is not None:
        raise Unsupported(f"--distil {distil} without a teacher", supported="--teacher FOLDER, of regard train")
    elif teacher_cache is not None:
        raise Unsupported("--teacher-cache without a teacher", supported="--teacher FOLDER, of regard train")
    watcher = None if monitor is None else _watcher(monitor, asked, output)
    if not quiet:
        console.print(plain(asked.describe()))
        console.print()
    with progress(quiet=quiet) as (bar, line):
        shown = bar.add_task("starting", total=None)

        def on_step(point: Any, steps: int, left: float) -> None:
            said = f"loss {point.loss:.3f}"
            bar.update(shown, description=said, completed=point.step + 1, total=steps)
            line(
                f"{(point.step + 1) / steps:4.0%}  step {point.step + 1} of {steps}  {said}  about {units.clock(left)} left"
            )

        def say(sentence: str) -> None:
            if not quiet:
                bar.console.print(Text(sentence, style="dim"))

        trained = train_model(
            asked,
            settings,
            output,
            ema=ema,
            best_of=best_of,
            monitor=watcher,
            teacher=master,
            frozen=kept,
            parallel=parallel,
            on_step=on_step,
            say=say,
        )
    record = trained.record
    page = (
        None
        if watcher is None
        else watcher.write_page(output / f"{watcher.name}.html", f"{record['mechanism']} on {asked.name}")
    )
    if as_json and first:
        seen = {} if watcher is None else {watcher.name: {"page": str(page), **watcher.summary()}}
        emit({"folder": str(trained.folder), **record, **seen})
    elif first and record["state"] != DIVERGED:
        rule = record["baseline"]
        beside = f"; without training, {rule['name']} has {rule['score']:.4g}" if rule else ""
        console.print(Text(f"{record['score']:.4g} {record['metric']} on held-out data{beside}.", style="bold"))
        for name, (mean, error) in record["figures"].items():
            console.print(Text(f"{name}: {units.told(mean, error)} over the items"))
        if record.get("weights"):
            console.print(Text(f"Weights: {chosen_weights(record)}."))
        if master is not None:
            console.print(Text(f"{learned_from(record)}."))
        console.print(Text(f"Model: {trained.folder} (its README says how to use it)"))
        if watcher is not None:
            if said := watcher.says():
                console.print(Text(said))
            console.print(Text(f"{watcher.name.capitalize()}: {page}"))
    if record["state"] == DIVERGED:
        raise Unsupported(
            f"a learning rate of {learning_rate:g}, at which the training diverged",
            supported="a smaller --learning-rate, with another --output",
        )


def _watcher(monitor: str, task: Any, output: Path) -> Any:
    """The monitor of a run, whose records go into the folder of the model."""
    from regard.workbench.trained.attention_monitor import AttentionMonitor
    from regard.workbench.trained.conservation import ConservationMonitor
    from regard.workbench.trained.folder import BEGUN, read_record

    path = output / f"{monitor}.json"
    watcher = AttentionMonitor(task, path=path) if monitor == "attention" else ConservationMonitor(task, path=path)
    record = read_record(output)
    if record is not None and record["state"] != BEGUN and not watcher.as_record()["looks"]:
        raise Unsupported(
            f"--monitor {monitor} of the run in {output}, which has ended and was not monitored",
            supported="a run that has not ended",
            nearest="another --output",
        )
    return watcher


def _frozen(context: typer.Context, folder: Path, exits: str | None, device: str) -> Any:
    """The model whose exits are trained. Raises Unsupported for options that the model itself determines."""
    from regard.workbench.trained.frozen import Frozen

    if exits is None:
        raise Unsupported("--frozen without exits to train", supported="--exits LAYERS", nearest="--exits all")
    given = [name for name in given_options(context) if name in OF_THE_RUN]
    if given:
        said = ", ".join("data" if name == "data" else spelled_option(name) for name in given)
        raise Unsupported(f"{said} with --frozen {folder}", supported="what was trained there, on its own data")
    return Frozen.read(folder, device)
