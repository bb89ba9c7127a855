"""regard in Hugging Face transformers.

Importing this module registers

- every attention mechanism of queries, keys and values as ``attn_implementation="regard:NAME"``, with its mask
  function::

      import regard.integrations.transformers
      model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="regard:softmax")

- ``regard:swapped``, through which models that :func:`regard.swap` has changed attend. Their config says what is in each
  module, so that ``save_pretrained`` and ``from_pretrained`` keep it; without this import transformers refuses to load
  them. For that, ``post_init`` of its models is extended: it puts back what the config says.
- :class:`GrowingCache`, a cache for ``generate`` that does not copy all keys and values at each token;
- :class:`RegardConfig` and :class:`RegardForCausalLM` with the ``Auto`` classes: a language model of regard that passes
  ``generate`` with its state, and saves and loads as others do.

Needs the extra ``hf``. Importing regard itself never imports transformers.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
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
from regard.contract import Context, Kind, Mask, Mechanism, Pattern, Unsupported
from regard.engines.attention import decode
from regard.engines.cache import append
from regard.integrations.heads import HeadAttention, check_swappable, read_mask
from regard.integrations.swap import Choice, reader_of
from regard.integrations.torch_modules import Swapped
from regard.models import LanguageModel, LanguageModelConfig, ModelState

PREFIX = "regard:"
SWAPPED = PREFIX + "swapped"
RECORD = "regard"
"""Attribute of a config that says what was swapped: the attention before, and the mechanism of each module (None for
softmax) by its path in the base model."""
PLACE = "regard"
"""Attribute of an attention module: its mechanism, or None for softmax."""
UNPLACED: Any = object()
ROTATES = re.compile("rotary|rotate_")
_CALL = threading.local()
_DEFAULTS: dict[tuple[str, tuple[tuple[str, Any], ...]], HeadAttention] = {}
CACHE = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
"""The name of a decoder's state in this version of transformers."""


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
    **given: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls for ``regard:NAME``: (B, H, N, D), (B, G, M, D), (B, G, M, V) -> (B, N, H, V).

    Raises:
        Unsupported: for a mask, bias, softcap or sink that the mechanism cannot honour.
    """
    return _forward(module, query, key, value, attention_mask, None, mechanism, **given)


def swapped_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Called by transformers for ``regard:swapped``; a module that :func:`regard.swap` left has softmax attention."""
    placed = getattr(module, PLACE, UNPLACED)
    if placed is UNPLACED:
        raise Unsupported(
            f"a {type(module).__name__} for which the config of the swapped model names no mechanism",
            supported="the class of model that was swapped and saved",
            nearest="load the model that was swapped, and regard.unswap(model)",
        )
    if (
        placed is not None
        and placed.card.name == "softmax"
        and not placed.adds
        and placed.config == placed.card.options()
    ):
        placed = None
    return _forward(module, query, key, value, attention_mask, placed, "softmax", **given)


def swapped_rows(module: nn.Module, rows: Sequence[tuple[Tensor, Tensor, Tensor]], **given: Any) -> list[Tensor]:
    """:func:`swapped_forward` of sequences of unequal lengths, each alone without a mask: for each row of the call in
    progress its new queries and all of its keys and values, a batch of 1."""
    called, x, source = getattr(_CALL, "tokens", (None, None, None))
    outputs = []
    for i, (query, key, value) in enumerate(rows):
        if called is module and x is not None and source is not None:
            own = x[i : i + 1, : query.shape[2]]
            _CALL.tokens = (module, own, own if source is x else source[i : i + 1])
        outputs.append(swapped_forward(module, query, key, value, None, **given)[0])
    return outputs


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    placed: HeadAttention | None,
    mechanism: str,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attend by what is placed in a module, or by a mechanism with its defaults."""
    n, m = query.shape[2], key.shape[2]
    plain = not dropout and all(x is None for x in (attention_mask, position_bias, softcap, s_aux))
    if plain and n == 1 and mechanism == "softmax" and placed is None:
        output = decode(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling)
        if output is not None:
            return output.transpose(1, 2), None
    x = source = None
    if placed is None:
        attend = _without_weights(mechanism, () if softcap is None else (("softcap", softcap),))
    else:
        attend = placed
        x, source = _tokens_of(module)
        if softcap is not None and getattr(placed.config, "softcap", None) != softcap:
            raise Unsupported(f"softcap={softcap} with {placed.card.name}", supported="a softcap set by regard.swap")
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


def _without_weights(mechanism: str, options: tuple[tuple[str, Any], ...]) -> HeadAttention:
    """The mechanism for any model; made once, and those without options before a compiler traces a call."""
    known = _DEFAULTS.get((mechanism, options))
    if known is not None:
        return known
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
    return _DEFAULTS.setdefault((mechanism, options), attend)


def _tokens_of(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The tokens of queries and keys of the call of `module` in progress."""
    called, x, source = getattr(_CALL, "tokens", (None, None, None))
    _CALL.tokens = (None, None, None)
    return (x, source) if called is module else (None, None)


