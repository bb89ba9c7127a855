"""Writes the generated pages: one for each mechanism, the verified matrix, mechanisms in models of other libraries,
growth with length, the ranking, backbones on Fashion-MNIST, parity with other code, findings of the studies, mixing
matrices, and the verdicts of the reproductions.

    python docs/generate.py                          # into docs/
    python docs/generate.py --plugin mine.py --output pages

The cards and docstrings are the only source of the mechanism pages. The tables come from docs/data, which ``make matrix``
and ``make reproductions`` measure. mkdocs imports this file as a hook, to list the pages in its navigation.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import statistics
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightened import lighter_page
from mixed import mixing_page
from studied import studies_page
from tables import table

from regard.catalogue import get_mechanism, get_module, list_mechanisms, load_plugin
from regard.contract import Cost, Kind, Mechanism, Pattern, Shape, spelled
from regard.functional import function_name
from regard.measurement.units import counted
from regard.positions import list_positions
from regard.reproductions import Outcome, collect, list_reproductions
from regard.reproductions.framework.telling import measured_words, remarks
from regard.studies import list_studies
from regard.tasks.described import documented
from regard.workbench.reports import charts
from regard.workbench.reports.scales import Axis
from regard.workbench.verification.subjects import Subject, axes_of
from regard.workbench.verification.swap_hosts import HOSTS
from regard.workbench.verification.swapped import MEANINGS as SWAP_MEANINGS
from regard.workbench.verification.swapped import TOLERANCES as SWAP_TOLERANCES
from regard.workbench.verification.verify import PROPERTIES

DOCS = Path(__file__).parent
DATA = DOCS / "data"
SOURCES = DOCS.parent / "tests" / "parity" / "fixtures" / "SOURCES.json"
LENGTHS = (1024, 4096, 16384)
HEADS, WIDTH = 8, 64
DTYPES = ("float64", "float32", "bfloat16", "float16")

COLUMNS = {
    **{dtype: (dtype, "torch") for dtype in DTYPES},
    "native float32": ("float32", "native"),
    "native bfloat16": ("bfloat16", "native"),
}
"""Columns of the matrix: dtype and backend. Native kernels leave float64 and float16 to torch."""

AXES = {
    "b": "batch",
    "h": "heads",
    "g": "key/value heads (groups)",
    "n": "queries (or tokens)",
    "m": "keys",
    "d": "features of a query or key",
    "k": "features of a query or key",
    "v": "features of a value",
    "c": "features of a token",
}

Cells = list[dict[str, Any]]


def mechanism_page(
    card: Mechanism, cells: Cells, reproduced: Sequence[Mapping[str, Any]] = (), variants: Cells = ()
) -> str:
    """The Markdown page of one mechanism."""
    also = f" Also called {_codes(card.spelled_aliases())}." if card.aliases else ""
    parts = [
        f"# {card.name}",
        f"{card.kind.value.capitalize()}: {card.paper.title} ({card.paper.year}), "
        f"[arXiv {card.paper.arxiv}](https://arxiv.org/abs/{card.paper.arxiv}).{also}",
        docstring_to_markdown(get_module(card.name).__doc__ or ""),
        "## How to call it",
        _python(function_snippet(card)),
        _python(layer_snippet(card)),
        "## Patterns",
        table(("pattern", "", "why not"), [_pattern_row(card, p) for p in Pattern]),
        "## Inputs",
        _inputs(card),
        "## Options",
        _options(card),
        "## Cost",
        _cost(card),
        "## What it takes and gives",
        _facts(card),
        "## Verified",
        _verified(card, cells),
        *_variants(card, variants),
        *(part for one in reproduced if card.name in one["mechanisms"] for part in _reproduced(one)),
    ]
    return _page(part for part in parts if part)


def docstring_to_markdown(text: str) -> str:
    """A module docstring as Markdown: equations are code, tables stay, roles lose their markup."""
    lines = []
    for line in inspect.cleandoc(text).splitlines():
        if not line.startswith("    "):
            line = _without_roles(line)
        if not line.startswith(("    ", "|")):
            line = re.sub(r"^(When to pick it|When not|Definition|Layout|Patterns|Deviations)(?=[ :])", r"**\1**", line)
            if line.startswith("**") and lines and lines[-1] and not lines[-1].startswith(("    ", "|")):
                lines.append("")
        elif line.startswith("|") and lines and lines[-1] and not lines[-1].startswith("|"):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _without_roles(text: str) -> str:
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)


def function_snippet(card: Mechanism) -> str:
    """Example code that calls the mechanism's function on inputs of the right shapes."""
    pattern = _pattern(card)
    subject = Subject(card, pattern)
    inputs = subject.inputs(12)
    name = function_name(card)
    lines = ["import torch", f"from regard.functional import {name}", ""]
    lines += [f"{n} = {_sample(card, n, t)}" for n, t in inputs.items()]
    arguments = [n if n != "roles" else "roles=roles" for n in inputs if n != "roles"]
    required = [n for n in arguments if n in card.inputs]
    optional = [f"{n}={n}" for n in arguments if n not in card.inputs]
    options = [*required, *optional, f'pattern="{pattern}"']
    options += ["roles=roles"] if "roles" in inputs else []
    options += [f"grid={subject.grid(12)}"] if subject.on_grid else []
    call = f"output = {name}({', '.join(options)})"
    shape = tuple(subject.run(inputs).output.shape)
    return "\n".join([*lines, f"{call}  # {', '.join(card.output)}: {shape}"])


def layer_snippet(card: Mechanism) -> str:
    """Example code that builds the mechanism's layer, and decodes with it if it can."""
    pattern = _pattern(card)
    context = ", context=Context(grid=(3, 4))" if Subject(card, pattern).on_grid else ""
    subject = Subject(card, pattern)
    decodes = subject.layer_decodes and pattern is Pattern.CAUSAL_SELF
    lines = [
        "import torch",
        f"from regard import {'Context, ' if decodes or context else ''}create_layer",
        "",
        f'layer = create_layer("{card.name}", dim=64, num_heads=4, pattern="{pattern}")',
        "x = torch.randn(2, 12, 64)",
        f"output = layer(x{context}).output",
    ]
    if decodes:
        lines += [
            "",
            'state = layer(x[:, :8], context=Context(want=frozenset({"state"}))).state',
            "for t in range(8, 12):",
            "    y, state = layer.step(x[:, t], state)  # equals output[:, t]",
        ]
    if card.kind is Kind.PROJECTION:
        lines += [
            "",
            "from regard.layers.linear import make_linear",
            "",
            f'linear = make_linear(64, 32, kind="{card.name}")',
            f'attention = create_layer("softmax", 64, 4, linear="{card.name}")',
        ]
    if card.kind is Kind.POOLING:
        lines += [
            "",
            "from regard.models import Encoder, EncoderConfig",
            "",
            f'classifier = Encoder(EncoderConfig(num_classes=10, features=4, dim=64, pool="{card.name}"))',
            "logits = classifier(torch.randn(2, 12, 4)).output",
        ]
    return "\n".join(lines)


