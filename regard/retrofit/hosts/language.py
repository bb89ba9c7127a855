"""Causal language models of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Pattern, Unsupported, an_instance
from regard.retrofit.corpus import Corpus, even_blocks
from regard.retrofit.hiding import LEAST_TEXT
from regard.retrofit.hosts.base import SAME, Batch, apart
from regard.retrofit.hosts.text import BLOCK, TextHost
from regard.retrofit.inserting import check_settings, inserts_tokens, reads_any_length, reads_by_state, rebuilt
from regard.retrofit.settings import RetrofitSettings

if TYPE_CHECKING:
    from jaxtyping import Float, Int

AHEAD = 1e-5
"""Change of logits, relative to the largest, above which a token must have read a later one; in a causal model only
rounding can change them."""
PROBED = 4
"""Number of times that a text of each length is read for probes: two probes, two models."""


@dataclass(frozen=True)
class LanguageHost(TextHost):
    """A causal language model, which predicts the next token after each token."""

    kind: ClassVar[str] = "language"
    pattern: ClassVar[Pattern] = Pattern.CAUSAL_SELF
    evaluated: ClassVar[int] = 4  # by two models, in blocks that are twice as long
    usual_lengths: ClassVar[tuple[int, ...]] = (512, 2048)
    decoded: ClassVar[int] = 12
    recalls: ClassVar[bool] = True

    @property
    def distributes(self) -> bool:
        """Always true."""
        return True

    @property
    def unit(self) -> str:
        return "nats a token"

    def settled(self, settings: RetrofitSettings) -> RetrofitSettings:
        if inserts_tokens(settings.mechanism):
            check_settings(self.model, settings.mechanism, settings.keep_layers, settings.chosen, settings.train)
            settings = self._within_window(settings)
        settings = super().settled(settings)
        if settings.by_recall and settings.block < LEAST_TEXT:
            raise Unsupported(
                f"keep_layers={settings.keep_layers!r} with blocks of {settings.block} tokens, too short to hide something in",
                supported=f"blocks of {LEAST_TEXT} tokens or more, longer than what a new layer reads",
                nearest=f"length={LEAST_TEXT}",
            )
        return settings

    def batch(self, data: Corpus, step: int, seed: int, settings: RetrofitSettings, rows: int | None = None) -> Batch:
        return Batch(data.blocks(step, seed, rows or settings.rows, settings.block))

    def held_out(self, data: Corpus, most: int, settings: RetrofitSettings) -> Batch:
        return Batch(even_blocks(data.held_out, most, settings.block))

    def _within_window(self, settings: RetrofitSettings) -> RetrofitSettings:
        """Blocks as long as the old layers' sliding window at most, so that new layers see no farther than those did."""
        if self.window is None:
            return settings
        length = min(BLOCK, self.longest or BLOCK, self.window) if settings.length is None else settings.length
        if length > self.window:
            raise Unsupported(
                f"blocks of {length} tokens with {settings.mechanism} in {an_instance(self.model)}, whose layers have a "
                f"window of {self.window}",
                supported=f"blocks of at most {self.window}",
                nearest=f"length={self.window}",
            )
        return replace(settings, length=length)

    def reach(self, settings: RetrofitSettings) -> int | None:
        """None for layers that read texts of any length within the positions of a block, as retrieval does; if some
        layers are kept, or read everything where it is, as many as the original or its sliding window."""
        if not settings.inserts:
            return self.longest
        if not settings.kept(len(self.layers)) and reads_any_length(self.begin(settings)):
            return None
        return min(filter(None, (self.longest, self.window)), default=None)

    def evaluation_length(self, ids: Int[Tensor, " n"], length: int, reach: int | None) -> int:
        """Twice the training block, if the model reads so much and the text is long enough, to show what happens beyond
        it.

        Args:
            reach: the most tokens that a model reads; None if unlimited.
        """
        return 2 * length if (reach is None or 2 * length <= reach) and len(ids) >= 4 * length else length

    def reads_at_most(self, settings: RetrofitSettings) -> int:
        reach = self.reach(settings)
        within = reach is None or 2 * settings.block <= reach
        return max(super().reads_at_most(settings), 2 * settings.block if within else 0)

    def longest_read(self, data: Corpus, settings: RetrofitSettings) -> int:
        reach = self.reach(settings)
        blocks = [self.evaluation_length(ids, settings.block, reach) for ids in data.sources.values()]
        return max(super().longest_read(data, settings), *blocks)

    def probed(self, settings: RetrofitSettings) -> float:
        return PROBED * sum(self.within(settings.spans, settings)) / settings.block

    def read_once(self, model: Any, ids: Int[Tensor, "b n"]) -> Tensor:
        return model(ids, use_cache=reads_by_state(model), logits_to_keep=1).logits

    def answers(self, model: Any, batch: Batch) -> Float[Tensor, "m v"]:
        return model(batch.inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)

    def own_loss(self, found: Float[Tensor, "m v"], batch: Batch) -> Tensor:
        return F.nll_loss(found, batch.inputs[:, 1:].flatten())

    def body(self, inputs: Int[Tensor, "b n"]) -> None:
        """Run all layers, without computing logits."""
        self.model.base_model(inputs, use_cache=False)

    def load(self, folder: Any) -> Any:
        from regard.integrations.transformers.folders import load_model

        return load_model(folder)

    def copy_with(self, numbers: Sequence[int], mechanism: str | Mapping[int, str], seed: int) -> tuple[Any, list[str]]:
        if not isinstance(mechanism, str) or not inserts_tokens(mechanism):
            return super().copy_with(numbers, mechanism, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made, new = rebuilt(self, numbers, mechanism)
        return made.eval(), new

    def check_answers(self, batch: Batch, expected: Tensor, mechanism: str, numbers: Sequence[int]) -> float:
        other = batch.inputs.clone()
        other[:, -1] = (other[:, -1] + 1) % self.model.get_input_embeddings().num_embeddings
        if apart(self.answers(self.model, replace(batch, inputs=other)), expected) > AHEAD:
            raise Unsupported(
                f"a retrofit of {an_instance(self.model)} whose tokens attend to later tokens",
                supported="causal language models, and encoders of transformers loaded as encoders",
                nearest="the same weights in AutoModelForMaskedLM",
            )
        if inserts_tokens(mechanism):
            difference = apart(self.answers(rebuilt(self, (), mechanism)[0], batch), expected)
            if not difference <= SAME:
                raise Unsupported(
                    f"{an_instance(self.model)} as a language model of regard, whose answers differ by "
                    f"{difference:.2g} of the largest",
                    supported="models of the kind of Llama",
                )
        made, _ = self.copy_with(numbers, mechanism, 0)
        difference = apart(self.answers(made, batch), expected)
        if made.config.use_cache:
            self._check_generates(made, batch.inputs[:1], mechanism)
        self.check_training(made, batch)
        return difference

    def _check_generates(self, made: Any, ids: Int[Tensor, "1 n"], mechanism: str) -> None:
        from regard.integrations.transformers import CACHE

        try:
            state = getattr(made(ids[:, :-1], use_cache=True, logits_to_keep=1), CACHE)
            made(ids[:, -1:], use_cache=True, **{CACHE: state})
        except Unsupported as error:
            raise Unsupported(
                f"{mechanism} in {an_instance(self.model)}, which could not generate with it: {error.asked}",
                supported="models that generate with the mechanism's state",
                nearest="model.config.use_cache = False, for a retrofit that reads everything again at each token",
            ) from error


def log_likelihoods(logits: Float[Tensor, "b n v"], ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n-1"]:
    """Log likelihood of each token but the first, given the tokens before it, in nats."""
    return torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
