"""Plans of layers from papers, for the `plan` of a model's config::

    config = LanguageModelConfig(
        vocab_size=256, plan=transnormer_plan(6, "T2"), norm="rms_nonparametric", tie_embeddings=True
    )
    config = LanguageModelConfig(vocab_size=256, plan=masformer_plan(12, "bottom:3", block=512))
    config = LanguageModelConfig(
        vocab_size=256, plan=tokenformer_plan(12, 256), norm="layer_nonparametric", tie_embeddings=True
    )

A plan is a list with (name, options) for each layer, to be changed as any list.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from regard.catalogue import get_mechanism
from regard.contract import Unsupported, at_least, one_of
from regard.mechanisms import differential, local, longformer
from regard.models.layer_plan import read_plan

TRANSNORMERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "T1": ({"activation": "relu"}, {"feature_map": "plain_elu"}),
    "T2": ({"activation": "softmax"}, {"feature_map": "elu"}),
}
"""Options of `diagonal` and of `norm_linear` in the two variants."""

COUNTED = "plans of softmax, local and longformer"

PLACES = ("bottom", "top", "middle", "spread")

GLU_ACTIVATIONS = {"identity": "bilinear", "silu": "swiglu"}
"""Feed-forward networks of TransNormer, by the activation of their gate."""


def transnormer_plan(
    num_layers: int,
    variant: str = "T2",
    *,
    block: int = 64,
    order: str = "diagonal_first",
    positions: str = "lrpe",
    glu_act: str | None = None,
) -> list[tuple[str, dict[str, Any]]]:
    """TransNormer (Qin et al., arXiv 2210.10340): floor(L / 2) layers of `diagonal`, the others of `norm_linear`.

    The paper's models have norms without parameters, of the embedding too (``norm="rms_nonparametric"``,
    ``embedding_norm="rms_nonparametric"``), networks of ``feed_forward=8 * dim // 3`` and, as language models, tied
    embeddings; the base size is dim=512, num_heads=8 and 6 layers.

    Args:
        num_layers: L, >= 1.
        variant: ``T1`` (relu and elu) or ``T2`` (softmax and 1 + elu).
        block: tokens a block of `diagonal`.
        order: ``diagonal_first``, ``norm_first`` or ``interleaved``, which begins with `diagonal`.
        positions: of every layer: ``lrpe``, ``rotary`` or ``none``.
        glu_act: of the authors' feed-forward networks, which have biases: ``identity``, as their code computes, or
            ``silu``, as their configs ask for (by a name that the code does not know). None for the networks of other
            models here, with a SiLU and without biases.

    Raises:
        Unsupported: for another variant, order or activation, or no layers.
    """
    at_least("num_layers", num_layers, 1)
    one_of("variant", variant, TRANSNORMERS)
    one_of("order", order, ("diagonal_first", "norm_first", "interleaved"))
    near, far = TRANSNORMERS[variant]
    network: dict[str, Any] = {}
    if glu_act is not None:
        one_of("glu_act", glu_act, GLU_ACTIVATIONS)
        network = {"feed_forward_kind": GLU_ACTIVATIONS[glu_act], "feed_forward_options": {"bias": True}}
    half = num_layers // 2
    diagonal = {
        "diagonal_first": range(half),
        "norm_first": range(num_layers - half, num_layers),
        "interleaved": range(0, 2 * half, 2),
    }[order]
    return [
        ("diagonal", {**near, "block": block, "positions": positions, **network})
        if layer in diagonal
        else ("norm_linear", {**far, "positions": positions, **network})
        for layer in range(num_layers)
    ]


def tokenformer_plan(
    num_layers: int,
    num_tokens: int,
    *,
    feed_forward_tokens: int | None = None,
    positions: str = "rotary",
    **options: Any,
) -> list[tuple[str, dict[str, Any]]]:
    """TokenFormer (Wang et al., arXiv 2410.23168): softmax attention and feed-forward networks of `token_parameter` alone.

    Query, key, value and output are projections with `num_tokens` parameter tokens each, the feed-forward network is one
    with more. The paper's models have norms without parameters (``norm="layer_nonparametric"``) and tied embeddings, so
    that there are 16 dim^2 parameters a layer with num_tokens=dim, and the embedding. Sizes (layers, dim = num_tokens,
    num_heads): 12, 768, 12 (150M); 24, 1024, 16 (450M); 32, 1280, 16 (900M); 40, 1536, 16 (1.5B).
    :func:`regard.training.grow` makes a trained one larger.

    Args:
        num_layers: layers, >= 1; values are drawn for this depth.
        num_tokens: parameter tokens of a projection, >= 1.
        feed_forward_tokens: of the feed-forward network; 4 num_tokens when None, 0 for layers without one, as those of
            the decoder_plan of an encoder-decoder.
        positions: of every layer. Rotary ones turn a quarter of each head's features, as in the paper; use ``none`` for
            cross layers.
        options: others of `token_parameter`: ``theta``, ``tau_mode``, ``top_k``, ``eps``.

    Raises:
        Unsupported: for no layers or tokens, or another option.
    """
    at_least("num_layers", num_layers, 1)
    more = 4 * num_tokens if feed_forward_tokens is None else feed_forward_tokens
    own = {"num_layers": num_layers, **options}
    projection = {**own, "num_tokens": num_tokens}
    layer: dict[str, Any] = {"linear": "token_parameter", "linear_options": projection, "positions": positions}
    if positions == "rotary":
        layer["position_options"] = {"fraction": 0.25}
    card = get_mechanism("token_parameter")
    card.options(**projection)
    if more == 0:
        layer["feed_forward"] = 0
    else:
        card.options(**own, num_tokens=more)
        network = {**own, "num_tokens": more}
        layer |= {"feed_forward_kind": "token_parameter", "feed_forward_options": network}
    return [("softmax", copy.deepcopy(layer)) for _ in range(num_layers)]


def differential_plan(num_layers: int, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    """Differential Transformer (Ye et al., arXiv 2410.05258): `differential`, with lambda_init by the depth of the layer.

    With the `num_heads` of a model of softmax attention it has as many parameters, but for a few: the paper's h counts
    pairs of heads.

    Args:
        num_layers: layers, >= 1.
        options: of every layer; a lambda_init among them is that of all.

    Raises:
        Unsupported: for no layers.
    """
    at_least("num_layers", num_layers, 1)
    return [
        ("differential", {"lambda_init": differential.depth_lambda(layer), **copy.deepcopy(options)})
        for layer in range(1, num_layers + 1)
    ]


def masformer_plan(
    num_layers: int,
    full_layers: str | Sequence[int],
    *,
    form: str = "block",
    block: int = 512,
    lookback: int = 1,
    window: int = 512,
    global_tokens: int = 0,
) -> list[tuple[str, dict[str, Any]]]:
    """MASFormer (Zhang et al., arXiv 2310.12442): full attention in a few layers, `local` attention in the others.

    The weights are those of a model with `softmax` in every layer, so a trained one loads into the mixed one, or becomes
    it by :func:`regard.models.change_plan`; for models from elsewhere :func:`regard.swap` does it, which takes the layers
    by the paths of their modules (and with ``only=`` those of one pattern)::

        swap(model, {"*.layers.[0-3].*": None, "*": ("local", {"form": "block", "block": 512})})

    Learned positions must be extended before inputs can be longer than those of training
    (:func:`regard.models.extend_positions`). The paper puts the full layers at the bottom and has 4 to 8 of 24. Full layers
    do not share one cache of keys and values: each projects its own input, and no layer reads another's state.

    Args:
        num_layers: layers, >= 1.
        full_layers: indices, or a place and a number: ``bottom:2`` (the first), ``top:2``, ``middle:2`` or ``spread:2``
            (evenly, the first layer among them).
        form, block, lookback, window: of `local`.
        global_tokens: first tokens that all others see in every layer, >= 0; where there are any, the other layers are
            `longformer` with the projections of all tokens for global ones too, and `form` must be ``window``.

    Raises:
        Unsupported: for layers that do not exist or another place, and for global tokens beside blocks.
    """
    at_least("num_layers", num_layers, 1)
    at_least("global_tokens", global_tokens, 0)
    full = _full_layers(num_layers, full_layers)
    name = "longformer" if global_tokens else "local"
    span: dict[str, Any]
    if global_tokens:
        if form != "window":
            raise Unsupported(
                f"global_tokens={global_tokens} with form={form!r}", supported="form='window'", nearest="form='window'"
            )
        span = {"window": window, "global_tokens": global_tokens, "separate_projections": False}
    elif form == "window":
        span = {"form": form, "window": window}
    else:
        span = {"form": form, "block": block, "lookback": lookback}
    get_mechanism(name).options(**span)
    return [("softmax", {}) if layer in full else (name, dict(span)) for layer in range(num_layers)]


def masformer_schedule(
    num_layers: int, full_layers: str | Sequence[int], steps: int, **options: Any
) -> list[tuple[int, list[tuple[str, dict[str, Any]]]]]:
    """Plans of a training that begins with full attention in every layer and ends with a :func:`masformer_plan`.

    Layers lose it one after the other from the top, evenly over the steps; of plans with the same step the last one holds::

        schedule = dict(masformer_schedule(12, "bottom:3", config.steps, block=512))

        def on_step(point):
            if point.step + 1 in schedule:
                change_plan(model, schedule[point.step + 1])

    Args:
        num_layers, full_layers, options: of the last plan.
        steps: of the training, >= 1.

    Returns:
        The first step of each plan, counted from 0, with the plan.
    """
    at_least("steps", steps, 1)
    last = [name for name, _ in masformer_plan(num_layers, full_layers, **options)]
    going = [layer for layer in reversed(range(num_layers)) if last[layer] != "softmax"]
    return [
        (
            count * steps // (len(going) + 1),
            masformer_plan(num_layers, sorted(set(range(num_layers)) - set(going[:count])), **options),
        )
        for count in range(len(going) + 1)
    ]


def _full_layers(num_layers: int, wanted: str | Sequence[int]) -> set[int]:
    if isinstance(wanted, str):
        place, _, digits = wanted.partition(":")
        count = int(digits) if digits.isdecimal() else -1
        if place not in PLACES or not 0 <= count <= num_layers:
            raise Unsupported(
                f"full_layers={wanted!r} of {num_layers}",
                supported=f"{', '.join(PLACES)} with a number of layers, or indices",
                nearest=f"full_layers='bottom:{max(1, num_layers // 4)}'",
            )
        start = {"bottom": 0, "top": num_layers - count, "middle": (num_layers - count) // 2, "spread": 0}[place]
        return {i * num_layers // count if place == "spread" else start + i for i in range(count)}
    outside = [layer for layer in wanted if not 0 <= layer < num_layers]
    if outside:
        raise Unsupported(f"full layers {outside} of {num_layers}", supported=f"indices from 0 to {num_layers - 1}")
    return set(wanted)


def attention_share(plan: Any, length: int) -> float:
    """Pairs of query and key that a plan of `softmax`, `local` and `longformer` layers computes on causal sequences of
    `length` tokens, as a share of those of as many `softmax` layers.

    Raises:
        Unsupported: for other mechanisms, which do not count pairs, or no tokens.
    """
    at_least("length", length, 1)
    layers = read_plan(plan, None)
    everything = length * (length + 1) // 2
    computed = 0.0
    for name, options in layers:
        card = get_mechanism(name)
        if card.name not in ("softmax", "local", "longformer"):
            raise Unsupported(f"the pairs of {card.name}", supported=COUNTED)
        own = {option: value for option, value in options.items() if option in card.config.__dataclass_fields__}  # type: ignore[attr-defined]
        config = card.options(**own)
        if card.name == "softmax" and config.window is not None:
            raise Unsupported("the pairs of softmax with a window", supported=COUNTED)
        if card.name == "softmax":
            computed += everything
        else:
            computed += (local if card.name == "local" else longformer).visible_pairs(config, length)
    return computed / (len(layers) * everything)
