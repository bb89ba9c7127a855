"""regard in Hugging Face transformers.

Importing this module registers

- every attention mechanism of queries, keys and values as ``attn_implementation="regard:NAME"``, with its mask
  function::

      import regard.integrations.transformers
      model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="regard:softmax")

- :class:`GrowingCache`, a cache for ``generate`` that does not copy all keys and values at each token;
- :class:`RegardConfig` and :class:`RegardForCausalLM` with the ``Auto`` classes: a language model of regard that passes
  ``generate`` with its state, and saves and loads as others do.

Needs the extra ``hf``. Importing regard itself never imports transformers.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import (
        AttentionInterface,
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.cache_utils import DynamicCache, DynamicLayer
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    from regard.contract import Unsupported

    raise Unsupported(
        f"regard.integrations.transformers without a fitting transformers ({error})",
        supported="transformers 5 or newer",
        nearest="pip install 'regard[hf]'",
    ) from error

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Context, Kind, Mask, Pattern, Unsupported
from regard.engines.attention import decode
from regard.engines.cache import append
from regard.integrations.heads import HeadAttention, check_swappable, read_mask
from regard.models import LanguageModel, LanguageModelConfig, ModelState

PREFIX = "regard:"
CACHE = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What this version of transformers calls the state of a decoder."""


def attention_names() -> list[str]:
    """Mechanisms that can take the place of a model's attention."""
    found = []
    for name in list_mechanisms(kind=Kind.ATTENTION):
        try:
            check_swappable(get_mechanism(name))
        except Unsupported:
            continue
        found.append(name)
    return found


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    mechanism: str,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: (B, H, N, D), (B, G, M, D), (B, G, M, V) -> (B, N, H, V).

    Raises:
        Unsupported: for a mask, bias, softcap or sink that the mechanism cannot honour.
    """
    n, m = query.shape[2], key.shape[2]
    plain = not dropout and all(x is None for x in (attention_mask, position_bias, softcap, s_aux))
    if plain and n == 1 and mechanism == "softmax" and "regard" not in module._modules:
        output = decode(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling)
        if output is not None:
            return output.transpose(1, 2), None
    attend, x, source = _attend_of(module, mechanism, softcap, query)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    crossing = source is not x
    mask = attention_mask
    if mask is not None:
        mask = mask[..., :m].expand(-1, -1, n, m)
    if position_bias is not None:
        mask = _biased(position_bias, mask)
    visible = read_mask(
        mask,
        causal and attention_mask is None,  # a mask, where there is one, has causality in it
        batch=query.shape[0],
        n=n,
        m=m,
        dtype=query.dtype,
        own_queries=n == m and not crossing,
        prefer_causal=causal,
    )
    if visible.causal and not crossing:
        pattern = Pattern.CAUSAL_SELF
    else:
        pattern = Pattern.NONCAUSAL_SELF if n == m and not crossing else Pattern.NONCAUSAL_CROSS
    inputs = {} if s_aux is None else {"sink": s_aux}
    result = attend(
        query, key, value, x, source, pattern=pattern, visible=visible, scale=scaling, dropout=dropout, **inputs
    )
    return result.output.transpose(1, 2), None


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _attend_of(
    module: nn.Module, mechanism: str, softcap: float | None, query: Tensor
) -> tuple[HeadAttention, Tensor | None, Tensor | None]:
    """What attends in `module`: what :func:`regard.swap` put there, or the mechanism with its defaults."""
    placed = getattr(module, "regard", None)
    if isinstance(placed, SwappedHeads) and placed.attend.card.name == mechanism:
        if softcap is not None and getattr(placed.attend.config, "softcap", None) != softcap:
            raise Unsupported(f"softcap={softcap} with {mechanism}", supported="a softcap set by regard.swap")
        return placed.attend, *placed.take()
    options = () if softcap is None else (("softcap", softcap),)
    return _without_weights(mechanism, options), None, None


@functools.cache
def _without_weights(mechanism: str, options: tuple[tuple[str, Any], ...]) -> HeadAttention:
    card = get_mechanism(mechanism)
    selves = [p for p in (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF) if p in card.patterns]
    if not selves:
        raise Unsupported(f"{mechanism} in self attention", supported="a mechanism with a self pattern")
    attend = HeadAttention(card, dim=1, heads=1, head_dim=1, pattern=selves[0], **dict(options))
    if attend.adds:
        raise Unsupported(
            f'attn_implementation="{PREFIX}{mechanism}" alone, since {mechanism} learns more than the model has',
            supported="mechanisms of queries, keys and values alone",
            nearest=f'regard.swap(model, "{mechanism}"), which adds what it learns',
        )
    return attend


class SwappedHeads(nn.Module):
    """A mechanism placed into a transformers attention module; catches the tokens that its gates are learned from."""

    def __init__(self, attend: HeadAttention) -> None:
        super().__init__()
        self.attend = attend
        self._tokens: tuple[Tensor | None, Tensor | None] = (None, None)

    def place(self, module: nn.Module) -> None:
        module.regard = self
        module.register_forward_pre_hook(self._catch, with_kwargs=True)

    def _catch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        others = ("encoder_hidden_states", "key_value_states")
        source = next((kwargs[name] for name in others if kwargs.get(name) is not None), x)
        self._tokens = (x, source)

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """The tokens of queries and keys of the call in progress."""
        tokens, self._tokens = self._tokens, (None, None)
        return tokens


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer in memory with room behind them, so that a token costs no copy of those before it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.get_seq_length() == 0:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            self.keys, self.values = append(self.keys, key_states, 2), append(self.values, value_states, 2)
        return self.keys, self.values


class GrowingCache(DynamicCache):
    """transformers' dynamic cache without the copy of all keys and values at each token::

        model.generate(ids, cache=GrowingCache(model.config))

    Args:
        config: the model's; layers that keep a window or a state of another kind stay as they are there.
    """

    layers: list[Any]
    layer_class_to_replicate: type[Any] | None

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__(config=config)
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer


class RegardConfig(PreTrainedConfig):
    """A :class:`regard.models.LanguageModelConfig` for transformers.

    Args:
        vocab_size: number of tokens.
        settings: the other fields of the config by name, as :attr:`settings` has them.
        use_cache: whether generation keeps the state.
        options: fields of the config, instead of `settings`; and what transformers takes.
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
        """The config that it stands for."""
        return LanguageModelConfig(self.vocab_size, **self.settings)


