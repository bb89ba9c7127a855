"""Layer plans from papers, for the `plan` of a model's config::

    config = LanguageModelConfig(
        vocab_size=256, plan=transnormer_plan(6, "T2"), norm="rms_nonparametric", tie_embeddings=True
    )
    config = LanguageModelConfig(vocab_size=256, plan=masformer_plan(12, "bottom:3", block=512))
    config = LanguageModelConfig(
        vocab_size=256, plan=tokenformer_plan(12, 256), norm="layer_nonparametric", tie_embeddings=True
    )

A plan is a list with (name, options) for each layer, and can be changed like any list.
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
"""Options of `diagonal` and `norm_linear` in the two variants."""

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
    """TransNormer (Qin et al., arXiv 2210.10340): floor(L / 2) layers of `diagonal`, the rest of `norm_linear`.

    The paper's models have norms without parameters, including one of the embedding (``norm="rms_nonparametric"``,
    ``embedding_norm="rms_nonparametric"``), ``feed_forward=8 * dim // 3`` and, as language models, tied embeddings; the
    base size has dim=512, num_heads=8 and 6 layers.

    Args:
        num_layers: L, >= 1.
        variant: ``T1`` (relu and elu) or ``T2`` (softmax and 1 + elu).
        block: tokens per block of `diagonal`.
        order: ``diagonal_first``, ``norm_first`` or ``interleaved``, which begins with `diagonal`.
        positions: the scheme of every layer: ``lrpe``, ``rotary`` or ``none``.
        glu_act: gate activation of the authors' feed-forward networks, which have biases: ``identity``, as their code
            computes, or ``silu``, as their configs ask for (by a name that their code does not recognise). None for
            regard's usual networks, with SiLU and without biases.

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
    """TokenFormer (Wang et al., arXiv 2410.23168): softmax attention whose projections are all `token_parameter`.

    Query, key, value and output are projections with `num_tokens` parameter tokens each; the feed-forward network is
    another such projection with more tokens. The paper's models have norms without parameters
    (``norm="layer_nonparametric"``) and tied embeddings; with num_tokens=dim this gives 16 dim^2 parameters per layer,
    plus the embedding. Sizes (layers, dim = num_tokens, num_heads): 12, 768, 12 (150M); 24, 1024, 16 (450M); 32, 1280,
    16 (900M); 40, 1536, 16 (1.5B). :func:`regard.training.grow` enlarges a trained model.

    Args:
        num_layers: number of layers, >= 1; the initial values depend on it.
        num_tokens: parameter tokens of a projection, >= 1.
        feed_forward_tokens: parameter tokens of the feed-forward network; 4 num_tokens when None, 0 for layers without
            one, as in the decoder_plan of an encoder-decoder.
        positions: the scheme of every layer. ``rotary`` rotates a quarter of each head's features, as in the paper; use
            ``none`` for cross layers.
        options: other options of `token_parameter`: ``theta``, ``tau_mode``, ``top_k``, ``eps``.

    Raises:
        Unsupported: for no layers or tokens, or an unknown option.
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
    """Differential Transformer (Ye et al., arXiv 2410.05258): `differential`, with a lambda_init that depends on depth.

    With the same `num_heads` as a softmax model it has nearly as many parameters: the paper's h counts pairs of heads.

    Args:
        num_layers: layers, >= 1.
        options: options of every layer; a lambda_init among them applies to all layers.

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
    """MASFormer (Zhang et al., arXiv 2310.12442): full attention in a few layers, `local` attention in the rest.

    The weights are those of a model with `softmax` in every layer, so the weights of such a model can be loaded into
    the mixed one, or it can be converted by :func:`regard.models.change_plan`. Models from other libraries are
    converted by :func:`regard.swap`, which selects layers by their module paths (and with ``only=`` by their pattern)::

        swap(model, {"*.layers.[0-3].*": None, "*": ("local", {"form": "block", "block": 512})})

    Learned positions must be extended before inputs can be longer than in training
    (:func:`regard.models.extend_positions`). The paper puts the full layers at the bottom and has 4 to 8 of 24. Full
    layers do not share a KV cache: each projects its own input, and no layer reads another's state.

    Args:
        num_layers: layers, >= 1.
        full_layers: indices, or a place and a number: ``bottom:2`` (the first two), ``top:2``, ``middle:2`` or
            ``spread:2`` (evenly, including the first layer).
        form, block, lookback, window: options of `local`.
        global_tokens: number of first tokens that all tokens attend to in every layer, >= 0. If > 0, the layers without
            full attention are `longformer`, without separate projections for global tokens, and `form` must be
            ``window``.

    Raises:
        Unsupported: for layers that do not exist, an unknown place, and global tokens with another form than
            ``window``.
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
    """A schedule of plans that begins with full attention in every layer and ends with a :func:`masformer_plan`.

    Layers lose full attention one by one from the top, evenly over the steps. If several plans have the same step, the
    last one counts::

        schedule = dict(masformer_schedule(12, "bottom:3", config.steps, block=512))

        def on_step(point):
            if point.step + 1 in schedule:
                change_plan(model, schedule[point.step + 1])

    Args:
        num_layers, full_layers, options: arguments of the last plan.
        steps: number of training steps, >= 1.

    Returns:
        Pairs of each plan's first step, counted from 0, and the plan.
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


def layers_at(place: str, count: int, num_layers: int) -> list[int]:
    """The numbers of `count` of `num_layers` layers at one of :data:`PLACES`, as in :func:`masformer_plan`."""
    start = {"bottom": 0, "top": num_layers - count, "middle": (num_layers - count) // 2, "spread": 0}[place]
    return [i * num_layers // count if place == "spread" else start + i for i in range(count)]


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
        return set(layers_at(place, count, num_layers))
    outside = [layer for layer in wanted if not 0 <= layer < num_layers]
    if outside:
        raise Unsupported(f"full layers {outside} of {num_layers}", supported=f"indices from 0 to {num_layers - 1}")
    return set(wanted)


def attention_share(plan: Any, length: int) -> float:
    """Return the share of full causal attention's query-key pairs that a plan computes on sequences of `length` tokens.

    The plan may have `softmax`, `local` and `longformer` layers; the full pairs are those of as many `softmax` layers.

    Raises:
        Unsupported: for other mechanisms, whose pairs are not counted, or ``length < 1``.
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
