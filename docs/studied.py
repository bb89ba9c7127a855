"""The page of the studies' findings, drawn from their published cells."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from tables import table

from regard.measurement.units import counted
from regard.reproductions.framework.telling import measured_words, remarks
from regard.workbench.reports.section_pages import cell, draw
from regard.workbench.reports.sections import section


def studies_page(data: Mapping[str, Any] | None) -> list[str]:
    """The page made from ``studies.json``, as pieces of Markdown."""
    parts = [
        "# Findings of the studies",
        "A study puts a question to many mechanisms at once; [Studies](studies.md) says how each one asks it, and how to put "
        "it to your own. Here is what the published cells show.",
    ]
    if data is None:
        return [*parts, "Not measured in this build of the pages: `python docs/measure.py studies` does it."]
    parts.append(f"Measured with {data['measured']}.")
    numbers = itertools.count()
    for record in data["studies"]:
        entered = f", {counted(len(record['entered']), 'mechanism')}" if record["entered"] else ""
        parts += [
            f"## {record['study']}",
            f"**{record['question']}**",
            f"{record['claim']} **{record['outcome'].capitalize()}** (preset `{record['preset']}`{entered}, {record['done']} "
            f"of {record['planned']} cells).",
            record["instead"],
        ]
        for one in map(section, record["sections"]):
            drawn = [(picture, draw(picture, f"study-{next(numbers)}")) for picture in one.pictures]
            parts += [f"### {one.title}", one.says]
            parts += [
                f'<figure class="drawn">{svg}<figcaption>{picture.caption}. {picture.note}</figcaption></figure>'
                for picture, svg in drawn
                if svg is not None
            ]
            parts.append(
                table(list(one.rows[0]), [[cell(v) for v in row.values()] for row in one.rows]) if one.rows else ""
            )
        judged = [*record["needs"], *record["findings"]]
        rows = [[one["says"], measured_words(one), one["outcome"]] for one in judged]
        headings = ("expected", "measured ± standard error (what decides)", "")
        parts += [table(headings, rows) if judged else "", "\n".join(f"- {remark}" for remark in remarks(record))]
    return list(filter(None, parts))
