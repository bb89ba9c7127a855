"""The README and the record that a retrofit writes next to its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from regard.catalogue import plugin_file, resolve
from regard.measurement import units
from regard.retrofit.measures import kind_of, measures_of
from regard.retrofit.settings import RECALL

README = """\
---
library_name: {library}
tags: [regard, retrofit]
---

# {name} with {mechanism} in {count} of {layers} layers

A retrofit of `{name}` ({cls}) by [regard](https://pypi.org/project/regard): `{mechanism}` replaces the
softmax attention of {swapped} and was trained back.

{recommendation}

```python
{loading}
```

| | original | retrofit |
|---|---|---|
{rows}

- Trained on {data}: {tokens} {counts} of attention transfer and {tuned} of {loss}{precision}.
- Kept layers: {kept}. New parameters: {parameters:,}.
{shared}- Everything that was measured is in `retrofit.json`, with the machine and the settings.
{notes}"""
OF_TRANSFORMERS = """\
import regard.integrations.transformers
from transformers import {auto}
{plugin}
model = {auto}.from_pretrained("this folder")"""
OF_TIMM = """\
import regard.integrations.timm
import timm
{plugin}
model = timm.create_model("local-dir:this folder", pretrained=True)"""
RIGHT = {"language": "next-token training", "encoder": "masked-token training", "vision": "training on classes"}
"""Training without a teacher, by kind of model."""


def as_json(record: dict[str, Any]) -> str:
    """Format a record as the text of its file."""
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def readme(record: dict[str, Any]) -> str:
    """The model card for a record."""
    results, settings = record["results"], record["settings"]
    distil, kind = settings["distil"], kind_of(record)
    own = RIGHT[kind]
    return README.format(
        name=record["from"]["name"],
        cls=record["from"]["class"],
        library="timm" if kind == "vision" else "transformers",
        loading=loading(record),
        counts=record.get("counts", "tokens"),
        mechanism=settings["mechanism"],
        count=len(record["swapped"]),
        layers=record["layers"],
        swapped=named(record["swapped"]),
        kept=numbers(record["kept"]),
        recommendation=record["recommendation"]["text"],
        rows="\n".join(f"| {name} | {a} | {b} |" for name, a, b in measures_of(record).rows(results)),
        data=record["data"]["training"],
        tokens=units.count(record["trained_tokens"]["transfer"] + record["trained_tokens"]["all layers"]),
        tuned=units.count(record["trained_tokens"]["tune"]),
        loss="distillation" if distil == 1 else own if distil == 0 else f"distillation and {own}",
        precision=f", with matrix products in {settings['precision']}" if "precision" in settings else "",
        parameters=record["new_parameters"],
        shared="".join(f"- {told}\n" for told in shared_heads(record)),
        notes="".join(f"- {note[0].upper()}{note[1:]}\n" for note in record["recommendation"]["notes"]),
    )


def shared_heads(record: Mapping[str, Any]) -> list[str]:
    """A sentence about the heads that each layer always has, if these are the most important ones."""
    found = record.get("shared_heads")  # newer records alone
    if found is None:
        return []
    told = "; ".join(f"layer {number}: {numbers(heads)}" for number, heads in found.items())
    return [f"Heads that are always active, the most important ones on the training data: {told}."]


def loading(record: dict[str, Any]) -> str:
    """The lines of Python that load the model of a record."""
    kind, name = kind_of(record), record["from"]["class"]
    file = plugin_file(resolve(record["settings"]["mechanism"])[0].name)
    plugin = "" if file is None else f"\nregard.load_plugin({file!r})"
    if kind == "vision":
        return OF_TIMM.format(plugin=plugin)
    auto = "AutoModelForMaskedLM" if name.endswith("ForMaskedLM") else "AutoModel"
    return OF_TRANSFORMERS.format(auto="AutoModelForCausalLM" if kind == "language" else auto, plugin=plugin)


def lost(keep_layers: str, unit: str) -> str:
    """What the sensitivity is by which layers are chosen, in words, for answers whose distance has a unit."""
    if keep_layers.startswith(RECALL):
        return "nats a hidden token lost with this layer and those given up before"
    return f"{unit} lost with this layer alone"


def named(layers: list[int]) -> str:
    """The layers of a list by number, in words: layer 2, layers 0-3, 5."""
    return f"{'layer' if len(layers) == 1 else 'layers'} {numbers(layers)}"


def numbers(layers: list[int]) -> str:
    """Format sorted numbers of layers or heads as ranges: 0-3, 5."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
