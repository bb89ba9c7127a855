"""`regard generate`: generate text with a trained language model."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from regard.cli.arguments import only_beside
from regard.cli.console import emit, errors
from regard.cli.options import DEVICE, JSON, LARGEST_SEED, PLUGINS
from regard.contract import Unsupported, an_instance
from regard.workbench.plugins import enter_plugins

if TYPE_CHECKING:
    from torch import Tensor

    from regard.models.speculation import Reads, Speculation
    from regard.tasks.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""Replacement character for bytes that do not form a character, or not yet."""


def generate(
    context: typer.Context,
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of regard train, retrofit or compress, or a causal language model from transformers (a folder, or a .gguf file)."
        ),
    ],
    text: Annotated[str, typer.Argument(help="Text that the model continues; - reads standard input.")],
    tokens: Annotated[int, typer.Option(min=0, help="New tokens.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; 1 draws from the model's own distribution.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw only from this many of the likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw only from the likeliest tokens that together have this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the draws.")] = 0,
    exit_rule: Annotated[
        str | None,
        typer.Option(
            "--exit",
            metavar="RULE",
            help="Exit early, for a model of regard train --exits: confidence:0.9, entropy:0.3, patience:2, layer:1; or "
            "halting:0.01 for one that halts.",
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Draft for speculative decoding; the model checks its tokens in one pass, so the text stays the model's own: the "
            "folder of a smaller model with the same tokens, or lookup, which proposes what followed last time."
        ),
    ] = None,
    proposals: Annotated[int, typer.Option(min=1, help="Tokens that a draft proposes at once.")] = 4,
    cache: Annotated[
        str | None,
        typer.Option(
            help="How keys and values are stored and read: int8, or a method of regard sparse, such as snapkv:capacity=256 or quest."
        ),
    ] = None,
    shorten: Annotated[
        float | None,
        typer.Option(
            help="Keep only this share of the text's tokens, above 0 and at most 1: those that a model expects least (LLMLingua)."
        ),
    ] = None,
    shorten_by: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a small model that judges which tokens are expected; the model itself when not given."
        ),
    ] = None,
    device: DEVICE = "cpu",
    plugin: PLUGINS = None,
    as_json: JSON = False,
) -> None:
    """Continue a text, token by token, from the model's state.

    With --exit, tokens that are certain leave before the last layer. The layers above then compute their keys and
    values from the hidden state with which the token left, so the text is the same as if it were read whole at each
    step.

    Examples:

    \b
        regard generate my_model "def main("
        regard generate hybrid/ "Once" --temperature 0
        regard generate my_model "Once" --tokens 500 --temperature 1 --top-p 0.9
        regard generate my_model "def main(" --draft lookup
        regard generate smollm2/ "Once" --cache int8
        regard generate large/ "$(cat notes.txt)" --shorten 0.5 --shorten-by smollm2/
        regard generate my_model "def main(" --exit confidence:0.9
        regard generate smollm2/ "Once" --draft smollm2-int4/ --proposals 6
        head -c 2000 story.txt | regard generate my_model - --json
    """
    import torch

    from regard.compression.folders import check_no_tokens
    from regard.models import exit_layers
    from regard.models.generation import check_sampling
    from regard.workbench.trained.folder import beyond, trained_length

    enter_plugins(plugin)
    prompt = sys.stdin.read() if text == "-" else text
    if not prompt:
        raise Unsupported("an empty text", supported="one character or more")
    check_sampling(temperature, top_k, top_p)
    if draft is None:
        only_beside(context, "--draft", ["proposals"])
    generator = torch.Generator(device).manual_seed(seed)
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    if cache is not None and draft is not None:
        raise Unsupported("both --draft and --cache", supported="one of them", nearest=f"--cache {cache}")
    if shorten_by is not None and shorten is None:
        raise Unsupported("--shorten-by without --shorten", supported="a share", nearest="--shorten 0.5")
    if cache is not None:
        check_no_tokens(folder, f"--cache {cache}")
    for place in [] if draft is None else [folder, Path(draft)]:
        check_no_tokens(place, "speculation")
    model, tokenizer = _opened(folder, device)
    shortened: dict[str, int] = {}
    kept: Tensor | None = None
    if shorten is not None:
        judge = (model, tokenizer) if shorten_by is None else _opened(shorten_by, device)
        kept, prompt, shortened = _shortened(*judge, prompt, shorten, device)
    if cache is not None:
        from regard.compression.sparse import sparsify

        sparsify(model, cache)
    if exit_rule is not None:
        _leave_early(model, exit_rule)
    ids = kept if kept is not None and shorten_by is None else _read(model, tokenizer, prompt, device)
    _check_positions(model, ids.shape[1] + tokens)
    farther = beyond(trained_length(folder, model), ids.shape[1] + tokens)
    counts = None
    if draft is None:
        stream = _stream(model, ids, tokens, sampling)
    else:
        speculation = _speculation(model, tokenizer, draft, device, proposals, ids.shape[1] + tokens)
        stops = _stops(model)
        drawn = speculation.stream(ids, tokens, stop_tokens=stops, **sampling)
        stream = itertools.takewhile(lambda token: int(token) not in stops, drawn)
        counts = speculation.counts
    watched: Any = contextlib.nullcontext([]) if exit_rule is None else exit_layers(model)
    with watched as seen:
        written = write(tokenizer, stream, lambda part: None if as_json else print(part, end="", flush=True), prompt)
    told: dict[str, Any] = {} if counts is None else {"speculation": dataclasses.asdict(counts)}
    if shortened:
        told["shortened"] = shortened
    if farther:
        told["beyond"] = farther
    if exit_rule is not None:
        depth = _depth(seen)
        told["exits"] = {"rule": exit_rule, "depth": depth, "layers": model.blocks.layers}
    if as_json:
        emit({"folder": str(folder), "prompt": prompt, "text": written, **told})
        return
    print()
    if farther:
        errors.print(Text(farther, style="dim"))
    if shortened:
        errors.print(Text(f"{shortened['kept']} of {shortened['tokens']} tokens of the text were kept", style="dim"))
    if counts is not None:
        said = f"{counts.tokens} tokens in {counts.passes} passes of the model; {counts.kept} of {counts.proposed} proposed ones kept"
        errors.print(Text(said, style="dim"))
    if exit_rule is not None:
        errors.print(Text(f"{depth:.2f} of {model.blocks.layers} layers on average", style="dim"))


