"""`regard compress`: make a trained model smaller and faster, or measure every recipe on it."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from rich.table import Table
from rich.text import Text

from regard.cli.arguments import only_beside
from regard.cli.console import console, emit
from regard.cli.options import JSON, PLUGINS
from regard.cli.progress import progress
from regard.contract import Unsupported, at_least
from regard.workbench.plugins import enter_plugins, plugin_words

if TYPE_CHECKING:
    from regard.compression import Recipe
    from regard.workbench.lighter.study import Study
    from regard.workbench.lighter.subjects import Subject
    from regard.workbench.side_effects import Probes

OUTPUT = Path("runs/compress")
WORK = ".work"


def compress(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder of regard train; of a causal language model, encoder or text classifier from transformers (or a .gguf "
            "file); or of a model from timm (or timm:NAME)."
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Data to calibrate with and to score on: text; for a classifier also a table with the columns text and label; "
            "for an image model a folder of images. A model of regard train uses its own data when not given. Repeatable."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Make one model: int8, gptq:bits=4,group=32, smoothquant + w8a8, or a .yaml file."),
    ] = None,
    recipes: Annotated[str | None, typer.Option(help="Measure several: all, or a comma-separated list.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the model, or for the results; the same command resumes from it."),
    ] = None,
    budget: Annotated[str, typer.Option(help="Time for all recipes together: 90s, 20m, 2h.")] = "20m",
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window; 512, or as many as the model reads, when not given.")
    ] = None,
    calibration: Annotated[
        int, typer.Option(help="Windows or items to calibrate with, for one model; for several the budget decides.")
    ] = 16,
    tolerance: Annotated[float, typer.Option(help="Share of the quality that the recommended recipe may lose.")] = 0.01,
    effects: Annotated[
        int,
        typer.Option(
            help="Questions that look for side effects: repetition, facts lost among distractors, made-up answers. 0 turns this off."
        ),
    ] = 0,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Make a model smaller and faster, with fewer bits, heads, neurons, layers or tokens, and measure what that costs.

    With --recipe, one model is written, which regard generate, evaluate, predict, serve and (without a step tokens)
    sparse read just like the original. With --recipes, each recipe is scored on held-out data and timed against the
    original.

    A recipe has at most one step of each kind, in this order: structured, axformer or gates, which remove parts;
    magnitude, wanda or sparsegpt, which set weights to 0; smoothquant or awq; int8, int4, gptq, lsq, w8a8 or llm_int8;
    tokens, which keeps fewer tokens or makes the cache cheaper; export, which writes a program next to the weights.
    distil comes first, to train a student with half the layers, or after a step, to recover its losses by learning from
    the original's outputs; with teacher=FOLDER it learns from a larger model with the same tokens, classes and inputs.

    Examples:

    \b
        regard compress smollm2/ --data my_corpus.txt --recipes all --budget 20m
        regard compress smollm2/ --recipe int8 --output small/
        regard compress my_model --recipe "gptq:bits=4,group=32" --output small/
        regard compress my_classifier --recipe "axformer:focus=size,slack=0.02 + int8" --output small/
        regard compress smollm2/ --data my_corpus.txt --recipe "structured:neurons=0.2,layers=2" --output small/
        regard compress smollm2/ --data my_corpus.txt --recipe "gates:share=0.6,hidden=true + distil:budget=10m" --output small/
        regard compress my_model --recipes "int8,int4:group=64,awq + gptq" --json
        regard compress smollm2/ --data my_corpus.txt --recipe "structured:layers=4 + distil:budget=10m + int8" --output small/
        regard compress smollm2/ --data my_corpus.txt --recipe "int8 + tokens:method=snapkv,capacity=256" --output small/
        regard compress smollm2/ --recipe "int8 + tokens:method=int8" --output small/
        regard compress my_images --recipe "int8 + tokens:method=evit,keep=0.7 + export" --output small/
        regard compress smollm2/ --data my_corpus.txt --recipes "int8,int4" --effects 12
        regard compress all-MiniLM-L6-v2/ --data my_corpus.txt --recipes "int8,w8a8,structured:layers=2"
        regard compress my_bert_classifier/ --data reviews.csv --recipe "distil:teacher=big_classifier/,budget=10m" --output small/
        regard compress my_bert_classifier/ --data reviews.csv --recipe "w8a8 + export" --output small/
        regard compress timm:vit_small_patch16_224 --data photos/ --recipes "int8,w8a8,tokens:method=tome"
    """
    from regard.compression.recipes import read_recipe, read_recipes
    from regard.core.files import check_folder
    from regard.measurement.budget import Budget
    from regard.workbench.lighter.subjects import open_subject

    entered = enter_plugins(plugin)
    at_least("calibration", calibration, 1)
    at_least("tolerance", tolerance, 0)
    at_least("effects", effects, 0)
    if recipe is not None and recipes is not None:
        raise Unsupported("both --recipe and --recipes", supported="--recipe for one model, --recipes to compare some")
    if recipe is not None:
        only_beside(context, "--recipes", ["budget", "tolerance"])
        if output is None:
            raise Unsupported(
                "--recipe without --output", supported="a folder for the model", nearest="--output small/"
            )
        one = read_recipe(recipe)
        _check_output(output, model)
        subject = open_subject(model, _data(data, model, needed=bool(one.needs)), length, [one])
        asked = _probes(subject, effects, length, data)
        _one(subject, one, output, calibration, asked, as_json)
        return
    only_beside(context, "--recipe", ["calibration"])
    several, time = read_recipes(recipes or "all"), Budget.parse(budget)
    check_folder(output or OUTPUT)
    subject = open_subject(model, data or None, length, several)
    asked = _probes(subject, effects, length, data)
    command = _command(model, data, length, entered.files)
    _several(subject, several, output or OUTPUT, time, command, tolerance, asked, as_json)


