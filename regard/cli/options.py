"""Arguments and options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JSON = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]
PLUGINS = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        help="Python file that defines a MECHANISM, a TASK or a MODEL, or file.py:Class of your own torch module. Repeatable.",
    ),
]
DATA = Annotated[
    list[str] | None, typer.Argument(help="Your files: text, a table or a folder, whichever the task reads.")
]
VALIDATION = Annotated[
    list[str] | None, typer.Option(help="Held-out data, in the same form; split off when not given.")
]
LENGTH = Annotated[int | None, typer.Option(help="Tokens in an item; the task's own when not given.")]
TOKENIZER = Annotated[str, typer.Option(help="Tokenizer, for tasks that read text: bytes, bpe:SIZE or a saved .json.")]
MODEL = Annotated[
    str | None,
    typer.Option(
        help="The backbone: a name from regard list --backbones, a plugin's, or another that suits the task; when not "
        "given, the first that suits it."
    ),
]
STACK = Annotated[
    str,
    typer.Option(
        help="How the backbone's layers are stacked, as option=value,option=value: share, share_groups, reversible, "
        "checkpoint_layers, stochastic_depth, exits (such as 1+2), exit_rule, exit_heads, layer_scale, branch_norm."
    ),
]
PRECISION = Annotated[
    str,
    typer.Option(
        help="Precision of training: float32, or mixed precision with bfloat16, or with float16 and a scaled loss."
    ),
]
RETROFIT_PRECISION = Annotated[
    str,
    typer.Option(
        help="Precision of training: float32, or mixed precision with bfloat16, faster on processors that multiply it."
    ),
]
REDUCE = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD:OPTIONS",
        help="Use fewer tokens, in a vision transformer: tome, tome_stride, tome_random, evit and attention (with a class "
        "token), random, stride or mean, with remove=4 (patches removed at each block) or keep=0.7 (the share kept at some "
        "blocks, which blocks=[1,3] can set).",
    ),
]


def _there(device: str) -> str:
    if device != "cpu":  # importing torch is slow, and not every command needs it
        from regard.workbench.advice.layer_work import check_device

        check_device(device)
    return device


LARGEST_SEED = 2**32 - 1
"""Every generator accepts it as a seed, even with a count added."""
FRAMES = "bare, convolution, unnormed or own"
FRAME = Annotated[str, typer.Option(help=f"What surrounds the mechanism in its layer: {FRAMES}.")]
DEVICE = Annotated[str, typer.Option(help="Device, as torch names it: cpu, cuda.", callback=_there)]
SKIP_UNREADABLE = Annotated[
    bool,
    typer.Option("--skip-unreadable", help="Skip images that cannot be read, and list them."),
]
SHARD = Annotated[
    str | None,
    typer.Option("--shard", help="i/n: run only share i of n of the cells, while other processes run the others."),
]
TIMINGS = Annotated[
    bool | None,
    typer.Option("--timings/--no-timings", help="Run only the timed cells (on an idle machine), or only the others."),
]
ENGINE = Annotated[
    str,
    typer.Option(
        help="Where cells run: local, one after the other in this process; or ray, on the Ray cluster at --address or, without "
        "one, on all processors of this machine (pip install 'regard\\[cluster]')."
    ),
]
ADDRESS = Annotated[
    str | None,
    typer.Option(
        help="Address of the Ray cluster: auto for the one on this machine, local for a new one, or HOST:PORT."
    ),
]

KEEP_LAYERS = Annotated[
    str | None,
    typer.Option(
        help="Layers that keep their attention: auto:SHARE or auto:NUMBER by sensitivity, recall:4 by what is found in the context, bottom:4 (or top, middle, spread), 0,5,29 or none. auto:0.5 when not "
        "given, none for landmark."
    ),
]
BATCH_SIZE = Annotated[int | None, typer.Option(help="Blocks (4 when not given) or images (32) in a training step.")]
TRAIN = Annotated[str, typer.Option(help="Weights trained in the last stage: all, new (swapped layers) or lora:RANK.")]
DISTIL = Annotated[
    float,
    typer.Option(
        help="Weight of the loss against the original's outputs, 0 to 1; the rest is that of next tokens, masked tokens or classes. "
        "Give 0 for masformer, and for selective_temperature and stochastic_subsampling, which at 1 learn to change nothing."
    ),
]
TRANSFER_RATE = Annotated[
    float, typer.Option(help="Learning rate of the attention transfer, as a share of each weight's size.")
]
RATE = Annotated[float, typer.Option(help="Learning rate of the last stage, likewise.")]
EVALUATION_BLOCKS = Annotated[
    int | None,
    typer.Option(
        help="Maximum number of blocks (or batches of images) from each source in the evaluation, and of texts of each probe; as the budget allows when not given."
    ),
]
POSITIONS = Annotated[
    int | None,
    typer.Option(
        help="Stretch a table of learned positions (GPT-2, OPT, BERT) to so many, for longer texts; with --distil 0."
    ),
]
SHARED_HEADS = Annotated[
    str,
    typer.Option(
        help="Heads that mixture_of_heads always has: the first of a layer, or the important ones on your data."
    ),
]