def _pattern(card: Mechanism) -> Pattern:
    if card.length == "grid" and Pattern.NONCAUSAL_SELF in card.patterns:
        return Pattern.NONCAUSAL_SELF
    return next(p for p in (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF, *Pattern) if p in card.patterns)


def _sample(card: Mechanism, name: str, tensor: torch.Tensor) -> str:
    shape = ", ".join(map(str, tensor.shape))
    if tensor.dtype is torch.bool:
        return f"torch.rand({shape}) < 0.8"
    if not tensor.is_floating_point():
        return f"torch.tensor({tensor.tolist()})"
    domain = card.domains.get(name, "normal")
    size = f"({shape})" if tensor.ndim == 0 else shape
    return {
        "normal": f"torch.randn({size})",
        "log_decay": f"-torch.rand({size})",
        "negative": f"-torch.rand({size})",
        "unit": f"torch.rand({size})",
        "positive": f"torch.rand({size}) + 0.5",
    }.get(domain, f"torch.randn({size})")


def _pattern_row(card: Mechanism, pattern: Pattern) -> tuple[str, str, str]:
    has = pattern in card.patterns
    return pattern.value, "yes" if has else "no", "" if has else card.refused.get(pattern, "")


def _inputs(card: Mechanism) -> str:
    rows = []
    for declared in card.inputs:
        name = declared.rstrip("?")
        axes = axes_of(card, name)
        kind = card.domains.get(name, "")
        rows.append((f"`{name}`", f"({', '.join(axes)})", "optional" if declared.endswith("?") else "", kind))
    rows.append(("output", f"({', '.join(card.output)})", "", ""))
    letters = dict.fromkeys("".join(card.inputs.values()) + card.output)
    legend = ", ".join(f"{letter} {AXES[letter]}" for letter in letters if letter in AXES)
    return table(("tensor", "axes", "", "values"), rows) + f"\n\nAxes: {legend}."


def _options(card: Mechanism) -> str:
    meanings = attributes_of(inspect.getdoc(card.config) or "")
    rows = []
    for field in dataclasses.fields(card.config):
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        rows.append((f"`{field.name}`", default, meanings.get(field.name, "")))
    if not rows:
        return (inspect.getdoc(card.config) or "No options.").splitlines()[0]
    return table(("option", "default", "meaning"), rows)


def attributes_of(docstring: str) -> dict[str, str]:
    """The description of each name in the ``Attributes:`` section of a docstring."""
    return {name: _without_roles(text.replace("``", "`")) for name, text in documented(docstring, "Attributes").items()}


def _cost(card: Mechanism) -> str:
    softmax = get_mechanism("softmax")
    rows = []
    for n in LENGTHS:
        own, reference = _cost_at(card, n), _cost_at(softmax, n)
        rows.append(
            (
                f"{n:,}",
                _number(own.flops),
                f"{own.flops / reference.flops:.2g}",
                _number(own.memory),
                _number(own.state) if card.state is not None else "none",
                _number(own.step_flops) if card.state is not None else "",
            )
        )
    headings = ("N", "operations", "of softmax's", "temporary numbers", "numbers of state", "operations a step")
    growth = ""
    if card.state is not None:
        growth = " The state keeps its size." if card.recurrent else " The state grows with the sequence."
    return (
        f"By the card, for one sequence with {HEADS} heads of {WIDTH} features, forward, without projections; "
        f"a multiply-add is two operations.{growth}\n\n" + table(headings, rows)
    )


def _number(value: float) -> str:
    for size, unit in (
        (1e12, "\N{NO-BREAK SPACE}T"),
        (1e9, "\N{NO-BREAK SPACE}G"),
        (1e6, "\N{NO-BREAK SPACE}M"),
        (1e3, "\N{NO-BREAK SPACE}k"),
    ):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _facts(card: Mechanism) -> str:
    weights = {"exact": 'exact, with `want={"weights"}`', "implicit": "implicit", "none": "none"}[card.weights]
    if card.weights == "exact" and "weights" not in card.honours:
        weights = "exact, not returned"
    rows = [
        ("forms", _codes(card.forms)),
        ("engine", f"[`{card.engine}`](../kernels.md)" if card.engine else "none: torch operators"),
        ("masks and extras beside padding and packing", _codes(sorted(card.honours)) or "none"),
        ("attention weights", weights),
        ("positions", _codes(card.accepts_positions)),
        *([("no other positions", card.refused_positions)] if card.refused_positions else []),
        ("default scale", _scale(card)),
        ("queries and keys of unequal number", "yes" if card.uneven else "refused in causal-self"),
        ("state", f"`{card.state.__name__}`" if card.state is not None else "none"),
    ]
    return table(("", ""), rows)


def _verified(card: Mechanism, cells: Cells) -> str:
    own = [c for c in cells if c["mechanism"] == card.name]
    if not own:
        return f"Not measured in this build of the pages: `regard verify {card.name}` measures it here."
    failing = sum(c["status"] == "fail" for c in own)
    said = f"{len(own)} cells: {'all hold' if not failing else f'{failing} fail'}. "
    said += "Largest error over the patterns, as a fraction of the largest output; 0 where a property is exact."
    rows = []
    for prop in PROPERTIES:
        of = [c for c in own if c["property"] == prop.name]
        if of:
            rows.append((f"`{prop.name}`", prop.meaning, *(_worst(_column(of, name)) for name in COLUMNS)))
    waived = [
        f"- `{c['property']}` in {c['pattern']} ({c['dtype']}): {c['detail']}" for c in own if c["status"] == "waived"
    ]
    waivers = "\n\nWaived, with the reason:\n\n" + "\n".join(dict.fromkeys(waived)) if waived else ""
    return f"{said}\n\n" + table(("property", "", *COLUMNS), rows) + waivers


