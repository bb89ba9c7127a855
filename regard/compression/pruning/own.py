"""Cutting models of regard: the result is described by another plan, so that a saved model is an ordinary one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.compression.pruning.anatomy import (
    KNOWN,
    Cut,
    Layer,
    Stream,
    Undo,
    assign,
    backwards,
    check_cuts,
    left,
    rows_of,
    spans,
)
from regard.contract import Unsupported, an_instance
from regard.layers.attention import AttentionLayer
from regard.layers.embedding import FactorisedEmbedding
from regard.layers.feed_forward import MLP, SwiGLU
from regard.layers.linear import Linear
from regard.layers.norms import LayerNorm, RMSNorm
from regard.layers.patches import FeatureEmbedding
from regard.layers.pooling import SIMPLE
from regard.models import Encoder, LanguageModel
from regard.models.blocks import Block, NoMixer
from regard.models.placing import input_positions
from regard.models.stack import Stack
from regard.positions.learned import Learned

HARD = "hard_softmax"
SHARED = (
    "query", "key", "value", "query_norm", "key_norm", "value_norm", "output_norm", "gate", "output", "positions",
    "convolutions",
)  # fmt: skip
"""Modules of an attention layer that its hard form shares."""


class OwnModel:
    """A LanguageModel or an Encoder."""

    def __init__(self, model: nn.Module) -> None:
        if type(model) not in (LanguageModel, Encoder):
            raise Unsupported(f"taking heads, neurons or layers out of {an_instance(model)}", supported=KNOWN)
        own: Any = model
        self.model = own
        if own.config.stack.share != "none":
            raise Unsupported(
                f"taking parts out of layers that share their {own.config.stack.share}",
                supported="layers with weights of their own",
            )
        self.layers = [_layer(f"blocks.{i}", block) for i, block in enumerate(own.blocks)]

    def harden(self, layer: int, keys: int) -> Undo:
        block = self.model.blocks[layer]
        old = block.mixer
        with torch.random.fork_rng(devices=[]):
            made: Any = Block(_hardened(block, keys), self.model.config, old.pattern).mixer
        for name in SHARED:  # the same modules, so that gates on them keep working
            setattr(made, name, getattr(old, name))
        block.mixer = made.train(old.training)
        return lambda: setattr(block, "mixer", old)

    def stream(self) -> Stream:
        model = self.model
        reason = next(filter(None, (_why_wide(model), *map(_why_layer_is_wide, self.layers))), "")
        if reason:
            raise Unsupported(
                f"a narrower residual stream in {an_instance(model)}: {reason}",
                supported="layers that end in plain projections, norms with weights, learned or rotary positions",
            )
        norms = [model.norm]
        for block, layer in zip(model.blocks, self.layers, strict=True):
            norms += [block.mixer_norm] if "attention" in layer.branches else []
            norms += [block.feed_forward_norm] if "feed_forward" in layer.branches else []
        scales = [pair for layer in self.layers for linear in layer.last.values() for pair in rows_of(linear)]
        start = model.embedding_norm
        if isinstance(start, nn.Identity):
            starts = [start]
            scales += _start(model)
            scaled = norms[1:] if self._tied() else norms
        else:
            starts, norms = [], [*norms, start]
            scaled = norms
        scales += [pair for norm in scaled for pair in rows_of(norm)]
        return Stream(model.config.dim, starts, norms, scales)

    def _tied(self) -> bool:
        return self.model.head is None

    def compact(self, cuts: Sequence[Cut], hidden: Sequence[int] = ()) -> Undo:
        kept = self.stream().without(hidden) if hidden else None
        undo = [self._compact(cuts)]
        if kept is not None:
            try:
                undo.append(self._narrow(kept))
            except Unsupported:
                undo[0]()
                raise
        return backwards(undo)

    def _narrow(self, kept: Tensor) -> Undo:
        """Replace the parts of the model by those of one with a narrower stream."""
        model, config = self.model, self.model.config
        plan = tuple(_explicit(block) for block in model.blocks)
        narrow = replace(config, dim=len(kept), plan=plan)
        with torch.random.fork_rng(devices=[]):
            made: Any = type(model)(narrow)
        old, tensors = model.state_dict(), {}
        for name, tensor in made.state_dict().items():
            found = old[name]
            for axis, (before, after) in enumerate(zip(found.shape, tensor.shape, strict=True)):
                if before != after:
                    if (before, after) != (config.dim, len(kept)):
                        raise Unsupported(
                            f"a narrower residual stream beside {name} of shape {tuple(found.shape)}",
                            supported="parameters that are as wide as the stream, or independent of it",
                        )
                    found = found.index_select(axis, kept.to(found.device))
            tensors[name] = found.clone()
        if self._tied():  # logits are divided by the root of the width
            for name, _ in made.norm.named_parameters():
                tensors[f"norm.{name}"] *= (len(kept) / config.dim) ** 0.5
        made.load_state_dict(tensors, assign=True)
        learned = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(learned[name])
        made.train(model.training)
        undo = [assign(model, name, child) for name, child in made.named_children()]
        return backwards([*undo, assign(model, "config", narrow)])

    def _compact(self, cuts: Sequence[Cut]) -> Undo:
        model, config, blocks = self.model, self.model.config, self.model.blocks
        made: list[Any] = []
        for block, layer, cut in zip(blocks, self.layers, check_cuts(self.layers, cuts), strict=True):
            made.append(block if cut == Cut().settled(layer) else _cut(block, layer, cut, config))
        kept = [block for block in made if not _is_empty(block)] or made[-1:]
        plan = tuple(block.entry for block in kept)
        if config.stack.exits or input_positions(plan, config.positions) != input_positions(
            tuple(block.entry for block in made), config.positions
        ):
            kept, plan = made, tuple(block.entry for block in made)
        model.blocks = Stack(kept, config.stack)
        model.blocks.training = blocks.training
        model.config = replace(config, plan=plan, num_layers=len(plan))

        def undo() -> None:
            model.blocks, model.config = blocks, config

        return undo


def _layer(name: str, block: Any) -> Layer:
    mixer, network = block.mixer, block.feed_forward
    fixed: dict[str, str] = {}
    output: Any = None
    down: Any = None
    heads, group, width, neurons = 0, 1, 0, 0
    branches, ends = {}, {}
    last: dict[str, Any] = {}
    if not isinstance(mixer, NoMixer):
        branches["attention"], ends["attention"] = mixer, block.mixer_end
        if type(mixer) is AttentionLayer and _is_plain(mixer.output):
            last["attention"] = mixer.output
        reason = _why_heads_stay(block)
        if reason:
            fixed["heads"] = reason
        else:
            heads, group, width, output = (
                mixer.kv_heads,
                mixer.num_heads // mixer.kv_heads,
                mixer.value_dim,
                mixer.output,
            )
    if network is not None:
        branches["feed_forward"], ends["feed_forward"] = network, block.feed_forward_end
        if type(network) is not MLP and not isinstance(network, SwiGLU):
            fixed["neurons"] = f"{an_instance(network)} has no hidden width"
        elif not all(_is_plain(linear) for linear in network.children()):
            fixed["neurons"] = "its projections are not plain"
        else:
            down = last["feed_forward"] = network.down
            neurons = down.in_features
    return Layer(name, block, heads, group, width, neurons, output, down, branches, ends, last, fixed=fixed)


def _why_heads_stay(block: Any) -> str:
    mixer = block.mixer
    name = block.entry[0]
    if type(mixer) is not AttentionLayer:
        return f"a layer of {name} has no heads of its own"
    own = [module for module in (mixer.projection, mixer.merge) if module is not None]
    if any(list(module.parameters()) + list(module.buffers()) for module in own) or mixer.merge is not None:
        return f"{name} has parameters in addition to its heads"
    if mixer.positions.bias is not None or list(mixer.positions.parameters()):
        return f"{mixer.positions.name} positions differ from head to head"
    if len(mixer.convolutions):
        return "its queries, keys and values pass a convolution"
    gate = [] if mixer.gate is None else list(mixer.gate.modules())
    linears = [
        mixer.query,
        mixer.key,
        mixer.value,
        mixer.output,
        *(m for m in gate if not isinstance(m, nn.Sequential)),
    ]
    return "" if all(_is_plain(linear) for linear in linears) else "its projections are not plain"


def _why_wide(model: Any) -> str:
    """Why the parts of a model beside its layers need the whole stream; empty if they do not."""
    config = model.config
    if config.stack.exits or config.stack.branch_norm != "none":
        return "it has norms of exits or of branches"
    if getattr(config, "pool", "none") not in (*SIMPLE, "none"):
        return f"the pool {config.pool} has a width of its own"
    if model.positions is not None and type(model.positions) is not Learned:
        return f"{model.positions.name} positions are made for its width"
    norms = [
        model.norm,
        *(getattr(block, name) for block in model.blocks for name in ("mixer_norm", "feed_forward_norm")),
    ]
    if not isinstance(model.embedding_norm, nn.Identity):
        norms.append(model.embedding_norm)
    if any(not isinstance(norm, nn.Identity) and not _has_weight(norm) for norm in norms if norm is not None):
        return "its norms have no weights"
    return "it has no norms" if isinstance(model.norm, nn.Identity) else ""


def _has_weight(norm: nn.Module) -> bool:
    return isinstance(norm, RMSNorm | LayerNorm) and norm.weight is not None


def _why_layer_is_wide(layer: Layer) -> str:
    for branch, module in layer.branches.items():
        if branch not in layer.last:
            return f"{an_instance(module)} in {layer.name} ends in no plain projection"
    return ""


def _start(model: Any) -> list[tuple[nn.Parameter, int]]:
    """The parameters of the embedding and its positions, with the axis of the stream."""
    embedding = model.embedding
    positions = [] if model.positions is None else [(model.positions.table, 1)]
    if isinstance(embedding, FactorisedEmbedding | FeatureEmbedding):
        last = embedding.up if isinstance(embedding, FactorisedEmbedding) else embedding.projection
        return [*rows_of(last), *positions]
    return [(embedding.weight, 1), *positions]


def _explicit(block: Any) -> tuple[str, dict[str, Any]]:
    """The entry of a block, with the widths that otherwise follow from that of the stream."""
    (name, options), mixer, network = block.entry, block.mixer, block.feed_forward
    options = dict(options)
    if not isinstance(mixer, NoMixer):
        options = _of_own_width(options) | {"head_dim": mixer.head_dim, "value_dim": mixer.value_dim}
    return name, options if network is None else options | {"feed_forward": network.down.in_features}


def _of_own_width(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in ("key_expand", "value_expand")}


def _is_plain(module: Any) -> bool:
    return type(module) in (nn.Linear, Linear)


def _is_empty(block: Any) -> bool:
    return isinstance(block.mixer, NoMixer) and block.feed_forward is None


def _cut(block: Any, layer: Layer, cut: Cut, config: Any) -> Block:
    name, options = block.entry[0], dict(block.entry[1])
    axes: dict[str, tuple[int, Tensor]] = {}
    silent: list[str] = []
    if cut.attention:
        options = {key: value for key, value in options.items() if key.startswith("feed_forward")} | {"num_heads": 0}
    elif cut.heads:
        mixer = block.mixer
        units, counts = left(layer.units, cut.heads)
        queries = spans(units, layer.group * mixer.head_dim)
        outputs = layer.columns(units)
        axes |= {"mixer.query": (0, queries), "mixer.key": (0, spans(units, mixer.head_dim))}
        axes |= {"mixer.value": (0, spans(units, mixer.value_dim)), "mixer.output": (1, outputs)}
        axes["mixer.gate" if isinstance(mixer.gate, nn.Linear) else "mixer.gate.1"] = (0, outputs)
        silent += [] if counts else ["mixer.output"]
        sizes = {"num_heads": layer.group * len(units), "head_dim": mixer.head_dim, "value_dim": mixer.value_dim}
        options = _of_own_width(options) | sizes | ({"num_kv_heads": len(units)} if layer.group > 1 else {})
        if layer.group == 1 and config.num_kv_heads is not None:
            options["num_kv_heads"] = len(units)
    if cut.feed_forward:
        options = {key: value for key, value in options.items() if not key.startswith("feed_forward")}
        options["feed_forward"] = 0
    elif cut.neurons:
        neurons, counts = left(layer.neurons, cut.neurons)
        kept = torch.tensor(neurons)
        axes |= {"feed_forward.up": (0, kept), "feed_forward.gate": (0, kept), "feed_forward.down": (1, kept)}
        silent += [] if counts else ["feed_forward.down"]
        options["feed_forward"] = len(neurons)
    if cut.hard is not None:
        name, options = _hardened_entry(name, options, cut.hard)
    return _copied(block, (name, options), config, axes, silent)


def _hardened(block: Any, keys: int) -> tuple[str, dict[str, Any]]:
    mixer, (name, options) = block.mixer, block.entry
    if not isinstance(mixer, AttentionLayer) or mixer.card.name != "softmax" or mixer.config != mixer.card.options():
        raise Unsupported(f"hard attention in a layer of {name}", supported="softmax without options of its own")
    return _hardened_entry(name, dict(options), keys)


def _hardened_entry(name: str, options: dict[str, Any], keys: int) -> tuple[str, dict[str, Any]]:
    return HARD, {**options, "keys": keys}


def _copied(
    block: Any,
    entry: tuple[str, dict[str, Any]],
    config: Any,
    axes: dict[str, tuple[int, Tensor]] | None = None,
    silent: Sequence[str] = (),
) -> Block:
    """A block for another entry with the weights of `block`, or with chosen rows (axis 0) or columns (axis 1)."""
    pattern = config.serves[0][0]
    with torch.random.fork_rng(devices=[]):
        made: Any = Block(entry, config, pattern)
    old = block.state_dict()
    tensors = {}
    for name, tensor in made.state_dict().items():
        module, _, leaf = name.rpartition(".")
        found = old[name]
        axis, index = (axes or {}).get(module, (None, None))
        if index is not None and axis is not None and axis < found.ndim and (axis == 0 or leaf == "weight"):
            found = found.index_select(axis, index.to(found.device))
        if module in silent and leaf == "weight":
            found = torch.zeros_like(found)
        tensors[name] = found.clone()
        assert tensors[name].shape == tensor.shape, f"{name}: {tuple(found.shape)} for {tuple(tensor.shape)}"
    made.load_state_dict(tensors, assign=True)
    learned = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(learned[name])
    return made.train(block.training)


def _pattern(config: Any) -> Any:
    return config.serves[0][0]
