"""Fewer tokens, or a cheaper cache of all of them, as a property of a model: set by a recipe, saved with its weights, and
set again on loading.

A record is ``{"method": name, "options": {...}}`` with values that no longer depend on data. Methods of `TRAINED` have
small networks of their own, whose weights are among the model's (:func:`add_choosers`).

| model | methods | what is removed |
|---|---|---|
| vision transformers of regard and timm | :data:`regard.compression.steps.IMAGES` | patches after blocks |
| the same | `TRAINED` | patches before blocks, as small trained networks choose |
| encoders of transformers with layers like BERT's | `TEXTS` | tokens after layers |
| causal language models of regard and transformers | `CACHES` | tokens of a prompt from the cache, before the next token is written; with ``quest`` tokens that a new one reads; with ``int8`` bits |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.compression.layers import Run, answers_of, comes_from_transformers
from regard.compression.pruning.anatomy import Undo
from regard.compression.sparse import METHODS as SPARSE
from regard.compression.sparse import at_compression, sparsely, sparsify
from regard.compression.sparse.catalogue import make
from regard.compression.steps import CACHES, IMAGES, KEEP, TEXTS, FewerTokens
from regard.compression.tokens.dynamic import DynamicTransformer
from regard.compression.tokens.interpreters import InterpretedTransformer
from regard.compression.tokens.reduction import ATTENDED, HOSTS, Reduction, blocks_of, reduce_tokens
from regard.compression.tokens.text import PrunedTokens, layers_of
from regard.compression.tokens.trained import ChoosingTransformer
from regard.contract import Context, Result, Unsupported, an_instance
from regard.models import LanguageModel
from regard.models.image_model import ImageModel

ATTRIBUTE = "_regard_tokens"
KINDS = {"image": IMAGES, "text": TEXTS, "cache": CACHES}
TRAINED: dict[str, type[ChoosingTransformer]] = {
    kind.method: kind for kind in (DynamicTransformer, InterpretedTransformer)
}
KNOWN = (
    "vision transformers (of regard and timm), encoders of transformers with layers as BERT's, causal "
    "language models of regard and transformers"
)
OPTIONS = {
    **dict.fromkeys(IMAGES, ("remove", "keep")),
    "power_bert": ("counts",),
    "ltp": ("thresholds",),
}


@dataclass(frozen=True)
class Applied:
    """The method that is active in a model."""

    record: dict[str, Any]
    undo: Undo
    at_work: Any


def kind_of(model: Any) -> str:
    """The kind of methods that a model supports: ``image``, ``text`` or ``cache``; raises Unsupported if none."""
    if getattr(model, ATTRIBUTE, None) is not None:
        raise Unsupported(
            "fewer tokens in a model that has fewer already", supported="one step `tokens`", nearest="undo()"
        )
    if isinstance(model, LanguageModel) or (comes_from_transformers(model) and model.can_generate()):
        try:
            with sparsely(model, "dense"):
                return "cache"
        except Unsupported as error:
            asked = f"tokens in the cache of {an_instance(model)}: {error.asked}"
            raise Unsupported(asked, supported=error.supported, nearest=error.nearest) from None
    if comes_from_transformers(model):
        layers_of(model)
        return "text"
    try:
        blocks_of(_backbone(model), class_token=False)
    except Unsupported as error:
        supported = KNOWN if error.supported == HOSTS else error.supported
        raise Unsupported(error.asked, supported=supported, nearest=error.nearest) from None
    return "image"


def settle(model: nn.Module, step: FewerTokens) -> str:
    """The method of a step for this model; raises Unsupported, naming the supported ones, for other methods."""
    kind = kind_of(model)
    method = step.named or KINDS[kind][0]
    if method not in KINDS[kind]:
        raise Unsupported(
            f"tokens by {method} in {an_instance(model)}",
            supported=", ".join(KINDS[kind]),
            nearest=f"tokens:method={KINDS[kind][0]}",
        )
    if kind == "image":
        blocks_of(_backbone(model), class_token=method in ATTENDED)
    if kind == "cache":
        try:
            sparsify(model, SPARSE[method]()).undo()
        except Unsupported as error:
            nearest = f"tokens:method={KINDS[kind][0]}"
            raise Unsupported(error.asked, supported=error.supported, nearest=nearest) from None
    return method


def record_of(model: nn.Module, step: FewerTokens, batches: Sequence[Any]) -> dict[str, Any]:
    """The record that :func:`put_on` applies to a model, with values computed for it.

    Args:
        batches: their length is the reference for the share of tokens: for texts the whole length, for caches the first
            half, which is the prompt in quality measurements (:class:`InTurn`).
    """
    method = settle(model, step)
    keep = KEEP if step.keep is None else step.keep
    options: dict[str, Any]
    if method in IMAGES:
        options = {"keep": keep} if step.remove is None else {"remove": step.remove}
    elif method == "ltp":
        layers = len(layers_of(model))
        assert step.threshold is not None
        options = {"thresholds": [step.threshold * (i + 1) / layers for i in range(layers)]}
    elif method == "power_bert":
        layers, n = len(layers_of(model)), _longest(batches)
        options = {"counts": [max(1, round(n * (1 - (1 - keep) * (i + 1) / layers))) for i in range(layers)]}
    elif step.sparse is not None:
        options = asdict(step.sparse)
    elif step.capacity is not None:
        options = asdict(at_compression(method, 2.0, 2 * step.capacity))
    else:
        options = asdict(at_compression(method, 1 / keep, _longest(batches) // 2))
    return {"method": method, "options": options}


def put_on(model: nn.Module, record: Mapping[str, Any], *, source: str = "a record") -> Applied:
    """Remove tokens in a model, in place, until :func:`take_off`.

    Args:
        record: from :func:`record_of`.
        source: where the record comes from, for error messages.

    Raises:
        Unsupported: for an invalid record, and a model of another kind.
    """
    method, options = record.get("method"), record.get("options")
    if not isinstance(method, str) or method not in {*IMAGES, *TEXTS, *CACHES} or not isinstance(options, Mapping):
        raise Unsupported(f"{source}, in which tokens are {dict(record)!r}", supported="a record of `regard compress`")
    at_work: Any
    if method in CACHES:
        at_work = sparsify(model, make(SPARSE[method], dict(options)))
    else:
        if not set(options) <= set(OPTIONS[method]):
            raise Unsupported(
                f"{source}, in which {method} has {', '.join(options)}", supported=", ".join(OPTIONS[method])
            )
        at_work = (
            reduce_tokens(_backbone(model), method, **options) if method in IMAGES else PrunedTokens(model, **options)
        )
    applied = Applied({"method": method, "options": dict(options)}, at_work.undo, at_work)
    setattr(model, ATTRIBUTE, applied)
    return applied


def add_choosers(model: nn.Module, record: Mapping[str, Any] | None, *, source: str = "a record") -> nn.Module:
    """The model with the small networks of a method of `TRAINED`, untrained: an ImageModel with another backbone, or the
    new module around a model of timm. For other records, the model as it is.

    Raises:
        Unsupported: for an invalid record, and a model of another kind.
    """
    kind = None if record is None else TRAINED.get(str(record.get("method")))
    if record is None or kind is None:
        return model
    try:
        choosing = kind(_backbone(model), **record["options"])
    except (KeyError, TypeError) as error:
        raise Unsupported(f"{source}, in which tokens are {dict(record)!r}", supported="a saved record") from error
    if not isinstance(model, ImageModel):
        return choosing
    model.backbone = choosing
    return model


def at_work_in(model: nn.Module) -> Reduction | ChoosingTransformer | None:
    """What leaves out patches in an image model, with the `tokens` of its last call; None if all tokens stay."""
    backbone, applied = _backbone(model), getattr(model, ATTRIBUTE, None)
    if isinstance(backbone, ChoosingTransformer):
        return backbone
    return applied.at_work if applied is not None and isinstance(applied.at_work, Reduction) else None


def take_off(model: nn.Module) -> None:
    """Let the model keep all tokens again."""
    applied = getattr(model, ATTRIBUTE, None)
    if applied is not None:
        applied.undo()
        delattr(model, ATTRIBUTE)


def tokens_record(model: nn.Module) -> dict[str, Any] | None:
    """The record of the active method of a model; None if all tokens stay."""
    applied = getattr(model, ATTRIBUTE, None)
    return getattr(model, "tokens_record", None) if applied is None else applied.record


@contextmanager
def all_tokens(model: nn.Module) -> Iterator[None]:
    """Let a model keep all its tokens within the context, unless it has learned which to keep."""
    applied = getattr(model, ATTRIBUTE, None)
    take_off(model)
    try:
        yield
    finally:
        if applied is not None:
            put_on(model, applied.record)


@torch.no_grad()
def let_go(model: nn.Module, step: FewerTokens, batches: Sequence[Any], run: Run) -> tuple[Undo, str]:
    """Do the recipe step ``tokens``; return a function that undoes it, and a sentence that says what was done.

    Raises:
        Unsupported: as in :func:`settle`, and for a model with outputs per token, some of which would be lost.
    """
    record = record_of(model, step, batches)
    before = answers_of(run(model, batches[0])) if batches else None
    expected = None if before is None else tuple(before.shape)
    if before is not None and record["method"] in TEXTS:
        _check_kept(model, before, lambda: answers_of(run(model, batches[0])))
    applied = put_on(model, record)
    try:
        found = _shape(run(model, batches[0])) if batches else None
        if found != expected:
            raise Unsupported(
                f"fewer tokens in {an_instance(model)} with one output per token: the shape changed from {expected} to {found}",
                supported="models with one answer for an input",
            )
    except BaseException:
        take_off(model)
        raise
    return lambda: take_off(model), _words(applied, bool(batches))


def _check_kept(model: nn.Module, expected: Tensor, answers: Callable[[], Tensor | None]) -> None:
    """Raise Unsupported if an encoder answers otherwise while only padding is dropped: its layers are not as BERT's."""
    everything = PrunedTokens(model, thresholds=[-1.0] * len(layers_of(model)))
    try:
        found = answers()
    finally:
        everything.undo()
    if (
        found is not None
        and found.shape == expected.shape
        and not torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    ):
        raise Unsupported(
            f"fewer tokens in {an_instance(model)}, whose answers change although all tokens but padding stay",
            supported="encoders of transformers with layers as BERT's",
        )


