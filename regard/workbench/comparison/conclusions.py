"""Conclusions from the runs and costs of a comparison: scores, comparisons, the recommendation and its notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regard.workbench.comparison.recommend import Recommendation, published_means, recommend
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.comparison.summary import (
    beside_baseline,
    beside_frames,
    comparison_of,
    frames_sentences,
    rates_on_edge,
    skipped_steps,
    summarise,
    too_long,
)
from regard.workbench.comparison.trainer import Runs
from regard.workbench.comparison.work import Work


class Conclusions:
    """Conclusions from the runs: summaries, comparisons and the recommendation.

    Attributes:
        beside: for each task, scores of the leading mechanisms in further frames, see :func:`beside_frames`.
        left_out: sentences about what there was no time for.
    """

    def __init__(
        self,
        works: Sequence[Work],
        settings: CompareSettings,
        runs: Mapping[str, Runs],
        costs: list[dict[str, Any]],
        matched: str = "",
    ) -> None:
        self.works, self.settings, self.runs, self.matched = works, settings, runs, matched
        self.comparisons = {task: comparison_of(made.rows) for task, made in runs.items()}
        self.rules = {w.task.name: w.baseline for w in works if w.baseline is not None}
        self.metrics = {w.task.name: (w.task.metric, w.task.higher_is_better) for w in works}
        self.left_out = [said for made in runs.values() for said in (*made.left_out, *made.longer, made.fewer) if said]
        self.left_out += too_long(costs)
        kind = {w.task.name: w.kind for w in works}
        cost_of = {(kind[row["task"]], row["mechanism"]): row for row in costs}
        self.summary = {
            work.task.name: summarise(
                runs[work.task.name].rows,
                self.comparisons[work.task.name],
                {name: cost_of.get((work.kind, name), {}) for name in settings.names},
                settings.measured_at(work.own_length),
                self.rules.get(work.task.name),
            )
            for work in works
        }
        self.beside: dict[str, list[dict[str, Any]]] = {}
        self.advice = self._recommend()

    def _recommend(self) -> Recommendation:
        at = {work.task.name: self.settings.measured_at(work.own_length) for work in self.works}
        edges = {
            (task, name): edge
            for task, made in self.runs.items()
            for name, edge in rates_on_edge(made.trials).items()
            if not any(e["mechanism"] == name and e["solved"] for e in self.summary[task])  # nothing more to gain
        }
        frame = "" if self.settings.all_backbones else self.settings.frames[0]
        return recommend(
            self.summary,
            self.comparisons,
            self.metrics,
            prefer=self.settings.prefer,
            budget=str(self.settings.budget),
            seeds=self.settings.seeds,
            at_length=at,
            frame=frame,
            edges=edges,
            beside=self.beside,
            named=self.settings.names,
            published=published_means(frame),
        )

    def leaders(self) -> list[str]:
        """The winner, its equals, the best of each task, softmax, then the next best: as many as `settings.leaders`."""
        ranked = [[e["mechanism"] for e in entries if e["mean"] is not None] for entries in self.summary.values()]
        named = [self.advice.winner, *self.advice.alike, *(names[0] for names in ranked if names), "softmax"]
        named += [name for names in ranked for name in names]
        known = [name for name in dict.fromkeys(named) if name in self.settings.names]
        return known[: self.settings.leaders]

    def look_beside(self, rows: Mapping[str, list[dict[str, Any]]]) -> None:
        """Add the rows of further frames, which may decide between equals, and complete the notes."""
        for task, made in rows.items():
            if made:
                self.beside[task] = beside_frames(self.runs[task].rows, made)
        self.advice = self._recommend()
        notes = [work.few_items for work in self.works if work.few_items]
        for work in self.works:
            shared = getattr(work.task, "overlap", None)
            if shared is not None and shared.much:
                notes.append(f"On {work.task.name}, {shared}")
        winner = self.advice.winner
        published = "Of models with layers of their own, " + ("with widths scaled" if self.matched else "as published")
        if any(variant.sized for variant in self.settings.variants.values()):
            published = "Not made equal in parameters"
        notes += [f"{published}: {work.published}." for work in self.works if work.published]
        notes += [self.matched] * bool(self.matched)
        notes += [beside_baseline(task, self.summary[task], rule, winner) for task, rule in self.rules.items()]
        notes += self.advice.notes
        notes += frames_sentences(self.beside, self.metrics, self.settings.frames[0])
        notes += self.left_out
        notes += [said for task, made in self.runs.items() if (said := skipped_steps(task, made.rows))]
        self.advice.notes[:] = notes
