"""Parse the text of arguments into names, numbers, mechanisms and tasks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from regard.catalogue import list_mechanisms
from regard.contract import Kind, Pattern, Unsupported, at_least, closest, read_options, written_options


def given_options(context: typer.Context) -> list[str]:
    """Arguments and options given on the command line, by their Python names."""
    return [name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]


def only_beside(context: typer.Context, option: str, names: Sequence[str]) -> None:
    """Raise Unsupported if one of `names` is on the command line without `option`, on which it depends."""
    for name in given_options(context):
        if name in names:
            raise Unsupported(
                f"{spelled_option(name)} without {option}", supported=f"{option} together with it", nearest=option
            )


def spelled_option(name: str) -> str:
    """The command-line spelling of an option."""
    return "--" + name.replace("_", "-")


def read_names(text: str) -> tuple[str, ...]:
    """Names of the mechanisms in a comma-separated list, spelled uniformly; raises Unsupported for unknown ones."""
    from regard.models.variants import read_variants

    return tuple(variant.name for variant in read_variants(text))


def read_integers(name: str, text: str, least: int = 1) -> tuple[int, ...]:
    """Sorted whole numbers of a comma-separated list, without duplicates; raises Unsupported, which names `name`."""
    try:
        found = tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise Unsupported(
            f"{name} {text!r}", supported="comma-separated whole numbers", nearest="256,1024,4096"
        ) from None
    if not found:
        raise Unsupported(f"{name} {text!r}", supported="one or more comma-separated whole numbers")
    at_least(name, found[0], least)
    return found


def read_lengths(text: str, name: str = "lengths") -> tuple[int, ...]:
    """Sorted numbers of tokens of a comma-separated list such as 512,4k (k is 1024), without duplicates; raises
    Unsupported, which names `name`."""
    found = set()
    for part in filter(str.strip, text.split(",")):
        match = re.fullmatch(r"\s*(\d+)\s*([kK]?)\s*", part)
        if match is None or int(match[1]) < 1:
            raise Unsupported(f"{name} {text!r}", supported="comma-separated numbers of tokens", nearest="256,1k,4k")
        found.add(int(match[1]) * (1024 if match[2] else 1))
    return tuple(sorted(found))


def read_numbers(name: str, text: str) -> tuple[float, ...]:
    """Sorted numbers of a comma-separated list, without duplicates; raises Unsupported, naming the list `name`."""
    try:
        return tuple(sorted(dict.fromkeys(float(part) for part in text.split(",") if part.strip())))
    except ValueError:
        raise Unsupported(f"{name} {text!r}", supported="comma-separated numbers", nearest="0.003,0.01") from None


def read_mechanisms(text: str, tasks: list[Any]) -> list[Any]:
    """Mechanisms with options, hybrids, or image backbones; ``all`` stands for the mechanisms that suit every task.

    Raises:
        Unsupported: where no mechanism is named, and as in :func:`regard.models.variants.read_variant`.
    """
    from regard.models.variants import read_variants

    if text.strip() == "all":
        patterns = {t.pattern for t in tasks}
        inserting = patterns == {Pattern.CAUSAL_SELF}  # only language models have room for inserted tokens
        return list_mechanisms(
            where=lambda c: (
                patterns <= set(c.patterns)
                and c.kind in (Kind.ATTENTION, Kind.MIXER, Kind.WRAPPER)
                and (inserting or c.prepare is None)
            )
        )
    found = read_variants(text)
    if not found:
        raise Unsupported(
            f"mechanisms {text!r}", supported="comma-separated names, or all", nearest="softmax,gated_linear"
        )
    return found


def read_backbones(text: str) -> list[Any]:
    """Image backbones, optionally with options; raises Unsupported if a mechanism is among them."""
    from regard.models.variants import Variant, read_model, read_variants
    from regard.models.vision import list_networks

    known = list_networks()

    def read(written: str) -> Variant:
        name = written.partition(":")[0].strip()
        if name not in known:
            raise Unsupported(
                f"model {written!r}",
                supported="names that `regard list --backbones` prints",
                nearest=closest(name, known) or "--mechanisms",
            )
        return read_model(written)

    found = read_variants(text, read)
    if not found:
        raise Unsupported(f"models {text!r}", supported="comma-separated names", nearest="van_nano,vit_nano")
    return found


def named_backbones(text: str) -> list[Any]:
    """The image backbones in `text`, if its first name is one; otherwise an empty list."""
    from regard.models.vision import list_networks

    return read_backbones(text) if text.partition(":")[0].strip() in list_networks() else []


def read_stack(text: str) -> Any:
    """The stack of a comparison's backbones; its early-exit layers are joined by plus signs."""
    from regard.models import StackConfig

    options = read_options(text, "stack", before="")
    if "exits" in options:
        options["exits"] = read_integers("exits", str(options["exits"]).replace("+", ","))
    return StackConfig.read(options)


