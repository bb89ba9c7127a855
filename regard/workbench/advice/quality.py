"""The quality of mechanisms, as far as it is known from stored results of `regard compare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from regard.contract import Unsupported
from regard.measurement.store import Store


@dataclass(frozen=True)
class Quality:
    """Scores of mechanisms in stored results.

    Attributes:
        said: each mechanism's scores in words.
        behind: for each mechanism that is worse than the best, the reason.
        solved: for each mechanism trained on a recall task, whether it solved the task.
        source: the folder of the results.
    """

    said: Mapping[str, str] = field(default_factory=dict)
    behind: Mapping[str, str] = field(default_factory=dict)
    solved: Mapping[str, bool] = field(default_factory=dict)
    source: str = ""


def read_quality(folder: str | Path) -> Quality:
    """Read scores from the newest comparison in the output folder of `regard compare`, or in its ``results.db``.

    Raises:
        Unsupported: if there is none.
    """
    path = Path(folder)
    file = path / "results.db" if path.is_dir() else path
    if not file.is_file():
        raise Unsupported(f"results in {folder}: no results.db there", supported="the output folder of regard compare")
    with Store(file) as store:
        rows = store.rows("run")
    if not rows:
        raise Unsupported(
            f"results in {folder}, which holds no finished comparison", supported="a comparison that has ended"
        )
    said: dict[str, list[str]] = {}
    behind: dict[str, str] = {}
    solved: dict[str, bool] = {}
    for task, entries in rows[-1].payload["summary"].items():
        won = any(e["solved"] for e in entries)
        for entry in entries:
            name = entry["mechanism"]
            if entry["mean"] is None:
                continue
            error = "" if entry["standard_error"] is None else f" ± {entry['standard_error']:.2g}"
            solves = {True: ", solved", False: ", not solved", None: ""}[entry["solved"]]
            said.setdefault(name, []).append(f"{task} {entry['mean']:.4g}{error}{solves}")
            if entry["solved"] is not None and task == "recall":
                solved[name] = entry["solved"]
            if won and not entry["solved"]:
                behind.setdefault(name, f"it does not solve {task} in your results, others do")
            elif not won and entry["separable_from_best"]:
                behind.setdefault(name, f"it is measurably behind the best on {task} in your results")
    return Quality({n: "; ".join(parts) for n, parts in said.items()}, behind, solved, str(folder))
