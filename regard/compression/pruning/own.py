"""Cutting models of regard: the result is described by another plan, so that a saved model is an ordinary one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.compression.pruning.anatomy import KNOWN, Cut, Layer, Undo, check_cuts, left, spans
from regard.contract import Unsupported, an_instance
from regard.layers.attention import AttentionLayer
from regard.layers.feed_forward import MLP, SwiGLU
from regard.layers.linear import Linear
from regard.models import Encoder, LanguageModel
from regard.models.blocks import Block, NoMixer
from regard.models.placing import input_positions
from regard.models.stack import Stack

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

    def compact(self, cuts: Sequence[Cut]) -> Undo:
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
    if not isinstance(mixer, NoMixer):
        branches["attention"], ends["attention"] = mixer, block.mixer_end
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
            down = network.down
            neurons = down.in_features
    return Layer(name, block, heads, group, width, neurons, output, down, branches, ends, fixed=fixed)


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
        options |= sizes | ({"num_kv_heads": len(units)} if layer.group > 1 else {})
        options = {key: value for key, value in options.items() if key not in ("key_expand", "value_expand")}
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
