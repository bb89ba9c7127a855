"""Find studies: the modules and folders in the parent folder, and other reproductions that have a table."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from pathlib import Path

from regard.contract import Unsupported, closest
from regard.reproductions import Reproduction, get_reproduction, list_reproductions
from regard.studies.framework.protocol import Study
from regard.workbench.reports.sections import Points, Section

FOLDER = Path(__file__).parents[1]


def list_studies() -> tuple[str, ...]:
    """Names of all studies, sorted."""
    return tuple(sorted(_found()))


def get_study(name: str) -> Study:
    """A study by its name.

    Raises:
        Unsupported: for an unknown name.
    """
    found, wanted = _found(), name.replace("_", "-")
    if wanted not in found:
        raise Unsupported(f"study {name!r}", supported=", ".join(list_studies()), nearest=closest(wanted, list(found)))
    return found[wanted]


@functools.cache
def _found() -> dict[str, Study]:
    own = [
        importlib.import_module(f"regard.studies.{entry.name}").STUDY
        for entry in pkgutil.iter_modules([str(FOLDER)])
        if entry.name != "framework"
    ]
    tabled = [get_reproduction(name) for name in list_reproductions()]
    studies = [*(_of(one) for one in tabled if one.table is not None), *own]  # a module of its own goes before a table
    return {study.name: study for study in studies}


def _of(reproduction: Reproduction) -> Study:
    """Wrap a reproduction that has a table as a study, with one preset and the reproduction's own mechanisms."""

    def sections(_: object, cells: object) -> list[Section]:
        assert reproduction.table is not None
        rows = reproduction.table(cells)  # type: ignore[arg-type]
        pictures = []
        if reproduction.picture is not None:
            name, across, up = reproduction.picture
            known = [row for row in rows if row[across] is not None and row[up] is not None]
            points = {
                " ".join(str(v) for v in (row[name], *list(row.values())[1:2]) if v is not None): (row[across], row[up])
                for row in known
            }
            pictures.append(Points(f"{up} against {across}", across, up, points))
        return [Section("What was measured", "", pictures, rows)]

    return Study(
        name=reproduction.name.replace("_", "-"),
        question=reproduction.question,
        make=lambda _: reproduction,
        sections=sections,
        presets=("small",),
        folder="runs/reproduce",
    )