Asked: TypeAlias = "tuple[Probes | None, int]"
"""Probes of side effects, and how many questions they ask."""


def _probes(subject: Subject, effects: int, length: int | None, data: list[str] | None) -> Asked:
    if not effects:
        return None, 0
    from regard.workbench.lighter.subjects.base import LENGTH
    from regard.workbench.side_effects import Probes

    return Probes(subject.reader(subject.load()), length or LENGTH, data or None), effects


def _one(subject: Subject, recipe: Recipe, output: Path, calibration: int, asked: Asked, as_json: bool) -> None:
    from regard.compression import compress as compress_model
    from regard.workbench.lighter.study import calibration_data, training_data
    from regard.workbench.side_effects import HEADINGS, Effects, rows, sentence

    work, (probes, count), model = output / WORK, asked, subject.load()
    effects: dict[str, Effects] = {}
    with progress(quiet=as_json) as (bar, line):
        shown = bar.add_task(recipe.name, total=None)

        def watch(name: str, done: int, of: int) -> None:
            bar.update(shown, description=name, completed=done, total=of)
            line(f"{name} ({done} of {of})")

        def ask(name: str) -> None:
            if probes is not None:
                watch(f"{name}: side effects", 0, count)
                reader = subject.reader(model)
                effects[name] = Effects(tuple(probes.ask(reader, number) for number in range(count)))

        ask("original")
        begun = work.exists()
        try:
            found = compress_model(
                model,
                recipe,
                calibration_data(subject, recipe, calibration),
                training=training_data(subject, recipe),
                run=subject.run,
                work=work if recipe.needs else None,
                on_layer=watch,
            )
        except Unsupported:
            if not begun:  # a recipe that cannot run leaves no folder; one that was interrupted resumes
                shutil.rmtree(work, ignore_errors=True)
                if output.is_dir() and not any(output.iterdir()):
                    output.rmdir()
            raise
        ask(recipe.name)
    work.mkdir(parents=True, exist_ok=True)  # its presence marks an interrupted save, which starts over
    subject.save(found, output)
    shutil.rmtree(work, ignore_errors=True)
    if as_json:
        told = {name: one.as_dict() for name, one in effects.items()}
        emit({"folder": str(output), **found.report.as_dict(), "side_effects": told or None})
        return
    console.print(Text(str(found.report)))
    if effects:
        console.print(_plain_table(["model", *HEADINGS], rows("original", effects)))
        console.print(Text(sentence("original", effects)))
    console.print(Text(f"Model: {output}"))


