"""Prints `regard profile --json` as a Markdown table: median milliseconds, and their ratio to softmax in the same run.

regard profile linear gated_linear --json > profile.json
python benchmarks/table.py profile.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(measurements: list[dict], what: str) -> str:
    """The table of one kind of work: a row for each mechanism, a column for each length."""
    rows = [m for m in measurements if m["what"] == what]
    lengths = sorted({m["length"] for m in rows})
    names = list(dict.fromkeys(m["mechanism"] for m in rows))
    time = {(m["mechanism"], m["length"]): m["milliseconds"] for m in rows}
    lines = ["| mechanism | " + " | ".join(f"{n:,}" for n in lengths) + " |", "|---|" + "---:|" * len(lengths)]
    for name in names:
        cells = [f"{time[name, n]:.3g} ({time[name, n] / time['softmax', n]:.2f}x)" for n in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    for what in found["settings"]["what"]:
        print(f"### {what}\n\n{table(found['measurements'], what)}\n")


if __name__ == "__main__":
    main()