def read_exits(text: str, layers: int, objective: str, stack: Any) -> Any:
    """A stack with early exits: ``all`` or ``1+2``, optionally followed by ``:own`` or ``:halting``.

    Args:
        layers: number of layers of the model.
        objective: objective of its task.
        stack: the other options of the stack.
    """
    from dataclasses import replace

    from regard.contract import one_of

    places, _, kind = text.partition(":")
    one_of(f"--exits {places}:", kind, ("", "own", "halting"))
    exits = tuple(range(1, layers)) if places == "all" else read_integers("--exits", places.replace("+", ","), least=0)
    if layers == 1:
        raise Unsupported(f"--exits {text} of 1 layer", supported="two layers or more", nearest="--layers 2")
    if not 1 <= exits[0] <= exits[-1] < layers:
        raise Unsupported(f"--exits {text} of {layers} layers", supported=f"layers from 1 to {layers - 1}, or all")
    if kind == "own" and objective != "classification":
        raise Unsupported(
            f"--exits {text} on a task of {objective}",
            supported=":own where whole sequences are classified",
            nearest=f"--exits {places}",
        )
    changes = {"own": {"exit_heads": "own"}, "halting": {"exit_rule": "halting:0.01"}}.get(kind, {})
    return replace(stack, exits=exits, **changes)


def read_tasks(
    chosen: list[str] | None,
    data: list[str] | None,
    validation: list[str] | None,
    length: int | None,
    tokenizer: str,
    plugged: Sequence[Any],
    recognised: Callable[[str], None] = lambda described: None,
    skip_unreadable: bool = False,
) -> list[Any]:
    """The tasks of a comparison: those named, those of plugins, those that suit the data, or the default tasks.

    Args:
        plugged: tasks of plugins, or their classes.
        recognised: called with a description of the task recognised from the data.
    """
    from regard.tasks import create_task

    own = plugged_tasks(plugged, () if chosen else (data, validation))
    if not chosen and not own and not data:
        chosen = ["text", "recall"]
    described = []
    if chosen or not own:
        described = describe_tasks(chosen, data, validation, length, tokenizer, recognised, skip_unreadable)
    return [*(create_task(name, **options) for name, options in described), *own]


def plugged_tasks(plugged: Sequence[Any], data: Sequence[list[str] | None] = ()) -> list[Any]:
    """The tasks that plugins define, made and checked.

    Args:
        plugged: tasks, or their classes.
        data: data that were given too, which no plugin task would read.
    """
    from regard.tasks import check_task

    own = [check_task(one() if isinstance(one, type) else one) for one in plugged]
    if own and any(data):
        raise Unsupported(
            f"data for {own[0].name}, a plugin's task, which reads its own",
            supported="the task alone, or also a --task that reads the data",
        )
    return own


def describe_tasks(
    chosen: list[str] | None,
    data: list[str] | None,
    validation: list[str] | None,
    length: int | None,
    tokenizer: str,
    recognised: Callable[[str], None] = lambda described: None,
    skip_unreadable: bool = False,
) -> list[tuple[str, dict[str, Any]]]:
    """Names and options of the tasks that are named, or of the task that suits the data.

    Args:
        recognised: called with a description of the task recognised from the data.
    """
    from regard.tasks import TASKS
    from regard.tasks.recognise import recognise

    named: list[tuple[str, dict[str, Any]]] = []
    for described in chosen or ():
        name, _, rest = described.partition(":")
        named.append((name, read_options(rest, name)))
    if not chosen:
        for word in data or ():
            if word.partition(":")[0] in TASKS and not Path(word).exists():
                raise Unsupported(
                    f"{word}, which does not exist", supported="files and folders", nearest=f"--task {word}"
                )
        named = [recognise(data)] if data else [("text", {})]
        name, options = named[0]
        if named != [("text", {})]:
            recognised(written_options(name, options))
    found, reading = [], []
    for name, options in named:
        if name in TASKS:
            accepted = inspect.signature(TASKS[name]).parameters
            if "data" in accepted:
                reading.append(name)
                given = {"data": _one(data), "validation": _one(validation)}
                options |= {option: paths for option, paths in given.items() if paths}
            if "tokenizer" in accepted:
                options["tokenizer"] = tokenizer
            if skip_unreadable and "skip_unreadable" in accepted:
                options["skip_unreadable"] = True
        if length is not None:
            options["length"] = length
        found.append((name, options))
    if skip_unreadable and not any(options.get("skip_unreadable") for _, options in found):
        raise Unsupported(
            f"--skip-unreadable with {', '.join(name for name, _ in named)}", supported="tasks that read images"
        )
    if (data or validation) and not reading:
        readers = [name for name, kind in TASKS.items() if "data" in inspect.signature(kind).parameters]
        raise Unsupported(
            f"data for {', '.join(name for name, _ in named)}",
            supported="tasks that read data: " + ", ".join(readers),
            nearest="--task text",
        )
    return found


def _one(paths: list[str] | None) -> str | list[str] | None:
    return paths[0] if paths and len(paths) == 1 else paths
