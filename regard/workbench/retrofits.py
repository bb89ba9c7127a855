"""Several retrofits of one model, compared with each other and with the original."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regard.core.files import write_text_atomically
from regard.measurement import units
from regard.measurement.budget import Budget
from regard.models.variants import Variant
from regard.retrofit import card, open_host
from regard.retrofit.measures import ORIGINAL, RETROFIT, change, kind_of, measures_of
from regard.retrofit.measures.probes import found_by, probed
from regard.retrofit.measures.shared import kept
from regard.retrofit.measures.verdict import state_at
from regard.retrofit.run import Say, planned, read_settings
from regard.retrofit.settings import AUTO, RECALL
from regard.retrofit.stage import Progress, Watch
from regard.workbench.reports.pages import pages
from regard.workbench.reports.section_pages import parts_of_page
from regard.workbench.reports.sections import Curves, Points, Section

RECORD = "retrofits.json"


def compare_retrofits(
    model: Any,
    variants: Sequence[Variant],
    *,
    data: Any = None,
    output: str | os.PathLike[str],
    budget: Budget,
    keep_layers: str | Sequence[int] | None = None,
    validation: Any = None,
    tokenizer: Any = None,
    watch: Watch = lambda progress: None,
    say: Say = lambda sentence: None,
    **settings: Any,
) -> dict[str, Any]:
    """Retrofit a model with each of several mechanisms, each in its own folder, and recommend one.

    Args:
        model, keep_layers, validation, tokenizer, settings: as in :func:`regard.retrofit.retrofit`.
        data: likewise; the sources of Python's standard library when None.
        variants: the mechanisms, each for one kind of layer; the retrofit itself chooses which layers change.
        output: folder for the results. If a run is killed, the same call resumes it.
        budget: a total time, shared equally; or tokens or steps for each mechanism.
        watch, say: called with the progress, and with status messages.

    Returns:
        The contents of ``retrofits.json``: `model`, `retrofits` (one record per mechanism) and `recommendation`.

    Raises:
        Unsupported: before any training, for whatever :func:`regard.retrofit.retrofit` would refuse with any of the
            mechanisms, such as a folder of another retrofit or a budget that is too small for one of them.
    """
    names, place = [variant.name for variant in variants], Path(output)
    share = Budget("seconds", budget.amount / len(names)) if budget.unit == "seconds" else budget
    asked = [read_settings(name, keep_layers, share, settings) for name in names]
    host, records = open_host(model, tokenizer, say), dict[str, Any]()
    runs = planned(
        host, asked, [place / folder_of(name) for name in names], data=data, validation=validation, watch=watch, say=say
    )
    for at, (name, run) in enumerate(zip(names, runs, strict=True)):

        def watched(progress: Progress, at: int = at, name: str = name) -> None:
            watch(dataclasses.replace(progress, doing=f"{name} ({at + 1} of {len(names)}): {progress.doing}"))

        say(f"{name}, {at + 1} of {len(names)}")
        records[name] = dataclasses.replace(run, watch=watched).finish().record
    first = next(iter(records.values()))
    told = {"model": first["from"]["name"], "retrofits": records, "recommendation": recommend(records)}
    text = json.dumps(told, indent=1, ensure_ascii=False)
    write_text_atomically(place / RECORD, text)
    write_report(place)
    return told


def folder_of(name: str) -> str:
    """The name of the folder for a mechanism's retrofit."""
    return re.sub(r"[^A-Za-z0-9_.=-]+", "-", name)


