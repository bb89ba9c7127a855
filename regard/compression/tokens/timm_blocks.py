"""Blocks of timm's vision transformers that output fewer tokens: those of its `VisionTransformer`."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from regard.compression.tokens.reducers import Heads
from regard.contract import Unsupported

HOSTS = {"VisionTransformer": "timm.models.vision_transformer"}
"""timm's models whose blocks can output fewer tokens, and their modules."""
ATTENTIONS = ("Attention",)


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
            if attn_mask is not None:
                raise Unsupported("attn_mask in a model with fewer tokens", supported="no mask")
            tokens = self.reduction.begin(self.number, x, self.protected)
            bias = self.reduction.bias(tokens)
            with _watched(self.attn) as heads:
                mixed = self.attn(self.norm1(x), attn_mask=None if bias is None else bias.to(x.dtype))
            heads.placed = heads.given
            x = x + self.drop_path1(self.ls1(mixed))
            x = self.reduction.after(self.number, tokens, x, lambda: self.reduction.evidence(heads, x, bias)).x
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
            return self.reduction.passed_on(self.number, x)

    return _found_by_name(ReducedTimmBlock)


REDUCED: dict[tuple[str, str], tuple[str, Callable[[], type]]] = {
    ("timm.models.vision_transformer", "Block"): ("ReducedTimmBlock", _plain),
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


def _found_by_name(made: type) -> type:
    made.__qualname__ = made.__name__  # by which a saved model finds it, see __getattr__
    return made


def __getattr__(name: str) -> Any:
    for own, make in REDUCED.values():
        if name == own:
            return make()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
