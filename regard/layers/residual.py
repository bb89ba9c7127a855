"""Residual branches of pre-norm blocks, x + after(branch(norm(x))), in one native call where the result is the same.

In inference on a CPU with plain float32 tensors, branches of standard parts go to the kernels of
:mod:`regard.engines.residual`. Parts of another class, with hooks or a ``forward`` of their own, or with active
dropout, are called as usual.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from regard.apply import apply
from regard.contract import Context, Mask, Pattern
from regard.engines import residual
from regard.engines.residual import Dense, RowNorm
from regard.layers.attention import AttentionLayer
from regard.layers.drop_path import DropPath
from regard.layers.feed_forward import MLP, SwiGLU
from regard.layers.linear import Linear
from regard.layers.norms import LayerNorm, LayerScale, RMSNorm
from regard.positions.none import NoPositions

if TYPE_CHECKING:
    from jaxtyping import Float

Branch = tuple[nn.Module, nn.Module, tuple[nn.Module, ...]]
"""A norm, a feed-forward network or layer, and the modules applied to its output before the addition."""

LINEARS = (Linear, nn.Linear)
IDENTITIES = {DropPath: "probability", nn.Dropout: "p", nn.Identity: ""}
"""Modules that are the identity in evaluation, and in training if this attribute is 0."""


def add_feed_forward(
    x: Float[Tensor, "... n c"], norm: nn.Module, network: nn.Module, *after: nn.Module
) -> Float[Tensor, "... n c"]:
    """x + after(network(norm(x))), with the modules of `after` applied in turn."""
    found = fused_feed_forward(x, norm, network, *after)
    if found is not None:
        return found
    update = network(norm(x))
    for module in after:
        update = module(update)
    return x + update


def fused_feed_forward(
    x: Float[Tensor, "... n c"], norm: nn.Module, network: nn.Module, *after: nn.Module
) -> Float[Tensor, "... n c"] | None:
    """:func:`add_feed_forward` in one native call; None if there is no kernel for it."""
    return fused(x, [(norm, network, after)])


def fused_attention(
    x: Float[Tensor, "b n c"], norm: nn.Module, layer: nn.Module, *after: nn.Module, context: Context | None = None
) -> Float[Tensor, "b n c"] | None:
    """x + after(layer(norm(x))) for softmax self-attention, in one native call; None if there is no kernel for it, as
    for windows, positions, gates, and masks other than :func:`regard.core.ragged.packed` and a bias for each key."""
    documents = key_bias = None
    if context is not None:
        if context.want or any(getattr(context, name) is not None for name in TOLD):
            return None
        if context.mask is not None:
            documents, key_bias = _documents(context.mask), _key_bias(context.mask, x)
            if documents is None and key_bias is None:
                return None
    natives = _natives(x, [(norm, layer, after)])
    return None if natives is None else natives[0](x, documents, key_bias)


def fused(x: Float[Tensor, "b n c"], branches: Iterable[Branch]) -> Float[Tensor, "b n c"] | None:
    """Apply branches to `x` one after the other, each in one native call; None if there is no kernel for one of them.

    All branches are inspected before the first one runs: a native call evicts Python's data from the processor's cache,
    and inspecting a branch afterwards takes several times as long.
    """
    natives = _natives(x, branches)
    if natives is None:
        return None
    for native in natives:
        x = native(x)
    return x


def may_be_fused(x: Tensor) -> bool:
    """Return whether branches of `x` may have native calls; a cheap first test that keeps single tokens fast."""
    return not (torch.compiler.is_compiling() or residual.is_small(x))


def is_called_plainly(module: nn.Module) -> bool:
    """Return whether calling a module runs the ``forward`` of its class and nothing else."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or _has_any_global_hook()
    )


TOLD = ("memory_mask", "positions", "memory_positions", "roles", "teacher")
"""Fields of a context that the fused attention does not support."""


def _documents(mask: Mask) -> residual.Documents | None:
    """The documents of a mask that a model made for its layers; None if there is more to a mask, or another kind."""
    borders, longest = mask.cu_seqlens, mask.max_length
    if borders is None or longest is None or mask.layout is None or mask.bias is not None or mask.blocks is not None:
        return None
    return residual.Documents(borders, longest) if borders.dtype is torch.int64 else None


def _key_bias(mask: Mask, x: Tensor) -> Float[Tensor, "b n"] | None:
    """The bias of a mask that has nothing else, if it depends on the key alone; None otherwise."""
    bias, (batch, n, _) = mask.bias, x.shape
    if bias is None or mask.ragged or mask.layout is not None or mask.blocks is not None or not residual.plain(bias):
        return None
    return bias.expand(batch, 1, 1, n)[:, 0, 0] if bias.shape in ((batch, 1, 1, n), (1, 1, 1, n)) else None


