"""The page about making a language model lighter, drawn from its measured table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables import table

from regard.measurement import units
from regard.measurement.statistics import pareto_front
from regard.workbench.reports import charts
from regard.workbench.reports.charts import ScatterPoint
from regard.workbench.reports.scales import Axis

LEFT_OUT = (
    "Linear attention in place of softmax, and everything else that has to be trained back, is [retrofit](retrofit.md): it costs "
    "training, and is judged there.",
    "Distillation into another, smaller model: `regard train --teacher`, in [compress](compress.md). The rows here shorten the "
    "model itself and win back what that lost.",
    "Architecture search and lighter networks (shared key heads, factorised embeddings, other mechanisms) are chosen before a model "
    "is trained: [search](search.md), [techniques](techniques.md).",
    "Early exit needs a model that was trained with exits: `regard train --exits`.",
    "Methods that the surveys name and regard does not have: movement pruning, TernaryBERT, BinaryBERT, ZeroQuant and PTQ4ViT; "
    "Scissorhands and AutoCompressor for caches and prompts; PyramidDrop, SparseVLM, VisionZip, PiToMe and DART for tokens of "
    "images. Each is close to one that is there (magnitude pruning, `gptq`, `h2o`, `shorten`, `fastv`, `tome`) or needs its own "
    "pretraining.",
    "Fewer tokens of images ([vision](vision.md)) have no counterpart in a language model without images.",
)


def lighter_page(data: Mapping[str, Any] | None) -> list[str]:
    """The page made from ``lighter.json``, as pieces of Markdown."""
    parts = [
        "# Lighter: each family on one model",
        "A survey of efficient inference ([2307.07982](https://arxiv.org/abs/2307.07982)) sorts methods into families and quotes "
        "each paper's figures, which were taken on other models, tasks and machines. Here every family is done to the same model, "
        "one method at a time, and measured in the same way.",
    ]
    if data is None:
        return [*parts, "Not measured in this build of the pages: `make lighter` does it."]
    setting, original = data["setting"], data["original"]
    parts.append(
        f"{setting['model']} on {setting['data']}: perplexity of {setting['scored']} tokens, each read after a prompt of "
        f"{setting['prompt']} and those before it, through the cache; the same windows for every row. {setting['calibration']} other "
        f'windows calibrate. Prefill is the prompt, decode a token after it; "faster" is the median of the ratios to the '
        f"original, in turns in one process ({setting['cpu']}, {_threads(setting['threads'])}, torch {setting['torch']}). All rows but "
        f"`transformers`, which is the model's own code, decode as `regard generate` does, in few native calls where the layers "
        f"allow it. The model's weights come from a 4-bit file, so that 4 bits lose less here than elsewhere."
    )
    rows = [_row("original", "", original, original)]
    families = list(dict.fromkeys(row["family"] for row in data["rows"]))
    ordered = sorted(data["rows"], key=lambda row: families.index(row["family"]))
    rows += [_row(row["name"], row["family"], row, original) for row in ordered]
    headings = (
        "what",
        "family",
        "perplexity",
        "lost",
        "parameters",
        "weights",
        "cache",
        "prefill, faster",
        "decode, faster",
    )
    parts += [_picture(data), table(headings, rows)]
    commands = dict.fromkeys(row["command"] for row in data["rows"] if row["command"])
    parts += [
        "Weights and cache are bytes in memory, the cache that of the prompt. Zeros in weights save "
        "nothing here, sparse methods keep the cache unless they say so, and a method that costs more time to choose than it saves "
        "is slower: the table says which. After prompts this short there is little to save by reading less.",
        "Drafts change no answer, so their perplexity is the original's. They are timed on whole greedy replies to the prompts of all "
        "windows, from which the time of the prompts is taken; a lookup gains as much as replies repeat what was said, which small "
        "models do often. Where the draft is a model, weights, cache and prefill are those of both.",
        "## What is not in it",
        "\n".join(f"- {sentence}" for sentence in LEFT_OUT),
        "## Commands",
        "```sh\n" + "\n".join(commands) + "\n```",
    ]
    return parts


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _row(name: str, family: str, row: Mapping[str, Any], original: Mapping[str, Any]) -> list[str]:
    lost = round(row["perplexity"] / original["perplexity"] - 1, 3) or 0.0  # no -0.0
    faster = [f"{row['faster'][what]:.2f}x" if row["faster"] else "" for what in ("prefill", "decode")]
    share = "" if row is original else f"{lost:+.1%}"
    return [
        f"`{name}`",
        family,
        f"{row['perplexity']:.2f}",
        share,
        units.count(row["parameters"]),
        units.size(row["weights"]),
        units.size(row["cache"]),
        *faster,
    ]


def _picture(data: Mapping[str, Any]) -> str:
    rows = [row for row in data["rows"] if row["faster"]]
    if len(rows) < 2:
        return ""
    front = pareto_front({row["name"]: (-row["perplexity"], row["faster"]["decode"]) for row in rows})
    families = list(dict.fromkeys(row["family"] for row in rows))
    points = [
        ScatterPoint(
            families.index(row["family"]),
            row["name"],
            row["faster"]["decode"],
            row["perplexity"] / data["original"]["perplexity"],
            front=row["name"] in front,
            detail=f"{row['name']} ({row['family']}): {row['faster']['decode']:.2f}x as fast, perplexity {row['perplexity']:.2f}",
            label=row["name"] in front,
        )
        for row in rows
    ]
    drawn = charts.scatter(
        "lighter",
        "Perplexity against speed of decoding",
        "Perplexity beside the original's, by how much faster a token is decoded; one point for each method.",
        points,
        Axis("decoding, times as fast →", "{:.2g}x".format, log=True, base=2),
        Axis(
            "↑ perplexity, times the original's (lower is better, so low is up)",
            "{:.3g}".format,
            log=True,
            rising=False,
            limit=2.0,
        ),
    )
    return f'<figure class="drawn">{drawn}<figcaption>Perplexity against the speed of decoding; a colour for each family. What loses more than twice the perplexity is drawn at the edge.</figcaption></figure>'
