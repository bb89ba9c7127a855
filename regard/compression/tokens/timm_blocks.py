"""Blocks of timm's vision transformers that output fewer tokens: those of its `VisionTransformer`, `Eva` and `Beit`."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.compression.tokens.reducers import Evidence, Heads, Tokens
from regard.contract import Unsupported

if TYPE_CHECKING:
    from jaxtyping import Float, Int

HOSTS = {"VisionTransformer": "timm.models.vision_transformer", "Eva": "timm.models.eva", "Beit": "timm.models.beit"}
"""timm's models whose blocks can output fewer tokens, and their modules."""
ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")


def is_host(model: nn.Module) -> bool:
    """Whether a model is one of `HOSTS`."""
    modules = ((sys.modules.get(module), name) for name, module in HOSTS.items())
    return any(module is not None and isinstance(model, getattr(module, name)) for module, name in modules)


def why_not(block: nn.Module) -> str:
    """What stands against fewer tokens in a block of timm, in words that follow "with"; empty if nothing does."""
    kind, attention = type(block), type(getattr(block, "attn", None))
    if (kind.__module__, kind.__name__) not in REDUCED:
        return f"a {kind.__name__}"
    if attention.__name__ not in ATTENTIONS or not attention.__module__.startswith("timm."):
        return f"a {kind.__name__} of {attention.__name__}"
    return ""


def reduced(block: type) -> type:
    """The subclass of a block of timm that outputs fewer tokens."""
    return REDUCED[block.__module__, block.__name__][1]()


@functools.cache
def _plain() -> type[nn.Module]:
    block_class: Any = importlib.import_module("timm.models.vision_transformer").Block

    class ReducedTimmBlock(block_class):
        """A block of timm's `VisionTransformer` that outputs fewer tokens."""

        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            _check_no_mask(attn_mask is not None)
            reduction = self.reduction
            tokens = reduction.begin(self.number, x, self.protected)
            bias = reduction.bias(tokens)
            with _watched(self.attn) as heads:
                mixed = self.attn(self.norm1(x), attn_mask=None if bias is None else bias.to(x.dtype))
            heads.placed = heads.given
            x = x + self.drop_path1(self.ls1(mixed))
            x = reduction.after(self.number, tokens, x, lambda: reduction.evidence(heads, x, bias)).x
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
            return reduction.passed_on(self.number, x)

    return _found_by_name(ReducedTimmBlock)


@functools.cache
def _eva() -> type[nn.Module]:
    block_class: Any = importlib.import_module("timm.models.eva").EvaBlock

    class ReducedEvaBlock(block_class):
        """A block of timm's `Eva` that outputs fewer tokens, turned by their own positions."""

        def forward(
            self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
        ) -> Tensor:
            _check_no_mask(attn_mask is not None or is_causal)
            reduction = self.reduction
            tokens = reduction.begin(self.number, x, self.protected)
            bias = reduction.bias(tokens)
            turns = rope if rope is None or reduction.whole else _turns(rope, tokens)
            with _watched(self.attn) as heads:
                mixed = self.attn(self.norm1(x), rope=turns, attn_mask=None if bias is None else bias.to(x.dtype))
            heads.placed = {name: _turned(self.attn, part, turns) for name, part in heads.given.items()}
            x = x + self.drop_path1(_scaled(self.gamma_1, mixed))
            x = reduction.after(self.number, tokens, x, lambda: reduction.evidence(heads, x, bias)).x
            x = x + self.drop_path2(_scaled(self.gamma_2, self.mlp(self.norm2(x))))
            return reduction.passed_on(self.number, x)

    return _found_by_name(ReducedEvaBlock)


@functools.cache
def _beit() -> type[nn.Module]:
    block_class: Any = importlib.import_module("timm.models.beit").Block

    class ReducedBeitBlock(block_class):
        """A block of timm's `Beit` that outputs fewer tokens, with the biases of their own positions."""

        def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
            reduction, attention = self.reduction, self.attn
            tokens = reduction.begin(self.number, x, self.protected)
            own = attention.relative_position_bias_table is not None
            bias = None if shared_rel_pos_bias is None else shared_rel_pos_bias[None]
            if own:
                bias = attention._get_rel_pos_bias() + (0 if bias is None else bias)
            normed = self.norm1(x)
            if reduction.whole:
                mixed = attention(normed, shared_rel_pos_bias=shared_rel_pos_bias)
            else:
                bias = None if bias is None else _pairs(bias, tokens.origins)
                counted = reduction.bias(tokens)
                if counted is not None:
                    bias = counted.to(x.dtype) + (0 if bias is None else bias)
                with _biased(attention, bias if own else None):
                    mixed = attention(normed, shared_rel_pos_bias=None if own else bias)
            x = x + self.drop_path1(_scaled(self.gamma_1, mixed))

            def evidence() -> Evidence:
                given = _heads_of_beit(attention, normed)
                return reduction.evidence(Heads(given, given), x, bias)

            x = reduction.after(self.number, tokens, x, evidence).x
            x = x + self.drop_path2(_scaled(self.gamma_2, self.mlp(self.norm2(x))))
            return reduction.passed_on(self.number, x)

    return _found_by_name(ReducedBeitBlock)


