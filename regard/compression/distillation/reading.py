"""What the layers of a model compute in a call, read while it runs, and the losses that compare a student's with a teacher's.

| kind | what is compared, by which loss | layers |
|---|---|---|
| ``features`` | hidden states: :func:`feature_loss` relative to the mean square of the teacher's | pairs at the same relative depth |
| ``patient`` | directions of hidden states: :func:`patient_loss`, PKD | the same pairs without the last |
| ``attention`` | attention weights: :func:`attention_transfer_loss`, MobileBERT | pairs at the same relative depth |
| ``relation`` | attention weights and relations of values: :func:`attention_transfer_loss` + :func:`relation_loss`, MiniLM | the last of both |

Hidden states are those of all tokens that are no padding; in ``patient`` of the first token alone where the answer is read
there, as in classifiers like BERT. Those of another width than the teacher's pass a linear map first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.compression.distillation.losses import (
    attention_transfer_loss,
    feature_loss,
    patient_loss,
    relation_loss,
)
from regard.compression.layers import comes_from_transformers
from regard.compression.pruning.foreign import FAMILIES, WIDTHS, Family
from regard.contract import Context, Mechanism, Result, Unsupported, an_instance
from regard.core.precision import wide
from regard.layers.attention import AttentionLayer
from regard.models import Encoder, LanguageModel
from regard.models.blocks import valid_tokens

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

OF_STATES = ("features", "patient")
"""Kinds that compare hidden states."""
OF_ATTENTION = ("attention", "relation")
"""Kinds that compare what is inside of attention."""
KINDS = ("response", *OF_STATES, *OF_ATTENTION)
"""What a student learns from; ``response`` is the answers alone."""

SOFTMAX = ("softmax", "local", "block_sparse", "selective_temperature", "adaptive_span")
"""Mechanisms whose weights are read: those of a query sum to 1."""
OTHER_PASSES = ("reversible", "checkpoint_layers", "exits")
"""Options of a stack whose layers do not run one after the other in the model's own call."""
READABLE = "LanguageModel and Encoder of regard; transformers models with layers as those of Llama, BERT, DistilBERT, GPT-2, GPT-NeoX or OPT"


@dataclass
class Seen:
    """What the layers of a model computed, the first layer first; a kind of loss needs only some of it.

    Attributes:
        hidden: hidden states after each layer, (B, N, C).
        weights: attention weights, (B, H, N, N).
        values: by head, (B, G, N, V).
        valid: tokens that are no padding, (B, N); None if all are.
        first: whether the answer is read at the first token.
    """

    hidden: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    valid: Bool[Tensor, "b n"] | None = None
    first: bool = False


@contextmanager
def reading(model: nn.Module, kind: str) -> Iterator[Seen]:
    """Read what a kind of loss compares, in one call of a model within the context; nothing for ``response``.

    A model of transformers computes its attention eagerly meanwhile, so it must not run in another thread.

    Raises:
        Unsupported: for models whose layers cannot be read.
    """
    seen = Seen()
    if kind == "response":
        yield seen
        return
    layers, own = layers_of(model, kind), comes_from_transformers(model)
    with ExitStack() as undo:
        asked = (model if own else layers[0]).register_forward_pre_hook(partial(_note_padding, seen), with_kwargs=True)
        undo.callback(asked.remove)
        if kind in OF_STATES:
            seen.first = _reads_first(model)
            for layer in layers:
                undo.callback(layer.register_forward_hook(partial(_note_hidden, seen)).remove)
        elif own:
            attentions = _attentions(model, layers, kind)
            undo.enter_context(_eager(model))
            for attention, (value, family) in attentions.items():
                undo.callback(attention.register_forward_hook(partial(_note_weights, seen)).remove)
                undo.callback(value.register_forward_hook(partial(_note_values, seen, attention, family)).remove)
        else:
            for mixer in _mixers(model, layers, kind):
                mixer.mix = partial(_mix, seen, mixer.mix)
                undo.callback(vars(mixer).__delitem__, "mix")
        yield seen
    if not (seen.hidden if kind in OF_STATES else seen.weights):
        raise Unsupported(
            f"kind={kind} of {an_instance(model)}, whose layers do not run as modules one after the other",
            supported=READABLE,
            nearest="kind=response",
        )


def layers_of(model: nn.Module, kind: str) -> list[nn.Module]:
    """The largest sequence of modules of one class; raises Unsupported if there is none."""
    rows = [
        list(row)
        for row in model.modules()
        if isinstance(row, nn.ModuleList | nn.Sequential) and len({type(layer) for layer in row}) == 1
    ]
    if not rows:
        raise Unsupported(
            f"kind={kind} of {an_instance(model)} without a row of layers",
            supported="kind=response",
            nearest="kind=response",
        )
    return max(rows, key=lambda row: sum(parameter.numel() for layer in row for parameter in layer.parameters()))


