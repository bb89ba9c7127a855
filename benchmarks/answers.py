"""Tests whether `make compare` gives the same answer again: the default comparison, repeated with other seeds.

    python benchmarks/answers.py               # ten runs of 8 minutes; the same command continues where it stopped
    python benchmarks/answers.py --runs 3 --budget 4m
    python benchmarks/answers.py -- --task text --mechanisms softmax,delta_rule   # another comparison

Each run has its own seeds (`--seed-offset`), so runs share no draws of weights, batches or orders, only the held-out items.
The goal: nine of ten runs recommend the same mechanism. Each run is kept as one JSON file in the folder of runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

SEEDS_APART = 100


def run(folder: Path, number: int, budget: str, options: list[str]) -> dict[str, Any]:
    """The answer of one run, read from its file if the run has already finished."""
    file = folder / f"{number}.json"
    if not file.is_file():
        command = [sys.executable, "-m", "regard", "compare", "--budget", budget, *options, "--json"]
        command += ["--seed-offset", str(number * SEEDS_APART), "--output", str(folder / str(number))]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        file.write_text(printed)
    return json.loads(file.read_text())


def row(number: int, found: dict[str, Any]) -> str:
    """A row of the table: the recommended mechanism, those it could not be told apart from, and all scores."""
    told = found["recommendation"]
    scores = "; ".join(
        f"{task}: " + ", ".join(f"{e['mechanism']} {e['mean']:.3f}" for e in entries if e["mean"] is not None)
        for task, entries in found["summary"].items()
    )
    return f"| {number} | {told['winner']} | {', '.join(told['alike'])} | {scores} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--budget", default="8m")
    parser.add_argument("--output", type=Path, default=Path("runs/answers"))
    parser.add_argument("options", nargs="*", help="further options of regard compare, after --")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    winners: Counter[str] = Counter()
    print("| run | recommended | alike | scores |\n|---|---|---|---|")
    for number in range(1, asked.runs + 1):
        found = run(asked.output, number, asked.budget, asked.options)
        winners[found["recommendation"]["winner"]] += 1
        print(row(number, found), flush=True)
    print(f"\n{', '.join(f'{name} {count} of {asked.runs}' for name, count in winners.most_common())}")


if __name__ == "__main__":
    main()