def _remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a call: keep its tokens for this thread, since transformers hands attention no more than heads."""
    x = args[0] if args else kwargs.get("hidden_states")
    others = ("encoder_hidden_states", "key_value_states")
    source = next((kwargs[name] for name in others if kwargs.get(name) is not None), x)
    _CALL.tokens = (module, x, source)


def head_attention(module: Any, card: Mechanism, pattern: Pattern, options: dict[str, Any]) -> HeadAttention:
    """The mechanism for a module of a transformers model."""
    config = module.config
    heads = getattr(module, "num_heads", None) or config.num_attention_heads
    widths = (getattr(module, name, None) for name in ("qk_head_dim", "head_dim", "attention_head_size"))
    width = next(filter(None, widths), config.hidden_size // heads)
    groups = getattr(module, "num_key_value_groups", 1)
    attend = HeadAttention(
        card,
        dim=config.hidden_size,
        heads=heads,
        kv_heads=heads // groups,
        head_dim=width,
        value_dim=getattr(module, "v_head_dim", None),
        pattern=pattern,
        **options,
    )
    if not pattern.cross and any(ROTATES.search(name) for name in vars(sys.modules[type(module).__module__])):
        attend.check_rotated()
    if "roles" in card.honours and not pattern.causal and hasattr(config, "patch_size"):
        raise Unsupported(
            f"swapping to {card.name}, which lays tokens out, where transformers does not say how images are",
            supported="models of text",
            nearest="the same model of timm",
        )
    some = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    return attend.to(some).train(module.training)


def place(module: nn.Module, attend: HeadAttention) -> None:
    """Put a mechanism into an attention module, in the place of one that is there."""
    if not is_swapped(module):
        module.register_forward_pre_hook(_remember, with_kwargs=True)
    setattr(module, PLACE, attend)


def is_swapped(module: nn.Module) -> bool:
    """Whether a mechanism is placed in it."""
    return module._modules.get(PLACE) is not None and _dispatches(module)


def take_out(module: nn.Module) -> None:
    """The opposite of :func:`place`: the module has softmax attention again."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _remember:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    setattr(module, PLACE, None)


def _dispatches(module: nn.Module) -> bool:
    home = sys.modules.get(type(module).__module__)
    return hasattr(home, "ALL_ATTENTION_FUNCTIONS") and "Attention" in type(module).__name__


def check_interface(model: PreTrainedModel) -> None:
    """Raise Unsupported for a model that attends in another way."""
    if not model._can_set_attn_implementation():
        raise Unsupported(
            f"{type(model).__name__}, which does not dispatch through transformers' attention interface",
            supported="models that do",
        )


