"""`regard generate`: text from a trained language model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regard.cli.console import emit
from regard.cli.options import DEVICE, JSON
from regard.contract import Unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from regard.tasks.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""The replacement for bytes that are no character, or not yet one."""


def generate(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of regard train, retrofit or compress, or a causal language model of transformers (a folder, or a .gguf file)."
        ),
    ],
    text: Annotated[str, typer.Argument(help="What the model goes on from; - reads standard input.")],
    tokens: Annotated[int, typer.Option(help="New tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 draws as the model says.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many of the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest of this probability in all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: DEVICE = "cpu",
    as_json: JSON = False,
) -> None:
    """Go on from a text, token by token through the model's state.

    Examples:

    \b
        regard generate my_model "def main("
        regard generate hybrid/ "Once" --temperature 0
        regard generate my_model "Once" --tokens 500 --temperature 1 --top-p 0.9
        head -c 2000 story.txt | regard generate my_model - --json
    """
    import torch

    prompt = sys.stdin.read() if text == "-" else text
    if not prompt:
        raise Unsupported("an empty text", supported="one character or more")
    generator = torch.Generator(device).manual_seed(seed)
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    start = _of_transformers if _is_of_transformers(folder) else _of_regard
    tokenizer, stream = start(folder, prompt, tokens, device, sampling)
    written = write(tokenizer, stream, lambda part: None if as_json else print(part, end="", flush=True), prompt)
    if as_json:
        emit({"folder": str(folder), "prompt": prompt, "text": written})
    else:
        print()


def _is_of_transformers(folder: Path) -> bool:
    from regard.compression.folders import is_compressed, read_record
    from regard.workbench.trained import RECORD

    if (folder / RECORD).is_file():
        return False
    if is_compressed(folder):
        return bool(read_record(folder)["library"] == "transformers")
    return folder.suffix == ".gguf" or (folder / "config.json").is_file() or any(folder.glob("*.gguf"))


def _of_regard(
    folder: Path, prompt: str, tokens: int, device: str, sampling: dict[str, Any]
) -> tuple[Tokenizer, Iterable[Tensor]]:
    import torch

    from regard.models import LanguageModel
    from regard.workbench.trained import open_trained

    trained = open_trained(folder)
    model, tokenizer = trained.model(device), trained.tokenizer
    if not isinstance(model, LanguageModel):
        raise Unsupported(
            f"text from a {type(model).__name__}, as {folder} holds",
            supported="models of the task text (LanguageModel)",
        )
    ids = torch.from_numpy(tokenizer.encode([prompt.encode()]).astype("int64"))[None].to(device)
    return tokenizer, model.generate_stream(ids, tokens, **sampling)


def _of_transformers(
    folder: Path, prompt: str, tokens: int, device: str, sampling: dict[str, Any]
) -> tuple[Any, Iterable[Tensor]]:
    import torch

    from regard.compression.folders import is_compressed
    from regard.workbench.lighter.subjects import open_compressed, stream_text

    if is_compressed(folder):
        if device != "cpu":
            raise Unsupported(f"a compressed model on {device}", supported="the processor", nearest="--device cpu")
        model, tokenizer = open_compressed(folder)
    else:
        from regard.integrations.transformers.folders import load_model, load_tokenizer

        tokenizer, model = load_tokenizer(folder), load_model(folder).to(device)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
    return tokenizer, stream_text(model, ids, tokens, **sampling)


def write(tokenizer: Tokenizer, stream: Iterable[Tensor], show: Callable[[str], None], prompt: str) -> str:
    """The text of a stream of tokens; what is new of it is shown as it comes, once its characters are whole."""
    show(prompt)
    written, waiting = "", list[int]()
    for token in stream:
        waiting.append(int(token))
        part = tokenizer.decode(waiting)
        if not part.endswith(UNFINISHED):
            show(part)
            written, waiting = written + part, []
    rest = tokenizer.decode(waiting)
    show(rest)
    return written + rest
