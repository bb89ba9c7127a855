"""The README in a trained model's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regard.models.exit_rules import HALTING
from regard.workbench.plugins import plugin_words
from regard.workbench.trained.best_weights import Found
from regard.workbench.trained.folder import DIVERGED, LAST

UNTOLD = ("steps", "step_seconds", "first_item")
"""Settings that are left out of the README."""


def card(folder: Path, record: Mapping[str, Any]) -> str:
    """The README's text: what was trained, how well it does, and how to use it."""
    title = f"# {record['mechanism']} on {record['task']['name']}"
    if record["state"] == DIVERGED:
        rate = record["settings"]["learning_rate"]
        return (
            f"{title}\n\nThe training diverged at a learning rate of {rate:g}: there is no model. Try a smaller one.\n"
        )
    rule = record["baseline"]
    beside = f" (without training, {rule['name']}: {rule['score']:.4g})" if rule else ""
    own, plugins = record["settings"], record.get("plugins", ())
    lines = [
        title,
        f"Held out: {record['score']:.4g} {record['metric']}{beside}. {record['parameters']:,} parameters, "
        f"{record['tokens']:,} tokens in {record['steps']} steps, {record['seconds']:.0f} s of training on {record['machine']}.",
        *([f"The weights are {chosen_weights(record)}."] if record.get("weights") else []),
        *([f"{learned_from(record)}."] if record.get("teacher") else []),
        "\n".join(
            f"- {key.replace('_', ' ')}: {value}"
            for key, value in own.items()
            if key not in UNTOLD and value is not None
        ),
        "```\n" + record["described"] + "\n```",
        "## Use",
        "```python\n" + loading(folder, plugins) + "\n```",
    ]
    more = plugin_words(plugins)
    commands = [f"regard evaluate {folder}{more}"]
    reader = record.get("reader")
    if reader is not None and "colours" in reader:
        volumes = "overlap" in reader
        files = "scan.nii.gz --output mask.nii.gz" if volumes else "picture.jpg --output mask.png"
        commands.append(f"regard predict {folder} {files}{more}")
        commands += [] if volumes else [f"regard explain {folder} picture.jpg{more}"]
    elif reader is not None:
        commands += [f"regard {verb} {folder} picture.jpg{more}" for verb in ("predict", "explain")]
    if (own.get("stack") or {}).get("exits"):
        halts = str(own["stack"].get("exit_rule")).startswith(HALTING)
        rule = f"{HALTING}:0.1" if halts else "entropy:0.3"
        commands.append(f"regard evaluate {folder} --exit {rule}{more}")
    if record["tokenizer"] is not None and record["task"]["name"] == "text":
        commands.append(f'regard generate {folder} "..."{more}')
    return "\n\n".join([*lines, "```\n" + "\n".join(commands) + "\n```"]) + "\n"


def loading(folder: Path, plugins: Sequence[str]) -> str:
    """The lines of Python that load the model in a folder."""
    entering = f"from regard.workbench.plugins import enter_plugins\n\nenter_plugins({list(plugins)})\n"
    first = entering if plugins else "\n"
    return f"from regard.models import from_pretrained\n{first}model = from_pretrained({str(folder)!r})"


def chosen_weights(record: Mapping[str, Any]) -> str:
    """A description of the weights of a run that were kept."""
    found = Found(**record["weights"])
    others = found.averaged or found.step < record["steps"]
    return f"{found}" + (f"; the last ones are in {LAST}/" if others else "")


def learned_from(record: Mapping[str, Any]) -> str:
    """A description of a student's teacher."""
    told = record["teacher"]
    return (
        f"Distilled by {record['settings']['distil']} from {record['settings']['teacher']}: {told['mechanism']}, "
        f"{told['parameters']:,} parameters, {told['score']:.4g} {told['metric']}"
    )