def layer_pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """The layer of the teacher at the same relative depth as each layer of the student, both counted from 0; see
    :func:`patient_layers`, of which it is the strategy ``skip`` for any numbers of layers."""
    return [(i, max((i + 1) * teacher // student, 1) - 1) for i in range(student)]


def layers_loss(
    kind: str, own: Seen, told: Seen, projection: Float[Tensor, "c d"] | None = None
) -> Float[Tensor, ""] | float:
    """The loss of a kind, averaged over its pairs of layers; 0 for ``response``.

    Args:
        own, told: what the layers of the student and of the teacher computed for the same inputs.
        projection: from the width of the student's hidden states to that of the teacher's.

    Raises:
        Unsupported: for layers that cannot be compared.
    """
    if kind == "response":
        return 0.0
    if kind == "relation":
        return _related(own, told)
    if kind == "attention":
        found = [_attended(own, told, *pair) for pair in layer_pairs(len(own.weights), len(told.weights))]
        return torch.stack(found).mean()
    pairs = layer_pairs(len(own.hidden), len(told.hidden))
    if kind == "patient":
        pairs = pairs[:-1]  # the last layer is left to the loss on the answers
        if not pairs:
            raise Unsupported(
                "kind=patient of a student of one layer, which has none before the last",
                supported="2 layers or more",
                nearest="kind=response",
            )
    chosen = _directed if kind == "patient" else _of_tokens
    ours = [chosen(own.hidden[i], own) for i, _ in pairs]
    theirs = [chosen(told.hidden[j], own) for _, j in pairs]
    if projection is not None:
        ours = [x @ projection.to(x.dtype) for x in ours]
    for (i, j), x, y in zip(pairs, ours, theirs, strict=True):
        if x.shape != y.shape:
            raise Unsupported(
                f"kind={kind} of hidden states of shape {tuple(own.hidden[i].shape)}, to learn from "
                f"{tuple(told.hidden[j].shape)}",
                supported="equal shapes; other widths of tokens if all layers of a model have one width",
                nearest="kind=response",
            )
    if kind == "patient":
        return patient_loss(ours, theirs)
    return torch.stack([feature_loss(x, y) / y.square().mean() for x, y in zip(ours, theirs, strict=True)]).mean()


@torch.no_grad()
def first_projection(kind: str, own: Seen, told: Seen) -> Float[Tensor, "c d"] | None:
    """The linear map from a student's hidden states that comes nearest to the teacher's, by least squares with a little
    damping; None if their widths are equal or change from layer to layer, and for kinds that compare none."""
    if kind not in OF_STATES or own.hidden[-1].shape[-1] == told.hidden[-1].shape[-1]:
        return None
    if any(x.shape != layers.hidden[-1].shape for layers in (own, told) for x in layers.hidden):
        return None
    if own.hidden[-1].ndim != 3 or own.hidden[-1].shape[:2] != told.hidden[-1].shape[:2]:
        return None
    pairs = layer_pairs(len(own.hidden), len(told.hidden))
    x = torch.cat([_of_tokens(own.hidden[i], own).flatten(0, -2) for i, _ in pairs])
    y = torch.cat([_of_tokens(told.hidden[j], own).flatten(0, -2) for _, j in pairs])
    second = x.mT @ x
    second.diagonal().add_(DAMPING * second.diagonal().mean())
    return torch.linalg.solve(second, x.mT @ y)


DAMPING = 1e-3
"""Of the second moments in :func:`first_projection`, as a share of their mean."""


def _related(own: Seen, told: Seen) -> Tensor:
    hidden = None
    if own.valid is not None:
        zero = torch.zeros((), dtype=wide(own.values[-1]).dtype, device=own.valid.device)
        hidden = torch.where(own.valid, zero, -torch.inf)[:, None, None]
    ours, theirs = wide(own.values[-1]), wide(told.values[-1])
    return _attended(own, told, -1, -1) + relation_loss(ours, theirs, hidden, own.valid)


def _attended(own: Seen, told: Seen, student: int, teacher: int) -> Tensor:
    ours, theirs = wide(own.weights[student]), wide(told.weights[teacher])
    if ours.shape[1] != theirs.shape[1]:
        raise Unsupported(
            f"attention weights of {ours.shape[1]} heads, to learn from {theirs.shape[1]}",
            supported="as many heads",
            nearest="kind=patient",
        )
    return attention_transfer_loss(ours, theirs, own.valid)


def _of_tokens(states: Tensor, own: Seen) -> Tensor:
    """The states of all tokens that are no padding, in at least float32."""
    states, valid = wide(states), own.valid
    return states if valid is None or states.shape[:2] != valid.shape else states[valid]


def _directed(states: Tensor, own: Seen) -> Tensor:
    """The states whose directions are compared, (M, C)."""
    if states.ndim != 3:
        raise Unsupported(
            f"kind=patient of hidden states of shape {tuple(states.shape)}",
            supported="a vector for each token",
            nearest="kind=features",
        )
    if not own.first:
        return _of_tokens(states, own).flatten(0, -2)
    if own.valid is None:
        return wide(states[:, 0])
    return wide(states[torch.arange(len(states), device=states.device), own.valid.int().argmax(1)])


def _note_padding(seen: Seen, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    context, mask = named.get("context"), named.get("attention_mask")
    if isinstance(context, Context):
        seen.valid = valid_tokens(context, given[0].shape[1])
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        seen.valid = mask.bool()


def _note_hidden(seen: Seen, module: nn.Module, given: Any, output: Any) -> None:
    output = getattr(output, "output", output)
    seen.hidden.append(output[0] if isinstance(output, tuple) else output)


def _note_weights(seen: Seen, module: nn.Module, given: Any, output: Any) -> None:
    weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if not isinstance(weights, Tensor):
        raise Unsupported(
            f"attention weights of {an_instance(module)}, which returns none",
            supported="softmax by transformers' attention interface",
            nearest="kind=features",
        )
    seen.weights.append(weights)


def _note_values(
    seen: Seen, attention: nn.Module, family: Family, module: nn.Module, given: Any, output: Tensor
) -> None:
    width = next(size for name in WIDTHS if (size := getattr(attention, name, None)))
    seen.values.append(family.values_in(output, width))


def _mix(
    seen: Seen, mix: Callable[..., Result], card: Mechanism, heads: Mapping[str, Tensor | None], **call: Any
) -> Result:
    want = call.pop("want", frozenset())
    result = mix(card, heads, want=want | {"weights"}, **call)
    values = heads["v"]
    assert values is not None  # all of SOFTMAX have values
    seen.values.append(values)
    seen.weights.append(result.extras["weights"] if "weights" in want else result.extras.pop("weights"))
    return result


def _reads_first(model: Any) -> bool:
    if comes_from_transformers(model):
        name = type(model).__name__
        return name.endswith("ForSequenceClassification") and any(
            hasattr(getattr(layer, "attention", None), "self") for layer in layers_of(model, "patient")
        )
    return isinstance(model, Encoder) and model.config.pool == "first"


def _mixers(model: nn.Module, layers: list[Any], kind: str) -> list[AttentionLayer]:
    """The attention layers of a model of regard, each once."""
    if not isinstance(model, LanguageModel | Encoder):
        raise _unread(model, kind, "whose attention is not read")
    changed = [option for option in OTHER_PASSES if option in model.config.stack.changed]
    if changed:
        raise _unread(model, kind, f"with {changed[0]} of its stack")
    found = dict.fromkeys(block.mixer for block in layers)
    for mixer in found:
        if not isinstance(mixer, AttentionLayer) or mixer.card.name not in SOFTMAX:
            name = mixer.card.name if isinstance(mixer, AttentionLayer) else an_instance(mixer)
            raise _unread(model, kind, f"which has a layer of {name}", f"layers of {', '.join(SOFTMAX)}")
        if getattr(mixer.config, "learn_sink", False):
            raise _unread(model, kind, "with sinks, so that the weights of a query do not sum to 1")
    return list(found)


def _attentions(model: Any, layers: list[nn.Module], kind: str) -> dict[nn.Module, tuple[nn.Module, Family]]:
    """The attention modules of a model of transformers, each once, with their projections to the values and families."""
    from regard.integrations.transformers.fused.decoders import SOFTMAX as KNOWN

    found: dict[nn.Module, tuple[nn.Module, Family]] = {}
    for layer in layers:
        modules = dict(layer.named_modules())
        families = [one for one in FAMILIES.values() if one.belongs(layer) and one.value in modules]
        if not families:
            raise _unread(model, kind, f"whose {type(layer).__name__} has no attention that is known")
        path = families[0].value
        attention: Any = modules[path.rpartition(".")[0]]
        attends = getattr(getattr(attention, "config", None), "_attn_implementation", None)
        if attends not in KNOWN:
            raise _unread(model, kind, f"whose layers attend by {attends or 'code of their own'}")
        if hasattr(attention, "sinks"):
            raise _unread(model, kind, "with sinks, so that the weights of a query do not sum to 1")
        found[attention] = modules[path], families[0]
    return found


def _unread(model: nn.Module, kind: str, why: str, supported: str = READABLE) -> Unsupported:
    return Unsupported(f"kind={kind} of {an_instance(model)} {why}", supported=supported, nearest="kind=features")


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Make a model of transformers attend by the code that returns the weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
