"""Residual branches of pre-norm blocks: x + after(branch(norm(x))), in one native call where that computes the same.

In inference of plain float32 tensors on a CPU a branch of plain parts goes to the kernels of :mod:`regard.engines.residual`. A
part that is another kind of module, has hooks or another ``forward``, or drops something out, is called as ever.
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
from regard.contract import Context, Pattern
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
"""A norm, a feed-forward network or a layer, and what the addition passes then."""

LINEARS = (Linear, nn.Linear)
IDENTITIES = {DropPath: "probability", nn.Dropout: "p", nn.Identity: ""}
"""Modules that leave all as it is, in training where this attribute is 0."""


def add_feed_forward(
    x: Float[Tensor, "... n c"], norm: nn.Module, network: nn.Module, *after: nn.Module
) -> Float[Tensor, "... n c"]:
    """x + after(network(norm(x))), the modules of `after` one after the other."""
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
    """:func:`add_feed_forward` in one native call; None where there is none for it."""
    return fused(x, [(norm, network, after)])


def fused_attention(
    x: Float[Tensor, "b n c"], norm: nn.Module, layer: nn.Module, *after: nn.Module, context: Context | None = None
) -> Float[Tensor, "b n c"] | None:
    """x + after(layer(norm(x))) of softmax attention of a sequence to itself, in one native call; None where there is none for it:
    masks, windows, positions, gates and whatever else a layer may have."""
    if context is not None and (context.want or any(getattr(context, name) is not None for name in TOLD)):
        return None
    return fused(x, [(norm, layer, after)])


def fused(x: Float[Tensor, "b n c"], branches: Iterable[Branch]) -> Float[Tensor, "b n c"] | None:
    """What branches, one after the other, make of `x`, each in one native call; None where one of them has none.

    All are looked at before the first runs: what Python reads is out of the processor's cache after a call, and looking at a
    branch then takes several times as long.
    """
    if not may_be_fused(x) or not residual.plain(x):
        return None
    natives = []
    for norm, inner, after in branches:
        native = _native(norm, inner, after)
        if native is None or not native.takes(x):
            return None
        natives.append(native)
    for native in natives:
        x = native(x)
    return x


def may_be_fused(x: Tensor) -> bool:
    """Whether there may be native calls for branches of `x`: asked first, so that single tokens take no longer for it."""
    return not (torch.compiler.is_compiling() or residual.is_small(x))


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a module's call comes to the ``forward`` of its class and nothing else."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or _has_any_global_hook()
    )


TOLD = ("mask", "memory_mask", "positions", "memory_positions", "roles", "teacher")
"""What a context may have that such attention does not look at."""


class _Parts:
    """The modules of a branch as they were when its struct was made.

    Attributes:
        native: what computes the branch; None where the kernels do not.
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
        self._modules = [norm, *inner.children(), *ends]  # not the one that this is kept for as long as it lives
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
        """Whether these modules are still the branch, with the same tensors where they were."""
        return (
            _same((norm, *after), self._given)
            and options == self._options
            and [*map(type, self._modules)] == self._types
            and _same(self._found(), self._held)
            and getattr(norm, "eps", None) == self._eps
            and (self.native is None or self.native.is_current())
        )

    def _found(self) -> list[Any]:
        """The modules inside of others, and the tensors of all."""
        return [*itertools.chain.from_iterable(map(dict.values, self._homes))]

    def run_plainly(self) -> bool:
        """Whether no module has hooks or a ``forward`` of its own, or drops something out."""
        if (
            any(self._hooks)
            or any(map(operator.contains, self._attributes, itertools.repeat("forward")))
            or _has_any_global_hook()
        ):
            return False
        return not any(module.training and getattr(module, name) for module, name in self._dropping)


_PARTS: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()
"""Of the feed-forward networks and layers that were last called so."""


def _native(
    norm: nn.Module, inner: nn.Module, after: tuple[nn.Module, ...]
) -> residual.FeedForward | residual.Attention | None:
    """What computes a branch now; None where the modules do."""
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