class RegardCache:
    """The state of a :class:`RegardForCausalLM` in the place where transformers keeps a decoder's cache."""

    is_compileable = False

    def __init__(self, state: ModelState) -> None:
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row."""
        return int(self.state.length.max())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, as beam search does."""
        self.state = self.state.select(beam_idx)


class RegardForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of regard as transformers has them."""

    config_class = RegardConfig
    base_model_prefix = "model"
    _supports_sdpa = True  # transformers asks; every layer computes by its own mechanism

    def __init__(self, config: RegardConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.language_model())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules of regard initialise themselves."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: Any) -> None:
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
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """As other causal language models: logits, a loss with `labels` (-100 is ignored), and the state.

        Args:
            attention_mask: (B, N), 1 where a token exists; with a state that of the new tokens, or of all so far.
        """
        cache = options.get(CACHE)
        state = None if cache is None else cache.state
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
        found = {CACHE: None if result.state is None else RegardCache(result.state)}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **found)
        return output if return_dict in (None, True) else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """The whole prompt first, then the newest token beside the state."""
        cache = kwargs.get(CACHE)
        return {
            "input_ids": input_ids if cache is None else input_ids[:, -1:],
            "attention_mask": attention_mask if cache is None else None,
            "use_cache": use_cache,
            CACHE: cache,
            "logits_to_keep": 1,
        }


def register() -> None:
    """Register everything; importing the module has done so. Plugins loaded later need another call."""
    for name in attention_names():
        AttentionInterface.register(PREFIX + name, functools.partial(attention_forward, mechanism=name))
        AttentionMaskInterface.register(PREFIX + name, sdpa_mask)
    AutoConfig.register(RegardConfig.model_type, RegardConfig, exist_ok=True)
    AutoModelForCausalLM.register(RegardConfig, RegardForCausalLM, exist_ok=True)


register()