class InTurn(nn.Module):
    """A causal language model with a method for its cache, run in a way that makes this count: the first half of a
    sequence as the prompt, the rest token by token. It returns the model's outputs for every token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.config = model.config

    def forward(self, ids: Tensor, *, context: Any = None, **_: Any) -> Any:
        half = ids.shape[1] // 2
        parts = (ids[:, :half], ids[:, half:]) if half else (ids,)
        outputs: list[Tensor] = []
        state: Any = None
        if isinstance(self.model, LanguageModel):
            if context is not None and context.mask is not None:
                raise Unsupported("fewer tokens in a cache of padded sequences", supported="sequences of one length")
            for part in parts:
                found = self.model(part, state=state, context=Context(want=frozenset({"state"})))
                outputs.append(found.output)
                state = found.state
            return Result(torch.cat(outputs, 1))
        from transformers.modeling_outputs import CausalLMOutput

        from regard.integrations.transformers import CACHE

        for part in parts:
            found = self.model(part, **{CACHE: state}, use_cache=True)
            outputs.append(found.logits)
            state = getattr(found, CACHE)
        return CausalLMOutput(logits=torch.cat(outputs, 1))


def read_in_turn(model: nn.Module) -> nn.Module:
    """Wrap the model as :class:`InTurn` if it has a method for its cache."""
    record = tokens_record(model)
    return InTurn(model).eval() if record is not None and record["method"] in CACHES else model


def _words(applied: Applied, ran: bool) -> str:
    method, options, at_work = applied.record["method"], applied.record["options"], applied.at_work
    if method in CACHES:
        return f"{_cache_words(method, options)}. Quality is measured with the first half of a window as the prompt"
    if isinstance(at_work, Reduction):
        left = f": {_listed(at_work.counts)} tokens behind the blocks" if ran else ""
    else:
        left = f": {_listed([f'{n:.3g}' for n in at_work.kept])} tokens behind the layers, the mean of a batch"
    return f"fewer tokens by {method}{left}"


def _cache_words(method: str, options: Mapping[str, Any]) -> str:
    if "capacity" in options:
        return f"fewer tokens by {method}: of a prompt about {options['capacity']} stay in the cache of a layer"
    if "budget" in options:
        return (
            f"a new token reads about {options['budget'] + options['page']} tokens of the cache of a layer, by {method}"
        )
    return f"the cache of a layer is in 8 bits except for its newest tokens, {options['window']} or more of them"


def _listed(numbers: Sequence[Any]) -> str:
    return ", ".join(map(str, numbers))


def _longest(batches: Sequence[Any]) -> int:
    """Number of tokens of the longest input."""
    found = 0
    for batch in batches:
        if isinstance(batch, Mapping):
            ids = batch.get("input_ids")
        elif isinstance(batch, tuple | list):
            ids = batch[0]
        else:
            ids = getattr(batch, "inputs", batch)
        if isinstance(ids, Tensor) and ids.ndim >= 2:
            found = max(found, ids.shape[1])
    if not found:
        raise Unsupported("a share of tokens of data without tokens", supported="batches of ids (B, N), or input_ids")
    return found


def _shape(found: Any) -> Any:
    answers = answers_of(found)
    return None if answers is None else tuple(answers.shape)


def _backbone(model: Any) -> Any:
    return model.backbone if isinstance(model, ImageModel) else model
