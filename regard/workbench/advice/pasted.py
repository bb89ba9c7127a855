"""Code to paste: a layer, and a model if there is one, with the settings that were asked for."""

from __future__ import annotations

from regard.catalogue import get_mechanism, plugin_file
from regard.contract import Pattern
from regard.workbench.advice.layer_work import ROOM, LayerSettings
from regard.workbench.verification.subjects import Subject

VOCABULARY = 256


def code_for(name: str, settings: LayerSettings, use: str, length: int) -> str:
    """Python code that builds and calls the layer, decodes with it for ``serve``, and builds a model with it.

    Args:
        use: ``train``, ``infer`` or ``serve``.
        length: length of the input in the example.
    """
    card, pattern = get_mechanism(name), settings.pattern
    longest = {"length": length + ROOM * (use == "serve")} if card.length == "max" else {}
    options = {"pattern": pattern.value, **settings.options(card), **longest}
    listed = "".join(f", {key}={_quoted(value)}" for key, value in options.items())
    where = "" if settings.device == "cpu" else f", device={_quoted(settings.device)}"
    kind = "" if settings.dtype == "float32" else f", dtype=torch.{settings.dtype}"
    moved = f".to({(where + kind)[2:]})" if where + kind else ""
    lines = [
        "import torch",
        "import regard",
        "",
        *([f"regard.load_plugin({_quoted(file)})"] if (file := plugin_file(card.name)) else []),
        f"layer = regard.create_layer({_quoted(name)}, {settings.dim}, {settings.heads}{listed}){moved}",
    ]
    arguments, context, with_inserted = ["x"], [], str(length)
    if card.prepare is not None:
        ids = f"torch.zeros({settings.batch}, {length}, dtype=torch.long{where})"
        lines += [
            f"card = regard.get_mechanism({_quoted(name)})",
            f"roles = card.prepare({ids}, card.options())[1]  # where its own tokens are inserted; a model does it by itself",
        ]
        context.append("roles=roles")
        with_inserted = "roles.shape[1]"
    own = length if pattern.cross else with_inserted
    graph = ", requires_grad=True" if use == "train" else ""  # as inside a model: the layer may have no parameters
    lines.append(f"x = torch.randn({settings.batch}, {own}, {settings.dim}{where}{kind}{graph})")
    if pattern.cross:
        lines.append(f"memory = torch.randn({settings.batch}, {with_inserted}, {settings.dim}{where}{kind})")
        arguments.append("memory")
    grid = Subject(card, pattern).grid(length)
    if grid is not None:
        context.append(f"grid={grid}")
    if use == "serve" and not pattern.cross:
        context.append('want=frozenset({"state"})')
    if context:
        arguments.append(f"context=regard.Context({', '.join(context)})")
    if use == "serve":
        if pattern.cross:
            lines.append(f"state = layer.encode_memory({', '.join(arguments[1:])})")
        else:
            lines.append(f"state = layer({', '.join(arguments)}).state")
        lines.append("result = layer(x[:, :1], state=state)  # one token; result.state continues")
    else:
        lines.append(f"y = layer({', '.join(arguments)}).output")
    if use == "train":
        lines.append("y.sum().backward()")
    return "\n".join([*lines, *_model(name, settings, length, longest, moved, where, grid)]) + "\n"


def _model(
    name: str,
    settings: LayerSettings,
    length: int,
    longest: dict[str, int],
    moved: str,
    where: str,
    grid: tuple[int, ...] | None,
) -> list[str]:
    """Code for a model; empty for noncausal cross attention, and for inserted tokens outside language models."""
    causal, cross = settings.pattern.causal, settings.pattern.cross
    if settings.pattern is not Pattern.CAUSAL_SELF and (
        get_mechanism(name).prepare is not None or (cross and not causal)
    ):
        return []
    model = "EncoderDecoder" if cross else "LanguageModel" if causal else "Encoder"
    vocabulary = f"vocab_size={VOCABULARY}"
    if cross:
        vocabulary += f", memory_vocab_size={VOCABULARY}"
    elif not causal:
        vocabulary = f"num_classes=2, {vocabulary}"
    plan = f"[({_quoted(name)}, {longest})] * 4" if longest else _quoted(name)
    sizes = f"{vocabulary}, dim={settings.dim}, {'cross_plan' if cross else 'plan'}={plan}"
    sizes += f", num_heads={settings.heads}"
    if settings.head_dim is not None:
        sizes += f", head_dim={settings.head_dim}"
    ids = f"torch.randint({VOCABULARY}, ({settings.batch}, {length}){where})"
    arguments = [ids, *([ids] if cross else []), *([] if grid is None else [f"context=regard.Context(grid={grid})"])]
    return [
        "",
        f"from regard.models import {model}, {model}Config",
        "",
        f"model = {model}({model}Config({sizes})){moved}",
        f"logits = model({', '.join(arguments)}).output",
    ]


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
