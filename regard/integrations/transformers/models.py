"""Language models of regard as transformers models."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

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
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, a loss given `labels` (-100 is ignored), and the state, like other causal language models.

        Args:
            attention_mask: (B, N), 1 where a token exists; with a state, the mask of the new tokens or of all tokens so
                far.
            cache, past_key_values: the state that an earlier call returned, by its name in newer and older versions of
                transformers.
        """
        cache = past_key_values if cache is None else cache
        if not isinstance(cache, RegardCache | None):
            raise Unsupported(
                f"{an_instance(cache)} for a language model of regard, which continues from its state",
                supported="the cache that a call with use_cache=True returns",
                nearest=f"{CACHE}=None",
            )
        state, before = (None, 0) if cache is None else (cache.state, cache.tokens)
        keeps = self.config.use_cache if use_cache is None else use_cache
        mask = None
        if attention_mask is not None:
            valid = attention_mask[:, -input_ids.shape[1] :].bool()
            mask = None if bool(valid.all()) else Mask(valid=valid)
        want = frozenset({"state"}) if keeps and not self.training else frozenset()
        result = self.model.features(input_ids, context=Context(mask=mask, want=want), state=state)
        kept = result.output[:, -logits_to_keep:] if logits_to_keep else result.output
        logits = self.model.logits(kept)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
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