def judged(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The perplexities that decide: those on the last text, which is from another source if there is one."""
    found: Mapping[str, Any] = list(record["results"]["perplexity"].values())[-1]
    return found


def recommend(records: Mapping[str, Any]) -> str:
    """Recommend one retrofit: of those that are worth taking (or of all, if none is), the one that loses least."""
    worth = [name for name, record in records.items() if record["recommendation"]["take"]]
    losses = {name: measures_of(record).loss(record["results"]) for name, record in records.items()}
    best = min(worth or records, key=lambda name: losses[name][0])
    least, error, words = losses[best]

    def near_best(name: str) -> bool:
        lost, its, _ = losses[name]
        return name != best and lost - least <= 2 * ((its or 0.0) ** 2 + (error or 0.0) ** 2) ** 0.5

    near = [name for name in worth or records if near_best(name)]
    beside = f" {' and '.join(near)} cannot be told apart from it." if near else ""
    if worth:
        text = str(records[best]["recommendation"]["text"])
        return f"{best}: {text[0].lower()}{text[1:]}{beside}"
    return f"Keep the original: the nearest is {best}, of which {words}.{beside}"


def rows(records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table row for the original and one for each retrofit."""
    first = next(iter(records.values()))
    if kind_of(first) != "language":
        return _rows(records)
    at = state_at(*(record["results"] for record in records.values()))
    lengths = sorted({int(length) for record in records.values() for length in record["results"]["prefill"]})
    probes = dict.fromkeys((what, n) for record in records.values() for what, n, _ in probed(record["results"]))

    def row(name: str, model: str, *of: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"attention": name}
        results = of[0]["results"]
        found |= {f"perplexity on {source}": units.number(its[model]) for source, its in results["perplexity"].items()}
        found["change"] = None if model == ORIGINAL else change(dict(judged(of[0])))
        for what, size in probes:
            its = next((its for record in of for *one, its in probed(record["results"]) if one == [what, size]), None)
            shown = None if its is None else kept(*found_by(its, model))
            found[f"{what} in {units.tokens(int(size))}"] = shown
        found[f"state at {units.tokens(at)}"] = units.size(results["state"][str(at)][model])
        for what, words in (("prefill", "prompt of"), ("decoding", "token after")):
            for length in lengths:
                its = _figure(of, what, length)
                median = None if its is None else units.milliseconds(1000 * its[model]["median"])
                found[f"{words} {units.tokens(length)}"] = median
        found["new layers"] = "none" if model == ORIGINAL else card.numbers(of[0]["swapped"])
        return found

    original = row("original", ORIGINAL, *records.values())
    return [original, *(row(name, RETROFIT, record) for name, record in records.items())]


def _figure(records: Sequence[Mapping[str, Any]], what: str, length: int) -> Any:
    """The figure at a length of the first record that has it, since not all mechanisms read all lengths; None if none
    has."""
    return next((its for record in records if (its := record["results"][what].get(str(length)))), None)


def _rows(records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same for models other than language models."""
    told = {name: measures_of(record).rows(record["results"]) for name, record in records.items()}
    original = {what: before for what, before, _ in next(iter(told.values()))}
    found: list[dict[str, Any]] = [{"attention": "original", **original, "new layers": "none"}]
    for name, its in told.items():
        new = card.numbers(records[name]["swapped"])
        found.append({"attention": name, **{what: after for what, _, after in its}, "new layers": new})
    return found


def says(record: Mapping[str, Any]) -> str:
    """What the retrofits have in common, from the record of one of them."""
    keep = record["settings"]["keep_layers"]
    those = "the layers that its own sensitivity chose" if keep.startswith((AUTO, RECALL)) else f"these layers: {keep}"
    return f"Each was trained back with the same budget on the same data, and keeps {those}."


def sections(records: Mapping[str, Any]) -> list[Section]:
    """The sections of the report."""
    first = next(iter(records.values()))
    if kind_of(first) != "language":
        return [Section("Side by side", says(first), [], rows(records))]
    at = state_at(*(record["results"] for record in records.values()))
    source = list(first["results"]["perplexity"])[-1]
    before = judged(first)
    farthest = max(map(judged, records.values()), key=lambda its: its["length"])  # some read longer blocks than others
    points = {"softmax": (first["results"]["state"][str(at)][ORIGINAL] / 2**20, float(before[ORIGINAL]))}
    curves = {"softmax": [(b["last"], b[ORIGINAL]) for b in farthest["by_position"]]}
    for name, record in records.items():
        its = judged(record)
        points[name] = (record["results"]["state"][str(at)][RETROFIT] / 2**20, float(its[RETROFIT]))
        curves[name] = [(b["last"], b[RETROFIT]) for b in its["by_position"]]
    state = Points(
        "perplexity against state",
        f"MiB of state at {units.tokens(at)} tokens, by definition",
        f"↑ perplexity on {source} (lower is better, so low is up)",
        points,
        note="softmax is the original.",
        log_x=True,
        log_y=True,
        rising=False,
    )
    position = Curves(
        "perplexity by position",
        "position, up to",
        "↑ perplexity (lower is better, so low is up)",
        curves,
        note=f"Blocks of training had {first['settings']['length']} tokens.",
        log_x=True,
        log_y=True,
        rising=False,
    )
    return [Section("Side by side", says(first), [state, position], rows(records))]


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report page of a comparison of retrofits, ``report.html`` in its folder by default.

    Returns:
        The path of the page.
    """
    told = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    output = output or folder / "report.html"
    write_text_atomically(output, render(told))
    return output


def render(told: Mapping[str, Any]) -> str:
    """The report page as HTML text."""
    records = told["retrofits"]
    first = next(iter(records.values()))
    return (
        pages()
        .get_template("retrofits.html.j2")
        .render(
            told=told,
            machine=first["machine"],
            budget=first["settings"]["budget"],
            sections=parts_of_page(sections(records)),
            folders={name: folder_of(name) for name in records},
            texts={name: record["recommendation"] for name, record in records.items()},
        )
    )