def _variants(card: Mechanism, measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of variants: other sets of options with which the matrix is measured."""
    if not card.variants:
        return []
    of = {found["variant"]: found for found in measured if found["mechanism"] == card.name}
    rows = []
    for variant, options in card.variants.items():
        patterns = ", ".join(card.patterns_of(variant)) if variant in card.variant_patterns else "all"
        found = of.get(variant)
        shown = ("", "", "") if found is None else _counted(found)
        rows.append((variant, f"`{spelled(options)}`", patterns, *shown))
    headings = ("variant", "options", "patterns", "cells", "float64", "native float32")
    said = (
        f"Every property but those of compiled and exported programs, with other options (`regard verify {card.name} "
    )
    said += "--variant all`). Largest errors; w: some cells are waived."
    return ["### Variants", said, table(headings, rows)]


def _counted(found: Mapping[str, Any]) -> tuple[str, str, str]:
    waived = f" ({found['waived']} w)" if found["waived"] else ""
    failed = f", **{found['failed']} fail**" if found["failed"] else ""
    errors = ("" if found[name] is None else _error(found[name], 1) for name in ("float64", "native float32"))
    return f"{found['cells']}{waived}{failed}", *errors  # type: ignore[return-value]


def _column(cells: Cells, name: str) -> Cells:
    dtype, backend = COLUMNS[name]
    return [c for c in cells if c["dtype"] == dtype and c["backend"] == backend]


def _worst(cells: Cells) -> str:
    if not cells:
        return ""
    if any(c["status"] == "fail" for c in cells):
        return "**fails**"
    errors = [c["error"] for c in cells if c["error"] is not None]
    mark = " (waived)" if any(c["status"] == "waived" for c in cells) else ""
    return (_error(max(errors), 1) if errors else "") + mark


def _error(value: float, digits: int) -> str:
    return f"{value:.{digits}e}" if value else "0"


def _reproduced(one: Mapping[str, Any]) -> list[str]:
    """The section about a reproduction on a mechanism's page."""
    return ["## The paper's claim", f"{one['claim']} At a small size: **{one['outcome']}**.", *_tried(one)]


def _tried(one: Mapping[str, Any]) -> list[str]:
    """The experiment that tests a claim, and the outcome of each expectation."""
    needs = [(f"it can tell only if {f['says']}", measured_words(f), f["outcome"]) for f in one["needs"]]
    rows = needs + [(f["says"], measured_words(f), f["outcome"]) for f in one["findings"]]
    missing = f", missing: {', '.join(one['missing'])}" if one["missing"] and one["done"] else ""
    return [
        one["instead"],
        table(("expected", "measured ± standard error (what decides)", ""), rows),
        *(f"{remark[0].upper()}{remark[1:].rstrip('.')}." for remark in remarks(one)),
        f"`regard reproduce {one['name']}`; {one['done']} of {one['planned']} cells{missing}.",
    ]


ORDER = (Outcome.DID_NOT_HOLD, Outcome.UNDECIDED, Outcome.HELD, Outcome.NOT_RUN)


def reproductions(data: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Every reproduction, claims that did not hold first; one that docs/data lacks counts as not run."""
    measured = {one["name"]: one for one in data["reproductions"]} if data else {}
    every = {one["name"]: one for one in collect(list_reproductions(), None)}
    return sorted((every | measured).values(), key=lambda one: (ORDER.index(one["outcome"]), one["name"]))


def verdicts_page(reproduced: Sequence[Mapping[str, Any]], measured: str | None) -> str:
    """The page of verdicts of all reproductions, claims that did not hold first."""
    parts = [
        "# Verdicts",
        "What papers claim, tried at a size that a laptop can run: how is told in [Reproductions](reproductions.md). What "
        "did not hold comes first. A verdict is about the small experiment; it does not refute or confirm the paper.",
        f"Measured with {measured}."
        if measured
        else "Not run in this build of the pages: `make reproductions` does it.",
        table(
            ("claim", "", "paper", "verdict", "cells"),
            [
                (
                    f"[{one['name']}](#{one['name']})",
                    one["claim"],
                    f"[{one['paper']['arxiv']}](https://arxiv.org/abs/{one['paper']['arxiv']})",
                    f"**{one['outcome']}**" if one["outcome"] == Outcome.DID_NOT_HOLD else one["outcome"],
                    f"{one['done']} of {one['planned']}",
                )
                for one in reproduced
            ],
        ),
    ]
    for one in reproduced:
        about = ", ".join(map(_link, one["mechanisms"]))
        parts += [f"## {one['name']}", f"{about}: **{one['outcome']}**. {one['claim']}", *_tried(one)]
        if one.get("table"):
            rows = [
                [v if isinstance(v, str) else "" if v is None else f"{v:.3g}" for v in r.values()] for r in one["table"]
            ]
            parts += [_drawn(one), table(tuple(one["table"][0]), rows)]
    return _page(filter(None, parts))


def _drawn(one: Mapping[str, Any]) -> str:
    """A scatter plot of a reproduction's table, with the rows in which both columns are measured."""
    name, across, up = one.get("picture") or (None, None, None)
    rows = [row for row in one["table"] if name and row[across] is not None and row[up] is not None]
    if not rows:
        return ""
    names = list(dict.fromkeys(row[name] for row in rows))
    points = []
    for i, row in enumerate(rows):
        others = [other for other in rows if other is not row]
        points.append(
            charts.ScatterPoint(
                names.index(row[name]),
                row[name],
                row[across],
                row[up],
                front=not any(other[across] >= row[across] and other[up] >= row[up] for other in others),
                detail=", ".join(
                    f"{k} {v if isinstance(v, str) else f'{v:.3g}'}" for k, v in row.items() if v is not None
                ),
                label=row[name] not in [later[name] for later in rows[i + 1 :]],
            )
        )
    drawn = charts.scatter(
        f"picture-{one['name']}",
        f"{up} against {across}",
        f"{len(rows)} points; the figures are in the table below.",
        points,
        Axis(f"{across}, more is better"),
        Axis(f"{up}, more is better"),
    )
    return f'<figure class="drawn">{drawn}</figure>'


def matrix_page(data: Mapping[str, Any] | None, names: Sequence[str]) -> str:
    """The page of the verified matrix of all mechanisms."""
    head = [
        WIDE,
        "# The verified matrix",
        "Every property that the contract promises is measured for every mechanism, pattern, dtype and backend, on the function "
        "and on the layer. An error is the largest difference as a fraction of the largest output. A property that does "
        "not apply to a mechanism (a state in noncausal attention) has no cell; one that cannot hold is waived on the "
        "card, with the reason and, where there are some, the settings under which it holds and was measured.",
        "Largest errors allowed: float64 1e-12, float32 2e-6, bfloat16 4e-3, float16 1e-3, unless a card has its own. "
        "On native, what its kernels do not have is left to torch; a property in which none of them ran has no cell. "
        "`regard verify` measures the same on your machine.",
    ]
    if data is None:
        return _page([*head, "Not measured in this build of the pages: `make matrix` does it."])
    cells: Cells = data["cells"]
    shown = [name for name in names if any(c["mechanism"] == name for c in cells)]
    measured = data.get("measured")
    overview = []
    for mechanism in shown:
        own = [c for c in cells if c["mechanism"] == mechanism]
        counts = [len(own), sum(c["status"] == "waived" for c in own), sum(c["status"] == "fail" for c in own)]
        worst = [_worst([c for c in _column(own, name) if c["status"] != "waived"]) for name in COLUMNS]
        overview.append((_link(mechanism), *map(str, counts), *_other_options(data, mechanism), *worst))
    marks = []
    for level in dict.fromkeys(p.level for p in PROPERTIES):
        names = [p.name for p in PROPERTIES if p.level == level]
        rows = [
            (_link(m), *(_mark([c for c in cells if (c["mechanism"], c["property"]) == (m, n)]) for n in names))
            for m in shown
        ]
        marks += [f"### Of the {level}", table(("mechanism", *(n.replace("_", " ") for n in names)), rows)]
    waived = [
        (_link(c["mechanism"]), c["pattern"], f"`{c['property']}`", c["dtype"], c["detail"])
        for c in cells
        if c["status"] == "waived"
    ]
    parts = [
        *head,
        *([f"Measured with {measured}."] if measured else []),
        "## By mechanism",
        table(("mechanism", "cells", "waived", "failed", *OTHER_OPTIONS, *COLUMNS), overview),
        "Cells are those of the default options. A card's variants are further sets of options, which together have every "
        "value that an option takes; the page of a mechanism lists them with their errors. Random cases draw options, "
        "sizes, padding and the places where a sequence is cut (`regard verify NAME --random 200`).",
        "## By property",
        "Largest float64 error over the patterns (of the narrowest dtype where float64 is not measured); "
        "w: waived with a reason in some pattern; -: does not apply. The page of a mechanism has all dtypes.",
        *marks,
        "## What the properties say",
        table(("property", "meaning", "of"), [(f"`{p.name}`", p.meaning, p.level) for p in PROPERTIES]),
        "## Waivers",
        table(("mechanism", "pattern", "property", "dtype", "reason"), list(dict.fromkeys(waived)))
        if waived
        else "None.",
    ]
    return _page(parts)


def integrations_page(data: Mapping[str, Any] | None, names: Sequence[str]) -> str:
    """The page of mechanisms in models of other libraries."""
    from_models = "Llama, GPT-2, BERT, ViT and PyTorch's encoder and decoder"
    head = [
        WIDE,
        "# Which mechanism works in Llama, GPT-2, BERT, ViT",
        f"`regard.swap(model, NAME)` puts a mechanism into the attention modules of a model that exists. Here it is done to small "
        f"{from_models}, each with random weights, and the model is compared with a copy that has layers of "
        "`regard.create_layer` on the same weights. A number is the largest difference of all checks in float64, as a fraction of "
        "the largest number there; **no** is a refusal, whose reason is [below](#refused-and-why). How to swap: "
        "[tutorial](tutorials/swap.md).",
        "A llama stands for causal models with rotary positions (SmolLM, Qwen, Mistral), whose queries and keys the mechanism gets "
        "before their rotation. *state*: `generate` goes on from the mechanism's own state, in the place of the keys and "
        "values in the cache, with beams, padding, chats that go on and prefixes used again; *keys*: from the model's own cache.",
    ]
    if data is None:
        return _page([*head, "Not measured in this build of the pages: `python docs/measure.py integrations` does it."])
    cells = {(c["mechanism"], c["model"]): c for c in data["cells"]}
    shown = [name for name in names if (name, next(iter(HOSTS))) in cells]
    rows = [(_link(name), *(_swapped(cells[name, model]) for model in HOSTS)) for name in shown]
    limits = [(f"`{name}`", meaning, f"{SWAP_TOLERANCES[name]:g}") for name, meaning in SWAP_MEANINGS.items()]
    refused: dict[tuple[str, str], list[str]] = {}
    for (name, model), cell in cells.items():
        told = {"": cell.get("refused", ""), **cell.get("variants", {}).get("refused", {})}
        for options, reason in (*told.items(), *cell.get("withheld", {}).items()):
            if reason and name in shown:
                called = _link(name) + (f", {options}" if options else "")
                refused.setdefault((called, reason), []).append(HOSTS[model].title)
    reasons = [
        (called, "all" if len(models) == len(HOSTS) else ", ".join(models), reason)
        for (called, reason), models in refused.items()
    ]
    other = sum(cell.get("variants", {}).get("number", 0) for cell in cells.values())
    parts = [
        *head,
        f"Measured with {data['measured']}.",
        table(("mechanism", *(host.title for host in HOSTS.values())), rows),
        f"Numbers are those of the default options{f' and of {other:,} further sets of options' if other else ''}.",
        "## What is compared",
        table(("check", "what differs by no more than", ""), limits),
        "Other libraries' modules have no output norm, output gate or short convolution, so a swapped mechanism has none: "
        "`delta_rule`, `gated_linear` and `mlstm` have them in layers of `regard.create_layer`, where nothing says otherwise.",
        "## Refused, and why",
        table(("mechanism", "in", "reason"), reasons),
    ]
    return _page(parts)


def _swapped(cell: Mapping[str, Any]) -> str:
    """A cell of the table: the largest error, and the kind of cache that generation uses."""
    if "refused" in cell:
        return "**no**"
    found = [cell["errors"], cell.get("variants", {}).get("errors", {})]
    if any(not error <= SWAP_TOLERANCES[name] for errors in found for name, error in errors.items()):
        return "**fails**"
    worst = max(error for errors in found for name, error in errors.items() if name != "float32")
    return f"{_error(worst, 0)} {cell.get('cache', '')}".strip()


OTHER_OPTIONS = ("variants", "their cells", "failed ", "random cases", "failed  ")


def _other_options(data: Mapping[str, Any], mechanism: str) -> tuple[str, ...]:
    """Cells of a mechanism's row about options other than the defaults: variants and random cases."""
    own = [found for found in data.get("variants", ()) if found["mechanism"] == mechanism]
    drawn = [found for found in data.get("random", ()) if found["mechanism"] == mechanism]
    cells = (len(own), sum(found["cells"] for found in own), sum(found["failed"] for found in own))
    cases = (sum(found["ran"] - found["refused"] for found in drawn), sum(found["case"] is not None for found in drawn))
    return (*(map(str, cells) if own else ("", "", "")), *(map(str, cases) if drawn else ("", "")))


def _mark(cells: Cells) -> str:
    if not cells:
        return "-"
    if any(c["status"] == "fail" for c in cells):
        return "**fails**"
    dtype = next(d for d in DTYPES if any(c["dtype"] == d for c in cells))
    errors = [c["error"] for c in cells if c["error"] is not None and c["dtype"] == dtype]
    waived = any(c["status"] == "waived" for c in cells)
    return " ".join(filter(None, [_error(max(errors), 0) if errors else "", "w" if waived else ""]))


def _scale(card: Mechanism) -> str:
    if callable(card.default_scale):
        return str(card.default_scale.__doc__)
    return "D^-0.5" if card.default_scale == "rsqrt" else f"{card.default_scale:g}"


AGREES_WITHIN = 0.15
OF_TWO_PARTS = (
    "what is near, making summaries and joining both parts cost the same for each token at every length; up to 16,384 tokens "
    "they take half of the time or more, so that what grows faster has not caught up"
)
START = "the start of a call, which is the same for 16 tokens, is a good part of the time at 1024"
GROWS_OTHERWISE = {
    "aaren": START,
    "combiner": OF_TWO_PARTS,
    "complex_rotary": "turning queries and keys, which is linear, is a good part of the time at short lengths",
    "core_context": OF_TWO_PARTS,
    "funnel": "projections and feed-forward networks, which are linear, take more of the time than of the operations",
    "long_short": OF_TWO_PARTS,
    "low_rank_pooling": START,
    "mixture_of_heads": "the function puts the outputs of heads together; the card counts the attention of the heads too",
    "positional_attention": "encodings and their products, which are linear, take more of the time than of the operations",
    "probsparse": START,
    "s4d": "making the kernels from powers, which is linear, takes more of the time than the transforms do",
    "sparse_strided": OF_TWO_PARTS,
    "token_parameter": START,
    "universal_rpe": "keys near a query, which have factors of their own and are linear, take more of the time than of the "
    "operations",
}
"""Reasons why time or memory does not grow as the card says."""

SLOWER_THAN_SOFTMAX = {
    "clipped_softmax": "a weight is clipped after its row's sum is known, so the scores are computed twice",
    "complex_rotary": "softmax attention, after queries and keys are turned by angles of their own",
    "differential": "two softmax maps for each two heads, on values of both",
    "funnel": "it is a whole pool: projections, feed-forward networks, and scores that know distances, three times as wide",
    "gated_softmax": "softmax attention and a gate",
    "hard_softmax": "all scores are computed, and choosing among them takes longer than the products that it saves",
    "landmark": "whole sequences read all pairs, by a softmax of two levels; it saves in decoding, where few blocks are read",
    "latent": "softmax attention, after keys and values are made of latents; it saves in decoding, which makes none",
    "positional_attention": "the attention of softmax, on encodings instead of content",
    "sea": "it gathers keys one by one and sorts the pixels of each query: memory traffic, while softmax computes",
    "selective_temperature": "softmax attention, after queries, keys and values are scaled",
    "sigmoid": "all pairs, as softmax; only the sums of rows are saved",
    "stochastic_subsampling": "softmax attention of all keys: only training reads fewer",
    "synthesizer": "its scores are its input, a number for each pair, which must be read from memory",
    "universal_rpe": "softmax attention with a factor for each offset, in parts that are put together",
}
"""Reasons why a mechanism is slower than softmax at the longest measured length."""


def _why(names: Sequence[str], reasons: Mapping[str, str]) -> str:
    return "\n".join(f"- {_link(name)}: {reasons.get(name, 'not explained yet')}." for name in names) or "None."


def scaling_page(data: Mapping[str, Any] | None) -> str:
    """The page of how time and memory grow with length, and from which length each mechanism beats softmax."""
    parts = [
        "# Growth with length",
        "Forward passes of the functions on one sequence with 4 heads of 64. The exponent p of time or memory ~ length^p is "
        "fitted from 1024 tokens to the longest that was measured, on one thread and by its clock (`regard profile NAME "
        "--growth`); beside it the same for the operations and the storage that the card counts (memory with the output). "
        "The efficiency length is the number of tokens from which a mechanism takes less than softmax, whose kernel is a "
        "fast one; a dash: at none that was measured. Measured lengths go from 256 to 16,384, or to the longest whose storage by the card stays below 2 GiB.",
    ]
    if data is None:
        return _page([*parts, "Not measured in this build of the pages: `make scaling` does it."])
    refused = [
        f"- {_link(name)}: {found['refused']}" for name, found in data["mechanisms"].items() if "refused" in found
    ]
    measured = {name: found for name, found in data["mechanisms"].items() if "refused" not in found}
    rows, otherwise = [], []
    for name, found in measured.items():
        p, lengths = found["growth"], found["efficiency"]
        shown = (lengths.get(kind) for kind in ("forward time", "training time", "forward memory"))
        growth = [(p[kind], p[f"{kind}_by_cost"]) for kind in ("time", "memory")]
        if any(abs(own - card) > AGREES_WITHIN for own, card in growth):
            otherwise.append(name)
        exponents = (f"{own:.2f} / {card:.2f}" for own, card in growth)
        longest, share = str(found["longest"]), f"{found['time over softmax']:.3g}"
        crossings = ("—" if n is None else str(n) for n in shown)
        rows.append((_link(name), found["pattern"], *exponents, *crossings, longest, share))
    headings = ("mechanism", "pattern", "time, measured / card", "memory, measured / card")
    headings += (
        "faster than softmax from",
        "in training from",
        "less memory from",
        "longest",
        "time there / softmax's",
    )
    slower = [name for name, found in measured.items() if name != "softmax" and found["time over softmax"] > 1]
    parts += [
        f"Measured with {data['measured']}.{_elsewhere(measured)} Times over softmax are ratios on one machine.",
        table(headings, rows),
        f"## Growth that differs from the card's by more than {AGREES_WITHIN}",
        _why(otherwise, GROWS_OTHERWISE),
        "## Slower than softmax at the longest length",
        _why(slower, SLOWER_THAN_SOFTMAX),
    ]
    if refused:
        parts += ["## Not measured", "\n".join(refused)]
    return _page(parts)


def _elsewhere(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Sentences naming the rows of a table that were measured on a different machine from most."""
    machines: dict[str, list[str]] = {}
    for name, found in rows.items():
        if "measured" in found:
            machines.setdefault(found["measured"], []).append(name)
    return "".join(f" With {machine}: {_codes(names)}." for machine, names in machines.items())


def ranking_page(data: Mapping[str, Any] | None, tasks: Mapping[str, Any] | None) -> str:
    """The page that ranks all mechanisms on recall and text, and a few on every other kind of task, best first."""
    parts = [
        "# All mechanisms on the same work",
        "`regard compare --mechanisms all` gives every mechanism the same backbone at the same number of parameters, the "
        "same batches and the same search of learning rates. It says how much each learns of so much data at this size, "
        "not how well it can do. Scores are means over seeds ± the standard error over seeds; mechanisms of one rank are "
        "those that the paired comparison cannot tell apart from the first of them. Mechanisms without a causal-self pattern have no part in "
        "it. Training runs may share the machine with each other (`--shard`), so their speed is not told.",
    ]
    if data is None:
        parts.append("Not measured in this build of the pages: `make ranking` does it.")
    else:
        facts = [f"- {key}: {value}" for key, value in data["settings"].items()]
        parts += [f"Measured with {data['measured']}.", "\n".join([f"- budget of a run: {data['budget']}", *facts])]
        parts += _ranked_tasks(data)
    if tasks is not None:
        names = sorted({name for found in tasks["comparisons"].values() for name in found["mechanisms"]})
        parts += [
            "## A few mechanisms on other tasks",
            f"{_codes(names)} on tasks that classify, predict, correct and compute, each in a comparison of its own in the "
            "same frame (`make tasks`). How much is learnt depends on the time given.",
        ]
        for name, found in sorted(tasks["comparisons"].items()):
            parts += _ranked_tasks(found, f"### {name}")
    return _page(parts)


def _ranked_tasks(data: Mapping[str, Any], heading: str | None = None) -> list[str]:
    """A section for each task of a comparison; with a heading, the only one's, which tells its own budget."""
    headings = ("rank", "mechanism", "score", "", "inference, ms", "decodes, tokens/s", "state, KiB")
    parts = []
    for task in data["tasks"]:
        own = [entry for entry in data["entries"] if entry["task"] == task]
        done = sum(entry["seeds"] for entry in own)
        facts = f"{len(own)} mechanisms, {done} scored runs. Costs at {data['settings']['table and picture at']}."
        if heading is not None:
            run = data["settings"][f"{task}: run"]
            facts += f" Budget {data['budget']}; a run: {run}. {data['measured']}."
        parts += [
            heading or f"## {task}",
            data["descriptions"][task].replace("\n", "; "),
            facts,
            table(headings, [_ranked(entry) for entry in own]),
        ]
        rule = data["baselines"].get(task)
        if rule:
            parts.append(f"Without training, {rule['name']} scores {rule['score']:.4g}.{_not_better(own)}")
    return parts


def _not_better(entries: Sequence[Mapping[str, Any]]) -> str:
    """The sentence on mechanisms that are not shown to be better than the rule."""
    level, behind = (
        [f"`{entry['mechanism']}`" for entry in entries if entry.get("beside_baseline") == standing]
        for standing in ("level", "behind")
    )
    if entries and len(level) + len(behind) == len(entries):
        return " No mechanism is shown to be better."
    said = [(level, "not told apart from it"), (behind, "worse")]
    return "".join(f" {', '.join(names)}: {told}." for names, told in said if names)


def _ranked(entry: Mapping[str, Any]) -> tuple[str, ...]:
    def shown(key: str, digits: str, scale: float = 1.0) -> str:
        return "—" if entry[key] is None else format(entry[key] / scale, digits)

    error = "" if entry["standard_error"] is None else f" ± {entry['standard_error']:.2g}"
    score = "diverged" if entry["mean"] is None else f"{entry['mean']:.4g}{error}"
    marks = "solved" if entry["solved"] else ""
    first = 1 if entry["separable_from_best"] is False else None
    costs = (
        shown("inference_ms", ".3g"),
        shown("decode_tokens_per_second", ",.0f"),
    )
    state = shown("state_bytes", ",.3g", 1024.0)
    rank = entry.get("rank", first)
    return "—" if rank is None else str(rank), _link(entry["mechanism"]), score, marks, *costs, state


def fashion_page(data: Mapping[str, Any] | None, resolution: Mapping[str, Any] | None) -> str:
    """The page of small backbones on Fashion-MNIST, best first, and of positions in larger images."""
    return _page(["# Image backbones on Fashion-MNIST", *_backbones(data), *_resolution(resolution)])


def _backbones(data: Mapping[str, Any] | None) -> list[str]:
    parts = [
        "A small size of every backbone, trained from scratch on images resized to 32 x 32 pixels (64 x 64 where the name "
        "ends so: BiFormer and VMamba begin with a quarter of the sides), with one learning rate for all and as many steps as "
        "fit into the same time at the speed measured in training; the last weights count "
        "(`benchmarks/fashion_mnist.py`). Training images are left as they are (`none`), half of them are "
        "mirrored (`flip`), or they are shifted too (`light`). Sizes are those of this project for small images and are not "
        "matched, and nothing is tuned to any of them: the order says what came of so much time on a machine. "
        "`agent_vit_nano` and `moh_vit_nano` are `vit_nano` with another attention in its six layers (`regard train --model "
        "'vit_nano:plan=agent*6'`, `mixture_of_heads*6`). With two seeds or more the error is the standard error "
        "over seeds, with one that of the share of test images. Speeds are of batches of 64, medians of all models in turn in one process.",
    ]
    if data is None or not data["cells"]:
        return [*parts, "Not measured in this build of the pages: `python benchmarks/fashion_mnist.py` does it."]
    budgets = [(cell["minutes"], cell["items"]) for cell in data["cells"]]
    budget = max(budgets, key=budgets.count)
    cells = [cell for cell, own in zip(data["cells"], budgets, strict=True) if own == budget]
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    machines = sorted({machine_of(cell) for cell in cells})
    letters, several = dict(zip(machines, string.ascii_uppercase, strict=False)), len(machines) > 1
    for cell in cells:
        groups.setdefault((cell["model"], cell["augment"], cell["precision"]), []).append(cell)

    def mean(found: Sequence[float | None]) -> float:
        return -1.0 if None in found else statistics.fmean(score for score in found if score is not None)

    scores = {key: [cell["accuracy"] for cell in group] for key, group in groups.items()}
    rows = []
    for key, found in sorted(scores.items(), key=lambda entry: -mean(entry[1])):
        (name, augment, precision), share, own = key, mean(found), groups[key][0]
        spread = statistics.stdev(map(float, found)) if len(found) > 1 and share >= 0 else None  # type: ignore[arg-type]
        error = spread / len(found) ** 0.5 if spread is not None else (max(share * (1 - share), 0) / budget[1]) ** 0.5
        speed = data["speeds"].get(name)
        shown = ["—"] * 4
        if speed is not None:
            memory = (f"{speed[kind] / 2**20:,.0f}" for kind in ("training_bytes", "inference_bytes"))
            shown = [f"{speed['training']:,.0f}", f"{speed['inference']:,.0f}", *memory]
        accuracy = f"{share:.2%} ± {error:.2%}" if share >= 0 else "diverged"
        rows.append(
            (
                f"`{name}`",
                augment,
                precision,
                accuracy,
                str(len(found)),
                f"{own['parameters']:,}",
                f"{own['steps']:,}",
                *(["".join(sorted({letters[machine_of(cell)] for cell in groups[key]}))] if several else []),
                *shown,
            )
        )
    headings = (
        "backbone",
        "augmentation",
        "precision",
        "accuracy",
        "seeds",
        "parameters",
        "steps",
        *(["on"] if several else []),
        "images/s, training",
        "images/s, inference",
    )
    headings += ("MiB, training", "MiB, inference")
    on = ", ".join(f"on {it} ({letters[it]})" if several else f"on {it}" for it in machines)
    told = f"{budget[0]:g} minutes a run; {budget[1]:,} test images; trained {on}."
    if several:
        told += (
            " A slower machine takes fewer steps by the clock; rows whose steps follow from the training speed shown are "
            "comparable, whichever machine trained them."
        )
    return [*parts, told, table(headings, rows)]


def machine_of(cell: Mapping[str, Any]) -> str:
    """The processor and the threads of a run, in words."""
    return f"{cell['cpu']} with {counted(cell['threads'], 'thread')}"


def _resolution(data: Mapping[str, Any] | None) -> list[str]:
    """The section on positions trained at one image size and tested at larger ones."""
    parts = [
        "## Larger images than in training",
        "An encoder of three layers of softmax attention is trained on 28 x 28 pixels and tested on the same images resized to "
        "42 and 56, with patches of 2 x 2 (`benchmarks/resolution.py`): accuracy ± the standard error over seeds. Learned "
        "positions are also stretched from the trained grid to the larger one; SeqPE's are also interpolated: rows and columns "
        "of the larger grid are scaled into those of the trained one.",
    ]
    if data is None or not data["cells"]:
        return [*parts, "Not measured in this build of the pages: `python benchmarks/resolution.py` does it."]
    length = max((cell["steps"], cell["items"]) for cell in data["cells"])
    found: dict[str, dict[str, list[float | None]]] = {}
    for cell in data["cells"]:
        if (cell["steps"], cell["items"]) != length:
            continue
        for side, accuracy in cell["accuracy"].items():
            size, _, how = side.partition(" ")
            name = f"{cell['positions']}, {how}" if how else cell["positions"]
            found.setdefault(name, {}).setdefault(size, []).append(accuracy)
    sides = sorted({size for scores in found.values() for size in scores})

    def shown(scores: Sequence[float | None]) -> str:
        sound = [score for score in scores if score is not None]
        if not scores or len(sound) < len(scores):
            return "diverged" if scores else "—"
        error = f" ± {statistics.stdev(sound) / len(sound) ** 0.5:.2%}" if len(sound) > 1 else ""
        return f"{statistics.fmean(sound):.2%}{error}"

    rows = [(name, *(shown(scores.get(side, ())) for side in sides)) for name, scores in found.items()]
    seeds = len({cell["seed"] for cell in data["cells"] if (cell["steps"], cell["items"]) == length})
    told = f"{length[0]:,} steps, {length[1]:,} test images, {seeds} seed{'s' * (seeds != 1)}."
    return [*parts, told, table(("positions", *(f"{side} pixels" for side in sides)), rows)]


def parity_page(sources: Mapping[str, Any], measured: Mapping[str, Any] | None, names: Sequence[str]) -> str:
    """The page of comparisons with code written elsewhere, with the size of the differences."""
    parts = [
        "# Parity with other code",
        "Inputs and outputs (and gradients, where recorded) of other implementations were stored once; the tests run "
        "this project's code on the same inputs. Only numbers are stored, none of the code. The error is the largest "
        "difference that a test of the recording sees, as a fraction of the largest expected value"
        + (f", measured with {measured['measured']}." if measured else "; not measured in this build (`make matrix`).")
        + " *tested*: a test compares with the recording in a way of its own, within 1e-10 or its stated tolerance.",
    ]
    errors = measured["fixtures"] if measured else {}
    studies = (name.replace("-", "_") for name in list_studies())
    owners = (*names, *list_positions(), *studies, "vision", "compression")
    recordings: dict[str, list[dict[str, Any]]] = {}
    for entry in sources["fixtures"]:
        stem = entry["file"].removesuffix(".npz")
        owner = max((n for n in owners if stem == n or stem.startswith(n + "_")), key=len, default="other")
        recordings.setdefault(owner, []).append(entry)
    for owner in sorted(recordings):
        rows = []
        for entry in recordings[owner]:
            found = errors.get(entry["file"])
            shown = "" if not measured else "not tested" if found is None else _parity(found["error"])
            dtypes = sorted({a["dtype"] for a in entry["arrays"].values() if a["dtype"].startswith("float")})
            rows.append(
                (f"`{entry['file'].removesuffix('.npz')}`", _source(entry), entry["call"], ", ".join(dtypes), shown)
            )
        parts += [f"## {owner}", table(("recording", "code", "call", "dtype", "error"), rows)]
    return _page(parts)


def _parity(error: float | None) -> str:
    return "tested" if error is None else _error(error, 1)


def _source(entry: Mapping[str, Any]) -> str:
    commit = entry["commit"]
    name = f"{entry['repository']}: {entry['object']}"
    path = entry["path"].split(",")[0]
    if re.fullmatch(r"[0-9a-f]{40}", commit):
        name = f"[{name}](https://github.com/{entry['repository']}/blob/{commit}/{path})"
        commit = commit[:10]
    return f"{name} ({commit}; {entry['licence']})"


FAMILIES = {
    "Softmax and its kin": "Each query reads each key: operations grow with the square of the length, the cache with the length.",
    "Windows and blocks": "Each query reads the keys in fixed places: those near it, blocks, every s-th one.",
    "Chosen keys": "What tokens hold decides which keys a query reads.",
    "Summaries": "A few vectors stand for many keys, or for many queries.",
    "Linear attention": "The weight of a pair is a product of features, so that the past fits in one matrix a head.",
    "Recurrences and state spaces": "A state of fixed size goes from token to token, and decays or is edited on its way.",
    "Mixing without pairs": "Convolutions and transforms over the sequence, without queries and keys.",
    "Parts of a model": "Poolings, linear layers, and what goes around the heads of another mechanism.",
}
"""Families of mechanisms with their descriptions, in the order of the navigation."""

PLACED = {
    "aaren": "Recurrences and state spaces",
    "bilevel_routing": "Chosen keys",
    "landmark": "Chosen keys",
    "lara": "Linear attention",
    "mlstm": "Recurrences and state spaces",
    "moba": "Chosen keys",
    "probsparse": "Chosen keys",
    "reformer": "Chosen keys",
    "routing": "Chosen keys",
    "s4d": "Recurrences and state spaces",
    "sea": "Chosen keys",
    "sinkhorn": "Chosen keys",
}
"""Families of the mechanisms that their card alone would place in another family."""

SHORT = {
    Pattern.NONCAUSAL_SELF: "NS",
    Pattern.CAUSAL_SELF: "CS",
    Pattern.NONCAUSAL_CROSS: "NC",
    Pattern.CAUSAL_CROSS: "CC",
}
WIDE = "---\nhide: [toc]\n---"
"""Front matter of a page whose tables need the space of the table of contents."""

AT = LENGTHS[-1]
"""Length at which the chooser compares mechanisms."""


def family(card: Mechanism) -> str:
    """The family of a mechanism, by its card's kind, inputs, engine, weights and cost."""
    if card.name in PLACED:
        return PLACED[card.name]
    if card.kind not in (Kind.ATTENTION, Kind.MIXER):
        return "Parts of a model"
    if _operations(card) > 0.25:  # it computes a fixed share of softmax's pairs, however long the input
        return "Softmax and its kin"
    if card.domains:  # decays, step sizes or writing strengths
        return "Recurrences and state spaces"
    if card.kind is Kind.MIXER:
        return "Mixing without pairs"
    if card.engine in ("linear_attention", "gated_recurrence"):
        return "Linear attention"
    return "Windows and blocks" if card.weights == "exact" else "Summaries"


def by_family(names: Iterable[str]) -> dict[str, list[Mechanism]]:
    """The mechanisms `names` by family, without empty families."""
    cards = [get_mechanism(name) for name in names]
    families = {name: [card for card in cards if family(card) == name] for name in FAMILIES}
    return {name: members for name, members in families.items() if members}


def _operations(card: Mechanism) -> float:
    """Operations according to the card, as a fraction of softmax's."""
    return _cost_at(card, AT).flops / _cost_at(get_mechanism("softmax"), AT).flops


def _cost_at(card: Mechanism, n: int) -> Cost:
    return card.cost(Shape(1, HEADS, n, n, WIDTH, WIDTH), card.options())


def index_page(
    names: Sequence[str],
    scaling: Mapping[str, Any] | None = None,
    ranking: Mapping[str, Any] | None = None,
    reproduced: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The index page: the chooser (a table of all mechanisms) and the list of each family."""
    tasks = {task: _arrow(ranking, task) for task in ranking["tasks"]} if ranking else {}
    families = by_family(names)
    rows = [
        (f"[{card.name}]({card.name}.md)", title, *_chosen_by(card, scaling, ranking, reproduced))
        for title, members in families.items()
        for card in members
    ]
    headings = ("mechanism", "family", "patterns", "state", "operations / softmax's", "time / softmax's")
    parts = [
        WIDE,
        "# Mechanisms",
        f"A heading sorts the table; the field above it keeps the rows that have all its words, such as `CS fixed`. The "
        f"card of each mechanism says its patterns, its state and its operations at {AT:,} tokens ({HEADS} heads of "
        f"{WIDTH}); time is [measured](../scaling.md), at {AT:,} tokens where no other length is named. "
        f"{_scores_meaning(tasks)}The verdict is that of the [reproduction](../verdicts.md) of its paper's claim. A dash: "
        "not measured, or not possible.",
        "Patterns: " + ", ".join(f"{short} {pattern.value}" for pattern, short in SHORT.items()) + ". State: numbers "
        "kept to decode the next token; *fixed* keeps its size, *grows* grows with the sequence.",
        table((*headings, *(f"{task} {arrow}" for task, arrow in tasks.items()), "claim at a small size"), rows),
    ]
    for title, members in families.items():
        listed = [(f"[{card.name}]({card.name}.md)", card.summary) for card in members]
        parts += [f"## {title}", FAMILIES[title], table(("mechanism", "what it does"), listed)]
    return _page(parts)


def _arrow(ranking: Mapping[str, Any], task: str) -> str:
    """An arrow that says whether higher or lower scores are better; a ranking's entries come best first."""
    means = [e["mean"] for e in ranking["entries"] if e["task"] == task and e["mean"] is not None]
    return "↑" if means and means[0] > means[-1] else "↓"


def _scores_meaning(tasks: Iterable[str]) -> str:
    named = " and ".join(tasks)
    return f"Scores on {named} are those of [the ranking](../ranking.md), ↑ more is better. " if named else ""


def _chosen_by(
    card: Mechanism,
    scaling: Mapping[str, Any] | None,
    ranking: Mapping[str, Any] | None,
    reproduced: Sequence[Mapping[str, Any]],
) -> list[str]:
    """The chooser's cells after name and family."""
    state = "none"
    if card.state is not None:
        state = f"{_number(_cost_at(card, AT).state)} {'fixed' if card.recurrent else 'grows'}"
    measured = (scaling or {"mechanisms": {}})["mechanisms"].get(card.name, {})
    time = "—"
    if "time over softmax" in measured and card.kind is not Kind.WRAPPER:  # a wrapper's heads are another mechanism's
        time = f"{measured['time over softmax']:.2g}"
        time += "" if measured["longest"] == AT else f" at {measured['longest']:,}"
    scores = []
    for task in ranking["tasks"] if ranking else ():
        means = {e["mechanism"]: e["mean"] for e in ranking["entries"] if e["task"] == task}
        scores.append("—" if means.get(card.name) is None else f"{means[card.name]:.3g}")
    about = [one for one in reproduced if card.name in one["mechanisms"] and one["outcome"] != Outcome.NOT_RUN]
    about.sort(key=lambda one: one["name"] != card.name)
    claim = (
        f"[{about[0]['outcome'].removesuffix(' at this size')}](../verdicts.md#{about[0]['name']})" if about else "—"
    )
    patterns = " ".join(short for pattern, short in SHORT.items() if pattern in card.patterns)
    return [patterns, state, f"{_operations(card):.2g}", time, *scores, claim]


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def _link(name: str) -> str:
    return f"[{name}](mechanisms/{name}.md)"


def _codes(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def write(output: Path, names: Sequence[str]) -> list[Path]:
    """Write all generated pages for the mechanisms `names` below `output`."""
    verified = _read(DATA / "verify.json")
    cells = verified["cells"] if verified else []
    judged = _read(DATA / "reproductions.json")
    reproduced = reproductions(judged)
    scaling, ranking = _read(DATA / "scaling.json"), _read(DATA / "ranking.json")
    variants = verified.get("variants", []) if verified else []
    pages = {
        f"mechanisms/{name}.md": mechanism_page(get_mechanism(name), cells, reproduced, variants) for name in names
    }
    pages |= {
        "mechanisms/index.md": index_page(names, scaling, ranking, reproduced),
        "matrix.md": matrix_page(verified, names),
        "integrations.md": integrations_page(_read(DATA / "integrations.json"), names),
        "scaling.md": scaling_page(scaling),
        "ranking.md": ranking_page(ranking, _read(DATA / "tasks.json")),
        "fashion.md": fashion_page(_read(DATA / "fashion_mnist.json"), _read(DATA / "resolution.json")),
        "lighter.md": _page(lighter_page(_read(DATA / "lighter.json"))),
        "findings.md": _page(studies_page(_read(DATA / "studies.json"))),
        "mixing.md": _page(mixing_page(names)),
        "verdicts.md": verdicts_page(reproduced, judged["measured"] if judged else None),
        "parity.md": parity_page(_read(SOURCES), _read(DATA / "parity.json"), list_mechanisms()),
    }
    (output / "mechanisms").mkdir(parents=True, exist_ok=True)
    for path, text in pages.items():
        (output / path).write_text(text)
    return [output / path for path in pages]


def on_config(config: Any) -> Any:
    """mkdocs hook: fill the navigation with the mechanisms of each family."""
    for entry in config["nav"]:
        if "Mechanisms" in entry:
            families = by_family(name for name in list_mechanisms() if (DOCS / f"mechanisms/{name}.md").is_file())
            pages = [{title: [f"mechanisms/{c.name}.md" for c in members]} for title, members in families.items()]
            entry["Mechanisms"] = [{"Choose a mechanism": "mechanisms/index.md"}, *pages]
    return config


def on_page_content(html: str, **_: Any) -> str:
    """mkdocs hook: replace roles by links, if the reference has their target, and ``::``, neither of which Markdown has."""

    def link(found: re.Match[str]) -> str:
        path, short = found[2], found[1]
        return f'<autoref optional identifier="{path}"><code>{path.split(".")[-1] if short else path}</code></autoref>'

    return re.sub(r":\w+:<code>(~?)([\w.]+)</code>", link, html).replace("::</p>", ":</p>")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the generated pages of the documentation.")
    parser.add_argument("--plugin", action="append", default=[], help="also write the page of this mechanism's file")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the pages")
    arguments = parser.parse_args()
    for plugin in arguments.plugin:
        load_plugin(plugin)
    written = write(arguments.output, list_mechanisms())
    print(f"{len(written)} pages in {arguments.output}")


if __name__ == "__main__":
    main()
