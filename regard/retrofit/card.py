"""The README and the record that a retrofit leaves beside its weights."""

from __future__ import annotations

import json
from typing import Any

from regard.measurement import units

README = """\
---
library_name: transformers
tags: [regard, retrofit]
---

# {name} with {mechanism} in {count} of {layers} layers

A retrofit of `{name}` ({cls}) by [regard](https://pypi.org/project/regard): layers {swapped} have `{mechanism}`
instead of softmax attention and were trained back.

{recommendation}

```python
import regard.integrations.transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```

| | original | retrofit |
|---|---|---|
{rows}

- Trained on {data}: {tokens} tokens of attention transfer and {tuned} of {loss}.
- Kept layers: {kept}. New parameters: {parameters:,}.
- Everything that was measured is in `retrofit.json`, with the machine and the settings.
{notes}"""


def as_json(record: dict[str, Any]) -> str:
    """A record as the text of its file."""
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def readme(record: dict[str, Any]) -> str:
    """The model card of a record."""
    results, settings = record["results"], record["settings"]
    distil = settings["distil"]
    return README.format(
        name=record["from"]["name"],
        cls=record["from"]["class"],
        mechanism=settings["mechanism"],
        count=len(record["swapped"]),
        layers=record["layers"],
        swapped=numbers(record["swapped"]),
        kept=numbers(record["kept"]),
        recommendation=record["recommendation"]["text"],
        rows="\n".join(f"| {name} | {a} | {b} |" for name, a, b in rows(results)),
        data=record["data"]["training"],
        tokens=units.count(record["trained_tokens"]["transfer"] + record["trained_tokens"]["all layers"]),
        tuned=units.count(record["trained_tokens"]["tune"]),
        loss="distillation"
        if distil == 1
        else "next-token training"
        if distil == 0
        else "distillation and next-token training",
        parameters=record["new_parameters"],
        notes="".join(f"- {note[0].upper()}{note[1:]}\n" for note in record["recommendation"]["notes"]),
    )


def rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured: what, of the original, of the retrofit."""
    found = []
    for source, its in results["perplexity"].items():
        found.append((f"perplexity on {source}", units.number(its["original"]), units.number(its["retrofit"])))
    for length, its in results["recall"].items():
        if its is not None:
            shares = (sum(its[model]) / len(its[model]) for model in ("original", "retrofit"))
            before, after = (f"{share:.0%}" for share in shares)
            found.append((f"needle in {units.tokens(int(length))} tokens, said", before, after))
    for length, its in results["state"].items():
        found.append(
            (
                f"state at {units.tokens(int(length))} tokens, by definition",
                units.size(its["original"]),
                units.size(its["retrofit"]),
            )
        )
    for length, its in results["decoding"].items():
        held = [its[model]["held"] for model in ("original", "retrofit")]
        before, after = ("nothing" if each is None else units.size(each) for each in held)
        found.append((f"cache that generate holds after {units.tokens(int(length))} tokens", before, after))
    for what, words in (("prefill", "time of a prompt of"), ("decoding", "time of a token after")):
        for length, its in results[what].items():
            before, after = (units.milliseconds(1000 * its[model]["median"]) for model in ("original", "retrofit"))
            found.append((f"{words} {units.tokens(int(length))} tokens", before, after))
    return found


def change(its: dict[str, Any]) -> str:
    """How perplexity changed, with its standard error."""
    value, error = its["change"], its["standard_error"]
    if abs(value) < 5e-4:
        said = "unchanged"
    elif value < 10:
        said = f"{abs(value):.1%} {'higher' if value > 0 else 'lower'}"
    else:
        said = f"{1 + value:.3g} times as high"
    return said if error is None or value >= 10 else f"{said} (± {100 * error:.1f})"


def numbers(layers: list[int]) -> str:
    """Layers as ranges: 0-3, 5."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
