"""Text models: the common part of language models and encoders of transformers."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from regard.contract import Unsupported, an_instance
from regard.models.weights import weights_digest
from regard.retrofit.corpus import Corpus, read_corpus
from regard.retrofit.hosts.base import Host, apart
from regard.retrofit.settings import RetrofitSettings, advising
from regard.tasks.documents import Paths
from regard.tasks.recognise import recognise

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

READS = 16
"""Number of times that a text of each length is read for timing."""
BLOCK, BLOCKS = 512, 4
"""Default tokens in a block, and default blocks of a training step."""


@dataclass(frozen=True)
class TextHost(Host):
    """A model of transformers that reads tokens.

    Attributes:
        usual_lengths: default lengths of the measurements.
        decoded: tokens that a timing decodes after a text of each length.
    """

    usual_lengths: ClassVar[tuple[int, ...]]
    decoded: ClassVar[int] = 0

    @property
    def longest(self) -> int | None:
        """The most tokens that its positions allow; None if unlimited."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def window(self) -> int | None:
        """The sliding window of its layers, or of some of them; None without one."""
        return getattr(self.model.config, "sliding_window", None)

    def reach(self, settings: RetrofitSettings) -> int | None:
        """The most tokens that a model with new layers reads, once the block's length is filled in; None if unlimited."""
        return self.longest

    def within(self, lengths: Sequence[int], settings: RetrofitSettings) -> list[int]:
        """The lengths that a model with new layers reads."""
        reach = self.reach(settings)
        return [n for n in lengths if reach is None or n <= reach]

    def settled(self, settings: RetrofitSettings) -> RetrofitSettings:
        length = settings.length
        if length is None:
            length = BLOCK if self.longest is None else min(BLOCK, self.longest)
        if self.longest is not None and length > self.longest:
            raise Unsupported(
                f"blocks of {length} tokens for a model of {self.longest} positions",
                supported=f"blocks of at most {self.longest}",
                nearest=f"length={self.longest}{self._or_longer(length)}",
            )
        settings = replace(settings, length=length)
        lengths = self.usual_lengths if settings.lengths is None else settings.lengths
        if not lengths:
            raise Unsupported("lengths=()", supported="one or more of 32 or more", nearest="lengths=(512,)")
        if not self.within(lengths, settings):
            if settings.lengths is not None:
                reach = self.reach(settings)
                raise Unsupported(
                    f"lengths={lengths} of a model of {reach} positions",
                    supported=f"one or more of at most {reach}",
                    nearest=f"lengths=({reach},){self._or_longer(max(lengths))}",
                )
            lengths = (length,)
        return replace(settings, lengths=lengths, batch_size=settings.batch_size or BLOCKS)

    def _or_longer(self, length: int) -> str:
        """Advice for texts longer than the table of positions, if the model has one."""
        from regard.integrations.transformers.longer import learns_positions

        return f" or positions={length}, distil=0" if learns_positions(self.model) else ""

    def reads_at_most(self, settings: RetrofitSettings) -> int:
        reach = self.reach(settings)
        longest = max([settings.block, *(n + self.decoded for n in self.within(settings.spans, settings))])
        return longest if reach is None else min(longest, reach)

    def longest_read(self, data: Corpus, settings: RetrofitSettings) -> int:
        """Tokens of the longest text that the evaluation reads."""
        return TextHost.reads_at_most(self, settings)

    @torch.no_grad()
    def check_longest(self, data: Corpus, settings: RetrofitSettings, numbers: Sequence[int]) -> float:
        length = self.longest_read(data, settings)
        if length <= settings.block:
            return 0.0
        text = data.held_out.repeat(math.ceil(length / len(data.held_out)))[:length][None]
        made, _ = self.copy_with(numbers, settings.mechanism, settings.seed)
        try:
            with advising(settings.mechanism, self.reads_at_most(settings)):
                found = self.read_once(made, text)
        except Unsupported as error:
            window = self.window
            if window is None:
                raise
            most = window - self.decoded
            short = self.longest_read(data, replace(settings, lengths=(most,))) <= window
            block = "" if short else f"length={window // 2}, "
            raise Unsupported(
                f"texts of {length} tokens in the evaluation of {an_instance(self.model)}, whose layers have a window of "
                f"{window}: {error.asked}",
                supported=f"{block and 'blocks of at most half as many tokens and '}lengths of at most {most}",
                nearest=f"{block}lengths=({most},)" if most >= 32 else "",
            ) from error
        return apart(found, self.read_once(self.model, text))

    def read_once(self, model: Any, ids: Int[Tensor, "b n"]) -> Tensor:
        """The outputs of the last layer of a model, or the logits of its last token."""
        return model.base_model(ids).last_hidden_state

    def timed(self, settings: RetrofitSettings) -> float:
        return READS * sum(self.within(settings.spans, settings)) / settings.block

    def reads(self, settings: RetrofitSettings) -> int:
        return settings.block

    def read(
        self, data: Paths | Tensor | None, validation: Paths | Tensor | None, settings: RetrofitSettings
    ) -> Corpus:
        for place in (*_places(data), *_places(validation)):
            if Path(place).is_dir() and recognise(place)[0] == "images":
                raise Unsupported(
                    f"{place}, a folder of images, as data of {an_instance(self.model)}",
                    supported="text files and folders",
                )
        vocabulary = self.model.get_input_embeddings().num_embeddings
        return read_corpus(
            data, validation, self.tokenizer, length=settings.block, vocabulary=vocabulary, seed=settings.seed
        )

    def extended(self, positions: int | None) -> Self:
        from regard.integrations.transformers.longer import with_longer_positions

        if positions is None:
            return self
        host = self.with_model(with_longer_positions(self.model, positions).requires_grad_(False))
        if getattr(self.tokenizer, "model_max_length", positions) >= positions:
            return host
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.model_max_length = positions  # else it warns of longer texts, or cuts them
        return replace(host, tokenizer=tokenizer)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model and its tokenizer in transformers' format: a GGUF file becomes a folder of safetensors."""
        from regard.integrations.transformers.folders import quietly

        with quietly():
            self.model.save_pretrained(str(folder))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))

    def fingerprint(self) -> str:
        config = {k: v for k, v in self.model.config.to_dict().items() if not k.startswith(("_", "transformers"))}
        described = json.dumps(config, sort_keys=True, default=str) + weights_digest(self.model)
        return hashlib.sha256(described.encode()).hexdigest()[:12]

    def heads(self, number: int) -> tuple[int, int, int, int]:
        module: Any = self.attention(number)
        config = self.model.config
        heads = getattr(module, "num_heads", None) or config.num_attention_heads
        width = getattr(module, "head_dim", None) or config.hidden_size // heads
        groups = heads // getattr(module, "num_key_value_groups", 1)
        return heads, groups, width, getattr(module, "v_head_dim", None) or width


