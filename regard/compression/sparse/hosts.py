"""Sparse attention in an existing model: :func:`sparsify`, undone by :meth:`Sparse.undo`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from regard.compression.sparse.card import Config, card_of
from regard.compression.sparse.catalogue import read_method
from regard.compression.sparse.method import PHASES, Meter, Method, Place
from regard.contract import Pattern, Unsupported, an_instance
from regard.layers.attention import AttentionLayer
from regard.models import LanguageModel

KNOWN = "regard.models.LanguageModel with softmax, causal language models of transformers with the attention interface"


@dataclass
class Sparse:
    """A model whose attention is sparse.

    Attributes:
        model: the given model, changed in place.
        method: the method that runs in it.
        layers: number of layers with the method.
        meters: one for each layer.
    """

    model: nn.Module
    method: Method
    layers: int
    meters: list[Meter] = field(default_factory=list)
    _undoing: list[Any] = field(default_factory=list)

    def sparsity(self, phase: str) -> float:
        """The mean over layers of the share of causal pairs that was skipped in ``prefill`` or ``decode``."""
        return sum(meter.sparsity(phase) for meter in self.meters) / max(len(self.meters), 1)

    def measured(self) -> dict[str, float]:
        """Sparsity by phase, the mean share of prompts kept in caches, the bytes read of caches in decoding, and the
        multiplications spent on choosing."""
        prompts = sum(meter.prompts for meter in self.meters)
        return {
            **{phase: self.sparsity(phase) for phase in PHASES},
            "cache": sum(meter.cache for meter in self.meters) / prompts if prompts else 1.0,
            "read": sum(meter.read for meter in self.meters),
            "index": sum(sum(meter.index.values()) for meter in self.meters),
        }

    def undo(self) -> None:
        """Restore the model's attention."""
        while self._undoing:
            self._undoing.pop()()


def sparsify(model: nn.Module, method: Method | str) -> Sparse:
    """Put a sparse method into every attention layer of a trained model, in place and without training.

    ::

        sparse = sparsify(model, "snapkv:capacity=256")
        model.generate(ids, max_new_tokens=20)
        sparse.sparsity("decode"), sparse.undo()

    Args:
        model: a :class:`regard.models.LanguageModel` whose layers are all ``softmax``, or a causal language model of
            transformers that dispatches through its attention interface, in evaluation mode.
        method: a method, or text for :func:`regard.compression.sparse.read_method`.

    Raises:
        Unsupported: for other models, and for layers whose attention is more than softmax (a window, a sink, a soft
            cap).
    """
    method = read_method(method) if isinstance(method, str) else method
    if is_sparse(model):
        raise Unsupported("a second sparse method in a model", supported="one at a time", nearest="undo() of the first")
    if isinstance(model, LanguageModel):
        return _in_own(model, method)
    if hasattr(model, "set_attn_implementation"):
        return _in_transformers(model, method)
    raise Unsupported(f"sparse attention in {an_instance(model)}", supported=KNOWN)


@contextmanager
def sparsely(model: nn.Module, method: Method | str) -> Iterator[Sparse]:
    """Apply :func:`sparsify` within the context."""
    sparse = sparsify(model, method)
    try:
        yield sparse
    finally:
        sparse.undo()


def is_sparse(model: nn.Module) -> bool:
    """Return whether a sparse method is in a model."""
    return any(
        isinstance(getattr(getattr(module, "config", None), "method", None), Method) for module in model.modules()
    )


def _in_own(model: LanguageModel, method: Method) -> Sparse:
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, AttentionLayer)]
    _check_found(model, found)
    for name, layer in found:
        plain = layer.card.name == "softmax" and layer.config == layer.card.options() and layer.projection is not None
        if not plain or layer.merge is not None or layer.positions.bias is not None:
            raise Unsupported(
                f"sparse attention in {name}, which is {layer.card.name} with {layer.config}, positions "
                f"{layer.positions.name}",
                supported="softmax without options, with positions that add nothing to its scores",
            )
        here = (layer.positions, *(() if model.positions is None else (model.positions,)))
        if method.places_keys and any(x.embed or x.prepare or x.rotate_keys for x in here):
            raise _unplaceable(name, f"{here[-1].name} positions")
    sparse, card = Sparse(model, method, len(found)), card_of(method)
    for number, (_, layer) in enumerate(found):
        config = _config(sparse, number)
        before = layer.card, layer.config, layer.projection, layer.places_keys
        layer.card, layer.config, layer.projection = card, config, None
        layer.places_keys = card.places_keys(layer.pattern)

        def undo(layer: Any = layer, before: tuple[Any, ...] = before) -> None:
            layer.card, layer.config, layer.projection, layer.places_keys = before

        sparse._undoing.append(undo)
    return sparse


