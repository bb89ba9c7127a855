"""The report page of a retrofit: a self-contained HTML file, made from the record in its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from regard.catalogue import list_mechanisms
from regard.core.files import write_text_atomically
from regard.measurement import units
from regard.models.variants import read_variant
from regard.retrofit import card, read_record
from regard.retrofit.inserting import inserts_tokens
from regard.retrofit.measures import MODELS, change, kind_of, measures_of
from regard.workbench.reports import charts
from regard.workbench.reports.charts import Figure, Series
from regard.workbench.reports.markers import numbers
from regard.workbench.reports.pages import pages
from regard.workbench.reports.scales import Axis

HEADINGS = {
    "language": "Perplexity by position",
    "encoder": "Hidden states beside the original's",
    "vision": "Hidden states beside the original's",
}
KEPT = "The share of the variance of hidden states that is kept after each layer: 1 is the original, 0 no better than its mean."
LEDES = {
    "language": "Lower is better and is drawn higher. Blocks of training had {length} tokens; what lies to the right of that was "
    "never trained.",
    "encoder": KEPT,
    "vision": KEPT,
}
COSTS = {
    "language": ("State and time by length", "State is what a sequence goes on from. "),
    "encoder": ("Time and operations by length", ""),
    "vision": (
        "Time and operations",
        "Operations are those of attention by definition, of images as large as these and larger: attention to all patches grows "
        "with the square of their number. ",
    ),
}


def write_retrofit_report(folder: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a finished retrofit, replacing the file atomically.

    Args:
        folder: the retrofit's folder.
        path: path of the HTML file; ``report.html`` in the folder when None.

    Raises:
        Unsupported: for a folder without a finished retrofit, or if the file cannot be written.
    """
    place = Path(folder) / "report.html" if path is None else Path(path)
    page = render_retrofit(read_record(folder))
    write_text_atomically(place, page)
    return place


def render_retrofit(record: Mapping[str, Any]) -> str:
    """The report page of a record as HTML text."""
    view, kind = _View(record), kind_of(record)
    quality, costs = {
        "language": (view.positions, view.costs),
        "encoder": (view.layers, view.reading),
        "vision": (view.layers, view.images),
    }[kind]
    cost, explained = COSTS[kind]
    return (
        pages()
        .get_template("retrofit.html.j2")
        .render(
            record=record,
            title=f"{record['from']['name']} with {record['settings']['mechanism']}",
            swapped=card.named(record["swapped"]),
            kept=card.numbers(record["kept"]),
            shared=card.shared_heads(record),
            trained=sum(record["trained_tokens"].values()),
            quality=quality(),
            heading=HEADINGS[kind],
            lede=LEDES[kind].format(**record["settings"]),
            costs=costs(),
            cost=cost,
            explained=explained,
            counts=record.get("counts", "tokens"),
            training=view.training(),
            inserts=inserts_tokens(record["settings"]["mechanism"]),
            sensitivity=record["sensitivity"],
            rows=measures_of(record).rows(record["results"]),
            facts=_facts(record),
        )
    )


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, machine = record["settings"], record["machine"]
    found = {
        "model": f"{record['from']['class']} {record['from']['fingerprint']}",
        **{name.replace("_", " "): value for name, value in settings.items()},
        "data": record["data"]["digest"],
        "regard": record["regard"],
        "torch": machine["torch"],
        "processor": machine["cpu"],
        "machine": machine["machine_id"],
    }
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in found.items()
        if value not in (None, [])
    ]