REDUCED: dict[tuple[str, str], tuple[str, Callable[[], type]]] = {
    ("timm.models.vision_transformer", "Block"): ("ReducedTimmBlock", _plain),
    ("timm.models.eva", "EvaBlock"): ("ReducedEvaBlock", _eva),
    ("timm.models.beit", "Block"): ("ReducedBeitBlock", _beit),
}
"""Blocks of timm, by module and name: the name and the maker of the class that outputs fewer tokens."""


@contextmanager
def _watched(attention: Any) -> Iterator[Heads]:
    """The normed queries and keys of the next call of an attention module, without positions."""
    heads, given = Heads(), dict[str, Tensor]()
    heads.given = given
    parts = (("q", attention.q_norm), ("k", attention.k_norm))
    hooks = [
        part.register_forward_hook(lambda _, __, output, name=name: given.__setitem__(name, output))
        for name, part in parts
    ]
    try:
        yield heads
    finally:
        for hook in hooks:
            hook.remove()


def _turns(rope: Tensor, tokens: Tokens) -> Float[Tensor, "b #h n d"]:
    """The sines and cosines (..., N, D) of all patches, for the patches that are left."""
    index = (tokens.origins[:, tokens.protected :] - tokens.protected)[:, None, :, None]
    rope = rope.view(*(1,) * (4 - rope.ndim), *rope.shape).expand(len(index), -1, -1, -1)
    return rope.gather(2, index.expand(-1, rope.shape[1], -1, rope.shape[3]))


def _turned(attention: Any, heads: Float[Tensor, "b h n d"], turns: Tensor | None) -> Float[Tensor, "b h n d"]:
    """Queries or keys as Eva's attention turns them; class tokens stay."""
    if turns is None:
        return heads
    layers: Any = importlib.import_module("timm.layers")
    first = attention.num_prefix_tokens
    turned = layers.apply_rot_embed_cat(heads[:, :, first:], turns, half=attention.rotate_half)
    return torch.cat([heads[:, :, :first], turned.to(heads.dtype)], 2)


def _pairs(bias: Float[Tensor, "1 h n0 n0"], origins: Int[Tensor, "b n"]) -> Float[Tensor, "b h n n"]:
    """The biases of all pairs of tokens, for pairs of those that are left."""
    pairs = bias[0].permute(1, 2, 0)  # (N_0, N_0, H)
    return pairs[origins[:, :, None], origins[:, None]].permute(0, 3, 1, 2)


@contextmanager
def _biased(attention: Any, bias: Tensor | None) -> Iterator[None]:
    """Let Beit's attention add this bias in place of that of all pairs, unless it is None."""
    if bias is None:
        yield
        return
    vars(attention)["_get_rel_pos_bias"] = lambda: bias  # as torch.compile can follow it
    try:
        yield
    finally:
        del vars(attention)["_get_rel_pos_bias"]


def _heads_of_beit(attention: Any, normed: Float[Tensor, "b n c"]) -> dict[str, Float[Tensor, "b h n d"]]:
    query, key, _ = attention.qkv.weight.chunk(3)
    parts = {"q": (query, attention.q_bias), "k": (key, attention.k_bias)}
    return {
        name: F.linear(normed, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for name, (weight, bias) in parts.items()
    }


def _scaled(factors: Tensor | None, x: Tensor) -> Tensor:
    return x if factors is None else factors * x


def _check_no_mask(masked: bool) -> None:
    if masked:
        raise Unsupported("a mask in a model of timm with fewer tokens", supported="no mask")


def _found_by_name(made: type) -> type:
    made.__qualname__ = made.__name__  # by which a saved model finds it, see __getattr__
    return made


def __getattr__(name: str) -> Any:
    for own, make in REDUCED.values():
        if name == own:
            return make()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
