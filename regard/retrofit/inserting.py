"""Retrofits with a mechanism that inserts tokens, such as landmark, which changes the sequence that every layer reads.

transformers has no concept of inserted tokens, so the model becomes a language model of regard, which inserts them,
continues from a state that includes them, and drops them from its logits; for transformers it is a `RegardForCausalLM`.
Its layers have the original's weights, and an inserted token starts from the mean of the embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from regard.catalogue import get_mechanism
from regard.contract import Mechanism, TrainedModel, Unsupported, an_instance
from regard.models.from_transformers import TAKES_LAYERS, converted
from regard.models.variants import Variant, go_together, read_variant

if TYPE_CHECKING:
    from regard.retrofit.hosts import Host

USUAL = TrainedModel(length=2048, heads=8)
"""A model for which options are checked before the model is known."""

KEPT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_mechanism(written: str) -> Variant:
    """Read a mechanism as it is given for a trained model; see :func:`check_options`."""
    return read_variant(written, check_options)


def check_options(card: Mechanism, options: Mapping[str, Any]) -> None:
    """Raise Unsupported for options that go together neither alone nor with those that the card adds in trained models."""
    try:
        go_together(card, options)
    except Unsupported:
        if card.in_trained_models is None:
            raise
        go_together(card, {**card.in_trained_models(USUAL), **options})


def inserts_tokens(mechanism: str) -> bool:
    """Return whether a mechanism, the same for all layers, inserts tokens into the sequence."""
    layers = read_mechanism(mechanism).layers
    return len(layers) == 1 and get_mechanism(layers[0][0]).prepare is not None


def reads_any_length(mechanism: str) -> bool:
    """Return whether a mechanism reads texts of any length with a limited number of positions."""
    ((name, options),) = read_variant(mechanism).layers
    card = get_mechanism(name)
    return card.most_positions is not None and card.most_positions(card.options(**options)) is not None


def rebuilt(host: Host, numbers: Sequence[int], mechanism: str) -> tuple[Any, list[str]]:
    """Rebuild the host's model as one of regard with a mechanism in some layers, wrapped for transformers; also return
    the names of its new parameters.

    Raises:
        Unsupported: for a model that regard's layers cannot reproduce.
    """
    from regard.integrations.transformers import RegardConfig, RegardForCausalLM

    ((name, options),), config = read_variant(mechanism).layers, host.model.config
    layers = [(name, options) if layer.number in numbers else ("softmax", {}) for layer in host.layers]
    dtype = next(host.model.parameters()).dtype
    model, new = converted(
        config.to_dict(), host.model.state_dict(), dtype=dtype, layers=layers, source=an_instance(host.model)
    )
    settings = {f.name: getattr(model.config, f.name) for f in fields(model.config) if f.name != "vocab_size"}
    told: dict[str, Any] = {name: getattr(config, name, None) for name in KEPT_IDS}
    clothed = RegardForCausalLM(RegardConfig(model.config.vocab_size, settings=settings, **told)).to(dtype)
    clothed.model = model
    clothed.generation_config = copy.deepcopy(host.model.generation_config)
    return clothed, [f"model.{name}" for name in new]


def placed_in(model: Any, path: str, number: int) -> tuple[Mechanism, Any] | None:
    """A layer's mechanism and its options; None for a layer with the attention of a transformers model."""
    from regard.integrations.transformers import RegardForCausalLM

    if isinstance(model, RegardForCausalLM):
        mixer: Any = model.model.blocks[number].mixer
        return mixer.card, mixer.config
    attend = getattr(model.get_submodule(path), "regard", None)
    return None if attend is None else (attend.card, attend.config)


def reads_by_state(model: Any) -> bool:
    """Return whether texts are read with a state, as `generate` does, so that the mechanism selects from the past."""
    from regard.integrations.transformers import RegardForCausalLM

    return isinstance(model, RegardForCausalLM)


def check_settings(model: Any, mechanism: str, keep_layers: object, chosen: bool, train: str) -> None:
    """Raise Unsupported for models that cannot be rebuilt, options that the mechanism does not have, and settings that
    cannot work if every layer reads inserted tokens."""
    ((name, options),) = read_mechanism(mechanism).layers
    check_options(get_mechanism(name), options)
    if model.config.model_type not in TAKES_LAYERS:
        raise Unsupported(
            f"{name} in {an_instance(model)}: it inserts tokens, which transformers does not have, so the model would have to "
            "be rebuilt from regard's own layers",
            supported=f"{name} in models of type {', '.join(TAKES_LAYERS)}",
            nearest="core_context, which inserts nothing",
        )
    if chosen:
        raise Unsupported(
            f"keep_layers={keep_layers!r} with {mechanism}, whose inserted tokens every layer reads, so layers cannot be "
            "chosen by sensitivity",
            supported="none, or layers by number (they read inserted tokens as any others)",
            nearest="none",
        )
    if train != "all":
        raise Unsupported(
            f"train={train!r} with {mechanism}, whose inserted tokens all layers have to learn to read",
            supported="train='all'",
            nearest="train='all'",
        )