class _Parts:
    """The modules of a branch, as they were when its native struct was made.

    Attributes:
        native: computes the branch; None if there is no kernel for it.
    """

    def __init__(
        self,
        norm: nn.Module,
        inner: nn.Module,
        after: tuple[nn.Module, ...],
        options: tuple[Any, ...],
    ) -> None:
        ends = [x for module in after for x in ([module, *module] if type(module) is nn.Sequential else [module])]
        self._given, self._options = (norm, *after), options
        self._modules = [norm, *inner.children(), *ends]  # without inner, its weak key
        self._types = [*map(type, self._modules)]
        sequences = [x for x in after if type(x) is nn.Sequential]
        self._homes = [x._modules for x in (inner, *sequences)] + [x._parameters for x in self._modules]
        self._held = self._found()
        called = [inner, *self._modules]
        self._hooks = [x for module in called for x in (module._forward_hooks, module._forward_pre_hooks)]
        self._attributes = [vars(module) for module in called]
        self._dropping = [(x, IDENTITIES[type(x)]) for x in ends if IDENTITIES.get(type(x))]
        self._eps = getattr(norm, "eps", None)
        scales = [x for x in ends if type(x) is LayerScale]
        known = all(type(x) in (nn.Sequential, LayerScale, *IDENTITIES) for x in ends) and len(scales) <= 1
        make = _MAKERS.get(type(inner)) if known else None
        self.native = None if make is None else make(norm, inner, scales[0].factors if scales else None)

    def are_current(self, norm: nn.Module, after: tuple[nn.Module, ...], options: tuple[Any, ...]) -> bool:
        """Return whether the branch still has these modules, with the same tensors in the same places."""
        return (
            _same((norm, *after), self._given)
            and options == self._options
            and [*map(type, self._modules)] == self._types
            and _same(self._found(), self._held)
            and getattr(norm, "eps", None) == self._eps
            and (self.native is None or self.native.is_current())
        )

    def _found(self) -> list[Any]:
        """All modules inside the given ones, and the tensors of all of them."""
        return [*itertools.chain.from_iterable(map(dict.values, self._homes))]

    def run_plainly(self) -> bool:
        """Return whether no module has hooks, a ``forward`` of its own, or active dropout."""
        if (
            any(self._hooks)
            or any(map(operator.contains, self._attributes, itertools.repeat("forward")))
            or _has_any_global_hook()
        ):
            return False
        return not any(module.training and getattr(module, name) for module, name in self._dropping)


_PARTS: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()
"""The parts of each feed-forward network or layer, from its latest call."""


def _natives(x: Tensor, branches: Iterable[Branch]) -> list[Any] | None:
    """The native forms of branches of `x`; None if one of them has none."""
    if not may_be_fused(x) or not residual.plain(x):
        return None
    natives = []
    for norm, inner, after in branches:
        native = _native(norm, inner, after)
        if native is None or not native.takes(x):
            return None
        natives.append(native)
    return natives


def _native(
    norm: nn.Module, inner: nn.Module, after: tuple[nn.Module, ...]
) -> residual.FeedForward | residual.Attention | None:
    """The native form of a branch; None if its modules must be called."""
    options: tuple[Any, ...] = ()
    if isinstance(inner, AttentionLayer):
        options = inner.card, inner.config, inner.pattern, inner.num_heads, inner.kv_heads, inner.head_dim, inner.mix
    elif not isinstance(inner, MLP | SwiGLU):
        return None
    if inner.training and inner.dropout:
        return None
    parts = _PARTS.get(inner)
    if parts is None or not parts.are_current(norm, after, options):
        parts = _PARTS[inner] = _Parts(norm, inner, after, options)
    return parts.native if parts.native is not None and parts.run_plainly() else None


def _same(found: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(found) == len(before) and all(map(operator.is_, found, before))


def _feed_forward(norm: Any, network: Any, scale: Tensor | None) -> residual.FeedForward | None:
    row_norm, (up, down) = _row_norm(norm), map(_dense, (network.up, network.down))
    gate = _dense(network.gate) if type(network) is SwiGLU else None
    if row_norm is None or up is None or down is None or (gate is None) != (type(network) is MLP):
        return None
    return residual.FeedForward(row_norm, up, down, gate, scale)


def _attention(norm: Any, layer: AttentionLayer, scale: Tensor | None) -> residual.Attention | None:
    row_norm, config = _row_norm(norm), layer.config
    if layer.card.name != "softmax" or layer.pattern is not Pattern.NONCAUSAL_SELF or layer.mix is not apply:
        return None
    if config.window is not None or config.softcap is not None or config.learn_sink:
        return None
    others = layer.query_norm, layer.key_norm, layer.value_norm, layer.output_norm, layer.gate, layer.merge
    if any(x is not None for x in others) or len(layer.convolutions) or type(layer.positions) is not NoPositions:
        return None
    linears = [_dense(x) for x in (layer.query, layer.key, layer.value, layer.output)]
    if row_norm is None or any(x is None for x in linears):
        return None
    heads = {"heads": layer.num_heads, "kv_heads": layer.kv_heads, "scale_of_scores": layer.head_dim**-0.5}
    return residual.Attention(row_norm, *linears, **heads, scale=scale)  # type: ignore[arg-type]


def _dense(module: Any) -> Dense | None:
    return Dense(module.weight, module.bias) if type(module) in LINEARS else None


def _row_norm(module: Any) -> RowNorm | None:
    if type(module) not in (LayerNorm, RMSNorm):
        return None
    centred = type(module) is LayerNorm
    return RowNorm(module.weight, module.bias if centred else None, module.eps, centred)


_MAKERS: dict[type, Callable[[Any, Any, Tensor | None], residual.FeedForward | residual.Attention | None]] = {
    MLP: _feed_forward,
    SwiGLU: _feed_forward,
    AttentionLayer: _attention,
}