def _several(
    subject: Subject,
    recipes: list[Recipe],
    output: Path,
    budget: Any,
    command: Callable[[str], str],
    tolerance: float,
    asked: Asked,
    as_json: bool,
) -> None:
    from regard.workbench.lighter.report import effects_table, write_page
    from regard.workbench.lighter.study import REPORT, caution, recommend, study
    from regard.workbench.side_effects import sentence as effects_sentence

    with progress(quiet=as_json) as (bar, line):
        shown = bar.add_task("starting", total=len(recipes))

        def watch(doing: str, done: int, count: int) -> None:
            bar.update(shown, description=doing, completed=done, total=count)
            line(f"{done} of {count}: {doing}")

        def say(sentence: str) -> None:
            if not as_json:
                bar.console.print(Text(sentence, style="dim"))

        probes, count = asked
        found = study(subject, recipes, output, budget, probes=probes, effects=count, say=say, on_progress=watch)
    best, sentence = recommend(found, tolerance)
    page, careful = write_page(found, output / REPORT, command=command, tolerance=tolerance), caution(found, tolerance)
    if as_json:
        advice = {"recipe": best, "text": sentence, "caution": careful or None}
        emit({**found.as_dict(), "recommendation": advice, "report": str(page)})
        return
    console.print(Text(found.described))
    console.print(_table(found, best))
    for name, why in found.refused.items():
        console.print(Text(f"left out: {name}: {why}", style="dim"))
    console.print()
    if found.effects:
        console.print(_plain_table(*effects_table(found)))
        console.print(Text(effects_sentence("original", found.effects)))
        console.print()
    console.print(Text(sentence, style="bold"))
    if careful:
        console.print(Text(careful))
    if best is not None:
        console.print(Text(command(best)), soft_wrap=True)  # on one line, so that it can be copied
    console.print(Text(f"Report: {page}"))


def _command(model: Path, data: list[str] | None, length: int | None, plugins: Sequence[str]) -> Callable[[str], str]:
    """A function that turns a recipe into the command that makes its model from the same data."""

    def made(recipe: str) -> str:
        from regard.compression.recipes import read_recipe

        words = ["regard", "compress", str(model)]
        if read_recipe(recipe).needs:
            words += [word for path in data or () for word in ("--data", path)]
            words += [] if length is None else ["--length", str(length)]
        return f'{shlex.join(words)} --recipe "{recipe}"{plugin_words(plugins)} --output small/'

    return made


def _table(found: Study, best: str | None) -> Table:
    from regard.workbench.lighter.report import cells, labels

    rows = (found.original, *found.rows)
    return _plain_table(labels(found), [cells(found, row) for row in rows], [row.recipe == best for row in rows])


def _plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[bool] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    for i, row in enumerate(rows):
        style = "bold" if i < len(best) and best[i] else ""
        table.add_row(*(Text(cell, style=style) for cell in row))
    return table


def _data(data: list[str] | None, model: Path, *, needed: bool) -> Any:
    """The data to open a model with; empty for a transformers or timm model if the recipe needs no calibration."""
    from regard.workbench.trained.folder import RECORD

    if data or needed or (model / RECORD).is_file():
        return data or None
    return ()


def _check_output(output: Path, model: Path) -> None:
    from regard.compression.folders import RECORD, is_compressed, library_of_place
    from regard.core.files import check_folder, is_same_place

    if is_same_place(output, model):
        raise Unsupported(f"{output} as the output, which is the model itself", supported="another folder")
    check_folder(output)
    strange = output.is_dir() and any(output.iterdir()) and not {RECORD, WORK} & {p.name for p in output.iterdir()}
    if strange:
        raise Unsupported(
            f"{output} as the output, which has other files in it",
            supported="a new folder, or that of a compressed model",
        )
    if is_compressed(output) and library_of_place(output) != library_of_place(model):
        raise Unsupported(
            f"{output} as the output, which has a compressed model of another library", supported="another folder"
        )
