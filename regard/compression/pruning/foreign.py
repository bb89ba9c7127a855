"""Cutting models of transformers: causal language models like Llama, encoders like BERT, and those of :data:`FAMILIES`.

If all layers keep the same sizes, and the model's config can express them, the config records them, and transformers
alone can load the saved model. Otherwise :mod:`regard.compression.pruning.records` records them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.compression.pruning.anatomy import (
    BRANCHES,
    KNOWN,
    Cut,
    Layer,
    NoBranch,
    Stream,
    Undo,
    assign,
    backwards,
    check_cuts,
    left,
    put,
    rows_of,
    smaller,
    spans,
    staying,
)
from regard.compression.pruning.hard import attends_by_interface
from regard.compression.pruning.records import check_whole, entry_of, note, why_not_built
from regard.contract import Unsupported, an_instance
from regard.integrations.conv1d import has_conv1d
from regard.layers.linear import Linear


@dataclass(frozen=True)
class Family:
    """The paths of a layer's parts, relative to the layer.

    Attributes:
        query, key, value, output: projections of its attention; three times the same for one that computes all of them.
        up, down: projections of its feed-forward network.
        attention: the module of its attention.
        feed_forward: modules of its feed-forward network.
        kind: class of the layers; any class when empty.
        fused: order of the rows of one projection for queries, keys and values: ``parts``, one after another, or
            ``heads``, the three of each head together; empty for three projections.
        post_norm: whether a norm follows the residual sum of a branch, and so stays when the branch is removed.
        norms: these norms, where they are inside the branches' modules.
        neurons: the config's name for the hidden width of the feed-forward network.
    """

    query: str
    key: str
    value: str
    output: str
    up: tuple[str, ...]
    down: str
    attention: str
    feed_forward: tuple[str, ...]
    kind: str = ""
    fused: str = ""
    post_norm: bool = False
    norms: tuple[str, ...] = ()
    neurons: str = "intermediate_size"

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all linear layers."""
        return (self.query, self.key, self.value, self.output, *self.up, self.down)

    def belongs(self, layer: nn.Module) -> bool:
        """Return whether a layer is of the class that the family asks for."""
        return self.kind in ("", type(layer).__name__)

    def values_in(self, projected: Tensor, width: int) -> Tensor:
        """The values of `width` of each head, (B, G, N, width), in what the projection to values computes, (B, N, ...)."""
        if self.fused == "parts":
            projected = projected.chunk(3, -1)[-1]
        heads = projected.unflatten(-1, (-1, 3 * width if self.fused == "heads" else width))
        return heads[..., -width:].transpose(1, 2)


OPT = Family(
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    ("fc1",),
    "fc2",
    "self_attn",
    ("fc1", "fc2"),
    kind="OPTDecoderLayer",
    neurons="ffn_dim",
)

FAMILIES = {
    "decoder": Family(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
        "self_attn",
        ("mlp",),
    ),
    "encoder": Family(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        ("intermediate.dense",),
        "output.dense",
        "attention",
        ("intermediate", "output"),
        post_norm=True,
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
    ),
    "gpt2": Family(
        "attn.c_attn",
        "attn.c_attn",
        "attn.c_attn",
        "attn.c_proj",
        ("mlp.c_fc",),
        "mlp.c_proj",
        "attn",
        ("mlp",),
        kind="GPT2Block",
        fused="parts",
        neurons="n_inner",
    ),
    "gpt_neox": Family(
        "attention.query_key_value",
        "attention.query_key_value",
        "attention.query_key_value",
        "attention.dense",
        ("mlp.dense_h_to_4h",),
        "mlp.dense_4h_to_h",
        "attention",
        ("mlp",),
        kind="GPTNeoXLayer",
        fused="heads",
    ),
    "opt": OPT,
    "opt, norms after": replace(OPT, post_norm=True),
    "distilbert": Family(
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        ("ffn.lin1",),
        "ffn.lin2",
        "attention",
        ("ffn",),
        kind="TransformerBlock",
        post_norm=True,
        neurons="hidden_dim",
    ),
}
"""The layers that can be cut: any with these paths, unless `kind` names their class."""

TABLES = ("Embedding", "OPTLearnedPositionalEmbedding")
"""Classes of embeddings that look up rows of a table, and do nothing else."""

WIDTHS = ("head_dim", "attention_head_size", "head_size")
"""Names that attention modules have for the width of a head."""

SIZES = {0: ("out_features", "normalized_shape"), 1: ("in_features", "embedding_dim")}
"""Attributes of modules that tell the size of each axis of their weights."""

