"""The mechanisms as functions of tensors, generated from the catalogue.

Layouts are those of `torch.nn.functional.scaled_dot_product_attention`: (batch, heads, sequence, features). Unlike
there, a call without `pattern` is causal wherever the mechanism can be; ``pattern="noncausal-self"`` lets all tokens
see each other. Everything after the tensors is keyword-only::

    from regard.functional import softmax_attention, gated_linear_attention
    o = softmax_attention(q, k, v, pattern="causal-self")
    o = gated_linear_attention(q, k, v, log_decay, mask=Mask(lengths=lengths))
    result = gated_linear_attention(q, k, v, log_decay, return_state=True)      # .output, .state
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from regard.apply import apply
from regard.catalogue import find_mechanism, get_mechanism, get_module, list_mechanisms
from regard.contract import Kind, Mask, Mechanism, Pattern, Unsupported, check_mask, closest


def function_name(card: Mechanism) -> str:
    """Name of the mechanism's function in this module."""
    if card.kind is Kind.ATTENTION and not card.name.endswith("attention"):
        return f"{card.name}_attention"
    return card.name


def _function(card: Mechanism) -> Callable[..., Any]:
    names = list(card.axes)
    own = set(card.config.__dataclass_fields__)  # type: ignore[attr-defined]
    passed = {*_CALL_OPTIONS, *_CONTEXT_OPTIONS} - own
    usual_pattern = next(p for p in (Pattern.CAUSAL_SELF, *card.patterns) if p in card.patterns)
    usual_config = card.options()

    def function(*tensors: Tensor | None, **options: Any) -> Any:
        if len(tensors) > len(names):
            raise Unsupported(f"{len(tensors)} tensors for {card.name}", supported=", ".join(card.inputs))
        inputs: dict[str, Any] = dict(zip(names, tensors, strict=False))
        call: dict[str, Any] = {"pattern": usual_pattern}
        bias = options.pop("bias", None)
        config: dict[str, Any] = {}
        for name, value in options.items():
            if name in inputs:
                raise Unsupported(f"{card.name} with {name} given twice", supported="by place or by name")
            if name not in known:
                raise Unsupported(
                    f"option {name!r} of {card.name}",
                    supported=", ".join(known),
                    nearest=_ELSEWHERE.get(name) or closest(name, known),
                )
            place = inputs if name in names else call if name in passed else config
            place[name] = value
        if bias is not None:
            check_mask("mask", call.get("mask"))
            mask = call.get("mask") or Mask()
            if mask.bias is not None:
                raise Unsupported(f"{card.name} with bias and mask.bias", supported="one of them, or their sum")
            call["mask"] = Mask(mask.valid, mask.lengths, mask.cu_seqlens, mask.max_length, bias, mask.blocks)
        result = apply(card, inputs, config=card.options(**config) if config else usual_config, **call)
        full = call.get("return_state") or call.get("state") is not None or result.losses or result.extras
        return result if full else result.output

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            n,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None if n + "?" in card.inputs else inspect.Parameter.empty,
            annotation="Tensor | None" if n + "?" in card.inputs else "Tensor",
        )
        for n in names
    ]
    parameters += [inspect.Parameter(n, keyword, default=d) for n, d in _CALL_OPTIONS.items() if n not in own]
    parameters += [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in ("bias", *_CONTEXT_OPTIONS)
    ]
    parameters += [
        inspect.Parameter(n, keyword, default=f.default)
        for n, f in card.config.__dataclass_fields__.items()  # type: ignore[attr-defined]
        if n not in {p.name for p in parameters}
    ]
    known = [parameter.name for parameter in parameters]
    function.__name__ = function.__qualname__ = function_name(card)
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__doc__ = get_module(card.name).__doc__
    if usual_pattern is Pattern.CAUSAL_SELF:
        function.__doc__ = f"{(function.__doc__ or '').rstrip()}\n\n{_CAUSAL}"
    return function


_CAUSAL = """Called without `pattern` it is causal, unlike torch.nn.functional.scaled_dot_product_attention:
pattern="noncausal-self" lets all tokens see each other.
"""


_CALL_OPTIONS: dict[str, Any] = {
    "pattern": Pattern.CAUSAL_SELF,
    "mask": None,
    "memory_mask": None,
    "state": None,
    "return_state": False,
    "scale": None,
    "chunk_size": None,
    "backend": None,
    "form": None,
}
_ELSEWHERE = {
    "is_causal": 'pattern="causal-self" for True, pattern="noncausal-self" for False',
    "causal": 'pattern="causal-self" for True, pattern="noncausal-self" for False',
    "attn_mask": "mask=Mask(bias=...), scores to add and -inf for pairs that are hidden",
    "attention_mask": "mask=Mask(valid=attention_mask.bool())",
    "key_padding_mask": "mask=Mask(valid=~key_padding_mask)",
    "dropout_p": "dropout",
    "softmax_scale": "scale",
    "need_weights": 'want={"weights"}',
    "enable_gqa": "none is needed: k and v may have fewer heads",
}
"""Arguments of other libraries' attention functions, with their names here."""
_CONTEXT_OPTIONS = (
    "dropout",
    "generator",
    "grid",
    "roles",
    "training",
    "progress",
    "teacher",
    "want",
    "rotate",
    "position_bias",
)


_MADE: dict[str, tuple[Mechanism, Callable[..., Any]]] = {}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    for mechanism in (name, name.removesuffix("_attention")):
        card = find_mechanism(mechanism)
        if card is not None and function_name(card) == name:
            made = _MADE.get(name)
            if made is None or made[0] is not card:  # a plugin may have replaced an earlier one
                made = _MADE[name] = (card, _function(card))
            return made[1]
    raise AttributeError(f"module 'regard.functional' has no function {name!r}; {_instead(name)}")


def _instead(name: str) -> str:
    """A suggestion for a name that no function has."""
    bare = name.removesuffix("_attention")
    card = find_mechanism(bare)
    if card is not None and bare in card.alias_options:
        return f"try regard.create_layer({bare!r}, ...), or {function_name(card)} with the options of its card"
    likeliest = closest(name, __dir__()) if card is None else function_name(card)
    return f"try {likeliest}" if likeliest else "see dir(regard.functional)"


def __dir__() -> list[str]:
    return sorted([*globals(), *(function_name(get_mechanism(n)) for n in list_mechanisms())])


__all__ = ["apply", "function_name"]