def record_swap(model: Any, chosen: Mapping[str, Any]) -> str:
    """Let a model attend by what is placed in it, and its config say so; what to know of generation now.

    Args:
        chosen: mechanism, options and pattern of each changed module by its path.
    """
    config = model.config
    known = getattr(config, RECORD, None) or {"attention": config._attn_implementation, "modules": {}}
    modules = dict(known["modules"])
    for path, module in model.named_modules():
        if path in chosen:
            choice = chosen[path]
            entry = {"mechanism": choice.card.name, "pattern": choice.pattern.value, "options": choice.options}
            modules[_inside_base(model, path)] = entry
        elif _dispatches(module) and not is_swapped(module):
            modules[_inside_base(model, path)] = None
            setattr(module, PLACE, None)
    setattr(config, RECORD, {**known, "modules": modules})
    model.set_attn_implementation(SWAPPED)
    config.attn_implementation = SWAPPED  # a name that a config is saved and loaded with
    whole = needing_whole_sequences(model)
    _turn_cache(model, off=bool(whole))
    if not whole:
        return "Generation goes on with the model's cache of keys and values, read whole at each step."
    return f"use_cache is off: {', '.join(whole)} cannot go on from a cache of keys and values."


def _turn_cache(model: Any, *, off: bool) -> None:
    """Turn the cache of a swapped model off, or on again where that has turned it off."""
    record = getattr(model.config, RECORD)
    for each in filter(None, (model.config, getattr(model, "generation_config", None))):
        if off and getattr(each, "use_cache", False):
            each.use_cache, record["use_cache"] = False, True
        elif not off and record.get("use_cache"):
            each.use_cache = True
    if not off:
        record.pop("use_cache", None)


def record_unswap(model: Any) -> None:
    """The opposite of :func:`record_swap`, for the modules from which the mechanism was taken."""
    config, swapped = model.config, False
    record = getattr(config, RECORD)
    modules = dict(record["modules"])
    for path, module in model.named_modules():
        if is_swapped(module) or isinstance(module, Swapped):
            swapped = True
        elif _inside_base(model, path) in modules:
            modules[_inside_base(model, path)] = None
    setattr(config, RECORD, {**record, "modules": modules})
    _turn_cache(model, off=bool(needing_whole_sequences(model)))
    if swapped:
        return
    for module in model.modules():
        if getattr(module, PLACE, UNPLACED) is None:
            delattr(module, PLACE)
    delattr(config, RECORD)
    config.__dict__.pop("attn_implementation", None)
    model.set_attn_implementation(record["attention"])


def needing_whole_sequences(model: nn.Module) -> list[str]:
    """Mechanisms placed in a model that cannot go on from a cache of keys and values."""
    placed: list[Any] = [module.regard for module in model.modules() if is_swapped(module)]
    return sorted({attend.card.name for attend in placed if attend.needs_whole_sequences})


def _inside_base(model: Any, path: str) -> str:
    """A path without the name of the base model, which models with other heads have in common."""
    return path.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else path


def restore(model: Any) -> None:
    """Put the mechanisms into a model that its config names; those that a part has already put there are left.

    Raises:
        Unsupported: where a mechanism is unknown here, or another attention is asked for.
    """
    config = model.config
    record = config.regard
    if config._attn_implementation != SWAPPED:
        raise Unsupported(
            f'attn_implementation="{config._attn_implementation}" of a model that was saved with other mechanisms',
            supported=f'"{SWAPPED}", which is what it was saved with',
            nearest="regard.unswap(model) once it is loaded",
        )
    config.attn_implementation = SWAPPED
    for path, module in list(model.named_modules()):
        entry = record["modules"].get(_inside_base(model, path), UNPLACED)
        if entry is UNPLACED or hasattr(module, PLACE) or isinstance(module, Swapped):
            continue
        reader = reader_of(module)
        if entry is None:
            setattr(module, PLACE, None)
        elif reader is not None:
            reader(model, path, module, Choice.of((entry["mechanism"], entry["options"]), entry["pattern"]))()


def _restoring(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(post_init)
    def restored(self: Any) -> None:
        post_init(self)
        if getattr(self.config, RECORD, None) is not None:
            restore(self)

    return restored


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
        with contextlib.suppress(Unsupported):
            _without_weights(name, ())
    AttentionInterface.register(SWAPPED, swapped_forward)
    AttentionMaskInterface.register(SWAPPED, sdpa_mask)
    AutoConfig.register(RegardConfig.model_type, RegardConfig, exist_ok=True)
    AutoModelForCausalLM.register(RegardConfig, RegardForCausalLM, exist_ok=True)


register()
PreTrainedModel.post_init = _restoring(PreTrainedModel.post_init)