def _leave_early(model: Any, rule: str) -> None:
    from regard.models import LanguageModel, set_exit_rule

    if not isinstance(model, LanguageModel):
        raise Unsupported(f"--exit {rule} of {an_instance(model)}", supported="models of regard train --exits")
    set_exit_rule(model, rule)


def _depth(seen: list[Tensor]) -> float:
    """Average number of layers passed by the tokens that a new one followed; `seen` has the layers for each call."""
    import torch

    return float(torch.cat([seen[0][-1:], *seen[1:]]).double().mean()) if seen else 0.0


def _opened(folder: Path, device: str) -> tuple[Any, Any]:
    """Open a language model and its tokenizer."""
    from regard.compression.folders import is_of_transformers
    from regard.workbench.lighter.subjects.language import open_of_transformers

    if not is_of_transformers(folder):
        from regard.models import LanguageModel
        from regard.workbench.sparse.readers import MODELS
        from regard.workbench.trained.folder import open_trained

        trained = open_trained(folder, supported=MODELS)
        model = trained.model(device)
        if not isinstance(model, LanguageModel):
            raise Unsupported(
                f"text from {an_instance(model)}, as {folder} holds",
                supported="models of the task text (LanguageModel)",
            )
        return model, trained.tokenizer
    return open_of_transformers(folder, device)


