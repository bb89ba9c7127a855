"""Language models of regard as transformers models."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from regard.contract import Context, Mask, Unsupported, an_instance
from regard.integrations.transformers.caches import CACHE
from regard.models import LanguageModel, LanguageModelConfig, ModelState


class RegardConfig(PreTrainedConfig):
    """A :class:`regard.models.LanguageModelConfig` for transformers.

    Args:
        vocab_size: number of tokens.
        settings: the other fields of the config by name, as :attr:`settings` has them.
        use_cache: whether generation keeps the state.
        options: fields of the config, instead of `settings`, and options of transformers' own configs.
    """

    model_type = "regard"

    def __init__(
        self, vocab_size: int = 256, settings: dict[str, Any] | None = None, use_cache: bool = True, **options: Any
    ) -> None:
        own = {f.name for f in fields(LanguageModelConfig)} - {"vocab_size"}
        chosen = dict(settings or {}) | {name: options.pop(name) for name in list(options) if name in own}
        if not isinstance(chosen.get("plan", ""), str):  # JSON has no tuples
            chosen["plan"] = [entry if isinstance(entry, str) else tuple(entry) for entry in chosen["plan"]]
        config = LanguageModelConfig(vocab_size, **chosen)
        for name, given, plain in (("share", config.stack.share, "none"), ("exits", config.stack.exits, ())):
            if given != plain:
                raise Unsupported(
                    f"{name}={given!r} of stack in transformers, which stores each layer apart and trains one output",
                    supported="regard.models.LanguageModel",
                    nearest=f"{name}={plain!r}",
                )
        self.vocab_size = vocab_size
        self.settings = {name: value for name, value in asdict(config).items() if name in own}
        self.hidden_size, self.num_attention_heads = config.dim, config.num_heads
        self.num_hidden_layers = config.num_layers
        derived = ("hidden_size", "num_attention_heads", "num_hidden_layers")
        options = {name: value for name, value in options.items() if name not in derived}
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": False, **options})

    def language_model(self) -> LanguageModelConfig:
        """The config in regard's own form."""
        return LanguageModelConfig(self.vocab_size, **self.settings)


class RegardCache:
    """The state of a :class:`RegardForCausalLM`, where transformers keeps a decoder's cache.

    Attributes:
        state: state after the tokens so far.
        tokens: number of tokens read in each row, padding included.
    """

    is_compileable = False
    is_linear = (True,)
    """Tells transformers to leave it to the model which tokens are new."""

    def __init__(self, state: ModelState, tokens: int) -> None:
        self.state, self.tokens = state, tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens in the longest row."""
        return int(self.state.length.max())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, as beam search does."""
        self.state = self.state.select(beam_idx)


class RegardForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of regard as a transformers model."""

    config_class = RegardConfig
    base_model_prefix = "model"
    _supports_sdpa = True  # transformers asks for it; every layer computes its own mechanism

    def __init__(self, config: RegardConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.language_model())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: regard's modules initialise themselves."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output projection; None where it is the token embedding."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the output projection."""
        self.model.head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Change the number of tokens as in other models, where the token embedding is one table of tokens alone."""
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.model.embedding
        embedding, head = self.model.embedding, self.model.head
        plain = isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear | None)
        if not plain or self.model.insertion.extra_tokens:
            found = "inserted tokens" if plain else f"{an_instance(embedding)} and {an_instance(head)}"
            raise Unsupported(
                f"another number of tokens in a language model of regard with {found}",
                supported="an embedding that is one table of tokens alone, and a dense output projection",
            )
        resized = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.model.config = replace(self.model.config, vocab_size=resized.num_embeddings)
        return resized

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        cache: RegardCache | None = None,
        past_key_values: RegardCache | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, a loss given `labels` (-100 is ignored), and the state, like other causal language models.

        Args:
            attention_mask: (B, N), 1 where a token exists; with a state, the mask of the new tokens or of all tokens so
                far.
            cache, past_key_values: the state that an earlier call returned, by its name in newer and older versions of
                transformers.
            position_ids: (B or 1, N); they must count the tokens.
            num_items_in_batch: number of labels by which the loss is divided; None for those of this call.
            others: arguments of other models, which must be None or False.

        Raises:
            Unsupported: for an argument that would have an effect in another model and has none in this one.
        """
        for name, given in others.items():
            if given is not None and given is not False:
                raise Unsupported(
                    f"{name} for a language model of regard",
                    supported="input_ids, attention_mask, labels, use_cache, logits_to_keep",
                    nearest=f"{name}=None",
                )
        cache = past_key_values if cache is None else cache
        if not isinstance(cache, RegardCache | None):
            raise Unsupported(
                f"{an_instance(cache)} for a language model of regard, which continues from its state",
                supported="the cache that a call with use_cache=True returns",
                nearest=f"{CACHE}=None",
            )
        state, before = (None, 0) if cache is None else (cache.state, cache.tokens)
        keeps = self.config.use_cache if use_cache is None else use_cache
        valid = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            valid = attention_mask[:, -input_ids.shape[1] :].bool()
        mask = None if attention_mask is None or bool(valid.all()) else Mask(valid=valid)
        if position_ids is not None:
            _check_positions(position_ids, valid, state)
        want = frozenset({"state"}) if keeps and not self.training else frozenset()
        result = self.model.features(input_ids, context=Context(mask=mask, want=want), state=state)
        kept = result.output[:, -logits_to_keep:] if logits_to_keep else result.output
        logits = self.model.logits(kept)
        loss = None
        if labels is not None:
            counted = {"num_items_in_batch": num_items_in_batch, "vocab_size": self.config.vocab_size}
            loss = self.loss_function(logits=logits, labels=labels, **counted)
        found = {CACHE: None if result.state is None else RegardCache(result.state, before + input_ids.shape[1])}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **found)
        return output if return_dict in (None, True) else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Pass on the tokens that the state has not read yet: first the whole prompt, then the newest token."""
        cache = kwargs.get(CACHE)
        read = cache.tokens if isinstance(cache, RegardCache) else 0
        if read >= input_ids.shape[1]:
            raise Unsupported(
                f"generating from {input_ids.shape[1]} tokens with a cache that has read {read}",
                supported="a prompt that begins with what was read, and continues it",
            )
        return {
            "input_ids": input_ids[:, read:],
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            CACHE: cache,
            "logits_to_keep": 1,
        }


def _check_positions(positions: Tensor, valid: Tensor, state: ModelState | None) -> None:
    """Refuse positions that do not count the tokens, such as those of packed texts."""
    ranks = valid.cumsum(-1) - 1 + (0 if state is None else state.length[:, None])
    if not bool(((positions == ranks) | ~valid).all()):
        raise Unsupported(
            "position_ids for a language model of regard that do not count its tokens",
            supported="positions from 0 on, padding left out",
            nearest="position_ids=None",
        )
