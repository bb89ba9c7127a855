r"""Stochastically subsampled attention (SSA): layers train on random subsets of the keys and use all at test time.

When to pick it: attention dominates the cost of training, or the model overfits; a model that should be its own
ensemble.
When not: for inference, which costs as much as softmax attention, or a model that underfits.

Definition (Hussain, Zaki and Subramanian, arXiv 2306.01705, section 4), with m = rho M of the M keys:

    O = softmax(tau Q K_{pi[:m]}^T + B_{:, pi[:m]}) V_{pi[:m]}    with pi drawn among all permutations of the keys (unbiased)

or, locally biased, with queries and permuted keys split into windows of w, where the queries of a window attend to the
keys of the same window:

    pi = argsort(j + sigma noise_j)

The softmax runs over the remaining keys; nothing is multiplied by 1 / rho. Masks, biases and positions are those of the
original places. Every layer and call draws anew; heads share a draw, and so do the sequences of a batch if none is
padded. sigma = 0 is attention in blocks, and an infinite sigma makes the windows unbiased samples. In causal-self the
query's own key is always added, so that no query is left without keys.

Training (section 4.3): most of it with rho < 1, then a short part with all keys, in which the many sub-networks
consolidate. `steps` and `finetune` schedule this by `context.progress`, the training step; or use :func:`subsampled`.
At test time the model is dense, or the mean of several random passes (:func:`ensemble_predict`).

| paper | here |
|---|---|
| rho, m / M | `ratio` |
| w, window of the locally biased form | `window`; round(rho N) when None |
| sigma, in places | `sigma`; the window when None |
| B | `bias` of the mask, or a position scheme |
| pathway | the computation of one pass of `subsampled(model)` |
| consolidation, fine-tuning | the last fraction `finetune` of `steps` |

Layout: (B, H, N, D); keys and values may have fewer heads. With padding m is rho times the number of valid keys in each
row. On a `grid` of two sides windows are squares of side `window`: keys are sorted by noisy rows into bands, and within
a band by noisy columns. `mode="bernoulli"` (source dropout of the authors' TGT, saves nothing) keeps each key of each
sequence with probability rho; `host_window` is attention in blocks, as in host models with windows, each of which is
subsampled.
State: every key and value, as in softmax attention; a subsampled step draws among the cached keys.
Deviations: the causal rule for the query's own key is not in the paper. The locally biased form needs whole sequences
in self patterns; kernels for edges of graphs are not implemented. The noise is normal unless `noise` is set. A key that
is not drawn gets no gradient in that layer. A model with ``stack={"checkpoint_layers": n}`` draws the same keys again
in the backward pass, also from a `generator`; under any other checkpointing the caller must restore a `generator`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import (
    ALL_PATTERNS,
    Call,
    Context,
    Cost,
    Kind,
    Mechanism,
    Paper,
    Pattern,
    Shape,
    Unsupported,
    Waiver,
    an_instance,
    at_least,
    one_of,
)
from regard.core.precision import wide
from regard.engines.attention import (
    attention_cost,
)
from regard.engines.cache import KeyValueState, absorb
from regard.mechanisms.stochastic_subsampling.definition import (
    MODES,
    NOISES,
    Config,
    _slots,
    draw_keys,
    reference,
)
from regard.mechanisms.stochastic_subsampling.forms import chunked, parallel, read, take

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def subsample(
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m v"],
    *,
    ratio: float = 0.25,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "b g kept d"], Float[Tensor, "b g kept v"], Int[Tensor, " kept"]]:
    """Return an unbiased sample of keys and values, in order and shared by sequences and heads, and its places."""
    config = Config(ratio=ratio)
    call = Call(Pattern.NONCAUSAL_CROSS, config, generator=generator)
    if k.shape[2] == 0:
        return k, v, torch.zeros(0, dtype=torch.long, device=k.device)
    places = torch.arange(k.shape[2], device=k.device)[None]
    slots = _slots(draw_keys(call, ratio, places, 1), ratio)
    return take(k, slots), take(v, slots), slots[0]


@contextmanager
def subsampled(model: nn.Module, ratio: float | None = None, **options: Any) -> Iterator[nn.Module]:
    """Within the block the model's subsampled layers also subsample in evaluation, or are dense with ``ratio=1``.

    Args:
        model: a model with layers of this mechanism, or of another library with this mechanism swapped in.
        ratio: ratio of all these layers; each layer's own when None.
        options: other options of :class:`Config` to change, such as ``mode``. Schedules are disabled.

    Raises:
        Unsupported: for a model without such layers.
    """
    layers: list[Any] = [m for m in model.modules() if getattr(getattr(m, "card", None), "name", "") == MECHANISM.name]
    if not layers:
        raise Unsupported(
            f"subsampling {an_instance(model)} without layers of {MECHANISM.name}",
            supported=f'create_layer("{MECHANISM.name}", ...), a plan with it, or regard.swap(model, "{MECHANISM.name}")',
        )
    changes = {"in_evaluation": True, "steps": None, "anneal": False, **options}
    if ratio is not None:
        changes["ratio"] = ratio
    before = [layer.config for layer in layers]
    after = [dataclasses.replace(config, **changes) for config in before]
    for layer, config in zip(layers, after, strict=True):
        layer.config = config
    try:
        yield model
    finally:
        for layer, config in zip(layers, before, strict=True):
            layer.config = config


@torch.no_grad()
def ensemble_predict(
    model: nn.Module,
    *inputs: Tensor,
    passes: int = 8,
    ratio: float | None = None,
    average: str = "probabilities",
    context: Context | None = None,
    **options: Any,
) -> Float[Tensor, "... classes"]:
    """Average the predictions of several subsampled passes, in evaluation mode.

    Args:
        model: called as ``model(*inputs, context=context)``, or as ``model(*inputs)`` if it is of another library with
            this mechanism swapped in; its output must be logits, or have them as `logits`.
        passes: number of random passes; each draws anew in every layer, from ``context.generator`` if there is one.
        ratio, options: as for :func:`subsampled`.
        average: ``probabilities``, or ``logits``.

    Returns:
        Mean probabilities, or mean logits, in at least float32.

    Raises:
        Unsupported: for a model without such layers, and for a `context` of one that takes none.
    """
    at_least("passes", passes, 1)
    one_of("average", average, ("probabilities", "logits"))
    taking = "context" in inspect.signature(model.forward).parameters
    if context is not None and not taking:
        raise Unsupported(
            f"a context for {an_instance(model)}, which takes none",
            supported="context=None",
            nearest="regard.integrations.collect_losses(model, generator=...) around the call",
        )
    given = {"context": Context() if context is None else context} if taking else {}
    training = [module for module in model.modules() if module.training]
    model.eval()
    total: Tensor | None = None
    try:
        with subsampled(model, ratio, **options):
            for _ in range(passes):
                answer = model(*inputs, **given)
                logits = wide(answer.output if taking else getattr(answer, "logits", answer))
                found = logits.softmax(-1) if average == "probabilities" else logits
                total = found if total is None else total + found
    finally:
        for module in training:
            module.training = True
    assert total is not None
    return total / passes


def cost(shape: Shape, config: Config) -> Cost:
    """Cost of evaluation, which is dense unless `in_evaluation` is set; then it costs as much as training."""
    keys: float = shape.m if config.host_window is None else config.host_window
    if config.in_evaluation and config.mode == "local":
        keys = (2 * config.neighbours + 1) * (config.ratio * shape.n if config.window is None else config.window)
    elif config.in_evaluation and config.mode == "unbiased":
        keys = config.ratio * keys
    return attention_cost(shape, max(1, round(keys)))


DRAWING = (
    "half",
    "Bernoulli",
    "a draw for each sequence",
    "local",
    "local, uniform",
    "local, laplace",
    "in windows",
)
"""Variants that also draw keys in evaluation."""


MECHANISM = Mechanism(
    name="stochastic_subsampling",
    aliases=("ssa", "ssa_sub", "stochastically_subsampled_attention", "information_pathways"),
    kind=Kind.ATTENTION,
    summary="In training each layer sees a random part of the keys, and at test time all of them.",
    paper=Paper("The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles", "2306.01705", 2023, 39),
    inputs={"q": "bhnd", "k": "bgmd", "v": "bgmv"},
    patterns=ALL_PATTERNS,
    forms={
        "reference": reference,
        "parallel": parallel,
        "chunked": chunked,
        "step": chunked,
        "absorb": absorb,
        "read": read,
    },
    config=Config,
    variants={
        "half": {"ratio": 0.5, "in_evaluation": True},
        "Bernoulli": {"mode": "bernoulli", "ratio": 0.5, "in_evaluation": True, "per_head": True},
        "a draw for each sequence": {"ratio": 0.5, "in_evaluation": True, "per_sample": True},
        "local": {"mode": "local", "window": 3, "sigma": 2.0, "neighbours": 1, "in_evaluation": True},
        "local, uniform": {"mode": "local", "noise": "uniform", "in_evaluation": True},
        "local, laplace": {"mode": "local", "noise": "laplace", "in_evaluation": True},
        "in windows": {"host_window": 5, "ratio": 0.5, "in_evaluation": True},
        "scheduled": {"steps": 100, "finetune": 0.2, "anneal": True},
    },
    variant_patterns={
        "local": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "local, uniform": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "local, laplace": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
        "in windows": (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF),
    },
    engine="attention",
    state=KeyValueState,
    cost=cost,
    honours=frozenset({"bias", "blocks", "dropout", "weights", "lse"}),
    weights="exact",
    accepts_positions=("none", "sinusoidal", "learned", "rotary", "alibi", "relative"),
    waivers=(
        *(
            Waiver(name, "keys are drawn for one call, of the length and the rows that it has", variants=DRAWING)
            for name in ("padding", "packing", "row_alone", "alignment", "pair_masks", "state", "memory")
        ),
        *(
            Waiver(name, "keys are drawn for one call, of the length and the rows that it has", variants=DRAWING)
            for name in ("layer_padding", "layer_packing", "layer_decoding")
        ),
    ),
)


__all__ = [
    "DRAWING",
    "MECHANISM",
    "MODES",
    "NOISES",
    "Config",
    "chunked",
    "cost",
    "ensemble_predict",
    "parallel",
    "read",
    "reference",
    "subsample",
    "subsampled",
]
