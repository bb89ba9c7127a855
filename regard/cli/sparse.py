"""`regard sparse`: which sparse attention is safe for a trained model, and up to which compression."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from regard.cli.arguments import given_options, read_lengths, spelled_option
from regard.cli.console import console, emit
from regard.cli.options import JSON, PLUGINS
from regard.cli.progress import progress
from regard.contract import Unsupported, at_least, closest, one_of
from regard.workbench.plugins import enter_plugins

if TYPE_CHECKING:
    from regard.workbench.sparse.study import Plan

OUTPUT = Path("runs/sparse")
STORE, REPORT = "sparse.sqlite", "report.html"
PRESETS = ("constructed", "tiny", "small")
CONSTRUCTED = (256, 1024, 4096)
OF_CONSTRUCTED = ("lengths", "samples", "output")
OF_PRESETS = (*OF_CONSTRUCTED, "methods", "ratios", "tasks", "budget")
"""Options for models that are constructed here."""


def sparse(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of regard train (of text) or of a causal language model from transformers, or a .gguf file; or "
            "constructed, tiny or small: models that the command makes itself, unless a folder is called so here."
        ),
    ],
    lengths: Annotated[str | None, typer.Option(help="Lengths of the prompts in tokens: 1k,4k (k is 1024).")] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="all, or a comma-separated list; two of different phases are joined as in block_sparse + quest."
        ),
    ] = "all",
    ratios: Annotated[str, typer.Option(help="Compression ratios to try.")] = "2,4,8,16,20",
    tasks: Annotated[str, typer.Option(help="all, or a comma-separated list.")] = "all",
    samples: Annotated[
        int | None, typer.Option(help="Questions of each task at each length; 10 when not given.")
    ] = None,
    wording: Annotated[
        str, typer.Option(help="Wording of the prompts: full, as in the benchmark, or brief, for small models.")
    ] = "full",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text for the tasks about documents and for the task text, or a .json file of SQuAD. Repeatable."
        ),
    ] = None,
    effects: Annotated[
        int,
        typer.Option(
            help="Questions that look for side effects: repetition, facts lost among distractors, made-up answers. 0 turns this off."
        ),
    ] = 0,
    budget: Annotated[str | None, typer.Option(help="Time after which no new question is asked: 90s, 20m, 2h.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results; the same command resumes from it.")] = OUTPUT,
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Ask a trained model questions about long contexts, with dense and with sparse attention, and say what is safe.

    Nothing is trained. Methods read prompts sparsely (vertical_slash, block_sparse, flex_prefill, local_sinks), keep
    part of the cache (snapkv, ada_snapkv, pyramidkv, h2o, tova, streaming), read part of it (quest), or keep it in 8
    bits (int8).

    Examples:

    \b
        regard sparse smollm2/ --lengths 1k,4k --budget 1h
        regard sparse smollm2/ --lengths 2k --methods quest,snapkv --tasks text,ruler_niah --wording brief
        regard sparse my_model --lengths 512 --tasks text --data my_corpus.txt --json
        regard sparse smollm2/ --lengths 1k --methods quest,snapkv --ratios 4,8 --tasks text --effects 12
        regard sparse constructed
    """
    from regard.compression.sparse.catalogue import read_names
    from regard.core.files import check_folder
    from regard.measurement.budget import Budget

    enter_plugins(plugin)
    if samples is not None:
        at_least("samples", samples, 1)
    at_least("effects", effects, 0)
    one_of("wording", wording, ("full", "brief"))
    seconds = None
    if budget is not None:
        parsed = Budget.parse(budget)
        if parsed.unit != "seconds":
            raise Unsupported(f"budget {budget}", supported="a time: 90s, 20m, 2h", nearest="20m")
        seconds = parsed.amount
    counts = None if lengths is None else read_lengths(lengths)
    check_folder(output)
    preset = model if model in PRESETS and not Path(model).is_dir() else None
    if preset:
        taken = OF_CONSTRUCTED if preset == "constructed" else OF_PRESETS
        for name in given_options(context):
            if name not in (*taken, "model", "as_json"):
                raise Unsupported(
                    f"{spelled_option(name)} of {model}", supported=", ".join(spelled_option(each) for each in taken)
                )
    if preset == "constructed":
        _constructed(counts or CONSTRUCTED, samples or 150, output, as_json)
        return
    chosen = tuple(read_names(methods)), read_ratios(ratios)
    if preset:
        _preset(
            preset, counts or (256, 512), chosen, _tasks(tasks, brief=True), samples or 30, seconds, output, as_json
        )
        return
    from regard.workbench.sparse.study import Plan

    asked = _tasks(tasks, brief=False)
    given = None if data is None else data[0] if len(data) == 1 else data
    plan = Plan(counts or (1024,), *chosen, asked, wording, samples or 10, given, effects)
    _folder(Path(model), plan, seconds, output, as_json)


