"""Reproductions: papers' claims, tested at a size that a laptop can run. One module per claim, found by scanning."""

from __future__ import annotations

from regard.reproductions.framework.catalogue import get_reproduction, list_reproductions
from regard.reproductions.framework.judging import Check, Finding, Outcome, Verdict
from regard.reproductions.framework.protocol import Cell, Reproduction
from regard.reproductions.framework.runs import collect, pilot, plan, restore, run

__all__ = [
    "Cell",
    "Check",
    "Finding",
    "Outcome",
    "Reproduction",
    "Verdict",
    "collect",
    "get_reproduction",
    "list_reproductions",
    "pilot",
    "plan",
    "restore",
    "run",
]