def _in_transformers(model: Any, method: Method) -> Sparse:
    from regard.integrations.chosen import Chosen
    from regard.integrations.heads import HeadAttention
    from regard.integrations.swap import reader_of
    from regard.integrations.transformers import PLACE, RECORD, SWAPPED, check_interface, take_out
    from regard.integrations.transformers.attending import Placement, heads_of
    from regard.integrations.transformers.caches import keeps_every_key
    from regard.integrations.transformers.placing import place
    from regard.integrations.transformers.rotary import find_rotary

    check_interface(model)
    if model.config.is_encoder_decoder:
        raise Unsupported(f"sparse attention in {an_instance(model)}, which has an encoder", supported=KNOWN)
    if getattr(model.config, RECORD, None) is not None:
        raise Unsupported(
            f"sparse attention in {an_instance(model)} whose attention was swapped",
            supported="softmax",
            nearest="regard.unswap(model)",
        )
    found = [(name, module) for name, module in model.named_modules() if reader_of(module) is not None]
    _check_found(model, found)
    for name, module in found:
        index = getattr(module, "layer_idx", None)
        known = hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
        if index is None or not known or not keeps_every_key(module.config, index):
            raise Unsupported(
                f"sparse attention in {name}, {an_instance(module)}",
                supported="causal layers whose cache keeps every key and that have no window of their own",
            )
    rotaries = [find_rotary(model, *layer, heads_of) if method.places_keys else None for layer in found]
    for (name, module), rotary in zip(found, rotaries, strict=True):
        if method.places_keys and (rotary is None or not rotary.counts):
            why = (
                "no rotation of keys that could be left out" if rotary is None else "frequencies that follow the length"
            )
            raise _unplaceable(name, f"{an_instance(module)} and {why}")
    sparse = Sparse(model, method, len(found))
    before = model.config._attn_implementation
    for number, ((_, module), rotary) in enumerate(zip(found, rotaries, strict=True)):
        config, module_config = _config(sparse, number), module.config
        heads = module_config.num_attention_heads
        attend = HeadAttention(
            Chosen(card_of(method), config),
            dim=module_config.hidden_size,
            heads=heads,
            kv_heads=heads // getattr(module, "num_key_value_groups", 1),
            head_dim=getattr(module, "head_dim", None) or module_config.hidden_size // heads,
            pattern=Pattern.CAUSAL_SELF,
        )
        # without a rotary, the model rotates queries and keys before this point, as they are stored in a cache
        attend.placement = Placement.of(module, module.layer_idx, rotary, saved=False)
        place(module, attend.train(module.training))

        def undo(module: Any = module) -> None:
            take_out(module)
            delattr(module, PLACE)

        sparse._undoing.append(undo)
    model.set_attn_implementation(SWAPPED)
    sparse._undoing.append(lambda: model.set_attn_implementation(before))
    return sparse


def _config(sparse: Sparse, number: int) -> Config:
    meter = Meter()
    sparse.meters.append(meter)
    return Config(sparse.method, Place(number, sparse.layers, meter=meter))


def _unplaceable(name: str, found: str) -> Unsupported:
    return Unsupported(
        f"keys at their places in the cache in {name}, which has {found}",
        supported="rotary positions whose frequencies are the same at every length",
        nearest="streaming:positions=text",
    )


def _check_found(model: nn.Module, found: Sequence[Any]) -> None:
    if not found:
        raise Unsupported(f"sparse attention in {an_instance(model)} without attention layers", supported=KNOWN)