def read_ratios(text: str) -> tuple[float, ...]:
    """Sorted compression ratios above 1, without duplicates."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not found[0] > 1 or found[-1] > 1e6:
        raise Unsupported(f"ratios {text!r}", supported="comma-separated numbers above 1", nearest="2,4,8,16")
    return tuple(found)


def _tasks(text: str, *, brief: bool) -> tuple[str, ...]:
    from regard.workbench.sparse.study import TASKS
    from regard.workbench.sparse.tiny import TINY_TASKS

    known = TINY_TASKS if brief else TASKS
    if text.strip() == "all":
        return known
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names or [text]:
        if name not in known:
            raise Unsupported(f"task {name!r}", supported=", ".join(known), nearest=closest(name, known))
    return tuple(names)


def _folder(path: Path, plan: Plan, seconds: float | None, output: Path, as_json: bool) -> None:
    from regard.measurement.store import Store
    from regard.workbench.sparse.readers import open_reader
    from regard.workbench.sparse.report import write_page
    from regard.workbench.sparse.study import recommend, study

    reader = open_reader(path)
    with Store(output / STORE) as store, progress(quiet=as_json) as (bar, line):
        shown = bar.add_task("starting", total=None)

        def watch(doing: str, done: int, count: int) -> None:
            bar.update(shown, description=doing, completed=done, total=count)
            line(f"{done} of {count}: {doing}")

        def say(sentence: str) -> None:
            if not as_json:
                bar.console.print(Text(sentence, style="dim"))

        found = study(reader, plan, store, seconds=seconds, say=say, on_progress=watch)
    safe, sentence = recommend(found)
    page = write_page(found, output / REPORT)
    if as_json:
        emit({**found.as_dict(), "recommendation": {"safe": safe, "text": sentence}, "report": str(page)})
        return
    from regard.workbench.side_effects import sentence as effects_sentence
    from regard.workbench.sparse.report import effects_table, safe_table

    console.print(Text(found.name))
    console.print(_table(*safe_table(found)))
    if found.effects:
        console.print()
        console.print(_table(*effects_table(found)))
    for where, why in found.refused.items():
        console.print(Text(f"left out: {where}: {why}", style="dim"))
    if found.beyond:
        console.print(Text(found.beyond, style="dim"))
    if found.over:
        console.print(
            Text(
                "The budget ran out before every question was asked; give the same command again to resume.",
                style="dim",
            )
        )
    console.print()
    console.print(Text(sentence, style="bold"))
    if found.effects:
        console.print(Text(effects_sentence("dense", found.effects), style="bold"))
    console.print(Text(f"Report: {page}"))


def _constructed(lengths: Sequence[int], trials: int, output: Path, as_json: bool) -> None:
    from regard.workbench.sparse.constructed import isoflops
    from regard.workbench.sparse.report import isoflops_rows, isoflops_sentence, write_isoflops

    with progress(quiet=as_json) as (bar, line):
        shown = bar.add_task("starting", total=None)

        def watch(length: int, width: int, ratio: float) -> None:
            bar.update(shown, description=f"{length} keys, width {width}, {ratio:g}x")
            line(f"{length} keys, width {width}, {ratio:g}x")

        groups = {
            name: isoflops(lengths, trials, topics=topics, on_point=watch)
            for name, topics in (("pages with a topic", True), ("pages without one", False))
        }
    measured = (
        "Keys, values and queries are made by hand; one attention layer, dense or as Quest, finds a value by its key.",
        "The size is the width of a key, the cost the multiplications and additions of a query.",
        f"{trials} trials a point; a win is one that z tells from chance (1.645, one-sided).",
    )
    page = write_isoflops(groups, output / REPORT, title="Retrieval by a layer made by hand", measured=measured)
    sentences = [isoflops_sentence(by_length, name) for name, by_length in groups.items()]
    if as_json:
        emit({"groups": {name: _points(g) for name, g in groups.items()}, "text": sentences, "report": str(page)})
        return
    for name, by_length in groups.items():
        console.print(Text(name, style="bold"))
        console.print(_table(*isoflops_rows(by_length)))
    for sentence in sentences:
        console.print(Text(sentence, style="bold"))
    console.print(Text(f"Report: {page}"))


def _points(by_length: Any) -> dict[str, Any]:
    return {
        str(n): [{"size": p.size, "ratio": p.ratio, "cost": p.cost, "score": p.score} for p in points]
        for n, points in by_length.items()
    }


def _preset(
    name: str,
    lengths: Sequence[int],
    chosen: tuple[tuple[str, ...], tuple[float, ...]],
    tasks: tuple[str, ...],
    samples: int,
    seconds: float | None,
    output: Path,
    as_json: bool,
) -> None:
    from regard.measurement.store import Store
    from regard.workbench.sparse import tiny
    from regard.workbench.sparse.analysis import scaling_law
    from regard.workbench.sparse.report import isoflops_rows, isoflops_sentence, write_isoflops, write_page
    from regard.workbench.sparse.study import Plan, observations, points, recommend, study

    plan = Plan(tuple(lengths), *chosen, tasks, "brief", samples)
    steps, longest = tiny.PRESETS[name]
    found = {}
    with Store(output / STORE) as store, progress(quiet=as_json) as (bar, line):
        shown = bar.add_task("starting", total=None)
        for size in tiny.SIZES:

            def step(number: int, loss: float, size: str = size) -> None:
                bar.update(shown, description=f"training {size}: loss {loss:.3f}", completed=number, total=steps)
                line(f"training {size}: step {number} of {steps}, loss {loss:.3f}")

            def watch(doing: str, done: int, count: int, size: str = size) -> None:
                bar.update(shown, description=f"{size}: {doing}", completed=done, total=count)
                line(f"{size}: {done} of {count}: {doing}")

            model = tiny.train(size, output / "models" / size, steps, seconds=longest, on_step=step)
            reader = tiny.WordReader(model, f"{name} {size}")
            found[size] = study(reader, plan, store, seconds=seconds, on_progress=watch)
            write_page(found[size], output / f"report-{size}.html")
    groups = {method: grouped for method in plan.methods if (grouped := points(found.values(), method))}
    measured = (
        "Three decoders were trained on the tasks, and answer the same samples dense and sparse.",
        "The cost is that of a prompt and its reply in floating-point operations; the score the mean over tasks.",
    )
    page = write_isoflops(groups, output / REPORT, title=f"Decoders trained here ({name})", measured=measured)
    sentences = [isoflops_sentence(by_length, method) for method, by_length in groups.items()]
    laws = {method: scaling_law(observations(found.values(), method)) for method in plan.methods}
    if as_json:
        emit(
            {
                "sizes": {size: {**f.as_dict(), "recommendation": recommend(f)[1]} for size, f in found.items()},
                "groups": {method: _points(g) for method, g in groups.items()},
                "laws": {method: None if law is None else vars(law) for method, law in laws.items()},
                "text": sentences,
                "report": str(page),
            }
        )
        return
    for size, one in found.items():
        console.print(Text(f"{size}: {recommend(one)[1]}"))
    for method, by_length in groups.items():
        console.print(Text(method, style="bold"))
        console.print(_table(*isoflops_rows(by_length)))
    for sentence in sentences:
        console.print(Text(sentence, style="bold"))
    for method, law in laws.items():
        if law is not None:
            held = ", ".join(f"{what} {r:.2f}" for what, r in law.held_out.items())
            console.print(
                Text(
                    f"{method}: score ~ P^{law.parameters:.2f} N^{law.length:.2f} compression^{law.compression:.2f}; "
                    f"R^2 on what was left out: {held or 'nothing to leave out'}"
                )
            )
    console.print(Text(f"Report: {page}"))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