class _View:
    """The charts for a record."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record, self.results = record, record["results"]
        ((mechanism, _),) = read_variant(record["settings"]["mechanism"]).layers
        known = numbers(["softmax", mechanism], list_mechanisms())
        self.numbers = (
            dict(zip(MODELS, known.values(), strict=True)) if len(known) == 2 else {MODELS[0]: 0, MODELS[1]: 1}
        )

    def positions(self) -> list[Figure]:
        """Charts of perplexity by position, one per text."""
        found = []
        for at, (source, its) in enumerate(self.results["perplexity"].items()):
            bins = its["by_position"]
            series = [self._series(model, [(b["last"], b[model]) for b in bins]) for model in MODELS]
            axis = Axis("↑ perplexity (lower is better, so low is up)", units.tick, log=True, rising=False)
            place = Axis("position, up to", units.tokens, log=True, base=2)
            note = f"{its['blocks']} blocks of {its['length']} tokens; in all {change(its)}."
            found.append(Figure(source, self._lines(f"position-{at}", source, series, place, axis), note))
        return found

    def costs(self) -> list[Figure]:
        """Charts by length of the state, the time of a prompt and the time of a token."""
        length = Axis("tokens", units.tokens, log=True, base=2)
        state = [self._series(m, [(int(n), s[m]) for n, s in self.results["state"].items()]) for m in MODELS]
        size = Axis("↑ bytes (less is up)", units.size, log=True, base=2, rising=False)
        found = [Figure("state of a sequence", self._lines("state", "state", state, length, size))]
        for what, words in (("prefill", "time of a prompt"), ("decoding", "time of a token after a prompt")):
            its = self.results[what]
            series = [self._series(m, [(int(n), 1000 * t[m]["median"]) for n, t in its.items()]) for m in MODELS]
            axis = Axis("↑ time (less is up)", units.milliseconds, log=True, rising=False)
            note = ""
            if what == "decoding" and any(t["retrofit"]["from"] != "cache" for t in its.values()):
                note = "The retrofit reads the whole sequence again at each token."
            found.append(Figure(words, self._lines(what, words, series, length, axis), note))
        return found

    def layers(self) -> list[Figure]:
        """Charts of the share of variance kept after each layer, one per text."""
        found = []
        for at, (source, its) in enumerate(self.results["quality"].items()):
            if "by_layer" not in its:  # missing for vision transformers in records of earlier versions
                continue
            points = list(enumerate(its["by_layer"]))
            series = [Series(self.numbers["retrofit"], "retrofit", points, rings=self.record["swapped"])]
            axis = Axis("↑ share of the variance that is kept", units.tick)
            said = "Hidden states of the retrofit beside the original's."
            chart = charts.lines(f"layers-{at}", source, said, series, Axis("layer", units.tick), axis)
            read = f"{its['images']} images" if "images" in its else f"{its['blocks']} blocks of {its['length']} tokens"
            found.append(Figure(source, chart, f"{read}. A ring marks a layer that has new attention."))
        return found

    def images(self) -> list[Figure]:
        """Charts of the time per image by batch size, and of operations by image size."""
        found = []
        if times := self.results.get("time_by_batch"):  # missing in records of earlier versions
            series = [
                self._series(m, [(int(n), 1000 * its[m]["median"] / int(n)) for n, its in times.items()])
                for m in MODELS
            ]
            axis = Axis("↑ time of an image (less is up)", units.milliseconds, log=True, rising=False)
            place = Axis("images at once", units.tick, log=True, base=2)
            found.append(Figure("time of an image", self._lines("time", "time of an image", series, place, axis)))
        if sizes := self.results.get("operations_by_size"):
            series = [self._series(m, [(its["tokens"], its[m]) for its in sizes.values()]) for m in MODELS]
            axis = Axis("↑ operations (less is up)", units.count, log=True, rising=False)
            words = "operations of attention, by definition"
            said = "; ".join(f"{size} pixels are {units.tokens(its['tokens'])} tokens" for size, its in sizes.items())
            place = Axis("tokens of an image", units.tokens, log=True, base=2)
            found.append(Figure(words, self._lines("operations", words, series, place, axis), f"{said}."))
        return found

    def reading(self) -> list[Figure]:
        """Charts of time and operations by length."""
        length, found = Axis("tokens", units.tokens, log=True, base=2), []
        for what, words, factor, tick in (
            ("time", "time of a text", 1000.0, units.milliseconds),
            ("operations", "operations of attention, by definition", 1.0, units.count),
        ):
            its = self.results[what]
            values = {
                m: [(int(n), t[m] if what == "operations" else t[m]["median"]) for n, t in its.items()] for m in MODELS
            }
            series = [self._series(m, [(n, factor * value) for n, value in values[m]]) for m in MODELS]
            axis = Axis(f"↑ {what} (less is up)", tick, log=True, rising=False)
            found.append(Figure(words, self._lines(what, words, series, length, axis)))
        return found

    def training(self) -> list[Figure]:
        """Charts of the losses in each stage, and of each layer's sensitivity."""
        losses, found = self.record["losses"], []
        step = Axis("step", units.tick)
        layers = list(losses["transfer"][0]) if losses["transfer"] else []
        curves = [
            Series(
                at,
                f"layer {layer}",
                [(i + 1, row[layer]) for i, row in enumerate(losses["transfer"])],
                label=len(layers) <= 12,
            )
            for at, layer in enumerate(layers)
        ]
        share = Axis("share of the output's square", units.tick, log=True)
        if curves:
            chart = self._lines("transfer", "attention transfer", curves, step, share)
            found.append(Figure("attention transfer", chart))
        tuned = [Series(1, "loss", list(enumerate(losses["tune"], 1)))]
        looks = losses.get("held_out", {}).get("tune", [])  # missing in records of earlier versions
        if looks:
            tuned.append(Series(2, "held out", [(done, found[0]) for done, found in looks]))
        unit = self.record.get("unit", "nats a token")
        nats = Axis(unit, units.tick, log=True)
        found.append(Figure("whole model", self._lines("tune", "whole model", tuned, step, nats)))
        known = self.record["sensitivity"]
        if known:
            points = sorted((int(layer), loss) for layer, loss in known.items())
            series = [Series(1, "lost", points, rings=self.record["swapped"])]
            chart = charts.lines(
                "sensitivity",
                "sensitivity of each layer",
                "What the model loses with one new layer.",
                series,
                Axis("layer", units.tick),
                Axis(card.lost(self.record["settings"]["keep_layers"], unit), units.tick),
            )
            found.append(Figure("sensitivity", chart, "A ring marks a layer that has new attention."))
        return found

    def _series(self, model: str, points: Sequence[tuple[float, float | None]]) -> Series:
        return Series(self.numbers[model], model, points)

    def _lines(self, identity: str, title: str, series: Sequence[Series], x: Axis, y: Axis) -> Markup | None:
        markers = all(len(s.points) <= 24 for s in series)
        return charts.lines(identity, title, f"{title}, original and retrofit.", series, x, y, markers=markers)