def _read(model: Any, tokenizer: Any, prompt: str, device: str) -> Tensor:
    import torch

    from regard.models import LanguageModel

    if isinstance(model, LanguageModel):
        return torch.from_numpy(tokenizer.encode([prompt.encode()]).astype("int64"))[None].to(device)
    return torch.tensor([tokenizer(prompt)["input_ids"]], device=device)


def _stream(model: Any, ids: Tensor, tokens: int, sampling: dict[str, Any]) -> Iterable[Tensor]:
    from regard.models import LanguageModel
    from regard.workbench.lighter.subjects.language import stream_text

    if isinstance(model, LanguageModel):
        return model.generate_stream(ids, tokens, **sampling)
    return stream_text(model, ids, tokens, **sampling)


def _stops(model: Any) -> tuple[int, ...]:
    from regard.models import LanguageModel

    if isinstance(model, LanguageModel):
        return ()
    from regard.integrations.transformers.folders import stop_tokens

    return stop_tokens(model)


def _check_positions(model: Any, tokens: int) -> None:
    from regard.models import LanguageModel

    if not isinstance(model, LanguageModel):
        from regard.integrations.transformers.folders import check_positions

        check_positions(model, tokens)


def _shortened(
    model: Any, tokenizer: Any, prompt: str, share: float, device: str
) -> tuple[Tensor, str, dict[str, int]]:
    """Shorten a text; returns the tokens that are kept, their text without special tokens, and how many they are."""
    from regard.compression.prompts import shorten
    from regard.models import LanguageModel

    ids = _read(model, tokenizer, prompt, device)[0]
    found = shorten(_reads(model, "shortening a text"), [(ids, share)])
    shown = {} if isinstance(model, LanguageModel) else {"skip_special_tokens": True}
    text = tokenizer.decode(found.ids.tolist(), **shown)
    return found.ids[None], text, {"tokens": len(ids), "kept": len(found.ids)}


def _reads(model: Any, purpose: str = "speculation") -> Reads:
    from regard.models import LanguageModel
    from regard.models.speculation import ReadLanguageModel

    if isinstance(model, LanguageModel):
        return ReadLanguageModel(model)
    from regard.integrations.transformers.speculation import ReadCausalModel

    return ReadCausalModel(model, purpose)


def _speculation(model: Any, tokenizer: Any, draft: str, device: str, proposals: int, length: int) -> Speculation:
    """Speculation with a draft that can propose all of `length` tokens, prompt and reply together."""
    from regard.models.speculation import ModelDraft, PromptLookup, Speculation

    if draft == "lookup":
        return Speculation(_reads(model), PromptLookup(), proposals)
    small, own = _opened(Path(draft), device)
    found = Speculation(_reads(model), ModelDraft(_reads(small)), proposals)
    if not _same_tokens(tokenizer, own, found.reads.vocabulary):
        raise Unsupported(
            f"the draft {draft} with other tokens than the model", supported="a draft with the same tokens"
        )
    _check_positions(small, length)
    return found


def _same_tokens(one: Any, other: Any, count: int) -> bool:
    if hasattr(one, "get_vocab") and hasattr(other, "get_vocab"):
        return bool(one.get_vocab() == other.get_vocab())
    return all(one.decode([token]) == other.decode([token]) for token in range(count))


def write(tokenizer: Tokenizer, stream: Iterable[Tensor], show: Callable[[str], None], prompt: str) -> str:
    """Decode a stream of tokens. New text is shown as it arrives, as soon as its characters are complete.

    The prompt is shown only with the first token, so that nothing precedes an error message.
    """
    coming = iter(stream)
    first = list(itertools.islice(coming, 1))
    show(prompt)
    written, waiting = "", list[int]()
    for token in itertools.chain(first, coming):
        waiting.append(int(token))
        part = tokenizer.decode(waiting)
        if not part.endswith(UNFINISHED):
            show(part)
            written, waiting = written + part, []
    rest = tokenizer.decode(waiting)
    show(rest)
    return written + rest
