"""Describes a reproduction's record in words, the same for the terminal and the pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regard.reproductions.framework.judging import LEAST_SEEDS, Outcome


def measured_words(finding: Mapping[str, Any]) -> str:
    """Return mean, standard error and the interval that decides, as text."""
    if finding["mean"] is None:
        return "not measured"
    error = "" if finding["standard_error"] is None else f" ± {_number(finding['standard_error'], 2)}"
    interval = "" if finding["low"] is None else f" ({_number(finding['low'])} to {_number(finding['high'])})"
    return f"{_number(finding['mean'])}{error}{interval}"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def remarks(record: Mapping[str, Any]) -> list[str]:
    """Return remarks on a verdict: what it does not cover, and what would decide it."""
    told = [f"left out: {claim}" for claim in record["left_out"]]
    if record["outcome"] == Outcome.UNDECIDED and not record["missing"]:
        told.append(f"to decide it: {cost_of_deciding(record)}")
    return told


def cost_of_deciding(record: Mapping[str, Any]) -> str:
    """Describe the cost of deciding an undecided claim."""
    lacking = [
        finding["says"]
        for finding in record["needs"]
        if finding["outcome"] == Outcome.DID_NOT_HOLD or finding["mean"] is None
    ]
    if lacking:
        return f"an experiment in which this holds: {'; '.join(lacking)}"
    unsettled = [
        finding for finding in (*record["findings"], *record["needs"]) if finding["outcome"] == Outcome.UNDECIDED
    ]
    if any(finding["seeds"] < LEAST_SEEDS for finding in unsettled):
        return f"{LEAST_SEEDS} seeds at least"
    seeds = [finding["seeds_to_decide"] for finding in unsettled]
    if record["hours_to_decide"] is None:
        return "a larger experiment: no affordable number of seeds separates what is compared here"
    return f"{max(seeds)} seeds, about {record['hours_to_decide']:.2g} hours of one core, if means and spreads stay"
