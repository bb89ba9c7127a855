"""Language models, encoders and tokenizers of transformers from local files, without running any code in them."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging

from regard.contract import Unsupported, an_instance
from regard.integrations.encoders import architecture_of, read_config
from regard.layers.linear import accelerate
from regard.tasks.documents import nearest_path

SUPPORTED = "a folder of save_pretrained with its tokenizer, or a GGUF file"


def find_files(place: Path, *, supported: str = SUPPORTED) -> tuple[Path, dict[str, str]]:
    """The folder of a model and the further arguments that `from_pretrained` needs: the name of a GGUF file.

    Args:
        place: a folder, or a GGUF file; a folder without ``config.json`` may hold one GGUF file.
        supported: what an error message should list as supported.

    Raises:
        Unsupported: where there is no model, or more than one.
    """
    if not place.exists():
        raise Unsupported(f"{place}, which does not exist", supported=supported, nearest=nearest_path(place))
    if place.is_file():
        if place.suffix != ".gguf":
            raise Unsupported(f"{place}", supported=supported)
        return place.parent, {"gguf_file": place.name}
    if (place / "config.json").is_file():
        return place, {}
    files = sorted(place.glob("*.gguf"))
    if len(files) == 1:
        return place, {"gguf_file": files[0].name}
    what = f"{len(files)} GGUF files: name one" if files else "neither config.json nor a .gguf file"
    raise Unsupported(
        f"{place}, which holds no model ({what})", supported=supported, nearest=str(files[0]) if files else ""
    )


def load_model(place: Path, *, of: Any = None, dtype: torch.dtype = torch.float32, supported: str = SUPPORTED) -> Any:
    """Load the model in a folder or a GGUF file, in evaluation mode, with the linear layers of :func:`regard.accelerate`;
    arguments as in :func:`find_files`.

    Args:
        of: the transformers class that loads it; None for the one for causal language models.

    Raises:
        Unsupported: also for files that lack some weights, which transformers would initialise at random.
    """
    folder, file = find_files(place, supported=supported)
    options = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True, **file}  # no pickles
    auto = transformers.AutoModelForCausalLM if of is None else of
    config = {} if file else read_config(folder)
    if of is None and config.get("is_encoder_decoder"):
        raise Unsupported(
            f"the {architecture_of(config)} in {place}, an encoder-decoder, as a language model that continues a text",
            supported=supported,
        )
    model, found = _loaded(auto, "model", place, folder, supported, **options)
    saved = next(iter(getattr(model.config, "architectures", None) or ()), "")
    if of is None and saved.endswith("ForMaskedLM"):
        raise Unsupported(
            f"the {saved} in {place}, an encoder, as a language model that continues a text", supported=supported
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise Unsupported(
            f"the model in {place}, which lacks {len(missing)} weights of {an_instance(model)} (as {missing[0]})",
            supported=supported,
        )
    accelerate(model)
    return model.eval()


def load_tokenizer(place: Path, *, supported: str = SUPPORTED) -> Any:
    """Load the tokenizer in a folder or a GGUF file; arguments as in :func:`find_files`."""
    folder, file = find_files(place, supported=supported)
    return _loaded(transformers.AutoTokenizer, "tokenizer", place, folder, supported, **file)


def has_tokenizer(place: Path) -> bool:
    """Return whether there is a tokenizer in a folder or GGUF file."""
    folder, file = find_files(place)
    return bool(file) or any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def stop_tokens(model: Any) -> tuple[int, ...]:
    """End-of-text tokens of a causal language model; empty where its generation config names none."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return (found,) if isinstance(found, int) else tuple(found or ())


def check_positions(model: Any, tokens: int) -> None:
    """Raise Unsupported for more tokens than a causal language model has entries in its position table."""
    if not has_positions(model, tokens):
        raise Unsupported(
            f"{tokens} tokens, prompt and reply together, of {an_instance(model)}",
            supported=f"as many as it has positions, {model.config.max_position_embeddings}",
            nearest="a shorter text or fewer tokens",
        )


def has_positions(model: Any, tokens: int) -> bool:
    """Return whether a causal language model can read so many tokens: False where its position table is shorter."""
    reach = getattr(model.config, "max_position_embeddings", None)
    if reach is None or tokens <= reach or "position_ids" not in inspect.signature(model.forward).parameters:
        return True
    last = torch.tensor([[tokens - 1]], device=model.device)
    try:
        with torch.no_grad():
            model(torch.zeros_like(last), position_ids=last)
    except IndexError:
        return False
    return True


def known_positions(place: Path, *, supported: str = SUPPORTED) -> int | None:
    """Number of tokens that a causal language model was made for, by its config; arguments as in :func:`find_files`."""
    folder, file = find_files(place, supported=supported)
    config = _loaded(transformers.AutoConfig, "config", place, folder, supported, **file)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _loaded(of: Any, what: str, place: Path, folder: Path, supported: str, **options: Any) -> Any:
    with quietly():
        try:
            return of.from_pretrained(str(folder), local_files_only=True, **options)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            said = str(error).strip().split("\n")[0][:200] or type(error).__name__
            raise Unsupported(
                f"the {what} in {place}, which transformers cannot load ({said})", supported=supported
            ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the progress bars and messages of transformers."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # some progress bars ignore the setting
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