NOT_OF_LAYERS = re.compile("token|architectures")
"""Lists of a config that are not one entry per layer, even where they are as long."""


class NoAttention(nn.Module):
    """Replacement for removed attention: returns 0. A cache still counts its tokens."""

    def __init__(self, layer_idx: int | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *_: Any, **more: Any) -> tuple[Tensor, None]:
        from regard.integrations.transformers.attending import CACHES

        cache = next((more[name] for name in CACHES if more.get(name) is not None), None)
        if cache is not None and self.layer_idx is not None:
            counted = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(counted, counted, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NormAlone(nn.Module):
    """Replacement for a branch and the norm after it: only the norm is left."""

    def __init__(self, norm: nn.Module, *, attention: bool) -> None:
        super().__init__()
        self.LayerNorm, self.attention = norm, attention

    def forward(self, hidden_states: Tensor, *more: Any, **_: Any) -> Any:
        if self.attention:
            return self.LayerNorm(hidden_states), None
        return self.LayerNorm(more[0])

    def set_attention_type(self, value: str, layer_idx: int | None = None) -> None:
        """BigBird tells its attention which kind it is to be."""


class TransformersModel:
    """A model of transformers whose layers belong to one of :data:`FAMILIES`."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        check_whole(model)
        if getattr(self.model.config, "scale_attn_by_inverse_layer_idx", False):
            raise Unsupported(
                f"taking heads, neurons or layers out of {an_instance(model)} whose scores are divided by the layer's number",
                supported="scale_attn_by_inverse_layer_idx=False",
            )
        found = [
            (name, family, stack)
            for name, stack in model.named_modules()
            for family in FAMILIES
            if isinstance(stack, nn.ModuleList) and len(stack) and all(_fits(layer, family) for layer in stack)
        ]
        if len(found) != 1:
            raise Unsupported(
                f"taking heads, neurons or layers out of {an_instance(model)} with {len(found)} stacks of known layers",
                supported=KNOWN,
                nearest="find_host within conv1d_as_linear(model)" if has_conv1d(model) else "",
            )
        self.path, self.kind, self.stack = found[0]
        self.family = FAMILIES[self.kind]
        self.layers = [_layer(f"{self.path}.{i}", layer, self.family) for i, layer in enumerate(self.stack)]

    def harden(self, layer: int, keys: int) -> Undo:
        from regard.compression.pruning.hard import harden_module

        return harden_module(self.layers[layer].module.get_submodule(_attends(self.family)), keys)

    def stream(self) -> Stream:
        model, tables, norms, reader = self.model, self._tables(), self._norms(), self._reader()
        width = model.config.hidden_size
        if any(type(table).__name__ not in TABLES or table.embedding_dim != width for table in tables):
            raise self._wide("its embeddings are multiplied, or of another width")
        if reader is None:
            raise self._wide("its answers are the hidden states, or a head has some of its own")
        shapes = [[parameter.shape for parameter in norm.parameters(recurse=False)] for norm in norms]
        if not all(found and set(found) == {(width,)} for found in shapes):
            raise self._wide("some of its norms have no weights, or another width")
        scales = [pair for layer in self.layers for linear in layer.last.values() for pair in rows_of(linear)]
        inside = set(self.stack.modules())
        outside = [norm for norm in norms if norm not in inside]
        starts = [] if self.family.post_norm and outside else tables
        scales += [(table.weight, 1) for table in starts]
        tied = any(reader.weight is table.weight for table in starts)
        scales += [pair for norm in norms if norm in inside or not tied for pair in rows_of(norm)]
        return Stream(width, starts, norms, scales)

    def _wide(self, reason: str) -> Unsupported:
        return Unsupported(
            f"a narrower residual stream in {an_instance(self.model)}: {reason}",
            supported="causal language models, and classifiers, like Llama, GPT-2, OPT or BERT",
        )

    def _outside(self) -> list[nn.Module]:
        inside = set(self.stack.modules())
        return [module for module in self.model.modules() if module not in inside]

    def _tables(self) -> list[Any]:
        return [module for module in self._outside() if isinstance(module, nn.Embedding)]

    def _norms(self) -> list[nn.Module]:
        """The norms over the stream: all but those inside of attention."""
        own = _attends(self.family) + "."
        layers = [m for layer in self.stack for name, m in layer.named_modules() if not name.startswith(own)]
        return [module for module in (*layers, *self._outside()) if "Norm" in type(module).__name__]

    def _reader(self) -> nn.Linear | None:
        """The projection that reads the last hidden states; None if something else does."""
        model, width = self.model, self.model.config.hidden_size
        if model.base_model is model or (self.family.post_norm and model.get_output_embeddings() is not None):
            return None
        linears = [module for module in self._outside() if isinstance(module, nn.Linear)]
        return next((linear for linear in linears if linear.in_features == width), None)

    def _narrow(self, kept: Tensor) -> Iterator[Undo]:
        """Select dimensions of the stream in all parameters, keeping those shared that are."""
        family, made = self.family, dict[nn.Parameter, nn.Parameter]()
        readers, writers = (family.query, family.key, family.value, *family.up), (family.output, family.down)
        places: list[tuple[Any, int]] = [(self._reader(), 1), *((table, 1) for table in self._tables())]
        places += [(norm, 0) for norm in self._norms()]
        for layer in self.stack:
            places += [(layer.get_submodule(path), 1) for path in dict.fromkeys(readers)]
            places += [(layer.get_submodule(path), 0) for path in writers]
        for module, axis in places:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if axis < parameter.ndim:
                    if parameter not in made:
                        chosen = parameter.detach().index_select(axis, kept.to(parameter.device))
                        made[parameter] = nn.Parameter(chosen, requires_grad=parameter.requires_grad)
                    yield assign(module, name, made[parameter])
            for name in SIZES[axis]:
                if hasattr(module, name):
                    size = (len(kept),) if name == "normalized_shape" else len(kept)
                    yield assign(module, name, size)

    def compact(self, cuts: Sequence[Cut], hidden: Sequence[int] = ()) -> Undo:
        settled = check_cuts(self.layers, cuts)
        kept = staying(settled)
        width = self.stream().without(hidden) if hidden else None
        undo: list[Undo] = []
        try:
            if width is not None:
                undo.extend(self._narrow(width))
            for number in kept:
                undo.extend(self._cut(number, settled[number]))
        except (AttributeError, RuntimeError, TypeError):  # a layer that lacks something of its family
            backwards(undo)()
            raise
        if len(kept) < len(settled):
            undo += self._keep_layers(kept)
        hidden_size = None if width is None else len(width)
        undo += self._describe([settled[i] for i in kept], [self.layers[i] for i in kept], hidden_size)
        return backwards(undo)

    def _cut(self, number: int, cut: Cut) -> Iterator[Undo]:
        layer, family = self.layers[number], self.family
        module: Any = layer.module
        if cut.attention:
            old = module.get_submodule(family.attention)
            if family.norms:
                new: nn.Module = NormAlone(module.get_submodule(family.norms[0]), attention=True)
            else:
                new = NoAttention(getattr(old, "layer_idx", None))
            yield put(module, family.attention, new.train(old.training))
        elif cut.heads:
            units, counts = left(layer.units, cut.heads)
            for path, rows in _rows(layer, family, units).items():
                yield put(module, path, smaller(module.get_submodule(path), rows=rows))
            attention = module.get_submodule(_attends(family))
            heads = len(units) * layer.group
            for name, count in (("num_heads", heads), ("split_size", heads * layer.width)):
                if hasattr(attention, name):
                    yield assign(attention, name, count)
            output = smaller(layer.output, columns=layer.columns(units), silent=not counts)  # type: ignore[arg-type]
            yield put(module, family.output, output)
        if cut.feed_forward:
            yield from self._without_network(module)
        elif cut.neurons:
            neurons, counts = left(layer.neurons, cut.neurons)
            kept = torch.tensor(neurons)
            for path in family.up:
                yield put(module, path, smaller(module.get_submodule(path), rows=kept))
            down = smaller(module.get_submodule(family.down), columns=kept, silent=not counts)
            yield put(module, family.down, down)
        if cut.hard is not None:
            yield self.harden(number, cut.hard)

    def _without_network(self, module: Any) -> Iterator[Undo]:
        norms, (*first, last) = self.family.norms, self.family.feed_forward
        new = NormAlone(module.get_submodule(norms[1]), attention=False) if norms else NoBranch()
        for path in first:
            yield put(module, path, nn.Identity())
        yield put(module, last, new.train(module.training))

    def _keep_layers(self, kept: list[int]) -> list[Undo]:
        layers, config = self.stack, self.model.config
        parent, _, name = self.path.rpartition(".")
        undo: list[Undo] = [put(self.model.get_submodule(parent), name, nn.ModuleList(layers[i] for i in kept))]
        for new, old in enumerate(kept):
            for module in layers[old].modules():
                if getattr(module, "layer_idx", None) is not None:
                    undo.append(assign(module, "layer_idx", new))
        undo += [
            assign(config, one, [found[i] for i in kept])
            for one, found in list(vars(config).items())
            if isinstance(found, list | tuple) and len(found) == len(layers) and not NOT_OF_LAYERS.search(one)
        ]
        return [*undo, assign(config, "num_hidden_layers", len(kept))]

    def _describe(self, cuts: list[Cut], layers: list[Layer], hidden: int | None) -> list[Undo]:
        """Record what is left in the config, or else in a separate record."""
        entries = [entry_of(cut, layer) for cut, layer in zip(cuts, layers, strict=True)]
        same = all(entry == entries[0] for entry in entries)
        whole = not cuts[0].attention and not cuts[0].feed_forward and cuts[0].hard is None
        config, first = self.model.config, layers[0]
        pruned = entries[0]["units"] != first.units
        heads = entries[0]["units"] * first.group
        own_width = not self.family.post_norm and getattr(config, "head_dim", None) is not None
        sized = own_width and (hidden or config.hidden_size) % heads == 0  # transformers refuses other configs
        resized = pruned or hidden is not None
        if same and whole and (sized or not resized):
            undo = [assign(config, self.family.neurons, entries[0]["neurons"])]
            if hidden is not None:
                undo.append(assign(config, "hidden_size", hidden))
            if pruned:
                undo.append(assign(config, "num_attention_heads", heads))
                undo.append(assign(config, "num_key_value_heads", entries[0]["units"]))
            if resized and why_not_built(self.model) is not None:  # layers of this kind ignore head_dim
                backwards(undo)()
                return [note(self.model, entries, hidden)]
            return undo
        return [note(self.model, entries, hidden)]


def _fits(layer: nn.Module, name: str) -> bool:
    family = FAMILIES[name]
    try:
        found = [layer.get_submodule(path) for path in family.paths]
    except AttributeError:
        return False
    if not family.belongs(layer) or hasattr(layer, "crossattention"):
        return False
    norms_before = getattr(layer, "do_layer_norm_before", not family.post_norm)
    return norms_before is not family.post_norm and all(type(module) in (nn.Linear, Linear) for module in found)


def _rows(layer: Layer, family: Family, units: Sequence[int]) -> dict[str, Tensor]:
    """The rows of the projections of queries, keys and values that belong to units of attention, by path."""
    if family.fused == "heads":
        return {family.query: spans(units, 3 * layer.width)}
    if family.fused:
        own = spans(units, layer.width)
        return {family.query: torch.cat([own + part * layer.units * layer.width for part in range(3)])}
    key: Any = layer.module.get_submodule(family.key)
    size = key.out_features // layer.units
    sizes = {family.query: size * layer.group, family.key: size, family.value: layer.width}
    return {path: spans(units, size) for path, size in sizes.items()}


def _attends(family: Family) -> str:
    return family.query.rpartition(".")[0]


def _layer(name: str, module: Any, family: Family) -> Layer:
    attention = module.get_submodule(_attends(family))
    width = next(size for one in WIDTHS if (size := getattr(attention, one, None)))
    query, key, down = (module.get_submodule(path) for path in (family.query, family.key, family.down))
    units = key.out_features // (3 * width if family.fused else width)
    output = module.get_submodule(family.output)
    networks = [module.get_submodule(path) for path in family.feed_forward]
    fixed: dict[str, str] = {}
    if family.post_norm and not attends_by_interface(attention):
        fixed["heads"] = f"{an_instance(attention)} does not attend through transformers' attention interface"
    if family.norms and (reason := _unlike_bert(module)):
        fixed |= dict.fromkeys(BRANCHES, reason)
    last = dict(zip(BRANCHES, (output, down), strict=True))
    return Layer(
        name,
        module,
        units,
        query.out_features // key.out_features,
        width,
        down.in_features,
        output,
        down,
        {"attention": module.get_submodule(family.attention), "feed_forward": nn.ModuleList(networks)},
        last,
        last,
        family.post_norm,
        fixed,
    )


def _unlike_bert(layer: Any) -> str:
    """Why the norm alone cannot take the place of an encoder layer's branch and its norm; empty if it can."""
    if not all(hasattr(part, "LayerNorm") for part in (layer.attention.output, layer.output)):
        return "its norms come before its branches"
    if hasattr(layer, "set_attention_type"):
        return f"{an_instance(layer)} chooses its attention by the length of inputs"
    call = inspect.signature(layer.attention.forward)
    if next(iter(call.parameters)) != "hidden_states":
        return f"{an_instance(layer.attention)} is given more than hidden states"
    if call.return_annotation in (Tensor, "torch.Tensor", "Tensor"):
        return f"{an_instance(layer.attention)} returns no weights"
    return ""