def _places(data: Any) -> list[Any]:
    """The files and folders in `data`; none if it is given as a tensor."""
    return [data] if isinstance(data, (str, Path)) else list(data) if isinstance(data, (list, tuple)) else []


def check_whole(model: Any) -> None:
    """Raise Unsupported for models of transformers with quantized weights or adapters, and for those swapped before."""
    from regard.integrations.transformers import RECORD

    what = f"a retrofit of {an_instance(model)}"
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None:
        raise Unsupported(f"{what} with quantized weights", supported="weights in floating point")
    if hasattr(model, "peft_config"):
        raise Unsupported(
            f"{what} with adapters", supported="whole weights", nearest="merge_and_unload() of the adapters"
        )
    if getattr(model.config, RECORD, None) is not None:
        raise Unsupported(
            f"{what} whose attention was swapped before", supported="the original", nearest="regard.unswap(model)"
        )


def open_folder(path: Path, tokenizer: Any) -> tuple[Any, Any]:
    """Open the model in a folder or a GGUF file, with the class that it was saved as, and its tokenizer."""
    from regard.compression.folders import is_compressed
    from regard.integrations.transformers.folders import find_files, has_tokenizer, load_model, load_tokenizer
    from regard.retrofit.hosts.encoder import class_of

    if is_compressed(path):
        raise Unsupported(f"{path}, which is compressed", supported="a model in floating point")
    folder, file = find_files(path)
    model = load_model(path, of=None if file else class_of(folder))
    if file:
        model = _without_quantizer(model)
    if tokenizer is None and has_tokenizer(path):
        tokenizer = load_tokenizer(path)
    return model, tokenizer


def _without_quantizer(model: Any) -> nn.Module:
    """Rebuild the model of a GGUF file, whose weights are already floating-point numbers, so that it can be saved."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
